"""What a detector looks at: pixels, DCT coefficients or inverted activations, made comparable.

The three detectors of the FLIPAD paper are one network on three features ([P1] E.4):

====== ============ ===================================================================
RawPAD pixels       the image, made smaller
DCTPAD dct          log(abs(DCT-II) + 1e-10) of each channel of the image made smaller
FLIPAD activations  the activation before the last layer (`invert`), made smaller
====== ============ ===================================================================

`fit` learns from training samples what `prepare` needs, in one pass over batches; `prepare` is pure
and can be jitted, its input is raw (images in [-1, 1] or activations), its output goes into a
detector.

Conventions. The text of the paper says nearest down-sampling for all three; the published code
max-pools activations and crops before the DCT. The paper mentions no standardisation; the published
code divides activations and DCT features (not pixels) by their standard deviation, activations with
statistics of own samples, DCT with those of own and real samples together. Standardisation is part
of both conventions here, because an activation without it has no common scale; "paper" takes own
samples only.

Deviations from the published code, in both conventions: a side that is not longer than `size` is
left as it is, nothing is ever enlarged; channels are chosen when asked for only.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from flipad_jax import conventions

__all__ = [
    "FeatureConfig",
    "FittedFeatures",
    "Moments",
    "center_crop",
    "dct",
    "downsample_nearest",
    "extract",
    "fit",
    "log_dct",
    "max_pool",
    "moments",
    "merge_moments",
    "prepare",
    "preset",
    "select_channels",
    "standard_deviation",
    "standardize",
]

KINDS = ("pixels", "dct", "activations")
RESIZES = ("nearest", "max_pool", "center_crop")
STANDARDIZATIONS = ("none", "own", "all")

_LOG_OFFSET = 1e-10  # [P1] E.4
_STD_OFFSET = 0.05  # published code; keeps elements that hardly vary from being blown up


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """Which features, of which size.

    Attributes:
      kind: "pixels" or "dct" (input: images in [-1, 1]) or "activations" (input: activations).
      resize: how sides longer than `size` are shortened: "nearest", "max_pool" or "center_crop".
      size: longest side of the features; None leaves the input as it is.
      standardize: statistics of which training samples standardise: "own", "all" (own and real),
        "none".
      num_channels: keep the channels that differ most between own and real; None keeps all, in
        order.
    """

    kind: str
    resize: str = "nearest"
    size: int | None = 32
    standardize: str = "own"
    num_channels: int | None = None

    def __post_init__(self):
        for name, options in (
            ("kind", KINDS),
            ("resize", RESIZES),
            ("standardize", STANDARDIZATIONS),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {options}.")
        for name in ("size", "num_channels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected a positive number, or None.")


def preset(kind: str, convention: str = "paper") -> FeatureConfig:
    """Features of RawPAD ("pixels"), DCTPAD ("dct") or FLIPAD ("activations").

    Args:
      kind: as in `FeatureConfig`.
      convention: "paper" (the text) or "reference" (the published code), see the module docstring.

    Raises:
      ValueError: for an unknown kind or convention.
    """
    conventions.check(convention)
    standardize_by = "none" if kind == "pixels" else "own"
    if convention == "paper":
        return FeatureConfig(kind=kind, standardize=standardize_by)
    if kind == "dct":
        return FeatureConfig(kind=kind, resize="center_crop", standardize="all")
    resize = "max_pool" if kind == "activations" else "nearest"
    return FeatureConfig(kind=kind, resize=resize, standardize=standardize_by)


# ---------------------------------------------------------------------------------------------
# Fixed transforms, [n, h, w, c] -> [n, h', w', c']


def _nearest_index(length: int, size: int) -> np.ndarray:
    ratio = np.float32(length) / np.float32(size)
    index = np.floor(np.arange(size, dtype=np.float32) * ratio).astype(np.int32)
    return np.minimum(index, length - 1)


def downsample_nearest(x: jax.Array, size: int) -> jax.Array:
    """Shorten sides longer than `size` by nearest-neighbour sampling.

    Output i comes from input floor(i * in / size), as PyTorch's `interpolate(mode="nearest")` has
    it: the ratio is rounded to float32 first, which matters for a few sizes.

    Args:
      x: `[n, h, w, c]`.
      size: longest side of the result.

    Returns:
      `[n, min(h, size), min(w, size), c]`.
    """
    for axis in (1, 2):
        length = x.shape[axis]
        if length > size:
            x = jnp.take(x, _nearest_index(length, size), axis=axis)
    return x


def max_pool(x: jax.Array, size: int) -> jax.Array:
    """Shorten sides longer than `size` by the maximum over windows that do not overlap.

    Args:
      x: `[n, h, w, c]`.
      size: longest side of the result.

    Returns:
      `[n, min(h, size), min(w, size), c]`.

    Raises:
      ValueError: if a longer side is not a multiple of `size`.
    """
    n, h, w, c = x.shape
    rows, columns = min(h, size), min(w, size)
    if h % rows or w % columns:
        raise ValueError(
            f"max_pool: sides {h}x{w} are not multiples of size={size}; choose another size, or "
            "resize "
            f'="nearest" or "center_crop".'
        )
    return x.reshape(n, rows, h // rows, columns, w // columns, c).max(axis=(2, 4))


def center_crop(x: jax.Array, size: int) -> jax.Array:
    """Keep the middle of sides longer than `size` (an odd rest is split as torchvision does).

    Args:
      x: `[n, h, w, c]`.
      size: longest side of the result.

    Returns:
      `[n, min(h, size), min(w, size), c]`.
    """
    for axis in (1, 2):
        length = x.shape[axis]
        if length > size:
            start = round((length - size) / 2)
            x = lax.slice_in_dim(x, start, start + size, axis=axis)
    return x


def _dct_matrix(length: int) -> np.ndarray:
    """`[length, length]` float64: row k is 2 cos(pi k (2 j + 1) / (2 length))."""
    k, j = np.mgrid[:length, :length]
    # The angle is reduced in integers: cos of a large rounded argument loses digits.
    return 2 * np.cos(np.pi * ((k * (2 * j + 1)) % (4 * length)) / (2 * length))


def dct(x: jax.Array) -> jax.Array:
    """Two-dimensional DCT-II of each channel, un-normalised: SciPy's `dctn(x, type=2, norm=None)`.

    Two products with cosine matrices: for the sides that features have they are quicker than an
    FFT, and they are the same on every accelerator.

    Args:
      x: `[n, h, w, c]` floating point.

    Returns:
      `[n, h, w, c]` of the same dtype; [:, 0, 0] is 4 times the sum over the channel.
    """
    rows = jnp.asarray(_dct_matrix(x.shape[1]), x.dtype)
    columns = jnp.asarray(_dct_matrix(x.shape[2]), x.dtype)
    return jnp.einsum("ki,lj,nijc->nklc", rows, columns, x, precision=lax.Precision.HIGHEST)


def log_dct(x: jax.Array) -> jax.Array:
    """DCT features log(abs(dct(x)) + 1e-10), [P1] E.4; the absolute value is not in the text.

    A coefficient that is zero in exact arithmetic (any but the first of a constant channel) is
    rounding noise before the logarithm and therefore noise of order ten after it, here as in the
    published code.

    Args:
      x: images `[n, h, w, c]` in [-1, 1].

    Returns:
      `[n, h, w, c]` of the same dtype.
    """
    return jnp.log(jnp.abs(dct(x)) + _LOG_OFFSET)


_RESIZE = {"nearest": downsample_nearest, "max_pool": max_pool, "center_crop": center_crop}


def extract(config: FeatureConfig, x: jax.Array) -> jax.Array:
    """The part of `prepare` that needs nothing fitted: resize, then the DCT if asked for.

    Args:
      config: which features.
      x: `[n, h, w, c]` floating point: images in [-1, 1], or activations.

    Returns:
      `[n, h', w', c]` of the same dtype.

    Raises:
      ValueError: if x is not a floating-point batch, or its sides do not fit the resizing.
    """
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"features: got {x.dtype}{list(x.shape)}, expected floating point [n, h, w, c]; bring "
            f"8-bit images to [-1, 1] first."
        )
    if config.size is not None:
        x = _RESIZE[config.resize](x, config.size)
    return log_dct(x) if config.kind == "dct" else x


# ---------------------------------------------------------------------------------------------
# Statistics over a stream


class Moments(NamedTuple):
    """Mean and spread of the samples seen so far, per element."""

    num_samples: jax.Array  # [], dtype of the features
    mean: jax.Array  # [h, w, c]
    sum_squares: jax.Array  # [h, w, c] sum of squared deviations from the mean


def moments(x: jax.Array) -> Moments:
    """Moments of one batch `[n, ...]`, two-pass."""
    mean = x.mean(axis=0)
    return Moments(
        num_samples=jnp.asarray(x.shape[0], x.dtype),
        mean=mean,
        sum_squares=jnp.square(x - mean[None]).sum(axis=0),
    )


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the union (Chan, Golub, LeVeque 1979): no difference of large squares."""
    num_samples = a.num_samples + b.num_samples
    weight = b.num_samples / num_samples
    delta = b.mean - a.mean
    return Moments(
        num_samples=num_samples,
        mean=a.mean + delta * weight,
        sum_squares=a.sum_squares + b.sum_squares + jnp.square(delta) * (a.num_samples * weight),
    )


