"""The release's way of computing the denoiser, in plain PyTorch: the baseline of every ratio.

The three planes go through the shared modules one after the other (NCHW). They are concatenated before and split after
every cross-plane attention. Attention materialises its matrix: two matmuls around a float32 softmax, with queries and
keys each scaled by d^-1/4. In training it is recomputed.

This is written from the project's own description of PVDM (Yu et al., CVPR 2023), and checked against golden values of
the authors' release. Costs that aren't part of the method are left out (dropout of 0, einops, asserts in Python), so
that the baseline isn't slower than it needs to be. Parameter names are the release's and this package's: one state dict
loads into both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pvdm_fast.layout import PlaneLayout, TriplaneLayout

GROUPS = 32


@dataclass(frozen=True)
class Variant:
    """How attention is computed.

    sdpa: use `scaled_dot_product_attention` instead of two matmuls and a softmax.
    recompute: attention blocks save only their input for the backward pass, as the release does.
    """

    sdpa: bool = False
    recompute: bool = True


RELEASE = Variant()
SDPA = Variant(sdpa=True, recompute=False)  # the stronger baseline: fused attention doesn't need recomputation


def attend(qkv: Tensor, heads: int, variant: Variant = RELEASE) -> Tensor:
    """Softmax attention of channels-first tokens.

    Args:
        qkv: (B, 3 C, N). Channels are grouped by head, each with its q, k, v.

    Returns:
        (B, C, N).
    """
    batch, channels, tokens = qkv.shape
    width = channels // (3 * heads)
    if variant.sdpa:
        # One copy to channels last. Without it PyTorch falls back to two matmuls of its own.
        q, k, v = qkv.view(batch, heads, 3, width, tokens).permute(2, 0, 1, 4, 3).contiguous().unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(batch, heads * width, tokens)
    q, k, v = qkv.reshape(batch * heads, 3 * width, tokens).split(width, dim=1)
    scale = width**-0.25
    scores = (q * scale).mT @ (k * scale)
    weights = scores.float().softmax(dim=-1).to(scores.dtype)
    return (v @ weights.mT).reshape(batch, heads * width, tokens)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GroupNorm of x (B, C, *), computed in float32 for every dtype."""
    return F.group_norm(x.float(), GROUPS, weight.float(), bias.float(), 1e-5).to(x.dtype)


def resample(x: Tensor, direction: str | None) -> Tensor:
    """x: (B, C, h, w) -> its sides doubled ("up"), halved ("down") or unchanged (None)."""
    if direction is None:
        return x
    return F.interpolate(x, scale_factor=2, mode="nearest") if direction == "up" else F.avg_pool2d(x, 2)


class GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.weight, self.bias)


