"""Attributability of keyed generators: what is measured, and what the theorems promise ([P2]).

A registry gives user i a unit key phi_i and a copy of the root model whose images carry a shift,
G_i(z) = G_0(z) + gamma_i phi_i + eps (eq. 5, eps ~ N(mu_i, Sigma_i)). An image x belongs to user i
if phi_i^T x > 0, and to nobody if that holds for no key: real images have phi^T x < 0 (the key is
*data compliant*). The published code has the opposite sign; this is the paper's.

Two kinds of numbers, side by side:

*   measured: distinguishability D (eq. 1), attributability A (eq. 2), length of the shift (eq. 3);
*   promised: the gamma that Theorem 1 asks for, the cosine that Theorem 2 allows, and `certify`,
    the lower bounds on D and A that the same argument gives for the registry as it is.

The mean mu and the covariance Sigma of the error are [D] and [D, D] for images of D numbers. Only
phi^T mu and phi^T Sigma phi are ever needed, so only projections on keys are kept: nothing here
grows with D^2.

Images are `[n, h, w, c]`, uint8 (then scaled) or float32 or float64 in [-1, 1]; keys are
`[N, h, w, c]`, each of norm 1. Keys of another rank, `[N, D]` say, go with samples of any shape and
range that have as many numbers.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flipad_jax import data

__all__ = [
    "NOBODY",
    "SEVERAL",
    "Attribution",
    "Certificate",
    "ErrorStatistics",
    "Extent",
    "ShiftLength",
    "allowed_cosine",
    "assign",
    "attributability",
    "attribute",
    "certify",
    "check_keys",
    "distinguishability",
    "error_statistics",
    "extent",
    "project",
    "required_gamma",
    "responses",
    "shift_length",
]

_NORM_SLACK = 1e-3  # float32 keys of a million numbers are this far from norm 1 at most
_BATCH = 1024


def check_keys(keys: np.ndarray | jax.Array) -> np.ndarray:
    """Keys as `[N, D]` float32, each of norm 1.

    Raises:
      ValueError: for no key, NaN, or a key whose norm is not 1; the message names them.
    """
    keys = np.asarray(keys, np.float32)
    if keys.ndim < 2 or not len(keys):
        raise ValueError(f"keys have shape {keys.shape}, expected [N, ...] with N >= 1")
    flat = keys.reshape(len(keys), -1)
    norms = np.linalg.norm(flat.astype(np.float64), axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) <= _NORM_SLACK))
    if bad.size:
        raise ValueError(
            f"keys {bad[:10].tolist()} have norm {norms[bad[:10]].round(4).tolist()}, expected 1; "
            "divide a key by its norm (a key of zeros is none)"
        )
    return flat


def _check_samples(name: str, samples: np.ndarray, shape: tuple[int, ...]) -> None:
    """Samples of as many numbers as keys of a shape; of that very shape, if it is an image's."""
    is_image = len(shape) == 3
    if is_image and samples.shape[1:] != shape:
        sides = ", ".join(map(str, shape))
        raise ValueError(f"{name} must be [n, {sides}] as the keys are, got shape {samples.shape}")
    each = math.prod(samples.shape[1:])
    if not samples.ndim or each != math.prod(shape):
        raise ValueError(
            f"{name} have shape {samples.shape[1:]}, {each} numbers each; the keys have "
            f"{math.prod(shape)}: they belong to {name} of another size"
        )
    if samples.dtype != np.uint8 and not jnp.issubdtype(samples.dtype, jnp.floating):
        raise ValueError(f"{name} are {samples.dtype}, expected floating point or uint8")


@jax.jit
def _project(keys: jax.Array, images: jax.Array) -> jax.Array:
    return jnp.dot(images, keys.T, precision=lax.Precision.HIGHEST)


