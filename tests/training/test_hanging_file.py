"""A video that hangs its reader costs the run one time-out, and the resumed run none."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from training.small import SMALL, losses

from pvdm_fast.data import clips, open_dataset, write_video
from pvdm_fast.train import main


@pytest.mark.slow
def test_a_run_goes_on_past_a_file_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "videos").mkdir()
    for number in range(4):
        film = np.random.default_rng(number).integers(0, 255, (6, 16, 16, 3), np.uint8)
        write_video(tmp_path / "videos" / f"{number}.mp4", film)
    opened, original = [], clips.read_frames
    held_out = open_dataset(tmp_path / "videos", frames=4, height=16, width=16, split="test")
    hanging = next(str(path) for path in sorted((tmp_path / "videos").iterdir()) if path != held_out.videos[0].path)

    def read_frames(source: Path, *arguments: object) -> object:
        if str(source) == hanging:
            opened.append(source)
            if len(opened) > 1:  # the first time is the look by open_dataset
                time.sleep(60)
        return original(source, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(clips, "read_frames", read_frames)
    run = tmp_path / "run"
    options = [
        "--data",
        str(tmp_path / "videos"),
        "--read-timeout",
        "1",
        "--save-every",
        "2",
        "--stage",
        "autoencoder",
    ]
    assert main([*SMALL, *options, "--autoencoder-steps", "4", "--run", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())["autoencoder"]
    assert results["unreadable_files"] == {hanging: "could not be read within 1 s"}
    whole = losses(run, "autoencoder")
    shutil.rmtree(run / "checkpoints" / "autoencoder-step-0000004")  # as if it had been killed after step 2
    (run / "results.json").unlink()
    tries = len(opened)
    assert main(["--resume", str(run)]) == 0
    assert losses(run, "autoencoder") == whole
    assert len(opened) - tries <= 1, "open_dataset may look at it, training does not"
