"""Files that can't give a clip are opened once, and again only if the cause may pass or the file has changed."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from data import films
from PIL import Image

from pvdm_fast.data import ClipDataset, DataError, open_dataset, video_reader
from pvdm_fast.data.errors import UnreadableVideo, unreadable

SIZE = {"frames": 4, "height": 16, "width": 16}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is opened."""
    import av

    counts: Counter[str] = Counter()
    real = av.open

    def count(file: object, *arguments: object, **options: object) -> object:
        counts[Path(str(file)).name] += 1
        return real(file, *arguments, **options)

    monkeypatch.setattr(av, "open", count)
    return counts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):  # the hash holds one of them out
        films.encode(tmp_path / f"good{number}.mp4", films.frames(8, seed=number))
    films.encode(tmp_path / "short.mp4", films.frames(2))
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(os.urandom(300))
    (tmp_path / "text.mkv").write_text("no video")
    return tmp_path


def skipped(dataset: ClipDataset, draws: range) -> list[list[tuple[str, str]]]:
    return [sorted(dataset[draw]["skipped"]) for draw in draws]


def test_unusable_files_are_opened_once(folder: Path, opened: Counter[str]) -> None:
    dataset = open_dataset(folder, **SIZE)
    skipped(dataset, range(20))
    before = Counter(opened)
    again = skipped(dataset, range(20, 60))
    assert {name for name, count in opened.items() if count > before[name]} <= {
        f"good{number}.mp4" for number in range(4)
    }
    reasons = {Path(path).name: reason for entries in again for path, reason in entries}
    assert len(reasons) >= 2, "they are still recorded in every item"


def test_a_file_that_has_changed_is_tried_again(folder: Path) -> None:
    dataset = open_dataset(folder, **SIZE)
    names = {Path(path).name for entries in skipped(dataset, range(20)) for path, _ in entries}
    name = sorted(names)[0]
    films.encode(folder / name, films.frames(8))
    found = {dataset[draw]["name"].split("@")[0] for draw in range(20, 60)}
    assert name in found


def test_damage_in_one_window_is_not_held_against_the_others(tmp_path: Path) -> None:
    for number in range(12):
        Image.fromarray(films.frames(1)[0]).save(tmp_path / f"{number}.png")
    (tmp_path / "11.png").write_bytes(b"damaged")
    dataset = open_dataset(tmp_path, **SIZE)
    reasons = []
    for draw in range(30):
        try:
            dataset[draw]
        except DataError as error:
            reasons.append(str(error))
    assert 0 < len(reasons) < 25 and all("11.png cannot be decoded" in reason for reason in reasons)


@pytest.mark.parametrize(("number", "passing"), [(24, True), (5, True), (12, True), (13, False), (2, False)])
def test_causes_that_may_pass(number: int, passing: bool) -> None:
    assert unreadable("cannot be opened", OSError(number, "x")).passing is passing


def test_a_file_is_tried_again_when_the_cause_may_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(folder / "good1.mp4", **SIZE)
    real = video_reader.packet_index

    def busy(source: object) -> object:
        raise unreadable("cannot be opened", OSError(24, "Too many open files"))

    fresh = open_dataset(folder / "good1.mp4", **SIZE)
    fresh._indices.entries.clear()  # type: ignore[attr-defined]
    monkeypatch.setattr("pvdm_fast.data.clips.packet_index", busy)
    with pytest.raises(Exception, match="Too many open files"):
        fresh[1]
    monkeypatch.setattr("pvdm_fast.data.clips.packet_index", real)
    assert fresh[1]["name"] == dataset[1]["name"] and issubclass(UnreadableVideo, Exception)