def _products(keys: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """`[n, N]` of keys `[N, D]` and samples of D numbers, in batches; uint8 are scaled."""
    rows = [np.zeros((0, len(keys)), np.float32)]
    for start in range(0, len(samples), _BATCH):
        batch = samples[start : start + _BATCH].reshape(-1, keys.shape[1])
        if batch.dtype == np.uint8:
            batch = batch / np.float32(127.5) - 1
        rows.append(np.asarray(_project(keys, batch.astype(np.float32))))
    return np.concatenate(rows)


def responses(keys: np.ndarray | jax.Array, images: np.ndarray | jax.Array) -> np.ndarray:
    """phi_j^T x of every image and key.

    Args:
      keys: `[N, h, w, c]`.
      images: `[n, h, w, c]`.
    Returns:
      `[n, N]` float32; above 0: the key's user made it.
    Raises:
      ValueError: for keys that are no unit vectors, images of another shape than theirs, or images
        that `data.check_images` refuses.
    """
    shape, keys = np.shape(keys)[1:], check_keys(keys)
    images = np.asarray(images)
    if len(shape) == 3:
        data.check_images(images, shape=shape)
    else:
        _check_samples("images", images, shape)
    return _products(keys, images)


def project(keys: np.ndarray | jax.Array, differences: np.ndarray | jax.Array) -> np.ndarray:
    """phi_j^T d of every difference d of two images and every key.

    As `responses`, for what is no image: nothing is scaled, and no range is asked for.

    Args:
      keys: `[N, h, w, c]`.
      differences: `[n, h, w, c]` float.
    Returns:
      `[n, N]` float32.
    Raises:
      ValueError: for keys that are no unit vectors, or differences that are of another shape or
        not floating point.
    """
    shape, keys = np.shape(keys)[1:], check_keys(keys)
    differences = np.asarray(differences)
    _check_samples("differences", differences, shape)
    if differences.dtype == np.uint8:
        raise ValueError(
            "differences are uint8, expected floating point: subtract images in [-1, 1], see "
            "data.to_float"
        )
    return _products(keys, differences)


def distinguishability(own: np.ndarray, real: np.ndarray) -> float:
    """D of eq. 1: half the share of own images with phi^T x > 0, half that of real ones below 0.

    Args:
      own: `[n]` responses of the user's images to the user's key.
      real: `[m]` responses of real images.
    Raises:
      ValueError: for an empty set or NaN.
    """
    own, real = _finite("own", own), _finite("real", real)
    return float(((own > 0).mean() + (real < 0).mean()) / 2)


def attributability(responses_by_model: Iterable[np.ndarray]) -> float:
    """A of eq. 2: mean share of images that their own key claims and no other key does.

    Args:
      responses_by_model: for model i the responses `[n_i, N]` of its images to all N keys, in the
        order of the keys.
    Raises:
      ValueError: for another number of models than of keys, an empty set or NaN.
    """
    shares = []
    for index, found in enumerate(responses_by_model):
        found = _finite(f"model {index}'s", found)
        if found.ndim != 2 or index >= found.shape[1]:
            raise ValueError(
                f"responses of model {index} have shape {found.shape}, expected [n, N] with a "
                "column for every model's key"
            )
        only = found > 0
        claimed = only[:, index].copy()
        only[:, index] = False
        shares.append((claimed & ~only.any(axis=1)).mean())
        num_keys = found.shape[1]
    if not shares or len(shares) != num_keys:
        raise ValueError(f"{len(shares)} models and another number of keys: expected one each")
    return float(np.mean(shares))


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"{name} responses: {values.size} numbers, expected some, all finite")
    return values


class Extent(NamedTuple):
    """d_min and d_max of keys: smallest and largest |phi^T x| over data, `[N]` float64 each."""

    d_min: np.ndarray
    d_max: np.ndarray
    compliance: np.ndarray  # share of data with phi^T x < 0


def extent(keys: np.ndarray | jax.Array, batches: Iterable[np.ndarray | jax.Array]) -> Extent:
    """d_min, d_max (Theorems 1 and 2) and data compliance of every key.

    Args:
      keys: `[N, h, w, c]`.
      batches: images `[n, h, w, c]` of the data, in as many pieces as you like.
    Raises:
      ValueError: for keys or images that `responses` refuses, or no images.
    """
    check_keys(keys)
    low, high = np.full(len(keys), np.inf), np.zeros(len(keys))
    compliant, total = np.zeros(len(keys)), 0
    for images in batches:
        found = responses(keys, images).astype(np.float64)
        if len(found):
            low = np.minimum(low, np.abs(found).min(axis=0))
            high = np.maximum(high, np.abs(found).max(axis=0))
            compliant += (found < 0).sum(axis=0)
            total += len(found)
    if not total:
        raise ValueError("extent: no images")
    return Extent(low, high, compliant / total)


