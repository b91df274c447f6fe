"""`triplane_project` in Triton, forward: one launch from the lattice to a plane's latents.

A program takes a tile of whole sequences through all layers, one tile after the other. Sequences don't meet, so nothing
waits for another program. A tile's residual stream (128 rows of 384 channels in float32: 192 KiB) doesn't fit a
program's registers. So what one step hands to the next goes through memory of the program's own, which is written and
read again so soon that it stays in the L2:

    stream  C float32: the residual stream
    narrow  C or inner: normed rows, then the heads' results
    wide    3 inner or hidden: queries, keys and values, then the hidden layer

Between steps stands a barrier of the program's threads, after which they see each other's values. (Not on AMD's GPUs:
there it compiles to an s_barrier that doesn't wait for stores, so the kernel isn't used.) Steps are products of
the tile with a weight, by blocks, and attention of one head at a time. Its scores are those of `axial_attention_short`:
between different sequences they are computed too, and dropped. So a value that isn't finite also makes the other
sequences of its tile NaN.

Of the last layer only element 0 of each sequence is kept: after attention the tile has a row for each sequence.

At full size in bf16 a row of the tile takes 3456 bytes, and 132 programs of 128 rows 58 MB. Inputs, weights and result
are 20 MB for one clip. The layers one by one move 944 MB in 34 launches. Weights (1.4 MB a layer) are read from the L2
once for each tile, so tiles are as large as registers allow. All of this is reasoned, not measured.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.backends.projection_layers import NAMES
from pvdm_fast.backends.rows import rows_dense
from pvdm_fast.kernels.attention_common import LOG2_E, padded
from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.math import dot_precision, normal, sum_of_products, tanh
from pvdm_fast.kernels.triplane_slice import gather_of

LONGEST = 64  # elements of a sequence, the appended token among them: a tile of 64 rows holds one
MOST_LATENTS = 32  # in a step of the last product
# Channels in a step of attention, by the bytes of a value: operands in float32 without TF32 are held in registers.
MOST_OF_A_HEAD = {4: 16, 2: 64}
# ROWS: of a tile. OUTPUTS, CHANNELS: of a step of a product. PROGRAMS: the most there are, one for each multiprocessor.
# At 255 registers a thread no second one fits.
FORWARD = ConfigTable(
    "triplane_project_forward",
    {
        ("*", "*", "*"): Config({"ROWS": 128, "OUTPUTS": 128, "CHANNELS": 32, "PROGRAMS": 170}, 8, 2),
        ("*", "*", "float32"): Config({"ROWS": 64, "OUTPUTS": 64, "CHANNELS": 32, "PROGRAMS": 132}, 8, 1),
        ("interpreter", "*", "*"): Config({"ROWS": 64, "OUTPUTS": 128, "CHANNELS": 128, "PROGRAMS": 3}),
        **{
            (family, "*", dtype): Config(
                {"ROWS": 128, "OUTPUTS": outputs, "CHANNELS": channels, "PROGRAMS": programs}, 8, stages
            )
            for family, outputs, channels, programs, stages in (
                ("sm80", 64, 64, 108, 3),
                ("sm90", 128, 64, 132, 3),
                ("sm100", 128, 32, 148, 2),
            )
            for dtype in ("bfloat16", "float16")
        },
    },
    candidates=tuple(
        Config({"ROWS": rows, "OUTPUTS": outputs, "CHANNELS": channels, "PROGRAMS": programs}, 8, stages)
        for rows, programs in ((64, 264), (128, 132))
        for outputs in (64, 128)
        for channels, stages in ((32, 3), (64, 2), (64, 3))
    ),
)


def refusal(*inputs: Any) -> str | None:
    """Why the kernel doesn't take these arguments (of either direction), or None."""
    length = gather_of(*inputs[-6:-2]).length + 1
    if length > LONGEST:
        return f"it takes sequences of at most {LONGEST} elements, not {length}: use another backend."
    return None


@triton.jit
def _rows(step, ROWS: tl.constexpr, SPACING: tl.constexpr):
    """ROWS rows of the tile, SPACING apart. `step` is a loop's variable, which is never negative.

    min(step, 0) is 0, but only at run time. Otherwise the compiler computes the addresses of every step before all
    loops, and holds them in registers: some hundred a thread.
    """
    return tl.arange(0, ROWS) * SPACING + tl.minimum(step, 0)


