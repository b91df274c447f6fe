"""The gradient of `triplane_project` in Triton's interpreter, against the float64 reference, and in networks."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

import torch
from backends.triton.test_triplane_project import CASES, Network
from comparison import assert_close, relative_error
from tolerances import BFLOAT16_FACTOR, OPERATION, PROJECTION_16_BIT
from torch import Tensor

from pvdm_fast import TriplaneLayout, ops, use_backend
from pvdm_fast.analysis.projections import Projection
from pvdm_fast.backends.projection_layers import NAMES
from pvdm_fast.backends.reference import triplane_project as reference
from pvdm_fast.kernels import triplane_project, triplane_project_backward, triplane_project_weights
from pvdm_fast.kernels.configs import assume
from pvdm_fast.kernels.launch import Config, watch

PARAMETERS = ("x", *NAMES)


def incoming(case: Projection) -> Tensor:
    """A gradient of the latents, in float64."""
    batch, tokens, _ = case.case.shapes["x"]
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, tokens // case.length, case.latent, generator=generator, dtype=torch.float64)


def computed(case: Projection, grad: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = triplane_project.backward(grad, *tensors.values(), *case.arguments())
    for gradient, (name, tensor) in zip(found, tensors.items(), strict=True):
        assert gradient.dtype == tensor.dtype and gradient.is_contiguous(), name
    return dict(zip(PARAMETERS, found, strict=True))


def exact(case: Projection, grad: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = reference.backward(grad.double(), *(t.double() for t in tensors.values()), *case.arguments())
    return dict(zip(PARAMETERS, found, strict=True))


def check(case: Projection, grad: Tensor, tensors: dict[str, Tensor], tolerance: float) -> None:
    expected = exact(case, grad, tensors)
    for name, gradient in computed(case, grad, tensors).items():
        assert_close(gradient, expected[name], tolerance, name)


def single(case: Projection) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in case.tensors().items()}


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    case = CASES[name]
    tensors, grad = single(case), incoming(case).float()
    before = {n: t.clone() for n, t in {**tensors, "grad": grad}.items()}
    check(case, grad, tensors, OPERATION[torch.float32])
    assert all(torch.equal(t, before[n]) for n, t in {**tensors, "grad": grad}.items())


def blocks(monkeypatch: pytest.MonkeyPatch, rows: int, outputs: int, channels: int, programs: int) -> None:
    sizes = {"ROWS": rows, "OUTPUTS": outputs, "CHANNELS": channels, "WIDTH": 16, "PROGRAMS": programs}
    monkeypatch.setattr(triplane_project_backward, "BACKWARD", lambda *_: Config(sizes))
    weights = {"OUTPUTS": outputs, "INPUTS": channels, "ROWS": 32}
    monkeypatch.setattr(triplane_project_weights, "WEIGHTS", lambda *_: Config(weights))


@pytest.mark.parametrize("sizes", [(128, 32, 16), (64, 16, 32)])
def test_steps_that_sizes_do_not_divide(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int]) -> None:
    """Several steps of outputs, channels and rows with a rest, tiles of two blocks of attention, more tiles than
    programs."""
    blocks(monkeypatch, *sizes, programs=2)
    case = Projection((2, 5, 12), "yt", 40, 2, 20, hidden=50, latent=33)
    check(case, incoming(case).float(), single(case), OPERATION[torch.float32])


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pieces, the last one smaller, in memory for one, add up to the same gradients."""
    case = Projection((3, 5, 9), "xy", 16, 4, 2, batch=2)
    tensors, grad = single(case), incoming(case).float()
    sizes = triplane_project_backward.Sizes(2, 16, 8, 24, 3, 4)
    monkeypatch.setattr(triplane_project_backward, "MOST_SCRATCH", 3 * sizes.scratch(16, 4) - 1)
    assert triplane_project_backward.pieces(sizes, 90, 16, 4) == [(0, 32), (32, 32), (64, 26)]
    expected = exact(case, grad, tensors)
    largest = []
    with watch(lambda kernel, grid, arguments, config, constants: largest.append(kernel.__name__)):
        triplane_project.backward(grad, *tensors.values(), *case.arguments())
    assert largest == ["triplane_project_backward", "triplane_project_weights"] * 3 + ["partials_sum"]
    for name, gradient in computed(case, grad, tensors).items():
        assert_close(gradient, expected[name], OPERATION[torch.float32], name)


def test_strides() -> None:
    """Also of the incoming gradient: sum() expands one value."""
    case = CASES["one layer"]
    tensors, grad = single(case), incoming(case).float()
    expected = computed(case, grad, tensors)
    wide = {n: t.repeat_interleave(2, -1)[..., ::2] for n, t in tensors.items()}
    wide["x"] = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
    found = triplane_project.backward(grad.repeat_interleave(3, -1)[..., ::3], *wide.values(), *case.arguments())
    assert all(torch.equal(a, e) for a, e in zip(found, expected.values(), strict=True)), "and the same bits twice"
    ones = torch.ones(()).expand(grad.shape)
    assert all(
        torch.equal(a, e)
        for a, e in zip(
            triplane_project.backward(ones, *tensors.values(), *case.arguments()),
            computed(case, ones.contiguous(), tensors).values(),
            strict=True,
        )
    )


