"""A network that draws own images again, from own images alone: what it cannot draw is not ours.

Where images were processed, their finest traces are gone, and with them what `classifier` and the
statistics of activations live on: after noise or strong compression an own image and an altered
copy of it are the same to them. What is left is what the picture shows. An autoencoder that learned
to make untouched own images of processed ones, through a bottleneck, knows what own pictures look
like and no others; it is what `regeneration` is for those who have no weights, or do not want to
search. Ours; in neither paper.

The statistic is the squared residual x - decode(encode(x)), in grey levels, after means over the
cells of an 8 x 8 grid: noise and quantisation average out there, a wrong picture does not.

Convolutions 4 x 4 of stride 2 down to 4 x 4 at most, one dense layer to the code; a decoder like a
DCGAN's. Squared error, AdamW with weight decay 1e-4, one learning-rate cycle up to 3e-3. Images of
more than 64 pixels a side are averaged down first.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from flipad_jax import data
from flipad_jax.detection import networks
from flipad_jax.generators import layers

__all__ = ["ReconstructionConfig", "Reconstructor", "errors", "fit"]

_SIDE = 64  # pixels that the network sees of a side, at most
_GRID = 8  # cells of a side over which residuals are averaged


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """Settings of the network and its training.

    Attributes:
      widths: channels of the encoder's convolutions, the last one repeats; of the decoder's in
        reverse.
      code_dim: numbers that an image is squeezed into; more than the generator's latent has.
      num_steps: training steps; 0 for no network.
      batch_size: images in a batch.
      learning_rate: the highest of the cycle.
    """

    widths: tuple[int, ...] = (32, 64, 128)
    code_dim: int = 128
    num_steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 3e-3

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))
        if not self.widths or min(*self.widths, self.code_dim, self.batch_size) < 1:
            raise ValueError(
                f"ReconstructionConfig: {self.widths=}, {self.code_dim=}, {self.batch_size=} must "
                "be positive"
            )
        if self.num_steps < 0:
            raise ValueError(f"ReconstructionConfig: {self.num_steps=} must not be negative")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"ReconstructionConfig: {self.learning_rate=} must be between 0 and 1")


@struct.dataclass
class Reconstructor:
    """A trained network; a pytree of its variables.

    Attributes:
      variables: Flax variables, `params` and `batch_stats`.
      input_shape: (h, w, c) of an image (static).
      config: settings (static).
    """

    variables: Any
    input_shape: tuple[int, int, int] = struct.field(pytree_node=False)
    config: ReconstructionConfig = struct.field(pytree_node=False)

    @property
    def reads(self) -> str:
        """As `classifier.Classifier.reads`."""
        return "images"


class _Network(nn.Module):
    widths: tuple[int, ...]
    code_dim: int
    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        h, w, c = self.shape
        num_stages = max(1, math.ceil(math.log2(max(h, w) / 4)))
        low_h, low_w = (-(-side // 2**num_stages) for side in (h, w))
        tall, wide = low_h * 2**num_stages, low_w * 2**num_stages
        widths = [self.widths[min(i, len(self.widths) - 1)] for i in range(num_stages)]
        x = jnp.pad(images, [(0, 0), (0, tall - h), (0, wide - w), (0, 0)], mode="edge")
        for width in widths:
            x = layers.Conv(width)(x)
            x = nn.leaky_relu(layers.BatchNorm()(x, train=train), 0.1)
        code = nn.Dense(self.code_dim)(x.reshape(len(x), -1))
        x = nn.Dense(low_h * low_w * widths[-1])(code).reshape(-1, low_h, low_w, widths[-1])
        for width in widths[-2::-1]:
            x = nn.relu(layers.BatchNorm()(x, train=train))
            x = layers.ConvTranspose(width)(x)
        x = layers.ConvTranspose(c)(nn.relu(layers.BatchNorm()(x, train=train)))
        return jnp.tanh(x)[:, :h, :w]


def _seen_shape(shape: Sequence[int]) -> tuple[tuple[int, int, int], int]:
    """What the network sees of images of a shape, and the pixels of a side that become one."""
    factor = max(1, -(-max(shape[:2]) // _SIDE))
    return (-(-shape[0] // factor), -(-shape[1] // factor), shape[2]), factor


def _cells(images: jax.Array, height: int, width: int) -> jax.Array:
    """Means over cells of so many pixels, `[n, h, w, c]`; those at the end may be smaller."""
    h, w = images.shape[1:3]
    pad = [(0, 0), (0, -h % height), (0, -w % width), (0, 0)]

    def sums(x):
        x = jnp.pad(x, pad)
        n, tall, wide, c = x.shape
        return x.reshape(n, tall // height, height, wide // width, width, c).sum(axis=(2, 4))

    return sums(images) / sums(jnp.ones((1, h, w, 1), images.dtype))


def _network(shape: tuple[int, int, int], config: ReconstructionConfig) -> _Network:
    return _Network(config.widths, config.code_dim, _seen_shape(shape)[0])


def fit(
    rng: jax.Array,
    own: np.ndarray,
    processed: Sequence[np.ndarray],
    config: ReconstructionConfig = ReconstructionConfig(),
    *,
    progress: Callable[[int], None] | None = None,
) -> Reconstructor:
    """Train the network, every batch divided among all devices of all processes.

    Args:
      rng: key of initialisation and batches.
      own: own images, `[n, h, w, c]` uint8 or float32 in [-1, 1], as they were made.
      processed: the same images as they are seen, several times if what happens to them is random.
      config: settings.
      progress: called with the number of steps done.
    Returns:
      The network.
    Raises:
      ValueError: for images of another kind, fewer than 16, no `processed` ones, a batch that
        cannot be divided among the processes, or training that ends in NaN or infinity.
    """
    own = np.asarray(data.check_images(own))
    shape = (own.shape[1], own.shape[2], own.shape[3])
    seen = [np.asarray(data.check_images(images, shape=shape)) for images in processed]
    if len(own) < 16 or not seen or any(len(images) != len(own) for images in seen):
        raise ValueError(
            f"{len(own)} own images and {[len(images) for images in seen]} processed ones; "
            "expected 16 at least, and as many of the latter, once or several times"
        )
    network, factor = _network(shape, config), _seen_shape(shape)[1]

    def loss(predict, images, wanted):
        images, wanted = (_cells(x, factor, factor) for x in (images, wanted))
        return jnp.mean(jnp.square(predict(images) - wanted))

    def draw(generator):
        picked = generator.integers(len(own), size=config.batch_size)
        shown = seen[int(generator.integers(len(seen)))]
        return data.to_float(shown[picked]), data.to_float(own[picked])

    variables = networks.train(
        rng,
        network,
        network.shape,
        loss,
        draw,
        num_rows=config.batch_size,
        num_steps=config.num_steps,
        learning_rate=config.learning_rate,
        weight_decay=1e-4,
        what="draws own images again",
        progress=progress,
    )
    return Reconstructor(variables, shape, config)


@jax.jit
def _errors(model: Reconstructor, images: jax.Array) -> jax.Array:
    network = _network(model.input_shape, model.config)
    factor = _seen_shape(model.input_shape)[1]
    images = _cells(images, factor, factor)
    drawn = cast(jax.Array, network.apply(model.variables, images, train=False))
    residual = 127.5 * (images - drawn)
    cell = [-(-side // _GRID) for side in network.shape[:2]]
    return jnp.mean(jnp.square(_cells(residual, *cell)), axis=(1, 2, 3))


def errors(model: Reconstructor, images: np.ndarray, *, batch_size: int = 64) -> np.ndarray:
    """How badly images are drawn again: higher = less likely ours.

    Args:
      model: from `fit`.
      images: `[n, h, w, c]` uint8 or float32 in [-1, 1].
      batch_size: images per compiled call.
    Returns:
      `[n]` float64, mean squares of grey levels.
    Raises:
      ValueError: for other images.
    """
    images = np.asarray(data.check_images(images, shape=model.input_shape))
    return networks.ask(
        lambda model, batch, put: _errors(model, put(batch)), model, images, batch_size
    )
