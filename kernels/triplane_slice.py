"""`triplane_slice` in Triton: one pass gathers the sequences. The gradient is read once.

A row is C values of s bytes. Forward reads each lattice row once and writes each sequence row once. Backward reads each
sequence row once and writes each lattice row once. It also writes and reads once the partial sums of the positions'
gradient: 4 C bytes for each of about PROGRAMS programs. Positions come from the caches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.backends.rows import rows_dense
from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.partials import sum_partials

# 64 channels divide the widths in use (384, 192, 64) and are a cache line in 16 bits.
FORWARD = ConfigTable(
    "triplane_slice_forward",
    {
        ("*", "*", "*"): Config({"ROWS": 32, "COLUMNS": 64}),
        ("interpreter", "*", "*"): Config({"ROWS": 32, "COLUMNS": 128}),
    },
    candidates=(Config({"ROWS": 16, "COLUMNS": 128}), Config({"ROWS": 64, "COLUMNS": 64}, num_warps=8)),
)
# PROGRAMS: about how many there are for each block of channels. Each sequence position gets its share of them.
BACKWARD = ConfigTable(
    "triplane_slice_backward",
    {
        ("*", "*", "*"): Config({"SITES": 16, "COLUMNS": 64, "PROGRAMS": 264}, num_warps=2),
        ("interpreter", "*", "*"): Config({"SITES": 8, "COLUMNS": 128, "PROGRAMS": 12}),
    },
    candidates=(
        Config({"SITES": 32, "COLUMNS": 64, "PROGRAMS": 264}, num_warps=4),
        Config({"SITES": 16, "COLUMNS": 64, "PROGRAMS": 528}, num_warps=2),
    ),
)


@dataclass(frozen=True)
class Gather:
    """Element l of the sequence at site p is lattice token p // inner * outer_step + p % inner + l * step."""

    length: int
    inner: int
    outer_step: int
    step: int


def gather_of(plane: str, time: int, height: int, width: int) -> Gather:
    if plane == "xy":
        return Gather(time, height * width, 0, height * width)
    if plane == "yt":
        return Gather(height, width, height * width, width)
    return Gather(width, 1, width, 1)


@triton.jit
def triplane_slice_forward(
    x, token, positions, out, rows, length, channels, inner, outer_step, step, batch_stride, token_stride,
    positions_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # rows = sites * (length + 1) of one batch element. A program takes a block of rows and a block of channels.
    across = tl.cdiv(channels, COLUMNS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    block = tl.program_id(0) // across
    down = tl.cdiv(rows, ROWS)
    batch = (block // down).to(tl.int64)
    row = block % down * ROWS + tl.arange(0, ROWS)
    site, element = row // (length + 1), row % (length + 1)
    source = site // inner * outer_step + site % inner + element * step
    here = (column < channels)[None, :]
    inside = (row < rows)[:, None] & here
    offset = batch * batch_stride + source.to(tl.int64)[:, None] * token_stride + column[None, :]
    value = tl.load(x + offset, mask=inside & (element < length)[:, None], other=0.0).to(tl.float32)
    value += tl.load(token + column[None, :], mask=here & (element == length)[:, None], other=0.0).to(tl.float32)
    value += tl.load(
        positions + element[:, None] * positions_stride + column[None, :], mask=inside, other=0.0
    ).to(tl.float32)  # fmt: skip
    target = (batch * rows + row.to(tl.int64)[:, None]) * channels + column[None, :]
    tl.store(out + target, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def triplane_slice_backward(
    grad, dx, partials, sites_in_all, sites, length, channels, inner, outer_step, step, batch_stride, site_stride,
    row_stride, SITES: tl.constexpr, COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    # A program takes one position of the sequences, a block of channels, and its share of the blocks of sites (of all
    # batch elements). Channels, then positions, are fastest in the index: neighbouring programs read neighbouring
    # memory.
    across = tl.cdiv(channels, COLUMNS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    block = tl.program_id(0) // across
    element, share = block % (length + 1), block // (length + 1)
    here = (column < channels)[None, :]
    kept = tl.where(element < length, sites_in_all, 0)  # the gradient of the appended token belongs to no lattice token
    totals = tl.zeros([SITES, COLUMNS], tl.float32)
    for tile in range(share, tl.cdiv(sites_in_all, SITES), tl.cdiv(PROGRAMS, length + 1)):
        index = tile * SITES + tl.arange(0, SITES)
        batch, site = (index // sites).to(tl.int64), index % sites
        inside = (index < sites_in_all)[:, None] & here
        offset = batch * batch_stride + site.to(tl.int64) * site_stride + element.to(tl.int64) * row_stride
        value = tl.load(grad + offset[:, None] + column[None, :], mask=inside, other=0.0)
        target = site // inner * outer_step + site % inner + element * step
        to = (batch * (sites * length) + target)[:, None] * channels + column[None, :]
        tl.store(dx + to, value, mask=(index < kept)[:, None] & here)
        totals += value.to(tl.float32)
    row = (share * (length + 1) + element).to(tl.int64)
    tl.store(partials + row * channels + column, tl.sum(totals, 0), mask=column < channels)


def forward(x: Tensor, token: Tensor, positions: Tensor, plane: str, time: int, height: int, width: int) -> Tensor:
    """x: (B, T H W, C), token: (C), positions: (L + 1, C) -> (B, sites, L + 1, C)."""
    x, token, positions = rows_dense(x), rows_dense(token), rows_dense(positions)
    batch, tokens, channels = x.shape
    gather = gather_of(plane, time, height, width)
    sites = tokens // gather.length
    rows = sites * (gather.length + 1)
    out = torch.empty(batch, sites, gather.length + 1, channels, dtype=x.dtype, device=x.device)
    config = FORWARD(x.device, "any", x.dtype)
    blocks = batch * triton.cdiv(rows, config.blocks["ROWS"])
    launch(
        triplane_slice_forward,
        (blocks * triton.cdiv(channels, config.blocks["COLUMNS"]),),
        *(x, token, positions, out),
        *(rows, gather.length, channels, gather.inner, gather.outer_step, gather.step),
        *(x.stride(0), x.stride(1), positions.stride(0)),
        config=config,
    )
    return out


def backward(
    grad: Tensor, token: Tensor, positions: Tensor, plane: str, time: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, token and positions from grad: (B, sites, L + 1, C)."""
    grad = rows_dense(grad)
    batch, sites, rows, channels = grad.shape
    gather = gather_of(plane, time, height, width)
    dx = torch.empty(batch, time * height * width, channels, dtype=grad.dtype, device=grad.device)
    dtoken, dpositions = (torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in (token, positions))
    config = BACKWARD(grad.device, "any", grad.dtype)
    blocks = config.blocks
    shares = min(triton.cdiv(batch * sites, blocks["SITES"]), triton.cdiv(blocks["PROGRAMS"], rows))
    partials = torch.empty(shares, rows * channels, dtype=torch.float32, device=grad.device)
    launch(
        triplane_slice_backward,
        (shares * rows * triton.cdiv(channels, blocks["COLUMNS"]),),
        *(grad, dx, partials),
        *(batch * sites, sites, gather.length, channels, gather.inner, gather.outer_step, gather.step),
        *grad.stride()[:3],
        config=config,
    )
    sum_partials(partials, dpositions, dtoken)
    return dx, dtoken, dpositions
