"""``python -m pvdm_fast.train``: trains the autoencoder, then the diffusion model of its latents."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pvdm_fast.jobs.command import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, 2 (user's error), 3 (loss isn't finite), or 128 + the number of a signal."""

    def train() -> None:
        from pvdm_fast.training.options import parse

        request = parse(arguments)
        from pvdm_fast.training.session import run_training

        run_training(request)

    return run_command(train)


if __name__ == "__main__":
    sys.exit(main())
