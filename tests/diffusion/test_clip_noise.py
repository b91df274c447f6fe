"""Each clip has noise of its own: the same whatever is sampled beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pvdm_fast.diffusion.sampling import CLIP_STEP, NoiseSource, sample_video
from pvdm_fast.diffusion.schedulers import SCHEDULER_NAMES
from pvdm_fast.errors import UserError
from pvdm_fast.models import Autoencoder, Denoiser


@pytest.fixture(scope="module")
def models() -> tuple[Autoencoder, Denoiser]:
    torch.manual_seed(0)
    autoencoder = Autoencoder(
        frames=4, height=16, width=16, patch_size=8, channels=16, depth=1, num_heads=1, head_dim=8
    )
    denoiser = Denoiser(time=4, height=2, width=2, model_channels=32, channel_mult=[1], num_heads=2, num_res_blocks=1)
    for model in (autoencoder, denoiser):
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return autoencoder.eval(), denoiser.eval()


def test_a_clip_s_noise_depends_on_the_seed_and_its_number() -> None:
    five = NoiseSource.of_clips(7, range(5))((5, 3, 4))
    assert torch.equal(NoiseSource.of_clips(7, [3, 1])((2, 3, 4)), five[[3, 1]])
    assert torch.equal(NoiseSource.of_clips(7, [0])((1, 3, 4)), NoiseSource(7)((1, 3, 4)))
    assert len({row.sum().item() for row in torch.cat([five, NoiseSource.of_clips(8, range(5))((5, 3, 4))])}) == 10
    with pytest.raises(UserError, match="seed must be at least 0"):
        NoiseSource.of_clips(-1, [0])


def test_no_two_clips_of_near_seeds_share_their_noise() -> None:
    """Clip i of seed s is clip j of seed s + d where (i - j) steps are d: for every d below 1,000 they are far apart,
    and none is 0, since the step is odd."""
    inverse = pow(CLIP_STEP, -1, 2**32)
    apart = [min(d * inverse % 2**32, -d * inverse % 2**32) for d in range(1, 1000)]
    assert min(apart) > 2_600_000
    assert CLIP_STEP % 2 == 1


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_a_clip_is_the_same_in_every_batch(name: str, models: tuple[Autoencoder, Denoiser]) -> None:
    """With new noise in every step where the sampler draws it, and in the second clip of a long video."""
    options: dict[str, Any] = dict(frames=6, steps=3, scheduler=name)
    five = sample_video(*models, clips=5, seed=3, **options)
    parts = [
        sample_video(*models, clips=len(clips), seed=NoiseSource.of_clips(3, clips), **options)
        for clips in (range(0, 2), range(2, 4), range(4, 5))
    ]
    torch.testing.assert_close(torch.cat(parts), five, rtol=0, atol=1e-4)
    assert (five[0] - five[1]).abs().max() > 1e-3, "but clips differ"
