"""Distances between two sets of clips in the shipped network's features, with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pvdm_fast.evaluation.moments import Gaussian, frechet_distance, frechet_distances, moments

REPLICATES, LEVEL, SEED = 200, 0.95, 0
FEWEST = 128  # clips: with fewer, intervals hold less often than they say
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Distance:
    """A distance between two distributions, corrected for the number of clips, and its interval at LEVEL."""

    value: float
    low: float
    high: float


def frechet(real: Tensor, made: Tensor) -> Distance:
    """The Fréchet distance of features (n, D) and (m, D).

    Computed from n clips it is too large on average. The bootstrap shows by how much: resamples differ from the sample
    as the sample differs from the distribution. That is taken off, so results of different numbers of clips compare. A
    value below 0 means that no difference was found.
    """
    rows = real.double(), made.double()
    observed = frechet_distance(*(Gaussian.of(moments(values)) for values in rows))
    drawn = _draws(len(real), len(made))
    replicates = frechet_distances(*(_resampled(*pair) for pair in zip(rows, drawn, strict=True)))
    corrected = 2 * observed - float(replicates.mean())
    return _interval(corrected, replicates - replicates.mean())


def kernel(real: Tensor, made: Tensor) -> Distance:
    """The kernel distance (squared maximum mean discrepancy) of features (n, D) and (m, D), unbiased, with the
    polynomial kernel (x·y / D + 1)³ of KID (Bińkowski, Sutherland, Arbel, Gretton 2018). It can be negative."""
    weights = [
        torch.cat([torch.ones(1, len(drawn[0]), dtype=torch.float64), drawn]) for drawn in _draws(len(real), len(made))
    ]
    values = _discrepancy(real.double(), made.double(), *weights)
    return _interval(float(values[0]), values[1:] - values[0])


def _draws(*counts: int) -> tuple[Tensor, ...]:
    """How often each clip is drawn in each replicate, (REPLICATES, n) for each set: n draws with replacement."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = []
    for count in counts:
        chosen = torch.randint(count, (REPLICATES, count), generator=generator)
        one = torch.ones(chosen.shape, dtype=torch.float64)
        drawn.append(torch.zeros_like(one).scatter_add_(1, chosen, one))
    return tuple(drawn)


def _interval(value: float, errors: Tensor) -> Distance:
    """The basic bootstrap interval: the errors of replicates, mirrored."""
    tail = (1 - LEVEL) / 2
    low, high = errors.quantile(torch.tensor([tail, 1 - tail], dtype=errors.dtype)).tolist()
    return Distance(value, value - high, value - low)


def _resampled(rows: Tensor, weights: Tensor) -> Gaussian:
    """The Gaussians (R, D), (R, D, D) of rows (n, D) that are there as often as their weights (R, n) say."""
    count, width = rows.shape
    centre = rows.mean(0)
    products = torch.zeros(len(weights), width * width, dtype=rows.dtype)
    for start in range(0, count, ROWS_AT_ONCE):
        centred = rows[start : start + ROWS_AT_ONCE] - centre
        products += weights[:, start : start + ROWS_AT_ONCE] @ (centred[:, :, None] * centred[:, None, :]).flatten(1)
    offset = weights @ (rows - centre) / count
    covariance = products.view(-1, width, width) / count - offset[:, :, None] * offset[:, None, :]
    return Gaussian(count, centre + offset, covariance)


def _discrepancy(real: Tensor, made: Tensor, real_weights: Tensor, made_weights: Tensor) -> Tensor:
    """The unbiased discrepancy (R,) for each row of weights. A clip is never paired with itself or its copies."""
    within = _mean_kernel(real, real, real_weights, real_weights) + _mean_kernel(made, made, made_weights, made_weights)
    return within - 2 * _mean_kernel(real, made, real_weights, made_weights)


def _mean_kernel(first: Tensor, second: Tensor, first_weights: Tensor, second_weights: Tensor) -> Tensor:
    """The weighted mean (R,) of the kernel over pairs; over pairs of different rows if both sets are the same."""
    same = first is second
    total = torch.zeros(len(first_weights), dtype=torch.float64)
    for start in range(0, len(first), ROWS_AT_ONCE):
        rows = first[start : start + ROWS_AT_ONCE]
        values = (rows @ second.T / first.shape[1] + 1) ** 3
        if same:
            values.diagonal(start).zero_()
        weights = first_weights[:, start : start + ROWS_AT_ONCE]
        total += (weights @ values * second_weights).sum(1)
    pairs = first_weights.sum(1) * second_weights.sum(1)
    if same:
        pairs = pairs - first_weights.square().sum(1)
    return total / pairs