class Attention(nn.Module):
    """GroupNorm -> qkv -> attention -> output projection -> residual, over all positions of x (B, C, *)."""

    def __init__(self, channels: int, heads: int, variant: Variant = RELEASE) -> None:
        super().__init__()
        self.heads, self.variant = heads, variant
        self.norm = GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.variant.recompute and torch.is_grad_enabled():
            return checkpoint(self._attend, x, use_reentrant=False, preserve_rng_state=False)
        return self._attend(x)

    def _attend(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        h = attend(self.qkv(self.norm(flat)), self.heads, self.variant)
        return (flat + self.proj_out(h)).view(x.shape)


class CrossPlane(Attention):
    """Attention across planes: concatenated before, split after."""

    def planes(self, planes: Sequence[Tensor]) -> list[Tensor]:
        """planes: (B, C, h, w) each -> the same."""
        joined = torch.cat([plane.flatten(2) for plane in planes], dim=2)
        parts = self(joined).split([plane.shape[2] * plane.shape[3] for plane in planes], dim=2)
        return [part.unflatten(2, plane.shape[2:]) for part, plane in zip(parts, planes, strict=True)]


class Residual(nn.Module):
    """GroupNorm, SiLU, [x2], conv; GroupNorm, scale and shift, SiLU, conv; plus the skip: one plane (B, C, h, w)."""

    def __init__(self, channels: int, embedding: int, out_channels: int, direction: str | None = None) -> None:
        super().__init__()
        self.resample = direction
        self.in_layers = nn.Sequential(
            GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out_channels))
        self.out_layers = nn.ModuleDict(
            {"0": GroupNorm(GROUPS, out_channels), "3": nn.Conv2d(out_channels, out_channels, 3, padding=1)}
        )
        same = out_channels == channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(resample(activation(norm(x)), self.resample))
        scale, shift = self.emb_layers(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers["0"](h) * (1 + scale) + shift
        return self.skip_connection(resample(x, self.resample)) + self.out_layers["3"](F.silu(h))


class Block(nn.ModuleList):
    """The modules of one block of the U-Net, for one plane."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for module in self:
            x = module(x, embedding) if isinstance(module, Residual) else module(x)
        return x


def timestep_embedding(timestep: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width): cosines, then sines."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timestep.device).float() / half)
    angles = timestep[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class EagerDenoiser(nn.Module):
    """The U-Net shared by three planes. Arguments are the config of `pvdm_fast.models.Denoiser`."""

    def __init__(
        self,
        *,
        time: int,
        height: int,
        width: int,
        latent_channels: int,
        model_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        num_heads: int,
        variant: Variant = RELEASE,
    ) -> None:
        super().__init__()
        self.layout: PlaneLayout = TriplaneLayout(time, height, width)
        self.model_channels, self.heads, self.variant = model_channels, num_heads, variant
        embedding = 4 * model_channels
        self.register_buffer("zeros", torch.zeros(1, latent_channels, self.layout.num_tokens))
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.input_blocks = nn.ModuleList([Block([nn.Conv2d(2 * latent_channels, model_channels, 3, padding=1)])])
        self.input_attns = nn.ModuleList([nn.Identity()])
        channels = model_channels
        skips = [channels]
        for level, factor in enumerate(channel_mult):
            inside = 2**level in attention_resolutions
            for _ in range(num_res_blocks):
                block = Residual(channels, embedding, factor * model_channels)
                channels = factor * model_channels
                self._add(self.input_blocks, self.input_attns, channels, block, *self._attention(inside, channels))
                skips.append(channels)
            if level < len(channel_mult) - 1:
                down = Residual(channels, embedding, channels, "down")
                self._add(self.input_blocks, self.input_attns, channels, down)
                skips.append(channels)
        first, last = (Residual(channels, embedding, channels) for _ in range(2))
        self.middle_block = Block([first, Attention(channels, num_heads, variant), last])
        self.mid_attn = CrossPlane(channels, num_heads, variant)
        self.output_blocks, self.output_attns = nn.ModuleList(), nn.ModuleList()
        for level, factor in reversed(list(enumerate(channel_mult))):
            inside = 2**level in attention_resolutions
            for index in range(num_res_blocks + 1):
                block = Residual(channels + skips.pop(), embedding, factor * model_channels)
                channels = factor * model_channels
                modules: list[nn.Module] = [block, *self._attention(inside, channels)]
                if level > 0 and index == num_res_blocks:
                    modules.append(Residual(channels, embedding, channels, "up"))
                self._add(self.output_blocks, self.output_attns, channels, *modules)
        self.out = nn.Sequential(
            GroupNorm(GROUPS, model_channels), nn.SiLU(), nn.Conv2d(model_channels, latent_channels, 3, padding=1)
        )

    def _add(self, blocks: nn.ModuleList, attentions: nn.ModuleList, channels: int, *modules: nn.Module) -> None:
        blocks.append(Block(modules))
        attentions.append(CrossPlane(channels, self.heads, self.variant))

    def _attention(self, inside: bool, channels: int) -> list[nn.Module]:
        return [Attention(channels, self.heads, self.variant)] if inside else []

    def forward(self, latent: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        """latent, condition: (B, D, N), timestep: (B,) -> predicted noise (B, D, N)."""
        embedding = timestep_embedding(timestep, self.model_channels)
        embedding = self.time_embed(embedding.to(latent.dtype))
        if condition is None:
            condition = self.zeros.expand(len(latent), -1, -1)  # type: ignore[operator]
        x = torch.cat((latent, condition.to(latent.dtype)), dim=1)
        planes = [self.input_blocks[0](plane, embedding) for plane in self.layout.split(x, dim=2)]
        skips = [planes]
        for block, attention in zip(self.input_blocks[1:], self.input_attns[1:], strict=True):
            planes = self._run(block, attention, planes, embedding)
            skips.append(planes)
        planes = self._run(self.middle_block, self.mid_attn, planes, embedding)
        for block, attention in zip(self.output_blocks, self.output_attns, strict=True):
            planes = [torch.cat(pair, dim=1) for pair in zip(planes, skips.pop(), strict=True)]
            planes = self._run(block, attention, planes, embedding)
        return torch.cat([self.out(plane).flatten(2) for plane in planes], dim=2)

    @staticmethod
    def _run(block: Any, attention: Any, planes: Sequence[Tensor], embedding: Tensor) -> list[Tensor]:
        return attention.planes([block(plane, embedding) for plane in planes])
