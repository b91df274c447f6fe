"""`plane_conv` on the CPU: one product of all planes' unfolded tokens and the weight, which needs no rearranging."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.gemm import compute_dtype, linear, weight_gradient
from pvdm_fast.backends.rows import order_of, rows_dense

TAPS = 9
WORKSPACE = 24 << 20  # bytes of unfolded rows at a time; from 2 to 31 MiB the size changes times by at most 10 %
# The gradient of x is a convolution too, of the gradient with the turned weight. Its unfolded rows serve the weight's
# gradient as well, and nothing is folded. But the weight is rearranged twice, which only many tokens pay for. On a
# Zen 5, both gradients in bfloat16 by 1 and 2 threads: 1.2x and 1.2x as fast for 3072 tokens of 64 channels, 1.1x and
# 1.2x for 2048 of 256, 1.2x and 1.1x for 2048 from 512 to 256, but 0.9x for 512 of 512 and 0.6x for 128 of 1024.
MANY = 4  # tokens a channel
_kept = threading.local()


def _workspace(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns) of memory that this thread keeps. The contents are valid until the thread's next call.

    It is kept because malloc sometimes returns such a large block to the system. Writing it then faults its pages one
    by one: up to 7 ms for 19 MB, next to a product of 12 ms.
    """
    size = rows * columns * dtype.itemsize
    buffer: Tensor | None = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = _kept.buffer = torch.empty(size, dtype=torch.uint8)
    return buffer[:size].view(dtype).view(rows, columns)


def _chunks(rows: int, channels: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of chunks of about equal size, whose unfolded rows fit the workspace."""
    most = max(64, WORKSPACE // (TAPS * channels * dtype.itemsize))
    parts = -(-rows // most)
    bounds = [rows * part // parts for part in range(parts + 1)]
    yield from ((first, stop - first) for first, stop in pairwise(bounds))


def _unfold(x: Tensor, planes: list[int], first: int, rows: int) -> Tensor:
    out = _workspace(rows, TAPS * x.shape[2], x.dtype)
    extension("_cpu").plane_conv_unfold(x, out, planes, first, torch.get_num_threads())
    return out


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum over chunks, in float32 where there is more than one."""
    return part if total is None else total.float() + part


def forward(x: Tensor, weight: Tensor, bias: Tensor, planes: Sequence[int], residual: Tensor | None = None) -> Tensor:
    """x: (B, N, C), weight: (C', C, 3, 3), bias: (C'), residual: (B, N, C') or None -> (B, N, C')."""
    (batch, tokens, channels), planes = x.shape, list(planes)
    dtype = compute_dtype(x.dtype)
    wide, matrix, level = rows_dense(x.to(dtype)), weight.to(dtype).flatten(1), bias.to(dtype)
    added = None if residual is None else residual.flatten(0, 1)
    parts = []
    for first, rows in _chunks(batch * tokens, channels, dtype):
        part = linear(_unfold(wide, planes, first, rows), matrix, level)
        if added is not None:  # the product is still in a cache
            part += added[first : first + rows]
        parts.append(part.to(x.dtype))
    return _joined(parts).view(batch, tokens, -1)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, planes: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias. Those of x and weight are empty unless `needs` asks for them."""
    dtype = compute_dtype(x.dtype)
    rows = rows_dense(grad.to(dtype))
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if needs[0] and _many_tokens(x):
        dx, dweight = _gradients_by_convolution(rows, x, weight, list(planes), needs[1])
    else:
        flat = rows.flatten(0, 1)
        dx = _input_gradient(flat, x, weight, list(planes)) if needs[0] else dx
        dweight = _weight_gradient(flat, x, weight, list(planes)) if needs[1] else dweight
    if needs[1]:
        dweight = dweight.contiguous(memory_format=order_of(weight))
    return dx, dweight, rows.sum((0, 1), dtype=torch.float32).to(grad.dtype)


def _many_tokens(x: Tensor) -> bool:
    return x.shape[0] * x.shape[1] >= MANY * x.shape[2]


def _gradients_by_convolution(
    grad: Tensor, x: Tensor, weight: Tensor, planes: list[int], weight_too: bool
) -> tuple[Tensor, Tensor]:
    """grad: (B, N, C'). Gradients of x, and of the weight if it is wanted (else empty), which is summed in float32."""
    outputs, channels = weight.shape[:2]
    turned = weight.to(grad.dtype).flatten(2).flip(2).transpose(0, 1).reshape(channels, -1)
    wide, total, parts = x.to(grad.dtype).flatten(0, 1), None, []
    for first, rows in _chunks(len(wide), outputs, grad.dtype):
        unfolded = _unfold(grad, planes, first, rows)
        parts.append(linear(unfolded, turned).to(x.dtype))
        if weight_too:
            total = _added(total, weight_gradient(wide[first : first + rows], unfolded))
    dx = _joined(parts).view(x.shape)
    if total is None:
        return dx, weight.new_empty(0)
    dweight = total.view(channels, outputs, TAPS).flip(2).transpose(0, 1)
    return dx, dweight.to(weight.dtype).contiguous().view(weight.shape)


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, planes: list[int]) -> Tensor:
    """The unfolded gradient (one product), folded back with float32 sums. grad: (B N, C')."""
    matrix = weight.to(grad.dtype).flatten(1).t()
    dx = torch.zeros(x.shape, dtype=torch.float32)
    for first, rows in _chunks(len(grad), x.shape[2], grad.dtype):
        unfolded = linear(grad[first : first + rows], matrix)
        extension("_cpu").plane_conv_fold(unfolded, dx, planes, first, torch.get_num_threads())
    return dx.to(x.dtype)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, planes: list[int]) -> Tensor:
    """The transposed gradient times the unfolded rows, which are made again. Chunks are added in float32."""
    wide = rows_dense(x.to(grad.dtype))
    total: Tensor | None = None
    for first, rows in _chunks(len(grad), x.shape[2], grad.dtype):
        total = _added(total, linear(grad[first : first + rows].t(), _unfold(wide, planes, first, rows).t()))
    assert total is not None  # the public function refuses empty tensors
    return total.to(weight.dtype).view(weight.shape)
