"""Held-out scores: how they are said and drawn, and stages that --early-stop ends, with planned scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training.small import SMALL, same_weights, steps, weights

from pvdm_fast.train import main
from pvdm_fast.training import checkpoint, previews, trainer
from pvdm_fast.training.scores import Best, score_text
from pvdm_fast.training.stages import AutoencoderStage

PLANNED = (10.0, 12.0, 11.0, 9.0, 13.0, 14.0)
EVERY_2 = ["--stage", "autoencoder", "--autoencoder-steps", "12", "--preview-every", "2", "--save-every", "2"]
ARGUMENTS = [*SMALL, *EVERY_2, "--early-stop", "2"]


STAGES = ("autoencoder", "diffusion")


class Crash(BaseException):
    """Nothing catches this, so everything in memory is lost."""


def plan(monkeypatch: pytest.MonkeyPatch, crash_at: int | None = None) -> list[int]:
    """Make the PSNR of step 2 n the n-th of PLANNED. Returns the steps that were scored, as they come."""
    scored: list[int] = []
    score = trainer.Trainer.score

    def planned(self: trainer.Trainer) -> None:
        if self.progress.step == crash_at:
            raise Crash
        scored.append(self.progress.step)
        value = PLANNED[self.progress.step // 2 - 1]
        monkeypatch.setattr(AutoencoderStage, "score", lambda stage, videos: {"psnr": value})
        score(self)

    monkeypatch.setattr(trainer.Trainer, "score", planned)
    return scored


def result(run: Path) -> dict[str, Any]:
    found = json.loads((run / "results.json").read_text())["autoencoder"]
    return {name: value for name, value in found.items() if name != "seconds"}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        scored = plan(monkeypatch)
        assert main([*ARGUMENTS, "--run", str(run)]) == 0
        assert scored == [2, 4, 6, 8]
    return run


@pytest.mark.slow
def test_the_stage_ends_and_the_best_weights_are_kept(stopped: Path) -> None:
    assert result(stopped) == {
        "steps": 8,
        "best_step": 4,
        "psnr": 12.0,
        "planned_steps": 12,
        "scores_waited": 2,
        "unreadable_files": {},
    }
    best = checkpoint.load(checkpoint.Checkpoint(0, 4, stopped / "best" / "autoencoder-step-0000004"))
    saved = weights(stopped, "autoencoder")
    assert all(torch.equal(saved[name], best["model"][name]) for name in saved)
    newest, _ = checkpoint.newest_good(stopped / "checkpoints")
    assert newest is not None and newest.step == 8
    last = checkpoint.load(newest)["model"]
    assert any(not torch.equal(saved[name], last[name]) for name in saved)


@pytest.mark.slow
@pytest.mark.parametrize("crash_at", [4, 8])
def test_a_crash_changes_nothing(crash_at: int, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as crashing:
        plan(crashing, crash_at)
        with pytest.raises(Crash):
            main([*ARGUMENTS, "--run", str(run)])
    plan(monkeypatch)
    assert main(["--resume", str(run)]) == 0
    assert result(run) == result(stopped)
    assert same_weights(run, stopped, "autoencoder")


@pytest.mark.slow
def test_how_it_goes_on(stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Not by itself, not with more steps alone, but with more patience. Last, because it changes the run."""
    scored = plan(monkeypatch)
    assert main(["--resume", str(stopped)]) == 0 and not scored
    assert main(["--resume", str(stopped), "--autoencoder-steps", "20"]) == 2
    assert "say --early-stop none, or more than 2" in capsys.readouterr().err
    assert main(["--resume", str(stopped), "--early-stop", "3"]) == 0
    assert scored == [10, 12]
    found = result(stopped)
    assert (found["steps"], found["best_step"], found["psnr"]) == (12, 12, 14.0) and "planned_steps" not in found


@pytest.mark.slow
def test_without_early_stop_the_last_weights_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(monkeypatch)
    run = tmp_path / "run"
    assert main([*SMALL, *EVERY_2, "--autoencoder-steps", "6", "--run", str(run)]) == 0
    assert result(run) == {"steps": 6, "psnr": 11.0, "unreadable_files": {}}
    assert not (run / "best").exists()
    said = [line for line in capsys.readouterr().out.splitlines() if "held-out" in line and "step " in line]
    assert said[:3] == [
        "autoencoder step 2: held-out PSNR 10.00 dB",
        "autoencoder step 4: held-out PSNR 12.00 dB, the best so far",
        "autoencoder step 6: held-out PSNR 11.00 dB (best: PSNR 12.00 dB at step 4)",
    ]


def test_discriminators_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main([*SMALL, *steps(2), "--early-stop", "1", "--adversarial-start", "1", "--run", str(run)]) == 2
    assert "leave out --early-stop, or --adversarial-start" in capsys.readouterr().err
    assert not run.exists()


def test_which_scores_are_best() -> None:
    """A smaller loss is better, a NaN is never better than a number, an equal score is not a new best."""
    best = Best()
    assert best.add({"held_out_loss": float("nan")}, 1) and best.add({"held_out_loss": 0.5}, 2)
    assert not best.add({"held_out_loss": 0.5}, 3) and not best.add({"held_out_loss": float("nan")}, 4)
    assert (best.step, best.waited) == (2, 2)
    assert best.add({"held_out_loss": 0.4}, 5) and best.waited == 0
    assert score_text({"psnr": 24.314, "lpips": 0.2, "steps": 3}) == "PSNR 24.31 dB, LPIPS 0.2000"


@pytest.mark.usefixtures("drawn")
def test_the_curves_show_held_out_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(previews, "_save_figure", lambda figure, path: drawn.append(figure))
    records: list[dict[str, Any]] = [
        {"stage": stage, "step": step, "loss": 1 / step} for stage in STAGES for step in range(1, 9)
    ]
    records += [
        {"stage": "autoencoder", "step": 8, "psnr": 20.0},
        {"stage": "diffusion", "step": 8, "held_out_loss": 0.3},
    ]
    previews.write_loss_curves(tmp_path / "loss.png", records)
    autoencoder, diffusion, psnr = drawn[0].axes
    assert (psnr.get_ylabel(), psnr.lines[0].get_ydata().tolist()) == ("held-out PSNR (dB)", [20.0])
    held_out = diffusion.lines[-1]
    assert (held_out.get_label(), list(held_out.get_xdata()), list(held_out.get_ydata())) == (
        "held-out loss",
        [8],
        [0.3],
    )
    assert [text.get_text() for text in diffusion.get_legend().get_texts()] == ["loss", "held-out loss"]
    assert autoencoder.get_ylabel() == "loss"
