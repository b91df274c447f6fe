"""Compiles every kernel for every GPU family, without a GPU: budgets, and planted faults that they find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import kernel_resources
from pvdm_fast.backends.choice import SERVED
from pvdm_fast.errors import UserError

pytest.importorskip("triton", reason="needs Triton: pip install triton")
ROOT = Path(__file__).parents[3]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs in a process that compiles, because this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def planted() -> dict[str, dict[str, list[str]]]:
    result = run("tests/backends/triton/planted.py")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("architecture", ["sm80", "sm100", "gfx942"])
@pytest.mark.slow
def test_good_kernels_keep_the_budget(planted: dict[str, dict[str, list[str]]], architecture: str) -> None:
    assert planted[architecture]["good product"] == planted[architecture]["good copy"] == []
    assert not any("over lanes" in problem for problem in planted[architecture]["good sum"])


@pytest.mark.parametrize(
    ("fault", "architectures"),
    [
        ("spills", ["sm80", "sm100", "gfx942"]),
        ("shared memory", ["sm80", "sm100", "gfx942"]),
        ("sums over lanes", ["sm80", "sm100", "gfx942"]),
        ("tensor cores", ["sm80", "sm100"]),  # AMD's tensor cores take float32 too
        ("16-byte load", ["sm80", "sm100", "gfx942"]),
    ],
)
@pytest.mark.slow
def test_planted_faults_are_found(
    planted: dict[str, dict[str, list[str]]], fault: str, architectures: list[str]
) -> None:
    for architecture in architectures:
        assert any(fault in problem for problem in planted[architecture][fault]), planted[architecture]


def check_resources(architectures: Sequence[str], *options: str) -> None:
    result = run("-m", "benchmarks.kernel_resources", *options, "--architectures", *architectures)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split("|")[1:3] for line in result.stdout.splitlines() if line.startswith("|")][2:]
    kernels = {kernel.strip() for kernel, _ in rows}
    assert not [op for op in SERVED["triton"] if not any(kernel.startswith(op) for kernel in kernels)]
    compiled = {(kernel.strip(), target.strip()) for kernel, target in rows}
    assert compiled == {(kernel, target) for kernel in kernels for target in architectures}
    documented = kernel_resources.DOCS.read_text()
    missing = [kernel for kernel in kernels if f"| {kernel} |" not in documented]
    assert not missing, (
        f"run python -m benchmarks.kernel_resources --write-docs: {kernel_resources.DOCS.name} lacks {missing}"
    )


# float32 under the switches as PyTorch sets them: its own convolutions then use tensor cores, its products don't.
DEFAULT_SWITCHES = """
import json, sys, torch
from benchmarks.ahead_of_time import compile_calls, over_budget
from benchmarks.kernel_resources import full_size_calls
calls = [call.with_dtype(torch.bfloat16, torch.float32) for call in full_size_calls()]
calls = [call for call in calls if call.op in ("plane_conv", "triplane_expand")]
found = [made for architecture in sys.argv[1:] for made in compile_calls(architecture, calls) if made.products]
print(json.dumps([
    (made.kernel, made.architecture, made.products_tf32, made.tensor_core_instructions, over_budget(made))
    for made in found
]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "architectures",
    [("sm80", "sm120", "gfx942"), pytest.param(("sm90", "sm100"), marks=pytest.mark.exhaustive)],
    ids=" ".join,
)
def test_float32_takes_tensor_cores_where_eager_does(architectures: tuple[str, ...]) -> None:
    result = run("-c", DEFAULT_SWITCHES, *architectures)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    for architecture in architectures:
        of_convolutions = [row for row in rows if row[1] == architecture and row[0].startswith("plane_conv")]
        assert {row[0] for row in of_convolutions} == {"plane_conv_forward", "plane_conv_backward_dweight"}
        assert all(cores for *_, cores, _ in of_convolutions), of_convolutions  # AMD's have float32 too
    for kernel, architecture, tf32, cores, problems in rows:
        nvidia = architecture.startswith("sm")
        assert tf32 == (nvidia and kernel.startswith("plane_conv")), (kernel, architecture)
        assert bool(cores) == (tf32 or not nvidia), (kernel, architecture)
        assert problems == []


@pytest.mark.slow
def test_every_kernel_on_one_target() -> None:
    """All that full-size networks launch in bfloat16, and every configuration of every table once, separately for
    float32 and 16 bits.

    Table entries that nothing uses are problems too. It is for the target with the least shared memory.
    """
    check_resources(["sm120"], "--quick")


@pytest.mark.exhaustive
def test_every_configuration_in_every_dtype_on_every_target() -> None:
    """Also every set of dtypes that mixed precision makes. Every change of a kernel runs it."""
    check_resources(kernel_resources.ARCHITECTURES)


def test_refuses_the_interpreter() -> None:
    with pytest.raises(UserError, match="TRITON_INTERPRET is set, so kernels are not compiled: unset it"):
        kernel_resources.run([])


def test_writes_between_the_marks(tmp_path: Path) -> None:
    path = tmp_path / "triton_resources.md"
    begin, end = kernel_resources.BEGIN, kernel_resources.END
    path.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for _ in range(2):
        kernel_resources.write_docs([], path=path)
    text = path.read_text()
    assert text.startswith(f"before\n{begin}\nMade by") and text.endswith(f"{end}\nafter\n") and "old" not in text
    assert text.count("| kernel |") == 1


def test_does_not_write_without_marks(tmp_path: Path) -> None:
    path = tmp_path / "triton_resources.md"
    path.write_text("nothing")
    with pytest.raises(UserError, match="must have the lines"):
        kernel_resources.write_docs([], path=path)
