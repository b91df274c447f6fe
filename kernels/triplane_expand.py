"""`triplane_expand` in Triton: both directions as skinny products. The lattice is written once, its gradient read once.

The latents of a lattice token are P, a row of 3 D values: the tokens of xy, yt and xt that it lies over. Then

    lattice = P W' + sum of biases, W: (C, 3 D), the three weights side by side
    U = G W, (tokens, 3 D), G: the lattice's gradient. dplanes are sums of U along time, height and width
    dW = G' [P | 1 1 1], (C, 3 D + 3): the ones give the biases' gradients

At full size 3 D is 12, one step of a tensor core, and P is gathered from the caches where it is needed. Nothing as wide
as C is summed over an axis, or stored between kernels.

Bytes for C channels of s bytes. Forward writes C s per lattice token. Backward reads C s. It also writes and reads
once: U, 12 D bytes for each block of channels, and (12 D + 12) C of dW for each of at most PROGRAMS programs. At full
size in bf16 and batch 1 these are 19 % and 17 % of G, each way. The second doesn't grow with the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.backends.rows import rows_dense
from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.math import dot_precision
from pvdm_fast.kernels.partials import sum_partials
from pvdm_fast.layout import TriplaneLayout

DEEPEST = 20  # channels of a latent: with the three ones, P has 63 columns
FORWARD = ConfigTable(
    "triplane_expand_forward",
    {
        ("*", "*", "*"): Config({"ROWS": 64, "CHANNELS": 128}),
        ("*", "*", "float32"): Config({"ROWS": 32, "CHANNELS": 64}),
        ("interpreter", "*", "*"): Config({"ROWS": 64, "CHANNELS": 128}),
    },
    candidates=(
        Config({"ROWS": 128, "CHANNELS": 128}, num_warps=8),
        Config({"ROWS": 128, "CHANNELS": 64}),
        Config({"ROWS": 64, "CHANNELS": 64}),
    ),
)
# PROGRAMS: about how many programs share the tokens, for each block of channels. Each writes 4 C (3 D + 3) bytes of dW.
# float32 without TF32 has no tensor cores: smaller tiles, whose operands stay in registers.
PRODUCTS = ConfigTable(
    "triplane_expand_products",
    {
        ("*", "*", "*"): Config({"ROWS": 64, "CHANNELS": 128, "PROGRAMS": 88}, num_stages=3),
        ("*", "*", "float32"): Config({"ROWS": 32, "CHANNELS": 32, "PROGRAMS": 66}),
        ("interpreter", "*", "*"): Config({"ROWS": 32, "CHANNELS": 64, "PROGRAMS": 3}),
        ("interpreter", "*", "float32"): Config({"ROWS": 64, "CHANNELS": 32, "PROGRAMS": 2}),
    },
    candidates=(
        Config({"ROWS": 32, "CHANNELS": 128, "PROGRAMS": 176}, num_stages=4),
        Config({"ROWS": 128, "CHANNELS": 128, "PROGRAMS": 44}, num_warps=8),
    ),
)
AXIS_SUMS = ConfigTable(
    "triplane_expand_axis_sums",
    {
        ("*", "*", "*"): Config({"TOKENS": 8, "TERMS": 32}),
        ("interpreter", "*", "*"): Config({"TOKENS": 32, "TERMS": 16}),
    },
    candidates=(Config({"TOKENS": 16, "TERMS": 32}), Config({"TOKENS": 4, "TERMS": 32}, num_warps=2)),
)


def refusal(*inputs: Any) -> str | None:
    """Why the kernels don't take these arguments (of either direction), or None. The weight is the last 3-D tensor."""
    depth = [value for value in inputs if isinstance(value, Tensor) and value.dim() == 3][-1].shape[2]
    if depth > DEEPEST:
        return f"it takes latents of at most {DEEPEST} channels, not {depth}: use another backend."
    return None


@triton.jit
def _gather(planes, batch, token, side, batch_stride, token_stride, here, time, height, width, DEPTH: tl.constexpr):
    """P of some lattice tokens: (rows, sides), in the dtype of planes. Ones right of the 3 D latents, and where not
    `here`."""
    plane, d = side // DEPTH, side % DEPTH
    t, h, w = token // (height * width), token // width % height, token % width
    xy = h * width + w
    yt = height * width + t * width + w
    xt = height * width + time * width + t * height + h
    source = tl.where(plane[None, :] == 0, xy[:, None], tl.where(plane[None, :] == 1, yt[:, None], xt[:, None]))
    offset = (batch * batch_stride)[:, None] + source.to(tl.int64) * token_stride + d[None, :]
    return tl.load(planes + offset, mask=here[:, None] & (plane < 3)[None, :], other=1.0)


