"""What is computed in: bfloat16 where a CPU or GPU has units for it, else float32, said in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training.small import SMALL, losses, steps

from pvdm_fast.backends import precision
from pvdm_fast.backends.gemm import compute_dtype
from pvdm_fast.backends.precision import announce, choose_precision
from pvdm_fast.sample import load_models
from pvdm_fast.sample import main as sample_main
from pvdm_fast.train import main

LINE = "this CPU has neither AVX512-BF16 nor AMX-BF16, so float32 is used instead"


@pytest.fixture(params=[False, True], ids=["without units", "with units"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Sets whether the CPU claims to multiply bfloat16. (PyTorch computes it either way.)"""
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "avx512_f"])
def test_the_units_that_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True}, raising=False)
    precision.cpu_multiplies_bfloat16.cache_clear()
    try:
        expected = name.endswith("bf16")
        assert precision.cpu_multiplies_bfloat16() == expected
        assert (compute_dtype(torch.bfloat16) == torch.bfloat16) == expected
    finally:
        precision.cpu_multiplies_bfloat16.cache_clear()


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), amd: str | None = None) -> None:
    """A GPU of this compute capability, or AMD's of this name, as far as precision asks about it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", "6.4" if amd else None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=amd))


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_auto_on_nvidia(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From 8.0 on; what is asked for by name too, but for fp16, which PyTorch itself serves before."""
    gpu(monkeypatch, capability)
    chosen, named = (choose_precision(asked, "cuda") for asked in ("auto", "bf16"))
    if capability >= (8, 0):
        assert str(chosen) == "bf16: chosen by auto, since this GPU has matrix units for it"
        assert str(named) == "bf16: as asked for"
    else:
        reason = "this GPU's compute capability is {}.{}, and bfloat16 begins with 8.0".format(*capability)
        assert str(chosen) == str(named) == f"float32: {reason}"
        assert named.refused and not chosen.refused
    assert str(choose_precision("fp16", "cuda")) == "fp16: as asked for"
    assert str(choose_precision("no", "cuda")) == str(choose_precision("fp32", "cuda")) == "float32: as asked for"


@pytest.mark.parametrize(
    ("name", "serves"),
    [
        ("gfx942:sramecc+:xnack-", True),
        ("gfx90a", True),
        ("gfx950", True),
        ("gfx1100", True),
        ("gfx1201", True),
        ("gfx906", False),
        ("gfx1030", False),
    ],
)
def test_auto_on_amd(name: str, serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, amd=name)
    chosen = choose_precision("auto", "cuda")
    assert chosen.name == ("bf16" if serves else "float32")
    assert serves or f"({name}) has no matrix units" in chosen.why


def test_auto_on_a_cpu_is_float32(units: bool) -> None:
    assert str(choose_precision("auto", "cpu")) == "float32: auto takes 16 bits on GPUs only"


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("auto", "--dtype auto: float32: this GPU's compute capability is 7.5, and bfloat16 begins with 8.0\n"),
        (
            "bf16",
            "--dtype bf16: this GPU's compute capability is 7.5, and bfloat16 begins with 8.0, so float32 is used "
            "instead\n",
        ),
        ("fp16", ""),
        ("fp32", ""),
    ],
)
def test_what_is_said(
    asked: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu(monkeypatch, (7, 5))
    announce(asked, choose_precision(asked, "cuda"), "--dtype")
    assert capsys.readouterr().out == line


@pytest.mark.slow
def test_training(units: bool, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main([*SMALL, *steps(1), "--mixed-precision", "bf16", "--run", str(run)]) == 0
    output = capsys.readouterr().out
    assert output.count(f"--mixed-precision bf16: {LINE}\n") == (0 if units else 1)
    shown = next(line for line in output.splitlines() if line.startswith("precision"))
    assert shown == "precision  " + ("bf16: as asked for" if units else f"float32: {LINE.partition(',')[0]}")
    same = losses(run, "autoencoder")[0] == losses(finished, "autoencoder")[0]  # the same first step, in float32
    assert same != units
    assert len(losses(run, "diffusion")) == 1
    again = [*SMALL, *steps(1), "--stage", "autoencoder", "--mixed-precision", "no", "--run", str(tmp_path / "next")]
    assert main(again) == 0, "the next job of a process chooses its own precision"


def sample(run: Path, out: Path, *arguments: str) -> np.ndarray:
    assert sample_main([str(run), "--out", str(out), "--steps", "3", "--device", "cpu", *arguments]) == 0
    return np.load(out).astype(float)


def test_sampling(units: bool, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With guidance and a second clip, so that every step of the pipeline meets the dtype."""
    options = ("--frames", "6", "--guidance", "1", "--clips", "2")
    exact = sample(finished, tmp_path / "fp32.npy", *options)
    assert LINE not in capsys.readouterr().out
    low = sample(finished, tmp_path / "bf16.npy", *options, "--dtype", "bf16")
    assert capsys.readouterr().out.count(f"--dtype bf16: {LINE}\n") == (0 if units else 1)
    assert (not np.array_equal(low, exact)) == units
    assert np.abs(low - exact).mean() < 2, "of 255 grey levels"
    expected = torch.bfloat16 if units else torch.float32
    for model in load_models(finished, "cpu", "bf16"):
        assert {tensor.dtype for tensor in model.state_dict().values()} == {expected}
