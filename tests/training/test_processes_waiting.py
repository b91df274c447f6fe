"""Several processes of which one waits for a batch that doesn't come: signals are answered, and no step is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from training.jobs import finish, start_job
from training.small import SMALL, checkpoint_names, losses, steps

from pvdm_fast.data import DataError
from pvdm_fast.training import trainer

pytestmark = pytest.mark.slow


def _after_two_batches(then: Callable[[], object]) -> None:
    """In the second process ``then`` is called in place of a third batch."""
    original = trainer.Trainer.batches

    def batches(self: trainer.Trainer) -> Iterator[Any]:
        source = original(self)
        yield next(source)
        yield next(source)
        print("no third batch", flush=True)
        then()

    if os.environ["RANK"] == "1":
        trainer.Trainer.batches = batches  # type: ignore[method-assign]


def wait_for_ever() -> None:
    _after_two_batches(lambda: time.sleep(600))


def give_out() -> None:
    def then() -> None:
        raise DataError("no usable video any more")

    _after_two_batches(then)


def begin(folder: Path, before: Callable[[], None]) -> list[ForkServerProcess]:
    """A job whose second process has no third batch, once it has asked for it."""
    arguments = [*SMALL, *steps(6), "--stage", "autoencoder", "--run", str(folder / "run")]
    processes = start_job(arguments, folder / "log", before=before)
    log, deadline = folder / "log1", time.monotonic() + 300
    while not log.exists() or "no third batch" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return processes


def assert_two_steps_are_saved(run: Path) -> None:
    assert checkpoint_names(run) == ["autoencoder-step-0000002"]
    assert [step for step, _, _ in losses(run, "autoencoder")] == [1, 2]


@pytest.mark.parametrize("to", [(0, 1), (1,)], ids=["to both", "to the one that waits"])
def test_a_signal_saves_and_stops_all(to: tuple[int, ...], tmp_path: Path) -> None:
    processes = begin(tmp_path, wait_for_ever)
    for rank in to:
        os.kill(processes[rank].pid, signal.SIGTERM)  # type: ignore[arg-type]
    assert finish(processes, 60) == [128 + signal.SIGTERM] * 2, (tmp_path / "log1").read_text()
    assert_two_steps_are_saved(tmp_path / "run")
    assert "continue with: python -m pvdm_fast.train --resume" in (tmp_path / "log0").read_text()


def test_a_second_signal_stops_the_others_at_once(tmp_path: Path) -> None:
    """The first process waits for the second one, which hears of nothing."""
    processes = begin(tmp_path, wait_for_ever)
    for _ in range(2):
        os.kill(processes[0].pid, signal.SIGTERM)  # type: ignore[arg-type]
        time.sleep(0.7)
    try:
        assert finish(processes[:1], 60) == [128 + signal.SIGTERM]
    finally:
        processes[1].kill()
    assert (tmp_path / "log0").read_text().endswith("stopped at once\n")


def test_data_that_give_out_in_one_process_lose_no_step(tmp_path: Path) -> None:
    assert finish(begin(tmp_path, give_out), 60) == [2, 2]
    assert_two_steps_are_saved(tmp_path / "run")
    assert (tmp_path / "log1").read_text().endswith("error in process 1: no usable video any more\n")
    assert "error: the data of another process gave out" in (tmp_path / "log0").read_text()
