"""triplane_project as a registered operation: derivatives of every kind, opcheck, what it refuses, who serves it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import assert_close
from tolerances import OPERATION
from torch import Tensor
from torch.autograd import forward_ad

from pvdm_fast import TriplaneLayout, ops, use_backend
from pvdm_fast.analysis.projections import Projection
from pvdm_fast.analysis.recorder import OwnCalls
from pvdm_fast.backends import choice
from pvdm_fast.errors import BackendError
from pvdm_fast.ops.registry import FLOPS

CASES = {
    "yt": Projection((2, 3, 2), "yt", 8, 2, 2, hidden=6, latent=2),
    "xt": Projection((1, 2, 3), "xt", 8, 1, 4, hidden=7, depth=3, latent=3, batch=2),
    "one layer": Projection((2, 2, 2), "xy", 8, 4, 1, hidden=6, depth=1, latent=2),
}
EVERY = pytest.mark.parametrize("name", CASES)


def leaves(case: Projection, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [t.to(dtype).requires_grad_() for t in case.tensors().values()]


@EVERY
def test_gradients(name: str) -> None:
    """Finite differences in float64, of the operation and of its backward pass."""
    case = CASES[name]
    assert torch.autograd.gradcheck(case.run, leaves(case), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(case.run, leaves(case), fast_mode=True)


@EVERY
def test_registration(name: str) -> None:
    case = CASES[name]
    inputs = leaves(case, torch.float32)
    with OwnCalls() as recorder:
        out = case.run(*inputs)
        torch.autograd.grad(out, inputs, torch.randn_like(out))
    own = [c for c in recorder.calls if "triplane_project" in c[0]._name]
    assert [c[0]._name for c in own] == ["pvdm_fast::triplane_project", "pvdm_fast::triplane_project_backward"]
    for function, arguments in own:
        torch.library.opcheck(function, tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments))
    forward, backward = (
        FLOPS["triplane_project"](d, *c[1][:-1]) for d, c in zip(("forward", "backward"), own, strict=True)
    )
    assert backward == 2 * forward > 0


@pytest.mark.skipif(choice.unavailable("cpu") is not None, reason="the CPU extension is not built")
def test_derivatives_of_the_kernel() -> None:
    """Double backward and jvp on the CPU backend are those of the float64 reference."""
    case = CASES["xt"]
    single, exact = leaves(case, torch.float32), leaves(case)

    def second(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(case.run(*inputs).square().sum(), inputs[:1], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), inputs)

    def tangent(inputs: list[Tensor]) -> Tensor:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t.detach(), torch.ones_like(t)) for t in inputs]
            return forward_ad.unpack_dual(case.run(*duals)).tangent

    with use_backend("cpu"):
        actual = (*second(single), tangent(single))
    for a, e in zip(actual, (*second(exact), tangent(exact)), strict=True):
        assert_close(a, e, 10 * OPERATION[torch.float32])  # a second derivative: sums of differences


def refused(match: str, **changed: Any) -> None:
    case = CASES["yt"]
    tensors: dict[str, Any] = {**case.tensors(), **{n: t for n, t in changed.items() if n != "rest"}}
    rest: dict[str, Any] = {"plane": "yt", "heads": 2, "layout": (2, 3, 2), **changed.get("rest", {})}
    with pytest.raises(ValueError, match=match):
        torch.ops.pvdm_fast.triplane_project(
            *tensors.values(), rest["plane"], *rest["layout"], rest["heads"], 1e-5, "auto"
        )


def test_refuses() -> None:
    x = CASES["yt"].tensors()["x"]
    refused("plane must be one of xy, yt, xt, not 'zz'", rest={"plane": "zz"})
    refused("3 heads must divide the attention's inner width 4", rest={"heads": 3})
    refused(r"x must be \(B, 16, C\)", rest={"layout": (2, 4, 2)})
    refused(r"positions must be \(4, 8\), not \(3, 8\)", positions=torch.zeros(3, 8).double())
    refused(r"qkv_weight must be \(2, 12, 8\)", qkv_weight=torch.zeros(2, 4, 8).double())
    refused("down_weight must be torch.float64", down_weight=torch.zeros(2, 8, 6))
    refused("both float64, or neither", x=x.float())
    refused("none empty", up_weight=torch.zeros(0, 6, 8).double())
    refused("x must be", x=x[:0])
    with pytest.raises(ValueError, match="at least one layer"):
        ops.triplane_project(x, TriplaneLayout(2, 3, 2), "yt", x[0, 0], x[0, :4], [], x[0, :2], x[0, 0, :2], heads=1)


def fuses(x: Tensor, weight: Tensor) -> bool:
    return ops.fuses_projection(x, weight, TriplaneLayout(2, 3, 2), "xy")


def test_who_serves_it() -> None:
    assert [b for b in choice.BACKENDS if "triplane_project" in choice.SERVED[b]] == [*choice.BACKENDS]
    case = CASES["yt"]
    with pytest.raises(BackendError, match="float64"), use_backend("cpu"):
        case.run(*leaves(case))
    x = torch.zeros(1, 12, 8)
    assert not fuses(x.to("meta"), x) and not fuses(x.double(), x.double())
    if choice.unavailable("cpu") is None:
        assert fuses(x, x)
    with use_backend("reference"):
        assert not fuses(x, x)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_is_not_here_says_so(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """With a gradient too, and without importing what it needs."""
    monkeypatch.setattr(choice, "_requested", backend)  # as by the environment variable
    monkeypatch.setattr(choice, "unavailable", lambda name: f"{name} is not here.")
    monkeypatch.setattr(choice, "implementation", lambda *_: pytest.fail("it was looked at"))
    with pytest.raises(BackendError, match=f"{backend} is not here"):
        CASES["yt"].run(*leaves(CASES["yt"], torch.float32))


@pytest.mark.skipif(choice.unavailable("cpu") is not None, reason="the CPU extension is not built")
def test_where_the_layers_are_quicker() -> None:
    """Many channels in bfloat16 with a gradient, and only these."""
    narrow, wide = torch.zeros(1, 12, 128), torch.zeros(1, 12, 136)
    trained = torch.zeros(8, 8, requires_grad=True)
    assert fuses(narrow.bfloat16(), trained.bfloat16())
    assert fuses(wide, trained)
    assert fuses(wide.half(), trained.half())
    assert fuses(wide.bfloat16(), torch.zeros(8, 8).bfloat16())
    assert not fuses(wide.bfloat16(), trained.bfloat16())
    assert not fuses(wide.bfloat16().requires_grad_(), torch.zeros(8, 8).bfloat16())
    with torch.no_grad():
        assert fuses(wide.bfloat16(), trained.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not fuses(wide, trained)
