"""The denoiser: one 2D U-Net shared by three planes, with attention across them (PVDM, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from pvdm_fast.layout import PlaneLayout, TriplaneLayout
from pvdm_fast.models import latent_statistics
from pvdm_fast.models.noise_schedule import NoiseSchedule
from pvdm_fast.models.presets import DENOISER, preset
from pvdm_fast.models.ranges import check_timestep
from pvdm_fast.models.saving import InFolders
from pvdm_fast.nn import PlaneAttention, PlaneConv, PlaneNorm, ResidualBlock, TriplaneAttention, casting, planes
from pvdm_fast.nn.constants import constant
from pvdm_fast.nn.planes import NORM_GROUPS
from pvdm_fast.nn.residual import embedded, scale_shifts

PREDICTIONS = ("noise", "v", "flow")


@dataclass
class DenoiserOutput(BaseOutput):
    """sample: (B, D, N), the predicted noise, or the velocity of a denoiser with prediction "flow"."""

    sample: Tensor


def _frequencies(half: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.exp(-math.log(10000) * torch.arange(half, device=device).to(dtype) / half)


def timestep_embedding(timestep: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """timestep: (B,) -> (B, width): all cosines, then all sines, frequencies exp(-ln 10000 i / half)."""
    angles = timestep[:, None].to(dtype) * constant(_frequencies, timestep, dtype, width // 2)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def noise_level_bits(device: torch.device) -> Tensor:
    """The 1000 float32 noise levels as int32. Floats would be rounded when buffers are cast with the model."""
    return NoiseSchedule.create(device).alphas_cumprod.view(torch.int32)


def _check_widths(model_channels: int, channel_mult: Sequence[int], num_res_blocks: int, num_heads: int) -> None:
    """Raises ValueError for widths that a layer would refuse, in some cases only when it computes."""
    if model_channels < 1 or model_channels % NORM_GROUPS:
        raise ValueError(
            f"model_channels {model_channels} must be a multiple of {NORM_GROUPS}, the groups of the normalization."
        )
    if not channel_mult or channel_mult[0] != 1 or min(channel_mult) < 1:
        raise ValueError(
            f"channel_mult {list(channel_mult)} must begin with 1, and all of it be at least 1: the first level and "
            "the last layer have model_channels."
        )
    if num_res_blocks < 1 or num_heads < 1 or any(factor * model_channels % num_heads for factor in channel_mult):
        raise ValueError(
            f"num_res_blocks {num_res_blocks} must be at least 1, and num_heads {num_heads} divide the channels of "
            f"every level, which are {[factor * model_channels for factor in channel_mult]}."
        )


def _check_attention(attention_resolutions: Sequence[int]) -> None:
    """Raises ValueError for what is no level's downsampling factor in any network: it would be passed over."""
    if any(factor < 1 or factor & (factor - 1) for factor in attention_resolutions):
        raise ValueError(
            f"attention_resolutions {list(attention_resolutions)} must be downsampling factors of levels: 1, 2, 4, ..."
        )


def _check_sampling(steps: int | None, scheduler: str, guidance: float, distilled: bool) -> None:
    """Raises ValueError for ways to sample that no denoiser has, or that a distilled one can't have."""
    if steps is not None and steps < 1:
        raise ValueError(f"sampling_steps {steps} must be 1 or more.")
    if not math.isfinite(guidance) or guidance < 0:
        raise ValueError(f"sampling_guidance {guidance} must be 0 or more.")
    if distilled and (steps is not None or scheduler not in ("auto", "stochastic") or guidance != 0):
        raise ValueError(
            "A distilled denoiser has its own steps and guidance: leave out what begins with sampling_. Only "
            "sampling_scheduler may be 'stochastic'."
        )


class PlanePositions(nn.Module):
    """Learned vectors that say where a token is: one per row, column and time, shared by the planes with that axis, and
    one per plane. The planes share all other weights. Without these vectors only their contents distinguish planes and
    positions."""

    def __init__(self, layout: TriplaneLayout, channels: int) -> None:
        super().__init__()
        self.time = nn.Parameter(0.5 * torch.randn(layout.time, channels))
        self.height = nn.Parameter(0.5 * torch.randn(layout.height, channels))
        self.width = nn.Parameter(0.5 * torch.randn(layout.width, channels))
        self.plane = nn.Parameter(0.5 * torch.randn(3, channels))

    def forward(self) -> Tensor:
        """(N, C), in the order of the packed tokens."""
        axes = ((self.height, self.width), (self.time, self.width), (self.time, self.height))
        planes = [rows[:, None] + columns + plane for (rows, columns), plane in zip(axes, self.plane, strict=True)]
        return torch.cat([plane.flatten(0, 1) for plane in planes])


