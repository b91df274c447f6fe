"""The video autoencoder: TimeSformer encoder, projection to three planes, and back (PVDM, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from einops import rearrange
from torch import Tensor, nn

from pvdm_fast import ops
from pvdm_fast.layout import PLANE_NAMES, TriplaneLayout
from pvdm_fast.models.presets import AUTOENCODER, preset
from pvdm_fast.models.ranges import check_pixels
from pvdm_fast.models.saving import InFolders
from pvdm_fast.nn import AxialTransformer, PlaneProjection, casting
from pvdm_fast.nn.linear import Linear, linear
from pvdm_fast.nn.plain import POINTWISE_2D, weights_of


@dataclass
class EncoderOutput(BaseOutput):
    """latent: (B, D, N), in [-1, 1]."""

    latent: Tensor


@dataclass
class AutoencoderOutput(BaseOutput):
    """sample: (B, 3, T, H, W), in [-1, 1]."""

    sample: Tensor


class Autoencoder(InFolders, ModelMixin, ConfigMixin):
    """PVDM's autoencoder (the release's `ViTAutoencoder`, its parameter names included; `base` is its full size).

    Args:
        frames: T. height, width: of a frame in pixels, multiples of patch_size. All may differ.
        patch_size: side of a patch in pixels.
        channels: C, a multiple of 8. depth: layers of the encoder and of the decoder. num_heads, head_dim: of these.
        latent_channels: D.
        projection_depth, projection_hidden: layers, and feed-forward width, of the projection to planes.

    Raises:
        ValueError: sizes don't divide.
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
            ValueError: the shape isn't the model's, or values are integers or (checked on a CPU) 8-bit.
        """
        sizes = (3, self.config.frames, self.config.height, self.config.width)
        if video.dim() != 5 or video.shape[1:] != sizes or video.shape[0] == 0:
            raise ValueError(
                f"video must be (B, {', '.join(map(str, sizes))}) with B > 0, but is {tuple(video.shape)}."
            )
        check_pixels(video)
        parts = self._parts("encoder", "{}_quant_attn", "pre_{}")
        return EncoderOutput(latent=casting.run(parts, video.device, self._encode, video))

    def _parts(self, *names: str) -> Iterator[nn.Module]:
        """The modules of these names, {} standing for each plane."""
        for name in dict.fromkeys(name.format(plane) for plane in PLANE_NAMES for name in names):
            yield getattr(self, name)

    def _encode(self, video: Tensor) -> Tensor:
        p, layout = self.config.patch_size, self.layout
        patches = rearrange(video, "b c t (h p) (w q) -> b (t h w) (p q c)", p=p, q=p)
        to_tokens = cast(Linear, self.encoder.to_patch_embedding)
        lattice = self.encoder(to_tokens(patches), layout)
        latents = []
        for name in PLANE_NAMES:
            token, positions = getattr(self, f"{name}_token"), getattr(self, f"{name}_pos_embedding")
            projection, to_latent = getattr(self, f"{name}_quant_attn"), getattr(self, f"pre_{name}")
            parameters = token.flatten(), positions.squeeze(0), to_latent
            latents.append(projection.latents(lattice, layout, name, *parameters))
        return torch.cat(latents, dim=1).transpose(1, 2).contiguous()

    def decode(self, latent: Tensor) -> AutoencoderOutput:
        """Decode three latent planes to a video.

        Args:
            latent: (B, D, N) packed planes. Differentiable.

        Returns:
            `.sample`: (B, 3, T, H, W) in [-1, 1].

        Raises:
            ValueError: another shape than the model's.
        """
        layout = self.layout
        if latent.dim() != 3 or latent.shape[1:] != (self.config.latent_channels, layout.num_tokens):
            raise ValueError(
                f"latent must be (B, {self.config.latent_channels}, {layout.num_tokens}) for {layout}, but is "
                f"{tuple(latent.shape)}."
            )
        parts = self._parts("post_{}", "decoder", "to_pixel")
        return AutoencoderOutput(sample=casting.run(parts, latent.device, self._decode, latent))

    def _decode(self, latent: Tensor) -> Tensor:
        lattice = self.decoder(self._expand(latent.transpose(1, 2)), self.layout)
        return 2 * self._to_pixels(lattice).sigmoid() - 1

    def _expand(self, tokens: Tensor) -> Tensor:
        """Packed planes (B, N, D) -> the lattice (B, T H W, C): the sum of their `post_*` layers."""
        posts = [getattr(self, f"post_{name}") for name in PLANE_NAMES]
        layers = [layer for layer in (weights_of(post, nn.Conv2d, POINTWISE_2D) for post in posts) if layer is not None]
        if len(layers) == len(posts):
            weight = torch.stack([weight.flatten(1) for weight, _ in layers])
            return ops.triplane_expand(tokens, self.layout, weight, torch.stack([bias for _, bias in layers]))
        pictures = [rearrange(plane, "b h w d -> b d h w") for plane in self.layout.split(tokens)]
        xy, yt, xt = (post(picture) for post, picture in zip(posts, pictures, strict=True))
        lattice = xy[:, :, None] + yt[:, :, :, None] + xt[..., None]  # (B, C, T, H, W)
        return rearrange(lattice, "b c t h w -> b (t h w) c")

    def _to_pixels(self, lattice: Tensor) -> Tensor:
        """(B, T H W, C) -> (B, 3, T, H p, W p), before the sigmoid."""
        layer, layout, p = self.to_pixel["1"], self.layout, self.config.patch_size
        sizes = dict(t=layout.time, h=layout.height, w=layout.width)
        weights = weights_of(layer, nn.ConvTranspose2d, ((p, p), (p, p), (0, 0), (1, 1), 1, "zeros"))
        if weights is None or layer.output_padding != (0, 0):
            pixels = layer(rearrange(lattice, "b (t h w) c -> (b t) c h w", **sizes))
            return rearrange(pixels, "(b t) c h w -> b c t h w", t=layout.time)
        weight, bias = weights
        pixels = linear(lattice, weight.flatten(1).t())
        pixels = rearrange(pixels, "b (t h w) (c p q) -> b t h w c p q", **sizes, p=p, q=p)
        pixels = pixels + bias[:, None, None].to(pixels.dtype)
        return rearrange(pixels, "b t h w c p q -> b c t (h p) (w q)")

    def forward(self, video: Tensor, latent_noise: Tensor | None = None) -> AutoencoderOutput:
        """The reconstruction of a video: `decode(encode(video).latent + latent_noise)`, with noise (B, D, N)."""
        latent = self.encode(video).latent
        return self.decode(latent if latent_noise is None else latent + latent_noise)
