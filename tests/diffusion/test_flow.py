"""Rectified flow on a Gaussian, where velocity, loss and samples are known in closed form."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from pvdm_fast.diffusion.flow import interpolate, logit_normal_times, sampling_times, shifted
from pvdm_fast.diffusion.guidance import guided_prediction
from pvdm_fast.diffusion.noise import diffusion_loss
from pvdm_fast.diffusion.sampling import (
    NoiseSource,
    SamplingOptions,
    fitting_steps,
    passes,
    sample_latents,
    sample_video,
)
from pvdm_fast.diffusion.schedulers import OF_FLOW, fitting_name, make_scheduler, scheduler_of
from pvdm_fast.errors import UserError
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.models import Autoencoder, Denoiser, latent_statistics
from pvdm_fast.models.noise_schedule import NoiseSchedule
from pvdm_fast.models.release import CheckpointError, to_release

MEAN, STD = 0.3, 0.15  # of the latents; 4 standard deviations stay inside [-1, 1]
SHAPE = (64, 4, 12)
FLOW: dict[str, Any] = dict(time=2, height=2, width=2, model_channels=32, channel_mult=[1], num_heads=2)


class Exact(nn.Module):
    """Predicts E[noise - latent] of latents N(MEAN, STD^2), from the noisy latent and the time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = {"prediction": "flow", "latent_channels": 4, "num_classes": None}
        self.layout = TriplaneLayout(2, 2, 2)
        self.times: list[float] = []

    def forward(self, latent: Tensor, timestep: Tensor, condition: Tensor | None = None) -> SimpleNamespace:
        self.times.append(timestep[0].item())
        time = (timestep / 1000).view(-1, 1, 1)
        variance = (1 - time) ** 2 * STD**2 + time**2
        slope = (time - (1 - time) * STD**2) / variance
        return SimpleNamespace(sample=slope * (latent - (1 - time) * MEAN) - MEAN)


@pytest.fixture(scope="module")
def tiny_autoencoder() -> Autoencoder:
    return Autoencoder(
        frames=2, height=16, width=16, patch_size=8, channels=16, depth=1, num_heads=1, head_dim=8, latent_channels=4
    ).eval()


def filled(model: Denoiser) -> Denoiser:
    """With numbers also in the layers that start as zeros."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


OF_THE_PATH = [name for name in OF_FLOW if name != "stochastic"]


def least_loss(time: Tensor) -> Tensor:
    """Var[noise - latent] given the noisy latent: no predictor has a smaller error."""
    return STD**2 / ((1 - time) ** 2 * STD**2 + time**2)


def test_the_exact_velocity_has_the_least_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    latent = MEAN + STD * torch.randn((4096, 4, 12), generator=generator)
    noise = torch.randn(latent.shape, generator=generator)
    time = logit_normal_times(torch.randn(len(latent), generator=generator), 0.0, 1.0, 1.0)
    exact, zeros = Exact(), torch.zeros_like(latent)

    def loss(denoiser: Any) -> float:
        return diffusion_loss(denoiser, NoiseSchedule.create(), latent, zeros, noise, 1000 * time, "flow").item()

    least = least_loss(time).mean().item()
    assert loss(exact) == pytest.approx(least, rel=0.02)
    assert loss(lambda *args, **kwargs: SimpleNamespace(sample=exact(*args).sample + 0.1)) == pytest.approx(
        least + 0.01, rel=0.02
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", OF_THE_PATH)
def test_every_sampler_reaches_the_gaussian(name: str, shift: float) -> None:
    """The path takes each noise to MEAN + STD noise. Euler's method is of first order, and needs more steps."""
    exact, steps = Exact(), 200 if name == "euler" else 100
    scheduler = make_scheduler(name, "flow", shift)
    latent = sample_latents(exact, scheduler, SHAPE, steps=steps, noise=NoiseSource(0))  # type: ignore[arg-type]
    noise = NoiseSource(0)(SHAPE)
    assert (latent - (MEAN + STD * noise)).square().mean().sqrt() < 1e-2
    assert latent.mean() == pytest.approx(MEAN + STD * noise.mean().item(), abs=1e-3)
    assert latent.std() == pytest.approx(STD * noise.std().item(), abs=1e-2)
    assert len(exact.times) == passes(scheduler, steps)
    assert exact.times[0] == 1000, "the first pass sees pure noise"


