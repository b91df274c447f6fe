"""Every operation: its gradient formula, its registration, torch.compile, and each backend that runs here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from backends.cuda import emulated
from comparison import assert_close
from instruction_sets import ISAS, using
from tolerances import ATTENTION_16_BIT, CONV_SUM, OPERATION
from torch import Tensor

from pvdm_fast import use_backend
from pvdm_fast.analysis.cases import ONE_TOKEN, SMALL, USUAL, Case, as_tuple, leaves, run_with_gradients
from pvdm_fast.analysis.recorder import OwnCalls
from pvdm_fast.backends import choice
from pvdm_fast.backends.choice import ATTENTION, KERNEL_DTYPES, OPERATIONS, SERVED
from pvdm_fast.backends.cuda import attention

everywhere = pytest.mark.parametrize("name", SMALL)
HALVES = KERNEL_DTYPES[1:]


@pytest.mark.parametrize("table", [SMALL, USUAL, ONE_TOKEN], ids=["small", "usual", "one token"])
def test_every_operation_has_cases(table: dict[str, Case]) -> None:
    assert {case.op for case in table.values()} == set(OPERATIONS)


@everywhere
def test_gradient_formula(name: str) -> None:
    """Finite differences in float64."""
    case = SMALL[name]
    inputs = leaves(case.inputs(torch.float64))
    assert torch.autograd.gradcheck(
        lambda *tensors: case.run(**dict(zip(inputs, tensors, strict=True))), tuple(inputs.values()), fast_mode=True
    )


def transposed(tensor: Tensor) -> Tensor:
    """The same values, with the memory of the first two axes swapped."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else tensor


def sliced(tensor: Tensor) -> Tensor:
    """The same values as a slice of a larger buffer, every second element of the last axis."""
    buffer = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
    buffer[..., ::2] = tensor
    return buffer[..., ::2]


CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")  # opcheck's own
FORMS = {"contiguous": lambda t: t, "transposed": transposed, "sliced": sliced}


# Tracing and differentiating takes 1.6 s an operation; the other forms are quick.
SLOW = {"contiguous": pytest.mark.slow}


@everywhere
@pytest.mark.parametrize("form", [pytest.param(form, marks=SLOW.get(form, ())) for form in FORMS])
def test_registration(name: str, form: str) -> None:
    """opcheck of the operation and its backward, as the public function calls them: schema, fake strides, autograd."""
    case = SMALL[name]
    change = FORMS[form]
    inputs = leaves({n: change(t) for n, t in case.inputs(torch.float32).items()})
    with OwnCalls() as recorder:
        results = as_tuple(case.run(**inputs))
        torch.autograd.grad(results, list(inputs.values()), [change(torch.randn_like(r)) for r in results])
    assert {call[0]._name for call in recorder.calls} == {f"pvdm_fast::{case.op}", f"pvdm_fast::{case.op}_backward"}
    # Strides matter to what is written and to the fakes. Whether it can be traced and differentiated is seen once.
    checks = CHECKS if form == "contiguous" else ("test_schema", "test_faketensor")
    for function, arguments in recorder.calls:
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        torch.library.opcheck(function, detached, test_utils=checks)
    forward, arguments = recorder.calls[0]
    differentiable = tuple(
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.requires_grad else a for a in arguments
    )
    torch.library.opcheck(forward, differentiable, test_utils=checks)


@everywhere
def test_compiles_to_one_graph(name: str) -> None:
    case = SMALL[name]
    inputs = case.inputs(torch.float32)
    expected = run_with_gradients(case, inputs, torch.float32)
    torch._dynamo.reset()
    compiled = Case(case.op, case.shapes, torch.compile(case.run, fullgraph=True, backend="aot_eager"))
    for what, tensor in run_with_gradients(compiled, inputs, torch.float32).items():
        assert_close(tensor, expected[what], OPERATION[torch.float32], what)


TENSOR_CORES = f"{emulated.BACKEND} by tensor cores"
WAYS = [*(f"cpu {isa}" for isa in ISAS or ["none"]), "triton", "cuda", emulated.BACKEND, TENSOR_CORES]


