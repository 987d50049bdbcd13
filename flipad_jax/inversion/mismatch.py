"""Whether a layer and a mean activation are those that made some images.

A wrong one inverts every image all the same, into activations that mean nothing. The mean of the
images tells.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from flipad_jax.inversion import final_layer, linops
from flipad_jax.inversion.final_layer import FinalLayer

__all__ = ["MISMATCH_BOUND", "mean_mismatch", "warning"]

# `mean_mismatch`, measured on the zoo's three DCGANs and its WGAN-GP (1000 digits each, 72 % of the
# pixels at level 0) / on a DCGAN of 64 x 64 photographs (64 images, none at 0 or 255):
#   the right layer                              0.12 to 0.16  /  0.06
#     with 60 or 100 images                      0.06 to 0.15  /  0.03
#   kernel flipped in both directions            0.25 to 0.57  /  0.71
#   rows and columns of the kernel exchanged     0.19 to 0.53  /  0.68
#   rows and columns of z_bar exchanged          0.39 to 0.65  /  0.84
#   padding one pixel aside                      0.44 to 0.60  /  0.70
#   sigmoid for tanh                             0.86 to 1.04  /  0.48
#   identity for tanh                            0.19 to 0.20  /  0.00 (low contrast: tanh(a) = a)
#   a bias of 0.3 forgotten                      0.10 to 0.15  /  1.35
#   a bias of 1 forgotten                        0.32 to 0.48  /  4.22
#   kernel or z_bar of another seed              0.73 to 1.11
#   ... of the WGAN-GP that began as this DCGAN  0.20 to 0.44
#   channels of the image reversed                     -       /  0.87
#   another picture added, half as strong        0.11 to 0.46  /  0.46
#   another picture added, as strong             0.19 to 0.48  /  0.68
MISMATCH_BOUND = 0.175

_NUM_IMAGES = 1000
_NUM_PIXELS = 1024


def mean_mismatch(layer: FinalLayer, z_bar: np.ndarray | jax.Array, generated: np.ndarray) -> float:
    """How far the mean of a generator's images is from what layer and mean activation say.

    Before its activation an image is A z + bias, so the mean over images is A z_bar + bias. Levels
    0 and 255 hide by how much a value was beyond them, so pixels are compared as if their values
    were normal around A z_bar + bias, with that spread at which the 256 levels have the spread that
    is observed: what mean level (before the activation) would be expected, and what is there? The
    root mean square of the difference, less what the number of images explains, is taken relative
    to the spread of a pixel; over 1024 pixels and at most 1000 images.

    The right layer has about 0.05 where pixels keep away from 0 and 255, and 0.16 where three
    quarters of them lie there, which is what the normal distribution costs; `MISMATCH_BOUND` and
    the comment beside it say what wrong ones have. A small mismatch proves little: where contrast
    is low the activations all look alike, and dark images hide a small bias or residual.

    Args:
      layer: what is said to be the last layer.
      z_bar: what is said to be its mean activation, `layer.operator.input_shape`.
      generated: own images, `[n, h, w, c]` uint8, n of 2 or more.
    Returns:
      0 for a perfect fit; infinite if the images are all alike and not the mean.
    """
    from scipy.special import ndtr

    generated = np.asarray(generated[:_NUM_IMAGES])
    n = len(generated)
    expected = layer.operator.forward(jnp.asarray(z_bar, layer.operator.dtype))
    if layer.bias is not None:
        expected = expected + layer.bias
    mean = np.asarray(expected, np.float64).reshape(-1)
    picked = np.random.default_rng(0).permutation(mean.size)[:_NUM_PIXELS]
    mean = mean[picked]
    levels = _before_activation(layer.activation, np.arange(256, dtype=np.uint8))
    between = _before_activation(
        layer.activation, ((np.arange(255) + 0.5) / 127.5 - 1).astype(np.float32)
    )
    values = levels[generated.reshape(n, -1)[:, picked]]
    observed, spread = values.mean(axis=0), values.std(axis=0, ddof=1)

    def moments(log_scale):
        below = ndtr((between - mean[:, None]) / np.exp(log_scale)[:, None])
        share = np.diff(below, axis=1, prepend=0.0, append=1.0)
        first = share @ levels
        return first, np.sqrt(np.maximum(share @ levels**2 - first**2, 0))

    # The spread over levels grows with the scale, so the scale is found by bisection.
    low, high = np.full(mean.size, -8.0), np.full(mean.size, 5.0)
    for _ in range(20):
        middle = (low + high) / 2
        too_small = moments(middle)[1] < spread
        low, high = np.where(too_small, middle, low), np.where(too_small, high, middle)
    difference = np.mean((moments(low)[0] - observed) ** 2 - spread**2 / n)
    scale = np.mean(spread**2)
    if scale == 0:
        return math.inf if difference > 0 else 0.0
    return float(np.sqrt(max(difference, 0) / scale))


def warning(layer: FinalLayer, z_bar: np.ndarray | jax.Array, generated: np.ndarray) -> str:
    """What looks wrong, in words; empty where the mismatch is within `MISMATCH_BOUND`."""
    mismatch = mean_mismatch(layer, z_bar, generated)
    if mismatch <= MISMATCH_BOUND:
        return ""
    return (
        f"the layer does not fit the images: their mean is off by {mismatch:.2f} (at most "
        f"{MISMATCH_BOUND} is expected), so weights, layout, strides, padding, bias, activation or "
        "mean activation may not be those that made them, or something is added after the last "
        "layer"
    )


def _before_activation(activation: str, x: np.ndarray) -> np.ndarray:
    """Targets of single values, float64 `[n]`."""
    column = FinalLayer(
        operator=linops.conv(np.ones((1, 1, 1, 1), np.float32), (len(x), 1, 1)),
        activation=activation,
    )
    return np.asarray(final_layer.targets(column, x.reshape(1, -1, 1, 1)), np.float64).reshape(-1)
