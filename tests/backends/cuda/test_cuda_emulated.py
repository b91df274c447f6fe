"""The CUDA kernels on the host, against the reference: g++ builds the same .cu files with csrc/emulation."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from comparison import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, poisoned_empty, transposed
from tolerances import OPERATION
from torch import Tensor

from pvdm_fast.backends import extensions
from pvdm_fast.backends.cuda import triplane_expand as kernels
from pvdm_fast.backends.reference import triplane_expand as reference
from pvdm_fast.layout import TriplaneLayout

SCHEDULES = (0, 1, 2)


def inputs(sizes: tuple[int, int, int], channels: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """planes, weight, bias and the incoming gradient."""
    tokens = TriplaneLayout(*sizes).num_tokens
    lattice = sizes[0] * sizes[1] * sizes[2]
    planes, grad = torch.randn(2, tokens, depth).to(dtype), torch.randn(2, lattice, channels).to(dtype)
    return planes, torch.randn(3, channels, depth), torch.randn(3, channels), grad


def check_forward(planes: Tensor, weight: Tensor, bias: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    expected = reference.forward(planes.double(), weight.double(), bias.double(), *sizes)
    actual = kernels.forward(planes, weight, bias, *sizes)
    assert_close(actual, expected, OPERATION[planes.dtype], "output")
    return actual


def check_backward(grad: Tensor, planes: Tensor, weight: Tensor, sizes: tuple[int, int, int]) -> list[Tensor]:
    expected = reference.backward(grad.double(), planes.double(), weight.double(), *sizes)
    actual = kernels.backward(grad, planes, weight, *sizes)
    for name, a, e in zip(("planes", "weight", "bias"), actual, expected, strict=True):
        assert_close(a, e, OPERATION[a.dtype], f"gradient of {name}")
    return list(actual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "channels"), [((3, 5, 7), 21), ((3, 5, 7), 32), ((9, 6, 17), 40), ((1, 1, 1), 8), ((2, 9, 3), 1)]
)
def test_equals_reference_in_every_order(
    device: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sizes: tuple[int, int, int], channels: int
) -> None:
    """Sizes that aren't multiples of any tile, partial and whole packs. The order of threads must not change a
    bit."""
    planes, weight, bias, grad = inputs(sizes, channels, 3, dtype)
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    results = []
    for order in SCHEDULES:
        device.set_schedule(order)
        results.append([check_forward(planes, weight, bias, sizes), *check_backward(grad, planes, weight, sizes)])
    device.set_schedule(0)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [transposed, lambda t: t.mT.contiguous().mT, lambda t: t[:, :1].expand_as(t)])
def test_strides(device: ModuleType, dtype: torch.dtype, change: Callable[[Tensor], Tensor]) -> None:
    """Batch, token and channel axes in any memory order, and stride 0."""
    sizes = (3, 5, 7)
    planes, weight, bias, grad = inputs(sizes, 24, 4, dtype)
    check_forward(change(planes), weight, bias, sizes)
    check_backward(change(grad), change(planes), weight, sizes)
    check_backward(torch.ones((), dtype=dtype).expand(grad.shape), planes, weight, sizes)


def test_unaligned_rows(device: ModuleType) -> None:
    """Rows that don't start at multiples of 16 bytes are read element by element."""
    sizes = (2, 3, 4)
    planes, weight, _, grad = inputs(sizes, 32, 4, torch.bfloat16)
    buffer = torch.zeros(grad.shape[0], grad.shape[1], 41, dtype=grad.dtype)
    buffer[..., 3:35] = grad
    assert buffer[..., 3:35].data_ptr() % 16 == 6
    check_backward(buffer[..., 3:35], planes, weight, sizes)


@settings(max_examples=20, deadline=None)
@given(
    st.tuples(*[st.integers(1, 11)] * 3), st.integers(1, 40), st.integers(1, 5), st.sampled_from(DTYPES), st.integers()
)
def test_any_sizes(
    device: ModuleType, sizes: tuple[int, int, int], channels: int, depth: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed % 2**31)
    planes, weight, bias, grad = inputs(sizes, channels, depth, dtype)
    check_forward(planes, weight, bias, sizes)
    check_backward(grad, planes, weight, sizes)


def test_arguments_are_checked(device: ModuleType) -> None:
    planes, weight, bias, _ = inputs((2, 3, 4), 8, 4, torch.float32)
    with pytest.raises(ValueError, match="planes has not the shape"):
        kernels.forward(planes[:, 1:], weight, bias, 2, 3, 4)
    with pytest.raises(ValueError, match="workspace"):
        device.triplane_expand_sums(torch.zeros(1, 24, 8), torch.zeros(1, 26, 8), torch.zeros(5), *(2, 3, 4), *(0, 0))


def test_extension_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What you see if nvcc wasn't found at installation."""
    monkeypatch.setattr(extensions, "build_info", lambda: {"_cuda": {"built": False, "reason": "no nvcc found"}})
    with pytest.raises(extensions.ExtensionError, match="left out when pvdm_fast was installed: no nvcc found"):
        extensions.extension.__wrapped__("_cuda")
