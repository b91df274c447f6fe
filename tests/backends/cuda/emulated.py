"""Builds the CUDA kernels for the host, with csrc/emulation, as a module that replaces `pvdm_fast._cuda`."""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

from pvdm_fast.backends import choice
from pvdm_fast.backends.cuda import attention, plane_norm, triplane_expand, triplane_project, triplane_slice

ROOT = Path(__file__).resolve().parents[3]
CUDA_SOURCES = tuple(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
KERNELS = (ROOT / "csrc" / "bindings_cuda.cpp", *CUDA_SOURCES)
BACKEND = "cuda-emulated"


def compile_for_host(output: Path, flags: tuple[str, ...], sources: tuple[Path, ...]) -> Path:
    """Compile .cu files (and others) with g++, and link them to `output`."""
    lines = ["-g"] if "-fsanitize" in " ".join(flags) else []  # sanitizers print line numbers
    command = ["g++", "-std=c++17", "-pthread", "-O1", *lines, "-DPVDM_EMULATE", "-DPVDM_ABI=0"]
    command += [f"-I{ROOT / 'csrc'}", *flags]
    command += ["-Wno-unknown-pragmas", "-x", "c++", *map(str, sources), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return output


def build(
    folder: Path, flags: tuple[str, ...] = (), sources: tuple[Path, ...] = KERNELS, name: str = "_emulated"
) -> Path:
    """Compile the CUDA kernels and their bindings, or other `sources`, as a Python extension; returns its path."""
    module = ("-fPIC", "-shared", "-fvisibility=hidden", f"-I{pybind11.get_include()}")
    module += (f"-I{sysconfig.get_paths()['include']}", *flags)
    return compile_for_host(folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}", module, sources)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def replace_device(patch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Replace `pvdm_fast._cuda` by the stand-in, with the host as its device."""
    for launcher in (attention, plane_norm, triplane_expand, triplane_project, triplane_slice):
        patch.setattr(launcher, "extension", lambda name: module)
        patch.setattr(launcher, "launch_target", lambda tensor: (0, 0))


@contextmanager
def registered(module: ModuleType) -> Iterator[None]:
    """In this block "cuda-emulated" is a backend for tensors on the CPU: the launchers of "cuda" with the stand-in.

    You can ask for it with `use_backend("cuda-emulated")`. Automatic choice takes it if possible, otherwise the
    reference.
    """
    unavailable, serves = choice.unavailable, choice.serves
    with pytest.MonkeyPatch.context() as patch:
        replace_device(patch, module)
        patch.setattr(choice, "BACKENDS", (*choice.BACKENDS, BACKEND))
        patch.setattr(choice, "unavailable", lambda name: None if name == BACKEND else unavailable(name))
        # Who asks whether "cuda" serves (`fuses_projection`) hears of this one.
        patch.setattr(choice, "serves", lambda name, *rest: serves(BACKEND if name == "cuda" else name, *rest))
        patch.setitem(choice.PACKAGE, BACKEND, choice.PACKAGE["cuda"])
        patch.setitem(choice.SERVED, BACKEND, choice.SERVED["cuda"])
        patch.setitem(choice.DEVICE, BACKEND, "cpu")
        patch.setitem(choice.PREFERENCE, "cpu", (BACKEND, "reference"))
        choice.ranking.cache_clear()
        yield
    choice.ranking.cache_clear()
