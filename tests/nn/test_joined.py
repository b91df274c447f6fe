"""Weights of all embedding layers in one tensor: kept between passes without a gradient, and never stale."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from filling import randomised
from models.test_models import UNET
from torch import Tensor, nn

from pvdm_fast.analysis.recorder import Recorder, name_of
from pvdm_fast.models import Denoiser
from pvdm_fast.nn import copies, joined, residual


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings share a product here too."""
    monkeypatch.setattr(residual, "JOINED", frozenset({"cpu"}))


@pytest.fixture
def model() -> Denoiser:
    torch.manual_seed(0)
    return randomised(Denoiser(**UNET)).eval()


def linear(model: Denoiser) -> nn.Linear:
    """The embedding layer of one block."""
    return model.middle_block[0].emb_layers[1]


def run(model: Denoiser) -> Tensor:
    latent = torch.randn(2, 4, 44, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model(latent.to(model.dtype), torch.tensor([7, 900])).sample


class Joins(Recorder):
    """Counts how often weights, which have as many rows as there are blocks' outputs, are joined."""

    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        layers = [m.emb_layers[1] for m in model.modules() if isinstance(m, residual.ResidualBlock)]
        self.rows, self.count = sum(len(layer.weight) for layer in layers), 0

    def note(self, function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        self.count += name_of(function) == "cat" and len(result) == self.rows


def joins(model: Denoiser, mixed: bool = False) -> int:
    with Joins(model) as found, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        run(model)
    return found.count


@pytest.mark.parametrize("mixed", [False, True])
def test_joined_once_while_sampling(model: Denoiser, mixed: bool) -> None:
    assert [joins(model, mixed) for _ in range(2)] == [2, 2], "outside of `kept`: weights and biases in each pass"
    with copies.kept():
        assert [joins(model, mixed) for _ in range(3)] == [2, 0, 0]
    with copies.kept():
        assert joins(model, mixed) == 2


def in_place(model: Denoiser) -> None:
    linear(model).weight.mul_(2)


def bias_in_place(model: Denoiser) -> None:
    linear(model).bias.add_(1)


def other_parameter(model: Denoiser) -> None:
    linear(model).weight = nn.Parameter(2 * linear(model).weight)


def loaded(model: Denoiser) -> None:
    model.load_state_dict({name: 1.5 * values for name, values in model.state_dict().items()})


def hooked(model: Denoiser) -> None:
    linear(model).register_forward_hook(lambda module, inputs, output: 2 * output)


def cast(model: Denoiser) -> None:
    model.double()


CHANGES = (in_place, bias_in_place, other_parameter, loaded, hooked, cast)


@torch.no_grad()
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(model: Denoiser, change: Callable[[Denoiser], None], mixed: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        with copies.kept():
            before = run(model)
            change(model)
            after = run(model)
            assert torch.equal(after, run(model))
        assert torch.equal(after, run(model))
    assert not torch.allclose(after.double(), before.double(), atol=1e-7)


def test_gradients_are_those_of_the_weights(model: Denoiser) -> None:
    with copies.kept():
        with torch.no_grad():
            run(model)
        with Joins(model) as found:
            run(model).square().mean().backward()
    assert found.count == 2
    assert linear(model).weight.grad is not None and linear(model).weight.grad.any()


@torch.no_grad()
def test_freed_at_the_end(model: Denoiser) -> None:
    with copies.kept():
        run(model)
        store = copies.kept_now()
        assert store is not None
        made = [weakref.ref(one.tensor) for one in store.joined.values()]
        assert len(made) == 2 and all(one() is not None for one in made)
        del store
    gc.collect()
    assert not any(one() is not None for one in made)


@torch.no_grad()
def test_changes_do_not_fill_the_memory(model: Denoiser) -> None:
    with copies.kept():
        for _ in range(2 * joined.MOST):
            other_parameter(model)
            run(model)
        store = copies.kept_now()
        assert store is not None and len(store.joined) <= joined.MOST


def test_inference_mode(model: Denoiser) -> None:
    """Weights that were made there have no version: they are joined in each pass."""
    with torch.inference_mode(), copies.kept():
        run(model)
        made = randomised(Denoiser(**UNET)).eval()
        assert torch.equal(run(made), run(made))
        store = copies.kept_now()
        assert store is not None and len(store.joined) == 2


@torch.no_grad()
def test_moved_to_another_device() -> None:
    layers = [nn.Linear(3, 4), nn.Linear(3, 5)]
    with copies.kept():
        assert joined.join([layer.weight for layer in layers]).device.type == "cpu"
        assert joined.join([layer.to("meta").weight for layer in layers]).is_meta


@torch.no_grad()
def test_compiled_code_joins_by_itself() -> None:
    layers = [nn.Linear(3, 4), nn.Linear(3, 5)]
    compiled = torch.compile(lambda: joined.join([layer.weight for layer in layers]), fullgraph=True, backend="eager")
    with copies.kept():
        for _ in range(2):
            assert torch.equal(compiled(), torch.cat([layer.weight for layer in layers]))
            layers[0].weight.add_(1)
        store = copies.kept_now()
        assert store is not None and not store.joined
