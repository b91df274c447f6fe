"""Compares tensors so that nothing hides: shapes, then finiteness, then the difference's relative 2-norm."""

from __future__ import annotations

import torch
from torch import Tensor

from pvdm_fast.analysis.comparison import relative_error as relative_error


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "result") -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} exceeds {tolerance:.0e}"