@triton.jit
def _product(
    left, rows, limit, weight, output, depth, stride, written,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Rows, `stride` apart, times some outputs of a weight (written, depth): (ROWS, OUTPUTS) in float32."""
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, depth, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < depth)
        a = tl.load(left + rows[:, None] * stride + channel, mask=inside, other=0.0)
        inside = (output < written)[:, None] & (channel < depth)
        w = tl.load(weight + output[:, None] * depth + channel, mask=inside, other=0.0)
        sums = tl.dot(a, tl.trans(w), sums, input_precision=PRECISION)
    return sums


@triton.jit
def _norm(
    stream, narrow, rows, limit, weight, bias, eps, c, narrow_stride, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """LayerNorm of rows of the stream, to `narrow`. The variance is summed in a pass of its own, around the mean."""
    total = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        total += tl.sum(tl.load(stream + rows[:, None] * c + channel, mask=inside, other=0.0), 1)
    mean = total / c
    total = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        value = tl.load(stream + rows[:, None] * c + channel, mask=inside, other=0.0)
        value = tl.where(inside, value - mean[:, None], 0.0)
        total += sum_of_products(value, value, 1)
    rstd = tl.rsqrt(total / c + eps)
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        value = tl.load(stream + rows[:, None] * c + channel, mask=inside, other=0.0)
        gain = tl.load(weight + channel, mask=channel < c, other=0.0).to(tl.float32)
        shift = tl.load(bias + channel, mask=channel < c, other=0.0).to(tl.float32)
        normed = (value - mean[:, None]) * rstd[:, None] * gain + shift
        tl.store(narrow + rows[:, None] * narrow_stride + channel, normed.to(narrow.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def _widen(
    narrow, wide, limit, weight, bias, c, written, narrow_stride, wide_stride, PRECISION: tl.constexpr,
    SPACING: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """wide = narrow weight'. With a bias: GELU of the sum."""
    for first in tl.range(0, written, OUTPUTS, num_stages=1, disable_licm=True):
        rows = _rows(first, ROWS, SPACING)
        output = first + tl.arange(0, OUTPUTS)
        sums = _product(
            narrow, rows, limit, weight, output, c, narrow_stride, written, PRECISION, ROWS, OUTPUTS, CHANNELS
        )  # fmt: skip
        if bias is not None:
            sums += tl.load(bias + output, mask=output < written, other=0.0).to(tl.float32)[None, :]
            cdf, _ = normal(sums)
            sums *= cdf
        inside = (rows < limit)[:, None] & (output < written)[None, :]
        tl.store(wide + rows[:, None] * wide_stride + output[None, :], sums.to(wide.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def _add(
    left, stream, limit, weight, bias, depth, stride, c, PRECISION: tl.constexpr,
    SPACING: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """stream += left weight' + bias."""
    for first in tl.range(0, c, OUTPUTS, num_stages=1, disable_licm=True):
        rows = _rows(first, ROWS, SPACING)
        output = first + tl.arange(0, OUTPUTS)
        sums = _product(left, rows, limit, weight, output, depth, stride, c, PRECISION, ROWS, OUTPUTS, CHANNELS)
        sums += tl.load(bias + output, mask=output < c, other=0.0).to(tl.float32)[None, :]
        inside = (rows < limit)[:, None] & (output < c)[None, :]
        place = stream + rows[:, None] * c + output[None, :]
        tl.store(place, sums + tl.load(place, mask=inside, other=0.0), mask=inside)
    tl.debug_barrier()


@triton.jit
def _attend(
    wide, narrow, limit, scale, heads, head_width, narrow_stride, wide_stride,
    PRECISION: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Attention inside every LENGTH rows, from `wide` (q | k | v) to `narrow`. WIDTH: channels of a head at a time."""
    for head in tl.range(0, heads, num_stages=1, disable_licm=True):
        rows = _rows(head, ROWS, 1)
        queries = wide + rows[:, None] * wide_stride + head * head_width
        scores = tl.zeros((ROWS, ROWS), tl.float32)
        for first in range(0, head_width, WIDTH):
            channel = first + tl.arange(0, WIDTH)[None, :]
            inside = (rows < limit)[:, None] & (channel < head_width)
            q = tl.load(queries + channel, mask=inside, other=0.0)
            k = tl.load(queries + heads * head_width + channel, mask=inside, other=0.0)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        # Rows that don't exist are sequences of zeros, so that every row has a finite maximum.
        own = (rows // LENGTH)[:, None] == (rows // LENGTH)[None, :]
        scores = tl.where(own, scores * (scale * LOG2_E), float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        total = tl.sum(weights, 1)
        weights = weights.to(wide.dtype.element_ty)
        for first in range(0, head_width, WIDTH):
            channel = first + tl.arange(0, WIDTH)[None, :]
            inside = (rows < limit)[:, None] & (channel < head_width)
            v = tl.load(queries + 2 * heads * head_width + channel, mask=inside, other=0.0)
            sums = tl.dot(weights, v, input_precision=PRECISION) / total[:, None]
            target = narrow + rows[:, None] * narrow_stride + head * head_width + channel
            tl.store(target, sums.to(narrow.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def _rest_of_layer(
    stream, narrow, wide, step, limit, out_weight, out_bias, norm_weight, norm_bias, up_weight, up_bias, down_weight,
    down_bias, layer, eps, c, width, hidden, narrow_stride, wide_stride, PRECISION: tl.constexpr,
    SPACING: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What follows attention: output projection, norm, feed-forward, and both residuals."""
    of_c = layer * c
    _add(
        narrow, stream, limit, out_weight + of_c * width, out_bias + of_c, width, narrow_stride, c,
        PRECISION, SPACING, ROWS, OUTPUTS, CHANNELS,
    )  # fmt: skip
    rows = _rows(step, ROWS, SPACING)
    _norm(stream, narrow, rows, limit, norm_weight + of_c, norm_bias + of_c, eps, c, narrow_stride, ROWS, CHANNELS)
    _widen(
        narrow, wide, limit, up_weight + of_c * hidden, up_bias + layer * hidden, c, hidden, narrow_stride, wide_stride,
        PRECISION, SPACING, ROWS, OUTPUTS, CHANNELS,
    )  # fmt: skip
    _add(
        wide, stream, limit, down_weight + of_c * hidden, down_bias + of_c, hidden, wide_stride, c,
        PRECISION, SPACING, ROWS, OUTPUTS, CHANNELS,
    )  # fmt: skip


@triton.jit
def _gather(
    x, token, positions, stream, rows, limit, source, c, LENGTH: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """The tile's sequences, to the stream: lattice tokens, the appended token, and their positions."""
    element = rows % LENGTH
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        of_lattice = inside & (element < LENGTH - 1)[:, None]
        value = tl.load(x + source[:, None] + channel, mask=of_lattice, other=0.0).to(tl.float32)
        appended = inside & (element == LENGTH - 1)[:, None]
        value += tl.load(token + channel, mask=appended, other=0.0).to(tl.float32)
        value += tl.load(positions + element[:, None] * c + channel, mask=inside, other=0.0).to(tl.float32)
        tl.store(stream + rows[:, None] * c + channel, value, mask=inside)
    tl.debug_barrier()


@triton.jit
def _latents(
    stream, narrow, out, rows, limit, first_sequence, weight, bias, c, latents, narrow_stride, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out = tanh(stream weight' + bias)."""
    for first in tl.range(0, c, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        inside = (rows < limit)[:, None] & (channel < c)
        value = tl.load(stream + rows[:, None] * c + channel, mask=inside, other=0.0)
        tl.store(narrow + rows[:, None] * narrow_stride + channel, value.to(narrow.dtype.element_ty), mask=inside)
    tl.debug_barrier()
    sequence = (first_sequence + tl.arange(0, ROWS)).to(tl.int64)
    for first in tl.range(0, latents, OUTPUTS, num_stages=1, disable_licm=True):
        output = first + tl.arange(0, OUTPUTS)
        sums = _product(
            narrow, rows, limit, weight, output, c, narrow_stride, latents, PRECISION, ROWS, OUTPUTS, CHANNELS
        )  # fmt: skip
        sums += tl.load(bias + output, mask=output < latents, other=0.0).to(tl.float32)[None, :]
        inside = (rows < limit)[:, None] & (output < latents)[None, :]
        target = out + sequence[:, None] * latents + output[None, :]
        tl.store(target, tanh(sums).to(out.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def triplane_project_forward(
    x, token, positions, norm1_weight, norm1_bias, qkv_weight, out_weight, out_bias, norm2_weight, norm2_bias,
    up_weight, up_bias, down_weight, down_bias, latent_weight, latent_bias, stream, narrow, wide, out,
    sequences, sites, inner, outer_step, step, batch_stride, token_stride, eps, scale,
    layers, c, heads, head_width, hidden, latents, narrow_stride, wide_stride,
    LENGTH: tl.constexpr, FIRST: tl.constexpr, LATENTS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """x: (B, T H W, c) by strides -> out: (sequences, latents). stream, narrow, wide: (programs, ROWS, ...).

    Grid: at most PROGRAMS. FIRST: rows of a tile that holds only element 0 of each sequence. LATENTS, WIDTH: latents,
    and channels of a head, at a time.
    """
    width = heads * head_width
    PACKED: tl.constexpr = ROWS // LENGTH
    program = tl.program_id(0).to(tl.int64)
    stream += program * ROWS * c
    narrow += program * ROWS * narrow_stride
    wide += program * ROWS * wide_stride
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(sequences, PACKED), tl.num_programs(0), num_stages=1, disable_licm=True
    ):
        limit = tl.minimum(sequences - tile * PACKED, PACKED) * LENGTH  # rows behind it don't exist
        rows = _rows(tile, ROWS, 1)
        sequence = tile * PACKED + rows // LENGTH
        site = sequence % sites
        source = (sequence // sites).to(tl.int64) * batch_stride
        source += (site // inner * outer_step + site % inner + rows % LENGTH * step).to(tl.int64) * token_stride
        _gather(x, token, positions, stream, rows, limit, source, c, LENGTH, CHANNELS)
        for number in tl.range(0, layers, num_stages=1, disable_licm=True):
            layer = tl.cast(number, tl.int64)
            _norm(
                stream, narrow, _rows(number, ROWS, 1), limit, norm1_weight + layer * c, norm1_bias + layer * c, eps, c,
                narrow_stride, ROWS, CHANNELS,
            )  # fmt: skip
            _widen(
                narrow, wide, limit, qkv_weight + layer * c * (3 * width), None, c, 3 * width, narrow_stride,
                wide_stride, PRECISION, 1, ROWS, OUTPUTS, CHANNELS,
            )  # fmt: skip
            _attend(
                wide, narrow, limit, scale, heads, head_width, narrow_stride, wide_stride,
                PRECISION, LENGTH, ROWS, WIDTH,
            )  # fmt: skip
            if number < layers - 1:
                _rest_of_layer(
                    stream, narrow, wide, number, limit, out_weight, out_bias, norm2_weight, norm2_bias,
                    up_weight, up_bias, down_weight, down_bias, layer, eps, c, width, hidden, narrow_stride,
                    wide_stride, PRECISION, 1, ROWS, OUTPUTS, CHANNELS,
                )  # fmt: skip
        _rest_of_layer(
            stream, narrow, wide, tile, limit, out_weight, out_bias, norm2_weight, norm2_bias, up_weight, up_bias,
            down_weight, down_bias, tl.cast(layers - 1, tl.int64), eps, c, width, hidden, narrow_stride,
            wide_stride, PRECISION, LENGTH, FIRST, OUTPUTS, CHANNELS,
        )  # fmt: skip
        _latents(
            stream, narrow, out, _rows(tile, FIRST, LENGTH), limit, tile * PACKED, latent_weight, latent_bias,
            c, latents, narrow_stride, PRECISION, FIRST, LATENTS, CHANNELS,
        )  # fmt: skip


def forward(x: Tensor, *arguments: Any) -> Tensor:
    """x: (B, T H W, C), then what the reference takes -> (B, sites, D) in the dtype of the matrices."""
    named = {name: tensor.contiguous() for name, tensor in zip(NAMES, arguments, strict=False)}
    plane, time, height, width, heads, eps = arguments[len(NAMES) :]
    x, matrix = rows_dense(x), named["qkv_weight"]
    (batch, tokens, channels), dtype, device = x.shape, matrix.dtype, x.device
    (layers, hidden, _), inner = named["up_weight"].shape, named["out_weight"].shape[2]
    latent = len(named["latent_bias"])
    gather = gather_of(plane, time, height, width)
    length, sites, head = gather.length + 1, tokens // gather.length, inner // heads
    config = FORWARD(device, "any", dtype)
    rows = config.blocks["ROWS"]
    packed = rows // length
    tiles = triton.cdiv(batch * sites, packed)
    # No more than it takes to be done at the same time: each has memory of its own.
    programs = triton.cdiv(tiles, triton.cdiv(tiles, config.blocks["PROGRAMS"]))
    narrow, wide = max(channels, inner), max(3 * inner, hidden)
    memory = [
        torch.empty(programs, rows, size, dtype=kind, device=device)
        for size, kind in ((channels, torch.float32), (narrow, dtype), (wide, dtype))
    ]
    out = torch.empty(batch, sites, latent, dtype=dtype, device=device)
    launch(
        triplane_project_forward,
        (programs,),
        *(x, *named.values(), *memory, out),
        *(batch * sites, sites, gather.inner, gather.outer_step, gather.step, x.stride(0), x.stride(1)),
        *(eps, head**-0.5, layers, channels, heads, head, hidden, latent, narrow, wide),
        config=config,
        **dict(LENGTH=length, FIRST=padded(packed), LATENTS=min(MOST_LATENTS, padded(latent))),
        **dict(WIDTH=min(MOST_OF_A_HEAD[dtype.itemsize], padded(head)), PRECISION=dot_precision(matrix)),
    )
    return out
