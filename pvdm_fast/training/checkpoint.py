"""Checkpoints that are never half written: a folder with the state, and a note that says what it must hold."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.archives import load_archive
from pvdm_fast.jobs.checksums import checksum
from pvdm_fast.jobs.files import remove_folder, whole_folder
from pvdm_fast.jobs.reading import UnreadableFile, read_json_object
from pvdm_fast.training.config import STAGES

KEPT = 2
STATE, NOTE, CONFIG = "state.pt", "checkpoint.json", "config.yaml"
NOTE_BYTES = 4096


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A place in a run: ``stage`` is an index into STAGES, so that later checkpoints compare greater."""

    stage: int
    step: int
    path: Path

    @property
    def stage_name(self) -> str:
        return STAGES[self.stage]


def save(
    folder: Path, stage: str, step: int, state: dict[str, Any], *, keep: int = KEPT, config: str | None = None
) -> Path:
    """Write ``state`` as ``folder/STAGE-step-NNNNNNN``, and remove all earlier ones except the newest ``keep - 1``.

    ``config``: the options in use, as YAML, for whoever goes on from there.

    Raises:
        UserError: the disk is full or the folder can't be written. Earlier checkpoints are still there.
    """
    path = folder / f"{stage}-step-{step:07d}"
    try:
        with whole_folder(path) as temporary:
            torch.save(state, temporary / STATE)
            note = {
                "stage": stage,
                "step": step,
                "bytes": (temporary / STATE).stat().st_size,
                "crc32": checksum(temporary / STATE),
            }
            (temporary / NOTE).write_text(json.dumps(note), encoding="utf-8")
            if config is not None:
                (temporary / CONFIG).write_text(config, encoding="utf-8")
        place = Checkpoint(STAGES.index(stage), step, path)  # later ones are damaged and were passed over
        for old in [item for item in found(folder) if item <= place][:-keep]:
            remove_folder(old.path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_writer_failure(error):
            raise
        last = found(folder)
        kept = f"the last good one is {last[-1].path}" if last else "there is none yet"
        reason = getattr(error, "strerror", None) or "the file could not be written whole, the disk may be full"
        raise UserError(f"cannot write the checkpoint {path}: {reason}; {kept}") from error
    return path


def _is_writer_failure(error: RuntimeError) -> bool:
    """torch.save's zip writer reports a failed write as RuntimeError, for example "unexpected pos"."""
    return any(words in str(error) for words in ("PytorchStreamWriter", "unexpected pos", "write"))


def found(folder: Path) -> list[Checkpoint]:
    """The checkpoints in a folder, oldest first. Half-written ones have other names and don't count."""
    result = []
    for path in folder.glob("[!.]*"):
        stage, _, number = path.name.rpartition("-step-")
        if stage in STAGES and number.isascii() and number.isdecimal():
            result.append(Checkpoint(STAGES.index(stage), int(number), path))
    return sorted(result)


def damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint's files. None if they are as written."""
    path = checkpoint.path
    try:
        note = read_json_object(path / NOTE, NOTE_BYTES)
        if (note["stage"], note["step"]) != (checkpoint.stage_name, checkpoint.step):
            return f"its {NOTE} is of another checkpoint"
        if (path / STATE).stat().st_size != note["bytes"]:
            return "its size is wrong"
        return None if checksum(path / STATE) == note["crc32"] else "its checksum is wrong"
    except OSError as error:
        return f"it cannot be read ({error})"
    except (ValueError, KeyError, TypeError):
        return f"its {NOTE} is damaged"


def newest_good(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint, and a sentence for each newer one that was skipped.

    Raises:
        UserError: there are checkpoints, but none is good. Starting again would lose the run.
    """
    passed_over: list[str] = []
    for candidate in reversed(found(folder)):
        problem = damage(candidate)
        if problem is None:
            return candidate, passed_over
        passed_over.append(f"{candidate.path} is passed over: {problem}")
    if passed_over:
        raise UserError(
            f"no checkpoint in {folder} is good ({'; '.join(passed_over)}): put a good copy there, or remove the "
            f"folder to train the stage from its start"
        )
    return None, passed_over


def load(checkpoint: Checkpoint) -> dict[str, Any]:
    """The state saved in a checkpoint, on the CPU. Only tensors and plain values are ever unpickled.

    Raises:
        UserError: the file holds something else, though its checksum is right.
    """
    try:
        state = load_archive(checkpoint.path / STATE)
    except OSError as error:
        raise UserError(f"cannot read {checkpoint.path / STATE}: {error.strerror or error}") from error
    except UnreadableFile as error:
        raise UserError(f"{checkpoint.path / STATE} is not a state that this trainer wrote: remove it") from error
    if not isinstance(state, dict):
        raise UserError(f"{checkpoint.path / STATE} is not a state that this trainer wrote: remove it")
    return state


def random_states() -> dict[str, Any]:
    """The states of the random generators of torch (CPU and GPUs) and Python, as plain values."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Restore what `random_states` returned. GPU states only if there are as many GPUs."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    version, values, gauss_next = states["python"]
    random.setstate((version, tuple(values), gauss_next))
