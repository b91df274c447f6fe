"""plane_norm in Triton's interpreter: whole planes and chunks, resampling, strides, dtypes, hard values, launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_close, relative_error
from inputs import DTYPES, transposed
from tolerances import OPERATION
from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.backends.reference import plane_norm as reference
from pvdm_fast.layout import PlaneLayout, TriplaneLayout

pytestmark = pytest.mark.skipif(
    not choice.interpreting(), reason="needs Triton's interpreter: run with TRITON_INTERPRET=1"
)
triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")

from backends.triton.interpreter import arriving  # noqa: E402

from pvdm_fast.kernels import arrivals, plane_norm, plane_norm_backward, plane_norm_tiles  # noqa: E402
from pvdm_fast.kernels.configs import ANY, assume  # noqa: E402
from pvdm_fast.kernels.launch import Config, watch  # noqa: E402

ODD, EVEN = TriplaneLayout(3, 5, 7), TriplaneLayout(2, 4, 6)
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transposed,
    "channels first": lambda t: t.mT.contiguous().mT,
    "stride 0 tokens": lambda t: t[:, :1].expand_as(t),
    "all stride 0": lambda t: t[:1, :1, :1].expand_as(t),
}


@pytest.fixture(params=["whole", "chunks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through the kernels. Chunks are so small that planes have several, and so do channels."""
    if request.param == "chunks":
        cut(monkeypatch)
    return request.param


def cut(monkeypatch: pytest.MonkeyPatch, most_chunks: int = 64, tile: int = 256) -> None:
    monkeypatch.setattr(plane_norm_tiles, "MOST_CHUNKS", most_chunks)
    for module in (plane_norm, plane_norm_backward):
        monkeypatch.setattr(module, "WHOLE_TILE", 0)
        monkeypatch.setattr(module.CHUNKS, "entries", {(ANY, ANY, ANY): Config({"TILE": tile, "CHANNELS": 8})})
        monkeypatch.setattr(module.CHUNKS, "asked", {})


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def draw(layout: PlaneLayout, channels: int, dtype: torch.dtype, resample: int = 0, modulated: bool = True) -> Any:
    """x, (weight, bias, scale_shift) and the incoming gradient."""
    tokens = layout.num_tokens
    written = tokens * 4 if resample > 0 else tokens // 4 if resample < 0 else tokens
    parameters = torch.randn(channels), torch.randn(channels), torch.randn(2, 2 * channels) if modulated else None
    return (2 * torch.randn(2, tokens, channels) + 3).to(dtype), parameters, torch.randn(2, written, channels).to(dtype)


def check(x: Tensor, parameters: Any, grad: Tensor, planes: list[int], groups: int, **options: Any) -> tuple[Any, ...]:
    """Forward and backward against the float64 reference. Returns all results."""
    activation, resample = options.get("activation", True), options.get("resample", 0)
    forward_options, options_ = (planes, groups, 1e-5, activation, resample), (planes, groups, activation, resample)
    y, mean, rstd = plane_norm.forward(x, *parameters, *forward_options)
    expected = reference.forward(*wide(x, *parameters), *forward_options)
    for name, a, e in zip(("output", "mean", "1 / std"), (y, mean, rstd), expected, strict=True):
        assert a.is_contiguous()
        assert_close(a, e, OPERATION[a.dtype], name)
    actual = plane_norm.backward(grad, x, *parameters, mean, rstd, *options_)
    gradients = reference.backward(*wide(grad, x, *parameters, mean, rstd), *options_)
    for name, a, e in zip(("x", "weight", "bias", "scale_shift"), actual, gradients, strict=True):
        assert_close(a, e, OPERATION[a.dtype], f"gradient of {name}")
    return y, mean, rstd, *actual


