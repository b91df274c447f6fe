"""Launch configurations: plain tables by (architecture, shape class, dtype), and the user's own, measured by tune."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from pvdm_fast.kernels.launch import Config

# Named after the first GPU of a family; others take the nearest that has no more shared memory (a block's limit, KiB).
SHARED_MEMORY = {"sm80": 163, "sm90": 227, "sm100": 227, "sm120": 99, "gfx942": 64, "interpreter": 1 << 20}
ANY = "*"
Key = tuple[str, str, str]  # architecture, shape class, dtype ("float32", "bfloat16", "float16"); each may be ANY
TABLES: dict[str, ConfigTable] = {}
_assumed: str | None = None


@contextmanager
def assume(architecture: str) -> Iterator[None]:
    """Choose configurations as on `architecture`, whatever is here (for compiling ahead of time)."""
    global _assumed
    previous, _assumed = _assumed, architecture
    try:
        yield
    finally:
        _assumed = previous


@cache
def _present(index: int | None) -> str:
    properties = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    if torch.version.hip:
        return "gfx942"
    if (properties.major, properties.minor) == (8, 0):
        return "sm80"
    return {9: "sm90", 10: "sm100"}.get(properties.major, "sm120")


def architecture(device: torch.device) -> str:
    """The architecture whose configurations serve `device`: a key of SHARED_MEMORY."""
    if _assumed is not None:
        return _assumed
    return "interpreter" if device.type == "cpu" else _present(device.index)


def user_table() -> Path:
    """The file that `python -m pvdm_fast.tune` writes and every process reads once."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "pvdm_fast" / "triton.json"


@cache
def _tuned() -> dict[str, dict[str, dict[str, object]]]:
    path = user_table()
    return json.loads(path.read_text()) if path.exists() else {}


class ConfigTable:
    """The configurations of one kernel.

    Args:
        name: of the kernel, unique.
        entries: by (architecture, shape class, dtype); ANY where it makes no difference. The most particular wins:
            the architecture counts most, then the shape class, then the dtype.
        candidates: what tune tries beside the entries.
    """

    def __init__(self, name: str, entries: Mapping[Key, Config], candidates: tuple[Config, ...] = ()) -> None:
        assert name not in TABLES and (ANY, ANY, ANY) in entries
        self.name, self.entries, self.candidates = name, dict(entries), candidates
        self._chosen: dict[Key, Config] = {}
        TABLES[name] = self

    def __call__(self, device: torch.device, shape_class: str, dtype: torch.dtype) -> Config:
        key = (architecture(device), shape_class, str(dtype).removeprefix("torch."))
        if key not in self._chosen:
            self._chosen[key] = self._tuned_entry(key) or self.entries[self.entry_of(key)]
        return self._chosen[key]

    def entry_of(self, key: Key) -> Key:
        """The key of the entry that serves `key`."""
        where, what, dtype = key
        orders = [(a, s, d) for a in (where, ANY) for s in (what, ANY) for d in (dtype, ANY)]
        return next(order for order in orders if order in self.entries)

    def _tuned_entry(self, key: Key) -> Config | None:
        found = _tuned().get(self.name, {}).get("/".join(key)) if _assumed is None else None
        return Config(**found) if found else None  # type: ignore[arg-type]
