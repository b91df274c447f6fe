"""`python -m benchmarks.first_contact --out DIR --minutes 9`: what a person with a new card runs once.

From a source tree, with or without network: PyTorch, Triton, numpy, safetensors and einops are enough. Each part has
its own process and clock, and is written to DIR as it ends: a cut run is worth what it did. The exit code is 1 where a
part failed; all others were done nevertheless.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pvdm_fast.jobs.command import run_command  # first: a Ctrl-C while the rest is imported is one line

# isort: split
from benchmarks.first_contact import page
from benchmarks.first_contact.context import ROOT
from benchmarks.first_contact.walk import Outcome, Walk
from pvdm_fast.errors import UserError
from pvdm_fast.jobs import numbers
from pvdm_fast.jobs.arguments import Parser

MINUTES = numbers.real(0.5, 600)


class Failed(UserError):
    """A part failed; the page says which, and how."""

    exit_code = 1


def make_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.first_contact", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    parser.add_argument(
        "--minutes", type=MINUTES, default=9.0, metavar="M", help="for everything together (default: %(default)g)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dry", action="store_true", help="tiny sizes: walk through everything, measure nothing real")
    return parser


def run(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("No GPU is available to PyTorch: run with --device cpu, or on a machine with one.")
    if not (ROOT / "csrc").is_dir():
        raise UserError(f"{ROOT} is no source tree of pvdm_fast: run from a checkout.")
    options.out.mkdir(parents=True, exist_ok=True)
    walk = Walk(options.out.resolve(), device, options.dry, 60 * options.minutes)
    outcomes = walk.run(lambda ended: page.write(walk, ended))
    print(f"\n{walk.out / page.PAGE}")
    report(outcomes)


def report(outcomes: Sequence[Outcome]) -> None:
    """Raises Failed where a part did."""
    if failed := [outcome.title for outcome in outcomes if outcome.failed]:
        raise Failed(f"{len(failed)} of {len(outcomes)} parts failed: {', '.join(failed)}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
