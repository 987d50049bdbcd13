"""LSGAN: least squares instead of cross entropy ([P1] E.1; Mao et al. 2017).

At 64 x 64 with the default widths this is the paper's architecture. Generator: a linear layer from
the latent to 128 x 8 x 8, three blocks of nearest upsampling x2, 3x3 convolution, batch
normalisation and ReLU (128-128-128-64), a last 3x3 convolution and tanh: unlike DCGAN's, its last
layer has stride 1 and a bias. Discriminator: five blocks of 3x3 convolution with stride 2, leaky
ReLU 0.2, dropout of whole channels (0.25) and, in all but the first, batch normalisation
(16-32-64-128-128), then a linear layer from the 2 x 2 x 128 values. Images of other sizes start at
an eighth of their side, and smaller ones have fewer blocks in the discriminator.

Recipe: targets 1 (real) and 0 (fake), generator's target 1, Adam 2e-4 with betas (0.5, 0.999),
convolutions N(0, 0.02), scales of batch normalisation N(1, 0.02), linear layers and biases as
PyTorch has them. Where text and published code disagree, `convention` decides:

- "paper": five discriminator steps per generator step, eps 1e-5 in batch normalisation;
- "reference": one, and 0.8, which came from an argument in the wrong place, in both networks.

Departures from both: no bias before batch normalisation, where it would change nothing; the
discriminator is updated before the generator, as in the other families (published: after it).
"""

from typing import cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from flipad_jax import conventions
from flipad_jax.generators import layers
from flipad_jax.generators.dcgan import LEARNING_RATE
from flipad_jax.generators.training import Gan

__all__ = ["Discriminator", "Generator", "lsgan"]

_GENERATOR_FEATURES = (128, 128, 128, 64)
_DISCRIMINATOR_FEATURES = (16, 32, 64, 128, 128)


class Generator(nn.Module):
    """Latents `[n, latent_dim]` -> images `[n, size, size, channels]` in (-1, 1).

    `activation` stops before the last layer: z in the papers, `[n, size, size, features[-1]]`,
    non-negative.

    Attributes:
      size: side of the images, a multiple of 8.
      channels: of the images.
      features: channels after the linear layer and after each of the three blocks.
      epsilon: of batch normalisation.
    """

    size: int
    channels: int
    features: tuple[int, ...]
    epsilon: float = 1e-5

    def setup(self):
        self.linear = layers.Linear((self.size // 8) ** 2 * self.features[0])
        self.convolutions = [layers.UpsampledConv(width) for width in self.features[1:]]
        self.norms = [layers.BatchNorm(layers.scale_init, self.epsilon) for _ in self.features[1:]]
        self.last = layers.Conv(self.channels, kernel_size=3, stride=1, padding=1, use_bias=True)

    def activation(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
        side = self.size // 8
        x = self.linear(latents).reshape(-1, side, side, self.features[0])
        for convolution, norm in zip(self.convolutions, self.norms):
            x = nn.relu(norm(convolution(x), train=train))
        return x

    def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
        return jnp.tanh(self.last(self.activation(latents, train=train)))


class Discriminator(nn.Module):
    """Images `[n, size, size, channels]` -> scores `[n]`, near 1 for real ones and 0 for others.

    Needs the random stream "dropout". Widths from the image inwards.
    """

    features: tuple[int, ...]
    dropout: float = 0.25
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for i, width in enumerate(self.features):
            x = layers.Conv(width, kernel_size=3, use_bias=True)(x)
            x = nn.leaky_relu(x, 0.2)
            # One draw per image and channel, as Dropout2d.
            x = nn.Dropout(self.dropout, broadcast_dims=(1, 2))(x, deterministic=False)
            if i > 0:
                x = layers.BatchNorm(layers.scale_init, self.epsilon)(x, train=True)
        return layers.Linear(1)(x.reshape(x.shape[0], -1))[:, 0]


def _discriminator_loss(discriminate, real, fake, rng):
    real_rng, fake_rng = jax.random.split(rng)
    return 0.5 * (
        jnp.mean((discriminate(real, real_rng) - 1) ** 2)
        + jnp.mean(discriminate(fake, fake_rng) ** 2)
    )


def _generator_loss(discriminate, fake, rng):
    return jnp.mean((discriminate(fake, rng) - 1) ** 2)


def lsgan(
    image_shape: tuple[int, int, int],
    *,
    latent_dim: int = 100,
    features: tuple[int, ...] | None = None,
    discriminator_features: tuple[int, ...] | None = None,
    convention: str = "paper",
) -> Gan:
    """The LSGAN of [P1] E.1 for images of `image_shape` (h = w, a power of two from 16).

    Args:
      image_shape: `(h, w, c)`.
      latent_dim: dimension of the standard normal latent.
      features: four generator widths, after the linear layer and after each block; the paper's 128,
        128, 128, 64 by default.
      discriminator_features: from the image inwards, one per halving down to 2 x 2, at most five;
        the first of the paper's 16, 32, 64, 128, 128 by default.
      convention: "paper" or "reference", see the module docstring.
    Raises:
      ValueError: if the image is not square, of another size, the number of widths is wrong, or the
        convention is unknown.
    """
    conventions.check(convention)
    if len(image_shape) != 3 or image_shape[0] != image_shape[1]:
        raise ValueError(f"image_shape must be (h, w, c) with h = w, got {tuple(image_shape)}")
    size = image_shape[0]
    if size < 16 or size & (size - 1):
        raise ValueError(f"an LSGAN makes images of 16, 32, 64, ... pixels a side, not {size}")
    # The last map is 2 x 2 or, beyond 64 x 64, larger.
    blocks = min(size.bit_length() - 2, len(_DISCRIMINATOR_FEATURES))
    epsilon = 1e-5 if convention == "paper" else 0.8
    return Gan(
        family="lsgan",
        generator=Generator(
            size,
            image_shape[-1],
            _check_widths("features", features or _GENERATOR_FEATURES, 4, size),
            epsilon,
        ),
        discriminator=Discriminator(
            _check_widths(
                "discriminator_features",
                discriminator_features or _DISCRIMINATOR_FEATURES[:blocks],
                blocks,
                size,
            ),
            epsilon=epsilon,
        ),
        discriminator_loss=_discriminator_loss,
        generator_loss=_generator_loss,
        optimizer=optax.adam(LEARNING_RATE, b1=0.5, b2=0.999),
        discriminator_steps=5 if convention == "paper" else 1,
        image_shape=cast(tuple[int, int, int], tuple(image_shape)),
        latent_dim=latent_dim,
        learning_rate=LEARNING_RATE,
    )


def _check_widths(name, widths, count, size):
    if len(widths) != count:
        raise ValueError(
            f"{name}={tuple(widths)}: an LSGAN of {size} pixels a side needs {count} widths"
        )
    return tuple(widths)
