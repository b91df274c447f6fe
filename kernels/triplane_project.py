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
are 20 MB for one clip. From the lattice to the latents, slice, layers and convolution one by one move 971 MB in 37
launches (944 in 34 of them the layers). Weights (1.4 MB a layer) are read from the L2 once for each tile, so tiles are
as large as registers allow. All of this is reasoned, not measured.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.backends.projection_layers import NAMES
from pvdm_fast.backends.rows import rows_dense
from pvdm_fast.kernels.attention_common import padded
from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch, programs_for
from pvdm_fast.kernels.math import dot_precision, tanh
from pvdm_fast.kernels.triplane_project_backward import backward
from pvdm_fast.kernels.triplane_project_steps import (
    attend,
    gather,
    norm,
    product,
    rest_of_layer,
    tile_rows,
    widen,
    width_of_a_step,
)
from pvdm_fast.kernels.triplane_slice import gather_of

__all__ = ["backward", "forward", "refusal"]

LONGEST = 64  # elements of a sequence, the appended token among them: a tile of 64 rows holds one
MOST_LATENTS = 32  # in a step of the last product
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
        sums = product(
            narrow, rows, limit, weight, output, c, narrow_stride, c, latents, PRECISION, ROWS, OUTPUTS, CHANNELS
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
        rows = tile_rows(tile, ROWS, 1)
        sequence = tile * PACKED + rows // LENGTH
        site = sequence % sites
        source = (sequence // sites).to(tl.int64) * batch_stride
        source += (site // inner * outer_step + site % inner + rows % LENGTH * step).to(tl.int64) * token_stride
        gather(x, token, positions, stream, rows, limit, source, c, LENGTH, CHANNELS)
        for number in tl.range(0, layers, num_stages=1, disable_licm=True):
            layer = tl.cast(number, tl.int64)
            own = tile_rows(number, ROWS, 1)
            norm(
                stream, narrow, own, own, limit, norm1_weight + layer * c, norm1_bias + layer * c, None, None, eps, c,
                narrow_stride, ROWS, CHANNELS,
            )  # fmt: skip
            widen(
                narrow, wide, limit, qkv_weight + layer * c * (3 * width), None, c, 3 * width, narrow_stride,
                wide_stride, PRECISION, 1, ROWS, OUTPUTS, CHANNELS,
            )  # fmt: skip
            attend(
                wide, narrow, limit, scale, heads, head_width, narrow_stride, wide_stride,
                PRECISION, LENGTH, ROWS, ROWS, WIDTH,
            )  # fmt: skip
            if number < layers - 1:
                rest_of_layer(
                    stream, narrow, wide, number, limit, out_weight, out_bias, norm2_weight, norm2_bias,
                    up_weight, up_bias, down_weight, down_bias, layer, eps, c, width, hidden, narrow_stride,
                    wide_stride, PRECISION, 1, ROWS, OUTPUTS, CHANNELS,
                )  # fmt: skip
        rest_of_layer(
            stream, narrow, wide, tile, limit, out_weight, out_bias, norm2_weight, norm2_bias, up_weight, up_bias,
            down_weight, down_bias, tl.cast(layers - 1, tl.int64), eps, c, width, hidden, narrow_stride,
            wide_stride, PRECISION, LENGTH, FIRST, OUTPUTS, CHANNELS,
        )  # fmt: skip
        _latents(
            stream, narrow, out, tile_rows(tile, FIRST, LENGTH), limit, tile * PACKED, latent_weight, latent_bias,
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
    programs = programs_for(tiles, config)
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
        **dict(WIDTH=width_of_a_step(head, dtype), PRECISION=dot_precision(matrix)),
    )
    return out
