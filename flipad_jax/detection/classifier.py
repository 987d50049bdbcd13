"""Small networks that tell own images from others that look like ours.

They learn from own images and, in place of rivals, from what can be made of our own model:

*   *altered* copies of own images (`perturbations.alter`), for which own images are enough;
*   images of *impostors*, changed copies of our own generator (`generators.impostors`).

One reads images, and sees what a statistic of activations cannot: the grid that strides leave
behind, and how the last grey levels are made where an image is almost black or white. One reads the
activations that images are inverted to, which know our last layer. `one_class` adds such networks
to its statistics.

Input of the first, per colour channel, of the image in 8 bits: atanh(x) / 4 with the clip of
`final_layer`, x, and whether the grey level is 0, 1, 2; of the second z', every channel less its
mean over own ones and in units of its standard deviation. Convolutions 4 x 4 of stride 2 down to 4
x 4 (dense layers where a side is a single place, as before a dense last layer), batch
normalisation, leaky ReLU 0.1, one dense output. Cross entropy, AdamW with weight decay 1e-2, one
learning-rate cycle up to 3e-3, as many own images as others in a batch.

Images and activations of more than 64 places a side are read in squares of 64 at multiples of 8, so
that every square meets the strides alike: a random one of each image in training; when the image is
asked about, as many as cover it, whose logits are averaged. Of a side beyond 64 that is no multiple
of 8 up to 7 rows or columns at the end are not seen.
"""

import dataclasses
from typing import Any, Callable, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct

from flipad_jax import data
from flipad_jax.detection import networks
from flipad_jax.detection.feature_rows import FeatureRows
from flipad_jax.generators import layers

__all__ = ["READS", "Classifier", "ClassifierConfig", "check_counts", "fit", "logits"]

READS = ("images", "activations")

_CLIP = 1 - 1e-4
_SQUARE = 64  # pixels a side that the network sees
_GRID = 8  # squares begin at multiples: a stride of 2, 4 or 8 meets them all alike


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Settings of the network and its training.

    Attributes:
      widths: channels of the convolutions; the last one repeats for larger images.
      num_steps: training steps.
      batch_size: own images in a batch, and as many others.
      learning_rate: the highest of the cycle.
    """

    widths: tuple[int, ...] = (32, 64, 64)
    num_steps: int = 400
    batch_size: int = 64
    learning_rate: float = 3e-3

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))
        if not self.widths or min(*self.widths, self.num_steps, self.batch_size) < 1:
            raise ValueError(
                f"ClassifierConfig: {self.widths=}, {self.num_steps=}, {self.batch_size=} "
                "must be positive"
            )
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"ClassifierConfig: {self.learning_rate=} must be between 0 and 1")


@struct.dataclass
class Classifier:
    """A trained network; a pytree of its variables.

    Attributes:
      variables: Flax variables, `params` and `batch_stats`.
      offset: `[c]` subtracted from activations; None for images.
      scale: `[c]` divides them then; None for images.
      input_shape: (h, w, c) of an image or an activation (static).
      config: settings (static).
    """

    variables: Any
    offset: jax.Array | None
    scale: jax.Array | None
    input_shape: tuple[int, int, int] = struct.field(pytree_node=False)
    config: ClassifierConfig = struct.field(pytree_node=False)

    @property
    def reads(self) -> str:
        """What it is shown, one of `READS`."""
        return "images" if self.offset is None else "activations"


class _Network(nn.Module):
    widths: tuple[int, ...]
    num_stages: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x, make_stage = images, cast(Callable[[int], nn.Module], layers.Conv)
        if min(images.shape[1:3]) < 2:  # No window of a convolution finds room.
            x, make_stage = images.reshape(images.shape[0], -1), nn.Dense
        for stage in range(self.num_stages):
            x = make_stage(self.widths[min(stage, len(self.widths) - 1)])(x)
            x = nn.leaky_relu(layers.BatchNorm()(x, train=train), 0.1)
        return nn.Dense(1)(x.reshape(x.shape[0], -1))[:, 0]


def _seen(image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Height and width of what the network sees of an image."""
    return min(image_shape[0], _SQUARE), min(image_shape[1], _SQUARE)


