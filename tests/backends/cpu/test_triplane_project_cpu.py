"""triplane_project on the CPU: every instruction set against the float64 reference, at odd sizes; borders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close, relative_error
from instruction_sets import ISAS, using
from tolerances import BFLOAT16_FACTOR, OPERATION, PROJECTION_16_BIT
from torch import Tensor

from pvdm_fast.analysis.projections import Projection
from pvdm_fast.backends import extensions
from pvdm_fast.backends.cpu import triplane_project as kernel
from pvdm_fast.backends.projection_layers import MATRICES, NAMES
from pvdm_fast.backends.reference import triplane_project as reference

pytestmark = pytest.mark.skipif(not ISAS, reason="the CPU extension is not built: pip install -e .")

# Sequences of 2 to 41, channels of 8 to 512, heads of 1 to 8; several tiles, and a last one that is smaller.
CASES = {
    "least": Projection((1, 1, 2), "xy", 8, 1, 1, hidden=8, depth=1, latent=1),
    "one layer": Projection((2, 3, 5), "yt", 24, 3, 5, hidden=17, depth=1),
    "tiles": Projection((3, 9, 13), "xy", 16, 4, 2, batch=2),
    "17": Projection((16, 3, 3), "xy", 48, 4, 6, hidden=64, depth=3, latent=4),
    "33": Projection((3, 32, 5), "yt", 40, 8, 3, hidden=50, latent=7),
    "41": Projection((7, 3, 40), "xt", 72, 2, 33, hidden=40, batch=2),
    "wide": Projection((2, 2, 4), "xt", 512, 4, 64, hidden=136, latent=20),
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param):
        yield request.param


def results(module: Any, case: Projection, tensors: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    arguments = (*tensors.values(), *case.arguments())
    out = module.forward(*arguments)
    return {"out": out} | dict(zip(("x", *NAMES), module.backward(grad, *arguments), strict=True))


def compare(case: Projection, tensors: dict[str, Tensor], tolerance: float) -> None:
    exact = {name: t.double() for name, t in tensors.items()}
    sites = case.batch * exact["x"].shape[1] // case.length
    grad = torch.randn(case.batch, sites // case.batch, case.latent, generator=torch.Generator().manual_seed(5))
    expected = results(reference, case, exact, grad.double())
    actual = results(kernel, case, tensors, grad)
    again = results(kernel, case, tensors, grad)
    for name, value in actual.items():
        assert torch.equal(value, again[name]), f"{name} differs on a second run"
        assert_close(value, expected[name], tolerance, name)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    case = CASES[name]
    tensors = {n: t.float() for n, t in case.tensors().items()}
    compare(case, tensors, OPERATION[torch.float32])


def eager(case: Projection, tensors: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """PyTorch's own operations in the tensors' dtype, autograd's gradients."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    x, token, positions, *stacked = leaves.values()
    layers, (weight, bias) = zip(*(t.unbind() for t in stacked[:-2]), strict=True), stacked[-2:]
    lattice = x.unflatten(1, case.layout)
    moved = {"xy": lattice.permute(0, 2, 3, 1, 4), "yt": lattice.transpose(2, 3), "xt": lattice}[case.plane].flatten(
        1, 2
    )
    end = token.expand(*moved.shape[:2], 1, -1)
    y = (torch.cat((moved, end), dim=2) + positions).flatten(0, 1)
    for norm1, bias1, qkv, out, out_bias, norm2, bias2, up, up_bias, down, down_bias in layers:
        normed = F.layer_norm(y, y.shape[-1:], norm1, bias1, 1e-5)
        q, k, v = F.linear(normed, qkv).unflatten(-1, (3, case.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        y = y + F.linear(attended, out, out_bias)
        normed = F.layer_norm(y, y.shape[-1:], norm2, bias2, 1e-5)
        y = y + F.linear(F.gelu(F.linear(normed, up, up_bias)), down, down_bias)
    result = F.linear(y[:, 0], weight, bias).tanh().unflatten(0, moved.shape[:2])
    gradients = torch.autograd.grad(result, list(leaves.values()), grad.to(result.dtype))
    return {"out": result.detach()} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["one layer", "17", "33", "wide"])
def test_16_bits(name: str, dtype: torch.dtype) -> None:
    """At most twice the error of PyTorch's own operations in that dtype: products are of rows rounded once."""
    case = CASES[name]
    tensors = {n: t.to(dtype) for n, t in case.tensors().items()}
    exact = {n: t.double() for n, t in tensors.items()}
    sites = exact["x"].shape[1] // case.length
    grad = torch.randn(case.batch, sites, case.latent, generator=torch.Generator().manual_seed(5)).to(dtype)
    expected, rival = results(reference, case, exact, grad.double()), eager(case, tensors, grad)
    actual = results(kernel, case, tensors, grad)
    again = results(kernel, case, tensors, grad)
    for what, value in actual.items():
        assert value.dtype == dtype and torch.isfinite(value).all()
        assert torch.equal(value, again[what]), f"{what} differs on a second run"
        error = relative_error(value, expected[what])
        assert error <= BFLOAT16_FACTOR * relative_error(rival[what], expected[what]) + OPERATION[dtype], what


def test_eager_is_the_reference() -> None:
    for case in (CASES["one layer"], CASES["33"], CASES["tiles"]):
        tensors = case.tensors()
        grad = torch.randn(case.batch, tensors["x"].shape[1] // case.length, case.latent).double()
        expected = eager(case, tensors, grad)
        for name, value in results(reference, case, tensors, grad).items():
            assert_close(value, expected[name], OPERATION[torch.float64], name)


@pytest.mark.usefixtures("isa")
def test_matrices_in_bfloat16_of_a_float32_lattice() -> None:
    """As under autocast: the stream and all vectors stay float32."""
    case = CASES["17"]
    tensors = {n: t.to(torch.bfloat16 if n in MATRICES else torch.float32) for n, t in case.tensors().items()}
    exact = {n: t.double() for n, t in tensors.items()}
    grad = torch.randn(case.batch, exact["x"].shape[1] // case.length, case.latent)
    expected, actual = results(reference, case, exact, grad.double()), results(kernel, case, tensors, grad)
    for name, value in actual.items():
        assert value.dtype == (torch.bfloat16 if name in (*MATRICES, "out") else torch.float32)
        assert_close(value, expected[name], PROJECTION_16_BIT[torch.bfloat16], name)


@pytest.mark.usefixtures("isa")
def test_strides() -> None:
    case = CASES["tiles"]
    tensors = {n: t.float() for n, t in case.tensors().items()}
    sites = tensors["x"].shape[1] // case.length
    grad = torch.randn(case.batch, case.latent, sites).transpose(1, 2)
    expected = results(kernel, case, tensors, grad.contiguous())
    wide = {n: t.repeat_interleave(2, -1)[..., ::2] for n, t in tensors.items()}
    wide["x"] = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
    for name, value in results(kernel, case, wide, grad).items():
        assert torch.equal(value, expected[name]), name


def test_threads() -> None:
    """Tiles are cut alike by any number of threads, as long as there is enough for each: the results are the same bits,
    gradients of parameters differ by the order of sums."""
    case = Projection((2, 24, 24), "xy", 16, 4, 2)
    tensors = {n: t.float() for n, t in case.tensors().items()}
    grad = torch.randn(1, 576, case.latent)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(kernel, case, tensors, grad))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, value in found[0].items():
            if name in ("out", "x"):
                assert torch.equal(value, other[name]), name
            else:
                assert_close(other[name], value.double(), OPERATION[torch.float32], name)


def test_border_refuses() -> None:
    module: Any = extensions.extension("_cpu")
    case = CASES["tiles"]
    tensors = {n: t.float() for n, t in case.tensors().items()}
    x, *parameters = tensors.values()
    out, numbers = torch.empty(2, 117, 3), (0, 3, 9, 13, 4, 1e-5, 1)

    def call(**changed: Tensor) -> None:
        given = tuple({**tensors, **changed}[name] for name in NAMES)
        module.triplane_project_forward(changed.get("x", x), given, changed.get("out", out), *numbers)

    call()
    with pytest.raises(ValueError, match="out has not the shape"):
        call(out=torch.empty(2, 116, 3))
    with pytest.raises(ValueError, match="qkv_weight has not the shape"):
        call(qkv_weight=torch.empty(2, 25, 16))
    with pytest.raises(ValueError, match="matrices must share a dtype"):
        call(up_weight=tensors["up_weight"].bfloat16())
    with pytest.raises(ValueError, match="must be float32"):
        call(token=tensors["token"].double())
    with pytest.raises(ValueError, match="must be contiguous"):
        call(down_weight=tensors["down_weight"].transpose(0, 1).contiguous().transpose(0, 1))
    assert len(parameters) == len(NAMES)
