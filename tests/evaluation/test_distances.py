"""Distances equal what is computed by hand, have no bias, and their intervals hold as often as they say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pvdm_fast.evaluation import distances
from pvdm_fast.evaluation.distances import LEVEL, Distance, frechet, kernel
from pvdm_fast.evaluation.moments import Gaussian, frechet_distance

WIDTH, TRIALS = 4, 80
SCALES = torch.tensor([1.0, 0.7, 1.4, 0.5], dtype=torch.float64)
MEAN = torch.tensor([0.6, -0.3, 0.0, 0.2], dtype=torch.float64)


def drawn(count: int, seed: int, other: bool) -> Tensor:
    """Rows (n, 4) of the standard normal distribution, or of the other one."""
    rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows * SCALES + MEAN if other else rows


def true_frechet() -> float:
    eye = torch.eye(WIDTH, dtype=torch.float64)
    return frechet_distance(Gaussian(1, 0 * MEAN, eye), Gaussian(1, MEAN, torch.diag(SCALES**2)))


def true_kernel() -> float:
    """By the moments of Gaussians: E (x·y)³ and lower powers of independent x and y."""
    eye = torch.eye(WIDTH, dtype=torch.float64)
    sides = [(0 * MEAN, eye), (MEAN, torch.diag(SCALES**2))]

    def expected(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
        (a, A), (b, B) = first, second
        one = a @ b
        two = ((A + torch.outer(a, a)) * (B + torch.outer(b, b))).sum()
        three = one**3 + 3 * one * (a @ B @ a + b @ A @ b + (A * B).sum()) + 6 * a @ B @ A @ b
        return float(1 + 3 * one / WIDTH + 3 * two / WIDTH**2 + three / WIDTH**3)

    return expected(sides[0], sides[0]) + expected(sides[1], sides[1]) - 2 * expected(*sides)


def test_the_kernel_distance_is_the_unbiased_one_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "ROWS_AT_ONCE", 5)
    first, second = drawn(13, 1, other=False), drawn(9, 2, other=True)

    def mean(one: Tensor, two: Tensor) -> float:
        pairs = [(float(x @ y) / WIDTH + 1) ** 3 for i, x in enumerate(one) for j, y in enumerate(two)
                 if one is not two or i != j]  # fmt: skip
        return float(np.mean(pairs))

    expected = mean(first, first) + mean(second, second) - 2 * mean(first, second)
    assert kernel(first, second).value == pytest.approx(expected, rel=1e-10)


def test_a_resample_is_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = drawn(7, 3, other=True)
    chosen = torch.tensor([0, 0, 2, 3, 3, 3, 6])
    weights = torch.stack([torch.ones(7), torch.bincount(chosen, minlength=7)]).double()
    monkeypatch.setattr(distances, "ROWS_AT_ONCE", 3)
    found = distances._resampled(rows, weights)
    for number, expected in enumerate((rows, rows[chosen])):
        assert torch.allclose(found.mean[number], expected.mean(0))
        assert torch.allclose(found.covariance[number], torch.cov(expected.T, correction=0))
    (one, two), whole = distances._draws(7, 9), distances.REPLICATES
    assert one.shape == (whole, 7) and (one.sum(1) == 7).all() and (two.sum(1) == 9).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("distance", "truth"), [(frechet, true_frechet()), (kernel, true_kernel())], ids=["frechet", "kernel"]
)
def test_intervals_hold_as_often_as_they_say(distance: Callable[[Tensor, Tensor], Distance], truth: float) -> None:
    """80 trials: a share of 95 % has a standard error of 2.4 points. The values have no bias, the intervals the width
    that their spread asks for."""
    found = [distance(drawn(160, 2 * t, other=False), drawn(240, 2 * t + 1, other=True)) for t in range(TRIALS)]
    held = np.mean([one.low <= truth <= one.high for one in found])
    assert held > LEVEL - 3 * (LEVEL * (1 - LEVEL) / TRIALS) ** 0.5
    values = np.array([one.value for one in found])
    assert abs(values.mean() - truth) < 3 * values.std() / TRIALS**0.5
    assert np.mean([one.high - one.low for one in found]) == pytest.approx(3.92 * values.std(), rel=0.3)


@pytest.mark.parametrize("distance", [frechet, kernel])
def test_equal_distributions_are_not_told_apart(
    distance: Callable[[Tensor, Tensor], Distance], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a distance of zero the bootstrap is cautious: it may say so more often than it claims, and never less."""
    monkeypatch.setattr(distances, "REPLICATES", 100)
    found = [distance(drawn(160, 2 * t, other=False), drawn(160, 2 * t + 1, other=False)) for t in range(30)]
    assert np.mean([one.low <= 0 <= one.high for one in found]) > LEVEL - 3 * (LEVEL * (1 - LEVEL) / 30) ** 0.5
