"""Runs side by side: one table, clips of both, and what differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from evaluation.conftest import make_run

from pvdm_fast.errors import UserError
from pvdm_fast.evaluate import main
from pvdm_fast.evaluation.comparing import names, protocol_differences, score_table

QUICK = ["--clips", "3", "--samples", "1", "--frames", "4", "--steps", "1", "--nearest-among", "4", "--device", "cpu"]


def test_two_runs_have_one_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_run(tmp_path / "<other>")
    (other / "autoencoder").rename(tmp_path / "moved")
    shutil.copytree(run / "autoencoder", other / "autoencoder")
    shutil.rmtree(other / "denoiser")
    out = tmp_path / "out"
    assert main([str(run), str(other), *QUICK, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    header = next(line for line in printed.splitlines() if line.rstrip().endswith("of"))
    assert header.split() == ["run", "<other>", "of"]
    row = next(line for line in printed.splitlines() if line.startswith("reconstruction PSNR"))
    psnr = [json.loads((out / name / "evaluation.json").read_text())["results"]["reconstruction"]["psnr"]["mean"]
            for name in ("run", "<other>")]  # fmt: skip
    assert row.count(f"{psnr[0]:.2f}") == 2 and psnr[0] == psnr[1]
    page = (out / "comparison.html").read_text()
    assert "<other>" not in page and "<h3>&lt;other&gt;</h3>" in page and "Nearest training clips of run" in page
    assert page.count("data:video/mp4") == 3 + 3 + 1 + 1
    assert "autoencoder: loss" in page and "sampling.samples" in page


def test_runs_of_other_data_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("synthetic:shapes", "films"))
    assert main([str(run), str(other), *QUICK]) == 2
    assert "name them with --data, not films and synthetic:shapes" in capsys.readouterr().err
    assert main([str(run), str(run)]) == 2
    assert "must be different folders" in capsys.readouterr().err


def test_names_tell_runs_apart() -> None:
    assert names([Path("/x/one"), Path("/y/two")]) == ["one", "two"]
    assert names([Path("/x/run"), Path("/y/run")]) == ["x/run", "y/run"]
    with pytest.raises(UserError, match="different folders"):
        names([Path("/x/run"), Path("/x/../x/run")])


def test_a_score_that_one_lacks_is_a_dash() -> None:
    base = {"reconstruction": {"clips": 1, "frames": 2, "psnr": None, "ssim": None}, "generation": {}}
    scored = {**base, "reconstruction": {**base["reconstruction"], "psnr": {"mean": 20.0, "standard_error": None}}}
    assert score_table(["a", "b"], [base, scored]) == [
        ("", "a", "b", "of"),
        ("reconstruction PSNR", "-", "20.00 dB", "1 clips of 2 frames"),
    ]
    assert protocol_differences([{"x": 1, "y": 2}, {"x": 1, "y": 3}]) == [("y", "2", "3")]
