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
