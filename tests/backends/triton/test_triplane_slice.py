"""triplane_slice in Triton's interpreter: every plane, several blocks of rows, sites and channels, strides, dtypes."""

from __future__ import annotations

import pytest
import torch
from backends.triton.pointwise import FORMS, compare, same_again, wide
from inputs import DTYPES
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.backends.reference import triplane_slice as reference
from pvdm_fast.layout import TriplaneLayout

pytestmark = pytest.mark.skipif(
    not choice.interpreting(), reason="needs Triton's interpreter: run with TRITON_INTERPRET=1"
)
pytest.importorskip("triton", reason="needs Triton: pip install triton")

from pvdm_fast.kernels import triplane_slice  # noqa: E402

LAYOUT = TriplaneLayout(3, 5, 7)
PLANES = {"xy": 3, "yt": 5, "xt": 7}


def check(x: Tensor, grad: Tensor, token: Tensor, positions: Tensor, plane: str) -> tuple[Tensor, ...]:
    where = (plane, LAYOUT.time, LAYOUT.height, LAYOUT.width)
    out = triplane_slice.forward(x, token, positions, *where)
    compare((out,), (reference.forward(*wide(x, token, positions), *where),), "sequences")
    gradients = triplane_slice.backward(grad, token, positions, *where)
    compare(gradients, reference.backward(*wide(grad, token, positions), *where), "gradients")
    return out, *gradients


def draw(plane: str, channels: int, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, ...]:
    length, lattice = PLANES[plane], LAYOUT.num_lattice_tokens
    x, token, positions = (
        torch.randn(s).to(dtype) for s in ((batch, lattice, channels), channels, (length + 1, channels))
    )
    return x, torch.randn(batch, lattice // length, length + 1, channels).to(dtype), token, positions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("channels", [5, 130])
def test_blocks(dtype: torch.dtype, plane: str, channels: int) -> None:
    inputs = draw(plane, channels, dtype, batch=3)  # 14 blocks of sites for xy, 3 programs a position
    same_again(lambda: check(*inputs, plane))


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("form", FORMS)
def test_strides(form: str, plane: str) -> None:
    x, grad, token, positions = draw(plane, 12, torch.float32)
    check(FORMS[form](x), FORMS[form](grad), token[::2].repeat_interleave(2), positions.T.contiguous().T, plane)


def test_mixed_dtypes() -> None:
    x, grad, token, positions = draw("yt", 12, torch.bfloat16)
    results = check(x, grad, token.float(), positions.float(), "yt")
    assert [r.dtype for r in results] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("sizes", [(1, 4, 6), (4, 1, 6), (4, 6, 1), (1, 1, 1)])
def test_thin_lattices(sizes: tuple[int, int, int]) -> None:
    lattice = sizes[0] * sizes[1] * sizes[2]
    for plane, length in zip(PLANES, sizes, strict=True):
        x, token, positions = torch.randn(2, lattice, 8), torch.randn(8), torch.randn(length + 1, 8)
        grad = torch.randn(2, lattice // length, length + 1, 8)
        out = triplane_slice.forward(x, token, positions, plane, *sizes)
        gradients = triplane_slice.backward(grad, token, positions, plane, *sizes)
        compare((out,), (reference.forward(*wide(x, token, positions), plane, *sizes),), plane)
        compare(gradients, reference.backward(*wide(grad, token, positions), plane, *sizes), plane)
