"""The CPU kernels in every instruction set of this machine, against the float64 reference."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_close, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, poisoned_empty, transposed
from instruction_sets import ISAS
from tolerances import OPERATION
from torch import Tensor

from pvdm_fast.backends import extensions
from pvdm_fast.backends.cpu import plane_norm, triplane_expand
from pvdm_fast.backends.reference import plane_norm as norm_reference
from pvdm_fast.backends.reference import triplane_expand as expand_reference
from pvdm_fast.layout import PlaneLayout, TriplaneLayout

pytestmark = pytest.mark.skipif(extensions.availability("cpu") is not None, reason=str(extensions.availability("cpu")))
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": transposed,
    "channels first": lambda t: t.mT.contiguous().mT,
    "stride 0 tokens": lambda t: t[:, :1].expand_as(t),
    "all stride 0": lambda t: t[:1, :1, :1].expand_as(t),
}


def wide(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.double() for t in tensors)


def check_expand(planes: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, sizes: tuple[int, int, int]) -> Any:
    """Forward and backward against the reference. Returns all results."""
    out = triplane_expand.forward(planes, weight, bias, *sizes)
    assert_close(out, expand_reference.forward(*wide(planes, weight, bias), *sizes), OPERATION[out.dtype], "output")
    actual = triplane_expand.backward(grad, planes, weight, *sizes)
    expected = expand_reference.backward(*wide(grad, planes, weight), *sizes)
    for name, a, e in zip(("planes", "weight", "bias"), actual, expected, strict=True):
        assert_close(a, e, OPERATION[a.dtype], f"gradient of {name}")
    return out, *actual


def expand_inputs(sizes: tuple[int, int, int], channels: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    tokens, lattice = TriplaneLayout(*sizes).num_tokens, sizes[0] * sizes[1] * sizes[2]
    planes, grad = torch.randn(2, tokens, depth).to(dtype), torch.randn(2, lattice, channels).to(dtype)
    return planes, torch.randn(3, channels, depth), torch.randn(3, channels), grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 21, 64, 80])
def test_expand(isa: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, channels: int) -> None:
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    inputs = expand_inputs((3, 5, 7), channels, 4, dtype)
    first, second = (check_expand(*inputs, (3, 5, 7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_expand_strides(isa: str, form: str) -> None:
    planes, weight, bias, grad = expand_inputs((3, 5, 7), 24, 4, torch.float32)
    check_expand(FORMS[form](planes), FORMS[form](weight), bias, FORMS[form](grad), (3, 5, 7))


def check_norm(x: Tensor, parameters: Any, grad: Tensor, planes: list[int], groups: int, **options: Any) -> Any:
    activation, resample = options.get("activation", True), options.get("resample", 0)
    forward_options, options_ = (planes, groups, 1e-5, activation, resample), (planes, groups, activation, resample)
    y, mean, rstd = plane_norm.forward(x, *parameters, *forward_options)
    expected = norm_reference.forward(*wide(x, *parameters), *forward_options)
    for name, a, e in zip(("output", "mean", "1 / std"), (y, mean, rstd), expected, strict=True):
        assert_close(a, e, OPERATION[a.dtype], name)
    actual = plane_norm.backward(grad, x, *parameters, mean, rstd, *options_)
    gradients = norm_reference.backward(*wide(grad, x, *parameters, mean, rstd), *options_)
    for name, a, e in zip(("x", "weight", "bias", "scale_shift"), actual, gradients, strict=True):
        assert_close(a, e, OPERATION[a.dtype], f"gradient of {name}")
    return y, mean, rstd, *actual


def norm_inputs(
    layout: PlaneLayout, channels: int, dtype: torch.dtype, resample: int = 0, modulated: bool = True
) -> Any:
    """x, (weight, bias, scale_shift) and the incoming gradient."""
    tokens = layout.num_tokens
    written = tokens * 4 if resample > 0 else tokens // 4 if resample < 0 else tokens
    parameters = torch.randn(channels), torch.randn(channels), torch.randn(2, 2 * channels) if modulated else None
    return (2 * torch.randn(2, tokens, channels) + 3).to(dtype), parameters, torch.randn(2, written, channels).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resample", [-1, 0, 1])
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_norm(
    isa: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, resample: int, activation: bool, modulated: bool
) -> None:
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    layout = TriplaneLayout(4, 6, 14) if resample < 0 else TriplaneLayout(3, 5, 7)
    x, parameters, grad = norm_inputs(layout, 20, dtype, resample, modulated)
    options = {"activation": activation, "resample": resample}
    first, second = (check_norm(x, parameters, grad, layout.sizes, 4, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_norm_strides(isa: str, form: str) -> None:
    layout = TriplaneLayout(3, 5, 7)
    x, parameters, grad = norm_inputs(layout, 24, torch.float32)
    check_norm(transposed(x) if "0" in form else FORMS[form](x), parameters, FORMS[form](grad), layout.sizes, 8)


def test_norm_of_many_tokens(isa: str) -> None:
    """Several chunks per plane, the last one partial. And one plane of all tokens (joint statistics)."""
    for layout in (TriplaneLayout(9, 17, 15), PlaneLayout(((543, 1),))):
        check_norm(*norm_inputs(layout, 32, torch.float32), layout.sizes, 32)


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_norm_of_a_large_mean(isa: str, mean: float) -> None:
    """A mean far above the deviation costs no digits. Inputs are exact, so the float64 reference has the same."""
    x = (torch.randn(1, 700, 16) + mean).float()
    ones, options = torch.ones(16), ([700, 1], 4, 1e-5, False, 0)
    actual = plane_norm.forward(x, ones, torch.zeros(16), None, *options)[0]
    expected = norm_reference.forward(*wide(x, ones, torch.zeros(16)), None, *options)[0]
    assert torch.isfinite(actual).all()
    assert relative_error(actual, expected) < 1e-5


def test_norm_of_a_constant(isa: str) -> None:
    """No variance: the result is the bias, not NaN."""
    x, bias = torch.full((1, 300, 8), 7.3), torch.randn(8)
    y = plane_norm.forward(x, torch.ones(8), bias, None, [300, 1], 2, 1e-5, False, 0)[0]
    assert torch.allclose(y, bias.expand_as(y))


def test_nan_is_passed_on(isa: str) -> None:
    """NaN in, NaN out: a diverged model must not look healthy."""
    x = torch.randn(1, 50, 8)
    x[0, 3, 1] = float("nan")
    y = plane_norm.forward(x, torch.ones(8), torch.zeros(8), None, [50, 1], 2, 1e-5, True, 0)[0]
    assert torch.isnan(y[..., :4]).all()
    assert torch.isfinite(y[..., 4:]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_torchs(isa: str, dtype: torch.dtype) -> None:
    """Every 16-bit value is read and written as by PyTorch: special values, subnormals, ties, overflow."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = torch.cat((every, torch.nextafter(every.float(), torch.tensor(torch.inf)).to(dtype)))
    zeros, bias = torch.zeros(3, 1, 1), torch.zeros(3, 1)
    planes = torch.zeros(1, 2 * values.numel() + 1, 1, dtype=dtype)  # T = 1, H = 1: xy, yt, xt rows of W, W and 1
    planes[0, : values.numel(), 0] = values
    one = zeros.clone()
    one[0] = 1
    out = triplane_expand.forward(planes, one, bias, 1, 1, values.numel())[0, :, 0]
    finite = values.isfinite()
    assert torch.equal(out[finite].float(), values[finite].float())
    assert torch.equal(out.isnan(), values.isnan())
    scaled = triplane_expand.forward(planes, one * 1.0371, bias, 1, 1, values.numel())[0, :, 0]
    expected = (values.float() * torch.tensor(1.0371)).to(dtype)
    assert torch.equal(scaled[finite].float(), expected[finite].float())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_bits(isa: str, threads: int) -> None:
    layout = TriplaneLayout(3, 12, 20)
    x, parameters, grad = norm_inputs(layout, 48, torch.float32)
    planes, weight, bias, lattice = expand_inputs((3, 12, 20), 48, 4, torch.float32)
    before = torch.get_num_threads()

    def run(count: int) -> list[Tensor]:
        torch.set_num_threads(count)
        y, mean, rstd = plane_norm.forward(x, *parameters, layout.sizes, 8, 1e-5, True, 0)
        gradients = plane_norm.backward(grad, x, *parameters, mean, rstd, layout.sizes, 8, True, 0)
        sums = torch.empty(2, layout.num_tokens, 48)
        extensions.extension("_cpu").triplane_expand_sums(lattice, sums, 3, 12, 20, count)
        return [y, *gradients, sums, triplane_expand.forward(planes, weight, bias, 3, 12, 20)]

    try:
        assert all(torch.equal(a, b) for a, b in zip(run(1), run(threads), strict=True))
    finally:
        torch.set_num_threads(before)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from(DTYPES),
)
def test_any_planes(planes: list[tuple[int, int]], groups: int, width: int, dtype: torch.dtype) -> None:
    layout = PlaneLayout(tuple(planes))
    x = torch.randn(2, layout.num_tokens, groups * width).to(dtype)
    options = torch.randn(groups * width), torch.randn(groups * width), None, layout.sizes, groups, 1e-2, True, 0
    actual = plane_norm.forward(x, *options)[0]
    expected = norm_reference.forward(x.double(), *options)[0]
    assert torch.isfinite(actual).all()
    assert (actual.double() - expected).norm() <= OPERATION[dtype] * (expected.norm() + expected.numel() ** 0.5)


