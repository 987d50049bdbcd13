"""Distances between images: by pixels, by structure, by a network's features.

*   "l2": mean squared difference of the pixels.
*   "inception": mean squared difference of Inception-V3's features at "Mixed_5d" (`inception`),
    whose weights the user brings. The distance of SM-Inv_inc ([P1] appendix D; Zhang et al. 2021).
*   "ms_ssim": one minus the structural similarity, averaged over scales. It needs no weights, looks
    at local contrast and structure instead of grey levels, and **is not Inception**: numbers made
    with it are not comparable with the paper's SM-Inv_inc.

[P1] says nothing of how images enter Inception-V3; here they do as in its published code: in
[-1, 1], minus ImageNet's mean, divided by ImageNet's standard deviation, not resized to 299 pixels.
(ImageNet's numbers are meant for images in [0, 1], and the network was trained on [-1, 1].) A grey
image enters as three equal channels.

"ms_ssim" at each scale is the index of Wang et al. (IEEE Trans. Image Processing 13, 2004):
Gaussian window of 11 pixels and standard deviation 1.5, K = (0.01, 0.03), only places where the
window is inside the image, mean over places and channels. It takes images in [0, 1]: being a
product of means and covariance, it would find a picture in [-1, 1] similar to its negative. The
next scale is the mean of 2 x 2 pixels, and there are as many scales as the window fits in, at most
five: two at 32 x 32, three at 64 x 64. Wang et al. (Asilomar 2003) take a product over scales, of
powers; the mean is used here because structure may be anti-correlated, as it is at a search's
random start. The product must then be clipped to zero and has no gradient.

A distance is used in two parts, because a search compares thousands of images with the same ones:
`prepare` looks at those once, `between` compares others with what it kept.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from flipad_jax import inception
from flipad_jax.inception import Inception

__all__ = ["NAMES", "Distance", "between", "distance", "prepare", "structural_similarity"]

NAMES = ("l2", "ms_ssim", "inception")

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

_WINDOW = 11
_SIGMA = 1.5
_MAX_SCALES = 5
_C1, _C2 = 0.01**2, 0.03**2


@struct.dataclass
class Distance:
    """A distance by name; a pytree, so that jitted functions take it as an argument.

    Attributes:
      name: one of `NAMES` (static).
      network: of "inception", else None.
    """

    name: str = struct.field(pytree_node=False)
    network: Inception | None = None


def distance(name: str, network: Inception | None = None) -> Distance:
    """The distance of that name.

    Args:
      name: one of `NAMES`.
      network: from `inception.load`; for "inception" and for nothing else.
    Raises:
      ValueError: for an unknown name, or a network that is missing or of no use.
    """
    if name not in NAMES:
        raise ValueError(f"distance {name!r} is unknown; there are {', '.join(NAMES)}")
    if name == "inception" and network is None:
        raise ValueError(
            "distance 'inception' needs network=inception.load(FILE) with weights of Inception-V3, "
            "which are not shipped; 'ms_ssim' needs none"
        )
    if name != "inception" and network is not None:
        raise ValueError(f"distance {name!r} takes no network; did you mean 'inception'?")
    return Distance(name, network)


def prepare(distance: Distance, images: jax.Array) -> jax.Array:
    """What `between` needs of the images that others are compared with.

    Args:
      distance: from `distance`.
      images: `[n, h, w, c]` float in [-1, 1].
    Returns:
      `[n, ...]`.
    Raises:
      ValueError: while tracing, for images that are too small for the distance, or that are neither
        grey nor RGB where it needs such.
    """
    if distance.name == "inception":
        return _inception_features(distance, images)
    if distance.name == "ms_ssim":
        _check_window(images)
    return images


def between(distance: Distance, reference: jax.Array, images: jax.Array) -> jax.Array:
    """Distances of images to those that `prepare` saw, pair by pair; pure and differentiable.

    Args:
      distance: from `distance`.
      reference: from `prepare`, of n images.
      images: `[n, h, w, c]` float in [-1, 1], of the same size.
    Returns:
      `[n]`, 0 between equal images and otherwise positive, up to rounding; "ms_ssim" at most 2.
    """
    if distance.name == "ms_ssim":
        return 1 - structural_similarity(reference, images).mean(axis=1)
    if distance.name == "inception":
        images = _inception_features(distance, images)
    return jnp.mean(jnp.square(images - reference), axis=tuple(range(1, images.ndim)))


def structural_similarity(x: jax.Array, y: jax.Array) -> jax.Array:
    """Structural similarity at every scale, finest first.

    Args:
      x: `[n, h, w, c]` float in [-1, 1], h and w at least 11.
      y: the same shape.
    Returns:
      `[n, scales]`, each in [-1, 1], 1 for equal images.
    Raises:
      ValueError: while tracing, if the window does not fit.
    """
    _check_window(x)
    x, y = (x + 1) / 2, (y + 1) / 2
    scales: list[jax.Array] = []
    while min(x.shape[1:3]) >= _WINDOW and len(scales) < _MAX_SCALES:
        scales.append(_similarity(x, y))
        x, y = _halve(x), _halve(y)
    return jnp.stack(scales, axis=1)


def _check_window(images: jax.Array) -> None:
    if images.ndim != 4 or min(images.shape[1:3]) < _WINDOW:
        raise ValueError(
            f"distance 'ms_ssim' got images {list(images.shape)}, expected [n, h, w, c] with h, w "
            f">= {_WINDOW}, the size of its window; take 'l2' for smaller ones"
        )


def _similarity(x: jax.Array, y: jax.Array) -> jax.Array:
    mean_x, mean_y = _windowed(x), _windowed(y)
    variances = _windowed(x * x) - mean_x**2 + _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    index = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    index /= (mean_x**2 + mean_y**2 + _C1) * (variances + _C2)
    return index.mean(axis=(1, 2, 3))


def _windowed(x: jax.Array) -> jax.Array:
    """Gaussian mean of every window inside the image, as two matrix products."""
    rows, columns = (jnp.asarray(_window_matrix(size), x.dtype) for size in x.shape[1:3])
    # E[x^2] - E[x]^2 cancels, so a product in reduced precision would show.
    return jnp.einsum("ih,jw,nhwc->nijc", rows, columns, x, precision=lax.Precision.HIGHEST)


def _window_matrix(size: int) -> np.ndarray:
    """`[size - 10, size]`: row i is the window at i."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    matrix = np.zeros((size - _WINDOW + 1, size))
    for i, row in enumerate(matrix):
        row[i : i + _WINDOW] = weights / weights.sum()
    return matrix


def _halve(x: jax.Array) -> jax.Array:
    """Means of 2 x 2 pixels, an odd last row or column left out."""
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def _inception_features(distance: Distance, images: jax.Array) -> jax.Array:
    assert distance.network is not None  # `distance` sees to it.
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"distance 'inception' got images {list(images.shape)}, expected grey or RGB ones, "
            "[n, h, w, 1] or [n, h, w, 3]"
        )
    rgb = jnp.broadcast_to(images, (*images.shape[:3], 3))
    mean = jnp.asarray(_IMAGENET_MEAN, rgb.dtype)[None, None, None]
    std = jnp.asarray(_IMAGENET_STD, rgb.dtype)[None, None, None]
    return inception.features(distance.network, (rgb - mean) / std, layer="Mixed_5d")
