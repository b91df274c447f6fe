"""Runs that are followed elsewhere: TensorBoard's event files, and what W&B is given by a stand-in of its module."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from training.small import SMALL, steps

from pvdm_fast.train import main


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_tensorboard(tmp_path: Path) -> None:
    """Scalars of the records, pictures, and previews as GIFs that move."""
    pytest.importorskip("tensorboard", reason="TensorBoard is an extra: pip install -e '.[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*SMALL, *steps(1), "--tensorboard", "--run", str(tmp_path / "run")]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"autoencoder/loss", "autoencoder/psnr", "diffusion/held_out_loss"} <= set(events.Tags()["scalars"])
    stages = ("autoencoder", "diffusion")
    assert set(events.Tags()["images"]) == {f"{stage}/{name}" for stage in stages for name in ("preview", "frames")}
    for stage, frames in (("autoencoder", 4), ("diffusion", 8)):
        (shown,) = events.Images(f"{stage}/preview")
        with Image.open(io.BytesIO(shown.encoded_image_string)) as image:
            assert (image.format, image.n_frames, image.size) == ("GIF", frames, (shown.width, shown.height))


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.metrics: dict[str, str | None] = {}
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics[name] = step_metric

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


class FakeWandB(ModuleType):
    """What of wandb is used."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[tuple[dict[str, Any], FakeRun]] = []
        self.refuses = False

    def init(self, **options: Any) -> FakeRun:
        if self.refuses:
            raise self.Error("No API key configured")
        self.started.append((options, FakeRun()))
        return self.started[-1][1]

    def Settings(self, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(**options)

    def Video(self, path: str, format: str) -> tuple[str, int]:
        return format, Path(path).stat().st_size

    def Image(self, path: str) -> tuple[str, int]:
        return "png", Path(path).stat().st_size


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    module = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


@pytest.mark.slow
def test_wandb_gets_records_videos_and_pictures(wandb: FakeWandB, tmp_path: Path) -> None:
    run = tmp_path / "named"
    assert main([*SMALL, *steps(2), "--stage", "autoencoder", "--wandb", "--run", str(run)]) == 0
    options, first = wandb.started[0]
    assert (options["project"], options["name"], options["dir"]) == ("pvdm-fast", "named", str(run))
    assert options["config"]["autoencoder.steps"] == 2 and options["resume"] == "allow"
    assert first.metrics["autoencoder/*"] == "autoencoder/step" and first.exit_code == 0
    assert [values["autoencoder/step"] for values in first.logged] == [1, 2, 2, 2]
    assert "autoencoder/loss" in first.logged[0] and "autoencoder/psnr" in first.logged[2]
    (kind, size), (picture, _) = first.logged[3]["autoencoder/preview"], first.logged[3]["autoencoder/frames"]
    assert (kind, picture) == ("mp4", "png") and size == (run / "reconstructions.mp4").stat().st_size
    assert main(["--resume", str(run), "--stage", "diffusion"]) == 0
    again, second = wandb.started[1]
    assert again["id"] == options["id"], "it goes on where it was"
    assert {key for values in second.logged for key in values} >= {"diffusion/loss", "diffusion/preview"}


def test_wandb_that_cannot_start_is_one_sentence(
    wandb: FakeWandB, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.refuses = True
    assert main([*SMALL, *steps(1), "--wandb", "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "W&B cannot start: No API key configured; log in with" in error and error.count("\n") == 1