def _corners(image_shape: tuple[int, int, int], step: int) -> list[tuple[int, int]]:
    """Top left corners, `step` apart and the last ones, of what the network may see of an image."""
    rows, columns = (
        sorted({*range(0, side - seen + 1, step), (side - seen) // _GRID * _GRID})
        for side, seen in zip(image_shape, _seen(image_shape))
    )
    return [(row, column) for row in rows for column in columns]


def _network(image_shape: tuple[int, int, int], config: ClassifierConfig) -> _Network:
    size, num_stages = min(_seen(image_shape)), 0
    while size > 4:
        size, num_stages = size // 2, num_stages + 1
    return _Network(config.widths, max(num_stages, 1))


def check_counts(num_own: int, num_others: int) -> None:
    """Refuse, before anything is computed, what `fit` would.

    Raises:
      ValueError: for fewer than 16 of either.
    """
    if min(num_own, num_others) < 16:
        raise ValueError(
            f"{num_own} own images and {num_others} others are too few to learn from; "
            "expected 16 of either at least, and some thousands to be good"
        )


def _inputs(images: jax.Array) -> jax.Array:
    """Images `[n, h, w, c]` in [-1, 1] -> `[n, h, w, 5 c]`."""
    levels = jnp.round((images + 1) * 127.5)
    images = levels / 127.5 - 1  # What was not rounded yet must not be told by that.
    parts = [jnp.arctanh(jnp.clip(images, -_CLIP, _CLIP)) / 4, images]
    parts += [(levels == level).astype(images.dtype) for level in range(3)]
    return jnp.concatenate(parts, axis=-1)


def fit(
    rng: jax.Array,
    own: np.ndarray | FeatureRows,
    others: np.ndarray | FeatureRows,
    config: ClassifierConfig = ClassifierConfig(),
    *,
    reads: str = "images",
    progress: Callable[[int], None] | None = None,
) -> Classifier:
    """Train the network, every batch divided among all devices of all processes.

    Args:
      rng: key of initialisation and batches.
      own: own images, `[n, h, w, c]` uint8 or float32 in [-1, 1]; or their activations z'.
      others: images that look like ours, or their activations, the same shape but for n.
      config: settings.
      reads: which of the two, one of `READS`.
      progress: called with the number of steps done.
    Returns:
      The classifier.
    Raises:
      ValueError: for images of another kind, fewer than 16 of either, a batch that cannot be
        divided among the processes, or training that ends in NaN or infinity.
    """
    own = _checked(own, reads)
    h, w, c = own.shape[1:]
    others = _checked(others, reads, (h, w, c))
    check_counts(len(own), len(others))
    seen, corners = _seen((h, w, c)), _corners((h, w, c), _GRID)
    offset, scale = (None, None) if reads == "images" else _channel_scale(own)
    # An empty stand-in: what a network is shown depends on what it reads.
    model = Classifier({}, offset, scale, (h, w, c), config)
    shown = jax.eval_shape(_shown, model, jax.ShapeDtypeStruct((1, *seen, c), jnp.float32))
    labels = jnp.repeat(jnp.array([0.0, 1.0], jnp.float32), config.batch_size)

    def loss(predict, rows):
        return optax.sigmoid_binary_cross_entropy(predict(_shown(model, rows)), labels).mean()

    def draw(generator):
        picked = [
            _squares(
                rows, generator.integers(len(rows), size=config.batch_size), corners, generator
            )
            for rows in (own, others)
        ]
        return (np.concatenate(picked),)

    variables = networks.train(
        rng,
        _network((h, w, c), config),
        shown.shape[1:],
        loss,
        draw,
        num_rows=2 * config.batch_size,
        num_steps=config.num_steps,
        learning_rate=config.learning_rate,
        weight_decay=1e-2,
        what=f"reads {reads}",
        progress=progress,
    )
    return dataclasses.replace(model, variables=variables)


def _checked(
    rows: np.ndarray | FeatureRows, reads: str, shape: tuple[int, int, int] | None = None
) -> np.ndarray | FeatureRows:
    if reads == "images":
        return np.asarray(data.check_images(rows, shape=shape))
    if reads not in READS:
        raise ValueError(f"reads={reads!r}: expected one of {READS}")
    floating = rows.ndim == 4 and np.issubdtype(rows.dtype, np.floating)
    if not floating or (shape is not None and tuple(rows.shape[1:]) != tuple(shape)):
        expected = "[n, h, w, c]" if shape is None else f"[n, {', '.join(map(str, shape))}]"
        raise ValueError(
            f"activations are {rows.dtype}{list(rows.shape)}, expected floating point {expected}"
        )
    return rows if isinstance(rows, FeatureRows) else np.asarray(rows)


def _channel_scale(own: np.ndarray | FeatureRows) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of every channel of activations, `[c]` each."""
    total = squares = np.zeros(own.shape[3])
    for start in range(0, len(own), 64):
        part = np.asarray(own[start : start + 64], np.float64).reshape(-1, own.shape[3])
        total, squares = total + part.sum(axis=0), squares + np.square(part).sum(axis=0)
    count = len(own) * own.shape[1] * own.shape[2]
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0)
    # A channel that never moves is not blown up.
    std = np.sqrt(variance + 1e-6 * variance.mean() + np.finfo(np.float32).tiny)
    return jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)


def _shown(model: Classifier, rows: jax.Array) -> jax.Array:
    """What the network sees of images or activations."""
    if model.offset is None or model.scale is None:
        return _inputs(rows)
    return (rows - model.offset) / model.scale


def _squares(
    images: np.ndarray | FeatureRows, indices: np.ndarray, corners: list[tuple[int, int]], draw
) -> np.ndarray:
    """These images (or activations), float32; of large ones a square at random."""
    rows = images[indices]
    height, width, channels = rows.shape[1:]
    h, w = _seen((height, width, channels))
    if (h, w) != (height, width):
        places = [corners[place] for place in draw.integers(len(corners), size=len(indices))]
        rows = np.stack([row[y : y + h, x : x + w] for row, (y, x) in zip(rows, places)])
    return data.to_float(rows)


@jax.jit
def _logits(model: Classifier, images: jax.Array) -> jax.Array:
    network = _network(model.input_shape, model.config)
    return cast(jax.Array, network.apply(model.variables, _shown(model, images), train=False))


def logits(
    model: Classifier, images: np.ndarray | FeatureRows, *, batch_size: int = 64
) -> np.ndarray:
    """Log odds that the images only look like ours: higher = less likely ours.

    Args:
      model: from `fit`.
      images: `[n, h, w, c]` uint8 or float32 in [-1, 1], or activations, as in `fit`.
      batch_size: images per compiled call.
    Returns:
      `[n]` float64; NaN for an activation that is not finite.
    Raises:
      ValueError: for other images.
    """
    images = _checked(images, model.reads, model.input_shape)
    corners, (h, w) = _corners(model.input_shape, _SQUARE), _seen(model.input_shape)

    def mean_over_squares(model, batch, put):
        found = [
            np.asarray(_logits(model, put(batch[:, y : y + h, x : x + w])), np.float64)
            for y, x in corners
        ]
        return np.mean(found, axis=0)

    return networks.ask(mean_over_squares, model, images, batch_size)
