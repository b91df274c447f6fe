"""The two stages of training: the autoencoder, then the denoiser of its latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvdm_fast.backends.precision import DTYPES
from pvdm_fast.data.transforms import to_float
from pvdm_fast.diffusion.flow import logit_normal_times
from pvdm_fast.diffusion.noise import diffusion_loss, joint_batch, joint_latents
from pvdm_fast.diffusion.sampling import check_pair
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.processes import Processes
from pvdm_fast.jobs.share import Share
from pvdm_fast.jobs.transfer import to_device
from pvdm_fast.losses.psnr import psnr
from pvdm_fast.models import latent_statistics
from pvdm_fast.models.latent_statistics import normalized
from pvdm_fast.models.noise_schedule import TRAIN_STEPS, NoiseSchedule
from pvdm_fast.training.config import TrainConfig
from pvdm_fast.training.hyperparameters import AutoencoderOptions, DiffusionOptions, StageOptions
from pvdm_fast.training.sharding import cut_like, local, of_parts

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pvdm_fast.models import Autoencoder, Denoiser

L1_WEIGHT, L2_WEIGHT = 4.0, 16.0
Classes = Sequence[str | None] | None
Labelled = tuple[Tensor, Classes]
"""Clips (B, 3, T, H, W), and the name of each one's class or None."""
WHOLE = Share()
STATISTICS = ("latent_mean", "latent_std")


