"""Builds pvdm_fast._cpu with the C++ compiler, and pvdm_fast._cuda if nvcc is found.

Both extensions are optional. If one can't be built, installation continues, and one line says why. The same facts go to
pvdm_fast/_build_info.json, which `python -m pvdm_fast.info` shows. Set PVDM_FAST_BUILD_CUDA=0 to leave out CUDA.
Everything else is in pyproject.toml.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build_tools


def python_flags() -> str:
    import pybind11

    return build_tools.python_flags(pybind11.get_include())


def build_cpu(output: Path, folder: Path) -> dict[str, Any]:
    build_tools.run_ninja(build_tools.cpu_extension(output, python_flags()), folder)
    compiler = build_tools.compiler()
    version = build_tools.first_line([*shlex.split(compiler), "--version"])
    return {"compiler": version, "targets": list(build_tools.isa_flags())}


def build_cuda(output: Path, folder: Path) -> dict[str, Any]:
    if os.environ.get("PVDM_FAST_BUILD_CUDA", "1") == "0":
        raise build_tools.Unbuildable("PVDM_FAST_BUILD_CUDA=0 was set: unset it and install again")
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(build_tools.CUDA_TARGETS)
    extension, toolkit, facts = build_tools.plan_cuda(output, python_flags(), asked)
    build_tools.run_ninja(extension, folder, toolkit.nvcc)
    return facts


class BuildNative(build_ext):
    """Gives both extensions to ninja. A failure is recorded, not raised."""

    builders = {"pvdm_fast._cpu": build_cpu, "pvdm_fast._cuda": build_cuda}  # noqa: RUF012

    def run(self) -> None:
        self.facts: dict[str, Any] = {"python": sys.version.split()[0], "abi": build_tools.abi()}
        in_place = self.inplace
        super().run()
        package = build_tools.ROOT / "pvdm_fast" if in_place else Path(self.build_lib) / "pvdm_fast"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(self.facts, indent=1) + "\n")

    def build_extension(self, ext: Extension) -> None:
        short = ext.name.rpartition(".")[2]
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        stale = build_tools.ROOT / "pvdm_fast" / output.name
        folder = build_tools.ROOT / "build" / f"{sys.implementation.cache_tag}{short}"
        try:
            self.facts[short] = {"built": True, **self.builders[ext.name](output, folder)}
            print(f"pvdm_fast: built {short} for {', '.join(self.facts[short]['targets'])}", file=sys.stderr)
        except build_tools.Unbuildable as reason:
            for path in (output, stale) if self.editable_mode or self.inplace else (output,):
                path.unlink(missing_ok=True)
            self.facts[short] = {"built": False, "reason": str(reason)}
            print(f"pvdm_fast: left out {short}: {reason}. Everything else works.", file=sys.stderr)


setup(
    packages=[*find_packages(include=["pvdm_fast", "pvdm_fast.*"]), "pvdm_fast.kernels"],
    ext_modules=[Extension(name, sources=[], optional=True) for name in BuildNative.builders],
    cmdclass={"build_ext": BuildNative},
)
