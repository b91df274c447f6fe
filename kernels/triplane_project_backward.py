"""`triplane_project` in Triton, backward: one launch takes tiles forth and back, one multiplies for weights.

The first launch has the tiles of the forward pass. A program takes a tile through all layers again, then its gradient
back through them. It writes dx, and what the products for the weights' gradients need: for each layer both norms'
results before weight and bias (`hat1`, `hat2`), what was attended to, GELU of the hidden layer, and the gradients of
queries, keys and values, of the hidden layer, and of both residual sums. Queries, keys, values and the hidden layer are
computed once more on the way back. Sums over rows (of the norms' parameters and the positions) are one row of
`vectors` for each program, which adds its tiles in their order.

Why weights' gradients are a launch of their own (`triplane_project_weights.py`): they sum over all rows, so a program
that kept its own sums would need 2.75 MB a layer at full size in float32. A multiprocessor holds 0.25 MB in registers
and 0.22 MB in shared memory. In memory they would be 132 x 11 MB, 1.45 GB in all.

At full size in bf16 these operands take 393 MB for one clip, and are nearly all that is moved (writing and reading
them: 786 of 889 MB, computed). Clips beyond MOST_SCRATCH are done in pieces, one after the other in the same memory,
and each piece adds to the weights' gradients of those before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.backends.projection_layers import NAMES
from pvdm_fast.backends.rows import rows_dense
from pvdm_fast.kernels.attention_common import padded
from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch, programs_for
from pvdm_fast.kernels.math import dot_precision
from pvdm_fast.kernels.partials import sum_partials
from pvdm_fast.kernels.triplane_project_backward_steps import (
    again,
    attend_back,
    feed_forward_back,
    latents_back,
    norm_back,
    rest_of_layer_kept,
    scatter,
    spread,
    through,
)
from pvdm_fast.kernels.triplane_project_steps import attend, gather, norm, tile_rows, widen
from pvdm_fast.kernels.triplane_project_weights import weight_gradients
from pvdm_fast.kernels.triplane_slice import Gather, gather_of

LONGEST = 64  # elements of a sequence, the appended token among them: a block of 64 rows holds one
MOST_LATENTS = 32  # in a step of the last product
MOST_SCRATCH = 512 << 20  # bytes of a piece's operands
ZEROED = tl.constexpr(1024)  # values at a time


def config_of(rows: int, channels: int, width: int, programs: int, stages: int, outputs: int = 64) -> Config:
    """As in the forward pass. WIDTH: channels of a head in a step of attention, the fewer the fewer registers."""
    blocks = {"ROWS": rows, "OUTPUTS": outputs, "CHANNELS": channels, "WIDTH": width, "PROGRAMS": programs}
    return Config(blocks, 8, stages)


BACKWARD = ConfigTable(
    "triplane_project_backward",
    {
        ("*", "*", "*"): config_of(128, 32, 32, 170, 2),
        ("*", "*", "float32"): config_of(64, 32, 16, 132, 1),
        ("sm80", "*", "float32"): config_of(64, 32, 16, 108, 1, outputs=32),
        ("interpreter", "*", "*"): Config({"ROWS": 64, "OUTPUTS": 128, "CHANNELS": 128, "WIDTH": 64, "PROGRAMS": 3}),
        **{
            (family, "*", dtype): config_of(128, channels, width, programs, stages)
            for family, channels, width, programs, stages in (
                ("sm80", 32, 32, 108, 2),
                ("sm90", 64, 64, 132, 3),
                ("sm100", 32, 64, 148, 2),
            )
            for dtype in ("bfloat16", "float16")
        },
    },
    candidates=tuple(
        config_of(rows, channels, width, programs, stages)
        for rows, programs in ((64, 264), (128, 132))
        for channels, stages in ((32, 2), (32, 3), (64, 3))
        for width in (16, 32, 64)
    ),
)


@triton.jit
def triplane_project_backward(
    grad, x, token, positions, norm1_weight, norm1_bias, qkv_weight, out_weight, out_bias, norm2_weight, norm2_bias,
    up_weight, up_bias, down_weight, down_bias, latent_weight, latent_bias, dx, vectors,
    hat1, rstd1, dqkv, attended, hat2, rstd2, gelu, dhidden, flowing, dtotal, kept, dlatent,
    stream, dnormed, narrow, wide,
    before, sequences, sites, inner, outer_step, step, batch_stride, token_stride, grad_batch, grad_site, tokens, eps,
    scale, layers, c, heads, head_width, hidden, latents, latents_stride, narrow_stride, wide_stride,
    LENGTH: tl.constexpr, FIRST: tl.constexpr, ELEMENTS: tl.constexpr, LATENTS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """grad: (B, sites, latents) by strides. Of the sequences from `before` on, writes dx and the operands.

    Operands have a row for each element of a sequence and each layer. In the last layer, from the attention's result
    on, they have a row for each sequence (but `attended`). vectors: (programs, 4 layers c + LENGTH c), the sums of
    norm1_weight, norm1_bias, norm2_weight, norm2_bias and positions. stream, dnormed, narrow, wide: (programs, ROWS,
    ...). Grid: at most PROGRAMS.
    """
    width = heads * head_width
    PACKED: tl.constexpr = ROWS // LENGTH
    program = tl.program_id(0).to(tl.int64)
    stream += program * ROWS * c
    dnormed += program * ROWS * c
    narrow += program * ROWS * narrow_stride
    wide += program * ROWS * wide_stride
    vectors += program * (4 * layers + LENGTH) * c
    for start in tl.range(0, (4 * layers + LENGTH) * c, ZEROED, num_stages=1):
        value = start + tl.arange(0, ZEROED)
        tl.store(vectors + value, tl.zeros((ZEROED,), tl.float32), mask=value < (4 * layers + LENGTH) * c)
    tl.debug_barrier()
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(sequences, PACKED), tl.num_programs(0), num_stages=1, disable_licm=True
    ):
        count = tl.minimum(sequences - tile * PACKED, PACKED)
        limit = count * LENGTH  # rows behind it don't exist
        rows = tile_rows(tile, ROWS, 1)
        sequence = before + tile * PACKED + rows // LENGTH
        site = sequence % sites
        source = (sequence // sites).to(tl.int64) * batch_stride
        source += (site // inner * outer_step + site % inner + rows % LENGTH * step).to(tl.int64) * token_stride
        gather(x, token, positions, stream, rows, limit, source, c, LENGTH, CHANNELS)
        # Made anew where they are used, as far as they go: what is held through a tile takes registers from every step.
        first = tl.cast(tile, tl.int64) * PACKED
        for number in tl.range(0, layers, num_stages=1, disable_licm=True):
            layer = tl.cast(number, tl.int64)
            at = (layer * sequences + first) * LENGTH
            own = tile_rows(number, ROWS, 1)
            norm(
                stream, narrow, own, own, limit, norm1_weight + layer * c, norm1_bias + layer * c, hat1 + at * c,
                rstd1 + at, eps, c, narrow_stride, ROWS, CHANNELS,
            )  # fmt: skip
            widen(
                narrow, wide, limit, qkv_weight + layer * c * (3 * width), None, c, 3 * width, narrow_stride,
                wide_stride, PRECISION, 1, ROWS, OUTPUTS, CHANNELS,
            )  # fmt: skip
            attend(
                wide, attended + at * width, limit, scale, heads, head_width, width, wide_stride,
                PRECISION, LENGTH, ROWS, BLOCK, WIDTH,
            )  # fmt: skip
            if number < layers - 1:
                rest_of_layer_kept(
                    stream, narrow, attended + at * width, hat2 + at * c, rstd2 + at, gelu + at * hidden, number, limit,
                    limit, out_weight + layer * c * width, out_bias + layer * c, norm2_weight + layer * c,
                    norm2_bias + layer * c, up_weight + layer * c * hidden, up_bias + layer * hidden,
                    down_weight + layer * c * hidden, down_bias + layer * c, eps, c, width, hidden, narrow_stride,
                    PRECISION, 1, ROWS, OUTPUTS, CHANNELS,
                )  # fmt: skip
        last = tl.cast(layers - 1 + tl.minimum(tile, 0), tl.int64)
        of_last = last * sequences * LENGTH + first
        rest_of_layer_kept(
            stream, narrow, attended + (last * sequences + first) * LENGTH * width, hat2 + of_last * c, rstd2 + of_last,
            gelu + of_last * hidden, tile, limit, count, out_weight + last * c * width, out_bias + last * c,
            norm2_weight + last * c, norm2_bias + last * c, up_weight + last * c * hidden, up_bias + last * hidden,
            down_weight + last * c * hidden, down_bias + last * c, eps, c, width, hidden, narrow_stride,
            PRECISION, LENGTH, FIRST, OUTPUTS, CHANNELS,
        )  # fmt: skip
        latents_back(
            stream, kept + first * c, dlatent + first * latents_stride, flowing + of_last * c, grad, tile,
            before + tile * PACKED, sites, count, grad_batch, grad_site, latent_weight, latent_bias, c, latents,
            latents_stride, PRECISION, LENGTH, FIRST, LATENTS, OUTPUTS, CHANNELS,
        )  # fmt: skip
        feed_forward_back(
            stream, narrow, dnormed, hat2 + of_last * c, rstd2 + of_last, flowing + of_last * c,
            dhidden + of_last * hidden, dtotal + of_last * c, tile, count, norm2_weight + last * c,
            norm2_bias + last * c, up_weight + last * c * hidden, up_bias + last * hidden,
            down_weight + last * c * hidden, vectors + (2 * layers + last) * c, vectors + (3 * layers + last) * c, c,
            hidden, narrow_stride, PRECISION, FIRST, OUTPUTS, CHANNELS,
        )  # fmt: skip
        spread(stream, limit, c, LENGTH, ROWS, CHANNELS)
        for done in tl.range(0, layers, num_stages=1, disable_licm=True):
            layer = last - done
            at = (layer * sequences + first) * LENGTH
            if done > 0:
                feed_forward_back(
                    stream, narrow, dnormed, hat2 + at * c, rstd2 + at, flowing + at * c, dhidden + at * hidden,
                    dtotal + at * c, done, limit, norm2_weight + layer * c, norm2_bias + layer * c,
                    up_weight + layer * c * hidden, up_bias + layer * hidden, down_weight + layer * c * hidden,
                    vectors + (2 * layers + layer) * c, vectors + (3 * layers + layer) * c, c,
                    hidden, narrow_stride, PRECISION, ROWS, OUTPUTS, CHANNELS,
                )  # fmt: skip
            again(
                hat1 + at * c, narrow, done, limit, norm1_weight + layer * c, norm1_bias + layer * c, c, narrow_stride,
                ROWS, CHANNELS,
            )  # fmt: skip
            widen(
                narrow, wide, limit, qkv_weight + layer * c * (3 * width), None, c, 3 * width, narrow_stride,
                wide_stride, PRECISION, 1, ROWS, OUTPUTS, CHANNELS,
            )  # fmt: skip
            of_total = tl.where(done > 0, at, layer * sequences * LENGTH + first)
            through(
                dtotal + of_total * c, narrow, None, tl.where(done > 0, limit, count), out_weight + layer * c * width,
                c, width, c, narrow_stride, PRECISION, ROWS, OUTPUTS, CHANNELS,
            )  # fmt: skip
            attend_back(
                wide, narrow, dqkv + at * (3 * width), limit, scale, tl.where(done > 0, 0, 1), heads, head_width,
                narrow_stride, wide_stride, PRECISION, LENGTH, ROWS, BLOCK, WIDTH,
            )  # fmt: skip
            through(
                dqkv + at * (3 * width), dnormed, None, limit, qkv_weight + layer * c * (3 * width), 3 * width, c,
                3 * width, c, PRECISION, ROWS, OUTPUTS, CHANNELS,
            )  # fmt: skip
            below = (tl.maximum(layer - 1, 0) * sequences + first) * LENGTH
            norm_back(
                dnormed, hat1 + at * c, rstd1 + at, stream, flowing + below * c, layer > 0, done, limit,
                norm1_weight + layer * c, vectors + layer * c, vectors + (layers + layer) * c, c, ROWS, CHANNELS,
            )  # fmt: skip
        scatter(
            stream, dx, vectors + 4 * layers * c, before + tile * PACKED, limit, sites, inner, outer_step, step, tokens,
            c, narrow.dtype.element_ty, PRECISION, LENGTH, ELEMENTS, ROWS, CHANNELS,
        )  # fmt: skip


class Operands(NamedTuple):
    """What the first launch hands to the products for the weights' gradients, and 1 / std of the norms.

    Rows: layers x rows of all elements (hat1, rstd1, dqkv, attended), the same but one for each sequence in the last
    layer (hat2 to dtotal), or one for each sequence (kept, dlatent).
    """

    hat1: Tensor
    rstd1: Tensor
    dqkv: Tensor
    attended: Tensor
    hat2: Tensor
    rstd2: Tensor
    gelu: Tensor
    dhidden: Tensor
    flowing: Tensor
    dtotal: Tensor
    kept: Tensor
    dlatent: Tensor


class Sizes(NamedTuple):
    """Of a projection."""

    layers: int
    channels: int
    inner: int
    hidden: int
    latents: int
    length: int  # elements of a sequence, the appended token among them

    @property
    def latents_stride(self) -> int:
        """Between rows of the latents' gradient: 16-byte loads need a multiple of 16."""
        return triton.cdiv(self.latents, 16) * 16

    def rows(self, sequences: int) -> tuple[int, int]:
        """Of operands before and from the attention's result on."""
        of_layer = sequences * self.length
        return self.layers * of_layer, (self.layers - 1) * of_layer + sequences

    def scratch(self, sequences: int, itemsize: int) -> int:
        """Bytes of the operands."""
        before, behind = self.rows(sequences)
        values = before * (self.channels + 4 * self.inner) + behind * (3 * self.channels + 2 * self.hidden)
        return (values + sequences * (self.channels + self.latents_stride)) * itemsize + 4 * (before + behind)

    def operands(self, sequences: int, dtype: torch.dtype, device: torch.device) -> Operands:
        before, behind = self.rows(sequences)
        c, hidden, inner = self.channels, self.hidden, self.inner

        def of(rows: int, width: int) -> Tensor:
            return torch.empty(rows, width, dtype=dtype, device=device)

        return Operands(
            hat1=of(before, c),
            rstd1=torch.empty(before, dtype=torch.float32, device=device),
            dqkv=of(before, 3 * inner),
            attended=of(before, inner),
            hat2=of(behind, c),
            rstd2=torch.empty(behind, dtype=torch.float32, device=device),
            gelu=of(behind, hidden),
            dhidden=of(behind, hidden),
            flowing=of(behind, c),
            dtotal=of(behind, c),
            kept=of(sequences, c),
            dlatent=of(sequences, self.latents_stride),
        )


