"""`triplane_project` on a GPU, forward: one launch in CUDA C++, a tile of sequences at a time through all layers.

Here is decided how large a tile is, and how much of a layer lies in shared memory at a time. At full size in bf16 on an
H100, along time, 103 blocks take 205 tiles of five sequences, two heads and all of the hidden layer at a time. Their
residual streams are 15 MB, which stay in the L2 (computed). There is no backward pass: Triton's kernel computes the
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pvdm_fast.backends.cuda import launch_target
from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.projection_layers import MATRICES, NAMES
from pvdm_fast.backends.rows import parameter, rows_dense
from pvdm_fast.layout import PLANE_NAMES

LONGEST = 64  # elements of a sequence, the appended token among them: a warp holds all scores of 16 queries
UNIT = 16  # channels of heads and of the hidden layer: narrower ones are padded with zeros
# Rows of a tile, by the bytes of a matrix's number: as many as there are registers for their sums.
ROWS = {2: (32, 64, 96, 112), 4: (32, 64)}
# Warps of a block. The stages of four take half the shared memory, for GPUs that have little. But then each quarter of
# a multiprocessor has one, with nothing to do where it waits: by the rule half as long again. Reasoned, not measured.
WARPS = {8: 2, 4: 3}
STAGES, ZEROS = 3 * 32 * 64, 128  # bytes of a warp's stages, and what else there is
# Below 96 rows a tile's weights take longer to come from the L2 than its products: at full size on an H100 1.4 MB a
# layer at some 25 bytes a clock and multiprocessor are 56,000 clocks, the products of 16 rows 9,000. In float32
# products always take longer. Reasoned, not measured.
LEAST_PAID = {2: 96, 4: 0}
NO_GRADIENT = 'it computes no gradient: use backend "triton".'


class Tile(NamedTuple):
    """How the kernel is cut: rows of a tile, warps of a block, heads and channels of the hidden layer at a time."""

    rows: int
    warps: int
    heads: int
    hidden: int


class Sizes(NamedTuple):
    """What a tile depends on: bytes of a matrix's number, elements of a sequence, widths as the kernel takes them."""

    size: int
    length: int
    channels: int
    heads: int
    head: int
    hidden: int


