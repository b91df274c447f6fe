"""Gradients of `plane_norm`.

With n = (x - mean) rstd, z = n gain + rest (weight, bias and FiLM folded) and dz the gradient of z:
dx = rstd (gain dz - avg(gain dz) - n avg(gain dz n)), averaged over a group's tokens and channels.

Both averages, and the gradients of weight, bias and FiLM, follow from two sums over tokens per channel: of dz and of dz
n. Each program writes them for its tile. The gradient is read at its own resolution. As in forward, planes are whole or
in chunks:

- whole: `plane_norm_backward_dx` (sums and dx from one reading of x and the gradient). The last program of each group
  adds the sums (`arrivals.py`); otherwise `plane_norm_backward_parameters` does.
- in chunks: `plane_norm_backward_sums`, then `plane_norm_backward_dx` (reads again and joins the chunks' sums), then
  `plane_norm_backward_parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.backends.rows import rows_dense
from pvdm_fast.kernels.arrivals import counters_for, is_last
from pvdm_fast.kernels.configs import ANY, ConfigTable
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.math import rounded_product, silu_derivative, sum_of_products
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

# The last program adds the sums of BATCHES batch elements at a time. Those of more than MOST_BATCHES are left to
# another kernel: four rounds of loads take 1.5 us. Reasoned, not measured.
BATCHES = tl.constexpr(4)
MOST_BATCHES = 16
# The largest tile that holds a plane's tokens, in elements: n and dz take 64 registers per thread at 16 warps.
WHOLE_TILE = 16384

# Whole planes: 8 or 16 values of x and of the gradient per thread, 32 in the largest tile.
WHOLE = ConfigTable(
    "plane_norm_backward_whole",
    {
        (ANY, ANY, ANY): Config(num_warps=16),
        (ANY, "tile1024", ANY): Config(num_warps=2),
        (ANY, "tile2048", ANY): Config(num_warps=4),
        (ANY, "tile4096", ANY): Config(num_warps=8),
        ("sm80", "tile8192", "float32"): Config(num_warps=8),  # 16 spill
        ("sm100", "tile1024", ANY): Config(num_warps=4),  # 2 spill
        ("sm120", "tile4096", ANY): Config(num_warps=16),  # 8 spill
        ("gfx942", ANY, ANY): Config(num_warps=8),  # of 64 threads
        ("gfx942", "tile1024", ANY): Config(num_warps=1),
        ("gfx942", "tile2048", ANY): Config(num_warps=2),
        ("gfx942", "tile4096", ANY): Config(num_warps=4),
    },
    candidates=tuple(Config(num_warps=w) for w in (4, 8, 16)),
)
CHUNKS = ConfigTable(
    "plane_norm_backward_chunks",
    {(ANY, ANY, ANY): Config({"TILE": 4096, "CHANNELS": 128}, num_warps=8)},
    candidates=tuple(
        Config({"TILE": tile, "CHANNELS": channels}, num_warps=tile // 512)
        for tile in (2048, 4096, 8192)
        for channels in (64, 128, 256)
    ),
)
# BLOCK_B batch elements x BLOCK_K chunks x BLOCK_C channels at a time.
PARAMETERS = ConfigTable(
    "plane_norm_parameter_gradients",
    {
        (ANY, ANY, ANY): Config({"BLOCK_B": 4, "BLOCK_K": 16, "BLOCK_C": 32}, num_warps=4),
        ("sm100", ANY, ANY): Config({"BLOCK_B": 4, "BLOCK_K": 8, "BLOCK_C": 32}, num_warps=4),  # 16 spill
    },
    candidates=tuple(Config({"BLOCK_B": b, "BLOCK_K": k, "BLOCK_C": 32}, 4) for b in (1, 4, 8) for k in (4, 16)),
)


@triton.jit
def _load_gradient(grad, stride, token, columns, channel, mask, RESAMPLE: tl.constexpr):
    """The gradient of a plane's tokens (N) before resampling: (N, G, W). grad: that of the resampled plane."""
    if RESAMPLE == 0:
        return load_tile(grad, stride, token, channel, mask)
    i, j = token // columns, token % columns
    if RESAMPLE < 0:
        return load_tile(grad, stride, i // 2 * (columns // 2) + j // 2, channel, mask) * 0.25
    corner = 4 * i * columns + 2 * j
    above = load_tile(grad, stride, corner, channel, mask) + load_tile(grad, stride, corner + 1, channel, mask)
    corner += 2 * columns
    return above + load_tile(grad, stride, corner, channel, mask) + load_tile(grad, stride, corner + 1, channel, mask)


@triton.jit
def _normed_and_gradient(
    x, grad, stride, grad_stride, mean, rstd, gain, rest, token, columns, channel, mask,
    ACTIVATION: tl.constexpr, RESAMPLE: tl.constexpr,
):  # fmt: skip
    """n and dz of a tile (N, G, W), both 0 outside the mask. x, grad: those of the plane."""
    values = load_tile(x, stride, token, channel, mask)
    dz = _load_gradient(grad, grad_stride, token, columns, channel, mask, RESAMPLE)
    n = tl.where(mask, (values - mean[None, :, None]) * rstd[None, :, None], 0.0)
    if ACTIVATION:
        dz = rounded_product(dz, silu_derivative(n * gain[None, :, :] + rest[None, :, :]))
    return n, dz


@triton.jit
def _of_plane(x, grad, b, first, batch_stride, stride, grad_batch_stride, grad_stride, RESAMPLE: tl.constexpr):
    """Pointers to a plane's first token, and to the first token of its resampled gradient."""
    before = first * 4 if RESAMPLE > 0 else first // 4 if RESAMPLE < 0 else first
    return x + b * batch_stride + first.to(tl.int64) * stride, (
        grad + b * grad_batch_stride + before.to(tl.int64) * grad_stride
    )


@triton.jit
def _load_statistics(mean, rstd, b, plane, group, PLANES: tl.constexpr, GROUPS: tl.constexpr):
    at = (b * (len(PLANES) // 2) + plane) * GROUPS + group
    m = tl.load(mean + at, mask=group < GROUPS, other=0.0)
    return m, tl.load(rstd + at, mask=group < GROUPS, other=0.0)


@triton.jit
def _store_sums(sums, b, chunk, chunks, level, tilt, channel, inside, CHANNELS: tl.constexpr):
    """Writes sums over tokens of dz (level) and dz n (tilt), each (G, W), to sums (2, B, chunks, C)."""
    at = sums + (b * chunks + chunk) * CHANNELS + channel
    tl.store(at, level, mask=inside)
    tl.store(at + tl.num_programs(2).to(tl.int64) * chunks * CHANNELS, tilt, mask=inside)


@triton.jit
def plane_norm_backward_sums(
    x, grad, weight, bias, scale_shift, mean, rstd, sums, group_sums,
    batch_stride, stride, grad_batch_stride, grad_stride, scale_shift_stride, chunks,
    PLANES: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    RESAMPLE: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Per chunk of TILES tiles: sums (2, B, chunks, C) of dz and dz n, and group_sums (2, B, chunks, G) of gain times
    these."""
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    plane, first, rows, columns, start = chunk_of(chunk, PLANES, TILES * BLOCK_N)
    group, channel, inside = group_tile(GROUPS, WIDTH, BLOCK_G, BLOCK_W)
    m, r = _load_statistics(mean, rstd, b, plane, group, PLANES, GROUPS)
    gain, rest = load_affine(weight, bias, scale_shift, b, scale_shift_stride, channel, inside, GROUPS * WIDTH)
    x_plane, grad_plane = _of_plane(x, grad, b, first, batch_stride, stride, grad_batch_stride, grad_stride, RESAMPLE)
    level, tilt = tl.zeros([BLOCK_G, BLOCK_W], tl.float32), tl.zeros([BLOCK_G, BLOCK_W], tl.float32)
    for tile in range(TILES):
        token = ((chunk - start) * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (token < rows * columns)[:, None, None] & inside[None, :, :]
        n, dz = _normed_and_gradient(
            x_plane, grad_plane, stride, grad_stride, m, r, gain, rest, token, columns, channel, mask,
            ACTIVATION, RESAMPLE,
        )  # fmt: skip
        level += tl.sum(dz, 0)
        tilt += sum_of_products(dz, n, 0)
    _store_sums(sums, b, chunk, chunks, level, tilt, channel, inside, GROUPS * WIDTH)
    at = group_sums + (b * chunks + chunk) * GROUPS + group
    tl.store(at, sum_of_products(gain, level, 1), mask=group < GROUPS)
    tl.store(
        at + tl.num_programs(2).to(tl.int64) * chunks * GROUPS, sum_of_products(gain, tilt, 1), mask=group < GROUPS
    )


@triton.jit
def _join_sums(group_sums, b, plane, chunks, group, PLANES: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
               OWN: tl.constexpr):  # fmt: skip
    """Sums (G) of gain dz and of gain dz n over a plane's chunks."""
    start, own = chunks_of(plane, PLANES, SIZE)
    k = tl.arange(0, OWN)
    mask = (k < own)[:, None] & (group < GROUPS)[None, :]
    at = group_sums + (b * chunks + start + k)[:, None] * GROUPS + group[None, :]
    level = tl.sum(tl.load(at, mask=mask, other=0.0), 0)
    return level, tl.sum(tl.load(at + tl.num_programs(2).to(tl.int64) * chunks * GROUPS, mask=mask, other=0.0), 0)


@triton.jit
def _add_sums(
    sums, weight, bias, scale_shift, dweight, dbias, dscale_shift, scale_shift_stride, batch, chunks, channels, channel,
    inside, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds sums (2, B, chunks, C) over chunks and, for weight and bias, over the batch. Always in the same order."""
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    dweight_sum, dbias_sum = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for begin in range(0, batch, BLOCK_B):
        b = (begin + tl.arange(0, BLOCK_B)).to(tl.int64)
        level, tilt = tl.zeros([BLOCK_B, BLOCK_C], tl.float32), tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        for chunk in range(0, chunks, BLOCK_K):
            k = chunk + tl.arange(0, BLOCK_K)
            mask = (b < batch)[:, None, None] & (k < chunks)[None, :, None] & inside[None, None, :]
            at = sums + (b[:, None, None] * chunks + k[None, :, None]) * channels + channel[None, None, :]
            level += tl.sum(tl.load(at, mask=mask, other=0.0, cache_modifier=".cg"), 1)
            second = at + tl.cast(batch, tl.int64) * chunks * channels
            tilt += tl.sum(tl.load(second, mask=mask, other=0.0, cache_modifier=".cg"), 1)
        if scale_shift is not None:
            mask = (b < batch)[:, None] & inside[None, :]
            at = dscale_shift + b[:, None] * 2 * channels + channel[None, :]
            tl.store(at, (tilt * w[None, :] + level * shift[None, :]).to(dscale_shift.dtype.element_ty), mask=mask)
            tl.store(at + channels, level.to(dscale_shift.dtype.element_ty), mask=mask)
            source = scale_shift + b[:, None] * scale_shift_stride + channel[None, :]
            scale = 1.0 + tl.load(source, mask=mask, other=0.0).to(tl.float32)
            level, tilt = rounded_product(level, scale), rounded_product(tilt, scale)
        dweight_sum += tl.sum(tilt, 0)
        dbias_sum += tl.sum(level, 0)
    tl.store(dweight + channel, dweight_sum.to(dweight.dtype.element_ty), mask=inside)
    tl.store(dbias + channel, dbias_sum.to(dbias.dtype.element_ty), mask=inside)


@triton.jit
def _add_own_sums(
    sums, weight, bias, scale_shift, dweight, dbias, dscale_shift, counters, scale_shift_stride, chunks,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The last of the programs with these groups adds their sums, those of OWN planes at a time."""
    batch = tl.num_programs(2)
    if is_last(counters + tl.program_id(1), tl.num_programs(0) * batch):
        place = tl.arange(0, BLOCK_G * BLOCK_W)
        group, place = tl.program_id(1) * BLOCK_G + place // BLOCK_W, place % BLOCK_W
        _add_sums(
            sums, weight, bias, scale_shift, dweight, dbias, dscale_shift, scale_shift_stride, batch, chunks,
            GROUPS * WIDTH, group * WIDTH + place, (group < GROUPS) & (place < WIDTH),
            BATCHES, OWN, BLOCK_G * BLOCK_W,
        )  # fmt: skip


@triton.jit
def plane_norm_backward_dx(
    x, grad, weight, bias, scale_shift, mean, rstd, sums, group_sums, dx, counters, dweight, dbias, dscale_shift,
    batch_stride, stride, grad_batch_stride, grad_stride, scale_shift_stride, dx_batch_stride, chunks,
    PLANES: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr, RESAMPLE: tl.constexpr, SIZE: tl.constexpr, OWN: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Writes one tile of dx. If group_sums is None, the tile is a whole plane, and its sums are written too. With
    counters, one for each block of groups, these are added for dweight, dbias and dscale_shift.

    chunks, SIZE, OWN describe group_sums: number of chunks in all, tokens per chunk, most chunks of a plane (padded).
    Without it there is a chunk for each plane, and OWN of them are added at a time.
    """
    b = tl.program_id(2).to(tl.int64)
    plane, first, rows, columns, start = chunk_of(tl.program_id(0), PLANES, BLOCK_N)
    group, channel, inside = group_tile(GROUPS, WIDTH, BLOCK_G, BLOCK_W)
    m, r = _load_statistics(mean, rstd, b, plane, group, PLANES, GROUPS)
    gain, rest = load_affine(weight, bias, scale_shift, b, scale_shift_stride, channel, inside, GROUPS * WIDTH)
    x_plane, grad_plane = _of_plane(x, grad, b, first, batch_stride, stride, grad_batch_stride, grad_stride, RESAMPLE)
    token = (tl.program_id(0) - start) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (token < rows * columns)[:, None, None] & inside[None, :, :]
    n, dz = _normed_and_gradient(
        x_plane, grad_plane, stride, grad_stride, m, r, gain, rest, token, columns, channel, mask, ACTIVATION, RESAMPLE
    )
    if group_sums is None:
        levels, tilts = tl.sum(dz, 0), sum_of_products(dz, n, 0)
        _store_sums(sums, b, plane, chunks, levels, tilts, channel, inside, GROUPS * WIDTH)
        level, tilt = sum_of_products(gain, levels, 1), sum_of_products(gain, tilts, 1)
    else:
        level, tilt = _join_sums(group_sums, b, plane, chunks, group, PLANES, GROUPS, SIZE, OWN)
    scale = r / (rows * columns * WIDTH).to(tl.float32)
    result = dz * (r[:, None] * gain)[None, :, :] - ((scale * level)[None, :, None] + n * (scale * tilt)[None, :, None])
    at = dx + b * dx_batch_stride + (first + token).to(tl.int64)[:, None, None] * (GROUPS * WIDTH) + channel[None, :, :]
    tl.store(at, result.to(dx.dtype.element_ty), mask=mask)
    if counters is not None:
        _add_own_sums(
            sums, weight, bias, scale_shift, dweight, dbias, dscale_shift, counters, scale_shift_stride, chunks,
            GROUPS, WIDTH, OWN, BLOCK_G, BLOCK_W,
        )  # fmt: skip


@triton.jit
def plane_norm_backward_parameters(
    sums, weight, bias, scale_shift, dweight, dbias, dscale_shift, scale_shift_stride, batch, chunks, channels,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds all sums, in blocks of BLOCK_C channels."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    _add_sums(
        sums, weight, bias, scale_shift, dweight, dbias, dscale_shift, scale_shift_stride, batch, chunks, channels,
        channel, channel < channels, BLOCK_B, BLOCK_K, BLOCK_C,
    )  # fmt: skip


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale_shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    planes: Sequence[int],
    groups: int,
    activation: bool,
    resample: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and scale_shift (empty if there is none). One to three launches."""
    batch, _, channels = x.shape
    dx, dweight, dbias = x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    dscale_shift = x.new_empty(0) if scale_shift is None else scale_shift.new_empty(scale_shift.shape)
    grad, x, weight, bias = (rows_dense(t) for t in (grad, x, weight, bias))
    scale_shift = None if scale_shift is None else rows_dense(scale_shift)
    scale_shift_stride = 0 if scale_shift is None else scale_shift.stride(0)
    constants = {**constants_of(planes, channels, groups), "ACTIVATION": activation, "RESAMPLE": resample}
    inputs = (grad, weight, bias, scale_shift, mean.contiguous(), rstd.contiguous())
    strides = (x.stride(0), x.stride(1), grad.stride(0), grad.stride(1), scale_shift_stride)
    blocks = whole_blocks(x, planes, groups, WHOLE_TILE)
    if blocks is not None:
        config = replace(WHOLE(x.device, tile_class(math.prod(blocks.values())), x.dtype), blocks=blocks)
        chunks = len(planes) // 2
        size, own = 1, min(16, triton.next_power_of_2(chunks))
        group_sums = None
        sums = x.new_empty(2, batch, chunks, channels, dtype=torch.float32)
    else:
        config = chunk_config(CHUNKS, x, groups)
        tiles = tiles_a_chunk(planes, config.blocks["BLOCK_N"])
        size = tiles * config.blocks["BLOCK_N"]
        chunks, own = sum(count_chunks(planes, size)), triton.next_power_of_2(max(count_chunks(planes, size)))
        sums = x.new_empty(2, batch, chunks, channels, dtype=torch.float32)
        group_sums = x.new_empty(2, batch, chunks, groups, dtype=torch.float32)
        grid = (chunks, -(-groups // config.blocks["BLOCK_G"]), batch)
        launch(
            plane_norm_backward_sums,
            grid,
            x,
            *inputs,
            sums,
            group_sums,
            *strides,
            chunks,
            config=config,
            TILES=tiles,
            **constants,
        )
    across = -(-groups // config.blocks["BLOCK_G"])
    counters = None
    if group_sums is None and batch <= MOST_BATCHES:
        width = config.blocks["BLOCK_G"] * config.blocks["BLOCK_W"]
        counters = counters_for(x, across, 2 * batch * chunks * width * 4)
    results = (dweight, dbias, dscale_shift)
    launch(
        plane_norm_backward_dx,
        (sum(count_chunks(planes, config.blocks["BLOCK_N"])), across, batch),
        *(x, *inputs, sums, group_sums, dx, counters, *(results if counters is not None else (None,) * 3)),
        *(*strides, dx.stride(0), chunks),
        config=config,
        SIZE=size,
        OWN=own,
        **constants,
    )
    if counters is not None:
        return dx, *results
    config = PARAMETERS(x.device, ANY, x.dtype)
    launch(
        plane_norm_backward_parameters,
        (-(-channels // config.blocks["BLOCK_C"]),),
        *(sums, weight, bias, scale_shift, *results, scale_shift_stride, batch, chunks, channels),
        config=config,
    )
    return dx, *results
