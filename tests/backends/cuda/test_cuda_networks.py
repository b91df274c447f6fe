"""The backend "cuda-emulated" (`emulated.registered`): automatic choice, and whole networks on the CUDA kernels.

Single operations are in tests/ops/test_operations.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from backends.cuda import emulated
from comparison import assert_close, relative_error
from golden_tools import GoldenCase, load_case
from models.test_golden import check_gradients
from tolerances import GOLDEN_NETWORK, NETWORK_16_BIT

from pvdm_fast import TriplaneLayout, ops, use_backend
from pvdm_fast.backends import choice
from pvdm_fast.backends.choice import SERVED, BackendError
from pvdm_fast.backends.cuda import attention, triplane_project
from pvdm_fast.layout import PlaneLayout
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.models.release import load_release_autoencoder, load_release_denoiser

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: install g++")


@pytest.fixture(scope="module", autouse=True)
def device(emulated_device: ModuleType) -> Iterator[ModuleType]:
    with emulated.registered(emulated_device):
        yield emulated_device


def served() -> dict[str, str]:
    return {op: choice.automatic(op, "cpu", torch.float32) for op in (*choice.OPERATIONS, *choice.FUSED_PROJECTION)}


def test_automatic_choice_keeps_to_the_limits() -> None:
    """Beyond the kernels' limits the next backend computes. If you ask for this one by name, it says what the
    limit is."""
    assert {op for op, name in served().items() if name == emulated.BACKEND} == set(SERVED["cuda"])
    layout = PlaneLayout(((1, 1),) * 33)
    ones = torch.ones(4)
    calls = {
        "heads of at most 256 channels, not 264": lambda: ops.segment_attention(torch.randn(1, 4, 3, 1, 264)),
        "at most 32 segments, not 40": lambda: ops.segment_attention(torch.randn(1, 40, 3, 1, 8), list(range(41))),
        "at most 32 planes, not 33": lambda: ops.plane_norm(torch.randn(1, 33, 4), layout, ones, ones, groups=2),
    }
    for message, call in calls.items():
        assert torch.isfinite(call()).all()
        with use_backend(emulated.BACKEND), pytest.raises(BackendError, match=message):
            call()


def denoiser() -> tuple[GoldenCase, Denoiser]:
    case = load_case("unet_small")
    state = {f"module.diffusion_model.{name}": tensor for name, tensor in case.parameters().items()}
    layout = TriplaneLayout(**case.meta["layout"])
    return case, load_release_denoiser(state, layout=layout, num_heads=case.meta["config"]["num_heads"])


def autoencoder() -> tuple[GoldenCase, Autoencoder]:
    case = load_case("autoencoder_small")
    config = case.meta["ddconfig"]
    model = load_release_autoencoder(case.parameters(), frames=config["timesteps"], resolution=config["resolution"])
    return case, model


@pytest.mark.slow
def test_denoiser() -> None:
    case, model = denoiser()
    x = case.input("x").requires_grad_()
    y = model(x, torch.tensor(case.meta["t"])).sample
    assert_close(y, case.tensors["output.unconditional"], GOLDEN_NETWORK)
    y.backward(case.draw("grad_output", tuple(y.shape)))
    check_gradients(case, model, {"x": x}, GOLDEN_NETWORK)


@pytest.mark.slow
def test_autoencoder() -> None:
    case, model = autoencoder()
    video = case.draw("input.video", (1, 3, 16, 48, 48)).tanh().requires_grad_()
    latent = model.encode(video).latent
    assert_close(latent, case.tensors["output.latent"], GOLDEN_NETWORK)
    frames = model.decode(latent).sample.transpose(1, 2).flatten(0, 1)
    assert_close(frames, case.tensors["output.reconstruction"], GOLDEN_NETWORK)
    frames.backward(case.draw("grad_output", tuple(frames.shape)))
    check_gradients(case, model, {"video": video}, GOLDEN_NETWORK)


@pytest.mark.slow
@torch.no_grad()
def test_autoencoder_without_a_gradient(monkeypatch: pytest.MonkeyPatch, device: ModuleType) -> None:
    """Each projection is one operation then: its float32 products, and in float16 those by tensor cores."""
    calls: list[Any] = []
    forward = triplane_project.forward
    monkeypatch.setattr(triplane_project, "forward", lambda *a: calls.append(a) or forward(*a))
    case, model = autoencoder()
    video = case.draw("input.video", (1, 3, 16, 48, 48)).tanh()
    expected = case.tensors["output.latent"]
    assert_close(model.encode(video).latent, expected, GOLDEN_NETWORK)
    assert len(calls) == 3
    model.half()
    with use_backend("reference"):
        rival = relative_error(model.encode(video.half()).latent, expected)
    device.counts()
    assert relative_error(model.encode(video.half()).latent, expected) <= NETWORK_16_BIT * rival
    assert len(calls) == 6 and device.counts()["mma"] > 0


@pytest.mark.exhaustive
def test_denoiser_on_tensor_cores(monkeypatch: pytest.MonkeyPatch, device: ModuleType) -> None:
    """In float16 the network is as close to the golden values as the float16 reference. (Backward would take
    minutes.)"""
    monkeypatch.setattr(attention, "MATRIX_LENGTH", 1)
    case, model = denoiser()
    model.half()

    def errors(name: str) -> list[float]:
        with use_backend(name), torch.no_grad():
            y = model(case.input("x").half(), torch.tensor(case.meta["t"])).sample
        return [relative_error(y, case.tensors["output.unconditional"])]

    device.counts()
    for mine, reference in zip(errors("auto"), errors("reference"), strict=True):
        assert mine <= NETWORK_16_BIT * reference
    assert device.counts()["mma"] > 0
