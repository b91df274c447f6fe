"""The folder of a run: where everything is, and the records of its training."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.files import clean_up, expect_folder, locked, whole_file
from pvdm_fast.jobs.reading import UnreadableFile, read_json_lines, read_json_object
from pvdm_fast.training.config import STAGES, TrainConfig, make_config, read_changes, to_yaml

if TYPE_CHECKING:
    from pvdm_fast.training.tracking import Tracker


class RunFolder:
    """Paths inside a run's folder. Only this class reads and writes ``metrics.jsonl`` and ``results.json``.

    ``trackers`` get every record that is added to metrics.jsonl.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"
        self.previews = path / "previews"
        self.autoencoder = path / "autoencoder"
        self.denoiser = path / "denoiser"
        self.teacher = path / "teacher"
        self.latents = path / "latents"
        self.metrics = path / "metrics.jsonl"
        self.changes = path / "changes.jsonl"
        self.results_file = path / "results.json"
        self.lock = path / "trainer.lock"
        self.trackers: list[Tracker] = []

    @staticmethod
    def create(path: Path | None) -> RunFolder:
        """A new folder. Without ``path`` it is runs/DATE-TIME.

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
        """The folder of an earlier run. Raises UserError if there is none."""
        run = RunFolder(path)
        expect_folder(path)
        if not run.config.is_file():
            raise UserError(f"{path} holds no run: there is no {run.config}")
        return run

    def clean_up(self) -> None:
        """Remove what a killed process left half written, see `pvdm_fast.jobs.files.clean_up`."""
        clean_up(self.path)

    def read_config(self) -> TrainConfig:
        return make_config(read_changes(self.config))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other trainers out of the folder. The kernel releases the lock when this process dies, for any reason.

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
        """Add one line to metrics.jsonl. Raises UserError if the disk is full."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.metrics}: {error.strerror}") from error
        for tracker in self.trackers:
            tracker.record(record)

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of metrics.jsonl, one in memory at a time. Damaged or incomplete lines are left out.

        Raises:
            UserError: the file cannot be read at all.
        """
        try:
            yield from filter(_is_record, read_json_lines(self.metrics))
        except FileNotFoundError:
            return
        except (OSError, UnreadableFile) as error:
            reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else error
            raise UserError(f"{self.metrics} {reason}; mend it, or move it away to go on without it") from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """All `records` as a list."""
        return list(self.records())

    def forget_after(self, stage: str, step: int) -> None:
        """Drop records later than a checkpoint, so that repeated steps aren't recorded twice."""
        place = (STAGES.index(stage), step)
        with whole_file(self.metrics) as temporary, temporary.open("w", encoding="utf-8") as file:
            for item in self.records():
                if (STAGES.index(item["stage"]), item["step"]) <= place:
                    file.write(json.dumps(item) + "\n")

    def results(self) -> dict[str, Any]:
        """The results of finished stages, by stage. Raises UserError if the file is damaged."""
        try:
            results = read_json_object(self.results_file)
        except FileNotFoundError:
            return {}
        except (OSError, UnreadableFile):
            results = {"": None}
        if not all(stage in STAGES and _is_result(result) for stage, result in results.items()):
            raise UserError(f"{self.results_file} is damaged: mend it, or remove it to train its stages again")
        return results

    def record_result(self, stage: str, result: dict[str, Any]) -> None:
        """Mark a stage as finished, with its results."""
        self._write_results({**self.results(), stage: result})

    def forget_result(self, stage: str) -> None:
        """Mark a stage as not finished: it is to take more steps."""
        self._write_results({name: result for name, result in self.results().items() if name != stage})

    def _write_results(self, results: dict[str, Any]) -> None:
        with whole_file(self.results_file) as temporary:
            temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _is_number(value: Any) -> bool:
    """Whether it is a real number that a float can hold. JSON's integers have no limit."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _is_record(record: Any) -> bool:
    """Whether a line of metrics.jsonl is a record: its stage, its step, and values that can be drawn."""
    if not isinstance(record, dict) or record.get("stage") not in STAGES or not _is_number(record.get("step")):
        return False
    values = [value for name, value in record.items() if name not in ("stage", "skipped", "clips")]
    return isinstance(record["step"], int) and all(value is None or _is_number(value) for value in values)


def _is_result(result: Any) -> bool:
    """Whether an entry of results.json has everything that is read from it again."""
    if not isinstance(result, dict) or not any(_is_number(result.get(name)) for name in ("psnr", "held_out_loss")):
        return False
    files = result.get("unreadable_files")
    numbers = all(_is_number(result.get(name)) for name in ("steps", "seconds"))
    numbers &= all(_is_number(result.get(name, 0)) for name in ("best_step", "planned_steps", "scores_waited"))
    return numbers and isinstance(files, dict) and all(isinstance(reason, str) for reason in files.values())


def _unused(path: Path) -> Path:
    """``path``, or with -2, -3, ... appended where it exists."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
