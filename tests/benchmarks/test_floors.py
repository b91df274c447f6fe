"""The formulas of FLOPs against PyTorch's own count, and the floors that they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import floors
from benchmarks.eager import EagerDenoiser, Residual, Variant
from benchmarks.eager_autoencoder import EagerAutoencoder
from benchmarks.registry import Setting

PLAIN = Variant(recompute=False)
SIZES = pytest.mark.parametrize(
    "size", ["tiny", *(pytest.param(size, marks=pytest.mark.slow) for size in ("small", "base"))]
)


def counted(run: Any, *arguments: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run(*arguments)
    return counter.get_total_flops()


@SIZES
def test_denoiser(size: str) -> None:
    config = Setting(size).denoiser
    with FakeTensorMode(), torch.no_grad():
        model = EagerDenoiser(**config, variant=PLAIN)
        latent = torch.empty(1, 4, Setting(size).layout.num_tokens)
        total = counted(model, latent, torch.zeros(1))
    # The release's blocks are called once per plane, and map the time embedding three times.
    maps = [module.emb_layers[1] for module in model.modules() if isinstance(module, Residual)]
    repeated = 2 * sum(floors.linear(1, layer.in_features, layer.out_features) for layer in maps)
    assert total - repeated == floors.denoiser(config)


@SIZES
def test_autoencoder(size: str) -> None:
    config = Setting(size).autoencoder
    with FakeTensorMode(), torch.no_grad():
        model = EagerAutoencoder(**config, variant=PLAIN)
        video = torch.empty(1, 3, config["frames"], config["height"], config["width"])
        latent = torch.empty(1, 4, Setting(size).lattice.num_tokens)
        assert counted(model.encode, video) == floors.encoder(config, whole=True)
        assert counted(model.decode, latent) == pytest.approx(floors.decoder(config), rel=2e-3)
    assert floors.encoder(config) < floors.encoder(config, whole=True)


def test_full_size_is_the_published_figure() -> None:
    assert floors.denoiser(Setting("base").denoiser) == pytest.approx(243e9, rel=0.01)
    assert floors.encoder(Setting("base").autoencoder, whole=True) == pytest.approx(1.44e12, rel=0.01)
    assert floors.decoder(Setting("base").autoencoder) == pytest.approx(1.16e12, rel=0.01)


def test_work_of_directions() -> None:
    forward, backward, both = (floors.work(d, 100.0, 8, 4, 2) for d in ("forward", "backward", "both"))
    assert (forward.flops, forward.bytes) == (100, 14)
    assert (backward.flops, backward.bytes) == (200, 26)
    assert (both.flops, both.bytes) == (300, 40)


def test_floor_is_the_slower_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "gemm_peak", lambda dtype, device: 100.0)
    monkeypatch.setattr(floors, "bandwidth", lambda working_set, device: 10.0)
    bound = floors.floor(floors.Work(1000, 10), torch.float32, "cpu")
    assert (bound.seconds, bound.bound) == (10.0, "arithmetic")
    bound = floors.floor(floors.Work(10, 1000), torch.float32, "cpu")
    assert (bound.seconds, bound.bound) == (100.0, "memory")


def test_peaks_are_kept_and_never_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "_seen", {})
    assert floors._highest("a", 2.0) == 2.0
    assert floors._highest("a", 1.0) == 2.0
    floors.save_peaks(tmp_path / "peaks.json")
    monkeypatch.setattr(floors, "_seen", {"a": 1.0, "b": 3.0})
    floors.load_peaks(tmp_path / "peaks.json")
    assert floors._seen == {"a": 2.0, "b": 3.0}


def test_measured_peaks_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "_seen", {})
    assert 1e8 < floors.bandwidth(1 << 20, "cpu") < 1e13


def test_peaks_are_timed_again_beside_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quicker later counts from then on; a tenth of the time goes to it at most."""
    now, calls = [0.0], {"product": 0, "copy": 0}

    def run(name: str, seconds: float) -> None:
        calls[name] += 1
        now[0] += seconds if calls[name] == 1 else seconds / 2

    product = floors.Probe("FLOP/s cpu float32", 100.0, lambda: run("product", 2.0), "cpu")
    copy = floors.Probe("bytes/s cpu 1 MiB", 10.0, lambda: run("copy", 1.0), "cpu")
    monkeypatch.setattr(floors.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(floors, "_seen", {})
    monkeypatch.setattr(floors, "_gemm_probe", lambda dtype, device, tf32: product)
    monkeypatch.setattr(floors, "_bandwidth_probe", lambda size, device: copy)
    assert (product.measure(0), copy.measure(0)) == (50.0, 10.0)
    needed = floors.Work(1000, 10)
    assert floors.floor(needed, torch.float32, "cpu").seconds == 20.0
    again = floors.beside(needed, torch.float32, "cpu")
    for _ in range(5):
        again()
    assert calls == {"product": 2, "copy": 2}
    now[0] += 13.5
    again()
    assert calls == {"product": 3, "copy": 3}
    bound = floors.floor(needed, torch.float32, "cpu")
    assert (bound.seconds, bound.flops_per_second, bound.bytes_per_second) == (10.0, 100.0, 20.0)
