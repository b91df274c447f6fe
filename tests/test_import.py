"""`import pvdm_fast` is quick, and loads neither Triton nor the large libraries."""

from __future__ import annotations

import statistics
import subprocess
import sys

CODE = """
import sys, time, torch
before = set(sys.modules)
started = time.perf_counter()
import pvdm_fast
from pvdm_fast import TriplaneLayout, use_backend
print(time.perf_counter() - started)
print(*sorted(name for name in set(sys.modules) - before if "." not in name))
"""


def test_import_is_quick() -> None:
    seconds = []
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        time, modules = result.stdout.splitlines()
        seconds.append(float(time))
        assert not {"triton", "diffusers", "accelerate", "av", "matplotlib"} & set(modules.split())
    assert statistics.median(seconds) < 0.2
