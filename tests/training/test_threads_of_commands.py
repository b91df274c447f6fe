"""``--threads`` of the commands, and that the number of threads doesn't show in what is sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training.small import SMALL, steps

from pvdm_fast import encode, evaluate, sample, train
from pvdm_fast.jobs import threads


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """The numbers of threads that each kind of unit was computed with."""
    found: dict[str, set[int]] = {}
    original = threads.unit

    @contextmanager
    def unit(kind: str) -> Iterator[None]:
        with original(kind):
            found.setdefault(kind, set()).add(torch.get_num_threads())
            yield

    monkeypatch.setattr(threads, "unit", unit)
    return found


def run_command(name: str, finished: Path, out: Path, number: int) -> int:
    asked = ["--threads", str(number), "--device", "cpu"]
    if name == "train":
        return train.main([*SMALL, *steps(1), *asked, "--run", str(out)])
    if name == "sample":
        return sample.main([str(finished), "--out", str(out / "a.npy"), "--steps", "2", "--clips", "1", *asked])
    if name == "encode":
        clips = ["--clips", "2", "--test-clips", "1", "--workers", "0"]
        return encode.main(["synthetic:shapes", str(out), "--autoencoder", str(finished), *clips, *asked])
    clips = ["--clips", "2", "--samples", "1", "--frames", "4", "--steps", "1"]
    return evaluate.main([str(finished), "--out", str(out), *clips, *asked])


KINDS = {
    "train": {"training step", "denoising step"},
    "sample": {"denoising step"},
    "encode": {"batch of clips"},
    "evaluate": {"reconstruction", "denoising step"},
}


@pytest.mark.parametrize("name", KINDS)
def test_the_number_is_taken(name: str, finished: Path, tmp_path: Path, used: dict[str, Any]) -> None:
    before = torch.get_num_threads()
    assert run_command(name, finished, tmp_path / "out", 3) == 0
    assert used == {kind: {3} for kind in KINDS[name]}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("wrong", ["0", "two", "1025"])
def test_a_wrong_number_is_one_sentence(
    name: str, wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"encode": ["a", "b", "--autoencoder", "c"], "sample": ["a"], "evaluate": ["a"], "train": []}[name]
    module = {"encode": encode, "sample": sample, "evaluate": evaluate, "train": train}[name]
    assert module.main([*needed, "--threads", wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --threads must be") and error.count("\n") == 1


def test_a_sample_has_the_same_bytes_for_any_number(finished: Path, tmp_path: Path) -> None:
    """So it may change while a video is sampled: the same seed still gives the same file."""
    for number in (1, 2, 3):
        assert run_command("sample", finished, tmp_path / str(number), number) == 0
    first, *others = (np.load(tmp_path / str(number) / "a.npy") for number in (1, 2, 3))
    assert all(np.array_equal(first, other) for other in others)
