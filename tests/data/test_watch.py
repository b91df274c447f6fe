"""Files that hang or crash their reader, and workers that are killed: named and left out, and no batch is lost."""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pvdm_fast.data import Batch, ClipDataset, DataError, Item, clips, make_loader, open_dataset
from pvdm_fast.data.clips import ClipSpec
from pvdm_fast.data.errors import UnreadableVideo
from pvdm_fast.data.watch import reading

SIZE = {"frames": 4, "height": 16, "width": 16}


@pytest.fixture
def hanging(video_folder: Path, tmp_path: Path) -> ClipDataset:
    """Six videos. One has become a pipe that nobody writes to, so opening it never returns."""
    folder = shutil.copytree(video_folder, tmp_path / "videos")
    dataset = open_dataset(folder, **SIZE, read_timeout=2)
    (folder / "b.mkv").unlink()
    os.mkfifo(folder / "b.mkv")
    return dataset


def take(dataset: ClipDataset, count: int, workers: int) -> list[Batch]:
    return list(itertools.islice(make_loader(dataset, batch_size=2, workers=workers), count))


def test_a_file_that_hangs_is_left_out(hanging: ClipDataset, capfd: pytest.CaptureFixture[str]) -> None:
    """Clips are those of a folder whose file is unreadable, no matter who finds out."""
    started = time.monotonic()
    found = take(hanging, 5, workers=2)
    assert time.monotonic() - started < 60
    printed = capfd.readouterr().err
    assert "b.mkv" in printed and "SIGALRM" in printed and "could not be read within 2 s" in printed
    assert any(path.endswith("b.mkv") and "within 2 s" in reason for b in found for path, reason in b["skipped"])
    alone = take(hanging, 5, workers=0)
    assert [batch["names"] for batch in alone] == [batch["names"] for batch in found]
    assert all(torch.equal(a["video"], b["video"]) for a, b in zip(alone, found, strict=True))


def test_in_the_main_process_waiting_is_interrupted(hanging: ClipDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    before, opened = signal.getsignal(signal.SIGALRM), []

    def noted(original: Callable[..., Any]) -> Callable[..., Any]:
        def read(source: Path, *rest: Any) -> Any:
            opened.append(Path(source).name)
            return original(source, *rest)

        return read

    for name in ("packet_index", "read_frames"):
        monkeypatch.setattr(clips, name, noted(getattr(clips, name)))
    skipped = [entry for draw in range(len(hanging)) for entry in hanging[draw]["skipped"]]
    assert [Path(path).name for path, _ in skipped] == ["b.mkv"] * len(skipped) and skipped
    tries = opened.count("b.mkv")
    assert tries > 0
    assert [entry for draw in range(len(hanging)) for entry in hanging[draw]["skipped"]] == skipped
    assert opened.count("b.mkv") == tries, "it is not tried again"
    assert "within 2 s" in skipped[0][1]
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_an_alarm_of_someone_else_is_left_alone() -> None:
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        with reading("a.mp4", 0.01):
            time.sleep(0.05)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 900
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_a_limit_of_nothing_is_no_limit() -> None:
    with reading("a.mp4", 0):
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


class Deeds(ClipDataset):
    """Reads "file 5" at draw 5, and does something there unless the file was set aside."""

    def __init__(self, deed: Callable[[], object]) -> None:
        self.deed, self.reasons = deed, dict[str, str]()
        self.spec = ClipSpec(1, 1, 1, read_timeout=2)

    def __len__(self) -> int:
        return 100

    def set_aside(self, file: str, reason: str) -> None:
        self.reasons[file] = reason

    def __getitem__(self, draw: int) -> Item:
        name = f"file {draw}"
        if draw == 5 and name not in self.reasons:
            with reading(name, self.spec.read_timeout):
                self.deed()
        skipped = [(name, self.reasons[name])] if name in self.reasons else []
        return {"video": torch.full((3, 1, 1, 1), float(draw)), "name": name, "label": None, "skipped": skipped}


def assert_nothing_lost(found: list[Batch]) -> None:
    assert [name for batch in found for name in batch["names"]] == [f"file {draw}" for draw in range(2 * len(found))]


def spin_with_the_interpreter_locked() -> None:
    """No thread and no Python signal handler can end this."""
    while True:
        ctypes.PyDLL(None).pause()


def test_the_kernel_ends_a_reader_that_python_cannot(capfd: pytest.CaptureFixture[str]) -> None:
    dataset = Deeds(spin_with_the_interpreter_locked)
    assert_nothing_lost(take(dataset, 6, workers=2))
    assert dataset.reasons == {"file 5": "could not be read within 2 s"}
    assert "while reading file 5" in capfd.readouterr().err


def test_a_reader_that_crashes_is_not_asked_again(capfd: pytest.CaptureFixture[str]) -> None:
    def crash() -> None:
        faulthandler.disable()  # pytest's would print a traceback
        os.kill(os.getpid(), signal.SIGSEGV)

    dataset = Deeds(crash)
    found = take(dataset, 6, workers=1)
    assert_nothing_lost(found)
    assert found[2]["skipped"] == [("file 5", "ended the process that read it (SIGSEGV)")]
    assert capfd.readouterr().err.count("data worker died") == 1


def test_a_worker_killed_once_is_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def once() -> None:
        if not (tmp_path / "done").exists():
            (tmp_path / "done").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    dataset = Deeds(once)
    assert_nothing_lost(take(dataset, 6, workers=2))
    assert not dataset.reasons
    printed = capfd.readouterr().err
    assert "SIGKILL" in printed and "file 5" in printed and "fewer workers" in printed


def test_the_file_in_hand_at_two_kills_is_left_out() -> None:
    dataset = Deeds(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert_nothing_lost(take(dataset, 6, workers=1))
    assert dataset.reasons == {"file 5": "ended the process that read it (SIGKILL)"}


def test_workers_that_keep_dying_end_the_run() -> None:
    class Ends(Deeds):
        def set_aside(self, file: str, reason: str) -> None:
            pass  # like data without files to leave out

    def crash() -> None:
        faulthandler.disable()
        os.abort()

    with pytest.raises(DataError, match=r"SIGABRT.*while reading file 5.*4th time in a row.*fewer workers"):
        take(Ends(crash), 6, workers=1)


def test_the_reason_is_that_of_an_unreadable_file() -> None:
    with pytest.raises(UnreadableVideo, match=r"within 0\.05 s"), reading("a.mp4", 0.05):
        time.sleep(30)
