"""A small network that tells own images from those of impostors of our own model.

Impostors are changed copies of our own generator (`generators.impostors`), so this, too, learns
from nothing but our own model. It sees what a statistic of activations cannot: how the last grey
levels are made where an image is almost black or white. Alone it is weak on images that are not
generated at all; `one_class` adds it to its statistics.

Input, per colour channel: atanh(x) / 4 with the clip of `final_layer`, x, and whether the grey
level is 0, 1, 2. Convolutions 4 x 4 of stride 2 down to 4 x 4, batch normalisation, leaky ReLU
0.1, one dense output. Cross entropy, AdamW with weight decay 1e-2, one learning-rate cycle up to
3e-3, as many own images as impostors in a batch.
"""

import dataclasses
import functools
from typing import Any, Callable, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct

from flipad_jax import data, parallel
from flipad_jax.generators import layers

__all__ = ["ImpostorClassifier", "ImpostorClassifierConfig", "fit", "logits"]

_CLIP = 1 - 1e-4


@dataclasses.dataclass(frozen=True)
class ImpostorClassifierConfig:
    """Settings of the network and its training.

    Attributes:
      widths: channels of the convolutions; the last one repeats for larger images.
      num_steps: training steps.
      batch_size: own images in a batch, and as many of impostors.
      learning_rate: the highest of the cycle.
    """

    widths: tuple[int, ...] = (32, 64, 64)
    num_steps: int = 900
    batch_size: int = 64
    learning_rate: float = 3e-3

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))
        if not self.widths or min(*self.widths, self.num_steps, self.batch_size) < 1:
            raise ValueError(
                f"ImpostorClassifierConfig: {self.widths=}, {self.num_steps=}, {self.batch_size=} "
                "must be positive"
            )
        if not 0 < self.learning_rate < 1:
            raise ValueError(
                f"ImpostorClassifierConfig: {self.learning_rate=} must be between 0 and 1"
            )


@struct.dataclass
class ImpostorClassifier:
    """A trained network; a pytree of its variables.

    Attributes:
      variables: Flax variables, `params` and `batch_stats`.
      image_shape: (h, w, c) of the images (static).
      config: settings (static).
    """

    variables: Any
    image_shape: tuple[int, int, int] = struct.field(pytree_node=False)
    config: ImpostorClassifierConfig = struct.field(pytree_node=False)


class _Network(nn.Module):
    widths: tuple[int, ...]
    num_stages: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = images
        for stage in range(self.num_stages):
            x = layers.Conv(self.widths[min(stage, len(self.widths) - 1)])(x)
            x = nn.leaky_relu(layers.BatchNorm()(x, train=train), 0.1)
        return nn.Dense(1)(x.reshape(x.shape[0], -1))[:, 0]


def _network(image_shape: tuple[int, int, int], config: ImpostorClassifierConfig) -> _Network:
    size, num_stages = min(image_shape[:2]), 0
    while size > 4:
        size, num_stages = size // 2, num_stages + 1
    return _Network(config.widths, max(num_stages, 1))


def _inputs(images: jax.Array) -> jax.Array:
    """`[n, h, w, c]` in [-1, 1] -> `[n, h, w, 5 c]`."""
    levels = jnp.round((images + 1) * 127.5)
    parts = [jnp.arctanh(jnp.clip(images, -_CLIP, _CLIP)) / 4, images]
    parts += [(levels == level).astype(images.dtype) for level in range(3)]
    return jnp.concatenate(parts, axis=-1)


