"""Frechet distance between two sets of images: how far apart two normal distributions of features
are (Heusel et al. 2017; with Inception-V3's pool3 features it is the FID that [P2] reports).

    a = statistics(features(batch) for batch in root_images)
    b = statistics(features(batch) for batch in keyed_images)
    distance(a, b)

    d^2 = ||m_a - m_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

Features are any `[n, d]` arrays: `inception.features(network, images, layer="pool3")` with a user's
weights, or others; the name of what was used belongs beside every number, because distances of
different features cannot be compared. Mean and covariance are summed up batch by batch in float64,
so memory does not grow with the number of images.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["FeatureStatistics", "distance", "statistics"]


class FeatureStatistics(NamedTuple):
    """Mean `[d]` and covariance `[d, d]` of features, float64, and how many there were."""

    mean: np.ndarray
    covariance: np.ndarray
    num_samples: int


def statistics(batches: Iterable[ArrayLike]) -> FeatureStatistics:
    """Mean and covariance (ddof 1, as pytorch-fid has it) of a stream of features.

    Args:
      batches: `[n, d]` each, any n.
    Raises:
      ValueError: for batches of another width, features that are not finite, or fewer than two.
    """
    mean, scatter, count = np.zeros(0), np.zeros((0, 0)), 0
    for batch in batches:
        x = np.asarray(batch, np.float64)
        if x.ndim != 2 or (count and x.shape[1] != mean.size):
            raise ValueError(f"features have shape {x.shape}, expected [n, {mean.size or 'd'}]")
        if not np.isfinite(x).all():
            raise ValueError(f"{(~np.isfinite(x)).sum()} features are NaN or infinite")
        if not len(x):
            continue
        if not count:
            mean, scatter = np.zeros(x.shape[1]), np.zeros((x.shape[1],) * 2)
        # Chan, Golub, LeVeque: deviations from means, never a difference of large sums.
        own = x.mean(axis=0)
        centred, delta = x - own, own - mean
        total = count + len(x)
        scatter += centred.T @ centred + np.outer(delta, delta) * (count * len(x) / total)
        mean = mean + delta * (len(x) / total)
        count = total
    if count < 2:
        raise ValueError(f"statistics of {count} features, expected two at least")
    return FeatureStatistics(mean, scatter / (count - 1), count)


def distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The squared Frechet distance, which is what is called FID.

    The trace of the root is the sum of the roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2),
    which is symmetric: no complex root of a product that is nearly singular (few samples, many
    features) and no jitter.

    Raises:
      ValueError: if the features are not as many.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"{a.mean.size} features and {b.mean.size}: they are not the same ones")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    shared = np.sqrt(np.maximum(mixed, 0)).sum()
    squared = np.sum(np.square(a.mean - b.mean)) + trace - 2 * shared
    # Rounding may leave a tiny negative number where the sets are the same.
    return float(max(squared, 0.0))
