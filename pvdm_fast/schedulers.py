"""The schedulers under their old name. They now live in `pvdm_fast.diffusion.schedulers`."""

from pvdm_fast.diffusion.schedulers import (
    ReleaseDDIMScheduler,
    ReleaseDDPMScheduler,
    make_scheduler,
    release_times,
)

__all__ = ["ReleaseDDIMScheduler", "ReleaseDDPMScheduler", "make_scheduler", "release_times"]