def forms_of(way: str, dtype: torch.dtype) -> list[str]:
    """Interpreted, an element's address is computed alike in every dtype, and a case takes half a second."""
    return ["sliced"] if way == "triton" and dtype != torch.float32 else list(FORMS)


def served() -> list[Any]:
    """(case, way, dtype, form): each case on every backend with kernels for its operation, on the CPU in every
    instruction set.

    16-bit attention has two families of CUDA kernels.
    """
    return [
        pytest.param(name, way, dtype, form, id=f"{form}-{name}-{way}-{str(dtype).removeprefix('torch.')}")
        for name, case in SMALL.items()
        for way in WAYS
        for dtype in (HALVES if way == TENSOR_CORES else KERNEL_DTYPES)
        for form in forms_of(way, dtype)
        if case.op in (ATTENTION if way == TENSOR_CORES else SERVED[way.partition(" ")[0].removesuffix("-emulated")])
    ]


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Makes one of `WAYS` possible, and gives its name."""
    backend, _, detail = request.param.partition(" ")
    if backend == emulated.BACKEND:
        module = request.getfixturevalue("emulated_device")
        with emulated.registered(module), pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "MATRIX_LENGTH", 1 if detail else 1 << 30)
            yield request.param
    elif reason := choice.unavailable(backend):
        pytest.skip(reason)
    else:
        with using(detail) if detail else nullcontext():
            yield request.param


def tolerance_of(op: str, what: str, dtype: torch.dtype, way: str) -> float:
    if way == TENSOR_CORES:
        return ATTENTION_16_BIT[dtype]
    return (CONV_SUM if op == "plane_conv" and "gradient" in what else OPERATION)[dtype]


@pytest.mark.parametrize(("name", "way", "dtype", "form"), served(), indirect=["way"])
def test_backend_equals_reference(name: str, way: str, dtype: torch.dtype, form: str) -> None:
    """Every backend, forward and every gradient, against the float64 reference on the same rounded inputs."""
    case, change, backend = SMALL[name], FORMS[form], way.partition(" ")[0]
    inputs = {n: change(t) for n, t in case.inputs(dtype).items()}
    with use_backend("reference"):
        expected = run_with_gradients(case, {n: t.double() for n, t in inputs.items()}, dtype)
    device = "cuda" if backend == "cuda" or (backend == "triton" and not choice.interpreting()) else "cpu"
    with use_backend(backend):
        actual = run_with_gradients(case, {n: t.to(device) for n, t in inputs.items()}, dtype, change)
        # Interpreted, a kernel's programs run one after the other, always in the same order: seen once is enough.
        if form == "contiguous" or way != "triton":
            again = run_with_gradients(case, {n: t.to(device) for n, t in inputs.items()}, dtype, change)
        else:
            again = actual
    for what, tensor in actual.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, again[what]), f"{what} differs on a second run"
        assert_close(tensor.cpu(), expected[what], tolerance_of(case.op, what, dtype, way), what)


@everywhere
def test_summed_gradient(name: str) -> None:
    """`.sum().backward()` gives gradients of stride 0. They must be read by their strides, and not written to."""
    case = SMALL[name]
    inputs = leaves(case.inputs(torch.float32))
    sum(r.sum() for r in as_tuple(case.run(**inputs))).backward()
    doubled = leaves(case.inputs(torch.float64))
    with use_backend("reference"):
        torch.autograd.backward(
            as_tuple(case.run(**doubled)), [torch.ones_like(r) for r in as_tuple(case.run(**doubled))]
        )
    for what, tensor in inputs.items():
        gradient, expected = tensor.grad, doubled[what].grad
        assert gradient is not None and expected is not None
        scale = expected.norm() + expected.numel() ** 0.5  # some of these gradients are zero except for rounding
        assert torch.isfinite(gradient).all() and (gradient - expected).norm() < 1e-5 * scale, what


@everywhere
def test_inputs_are_left_alone(name: str) -> None:
    case = SMALL[name]
    inputs = case.inputs(torch.float32)
    before = {n: t.clone() for n, t in inputs.items()}
    run_with_gradients(case, inputs, torch.float32)
    assert all(torch.equal(inputs[n], before[n]) for n in inputs)
