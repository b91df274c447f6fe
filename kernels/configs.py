"""Launch configurations: tables by (architecture, shape class, dtype), and the user's own table, measured by tune."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pvdm_fast.backends.choice import KERNEL_DTYPES
from pvdm_fast.errors import UserError
from pvdm_fast.kernels.launch import Config

# The first GPU of each family, and its shared memory per block in KiB. Other GPUs take the nearest with no more memory.
SHARED_MEMORY = {"sm80": 163, "sm90": 227, "sm100": 227, "sm120": 99, "gfx942": 64, "interpreter": 1 << 20}
REMEDY = "delete the file, or write it anew with python -m pvdm_fast.tune"
ANY = "*"
Key = tuple[str, str, str]  # architecture, shape class, dtype ("float32", "bfloat16", "float16"); each may be ANY
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES}
TABLES: dict[str, ConfigTable] = {}
_assumed: str | None = None


@contextmanager
def assume(architecture: str) -> Iterator[None]:
    """Choose configurations for `architecture` from the tables alone, whatever GPU is here: to compile ahead of time.

    `asked` of each table starts empty, and is restored at the end.
    """
    global _assumed
    previous, _assumed = _assumed, architecture
    asked = {name: table.asked for name, table in TABLES.items()}
    for table in TABLES.values():
        table.asked = {}
    try:
        yield
    finally:
        _assumed = previous
        for name, table in TABLES.items():
            table.asked = asked.get(name, {})


@cache
def _present(index: int | None) -> str:
    properties = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    if torch.version.hip:
        return "gfx942"
    if (properties.major, properties.minor) == (8, 0):
        return "sm80"
    return {9: "sm90", 10: "sm100"}.get(properties.major, "sm120")


def architecture(device: torch.device) -> str:
    """The architecture whose configurations `device` uses: a key of SHARED_MEMORY."""
    if _assumed is not None:
        return _assumed
    return "interpreter" if device.type == "cpu" else _present(device.index)


def user_table() -> Path:
    """The file that `python -m pvdm_fast.tune` writes. Each process reads it once."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "pvdm_fast" / "triton.json"


def read_user_table(path: Path) -> dict[str, dict[str, Any]]:
    """What tune wrote, by kernel, then by "architecture/shape class/dtype". {} if there is no file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        tables = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as tuned configurations ({error}): {REMEDY}.") from error
    if not isinstance(tables, dict) or not all(isinstance(entries, dict) for entries in tables.values()):
        raise UserError(f"{path} does not hold tuned configurations by kernel: {REMEDY}.")
    return tables


@cache
def _tuned() -> dict[str, dict[str, Any]]:
    return read_user_table(user_table())


class ConfigTable:
    """The configurations of one kernel.

    Args:
        name: of the kernel, unique.
        entries: by (architecture, shape class, dtype), with ANY where it makes no difference. The most specific entry
            wins: architecture counts most, then shape class, then dtype.
        candidates: what tune tries in addition to the entries.

    `asked` holds what was chosen, by (architecture, shape class, dtype). What you put there is chosen from then on.
    """

    def __init__(self, name: str, entries: Mapping[Key, Config], candidates: tuple[Config, ...] = ()) -> None:
        assert name not in TABLES and (ANY, ANY, ANY) in entries
        self.name, self.entries, self.candidates = name, dict(entries), candidates
        self.asked: dict[Key, Config] = {}
        TABLES[name] = self

    def __call__(self, device: torch.device, shape_class: str, dtype: torch.dtype) -> Config:
        key = (architecture(device), shape_class, NAMES[dtype])
        if key not in self.asked:
            self.asked[key] = self._tuned_entry(key) or self.entries[self.entry_of(key)]
        return self.asked[key]

    def entry_of(self, key: Key) -> Key:
        """The key of the entry that `key` uses."""
        where, what, dtype = key
        orders = [(a, s, d) for a in (where, ANY) for s in (what, ANY) for d in (dtype, ANY)]
        return next(order for order in orders if order in self.entries)

    def _tuned_entry(self, key: Key) -> Config | None:
        if _assumed is not None or key[0] == "interpreter":
            return None
        found = _tuned().get(self.name, {}).get("/".join(key))
        if found is None:
            return None
        known = {frozenset(config.blocks) for config in (*self.entries.values(), *self.candidates)}
        try:
            config = Config(**found)
            numbers = [*config.blocks.values(), config.num_warps, config.num_stages]
            fits = frozenset(config.blocks) in known and all(type(number) is int for number in numbers)
        except (TypeError, AttributeError):
            fits = False
        if not fits:
            raise UserError(
                f"{user_table()} configures {self.name} for {'/'.join(key)} in a way that this version's kernel does "
                f"not know (its blocks are {', '.join(self.entries[self.entry_of(key)].blocks) or 'none'}): {REMEDY}."
            )
        return config
