"""How batches come from workers: full shared memory, batches that never come, abandoned workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from data.test_data_loader import Probe, take

from pvdm_fast.data import DataError, crossing, loader
from pvdm_fast.data.clips import Item
from pvdm_fast.data.loader import make_loader
from pvdm_fast.data.watch import reading

SENTENCE = r"/dev/shm has .* MB free\)?: give the container more .*--shm-size.*fewer --workers \(0 reads"


def test_no_room_in_shared_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossing, "_room", lambda: (0.0, 1e9))
    monkeypatch.setattr(crossing, "ROOM_SECONDS", 0.3)
    with pytest.raises(DataError, match=f"a batch of clips takes 0.0 MB of shared memory, but {SENTENCE}") as error:
        take(make_loader(Probe("none"), batch_size=2, workers=2), 3)
    assert "\n" not in str(error.value)


def test_room_that_comes_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = time.time()
    monkeypatch.setattr(crossing, "_room", lambda: (1e9 * (time.time() > before + 1), 1e9))
    assert len(take(make_loader(Probe("none"), batch_size=2, workers=1), 3)) == 3


def test_a_batch_larger_than_all_of_it_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossing, "_room", lambda: (1.0, 1.0))
    monkeypatch.setattr(crossing, "ROOM_SECONDS", 600)
    with pytest.raises(DataError, match=SENTENCE):
        take(make_loader(Probe("none"), batch_size=2, workers=1), 3)


class Slow(Probe):
    """Takes its time at draw 4, with or without an open file."""

    def __getitem__(self, draw: int) -> Item:
        if draw == 4:
            if self.deed == "reads":
                with reading("a film", 0):
                    time.sleep(4)
            else:
                time.sleep(600)
        return super().__getitem__(draw)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossing, "LOST_SECONDS", 1.0)
    monkeypatch.setattr(loader, "POLL_SECONDS", 0.5)


def test_a_batch_that_never_comes_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    batches = iter(make_loader(Slow("sleeps"), batch_size=2, workers=1))
    next(batches), next(batches)
    started = time.monotonic()
    with pytest.raises(DataError, match=f"no batch of clips came for 1 s.*{SENTENCE}"):
        next(batches)
    assert time.monotonic() - started < 30, "the stuck worker is not waited for"


@pytest.mark.slow
def test_a_file_in_hand_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    batches = take(make_loader(Slow("reads"), batch_size=2, workers=1), 4)
    assert [place for batch in batches for _, place in batch["skipped"]] == list("01234567")


def test_an_error_in_a_worker_is_its_sentence_alone() -> None:
    with pytest.raises(DataError) as error:
        take(make_loader(Probe("fail"), batch_size=2, workers=1), 9)
    assert str(error.value) == "no usable video in nowhere"


def test_workers_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", refused)
    with pytest.raises(DataError, match=r"cannot start 3 data workers: Resource temporarily unavailable; .*--workers"):
        take(make_loader(Probe("none"), batch_size=2, workers=3), 1)


PARENT = """
import multiprocessing, time
from data.test_data_loader import Probe
from pvdm_fast.data.loader import make_loader
batches = iter(make_loader(Probe("none"), batch_size=1, workers=2))
next(batches)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_workers_die_with_their_parent() -> None:
    tests = Path(__file__).resolve().parents[1]
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=tests)
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 2 and all(Path(f"/proc/{pid}").exists() for pid in workers)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 2
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process exists and isn't a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Signalled(Probe):
    """Receives every signal that a scheduler sends to the whole group."""

    def __getitem__(self, draw: int) -> Item:
        for name in ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPWR"):
            os.kill(os.getpid(), getattr(signal, name))
        return super().__getitem__(draw)


def test_workers_leave_every_signal_to_the_trainer(capfd: pytest.CaptureFixture[str]) -> None:
    assert len(take(make_loader(Signalled("none"), batch_size=2, workers=2), 4)) == 4
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a small file system over /dev/shm")
def test_a_small_shared_memory(tmp_path: Path) -> None:
    """The real thing: 1 MB of shared memory, as in a container, and batches of 1.5 MB."""
    code = (
        "from pvdm_fast.data.loader import make_loader; from pvdm_fast.data import open_dataset\n"
        "d = open_dataset('synthetic:shapes', frames=4, height=256, width=256)\n"
        "next(iter(make_loader(d, batch_size=2, workers=2)))"
    )
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    check = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False)
    if check.returncode:
        pytest.skip("may not mount here")
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec {sys.executable} -c "$0"', code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    last = result.stderr.strip().splitlines()[-1]
    assert "DataError: a batch of clips takes 1.6 MB of shared memory, but /dev/shm has 1.0 MB free" in last
