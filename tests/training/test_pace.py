"""How long training takes: the words, the arithmetic, and steps that are really measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from training import small

from pvdm_fast import estimate, train
from pvdm_fast.training import pace, trainer
from pvdm_fast.training.config import make_config
from pvdm_fast.training.pace import Pace, about, measure

SMALL = ["--frames", "2", "--height", "8", "--width", "8", "--batch-size", "2", "--stage", "autoencoder"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (3, "less than a minute"),
        (60, "about 1 minute"),
        (100, "about 1.7 minutes"),
        (720, "about 12 minutes"),
        (5400, "about 1.5 hours"),
        (86_400, "about 24 hours"),
        (7.2 * 86_400, "about 7 days"),
    ],
)
def test_durations_read_well(seconds: float, words: str) -> None:
    assert about(seconds) == words


def test_the_first_step_does_not_count() -> None:
    measured = Pace()
    for seconds in (30.0, 2.0, 4.0):
        measured.add(seconds)
    assert measured.a_step == 3.0
    line = "diffusion: about 5 minutes for 100 steps here (3 s a step, measured over 2 steps)"
    assert measured.line("diffusion", 100) == line
    alone = Pace()
    alone.add(30.0)
    assert alone.a_step == 30.0 and "over one step" in alone.line("diffusion", 1)


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_real_steps_are_measured(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole batch where they fit in the time, else of one clip, times the batch."""
    sizes = {"video.frames": 2, "video.height": 8, "video.width": 8, f"{stage}.batch_size": 2, f"{stage}.accumulate": 3}
    config = make_config({**sizes, "device": "cpu"})
    taken: list[tuple[int, int]] = []
    step = trainer.Trainer.train_step

    def counted(self: trainer.Trainer, batches: list[trainer.Batch]) -> dict[str, object]:  # type: ignore[name-defined]
        taken.append((len(batches), len(batches[0]["video"])))
        return step(self, batches)

    monkeypatch.setattr(trainer.Trainer, "train_step", counted)
    found = measure(config, stage, 1e-6)
    assert taken == [(1, 1)] and found.steps == 0 and found.a_step > 0
    monkeypatch.setattr(pace, "_take_steps", lambda config, name, accelerator, seconds: Pace(1.0, 2, 4.0))
    assert measure(config, stage, 20.0).a_step == 12.0
    assert measure(config, stage, 48.0).a_step == 2.0


def test_the_command_says_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate.main([*SMALL, "--measure", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\nautoencoder: (about|less than) .* for 5000 steps here \(.* s a step, measured over ", printed)


def test_training_says_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the first steps after the warm-up are slow."""
    monkeypatch.setattr(trainer, "PACE_SECONDS", 1e-6)
    options = [*small.SMALL, *small.steps(4), "--stage", "autoencoder"]
    assert train.main([*options, "--run", str(tmp_path / "run")]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if " s a step" in line]
    assert len(said) == 1 and "for 2 steps here" in said[0] and "measured over one step" in said[0]


def test_what_does_not_fit_is_not_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pace, "free_bytes", lambda device: 1024)
    monkeypatch.setattr(pace, "measure", lambda *arguments: pytest.fail("measured"))
    assert estimate.main(SMALL) == 0
    assert "autoencoder: the time is not measured, because a step needs" in capsys.readouterr().out
