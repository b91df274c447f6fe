"""`geglu` in Triton: one pass in each direction.

Bytes per row of M outputs of s bytes. Forward: 2 M s read, M s written. Backward: 3 M s read, 2 M s written. That is
the floor: on an A100 or H100, some 35 instructions per value cost less than the bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.backends.rows import rows_dense
from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.math import normal

# A warp has 256 neighbouring values of a row: 16 bytes per lane and load in 16 bits. 256 divides the widths in use
# (1536, 768, 256). Four rows per program keep two loads per lane in flight, and each multiprocessor has 8 programs or
# more. AMD's waves are twice as wide.
ENTRIES = {
    ("*", "*", "*"): Config({"ROWS": 4, "COLUMNS": 256}),
    ("gfx942", "*", "*"): Config({"ROWS": 8, "COLUMNS": 256}),
    ("interpreter", "*", "*"): Config({"ROWS": 64, "COLUMNS": 64}),
}
CANDIDATES = tuple(Config({"ROWS": r, "COLUMNS": c}, w) for r, c, w in ((2, 256, 2), (8, 256, 8), (2, 512, 4)))
FORWARD = ConfigTable("geglu_forward", ENTRIES, CANDIDATES)
BACKWARD = ConfigTable("geglu_backward", ENTRIES, CANDIDATES)


@triton.jit
def _tile(rows, half, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (int64) and columns of this program's tile, and a mask of those that exist."""
    across = tl.cdiv(half, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < half)[None, :]


@triton.jit
def geglu_forward(x, out, rows, half, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, inside = _tile(rows, half, ROWS, COLUMNS)
    source = x + row * x_stride + column
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    cdf, _ = normal(gate)
    tl.store(out + row * half + column, (value * gate * cdf).to(out.dtype.element_ty), mask=inside)


@triton.jit
def geglu_backward(grad, x, dx, rows, half, grad_stride, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, inside = _tile(rows, half, ROWS, COLUMNS)
    source = x + row * x_stride + column
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    cdf, pdf = normal(gate)
    target = dx + row * (2 * half) + column
    tl.store(target, (g * gate * cdf).to(dx.dtype.element_ty), mask=inside)
    tl.store(target + half, (g * value * (cdf + gate * pdf)).to(dx.dtype.element_ty), mask=inside)


def _grid(rows: int, half: int, config: Config) -> tuple[int]:
    return (triton.cdiv(rows, config.blocks["ROWS"]) * triton.cdiv(half, config.blocks["COLUMNS"]),)


def _rows_of(x: Tensor) -> Tensor:
    return rows_dense(x.reshape(-1, x.shape[-1]))


def forward(x: Tensor) -> Tensor:
    """x: (..., 2M), halves (value | gate) -> (..., M)."""
    half = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], half, dtype=x.dtype, device=x.device)
    x = _rows_of(x)
    config = FORWARD(x.device, "any", x.dtype)
    launch(geglu_forward, _grid(len(x), half, config), x, out, len(x), half, x.stride(0), config=config)
    return out


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from grad: (..., M)."""
    half = x.shape[-1] // 2
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad, x = _rows_of(grad), _rows_of(x)
    config = BACKWARD(x.device, "any", x.dtype)
    launch(
        geglu_backward,
        _grid(len(x), half, config),
        *(grad, x, dx),
        *(len(x), half, grad.stride(0), x.stride(0)),
        config=config,
    )
    return dx