def pieces(sizes: Sizes, sequences: int, packed: int, itemsize: int) -> list[tuple[int, int]]:
    """(first, number) of the sequences done at a time: whole tiles of `packed`, whose operands fit MOST_SCRATCH."""
    most = max(1, MOST_SCRATCH // (sizes.scratch(packed, itemsize)))
    tiles = triton.cdiv(sequences, packed)
    each = triton.cdiv(tiles, triton.cdiv(tiles, most)) * packed
    return [(first, min(each, sequences - first)) for first in range(0, sequences, each)]


def _shared_dtype(tensors: list[Tensor]) -> torch.dtype:
    """The dtype of all of them, or float32."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _of_vectors(vectors: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of norms, positions and token from every program's sums."""
    names = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "positions")
    like = [named[name] for name in names]
    dtype = _shared_dtype([*like, named["token"]])
    total = torch.empty(vectors.shape[1], dtype=dtype, device=vectors.device)
    token = torch.empty(named["token"].shape, dtype=dtype, device=vectors.device)
    sum_partials(vectors, total, token)
    parts = total.split([tensor.numel() for tensor in like])
    found = {name: part.view(tensor.shape) for name, part, tensor in zip(names, parts, like, strict=True)}
    return {**found, "token": token}


def backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of x and of all tensors of NAMES from grad: (B, sites, D)."""
    originals = (x, *arguments[: len(NAMES)])
    named = {name: tensor.contiguous() for name, tensor in zip(NAMES, arguments, strict=False)}
    plane, time, height, width, heads, eps = arguments[len(NAMES) :]
    grad, x, matrix = rows_dense(grad), rows_dense(x), named["qkv_weight"]
    (layers, hidden, channels), inner = named["up_weight"].shape, named["out_weight"].shape[2]
    where = gather_of(plane, time, height, width)
    sizes = Sizes(layers, channels, inner, hidden, len(named["latent_bias"]), where.length + 1)
    sequences = x.shape[0] * (x.shape[1] // where.length)
    config = BACKWARD(x.device, "any", matrix.dtype)
    packed = config.blocks["ROWS"] // sizes.length
    parts = pieces(sizes, sequences, packed, matrix.dtype.itemsize)
    operands = sizes.operands(parts[0][1], matrix.dtype, x.device)
    programs = [programs_for(triton.cdiv(count, packed), config) for _, count in parts]
    memory = _memory(max(programs), config.blocks["ROWS"], sizes, matrix)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    vectors = torch.empty(
        sum(programs), (4 * layers + sizes.length) * channels, dtype=torch.float32, device=x.device
    )  # fmt: skip
    found: dict[str, Tensor] = {}
    for part, rows_of_vectors in zip(parts, vectors.split(programs), strict=True):
        tensors = (grad, x, *named.values(), dx, rows_of_vectors, *operands, *memory)
        _launch(tensors, part, sizes, where, heads, eps, config)
        found = weight_gradients(operands, named, found, part[1], sizes, single=len(parts) == 1)
    found |= _of_vectors(vectors, named)
    gradients = (dx, *(found[name] for name in NAMES))
    return tuple(g if g.dtype == t.dtype else g.to(t.dtype) for g, t in zip(gradients, originals, strict=True))


def _memory(programs: int, rows: int, sizes: Sizes, matrix: Tensor) -> list[Tensor]:
    """Memory of each program's own: the stream, a norm's gradient, a norm's result or a head's, queries to values."""
    c, narrow, wide = sizes.channels, max(sizes.channels, sizes.inner), 3 * sizes.inner
    kinds = ((c, torch.float32), (c, torch.float32), (narrow, matrix.dtype), (wide, matrix.dtype))
    return [torch.empty(programs, rows, width, dtype=dtype, device=matrix.device) for width, dtype in kinds]


def _launch(
    tensors: tuple[Tensor, ...],
    part: tuple[int, int],
    sizes: Sizes,
    where: Gather,
    heads: int,
    eps: float,
    config: Config,
) -> None:
    """The first launch, for the sequences of `part`. tensors: as the kernel takes them."""
    grad, x, rows_of_vectors = tensors[0], tensors[1], tensors[len(NAMES) + 3]
    head, packed = sizes.inner // heads, config.blocks["ROWS"] // sizes.length
    launch(
        triplane_project_backward,
        (len(rows_of_vectors),),
        *tensors,
        *(*part, x.shape[1] // where.length, where.inner, where.outer_step, where.step, *x.stride()[:2]),
        *(*grad.stride()[:2], x.shape[1], eps, head**-0.5, sizes.layers, sizes.channels, heads, head, sizes.hidden),
        *(sizes.latents, sizes.latents_stride, max(sizes.channels, sizes.inner), 3 * sizes.inner),
        config=config,
        **dict(LENGTH=sizes.length, FIRST=padded(packed), ELEMENTS=padded(sizes.length)),
        **dict(LATENTS=min(MOST_LATENTS, padded(sizes.latents)), PRECISION=dot_precision(tensors[-1])),
        BLOCK=LONGEST,
    )
