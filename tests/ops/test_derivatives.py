"""Derivatives of every operation beyond the first gradient: forward mode, double backward, `torch.func`, `vmap`.

The float64 formulas are checked against finite differences. Then every backend is checked against them in float32.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparison import assert_close, relative_error
from tolerances import FLOAT32_ERROR
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from pvdm_fast import ops, use_backend
from pvdm_fast.analysis.cases import SMALL, Case, as_tuple, leaves, rotation
from pvdm_fast.backends import choice
from pvdm_fast.backends.choice import SERVED
from pvdm_fast.ops import derivatives

everywhere = pytest.mark.parametrize("name", SMALL)
BACKENDS = [name for name in choice.BACKENDS if name != "cuda"]
FIRST = {case.op: name for name, case in reversed(SMALL.items())}
# Beyond the first gradient all backends go through the reference. Triton's is interpreted, so it has one case of each.
on_backends = pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for name, case in SMALL.items()
        for backend in BACKENDS
        if case.op in SERVED[backend] and (backend != "triton" or name == FIRST[case.op])
    ],
)

on_a_cpu = pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name, case in SMALL.items() for backend in ("reference", "cpu") if case.op in SERVED[backend]],
)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """PyTorch warns if it maps over an operation without a rule, or drops what it can't differentiate."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # from PyTorch's own rules for forward mode, which torch.jit.script loads
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        yield


def loss_of(case: Case) -> Callable[..., Tensor]:
    """A scalar of an operation's results. None of its derivatives is constant."""

    def loss(*tensors: Tensor) -> Tensor:
        results = as_tuple(case.run(**dict(zip(case.shapes, tensors, strict=True))))
        weights = [torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape) for r in results]
        return sum(((w * r).sin() + w * r.square()).sum() for w, r in zip(weights, results, strict=True))  # type: ignore[return-value]

    return loss


