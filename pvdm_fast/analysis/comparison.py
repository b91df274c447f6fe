"""How far two results are apart: the one measure of tests, self-test and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def relative_error(actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> float:
    """|actual - expected| / |expected| in the 2-norm, computed in float64; over all tensors where lists are given.

    Where all that is expected is 0, |actual| itself. NaN, which is no more than any tolerance and no tolerance either,
    where shapes differ or a value of either is not finite.
    """
    left, right = _listed(actual), _listed(expected)
    difference = total = 0.0
    for a, e in zip(left, right, strict=True):
        if a.shape != e.shape:
            return math.nan
        a, e = a.detach().cpu().double(), e.detach().cpu().double()
        if not (torch.isfinite(a).all() and torch.isfinite(e).all()):
            return math.nan
        difference += float((a - e).square().sum())
        total += float(e.square().sum())
    return math.sqrt(difference / total) if total > 0 else math.sqrt(difference)


def _listed(tensors: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else tensors
