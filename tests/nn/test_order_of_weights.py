"""On a GPU weights of 3x3 convolutions lie in channels_last, as their kernel reads them. Here the CPU counts as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from filling import randomised
from models.test_models import UNET
from torch import Tensor, nn
from training.small import SMALL, losses, same_weights

from pvdm_fast import ops, use_backend
from pvdm_fast.analysis.recorder import OwnCalls
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.models import Denoiser
from pvdm_fast.nn import PlaneConv, copies, planes
from pvdm_fast.train import main

LAST = torch.channels_last
LAYOUT = TriplaneLayout(2, 3, 4)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "CHANNELS_LAST", frozenset({"cpu"}))


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [module.weight for module in model.modules() if isinstance(module, PlaneConv)]


def gradients(x: Tensor, weight: Tensor, backend: str) -> list[Tensor]:
    torch.manual_seed(1)
    inputs = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight)]
    with use_backend(backend):
        out = ops.plane_conv(inputs[0], LAYOUT, inputs[1], torch.ones(len(weight)))
    return [out, *torch.autograd.grad(out, inputs, torch.randn_like(out))]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("channels", [8, 2])
def test_the_gradient_lies_as_the_weight(backend: str, channels: int) -> None:
    """So that no optimizer step copies it. 26 tokens of two channels and of eight are the CPU kernel's two ways."""
    x, weight = torch.randn(1, LAYOUT.num_tokens, channels), torch.randn(4, channels, 3, 3)
    found = gradients(x, weight.to(memory_format=LAST), backend)
    assert found[2].stride() == weight.to(memory_format=LAST).stride()
    for one, expected in zip(found, gradients(x, weight, backend), strict=True):
        torch.testing.assert_close(one, expected)


def test_fakes_lie_as_results() -> None:
    x, weight = torch.randn(1, LAYOUT.num_tokens, 8), torch.randn(4, 8, 3, 3).to(memory_format=LAST)
    with OwnCalls() as recorder:
        gradients(x, weight, "auto")
    for function, arguments in recorder.calls:
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        torch.library.opcheck(function, detached, test_utils=("test_schema", "test_faketensor"))


def test_only_where_kernels_read_it_so() -> None:
    assert all(weight.is_contiguous() for weight in weights(Denoiser(**UNET).to("cpu")))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_layer_made_there() -> None:
    """As in `with torch.device("cuda")`: nothing moves it afterwards."""
    assert not PlaneConv(8, 4).weight.is_contiguous() and not PlaneConv(8, 4, zero=True).weight.is_contiguous()


def test_moving_a_network_rearranges_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters stay the same objects, for whoever holds them. Files and copies of it equal those of before."""
    model = randomised(Denoiser(**UNET))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = weights(model)
    assert all(weight.is_contiguous() for weight in held)
    monkeypatch.setattr(planes, "CHANNELS_LAST", frozenset({"cpu"}))  # as `as_on_a_gpu`, from here on
    model.to("cpu")
    assert all(a is b and a.is_contiguous(memory_format=LAST) for a, b in zip(weights(model), held, strict=True))
    assert sum(not weight.is_contiguous() for weight in held) > 4, "of one input channel both orders are one"
    model.save_pretrained(tmp_path)
    for other in (model, Denoiser.from_pretrained(tmp_path), Denoiser.from_pretrained(tmp_path).to("cpu")):
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_computed_weight_is_left_alone() -> None:
    """Asking for it would take a step of the power iteration."""
    layer = nn.utils.parametrizations.spectral_norm(PlaneConv(8, 4))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.to("cpu")
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_copies_in_autocasts_dtype_lie_as_the_weights() -> None:
    layer = PlaneConv(8, 4).to("cpu")
    made = copies.make("cpu", torch.bfloat16, [layer.weight])
    with torch.autocast("cpu", torch.bfloat16):
        copy = made.of(layer.weight)
    assert copy.dtype is torch.bfloat16 and copy.stride() == layer.weight.stride()
    copy.float().square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.stride() == layer.weight.stride()


@pytest.mark.slow
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_is_trained_saved_and_resumed(tmp_path: Path, optimizer: str) -> None:
    constant = ["--autoencoder-steps", "1", "--diffusion-schedule", "constant", "--optimizer", optimizer]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*SMALL, *constant, "--diffusion-steps", "4", "--run", str(whole)]) == 0
    assert main([*SMALL, *constant, "--diffusion-steps", "2", "--run", str(parts)]) == 0
    assert main(["--resume", str(parts), "--diffusion-steps", "4"]) == 0
    assert losses(parts, "diffusion") == losses(whole, "diffusion") and len(losses(whole, "diffusion")) == 4
    assert same_weights(parts, whole, "denoiser")
