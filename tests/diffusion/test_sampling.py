"""Schedulers and the sampling loop: the release's trajectories, guidance, long videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comparison import assert_close
from diffusers import DDPMScheduler
from golden_tools import GoldenCase, load_case
from tolerances import GOLDEN_NETWORK
from torch import Tensor, nn

from pvdm_fast.diffusion.guidance import guided_prediction
from pvdm_fast.diffusion.sampling import NoiseSource, SamplingOptions, sample_latents, sample_video
from pvdm_fast.diffusion.schedulers import OF_NOISE, make_scheduler, release_times
from pvdm_fast.errors import UserError
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.models.noise_schedule import NoiseSchedule
from pvdm_fast.models.release import load_release_denoiser

SHAPE = (2, 4, 2048)


class StoredNoise(NoiseSource):
    """The golden noises of one trajectory, in order."""

    def __init__(self, case: GoldenCase, name: str) -> None:
        super().__init__(0)
        self.case, self.name, self.drawn = case, name, 0

    def __call__(self, shape: Sequence[int]) -> Tensor:
        self.drawn += 1
        return self.case.draw(f"noise.{self.name}.{self.drawn - 1}", tuple(shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unconditional", "conditional", "guided"])
def test_ddim_follows_the_release(name: str) -> None:
    case, unet = load_case("diffusion_small"), load_case("unet_small")
    denoiser = load_release_denoiser(unet.parameters(), num_heads=unet.meta["config"]["num_heads"]).eval()
    steps = case.meta["steps"]
    noise = StoredNoise(case, name)
    sample = sample_latents(
        denoiser,
        make_scheduler("ddim"),
        SHAPE,
        steps=steps,
        noise=noise,
        condition=None if name == "unconditional" else unet.draw("input.cond", SHAPE).tanh(),
        guidance=case.meta["guided_w"] if name == "guided" else 0.0,
        eta=case.meta["eta"],
    )
    assert noise.drawn == steps, "one noise for the start and one a step but the last"
    assert_close(sample, case.tensors[f"output.ddim6.{name}"], GOLDEN_NETWORK)


def test_times_of_the_release() -> None:
    assert release_times(6) == [999, 832, 665, 499, 332, 165, -1]
    assert release_times(50)[:3] == [999, 979, 959]
    assert release_times(1000) == list(range(999, -2, -1))
    for steps in (0, 1001):
        with pytest.raises(UserError, match=r"the number of sampling steps must be at (least 1|most 1000)"):
            release_times(steps)


def test_ddpm_is_diffusers_own_where_the_steps_divide_1000() -> None:
    ours = make_scheduler("ddpm")
    theirs = DDPMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        variance_type="fixed_small",
        clip_sample=True,
        timestep_spacing="trailing",
    )
    ours.set_timesteps(20)
    theirs.set_timesteps(20)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    latent, predicted = torch.randn(1, 4, 12), torch.randn(1, 4, 12)
    for timestep in (999, 499, 49):
        steps = [
            scheduler.step(predicted, timestep, latent, generator=torch.Generator().manual_seed(1)).prev_sample
            for scheduler in (ours, theirs)
        ]
        assert_close(*steps, 2e-5)  # diffusers multiplies the levels in float32


@pytest.mark.parametrize("name", OF_NOISE)
def test_every_sampler_has_the_exact_noise_levels(name: str, tmp_path: Path) -> None:
    """They are the release's, rounded once: before and after saving, and in what is derived from them."""
    schedule, golden = NoiseSchedule.create(), load_case("diffusion_small").tensors["alphas_cumprod"]
    made = make_scheduler(name)
    made.save_pretrained(tmp_path)
    for scheduler in (made, type(made).from_pretrained(tmp_path)):
        assert torch.equal(scheduler.alphas_cumprod, golden)
        assert torch.equal(scheduler.betas, schedule.betas)
        if hasattr(scheduler, "lambda_t"):
            exact = golden.double()
            assert_close(scheduler.sigmas, ((1 - exact) / exact).sqrt(), 1e-6)
            assert_close(scheduler.lambda_t, (exact / (1 - exact)).log() / 2, 1e-5)
    with pytest.raises(ValueError, match="noise levels"):
        type(made).from_config({**made.config, "beta_end": 0.02})


