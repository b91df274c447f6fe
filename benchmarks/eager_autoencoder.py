"""The release's way of computing the autoencoder, in plain PyTorch (see `benchmarks.eager`).

For each attention, tokens are rearranged (and so copied) into one batch of sequences, rotated with slices and stacks,
attended with a materialised matrix, and rearranged back. The projections compute all positions, though only element 0
is read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.eager import RELEASE, Variant
from pvdm_fast.layout import PLANE_NAMES, TriplaneLayout

PROJECTION_HEADS = 4
Tables = tuple[Tensor, Tensor]


def rotate_pairs(x: Tensor) -> Tensor:
    """Turns each neighbouring pair (a, b) of the last axis into (-b, a)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), dim=-1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, variant: Variant = RELEASE) -> Tensor:
    """q (already scaled), k, v: (S, L, d) -> (S, L, d)."""
    if variant.sdpa:
        q, k, v = (t.unsqueeze(1) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(1)
    return (q @ k.mT).softmax(dim=-1) @ v


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, n, heads d) -> (B heads, n, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)


def to_sequences(x: Tensor, axis: str, time: int) -> Tensor:
    """(B, T P, d) -> (B P, T, d) along time, (B T, P, d) along space."""
    x = x.unflatten(1, (time, -1))
    return (x.transpose(1, 2) if axis == "time" else x).flatten(0, 1)


def from_sequences(x: Tensor, axis: str, batch: int) -> Tensor:
    """The inverse of `to_sequences`."""
    x = x.unflatten(0, (batch, -1))
    return (x.transpose(1, 2) if axis == "time" else x).flatten(1, 2)


def axial_attention(
    qkv: Tensor, heads: int, axis: str, time: int, tables: Tables | None, variant: Variant = RELEASE
) -> Tensor:
    """qkv: (B, T P, 3 heads d) -> (B, T P, heads d). Attention runs along `axis` of the lattice."""
    q, k, v = (split_heads(part, heads) for part in qkv.chunk(3, dim=-1))
    batch = q.shape[0]
    q = q * q.shape[-1] ** -0.5
    q, k, v = (to_sequences(part, axis, time) for part in (q, k, v))
    if tables is not None:
        sin, cos = tables
        q, k = (t * cos + rotate_pairs(t) * sin for t in (q, k))
    out = from_sequences(attend(q, k, v, variant), axis, batch)
    return out.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


