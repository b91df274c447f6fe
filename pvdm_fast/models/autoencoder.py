"""The video autoencoder: TimeSformer encoder, projection to three planes, and back (PVDM, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from pvdm_fast import ops
from pvdm_fast.layout import PLANE_NAMES, TriplaneLayout
from pvdm_fast.models.presets import AUTOENCODER, preset
from pvdm_fast.models.ranges import check_pixels
from pvdm_fast.models.saving import ChecksumsKept
from pvdm_fast.nn import AxialTransformer, PlaneProjection
from pvdm_fast.nn.linear import Linear, linear


@dataclass
class EncoderOutput(BaseOutput):
    """latent: (B, D, N), in [-1, 1]."""

    latent: Tensor


@dataclass
class AutoencoderOutput(BaseOutput):
    """sample: (B, 3, T, H, W), in [-1, 1]."""

    sample: Tensor


class Autoencoder(ChecksumsKept, ModelMixin, ConfigMixin):
    """PVDM's autoencoder (the release's `ViTAutoencoder`, its parameter names included; `base` is its full size).

    Args:
        frames: T. height, width: of a frame in pixels, multiples of patch_size; all free and unequal.
        patch_size: side of a patch in pixels.
        channels: C, a multiple of 8. depth: layers of the encoder and of the decoder. num_heads, head_dim: of these.
        latent_channels: D.
        projection_depth, projection_hidden: layers, and feed-forward width, of the projection to planes.

    Raises:
        ValueError: sizes that don't divide.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        frames: int = 16,
        height: int = 256,
        width: int = 256,
        patch_size: int = 8,
        channels: int = 384,
        depth: int = 8,
        num_heads: int = 8,
        head_dim: int = 64,
        latent_channels: int = 4,
        projection_depth: int = 4,
        projection_hidden: int = 512,
    ) -> None:
        super().__init__()
        for name, size in (("height", height), ("width", width)):
            if size % patch_size:
                raise ValueError(
                    f"{name} {size} is not divisible by the patch size {patch_size}: choose a multiple of {patch_size}."
                )
        layout = self.layout = TriplaneLayout(frames, height // patch_size, width // patch_size)
        self.encoder = AxialTransformer(channels, depth, num_heads, head_dim)
        self.encoder.to_patch_embedding = Linear(3 * patch_size**2, channels)
        self.decoder = AxialTransformer(channels, depth, num_heads, head_dim)
        self.to_pixel = nn.ModuleDict({"1": nn.ConvTranspose2d(channels, 3, patch_size, stride=patch_size)})
        self.register_buffer("coords", torch.linspace(-1, 1, frames)[:, None])  # only kept for release state dicts
        for plane, length in zip(PLANE_NAMES, (layout.time, layout.height, layout.width), strict=True):
            self.register_parameter(f"{plane}_token", nn.Parameter(torch.randn(1, 1, channels)))
            self.register_parameter(f"{plane}_pos_embedding", nn.Parameter(torch.randn(1, length + 1, channels)))
            self.add_module(f"{plane}_quant_attn", PlaneProjection(channels, projection_depth, projection_hidden))
            self.add_module(f"pre_{plane}", nn.Conv2d(channels, latent_channels, 1))
            self.add_module(f"post_{plane}", nn.Conv2d(latent_channels, channels, 1))

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Autoencoder:
        """A new model of a named size: "tiny", "small" or "base" (62.1 M parameters), with `overrides` on top."""
        return cls(**preset(AUTOENCODER, name, overrides))

    def encode(self, video: Tensor) -> EncoderOutput:
        """Project a video to its three latent planes.

        Args:
            video: (B, 3, T, H, W) in [-1, 1]. Differentiable.

        Returns:
            `.latent`: (B, D, N), packed in the order xy, yt, xt, in [-1, 1].

        Raises:
            ValueError: another shape than the model's; integers, or values of 8 bits (on a CPU).
        """
        sizes = (3, self.config.frames, self.config.height, self.config.width)
        if video.dim() != 5 or video.shape[1:] != sizes or video.shape[0] == 0:
            raise ValueError(
                f"video must be (B, {', '.join(map(str, sizes))}) with B > 0, but is {tuple(video.shape)}."
            )
        check_pixels(video)
        p, layout = self.config.patch_size, self.layout
        patches = video.unflatten(4, (layout.width, p)).unflatten(3, (layout.height, p))  # (B, 3, T, h, p, w, p)
        patches = patches.permute(0, 2, 3, 5, 4, 6, 1).reshape(video.shape[0], layout.num_lattice_tokens, -1)
        to_tokens = cast(Linear, self.encoder.to_patch_embedding)
        lattice = self.encoder(to_tokens(patches), layout)
        planes = []
        for name in PLANE_NAMES:
            token, positions = getattr(self, f"{name}_token"), getattr(self, f"{name}_pos_embedding")
            sequences = ops.triplane_slice(lattice, layout, name, token.flatten(), positions.squeeze(0))
            plane = getattr(self, f"{name}_quant_attn")(sequences)
            to_latent = getattr(self, f"pre_{name}")
            planes.append(linear(plane, to_latent.weight.flatten(1), to_latent.bias))
        return EncoderOutput(latent=torch.cat(planes, dim=1).tanh().transpose(1, 2).contiguous())

    def decode(self, latent: Tensor) -> AutoencoderOutput:
        """Video of three latent planes.

        Args:
            latent: (B, D, N) packed planes. Differentiable.

        Returns:
            `.sample`: (B, 3, T, H, W) in [-1, 1].

        Raises:
            ValueError: another shape than the model's.
        """
        layout, p = self.layout, self.config.patch_size
        if latent.dim() != 3 or latent.shape[1:] != (self.config.latent_channels, layout.num_tokens):
            raise ValueError(
                f"latent must be (B, {self.config.latent_channels}, {layout.num_tokens}) for {layout}, but is "
                f"{tuple(latent.shape)}."
            )
        posts = [getattr(self, f"post_{name}") for name in PLANE_NAMES]
        weight = torch.stack([post.weight.flatten(1) for post in posts])
        bias = torch.stack([post.bias for post in posts])
        lattice = ops.triplane_expand(latent.transpose(1, 2), layout, weight, bias)
        lattice = self.decoder(lattice, layout)
        to_pixel = cast(nn.ConvTranspose2d, self.to_pixel["1"])
        pixels = linear(lattice, to_pixel.weight.flatten(1).t())  # (B, T h w, 3 p p)
        pixels = pixels.view(latent.shape[0], layout.time, layout.height, layout.width, 3, p, p)
        pixels = pixels + cast(Tensor, to_pixel.bias)[:, None, None].to(pixels.dtype)
        pixels = pixels.permute(0, 4, 1, 2, 5, 3, 6).reshape(
            latent.shape[0], 3, self.config.frames, self.config.height, self.config.width
        )
        return AutoencoderOutput(sample=2 * pixels.sigmoid() - 1)

    def forward(self, video: Tensor, latent_noise: Tensor | None = None) -> AutoencoderOutput:
        """The reconstruction of a video: `decode(encode(video).latent)`, latent_noise (B, D, N) added first."""
        latent = self.encode(video).latent
        return self.decode(latent if latent_noise is None else latent + latent_noise)
