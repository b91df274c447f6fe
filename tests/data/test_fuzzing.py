"""The video reader on mutated files gives a clip or a reason, never a crash, a hang or a leak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip(
    "webdataset", reason="needs webdataset: pip install webdataset"
)  # some of the files are read out of its shards
MIB = 2**20


def fuzz(folder: Path, count: int, first: int) -> dict[str, Any]:
    """Runs in a separate process, which must end by itself. If it leaves a file behind, look at that file."""
    done = subprocess.run(
        [sys.executable, "-m", "data.fuzz", str(folder), str(count), str(first)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    left = [path.name for path in folder.iterdir() if path.name[0].isdigit()]
    assert done.returncode == 0, f"exit code {done.returncode} at {left}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def check(result: dict[str, Any], count: int) -> None:
    assert result["clips"] + result["reasons"] == count
    assert min(result["clips"], result["reasons"]) > count / 10, "mutations that are all too mild or all too harsh"
    assert len(set(result["descriptors"])) == 1, "files are left open"


@pytest.mark.slow
def test_mutated_files(tmp_path: Path) -> None:
    check(fuzz(tmp_path, 150, 10_000), 150)


@pytest.mark.exhaustive
def test_many_mutated_files(tmp_path: Path) -> None:
    """A line fitted to memory in the second half of the run rises by less than 4 KiB per file."""
    count = 2400
    result = fuzz(tmp_path, count, 0)
    print(result)
    check(result, count)
    later = np.array(result["resident"][len(result["resident"]) // 2 :])
    slope = np.polyfit(50 * np.arange(len(later)), later, 1)[0]
    assert slope < 4096, f"{slope:.0f} bytes more a file"
    assert max(result["resident"]) < 1024 * MIB
