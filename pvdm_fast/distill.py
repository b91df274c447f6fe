"""``python -m pvdm_fast.distill RUN``: a student that samples in few steps what a trained flow samples in many."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.command import run_command

if TYPE_CHECKING:
    from pvdm_fast.training.options import Request

# What messages of a training run call by names that this command doesn't have, or advise where it has no option.
OWN_NAMES = {
    "--distillation-method": "--method",
    "--distillation-solver-steps": "--solver-steps",
    "--distillation-guidance": "--guidance",
    "--distillation-steps": "--steps",
    "--diffusion-steps": "--training-steps",
    ", and --diffusion-accumulate larger by as much": "",
    ", or start a new run with --mixed-precision bf16": "",
    ", or take smaller clips or a smaller model": "",
    "choose --no-fsdp, or path": "choose --method path",
    "--diffusion-batch-size": "--batch-size",
    "--diffusion-learning-rate": "--learning-rate",
    "--init-from": "RUN",
    "--run ": "--out ",
}
# Of the teacher's steps and learning rate, since the student starts from its weights. With "distribution" it takes
# every third step, the critic the others.
SHARES = {"distribution": (1 / 2, 1 / 6), "path": (1 / 3, 1 / 3)}


def make_parser() -> argparse.ArgumentParser:
    from pvdm_fast.jobs.arguments import Parser
    from pvdm_fast.jobs.devices import MEANING, METAVAR
    from pvdm_fast.training.config import OPTIONS

    parser = Parser(
        prog="python -m pvdm_fast.distill",
        description="Trains a student that samples in few steps what the flow of a trained run samples in many. Its "
        "folder is a run: sample, evaluate and train --resume take it, and sampling takes its number of steps by "
        "itself. What isn't given here is as the trained run had it.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run with a trained flow, or with a student of one")

    def add(flag: str, key: str, text: str, metavar: str = "N") -> None:
        kind = OPTIONS[key].metadata["number"]
        parser.add_argument(flag, dest=key, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)

    add("--steps", "distillation.steps", "steps in which the student samples, each one pass (default: 4)")
    parser.add_argument(
        "--method",
        dest="distillation.method",
        choices=tuple(SHARES),
        default=argparse.SUPPRESS,
        help=f"{OPTIONS['distillation.method'].metadata['help']} (default: distribution)",
    )
    add("--guidance", "distillation.guidance", "guidance that the student learns along (default: the run's)", "W")
    add("--solver-steps", "distillation.solver_steps", "path: the teacher's, two passes each (default: 8)")
    add("--training-steps", "diffusion.steps", "optimizer steps (default: half of the run's; path: a third)")
    add("--batch-size", "diffusion.batch_size", "clips a step (default: the run's)")
    add("--learning-rate", "diffusion.learning_rate", "the highest (default: a sixth of the run's; path: a third)", "X")
    add("--data", "data", "clips to learn from (default: the run's)", "DIR")
    add("--seed", "seed", "seed of clips and noise (default: the run's)")
    add("--device", "device", f"{MEANING} (default: the run's)", METAVAR)
    add("--threads", "threads", "CPU threads (default: the run's)")
    text = "folder of the student (default: RUN-N-steps)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    return parser


def parse(arguments: Sequence[str] | None = None) -> Request:
    """The training run that the command line asks for. Raises UserError where RUN is no run."""
    from pvdm_fast.training.config import TrainConfig, get, values_of
    from pvdm_fast.training.options import Request
    from pvdm_fast.training.presets import SAMPLING_OPTIONS
    from pvdm_fast.training.run_folder import RunFolder

    given = vars(make_parser().parse_args(arguments))
    method = given.get("distillation.method", TrainConfig().distillation.method)
    of_steps, of_rate = SHARES[method]
    place, out = given.pop("run"), given.pop("out")
    trained = RunFolder.existing(place).read_config()
    changes: dict[str, Any] = {
        **values_of(trained),
        "stage": "diffusion",
        "init_from": str(place),
        "autoencoder_from": None,
        "early_stop": None,
        "distillation.steps": 4,
        "distillation.method": method,
        **({"fsdp": False} if method == "distribution" else {}),
        "distillation.guidance": None,
        **{key: get(TrainConfig(), key) for key in SAMPLING_OPTIONS},
        "diffusion.time_mean": 0.0,
        "diffusion.time_std": 1.0,
        "diffusion.steps": math.ceil(of_steps * trained.diffusion.steps),
        "diffusion.learning_rate": of_rate * trained.diffusion.learning_rate,
        **given,
    }
    steps = changes["distillation.steps"]
    whole = Path(os.path.abspath(place))  # "." has no name
    folder = out or whole.with_name(f"{whole.name}-{steps}-step{'s' * (steps > 1)}")
    return Request(changes, folder, None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, 2 (user's error), 3 (loss isn't finite), or 128 + the number of a signal."""

    def distill() -> None:
        request = parse(arguments)
        from pvdm_fast.train import run

        try:
            run(request)
        except UserError as error:
            if error.exit_code != UserError.exit_code:  # it has a message and a code of its own
                raise
            raise UserError(with_own_names(str(error))) from error

    return run_command(distill)


def with_own_names(message: str) -> str:
    """A training run's message with the options by which this command takes them."""
    for name, own in OWN_NAMES.items():
        message = message.replace(name, own)
    return message


if __name__ == "__main__":
    sys.exit(main())
