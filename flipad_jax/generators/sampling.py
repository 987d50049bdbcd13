"""What attribution needs of a trained generator: images, activations, the last layer.

Batch normalisation is always in evaluation mode (the papers' code samples with batch statistics):
an image depends on its own latent only, so the model is one function and can be inverted. Latent i
is drawn from `jax.random.fold_in(rng, i)`: image i is the same whatever the batch size and however
many images are asked for.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from flipad_jax.generators import layers
from flipad_jax.generators.training import Gan, GanState
from flipad_jax.inversion import linops
from flipad_jax.inversion.final_layer import FinalLayer
from flipad_jax.inversion.final_layer import mean_activation as _mean_activation

__all__ = [
    "TrainedGenerator",
    "activations",
    "final_layer",
    "from_state",
    "generate",
    "latents",
    "mean_activation",
]


@struct.dataclass
class TrainedGenerator:
    """A generator and its weights; a pytree whose leaves are the weights.

    Attributes:
      variables: Flax variables, `params` and `batch_stats`.
      module: latents `[n, latent_dim]` -> images `[n, h, w, c]` in (-1, 1); has a method
        `activation`.
      image_shape: `(h, w, c)`.
      latent_dim: dimension of the standard normal latent.
    """

    variables: Any
    module: nn.Module = struct.field(pytree_node=False)
    image_shape: tuple[int, int, int] = struct.field(pytree_node=False)
    latent_dim: int = struct.field(pytree_node=False)


def from_state(gan: Gan, state: GanState) -> TrainedGenerator:
    """The generator of one trained seed (`training.take_seed` picks it from many)."""
    return TrainedGenerator(state.generator, gan.generator, gan.image_shape, gan.latent_dim)


def latents(rng: jax.Array, indices: jax.Array, latent_dim: int) -> jax.Array:
    """Standard normal latents `[n, latent_dim]` float32, each from its index `[n]` alone."""
    return jax.vmap(
        lambda i: jax.random.normal(jax.random.fold_in(rng, i), (latent_dim,), jnp.float32)
    )(indices)


def activations(generator: TrainedGenerator, z: jax.Array) -> jax.Array:
    """Activations before the last layer, `[n, h', w', c']`, of latents `[n, latent_dim]`."""
    return cast(jax.Array, generator.module.apply(generator.variables, z, method="activation"))


@functools.partial(jax.jit, static_argnames="batch_size")
def _generate_batch(generator, rng, first, batch_size):
    z = latents(rng, first + jnp.arange(batch_size, dtype=jnp.int32), generator.latent_dim)
    images = cast(jax.Array, generator.module.apply(generator.variables, z))
    # Rounded to the nearest grey level, as data.to_uint8 does on the host.
    return jnp.round((images + 1) * 127.5).astype(jnp.uint8)


def generate(
    generator: TrainedGenerator,
    rng: jax.Array,
    num_images: int,
    *,
    first: int = 0,
    batch_size: int = 250,
) -> np.ndarray:
    """Images number `first` to `first + num_images - 1` of the stream that `rng` names.

    Args:
      generator: the model.
      rng: names the stream.
      num_images: how many.
      first: number of the first one; disjoint ranges are independent images.
      batch_size: images at once, for memory and speed only.
    Returns:
      `[num_images, h, w, c]` uint8, on the host, rounded to the nearest grey level.
    Raises:
      ValueError: if a number is negative.
    """
    if num_images < 0 or first < 0 or batch_size < 1:
        raise ValueError(
            f"{num_images=}, {first=} must not be negative and {batch_size=} must be positive"
        )
    images = np.empty((num_images, *generator.image_shape), np.uint8)
    for start in range(0, num_images, batch_size):
        batch = np.asarray(_generate_batch(generator, rng, jnp.int32(first + start), batch_size))
        images[start : start + batch_size] = batch[: num_images - start]
    return images


def final_layer(generator: TrainedGenerator) -> FinalLayer:
    """The last layer: transposed convolution, or convolution of stride 1, its bias if there is one,
    and tanh."""
    last = generator.module.bind(generator.variables).last
    params = generator.variables["params"]["last"]
    kernel = jnp.asarray(params["kernel"])
    height, width, _ = generator.image_shape
    operator: linops.LinearOperator
    if isinstance(last, layers.ConvTranspose):
        shape = (height // last.stride, width // last.stride, kernel.shape[2])
        operator = linops.conv_transpose(kernel, shape, strides=last.stride, padding=last.padding)
    else:
        shape = (height, width, kernel.shape[2])
        operator = linops.conv(kernel, shape, strides=last.stride, padding=last.padding)
    bias = jnp.asarray(params["bias"]) if "bias" in params else None
    return FinalLayer(operator=operator, bias=bias, activation="tanh")


def mean_activation(
    generator: TrainedGenerator, rng: jax.Array, num_samples: int = 5000
) -> jax.Array:
    """z_bar, `[h', w', c']` float32: Monte Carlo mean over latents ([P1] section 4.2)."""
    return _mean_activation(
        functools.partial(activations, generator),
        rng,
        latent_shape=generator.latent_dim,
        num_samples=num_samples,
        sample_latents=functools.partial(jax.random.normal, dtype=jnp.float32),
    )
