"""`plane_conv` on the CPU: the unfolded tokens of all planes times the weight as it lies in memory, one product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pvdm_fast.native import extension, rows_dense
from pvdm_fast.native.cpu.gemm import compute_dtype, linear

TAPS = 9
# Bytes of unfolded rows at a time. glibc gives allocations of 32 MiB and more back to the system, and every page of the
# next one faults: 2 x the time of a forward pass. Below that, size hardly matters (2 to 31 MiB: within 10 %).
WORKSPACE = 24 << 20


def _chunks(rows: int, channels: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """(first row, number of rows), such that each chunk's unfolded rows fit the work-space, all about as large."""
    most = max(64, WORKSPACE // (TAPS * channels * dtype.itemsize))
    parts = -(-rows // most)
    bounds = [rows * part // parts for part in range(parts + 1)]
    yield from ((first, stop - first) for first, stop in pairwise(bounds))


def _unfold(x: Tensor, planes: list[int], first: int, rows: int) -> Tensor:
    out = x.new_empty(rows, TAPS * x.shape[2])
    extension("_cpu").plane_conv_unfold(x, out, planes, first, torch.get_num_threads())
    return out


def forward(x: Tensor, weight: Tensor, bias: Tensor, planes: Sequence[int]) -> Tensor:
    """x: (B, N, C), weight: (C', C, 3, 3), bias: (C') -> (B, N, C')."""
    (batch, tokens, channels), planes = x.shape, list(planes)
    dtype = compute_dtype(x.dtype)
    wide, matrix, level = rows_dense(x.to(dtype)), weight.to(dtype).flatten(1), bias.to(dtype)
    parts = [
        linear(_unfold(wide, planes, first, rows), matrix, level).to(x.dtype)
        for first, rows in _chunks(batch * tokens, channels, dtype)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(batch, tokens, -1)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, planes: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; the first two only where `needs` says so, else empty."""
    dtype = compute_dtype(x.dtype)
    rows = grad.flatten(0, 1).to(dtype).contiguous()
    dx = _input_gradient(rows, x, weight, list(planes)) if needs[0] else x.new_empty(0)
    dweight = _weight_gradient(rows, x, weight, list(planes)) if needs[1] else weight.new_empty(0)
    return dx, dweight, rows.sum(0, dtype=torch.float32).to(grad.dtype)


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, planes: list[int]) -> Tensor:
    """The unfolded gradient, one product, folded back: sums in float32. grad: (B N, C')."""
    matrix = weight.to(grad.dtype).flatten(1).t()
    dx = torch.zeros(x.shape, dtype=torch.float32)
    for first, rows in _chunks(len(grad), x.shape[2], grad.dtype):
        unfolded = linear(grad[first : first + rows], matrix)
        extension("_cpu").plane_conv_fold(unfolded, dx, planes, first, torch.get_num_threads())
    return dx.to(x.dtype)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, planes: list[int]) -> Tensor:
    """The transposed gradient times the unfolded rows, which are made again; chunks are added in float32."""
    wide = rows_dense(x.to(grad.dtype))
    total: Tensor | None = None
    for first, rows in _chunks(len(grad), x.shape[2], grad.dtype):
        part = linear(grad[first : first + rows].t(), _unfold(wide, planes, first, rows).t())
        total = part if total is None else total.float() + part
    assert total is not None  # the public function refuses empty tensors
    return total.to(weight.dtype).view(weight.shape)
