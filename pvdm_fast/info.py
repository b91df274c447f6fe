"""`python -m pvdm_fast.info`: what is installed, what was built, and which backend computes each operation here."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from pvdm_fast.jobs.arguments import Parser
from pvdm_fast.jobs.command import run_command


def make_parser() -> Parser:
    parser = Parser(prog="python -m pvdm_fast.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def show() -> None:
        options = make_parser().parse_args(arguments)
        from pvdm_fast.analysis.machine import collect, describe

        facts = collect()
        print(json.dumps(facts, indent=1) if options.json else describe(facts))

    return run_command(show)


if __name__ == "__main__":
    sys.exit(main())
