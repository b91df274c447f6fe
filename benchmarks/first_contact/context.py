"""What a part knows and where it writes: its device, its sizes, its clock, and a file that is whole at any time."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

import pvdm_fast
from pvdm_fast.jobs.files import whole_file

ROOT = Path(__file__).resolve().parents[2]
Value = TypeVar("Value")


class LeftOut(Exception):
    """A part that can't run here; the message says what is missing, and what would make it run."""


class Wrong(Exception):
    """A part ran, and what it found is wrong."""


def importable(name: str) -> bool:
    """Whether a package is installed; what stands in for one has no file."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None) is not None
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def use_source_tree() -> None:
    """Make `pvdm_fast.kernels` importable in a source tree that nobody installed: its modules are in kernels/."""
    if not importable("pvdm_fast.kernels"):
        pvdm_fast.__path__.append(str(ROOT))


def write_json(path: Path, content: Any) -> None:
    """The file is whole at any time. Numbers that JSON has no word for are written as null."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """What a part wrote; {} where it wrote nothing."""
    return json.loads(path.read_text()) if path.exists() else {}


@dataclass
class Context:
    """One part at work.

    Args:
        name: of the part.
        device: "cpu" or "cuda".
        dry: tiny sizes, few of them: to walk through everything, not to measure.
        out: the folder of the whole walk.
        seconds: that the part should take.
    """

    name: str
    device: str
    dry: bool
    out: Path
    seconds: float
    found: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def size(self) -> str:
        """Of networks and cases: a name that presets and benchmarks share."""
        return "tiny" if self.dry else "base" if self.device == "cuda" else "small"

    def left(self) -> float:
        """Seconds until this part should end."""
        return self.seconds - (time.monotonic() - self.started)

    def keep(self, **values: Any) -> None:
        """Write facts down, now."""
        self.found.update(values)
        write_json(self.out / f"{self.name}.json", self.found)

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Write one more row down, now."""
        self.keep(**{key: [*self.found.get(key, []), row]})

    def while_time(
        self, items: Iterable[Value], name: Callable[[Value], str] = str, least: float = 1.0
    ) -> Iterator[Value]:
        """The items in turn, until fewer than `least` seconds are left; the rest is written down by name."""
        waiting = list(items)
        while waiting and self.left() >= least:
            yield waiting.pop(0)
        if waiting:
            self.keep(no_time_for=[*self.found.get("no_time_for", []), *map(name, waiting)])

    def command(self, part: str, seconds: float, *more: str) -> list[str]:
        """The command of a part in a process of its own."""
        dry = ["--dry"] if self.dry else []
        return [
            sys.executable, "-m", "benchmarks.first_contact.child", part, "--device", self.device, *dry,
            "--out", str(self.out), "--seconds", f"{max(seconds, 1):.1f}", *more,
        ]  # fmt: skip

    def synchronize(self) -> None:
        """Wait for the GPU.

        Raises:
            RuntimeError: it has met a fault, after which nothing else of this process can run on it.
        """
        if self.device == "cuda":
            torch.cuda.synchronize()
