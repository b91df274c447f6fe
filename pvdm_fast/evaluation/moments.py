"""Mean and covariance from sums that can be added in any pieces, and the Fréchet distance of two Gaussians."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def moments(values: Tensor) -> Tensor:
    """Count, sums and outer products of rows in one matrix: (D + 1, D + 1) float64, the sum of z zᵀ for z = (1, row).

    The moments of several sets of rows add up to the moments of all rows.

    Args:
        values: (B, D).
    """
    ones = torch.ones(len(values), 1, dtype=torch.float64)
    rows = torch.cat([ones, values.detach().to("cpu", torch.float64)], dim=1)
    return rows.T @ rows


@dataclass(frozen=True, eq=False)
class Gaussian:
    """``mean`` (D,) and ``covariance`` (D, D) of ``count`` rows, float64. The covariance divides by the count."""

    count: int
    mean: Tensor
    covariance: Tensor

    @staticmethod
    def of(sums: Tensor) -> Gaussian:
        """From `moments`."""
        count = sums[0, 0]
        mean = sums[0, 1:] / count
        return Gaussian(int(count), mean, sums[1:, 1:] / count - torch.outer(mean, mean))

    @property
    def unbiased(self) -> Gaussian:
        """With a covariance that divides by the count less one. Of a single row it isn't a number."""
        scale = self.count / (self.count - 1) if self.count > 1 else torch.nan
        return Gaussian(self.count, self.mean, self.covariance * scale)

    @property
    def standard_error(self) -> Tensor:
        """The mean's standard error, (D,). NaN for a single row."""
        variance = self.covariance.diagonal().clamp_min(0)
        return (variance / (self.count - 1)).sqrt() if self.count > 1 else torch.full_like(variance, torch.nan)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|² + tr(C1) + tr(C2) - 2 tr((C1 C2)^½), in float64.

    The last trace is the sum of the singular values of C1^½ C2^½. Both roots come from symmetric eigenproblems, and
    eigenvalues below their rounding error count as 0. So covariances of few clips, which don't have full rank, work
    too. The general square root of C1 C2 is neither symmetric nor always real.
    """
    return float(frechet_distances(first, second))


def frechet_distances(first: Gaussian, second: Gaussian) -> Tensor:
    """`frechet_distance` of each pair of many Gaussians: means (..., D), covariances (..., D, D)."""
    product = _root(first.covariance) @ _root(second.covariance)
    common = torch.linalg.svdvals(product).sum(-1)
    spread = (first.covariance + second.covariance).diagonal(dim1=-2, dim2=-1).sum(-1) - 2 * common
    return (first.mean - second.mean).square().sum(-1) + spread


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square roots of positive semidefinite matrices (..., D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    rounding = values[..., -1:].clamp_min(0) * values.shape[-1] * torch.finfo(values.dtype).eps
    values = torch.where(values > rounding, values, 0.0)
    return (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