def test_launches_at_full_size() -> None:
    """Three, and two for each further piece. A piece's memory doesn't grow with the number of clips."""
    found: dict[int, list[tuple[str, int]]] = {}
    for batch in (1, 32):
        launched: list[tuple[str, int]] = []

        def watcher(kernel: Any, grid: tuple[int, ...], arguments: Any, *_: Any, to: Any = launched) -> None:
            to.append((kernel.__name__, sum(a.nbytes for a in arguments if isinstance(a, Tensor))))

        case = Projection((16, 32, 32), "xy", 384, 4, 48, hidden=512, depth=4, latent=4, batch=batch)
        tensors = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in case.case.shapes.values()]
        grad = torch.empty(batch, 1024, 4, dtype=torch.bfloat16, device="meta")
        with watch(watcher), assume("sm90"):
            triplane_project.backward(grad, *tensors, *case.arguments())
        found[batch] = launched
    names = ["triplane_project_backward", "triplane_project_weights"]
    assert [name for name, _ in found[1]] == [*names, "partials_sum"]
    assert [name for name, _ in found[32]] == [*names * 24, "partials_sum"]
    operands = [max(size for name, size in launched if name == names[1]) for launched in found.values()]
    assert 3.8e8 < operands[0] < 4.0e8, "what the header of triplane_project_backward.py says"
    assert operands[1] < 1.05 * triplane_project_backward.MOST_SCRATCH


def gradients(network: torch.nn.Module, x: Tensor, backend: str) -> dict[str, Tensor]:
    network.zero_grad()
    x = x.clone().requires_grad_()
    with use_backend(backend):
        out = network(x)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    found = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert all(gradient is not None for gradient in (x.grad, *found.values()))
    return {"x": x.grad, **found}  # type: ignore[dict-item]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    backward = triplane_project.backward
    monkeypatch.setattr(triplane_project, "backward", lambda *a: calls.append(a) or backward(*a))
    return calls


def test_a_network_with_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, network, x = counted(monkeypatch), Network().double(), torch.randn(2, 24, 16)
    expected = gradients(network, x.double(), "reference")
    found = gradients(network.float(), x, "triton")
    assert len(calls) == 1
    for name, gradient in found.items():
        assert_close(gradient, expected[name], OPERATION[torch.float32], name)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_16_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, autocast: bool) -> None:
    """At most twice the error of the layers one by one, with the same dtypes: all in 16 bits, or the matrices alone."""
    calls, network, x = counted(monkeypatch), Network().double(), torch.randn(1, 24, 16)
    expected = gradients(network, x.double(), "reference")
    network.to(torch.float32 if autocast else dtype)
    x = x if autocast else x.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        fused, layers = gradients(network, x, "triton"), gradients(network, x, "reference")
    assert len(calls) == 1
    for name, gradient in fused.items():
        assert gradient.isfinite().all(), name
        allowed = BFLOAT16_FACTOR * relative_error(layers[name], expected[name]) + OPERATION[dtype]
        assert relative_error(gradient, expected[name]) <= allowed, name


def test_it_is_fused_with_a_gradient_too() -> None:
    x, weight = torch.zeros(1, 384, 16, requires_grad=True), torch.zeros(3, 16, requires_grad=True)
    with use_backend("triton"):
        assert ops.fuses_projection(x, weight, TriplaneLayout(63, 3, 2), "xy")
        assert not ops.fuses_projection(x, weight, TriplaneLayout(64, 3, 2), "xy")


EVERY_SIZE = [
    Projection((length - 1, 2, 3), "xy", channels, heads, width, hidden=hidden, depth=depth, latent=latent)
    for length, channels, heads, width, hidden, depth, latent in (
        (2, 8, 8, 1, 9, 2, 1),
        (9, 136, 5, 7, 60, 3, 5),
        (17, 64, 4, 8, 128, 4, 4),
        (33, 200, 2, 65, 33, 2, 17),
        (40, 512, 8, 64, 512, 2, 40),
        (64, 16, 1, 16, 16, 2, 2),
    )
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", range(len(EVERY_SIZE)))
def test_every_size(number: int, dtype: torch.dtype) -> None:
    """The smallest in float32 alone: with heads of one channel, a rounding to 16 bits is all of a score's error."""
    case = EVERY_SIZE[number]
    dtype = dtype if number else torch.float32
    tensors = {n: t.to(dtype) for n, t in case.tensors().items()}
    rounding = PROJECTION_16_BIT[dtype] if dtype != torch.float32 else 0.0
    check(case, incoming(case).to(dtype), tensors, 2 * rounding + OPERATION[dtype])