class ErrorStatistics(NamedTuple):
    """The error eps of eq. 5 of one user's model, seen along every key.

    Attributes:
      mean: `[N]` float64, phi_j^T mu.
      std: `[N]` float64, sigma(phi_j) = sqrt(phi_j^T Sigma phi_j).
      num_samples: how many latents.
    """

    mean: np.ndarray
    std: np.ndarray
    num_samples: int


def error_statistics(
    keys: np.ndarray | jax.Array, errors: Iterable[np.ndarray | jax.Array]
) -> ErrorStatistics:
    """phi^T mu and sqrt(phi^T Sigma phi) from samples of the error, eq. 11.

    Args:
      keys: `[N, h, w, c]`.
      errors: batches `[n, h, w, c]` float of eps = G_phi(z) - G_0(z) - gamma phi.
    Raises:
      ValueError: for keys or errors that `project` refuses, or fewer than two.
    """
    check_keys(keys)
    parts = [project(keys, batch).astype(np.float64) for batch in errors]
    found = np.concatenate(parts) if parts else np.zeros((0, len(keys)))
    if len(found) < 2:
        raise ValueError(f"error_statistics got {len(found)} errors, expected two at least")
    return ErrorStatistics(found.mean(axis=0), found.std(axis=0, ddof=1), len(found))


class ShiftLength(NamedTuple):
    """||Delta x|| in both readings.

    Attributes:
      of_mean: ||E[G_phi(z) - G_0(z)]||, eq. 3 as printed.
      mean: E||G_phi(z) - G_0(z)||, what the published code computes; never smaller.
    """

    of_mean: float
    mean: float


def shift_length(differences: Iterable[np.ndarray | jax.Array]) -> ShiftLength:
    """How far a keyed model's images are from the root's, over batches `[n, ...]` of differences.

    Raises:
      ValueError: without images.
    """
    total, norms, count = 0.0, 0.0, 0
    for batch in differences:
        if not len(batch):
            continue
        flat = np.asarray(batch, np.float64).reshape(len(batch), -1)
        total = total + flat.sum(axis=0)
        norms += np.linalg.norm(flat, axis=1).sum()
        count += len(flat)
    if not count:
        raise ValueError("shift_length: no images")
    return ShiftLength(float(np.linalg.norm(total / count)), float(norms / count))


# --- theorems ---------------------------------------------------------------------------------


def _tail(delta: float) -> float:
    """sqrt(log(1 / delta^2)), in sigma: a normal number is beyond it with probability < delta."""
    if not 0 < delta <= 1:
        raise ValueError(f"delta={delta}: expected above 0 and at most 1")
    return float(np.sqrt(-2 * np.log(delta)))


def required_gamma(
    d_max: np.ndarray, sigma: np.ndarray, key_mean: np.ndarray, delta: float = 1e-2
) -> np.ndarray:
    """Right-hand side of eq. 6, Theorem 1: with a gamma at least this, D >= 1 - delta / 2.

    Args:
      d_max: largest |phi^T x| over the data.
      sigma: sqrt(phi^T Sigma phi).
      key_mean: phi^T mu.
      delta: in (0, 1].
    """
    return np.asarray(d_max) + np.asarray(sigma) * _tail(delta) - np.asarray(key_mean)


def allowed_cosine(
    d_min: np.ndarray,
    d_max: np.ndarray,
    sigma: np.ndarray,
    key_mean: np.ndarray,
    delta: float = 1e-2,
) -> np.ndarray:
    """a(phi, phi') of eq. 7, Theorem 2: phi^T phi' may be this large; all arguments are of phi'.

    As printed. Its proof takes for the gamma of *phi* the right-hand side of eq. 6 for *phi'*, so
    where one key needs a longer shift than another the condition is too lenient; `certify` uses
    the gamma that each model has.
    """
    asked = required_gamma(d_max, sigma, key_mean, delta)
    return -1 + (np.asarray(d_max) + np.asarray(d_min) - 2 * np.asarray(key_mean)) / asked


class Certificate(NamedTuple):
    """Lower bounds that hold if eq. 5 does: data inside [d_min, d_max], normal errors.

    Attributes:
      distinguishability: `[N]`, on D of every model.
      model_attributability: `[N]`, on the share of images of a model that are attributed to it.
      attributability: on A of the registry, the mean of these.
      missed: `[N, N]`; entry [i, i] bounds the probability that an image of model i is not claimed
        by its key, [i, j] that it is claimed by key j.
    """

    distinguishability: np.ndarray
    model_attributability: np.ndarray
    attributability: float
    missed: np.ndarray