def test_the_ddpm_posterior_is_the_release_s() -> None:
    golden = load_case("diffusion_small").tensors["posterior_variance"]
    scheduler = make_scheduler("ddpm")
    scheduler.set_timesteps(1000)
    variance = torch.stack([scheduler._get_variance(time) for time in range(1, 1000)])
    assert torch.allclose(variance, golden[1:], rtol=2e-3)  # a difference of two levels, in float32


class OracleDenoiser(nn.Module):
    """Knows the clean latent, so every sampler must end there. Adds the condition, if there is one."""

    def __init__(self, clean: Tensor) -> None:
        super().__init__()
        self.clean = nn.Parameter(clean)
        self.batches: list[int] = []

    def forward(self, latent: Tensor, timestep: Tensor, condition: Tensor | None = None) -> SimpleNamespace:
        self.batches.append(len(latent))
        level = NoiseSchedule.create().alphas_cumprod[timestep].view(-1, 1, 1)
        clean = self.clean if condition is None else self.clean + condition
        return SimpleNamespace(sample=(latent - level.sqrt() * clean) / (1 - level).sqrt())


@pytest.mark.parametrize("name", OF_NOISE)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_every_sampler_arrives_at_what_the_denoiser_knows(name: str, steps: int) -> None:
    clean = torch.rand(2, 4, 12) * 1.8 - 0.9
    seen = []

    def on_step(index: int, timestep: int, latent: Tensor) -> Tensor:
        seen.append(index)
        return latent

    sample = sample_latents(
        OracleDenoiser(clean),  # type: ignore[arg-type]
        make_scheduler(name),
        clean.shape,
        steps=steps,
        noise=NoiseSource(0),
        on_step=on_step,
    )
    assert torch.allclose(sample, clean, atol=2e-3)
    assert seen == list(range(steps))


def test_the_clean_prediction_is_clamped() -> None:
    for name in OF_NOISE:
        sample = sample_latents(
            OracleDenoiser(torch.full((1, 4, 12), 3.0)),  # type: ignore[arg-type]
            make_scheduler(name),
            (1, 4, 12),
            steps=5,
            noise=NoiseSource(0),
        )
        assert torch.allclose(sample, torch.ones(1, 4, 12), atol=1e-4), name


def test_guidance_is_one_pass_over_both_and_follows_the_formula() -> None:
    denoiser = OracleDenoiser(torch.zeros(1, 4, 12))
    latent, condition = torch.randn(2, 4, 12), torch.rand(2, 4, 12)
    conditional = guided_prediction(denoiser, latent, 500, condition)  # type: ignore[arg-type]
    unconditional = guided_prediction(denoiser, latent, 500)  # type: ignore[arg-type]
    denoiser.batches.clear()
    guided = guided_prediction(denoiser, latent, 500, condition, 1.5)  # type: ignore[arg-type]
    assert denoiser.batches == [4]
    assert torch.allclose(guided, 2.5 * conditional - 1.5 * unconditional, atol=1e-5)


def test_an_unknown_scheduler_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'foo'.*ddim, ddpm, dpm"):
        make_scheduler("foo")


class ChainDenoiser(OracleDenoiser):
    """Each clip's clean latent is that of the clip before plus 0.25. The first one is 0.25."""

    def __init__(self, layout: TriplaneLayout) -> None:
        super().__init__(torch.full((1, 2, layout.num_tokens), 0.25))
        self.layout, self.config = layout, {"latent_channels": 2}


