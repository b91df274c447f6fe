"""``python -m pvdm_fast.train``: trains the autoencoder, then the diffusion model of its latents."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.command import run_command

if TYPE_CHECKING:
    from pvdm_fast.training.options import Request
    from pvdm_fast.training.session import StageTooLarge


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, 2 (user's error), 3 (loss isn't finite), or 128 + the number of a signal."""

    def train() -> None:
        from pvdm_fast.training.options import parse

        run(parse(arguments))

    return run_command(train)


def run(request: Request) -> None:
    """Train what is asked for. Raises what `run_training` does; a stage without memory says what it would need."""
    from pvdm_fast.training.session import StageTooLarge, run_training

    try:
        run_training(request)
    except StageTooLarge as error:
        raise UserError(with_estimate(error)) from error


def with_estimate(error: StageTooLarge) -> str:
    """The sentence of a stage that found no memory, with the device's memory and what a step would have needed."""
    import torch

    from pvdm_fast.estimate import GIB, estimate

    there = ""
    if error.device.type == "cuda":
        there = f" ({torch.cuda.get_device_properties(error.device).total_memory / GIB:.1f} GiB)"
    found = estimate(error.config, error.stage)
    return (
        f"the {error.stage} stage is out of memory{there}: python -m pvdm_fast.estimate puts a step of "
        f"{found.batch} clips at {found.peak / GIB:.3f} GiB, {found.standing / GIB:.3f} GiB of which stand between "
        f"steps; {error.remedy}"
    )


if __name__ == "__main__":
    sys.exit(main())