def certify(
    keys: np.ndarray | jax.Array,
    gammas: np.ndarray,
    data_extent: Extent,
    errors: list[ErrorStatistics],
) -> Certificate:
    """What the argument of Theorems 1 and 2 promises for the models as they are.

    The theorems ask for a delta and give the gamma and the cosine that suffice. Read the other way
    round they give the delta of every model and key: along key j an image of model i is at
    phi_j^T x_0 + gamma_i phi_i^T phi_j + N(phi_j^T mu_i, sigma_i(phi_j)^2), with
    -d_max <= phi_j^T x_0 <= -d_min on compliant data, and P(N(0, 1) > y) <= exp(-y^2 / 2). A key
    that is not compliant on all the data promises nothing: its bounds are 0.

    Args:
      keys: `[N, ...]`.
      gammas: `[N]` length of every model's shift.
      data_extent: of the keys over the data that the root model stands for.
      errors: of every model, along every key.
    Raises:
      ValueError: for lengths that differ, or bad keys.
    """
    keys = check_keys(keys).astype(np.float64)
    gammas = np.asarray(gammas, np.float64)
    num = len(keys)
    if gammas.shape != (num,) or len(errors) != num or data_extent.d_max.shape != (num,):
        raise ValueError(
            f"{num} keys, {gammas.shape} gammas, {len(errors)} error statistics and extents of "
            f"{data_extent.d_max.shape}: expected one of each per key"
        )
    mean = np.stack([error.mean for error in errors])  # [model, key]
    std = np.stack([error.std for error in errors])
    shift = gammas[:, None] * (keys @ keys.T) + mean
    margin = data_extent.d_min[None, :] - shift  # below zero by so much, for other keys
    own = np.arange(num)
    margin[own, own] = shift[own, own] - data_extent.d_max  # above zero, for one's own
    with np.errstate(divide="ignore", invalid="ignore"):
        sigmas = np.where(std > 0, margin / std, np.where(margin >= 0, np.inf, -np.inf))
    # P(N > 0) = 1/2 and less beyond; where the margin is negative nothing is promised.
    missed = np.where(sigmas >= 0, np.exp(-np.maximum(sigmas, 0) ** 2 / 2), 1.0)
    usable = data_extent.compliance >= 1
    missed = np.where(usable[None, :], missed, 1.0)
    claimed = 1 - missed[own, own]
    by_model = np.clip(1 - missed.sum(axis=1), 0, 1)
    found = np.where(usable, 0.5 + claimed / 2, 0.0)
    return Certificate(found, by_model, float(by_model.mean()), missed)


NOBODY, SEVERAL = -1, -2


class Attribution(NamedTuple):
    """Who made an image.

    Attributes:
      user: `[n]` int, index of the key, `NOBODY`, or `SEVERAL` where more than one key claims it.
      margin: `[n]` float32: the claiming key's response; for nobody, how far the nearest key is
        from claiming it (negative); for several, how far the second is beyond zero.
    """

    user: np.ndarray
    margin: np.ndarray


def attribute(keys: np.ndarray | jax.Array, images: np.ndarray | jax.Array) -> Attribution:
    """The user whose key alone claims an image (eq. 2's one-hot rule), and by how much.

    Args:
      keys: `[N, h, w, c]`, those of the registry.
      images: `[n, h, w, c]`.
    Raises:
      ValueError: for keys or images that `responses` refuses.
    """
    return assign(responses(keys, images))


def assign(found: np.ndarray) -> Attribution:
    """`attribute`, of responses `[n, N]` that are there already.

    Raises:
      ValueError: for NaN or infinity.
    """
    if not np.isfinite(found).all():
        bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
        raise ValueError(f"images {bad[:10].tolist()} hold NaN or infinity")
    order = np.sort(found, axis=1)
    claims = (found > 0).sum(axis=1)
    user = np.where(claims == 1, found.argmax(axis=1), np.where(claims, SEVERAL, NOBODY))
    second = order[:, -2] if found.shape[1] > 1 else order[:, -1]
    margin = np.where(claims > 1, second, order[:, -1])
    return Attribution(user.astype(np.int64), margin.astype(np.float32))
