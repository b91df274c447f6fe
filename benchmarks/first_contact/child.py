"""One part in a process of its own: `python -m benchmarks.first_contact.child PART ...`; started by the walk."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.first_contact.context import Context, LeftOut, Wrong, use_source_tree
from benchmarks.first_contact.parts import FUNCTIONS, GRACE
from benchmarks.first_contact.without_diffusers import stand_in

LEFT_OUT = 3  # exit code


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_contact.child", description=__doc__)
    parser.add_argument("part", choices=FUNCTIONS)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--only", help="of a part that is shared among processes: what this one does")
    parser.add_argument("--as", dest="name", help="of the file that is written; default: the part's name")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    # Ends a part that hangs, in a kernel too, also where whoever started it is gone.
    signal.alarm(math.ceil(options.seconds + GRACE))
    use_source_tree()
    stood_in = stand_in()
    context = Context(options.name or options.part, options.device, options.dry, options.out, options.seconds)
    module, _, name = FUNCTIONS[options.part].partition(":")
    if stood_in:
        context.keep(without_diffusers=True)
    try:
        function = getattr(import_module(f"benchmarks.first_contact.{module}"), name)
        function(context, *([options.only] if options.only else []))
    except LeftOut as reason:
        context.keep(left_out=str(reason))
        print(f"left out: {reason}")
        return LEFT_OUT
    except Wrong as reason:
        context.keep(wrong=str(reason))
        print(f"wrong: {reason}")
        return 1
    context.keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
