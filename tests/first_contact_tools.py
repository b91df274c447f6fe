"""What the tests of `benchmarks.first_contact` share: a part at work, and programs that stand in for others."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

from benchmarks.first_contact.context import Context


def context(tmp_path: Path, name: str = "part", device: str = "cpu", seconds: float = 100) -> Context:
    return Context(name, device, True, tmp_path, seconds)


def executable(path: Path, script: str) -> Path:
    """A program in Python at `path`."""
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