def padded(width: int) -> int:
    return -(-width // UNIT) * UNIT


def shared_bytes(s: Sizes, tile: Tile) -> int:
    """Shared memory of a block."""
    wide = max(3 * tile.heads * s.head, tile.hidden)
    return ZEROS + tile.warps * STAGES + tile.rows * (s.size * (padded(s.channels) + wide) + 32)


def _in_parts(whole: int, most: int) -> int:
    """As much at a time as makes the fewest parts, and these even."""
    return -(-whole // -(-whole // most))


def _fitting(s: Sizes, room: int) -> Iterator[Tile]:
    """The tiles that a block has shared memory for."""
    for warps, rows in product(WARPS, ROWS[s.size]):
        left = (room - ZEROS - warps * STAGES) // rows - 32
        wide = (left // s.size - padded(s.channels)) // UNIT * UNIT
        if rows >= s.length and wide >= 3 * s.head:
            heads = _in_parts(s.heads, min(s.heads, wide // (3 * s.head)))
            yield Tile(rows, warps, heads, padded(_in_parts(s.hidden, min(s.hidden, wide))))


def best_tile(s: Sizes, sequences: int, multiprocessors: int, room: int) -> Tile | None:
    """The tile with which the multiprocessors are done first, and of these the one that passes the stream least; None
    if a block has no shared memory for any."""

    def cost(tile: Tile) -> tuple[int, int]:
        rounds = -(-sequences // (tile.rows // s.length * multiprocessors))
        time = rounds * max(tile.rows, LEAST_PAID[s.size]) * WARPS[tile.warps]
        return time, -(-s.heads // tile.heads) + -(-s.hidden // tile.hidden)

    return min(_fitting(s, room), key=cost, default=None)


@cache
def limits(device: torch.device) -> tuple[int, int]:
    """A device's multiprocessors, and bytes of shared memory that a block may have. Without a GPU, those of the host
    stand-in."""
    if device.type != "cuda":
        return 3, 227 << 10
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def refusal(*inputs: Any) -> str | None:
    """Why the kernel doesn't take these arguments (of either direction; or of forward, with x alone in place of the
    tensors, for layers like `PlaneProjection`'s), or None."""
    *tensors, plane, time, height, width, heads, _ = inputs
    if len(tensors) > len(NAMES) + 1:
        return NO_GRADIENT
    x, length = tensors[0], (time, height, width)[PLANE_NAMES.index(plane)] + 1
    channels = x.shape[-1]
    if length > LONGEST:
        return f"it takes sequences of at most {LONGEST} elements, not {length}: use another backend."
    if channels % 8:
        return f"it takes channels in multiples of 8, not {channels}: use another backend."
    named = dict(zip(("x", *NAMES), tensors, strict=False))
    matrix, out = named.get("qkv_weight", x), named.get("out_weight")
    head = channels // 8 if out is None else out.shape[2] // heads
    s = Sizes(matrix.element_size(), length, channels, heads, padded(head), UNIT)
    multiprocessors, room = limits(x.device)
    if best_tile(s, 1, multiprocessors, room) is None:
        return f"a block's {room >> 10} KiB of shared memory hold no tile of its sequences: use another backend."
    return None


def _pad_heads(named: dict[str, Tensor], heads: int) -> None:
    """Channels of zeros behind each head's."""
    qkv, out = named["qkv_weight"], named["out_weight"]
    head = out.shape[2] // heads
    more = padded(head) - head
    if more:
        named["qkv_weight"] = F.pad(qkv.unflatten(1, (3 * heads, head)), (0, 0, 0, more)).flatten(1, 2)
        named["out_weight"] = F.pad(out.unflatten(2, (heads, head)), (0, more)).flatten(2)


def _pad_hidden(named: dict[str, Tensor]) -> None:
    """Channels of zeros behind the hidden layer's: the GELU of 0 is 0."""
    hidden = named["up_bias"].shape[1]
    more = padded(hidden) - hidden
    if more:
        named["up_weight"] = F.pad(named["up_weight"], (0, 0, 0, more))
        named["up_bias"], named["down_weight"] = (F.pad(named[name], (0, more)) for name in ("up_bias", "down_weight"))


def _as_read(named: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The parameters as the kernel reads them, at 16 bytes: matrices in their own dtype, vectors in float32. Vectors in
    16 bits are cast in two launches together."""
    vectors = [name for name in NAMES if name not in MATRICES]
    if any(named[name].dtype != torch.float32 for name in vectors):
        parts = torch.cat([named[name].flatten() for name in vectors]).float()
        sizes = [named[name].numel() for name in vectors]
        for name, part in zip(vectors, parts.split(sizes), strict=True):
            named[name] = part.view(named[name].shape)
    dense = (named[name].contiguous() if name in MATRICES else parameter(named[name]) for name in NAMES)
    return tuple(tensor if tensor.data_ptr() % 16 == 0 else tensor.clone() for tensor in dense)


def forward(x: Tensor, *arguments: Any) -> Tensor:
    """x: (B, T H W, C), then what the reference takes -> (B, sites, D) in the dtype of the matrices."""
    named: dict[str, Tensor] = dict(zip(NAMES, arguments, strict=False))
    plane, time, height, width, heads, eps = arguments[len(NAMES) :]
    scale = (named["out_weight"].shape[2] // heads) ** -0.5
    _pad_heads(named, heads)
    _pad_hidden(named)
    matrix, length, channels = named["qkv_weight"], len(named["positions"]), x.shape[2]
    sites, latent = x.shape[1] // (length - 1), len(named["latent_bias"])
    head, hidden = named["out_weight"].shape[2] // heads, named["up_bias"].shape[1]
    sequences, (multiprocessors, room) = len(x) * sites, limits(x.device)
    sizes = Sizes(matrix.element_size(), length, channels, heads, head, hidden)
    tile = best_tile(sizes, sequences, multiprocessors, room)
    assert tile is not None, "refusal() lets through what fits"
    tiles = -(-sequences // (tile.rows // length))
    blocks = _in_parts(tiles, multiprocessors)
    stream = torch.empty(blocks, tile.rows, channels, dtype=torch.float32, device=x.device)
    out = torch.empty(len(x), sites, latent, dtype=matrix.dtype, device=x.device)
    extension("_cuda").triplane_project_forward(
        *(rows_dense(x), _as_read(named), out, stream, tile, scale),
        *(PLANE_NAMES.index(plane), time, height, width, heads, eps),
        *launch_target(x),
    )
    return out
