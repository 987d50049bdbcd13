"""WGAN-GP: Wasserstein critic with gradient penalty ([P1] E.1; Gulrajani et al. 2017).

The generator is DCGAN's with PyTorch's default initialisation; the critic is DCGAN's discriminator
with layer normalisation over channels, height and width in place of batch normalisation, and no
sigmoid. Five critic steps per generator step, the last of which shares its latents with it,
gradient penalty 10, Adam 2e-4 with betas (0, 0.9).
"""

from typing import cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from flipad_jax.generators import layers
from flipad_jax.generators.dcgan import LEARNING_RATE, Generator, check_features
from flipad_jax.generators.training import Gan

__all__ = ["Critic", "gradient_penalty", "wgan_gp"]

PENALTY = 10.0


class Critic(nn.Module):
    """Images `[n, size, size, channels]` -> scores `[n]`, higher for real."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        init = layers.pytorch_init(fan_in_axis=2)
        x = images
        for i, width in enumerate(self.features):
            x = layers.Conv(width, kernel_init=init)(x)
            if i > 0:
                x = nn.LayerNorm(epsilon=1e-5, reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3))(x)
            x = nn.leaky_relu(x, 0.2)
        return layers.Conv(1, stride=1, padding=0, kernel_init=init)(x)[:, 0, 0, 0]


def gradient_penalty(discriminate, real: jax.Array, fake: jax.Array, rng: jax.Array) -> jax.Array:
    """Mean of (||grad D(mix)||_2 - 1)^2 at one random point of the segment between each real and
    generated image.

    Args:
      discriminate: images `[n, h, w, c]` -> scores `[n]`, each from its own image only (hence layer
        normalisation).
      real, fake: `[n, h, w, c]`.
      rng: draws the points.
    Returns:
      a scalar.
    """
    weight = jax.random.uniform(rng, (real.shape[0], 1, 1, 1), real.dtype)
    mixed = weight * real + (1 - weight) * fake
    gradient = jax.grad(lambda images: discriminate(images).sum())(mixed)
    # The tiny constant keeps the derivative of the root finite where the gradient vanishes.
    norm = jnp.sqrt(jnp.sum(gradient**2, axis=(1, 2, 3)) + 1e-12)
    return jnp.mean((norm - 1) ** 2)


def _discriminator_loss(discriminate, real, fake, rng):
    wasserstein = discriminate(fake).mean() - discriminate(real).mean()
    return wasserstein + PENALTY * gradient_penalty(discriminate, real, fake, rng)


def _generator_loss(discriminate, fake, rng):
    del rng
    return -discriminate(fake).mean()


def wgan_gp(
    image_shape: tuple[int, int, int],
    *,
    latent_dim: int = 100,
    features: tuple[int, ...] | None = None,
    discriminator_features: tuple[int, ...] | None = None,
) -> Gan:
    """The WGAN-GP of [P1] E.1; arguments and errors as `dcgan.dcgan`."""
    return Gan(
        family="wgan_gp",
        generator=Generator(
            image_shape[-1],
            check_features(image_shape, features),
            kernel_init=layers.pytorch_init(fan_in_axis=3),
            scale_init=nn.initializers.ones,
        ),
        discriminator=Critic(check_features(image_shape, discriminator_features, inwards=True)),
        discriminator_loss=_discriminator_loss,
        generator_loss=_generator_loss,
        optimizer=optax.adam(LEARNING_RATE, b1=0.0, b2=0.9),
        discriminator_steps=5,
        image_shape=cast(tuple[int, int, int], tuple(image_shape)),
        latent_dim=latent_dim,
        learning_rate=LEARNING_RATE,
    )
