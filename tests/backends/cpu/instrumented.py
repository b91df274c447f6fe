"""Builds the CPU extension for a sanitizer."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pybind11

import build_tools


def build(folder: Path, isas: Sequence[str], flags: tuple[str, ...], *extra: Path) -> Path:
    """Builds the extension with `flags` and the sources `extra`, and returns its path.

    It has the instruction sets `isas`, the plain one, which the choice of a set names, and what amx borrows. The
    bindings, and the sets that `isas` doesn't name, are compiled without `flags`, because that would take long.
    """
    include = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
    wanted = {"plain", *isas, *(["avx512bf16"] if "amx" in isas else [])}
    sets = {isa: flags_of for isa, flags_of in build_tools.isa_flags().items() if isa in wanted}
    output = folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    extension = build_tools.cpu_extension(output, include, sets)
    extension.link += " " + " ".join(flags)
    others = (*(f"_{isa}" for isa in sets if isa not in isas), "bindings_cpu")
    instrumented = f"-O1 -g {' '.join(flags)}"
    extension.objects = {
        name: (source, rule, f"{flags_of} {'-O0' if name.endswith(others) else instrumented}")
        for name, (source, rule, flags_of) in extension.objects.items()
    } | {path.stem: (path, "cxx", instrumented) for path in extra}
    build_tools.run_ninja(extension, folder / "objects")
    return extension.output
