"""What a regenerated image proves: the statement behind `regeneration`.

`regenerate` finds the latent whose image is nearest to a suspect one. This module says what that
is worth. Errors are root mean square errors in grey levels.

*   **proved**: the regenerated image is off by at most half a level, and in no pixel by more than
    one. Latent, image and difference are the proof; whoever has the weights can repeat it.
*   **ours**: the image is not repeated to the last level, but the error is at most half of the
    smallest that any foreign image had, and so small that a foreign image comes as near with a
    probability of at most `ProofConfig.foreign_rate`, by the *upper* end of its interval.
*   **not_ours**: it is as far away as foreign images are, and further than all but the share `fnr`
    of own images that were searched for in the same way (a conformal p-value). It says: not ours
    *and processed as the search assumes*. An own image that was processed otherwise can end here.
    Under noise the error says how strong that is, and `noise_excess` takes its place here.
*   **cannot_judge**: between the two; or the image has fewer than two equations (pixels that are
    neither at level 0 nor 255) per unknown: a plain white image proves nothing.

How likely a foreign image is to come near is estimated twice. *Empirically*: errors e of foreign
images have near their lower end P(e < t) = q (t / u)^alpha, since the images within t of a set of
images fill a volume that grows like a power of t. The k smallest errors below u give alpha, the
codimension that foreign images see, by Hill's estimator; k alpha / alpha_hat is Gamma(k)
distributed, which gives its interval, and q has that of a binomial rate. *By counting*: d unknowns
cannot satisfy n > d equations, unless by luck; alpha would be n - d if foreign images were spread
over all directions alike. They are not, so that number is an upper end, not an estimate; it is
printed beside the other. Neither says anything about images that somebody *made* to come near.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

from flipad_jax.detection import calibration

__all__ = [
    "VERDICTS",
    "ForeignTail",
    "ProofConfig",
    "counted_codimension",
    "foreign_probability",
    "foreign_tail",
    "is_determined",
    "judge",
    "noise_excess",
    "noise_std",
    "ours_up_to",
    "rounding_p_value",
]

VERDICTS = ("proved", "ours", "not_ours", "cannot_judge")


@dataclasses.dataclass(frozen=True)
class ProofConfig:
    """Settings of the statement.

    Attributes:
      fnr: share of own images, processed as assumed, that may be called not ours.
      foreign_rate: probability of a foreign image to be called ours.
      confidence: of all intervals.
    Raises:
      ValueError: for numbers outside (0, 1).
    """

    fnr: float = 0.02
    foreign_rate: float = 1e-3
    confidence: float = 0.95

    def __post_init__(self):
        for name in ("fnr", "foreign_rate", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"ProofConfig: {name}={getattr(self, name)}: expected in (0, 1)")


class ForeignTail(NamedTuple):
    """Lower tail of the errors of foreign images.

    Attributes:
      edge: u, below which the power law is taken to hold; NaN if there are fewer than 80 errors.
      share_high: upper end of the interval of q, the share of errors below u.
      codimension: alpha, by Hill's estimator.
      codimension_low: lower end of its interval.
      smallest: of all errors.
    """

    edge: float
    share_high: float
    codimension: float
    codimension_low: float
    smallest: float


_SMALLEST_TAIL = 10
_FEWEST = 8 * _SMALLEST_TAIL  # of fewer errors the ten smallest are no tail: the law fails there


def foreign_tail(errors: np.ndarray, *, confidence: float = 0.95) -> ForeignTail:
    """Fit the lower tail to the smallest tenth of 80 or more errors, ten of them at least.

    Args:
      errors: `[n]` positive, finite; of foreign images under the same search.
      confidence: of the lower end of alpha and the upper end of q together.
    Raises:
      ValueError: for errors that are not positive and finite, or none.
    """
    import scipy.stats  # Here: it is slow to import.

    errors = np.sort(np.asarray(errors, np.float64))
    if errors.ndim != 1 or not len(errors) or not (np.isfinite(errors) & (errors > 0)).all():
        raise ValueError(f"foreign errors must be positive and finite, [n]; got {errors!r}")
    k = max(_SMALLEST_TAIL, len(errors) // 10)
    if len(errors) < _FEWEST or errors[k] <= errors[0]:
        return ForeignTail(math.nan, math.nan, math.nan, math.nan, float(errors[0]))
    edge = errors[k]
    alpha = 1 / float(np.mean(np.log(edge / errors[:k])))
    half = (1 - confidence) / 2  # of the error for each of the two
    low = alpha * scipy.stats.gamma.ppf(half, k) / k
    high = scipy.stats.beta.ppf(1 - half, k + 1, len(errors) - k)
    return ForeignTail(float(edge), float(high), alpha, float(low), float(errors[0]))


def foreign_probability(tail: ForeignTail, error: np.ndarray | float) -> np.ndarray:
    """Upper bound of P(a foreign image comes as near as `error`), with the tail's confidence.

    Args:
      tail: from `foreign_tail`.
      error: `[...]`.
    Returns:
      `[...]` in [0, 1]; the power law with the lower end of alpha and the upper end of q below
      `tail.edge`, 1 above it and where there is no tail.
    """
    error = np.asarray(error, np.float64)
    if math.isnan(tail.edge):
        return np.ones(error.shape)
    inside = tail.share_high * (np.minimum(error, tail.edge) / tail.edge) ** tail.codimension_low
    return np.where(error < tail.edge, inside, 1.0)


def ours_up_to(tail: ForeignTail, rate: float) -> float:
    """The error up to which an image is ours, in grey levels.

    Where `foreign_probability` is `rate`, and at most half of the smallest foreign error; 0 where
    there is no tail.
    """
    if math.isnan(tail.edge):
        return 0.0
    limit = tail.edge * min(1.0, rate / tail.share_high) ** (1 / tail.codimension_low)
    return min(limit, tail.smallest / 2)


def counted_codimension(equations: np.ndarray, num_unknowns: int) -> np.ndarray:
    """What the exponent alpha would be by counting, n - d; see the module docstring.

    Args:
      equations: `[...]` n, pixels that are neither at level 0 nor at 255.
      num_unknowns: d, with those of the processing.
    Returns:
      `[...]` at least 0.
    """
    return np.maximum(np.asarray(equations) - num_unknowns, 0)


def rounding_p_value(misfit: np.ndarray, equations: np.ndarray) -> np.ndarray:
    """P-value of "ours and untouched": is what is left no more than rounding?

    Under it r is uniform in +-1/2 for each of n pixels that are not cut off, so the mean of r^2 has
    mean 1/12 and variance 1 / (180 n). A latent that is a least-squares solution makes r smaller,
    not larger, so an image of ours is refused no more often than the p-value says; `regenerate`
    goes on for some steps after it has succeeded, so that its latents nearly are.

    Args:
      misfit: `[...]` mean of r^2 (`Regenerated.misfit`).
      equations: `[...]` n.
    Returns:
      `[...]` by the normal approximation; NaN where n = 0.
    """
    import scipy.stats

    n = np.asarray(equations, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (np.asarray(misfit, np.float64) - 1 / 12) * np.sqrt(180 * n)
    return np.where(n > 0, scipy.stats.norm.sf(z), np.nan)


def _noise_moments(std: float) -> np.ndarray:
    """`[4, 256]` of what normal noise, rounding and the ends of the scale change levels 0 to 255
    by: mean and variance, mean and variance of the square."""
    import scipy.special  # Here: it is slow to import.

    levels = np.arange(256.0)
    # From g to k: what falls into (k - 1/2, k + 1/2), and all that is beyond the ends.
    ends = np.concatenate([[-np.inf], levels[:-1] + 0.5, [np.inf]])
    below = scipy.special.ndtr((ends - levels[:, None]) / std)
    probabilities = np.diff(below, axis=1)
    errors = levels - levels[:, None]
    first, second, fourth = ((probabilities * errors**k).sum(axis=1) for k in (1, 2, 4))
    # Noise too weak to move a pixel has no variance.
    return np.stack([first, second - first**2, second, np.maximum(fourth - second**2, 1e-12)])


def _check_pairs(made: np.ndarray, images: np.ndarray) -> None:
    alike = made.ndim == 4 and made.shape == images.shape
    if made.dtype != np.uint8 or images.dtype != np.uint8 or not alike:
        raise ValueError(
            "expected uint8 images of one shape [n, h, w, c], got "
            f"{made.dtype} {list(made.shape)} and {images.dtype} {list(images.shape)}"
        )


_STDS = np.geomspace(0.25, 100, 25)


@functools.cache
def _moments_by_std() -> np.ndarray:
    """`[len(_STDS), 2, 256]`, mean and variance of `_noise_moments`, the same for all images."""
    return np.stack([_noise_moments(std)[:2] for std in _STDS])


def noise_std(made: np.ndarray, images: np.ndarray) -> np.ndarray:
    """How strong the noise is by which images depart from regenerated ones.

    From the differences (a - b - c + d) / 2 of all 2 x 2 pixels: a picture hardly has any, noise
    has as much there as everywhere. That strength is found under which their mean square is what it
    is, with what rounding and the ends of the grey scale do to it. Ours; in neither paper.

    Args:
      made: `[n, h, w, c]` uint8, regenerated images, h and w at least 2.
      images: the suspect ones, the same.
    Returns:
      `[n]` float64, standard deviations in grey levels, within [0.25, 100].
    Raises:
      ValueError: for images that are not uint8, too small, not `[n, h, w, c]` or not alike.
    """
    made, images = np.asarray(made), np.asarray(images)
    _check_pairs(made, images)
    h, w = (side - side % 2 for side in made.shape[1:3])
    if min(h, w) < 2:
        raise ValueError(f"images {list(made.shape[1:3])} have no 2 x 2 pixels")

    def corners(x):
        x = x[:, :h, :w]
        return x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]

    def difference(x):
        a, b, c, d = corners(x)
        return (a - b - c + d) / 2

    axes = (1, 2, 3)
    seen = np.square(difference(images.astype(np.float64) - made)).sum(axis=axes)
    expected = []
    for mean, variance in _moments_by_std():
        square = np.square(difference(mean[made])) + sum(corners(variance[made])) / 4
        expected.append(square.sum(axis=axes))
    # Nearly a parabola in std: a straight line where both are logarithms.
    columns, wanted = np.log(np.transpose(expected)), np.log(np.maximum(seen, 1e-12))
    found = [np.interp(value, column, np.log(_STDS)) for value, column in zip(wanted, columns)]
    return np.exp(np.reshape(found, len(made)))


def noise_excess(
    made: np.ndarray, images: np.ndarray, std: float | np.ndarray | None = None
) -> np.ndarray:
    """By how much more than noise an image departs from a regenerated one.

    A pixel at level g that normal noise was added to, rounded and cut off at 0 and 255, has a
    squared error of known mean and variance, smaller near the ends of the grey scale. An image of
    ours with that noise, found, has an excess near N(0, 1) (a little less, because the latent is
    fitted to the noise too), whatever its picture is; the root mean square error has not. Where the
    strength is not known it is estimated by `noise_std`: the excess of own images is then half as
    wide again, that of others smaller, as their finest details pass for noise. Ours; in neither
    paper.

    Args:
      made: `[n, h, w, c]` uint8, regenerated images.
      images: the suspect ones, the same.
      std: standard deviation of the noise, in grey levels; of all images, `[n]`, or None.
    Returns:
      `[n]` float64: the sum of squared errors, less its mean, in its standard deviations.
    Raises:
      ValueError: for a std that is not positive and finite, or images that are not uint8, not
        `[n, h, w, c]` or not alike in shape.
    """
    made, images = np.asarray(made), np.asarray(images)
    _check_pairs(made, images)
    stds = noise_std(made, images) if std is None else np.broadcast_to(std, len(made))
    if not ((stds > 0) & (stds < math.inf)).all():
        raise ValueError(f"std={std}: expected a positive number of grey levels")
    found = np.zeros(len(made))
    for value in np.unique(stds):
        mine = stds == value
        _, _, mean, variance = _noise_moments(value)[:, made[mine]]
        errors = np.square(images[mine].astype(np.float64) - made[mine])
        axes = (1, 2, 3)
        found[mine] = (errors - mean).sum(axis=axes) / np.sqrt(variance.sum(axis=axes))
    return found


class Judgement(NamedTuple):
    """`[n]` each.

    Attributes:
      verdict: of `VERDICTS`.
      p_value: conformal, against own images that were searched for in the same way.
      foreign_probability: upper bound that a foreign image comes as near.
    """

    verdict: np.ndarray
    p_value: np.ndarray
    foreign_probability: np.ndarray


def judge(
    errors: np.ndarray,
    proved: np.ndarray,
    own_errors: np.ndarray,
    tail: ForeignTail,
    config: ProofConfig = ProofConfig(),
    *,
    determined: np.ndarray | None = None,
    excess: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Judgement:
    """Verdicts of the module docstring.

    Args:
      errors: `[n]` of the suspect images; one that is not finite is no verdict.
      proved: `[n]` bool, `Regenerated.proved`.
      own_errors: `[m]` of own images that were processed as the search assumes.
      tail: of foreign images, from `foreign_tail`.
      config: settings.
      determined: `[n]` bool, from `is_determined`; all by default.
      excess: `noise_excess` of the suspect, the own and the foreign images: where there is noise,
        it says in place of the errors which images are far away.
    Raises:
      ValueError: for own errors that are missing or not finite.
    """
    errors = np.asarray(errors, np.float64)
    distances, own_distances, nearest = errors, own_errors, tail.smallest
    if excess is not None:
        found = np.where(np.isfinite(errors), excess[0], np.nan)  # else no image was made
        distances, own_distances, nearest = found, excess[1], float(np.min(excess[2]))
    p_value = calibration.conformal_p_values(own_distances, distances)
    probability = np.where(np.isfinite(errors), foreign_probability(tail, errors), np.nan)
    with np.errstate(invalid="ignore"):
        near = errors <= ours_up_to(tail, config.foreign_rate)
        far = (p_value <= config.fnr) & (distances >= nearest)
    verdict = np.where(
        np.asarray(proved, bool),
        "proved",
        np.where(near, "ours", np.where(far, "not_ours", "cannot_judge")),
    )
    if determined is not None:
        verdict = np.where(determined, verdict, "cannot_judge")
    return Judgement(verdict, p_value, probability)


def is_determined(equations: np.ndarray, num_unknowns: int) -> np.ndarray:
    """Whether images say enough about as many unknowns: two equations for each."""
    return np.asarray(equations) >= 2 * num_unknowns
