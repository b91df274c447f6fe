"""Shared by the forward and backward kernels of `plane_norm`: how planes are cut into tiles, and what a tile loads.

A tile is BLOCK_N tokens x BLOCK_G groups x BLOCK_W channels (a group's channels, padded to a power of two). A program
holds it in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.kernels.configs import ANY, ConfigTable
from pvdm_fast.kernels.launch import Config

# Enough programs to keep a large GPU busy: an H100 has 132 multiprocessors, a B200 148, an MI300X 304.
ENOUGH_PROGRAMS = 256
# Most chunks of a plane: `plane_norm_forward_apply` joins them in one tile.
MOST_CHUNKS = 64


def tile_class(elements: int) -> str:
    """The shape class of a tile: its elements, rounded up to a power of two, at least 1024."""
    return f"tile{max(elements, 1024)}"


def whole_blocks(x: Tensor, planes: Sequence[int], groups: int, most: int) -> dict[str, int] | None:
    """The tile that holds a plane's tokens; None where it would be larger than `most` elements.

    It takes more groups while their channels are less than 32 bytes per token (one memory transaction) and enough
    programs are left.
    """
    tokens = max(rows * columns for rows, columns in zip(planes[::2], planes[1::2], strict=True))
    block_n, block_w = max(16, triton.next_power_of_2(tokens)), triton.next_power_of_2(x.shape[2] // groups)
    block_g, programs = 1, x.shape[0] * len(planes) // 2 * groups
    while (
        block_g * block_w * x.element_size() < 32
        and block_g < groups
        and programs >= 2 * block_g * ENOUGH_PROGRAMS
        and 2 * block_g * block_w * block_n <= most
    ):
        block_g *= 2
    if block_n * block_g * block_w > most:
        return None
    return {"BLOCK_N": block_n, "BLOCK_G": block_g, "BLOCK_W": block_w}


def chunk_config(table: ConfigTable, x: Tensor, groups: int) -> Config:
    """The configuration of kernels that work by chunks, with TILE and CHANNELS turned into block sizes."""
    config = table(x.device, ANY, x.dtype)
    block_w = triton.next_power_of_2(x.shape[2] // groups)
    block_g = max(1, min(config.blocks["CHANNELS"] // block_w, triton.next_power_of_2(groups)))
    block_n = max(16, config.blocks["TILE"] // (block_g * block_w))
    return replace(config, blocks={"BLOCK_N": block_n, "BLOCK_G": block_g, "BLOCK_W": block_w})


def count_chunks(planes: Sequence[int], size: int) -> list[int]:
    """The number of chunks of each plane."""
    return [-(-rows * columns // size) for rows, columns in zip(planes[::2], planes[1::2], strict=True)]


def tiles_a_chunk(planes: Sequence[int], block_n: int) -> int:
    """How many tiles make a chunk, so that no plane has more than MOST_CHUNKS: a power of two."""
    return triton.next_power_of_2(-(-max(count_chunks(planes, block_n)) // MOST_CHUNKS))


def constants_of(planes: Sequence[int], channels: int, groups: int) -> dict[str, object]:
    """Compile-time constants of every kernel of `plane_norm`."""
    return {"PLANES": tuple(planes), "GROUPS": groups, "WIDTH": channels // groups}


@triton.jit
def group_tile(GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr):
    """This program's groups (G), their channels (G, W), and which of them exist. Axis 1 of the grid counts groups."""
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    place = tl.arange(0, BLOCK_W)
    channel = group[:, None] * WIDTH + place[None, :]
    return group, channel, (group[:, None] < GROUPS) & (place[None, :] < WIDTH)


@triton.jit
def load_tile(x, stride, token, channel, mask):
    """(N, G, W) values in float32, 0 outside the mask. x: that of the batch element. stride: between tokens."""
    at = token.to(tl.int64)[:, None, None] * stride + channel[None, :, :]
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_affine(weight, bias, scale_shift, b, scale_shift_stride, channel, inside, CHANNELS: tl.constexpr):
    """weight (1 + scale) and bias (1 + scale) + shift, each (G, W) in float32."""
    gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    rest = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if scale_shift is not None:
        at = scale_shift + b * scale_shift_stride + channel
        scale = 1.0 + tl.load(at, mask=inside, other=0.0).to(tl.float32)
        gain = gain * scale
        rest = rest * scale + tl.load(at + CHANNELS, mask=inside, other=0.0).to(tl.float32)
    return gain, rest
