"""``python -m pvdm_fast.tune``: the quickest configuration of every Triton kernel on this GPU, measured and kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pvdm_fast.jobs.arguments import Parser
from pvdm_fast.jobs.command import run_command


def make_parser() -> Parser:
    from pvdm_fast.jobs import numbers
    from pvdm_fast.models.presets import DENOISER

    parser = Parser(
        prog="python -m pvdm_fast.tune",
        description="Times every Triton kernel's configurations on this GPU, with the shapes of a network size. What "
        "is quicker than the package's own is kept in pvdm_fast/triton.json in your folder of settings (~/.config, or "
        "$XDG_CONFIG_HOME), which every later process reads.",
    )
    parser.add_argument(
        "--size", choices=tuple(DENOISER), default="base", help="of the networks (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="(default: %(default)s)"
    )
    parser.add_argument("--mixed", action="store_true", help="weights in float32, as in training with autocast")
    parser.add_argument(
        "--batch", type=numbers.BATCH, default=1, metavar="N", help="clips at a time (default: %(default)s)"
    )
    parser.add_argument("--operations", nargs="+", metavar="OP", help="only these (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="list what would be timed; needs no GPU")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def tune() -> None:
        options = make_parser().parse_args(arguments)
        from pvdm_fast.analysis.tuning import run_tuning

        run_tuning(options)

    return run_command(tune)


if __name__ == "__main__":
    sys.exit(main())
