"""Derivatives of whole networks: tangents, Hessian-vector products, gradient penalties, gradients of each sample.

Linear layers through oneDNN and steps in pieces are forced to take part, though these networks are small.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparison import assert_close, relative_error
from filling import randomised
from models.test_models import AE
from tolerances import FLOAT32_ERROR
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.nn import linear, recomputed

# Groups of the norms hold some tens of values. With two, the values would always be +1 and -1, with slopes of 1e8 where
# they change places.
UNET: dict[str, Any] = dict(
    time=4, height=6, width=8, model_channels=64, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[2],
    num_heads=2,
)  # fmt: skip
NETWORKS: dict[str, Callable[[], Any]] = {
    "autoencoder": lambda: randomised(Autoencoder(**AE)),
    "denoiser": lambda: randomised(Denoiser(**UNET)),
}
both = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(autouse=True)
def _everything_takes_part(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(linear, "LEAST_PRODUCTS", 1)
    monkeypatch.setattr(linear, "LEAST_ROWS", 1)
    monkeypatch.setattr(recomputed, "PIECE_ON_CPU", 1 << 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*torch.jit.*")  # from PyTorch's own rules for forward mode
        yield


def network(name: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor, Tensor]:
    """The network, its function of one tensor, a point and a direction: the same numbers in each dtype."""
    torch.manual_seed(3)
    model = NETWORKS[name]().to(dtype)
    shape = (2, 3, 3, 20, 28) if name == "autoencoder" else (2, 4, model.layout.num_tokens)
    x, v = torch.rand(shape) - 0.5, torch.randn(shape)
    times = torch.tensor([7.0, 400.0])

    def run(x: Tensor) -> Tensor:
        if name == "autoencoder":
            return model(x).sample
        return model(x, times[: len(x)] if len(x) < 2 else times).sample

    return model, run, x.to(dtype), v.to(dtype)


@both
def test_tangent(name: str) -> None:
    _, run, x, v = network(name, torch.float64)
    exact = jvp(run, (x,), (v,))[1]
    with torch.no_grad():
        assert_close(exact, (run(x + 1e-6 * v) - run(x - 1e-6 * v)) / 2e-6, 1e-7)
        _, run, x, v = network(name, torch.float32)
        assert_close(jvp(run, (x,), (v,))[1], exact, FLOAT32_ERROR)


def slope(run: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The gradient of a scalar at x, for x and all parameters. It can be differentiated again."""
    y = run(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return list(torch.autograd.grad((weights * y.square()).sum(), [x, *parameters], create_graph=True))


@pytest.mark.slow
@both
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradient_penalty(name: str, checkpointed: bool) -> None:
    """Every parameter gets a gradient, and the right one."""

    def penalty(dtype: torch.dtype) -> dict[str, Tensor]:
        model, run, x, _ = network(name, dtype)
        if checkpointed and dtype == torch.float32:
            for module in model.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = True
        x.requires_grad_()
        dx = slope(run, x, [])[0]
        (dx.flatten(1).norm(dim=1) - 1).square().sum().backward()
        assert x.grad is not None
        return {"x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, actual = penalty(torch.float64), penalty(torch.float32)
    model = NETWORKS[name]()
    missing = {n for n, _ in model.named_parameters()} - set(actual)
    assert not missing
    assert set(actual) == set(expected)
    largest = max(float(g.norm()) for g in expected.values())
    for what, exact in expected.items():
        error = float((actual[what].double() - exact).norm())
        assert error <= 2 * FLOAT32_ERROR * max(float(exact.norm()), 1e-2 * largest), f"{what}: {error:.1e}"


@pytest.mark.slow
@both
def test_hessian_vector_product(name: str) -> None:
    """For all parameters and the input together. In float64 against a difference quotient of gradients."""

    def product(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Callable[[float], list[Tensor]]]:
        model, run, x, v = network(name, dtype)
        parameters = list(model.parameters())
        generator = torch.Generator().manual_seed(9)
        change = [
            v,
            *(torch.randn(p.shape, generator=generator).to(dtype) * p.detach().abs().mean() for p in parameters),
        ]
        point = [x.requires_grad_(), *parameters]
        first = slope(run, x, parameters)
        second = torch.autograd.grad(sum((g * c).sum() for g, c in zip(first, change, strict=True)), point)

        def moved(step: float) -> list[Tensor]:
            with torch.no_grad():
                for p, c in zip(point, change, strict=True):
                    p.add_(step * c)
            gradients = [g.detach() for g in slope(run, x, parameters)]
            with torch.no_grad():
                for p, c in zip(point, change, strict=True):
                    p.sub_(step * c)
            return gradients

        return list(second), point, moved

    exact, _, moved = product(torch.float64)
    quotients = [(a - b) / 2e-6 for a, b in zip(moved(1e-6), moved(-1e-6), strict=True)]
    joint = lambda tensors: torch.cat([t.detach().flatten() for t in tensors])  # noqa: E731
    assert_close(joint(quotients), joint(exact), 1e-6)
    assert_close(joint(product(torch.float32)[0]), joint(exact), FLOAT32_ERROR)


@both
def test_gradients_of_each_sample(name: str) -> None:
    model, _, x, _ = network(name, torch.float32)
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        inputs = (sample[None],) if name == "autoencoder" else (sample[None], torch.tensor([7.0]))
        return functional_call(model, parameters, inputs).sample.square().mean()

    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    expected = [grad(loss)(parameters, sample) for sample in x]
    for index, one in enumerate(expected):
        whole = torch.cat([g.flatten() for g in one.values()])
        assert relative_error(torch.cat([actual[n][index].flatten() for n in one]), whole) < FLOAT32_ERROR