@pytest.mark.parametrize(("name", "ratio"), [("euler", 2), ("heun", 4)])
def test_errors_fall_with_the_order_of_the_method(name: str, ratio: float) -> None:
    noise = NoiseSource(0)(SHAPE)
    errors = []
    for steps in (40, 80):
        latent = sample_latents(Exact(), make_scheduler(name, "flow"), SHAPE, steps=steps, noise=NoiseSource(0))  # type: ignore[arg-type]
        errors.append((latent - (MEAN + STD * noise)).square().mean().sqrt().item())
    assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.1)


def test_the_default_comes_closest() -> None:
    """The numbers of docs/sampling.md."""
    errors = {}
    for name in OF_THE_PATH:
        latent = sample_latents(Exact(), make_scheduler(name, "flow"), SHAPE, steps=40, noise=NoiseSource(0))  # type: ignore[arg-type]
        errors[name] = (latent - (MEAN + STD * NoiseSource(0)(SHAPE))).square().mean().sqrt().item()
    assert errors == pytest.approx({"unipc": 0.0005, "dpm++": 0.001, "heun": 0.0016, "euler": 0.012}, rel=0.1)


def test_the_stochastic_sampler_gathers_at_the_mean() -> None:
    """Each step takes the mean of what the noisy latent may have been, and adds new noise to it. Of a Gaussian the
    offset x from the mean is multiplied by how much of it the velocity knows, and by the new noise's share."""
    steps = 20
    scheduler = make_scheduler("stochastic", "flow", 3.0)
    latent = sample_latents(Exact(), scheduler, SHAPE, steps=steps, noise=NoiseSource(0))  # type: ignore[arg-type]
    variance, times = 1.0, sampling_times(steps, 3.0).tolist()
    for time, after in itertools.pairwise(times):  # of the noisy latent's offset from (1 - time) MEAN
        known = (1 - time) * STD**2 / ((1 - time) ** 2 * STD**2 + time**2)
        variance = ((1 - after) * known) ** 2 * variance + after**2
    assert latent.mean() == pytest.approx(MEAN, abs=2e-3)
    assert latent.std() == pytest.approx(variance**0.5, rel=0.02)
    assert 0.3 * STD < latent.std() < 0.9 * STD, "less than the data's: docs/sampling.md says so"


def test_the_stochastic_sampler_draws_from_each_clip_s_own_noise() -> None:
    def sampled(clips: range) -> Tensor:
        scheduler, noise = make_scheduler("stochastic", "flow"), NoiseSource.of_clips(3, clips)
        return sample_latents(Exact(), scheduler, (len(clips), 4, 12), steps=5, noise=noise)  # type: ignore[arg-type]

    assert torch.allclose(sampled(range(4))[2:], sampled(range(2, 4)), atol=1e-6)


@pytest.mark.parametrize("name", OF_FLOW)
def test_steps_are_even_in_time_up_to_the_shift(name: str, tmp_path: Path) -> None:
    """From pure noise to none, none wasted; and after saving too."""
    made = make_scheduler(name, "flow", 3.0)
    made.save_pretrained(tmp_path)
    for scheduler in (made, type(made).from_pretrained(tmp_path)):
        for steps in (1, 2, 5, 1000):
            scheduler.set_timesteps(steps)
            even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
            times = 1000 * 3 * even / (1 + 2 * even)
            seen = scheduler.timesteps if name != "heun" else torch.unique(scheduler.timesteps).flip(0)
            assert torch.allclose(seen.double(), times, atol=1e-3)
            assert len(scheduler.timesteps) == passes(scheduler, steps) == len(scheduler.sigmas) - 1
            assert scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("name", OF_FLOW)
@pytest.mark.parametrize("steps", [1, 2, 300])
def test_few_and_many_steps_are_finite_and_inside(name: str, steps: int) -> None:
    latent = sample_latents(Exact(), make_scheduler(name, "flow"), (2, 4, 12), steps=steps, noise=NoiseSource(0))  # type: ignore[arg-type]
    assert latent.isfinite().all()
    if steps == 1:
        assert torch.allclose(latent, torch.full_like(latent, MEAN), atol=1e-3), "one step gives the mean"