@pytest.mark.parametrize("resample", [-1, 0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(way: str, dtype: torch.dtype, resample: int) -> None:
    """Odd, unequal planes, and groups whose width isn't a power of two. Two runs give the same bits."""
    layout = EVEN if resample < 0 else ODD
    inputs = draw(layout, 12, dtype, resample)
    first, second = (check(*inputs, layout.sizes, 4, resample=resample) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("activation", [False, True])
def test_without_scale_and_shift(way: str, activation: bool) -> None:
    check(*draw(ODD, 15, torch.float32, modulated=False), ODD.sizes, 5, activation=activation)


@pytest.mark.parametrize(
    ("layout", "channels", "groups"),
    [
        (PlaneLayout(((71, 1),)), 16, 2),  # joint statistics
        (PlaneLayout(((1, 1), (1, 1), (2, 1))), 4, 1),
        (PlaneLayout(((1, 9), (4, 3), (1, 1), (3, 5), (2, 2))), 6, 6),
        (PlaneLayout(((20, 30),)), 3, 1),
    ],
)
def test_layouts(way: str, layout: PlaneLayout, channels: int, groups: int) -> None:
    if layout.num_tokens <= 4:  # gradients of a plane of one token are rounding noise around zero
        x, parameters, _ = draw(layout, channels, torch.float32)
        actual = plane_norm.forward(x, *parameters, layout.sizes, groups, 1e-5, True, 0)
        expected = reference.forward(*wide(x, *parameters), layout.sizes, groups, 1e-5, True, 0)
        assert all((a - e).norm() <= 1e-5 * e.norm() for a, e in zip(actual, expected, strict=True))
    else:
        check(*draw(layout, channels, torch.float32), layout.sizes, groups)


def test_chunks_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes so large that a chunk has more than one tile, and its last tiles may lie beyond the plane."""
    cut(monkeypatch, most_chunks=2, tile=128)
    check(*draw(PlaneLayout(((7, 9), (8, 4), (1, 3))), 8, torch.float32), [7, 9, 8, 4, 1, 3], 2)


@pytest.mark.parametrize("form", FORMS)
def test_strides(way: str, form: str) -> None:
    x, parameters, grad = draw(ODD, 12, torch.float32)
    before = x.clone(), grad.clone()
    check(transposed(x) if "0" in form else FORMS[form](x), parameters, FORMS[form](grad), ODD.sizes, 4)
    assert torch.equal(x, before[0]) and torch.equal(grad, before[1])
    sliced = torch.stack((x, x), -1)[..., 0]
    strided = [None if p is None else torch.stack((p, p), -1)[..., 0] for p in parameters]
    if form == "transposed":
        check(sliced, strided, grad, ODD.sizes, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_any_dtype(dtype: torch.dtype) -> None:
    x, parameters, grad = draw(ODD, 8, torch.float32)
    results = check(x, [p.to(dtype) for p in parameters], grad, ODD.sizes, 2)
    assert [r.dtype for r in results[3:]] == [torch.float32, dtype, dtype, dtype]


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_a_large_mean(way: str, mean: float) -> None:
    """A mean far above the deviation costs no digits. Inputs are exact, so the float64 reference has the same."""
    x = (torch.randn(1, 130, 16) + mean).float()
    ones, options = torch.ones(16), ([130, 1], 4, 1e-5, False, 0)
    actual = plane_norm.forward(x, ones, torch.zeros(16), None, *options)[0]
    expected = reference.forward(*wide(x, ones, torch.zeros(16)), None, *options)[0]
    assert torch.isfinite(actual).all()
    assert relative_error(actual, expected) < 1e-5


def test_a_constant(way: str) -> None:
    """No variance: the result is the bias, not NaN."""
    x, bias = torch.full((1, 70, 8), 7.3), torch.randn(8)
    y = plane_norm.forward(x, torch.ones(8), bias, None, [70, 1], 2, 1e-5, False, 0)[0]
    assert torch.allclose(y, bias.expand_as(y))


def test_nan_is_passed_on(way: str) -> None:
    """NaN in, NaN out: in its group, plane and batch element, and nowhere else."""
    x = torch.randn(2, 71, 8)
    x[0, 36, 1] = float("nan")  # in the second plane
    y = plane_norm.forward(x, torch.ones(8), torch.zeros(8), None, ODD.sizes, 2, 1e-5, True, 0)[0]
    hit = torch.zeros_like(y, dtype=torch.bool)
    hit[0, 35:56, :4] = True
    assert torch.equal(y.isnan(), hit)


def test_groups_that_share_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many planes, programs take several groups: here all four, of 3 channels padded to 4."""
    monkeypatch.setattr(plane_norm_tiles, "ENOUGH_PROGRAMS", 1)
    x, parameters, grad = draw(ODD, 15, torch.bfloat16)
    assert plane_norm_tiles.whole_blocks(x, ODD.sizes, 5, 1 << 15) == {"BLOCK_N": 64, "BLOCK_G": 4, "BLOCK_W": 4}
    check(x, parameters, grad, ODD.sizes, 5)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("groups", [5, 15])
def test_the_last_program_adds_as_another_kernel_does(
    monkeypatch: pytest.MonkeyPatch, groups: int, modulated: bool
) -> None:
    """The same bits, whichever program comes last; with one group a program, and with several."""
    monkeypatch.setattr(plane_norm_tiles, "ENOUGH_PROGRAMS", 1)
    x, parameters, grad = draw(ODD, 15, torch.float32, modulated=modulated)
    inputs = x.repeat(3, 1, 1)[:5], parameters, grad.repeat(3, 1, 1)[:5]
    if modulated:
        inputs[1][2].resize_(5, 30).normal_()
    first = check(*inputs, ODD.sizes, groups)
    with arriving(lambda count: range(count)[::-1]):
        second = check(*inputs, ODD.sizes, groups)
    counters = arrivals.counters_for(x, 1, 1)
    assert counters is not None and not counters.any()
    monkeypatch.setattr(plane_norm_backward, "MOST_BATCHES", 4)
    third = check(*inputs, ODD.sizes, groups)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


def launches(layout: PlaneLayout, channels: int, modulated: bool = True, architecture: str = "sm90") -> list[str]:
    """Names of the kernels that forward and backward launch in bfloat16, in order."""
    tokens = layout.num_tokens
    x, weight = torch.empty(1, tokens, channels, dtype=torch.bfloat16, device="meta"), torch.empty(channels)
    parameters = (
        weight.to("meta"),
        weight.to("meta"),
        torch.empty(1, 2 * channels, device="meta") if modulated else None,
    )
    names: list[str] = []
    with assume(architecture), watch(lambda kernel, *_: names.append(kernel.__name__)):
        _, mean, rstd = plane_norm.forward(x, *parameters, layout.sizes, 32, 1e-5, True, 0)
        plane_norm.backward(torch.empty_like(x), x, *parameters, mean, rstd, layout.sizes, 32, True, 0)
    return names


def test_launches() -> None:
    """One launch each way at every level of the base denoiser, except the widest blocks of the first. On AMD's GPUs
    another one adds."""
    few = ["plane_norm_forward_apply", "plane_norm_backward_dx"]
    for size, channels in ((32, 256), (32, 512), (16, 1024), (8, 2048), (4, 2048)):
        assert launches(TriplaneLayout(size // 2, size, size), channels) == few
    more = [*few, "plane_norm_backward_parameters"]
    assert launches(TriplaneLayout(16, 32, 32), 256, architecture="gfx942") == more
    chunks = ["plane_norm_forward_statistics", few[0], "plane_norm_backward_sums", *more[1:]]
    assert launches(TriplaneLayout(16, 32, 32), 2048) == chunks
