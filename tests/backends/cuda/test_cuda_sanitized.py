"""Every CUDA kernel on the host stand-in under the sanitizers: addresses, and races between threads and blocks."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from backends.builds import Builds
from backends.cuda import emulated
from backends.cuda.sanitizers import FLAGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: install g++"),
    pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizers are Linux's: run on Linux"),
]
PROGRAM = (Path(__file__).with_name("all_kernels.cpp"), *emulated.CUDA_SOURCES)


def run(*command: str) -> None:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-6000:]
    assert "every kernel ran" in result.stdout


def program(builds: Builds, *flags: str) -> str:
    def build(folder: Path) -> Path:
        return emulated.compile_for_host(folder / "program", flags, PROGRAM)

    return str(builds.get("all_kernels" + flags[0].partition("=")[2].replace(",", "_"), build, *flags))


@pytest.mark.exhaustive
def test_addresses(builds: Builds) -> None:
    """Every access stays inside its tensor, workspace or shared memory (AddressSanitizer and UBSan)."""
    run(program(builds, *FLAGS))


@pytest.mark.exhaustive  # takes three minutes; every change of a kernel runs it
def test_races(builds: Builds) -> None:
    """Two threads of a block without a barrier in between, or two blocks, never touch one address
    (ThreadSanitizer)."""
    if subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False).returncode:
        pytest.skip("ThreadSanitizer needs `setarch -R`, which this system refuses: run where it is allowed")
    run("setarch", "-R", program(builds, "-fsanitize=thread"))
