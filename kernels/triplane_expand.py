"""`triplane_expand` in Triton: the lattice written once; its gradient read once, by two skinny products.

Forward: a program has a tile of times x columns x channels of one row of the lattice and computes the three
convolutions it needs there and then: D multiply-adds a value for yt, D / times and D / columns for the others.
Projecting the planes first would write and read N x C floats more: a quarter of what the lattice has in bytes at the
full size, and a read of 4 bytes for each 2 written.

Backward: all three gradients are linear in the lattice's gradient G (tokens x C), so nothing wide is summed over axes:
    U = G [W_xy | W_yt | W_xt]            (tokens x 3 D): dplanes are its sums along time, height and width;
    dW = G' [P_xy | P_yt | P_xt | 1 1 1]  (C x (3 D + 3)): each token's three latents, and ones for the biases.
One kernel reads a tile of G for both products, on tensor cores in 16 bits; two small ones add the parts up. Bytes, for
C 384 and D 4 in bf16, of G's: U 6 % for each block of channels, dW's parts 3 % to 13 %, both written and read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.partials import sum_partials
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.native import rows_dense

FORWARD = ConfigTable(
    "triplane_expand_forward",
    {
        ("*", "*", "*"): Config({"TIMES": 8, "COLUMNS": 8, "CHANNELS": 128}),
        ("*", "*", "float32"): Config({"TIMES": 8, "COLUMNS": 4, "CHANNELS": 128}),
        ("interpreter", "*", "*"): Config({"TIMES": 4, "COLUMNS": 8, "CHANNELS": 64}),
        ("interpreter", "*", "float32"): Config({"TIMES": 2, "COLUMNS": 4, "CHANNELS": 128}),
    },
    candidates=(
        Config({"TIMES": 16, "COLUMNS": 4, "CHANNELS": 128}),
        Config({"TIMES": 4, "COLUMNS": 8, "CHANNELS": 128}),
        Config({"TIMES": 8, "COLUMNS": 16, "CHANNELS": 64}),
    ),
)
# PROGRAMS: about how many share the tokens, for each block of channels: each leaves 4 C (3 D + 3) bytes of dW.
# float32 without tf32 has no tensor cores: smaller tiles, whose operands stay in registers.
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
    {("*", "*", "*"): Config({"ROWS": 32}), ("interpreter", "*", "*"): Config({"ROWS": 64})},
    candidates=(Config({"ROWS": 64}), Config({"ROWS": 16}, num_warps=2)),
)


@triton.jit
def _forward(
    planes, weight, bias, out, time, height, width, channels, batch_stride, token_stride,
    DEPTH: tl.constexpr, TIMES: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # weight: (3, D, C) and bias: (3, C) here, float32.
    blocks = tl.cdiv(channels, CHANNELS)
    index = tl.program_id(0)
    c = index % blocks * CHANNELS + tl.arange(0, CHANNELS)
    index = index // blocks
    blocks = tl.cdiv(width, COLUMNS)
    w = index % blocks * COLUMNS + tl.arange(0, COLUMNS)
    index = index // blocks
    h = index % height
    index = index // height
    blocks = tl.cdiv(time, TIMES)
    t = index % blocks * TIMES + tl.arange(0, TIMES)
    batch = (index // blocks).to(tl.int64)
    here_t, here_w, here_c = t < time, w < width, c < channels
    latents = planes + batch * batch_stride
    yt_token = (height * width + t[:, None] * width + w[None, :]).to(tl.int64)
    xt_token = (height * width + time * width + t * height + h).to(tl.int64)
    xy_token = (h * width + w).to(tl.int64)
    base = tl.load(bias + c, mask=here_c, other=0.0)
    base += tl.load(bias + channels + c, mask=here_c, other=0.0)
    base += tl.load(bias + 2 * channels + c, mask=here_c, other=0.0)
    xy = tl.zeros([COLUMNS, CHANNELS], tl.float32) + base[None, :]
    yt = tl.zeros([TIMES, COLUMNS, CHANNELS], tl.float32)
    xt = tl.zeros([TIMES, CHANNELS], tl.float32)
    for d in tl.static_range(DEPTH):
        row = weight + d * channels + c
        plane = DEPTH * channels
        p = tl.load(latents + xy_token * token_stride + d, mask=here_w, other=0.0).to(tl.float32)
        xy += p[:, None] * tl.load(row, mask=here_c, other=0.0)[None, :]
        p = tl.load(
            latents + yt_token * token_stride + d, mask=here_t[:, None] & here_w[None, :], other=0.0
        ).to(tl.float32)  # fmt: skip
        yt += p[:, :, None] * tl.load(row + plane, mask=here_c, other=0.0)[None, None, :]
        p = tl.load(latents + xt_token * token_stride + d, mask=here_t, other=0.0).to(tl.float32)
        xt += p[:, None] * tl.load(row + 2 * plane, mask=here_c, other=0.0)[None, :]
    lattice = yt + xy[None, :, :] + xt[:, None, :]
    token = ((batch * time + t.to(tl.int64)[:, None]) * height + h) * width + w[None, :]
    inside = (here_t[:, None] & here_w[None, :])[:, :, None] & here_c[None, None, :]
    tl.store(out + token[:, :, None] * channels + c[None, None, :], lattice.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _products(
    grad, planes, weight, parts, partials, tokens, tokens_in_all, time, height, width, channels,
    grad_batch_stride, grad_token_stride, planes_batch_stride, planes_token_stride,
    DEPTH: tl.constexpr, SIDES: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    # SIDES: 3 D + 3 columns [plane, d] and three of ones, padded to what a product needs.
    blocks = tl.cdiv(channels, CHANNELS)
    part, share = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    c = part * CHANNELS + tl.arange(0, CHANNELS)
    here_c = c < channels
    side = tl.arange(0, SIDES)
    plane, d = side // DEPTH, side % DEPTH
    w_tile = tl.load(
        weight + (plane[None, :] * channels + c[:, None]) * DEPTH + d[None, :],
        mask=here_c[:, None] & (plane < 3)[None, :],
        other=0.0,
    )
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
        u = tl.dot(g, w_tile, input_precision=PRECISION)
        place = (part.to(tl.int64) * tokens_in_all + index)[:, None] * (3 * DEPTH) + side[None, :]
        tl.store(parts + place, u, mask=here[:, None] & (plane < 3)[None, :])
        t, h, w = token // (height * width), token // width % height, token % width
        xy = h * width + w
        yt = height * width + t * width + w
        xt = height * width + time * width + t * height + h
        source = tl.where(plane[None, :] == 0, xy[:, None], tl.where(plane[None, :] == 1, yt[:, None], xt[:, None]))
        p = tl.load(
            planes + batch[:, None] * planes_batch_stride + source.to(tl.int64) * planes_token_stride + d[None, :],
            mask=here[:, None] & (plane < 3)[None, :],
            other=1.0,  # the columns of ones
        )
        dweight += tl.dot(tl.trans(g), p, input_precision=PRECISION)
    # As it is wanted in the end: weight (3, C, D), then bias (3, C).
    ones = side - 3 * DEPTH
    target = tl.where(
        (ones < 0)[None, :],
        (plane[None, :] * channels + c[:, None]) * DEPTH + d[None, :],
        (3 * DEPTH + ones[None, :]) * channels + c[:, None],
    )
    own = partials + share.to(tl.int64) * (3 * DEPTH + 3) * channels
    tl.store(own + target, dweight, mask=here_c[:, None] & (ones < 3)[None, :])


@triton.jit
def _axis_sums(
    parts, dplanes, batches, time, height, width, blocks, DEPTH: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr
):
    # A program has a block of one plane's tokens, of all batch elements: a token is the sum of `count` lattice tokens.
    tokens = height * width + time * width + time * height
    lattice = time * height * width
    xy_programs = tl.cdiv(batches * height * width, ROWS)
    yt_programs = tl.cdiv(batches * time * width, ROWS)
    index = tl.program_id(0)
    plane = tl.where(index < xy_programs, 0, tl.where(index < xy_programs + yt_programs, 1, 2))
    index -= tl.where(plane == 0, 0, tl.where(plane == 1, xy_programs, xy_programs + yt_programs))
    rows = tl.where(plane == 2, height, tl.where(plane == 1, time, height))
    rows = tl.where(plane == 2, time, rows)
    columns = tl.where(plane == 2, height, width)
    count = tl.where(plane == 0, time, tl.where(plane == 1, height, width))
    step = tl.where(plane == 0, height * width, tl.where(plane == 1, width, 1))
    row_step = tl.where(plane == 0, width, height * width)
    column_step = tl.where(plane == 2, width, 1)
    start = tl.where(plane == 0, 0, tl.where(plane == 1, height * width, (height + time) * width))
    row = index * ROWS + tl.arange(0, ROWS)
    here = row < batches * rows * columns
    batch, place = (row // (rows * columns)).to(tl.int64), row % (rows * columns)
    first = batch * lattice + place // columns * row_step + place % columns * column_step
    d = tl.arange(0, SIDES)
    inside = here[:, None] & (d < DEPTH)[None, :]
    totals = tl.zeros([ROWS, SIDES], tl.float32)
    for i in range(0, count * blocks):
        token = first + i % count * step + (i // count).to(tl.int64) * lattice * batches
        totals += tl.load(parts + token[:, None] * (3 * DEPTH) + plane * DEPTH + d[None, :], mask=inside, other=0.0)
    target = (batch * tokens + start + place)[:, None] * DEPTH + d[None, :]
    tl.store(dplanes + target, totals.to(dplanes.dtype.element_ty), mask=inside)


def _padded(size: int, least: int) -> int:
    return max(least, int(triton.next_power_of_2(size)))


def forward(planes: Tensor, weight: Tensor, bias: Tensor, time: int, height: int, width: int) -> Tensor:
    """planes: (B, N, D), weight: (3, C, D) and bias: (3, C) in packed order -> (B, T H W, C)."""
    planes = rows_dense(planes)
    batch, _, depth = planes.shape
    channels = weight.shape[1]
    # Channels last, so that lanes read neighbours.
    across = torch.empty(3, depth, channels, dtype=torch.float32, device=planes.device).copy_(weight.mT)
    out = torch.empty(batch, time * height * width, channels, dtype=planes.dtype, device=planes.device)
    config = FORWARD(planes.device, "any", planes.dtype)
    tiles = triton.cdiv(time, config.blocks["TIMES"]) * height * triton.cdiv(width, config.blocks["COLUMNS"])
    launch(
        _forward,
        (batch * tiles * triton.cdiv(channels, config.blocks["CHANNELS"]),),
        *(planes, across, bias.float().contiguous(), out),
        *(time, height, width, channels, planes.stride(0), planes.stride(1)),
        config=config,
        DEPTH=depth,
    )
    return out


def backward(
    grad: Tensor, planes: Tensor, weight: Tensor, time: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of planes, weight and bias from grad: (B, T H W, C), which is read once."""
    layout = TriplaneLayout(time, height, width)
    grad, planes, weight = rows_dense(grad.to(planes.dtype)), rows_dense(planes), weight.contiguous()
    (batch, tokens, channels), depth, device = grad.shape, planes.shape[2], grad.device
    config = PRODUCTS(device, "any", grad.dtype)
    blocks = triton.cdiv(channels, config.blocks["CHANNELS"])
    shares = min(triton.cdiv(batch * tokens, config.blocks["ROWS"]), config.blocks["PROGRAMS"])
    parts = torch.empty(blocks, batch * tokens, 3 * depth, dtype=torch.float32, device=device)
    partials = torch.empty(shares, (3 * depth + 3) * channels, dtype=torch.float32, device=device)
    single = grad.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    launch(
        _products,
        (shares * blocks,),
        *(grad, planes, weight, parts, partials),
        *(tokens, batch * tokens, time, height, width, channels),
        *(*grad.stride()[:2], *planes.stride()[:2]),
        config=config,
        DEPTH=depth,
        SIDES=_padded(3 * depth + 3, 16),
        PRECISION="ieee" if single else "tf32",
    )
    dplanes = torch.empty(batch, layout.num_tokens, depth, dtype=planes.dtype, device=device)
    config = AXIS_SUMS(device, "any", grad.dtype)
    programs = sum(triton.cdiv(batch * rows * columns, config.blocks["ROWS"]) for rows, columns in layout.planes)
    launch(
        _axis_sums,
        (programs,),
        *(parts, dplanes, batch, time, height, width, blocks),
        config=config,
        DEPTH=depth,
        SIDES=_padded(depth, 1),
    )
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    dbias = torch.empty(3, channels, dtype=weight.dtype, device=device)
    sum_partials(partials, dweight, dbias)
    return dplanes, dweight, dbias