class TimeTable(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freqs", 1.0 / 10000 ** (torch.arange(0, width, 2).float() / width))
        self.width = width

    def forward(self, time: int, like: Tensor) -> Tables:
        frequencies = 1.0 / 10000 ** (torch.arange(0, self.width, 2, device=like.device).float() / self.width)
        angles = torch.outer(torch.arange(time, device=like.device).float(), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.sin().to(like.dtype), angles.cos().to(like.dtype)


class SpaceTable(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scales", torch.logspace(0.0, math.log(5) / math.log(2), width // 4, base=2))
        self.width = width

    def forward(self, height: int, width: int, like: Tensor) -> Tables:
        top = math.log(5) / math.log(2)
        scales = torch.logspace(0.0, top, self.width // 4, base=2, device=like.device) * math.pi
        rows = torch.linspace(-1, 1, height, device=like.device)[:, None, None] * scales
        columns = torch.linspace(-1, 1, width, device=like.device)[None, :, None] * scales
        angles = torch.cat((rows.expand(-1, width, -1), columns.expand(height, -1, -1)), dim=-1)
        angles = angles.flatten(0, 1).repeat_interleave(2, dim=-1)
        return angles.sin().to(like.dtype), angles.cos().to(like.dtype)


class Step(nn.Module):
    """x + fn(LayerNorm(x))."""

    def __init__(self, channels: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fn = fn

    def forward(self, x: Tensor, *arguments: object) -> Tensor:
        return self.fn(self.norm(x), *arguments) + x


class Axial(nn.Module):
    def __init__(self, channels: int, heads: int, width: int, axis: str, variant: Variant) -> None:
        super().__init__()
        self.heads, self.axis, self.variant = heads, axis, variant
        self.to_qkv = nn.Linear(channels, 3 * heads * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * width, channels))

    def forward(self, x: Tensor, time: int, tables: Tables) -> Tensor:
        return self.to_out(axial_attention(self.to_qkv(x), self.heads, self.axis, time, tables, self.variant))


def geglu(x: Tensor) -> Tensor:
    """x: halves (value | gate) of the last axis -> value GELU(gate)."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


class GatedFeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"0": nn.Linear(channels, 8 * channels), "3": nn.Linear(4 * channels, channels)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["3"](geglu(self.net["0"](x)))


class TimeSformer(nn.Module):
    """Layers of time attention, space attention and feed-forward on (B, T P, C)."""

    def __init__(self, channels: int, depth: int, heads: int, width: int, variant: Variant = RELEASE) -> None:
        super().__init__()
        self.frame_rot_emb, self.image_rot_emb = TimeTable(width), SpaceTable(width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Step(channels, Axial(channels, heads, width, "time", variant)),
                    Step(channels, Axial(channels, heads, width, "space", variant)),
                    Step(channels, GatedFeedForward(channels)),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor, layout: TriplaneLayout) -> Tensor:
        time_tables = self.frame_rot_emb(layout.time, x)
        space_tables = self.image_rot_emb(layout.height, layout.width, x)
        layer: Any
        for layer in self.layers:
            time_attention, space_attention, feed_forward = layer
            x = time_attention(x, layout.time, time_tables)
            x = space_attention(x, layout.time, space_tables)
            x = feed_forward(x)
        return x


def sequence_attention(qkv: Tensor, variant: Variant = RELEASE) -> Tensor:
    """qkv: (S, L, 3 heads d) -> (S, L, heads d)."""
    q, k, v = (t.unflatten(-1, (PROJECTION_HEADS, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    if variant.sdpa:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    return out.transpose(1, 2).flatten(2)


class SequenceAttention(nn.Module):
    def __init__(self, channels: int, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        inner = PROJECTION_HEADS * (channels // 8)
        self.to_qkv = nn.Linear(channels, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: (S, L, C)."""
        return self.to_out(sequence_attention(self.to_qkv(x), self.variant))


class Projection(nn.Module):
    """Pre-norm transformer over (S, L, C), all positions. The caller uses element 0."""

    def __init__(self, channels: int, depth: int = 4, hidden: int = 512, variant: Variant = RELEASE) -> None:
        super().__init__()

        def feed_forward() -> nn.Module:
            first, second = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
            return _Net(nn.Sequential(first, nn.GELU(), nn.Identity(), second))

        self.layers = nn.ModuleList(
            nn.ModuleList([Step(channels, SequenceAttention(channels, variant)), Step(channels, feed_forward())])
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        layer: Any
        for layer in self.layers:
            attention, feed_forward = layer
            x = feed_forward(attention(x))
        return x


class _Net(nn.Module):
    """A sequence, under its name in the release's state dicts."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def sequences(lattice: Tensor, plane: str, layout: TriplaneLayout, token: Tensor, positions: Tensor) -> Tensor:
    """lattice: (B, T H W, C) -> (B sites, L + 1, C): the collapsed axis with the token appended and positions
    added."""
    axis = {"xy": 1, "yt": 2, "xt": 3}[plane]
    x = lattice.unflatten(1, (layout.time, layout.height, layout.width)).movedim(axis, 3).flatten(0, 2)
    end = token.view(1, 1, -1).expand(x.shape[0], 1, -1)
    return torch.cat((x, end), dim=1) + positions


def expand(planes: list[Tensor], layout: TriplaneLayout) -> Tensor:
    """planes: (B, C, h, w) each -> (B, T H W, C): their broadcast sum as a channels-first lattice, rearranged."""
    xy, yt, xt = planes
    lattice = xy[:, :, None] + yt[:, :, :, None] + xt[:, :, :, :, None]
    return lattice.flatten(2).transpose(1, 2).contiguous()


class EagerAutoencoder(nn.Module):
    """The autoencoder. Arguments are the config of `pvdm_fast.models.Autoencoder`."""

    def __init__(
        self,
        *,
        frames: int,
        height: int,
        width: int,
        patch_size: int,
        channels: int,
        depth: int,
        num_heads: int,
        head_dim: int,
        latent_channels: int,
        projection_depth: int = 4,
        projection_hidden: int = 512,
        variant: Variant = RELEASE,
    ) -> None:
        super().__init__()
        self.patch = patch_size
        layout = self.layout = TriplaneLayout(frames, height // patch_size, width // patch_size)
        self.encoder = TimeSformer(channels, depth, num_heads, head_dim, variant)
        self.encoder.to_patch_embedding = nn.Linear(3 * patch_size**2, channels)
        self.decoder = TimeSformer(channels, depth, num_heads, head_dim, variant)
        self.to_pixel = nn.ModuleDict({"1": nn.ConvTranspose2d(channels, 3, patch_size, stride=patch_size)})
        self.register_buffer("coords", torch.linspace(-1, 1, frames)[:, None])
        for plane, length in zip(PLANE_NAMES, (layout.time, layout.height, layout.width), strict=True):
            self.register_parameter(f"{plane}_token", nn.Parameter(torch.zeros(1, 1, channels)))
            self.register_parameter(f"{plane}_pos_embedding", nn.Parameter(torch.zeros(1, length + 1, channels)))
            self.add_module(f"{plane}_quant_attn", Projection(channels, projection_depth, projection_hidden, variant))
            self.add_module(f"pre_{plane}", nn.Conv2d(channels, latent_channels, 1))
            self.add_module(f"post_{plane}", nn.Conv2d(latent_channels, channels, 1))

    def encode(self, video: Tensor) -> Tensor:
        """video: (B, 3, T, H, W) in [-1, 1] -> (B, D, N)."""
        layout, p = self.layout, self.patch
        patches = video.unflatten(4, (layout.width, p)).unflatten(3, (layout.height, p))
        patches = patches.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)
        encoder: Any = self.encoder
        lattice = encoder(encoder.to_patch_embedding(patches), layout)
        latents = []
        for name, plane in zip(PLANE_NAMES, layout.planes, strict=True):
            token, positions = getattr(self, f"{name}_token"), getattr(self, f"{name}_pos_embedding")
            x = getattr(self, f"{name}_quant_attn")(sequences(lattice, name, layout, token, positions))[:, 0]
            image = x.unflatten(0, (video.shape[0], *plane)).permute(0, 3, 1, 2)
            latents.append(getattr(self, f"pre_{name}")(image).tanh().flatten(2))
        return torch.cat(latents, dim=2)

    def decode(self, latent: Tensor) -> Tensor:
        """latent: (B, D, N) -> (B, 3, T, H, W) in [-1, 1]."""
        layout = self.layout
        images = layout.split(latent, dim=2)
        planes = [getattr(self, f"post_{name}")(image) for name, image in zip(PLANE_NAMES, images, strict=True)]
        x = self.decoder(expand(planes, layout), layout)
        frames = x.unflatten(1, (layout.time, layout.height, layout.width)).permute(0, 1, 4, 2, 3).flatten(0, 1)
        pixels = 2 * self.to_pixel["1"](frames.contiguous()).sigmoid() - 1
        return pixels.unflatten(0, (latent.shape[0], layout.time)).transpose(1, 2)

    def forward(self, video: Tensor) -> Tensor:
        return self.decode(self.encode(video))
