"""One-class detector: no image of anybody else, own images are enough.

DeepSAD learns what separates own from *real* images and is blind to whatever another model shares
with ours. Inverted activations z' = z - z_bar carry more than that difference, and three statistics
of them, fitted on own images alone, read it off:

*   **residual**: the share of z' outside the span of the first principal directions of own z',
    ||(I - V V^T)(z' - mean)||^2 / ||z' - mean||^2;
*   **channel moments**: Mahalanobis distance of the per-channel means and standard deviations;
*   **quantiles**: Mahalanobis distance of a few quantiles of all entries of z'.

Small networks can be added (`fit(..., classifiers=)`), each a statistic more: of a `classifier` the
odds that an image only looks like ours, of a `reconstruction` how badly it draws the image.

*   **altered**: it learned to tell own images from altered copies of them (`perturbations.alter`);
    own images are enough for it, and it sees most rivals.
*   **altered_activations**: the same from z', of own images and of altered copies.
*   **impostors**: it learned to tell own images from those of changed copies of our own generator
    (`generators.impostors`), for which one needs the generator. It sees our own model after some
    more training best.
*   **reconstruction**: it learned to draw untouched own images from processed ones. Where images
    were processed the others see little, and it sees what the picture shows.

Own images that fitted nothing of this (the reference) turn each statistic s into a tail probability
p(s), and the score is Fisher's sum -2 sum_i w_i log p_i, higher = less likely ours. The statistics
are dependent, so the sum is a score and no chi-square: its threshold comes from a third set of own
images (`calibration`). A network counts one and a half times: it sees what the first three may
miss. What was chosen while looking at rivals, the weight and which networks there are, is told in
WORKSPACE.md; no network ever learned from one.

An empirical p-value cannot fall below 1 / (n + 1), so alone it would throw away how far beyond all
own images a statistic lies. Above the reference's 98 % quantile u the tail is therefore continued
as a Pareto tail, p(s) = 0.02 (s / u)^(-1 / gamma), with Hill's
estimate gamma of its index: heavy tails of own images give far values less weight, light ones more.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from flipad_jax import data, parallel
from flipad_jax.detection import classifier, reconstruction
from flipad_jax.detection.classifier import Classifier
from flipad_jax.detection.feature_rows import FeatureRows
from flipad_jax.detection.reconstruction import Reconstructor

__all__ = [
    "CLASSIFIERS",
    "STATISTICS",
    "Gaussian",
    "OneClass",
    "OneClassConfig",
    "Tails",
    "fisher_sum",
    "fisher_weights",
    "fit",
    "odds",
    "score",
    "statistics",
    "tails",
]

STATISTICS = ("residual", "channel_moments", "quantiles")
CLASSIFIERS = ("altered", "altered_activations", "impostors", "reconstruction")

_CLASSIFIER_WEIGHT = 1.5  # in Fisher's sum, where each of STATISTICS has 1
_LARGEST_LOGIT = 80.0  # its exponential is still a float32

_TAIL = 0.02  # share of the reference in the tail that Hill's estimate sees
_MIN_TAIL = 10  # ... and at least this many images


@dataclasses.dataclass(frozen=True)
class OneClassConfig:
    """Settings of the statistics.

    Attributes:
      num_components: principal directions kept; at most a third of the images fitted on, and half
        of the dimensions.
      quantiles: levels in [0, 1] of the quantile statistic.
      batch_size: images per compiled call.
    """

    num_components: int = 300
    quantiles: tuple[float, ...] = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
    batch_size: int = 64

    def __post_init__(self):
        object.__setattr__(self, "quantiles", tuple(self.quantiles))
        if self.num_components < 1 or self.batch_size < 1:
            raise ValueError(
                f"OneClassConfig: {self.num_components=} and {self.batch_size=} must be positive"
            )
        if not self.quantiles or not all(0 <= q <= 1 for q in self.quantiles):
            raise ValueError(f"OneClassConfig: quantiles={self.quantiles} must be levels in [0, 1]")


@struct.dataclass
class Gaussian:
    """A normal distribution, for Mahalanobis distances."""

    mean: jax.Array  # [k]
    precision: jax.Array  # [k, k]


@struct.dataclass
class OneClass:
    """A fitted detector; a pytree of float32 arrays.

    Attributes:
      mean: `[d]` mean own activation, d = h w c.
      directions: `[d, r]` orthonormal principal directions.
      moments: mean `[2 c]` and precision of the channel moments.
      quantiles: mean and precision of the quantiles.
      reference: `[k, n]` sorted statistics of the reference images: `STATISTICS`, then those of the
        classifiers.
      classifiers: networks by name, of `CLASSIFIERS`.
      input_shape: (h, w, c) of an activation (static).
      config: settings (static).
    """

    mean: jax.Array
    directions: jax.Array
    moments: Gaussian
    quantiles: Gaussian
    reference: jax.Array
    classifiers: dict[str, Classifier | Reconstructor]
    input_shape: tuple[int, int, int] = struct.field(pytree_node=False)
    config: OneClassConfig = struct.field(pytree_node=False)


def _channel_moments(z: jax.Array) -> jax.Array:
    """`[h, w, c]` -> `[2 c]`."""
    return jnp.concatenate([z.mean(axis=(0, 1)), z.std(axis=(0, 1))])


_jax_quantiles = jax.jit(
    jax.vmap(lambda z, levels: jnp.quantile(z.ravel(), levels), in_axes=(0, None))
)


def _quantiles(batch: np.ndarray, levels: tuple[float, ...]) -> np.ndarray | jax.Array:
    """`[n, h, w, c]` -> `[n, len(levels)]`."""
    if jax.default_backend() == "cpu":
        # NumPy partitions where XLA sorts: ten times faster for a 16 x 16 x 64 activation.
        return np.quantile(batch.reshape(len(batch), -1), levels, axis=1).T.astype(np.float32)
    return _jax_quantiles(batch, jnp.asarray(levels, jnp.float32))


def _mahalanobis(gaussian: Gaussian, x: jax.Array) -> jax.Array:
    x = x - gaussian.mean
    turned = jnp.dot(gaussian.precision, x, precision=lax.Precision.HIGHEST)
    return jnp.dot(x, turned, precision=lax.Precision.HIGHEST)


def _statistics_of_one(model: OneClass, z: jax.Array, quantiles: jax.Array) -> jax.Array:
    centred = z.ravel() - model.mean
    inside = jnp.dot(centred, model.directions, precision=lax.Precision.HIGHEST)
    # What is outside is formed before it is squared: the difference of two squared norms would
    # cancel where the directions explain nearly all.
    outside = centred - jnp.dot(model.directions, inside, precision=lax.Precision.HIGHEST)
    residual = jnp.sum(outside**2) / jnp.maximum(jnp.sum(centred**2), jnp.finfo(z.dtype).tiny)
    return jnp.stack(
        [
            residual,
            _mahalanobis(model.moments, _channel_moments(z)),
            _mahalanobis(model.quantiles, quantiles),
        ]
    )


_statistics_batch = jax.jit(jax.vmap(_statistics_of_one, in_axes=(None, 0, 0)))
_channel_moments_batch = jax.jit(jax.vmap(_channel_moments))


def _check(
    name: str, z: np.ndarray | jax.Array | FeatureRows, shape: tuple[int, ...] | None = None
) -> None:
    if (
        z.ndim != 4
        or not jnp.issubdtype(z.dtype, jnp.floating)
        or (shape is not None and tuple(z.shape[1:]) != shape)
    ):
        expected = "[n, h, w, c]" if shape is None else f"[n, {', '.join(map(str, shape))}]"
        raise ValueError(
            f"one-class {name} are {z.dtype}{list(z.shape)}, expected floating point {expected}"
        )


def _batches(z: np.ndarray | FeatureRows, batch_size: int):
    """Batches of one shape (the last filled up with its last image), and how many of each count."""
    for start in range(0, z.shape[0], batch_size):
        batch = np.asarray(z[start : start + batch_size], np.float32)
        yield data.filled(batch, batch_size), len(batch)


def fit(
    own: np.ndarray | FeatureRows,
    reference: np.ndarray | FeatureRows,
    config: OneClassConfig = OneClassConfig(),
    *,
    classifiers: Mapping[str, Classifier | Reconstructor] = types.MappingProxyType({}),
    reference_images: np.ndarray | None = None,
) -> OneClass:
    """Fit the statistics on one set of own images and their tail probabilities on another.

    Args:
      own: z' = z - z_bar of own images, `[n, h, w, c]` floating point. Of a `FeatureRows` that lies
        on disk never more than a batch is in memory.
      reference: the same of other own images, `[m, h, w, c]`; shares no image with `own`.
      config: settings.
      classifiers: networks by name, of `CLASSIFIERS`; they have not seen the reference.
      reference_images: the images behind `reference`, for the networks.
    Returns:
      The detector. Calibrate it on own images that are in neither set.
    Raises:
      ValueError: for shapes that differ, NaN, too few images to fit anything (30 and 20), or a
        classifier of another name.
    """
    from sklearn.covariance import ledoit_wolf

    unknown = sorted(set(classifiers) - set(CLASSIFIERS))
    if unknown:
        raise ValueError(f"classifiers {unknown}: expected some of {CLASSIFIERS}")
    for name, network in classifiers.items():
        kind = Reconstructor if name == "reconstruction" else Classifier
        if not isinstance(network, kind):
            raise ValueError(
                f"classifier {name!r} is a {type(network).__name__}, expected {kind.__name__}"
            )
    _check("activations", own)
    shape = tuple(own.shape[1:])
    _check("reference activations", reference, shape)
    if own.shape[0] < 30 or reference.shape[0] < 20:
        raise ValueError(
            f"the one-class detector got {own.shape[0]} own images to fit and "
            f"{reference.shape[0]} for reference; "
            "it needs at least 30 and 20, and is good from about 1000 and 500 on"
        )
    for name, z in (("own", own), ("reference", reference)):
        finite = [
            np.isfinite(batch[:count]).all(axis=(1, 2, 3))
            for batch, count in _batches(z, config.batch_size)
        ]
        bad = np.flatnonzero(~np.concatenate(finite))
        if bad.size:
            raise ValueError(
                f"{name} activations {bad[:10].tolist()} hold NaN or infinity ({bad.size} in all)"
            )

    def gaussian(x):
        x = np.asarray(x, np.float64)
        covariance, _ = ledoit_wolf(x)
        # A feature that never varies (a quantile that is always 0) gets a spread of rounding size,
        # not zero.
        floor = 1e-10 * max(np.trace(covariance) / len(covariance), np.finfo(np.float32).tiny)
        precision = np.linalg.inv(covariance + floor * np.eye(len(covariance)))
        return Gaussian(jnp.asarray(x.mean(0), jnp.float32), jnp.asarray(precision, jnp.float32))

    described = [
        [
            np.asarray(part)[:count]
            for part in (_channel_moments_batch(batch), _quantiles(batch, config.quantiles))
        ]
        for batch, count in _batches(own, config.batch_size)
    ]
    channel_moments, quantiles = (np.concatenate(parts) for parts in zip(*described))
    num_components = min(config.num_components, own.shape[0] // 3, math.prod(shape) // 2)
    if isinstance(own, FeatureRows) and own.on_disk:
        mean, directions = _streamed_directions(own, num_components, config.batch_size)
    else:
        rows = jnp.asarray(own[:], jnp.float32).reshape(own.shape[0], -1)
        mean, directions = _principal_directions(rows, num_components)
    model = OneClass(
        mean=mean,
        directions=directions,
        moments=gaussian(channel_moments),
        quantiles=gaussian(quantiles),
        reference=jnp.zeros((0, 0), jnp.float32),
        classifiers=dict(classifiers),
        input_shape=shape,
        config=config,
    )
    sorted_reference = np.sort(statistics(model, reference, reference_images), axis=0).T
    if not np.isfinite(sorted_reference).all():
        raise ValueError(
            "a statistic of the reference is not finite: "
            f"{int((~np.isfinite(sorted_reference)).any(axis=0).sum())} of {len(reference)} images"
        )
    return dataclasses.replace(model, reference=jnp.asarray(sorted_reference))


@functools.partial(jax.jit, static_argnums=1)
def _principal_directions(x: jax.Array, num_components: int) -> tuple[jax.Array, jax.Array]:
    """Mean `[d]` and first principal directions `[d, r]` of rows `[n, d]`, by the Gram matrix."""
    mean = x.mean(axis=0)
    centred = x - mean
    gram = jnp.dot(centred, centred.T, precision=lax.Precision.HIGHEST)
    _, vectors = jnp.linalg.eigh(gram)
    directions = jnp.dot(
        centred.T, vectors[:, ::-1][:, :num_components], precision=lax.Precision.HIGHEST
    )
    # Once more through QR: the Gram matrix squares the condition number, directions of little
    # variance are not orthogonal.
    return mean, jnp.linalg.qr(directions)[0]


_OVERSAMPLING = 20  # directions more than are kept
_PASSES = 4


@jax.jit
def _covariance_times(batch: jax.Array, mean: jax.Array, basis: jax.Array):
    """What a batch adds to C Q and to Q^T C Q, C the scatter matrix of the rows."""
    centred = batch.reshape(batch.shape[0], -1) - mean
    inside = jnp.dot(centred, basis, precision=lax.Precision.HIGHEST)
    return (
        jnp.dot(centred.T, inside, precision=lax.Precision.HIGHEST),
        jnp.dot(inside.T, inside, precision=lax.Precision.HIGHEST),
    )


def _streamed_directions(
    rows: FeatureRows, num_components: int, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    """`_principal_directions` of rows that lie on disk, by subspace iteration.

    Every pass reads the rows once and multiplies a random basis, somewhat larger than what is kept,
    by the scatter matrix. Where variances at the cut are nearly equal some of what is kept may be
    swapped for what is not; what the span explains hardly changes by that.
    """
    size = math.prod(rows.shape[1:])
    total = np.zeros(size)
    for batch in rows.batches(batch_size):
        total += batch.reshape(len(batch), -1).sum(axis=0, dtype=np.float64)
    mean = jnp.asarray(total / len(rows), jnp.float32)
    width = min(num_components + _OVERSAMPLING, size)
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (size, width), jnp.float32))[0]
    for _ in range(_PASSES):
        product, small = jnp.zeros((size, width)), jnp.zeros((width, width))
        for batch in rows.batches(batch_size):
            more, within = _covariance_times(jnp.asarray(batch), mean, basis)
            product, small = product + more, small + within
        _, vectors = jnp.linalg.eigh(small)
        directions = basis @ vectors[:, ::-1][:, :num_components]
        basis = jnp.linalg.qr(product)[0]
    return mean, jnp.linalg.qr(directions)[0]


def statistics(
    model: OneClass, z: np.ndarray | FeatureRows, images: np.ndarray | None = None
) -> np.ndarray:
    """The statistics, each positive and higher = less likely ours.

    Args:
      model: from `fit`.
      z: z' = z - z_bar, `[n, h, w, c]` floating point, n >= 0.
      images: the images behind `z`, uint8 or float32 in [-1, 1]; needed if the model has a
        classifier.
    Returns:
      `[n, k]` float32: `STATISTICS`, then `odds` of each network in the order of `CLASSIFIERS`; a
      row is NaN if its activation is not finite.
    Raises:
      ValueError: for another shape than in `fit`, or images that are missing or not as many.
    """
    _check("activations", z, model.input_shape)
    found = _activation_statistics(model, z)
    reads_images = any(network.reads == "images" for network in model.classifiers.values())
    shown = z[:0] if images is None else images
    if reads_images and (images is None or len(shown) != len(z)):
        raise ValueError(
            f"the classifiers of this detector need the {len(z)} images behind the activations, "
            f"got {'none' if images is None else len(images)}"
        )
    columns = [found]
    for name in CLASSIFIERS:
        if name in model.classifiers:
            network = model.classifiers[name]
            column = odds(network, shown if network.reads == "images" else z)
            column[np.isnan(found).any(axis=1)] = np.nan
            columns.append(column[:, None])
    return np.concatenate(columns, axis=1)


def odds(network: Classifier | Reconstructor, rows: np.ndarray | FeatureRows) -> np.ndarray:
    """The statistic of a network, `[n]` float32, positive: odds that images only look like ours, or
    of a `reconstruction` its error.

    Args, errors: as for `classifier.logits`, `reconstruction.errors`.
    """
    if isinstance(network, Reconstructor):
        return reconstruction.errors(network, cast(np.ndarray, rows)).astype(np.float32)
    found = classifier.logits(network, rows)
    return np.exp(np.clip(found, -_LARGEST_LOGIT, _LARGEST_LOGIT)).astype(np.float32)


def _activation_statistics(model: OneClass, z: np.ndarray | FeatureRows) -> np.ndarray:
    mesh = parallel.local_mesh(model.config.batch_size)
    fitted = parallel.replicate(dataclasses.replace(model, classifiers={}), mesh)
    rows = [np.zeros((0, 3), np.float32)]
    for batch, count in _batches(z, model.config.batch_size):
        quantiles = _quantiles(batch, model.config.quantiles)
        parts = parallel.shard((batch, quantiles), mesh)
        values = np.asarray(_statistics_batch(fitted, *parts))[:count]
        finite = np.isfinite(batch[:count]).all(axis=(1, 2, 3)) & np.isfinite(values).all(axis=1)
        rows.append(np.where(finite[:, None], values, np.nan))
    return np.concatenate(rows)


class Tails(NamedTuple):
    """Where the statistics' own values thin out, and how fast.

    Beyond the edge log p = log_p - (log s - edge) / hill.

    Attributes:
      edge: `[k]` logarithms of the values where the Pareto tails begin.
      hill: `[k]` Hill's estimates of their index.
      log_p: log tail probability at the edge, the same for all.
    """

    edge: np.ndarray
    hill: np.ndarray
    log_p: float


def tails(reference: np.ndarray | jax.Array) -> Tails:
    """The Pareto tails of statistics, from their values `[k, m]` on the reference, sorted."""
    logs = _logs(np.asarray(reference, np.float64))
    size = logs.shape[1]
    in_tail = max(int(_TAIL * size), _MIN_TAIL)
    edge = logs[:, size - in_tail - 1]
    # Hill's estimator; its floor keeps a reference of equal values from dividing by zero.
    hill = np.maximum(np.mean(logs[:, size - in_tail :] - edge[:, None], axis=1), 1e-6)
    return Tails(edge, hill, float(np.log((1 + in_tail) / (size + 1))))


def _logs(values: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(values, np.finfo(np.float32).tiny))


def _log_tail_probability(reference: np.ndarray, values: np.ndarray) -> np.ndarray:
    """log p of `values` `[n]` under the sorted `reference` `[m]`: empirical, Pareto in the tail."""
    at_least = reference.size - np.searchsorted(reference, values, side="left")
    empirical = np.log((1 + at_least) / (reference.size + 1))
    tail = tails(reference[None])
    logs = _logs(values)
    beyond = tail.log_p - (logs - tail.edge[0]) / tail.hill[0]
    return np.where(logs > tail.edge[0], beyond, empirical)


def fisher_weights(num_statistics: int) -> np.ndarray:
    """Weights `[k]` of Fisher's sum: 1 for each of `STATISTICS`, more for a network."""
    weights = np.full(num_statistics, _CLASSIFIER_WEIGHT)
    weights[: len(STATISTICS)] = 1.0
    return weights


def fisher_sum(reference: np.ndarray | jax.Array, values: np.ndarray) -> np.ndarray:
    """Fisher's weighted sum of the log tail probabilities.

    Args:
      reference: `[k, m]` sorted statistics of the reference images, see `OneClass`.
      values: `[n, k]` from `statistics`.
    Returns:
      `[n]` float64, higher = less likely ours; NaN where a statistic is not finite.
    """
    reference, values = (
        np.asarray(reference, np.float64),
        np.asarray(values, np.float64),
    )
    weights = fisher_weights(len(reference))
    with np.errstate(invalid="ignore"):
        logs = [
            weight * _log_tail_probability(sorted_values, column)
            for weight, sorted_values, column in zip(weights, reference, values.T, strict=True)
        ]
    total = -2 * np.sum(logs, axis=0)
    return np.where(np.isfinite(values).all(axis=1), total, np.nan)


def score(model: OneClass, z: np.ndarray, images: np.ndarray | None = None) -> np.ndarray:
    """`fisher_sum` of the statistics: higher = less likely ours.

    Args, errors: as for `statistics`.
    Returns:
      `[n]` float64; NaN for an activation that is not finite.
    """
    return fisher_sum(model.reference, statistics(model, z, images))
