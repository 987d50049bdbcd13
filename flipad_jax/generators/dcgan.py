"""DCGAN: generator, discriminator, losses ([P1] E.1; Radford et al. 2015).

At 64 x 64 with the default widths this is the paper's architecture: transposed convolutions
100-512-256-128-64-3, kernel 4, stride 2, padding 1 (the first: stride 1, padding 0, as the
published code has it), batch normalisation and ReLU in between, no bias, tanh at the end; the
mirrored discriminator with leaky ReLU 0.2. Other sizes (8, 16, 32, 128, ...) have one stage less or
more.

Recipe: binary cross entropy with soft labels 0.9 (real) and 0.1 (fake), generator's target 0.9,
Adam 2e-4 with betas (0.5, 0.999), weights N(0, 0.02), batch normalisation scales N(1, 0.02), one
generator step per discriminator step. The discriminator sees real and generated images as two
batches, each normalised by its own statistics.
"""

from typing import Callable, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from flipad_jax.generators import layers
from flipad_jax.generators.training import Gan

__all__ = ["Discriminator", "Generator", "dcgan", "default_features"]

REAL_LABEL = 0.9
FAKE_LABEL = 0.1
LEARNING_RATE = 2e-4  # of every recipe in [P1] E.1


def default_features(image_size: int) -> tuple[int, ...]:
    """Widths of the generator's hidden stages from 4 x 4 upwards: (512, 256, 128, 64) at 64, (256,
    128, 64) at 32.

    Raises:
      ValueError: if `image_size` is not 4 times a power of two, at least 8.
    """
    stages = (image_size // 4).bit_length() - 1
    if image_size < 8 or image_size != 4 * 2**stages:
        raise ValueError(
            f"a DCGAN makes images of 8, 16, 32, 64, ... pixels a side, not {image_size}"
        )
    return tuple(64 * 2**i for i in reversed(range(stages)))


class Generator(nn.Module):
    """Latents `[n, latent_dim]` -> images `[n, size, size, channels]` in (-1, 1).

    `activation` stops before the last layer: z in the papers, `[n, size / 2, size / 2,
    features[-1]]`, non-negative.
    """

    channels: int
    features: tuple[int, ...]
    kernel_init: Callable[..., jax.Array] = layers.normal_init
    scale_init: Callable[..., jax.Array] = layers.scale_init

    def setup(self):
        first = layers.ConvTranspose(
            self.features[0], stride=1, padding=0, kernel_init=self.kernel_init
        )
        rest = [layers.ConvTranspose(f, kernel_init=self.kernel_init) for f in self.features[1:]]
        self.convolutions = [first, *rest]
        self.norms = [layers.BatchNorm(self.scale_init) for _ in self.features]
        self.last = layers.ConvTranspose(self.channels, kernel_init=self.kernel_init)

    def activation(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
        x = latents[:, None, None, :]
        for convolution, norm in zip(self.convolutions, self.norms):
            x = nn.relu(norm(convolution(x), train=train))
        return x

    def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
        return jnp.tanh(self.last(self.activation(latents, train=train)))


class Discriminator(nn.Module):
    """Images `[n, size, size, channels]` -> logits `[n]`; hidden widths from the image inwards."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for i, width in enumerate(self.features):
            x = layers.Conv(width)(x)
            if i > 0:
                x = layers.BatchNorm(layers.scale_init)(x, train=True)
            x = nn.leaky_relu(x, 0.2)
        return layers.Conv(1, stride=1, padding=0)(x)[:, 0, 0, 0]


def _cross_entropy(logits: jax.Array, label: float) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(logits, jnp.full_like(logits, label)).mean()


def _discriminator_loss(discriminate, real, fake, rng):
    del rng
    return _cross_entropy(discriminate(real), REAL_LABEL) + _cross_entropy(
        discriminate(fake), FAKE_LABEL
    )


def _generator_loss(discriminate, fake, rng):
    del rng
    return _cross_entropy(discriminate(fake), REAL_LABEL)


def dcgan(
    image_shape: tuple[int, int, int],
    *,
    latent_dim: int = 100,
    features: tuple[int, ...] | None = None,
    discriminator_features: tuple[int, ...] | None = None,
) -> Gan:
    """The DCGAN of [P1] E.1 for images of `image_shape` (h = w, a power of two from 8).

    Args:
      image_shape: `(h, w, c)`.
      latent_dim: dimension of the standard normal latent.
      features: generator widths from 4 x 4 upwards, one per doubling; the paper's by default.
      discriminator_features: from the image inwards; the generator's reversed by default.
    Raises:
      ValueError: if the image is not square, of a size no DCGAN has, or the number of widths does
        not fit it.
    """
    return Gan(
        family="dcgan",
        generator=Generator(image_shape[-1], check_features(image_shape, features)),
        discriminator=Discriminator(
            check_features(image_shape, discriminator_features, inwards=True)
        ),
        discriminator_loss=_discriminator_loss,
        generator_loss=_generator_loss,
        optimizer=optax.adam(LEARNING_RATE, b1=0.5, b2=0.999),
        discriminator_steps=1,
        image_shape=cast(tuple[int, int, int], tuple(image_shape)),
        latent_dim=latent_dim,
        learning_rate=LEARNING_RATE,
    )


def check_features(
    image_shape: tuple[int, int, int], features: tuple[int, ...] | None, *, inwards: bool = False
) -> tuple[int, ...]:
    """`features`, or the paper's, checked against the image; `inwards` for a discriminator."""
    if len(image_shape) != 3 or image_shape[0] != image_shape[1]:
        raise ValueError(f"image_shape must be (h, w, c) with h = w, got {tuple(image_shape)}")
    default = default_features(image_shape[0])
    if features is None:
        return default[::-1] if inwards else default
    if len(features) != len(default):
        raise ValueError(
            f"images of {image_shape[0]} pixels need {len(default)} widths, got {tuple(features)}"
        )
    return tuple(features)
