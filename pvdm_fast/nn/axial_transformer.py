"""The TimeSformer layers of PVDM's autoencoder: time attention, space attention, feed-forward, on lattice tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pvdm_fast import ops
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.nn import checkpointing
from pvdm_fast.nn.constants import constant
from pvdm_fast.nn.linear import Linear
from pvdm_fast.nn.plain import is_plain, readable, weight_of, weights_of
from pvdm_fast.nn.recomputed import Normed, Sequences, attention, feed_forward, values_of

Tables = tuple[Tensor, Tensor]


Device = torch.device | str | None


def time_frequencies(width: int, device: Device = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """(width / 2): 10000^(-2 j / width)."""
    return 1.0 / 10000 ** (torch.arange(0, width, 2, device=device).to(dtype) / width)


def space_scales(width: int, device: Device = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """(width / 4): log-spaced, base 2, from 1 to 5."""
    return torch.logspace(0.0, math.log(10 / 2) / math.log(2), width // 4, base=2, device=device, dtype=dtype)


def time_rotation(length: int, width: int, device: Device = None, dtype: torch.dtype = torch.float32) -> Tables:
    """(sin, cos), each (length, width), for positions 0 ... length - 1.

    The frequencies are repeated as a whole, but the rotation works on neighbours, so the two members of a pair turn by
    different angles. The release does this, and its checkpoints depend on it.
    """
    angles = torch.outer(torch.arange(length, device=device).to(dtype), time_frequencies(width, device, dtype))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.sin(), angles.cos()


def space_rotation(
    height: int, width: int, head_width: int, device: Device = None, dtype: torch.dtype = torch.float32
) -> Tables:
    """(sin, cos), each (height * width, head_width): row angles, then column angles, each for both members of a
    pair."""
    scales = space_scales(head_width, device, dtype)
    rows = torch.linspace(-1, 1, height, device=device, dtype=dtype)[:, None] * scales * math.pi
    columns = torch.linspace(-1, 1, width, device=device, dtype=dtype)[:, None] * scales * math.pi
    rows = rows[:, None].expand(-1, width, -1)
    columns = columns[None].expand(height, -1, -1)
    angles = torch.cat((rows, columns), dim=-1).flatten(0, 1).repeat_interleave(2, dim=-1)
    return angles.sin(), angles.cos()


@readable
class PreNorm(nn.Module):
    """A residual step's norm and function. `forward` takes the stream, and what the step before adds to it.

    So one operation computes both the sum and the norm.
    """

    def __init__(self, channels: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fn = fn
        self._kind = type(fn)

    def forward(self, stream: Tensor, branch: Tensor | None, *arguments: object) -> tuple[Tensor, Tensor]:
        """stream, branch: (..., C) -> the stream plus `branch`, and fn of its norm."""
        return self.of_norm(self.fn, stream, branch, *arguments)

    def of_norm(
        self, fn: Callable[..., Tensor], stream: Tensor, branch: Tensor | None, *arguments: object
    ) -> tuple[Tensor, Tensor]:
        """`forward`, where `fn` is self.fn or a method of it."""
        norm = self.norm
        weights = weights_of(norm, nn.LayerNorm)
        if weights is None:
            stream = stream if branch is None else stream + branch
            return stream, fn(norm(stream), *arguments)
        parameters = *weights, norm.eps
        if branch is None:
            stream, values = ops.add_layer_norm(stream, None, *parameters)
        else:
            stream, values = ops.add_layer_norm(branch, stream, *parameters)
        x = Normed(values, stream, *parameters) if is_plain(self.fn, self._kind) else values
        return stream, fn(x, *arguments)


@readable
class AxialAttention(nn.Module):
    """Multi-head attention along time, or inside frames."""

    def __init__(self, channels: int, num_heads: int, head_width: int, axis: str) -> None:
        super().__init__()
        self.num_heads, self.head_width, self.axis = num_heads, head_width, axis
        inner = num_heads * head_width
        self.to_qkv = Linear(channels, 3 * inner, bias=False)
        self.to_out = nn.ModuleDict({"0": Linear(inner, channels)})

    def forward(self, x: Normed | Tensor, layout: TriplaneLayout, rotation: Tables) -> Tensor:
        """x: (B, T H W, C) -> (B, T H W, C)."""
        return self.to_out["0"](self.attend(x, layout, rotation))

    def attend(self, x: Normed | Tensor, layout: TriplaneLayout, rotation: Tables) -> Tensor:
        """x: (B, T H W, C) -> the heads' results (B, T H W, inner)."""
        batch, sites = len(values_of(x)), layout.height * layout.width
        frames = (batch * layout.time, 1) if self.axis == "space" else (batch, layout.time)
        sequences = Sequences(*frames, sites, self.axis)
        attended = attention(x, self.to_qkv, self.num_heads, sequences, rotation)
        return attended.view(batch, layout.num_lattice_tokens, -1)


