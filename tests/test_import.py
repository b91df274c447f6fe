"""`import pvdm_fast` is fast, and loads neither Triton nor the large libraries.

CPU time counts, so a busy machine doesn't make imports slow.
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


@pytest.mark.slow
def test_import_is_quick() -> None:
    for _ in range(3):  # the first try may compile bytecode
        result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        time, modules = result.stdout.splitlines()
        assert not {"triton", "diffusers", "accelerate", "av", "matplotlib"} & set(modules.split())
        if float(time) < 0.2:
            return
    pytest.fail(f"import pvdm_fast took {time} s of CPU time after torch was imported")


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports", ["import pvdm_fast, torch", "import torch, pvdm_fast", "import pvdm_fast.ops, torch"]
)
def test_operations_after_the_import_alone(imports: str) -> None:
    """In either order. An unknown name is an AttributeError, as in every namespace."""
    code = f"""
{imports}
assert not hasattr(torch.ops.pvdm_fast, "nonsense")
assert torch.ops.pvdm_fast.geglu(torch.ones(2, 4), "auto").shape == (2, 2)
assert type(torch.ops.pvdm_fast) is type(torch.ops.aten)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "command", ["train", "sample", "distill", "evaluate", "encode", "estimate", "convert", "info", "selftest", "tune"]
)
def test_help_is_quick(command: str) -> None:
    """Every command's --help, without importing torch."""
    code = f"""
import runpy, sys
sys.argv = ["pvdm_fast.{command}", "--help"]
try:
    runpy.run_module("pvdm_fast.{command}", run_name="__main__")
except SystemExit as end:
    print("torch" in sys.modules, end.code)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: ") and result.stdout.endswith("\nFalse 0\n")


def test_torch_is_not_imported() -> None:
    """This keeps a command's --help fast."""
    code = "import pvdm_fast, sys; raise SystemExit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