def test_arguments_are_checked() -> None:
    planes, weight, bias, _ = expand_inputs((2, 3, 4), 8, 4, torch.float32)
    with pytest.raises(ValueError, match="planes has not the shape"):
        triplane_expand.forward(planes[:, 1:], weight, bias, 2, 3, 4)
    with pytest.raises(ValueError, match="multiple of the groups"):
        plane_norm.forward(planes, bias[0], bias[0], None, [26, 1], 3, 1e-5, False, 0)
    with pytest.raises(ValueError, match="even sizes"):
        plane_norm.forward(planes, bias[0, :4], bias[0, :4], None, [13, 2], 2, 1e-5, False, -1)
    with pytest.raises(TypeError, match="float32, bfloat16"):
        triplane_expand.forward(planes.int(), weight, bias, 2, 3, 4)
    with pytest.raises(ValueError, match="at most 32 bits"):
        triplane_expand.forward(planes.double(), weight, bias, 2, 3, 4)


def _norm_of(x: Tensor) -> float:
    """Only our kernel may use threads here: PyTorch's own parallel operations hang in a forked child."""
    y = plane_norm.forward(x, x[0, 0], x[0, 0], None, [4096, 1], 8, 1e-5, False, 0)[0]
    return float(y.numpy().sum())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: run on Linux or macOS")
