"""Compares every backend that runs here with the reference, in about a minute: `python -m pvdm_fast.selftest`.

Forward and every gradient of every operation, in float32, bfloat16 and float16, against the float64 reference on the
CPU. What it prints says what was compared where: attach it to a report about a GPU. The exit code is 1 where something
is wrong, 2 where nothing could be compared. On a GPU the first run also compiles Triton's kernels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from pvdm_fast.jobs.command import run_command  # first: a Ctrl-C while the rest is imported is one line

# isort: split
import torch
from torch import Tensor

from pvdm_fast import info
from pvdm_fast.analysis import cases
from pvdm_fast.analysis.comparison import relative_error
from pvdm_fast.analysis.machine import collect
from pvdm_fast.backends import choice
from pvdm_fast.backends.choice import KERNEL_DTYPES, OPERATIONS, use_backend
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.arguments import Parser

# Relative 2-norm of the difference. Results are rounded once to their dtype: half a unit in the last place, and in
# float32 the sums of some thousand terms. Attention by tensor cores also rounds what lies between its two products, and
# convolution's gradient is a sum of rounded parts: two or three roundings.
ONCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
THRICE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
ROUNDED_BETWEEN = ("segment_attention", "axial_attention", "plane_conv")


class Failed(UserError):
    """A kernel is wrong here."""

    exit_code = 1


CASES = (*cases.SMALL.values(), *cases.USUAL.values())


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm; infinite where a value is not finite or the shape is another."""
    found = relative_error(actual, expected)
    return math.inf if math.isnan(found) else found


def compare(op: str, backend: str, dtype: torch.dtype, device: str) -> tuple[float, str]:
    """The worst error of an operation's cases, and what went wrong ("" where all is well)."""
    worst = 0.0
    for case in CASES:
        if case.op != op:
            continue
        inputs = case.inputs(dtype)
        with use_backend("reference"):
            expected = cases.run_with_gradients(case, {name: tensor.double() for name, tensor in inputs.items()}, dtype)
        there = {name: tensor.to(device) for name, tensor in inputs.items()}
        try:
            with use_backend(backend):
                actual, again = (cases.run_with_gradients(case, there, dtype) for _ in range(2))
        except Exception as problem:  # whatever a kernel or compiler raises is the finding
            return float("inf"), f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
        worst = max(worst, *(error(actual[name], exact) for name, exact in expected.items()))
        if not all(torch.equal(actual[name], again[name]) for name in actual):
            return worst, f"a second run gave other bits (shapes {list(case.shapes.values())})"
    return worst, "" if worst <= allowed(op, dtype) else "too far from the reference"


def allowed(op: str, dtype: torch.dtype) -> float:
    return (THRICE if op in ROUNDED_BETWEEN else ONCE)[dtype]


def check(device: str) -> tuple[int, int]:
    """Print a line for each operation, backend and dtype. Returns how many ran, and how many of those failed."""
    ran = failed = 0
    print(f"{'operation':<18}{'backend':<9}{'dtype':<10}{'error':<9}{'allowed':<9}")
    for backend in choice.BACKENDS[1:]:
        if reason := choice.unavailable(backend):
            print(f"{'all':<18}{backend:<9}not run: {reason}")
            continue
        for op in OPERATIONS:
            line = f"{op:<18}{backend:<9}"
            if reason := choice.why_not(backend, op, torch.empty(0, device=device)):
                print(f"{line}not run: {reason}")
                continue
            for dtype in KERNEL_DTYPES:
                if reason := choice.why_not(backend, op, torch.empty(0, device=device, dtype=dtype)):
                    print(f"{line}{str(dtype).removeprefix('torch.'):<10}not run: {reason}")
                    continue
                worst, problem = compare(op, backend, dtype, device)
                ran, failed = ran + 1, failed + bool(problem)
                name = str(dtype).removeprefix("torch.")
                result = f"{name:<10}{worst:<9.1e}{allowed(op, dtype):<9.1e}"
                print(line + result + (f"FAILED: {problem}" if problem else "ok"), flush=True)
    return ran, failed


def make_parser() -> Parser:
    parser = Parser(prog="python -m pvdm_fast.selftest", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default here: {default}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:

    def test() -> None:
        device = make_parser().parse_args(arguments).device
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("No GPU is available to PyTorch: run with --device cpu, or on a machine with one.")
        print(*info.describe_machine(collect()), "", sep="\n")
        # tf32 would hide faults in float32 products.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        ran, failed = check(device)
        if not ran:
            raise UserError(f"No backend but the reference runs on {device}: nothing was compared.")
        if failed:
            raise Failed(f"{failed} of {ran} are wrong.")
        print(f"\nAll {ran} are right.")

    return run_command(test)


if __name__ == "__main__":
    sys.exit(main())
