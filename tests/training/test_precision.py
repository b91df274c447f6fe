"""bfloat16 on a CPU: used if the CPU has units for it, otherwise float32, and one line says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from training.small import SMALL, losses, steps

from pvdm_fast.backends import precision
from pvdm_fast.backends.gemm import compute_dtype
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


@pytest.mark.slow
def test_training(units: bool, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main([*SMALL, *steps(1), "--mixed-precision", "bf16", "--run", str(run)]) == 0
    output = capsys.readouterr().out
    assert output.count(f"--mixed-precision bf16: {LINE}\n") == (0 if units else 1)
    machine = next(line for line in output.splitlines() if line.startswith("machine"))
    assert machine.endswith("bf16" if units else "float32")
    same = losses(run, "autoencoder")[0] == losses(finished, "autoencoder")[0]  # the same first step, in float32
    assert same != units
    assert len(losses(run, "diffusion")) == 1


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