class FlatAutoencoder:
    """Decodes a latent to frames filled with its first value."""

    dtype = torch.float32

    def __init__(self, layout: TriplaneLayout) -> None:
        self.layout, self.config = layout, {"latent_channels": 2}

    def decode(self, latent: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=latent[:, :1, :1, None, None].expand(-1, 3, self.layout.time, 4, 4))


def test_long_videos_are_chained_and_cut() -> None:
    layout = TriplaneLayout(4, 2, 3)
    done = []
    video = sample_video(
        FlatAutoencoder(layout),  # type: ignore[arg-type]
        ChainDenoiser(layout),  # type: ignore[arg-type]
        clips=2,
        frames=10,
        steps=6,
        progress=lambda number, total: done.append((number, total)),
    )
    assert video.shape == (2, 3, 10, 4, 4)
    expected = torch.tensor([0.25] * 4 + [0.5] * 4 + [0.75] * 2)
    assert torch.allclose(video[:, :, :, 0, 0], expected.expand(2, 3, 10), atol=1e-4)
    assert done == [(number, 18) for number in range(1, 19)]


def test_models_that_do_not_belong_together_are_refused() -> None:
    small, large = TriplaneLayout(4, 2, 3), TriplaneLayout(4, 2, 4)
    with pytest.raises(UserError, match=r"layout.*trained together"):
        sample_video(FlatAutoencoder(small), ChainDenoiser(large), clips=1, frames=4)  # type: ignore[arg-type]


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("clips", (0, -1, 1.5, True, "two"), "clips must be (at least 1|a whole number), not"),
        ("frames", (0, -4, NAN, None), "frames must be (at least 1|a whole number), not"),
        ("steps", (0, 1001, -1, 2.5), "steps must be (at least 1|at most 1000|a whole number), not"),
        ("eta", (-0.1, 1.5, NAN, INFINITE, None), "eta must be (at least 0|at most 1|a finite number), not"),
        ("guidance", (NAN, INFINITE, -INFINITE), "guidance must be a finite number"),
        ("seed", (2**64, -1, 0.5, None), "seed must be (at least 0|at most 9223372036854775807|a whole number), not"),
        ("scheduler", ("foo",), "no scheduler called 'foo'"),
    ],
)
def test_options_out_of_range_are_refused(field: str, values: tuple[Any, ...], message: str) -> None:
    good: dict[str, Any] = dict(clips=1, frames=4)
    layout = TriplaneLayout(4, 2, 3)
    for value in values:
        with pytest.raises(UserError, match=message):
            SamplingOptions(**{**good, field: value})
        with pytest.raises(UserError, match=message):
            sample_video(FlatAutoencoder(layout), ChainDenoiser(layout), **{**good, field: value})  # type: ignore[arg-type]


def test_options_are_one_thing_or_written_out() -> None:
    layout = TriplaneLayout(4, 2, 3)
    models: Any = FlatAutoencoder(layout), ChainDenoiser(layout)
    options = SamplingOptions(clips=2, frames=6, steps=3, seed=7, guidance=np.float32(0.5), eta=0)
    written_out = sample_video(*models, clips=2, frames=6, steps=3, seed=7, guidance=0.5, eta=0)
    assert torch.equal(sample_video(*models, options), written_out)
    assert sample_video(*models, options, frames=np.int64(3)).shape[2] == 3, "and changed for one call"
    for seed in (0, 2**63 - 1):
        assert SamplingOptions(clips=1, frames=1, seed=seed).seed == seed


def test_more_noise_than_there_is_is_refused() -> None:
    with pytest.raises(UserError, match=r"eta must be at most 1, not 3\.0"):
        sample_latents(
            OracleDenoiser(torch.zeros(1, 4, 12)),  # type: ignore[arg-type]
            make_scheduler("ddim"),
            (1, 4, 12),
            steps=5,
            noise=NoiseSource(0),
            eta=3.0,
        )
