"""Compares every backend that runs here with the reference, in about a minute: `python -m pvdm_fast.selftest`.

Forward and every gradient of every operation, in float32, bfloat16 and float16, against the float64 reference on the
CPU. What it prints says what was compared where: attach it to a report about a GPU. The exit code is 1 where something
is wrong, 2 where nothing could be compared. On a GPU the first run also compiles Triton's kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pvdm_fast.jobs.arguments import Parser
from pvdm_fast.jobs.command import run_command


def make_parser() -> Parser:
    parser = Parser(prog="python -m pvdm_fast.selftest", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where PyTorch finds a GPU")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def test() -> None:
        device = make_parser().parse_args(arguments).device
        from pvdm_fast.analysis.agreement import run_check

        run_check(device)

    return run_command(test)


if __name__ == "__main__":
    sys.exit(main())