@triton.jit
def _weights(weight, c, side, channels, DEPTH: tl.constexpr):
    """W of some channels: (channels, sides). Zeros right of the 3 D columns."""
    plane, d = side // DEPTH, side % DEPTH
    offset = (plane[None, :] * channels + c[:, None]) * DEPTH + d[None, :]
    return tl.load(weight + offset, mask=(c < channels)[:, None] & (plane < 3)[None, :], other=0.0)


@triton.jit
def triplane_expand_forward(
    planes, weight, bias, out, tokens, tokens_in_all, time, height, width, channels, batch_stride, token_stride,
    DEPTH: tl.constexpr, SIDES: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    index = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    here, here_c = index < tokens_in_all, c < channels
    batch, side = (index // tokens).to(tl.int64), tl.arange(0, SIDES)
    latents = _gather(
        planes, batch, index % tokens, side, batch_stride, token_stride, here, time, height, width, DEPTH
    )  # fmt: skip
    lattice = tl.dot(latents, tl.trans(_weights(weight, c, side, channels, DEPTH)), input_precision=PRECISION)
    base = tl.load(bias + c, mask=here_c, other=0.0).to(tl.float32)
    base += tl.load(bias + channels + c, mask=here_c, other=0.0).to(tl.float32)
    base += tl.load(bias + 2 * channels + c, mask=here_c, other=0.0).to(tl.float32)
    lattice += base[None, :]
    target = out + index.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(target, lattice.to(out.dtype.element_ty), mask=here[:, None] & here_c[None, :])


@triton.jit
def triplane_expand_backward_products(
    grad, planes, weight, parts, partials, tokens, tokens_in_all, time, height, width, channels,
    grad_batch_stride, grad_token_stride, planes_batch_stride, planes_token_stride,
    DEPTH: tl.constexpr, SIDES: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, CHANNELS)
    part, share = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    c = part * CHANNELS + tl.arange(0, CHANNELS)
    here_c = c < channels
    side = tl.arange(0, SIDES)
    weights = _weights(weight, c, side, channels, DEPTH)
    dweight = tl.zeros([CHANNELS, SIDES], tl.float32)
    for tile in range(share, tl.cdiv(tokens_in_all, ROWS), PROGRAMS):
        index = tile * ROWS + tl.arange(0, ROWS)
        here = index < tokens_in_all
        batch, token = (index // tokens).to(tl.int64), index % tokens
        g = tl.load(
            grad + (batch * grad_batch_stride + token.to(tl.int64) * grad_token_stride)[:, None] + c[None, :],
            mask=here[:, None] & here_c[None, :],
            other=0.0,
        )
        u = tl.dot(g, weights, input_precision=PRECISION)
        place = (index + part.to(tl.int64) * tokens_in_all)[:, None] * (3 * DEPTH) + side[None, :]
        tl.store(parts + place, u, mask=here[:, None] & (side < 3 * DEPTH)[None, :])
        latents = _gather(
            planes, batch, token, side, planes_batch_stride, planes_token_stride, here, time, height, width, DEPTH
        )  # fmt: skip
        dweight += tl.dot(tl.trans(g), latents, input_precision=PRECISION)
    # In the output's order: weight (3, C, D), then bias (3, C).
    plane, d, ones = side // DEPTH, side % DEPTH, side - 3 * DEPTH
    target = tl.where(
        (ones < 0)[None, :],
        (plane[None, :] * channels + c[:, None]) * DEPTH + d[None, :],
        (3 * DEPTH + ones[None, :]) * channels + c[:, None],
    )
    own = partials + share.to(tl.int64) * (3 * DEPTH + 3) * channels
    tl.store(own + target, dweight, mask=here_c[:, None] & (ones < 3)[None, :])


@triton.jit
def triplane_expand_backward_dplanes(
    parts, dplanes, batches, time, height, width, blocks,
    DEPTH: tl.constexpr, SIDES: tl.constexpr, TOKENS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    # A program takes a block of one plane's tokens, counted through all batch elements. Each is the sum of `count`
    # lattice tokens, `step` apart, in each block of channels.
    area = height * width
    xy_programs = tl.cdiv(batches * area, TOKENS)
    yt_programs = tl.cdiv(batches * time * width, TOKENS)
    index = tl.program_id(0)
    if index < xy_programs:
        plane, start, rows, columns, count = 0, 0, height, width, time
        step, row_step, column_step = area, width, 1
    elif index < xy_programs + yt_programs:
        index -= xy_programs
        plane, start, rows, columns, count = 1, area, time, width, height
        step, row_step, column_step = width, area, 1
    else:
        index -= xy_programs + yt_programs
        plane, start, rows, columns, count = 2, area + time * width, time, height, width
        step, row_step, column_step = 1, area, width
    token = index * TOKENS + tl.arange(0, TOKENS)
    here = token < batches * rows * columns
    batch, place = (token // (rows * columns)).to(tl.int64), token % (rows * columns)
    first = batch * time * area + place // columns * row_step + place % columns * column_step
    d = tl.arange(0, SIDES)
    totals = tl.zeros([TOKENS, TERMS, SIDES], tl.float32)
    for begin in range(0, count * blocks, TERMS):
        term = begin + tl.arange(0, TERMS)
        offset = (term // count).to(tl.int64) * batches * time * area + term % count * step
        source = (first[:, None] + offset[None, :])[:, :, None] * (3 * DEPTH) + plane * DEPTH + d[None, None, :]
        inside = here[:, None, None] & (term < count * blocks)[None, :, None] & (d < DEPTH)[None, None, :]
        totals += tl.load(parts + source, mask=inside, other=0.0)
    tokens = area + time * (height + width)
    target = (batch * tokens + start + place)[:, None] * DEPTH + d[None, :]
    result = tl.sum(totals, 1).to(dplanes.dtype.element_ty)
    tl.store(dplanes + target, result, mask=here[:, None] & (d < DEPTH)[None, :])


def _sides(depth: int) -> int:
    """Columns of P and three of ones, padded to what a product needs."""
    return max(16, int(triton.next_power_of_2(3 * depth + 3)))


def forward(planes: Tensor, weight: Tensor, bias: Tensor, time: int, height: int, width: int) -> Tensor:
    """planes: (B, N, D), weight: (3, C, D) and bias: (3, C) in packed order -> (B, T H W, C)."""
    planes, weight, bias = rows_dense(planes), weight.contiguous(), bias.contiguous()
    batch, _, depth = planes.shape
    tokens, channels = time * height * width, weight.shape[1]
    out = torch.empty(batch, tokens, channels, dtype=planes.dtype, device=planes.device)
    config = FORWARD(planes.device, "any", planes.dtype)
    blocks = triton.cdiv(channels, config.blocks["CHANNELS"])
    launch(
        triplane_expand_forward,
        (triton.cdiv(batch * tokens, config.blocks["ROWS"]) * blocks,),
        *(planes, weight, bias, out),
        *(tokens, batch * tokens, time, height, width, channels, planes.stride(0), planes.stride(1)),
        config=config,
        DEPTH=depth,
        SIDES=_sides(depth),
        PRECISION=dot_precision(planes),
    )
    return out


def _products_of(
    grad: Tensor, planes: Tensor, weight: Tensor, sizes: tuple[int, int, int], config: Config
) -> tuple[Tensor, Tensor]:
    """U (blocks of channels, B T H W, 3 D), and each program's dW (programs, (3 D + 3) C), both float32."""
    (batch, tokens, channels), depth = grad.shape, planes.shape[2]
    blocks = triton.cdiv(channels, config.blocks["CHANNELS"])
    shares = min(triton.cdiv(batch * tokens, config.blocks["ROWS"]), config.blocks["PROGRAMS"])
    parts = torch.empty(blocks, batch * tokens, 3 * depth, dtype=torch.float32, device=grad.device)
    partials = torch.empty(shares, (3 * depth + 3) * channels, dtype=torch.float32, device=grad.device)
    launch(
        triplane_expand_backward_products,
        (shares * blocks,),
        *(grad, planes, weight, parts, partials),
        *(tokens, batch * tokens, *sizes, channels),
        *(*grad.stride()[:2], *planes.stride()[:2]),
        config=config,
        DEPTH=depth,
        SIDES=_sides(depth),
        PRECISION=dot_precision(planes),
    )
    return parts, partials


def backward(
    grad: Tensor, planes: Tensor, weight: Tensor, time: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of planes, weight and bias from grad: (B, T H W, C), which is read once."""
    layout = TriplaneLayout(time, height, width)
    grad, planes, weight = rows_dense(grad.to(planes.dtype)), rows_dense(planes), weight.contiguous()
    (batch, _, depth), device = planes.shape, grad.device
    parts, partials = _products_of(
        grad, planes, weight, (time, height, width), PRODUCTS(device, "any", grad.dtype)
    )  # fmt: skip
    dplanes = torch.empty(batch, layout.num_tokens, depth, dtype=planes.dtype, device=device)
    config = AXIS_SUMS(device, "any", grad.dtype)
    launch(
        triplane_expand_backward_dplanes,
        (sum(triton.cdiv(batch * rows * columns, config.blocks["TOKENS"]) for rows, columns in layout.planes),),
        *(parts, dplanes, batch, time, height, width, len(parts)),
        config=config,
        DEPTH=depth,
        SIDES=int(triton.next_power_of_2(depth)),
    )
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    dbias = torch.empty(weight.shape[:2], dtype=weight.dtype, device=device)
    sum_partials(partials, dweight, dbias)
    return dplanes, dweight, dbias
