"""Frechet distance against SciPy's matrix root and closed forms."""

import numpy as np
import pytest
from scipy import linalg

from flipad_jax import frechet


def features(seed, num=200, dim=6):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)


def test_streamed_statistics_are_numpys():
    x = features(0) + 1e4  # Far from zero, where sums of squares cancel.
    found = frechet.statistics([x[:1], x[1:70], x[70:70], x[70:]])
    np.testing.assert_allclose(found.mean, x.mean(axis=0))
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-9)
    assert found.num_samples == 200


def test_distance_is_that_of_scipys_root():
    a, b = (frechet.statistics([features(seed)]) for seed in (0, 1))
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet.distance(b, a) == pytest.approx(expected, rel=1e-6)
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-8)


def test_closed_forms_and_fewer_samples_than_features():
    x = features(2)
    shifted = frechet.statistics([x + 3])
    assert frechet.distance(frechet.statistics([x]), shifted) == pytest.approx(9 * 6)
    # Diagonal: the sum of (sigma_a - sigma_b)^2.
    a = frechet.FeatureStatistics(np.zeros(3), np.diag([1.0, 4.0, 9.0]), 9)
    b = frechet.FeatureStatistics(np.zeros(3), np.diag([4.0, 4.0, 1.0]), 9)
    assert frechet.distance(a, b) == pytest.approx(1 + 0 + 4)
    few = frechet.statistics([features(3, num=4)])  # Singular.
    assert np.isfinite(frechet.distance(few, a._replace(mean=np.zeros(6), covariance=np.eye(6))))


def test_mistakes_are_named():
    a = frechet.statistics([features(0)])
    with pytest.raises(ValueError, match="not the same"):
        frechet.distance(a, frechet.statistics([features(0, dim=5)]))
    with pytest.raises(ValueError, match="NaN"):
        frechet.statistics([np.full((3, 2), np.nan)])
    with pytest.raises(ValueError, match="two at least"):
        frechet.statistics([np.zeros((1, 2))])
    with pytest.raises(ValueError, match=r"\[n, 2\]"):
        frechet.statistics([np.zeros((3, 2)), np.zeros((3, 4))])
