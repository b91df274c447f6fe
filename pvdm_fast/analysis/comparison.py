"""How far two results are apart: the one measure for tests, self-test and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def relative_error(actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> float:
    """|actual - expected| / |expected| in the 2-norm, computed in float64. For lists: over all their tensors.

    If all expected values are 0: |actual|. If shapes differ or any value is not finite: NaN, which fails every
    comparison with a tolerance.
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
