"""How well a detector decides: accuracy per rival, AUC, confusion, and how sure these numbers are.

Scores: higher = less likely ours. An image is rejected (declared not ours) iff its score is above
the threshold, accepted iff it is at or below, and undecided if its score is NaN or infinite. An
undecided image is never a success: an own one counts as not accepted, a rival's as not rejected,
also in the AUC and the ROC, where it ranks worst. Counts of undecided images are reported beside
the rates.

All rates are fractions in [0, 1]; NumPy on the host, float64.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "RocCurve",
    "auc",
    "clopper_pearson",
    "confusion",
    "mean_interval",
    "pair_accuracy",
    "roc",
    "summary",
]


def _scores(scores: ArrayLike, name: str) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"{name} scores of shape {list(scores.shape)}: expected [n] with n >= 1.")
    return scores


def _counts(scores: np.ndarray, threshold: float) -> dict[str, int]:
    if math.isnan(threshold):
        raise ValueError(
            "threshold is NaN: expected a number (or infinity, which accepts everything)."
        )
    finite = np.isfinite(scores)
    return {
        "accepted": int((finite & (scores <= threshold)).sum()),
        "rejected": int((finite & (scores > threshold)).sum()),
        "undecided": int((~finite).sum()),
    }


def confusion(
    own_scores: ArrayLike, rival_scores: Mapping[str, ArrayLike], threshold: float
) -> dict[str, dict[str, int]]:
    """Accepted, rejected and undecided images of every source, own ones under "own".

    Raises:
      ValueError: for an empty source, a rival called "own", or a threshold that is NaN.
    """
    if "own" in rival_scores:
        raise ValueError('a rival is called "own", the name of our own images; rename it.')
    sources = {"own": own_scores, **rival_scores}
    return {name: _counts(_scores(scores, name), threshold) for name, scores in sources.items()}


def pair_accuracy(own_scores: ArrayLike, rival_scores: ArrayLike, threshold: float) -> float:
    """Mean of the shares of own images accepted and rival images rejected.

    With as many own as rival images, as in [P1], this is the plain accuracy.

    Args:
      own_scores: `[n]` scores of own test images.
      rival_scores: `[m]` scores of one other source.
      threshold: from `calibration`.

    Returns:
      The accuracy in [0, 1]; at most 1 - fnr / 2 if own images are rejected at the rate fnr.

    Raises:
      ValueError: for empty scores or a threshold that is NaN.
    """
    own, rival = _scores(own_scores, "own"), _scores(rival_scores, "rival")
    accepted = _counts(own, threshold)["accepted"] / own.size
    rejected = _counts(rival, threshold)["rejected"] / rival.size
    return (accepted + rejected) / 2


def _labelled(own_scores: ArrayLike, rival_scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Labels (rival = 1) and finite scores for scikit-learn; an undecided image ranks worst."""
    own, rival = _scores(own_scores, "own"), _scores(rival_scores, "rival")
    scores = np.concatenate([own, rival])
    labels = np.repeat([0, 1], [own.size, rival.size])
    finite = np.isfinite(scores)
    low, high = (scores[finite].min(), scores[finite].max()) if finite.any() else (0.0, 0.0)
    # Beyond every finite score, also where adding 1 would be lost to rounding.
    worst = np.where(labels == 0, np.nextafter(high + 1, np.inf), np.nextafter(low - 1, -np.inf))
    return labels, np.where(finite, scores, worst)


def auc(own_scores: ArrayLike, rival_scores: ArrayLike) -> float:
    """P(a rival's score is above an own score), ties counted half: the area under `roc`.

    scikit-learn's `roc_auc_score` with rivals as the positive class.

    Args:
      own_scores: `[n]` scores of own test images.
      rival_scores: `[m]` scores of one other source.

    Returns:
      The area in [0, 1]; 1 is perfect, 0.5 chance.

    Raises:
      ValueError: for empty scores.
    """
    from sklearn.metrics import roc_auc_score  # slow to import, needed here only

    return float(roc_auc_score(*_labelled(own_scores, rival_scores)))


class RocCurve(NamedTuple):
    """What every threshold would do; one point per distinct score, thresholds falling."""

    own_rejected: np.ndarray  # [k] share of own images rejected (or undecided)
    rival_rejected: np.ndarray  # [k] share of the rival's images rejected
    thresholds: np.ndarray  # [k] from +inf (nothing is rejected) to -inf


