"""The sampling functions under their old name. They now live in `pvdm_fast.diffusion.sampling`."""

from pvdm_fast.diffusion.sampling import (
    NoiseSource,
    SamplingOptions,
    check_pair,
    sample_latents,
    sample_video,
    stream_video,
)

__all__ = ["NoiseSource", "SamplingOptions", "check_pair", "sample_latents", "sample_video", "stream_video"]
