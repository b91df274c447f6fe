"""Builds attention in the instruction set amx for CPUs without it: csrc/emulation computes what tiles would."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

import build_tools

ROOT = Path(__file__).resolve().parents[3]

STAND_IN = "-DPVDM_AMX_STAND_IN"


def skip_where_it_cannot_run(isas: Sequence[str]) -> None:
    """Skips a test and says why. isas: the instruction sets of this CPU."""
    if "avx512bf16" not in isas:
        pytest.skip("only the tiles have a stand-in: run on a CPU with AVX512-BF16")
    if "amx" not in build_tools.isa_flags():
        pytest.skip("needs an assembler that knows AMX: install binutils 2.36 or newer")


def build(folder: Path, flags: tuple[str, ...] = ()) -> Path:
    """Builds the extension `_tiles` (tiles.cpp next to this file) with `flags`, and returns its path.

    amx itself is compiled as for users. Of other sets there is only what amx borrows, or what the choice of a set
    names, without optimisation.
    """
    include = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
    sets = {isa: flags_of for isa, flags_of in build_tools.isa_flags().items() if isa in ("plain", "avx512bf16", "amx")}
    extension = build_tools.cpu_extension(folder / f"_tiles{sysconfig.get_config_var('EXT_SUFFIX')}", include, sets)
    extension.link += " " + " ".join(flags)
    added = f"{STAND_IN} {' '.join(flags)}"
    kept = {
        name: (source, rule, f"{flags_of} {added} {'' if name.endswith('_amx') else '-O0'}")
        for name, (source, rule, flags_of) in extension.objects.items()
        if name.startswith(("runtime_", "attention_"))
    }
    tiles = f"{include} {added} -O1 -ftree-vectorize -mavx512f -mfma {build_tools.isa_defines(list(sets))}"
    extension.objects = {"tiles": (Path(__file__).with_name("tiles.cpp"), "cxx", tiles), **kept}
    build_tools.run_ninja(extension, folder / "objects")
    return extension.output


def run_apart(module: ModuleType, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a separate process, with that extension as `module`."""
    load = (
        "from pathlib import Path; from backends.cuda import emulated;"
        f"module = emulated.load(Path({module.__file__!r}))"
    )
    path = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
    environment = {**os.environ, **variables, "PYTHONPATH": path}
    command = [sys.executable, "-c", f"{load}; {code}"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
