"""Every CUDA kernel on the host stand-in under the sanitizers: addresses, and races between threads and blocks."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from backends.cuda import emulated
from backends.cuda.sanitizers import FLAGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizers are Linux's"),
]
PROGRAM = (Path(__file__).with_name("all_kernels.cpp"), *emulated.CUDA_SOURCES)


def run(*command: str) -> None:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-6000:]
    assert "every kernel ran" in result.stdout


def test_addresses(tmp_path: Path) -> None:
    """Every access stays inside its tensor, workspace or shared memory (AddressSanitizer, and UBSan)."""
    run(str(emulated.compile_for_host(tmp_path / "program", FLAGS, PROGRAM)))


def test_races(tmp_path: Path) -> None:
    """No two threads of a block without a barrier between, and no two blocks, meet at one address (ThreadSanitizer)."""
    if subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False).returncode:
        pytest.skip("ThreadSanitizer needs setarch -R, which this system refuses")
    run("setarch", "-R", str(emulated.compile_for_host(tmp_path / "program", ("-fsanitize=thread",), PROGRAM)))
