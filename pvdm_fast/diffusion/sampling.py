"""Sampling: noise to latents, latents to video, and long videos clip after clip."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvdm_fast.diffusion.cuda_graph import choose_prediction
from pvdm_fast.diffusion.guidance import guided_prediction
from pvdm_fast.errors import UserError
from pvdm_fast.jobs import numbers, threads
from pvdm_fast.jobs.environment import plain_defaults
from pvdm_fast.jobs.transfer import to_device
from pvdm_fast.models.latent_statistics import normalized, restored

if TYPE_CHECKING:
    from pvdm_fast.models import Autoencoder, Denoiser

Progress = Callable[[int, int], None]
OnStep = Callable[[int, float, Tensor], Tensor]

# Between the seeds of a seed's clips: 2**32 over the golden ratio. A generator on the CPU takes 32 bits of its seed.
# This number is odd, so that no two of 2**32 clips have the same; and by the golden ratio the clips of seeds that are
# less than 1,000 apart meet after 2.6 million clips at the earliest (tests/diffusion/test_clip_noise.py).
CLIP_STEP = 0x9E3779B1


class NoiseSource:
    """Standard normal noise. It is drawn on the CPU, so a seed gives the same noise on every device.

    Args:
        seed: a number, a generator (used on its own device), or a list with one generator per video.
    """

    def __init__(self, seed: int | torch.Generator | list[torch.Generator]) -> None:
        if not isinstance(seed, (torch.Generator, list)):
            seed = torch.Generator().manual_seed(numbers.SEED.checked("seed", seed))
        self.generator = seed

    @classmethod
    def of_clips(cls, seed: int, clips: Iterable[int]) -> NoiseSource:
        """A generator for each clip, that depends on nothing but the seed and the clip's number.

        Clip 0 has the noise of ``torch.Generator().manual_seed(seed)``. Seeds that differ by a multiple of 2**32 are
        the same.

        Args:
            seed: a number.
            clips: the numbers of the clips, from 0.
        """
        seed = numbers.SEED.checked("seed", seed)
        return cls([torch.Generator().manual_seed((seed + clip * CLIP_STEP) % 2**32) for clip in clips])

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """A float32 tensor of the given shape, on the generator's device."""
        if isinstance(self.generator, list):
            if len(self.generator) != shape[0]:
                raise UserError(f"there are {len(self.generator)} generators for {shape[0]} videos: give one for each")
            return torch.cat([_normal((1, *shape[1:]), generator) for generator in self.generator])
        return _normal(shape, self.generator)

    def on(self, device: torch.device, shape: Sequence[int]) -> Tensor:
        """The same on another device: what was drawn on the CPU crosses without being waited for."""
        drawn = self(shape)
        return to_device([drawn], device)[0] if drawn.device.type == "cpu" else drawn.to(device)


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    scheduler: Any,
    shape: Sequence[int],
    *,
    steps: int,
    noise: NoiseSource,
    condition: Tensor | None = None,
    labels: Tensor | None = None,
    guidance: float = 0.0,
    eta: float = numbers.DEFAULT_ETA,
    predict: Callable[..., Tensor] = guided_prediction,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise latents from pure noise.

    Args:
        denoiser: predicts noise, or velocities. Put it into eval mode first.
        scheduler: from `pvdm_fast.diffusion.schedulers.make_scheduler`, or another diffusers scheduler that takes what
            the denoiser predicts.
        shape: (B, D, N) of the latents.
        steps: number of the scheduler's steps, 1 to 1000.
        noise: the source of the starting noise and of each step's noise.
        condition: latents (B, D, N) of the clips before, or None.
        labels: classes (B,) int64, or None.
        guidance: weight w of `pvdm_fast.diffusion.guidance`. It changes nothing without a condition or labels.
        eta: DDIM only: 0 adds no noise, 1 as much as the DDPM posterior.
        predict: what runs the denoiser, with the arguments of `pvdm_fast.diffusion.guidance.guided_prediction`.
        on_step: called after each pass of the denoiser, which is each step but for Heun's, as ``on_step(index,
            timestep, latent)``. Returns the latent to continue with.

    Returns:
        (B, D, N) float32 on the denoiser's device, as the denoiser sees latents: `stream_video` restores and clamps
        a flow's.
    """
    from pvdm_fast.nn import copies

    steps = numbers.SAMPLING_STEPS.checked("the number of sampling steps", steps)
    guidance, eta = numbers.GUIDANCE.checked("guidance", guidance), numbers.ETA.checked("eta", eta)
    device = next(denoiser.parameters()).device
    with plain_defaults():  # diffusers' schedulers compute with these
        scheduler.set_timesteps(steps, device=device)
    latent = noise.on(device, shape)
    # Once, not in each step, weights are joined, and under autocast cast (a CUDA graph casts them in each step).
    with copies.kept():
        for index, timestep in enumerate(scheduler.timesteps.tolist()):
            with threads.unit("denoising step"):
                predicted = predict(denoiser, latent, timestep, condition, guidance, labels).float()
                with plain_defaults():
                    latent = _scheduler_step(scheduler, predicted, timestep, latent, noise, eta)
            if on_step is not None:
                latent = on_step(index, timestep, latent)
    return latent


def _scheduler_step(
    scheduler: Any, predicted: Tensor, timestep: float, latent: Tensor, noise: NoiseSource, eta: float
) -> Tensor:
    """One step of any scheduler, with all its randomness from ``noise``."""
    from pvdm_fast.diffusion.schedulers import ReleaseDDIMScheduler

    if isinstance(scheduler, ReleaseDDIMScheduler):
        draws = eta > 0 and scheduler.next_time(timestep) >= 0
        extra = noise.on(latent.device, latent.shape) if draws else None
        return scheduler.step(predicted, timestep, latent, eta=eta, variance_noise=extra).prev_sample
    if scheduler.config.get("prediction_type") == "sample":
        level = scheduler.alphas_cumprod[int(timestep)].item()
        predicted = ((latent - (1 - level) ** 0.5 * predicted) / level**0.5).clamp(-1, 1)
    taken = inspect.signature(scheduler.step).parameters
    options = {"eta": eta, "generator": noise.generator}
    options = {name: value for name, value in options.items() if name in taken}
    return scheduler.step(predicted, timestep, latent, **options).prev_sample


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What is sampled, and how. The values are checked here, and passed on as one object.

    Args:
        clips: number of videos B.
        frames: their length. The last clip is cut to fit.
        steps: number of denoising steps per clip, 1 to 1000. None: the denoiser's own, or as many as it was distilled
            for, else 50.
        scheduler: a name of `pvdm_fast.diffusion.schedulers.make_scheduler`, or a scheduler. "auto" is the denoiser's
            own, else "ddim", or "unipc" where it predicts the velocity, or what it was distilled for.
        guidance: weight w of `pvdm_fast.diffusion.guidance`. 0 turns it off. None: the denoiser's own.
        eta: DDIM only: 0 adds no noise, 1 as much as the DDPM posterior.
        seed: the same seed gives the same videos on the same machine. Each has noise of its own
            (`NoiseSource.of_clips`), whatever the number of clips. Or a source of noise.
        condition: the video that the samples continue, (B or 1, 3, T, H, W) in [-1, 1], of the model's size. It isn't
            repeated in the samples. Without it the first clip has no condition.
        labels: classes (B,) int64, for a denoiser with classes, where its number of classes means no class. None: its
            classes in turn.
        cuda_graph: capture the denoiser's pass as a CUDA graph and replay it in every step. None: on a GPU, from 10
            steps on; where that fails, a warning says why and sampling goes on without. True: that or an error. Not yet
            run on a GPU.

    Raises:
        UserError: a number is out of range, or the scheduler is unknown.
    """

    clips: int
    frames: int
    steps: int | None = None
    scheduler: str | Any = "auto"
    guidance: float | None = None
    eta: float = numbers.DEFAULT_ETA
    seed: int | NoiseSource = 0
    condition: Tensor | None = None
    labels: Tensor | None = None
    cuda_graph: bool | None = None

    def __post_init__(self) -> None:
        from pvdm_fast.diffusion.schedulers import check_name

        for name, number in RANGES.items():
            if getattr(self, name) is not None or name not in OPEN:
                object.__setattr__(self, name, number.checked(NAMES.get(name, name), getattr(self, name)))
        if not isinstance(self.seed, NoiseSource):
            numbers.SEED.checked("the seed", self.seed)
        if isinstance(self.scheduler, str):
            check_name(self.scheduler)
        numbers.check_eta(self.scheduler, self.eta)


