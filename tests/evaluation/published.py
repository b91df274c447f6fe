"""The published Fréchet distance, written without the package."""

from __future__ import annotations

import numpy as np
import scipy.linalg


def by_scipy(first: np.ndarray, second: np.ndarray) -> float:
    """The published formula with the general matrix square root, as StyleGAN-V and cd-fvd write it."""
    means, covariances = (
        [x.mean(0) for x in (first, second)],
        [np.atleast_2d(np.cov(x.T, bias=True)) for x in (first, second)],
    )
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    spread = np.trace(covariances[0] + covariances[1] - 2 * np.real(root))
    return float(np.square(means[0] - means[1]).sum() + spread)
