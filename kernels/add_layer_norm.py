"""`add_layer_norm` in Triton: a program holds whole rows in registers, so everything is read once.

Bytes per row of C values of s bytes, with a residual. Forward: 2 C s read, 2 C s and 8 written. Backward: 3 C s and 8
read, C s written. The backward pass also writes and reads partial sums of the gradients of weight and bias: 8 C bytes
for each of at most PROGRAMS programs. In 16 bits that is 4 PROGRAMS / rows of the rest.
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
from pvdm_fast.kernels.math import rounded_product, sum_of_products
from pvdm_fast.kernels.partials import sum_partials

WIDEST = 8192  # columns: wider rows don't fit into a block's registers

# Narrow rows: one warp per program, so that sums over a row are shuffles and nothing waits at a barrier. Other rows:
# one per program, with 16 values per thread at the widest.
FORWARD = ConfigTable(
    "add_layer_norm_forward",
    {
        ("*", "*", "*"): Config({"ROWS": 1}, num_warps=16),
        ("*", "narrow", "*"): Config({"ROWS": 2}, num_warps=1),
        ("*", "middle", "*"): Config({"ROWS": 1}),
        ("gfx942", "middle", "*"): Config({"ROWS": 1}, num_warps=2),  # of 64 threads
        ("interpreter", "narrow", "*"): Config({"ROWS": 64}),
    },
    candidates=(Config({"ROWS": 4}, num_warps=1), Config({"ROWS": 1}, num_warps=1), Config({"ROWS": 4})),
)
# PROGRAMS: 8 warps per multiprocessor. Each program takes every PROGRAMS-th tile, so partial sums don't grow with the
# number of rows.
BACKWARD = ConfigTable(
    "add_layer_norm_backward",
    {
        ("*", "*", "*"): Config({"ROWS": 1, "PROGRAMS": 264}, num_warps=16),
        ("*", "narrow", "*"): Config({"ROWS": 2, "PROGRAMS": 1056}, num_warps=1),
        ("sm100", "narrow", "*"): Config({"ROWS": 1, "PROGRAMS": 1056}, num_warps=1),  # two rows spill
        ("*", "middle", "*"): Config({"ROWS": 1, "PROGRAMS": 528}),
        ("gfx942", "middle", "*"): Config({"ROWS": 1, "PROGRAMS": 528}, num_warps=2),
        ("interpreter", "narrow", "*"): Config({"ROWS": 32, "PROGRAMS": 3}),
    },
    candidates=tuple(Config({"ROWS": 2, "PROGRAMS": programs}, num_warps=1) for programs in (528, 864, 1216, 2112)),
)


def refusal(*inputs: Any) -> str | None:
    """Why the kernels don't take these arguments (of either direction, a tensor of rows first), or None."""
    columns = inputs[0].shape[-1]
    if columns > WIDEST:
        return f"it takes rows of at most {WIDEST} values, not {columns}: use another backend."
    return None


def width_class(columns: int) -> str:
    """ "narrow" up to 512 columns, "middle" up to 2048 (16 bytes and more a thread), else "wide"."""
    return "narrow" if columns <= 512 else "middle" if columns <= 2048 else "wide"