def fit(
    rng: jax.Array,
    own: np.ndarray,
    impostors: np.ndarray,
    config: ImpostorClassifierConfig = ImpostorClassifierConfig(),
    *,
    progress: Callable[[int], None] | None = None,
) -> ImpostorClassifier:
    """Train the network, every batch divided among all devices of all processes.

    Args:
      rng: key of initialisation and batches.
      own: own images, `[n, h, w, c]` uint8 or float32 in [-1, 1].
      impostors: images of impostors, the same shape but for n.
      config: settings.
      progress: called with the number of steps done.
    Returns:
      The classifier.
    Raises:
      ValueError: for images of another kind, fewer than 16 of either, or a batch that cannot be
        divided among the processes.
    """
    own = data.check_images(own)
    impostors = data.check_images(impostors, shape=own.shape[1:])
    if min(len(own), len(impostors)) < 16:
        raise ValueError(
            f"{len(own)} own images and {len(impostors)} of impostors are too few to learn from; "
            "expected 16 of either at least, and some thousands to be good"
        )
    mesh = parallel.mesh(2 * config.batch_size)
    shape = tuple(own.shape[1:])
    network = _network(shape, config)
    optimizer = optax.adamw(
        optax.cosine_onecycle_schedule(config.num_steps, config.learning_rate), weight_decay=1e-2
    )
    init_rng, batch_rng = jax.random.split(rng)
    init = layers.jit_for_one_run(functools.partial(network.init, train=False))
    variables = init(init_rng, jnp.zeros((1, *shape[:2], 5 * shape[2]), jnp.float32))
    opt_state = jax.jit(optimizer.init)(variables["params"])
    variables, opt_state = parallel.replicate((variables, opt_state), mesh)
    labels = jnp.repeat(jnp.array([0.0, 1.0], jnp.float32), config.batch_size)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables, opt_state, images):
        images = parallel.constrain(images, mesh)

        def loss(params):
            found, updated = network.apply(
                {**variables, "params": params},
                _inputs(images),
                train=True,
                mutable=["batch_stats"],
            )
            return optax.sigmoid_binary_cross_entropy(found, labels).mean(), updated

        grads, updated = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return parallel.constrain(({"params": params, **updated}, opt_state), mesh, axis=None)

    # A host loop of one compiled step: kernel gradients inside a compiled loop are slow on a CPU.
    mine = parallel.local_range(2 * config.batch_size)
    seed = int(jax.random.randint(batch_rng, (), 0, np.iinfo(np.int32).max))
    for index in range(config.num_steps):
        draw = np.random.default_rng([seed, index])
        picked = [
            data.to_float(images[draw.integers(len(images), size=config.batch_size)])
            for images in (own, impostors)
        ]
        batch = parallel.shard(np.concatenate(picked)[mine.start : mine.stop], mesh)
        variables, opt_state = step(variables, opt_state, batch)
        if progress is not None:
            progress(index + 1)
    return ImpostorClassifier(parallel.local(variables), shape, config)


@jax.jit
def _logits(model: ImpostorClassifier, images: jax.Array) -> jax.Array:
    network = _network(model.image_shape, model.config)
    return cast(jax.Array, network.apply(model.variables, _inputs(images), train=False))


def logits(model: ImpostorClassifier, images: np.ndarray, *, batch_size: int = 64) -> np.ndarray:
    """Log odds that an impostor made the images: higher = less likely ours.

    Args:
      model: from `fit`.
      images: `[n, h, w, c]` uint8 or float32 in [-1, 1], of the shape in `fit`.
      batch_size: images per compiled call.
    Returns:
      `[n]` float64.
    Raises:
      ValueError: for other images.
    """
    images = data.check_images(images, shape=model.image_shape)
    mesh = parallel.local_mesh(batch_size)
    model = parallel.replicate(model, mesh)
    rows = [np.zeros(0)]
    for start in range(0, len(images), batch_size):
        batch = data.to_float(images[start : start + batch_size])
        count = len(batch)
        batch = np.pad(batch, [(0, batch_size - count), (0, 0), (0, 0), (0, 0)], mode="edge")
        found = _logits(model, parallel.shard(batch, mesh))
        rows.append(np.asarray(found, np.float64)[:count])
    return np.concatenate(rows)
