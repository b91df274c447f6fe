"""The kernels on a real GPU: `pytest -m gpu`. Elsewhere each of these is skipped, saying so.

All run in processes of their own: the rest of the tests sets TRITON_INTERPRET, which would keep Triton off the GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pvdm_fast.analysis import goldens
from pvdm_fast.backends.choice import FUSED, FUSED_PROJECTION, OPERATIONS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: run with -m gpu on a machine with one"),
]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = [sys.executable, "-m", *command]
    return subprocess.run(arguments, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def selftest() -> subprocess.CompletedProcess[str]:
    """The whole self-test, minutes long where kernels have to be compiled."""
    return run("pvdm_fast.selftest", "--device", "cuda")


def lines_of(selftest: subprocess.CompletedProcess[str], what: str) -> list[str]:
    return [line for line in selftest.stdout.splitlines() if re.match(rf"{re.escape(what)}(,| )", line)]


@pytest.mark.parametrize("op", [*OPERATIONS, *FUSED, *FUSED_PROJECTION])
def test_operations_are_right(selftest: subprocess.CompletedProcess[str], op: str) -> None:
    """On every backend that runs there, at small sizes and at those of full networks."""
    compared = [line for line in lines_of(selftest, op) if "not run" not in line]
    assert compared, f"nothing of {op} was compared:\n{selftest.stdout}\n{selftest.stderr}"
    assert any(line.startswith(f"{op}, full") for line in compared)
    assert not [line for line in compared if not line.endswith("ok")]


@pytest.mark.parametrize("what", [*goldens.NETWORKS, "CUDA graph", "mixed devices", "another device"])
def test_networks_graphs_and_devices(selftest: subprocess.CompletedProcess[str], what: str) -> None:
    compared = lines_of(selftest, what)
    assert compared, f"nothing of {what} was compared:\n{selftest.stdout}\n{selftest.stderr}"
    assert not [line for line in compared if not line.endswith("ok")]


def test_nothing_else_is_wrong(selftest: subprocess.CompletedProcess[str]) -> None:
    assert selftest.returncode == 0, selftest.stdout + selftest.stderr


def test_first_contact(tmp_path: Path) -> None:
    """The whole walk at tiny sizes: every part ends well, or says why it is left out."""
    result = run("benchmarks.first_contact", "--out", str(tmp_path), "--device", "cuda", "--dry", "--minutes", "9")
    assert result.returncode == 0, result.stdout + result.stderr
    parts = {part["part"]: part["status"] for part in json.loads((tmp_path / "report.json").read_text())["parts"]}
    assert {name for name, status in parts.items() if status != "done"} <= {"build", "sanitizer", "tune"}


def test_tuning(tmp_path: Path) -> None:
    command = ("pvdm_fast.tune", "--size", "tiny", "--operations", "geglu")
    result = run(*command, XDG_CONFIG_HOME=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "entries written to" in result.stdout
