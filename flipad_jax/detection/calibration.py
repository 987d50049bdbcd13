"""From scores to verdicts: thresholds, conformal p-values, false-discovery control.

Scores: higher = less likely ours; an image is declared not ours iff its score is above (not at) the
threshold. All thresholds come from scores of own images that trained nothing (a validation split).

A verdict takes `verdict_threshold`: conformal where n own scores certify the rate, their maximum
where they are too few to.

What n own scores can certify. The empirical quantile of the paper (`threshold`) rejects a new own
image with probability fnr only about: with few scores the true rate may be twice that.
`conformal_threshold` keeps P(own image rejected) <= fnr for every n and every detector, given only
that the new image is exchangeable with the validation images; the price is that a rate below 1 / (n
+ 1) needs a larger n (`smallest_certifiable_fnr`): 198 scores certify no 0.005, 199 do. The
probability is over the draw of the validation images too; for one fixed set of them the rate varies
around it.

These functions run on the host in NumPy: exact sorting, float64, any n.
"""

import math
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "benjamini_hochberg",
    "benjamini_hochberg_level",
    "conformal_p_values",
    "conformal_threshold",
    "smallest_certifiable_fnr",
    "threshold",
    "verdict_threshold",
]


def _own_scores(own_scores: ArrayLike) -> np.ndarray:
    scores = np.asarray(own_scores, np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"own scores of shape {list(scores.shape)}: expected [n] with n >= 1.")
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {scores.size} own scores are NaN or infinite; nothing can be calibrated on "
            "them."
        )
    return scores


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"{name}={rate}: expected a rate in [0, 1].")


def threshold(own_scores: ArrayLike, fnr: float) -> float:
    """The (1 - fnr) quantile of own validation scores, linearly interpolated ([P1] E.3).

    The same as `torch.quantile` and `numpy.quantile`. Approximate, see the module docstring.

    Args:
      own_scores: `[n]` finite scores of own images.
      fnr: share of own images to give up, in [0, 1]; the paper has 0.005 and 0.05.

    Returns:
      The threshold; reject what is strictly above.

    Raises:
      ValueError: for scores that are empty or not finite, or a rate outside [0, 1].
    """
    scores = _own_scores(own_scores)
    _check_rate("fnr", fnr)
    return float(np.quantile(scores, 1 - fnr))


def smallest_certifiable_fnr(num_scores: int) -> float:
    """1 / (n + 1): the smallest rate > 0 for which `conformal_threshold` is finite."""
    return 1 / (num_scores + 1)


def conformal_threshold(own_scores: ArrayLike, fnr: float) -> float:
    """The smallest threshold with P(a new own image is rejected) <= fnr in finite samples.

    The ceil((n + 1)(1 - fnr))-th smallest score (split conformal prediction), +inf if that is
    beyond the n-th. Rejecting above it is the same as rejecting where `conformal_p_values` <= fnr.

    Args:
      own_scores: `[n]` finite scores of own images, which trained nothing.
      fnr: highest rate of rejected own images, in [0, 1].

    Returns:
      The threshold, +inf (nothing is ever rejected) if n is too small for this rate.

    Raises:
      ValueError: for scores that are empty or not finite, or a rate outside [0, 1].
    """
    scores = np.sort(_own_scores(own_scores))
    _check_rate("fnr", fnr)
    # 0.005 means the decimal number: 200 * 0.995 in floating point may land on either side of 199.
    allowed = math.floor((scores.size + 1) * Fraction(repr(float(fnr))))
    if allowed == 0:
        return math.inf
    if allowed > scores.size:
        return -math.inf  # fnr = 1: everything may be rejected
    return float(scores[scores.size - allowed])


def verdict_threshold(own_scores: ArrayLike, fnr: float) -> float:
    """The threshold that verdicts are given by.

    `conformal_threshold` where n >= 1 / fnr - 1 scores certify the rate: a new own image is
    rejected with probability fnr at most, and an image is called not ours exactly where its
    `conformal_p_values` is fnr or less (but for fnr = 1, where it is the smallest score). With
    fewer scores nothing would ever be rejected; then it is their maximum, which a new own image
    exceeds with probability 1 / (n + 1) at most: more than fnr, and the least that any finite
    threshold can promise.

    Args, errors: as for `threshold`.

    Returns:
      A finite threshold; reject what is strictly above.
    """
    scores = _own_scores(own_scores)
    return float(np.clip(conformal_threshold(scores, fnr), scores.min(), scores.max()))


