"""The commands' malloc setting: large blocks are reused without page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from pvdm_fast.jobs.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def take():
    torch.empty(64 << 18).zero_()  # 64 MiB
for _ in range(20):
    take()  # until blocks that aligned requests fit into have come together
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc: run on Linux")
@pytest.mark.slow
def test_freed_memory_is_kept() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", PROGRAM, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 100 < faults("default")
