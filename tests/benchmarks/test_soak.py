"""The soak test's judgement of artificial samples, and a very short soak."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.soak import Sample, judge, last_step, soak
from pvdm_fast.errors import UserError

MIB = 2**20


def samples(rise: float = 0.0, slowdown: float = 0.0, number: int = 100) -> list[Sample]:
    """One sample per second, of 500 MiB with 1 MiB of scatter. rise: MiB from first to last. CPU time per step
    grows likewise."""
    rng = np.random.default_rng(0)
    result, cpu = [], 0.0
    for second in range(number):
        share = second / (number - 1)
        cpu += 1 + slowdown * share
        result.append(Sample(second, int((500 + rise * share + rng.normal()) * MIB), cpu, 10 * second))
    return result


def test_flat_and_steady() -> None:
    found = judge(samples())
    assert found.flat and found.steady
    assert found.steps == 790 and found.memory == pytest.approx(500, abs=1)
    assert found.cpu_a_step_first == pytest.approx(100)


def test_a_leak_and_a_slowdown_are_seen() -> None:
    """A rise of 20 MiB, of which four fifths come after the warm-up, is 3 % of the memory."""
    leak = judge(samples(rise=20))
    assert not leak.flat and leak.rise == pytest.approx(16, abs=1.5) and "NOT FLAT" in leak.line("a")
    slow = judge(samples(slowdown=0.5))
    assert not slow.steady and "NOT STEADY" in slow.line("a")
    assert judge(samples(rise=-20)).flat, "memory that is given back is no leak"


def test_what_comes_once_is_no_leak() -> None:
    """Step 300 takes 30 MiB for good. By time alone, the warm-up would end at step 200."""
    once = [replace(sample, memory=sample.memory + (sample.step >= 300) * 30 * MIB) for sample in samples()]
    assert not judge(once).flat
    found = judge(once, settled=300)
    assert found.flat and found.steps == 680


def test_too_short() -> None:
    for few in ([], samples(number=3), [Sample(second, MIB, 1, 5) for second in range(50)]):
        with pytest.raises(UserError, match="too short"):
            judge(few)


def test_last_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) is None
    path.write_text('{"step": 1}\n{"step": 2, "text": "' + "x" * 3000 + '"}\n{"step": 3, "los')
    assert last_step(path) == 2


@pytest.mark.exhaustive
def test_a_short_soak(tmp_path: Path) -> None:
    """A few seconds for each stage: samples are taken and judged, with any verdict in such a short time."""
    found = soak(tmp_path / "soak", minutes=1.0, every=0.5, options=["--frames", "4"], preview_every=20)
    assert set(found) == {"autoencoder", "diffusion"}
    assert all(judgement.steps > 0 and judgement.memory > 100 for judgement in found.values())
