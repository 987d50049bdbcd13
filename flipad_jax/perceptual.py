"""Distances between images: by pixels, for now.

A distance is used in two parts, because a search compares thousands of images with the same ones:
`prepare` looks at those once, `between` compares others with what it kept.
"""

import jax
import jax.numpy as jnp
from flax import struct

__all__ = ["NAMES", "Distance", "between", "distance", "prepare"]

NAMES = ("l2",)


@struct.dataclass
class Distance:
    """A distance by name; a pytree, so that jitted functions take it as an argument.

    Attributes:
      name: one of `NAMES` (static).
    """

    name: str = struct.field(pytree_node=False)


def distance(name: str) -> Distance:
    """The distance of that name.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"distance {name!r} is unknown; there are {', '.join(NAMES)}")
    return Distance(name)


def prepare(distance: Distance, images: jax.Array) -> jax.Array:
    """What `between` needs of the images `[n, h, w, c]` that others are compared with."""
    return images


def between(distance: Distance, reference: jax.Array, images: jax.Array) -> jax.Array:
    """Distances `[n]` of images `[n, h, w, c]` to those that `prepare` saw, pair by pair."""
    return jnp.mean(jnp.square(images - reference), axis=tuple(range(1, images.ndim)))
