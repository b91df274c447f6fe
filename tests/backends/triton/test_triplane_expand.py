"""triplane_expand in Triton's interpreter: blocks of tokens and channels, depths, strides, tf32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends.triton.pointwise import FORMS, compare, same_again, wide
from comparison import relative_error
from inputs import DTYPES
from tolerances import OPERATION
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.backends.reference import triplane_expand as reference
from pvdm_fast.layout import TriplaneLayout

pytestmark = pytest.mark.skipif(
    not choice.interpreting(), reason="needs Triton's interpreter: run with TRITON_INTERPRET=1"
)
pytest.importorskip("triton", reason="needs Triton: pip install triton")

from pvdm_fast.kernels import triplane_expand  # noqa: E402

LAYOUT = TriplaneLayout(3, 5, 7)
Sizes = tuple[int, int, int]


def check(planes: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
    out = triplane_expand.forward(planes, weight, bias, *sizes)
    compare((out,), (reference.forward(*wide(planes, weight, bias), *sizes),), "lattice")
    gradients = triplane_expand.backward(grad, planes, weight, *sizes)
    compare(gradients, reference.backward(*wide(grad, planes, weight), *sizes), "gradients")
    return out, *gradients


def draw(layout: TriplaneLayout, channels: int, depth: int, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    tokens = (batch, layout.num_tokens, depth), (batch, layout.num_lattice_tokens, channels)
    shapes = (tokens[0], (3, channels, depth), (3, channels), tokens[1])
    return [torch.randn(shape).to(dtype) for shape in shapes]


def sizes_of(layout: TriplaneLayout) -> Sizes:
    return layout.time, layout.height, layout.width


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "depth"), [(5, 1), (130, 4), (33, 5), (70, 16)])
def test_blocks(dtype: torch.dtype, channels: int, depth: int) -> None:
    inputs = draw(LAYOUT, channels, depth, dtype)
    same_again(lambda: check(*inputs, sizes_of(LAYOUT)))


@pytest.mark.parametrize("form", FORMS)
def test_strides(form: str) -> None:
    check(*(FORMS[form](t) for t in draw(LAYOUT, 12, 4, torch.float32)), sizes_of(LAYOUT))


@pytest.mark.parametrize("sizes", [(1, 4, 6), (4, 1, 6), (4, 6, 1), (1, 1, 1), (2, 3, 40)])
def test_thin_lattices(sizes: Sizes) -> None:
    """Also an axis longer than a block of terms."""
    check(*draw(TriplaneLayout(*sizes), 8, 4, torch.float32, batch=3), sizes)


def test_tf32_where_allowed(float32_switches: Any) -> None:
    """By PyTorch's own switch. Biases stay float32."""
    float32_switches.fp32_precision = "tf32"
    planes, weight, bias, _ = draw(LAYOUT, 16, 4, torch.float32)
    exact = reference.forward(*wide(planes, weight, bias), *sizes_of(LAYOUT))
    error = relative_error(triplane_expand.forward(planes, weight, bias, *sizes_of(LAYOUT)), exact)
    assert OPERATION[torch.float32] < error < 1e-3
    still = triplane_expand.forward(torch.zeros_like(planes), weight, bias, *sizes_of(LAYOUT))
    compare((still,), (bias.double().sum(0).expand_as(still),), "biases alone")