def draws(case: Case, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    return tuple(case.inputs(dtype, seed).values())


@everywhere
def test_formulas_against_finite_differences(name: str) -> None:
    case = SMALL[name]
    inputs = tuple(leaves(case.inputs(torch.float64)).values())

    def run(*tensors: Tensor) -> Any:
        return case.run(**dict(zip(case.shapes, tensors, strict=True)))

    assert gradcheck(run, inputs, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, inputs, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True)


def found(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Derivatives of all kinds at one point, by name."""
    inputs, change, seed = draws(case, torch.float32, 0), draws(case, torch.float32, 1), draws(case, torch.float32, 2)
    inputs, change, seed = (tuple(t.to(dtype) for t in tensors) for tensors in (inputs, change, seed))
    loss = loss_of(case)
    everything = tuple(range(len(inputs)))

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(case.run(**dict(zip(case.shapes, tensors, strict=True))))

    def directional(*tensors: Tensor) -> Tensor:
        return sum((g * c).sum() for g, c in zip(grad(loss, everything)(*tensors), seed, strict=True))  # type: ignore[return-value]

    results: dict[str, Any] = {}
    results["value of jvp"], results["jvp"] = jvp(run, inputs, change)
    outputs, pull = vjp(run, *inputs)
    results["vjp"] = pull(tuple(torch.cos(o) for o in outputs))
    results["reverse over reverse"] = grad(directional, everything)(*inputs)
    results["forward over reverse"] = jvp(grad(loss, everything), inputs, change)[1]
    results["reverse over forward"] = grad(lambda *t: jvp(loss, t, change)[1], everything)(*inputs)
    results["forward over forward"] = jvp(lambda *t: jvp(loss, t, change)[1], inputs, change)[1]
    required = tuple(t.clone().requires_grad_() for t in inputs)
    first = torch.autograd.grad(loss(*required), required, create_graph=True)
    results["gradient penalty"] = torch.autograd.grad(sum(g.square().sum() for g in first), required)
    with forward_ad.dual_level():
        plain = [forward_ad.make_dual(t, c) for t, c in zip(inputs, change, strict=True)]
        results["dual"] = [forward_ad.unpack_dual(r).tangent for r in run(*plain)]
        duals = [forward_ad.make_dual(t, c) for t, c in zip(required, change, strict=True)]
        tangents = [forward_ad.unpack_dual(r).tangent for r in run(*duals)]
        squares = sum(t.square().sum() for t in tangents)
        if squares.requires_grad:  # not if the operation is linear in all inputs
            results["dual, then backward"] = torch.autograd.grad(squares, required, materialize_grads=True)
    flat = {}
    for what, tensors in results.items():
        for index, tensor in enumerate(tensors if isinstance(tensors, (tuple, list)) else (tensors,)):
            flat[f"{what} {index}"] = tensor.detach()
    return flat


@on_backends
def test_every_derivative_on_every_backend(name: str, backend: str) -> None:
    """In float32, within 1e-5 of the float64 formulas."""
    if reason := choice.unavailable(backend):
        pytest.skip(reason)
    case = SMALL[name]
    with use_backend("reference"):
        expected = found(case, torch.float64)
    with use_backend(backend):
        actual = found(case, torch.float32)
    for what, exact in expected.items():
        # Where terms cancel, the largest value of the same kind scales the error: some are 0 except for rounding.
        kind = what.rpartition(" ")[0]
        largest = max(float(t.norm()) for other, t in expected.items() if other.rpartition(" ")[0] == kind)
        assert actual[what].shape == exact.shape
        error = float((actual[what].double() - exact).norm())
        assert error <= FLOAT32_ERROR * max(float(exact.norm()), 0.1 * largest), f"{what}: {error:.1e}"


@on_a_cpu
def test_vmap(name: str, backend: str) -> None:
    """Over all inputs, each one alone, any axis, and twice. The results equal a loop's."""
    case = SMALL[name]
    names = list(case.shapes)
    many = [case.inputs(torch.float32, seed) for seed in range(3)]
    run = lambda *tensors: as_tuple(case.run(**dict(zip(names, tensors, strict=True))))  # noqa: E731

    def check(dims: list[int | None], what: str) -> None:
        inputs = [
            many[0][n] if d is None else torch.stack([m[n] for m in many], dim=d)
            for n, d in zip(names, dims, strict=True)
        ]
        expected = [run(*(many[0][n] if d is None else m[n] for n, d in zip(names, dims, strict=True))) for m in many]
        for index, result in enumerate(vmap(run, in_dims=tuple(dims))(*inputs)):
            # strides change the order of sums
            assert_close(result, torch.stack([e[index] for e in expected]), 1e-6, what)

    with use_backend(backend):
        check([0] * len(names), "all")
        check([-1] * len(names), "all, last axis")
        for index, victim in enumerate(names):
            check([1 if i == index and many[0][victim].dim() > 1 else 0 if i == index else None
                   for i in range(len(names))], victim)  # fmt: skip
        inputs = [torch.stack([m[n] for m in many]) for n in names]
        twice = vmap(vmap(run, in_dims=(0,) * len(names)), in_dims=(0,) * len(names))
        for once, result in zip(vmap(run)(*inputs), twice(*(torch.stack((t, t)) for t in inputs)), strict=True):
            assert torch.equal(result, torch.stack((once, once)))


@on_a_cpu
def test_gradients_of_each_sample(name: str, backend: str) -> None:
    """vmap of grad over the inputs with a batch, with shared weights. The results equal a loop's."""
    case = SMALL[name]
    inputs = case.inputs(torch.float32)
    batched = [n for n, shape in case.shapes.items() if shape[0] == 2 and n not in ("weight", "positions")]
    dims = tuple(0 if n in batched else None for n in inputs)
    everything = tuple(range(len(inputs)))

    def loss(*tensors: Tensor) -> Tensor:
        one = [t[None] if d == 0 else t for t, d in zip(tensors, dims, strict=True)]
        return loss_of(case)(*one)

    with use_backend(backend):
        actual = vmap(grad(loss, everything), in_dims=dims)(*inputs.values())
        expected = [
            grad(loss, everything)(*(t[i] if d == 0 else t for t, d in zip(inputs.values(), dims, strict=True)))
            for i in range(2)
        ]
    for index, gradients in enumerate(actual):
        assert_close(gradients, torch.stack([e[index] for e in expected]), FLOAT32_ERROR, name)


@pytest.mark.parametrize("name", ["geglu", "segment_attention-planes", "plane_conv", "add_layer_norm"])
def test_jacobians_and_hessians(name: str) -> None:
    """For the first numbers of an input, by every composition."""
    case = SMALL[name]
    inputs = draws(case, torch.float64, 0)

    def of_few(values: Tensor) -> Tensor:
        first = torch.cat((values, inputs[0].flatten()[len(values) :])).view(inputs[0].shape)
        return loss_of(case)(first, *inputs[1:])

    few = inputs[0].flatten()[:4].clone()
    expected = torch.autograd.functional.hessian(of_few, few)
    quotients = [
        (grad(of_few)(few + 1e-5 * e) - grad(of_few)(few - 1e-5 * e)) / 2e-5 for e in torch.eye(4, dtype=few.dtype)
    ]
    assert_close(torch.stack(quotients), expected, 1e-6)
    for how in (hessian, *(lambda f, a=a, b=b: a(b(f)) for a in (jacfwd, jacrev) for b in (jacfwd, jacrev))):
        assert_close(how(of_few)(few), expected, 1e-10)


def test_tables_of_the_rotation() -> None:
    """A tangent of the tables is computed. A gradient is refused, not silently left out."""
    qkv = torch.randn(1, 3, 2, 2, 3, 2, 8, dtype=torch.float64)
    sin, cos = (t.double() for t in rotation(3, 8))
    run = lambda s: ops.axial_attention(qkv, "time", (s, cos))  # noqa: E731
    change, step = torch.randn_like(sin), 1e-6
    quotient = (run(sin + step * change) - run(sin - step * change)) / (2 * step)
    assert_close(jvp(run, (sin,), (change,))[1], quotient, 1e-7)
    with pytest.raises(ValueError, match=r"^axial_attention: rotation tables have no gradient"):
        ops.axial_attention(qkv, "time", (sin.requires_grad_(), cos))


def test_what_goes_through_the_reference_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    derivatives.say.cache_clear()
    x = torch.randn(2, 8)
    with caplog.at_level(logging.INFO, logger="pvdm_fast"):
        for _ in range(3):
            jvp(ops.geglu, (x,), (x,))
    lines = [r.getMessage() for r in caplog.records if "reference" in r.getMessage()]
    assert lines == ["geglu: its forward-mode derivative through the reference, in PyTorch's own operations"]


@everywhere
def test_derivatives_stay_outside_autocast(name: str) -> None:
    """Their dtypes are those of the operation's inputs. The public function does the casts."""
    case = SMALL[name]
    inputs, change = draws(case, torch.float32, 0), draws(case, torch.float32, 1)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(case.run(**dict(zip(case.shapes, tensors, strict=True))))

    with torch.autocast("cpu", torch.bfloat16):
        results, tangents = jvp(run, inputs, change)
    rounded = [r.dtype for r in results]
    expected, exact = jvp(run, tuple(t.double() for t in inputs), tuple(t.double() for t in change))
    for result, tangent, e, d, dtype in zip(results, tangents, expected, exact, rounded, strict=True):
        assert tangent.dtype == dtype
        bound = 2e-2 if dtype == torch.bfloat16 else FLOAT32_ERROR
        assert relative_error(result, e) < bound and relative_error(tangent, d) < bound
