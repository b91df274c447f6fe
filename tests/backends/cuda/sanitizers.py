"""Runs a script with one of g++'s sanitizers preloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
# ThreadSanitizer doesn't see the barriers in the OpenMP library, so the runtime uses std::thread instead.
THREAD_FLAGS = ("-fsanitize=thread", "-DPVDM_PARALLEL_STD_THREAD")
RACE = 66  # exit code


def _environment(libraries: tuple[str, ...], **variables: str) -> dict[str, str]:
    paths = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in libraries
    ]
    return {
        **os.environ,
        **variables,
        "LD_PRELOAD": ":".join(paths),
        # The tests and this checkout, which need not be the installed one.
        "PYTHONPATH": os.pathsep.join(str(Path(__file__).resolve().parents[up]) for up in (2, 3)),
    }


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _check_clean(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    assert "clean" in result.stdout


def run_sanitized(script: Path, *arguments: object) -> None:
    """Runs under AddressSanitizer and UBSan. Any report is a failure. Leaks are Python's own and aren't checked."""
    # The sanitizer's signal stack is too small for the state of AMX tiles, and Linux then refuses the tiles.
    options = "detect_leaks=0:use_sigaltstack=0"
    environment = _environment(("libasan.so", "libubsan.so", "libstdc++.so"), ASAN_OPTIONS=options)
    _check_clean(_run([sys.executable, str(script), *map(str, arguments)], environment))


def thread_sanitizer() -> tuple[list[str], dict[str, str]]:
    """What to put before a command so that it runs under ThreadSanitizer, and its environment.

    The exit code is `RACE` if a race is reported. If ThreadSanitizer can't run, the test is skipped with the reason.
    """
    environment = _environment(("libtsan.so", "libstdc++.so"), TSAN_OPTIONS=f"exitcode={RACE}")
    if not Path(environment["LD_PRELOAD"].partition(":")[0]).is_file():
        pytest.skip("g++ has no libtsan here: install GCC's libtsan")
    # Its shadow memory needs fixed addresses. If the kernel's address randomisation may take them, it is turned off.
    prefixes = [[], ["setarch", "-R"]] if shutil.which("setarch") else [[]]
    for prefix in prefixes:
        probe = _run([*prefix, sys.executable, "-c", "print('works')"], environment)
        if probe.stdout == "works\n":
            return prefix, environment
    pytest.skip(f"ThreadSanitizer does not run here: run where `setarch -R` works ({probe.stderr.strip()[:200]})")


def run_thread_sanitized(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    prefix, environment = thread_sanitizer()
    return _run([*prefix, sys.executable, str(script), *map(str, arguments)], environment)
