"""plane_resample in Triton's interpreter: several blocks, odd sizes, strides, both directions of both steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends.triton.pointwise import FORMS, compare, same_again
from inputs import DTYPES
from torch import Tensor

from pvdm_fast import TriplaneLayout, use_backend
from pvdm_fast.backends import choice
from pvdm_fast.backends.reference import plane_resample as reference
from pvdm_fast.layout import PlaneLayout
from pvdm_fast.nn import ResidualBlock
from pvdm_fast.ops.plane_resample import STEPS as STEP

pytestmark = pytest.mark.skipif(
    not choice.interpreting(), reason="needs Triton's interpreter: run with TRITON_INTERPRET=1"
)
pytest.importorskip("triton", reason="needs Triton: pip install triton")

from pvdm_fast.kernels import plane_resample  # noqa: E402

COARSE = [
    PlaneLayout(((1, 1),)),
    PlaneLayout(((3, 5), (1, 7), (4, 1))),
    TriplaneLayout(5, 7, 9),  # two blocks of tokens, of both clips
]
STEPS = pytest.mark.parametrize("resample", [1, -1])


def layout_of(coarse: PlaneLayout, resample: int) -> PlaneLayout:
    return coarse if resample > 0 else coarse.upsample(2)


def check(x: Tensor, grad: Tensor, layout: PlaneLayout, resample: int) -> tuple[Tensor, ...]:
    """x has `layout`, and grad what it becomes."""
    arguments = layout.sizes, resample
    results = plane_resample.forward(x, *arguments), plane_resample.backward(grad, *arguments)
    exact = reference.forward(x.double(), *arguments), reference.backward(grad.double(), *arguments)
    compare(results, exact, "plane_resample")
    assert all(result.is_contiguous() for result in results)
    return results


def tensors(layout: PlaneLayout, resample: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    after = layout.upsample(2) if resample > 0 else layout.downsample(2)
    return tuple(torch.randn(2, n, channels).to(dtype) for n in (layout.num_tokens, after.num_tokens))


@STEPS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 5, 150])
@pytest.mark.parametrize("coarse", COARSE)
def test_blocks(coarse: PlaneLayout, channels: int, dtype: torch.dtype, resample: int) -> None:
    layout = layout_of(coarse, resample)
    x, grad = tensors(layout, resample, channels, dtype)
    same_again(lambda: check(x, grad, layout, resample))
    before = x.clone(), grad.clone()
    check(x, grad, layout, resample)
    assert torch.equal(x, before[0]) and torch.equal(grad, before[1])


@STEPS
@pytest.mark.parametrize("form", FORMS)
def test_strides(form: str, resample: int) -> None:
    layout = layout_of(COARSE[1], resample)
    x, grad = tensors(layout, resample, 6, torch.float32)
    check(FORMS[form](x), FORMS[form](grad), layout, resample)


@STEPS
def test_rounded_once(resample: int) -> None:
    """A sum of four is made in float32, and only its result is rounded."""
    layout = layout_of(COARSE[2], resample)
    x, grad = tensors(layout, resample, 7, torch.bfloat16)
    pairs = zip(check(x, grad, layout, resample), check(x.float(), grad.float(), layout, resample), strict=True)
    for actual, exact in pairs:
        assert torch.equal(actual, exact.bfloat16())


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("resample", ["up", "down"])
def test_residual_blocks_take_it(monkeypatch: pytest.MonkeyPatch, resample: str, backend: str) -> None:
    """Both ways on the skip, where Triton serves it. Values and gradients are those of plain PyTorch."""
    calls: list[str] = []
    launch = plane_resample.launch

    def counted(*arguments: Any, UP: bool, **options: Any) -> None:
        calls.append("up" if UP else "down")
        launch(*arguments, UP=UP, **options)

    monkeypatch.setattr(plane_resample, "launch", counted)
    block, layout = ResidualBlock(32, 16, 32, resample), TriplaneLayout(2, 2, 4)
    x, embedding = torch.randn(2, layout.num_tokens, 32, requires_grad=True), torch.randn(2, 16)
    with use_backend(backend):
        out = block(x, embedding, layout)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
    skip = reference.resample_planes(x, layout, STEP[resample])  # the last convolution starts at zero
    compare((out, gradient), (skip, torch.autograd.grad(skip.square().sum(), x)[0]), "residual block")
    other = {"up": "down", "down": "up"}[resample]  # of the gradient
    assert calls == ([resample, other] if backend == "triton" else [])