def test_latents_end_inside_their_range(tiny_autoencoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are decoded, and those that the next clip continues."""
    seen: list[Tensor] = []

    class Far(Exact):
        def forward(self, latent: Tensor, timestep: Tensor, condition: Tensor | None = None) -> SimpleNamespace:
            seen.extend([] if condition is None else [condition])
            return SimpleNamespace(sample=torch.full_like(latent, -9.0))

    decode = tiny_autoencoder.decode
    monkeypatch.setattr(tiny_autoencoder, "decode", lambda latent: (seen.append(latent), decode(latent))[1])
    sample_video(tiny_autoencoder, Far(), SamplingOptions(clips=1, frames=4, steps=1))  # type: ignore[arg-type]
    assert len(seen) == 3
    assert all(torch.equal(latent, torch.ones_like(latent)) for latent in seen)


def test_times_are_logit_normal_and_shifted() -> None:
    """P(t < x) = Phi((logit(x) - mean) / std); the shift adds its logarithm to the logit."""
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std, shift = -0.5, 1.3, 3.0
    times = logit_normal_times(normal, mean, std, shift)
    for at in (0.1, 0.5, 0.9):
        logit = torch.tensor(at, dtype=torch.float64).logit() - torch.tensor(shift).log()
        expected = torch.special.ndtr((logit - mean) / std).item()
        assert (times < at).double().mean().item() == pytest.approx(expected, abs=5e-3)
    assert torch.equal(shifted(times, 1.0), times)
    assert torch.equal(shifted(torch.tensor([0.0, 1.0]), 5.0), torch.tensor([0.0, 1.0]))


def test_the_path_goes_from_latent_to_noise() -> None:
    latent, noise = torch.rand(2, 4, 12), torch.randn(2, 4, 12)
    ends = interpolate(latent, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(ends[0], latent[0])
    assert torch.equal(ends[1], noise[1])


def test_a_denoiser_of_flow_gives_what_the_network_puts_out_and_takes_every_time() -> None:
    model = Denoiser(**FLOW, prediction="flow", time_shift=3.0)
    output = torch.randn(2, 12, 4)
    model._unet = lambda tokens, embedding: output  # type: ignore[method-assign]
    latent = torch.randn(2, 4, 12)
    assert torch.equal(model(latent, torch.tensor([0.25, 1000.0])).sample, output.transpose(1, 2))
    with pytest.raises(ValueError, match="from 0 to 1000"):
        model(latent, 1000.5)


def test_the_network_tells_fractions_of_a_time_apart() -> None:
    model = filled(Denoiser(**FLOW, prediction="flow"))
    latent = torch.randn(1, 4, 12)
    times = (500, 500.0, 500.5)
    whole, same, later = (guided_prediction(model, latent, time) for time in times)
    assert torch.equal(whole, same)
    assert not torch.equal(whole, later)


def test_guidance_of_velocities_is_that_of_the_noise() -> None:
    """(1 + w) u(condition) - w u(none), which is the velocity of the guided noise at this time and latent."""
    model = filled(Denoiser(**FLOW, prediction="flow"))
    latent, condition, time = torch.randn(1, 4, 12), torch.rand(1, 4, 12), 400.0
    guided = guided_prediction(model, latent, time, condition, 1.5)
    with_it, without = guided_prediction(model, latent, time, condition), guided_prediction(model, latent, time)
    noises = [latent + (1 - time / 1000) * velocity for velocity in (with_it, without)]
    noise = 2.5 * noises[0] - 1.5 * noises[1]
    assert torch.allclose((noise - latent) / (1 - time / 1000), guided, atol=1e-5)


@pytest.mark.parametrize(
    ("prediction", "scheduler", "words"),
    [
        ("flow", "ddim", "the scheduler ddim doesn't go with this denoiser, which predicts flow: choose one of unipc"),
        ("noise", "heun", "the scheduler heun doesn't go with this denoiser, which predicts noise: choose one of ddim"),
        ("v", "euler", "which predicts v"),
        ("flow", DDIMScheduler(), "DDIMScheduler doesn't go with this denoiser, which predicts flow"),
        ("v", FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler doesn't go with this denoiser"),
        ("flow", "nonsense", "there is no scheduler called 'nonsense'"),
    ],
)
def test_schedulers_that_dont_fit_are_refused(prediction: str, scheduler: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        scheduler_of(Denoiser(**FLOW, prediction=prediction), scheduler)
    assert words in str(caught.value)


def test_diffusers_own_flow_schedulers_fit() -> None:
    latent = sample_latents(
        Exact(),  # type: ignore[arg-type]
        scheduler_of(Denoiser(**FLOW, prediction="flow"), FlowMatchEulerDiscreteScheduler()),
        SHAPE,
        steps=50,
        noise=NoiseSource(0),
    )
    assert latent.std() == pytest.approx(STD, abs=1e-2)


def test_a_denoiser_s_own_way_to_be_sampled() -> None:
    """Counts where nothing else is asked for; a distilled one has no other."""
    model = Denoiser(**FLOW, prediction="flow", sampling_scheduler="stochastic", sampling_steps=20)
    assert fitting_name(model, "auto") == "stochastic" and fitting_name(model, "unipc") == "unipc"
    assert (fitting_steps(model, None), fitting_steps(model, 7)) == (20, 7)
    for wrong in ({"sampling_steps": 0}, {"sampling_guidance": -1.0}, {"sampling_guidance": float("nan")}):
        with pytest.raises(ValueError, match="must be"):
            Denoiser(**FLOW, prediction="flow", **wrong)
    for own in ({"sampling_steps": 4}, {"sampling_guidance": 1.0}, {"sampling_scheduler": "euler"}):
        with pytest.raises(ValueError, match="has its own steps and guidance"):
            Denoiser(**FLOW, prediction="flow", distilled_steps=4, **own)
    student = Denoiser(**FLOW, prediction="flow", distilled_steps=4)
    assert not scheduler_of(student, "auto").config["stochastic_sampling"]
    for other in ("stochastic", make_scheduler("stochastic", "flow")):
        with pytest.raises(UserError, match="was distilled for euler"):
            scheduler_of(student, other)
    student = Denoiser(**FLOW, prediction="flow", distilled_steps=4, sampling_scheduler="stochastic")
    assert scheduler_of(student, "auto").config["stochastic_sampling"]
    for other in ("euler", make_scheduler("euler", "flow")):
        with pytest.raises(UserError, match="was distilled for stochastic"):
            scheduler_of(student, other)


def test_auto_follows_the_model_and_eta_is_ddim_s(tiny_autoencoder: Any) -> None:
    model = Denoiser(**FLOW, prediction="flow", time_shift=2.0).eval()
    found = scheduler_of(model, "auto")
    assert type(found).__name__ == "FlowUniPCScheduler"
    assert found.config["flow_shift"] == 2
    assert type(scheduler_of(Denoiser(**FLOW), "auto")).__name__ == "ReleaseDDIMScheduler"
    with pytest.raises(UserError, match=r"eta is DDIM's share of new noise, and unipc has none"):
        sample_video(tiny_autoencoder, model, SamplingOptions(clips=1, frames=2, eta=0.0))


@pytest.mark.parametrize("scheduler", OF_FLOW)
def test_progress_counts_the_passes_of_the_denoiser(tiny_autoencoder: Any, scheduler: str) -> None:
    model = Denoiser(**FLOW, prediction="flow").eval()
    seen: list[tuple[int, int]] = []
    options = SamplingOptions(clips=1, frames=4, steps=3, scheduler=scheduler)
    video = sample_video(tiny_autoencoder, model, options, progress=lambda done, total: seen.append((done, total)))
    assert video.shape[2] == 4
    count = 2 * (5 if scheduler == "heun" else 3)
    assert seen == [(index + 1, count) for index in range(count)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(prediction="velocity"), "must be one of noise, v, flow, not 'velocity'"),
        (dict(prediction="v", time_shift=2.0), "goes with prediction flow only"),
        (dict(prediction="flow", time_shift=0.0), "must be above 0"),
    ],
)
def test_what_a_denoiser_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Denoiser(**FLOW, **options)


def test_the_release_has_no_flow() -> None:
    with pytest.raises(CheckpointError, match="flow"):
        to_release(Denoiser(**FLOW, prediction="flow"))


def test_statistics_make_latents_normal_and_are_undone() -> None:
    """By plane and channel, and the same in what is saved and loaded in bf16."""
    scale = torch.linspace(0.12, 0.4, 12).view(3, 4)
    offset = torch.linspace(-0.5, 0.5, 12).view(3, 4)
    layout, tokens = TriplaneLayout(2, 2, 2), torch.randn(500, 4, 12)
    of_token = [values.t().repeat_interleave(4, dim=1) for values in (scale, offset)]
    latents = tokens * of_token[0] + of_token[1]
    mean, std = latent_statistics.measure(latents.split(100), layout)
    assert torch.allclose(torch.tensor(mean), offset, atol=0.03)
    assert torch.allclose(torch.tensor(std), scale, rtol=0.05)
    model = Denoiser(**FLOW, prediction="flow", latent_mean=mean, latent_std=std)
    normal = latent_statistics.normalized(latents, model)
    for plane in layout.split(normal, dim=2):
        assert torch.allclose(plane.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
        assert torch.allclose(plane.square().mean((0, 2, 3)), torch.ones(4), atol=1e-3)
    assert torch.allclose(latent_statistics.restored(normal, model), latents, atol=1e-6)
    windows = latents.view(250, 2, 4, 12)  # as cached
    assert torch.equal(latent_statistics.normalized(windows, model.to(torch.bfloat16)).view_as(normal), normal)


def test_without_statistics_latents_stay_as_they_are() -> None:
    latent, model = torch.rand(1, 4, 12), Denoiser(**FLOW)
    assert latent_statistics.normalized(latent, model) is latent
    assert latent_statistics.restored(latent, model) is latent


def test_a_channel_that_is_constant_is_not_blown_up() -> None:
    _, std = latent_statistics.measure([torch.full((2, 1, 12), 0.3)], TriplaneLayout(2, 2, 2))
    assert std == [[latent_statistics.LEAST_STD]] * 3


def test_samples_of_normal_latents_have_the_statistics_again(tiny_autoencoder: Any) -> None:
    """The exact velocity of N(0, 1): what is decoded, and continued, are the numbers of the autoencoder."""
    seen: list[tuple[str, Tensor]] = []

    class Normal(Exact):
        def __init__(self) -> None:
            super().__init__()
            self.config |= {"latent_mean": [[0.3] * 4] * 3, "latent_std": [[0.05] * 4] * 3}

        def forward(self, latent: Tensor, timestep: Tensor, condition: Tensor | None = None) -> SimpleNamespace:
            seen.extend([] if condition is None else [("continued", condition)])
            time = (timestep / 1000).view(-1, 1, 1)
            return SimpleNamespace(sample=(2 * time - 1) / ((1 - time) ** 2 + time**2) * latent)

    class Coder(nn.Module):
        layout, config, dtype = tiny_autoencoder.layout, tiny_autoencoder.config, torch.float32

        def decode(self, latent: Tensor) -> Any:
            seen.append(("decoded", latent))
            return tiny_autoencoder.decode(latent)

        def encode(self, video: Tensor) -> SimpleNamespace:
            return SimpleNamespace(latent=torch.full((len(video), 4, 12), 0.35))

    condition = torch.zeros(1, 3, 2, 16, 16)
    sample_video(Coder(), Normal(), SamplingOptions(clips=64, frames=4, steps=20, condition=condition))  # type: ignore[arg-type]
    decoded = [latent for kind, latent in seen if kind == "decoded"]
    continued = [latent for kind, latent in seen if kind == "continued"]
    assert decoded[0].mean() == pytest.approx(0.3, abs=5e-3)
    assert decoded[0].std() == pytest.approx(0.05, abs=3e-3)
    assert torch.allclose(continued[0], torch.ones(64, 4, 12), atol=1e-5), "the condition of the caller, encoded"
    assert torch.allclose(continued[-1], (decoded[0] - 0.3) / 0.05, atol=1e-4), "the clip before"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(prediction="flow", latent_mean=[[0.0] * 4] * 3), "go together"),
        (dict(prediction="v", latent_mean=[[0.0] * 4] * 3, latent_std=[[1.0] * 4] * 3), "prediction flow only"),
        (dict(prediction="flow", latent_mean=[[0.0] * 4] * 3, latent_std=[[1.0] * 3] * 3), "latent_std must hold 3"),
        (dict(prediction="flow", latent_mean=[[0.0] * 4] * 3, latent_std=[[0.0] * 4] * 3), "must be above 0"),
    ],
)
def test_what_statistics_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Denoiser(**FLOW, **options)