@readable
class GatedFeedForward(nn.Module):
    """Linear C -> 8C, value times GELU of the gate, linear 4C -> C."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"0": Linear(channels, 8 * channels), "3": Linear(4 * channels, channels)})

    def forward(self, x: Normed | Tensor) -> Tensor:
        return feed_forward(x, self.net["0"], self.net["3"], "geglu")


class ReleaseTable(nn.Module):
    """A constant of the release's state dicts: kept under its name as loaded, and written again.

    It isn't used for computing. The rotation tables are float32, or float64 for float64 tokens, whatever dtype the
    model is moved to.
    """

    def __init__(self, name: str, values: Tensor) -> None:
        super().__init__()
        self.register_buffer(name, values)


class AxialTransformer(nn.Module):
    """A stack of layers of time attention, space attention and feed-forward, without a norm at the end.

    Args:
        channels: C. depth: layers. num_heads, head_width: of the attentions; head_width a multiple of 4.

    Attributes:
        gradient_checkpointing: if set, each layer saves only its input for the backward pass, which recomputes it.
    """

    def __init__(self, channels: int, depth: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        if head_width % 4:
            raise ValueError(f"The width of a head must be a multiple of 4 for the rotation tables, not {head_width}.")
        self.head_width = head_width
        self.gradient_checkpointing = False
        self.frame_rot_emb = ReleaseTable("inv_freqs", time_frequencies(head_width))
        self.image_rot_emb = ReleaseTable("scales", space_scales(head_width))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(channels, AxialAttention(channels, num_heads, head_width, "time")),
                    PreNorm(channels, AxialAttention(channels, num_heads, head_width, "space")),
                    PreNorm(channels, GatedFeedForward(channels)),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor, layout: TriplaneLayout) -> Tensor:
        """x: (B, T H W, C) lattice tokens of `layout` -> (B, T H W, C)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        time_tables = constant(time_rotation, x, dtype, layout.time, self.head_width)
        space_tables = constant(space_rotation, x, dtype, layout.height, layout.width, self.head_width)
        branch: Tensor | None = None
        for layer in self.layers:
            x, branch = checkpointing.run(self, _run_layer, layer, x, branch, layout, time_tables, space_tables)
        return x if branch is None else x + branch


def _run_layer(
    layer: Any,
    x: Tensor,
    branch: Tensor | None,
    layout: TriplaneLayout,
    time_tables: Tables,
    space_tables: Tables,
) -> tuple[Tensor, Tensor | None]:
    """Runs one layer. Returns the stream, and what is still to be added to it.

    Time attention, the heads of space attention, and what follows them are one operation each where a kernel serves it
    and its layers are plain.
    """
    time_attention, space_attention, feed_forward = layer
    summed = _attend_along_time(time_attention, x, branch, layout, time_tables)
    x, branch = time_attention(x, branch, layout, time_tables) if summed is None else (summed, None)
    attended = _attend_inside_frames(space_attention, x, branch, layout, space_tables)
    weights = _weights_behind_the_heads(space_attention, feed_forward, x)
    if attended is None and weights is None:
        return feed_forward(*space_attention(x, branch, layout, space_tables))
    if attended is None:
        attended = space_attention.of_norm(space_attention.fn.attend, x, branch, layout, space_tables)
    x, heads = attended
    if weights is None:
        return feed_forward(x, space_attention.fn.to_out["0"](heads))
    return ops.feed_forward_block(x, heads, *weights, eps=feed_forward.norm.eps), None


def _attend_along_time(
    step: Any, x: Tensor, branch: Tensor | None, layout: TriplaneLayout, tables: Tables
) -> Tensor | None:
    """The stream after time attention, in one operation. None where it shouldn't be used, or a layer isn't plain."""
    time = layout.time
    if not (ops.fuses_time_attention_block(x, time) and is_plain(step, PreNorm) and is_plain(step.fn, AxialAttention)):
        return None
    norm, qkv = weights_of(step.norm, nn.LayerNorm), weight_of(step.fn.to_qkv, Linear)
    out = weights_of(step.fn.to_out["0"], Linear)
    if norm is None or qkv is None or out is None or not ops.fuses_time_attention_block(x, time, (*norm, qkv, *out)):
        return None
    x = x if branch is None else x + branch
    heads, eps = step.fn.num_heads, step.norm.eps
    return ops.time_attention_block(x, *norm, qkv, *out, *tables, time=time, heads=heads, eps=eps)


def _attend_inside_frames(
    step: Any, x: Tensor, branch: Tensor | None, layout: TriplaneLayout, tables: Tables
) -> tuple[Tensor, Tensor] | None:
    """The stream before space attention, and its heads' results, in one operation. None as above."""
    if not (is_plain(step, PreNorm) and is_plain(step.fn, AxialAttention)):
        return None
    sites, heads = layout.height * layout.width, step.fn.num_heads
    if not ops.fuses_space_attention_heads(x, sites, heads):
        return None
    norm, qkv = weights_of(step.norm, nn.LayerNorm), weight_of(step.fn.to_qkv, Linear)
    if norm is None or qkv is None or not ops.fuses_space_attention_heads(x, sites, heads, (*norm, qkv)):
        return None
    x = x if branch is None else x + branch
    return x, ops.space_attention_heads(x, *norm, qkv, *tables, sites=sites, heads=heads, eps=step.norm.eps)


def _weights_behind_the_heads(space_attention: Any, feed_forward: Any, x: Tensor) -> tuple[Tensor, ...] | None:
    """What `ops.feed_forward_block` takes, in its order. None where it shouldn't be used, or a layer isn't plain."""
    if not ops.fuses_feed_forward_block(x):
        return None
    parts = ((space_attention, PreNorm), (feed_forward, PreNorm))
    if not all(is_plain(*part) for part in parts):
        return None
    attention, gated = space_attention.fn, feed_forward.fn
    if not (is_plain(attention, AxialAttention) and is_plain(gated, GatedFeedForward)):
        return None
    norm = weights_of(feed_forward.norm, nn.LayerNorm)
    out, up, down = (weights_of(one, Linear) for one in (attention.to_out["0"], gated.net["0"], gated.net["3"]))
    if norm is None or out is None or up is None or down is None:
        return None
    weights = (*out, *norm, *up, *down)
    return weights if ops.fuses_feed_forward_block(x, weights) else None
