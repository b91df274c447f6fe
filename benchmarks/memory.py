"""Measures memory: what each runner of a case saves for its backward pass, and what is alive at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.measure import Runner
from benchmarks.registry import Case, Setting
from pvdm_fast.analysis.memory import LiveMemory, saved_bytes

SHARE_OF_MEMORY = 0.85  # of the free memory; a run that would need more is left out


@dataclass(frozen=True)
class Weight:
    """saved: bytes kept for the backward pass, without weights. peak: bytes alive at once, with weights."""

    saved: int
    peak: int


def weigh_runner(runner: Runner, direction: str) -> Weight:
    def run() -> Sequence[Tensor]:
        results = runner.run()
        runner.gradients = [torch.empty_like(result) for result in results]
        return results

    saved = 0 if direction == "forward" else saved_bytes(run, list(runner.parameters.values()))
    standing = sum(leaf.nbytes for leaf in runner.leaves)
    with LiveMemory() as live:
        step = runner.step(direction)
        step()
    return Weight(saved, standing + live.peak)


def weigh(case: Case, setting: Setting, direction: str, *, without: Sequence[str] = ()) -> dict[str, Weight]:
    """The memory of every runner of a case, except those named in `without`.

    Only shapes are run: nothing is allocated or computed. Scratch memory inside kernels isn't counted. (A convolution's
    is small compared with its results.)
    """
    with FakeTensorMode():
        prepared = case.prepare(replace(setting, shapes_only=True, compiled=False))
        return {
            name: weigh_runner(runner, direction) for name, runner in prepared.runners.items() if name not in without
        }


def available(device: str) -> int:
    """Bytes that a run may take: a share of the memory that is free now."""
    if device == "cuda":
        return int(SHARE_OF_MEMORY * torch.cuda.mem_get_info()[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(SHARE_OF_MEMORY * 1024 * int(line.split()[1]))
    return 8 << 30
