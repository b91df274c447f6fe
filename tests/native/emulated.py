"""Builds the CUDA kernels for the host, against csrc/emulation, as a module that stands in for `pvdm_fast._cuda`."""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

from pvdm_fast.native.cuda import attention, plane_norm, triplane_expand, triplane_slice

ROOT = Path(__file__).resolve().parents[2]


KERNELS = (ROOT / "csrc" / "bindings_cuda.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu")))


def build(
    folder: Path, flags: tuple[str, ...] = (), sources: tuple[Path, ...] = KERNELS, name: str = "_emulated"
) -> Path:
    """Compile the CUDA kernels and their bindings, or other `sources`, with g++; returns the extension's path."""
    output = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [
        "g++",
        "-std=c++17",
        "-pthread",
        "-O1",
        "-g",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-DPVDM_EMULATE",
        *flags,
    ]
    command += [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    command += ["-Wno-unknown-pragmas", "-x", "c++", *map(str, sources), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return output


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def replace_device(patch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Put the stand-in in the place of `pvdm_fast._cuda`, with the host as its device."""
    for launcher in (attention, plane_norm, triplane_expand, triplane_slice):
        patch.setattr(launcher, "extension", lambda name: module)
        patch.setattr(launcher, "place", lambda tensor: (0, 0))