def conformal_p_values(own_scores: ArrayLike, scores: ArrayLike) -> np.ndarray:
    """How unusual a score is among own images: p = (1 + #{own >= score}) / (n + 1).

    For an own image P(p <= a) <= a for every a. Small = probably not ours; never 0, never above 1.

    Args:
      own_scores: `[n]` finite scores of own images, which trained nothing.
      scores: `[...]` scores to judge.

    Returns:
      `[...]` float64 p-values; NaN where a score is NaN or infinite, which is no verdict.

    Raises:
      ValueError: for own scores that are empty or not finite.
    """
    own = np.sort(_own_scores(own_scores))
    scores = np.asarray(scores, np.float64)
    at_least = own.size - np.searchsorted(own, scores, side="left")
    return np.where(np.isfinite(scores), (1 + at_least) / (own.size + 1), np.nan)


def benjamini_hochberg(p_values: ArrayLike, fdr: float) -> np.ndarray:
    """Which of many images to declare not ours, with a bound on the share of wrong declarations.

    Benjamini and Hochberg (1995): reject the k smallest p-values, k the largest with p_(k) <= fdr k
    / m. Conformal p-values that share one set of own scores are positively dependent in the way
    that keeps the bound (Bates et al. 2023): on average at most the share `fdr` of the rejected
    images are ours. With n own scores nothing can be rejected unless k / m >= 1 / (fdr (n + 1)) of
    the images are at the smallest p-value.

    Args:
      p_values: `[m]` p-values; NaN (no verdict) is neither rejected nor counted in m.
      fdr: bound on the expected share of own images among the rejected, in [0, 1].

    Returns:
      `[m]` bool, True = rejected, that is not ours.

    Raises:
      ValueError: for p-values outside [0, 1] or not `[m]`, or a rate outside [0, 1].
    """
    p_values = np.asarray(p_values, np.float64)
    _check_rate("fdr", fdr)
    known = ~np.isnan(p_values)
    if p_values.ndim != 1 or np.any((p_values[known] < 0) | (p_values[known] > 1)):
        raise ValueError(f"p-values of shape {list(p_values.shape)}: expected [m] within [0, 1].")
    return p_values <= benjamini_hochberg_level(
        *np.unique(p_values[known], return_counts=True), fdr
    )


def benjamini_hochberg_level(p_values: ArrayLike, counts: ArrayLike, fdr: float) -> float:
    """The largest p-value that `benjamini_hochberg` rejects, of any number of images.

    Args:
      p_values: `[k]` different p-values, ascending; of n own scores there are n + 1 at most.
      counts: `[k]` how many images have each.
      fdr: as there.

    Returns:
      The p-value up to which images are declared not ours; NaN, which nothing is up to, if none is.

    Raises:
      ValueError: for p-values that do not ascend within [0, 1], other counts, or a rate outside
        [0, 1].
    """
    p_values, counts = np.asarray(p_values, np.float64), np.asarray(counts, np.float64)
    _check_rate("fdr", fdr)
    ascends = p_values.ndim == 1 and np.all(np.diff(p_values) > 0)
    if not ascends or not np.all((p_values >= 0) & (p_values <= 1)):
        raise ValueError(
            f"p-values of shape {list(p_values.shape)}: expected [k] ascending, 0 to 1."
        )
    if counts.shape != p_values.shape or not np.all(counts >= 1):
        raise ValueError(
            f"counts of shape {list(counts.shape)}: expected one, 1 or more, for each."
        )
    # Conformal p-values are fractions that often meet the line exactly: rounding must not decide.
    line = fdr * np.cumsum(counts) / max(counts.sum(), 1) * (1 + 1e-12)
    below = np.flatnonzero(p_values <= line)
    return float(p_values[below[-1]]) if below.size else float("nan")
