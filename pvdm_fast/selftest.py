"""Compares every backend that runs here with the reference, in about a minute: `python -m pvdm_fast.selftest`.

Forward and every gradient of every operation, in float32, bfloat16 and float16, against the float64 reference. On a GPU
also at the sizes of full networks, with tf32, and whole networks against the release's golden values, as a CUDA graph
too: minutes, since the first run compiles Triton's kernels. What it prints says what was compared where: attach it to
a report about a GPU. The exit code is 1 where something is wrong, 2 where nothing could be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pvdm_fast.jobs import devices
from pvdm_fast.jobs.arguments import Parser
from pvdm_fast.jobs.command import run_command


def make_parser() -> Parser:
    parser = Parser(prog="python -m pvdm_fast.selftest", description=__doc__)
    parser.add_argument("--device", default="auto", type=devices.DEVICE, metavar=devices.METAVAR, help=devices.HELP)
    parser.add_argument(
        "--full", action=argparse.BooleanOptionalAction,
        help="the sizes of full networks too, whole networks against golden values, CUDA graphs, and tensors on the "
        "wrong device; the default on a GPU",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def test() -> None:
        options = make_parser().parse_args(arguments)
        from pvdm_fast.analysis.agreement import run_check

        run_check(options.device, options.full)

    return run_command(test)


if __name__ == "__main__":
    sys.exit(main())
