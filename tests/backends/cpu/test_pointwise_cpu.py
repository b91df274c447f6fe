"""geglu, add_layer_norm and triplane_slice on the CPU: every instruction set, odd sizes, strides, mixed dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close, relative_error
from inputs import DTYPES, transposed
from tolerances import OPERATION
from torch import Tensor

from pvdm_fast import ops, use_backend
from pvdm_fast.backends import extensions
from pvdm_fast.backends.cpu import add_layer_norm, geglu, triplane_slice
from pvdm_fast.backends.reference import add_layer_norm as norm_reference
from pvdm_fast.backends.reference import geglu as geglu_reference
from pvdm_fast.backends.reference import triplane_slice as slice_reference
from pvdm_fast.layout import TriplaneLayout

pytestmark = pytest.mark.skipif(extensions.availability("cpu") is not None, reason=str(extensions.availability("cpu")))
CHANNELS = [1, 3, 5, 33, 256]
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transposed,
    "channels first": lambda t: t.mT.contiguous().mT,
    "stride 0 rows": lambda t: t[:, :1].expand_as(t),
    "all stride 0": lambda t: t[(slice(1),) * t.dim()].expand_as(t),
    "slice of wider rows": lambda t: torch.cat((t, torch.full_like(t, float("nan"))), -1)[..., : t.shape[-1]],
}
LAYOUT = TriplaneLayout(3, 5, 7)
PLANES = {"xy": 3, "yt": 5, "xt": 7}


def wide(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


def compare(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, OPERATION[a.dtype], f"{what}, result {index}")


def same_again(run: Callable[[], tuple[Tensor, ...]]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def check_geglu(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    results = geglu.forward(x), geglu.backward(grad, x)
    compare(results, (geglu_reference.forward(x.double()), geglu_reference.backward(*wide(grad, x))), "geglu")
    return results


@pytest.mark.usefixtures("poisoned", "isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", CHANNELS)
def test_geglu(dtype: torch.dtype, width: int) -> None:
    x, grad = torch.randn(3, 7, 2 * width).to(dtype), torch.randn(3, 7, width).to(dtype)
    same_again(lambda: check_geglu(x, grad))


@pytest.mark.usefixtures("isa")
def test_geglu_element_by_element() -> None:
    """Gates from -30 to 30: absolute or relative error within 1e-6, also for the derivative. The tail keeps its
    digits."""
    gate = torch.cat((torch.linspace(-30, 30, 60001), torch.tensor([-0.0, 1e-30, -1e-30, 3e4, -3e4])))
    x = torch.stack((torch.ones_like(gate), gate), -1)
    ones = torch.ones(len(gate), 1)
    results = geglu.forward(x), geglu.backward(ones, x)
    exact = geglu_reference.forward(x.double()), geglu_reference.backward(ones.double(), x.double())
    for a, e in zip(results, exact, strict=True):
        assert torch.isfinite(a).all()
        assert ((a - e).abs() <= 1e-6 * e.abs().clamp_min(1)).all()
    tail = (gate > -5) & (gate < -1)
    assert ((results[0] - exact[0]).abs()[tail] <= 2e-6 * exact[0].abs()[tail]).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", FORMS)
def test_geglu_strides(form: str) -> None:
    check_geglu(FORMS[form](torch.randn(3, 7, 20)), FORMS[form](torch.randn(3, 7, 10)))


def check_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, grads: Any) -> tuple[Tensor, ...]:
    """grads: of the norm and of the sum (or None)."""
    results = add_layer_norm.forward(x, residual, weight, bias, 1e-5)
    total = x if residual is None else results[0]
    # The norm is that of the stored sum, so the reference gets the stored sum.
    expected = norm_reference.forward(total.double(), None, weight.double(), bias.double(), 1e-5)
    compare(results[1:], expected[1:], "add_layer_norm")
    assert results[1].dtype == (x if residual is None else residual).dtype
    if residual is not None:
        assert_close(total, x.double() + residual.double(), OPERATION[residual.dtype], "sum")
    gradients = add_layer_norm.backward(*grads, total, weight, *results[2:])
    compare(gradients, norm_reference.backward(*wide(*grads, total, weight, *results[2:])), "gradients")
    return *results, *gradients


@pytest.mark.usefixtures("poisoned", "isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS[1:])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm(dtype: torch.dtype, channels: int, with_residual: bool) -> None:
    shape = (2, 70, channels)  # more rows than a chunk of sums
    x, residual, *grads = ((2 * torch.randn(shape) + 1).to(dtype) for _ in range(4))
    weight, bias = torch.randn(2, channels)
    extra = grads[1] if with_residual else None
    same_again(lambda: check_norm(x, residual if with_residual else None, weight, bias, (grads[0], extra)))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", FORMS)
def test_norm_strides(form: str) -> None:
    x, residual, *grads = (FORMS[form](torch.randn(2, 9, 12)) for _ in range(4))
    check_norm(x, residual, *torch.randn(2, 24)[:, ::2].unbind(), tuple(grads))


@pytest.mark.usefixtures("poisoned", "isa")
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", DTYPES)
def test_norm_of_mixed_dtypes(x_dtype: torch.dtype, residual_dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 9, 33).to(x_dtype), torch.randn(2, 9, 33).to(residual_dtype)
    grads = tuple(torch.randn(2, 9, 33).to(residual_dtype) for _ in range(2))
    check_norm(x, residual, *torch.randn(2, 33).to(x_dtype), grads)


def test_norm_of_mixed_dtypes_through_autograd() -> None:
    """As under autocast: the branch is bfloat16, the stream float32."""
    x, residual = torch.randn(2, 9, 16).bfloat16().requires_grad_(), torch.randn(2, 9, 16, requires_grad=True)
    with use_backend("cpu"):
        total, normed = ops.add_layer_norm(x, residual, torch.ones(16), torch.zeros(16))
    (total.square().sum() + normed.pow(3).sum()).backward()
    assert x.grad is not None and residual.grad is not None
    assert x.grad.dtype == torch.bfloat16 and residual.grad.dtype == total.dtype == torch.float32
    assert torch.equal(x.grad, residual.grad.bfloat16())


@pytest.mark.usefixtures("isa")
def test_norm_far_from_zero_and_of_constant_rows() -> None:
    x = torch.randn(4, 384) + torch.tensor([0.0, 10.0, 1000.0, -1000.0])[:, None]
    check_norm(x, None, torch.ones(384), torch.zeros(384), (torch.randn(4, 384), None))
    _, normed, mean, rstd = add_layer_norm.forward(torch.full((2, 7), 5.0), None, torch.ones(7), torch.ones(7), 1e-5)
    assert (normed == 1).all() and (mean == 5).all()
    assert torch.allclose(rstd, torch.full((2,), 1e-5**-0.5))


def check_slice(x: Tensor, grad: Tensor, token: Tensor, positions: Tensor, plane: str) -> tuple[Tensor, ...]:
    where = (plane, LAYOUT.time, LAYOUT.height, LAYOUT.width)
    out = triplane_slice.forward(x, token, positions, *where)
    compare((out,), (slice_reference.forward(*wide(x, token, positions), *where),), "sequences")
    gradients = triplane_slice.backward(grad, token, positions, *where)
    compare(gradients, slice_reference.backward(*wide(grad, token, positions), *where), "gradients")
    return out, *gradients


def slice_inputs(plane: str, channels: int, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, ...]:
    length, lattice = PLANES[plane], LAYOUT.num_lattice_tokens
    x, token, positions = (
        torch.randn(s).to(dtype) for s in ((batch, lattice, channels), channels, (length + 1, channels))
    )
    return x, torch.randn(batch, lattice // length, length + 1, channels).to(dtype), token, positions


@pytest.mark.usefixtures("poisoned", "isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("channels", [1, 5, 33])
def test_slice(dtype: torch.dtype, plane: str, channels: int) -> None:
    inputs = slice_inputs(plane, channels, dtype, batch=3)  # up to 105 sequences: more than a chunk of sums
    same_again(lambda: check_slice(*inputs, plane))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("form", FORMS)
def test_slice_strides(form: str, plane: str) -> None:
    x, grad, token, positions = slice_inputs(plane, 12, torch.float32)
    check_slice(FORMS[form](x), FORMS[form](grad), token[::2].repeat_interleave(2), positions.T.contiguous().T, plane)


def test_slice_of_mixed_dtypes() -> None:
    x, grad, token, positions = slice_inputs("yt", 12, torch.bfloat16)
    results = check_slice(x, grad, token.float(), positions.float(), "yt")
    assert [r.dtype for r in results] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


def test_threads_change_nothing() -> None:
    """Sums are cut into chunks by size alone, so 1 and 2 threads agree bit for bit."""
    x, grad, token, positions = slice_inputs("xy", 24, torch.float32, batch=3)
    rows, weights = torch.randn(300, 24), torch.randn(2, 24)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        norm = check_norm(rows, 2 * rows, *weights, (rows, rows))
        return [*norm, *check_slice(x, grad, token, positions, "xy"), *check_geglu(rows, rows[:, :12])]

    before = torch.get_num_threads()
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(1), run(2), strict=True))
    finally:
        torch.set_num_threads(before)


def test_bfloat16_errors_are_the_eager_ones() -> None:
    """Values and gradients have at most twice the error of PyTorch's own operations in bfloat16."""
    x, y = torch.randn(64, 96).bfloat16(), torch.randn(64, 96).bfloat16()
    weight, bias = (1 + 0.2 * torch.randn(96)).bfloat16(), torch.randn(96).bfloat16()

    def eager_geglu(t: Tensor) -> Tensor:
        value, gate = t.chunk(2, -1)
        return value * F.gelu(gate)

    cases: list[tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]] = [
        (ops.geglu, eager_geglu, (x,)),
        (
            lambda a, r, w, b: ops.add_layer_norm(a, r, w, b)[1],
            lambda a, r, w, b: F.layer_norm(a + r, (96,), w, b),
            (x, y, weight, bias),
        ),
    ]
    for ours, eager, inputs in cases:

        def run(function: Callable[..., Any], dtype: torch.dtype, inputs: Any = inputs) -> list[Tensor]:
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
            out = function(*leaves)
            return [out, *torch.autograd.grad(out, leaves, y[:, : out.shape[-1]].to(dtype))]

        with use_backend("cpu"):
            actual = run(ours, torch.bfloat16)
        for a, b, e in zip(actual, run(eager, torch.bfloat16), run(eager, torch.float64), strict=True):
            assert relative_error(a, e) <= 2 * relative_error(b, e)


def test_border_refuses() -> None:
    module: Any = extensions.extension("_cpu")
    rows, row = torch.randn(4, 6), torch.randn(6)
    with pytest.raises(ValueError, match="has not the shape"):
        module.geglu_forward(rows, torch.empty(4, 2), 1)
    with pytest.raises(ValueError, match="share a dtype"):
        module.geglu_backward(rows[:, :3].bfloat16(), rows, torch.empty(4, 6), 1)
    with pytest.raises(ValueError, match="go together"):
        module.add_layer_norm_forward((rows, rows, row, row, None, rows, torch.empty(4), torch.empty(4)), 1e-5, 1)
    with pytest.raises(ValueError, match="plane must be"):
        module.triplane_slice_forward(rows, row, rows, rows, 3, 1, 1, 1, 1)
