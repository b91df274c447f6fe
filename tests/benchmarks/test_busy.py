"""The busy-machine benchmark: its processes end with it, and its table says what the rows say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from training.small import SMALL

from benchmarks import busy, rows
from benchmarks.busy import Job, Stoppable
from pvdm_fast.errors import UserError


def state(process: int) -> str:
    """One letter: R or S at work or waiting, T stopped, Z or "" ended."""
    path = Path(f"/proc/{process}/stat")
    return path.read_text().rpartition(")")[2].split()[0] if path.exists() else ""


def wait_for(process: int, states: str) -> None:
    deadline = time.monotonic() + 60
    while (state(process) or "Z") not in states:
        assert time.monotonic() < deadline, state(process)
        time.sleep(0.02)


def test_a_process_runs_only_while_it_is_let(tmp_path: Path) -> None:
    with Stoppable([sys.executable, "-c", "while True: pass"], tmp_path / "log") as hog:
        hog.stop()
        wait_for(hog.process.pid, "T")
        before = hog.cpu
        with hog.running():
            wait_for(hog.process.pid, "RS")
            deadline = time.monotonic() + 60
            while hog.cpu < before + 0.05:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        wait_for(hog.process.pid, "T")
    assert hog.process.poll() == -signal.SIGKILL


@pytest.mark.slow
def test_processes_end_with_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    """Stopped ones too: the kernel would let them go on when their parent is gone."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.busy import Stoppable\n"
        f"hog = Stoppable([sys.executable, '-c', 'while True: pass'], Path({str(tmp_path / 'log')!r}))\n"
        "hog.stop(); print(hog.process.pid, flush=True); sys.stdin.read()"
    )
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, cwd=root
    )
    assert parent.stdout is not None
    hog = int(parent.stdout.readline())
    try:
        wait_for(hog, "T")
        parent.kill()
        parent.wait()
        wait_for(hog, "Z")
    finally:
        if state(hog) not in ("", "Z"):
            os.kill(hog, signal.SIGKILL)


def test_steps_are_read_once_and_a_run_that_ended_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Job(tmp_path, "run", []) as job:
        assert job.seconds() == []
        job.run.mkdir()
        records = job.run / "metrics.jsonl"
        records.write_text('{"seconds": 1.0}\n{"seconds": 2.0}\n{"sec')
        assert job.wait_for(2) == [1.0, 2.0]
        with records.open("a") as file:
            file.write('onds": 3.0}\n')
        assert job.seconds() == [1.0, 2.0, 3.0]
        job.log.write_text("out of disk")
        with pytest.raises(UserError, match=r"(?s)3 steps and not to 7:.*out of disk"):
            job.pace(settle=0, seconds=0)


def row(busy_processes: int, setting: str, pace: float, **more: Any) -> rows.Row:
    known = {"cpu": "A CPU", "cpu_family": "6/1", "threads": 2, "torch": "2.14", "commit": "abc"}
    found = {"time": "2026-11-27T00:00:00Z", "stage": "diffusion", "busy": busy_processes, "setting": setting}
    measured = {"steps_per_second": pace, "spread": [pace - 1, pace + 1], "cpu": 1.5, "others": 0.25, "load": 3.5}
    return {**found, **measured, "realtime": False, "machine": known, **more}


def test_the_table_has_shares_of_the_quiet_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = [row(0, "all threads", 10), row(2, "ours", 4), row(0, "all threads", 20), row(2, "one thread", 5)]
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    for item in stored:
        rows.append(item, tmp_path / "a.busy.jsonl")
    text = busy.page()
    assert text.startswith("A CPU (family/model 6/1), 2 cores, torch 2.14, commit abc, 2026-11-27:\n\n| stage |")
    assert text.splitlines()[4:] == [
        "| diffusion | 0 | all threads | 20.0 | 19.0-21.0 | 100 % | 1.50 | 0.25 | 3.5 |",
        "| diffusion | 2 | one thread | 5.0 | 4.0-6.0 | 25 % | 1.50 | 0.25 | 3.5 |",
        "| diffusion | 2 | ours | 4.0 | 3.0-5.0 | 20 % | 1.50 | 0.25 | 3.5 |",
    ]
    assert rows.all_paths() == []


def test_a_stage_that_needs_an_autoencoder_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert busy.main(["--stage", "diffusion"]) == 2
    assert "needs --autoencoder RUN" in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_measurement(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of small models: the default ones need 50 s of CPU time for it."""
    threads = SMALL.index("--threads")
    monkeypatch.setattr(busy, "ENDLESS", [*SMALL[:threads], *SMALL[threads + 2 :], *busy.ENDLESS])
    short = ["--busy", "0", "1", "--settle", "0", "--seconds", "0.2", "--rounds", "1", "--no-store"]
    assert busy.main(short) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(line[1], line[2]) for line in lines] == [(str(n), name) for n in (0, 1) for name in busy.SETTINGS]
    assert all(float(line[3]) > 0 for line in lines)
