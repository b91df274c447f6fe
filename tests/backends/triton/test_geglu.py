"""geglu in Triton's interpreter: several blocks each way, odd widths, strides, every value of the gate."""

from __future__ import annotations

import pytest
import torch
from backends.triton.pointwise import FORMS, compare, same_again, wide
from inputs import DTYPES
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.backends.reference import geglu as reference

pytestmark = pytest.mark.skipif(
    not choice.interpreting(), reason="needs Triton's interpreter: run with TRITON_INTERPRET=1"
)
pytest.importorskip("triton", reason="needs Triton: pip install triton")

from pvdm_fast.kernels import geglu  # noqa: E402


def check(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    results = geglu.forward(x), geglu.backward(grad, x)
    compare(results, (reference.forward(x.double()), reference.backward(*wide(grad, x))), "geglu")
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 64, 150])
def test_blocks(dtype: torch.dtype, width: int) -> None:
    x, grad = torch.randn(3, 47, 2 * width).to(dtype), torch.randn(3, 47, width).to(dtype)
    same_again(lambda: check(x, grad))


@pytest.mark.parametrize("form", FORMS)
def test_strides(form: str) -> None:
    check(FORMS[form](torch.randn(3, 7, 20)), FORMS[form](torch.randn(3, 7, 10)))


def test_one_row() -> None:
    check(torch.randn(10), torch.randn(5))


def test_element_by_element() -> None:
    """Gates from -30 to 30: absolute or relative error within 1e-6, also for the derivative. The tail keeps its
    digits."""
    gate = torch.cat((torch.linspace(-30, 30, 6001), torch.tensor([-0.0, 1e-30, -1e-30, 3e4, -3e4])))
    x = torch.stack((torch.ones_like(gate), gate), -1)
    ones = torch.ones(len(gate), 1)
    results = geglu.forward(x), geglu.backward(ones, x)
    exact = reference.forward(x.double()), reference.backward(ones.double(), x.double())
    for a, e in zip(results, exact, strict=True):
        assert torch.isfinite(a).all()
        assert ((a - e).abs() <= 1e-6 * e.abs().clamp_min(1)).all()
    tail = (gate > -5) & (gate < -1)
    # The polynomial's own error: within 1.7e-3 of the values at -5 (2e-6 of the peak), and 1.2e-5 at -2.
    assert ((results[0] - exact[0]).abs()[tail] <= 2e-3 * exact[0].abs()[tail]).all()
