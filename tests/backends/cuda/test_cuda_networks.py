"""The backend "cuda-emulated" (`emulated.registered`): operations and whole networks on the CUDA kernels."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from backends.cuda import emulated
from comparison import assert_close, relative_error
from golden_tools import GoldenCase, load_case
from models.test_golden import check_gradients
from ops.test_operations import sliced, tolerance_of, transposed
from tolerances import ATTENTION_16_BIT, GOLDEN_NETWORK, NETWORK_16_BIT

from pvdm_fast import TriplaneLayout, ops, use_backend
from pvdm_fast.analysis.cases import SMALL, run_with_gradients
from pvdm_fast.backends import choice
from pvdm_fast.backends.choice import ATTENTION, KERNEL_DTYPES, SERVED, BackendError
from pvdm_fast.backends.cuda import attention
from pvdm_fast.layout import PlaneLayout
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.models.release import load_release_autoencoder, load_release_denoiser

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: install g++")
FORMS = {"contiguous": lambda t: t, "transposed": transposed, "sliced": sliced}


@pytest.fixture(scope="module", autouse=True)
def device(emulated_device: ModuleType) -> Iterator[ModuleType]:
    with emulated.registered(emulated_device):
        yield emulated_device


def kernels() -> list[tuple[str, torch.dtype, bool]]:
    """(case, dtype, whether by tensor cores), which are for attention in 16 bits."""
    served = [(name, case.op) for name, case in SMALL.items() if case.op in SERVED["cuda"]]
    halves = [(name, dtype, True) for name, op in served if op in ATTENTION for dtype in KERNEL_DTYPES[1:]]
    return [(name, dtype, False) for name, _ in served for dtype in KERNEL_DTYPES] + halves


@pytest.mark.parametrize(("name", "dtype", "matrix"), kernels())
@pytest.mark.parametrize("form", FORMS)
def test_equals_reference(
    monkeypatch: pytest.MonkeyPatch, name: str, form: str, dtype: torch.dtype, matrix: bool
) -> None:
    """As tests/ops/test_operations.py tests every backend, through the registered operation; also by tensor cores."""
    case = SMALL[name]
    monkeypatch.setattr(attention, "MATRIX_LENGTH", 1 if matrix else 1 << 30)
    inputs = {n: FORMS[form](t) for n, t in case.inputs(dtype).items()}
    with use_backend("reference"):
        expected = run_with_gradients(case, {n: t.double() for n, t in inputs.items()}, dtype)
    with use_backend(emulated.BACKEND):
        actual = run_with_gradients(case, inputs, dtype)
        again = run_with_gradients(case, inputs, dtype)
    for what, tensor in actual.items():
        assert tensor.dtype == dtype and torch.equal(tensor, again[what])
        assert_close(tensor, expected[what], ATTENTION_16_BIT[dtype] if matrix else tolerance_of(case.op, what, dtype))


def served() -> dict[str, str]:
    return {op: choice.automatic(op, "cpu", torch.float32) for op in choice.OPERATIONS}


def test_automatic_choice_keeps_to_the_limits() -> None:
    """Beyond the kernels' limits the next backend serves; asked for by name, this one says what the limit is."""
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
def test_denoiser_on_tensor_cores(monkeypatch: pytest.MonkeyPatch, device: ModuleType) -> None:
    """In float16 the network is as far from the golden values as with the reference in float16 (backward: minutes)."""
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