def test_works_in_a_forked_child() -> None:
    """OpenMP's threads don't survive a fork, and data loaders fork after the parent has used them."""
    x = torch.ones(1, 4096, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # also in the child: if it uses one thread, that is the kernel's choice
    try:
        assert _norm_of(x) == x.numel()
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=lambda: queue.put(_norm_of(x)), daemon=True)
        child.start()
        child.join(30)
    finally:
        torch.set_num_threads(before)
    alive = child.is_alive()
    child.kill()
    assert not alive, "the child hangs"
    assert child.exitcode == 0
    assert queue.get() == x.numel()


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_isa_from_the_environment() -> None:
    code = "from pvdm_fast.backends import extensions as e; print(e.availability('cpu') or e.extension('_cpu').isa())"
    assert run_python(code, PVDM_FAST_CPU_ISA="plain").stdout.strip() == "plain"
    assert "Unknown instruction set 'sse9'" in run_python(code, PVDM_FAST_CPU_ISA="sse9").stdout
    said = run_python(code, PVDM_FAST_CPU_ISA="amx").stdout.strip()
    assert said == "amx" if "amx" in ISAS else "asks for amx, which this CPU or its system does not have" in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: run on Linux")
def test_one_openmp_run_time() -> None:
    """The extension shares PyTorch's OpenMP, so that there is one pool of threads."""
    code = """
import torch
from pvdm_fast.backends import extensions
extensions.extension("_cpu")
names = {line.split()[-1] for line in open("/proc/self/maps")}
print(len([name for name in names if any(part in name for part in ("gomp", "libomp", "iomp"))]))
"""
    assert run_python(code).stdout.strip() == "1"
