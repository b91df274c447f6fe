"""`import pvdm_fast` is quick, and loads neither Triton nor the large libraries.

What counts is CPU time: a machine that is busy with something else makes no import slow.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys, time, torch
before = set(sys.modules)
started = time.process_time()
import pvdm_fast
from pvdm_fast import TriplaneLayout, use_backend
print(time.process_time() - started)
print(*sorted(name for name in set(sys.modules) - before if "." not in name))
"""


def test_import_is_quick() -> None:
    for _ in range(3):  # the first try may compile to bytecode
        result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        time, modules = result.stdout.splitlines()
        assert not {"triton", "diffusers", "accelerate", "av", "matplotlib"} & set(modules.split())
        if float(time) < 0.2:
            return
    pytest.fail(f"import pvdm_fast took {time} s of CPU time after torch was imported")
