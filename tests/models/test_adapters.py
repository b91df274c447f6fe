"""Training of LoRA adapters with peft, on both networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close
from filling import randomised
from torch import Tensor, nn

from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.nn import recomputed

peft = pytest.importorskip("peft", reason="pip install peft transformers")

ATTENTION = {"autoencoder": ["to_qkv"], "denoiser": ["qkv", "proj_out"]}
NETWORKS = pytest.mark.parametrize("network", ["autoencoder", "denoiser"])


def make(network: str) -> Any:
    torch.manual_seed(0)
    if network == "autoencoder":
        model: Any = Autoencoder(
            frames=2, height=8, width=8, patch_size=4, channels=32, depth=1, num_heads=2, head_dim=8,
            projection_depth=2, projection_hidden=48,
        )  # fmt: skip
    else:
        model = Denoiser(
            time=2, height=4, width=4, model_channels=32, channel_mult=[1, 2], num_res_blocks=1,
            attention_resolutions=[1], num_heads=2,
        )  # fmt: skip
    return randomised(model)


def inputs(model: Any, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, Autoencoder):
        return (torch.rand(batch, 3, 2, 8, 8, generator=generator) * 2 - 1,)
    return torch.randn(batch, 4, model.layout.num_tokens, generator=generator), torch.full((batch,), 500)


def adaptable(model: nn.Module) -> list[str]:
    """All layers that LoRA can adapt: linear ones, and the 1x1 and 3x3 convolutions."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return [name for name, layer in model.named_modules() if isinstance(layer, kinds)]


def adapted(network: str, targets: Any, **options: Any) -> Any:
    return peft.get_peft_model(make(network), peft.LoraConfig(r=2, target_modules=targets, **options))


@pytest.mark.slow
@NETWORKS
@pytest.mark.parametrize("how", ["plain", "checkpointing", "autocast", "pieces", "everything"])
def test_training(network: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the adapter is trained, and it fits a target. Saved and loaded, or merged, it gives the same output."""
    if how == "pieces":
        monkeypatch.setattr(recomputed, "PIECE_ON_CPU", 1024)
    base = make(network)
    given = inputs(base)
    model = adapted(network, adaptable(base) if how == "everything" else ATTENTION[network])
    if how == "checkpointing":
        model.get_base_model().enable_gradient_checkpointing()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    frozen = {name: p.clone() for name, p in model.named_parameters() if name not in trained}
    with torch.no_grad():
        target = torch.zeros_like(base(*given).sample)
        # a new adapter changes nothing except the order of sums
        assert_close(model(*given).sample, base(*given).sample, 1e-4)
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = (model(*given).sample.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    assert losses[-1] < 0.97 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)

    with torch.no_grad():
        expected = model(*given).sample
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(make(network), tmp_path)
        assert torch.equal(again(*given).sample, expected)
        assert_close(model.merge_and_unload()(*given).sample, expected, 1e-4)  # weights are rounded once more
        assert not torch.equal(base(*given).sample, expected)


@NETWORKS
def test_an_adapter_gets_the_gradient_of_the_formula(network: str) -> None:
    """With the base layer's weight W and the adapter B A, the gradient is that of W + B A."""
    model = adapted(network, ATTENTION[network], init_lora_weights=False, lora_alpha=2).double()
    given = [x.double() if x.is_floating_point() else x for x in inputs(model.get_base_model())]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    slopes = torch.autograd.grad(model(*given).sample.square().sum(), list(trained.values()))
    merged = make(network).double()
    weights = dict(merged.named_parameters())
    factors = {name.removeprefix("base_model.model."): p.detach().requires_grad_() for name, p in trained.items()}
    changed = {}
    for name, a in factors.items():
        if ".lora_A." in name:
            target, b = name.replace(".lora_A.default", ""), factors[name.replace("lora_A", "lora_B")]
            changed[target] = weights[target] + (b.flatten(1) @ a.flatten(1)).view(weights[target].shape)
    expected = torch.autograd.grad(
        torch.func.functional_call(merged, changed, tuple(given)).sample.square().sum(), list(factors.values())
    )
    for name, slope, truth in zip(trained, slopes, expected, strict=True):
        assert_close(slope, truth, 1e-5, name)  # the norms' statistics are float32
