"""Compiles the C++ and CUDA sources that tests need, each thing once: for all processes of a run, and for later runs.

Builds stay in pytest's cache folder, under a name with a hash of everything that they are made from. So a change of any
source, flag, compiler or version builds again, and `pytest --cache-clear` removes everything.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


class Builds:
    """The folder of builds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, build: Callable[[Path], Path], *facts: object) -> Path:
        """The path that `build(folder)` returns. It gets a new folder, and runs only if there is no such build yet.

        facts: what the build depends on besides the sources, above all flags.
        """
        if shutil.which("g++") is None:
            pytest.skip("needs a C++ compiler: install g++")
        target = self.folder / f"{name}-{_fingerprint(*map(str, facts))}"
        done = target / "done"  # holds the path, and is written last
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                for old in self.folder.glob(f"{name}-*"):  # of other sources, or interrupted
                    shutil.rmtree(old)
                target.mkdir()
                built = build(target)
                done.write_text(str(built.relative_to(target)))
            return target / done.read_text()


def _fingerprint(*facts: str) -> str:
    return hashlib.sha256("\n".join([_sources(), *facts]).encode()).hexdigest()[:16]


@cache
def _sources() -> str:
    """Hashes of all sources and helpers that builds here use, of the compiler and of the versions."""
    helpers = [path for suffix in ("py", "cpp", "cu") for path in HERE.glob(f"c*/*.{suffix}")]
    helpers = [path for path in helpers if not path.name.startswith("test_")]
    files = [*(ROOT / "csrc").rglob("*.*"), ROOT / "build_tools.py", *helpers]
    hashes = [f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sorted(files) if path.is_file()]
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    versions = [compiler, sys.version, pybind11.__version__, str(sysconfig.get_config_var("EXT_SUFFIX"))]
    return "\n".join([*hashes, *versions, os.environ.get("CXX", ""), os.environ.get("CXXFLAGS", "")])
