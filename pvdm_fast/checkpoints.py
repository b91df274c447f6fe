"""The release's checkpoints under the name that they had before `pvdm_fast.models.release`."""

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
