"""The folder of a run: where everything is, and the records of its training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.files import clean_up, locked, whole_file
from pvdm_fast.training.config import STAGES, TrainConfig, make_config, read_changes, to_yaml


class RunFolder:
    """Paths inside a run's folder; ``metrics.jsonl`` and ``results.json`` are read and written here only.

    ``listeners`` are called with every record that is added to metrics.jsonl.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.autoencoder = path / "autoencoder"
        self.denoiser = path / "denoiser"
        self.metrics = path / "metrics.jsonl"
        self.results_file = path / "results.json"
        self.lock = path / "trainer.lock"
        self.listeners: list[Callable[[dict[str, Any]], None]] = []

    @staticmethod
    def create(path: Path | None) -> RunFolder:
        """A new folder; without ``path`` it is runs/DATE-TIME.

        Raises:
            UserError: the folder already holds something, has a name that is not UTF-8, or cannot be written.
        """
        run = RunFolder(path or _unused(Path("runs") / time.strftime("%Y%m%d-%H%M%S")))
        try:
            str(run.path).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"the run folder's name must be UTF-8, and {run.path} is not: safetensors needs it"
            ) from None
        try:
            if run.config.exists():
                raise UserError(f"{run.path} already holds a run: continue it with --resume, or name another")
            if run.path.is_dir() and any(item != run.lock for item in run.path.glob("[!.]*")):
                raise UserError(f"the folder {run.path} is not empty: give a new one with --run")
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write the run folder {run.path}: {error.strerror}") from error
        return run

    @staticmethod
    def existing(path: Path) -> RunFolder:
        """The folder of an earlier run; raises UserError where there is none."""
        run = RunFolder(path)
        if not run.config.is_file():
            raise UserError(f"{path} holds no run: there is no {run.config}")
        return run

    def clean_up(self) -> None:
        """Remove what a killed process left half written, see :func:`pvdm_fast.jobs.files.clean_up`."""
        clean_up(self.path)

    def read_config(self) -> TrainConfig:
        return make_config(read_changes(self.config))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other trainers out of the folder; the kernel ends that when this process dies, however it dies.

        Raises:
            UserError: another trainer is at work in the folder, or it cannot be written.
        """
        with locked(self.lock, "trainer", "--run"):
            yield

    def write_config(self, config: TrainConfig) -> None:
        try:
            with whole_file(self.config) as temporary:
                temporary.write_text(to_yaml(config), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.path}: {error.strerror}") from error

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl; raises UserError when the disk is full."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.metrics}: {error.strerror}") from error
        for listener in self.listeners:
            listener(record)

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of metrics.jsonl, one in memory at a time; damaged or cut-off lines are left out."""
        if not self.metrics.exists():
            return
        with self.metrics.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict) and record.get("stage") in STAGES and isinstance(record.get("step"), int):
                    yield record

    def read_metrics(self) -> list[dict[str, Any]]:
        """All of :meth:`records`."""
        return list(self.records())

    def forget_after(self, stage: str, step: int) -> None:
        """Drop records later than a checkpoint, so that the steps taken again are not recorded twice."""
        place = (STAGES.index(stage), step)
        with whole_file(self.metrics) as temporary, temporary.open("w", encoding="utf-8") as file:
            for item in self.records():
                if (STAGES.index(item["stage"]), item["step"]) <= place:
                    file.write(json.dumps(item) + "\n")

    def results(self) -> dict[str, Any]:
        """What the finished stages recorded, by stage; raises UserError where the file is damaged."""
        if not self.results_file.exists():
            return {}
        try:
            results = json.loads(self.results_file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            results = None
        if not isinstance(results, dict) or not results.keys() <= set(STAGES):
            raise UserError(f"{self.results_file} is damaged: mend it, or remove it to train its stages again")
        return results

    def record_result(self, stage: str, result: dict[str, Any]) -> None:
        """Mark a stage as finished, with its results."""
        results = {**self.results(), stage: result}
        with whole_file(self.results_file) as temporary:
            temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _unused(path: Path) -> Path:
    """``path``, or with -2, -3, ... appended where it exists."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
