"""What every measurement says about its machine. It never includes the host's name."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

import pvdm_fast
from pvdm_fast.analysis.machine import cpu_fields, cpu_flags, model_name

ROOT = Path(__file__).resolve().parents[1]
# The CPU features that decide which kernels run, ours and oneDNN's.
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")


def _commit() -> str:
    """The commit, with "+" if the tree has changes. "unknown" outside a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", "pvdm_fast", "csrc", "kernels"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
    except OSError:
        return "unknown"
    return (head.stdout.strip() or "unknown") + ("+" if status.stdout.strip() else "")


@cache
def facts() -> dict[str, Any]:
    """CPU or GPU, features, threads, versions and commit."""
    info, features = cpu_fields(), cpu_flags()
    found: dict[str, Any] = {
        "cpu": model_name(),
        "cpu_family": f"{info.get('cpu family', '?')}/{info.get('model', '?')}",
        "flags": [flag for flag in FLAGS if flag in features],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "pvdm_fast": getattr(pvdm_fast, "__version__", "unknown"),
        "isa": _isa(),
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def _isa() -> str:
    """The instruction set that this package's CPU kernels use."""
    from pvdm_fast.backends import extensions

    if reason := extensions.availability("cpu"):
        return f"none: {reason}"
    return str(extensions.extension("_cpu").isa())


def name(device: str) -> str:
    """A file name for the machine, such as "amd-epyc-26-2-2-threads"."""
    known = facts()
    if device == "cuda":
        parts = [known["gpu"]]
    else:
        parts = [known["cpu"], known["cpu_family"], f"{known['threads']} threads"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def busy_time() -> float:
    """Seconds that all cores together were busy since the machine started; 0 where it doesn't say."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    fields = [int(field) for field in path.read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


class Others:
    """Cores that other programs keep busy from here on: a machine in use measures nothing well."""

    def __init__(self) -> None:
        self._start = (time.perf_counter(), busy_time(), time.process_time())

    def cores(self) -> float:
        wall, busy, own = (
            now - then
            for now, then in zip((time.perf_counter(), busy_time(), time.process_time()), self._start, strict=True)
        )
        return round(max(0.0, (busy - own) / max(wall, 1e-9)), 2)


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