def roc(own_scores: ArrayLike, rival_scores: ArrayLike) -> RocCurve:
    """Receiver operating characteristic, from (0, 0) to (1, 1).

    Undecided own images are rejected first and undecided rival images last: the area below is `auc`
    in every case.

    Args:
      own_scores: `[n]` scores of own test images.
      rival_scores: `[m]` scores of one other source.

    Raises:
      ValueError: for empty scores.
    """
    from sklearn.metrics import roc_curve

    labels, scores = _labelled(own_scores, rival_scores)
    own_rejected, rival_rejected, at_least = roc_curve(labels, scores, drop_intermediate=False)
    # scikit-learn rejects at or above its thresholds (from +inf), this library strictly above: what
    # is rejected above one value is what is rejected from the next higher one on.
    finite = np.concatenate([_scores(own_scores, "own"), _scores(rival_scores, "rival")])
    finite = finite[np.isfinite(finite)]
    thresholds = np.concatenate([at_least, [-np.inf]])
    if finite.size:  # Places that undecided images were given are no thresholds.
        thresholds[thresholds > finite.max()] = np.inf
        thresholds[thresholds < finite.min()] = -np.inf
    return RocCurve(
        np.concatenate([[0.0], own_rejected]), np.concatenate([[0.0], rival_rejected]), thresholds
    )


def clopper_pearson(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval for a binomial rate: covers the true rate with at least this confidence.

    Args:
      count: successes, 0 <= count <= total.
      total: trials, >= 1.
      confidence: in (0, 1).

    Returns:
      (low, high).

    Raises:
      ValueError: for counts or a confidence out of range.
    """
    from scipy.stats import beta  # slow to import, needed here only

    if not (0 <= count <= total and total >= 1 and 0 < confidence < 1):
        raise ValueError(
            f"clopper_pearson: count={count}, total={total}, confidence={confidence}: expected 0 "
            f"<= count <= total, total >= 1, 0 < confidence < 1."
        )
    tail = (1 - confidence) / 2
    low = beta.ppf(tail, count, total - count + 1) if count > 0 else 0.0
    high = beta.ppf(1 - tail, count + 1, total - count) if count < total else 1.0
    return float(low), float(high)


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float | None]:
    """Mean over repeats and the half-width of its Student t interval.

    Args:
      values: `[n]` results of independent repeats.
      confidence: of the interval.

    Returns:
      the mean, and half the width: the interval is mean -+ that. None for a single value, of which
      nobody knows the spread.

    Raises:
      ValueError: without values, for one that is not finite, or a confidence outside (0, 1).
    """
    from scipy import stats

    values = np.asarray(values, np.float64).ravel()
    if not values.size or not np.isfinite(values).all() or not 0 < confidence < 1:
        raise ValueError(
            f"mean_interval: {values.size} values, {np.isfinite(values).sum()} of them finite, "
            f"{confidence=}; expected finite numbers and a confidence inside (0, 1)."
        )
    if values.size == 1:
        return float(values[0]), None
    quantile = stats.t.ppf((1 + confidence) / 2, values.size - 1)
    return float(values.mean()), float(quantile * values.std(ddof=1) / np.sqrt(values.size))


def summary(
    own_scores: ArrayLike, rival_scores: Mapping[str, ArrayLike], threshold: float
) -> dict[str, Any]:
    """All of it for one detector, as a dict that JSON can hold.

    Args:
      own_scores: `[n]` scores of own test images (not those of the calibration).
      rival_scores: scores `[m]` of every other source by name, real images among them.
      threshold: from `calibration`.

    Returns:
      threshold (None if infinite), accuracy and auc per rival, mean_accuracy and mean_auc over
      rivals, achieved_fnr (share of own images not accepted, undecided ones among them) with its 95
      % Clopper-Pearson interval, num_images per source, and counts as from `confusion`.

    Raises:
      ValueError: without rivals, for an empty source, or a threshold that is NaN.
    """
    if not rival_scores:
        raise ValueError("summary: no rival scores; expected at least one source.")
    counts = confusion(own_scores, rival_scores, threshold)
    num_images = {name: sum(count.values()) for name, count in counts.items()}
    missed = num_images["own"] - counts["own"]["accepted"]
    accuracy = {
        name: pair_accuracy(own_scores, scores, threshold) for name, scores in rival_scores.items()
    }
    area = {name: auc(own_scores, scores) for name, scores in rival_scores.items()}
    return {
        "threshold": float(threshold) if math.isfinite(threshold) else None,
        "mean_accuracy": float(np.mean(list(accuracy.values()))),
        "accuracy": accuracy,
        "mean_auc": float(np.mean(list(area.values()))),
        "auc": area,
        "achieved_fnr": missed / num_images["own"],
        "achieved_fnr_interval": list(clopper_pearson(missed, num_images["own"])),
        "num_images": num_images,
        "counts": counts,
    }
