"""Every case of the registry: first agreement, then rounds that time ours and its baselines in turn.

pytest-benchmark times ours. The set-up of each of its rounds times the baselines, so that all see the same load. On a
GPU the table at the end has CUDA events for all, and pytest-benchmark's own numbers are the host's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks import floors, rows
from benchmarks.cases import all_cases
from benchmarks.machine import Others
from benchmarks.measure import Timings, seconds, warm_up
from benchmarks.registry import Setting
from benchmarks.session import DTYPES, DoesNotFit, Ready, devices, get_ready

BUDGET = 0.8  # seconds of rounds per measurement
PARAMETERS = [
    pytest.param(name, device, dtype, direction, id=f"{name}-{direction}-{rows.SHORT[dtype]}-{device}")
    for device in devices()
    for name, case in all_cases().items()
    for dtype in DTYPES
    for direction in case.directions
]


@lru_cache(maxsize=1)
def ready(name: str, setting: Setting) -> Ready:
    """The set-up that all directions of a case share."""
    return get_ready(all_cases()[name], setting)


@pytest.mark.parametrize(("name", "device", "dtype", "direction"), PARAMETERS)
def test_case(
    name: str,
    device: str,
    dtype: torch.dtype,
    direction: str,
    benchmark: Any,
    measured: list[rows.Row],
    request: pytest.FixtureRequest,
) -> None:
    size = "base" if request.config.getoption("--full") else "small"
    compiled = bool(request.config.getoption("--compiled")) or device == "cuda"
    try:
        found = ready(name, Setting(size, dtype, device, compiled))
    except DoesNotFit as reason:
        pytest.skip(str(reason))
    runners = found.prepared.runners
    peaks = floors.beside(found.prepared.work(direction), dtype, device)
    taken: dict[str, list[float]] = {rival: [] for rival in runners}

    def rivals_then_ours() -> tuple[tuple[Callable[[], object]], dict[str, Any]]:
        for rival, runner in runners.items():
            if rival != "ours" or device == "cuda":
                taken[rival].append(seconds(runner, direction, device))
        peaks()
        step = runners["ours"].step(direction)
        if device == "cuda":
            torch.cuda.synchronize()
        return (step,), {}

    def run(step: Callable[[], object]) -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{found.case.kind}s, ours alone"
    rounds = warm_up(runners, direction, device, BUDGET)
    others = Others()
    benchmark.pedantic(run, setup=rivals_then_ours, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable: checked, not timed
        return
    if device != "cuda":
        taken["ours"] = list(benchmark.stats.stats.data)
    row = found.row(direction, Timings(taken, others.cores()))
    benchmark.extra_info.update(ratio=row["ratio"], floor=row["floor"], saved=row["saved"], backends=row["backends"])
    measured.append(row)
