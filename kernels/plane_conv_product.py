"""The 3 x 3 convolution of all planes as one implicit matrix product. Beyond each plane's edge there are zeros.

Rows are the tokens of all planes and batch elements. The inner axis is 9 taps x input channels. Unfolded rows never
exist in memory: each step of the loop reads the neighbours of its tokens at one tap. The gradient of x is the same
product with mirrored taps.

Weights are read with dense input channels, which is PyTorch's channels_last format. A `PlaneConv` on a GPU keeps its
weight so. If yours lies otherwise, each call copies it. No copy is kept between calls, because it could become stale.

If there are too few programs for a GPU (lower levels of a U-Net: few tokens, large weights), programs share the inner
axis. The last of those that share a tile adds their parts in order (`arrivals.py`), otherwise a second kernel does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.backends.rows import rows_dense
from pvdm_fast.kernels.arrivals import counters_for, is_last, most_parts
from pvdm_fast.kernels.configs import ANY, ConfigTable, architecture
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.math import dot_precision
from pvdm_fast.kernels.planes import place_of
from pvdm_fast.layout import PlaneLayout

TAPS = 9
# Multiprocessors of a large GPU of each family. Programs share the inner axis until there are this many.
MULTIPROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "sm120": 170, "gfx942": 304, "interpreter": 1}
# At most this many programs share it, and each keeps at least this many steps.
MOST_PARTS, LEAST_STEPS = 16, 4
# Tensors with this many channels or fewer are read by their strides. Wider ones are made dense first.
NARROW = 16


def shape_class(rows: int, channels: int, written: int, dtype: torch.dtype) -> str:
    """The shape class of a product that reads rows x 9 channels and writes rows x `written`.

    "exact": float32; "narrow in", "narrow out": at most 16 channels (the denoiser's first and last convolution);
    "short": at most 64 rows, bound by reading the weight; "large": at least 128 tiles of 128 x 128, bound by
    arithmetic; "one wave": about as many tiles of 64 x 64 as a large GPU has multiprocessors; else "medium".
    """
    if dtype == torch.float32:
        return "exact"
    if channels <= NARROW:
        return "narrow in"
    if written <= NARROW:
        return "narrow out"
    if rows <= 64:
        return "short"
    if -(-rows // 128) * -(-written // 128) >= 128:
        return "large"
    return "one wave" if 96 <= -(-rows // 64) * -(-written // 64) <= 132 else "medium"


def tile(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    """A configuration of tiles of m x n results, k steps of the inner axis at a time."""
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, warps, stages)


# A stage takes (BLOCK_M + BLOCK_N) BLOCK_K elements of shared memory: in 16 bits 32 KiB for 128 x 128 x 64, so four
# stages fit 163 or 227 KiB, and three (sm120) 99. AMD keeps one stage in registers: of two, 32 KiB of its 64.
# float32 takes twice the bytes, and where PyTorch's switch for convolutions forbids tf32 no tensor cores: 64 x 64, 8 to
# 16 accumulators a thread.
# "one wave" (2048 tokens of 256 channels): tiles of 128 x 64 would be half as many, and share the inner axis by two.
# Smaller ones read a third more from the L2 cache (2.4 GFLOP at 32 FLOP a byte and 5.5 TB/s: 14 us in place of 10), but
# need no second launch, nor its 8 MB. Reasoned, not measured.
CONV = ConfigTable(
    "plane_conv",
    {
        (ANY, ANY, ANY): tile(128, 64, 64, 4, 4),
        (ANY, "exact", ANY): tile(64, 64, 32, 8, 3),
        (ANY, "narrow in", ANY): tile(64, 64, 16, 4, 3),
        (ANY, "narrow out", ANY): tile(64, 16, 64, 4, 4),
        (ANY, "short", ANY): tile(32, 64, 128, 8, 4),
        (ANY, "large", ANY): tile(128, 128, 64, 8, 4),
        (ANY, "one wave", ANY): tile(64, 64, 64, 4, 4),
        ("sm90", "large", ANY): tile(128, 256, 64, 8, 4),
        ("sm100", "large", ANY): tile(128, 256, 64, 8, 4),
        ("sm120", ANY, ANY): tile(128, 64, 64, 8, 3),  # 4 warps spill
        ("sm120", "exact", ANY): tile(64, 64, 32, 8, 3),
        ("sm120", "narrow in", ANY): tile(64, 64, 16, 4, 3),
        ("sm120", "narrow out", ANY): tile(64, 16, 64, 4, 3),
        ("sm120", "short", ANY): tile(32, 64, 128, 8, 3),
        ("sm120", "large", ANY): tile(128, 128, 64, 8, 2),
        ("sm120", "one wave", ANY): tile(64, 64, 64, 4, 3),
        ("gfx942", ANY, ANY): tile(128, 64, 64, 4, 2),
        ("gfx942", "exact", ANY): tile(64, 64, 32, 4, 2),
        ("gfx942", "narrow in", ANY): tile(64, 64, 16, 4, 2),
        ("gfx942", "narrow out", ANY): tile(64, 16, 64, 4, 2),
        ("gfx942", "short", ANY): tile(32, 64, 128, 8, 2),
        ("gfx942", "large", ANY): tile(128, 128, 64, 8, 2),
        ("interpreter", ANY, ANY): tile(64, 64, 64, 4, 1),
    },
    candidates=tuple(
        tile(m, n, k, warps, stages)
        for m, n, k, warps in (
            (32, 64, 128, 8),
            (64, 64, 64, 4),
            (128, 64, 64, 4),
            (128, 128, 64, 8),
            (128, 256, 64, 8),
        )
        for stages in (2, 3, 4)
    ),
)
# Use the vendor's convolution (cuDNN) from ROWS rows on, if both sides have CHANNELS channels or more. Reasoned, not
# measured. Three convolutions, their bias, and copies into and out of dense planes cost about 14 us of launches and 4
# times the bytes of x at 3 TB/s. On Hopper and Blackwell (wgmma, TMA) a library reaches 600 TFLOP/s and this kernel
# 400. So it pays from about 8192 rows of 512 channels on. On other GPUs both use the same instructions.
NEVER, ALWAYS = Config({"ROWS": 1 << 62, "CHANNELS": 1}), Config({"ROWS": 1, "CHANNELS": 1})
LARGE = Config({"ROWS": 8192, "CHANNELS": 512})
CHOICE = ConfigTable(
    "plane_conv_choice",
    {(ANY, ANY, ANY): NEVER, ("sm90", ANY, ANY): LARGE, ("sm100", ANY, ANY): LARGE},
    candidates=(NEVER, ALWAYS),
)


def parts_of(device: torch.device, programs: int, steps: int, most: int = MOST_PARTS) -> int:
    """How many programs share the steps of a product with `programs` tiles: a power of two, at most `most`."""
    wanted = min(MOST_PARTS, most, MULTIPROCESSORS[architecture(device)] // programs, steps // LEAST_STEPS)
    return 1 << (max(1, wanted).bit_length() - 1)


def readable(x: Tensor) -> Tensor:
    """`x` (B, N, C) as the kernels read it: with any strides if it is narrow, otherwise with dense channels."""
    return x if x.shape[2] <= NARROW else rows_dense(x)


def packed(weight: Tensor) -> Tensor:
    """(C', C, 3, 3) -> (C', 9, C) contiguous: a view if the weight is in channels_last format, otherwise a copy."""
    return weight.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


@triton.jit
def _taps_inside(token, exists, PLANES: tl.constexpr):
    """Per token: 9 bits that say which taps' neighbours lie in its plane, and the plane's number of columns."""
    i, j, rows, columns = place_of(token, PLANES)
    bits = token * 0
    for tap in tl.static_range(9):
        row, column = i + (tap // 3 - 1), j + (tap % 3 - 1)
        inside = exists & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        bits |= inside.to(tl.int32) << tap
    return bits, columns


@triton.jit
def _add_parts(parts, bias, residual, out, at, column, mask, elements, count, AT_ONCE: tl.constexpr):
    """out[at] = the sum of parts (count, elements), bias and residual, in float32, in order."""
    total = tl.zeros(at.shape, tl.float32)
    for first in range(0, count, AT_ONCE):
        for part in tl.static_range(AT_ONCE):
            source = parts + tl.cast(first + part, tl.int64) * elements + at
            total += tl.load(source, mask=mask & (first + part < count), other=0.0, cache_modifier=".cg")
    if bias is not None:
        total += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_tile(
    parts, bias, residual, out, counters, rows, written, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    """The last program of a tile adds its parts (programs along axis 2, rows, written), ADDED rows at a time."""
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if is_last(counters + tile, tl.num_programs(2)):
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        for first in range(0, BLOCK_M, ADDED):
            row = tl.program_id(0) * BLOCK_M + first + tl.arange(0, ADDED)[:, None]
            mask = (row < rows) & (column < written)
            at = row.to(tl.int64) * written + column
            elements = tl.cast(rows, tl.int64) * written
            _add_parts(parts, bias, residual, out, at, column, mask, elements, tl.num_programs(2), 4)


@triton.jit
def plane_conv_forward(
    x, weight, bias, residual, parts, out, counters, batch_stride, stride, channel_stride, weight_in, weight_tap,
    weight_out, rows, channels, written, steps, PLANES: tl.constexpr, TOKENS: tl.constexpr, MIRRORED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """One tile of out (rows, written), or of parts (programs along axis 2, rows, written), each of which takes `steps`
    steps of the inner axis, 9 x channels / BLOCK_K.

    parts: None if there is one. counters: of tiles; None: another kernel adds the parts. bias (written) and residual
    (rows, written) are added to the sum where they are given.
    weight_in, weight_tap, weight_out: strides of weight along x's channels, the taps and the written channels.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    token = row % TOKENS
    bits, columns = _taps_inside(token, row < rows, PLANES)
    x_rows = x + (row // TOKENS).to(tl.int64) * batch_stride + token.to(tl.int64) * stride
    weight_columns = weight + column.to(tl.int64) * weight_out
    blocks = tl.cdiv(channels, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(part * steps, tl.minimum((part + 1) * steps, 9 * blocks)):
        tap = step // blocks
        channel = (step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        shift = ((tap // 3 - 1) * columns + (tap % 3 - 1)).to(tl.int64) * stride
        mask = ((bits >> tap) & 1 != 0)[:, None] & (channel < channels)[None, :]
        a = tl.load((x_rows + shift)[:, None] + (channel * channel_stride)[None, :], mask=mask, other=0.0)
        place = 8 - tap if MIRRORED else tap
        mask = (channel < channels)[:, None] & (column < written)[None, :]
        b = tl.load(weight_columns[None, :] + (channel * weight_in + place * weight_tap)[:, None], mask=mask, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    mask = (row < rows)[:, None] & (column < written)[None, :]
    at = row.to(tl.int64)[:, None] * written + column[None, :]
    if parts is not None:
        tl.store(parts + part.to(tl.int64) * rows * written + at, total, mask=mask)
        if counters is not None:
            _add_tile(parts, bias, residual, out, counters, rows, written, BLOCK_M, BLOCK_N, ADDED)
    else:
        if bias is not None:
            total += tl.load(bias + column, mask=column < written, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def plane_conv_forward_add(
    parts, bias, residual, out, elements, written, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out = the sum of parts (COUNT, elements), bias and residual, in float32, in order. elements = rows x written."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _add_parts(parts, bias, residual, out, at, at % written, at < elements, elements, COUNT, COUNT)


ADD = ConfigTable(
    "plane_conv_add",
    {(ANY, ANY, ANY): Config({"BLOCK": 1024})},
    candidates=tuple(Config({"BLOCK": b}) for b in (512, 2048)),
)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    planes: Sequence[int],
    mirrored: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """x: (B, N, C), weight: (C', 9, C) contiguous -> (B, N, C'). mirrored: from a gradient (B, N, C') to that of x."""
    residual = None if residual is None else residual.contiguous()
    (batch, tokens, channels), written = x.shape, weight.shape[2 if mirrored else 0]
    rows, x = batch * tokens, readable(x)
    config = CONV(x.device, shape_class(rows, channels, written, x.dtype), x.dtype)
    grid = (triton.cdiv(rows, config.blocks["BLOCK_M"]), triton.cdiv(written, config.blocks["BLOCK_N"]))
    steps = TAPS * triton.cdiv(channels, config.blocks["BLOCK_K"])
    size = config.blocks["BLOCK_M"] * config.blocks["BLOCK_N"] * 4
    count = parts_of(x.device, grid[0] * grid[1], steps, most_parts(x.device, size))
    out = x.new_empty(batch, tokens, written)
    parts = counters = None
    if count > 1:
        parts = x.new_empty(count, rows, written, dtype=torch.float32)
        counters = counters_for(x, grid[0] * grid[1], count * size)
    later = parts is not None and counters is None
    outer, tap, inner = weight.stride()
    launch(
        plane_conv_forward,
        (*grid, count),
        *(x, weight, *((None,) * 2 if later else (bias, residual)), parts, None if later else out, counters),
        *x.stride(),
        *((outer, tap, inner) if mirrored else (inner, tap, outer)),
        *(rows, channels, written, triton.cdiv(steps, count)),
        config=config,
        PLANES=tuple(planes),
        TOKENS=tokens,
        MIRRORED=mirrored,
        PRECISION=dot_precision(x, "convolution"),
        # A thread adds 16 values at a time, of 4 parts: 64 registers.
        ADDED=min(config.blocks["BLOCK_M"], 512 * config.num_warps // config.blocks["BLOCK_N"]),
    )
    if later:
        config = ADD(x.device, ANY, x.dtype)
        programs = triton.cdiv(out.numel(), config.blocks["BLOCK"])
        launch(
            plane_conv_forward_add,
            (programs,),
            *(parts, bias, residual, out, out.numel(), written),
            config=config,
            COUNT=count,
        )
    return out


def convolve_by_vendor(x: Tensor, weight: Tensor, bias: Tensor | None, planes: Sequence[int]) -> Tensor:
    """The same with PyTorch's convolution, plane by plane; weight: (C', C, 3, 3). Deterministic algorithms only."""
    tf32 = dot_precision(x, "convolution") == "tf32"
    options = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, False, True, True, tf32)
    images = [plane.permute(0, 3, 1, 2) for plane in PlaneLayout.from_sizes(planes).split(x)]
    written = [torch.ops.aten._convolution(image, weight, bias, *options) for image in images]
    return torch.cat([image.permute(0, 2, 3, 1).flatten(1, 2) for image in written], dim=1)


def vendor_is_chosen(x: Tensor, written: int) -> bool:
    """Whether the convolution of `x` (B, N, C) to `written` channels goes to `convolve_by_vendor`."""
    rows, channels = x.shape[0] * x.shape[1], x.shape[2]
    least = CHOICE(x.device, shape_class(rows, channels, written, x.dtype), x.dtype).blocks
    return rows >= least["ROWS"] and min(channels, written) >= least["CHANNELS"]
