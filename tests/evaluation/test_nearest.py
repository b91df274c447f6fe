"""The nearest training clips: planted copies are found, and the page and the results say how near they are."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pvdm_fast.evaluate import main
from pvdm_fast.evaluation.clips import open_clips
from pvdm_fast.evaluation.nearest import NEIGHBOURS, distances, search, small_pixels

QUICK = ["--clips", "3", "--samples", "3", "--frames", "4", "--steps", "1", "--batch-size", "2", "--device", "cpu"]


def test_the_distance_is_the_root_mean_square_of_grey_levels() -> None:
    dark, light = torch.full((1, 3, 2, 64, 96), -1.0), torch.full((1, 3, 2, 64, 96), -1.0)
    light[:, 0] += 2 * 51 / 255
    assert small_pixels(dark).shape == (1, 3 * 2 * 32 * 48)
    assert distances(small_pixels(dark), small_pixels(light)).item() == pytest.approx(51 / 3**0.5, abs=1e-3)
    assert small_pixels(torch.zeros(1, 3, 2, 16, 24)).shape == (1, 3 * 2 * 16 * 24), "never enlarged"


def test_planted_copies_are_found() -> None:
    training = open_clips("synthetic:shapes", "train", frames=3, size=(16, 16), stride=1, seed=0)
    planted = [training[draw]["video"] for draw in (17, 4)]
    blurred = torch.stack([training[draw]["video"] for draw in range(20)]).mean(0)
    queries = torch.stack([*planted, blurred])[:, :, :2]
    evaluation: Any = SimpleNamespace(request=SimpleNamespace(batch_size=8, workers=0))
    stop: Any = SimpleNamespace(number=None)
    found = search(queries, training, 20, evaluation, stop)
    assert found.clips.shape == (3, 20) and found.unreadable == {}
    assert found.clips[:2, 0].tolist() == [17, 4] and found.relative[:2].tolist() == [0, 0]
    assert found.relative[2] > 0.5, "it is near to all, and no copy"
    assert torch.equal(found.distances, found.distances.sort(1).values)
    every = distances(
        small_pixels(queries), small_pixels(torch.stack([training[n]["video"][:, :2] for n in range(20)]))
    )
    assert torch.equal(every.gather(1, found.clips), found.distances)


def test_only_the_nearest_are_kept() -> None:
    training = open_clips("synthetic:shapes", "train", frames=1, size=(8, 8), stride=1, seed=0)
    clips = torch.stack([training[draw]["video"] for draw in range(64)])
    evaluation: Any = SimpleNamespace(request=SimpleNamespace(batch_size=7, workers=0))
    stop: Any = SimpleNamespace(number=None)
    found = search(clips[3:4], training, 64, evaluation, stop)
    every = distances(small_pixels(clips[3:4]), small_pixels(clips)).sort(1).values
    assert torch.equal(found.distances, every[:, :NEIGHBOURS]) and found.clips[0, 0] == 3


def test_the_results_and_the_page_have_them(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(run), *QUICK, "--shown", "2", "--nearest-among", "12", "--out", str(tmp_path)]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())["results"]["nearest"]
    assert found["among"] == 12 and found["videos"] == 4096 and "root mean square" in found["distance"]
    assert len(found["samples"]) == 2 and len(found["held_out"]) == 2
    assert all(0 <= row["clip"] < 12 and 0 < row["relative"] <= 1 for row in found["samples"] + found["held_out"])
    page = (tmp_path / "report.html").read_text()
    assert "Nearest training clips" in page and "the nearest of 12 training clips" in page
    assert page.count("data:video/mp4") == 6
    assert "samples, nearest training clip" in capsys.readouterr().out
    assert main([*arguments, "--shown", "3"]) == 0, "one more of each is made, nothing is measured again"
    assert (tmp_path / "report.html").read_text().count("data:video/mp4") == 9
    assert main([*arguments, "--nearest-among", "0"]) == 0
    results = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert results["nearest"] is None and "nearest training clips of samples: not asked for" in results["missing"]