RANGES = {
    "clips": numbers.VIDEOS,
    "frames": numbers.FRAMES,
    "steps": numbers.SAMPLING_STEPS,
    "guidance": numbers.GUIDANCE,
    "eta": numbers.ETA,
}
NAMES = {"steps": "the number of sampling steps"}
OPEN = ("steps", "guidance")  # None: the denoiser's own


def stream_video(
    autoencoder: Autoencoder,
    denoiser: Denoiser,
    options: SamplingOptions | None = None,
    *,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
    predict: Callable[..., Tensor] | None = None,
    **fields: Any,
) -> Iterator[Tensor]:
    """Videos of any length in pieces: one clip of the model after the other, each conditioned on the one before.

    Each clip depends only on the latent of the clip before, so memory doesn't grow with the length.

    Args:
        autoencoder, denoiser: a matching pair in eval mode, on one device.
        options: what to sample, and how.
        fields: those of `SamplingOptions`, in place of ``options``.
        progress: called as ``progress(passes of the denoiser done, total passes)``. Heun's steps are two passes each.
        on_step: called as ``on_step(passes done before, timestep, latent)``. Returns the latent to continue with.
        predict: what predicts the noise, where several calls share it
            (`pvdm_fast.diffusion.cuda_graph.choose_prediction`). By default it is chosen here, by ``cuda_graph``.

    Yields:
        (B, 3, t, H, W) float32 in [-1, 1] on the CPU. Each has T frames, the last one the rest.

    Raises:
        UserError: the two models or the denoiser and the scheduler don't belong together, a number is out of range, or
            a CUDA graph has no GPU.
    """
    wanted = SamplingOptions(**fields) if options is None else replace(options, **fields)
    frames, device = wanted.frames, next(denoiser.parameters()).device
    sampler = fitting_scheduler(denoiser, wanted)
    each, guidance = fitting_steps(denoiser, wanted.steps), fitting_guidance(denoiser, wanted.guidance)
    steps = passes(sampler, each)
    _check_request(autoencoder, denoiser, wanted)
    noise = wanted.seed
    if not isinstance(noise, NoiseSource):
        noise = NoiseSource.of_clips(noise, range(wanted.clips))
    layout = denoiser.layout
    shape = (wanted.clips, int(denoiser.config["latent_channels"]), layout.num_tokens)
    rounds = math.ceil(frames / layout.time)
    graphs = 2 if wanted.condition is None and rounds > 1 else 1  # the first clip alone has no condition
    predict = predict or choose_prediction(denoiser, wanted.cuda_graph, rounds * steps // graphs)
    latent: Tensor | None = None
    if wanted.condition is not None:
        with torch.no_grad():
            encoded = autoencoder.encode(wanted.condition.to(device, autoencoder.dtype)).latent.float()
        latent = normalized(encoded, denoiser).expand(shape)
    labels = classes_in_turn(denoiser, range(wanted.clips)) if wanted.labels is None else wanted.labels
    labels = None if labels is None else labels.to(device)
    for index in range(rounds):

        def after_step(step: int, timestep: float, latent: Tensor, before: int = index * steps) -> Tensor:
            if on_step is not None:
                latent = on_step(before + step, timestep, latent)
            if progress is not None:
                progress(before + step + 1, rounds * steps)
            return latent

        latent = sample_latents(
            denoiser,
            sampler,
            shape,
            steps=each,
            noise=noise,
            condition=latent,
            labels=labels,
            guidance=guidance,
            eta=wanted.eta,
            predict=predict,
            on_step=after_step,
        )
        decodable = restored(latent, denoiser)
        if denoiser.config.get("prediction") == "flow":  # the other samplers clamp in each step
            decodable = decodable.clamp(-1, 1)  # as the autoencoder's are
            latent = normalized(decodable, denoiser)
        # Nothing here keeps a clip until the next one is there, as a name for it would, or no_grad around the whole.
        yield _decode(autoencoder, decodable)[:, :, : frames - index * layout.time]


@torch.no_grad()
def _decode(autoencoder: Autoencoder, latent: Tensor) -> Tensor:
    return autoencoder.decode(latent.to(autoencoder.dtype)).sample.float().cpu()


def sample_video(
    autoencoder: Autoencoder, denoiser: Denoiser, options: SamplingOptions | None = None, **more: Any
) -> Tensor:
    """`stream_video` as one tensor, with its arguments: videos (B, 3, frames, H, W) float32 in [-1, 1], on the
    CPU."""
    return torch.cat(list(stream_video(autoencoder, denoiser, options, **more)), dim=2)


def fitting_scheduler(denoiser: Denoiser, options: SamplingOptions) -> Any:
    """The scheduler of these options for this denoiser. Raises UserError if they don't go together."""
    from pvdm_fast.diffusion.schedulers import fitting_name, scheduler_of

    if isinstance(options.scheduler, str):
        numbers.check_eta(fitting_name(denoiser, options.scheduler), options.eta)
    return scheduler_of(denoiser, options.scheduler)


def fitting_steps(denoiser: Denoiser, steps: int | None) -> int:
    """The number of steps for this denoiser, where so many or None are asked for.

    Raises:
        UserError: the denoiser was distilled for another number.
    """
    distilled = denoiser.config.get("distilled_steps")
    if distilled is None:
        return int(denoiser.config.get("sampling_steps") or numbers.DEFAULT_STEPS) if steps is None else steps
    if steps not in (None, distilled):
        raise UserError(
            f"this denoiser was distilled to sample in {distilled} steps, not in {steps}: leave the number "
            "out, or sample from its teacher"
        )
    return int(distilled)


def fitting_guidance(denoiser: Denoiser, guidance: float | None) -> float:
    """The weight of guidance for this denoiser, where so much or None is asked for.

    Raises:
        UserError: there is guidance, and the denoiser was distilled, which leaves none to add.
    """
    if guidance and denoiser.config.get("distilled_steps") is not None:
        raise UserError(
            f"guidance {guidance:g} can't be added to a distilled denoiser: leave it out, or distil one with "
            "it (python -m pvdm_fast.distill RUN --guidance W)"
        )
    return float(denoiser.config.get("sampling_guidance") or 0.0) if guidance is None else guidance


def classes_in_turn(denoiser: Denoiser, clips: range) -> Tensor | None:
    """The class (B,) int64 of each of these clips where none is asked for: 0, 1, ... and again from 0. None for a
    denoiser without classes."""
    count = denoiser.config.get("num_classes")
    return None if count is None else torch.tensor(clips, dtype=torch.long) % int(count)


def names_in_turn(denoiser: Denoiser, clips: range) -> list[str]:
    """The names of `classes_in_turn`, an empty list for a denoiser whose classes have none."""
    labels, names = classes_in_turn(denoiser, clips), denoiser.config.get("class_names")
    return [] if labels is None or not names else [names[label] for label in labels.tolist()]


def passes(scheduler: Any, steps: int) -> int:
    """How often the denoiser runs in this many steps: a scheduler of second order runs it twice in all but the last."""
    order: int = scheduler.order
    return order * steps - (order - 1)


def _check_request(autoencoder: Autoencoder, denoiser: Denoiser, options: SamplingOptions) -> None:
    """Raises UserError if these models can't sample what was asked for."""
    clips, condition, labels = options.clips, options.condition, options.labels
    check_pair(autoencoder, denoiser)
    if condition is not None:
        size = (3, *(int(autoencoder.config[name]) for name in ("frames", "height", "width")))
        if condition.shape[1:] != size or condition.shape[0] not in (1, clips):
            raise UserError(f"the condition must be {(clips, *size)} or {(1, *size)}, but is {tuple(condition.shape)}")
        if not condition.is_floating_point() or not bool((condition.abs() <= 1 + 1e-3).all()):
            raise UserError("the condition must be a video in [-1, 1], all of it finite")
    if labels is not None:
        number = denoiser.config["num_classes"]
        if number is None:
            raise UserError("this model was trained without classes: sample without one, or train with classes")
        if labels.shape != (clips,) or not bool(((labels >= 0) & (labels <= number)).all()):
            raise UserError(f"expected {clips} class numbers from 0 to {number - 1}, not {labels.tolist()}")


def check_pair(autoencoder: Autoencoder, denoiser: Denoiser) -> None:
    """Raises UserError unless the denoiser was made for the autoencoder's latents."""
    for what, have, want in (
        ("layout", denoiser.layout, autoencoder.layout),
        ("latent channels", denoiser.config["latent_channels"], autoencoder.config["latent_channels"]),
    ):
        if have != want:
            raise UserError(
                f"the denoiser's {what} ({have}) differ from the autoencoder's ({want}): "
                "use two models that were trained together"
            )
