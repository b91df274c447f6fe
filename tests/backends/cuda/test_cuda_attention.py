"""The CUDA attention kernels on the host stand-in: both families, every gradient, three schedules."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from comparison import assert_close
from inputs import DTYPES, poisoned_empty
from tolerances import ATTENTION_16_BIT, OPERATION
from torch import Tensor

from pvdm_fast.backends.cuda import attention, axial_attention, segment_attention
from pvdm_fast.backends.reference import axial_attention as axial_reference
from pvdm_fast.backends.reference import segment_attention as segment_reference
from pvdm_fast.nn.axial_transformer import time_rotation

HALVES = [torch.bfloat16, torch.float16]


def tolerance(dtype: torch.dtype, matrix: bool) -> float:
    return ATTENTION_16_BIT[dtype] if matrix else OPERATION[dtype]


def same_in_every_order(device: ModuleType, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned_empty)
        for order in (0, 1, 2):
            device.set_schedule(order)
            results.append(run())
    device.set_schedule(0)
    for other, mine in itertools.product(results[1:], [results[0]]):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True)), "the order of threads shows"
    return results[0]


def check_segments(device: ModuleType, qkv: Tensor, offsets: list[int], tolerance: float) -> None:
    scale = qkv.shape[-1] ** -0.5
    grad = torch.randn(qkv.shape[0], qkv.shape[1], *qkv.shape[3:]).to(qkv.dtype)

    def run() -> tuple[Tensor, ...]:
        out, lse = segment_attention.forward(qkv, offsets, scale)
        return out, lse, segment_attention.backward(grad, qkv, out, lse, offsets, scale)

    out, lse, dqkv = same_in_every_order(device, run)
    expected, expected_lse = segment_reference.forward(qkv.double(), offsets, scale)
    gradient = segment_reference.backward(grad.double(), qkv.double(), expected, expected_lse, offsets, scale)
    assert_close(out, expected, tolerance, "out")
    assert_close(lse, expected_lse, tolerance, "log-sum-exp")
    for i, name in enumerate("qkv"):
        assert_close(dqkv[:, :, i], gradient[:, :, i], tolerance, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("offsets", "heads", "width"),
    [
        ([0, 35, 50, 71], 2, 8),
        ([0, 1], 1, 16),
        ([0, 130], 1, 32),
        ([0, 3, 70], 3, 40),
        ([0, 20], 1, 5),
        ([0, 20], 1, 128),
        ([0, 9], 1, 256),
    ],
)
def test_vector_kernels(device: ModuleType, dtype: torch.dtype, offsets: list[int], heads: int, width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MATRIX_LENGTH", 1 << 30)
        check_segments(device, torch.randn(2, offsets[-1], 3, heads, width).to(dtype), offsets, OPERATION[dtype])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("offsets", "heads", "width"),
    [
        ([0, 70, 85, 150], 2, 8),
        ([0, 1], 1, 16),
        ([0, 131], 1, 32),
        ([0, 3, 80], 1, 40),
        ([0, 65], 1, 64),
        ([0, 70], 1, 128),
    ],
)
def test_tensor_core_kernels(
    device: ModuleType, dtype: torch.dtype, offsets: list[int], heads: int, width: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MATRIX_LENGTH", 1)
        qkv = torch.randn(1, offsets[-1], 3, heads, width).to(dtype)
        check_segments(device, qkv, offsets, ATTENTION_16_BIT[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_the_model(device: ModuleType, dtype: torch.dtype) -> None:
    """The denoiser's memory order, where each head has its q, k, v. And rows that don't start at multiples of 16
    bytes."""
    qkv = torch.randn(2, 70, 2, 3, 16).to(dtype).transpose(2, 3)
    assert attention.aligned(qkv)
    check_segments(device, qkv, [0, 70], tolerance(dtype, dtype != torch.float32))
    buffer = torch.randn(1, 20, 3, 2, 17).to(dtype)[..., 1:]
    assert not attention.aligned(buffer)
    check_segments(device, buffer, [0, 20], OPERATION[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("axis", "lattice", "width", "rotate", "single", "matrix"),
    [
        ("time", (3, 5, 7), 8, True, False, False),
        ("time", (17, 2, 3), 48, True, False, False),
        ("time", (33, 1, 2), 64, False, False, False),
        ("space", (2, 5, 7), 16, True, False, False),
        ("space", (2, 9, 8), 32, True, False, True),
        ("space", (1, 9, 15), 64, True, False, True),
        ("time", (9, 2, 3), 16, False, True, False),
        ("time", (33, 5, 1), 48, False, True, False),
    ],
)
def test_axial_attention(
    device: ModuleType,
    dtype: torch.dtype,
    axis: str,
    lattice: tuple[int, int, int],
    width: int,
    rotate: bool,
    single: bool,
    matrix: bool,
) -> None:
    matrix = matrix and dtype != torch.float32  # tensor cores take 16 bits
    qkv = torch.randn(2, *lattice, 2 if single else 3, 2, width).to(dtype)
    query = torch.randn(2, 1, *lattice[1:], 2, width).to(dtype) if single else None
    length = lattice[0] if axis == "time" else lattice[1] * lattice[2]
    sin, cos = time_rotation(length, width) if rotate else (None, None)
    grad = torch.randn(2, *(1 if single else lattice[0], *lattice[1:]), 2, width).to(dtype)
    scale = width**-0.5

    def run() -> tuple[Tensor, ...]:
        out, lse = axial_attention.forward(qkv, query, sin, cos, axis, scale)
        return out, lse, *axial_attention.backward(grad, qkv, query, sin, cos, out, lse, axis, scale)

    found = same_in_every_order(device, run)
    wide = [None if t is None else t.double() for t in (qkv, query, sin, cos)]
    out, lse = axial_reference.forward(*wide, axis, scale)  # type: ignore[arg-type]
    gradients = axial_reference.backward(grad.double(), *wide, out, lse, axis, scale)  # type: ignore[arg-type]
    for name, a, e in zip(("out", "lse", "dqkv", "dquery"), found, (out, lse, *gradients), strict=True):
        assert_close(a, e, tolerance(dtype, matrix), name)


def test_summed_gradient(device: ModuleType) -> None:
    """A gradient of stride 0."""
    qkv = torch.randn(1, 20, 3, 2, 16)
    out, lse = segment_attention.forward(qkv, [0, 20], 0.25)
    grad = torch.ones(()).expand(out.shape)
    expected = segment_attention.backward(grad.contiguous(), qkv, out, lse, [0, 20], 0.25)
    assert torch.equal(segment_attention.backward(grad, qkv, out, lse, [0, 20], 0.25), expected)


def test_work_is_what_was_planned(device: ModuleType) -> None:
    """Matrix instructions and bytes of one forward pass. No ldmatrix has a bank conflict."""
    tokens, width = 256, 64
    device.counts()
    segment_attention.forward(torch.randn(1, tokens, 3, 1, width).bfloat16(), [0, tokens], 0.125)
    counts = device.counts()
    blocks = tokens // 64
    assert counts["mma"] == 2 * tokens * tokens * width // (16 * 8 * 16)  # two products, nothing computed twice
    assert counts["bank_conflicts"] == 0
    assert counts["async_bytes"] == 2 * width * (
        tokens + blocks * 2 * tokens
    )  # q once, k and v once per block of queries
    segment_attention.backward(*_backward_arguments(tokens, width))
    assert device.counts()["bank_conflicts"] == 0


def _backward_arguments(tokens: int, width: int) -> tuple[object, ...]:
    qkv = torch.randn(1, tokens, 3, 1, width).bfloat16()
    out, lse = segment_attention.forward(qkv, [0, tokens], 0.125)
    return torch.randn_like(out), qkv, out, lse, [0, tokens], 0.125


def test_too_wide_or_too_many(device: ModuleType) -> None:
    with pytest.raises(ValueError, match="at most 256 channels"):
        segment_attention.forward(torch.randn(1, 4, 3, 1, 264), [0, 4], 1.0)
    with pytest.raises(ValueError, match="at most 32 segments"):
        segment_attention.forward(torch.randn(1, 40, 3, 1, 8), list(range(41)), 1.0)