class Denoiser(InFolders, ModelMixin, ConfigMixin):
    """PVDM's U-Net (the release's `UNetModel`, its parameter names included; `base` is its full size).

    Args:
        time, height, width: the layout of the latent. Each must be divisible by 2 ** (levels - 1).
        latent_channels: D. The input has 2 D: the noisy latent and the condition.
        model_channels: of the first level, a multiple of 32. channel_mult: factor of each level.
        num_res_blocks: residual blocks a level. attention_resolutions: downsampling factors (1, 2, 4, ...) at which
            planes attend to themselves too; those of levels that aren't there count for nothing. num_heads: of every
            attention.
        positions: learned positions of the tokens, which the release doesn't have.
        prediction: the network's own output: "noise" (as in the release), or "v" = sqrt(a) noise - sqrt(1 - a) latent
            (Salimans and Ho 2022), where a is the noise level's alphas_cumprod. `forward` returns the noise in both
            cases. From v it is exact where there is only noise. Or "flow": the velocity noise - latent on the straight
            path (1 - t) latent + t noise (`pvdm_fast.diffusion.flow`), which `forward` returns as it is.
        latent_mean, latent_std: [plane][channel], with which training and sampling normalise the autoencoder's latents
            (`pvdm_fast.models.latent_statistics`), for prediction "flow". None: they are taken as they are.
        time_shift: for prediction "flow", how far training and sampling move their times towards the noise
            (`pvdm_fast.diffusion.flow.shifted`). 1 moves nothing.
        distilled_steps: for prediction "flow", the number of steps that this network was distilled to sample in
            (`pvdm_fast.diffusion.distillation`). None: it predicts the velocity at every time.
        num_classes: number of classes, for class-conditional training. None: without classes. The class's embedding is
            added to that of the time. It has one more entry, for no class.
        class_names: their names, in the order of their numbers.
        sampling_steps, sampling_scheduler, sampling_guidance: how it is sampled where nothing else is asked for: the
            number of steps (None: 50), the name of the scheduler (`pvdm_fast.diffusion.schedulers`), and the weight of
            classifier-free guidance (`pvdm_fast.diffusion.guidance`). A distilled denoiser has only its own
            scheduler: "auto" (which is "euler") or "stochastic".

    Raises:
        ValueError: sizes that don't divide; a downsampling factor that is no power of two; an unknown prediction; a
            time shift that isn't positive; a time shift, statistics or distilled steps without flow; not as many names
            as classes; no steps, negative guidance, or a way to sample a distilled denoiser.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        time: int = 16,
        height: int = 32,
        width: int = 32,
        latent_channels: int = 4,
        model_channels: int = 256,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (4, 2, 1),
        num_heads: int = 8,
        positions: bool = False,
        prediction: str = "noise",
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        time_shift: float = 1.0,
        latent_mean: Sequence[Sequence[float]] | None = None,
        latent_std: Sequence[Sequence[float]] | None = None,
        distilled_steps: int | None = None,
        sampling_steps: int | None = None,
        sampling_scheduler: str = "auto",
        sampling_guidance: float = 0.0,
    ) -> None:
        super().__init__()
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"There are {len(class_names)} class names for {num_classes} classes.")
        if prediction not in PREDICTIONS:
            raise ValueError(f"The prediction must be one of {', '.join(PREDICTIONS)}, not {prediction!r}.")
        if time_shift <= 0 or (time_shift != 1 and prediction != "flow"):
            raise ValueError(f"time_shift {time_shift} must be above 0, and goes with prediction flow only.")
        if distilled_steps is not None and (distilled_steps < 1 or prediction != "flow"):
            raise ValueError(f"distilled_steps {distilled_steps} must be 1 or more, and needs prediction flow.")
        _check_sampling(sampling_steps, sampling_scheduler, sampling_guidance, distilled_steps is not None)
        if latent_mean is not None or latent_std is not None:
            if prediction != "flow" or latent_mean is None or latent_std is None:
                raise ValueError("latent_mean and latent_std go together, and with prediction flow only.")
            latent_statistics.check(latent_mean, latent_std, planes=3, channels=latent_channels)
        _check_widths(model_channels, channel_mult, num_res_blocks, num_heads)
        _check_attention(attention_resolutions)
        self.layout = TriplaneLayout(time, height, width)
        self.layout.downsample(2 ** (len(channel_mult) - 1))
        embedding = 4 * model_channels
        self.zeros: Tensor
        self.noise_levels: Tensor
        self.register_buffer("zeros", torch.zeros(1, latent_channels, self.layout.num_tokens))
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        if num_classes is not None:
            self.class_embed = nn.Embedding(num_classes + 1, embedding)
        if prediction == "v":
            self.register_buffer("noise_levels", noise_level_bits(self.zeros.device), persistent=False)
        self.position_vectors = PlanePositions(self.layout, model_channels) if positions else None
        self._build_input(embedding)
        self._build_middle(embedding)
        self._build_output(embedding)
        self.out = nn.ModuleDict(
            {"0": PlaneNorm(model_channels), "2": PlaneConv(model_channels, latent_channels, zero=True)}
        )

    def _build_input(self, embedding: int) -> None:
        config = self.config
        channels = config.model_channels
        self.input_blocks = nn.ModuleList([nn.ModuleList([PlaneConv(2 * config.latent_channels, channels)])])
        self.input_attns = nn.ModuleList([nn.Identity()])
        self._skip_channels = [channels]

        def add(*modules: nn.Module) -> None:
            self.input_blocks.append(nn.ModuleList(modules))
            self.input_attns.append(TriplaneAttention(channels, config.num_heads))
            self._skip_channels.append(channels)

        for level, factor in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                block = ResidualBlock(channels, embedding, factor * config.model_channels)
                channels = factor * config.model_channels
                add(block, *self._plane_attention(level, channels))
            if level < len(config.channel_mult) - 1:
                add(ResidualBlock(channels, embedding, channels, resample="down"))

    def _build_middle(self, embedding: int) -> None:
        channels = self._skip_channels[-1]
        heads = self.config.num_heads
        self.middle_block = nn.ModuleList(
            [
                ResidualBlock(channels, embedding, channels),
                PlaneAttention(channels, heads),
                ResidualBlock(channels, embedding, channels),
            ]
        )
        self.mid_attn = TriplaneAttention(channels, heads)

    def _build_output(self, embedding: int) -> None:
        config = self.config
        skips = list(self._skip_channels)
        channels = skips[-1]
        self.output_blocks, self.output_attns = nn.ModuleList(), nn.ModuleList()
        for level, factor in reversed(list(enumerate(config.channel_mult))):
            for index in range(config.num_res_blocks + 1):
                modules: list[nn.Module] = [
                    ResidualBlock(channels + skips.pop(), embedding, factor * config.model_channels)
                ]
                channels = factor * config.model_channels
                modules += self._plane_attention(level, channels)
                if level > 0 and index == config.num_res_blocks:
                    modules.append(ResidualBlock(channels, embedding, channels, resample="up"))
                self.output_blocks.append(nn.ModuleList(modules))
                self.output_attns.append(TriplaneAttention(channels, config.num_heads))

    def _plane_attention(self, level: int, channels: int) -> list[nn.Module]:
        attends = 2**level in self.config.attention_resolutions
        return [PlaneAttention(channels, self.config.num_heads)] if attends else []

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Denoiser:
        """A new model of a named size: "tiny", "small" or "base" (528.3 M parameters), with `overrides` on top."""
        return cls(**preset(DENOISER, name, overrides))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Denoiser:
        """Runs when the model is moved, cast or emptied (`to_empty`). The noise levels aren't in any file, so they are
        remade."""
        super()._apply(fn, recurse)
        if self.config.prediction == "v":
            self.noise_levels = noise_level_bits(self.noise_levels.device)
        return self

    def _level(self, timestep: Tensor) -> Tensor:
        """The noise level (B, 1, 1) float32 of each timestep (B,)."""
        if self.noise_levels.device != timestep.device:  # the weights came to another device without the buffer
            self.noise_levels = noise_level_bits(timestep.device)
        return self.noise_levels.view(torch.float32)[timestep].view(-1, 1, 1)

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor | float,
        condition: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> DenoiserOutput:
        """Predict the noise in a latent, or its velocity.

        Args:
            latent: (B, D, N) packed noisy planes. Differentiable.
            timestep: (B,), or one number for all, in [0, 1000). For prediction "v" they must be whole numbers. For
                "flow" it is 1000 t, 1000 included. Values are checked unless that means waiting for a GPU.
            condition: (B, D, N), the latent of the clip before. None: unconditional (zeros). Differentiable.
            class_labels: (B,) int64, from 0 to num_classes, where the last means no class. None: no class for any.

        Returns:
            `.sample`: (B, D, N).

        Raises:
            ValueError: shapes don't fit the model's layout, a time is out of range, or a model without classes gets
                labels.
        """
        shape = (self.config.latent_channels, self.layout.num_tokens)
        for name, tensor in (("latent", latent), ("condition", condition)):
            if tensor is not None and (tensor.dim() != 3 or tensor.shape[1:] != shape or len(tensor) != len(latent)):
                raise ValueError(
                    f"{name} must be (B, {shape[0]}, {shape[1]}) for {self.layout}, but is {tuple(tensor.shape)}."
                )
        if condition is None:
            condition = self.zeros.expand(len(latent), -1, -1)
        check_timestep(timestep, with_end=self.config.prediction == "flow")
        labels = self._class_labels(class_labels, latent)
        timestep = torch.as_tensor(timestep, device=latent.device).expand(len(latent))
        tokens = torch.cat((latent, condition.to(latent.dtype)), dim=1).transpose(1, 2)
        sample = casting.run((self,), latent.device, self._output, tokens, timestep, labels)
        sample = sample.transpose(1, 2).contiguous().to(latent.dtype)
        if self.config.prediction == "v":
            level = self._level(timestep)
            sample = (level.sqrt() * sample + (1 - level).sqrt() * latent).to(latent.dtype)
        return DenoiserOutput(sample=sample)

    def _output(self, tokens: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
        """What the network itself puts out: (B, N, D) of tokens (B, N, 2 D)."""
        dtype = self.zeros.dtype
        embedding = timestep_embedding(timestep, self.config.model_channels, torch.promote_types(dtype, torch.float32))
        embedding = embedded(self.time_embed, embedding.to(dtype))
        if labels is not None:
            embedding = embedding + self.class_embed(labels)
        return self._unet(tokens, embedding)

    def _class_labels(self, labels: Tensor | None, latent: Tensor) -> Tensor | None:
        """The given classes, or for each latent the number that means no class; None for a model without classes."""
        if self.config.num_classes is None:
            if labels is not None:
                raise ValueError("This denoiser has no classes, but class_labels were given: make it with num_classes.")
            return None
        if labels is None:
            return torch.full((len(latent),), self.config.num_classes, dtype=torch.long, device=latent.device)
        if labels.shape != (len(latent),):
            raise ValueError(f"class_labels must be ({len(latent)},), but is {tuple(labels.shape)}.")
        return labels

    def _unet(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, N, 2 D) -> (B, N, D)."""
        layout: PlaneLayout = self.layout
        down, up = list(self.input_blocks)[1:], list(self.output_blocks)
        modules = chain.from_iterable(cast(list[nn.ModuleList], [*down, self.middle_block, *up]))
        run = partial(self._run_block, embedding, scale_shifts(modules, embedding))
        x = planes.conv(cast(nn.ModuleList, self.input_blocks[0])[0], x, layout)
        if self.position_vectors is not None:
            x = x + self.position_vectors().to(x.dtype)
        x = self.input_attns[0](x)  # does nothing, unless somebody replaces it
        skips = [x]
        for block, attention in zip(down, list(self.input_attns)[1:], strict=True):
            x, layout = run(block, attention, x, layout)
            skips.append(x)
        x, layout = run(self.middle_block, self.mid_attn, x, layout)
        for block, attention in zip(up, self.output_attns, strict=True):
            x, layout = run(block, attention, torch.cat((x, skips.pop()), dim=-1), layout)
        return planes.conv(self.out["2"], planes.norm(self.out["0"], x, layout, activation=True), layout)

    @staticmethod
    def _run_block(
        embedding: Tensor,
        ready: Mapping[nn.Module, Tensor],
        block: nn.Module,
        attention: nn.Module,
        x: Tensor,
        layout: PlaneLayout,
    ) -> tuple[Tensor, PlaneLayout]:
        """A block's modules, then the attention across planes; `ready`: the `scale_shifts` of residual blocks."""
        for module in cast(nn.ModuleList, block):
            if module in ready:
                x = module(x, embedding, layout, ready[module])
                layout = cast(ResidualBlock, module).output_layout(layout)
            elif isinstance(module, PlaneAttention) or not hasattr(module, "output_layout"):
                x = module(x, layout)
            else:  # another residual block, or a wrapper around one
                x = module(x, embedding, layout)
                layout = cast(ResidualBlock, module).output_layout(layout)
        return attention(x, layout), layout