def standard_deviation(m: Moments) -> jax.Array:
    """Per-element standard deviation with ddof=1, `[h, w, c]`."""
    return jnp.sqrt(m.sum_squares / (m.num_samples - 1))


def standardize(x: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """(x - mean) / (std + 0.05) per element; x `[n, h, w, c]`, mean and std `[h, w, c]`."""
    return (x - mean[None]) / (std[None] + _STD_OFFSET)


def select_channels(own_mean: jax.Array, real_mean: jax.Array, num_channels: int) -> jax.Array:
    """The channels that differ most on average between own and real samples ([P1] E.4).

    Args:
      own_mean: `[h, w, c]` mean (standardised) feature of own samples.
      real_mean: `[h, w, c]` the same of real samples.
      num_channels: how many to keep.

    Returns:
      `[num_channels]` int32 indices, the most different channel first.

    Raises:
      ValueError: if there are fewer channels than asked for.
    """
    if num_channels > own_mean.shape[-1]:
        raise ValueError(
            f"num_channels={num_channels}: the features have {own_mean.shape[-1]} channels only."
        )
    difference = jnp.abs(own_mean - real_mean).mean(axis=(0, 1))
    return lax.top_k(difference, num_channels)[1].astype(jnp.int32)


# ---------------------------------------------------------------------------------------------
# Fitted features


@struct.dataclass
class FittedFeatures:
    """What `prepare` needs; a pytree whose leaves are arrays (or None where nothing was fitted).

    Attributes:
      mean, std: `[h', w', k]` statistics of the kept channels.
      channels: `[k]` int32 kept channels, most different first.
      config: which features (static).
      input_shape: (h, w, c) of a raw sample (static); `prepare` refuses any other.
    """

    mean: jax.Array | None
    std: jax.Array | None
    channels: jax.Array | None
    config: FeatureConfig = struct.field(pytree_node=False)
    input_shape: tuple[int, ...] = struct.field(pytree_node=False)


def _merge_batch(total: Moments | None, x: jax.Array, config: FeatureConfig) -> Moments:
    features = extract(config, x)
    batch = moments(features.astype(jnp.promote_types(features.dtype, jnp.float32)))
    return batch if total is None else merge_moments(total, batch)


_merge_batch_jit = jax.jit(_merge_batch, static_argnames="config")


def _stream_moments(
    config: FeatureConfig,
    batches: Iterable[jax.Array | np.ndarray],
    name: str,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[Moments, tuple[int, ...]]:
    total = None
    for x in batches:
        input_shape = input_shape or tuple(x.shape[1:])
        _check_shape(x, input_shape)
        total = _merge_batch_jit(total, jnp.asarray(x), config)
    if total is None or input_shape is None or total.num_samples < 2:
        raise ValueError(f"features: got fewer than two {name} samples, expected a training set.")
    if not jnp.isfinite(total.mean).all():
        raise ValueError(f"features: NaN or infinity in the {name} samples; leave these out.")
    return total, input_shape


def _check_shape(x: jax.Array | np.ndarray, input_shape: tuple[int, ...]) -> None:
    if x.shape[1:] != input_shape or x.shape[0] == 0:
        raise ValueError(
            f"features: got a batch {list(x.shape)}, expected samples of shape "
            f"{list(input_shape)}, as in the first training batch."
        )


def fit(
    config: FeatureConfig,
    own: Iterable[jax.Array | np.ndarray],
    real: Iterable[jax.Array | np.ndarray] | None = None,
) -> FittedFeatures:
    """Learn standardisation and channel choice from training samples.

    Memory does not grow with the number of samples: batches are read once, one at a time.

    Args:
      config: which features.
      own: batches `[n, h, w, c]` of own training samples (a whole set is `[x]`), as `prepare` takes
        them.
      real: the same of real samples; read only where `standardize="all"` or `num_channels` needs
        them.

    Returns:
      The fitted features.

    Raises:
      ValueError: if real samples are needed and missing, samples differ in shape or are not
        finite, or there are fewer than two.
    """
    needs_real = config.standardize == "all" or config.num_channels is not None
    if needs_real and real is None:
        raise ValueError(
            f"features: standardize={config.standardize!r}, num_channels={config.num_channels} "
            "compare own with real samples, and real is None."
        )
    own_moments, input_shape = _stream_moments(config, own, "own")
    chosen = own_moments
    if real is not None and needs_real:
        real_moments, _ = _stream_moments(config, real, "real", input_shape)
        if config.standardize == "all":
            chosen = merge_moments(own_moments, real_moments)
    mean, std, channels = chosen.mean, standard_deviation(chosen), None
    if config.num_channels is not None:
        # Standardisation is affine, so the mean of standardised features needs no second pass.
        means = jnp.stack([own_moments.mean, real_moments.mean])
        if config.standardize != "none":
            means = standardize(means, mean, std)
        channels = select_channels(means[0], means[1], config.num_channels)
        mean, std = mean[..., channels], std[..., channels]
    if config.standardize == "none":
        return FittedFeatures(None, None, channels, config=config, input_shape=input_shape)
    return FittedFeatures(mean, std, channels, config=config, input_shape=input_shape)


def prepare(fitted: FittedFeatures, x: jax.Array) -> jax.Array:
    """Raw samples to what the detector sees. Pure: `jax.jit(prepare)` works, `fitted` is a pytree.

    Args:
      fitted: from `fit`.
      x: `[n, h, w, c]` floating point: images in [-1, 1], or activations.

    Returns:
      `[n, h', w', k]` of the dtype of x.

    Raises:
      ValueError: if the samples do not have the shape of those in `fit`.
    """
    _check_shape(x, fitted.input_shape)
    features = extract(fitted.config, x)
    if fitted.channels is not None:
        features = jnp.take(features, fitted.channels, axis=-1)
    if fitted.mean is None or fitted.std is None:
        return features
    return standardize(features, fitted.mean, fitted.std).astype(x.dtype)
