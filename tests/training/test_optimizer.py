"""Muon: orthogonal steps, which parameters take them, and that a saved state goes on exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training.small import SMALL, losses, same_weights

from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.train import main
from pvdm_fast.training.optimizer import Muon, hidden_matrices, orthogonal, state_bytes

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(64, 150), (48, 200), (200, 48)])
def test_steps_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    """The directions of the singular value decomposition, with all singular values near 1."""
    matrix = torch.randn(shape, dtype=torch.float32)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.t() @ orthogonal(matrix[None])[0] @ right.t()
    assert (found.diagonal() > 0.6).all() and (found.diagonal() < 1.3).all()
    assert (found - found.diagonal().diag()).abs().max() < 0.05


def test_which_parameters_are_turned() -> None:
    """Hidden layers, and no position, token, norm, bias, table of classes, or layer with few inputs or outputs."""
    for model in (
        Denoiser.from_preset("tiny", num_classes=40),
        Autoencoder.from_preset("tiny", latent_channels=12),
    ):
        names = {name for name, parameter in model.named_parameters() for m in hidden_matrices(model) if parameter is m}
        assert names and all(name.endswith("weight") for name in names)
        assert not any("class_embed" in name or "norm" in name or "pos" in name for name in names)
        assert not any(name.startswith(("out.2", "pre_", "post_")) for name in names)
    assert any("in_layers" in name or "qkv" in name for name in names)


def test_matrices_of_one_shape_are_turned_together_and_each_by_itself() -> None:
    stack = torch.randn(3, 64, 150) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    together, alone = orthogonal(stack), torch.cat([orthogonal(matrix[None]) for matrix in stack])
    assert torch.allclose(together, alone, atol=2e-2)  # products in bfloat16 may round differently in a stack


def test_the_size_of_a_stack_changes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for stacked in (1, 1 << 24):
        monkeypatch.setattr("pvdm_fast.training.optimizer.STACKED", stacked)
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(3)))
        trained(model, Muon(model, **SETTINGS), range(2))
        models.append(model)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-3)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(16, 40, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(inputs) - inputs.flip(1)).square().mean().backward()
        optimizer.step()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.SiLU(), nn.Linear(64, 40))


def test_it_learns_and_goes_on_exactly_from_a_saved_state() -> None:
    model = small()
    optimizer = Muon(model, **SETTINGS)
    trained(model, optimizer, range(30))
    again = small()
    other = Muon(again, **SETTINGS)
    trained(again, other, range(10))
    saved, state = copy.deepcopy(again.state_dict()), copy.deepcopy(other.state_dict())
    resumed = small()
    resumed.load_state_dict(saved)
    last = Muon(resumed, **SETTINGS)
    last.load_state_dict(state)
    trained(resumed, last, range(10, 30))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    inputs = torch.randn(64, 40)
    first, last_loss = ((net(inputs) - inputs.flip(1)).square().mean() for net in (small(), model))
    assert last_loss < 0.7 * first


def test_a_step_is_as_large_as_the_formula_says_and_the_rest_is_adamw() -> None:
    model, like = small(), small()
    optimizer = Muon(model, **SETTINGS)
    adamw = torch.optim.AdamW(like.parameters(), **SETTINGS)
    for net, chosen in ((model, optimizer), (like, adamw)):
        trained(net, chosen, range(1))
    weight, before = model[0].weight, small()[0].weight  # type: ignore[index]
    change = weight.detach() - before.detach() * (1 - 1e-2 * 0.1)
    assert 0.5 < change.square().mean().sqrt() / (0.2 * 1e-2) < 1.2  # the smallest singular values stay below 1
    assert torch.allclose(model[0].bias, like[0].bias, rtol=1e-6, atol=1e-8)  # type: ignore[index]


def test_a_scaled_loss_that_overflows_changes_nothing() -> None:
    """float16: the loss scale comes off the gradients of all parameters, and a step with infinite ones is left out."""
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    plain, inputs = copy.deepcopy(model), torch.randn(8, 40)
    optimizer, of_plain = Muon(model, **SETTINGS), Muon(plain, **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(inputs).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    plain(inputs).square().mean().backward()
    of_plain.step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    scaler.scale(model(inputs).square().mean() * float("inf")).backward()
    scaler.step(optimizer)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_bytes_of_its_state() -> None:
    model = small()
    optimizer = Muon(model, **SETTINGS)
    trained(model, optimizer, range(1))
    held = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert state_bytes("muon", model) == sum(tensor.nbytes for tensor in held)


@pytest.mark.slow
def test_a_resumed_run_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both stages by Muon in bf16 where the CPU has it, as the default preset does."""
    options = [*SMALL, "--optimizer", "muon", "--mixed-precision", "bf16", "--diffusion-prediction", "flow"]
    options += ["--autoencoder-schedule", "constant", "--diffusion-schedule", "constant"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*options, "--autoencoder-steps", "4", "--diffusion-steps", "6", "--run", str(whole)]) == 0
    assert main([*options, "--autoencoder-steps", "4", "--diffusion-steps", "2", "--run", str(parts)]) == 0
    assert main(["--resume", str(parts), "--diffusion-steps", "6"]) == 0
    assert losses(whole, "diffusion") == losses(parts, "diffusion")
    assert same_weights(whole, parts, "autoencoder") and same_weights(whole, parts, "denoiser")
    assert main(["--resume", str(parts), "--optimizer", "adamw"]) == 2
    assert "--optimizer cannot change" in capsys.readouterr().err
