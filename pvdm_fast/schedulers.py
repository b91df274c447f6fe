"""The schedulers under the name that they had before `pvdm_fast.diffusion.schedulers`."""

from pvdm_fast.diffusion.schedulers import (
    ReleaseDDIMScheduler,
    ReleaseDDPMScheduler,
    make_scheduler,
    release_times,
)

__all__ = ["ReleaseDDIMScheduler", "ReleaseDDPMScheduler", "make_scheduler", "release_times"]