class Stage(ABC):
    """What the training loop needs to know of a stage.

    ``trains_model``: whether the step that is being taken changes the model. ``ranks``: whether a better held-out score
    means a better model. ``in_float32``: whether the stage computes in float32 whatever the run's precision, but for
    what it casts itself. ``pad_short``: whether half of a clip may be padding.
    """

    name: str
    model: nn.Module
    options: StageOptions
    clip_frames: int
    height: int
    width: int
    trains_model = True
    ranks = True
    in_float32 = False
    pad_short = False
    data: str | None = None  # what it reads in place of --data

    @abstractmethod
    def loss(
        self,
        model: nn.Module,
        video: Tensor,
        generator: torch.Generator,
        share: Share = WHOLE,
        classes: Classes = None,
    ) -> Tensor:
        """The training loss of a batch (B, 3, clip_frames, H, W), uint8 or in [-1, 1].

        Nothing in it waits for a GPU. ``model`` is the prepared form of ``self.model``.
        The batch is the ``share`` of a global one: the mean of all processes' losses is the global batch's.
        ``classes``: the name of each clip's class, or None where it has none.
        """

    @abstractmethod
    def score(self, batches: Iterable[Labelled]) -> dict[str, float]:
        """Scores of held-out clips."""

    def to(self, device: torch.device) -> None:  # noqa: B027
        """Move what isn't trained. accelerate moves the model itself."""

    def prepare(self, accelerator: Accelerator) -> None:  # noqa: B027
        """Prepare what is trained besides the model."""

    def before_training(self, clips: Iterable[Tensor], processes: Processes) -> None:  # noqa: B027
        """Measure what the stage needs of the data, on batches of training clips. Called before the first step."""

    def before_step(self, step: int) -> None:  # noqa: B027
        """Called before the losses of step number ``step``, counted from 0."""

    def after_backward(self) -> None:  # noqa: B027
        """Called after the backward pass of each batch of a step."""

    def measured(self) -> dict[str, Tensor]:
        """Scalars on the device to record, beside the loss; asked for once a step, after its last backward pass."""
        return {}

    def after_step(self, measured: Mapping[str, float]) -> None:  # noqa: B027
        """Called after each optimizer step with the values of `measured`; not where it was left out."""

    def after_skip(self) -> None:  # noqa: B027
        """Called instead of `after_step` where the step was left out."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beyond model and optimizer."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore what `state` returned."""

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Eval mode, with the weights that will be saved for use."""
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()


def video_size(autoencoder: Autoencoder) -> tuple[int, int, int]:
    """Frames, height and width of the clips an autoencoder takes."""
    config = autoencoder.config
    return int(config["frames"]), int(config["height"]), int(config["width"])


class AutoencoderStage(Stage):
    """Reconstruction: the mean absolute or squared error, with noise on the latent if the options say so."""

    name = "autoencoder"

    def __init__(self, config: TrainConfig, autoencoder: Autoencoder) -> None:
        self.model: Autoencoder = autoencoder
        self.options: AutoencoderOptions = config.autoencoder
        self.clip_frames, self.height, self.width = video_size(autoencoder)

    def loss(
        self,
        model: nn.Module,
        video: Tensor,
        generator: torch.Generator,
        share: Share = WHOLE,
        classes: Classes = None,
    ) -> Tensor:
        video = to_float(video)
        noise = to_device(self.latent_noise(len(video), generator, share), video.device)
        return self.pixel_loss(model(video, noise[0] if noise else None).sample.float(), video)

    def latent_noise(self, clips: int, generator: torch.Generator, share: Share) -> list[Tensor]:
        """The noise (clips, D, N) to add to the latent in training, on the CPU; an empty list where there is none."""
        if self.options.latent_noise == 0:
            return []
        shape = (share.world * clips, int(self.model.config["latent_channels"]), self.model.layout.num_tokens)
        return [self.options.latent_noise * share.of(torch.randn(shape, generator=generator))]

    def pixel_loss(self, sample: Tensor, video: Tensor) -> Tensor:
        """The loss that compares pixels, weighted."""
        if self.options.loss == "l1":
            return L1_WEIGHT * F.l1_loss(sample, video)
        return L2_WEIGHT * F.mse_loss(sample, video)

    def score(self, batches: Iterable[Labelled]) -> dict[str, float]:
        """``psnr``: of reconstructions, in dB, averaged over clips."""
        values = [psnr(self.model(video).sample, video) for video, _ in batches]
        return {"psnr": torch.cat(values).mean().item()}


class DiffusionStage(Stage):
    """Prediction of noise or velocity on latents, unconditional and conditional together, with averaged weights."""

    name = "diffusion"

    def __init__(self, config: TrainConfig, autoencoder: Autoencoder, denoiser: Denoiser) -> None:
        from diffusers.training_utils import EMAModel

        check_pair(autoencoder, denoiser)
        self.model: Denoiser = denoiser
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.options: DiffusionOptions = config.diffusion
        frames, self.height, self.width = video_size(autoencoder)
        self.clip_frames = 2 * frames
        self.conditional_probability = config.diffusion.conditional_probability
        self.class_dropout = config.diffusion.class_dropout
        # of a sharded model each process averages its part
        # -1: the k-th update has the decay min(decay, (1 + k) / (10 + k)), as the release's
        parameters, decay = local(denoiser.parameters()), config.diffusion.ema_decay
        self.ema = EMAModel(parameters, decay=decay, update_after_step=-1, foreach=True)
        self.pad_short, self.in_float32 = config.video.pad_short, config.diffusion.float32
        self.encoding: Callable[[], AbstractContextManager[object]] = nullcontext  # the autocast around it, if any
        self.step = 0  # the one that is being taken
        self.schedule = NoiseSchedule.create()

    def to(self, device: torch.device) -> None:
        self.autoencoder.to(device)
        self.ema.to(device)
        self.schedule = NoiseSchedule.create(device)

    def prepare(self, accelerator: Accelerator) -> None:
        if self.in_float32 and accelerator.mixed_precision != "no":
            dtype = DTYPES[str(accelerator.mixed_precision)]
            self.encoding = partial(torch.autocast, accelerator.device.type, dtype)

    def loss(
        self,
        model: nn.Module,
        video: Tensor,
        generator: torch.Generator,
        share: Share = WHOLE,
        classes: Classes = None,
    ) -> Tensor:
        """Also of cached latents (B, windows, D, N)."""
        target, condition = self._latents(video, generator, share)
        clips = share.world * len(target)
        drawn = [share.of(torch.randn((clips, *target.shape[1:]), generator=generator))]
        drawn.append(share.of(self._draw_times(clips, generator)))
        labels = self._labels(classes, len(target), generator, share)
        drawn += [] if labels is None else [labels]
        noise, time, *classed = to_device(drawn, target.device)
        return self._error(model, target, condition, noise, time, classed[0] if classed else None)

    def _latents(self, video: Tensor, generator: torch.Generator, share: Share) -> tuple[Tensor, Tensor]:
        """Targets and conditions (B, D, N), as the denoiser sees latents."""
        probability = self.conditional_probability
        per_batch = self.options.condition_per == "batch" and self.model.training  # scores are of both kinds
        if video.dim() == 4:
            latents, frames = normalized(video, self.model), self.clip_frames // 2
            return joint_latents(latents, frames, probability, generator, share, per_batch=per_batch)
        with torch.no_grad():
            return joint_batch(
                video, self._encode, probability, generator, share, per_batch=per_batch, pad_short=self.pad_short
            )

    def _error(
        self,
        model: nn.Module,
        target: Tensor,
        condition: Tensor,
        noise: Tensor,
        time: Tensor,
        labels: Tensor | None,
    ) -> Tensor:
        """The loss of what was drawn."""
        prediction = str(self.model.config["prediction"])
        denoise = model if labels is None else partial(model, class_labels=labels)
        weight = self.options.loss_weight
        return diffusion_loss(denoise, self.schedule, target, condition, noise, time, prediction, weight)

    def _draw_times(self, clips: int, generator: torch.Generator) -> Tensor:
        """Random times (clips,): int64 in [0, 1000), or for a flow 1000 t in float32."""
        if self.model.config["prediction"] != "flow":
            return torch.randint(TRAIN_STEPS, (clips,), generator=generator)
        options, normal = self.options, torch.randn(clips, generator=generator)
        shift = float(self.model.config["time_shift"])
        return TRAIN_STEPS * logit_normal_times(normal, options.time_mean, options.time_std, shift)

    def _labels(self, classes: Classes, clips: int, generator: torch.Generator, share: Share = WHOLE) -> Tensor | None:
        """Class numbers (B,), with a share of them dropped in training. None for a denoiser without classes.

        A held-out clip of a class that the denoiser doesn't know counts as one without a class.
        """
        config = self.model.config
        if config["num_classes"] is None:
            return None
        none = int(config["num_classes"])
        number = {name: index for index, name in enumerate(config["class_names"])}
        unknown = sorted({name for name in classes or () if name is not None and name not in number})
        if unknown and self.model.training:
            raise UserError(f"the data has classes that the denoiser doesn't know: {', '.join(unknown[:5])}")
        labels = torch.tensor([number.get(name or "", none) for name in classes or [None] * clips])
        dropped = share.of(torch.rand(share.world * clips, generator=generator)) < self.class_dropout
        return labels.masked_fill(dropped, none) if self.model.training else labels

    def _encode(self, video: Tensor) -> Tensor:
        return normalized(self._latent(video), self.model)

    def _latent(self, video: Tensor) -> Tensor:
        with self.encoding():
            return self.autoencoder.encode(to_float(video)).latent.float()

    def before_training(self, clips: Iterable[Tensor], processes: Processes) -> None:
        """The statistics of the latents, if the denoiser shall have them and doesn't have them yet."""
        if not self.options.normalize_latents or self.model.config["latent_mean"] is not None:
            return
        half = self.clip_frames // 2
        latents = (clip[:, 0] if clip.dim() == 4 else self._latent(clip[:, :, :half]) for clip in clips)
        mean, std = processes.on_main(lambda: latent_statistics.measure(latents, self.model.layout))
        self.model.register_to_config(latent_mean=mean, latent_std=std)

    def score(self, batches: Iterable[Labelled]) -> dict[str, float]:
        """``held_out_loss``: with their classes, and with the same noise every time, averaged over clips."""
        generator = torch.Generator().manual_seed(0)
        losses, clips = 0.0, 0
        for video, classes in batches:
            losses += self.loss(self.model, video, generator, classes=classes).item() * len(video)
            clips += len(video)
        return {"held_out_loss": losses / clips}

    def before_step(self, step: int) -> None:
        self.step = step

    def after_step(self, measured: Mapping[str, float]) -> None:
        every = self.options.ema_every
        if self.step % every == 0 and self.step >= every - 1:  # after steps 26, 51, ... for 25, as in the release
            self.ema.step(local(self.model.parameters()))

    def state(self) -> dict[str, Any]:
        state = self.ema.state_dict()
        averages = zip(state["shadow_params"], self.model.parameters(), strict=True)
        kept = {"ema": {**state, "shadow_params": [of_parts(average, like) for average, like in averages]}}
        statistics = {name: self.model.config[name] for name in STATISTICS}
        return kept if statistics["latent_mean"] is None else {**kept, "latents": statistics}

    def restore(self, state: dict[str, Any]) -> None:
        self.model.register_to_config(**state.get("latents", {}))
        averages = zip(state["ema"]["shadow_params"], self.model.parameters(), strict=True)
        parts = local(cut_like(average, like) for average, like in averages)
        self.ema.load_state_dict({**state["ema"], "shadow_params": parts, "decay": self.options.ema_decay})
        self.ema.to(next(self.model.parameters()).device)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        self.ema.store(local(self.model.parameters()))
        self.ema.copy_to(local(self.model.parameters()))
        try:
            with super().evaluation_weights():
                yield
        finally:
            self.ema.restore(local(self.model.parameters()))
