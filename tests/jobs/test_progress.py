"""Bars: what they say of the pace is what the pace was."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from pvdm_fast.jobs import progress
from pvdm_fast.jobs.progress import StepBar


def record(seconds: float, loss: float | None = 1.0) -> dict[str, Any]:
    left_out = {} if loss is not None else {"clips": ["a", "b"], "skipped": "a loss of nan"}
    return {"step": 7, "loss": loss, "seconds": seconds, **left_out}


def test_the_speed_is_that_of_all_steps_together(capsys: pytest.CaptureFixture[str]) -> None:
    """Steps of 0.1 s and 1.9 s in turn, 8 clips each: 8 clips a second. The mean of the speeds would be 42."""
    with StepBar("autoencoder", 1000, 0) as bar:
        for _ in range(200):
            bar.advance(record(0.1), 8)
            bar.advance(record(1.9), 8)
        text = bar.bar.postfix
    found = re.fullmatch(r"loss 1\.0000, ([\d.]+) clips/s", text)
    assert found and float(found[1]) == pytest.approx(8, rel=0.06)


def test_a_step_that_was_left_out_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with StepBar("autoencoder", 10, 0) as bar:
        bar.advance(record(0.5, None), 2)
        assert bar.bar.postfix == "loss none yet, 4.0 clips/s"
    assert "step 7 left out: a loss of nan; clips: a, b" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_the_time_left_follows_a_machine_that_becomes_busy(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pace of ten steps a second falls to one: a minute later the time left is what it will take."""
    now = [0.0]
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 5.0)
    bar = progress.make_bar("steps", 10_000)
    bar._time = lambda: now[0]
    bar.start_t = bar.last_print_t = 0.0
    for seconds, steps in ((0.1, 600), (1.0, 60)):
        for _ in range(steps):
            now[0] += seconds
            bar.update(1)
    left = (bar.total - bar.n) / bar.format_dict["rate"]
    bar.close()
    assert left == pytest.approx((10_000 - 660) * 1.0, rel=0.2)


def test_a_log_gets_whole_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of ten minutes of steps: a line every half minute, one at the end, and what is said; never a carriage return."""
    now = [0.0]
    with StepBar("autoencoder", 600, 0) as bar:
        bar.bar._time = lambda: now[0]
        bar.bar.start_t = bar.bar.last_print_t = 0.0
        for step in range(600):
            now[0] += 1.0
            bar.advance(record(1.0), 8)
            if step == 299:
                progress.say("autoencoder step 300: held-out PSNR 20.00 dB")
    printed = capsys.readouterr()
    assert "\r" not in printed.err + printed.out and printed.out == "autoencoder step 300: held-out PSNR 20.00 dB\n"
    lines = printed.err.splitlines()
    assert len(lines) == 600 / progress.QUIET_SECONDS + 1
    assert lines[0] == "autoencoder   5% 30/600 [00:30, 09:30 left, loss 1.0000, 8.0 clips/s]"
    assert lines[-1].startswith("autoencoder 100% 600/600 [10:00, 00:00 left")


def test_a_short_job_leaves_one_line_or_none(capsys: pytest.CaptureFixture[str]) -> None:
    for keep in (True, False):
        with progress.make_bar("clips", 3, keep=keep) as bar:
            bar.update(3)
    assert capsys.readouterr().err.count("\n") == 1


def test_long_times_are_in_days(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of ten steps took seven hours."""
    shown, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progress.sys, "stderr", shown)
    bar = progress.make_bar("steps", 10)
    bar._time = lambda: now[0]
    bar.start_t = bar.last_print_t = 0.0
    now[0] = 7 * 3600.0
    bar.update(1)
    assert "1/10 [7:00:00, 2 d 15 h left]" in shown.getvalue()
    now[0] *= 9
    bar.update(8)
    assert "9/10 [2 d 15 h, 7:00:00 left]" in shown.getvalue()
    bar.close()
    assert [progress.duration(seconds) for seconds in (0, 59.9, 86_399, 86_400)] == [
        "00:00",
        "00:59",
        "23:59:59",
        "1 d 0 h",
    ]
