"""Running a script with AddressSanitizer and UndefinedBehaviorSanitizer preloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def run_sanitized(script: Path, *arguments: Path) -> None:
    """Fails on any report. Leaks are Python's own and not looked for."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        # The tests and this checkout, which need not be the one that is installed.
        "PYTHONPATH": os.pathsep.join(str(Path(__file__).resolve().parents[up]) for up in (1, 2)),
    }
    command = [sys.executable, str(script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    assert "clean" in result.stdout
