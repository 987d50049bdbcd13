"""EBGAN: the discriminator is an autoencoder, its error the energy ([P1] E.1; Zhao et al. 2017).

The generator is DCGAN's. The discriminator encodes an image by convolutions 3-64-128-256 (4x4,
stride 2, padding 1, no bias, batch normalisation and leaky ReLU 0.2 in between) and decodes it by
transposed convolutions 256-128-64-3 (the same with ReLU); the code in the middle and the decoded
image have no activation. The energy E of a batch is its mean squared error. With margin m = max(1,
n / 64), n images in a batch,

    discriminator: E(real) + max(m - E(fake), 0),      generator: E(fake) + 0.1 P(codes of fake),

where P is the pull-away term, the mean squared cosine between the codes of two images. In the
generator's loss the image that the autoencoder should have returned is held fixed, as in the
published code: the gradient takes the way through the autoencoder only.

Recipe: Adam 2e-4 with betas (0.5, 0.999), weights N(0, 0.02), batch normalisation scales N(1,
0.02). Where text and published code disagree, `convention` decides:

- "paper": five discriminator steps per generator step; squared cosines, as Zhao et al. define them;
- "reference": one step; the cosines are not squared, so that opposite codes are best of all.

The text names neither margin nor energy: both are the published code's, whose margin applies to the
mean over a batch (Zhao et al.: to each image). Departure: the discriminator is updated before the
generator, as in the other families (published: after it).
"""

import functools
from typing import Callable, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from flipad_jax import conventions
from flipad_jax.generators import dcgan, layers
from flipad_jax.generators.dcgan import LEARNING_RATE
from flipad_jax.generators.training import Gan

__all__ = ["Autoencoder", "ebgan", "pull_away"]

PULL_AWAY = 0.1
_DISCRIMINATOR_FEATURES = (64, 128, 256)


class Autoencoder(nn.Module):
    """Images `[n, size, size, channels]` -> (the same decoded, codes `[n, d]`).

    Widths from the image inwards, each of which halves the side.
    """

    channels: int
    features: tuple[int, ...]

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = images
        for i, width in enumerate(self.features):
            if i > 0:
                x = nn.leaky_relu(layers.BatchNorm(layers.scale_init)(x, train=True), 0.2)
            x = layers.Conv(width)(x)
        codes = x.reshape(x.shape[0], -1)
        for width in self.features[-2::-1]:
            x = layers.ConvTranspose(width)(x)
            x = nn.relu(layers.BatchNorm(layers.scale_init)(x, train=True))
        return layers.ConvTranspose(self.channels)(x), codes


def pull_away(codes: jax.Array, *, squared: bool = True) -> jax.Array:
    """Mean over ordered pairs of different images of the (squared) cosine between their codes.

    Args:
      codes: `[n, d]`, n at least 2; a code of zeros has cosine 0 with every other.
      squared: as defined by Zhao et al.; False for the published code of [P1].
    Returns:
      a scalar in [0, 1], or in [-1, 1].
    Raises:
      ValueError: for fewer than two codes.
    """
    n = codes.shape[0]
    if n < 2:
        raise ValueError(f"the pull-away term compares images: a batch of {n} has no pair")
    # The tiny constant keeps the derivative finite for a code of zeros.
    directions = codes / jnp.sqrt(jnp.sum(codes**2, axis=1, keepdims=True) + 1e-12)
    cosines = jnp.where(jnp.eye(n, dtype=bool), 0, directions @ directions.T)
    return jnp.sum(cosines**2 if squared else cosines) / (n * (n - 1))


def _energy(images, decoded):
    return jnp.mean((decoded - images) ** 2)


def _discriminator_loss(discriminate, real, fake, rng):
    del rng
    margin = max(1.0, real.shape[0] / 64)
    fake_energy = _energy(fake, discriminate(fake)[0])
    return _energy(real, discriminate(real)[0]) + nn.relu(margin - fake_energy)


@functools.cache
def _generator_loss(squared: bool) -> Callable[..., jax.Array]:
    def loss(discriminate, fake, rng):
        del rng
        decoded, codes = discriminate(fake)
        energy = _energy(jax.lax.stop_gradient(fake), decoded)
        return energy + PULL_AWAY * pull_away(codes, squared=squared)

    return loss


def ebgan(
    image_shape: tuple[int, int, int],
    *,
    latent_dim: int = 100,
    features: tuple[int, ...] | None = None,
    discriminator_features: tuple[int, ...] | None = None,
    convention: str = "paper",
) -> Gan:
    """The EBGAN of [P1] E.1 for images of `image_shape` (h = w, a power of two from 8).

    Args:
      image_shape: `(h, w, c)`.
      latent_dim: dimension of the standard normal latent.
      features: generator widths as `dcgan.dcgan` takes them.
      discriminator_features: three widths of the encoder from the image inwards, the decoder's in
        reverse; the paper's 64, 128, 256 by default.
      convention: "paper" or "reference", see the module docstring.
    Raises:
      ValueError: as `dcgan.dcgan`, or if the convention is unknown.
    """
    conventions.check(convention)
    generator_features = dcgan.check_features(image_shape, features)
    widths = tuple(discriminator_features or _DISCRIMINATOR_FEATURES)
    if len(widths) != len(_DISCRIMINATOR_FEATURES):
        raise ValueError(
            f"discriminator_features={widths}: an EBGAN's encoder needs "
            f"{len(_DISCRIMINATOR_FEATURES)} widths"
        )
    return Gan(
        family="ebgan",
        generator=dcgan.Generator(image_shape[-1], generator_features),
        discriminator=Autoencoder(image_shape[-1], widths),
        discriminator_loss=_discriminator_loss,
        generator_loss=_generator_loss(squared=convention == "paper"),
        optimizer=optax.adam(LEARNING_RATE, b1=0.5, b2=0.999),
        discriminator_steps=5 if convention == "paper" else 1,
        image_shape=cast(tuple[int, int, int], tuple(image_shape)),
        latent_dim=latent_dim,
        learning_rate=LEARNING_RATE,
    )
