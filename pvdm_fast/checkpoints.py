"""The release's checkpoints under their old name. They now live in `pvdm_fast.models.release`."""

from pvdm_fast.models.release import (
    CheckpointError,
    load_model,
    load_release_autoencoder,
    load_release_denoiser,
    read_state_dict,
    to_release,
)

__all__ = [
    "CheckpointError",
    "load_model",
    "load_release_autoencoder",
    "load_release_denoiser",
    "read_state_dict",
    "to_release",
]