@triton.jit
def add_layer_norm_forward(
    x, residual, weight, bias, total, normed, mean_out, rstd_out, rows, columns, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    place = row[:, None] * columns + column[None, :]
    if HAS_RESIDUAL:
        values += tl.load(
            residual + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0
        ).to(tl.float32)  # fmt: skip
        stored = values.to(total.dtype.element_ty)  # the norm is that of the stored (rounded) sum
        tl.store(total + place, stored, mask=inside)
        values = stored.to(tl.float32)
    mean = tl.sum(values, 1) / columns
    centred = tl.where(inside, values - mean[:, None], 0.0)
    error = tl.sum(centred, 1) / columns  # corrects the mean; it matters in rows far from zero
    centred = tl.where(inside, centred - error[:, None], 0.0)
    rstd = tl.rsqrt(sum_of_products(centred, centred, 1) / columns + eps)
    w = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    result = centred * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(normed + place, result.to(normed.dtype.element_ty), mask=inside)
    tl.store(mean_out + row, mean + error, mask=row < rows)
    tl.store(rstd_out + row, rstd, mask=row < rows)


@triton.jit
def add_layer_norm_backward(
    grad_normed, grad_total, total, weight, mean, rstd, dx, partials,
    rows, columns, normed_stride, grad_total_stride, total_stride,
    HAS_TOTAL: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), PROGRAMS):
        row = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        g = tl.load(
            grad_normed + row[:, None] * normed_stride + column[None, :], mask=inside, other=0.0
        ).to(tl.float32)  # fmt: skip
        t = tl.load(total + row[:, None] * total_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mean + row, mask=row < rows, other=0.0)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        normed = (t - m[:, None]) * r[:, None]
        dweight += g * normed
        dbias += g
        g = rounded_product(g, w[None, :])  # zero outside, so sums need no mask
        average = tl.sum(g, 1) / columns
        slope = sum_of_products(g, normed, 1) / columns
        result = r[:, None] * (g - average[:, None] - normed * slope[:, None])
        if HAS_TOTAL:
            result += tl.load(
                grad_total + row[:, None] * grad_total_stride + column[None, :], mask=inside, other=0.0
            ).to(tl.float32)  # fmt: skip
        tl.store(dx + row[:, None] * columns + column[None, :], result.to(dx.dtype.element_ty), mask=inside)
    own = partials + tl.program_id(0).to(tl.int64) * 2 * columns + column
    tl.store(own, tl.sum(dweight, 0), mask=column < columns)
    tl.store(own + columns, tl.sum(dbias, 0), mask=column < columns)


def _rows_of(x: Tensor) -> Tensor:
    return rows_dense(x.reshape(-1, x.shape[-1]))


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual: (..., C) -> their sum (empty without a residual), and its norm in the residual's dtype, or x's
    without one. Per row also mean and 1 / std, float32."""
    like = x if residual is None else residual
    normed = torch.empty(x.shape, dtype=like.dtype, device=x.device)
    total = torch.empty(0 if residual is None else x.shape, dtype=like.dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    x = _rows_of(x)
    residual = x if residual is None else _rows_of(residual)
    rows, columns = x.shape
    config = FORWARD(x.device, width_class(columns), like.dtype)
    launch(
        add_layer_norm_forward,
        (triton.cdiv(rows, config.blocks["ROWS"]),),
        *(x, residual, rows_dense(weight), rows_dense(bias), total, normed, mean, rstd),
        *(rows, columns, x.stride(0), residual.stride(0), eps),
        config=config,
        HAS_RESIDUAL=total.numel() > 0,
        COLUMNS=triton.next_power_of_2(columns),
    )
    return total, normed, mean, rstd


def backward(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum (the same for x and residual), weight and bias."""
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    grad_normed, total = _rows_of(grad_normed), _rows_of(total)
    added = grad_normed if grad_total is None else _rows_of(grad_total)
    rows, columns = total.shape
    config = BACKWARD(total.device, width_class(columns), total.dtype)
    programs = min(triton.cdiv(rows, config.blocks["ROWS"]), config.blocks["PROGRAMS"])
    partials = torch.empty(programs, 2 * columns, dtype=torch.float32, device=total.device)
    launch(
        add_layer_norm_backward,
        (programs,),
        *(grad_normed, added, total, rows_dense(weight), mean.contiguous(), rstd.contiguous(), dx, partials),
        *(rows, columns, grad_normed.stride(0), added.stride(0), total.stride(0)),
        config=config,
        HAS_TOTAL=grad_total is not None,
        COLUMNS=triton.next_power_of_2(columns),
    )
    dweight, dbias = (torch.empty(columns, dtype=weight.dtype, device=weight.device) for _ in range(2))
    sum_partials(partials, dweight, dbias)
    return dx, dweight, dbias
