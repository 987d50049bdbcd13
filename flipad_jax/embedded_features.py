"""Features of images that need no download: a small classifier that ships with the library.

Frechet distances are measured between features. The papers' are those of Inception-V3
(`inception.py`, with a user's file of weights); these are the last hidden layer of a network that
tells ten digits and seven photographs apart, trained by `--experiment=train_features`. Distances of
the two kinds cannot be compared, so `NAME` stands beside every number that these features gave.
"""

import functools
import hashlib
import importlib.resources
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from flipad_jax import data
from flipad_jax.generators import layers

__all__ = ["NAME", "NUM_CLASSES", "NUM_FEATURES", "Network", "features", "load", "prepare"]

NAME = "embedded classifier of digits and photographs, 64 features (not Inception)"
NUM_CLASSES = 17
NUM_FEATURES = 64
_SIDE = 32
_FILE = "features.safetensors"
_SHA256 = "5445b2643fafbae77dc82dc67241c29688d76549bc0ad31421976bad9e7c6126"


class Network(nn.Module):
    """Images `[n, 32, 32, 3]` in [-1, 1] -> (features `[n, 64]`, logits `[n, 17]`)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for width in (32, 64, 96):
            x = nn.leaky_relu(layers.Conv(width, kernel_init=nn.initializers.he_normal())(x), 0.1)
        hidden = layers.Linear(NUM_FEATURES)(x.reshape(x.shape[0], -1))
        return hidden, layers.Linear(NUM_CLASSES)(nn.relu(hidden))


def _check(images: np.ndarray | jax.Array) -> None:
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images have shape {images.shape}, expected [n, h, w, 1] or [n, h, w, 3]")
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}, expected uint8 or float in [-1, 1]")


def prepare(images: jax.Array) -> jax.Array:
    """Images as the network takes them: RGB, 32 x 32, float32 in [-1, 1].

    Args:
      images: `[n, h, w, 1 or 3]`, uint8 or floating point in [-1, 1]; grey is repeated, other sizes
        are resized bilinearly (with a low-pass filter where they shrink).
    Raises:
      ValueError: for another shape or dtype.
    """
    _check(images)
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 127.5 - 1
    shape = (images.shape[0], _SIDE, _SIDE, images.shape[-1])
    if images.shape != shape:
        images = jax.image.resize(images, shape, "bilinear")
    return jnp.broadcast_to(images, (*shape[:3], 3)).astype(jnp.float32)


@functools.cache
def load() -> Any:
    """The weights, a pytree for `features`.

    Raises:
      ValueError: if the file is not the one that belongs to this version.
    """
    from safetensors.numpy import load as load_arrays

    source = importlib.resources.files("flipad_jax") / "embedded" / _FILE
    content = source.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != _SHA256:
        raise ValueError(
            f"embedded/{_FILE} has SHA-256 {digest}, expected {_SHA256}: reinstall flipad_jax"
        )
    arrays = {name: value.astype(np.float32) for name, value in load_arrays(content).items()}
    return traverse_util.unflatten_dict(arrays, sep="/")


@jax.jit
def _features(params: Any, images: jax.Array) -> jax.Array:
    return cast(jax.Array, Network().apply({"params": params}, prepare(images))[0])


def features(images: np.ndarray | jax.Array, *, batch_size: int = 256) -> np.ndarray:
    """Features of images, for `frechet.statistics`.

    Args:
      images: `[n, h, w, 1 or 3]`, uint8 or floating point in [-1, 1].
      batch_size: images at once, for memory and speed only.
    Returns:
      `[n, 64]` float32.
    Raises:
      ValueError: for another shape or dtype.
    """
    _check(images)
    params = load()
    found = [np.zeros((0, NUM_FEATURES), np.float32)]
    for start in range(0, len(images), batch_size):
        batch = jnp.asarray(images[start : start + batch_size])
        values = _features(params, data.filled(batch, batch_size))
        found.append(np.asarray(values)[: len(batch)])
    return np.concatenate(found)
