"""The projection to a plane in one operation: the layers' values and gradients, little kept, and where it may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_close, relative_error
from tolerances import BFLOAT16_FACTOR, OPERATION
from torch import Tensor, nn

from benchmarks.memory import saved_bytes
from pvdm_fast import TriplaneLayout, ops, use_backend
from pvdm_fast.backends import choice
from pvdm_fast.nn import PlaneProjection
from pvdm_fast.nn.projection import FeedForward

pytestmark = pytest.mark.skipif(choice.unavailable("cpu") is not None, reason="the CPU extension is not built")

LAYOUT, CHANNELS, LATENT = TriplaneLayout(5, 4, 3), 16, 3


class Network(nn.Module):
    """A projection with all that belongs to its plane."""

    def __init__(self, plane: str) -> None:
        super().__init__()
        self.plane = plane
        length = {"xy": LAYOUT.time, "yt": LAYOUT.height, "xt": LAYOUT.width}[plane]
        self.token = nn.Parameter(torch.randn(CHANNELS))
        self.positions = nn.Parameter(torch.randn(length + 1, CHANNELS))
        self.projection = PlaneProjection(CHANNELS, 3, 24)
        self.to_latent = nn.Conv2d(CHANNELS, LATENT, 1)

    def forward(self, lattice: Tensor) -> Tensor:
        return self.projection.latents(lattice, LAYOUT, self.plane, self.token, self.positions, self.to_latent)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The plane of every call of the fused operation."""
    seen: list[str] = []
    original = ops.triplane_project

    def noted(x: Tensor, layout: TriplaneLayout, plane: str, *rest: Any, **options: Any) -> Tensor:
        seen.append(plane)
        return original(x, layout, plane, *rest, **options)

    monkeypatch.setattr(ops, "triplane_project", noted)
    return seen


def lattice(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, LAYOUT.num_lattice_tokens, CHANNELS).to(dtype)


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], grad)]


@pytest.mark.parametrize("plane", ["xy", "yt", "xt"])
def test_equals_the_layers(plane: str, fused: list[str]) -> None:
    module, x = Network(plane), lattice()
    actual = results(module, x)
    assert fused == [plane]
    expected = results(module.double(), x.double())
    assert fused == [plane]
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, OPERATION[torch.float32], f"result {index}")


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool, fused: list[str]) -> None:
    """At most twice the error of the layers one by one, with the same dtypes."""
    module, x = Network("xy"), lattice()
    exact = results(module.double(), x.double())
    module.to(torch.float32 if autocast else torch.bfloat16)
    x = x if autocast else x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = results(module, x)
        assert fused == ["xy"]
        with use_backend("reference"):
            layers = results(module, x)
    assert fused == ["xy"]
    for index, (a, w, e) in enumerate(zip(actual, layers, exact, strict=True)):
        assert a.dtype == w.dtype, index
        rounding = OPERATION[torch.bfloat16]  # of a gradient of three numbers chance can leave the layers no error
        assert relative_error(a, e) <= BFLOAT16_FACTOR * relative_error(w, e) + rounding, index


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def replaced(network: Network) -> None:
    class Other(FeedForward):
        pass

    layer: Any = network.projection.layers[1]
    layer[1].fn.__class__ = Other


def other_eps(network: Network) -> None:
    layer: Any = network.projection.layers[1]
    layer[0].norm.eps = 1e-3


CHANGES: dict[str, Callable[[Any], Any]] = {
    "projection": lambda n: hooked(n.projection),
    "step": lambda n: hooked(n.projection.layers[0][1]),
    "attention": lambda n: hooked(n.projection.layers[0][0].fn),
    "to_qkv": lambda n: hooked(n.projection.layers[2][0].fn.to_qkv),
    "to_out": lambda n: hooked(n.projection.layers[0][0].fn.to_out["0"]),
    "norm": lambda n: hooked(n.projection.layers[0][0].norm),
    "hidden": lambda n: hooked(n.projection.layers[1][1].fn.net["3"]),
    "convolution": lambda n: hooked(n.to_latent),
    "another class": replaced,
    "another eps": other_eps,
    "another dtype": lambda n: n.projection.layers[1][0].fn.to_out.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_is_called(change: str, fused: list[str]) -> None:
    module, x = Network("yt"), lattice()
    CHANGES[change](module)
    if change == "another dtype":  # the layers refuse it, and nothing computes over it
        with pytest.raises(RuntimeError, match="dtype"):
            module(x)
    else:
        module(x)
    assert not fused


@pytest.mark.slow
def test_compiled_code_takes_the_layers(fused: list[str]) -> None:
    torch._dynamo.reset()
    module, x = Network("xt"), lattice()
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    actual = compiled(x)
    assert not fused
    assert_close(actual, module(x), OPERATION[torch.float32])


def test_what_is_kept() -> None:
    """The lattice, and the parameters as the operation takes them: those of all layers side by side."""
    module, x = Network("xy"), lattice().requires_grad_()
    parameters = sum(p.numel() for p in module.projection.parameters())
    assert saved_bytes(lambda: [module(x)], list(module.parameters())) == 4 * (parameters + x.numel())
