"""Results that survive a crash: which batches of a pass are done, and moments or rows of what was measured on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pvdm_fast.errors import UserError
from pvdm_fast.evaluation.moments import moments
from pvdm_fast.jobs.files import share_as_usual, whole_file
from pvdm_fast.jobs.reading import file_clock, parse_json


@dataclass
class Measured:
    """What a batch gave: values (B, D) by name, of which only moments are kept, files that couldn't be read, with
    reasons, and rows (B, D) float32 by name that are kept one by one."""

    values: dict[str, Tensor]
    unreadable: dict[str, str] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)


class Tally:
    """The part of a pass that one process has done.

    Args:
        path: the file that `save` writes. If it exists, this continues from its contents.
        batches: number of batches of the whole pass.

    Raises:
        UserError: the file can't be read, or belongs to another number of batches.
    """

    def __init__(self, path: Path, batches: int) -> None:
        self.path = path
        self.done = torch.zeros(batches, dtype=torch.bool)
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}  # "name@batch"
        self.unreadable: dict[str, str] = {}
        if path.exists():
            self._load()

    def _load(self) -> None:
        advice = f"remove the folder {self.path.parent} to measure again"
        try:
            with file_clock(self.path), safe_open(self.path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                self.unreadable = parse_json((file.metadata() or {})["unreadable"])
            done = tensors.pop("done").bool()
            if not isinstance(self.unreadable, dict):
                raise ValueError("its list of unreadable files is invalid")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"the statistics {self.path} cannot be read ({error}): {advice}") from error
        if done.shape != self.done.shape:
            raise UserError(f"the statistics {self.path} are of {len(done)} batches, not {len(self.done)}: {advice}")
        self.done = done
        self.rows = {name: tensors.pop(name) for name in list(tensors) if "@" in name}
        self.sums = tensors

    def add(self, batch: int, measured: Measured) -> None:
        """Add a batch, in memory only. Raises UserError for values that aren't finite."""
        for name, values in (*measured.values.items(), *measured.rows.items()):
            if not values.isfinite().all():
                raise UserError(f"{name} is not finite for batch {batch}: the model's weights must be damaged")
        for name, values in measured.values.items():
            sums = moments(values)
            self.sums[name] = self.sums[name] + sums if name in self.sums else sums
        self.rows.update({f"{name}@{batch}": rows for name, rows in measured.rows.items()})
        self.unreadable.update(measured.unreadable)
        self.done[batch] = True

    def save(self) -> None:
        """Write the file, complete or not at all. Raises UserError if the disk is full."""
        tensors = {**self.sums, **self.rows, "done": self.done.to(torch.uint8)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as temporary:
                save_file(tensors, temporary, {"unreadable": json.dumps(self.unreadable)})
                share_as_usual(temporary)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write the statistics {self.path}: {error}") from error


def read_tallies(folder: Path, batches: int) -> dict[str, Tally]:
    """The tallies that processes have left in a folder, by file name, sorted by name."""
    return {path.name: Tally(path, batches) for path in sorted(folder.glob("[!.]*.safetensors"))}


def remaining(tallies: Sequence[Tally], batches: int) -> list[int]:
    """The batches that are in none of the tallies."""
    done = torch.zeros(batches, dtype=torch.bool)
    for tally in tallies:
        done |= tally.done
    return (~done).nonzero().flatten().tolist()


def total(tallies: Sequence[Tally]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Sums, rows in the order of batches, and unreadable files of all tallies."""
    sums: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    unreadable: dict[str, str] = {}
    for tally in tallies:
        for name, values in tally.sums.items():
            sums[name] = sums[name] + values if name in sums else values
        for label, values in tally.rows.items():
            name, batch = label.rsplit("@", 1)
            pieces.setdefault(name, {})[int(batch)] = values
        unreadable.update(tally.unreadable)
    rows = {name: torch.cat([values for _, values in sorted(found.items())]) for name, found in pieces.items()}
    return sums, rows, unreadable
