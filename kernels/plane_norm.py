"""`plane_norm`: GroupNorm of every plane with scale and shift, SiLU and x2 resampling. One launch for all planes.

A program holds a tile of BLOCK_N tokens x BLOCK_G groups x BLOCK_W channels in registers. BLOCK_W is a group's
channels, padded to a power of two. The size decides between two ways:

- whole: one tile holds a plane's tokens of one or a few groups. One launch reads x once, and gets statistics and result
  from registers.
- in chunks: `plane_norm_forward_statistics` writes mean and sum of squared deviations of every chunk and group. Then
  `plane_norm_forward_apply` reads x again, joins the chunks of its plane (the same sum in the same order in every
  program) and writes the result.

Deviations are relative to the plane's first value of the group. It is an exact number near the mean, so a mean far
above the deviation costs no digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.backends.rows import rows_dense
from pvdm_fast.kernels.configs import ANY, ConfigTable, architecture
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.math import silu, sum_of_products
from pvdm_fast.kernels.plane_norm_backward import backward
from pvdm_fast.kernels.plane_norm_tiles import (
    chunk_config,
    constants_of,
    count_chunks,
    group_tile,
    load_affine,
    load_tile,
    tile_class,
    tiles_a_chunk,
    whole_blocks,
)  # fmt: skip
from pvdm_fast.kernels.planes import chunk_of, chunks_of

__all__ = ["backward", "forward", "refusal"]

WIDEST_GROUP = 1024  # channels: with wider groups, 16 tokens don't fit a program's registers
LARGEST_BATCH = 65535  # the limit of a grid's third axis
# The largest tile that holds a plane's tokens, in elements: 64 float32 per thread at 16 warps. On sm100 float32 spills
# there, at 32 warps too: of all tokens of 16 channels, without activation.
WHOLE_TILE, WHOLE_TILE_SM100 = 32768, 16384
# Whole planes: 8 to 32 values per thread (64 in the largest tile), and several loads of 16 bytes in flight. They are
# bound by latency, and larger planes have enough values for more warps.
WHOLE = ConfigTable(
    "plane_norm_whole",
    {
        (ANY, ANY, ANY): Config(num_warps=16),
        (ANY, "tile1024", ANY): Config(num_warps=2),
        (ANY, "tile2048", ANY): Config(num_warps=4),
        (ANY, "tile4096", ANY): Config(num_warps=4),
        (ANY, "tile8192", ANY): Config(num_warps=8),
        ("gfx942", ANY, ANY): Config(num_warps=8),  # of 64 threads
        ("gfx942", "tile1024", ANY): Config(num_warps=1),
        ("gfx942", "tile2048", ANY): Config(num_warps=2),
        ("gfx942", "tile4096", ANY): Config(num_warps=4),
        ("gfx942", "tile8192", ANY): Config(num_warps=4),
    },
    candidates=tuple(Config(num_warps=w) for w in (2, 4, 8, 16)),
)
# Chunks: TILE elements, in rows of at least CHANNELS channels. In 16 bits that is 256 bytes: whole cache lines.
CHUNKS = ConfigTable(
    "plane_norm_chunks",
    {
        (ANY, ANY, ANY): Config({"TILE": 8192, "CHANNELS": 128}, num_warps=8),
        ("sm100", ANY, "bfloat16"): Config({"TILE": 8192, "CHANNELS": 128}, num_warps=16),  # 8 spill
    },
    candidates=tuple(
        Config({"TILE": tile, "CHANNELS": channels}, num_warps=tile // 1024)
        for tile in (4096, 8192, 16384)
        for channels in (64, 128, 256)
    ),
)


def refusal(*inputs: Any) -> str | None:
    """Why the kernels don't take these arguments (of either direction: x (B, N, C) first, then planes and groups), or
    None."""
    batch, _, channels = inputs[0].shape
    at = next(i for i, value in enumerate(inputs) if isinstance(value, (list, tuple)))
    if channels // inputs[at + 1] > WIDEST_GROUP:
        return (
            f"it takes groups of at most {WIDEST_GROUP} channels, not {channels // inputs[at + 1]}: use more groups, "
            "or another backend."
        )
    if batch > LARGEST_BATCH:
        return f"it takes batches of at most {LARGEST_BATCH}, not {batch}: split the batch, or use another backend."
    return None


@triton.jit
def _moments(x, origin, mask, count):
    """Per group (G) of a tile with `count` values per group: mean of x - origin, and sum of squares around it."""
    deviation = tl.where(mask, x - origin[None, :, None], 0.0)
    mean = tl.sum(tl.sum(deviation, 2), 0) / count
    deviation = tl.where(mask, deviation - mean[None, :, None], 0.0)
    return mean, tl.sum(sum_of_products(deviation, deviation, 2), 0)


@triton.jit
def plane_norm_forward_statistics(
    x, partials, batch_stride, stride, chunks, PLANES: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """partials (2, B, chunks, G) of chunks of TILES tiles: mean minus the plane's first value, and sum of squares
    around it."""
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    _, first, rows, columns, start = chunk_of(chunk, PLANES, TILES * BLOCK_N)
    group, channel, inside = group_tile(GROUPS, WIDTH, BLOCK_G, BLOCK_W)
    x_plane = x + b * batch_stride + first.to(tl.int64) * stride
    origin = tl.load(x_plane + group * WIDTH, mask=group < GROUPS, other=0.0).to(tl.float32)
    tokens = rows * columns
    mean, squares = tl.zeros([BLOCK_G], tl.float32), tl.zeros([BLOCK_G], tl.float32)
    count = 0.0
    for tile in range(TILES):
        begin = ((chunk - start) * TILES + tile) * BLOCK_N
        token = begin + tl.arange(0, BLOCK_N)
        mask = (token < tokens)[:, None, None] & inside[None, :, :]
        here = tl.maximum(tl.minimum(tokens - begin, BLOCK_N), 0).to(tl.float32) * WIDTH
        values = load_tile(x_plane, stride, token, channel, mask)
        tile_mean, tile_squares = _moments(values, origin, mask, tl.maximum(here, 1.0))
        step, total = tile_mean - mean, count + here
        mean += step * (here / total)
        squares += tile_squares + step * step * (count * here / total)
        count = total
    at = partials + (b * chunks + chunk) * GROUPS + group
    tl.store(at, mean, mask=group < GROUPS)
    tl.store(at + tl.num_programs(2).to(tl.int64) * chunks * GROUPS, squares, mask=group < GROUPS)


@triton.jit
def _join(partials, b, chunks, start, own, tokens, group, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
          SIZE: tl.constexpr, OWN: tl.constexpr):  # fmt: skip
    """Mean (minus the plane's first value) and sum of squares of a plane's groups (G), from its `own` <= OWN chunks."""
    k = tl.arange(0, OWN)
    mask = (k < own)[:, None] & (group < GROUPS)[None, :]
    count = tl.maximum(tl.minimum(tokens - k * SIZE, SIZE), 0).to(tl.float32)[:, None] * WIDTH
    at = partials + (b * chunks + start + k)[:, None] * GROUPS + group[None, :]
    means = tl.load(at, mask=mask, other=0.0)
    squares = tl.load(at + tl.num_programs(2).to(tl.int64) * chunks * GROUPS, mask=mask, other=0.0)
    mean = sum_of_products(means, count, 0) / (tokens * WIDTH).to(tl.float32)
    step = means - mean[None, :]
    return mean, tl.sum(squares + step * step * count, 0)


@triton.jit
def _store_resampled(y, values, begin, tokens, columns, channel, inside, CHANNELS: tl.constexpr, RESAMPLE: tl.constexpr,
                     BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """Writes a tile of a plane's tokens from `begin` on (resample down: square by square). y: that of the resampled
    plane."""
    n = begin + tl.arange(0, BLOCK_N)
    if RESAMPLE < 0:
        quarter: tl.constexpr = BLOCK_N // 4
        values = tl.sum(tl.reshape(values, [quarter, 4, BLOCK_G, BLOCK_W]), 1) * 0.25
        n = begin // 4 + tl.arange(0, quarter)
        tokens = tokens // 4
    mask = (n < tokens)[:, None, None] & inside[None, :, :]
    if RESAMPLE > 0:
        n = n // columns * 4 * columns + n % columns * 2
    at = y + n.to(tl.int64)[:, None, None] * CHANNELS + channel[None, :, :]
    values = values.to(y.dtype.element_ty)
    tl.store(at, values, mask=mask)
    if RESAMPLE > 0:
        tl.store(at + CHANNELS, values, mask=mask)
        tl.store(at + 2 * columns * CHANNELS, values, mask=mask)
        tl.store(at + (2 * columns + 1) * CHANNELS, values, mask=mask)


@triton.jit
def plane_norm_forward_apply(
    x, weight, bias, scale_shift, partials, y, mean_out, rstd_out,
    batch_stride, stride, scale_shift_stride, y_batch_stride, chunks, eps,
    PLANES: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, RESAMPLE: tl.constexpr,
    SIZE: tl.constexpr, OWN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Norms and writes one tile. If partials is None, the tile is a whole plane and gives the statistics itself.

    chunks, SIZE, OWN describe partials: number of chunks in all, tokens per chunk, most chunks of a plane (padded).
    """
    b = tl.program_id(2).to(tl.int64)
    plane, first, rows, columns, start = chunk_of(tl.program_id(0), PLANES, BLOCK_N)
    group, channel, inside = group_tile(GROUPS, WIDTH, BLOCK_G, BLOCK_W)
    tokens = rows * columns
    begin = (tl.program_id(0) - start) * BLOCK_N
    n = begin + tl.arange(0, BLOCK_N)
    token = n
    if RESAMPLE < 0:  # square by square, so that the four tokens of a square are neighbours in the tile
        square, half = n // 4, columns // 2
        token = (square // half * 2 + n % 4 // 2) * columns + square % half * 2 + n % 2
    mask = (n < tokens)[:, None, None] & inside[None, :, :]
    x_plane = x + b * batch_stride + first.to(tl.int64) * stride
    values = load_tile(x_plane, stride, token, channel, mask)
    origin = tl.load(x_plane + group * WIDTH, mask=group < GROUPS, other=0.0).to(tl.float32)
    if partials is None:
        mean, squares = _moments(values, origin, mask, (tokens * WIDTH).to(tl.float32))
    else:
        initial, own = chunks_of(plane, PLANES, SIZE)
        mean, squares = _join(partials, b, chunks, initial, own, tokens, group, GROUPS, WIDTH, SIZE, OWN)
    rstd = tl.rsqrt(squares / (tokens * WIDTH).to(tl.float32) + eps)
    at = (b * (len(PLANES) // 2) + plane) * GROUPS + group
    if tl.program_id(0) == start:
        tl.store(mean_out + at, origin + mean, mask=group < GROUPS)
        tl.store(rstd_out + at, rstd, mask=group < GROUPS)
    gain, rest = load_affine(weight, bias, scale_shift, b, scale_shift_stride, channel, inside, GROUPS * WIDTH)
    z = ((values - origin[None, :, None]) - mean[None, :, None]) * (rstd[:, None] * gain)[None, :, :] + rest[None, :, :]
    if ACTIVATION:
        z = silu(z)
    written = first * 4 if RESAMPLE > 0 else first // 4 if RESAMPLE < 0 else first
    _store_resampled(
        y + b * y_batch_stride + written.to(tl.int64) * (GROUPS * WIDTH), z, begin, tokens, columns, channel, inside,
        GROUPS * WIDTH, RESAMPLE, BLOCK_N, BLOCK_G, BLOCK_W,
    )  # fmt: skip


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_shift: Tensor | None,
    planes: Sequence[int],
    groups: int,
    eps: float,
    activation: bool,
    resample: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (B, N, C) -> y: (B, N', C), and mean and 1 / std: (B, planes, groups) float32. One or two launches."""
    batch, tokens, channels = x.shape
    tokens = tokens * 4 if resample > 0 else tokens // 4 if resample < 0 else tokens
    y = x.new_empty(batch, tokens, channels)
    mean = x.new_empty(batch, len(planes) // 2, groups, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    x, scale_shift = rows_dense(x), None if scale_shift is None else rows_dense(scale_shift)
    constants = constants_of(planes, channels, groups)
    narrow = x.dtype == torch.float32 and architecture(x.device) == "sm100"
    blocks = whole_blocks(x, planes, groups, WHOLE_TILE_SM100 if narrow else WHOLE_TILE)
    if blocks is not None:
        config = replace(WHOLE(x.device, tile_class(math.prod(blocks.values())), x.dtype), blocks=blocks)
        partials, chunks, size, own = None, 0, 1, 1
    else:
        config = chunk_config(CHUNKS, x, groups)
        tiles = tiles_a_chunk(planes, config.blocks["BLOCK_N"])
        size = tiles * config.blocks["BLOCK_N"]
        chunks, own = sum(count_chunks(planes, size)), triton.next_power_of_2(max(count_chunks(planes, size)))
        partials = x.new_empty(2, batch, chunks, groups, dtype=torch.float32)
        grid = (chunks, -(-groups // config.blocks["BLOCK_G"]), batch)
        launch(
            plane_norm_forward_statistics,
            grid,
            x,
            partials,
            *x.stride()[:2],
            chunks,
            config=config,
            TILES=tiles,
            **constants,
        )
    grid = (sum(count_chunks(planes, config.blocks["BLOCK_N"])), -(-groups // config.blocks["BLOCK_G"]), batch)
    launch(
        plane_norm_forward_apply,
        grid,
        *(x, rows_dense(weight), rows_dense(bias), scale_shift, partials, y, mean, rstd),
        *(x.stride(0), x.stride(1), 0 if scale_shift is None else scale_shift.stride(0), y.stride(0), chunks, eps),
        config=config,
        ACTIVATION=activation,
        RESAMPLE=resample,
        SIZE=size,
        OWN=own,
        **constants,
    )
    return y, mean, rstd
