"""The benchmark of few steps: what it extrapolates, and that it measures the passes it names."""

from __future__ import annotations

import pytest
import torch

from benchmarks import few_steps
from benchmarks.eager import EagerDenoiser
from pvdm_fast.models import Denoiser
from pvdm_fast.models.presets import DENOISER


def test_the_release_is_extrapolated_from_its_passes() -> None:
    times = few_steps.Times([2.0, 3.0, 10.0], [5.0], {(torch.bfloat16, 1): [4.0, 6.0, 5.0]})
    assert times.release == 400 * 3.0 + 5.0
    table = "\n".join(few_steps.table(times))
    assert "1205, **extrapolated** from 4: 400 x 3.00 + 5.00 | 1 |" in table
    assert "| ours, bfloat16, 1 pass and decoding | 5.00 (4.00 to 6.00) | 241 |" in table


@pytest.mark.parametrize("size", list(DENOISER))
def test_the_release_has_the_same_sizes(size: str) -> None:
    with torch.device("meta"):
        theirs, ours = EagerDenoiser(**few_steps.release_sizes(size)), Denoiser.from_preset(size, positions=False)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (theirs, ours)]
    assert counts[0] == counts[1]


def test_it_measures_one_and_four_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    sample = few_steps.sample_video

    def counted(*arguments: object, **options: object) -> torch.Tensor:
        count = 0

        def on_step(step: int, timestep: float, latent: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return latent

        video = sample(*arguments, **options, on_step=on_step)  # type: ignore[arg-type]
        passes.append(count)
        return video

    monkeypatch.setattr(few_steps, "sample_video", counted)
    times = few_steps.measure("tiny", rounds=1)
    assert set(times.ours) == {(dtype, steps) for dtype in (torch.bfloat16, torch.float32) for steps in (1, 4)}
    assert all(len(found) == 2 and min(found) > 0 for found in times.ours.values())
    assert sorted(set(passes)) == [1, 4]
