"""Models that are made without memory, emptied, moved and copied: buffers that aren't in files are still right."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from comparison import assert_close
from filling import randomised
from torch import Tensor

from pvdm_fast import use_backend
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.models.denoiser import timestep_embedding
from pvdm_fast.nn.axial_transformer import space_rotation, time_rotation


def make(network: str) -> Any:
    torch.manual_seed(0)
    if network == "autoencoder":
        return Autoencoder(
            frames=2, height=8, width=8, patch_size=4, channels=16, depth=1, num_heads=1, head_dim=8, projection_depth=1
        ).eval()
    model = Denoiser(
        time=2, height=2, width=2, model_channels=32, channel_mult=[1], num_res_blocks=1, attention_resolutions=[],
        num_heads=1, prediction="v", positions=True, num_classes=2,
    )  # fmt: skip
    return randomised(model).eval()


@torch.no_grad()
def run(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, Autoencoder):
        return model((torch.rand(1, 3, 2, 8, 8, generator=generator) * 2 - 1).to(model.dtype)).sample
    latent = torch.randn(1, 4, model.layout.num_tokens, generator=generator)
    return model(latent.to(model.dtype), torch.tensor([500])).sample


def on_meta(model: Any) -> Any:
    with torch.device("meta"):
        return type(model).from_config(model.config).eval()


def emptied(model: Any) -> Any:
    """Leaves random memory contents in the model."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(7)
    return model


def without_buffers(model: Any) -> Any:
    with init_empty_weights(include_buffers=True):
        return type(model).from_config(model.config).eval()


def loaded(model: Any, like: Any, assign: bool = False) -> Any:
    model.load_state_dict(copy.deepcopy(like.state_dict()), assign=assign)
    return model


WAYS: dict[str, Callable[[Any], Any]] = {
    "to_empty": lambda m: loaded(emptied(copy.deepcopy(m)).to_empty(device="cpu"), m),
    "meta, to_empty": lambda m: loaded(on_meta(m).to_empty(device="cpu"), m),
    "meta, assigned": lambda m: loaded(on_meta(m), m, assign=True),
    "accelerate's empty weights": lambda m: loaded(without_buffers(m), m, assign=True),
    "to meta and back": lambda m: loaded(copy.deepcopy(m).to("meta").to_empty(device="cpu"), m),
    "deepcopy": copy.deepcopy,
    "bfloat16 and back": lambda m: loaded(copy.deepcopy(m).bfloat16().float(), m),
}


@pytest.mark.parametrize("network", ["autoencoder", "denoiser"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_making_a_model(network: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    like = make(network)
    expected = run(like)
    empty_like = torch.empty_like  # to_empty uses it; the contents of its memory are random
    monkeypatch.setattr(torch, "empty_like", lambda t, **options: empty_like(t, **options).fill_(7))
    model = WAYS[way](like)
    assert torch.equal(run(model), expected)
    state = set(model.state_dict())
    for name, buffer in model.named_buffers():
        assert name in state or torch.equal(buffer, dict(like.named_buffers())[name]), name


@pytest.mark.parametrize("network", ["autoencoder", "denoiser"])
def test_made_on_a_device(network: str) -> None:
    """Everything is on the device, including buffers that aren't in files. Otherwise the first forward pass would
    fail."""
    model = on_meta(make(network))
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    plain = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    assert not plain, "a tensor that is an attribute would stay behind"


def test_moving_a_model_says_nothing_untrue(caplog: pytest.LogCaptureFixture) -> None:
    """diffusers warns about an empty list of modules that should stay float32."""
    from diffusers.utils import logging as diffusers_logging

    logger = diffusers_logging.get_logger("diffusers.models.modeling_utils")
    logger.addHandler(caplog.handler)
    try:
        make("denoiser").to(torch.bfloat16)
        assert "float32" not in caplog.text
        logger.warning("another warning")
        assert "another warning" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
    assert logging.getLogger("diffusers").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("tables", [time_rotation, lambda n, *rest: space_rotation(n, 5, *rest)])
def test_tables_of_float64_models_are_float64(tables: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """sin^2 + cos^2 = 1 to float64's precision, and float32 tables are unchanged."""
    sin, cos = tables(7, 16, None, torch.float64)
    assert sin.dtype == torch.float64
    assert (sin.square() + cos.square() - 1).abs().max() < 1e-15
    narrow = tables(7, 16, None)
    assert narrow[0].dtype == torch.float32
    assert_close(narrow[0], sin, 1e-6)
    assert not torch.equal(narrow[0].double(), sin)


def test_the_embedding_of_time_in_float64() -> None:
    times = torch.tensor([3, 999])
    wide = timestep_embedding(times, 64, torch.float64)
    assert_close(timestep_embedding(times, 64), wide, 1e-4)  # angles up to 999, rounded to 6e-5
    frequencies = torch.logspace(0, -4, 33, dtype=torch.float64)[:32]
    assert_close(
        wide, torch.cat([(times[:, None] * frequencies).cos(), (times[:, None] * frequencies).sin()], 1), 1e-12
    )


def test_a_float64_autoencoder_is_float64() -> None:
    """Changing the weights by 1e-10 changes the output by about as much, not by float32 roundings."""
    model = make("autoencoder").double()
    with use_backend("reference"):
        before = run(model)
        model.encoder.to_patch_embedding.bias.data[0] += 1e-10
        after = run(model)
    assert 0 < (after - before).abs().max() < 1e-8
