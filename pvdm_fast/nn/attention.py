"""The denoiser's two attention blocks: across the planes, and inside each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from einops import rearrange
from torch import Tensor, nn

from pvdm_fast import ops
from pvdm_fast.layout import PlaneLayout
from pvdm_fast.nn import checkpointing, planes
from pvdm_fast.nn.linear import linear
from pvdm_fast.nn.plain import POINTWISE_1D, weights_of
from pvdm_fast.nn.planes import NORM_GROUPS, PlaneNorm


class TriplaneAttention(nn.Module):
    """Cross-plane attention: all tokens of the three planes attend to each other (PVDM, section 3.2).

    Drops in for the release's `AttentionBlock1D`: the same parameter names and shapes, the same values.
    GroupNorm(32) over all tokens -> qkv -> softmax attention -> output projection -> residual. The output projection
    starts at zero, so a new block is the identity.

    Args:
        channels: C, a multiple of 32.
        num_heads: of the attention; divides C.
        num_head_channels: if given (not -1), the width of a head. num_heads follows from it.

    Attributes:
        gradient_checkpointing: if set, the block saves only its input for the backward pass, which recomputes it.

    Raises:
        ValueError: sizes don't divide.
    """

    def __init__(self, channels: int, num_heads: int = 1, num_head_channels: int = -1) -> None:
        super().__init__()
        if num_head_channels != -1:
            if num_head_channels < 1 or channels % num_head_channels:
                raise ValueError(f"num_head_channels {num_head_channels} must divide the {channels} channels.")
            num_heads = channels // num_head_channels
        if channels % NORM_GROUPS or num_heads < 1 or channels % num_heads:
            raise ValueError(
                f"{channels} channels with {num_heads} heads: channels must be a multiple of {NORM_GROUPS} (the "
                f"groups of the norm) and of the number of heads."
            )
        self.channels = channels
        self.num_heads = num_heads
        self.gradient_checkpointing = False
        self.norm = PlaneNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)  # type: ignore[arg-type]

    @overload
    def forward(self, x: Tensor, layout: PlaneLayout | None = None) -> Tensor: ...
    @overload
    def forward(self, x: Sequence[Tensor]) -> list[Tensor]: ...
    def forward(self, x: Tensor | Sequence[Tensor], layout: PlaneLayout | None = None) -> Tensor | list[Tensor]:
        """Attend across planes.

        Args:
            x: packed planes (B, C, N). Or a sequence of planes (B, C, h, w) of any sizes. Or, with a layout, its tokens
                (B, N, C).
            layout: of the tokens.

        Returns:
            The same form as x, contiguous.

        Raises:
            ValueError: the number of axes or channels doesn't fit.
        """
        if layout is not None:
            assert isinstance(x, Tensor)
            layout.check(x)
            return self.forward_tokens(x)
        if isinstance(x, Tensor):
            if x.dim() != 3 or x.shape[1] != self.channels:
                raise ValueError(f"Packed planes must be (B, {self.channels}, N), but are {tuple(x.shape)}.")
            return self.forward_tokens(x.transpose(1, 2)).transpose(1, 2).contiguous()
        if not x or any(plane.dim() != 4 or plane.shape[1] != self.channels for plane in x):
            raise ValueError(
                f"Planes must be (B, {self.channels}, h, w) each, but are {[tuple(plane.shape) for plane in x]}."
            )
        layout = PlaneLayout(tuple((plane.shape[2], plane.shape[3]) for plane in x))
        tokens = torch.cat([rearrange(plane, "b c h w -> b (h w) c") for plane in x], dim=1)
        attended = layout.split(self.forward_tokens(tokens))
        return [rearrange(plane, "b h w c -> b c h w").contiguous() for plane in attended]

    def forward_tokens(self, x: Tensor) -> Tensor:
        """x: (B, N, C) packed channels-last tokens -> (B, N, C)."""
        return self._run(x, PlaneLayout(((x.shape[1], 1),)))

    def _run(self, x: Tensor, segments: PlaneLayout) -> Tensor:
        fused = self._attend_fused(x, segments)
        return checkpointing.run(self, self._attend, x, segments) if fused is None else fused

    def _attend_fused(self, x: Tensor, segments: PlaneLayout) -> Tensor | None:
        """What `_attend` computes, in one operation. None if there is no such operation for x, or a layer isn't
        plain."""
        like = self.qkv.__dict__["_parameters"].get("weight")
        if like is None or not ops.fuses_attention_block(x, like, heads=self.num_heads, groups=NORM_GROUPS):
            return None
        norm = weights_of(self.norm, PlaneNorm)
        qkv = weights_of(self.qkv, nn.Conv1d, POINTWISE_1D)
        proj = weights_of(self.proj_out, nn.Conv1d, POINTWISE_1D)
        if norm is None or qkv is None or proj is None:
            return None
        return ops.attention_block(
            x,
            *norm,
            qkv[0].squeeze(-1),
            qkv[1],
            proj[0].squeeze(-1),
            proj[1],
            heads=self.num_heads,
            groups=NORM_GROUPS,
            eps=self.norm.eps,
            layout=segments,
        )

    def _attend(self, x: Tensor, segments: PlaneLayout) -> Tensor:
        """Attention inside each plane of `segments`, whose tokens also share the statistics of the norm."""
        qkv = pointwise(self.qkv, planes.norm(self.norm, x, segments))
        # Channels are grouped by head, each with its q, k, v. The operation takes (B, N, 3, heads, d).
        qkv = qkv.unflatten(-1, (self.num_heads, 3, -1)).transpose(2, 3)
        attended = ops.segment_attention(qkv, segments.offsets).flatten(2)
        return x + pointwise(self.proj_out, attended)


class PlaneAttention(TriplaneAttention):
    """In-plane attention: each plane separately, with its own norm statistics (the release's `AttentionBlock`)."""

    def forward(self, x: Tensor, layout: PlaneLayout) -> Tensor:  # type: ignore[override]
        """x: (B, N, C) packed tokens of `layout` -> (B, N, C)."""
        return self._run(x, layout)


def pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies a 1x1 nn.Conv1d, or what replaces it, to tokens: x (B, N, C) -> (B, N, C')."""
    weights = weights_of(layer, nn.Conv1d, POINTWISE_1D)
    if weights is None:
        return layer(x.transpose(1, 2)).transpose(1, 2)
    weight, bias = weights
    return linear(x, weight.squeeze(-1), bias)
