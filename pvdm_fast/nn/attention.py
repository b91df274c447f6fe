"""The denoiser's two attention blocks: across the planes, and inside each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn

from pvdm_fast import ops
from pvdm_fast.layout import PlaneLayout
from pvdm_fast.nn import checkpointing
from pvdm_fast.nn.linear import linear
from pvdm_fast.nn.planes import NORM_GROUPS, PlaneNorm


class TriplaneAttention(nn.Module):
    """Cross-plane attention: all tokens of the three planes attend to each other (PVDM, section 3.2).

    Drops in for the release's `AttentionBlock1D`: the same parameter names and shapes, the same values.
    GroupNorm(32) over all tokens -> qkv -> softmax attention -> output projection -> residual. The output projection
    starts at zero, so a new block is the identity.

    Args:
        channels: C, a multiple of 32.
        num_heads: of the attention; divides C.
        num_head_channels: where given (not -1), the width of a head instead, from which num_heads follows.

    Attributes:
        gradient_checkpointing: set, the block keeps its input alone for the backward pass and is computed again there.

    Raises:
        ValueError: sizes that don't divide.
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
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Sequence[Tensor]) -> list[Tensor]: ...
    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Attend across planes.

        Args:
            x: packed planes (B, C, N); or the planes (B, C, h, w) in a sequence, of any sizes.

        Returns:
            The same form as x, contiguous.

        Raises:
            ValueError: another number of axes or channels.
        """
        if isinstance(x, Tensor):
            if x.dim() != 3 or x.shape[1] != self.channels:
                raise ValueError(f"Packed planes must be (B, {self.channels}, N), but are {tuple(x.shape)}.")
            return self.forward_tokens(x.transpose(1, 2)).transpose(1, 2).contiguous()
        if not x or any(plane.dim() != 4 or plane.shape[1] != self.channels for plane in x):
            raise ValueError(
                f"Planes must be (B, {self.channels}, h, w) each, but are {[tuple(plane.shape) for plane in x]}."
            )
        layout = PlaneLayout(tuple((plane.shape[2], plane.shape[3]) for plane in x))
        tokens = torch.cat([plane.flatten(2) for plane in x], dim=2).transpose(1, 2)
        planes = layout.split(self.forward_tokens(tokens))
        return [plane.permute(0, 3, 1, 2).contiguous() for plane in planes]

    def forward_tokens(self, x: Tensor) -> Tensor:
        """x: (B, N, C) packed channels-last tokens -> (B, N, C)."""
        if ops.fuses_attention_block(x, self.qkv.weight):
            return self._attend_fused(x)
        return checkpointing.run(self, self._attend, x, PlaneLayout(((x.shape[1], 1),)))

    def _attend_fused(self, x: Tensor) -> Tensor:
        """What `forward_tokens` computes otherwise, in one operation."""
        assert self.qkv.bias is not None and self.proj_out.bias is not None
        return ops.attention_block(
            x,
            self.norm.weight,
            self.norm.bias,
            self.qkv.weight.squeeze(-1),
            self.qkv.bias,
            self.proj_out.weight.squeeze(-1),
            self.proj_out.bias,
            heads=self.num_heads,
            groups=NORM_GROUPS,
            eps=self.norm.eps,
        )

    def _attend(self, x: Tensor, segments: PlaneLayout) -> Tensor:
        """Attention inside each plane of `segments`, whose tokens also share the statistics of the norm."""
        batch, tokens, channels = x.shape
        qkv = linear(self.norm(x, segments), self.qkv.weight.squeeze(-1), self.qkv.bias)
        # Channels are ordered head by head, each its q, k, v; the operation wants (B, N, 3, heads, d).
        qkv = qkv.view(batch, tokens, self.num_heads, 3, channels // self.num_heads).transpose(2, 3)
        attended = ops.segment_attention(qkv, segments.offsets).flatten(2)
        return x + linear(attended, self.proj_out.weight.squeeze(-1), self.proj_out.bias)


class PlaneAttention(TriplaneAttention):
    """In-plane attention: each plane on its own, norm statistics too (the release's `AttentionBlock`)."""

    def forward_planes(self, x: Tensor, layout: PlaneLayout) -> Tensor:
        """x: (B, N, C) packed tokens of `layout` -> (B, N, C)."""
        return checkpointing.run(self, self._attend, x, layout)
