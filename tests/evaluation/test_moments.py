"""Moments add up in any pieces, and the Fréchet distance equals an independent implementation's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation.published import by_scipy
from tolerances import FRECHET

from pvdm_fast.evaluation.moments import Gaussian, frechet_distance, moments


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    """Correlated features with unequal scales, float64."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * np.geomspace(1, 0.01, width)
    return torch.from_numpy(rng.normal(size=(count, width)) @ mixing + rng.normal(size=width))


@pytest.mark.parametrize(("counts", "width"), [((300, 200), 40), ((900, 1000), 12), ((50, 60), 1)])
def test_the_distance_is_scipy_s(counts: tuple[int, int], width: int) -> None:
    first, second = rows(counts[0], width, 1), rows(counts[1], width, 2)
    ours = frechet_distance(Gaussian.of(moments(first)), Gaussian.of(moments(second)))
    assert ours == pytest.approx(by_scipy(first.numpy(), second.numpy()), rel=FRECHET)


def test_of_commuting_covariances_it_is_the_closed_form() -> None:
    width = 200
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0]
    spectra = np.geomspace(1e-12, 10, width), np.geomspace(5, 1e-14, width)
    first, second = (
        Gaussian(9, torch.zeros(width, dtype=torch.float64), torch.from_numpy((basis * s) @ basis.T)) for s in spectra
    )
    assert frechet_distance(first, second) == pytest.approx(np.square(np.sqrt(spectra[0]) - np.sqrt(spectra[1])).sum())


def test_fewer_clips_than_features_lose_nothing() -> None:
    """Features inside a subspace keep their distance there, though no covariance has full rank."""
    inside = rows(30, 8, 3), rows(25, 8, 4)
    place = torch.linalg.qr(torch.randn(400, 8, dtype=torch.float64)).Q
    alone = frechet_distance(*(Gaussian.of(moments(x)) for x in inside))
    embedded = frechet_distance(*(Gaussian.of(moments(x @ place.T)) for x in inside))
    assert embedded == pytest.approx(alone, rel=FRECHET)


def test_equal_clips_are_at_distance_zero() -> None:
    for width, count in ((40, 300), (400, 30)):
        gaussian = Gaussian.of(moments(rows(count, width, 5)))
        assert abs(frechet_distance(gaussian, gaussian)) < FRECHET * float(gaussian.covariance.trace())


def test_moments_add_up_in_any_pieces() -> None:
    values = rows(101, 7, 6) + 1000  # far from 0, so that sums of squares lose digits
    sums = torch.stack([moments(piece) for piece in values.split(9)]).sum(0)
    gaussian = Gaussian.of(sums)
    assert gaussian.count == 101
    assert np.allclose(gaussian.mean, values.mean(0), rtol=1e-14)
    assert np.allclose(gaussian.covariance, np.cov(values.numpy().T, bias=True), atol=1e-8)
    expected = values.std(0) / 101**0.5
    assert np.allclose(gaussian.standard_error, expected, rtol=1e-8)
