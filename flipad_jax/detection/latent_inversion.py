"""SM-Inv: the nearest image that our generator makes, found by searching its latents.

The baseline of [P1] (appendix D and E.4, after Albright and McCloskey 2019 and Zhang et al. 2021):
an image is ours if some latent reproduces it. From several random starts z ~ N(0, I), Adam lowers

    distance(x, G(z))

and the start that ends nearest counts. The score is what is left: higher = less likely ours.

Inverting only the last layer (`inversion`) is one convex problem per image. This one is not convex,
takes ten thousand forward and backward passes through the whole generator and has no certificate: a
large distance may mean another model, or a search that got stuck.

Differences from the code published with [P1]:

*   Batch normalisation is in evaluation mode (`generators.sampling`; a generator of one's own must
    be one function of its latent). There, the generator normalises with the statistics of the batch
    of reconstructions, so that one image's reconstruction depends on all others.
*   Every pair of image and start has its own loss; there it is the mean over the batch. That
    divides a gradient by the size of the batch, and Adam's steps hardly depend on the scale of a
    gradient (only through eps = 1e-8 in the denominator).
*   With distance "l2" the score is ||x - G(z)||_2 / D as in the text, D = h w c; there it is the
    mean squared error. Among images of one size either is an increasing function of the other, so
    verdicts agree, except for the interpolation inside a quantile.
*   Thresholds are the caller's business (`calibration`). The published numbers rest on thresholds
    from 10 000 *training* images of the detectors, not on the 1000 validation images that all other
    methods use.

A step is one compiled call. No `lax.fori_loop` or `lax.scan` over the steps: with the zoo's 32 x 32
DCGAN and 100 pairs at once XLA's CPU backend needs 43 ms of processor time for a step, and 101 ms
for each step of either loop.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from flipad_jax import data, perceptual
from flipad_jax.generators.sampling import TrainedGenerator
from flipad_jax.inception import Inception
from flipad_jax.perceptual import Distance

__all__ = [
    "LatentGenerator",
    "LatentInversion",
    "LatentInversionConfig",
    "LatentSearch",
    "LatentState",
    "latent_inversion",
    "score",
    "search",
    "starts",
]

_PROGRESS_EVERY = 25  # steps that are queued up before the host waits for them


@dataclasses.dataclass(frozen=True)
class LatentInversionConfig:
    """Settings of the search; defaults: [P1] E.4.

    Attributes:
      num_steps: steps of Adam.
      num_restarts: random starts per image.
      learning_rate: Adam's; betas 0.9 and 0.999.
      distance: what is lowered, one of `perceptual.NAMES`: "l2" is the paper's SM-Inv_2,
        "inception" its SM-Inv_inc; "ms_ssim" needs no weights and is neither.
      batch_size: pairs of image and start at once, for memory and speed only. An accelerator takes
        thousands.
    """

    num_steps: int = 1000
    num_restarts: int = 10
    learning_rate: float = 0.1
    distance: str = "l2"
    batch_size: int = 100

    def __post_init__(self):
        if min(self.num_steps, self.num_restarts, self.batch_size) < 1:
            raise ValueError(
                f"LatentInversionConfig: {self.num_steps=}, {self.num_restarts=}, "
                f"{self.batch_size=} must be positive"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"LatentInversionConfig: {self.learning_rate=} must be finite and positive"
            )
        if self.distance not in perceptual.NAMES:
            raise ValueError(
                f"LatentInversionConfig: distance={self.distance!r} is unknown; there are "
                f"{', '.join(perceptual.NAMES)}"
            )


@struct.dataclass
class LatentGenerator:
    """Any generator; a pytree whose leaves are the weights.

    Attributes:
      params: weights, of whatever form `apply` takes.
      apply: `(params, z [n, latent_dim]) -> images [n, h, w, c]` in [-1, 1], differentiable; an
        image depends on its own latent only.
      latent_dim: dimension of the standard normal latent.
    """

    params: Any
    apply: Callable[[Any, jax.Array], jax.Array] = struct.field(pytree_node=False)
    latent_dim: int = struct.field(pytree_node=False)


class LatentSearch(NamedTuple):
    """What a search found, on the host; n images.

    Attributes:
      latent: `[n, latent_dim]` float32, the best latent of each image.
      distance: `[n]` float32, its distance. NaN if no start of the image came to an end.
      restart: `[n]` int, the start that it came from.
      distances: `[n, num_restarts]` float32, of all starts; NaN where Adam diverged.
      name: of the distance.
      image_shape: `(h, w, c)`.
    """

    latent: np.ndarray
    distance: np.ndarray
    restart: np.ndarray
    distances: np.ndarray
    name: str
    image_shape: tuple[int, int, int]


class LatentState(NamedTuple):
    """What the next step needs, of m pairs of image and start.

    Attributes:
      z: `[m, latent_dim]` latents.
      opt_state: Adam's moments.
    """

    z: jax.Array
    opt_state: optax.OptState


class LatentInversion(NamedTuple):
    """The search as pure functions of m pairs; `reference` is `perceptual.prepare` of the images.

    Adam works entry by entry and every pair has its own loss, so no pair knows of another.

    Attributes:
      init: `(z [m, latent_dim]) -> state`.
      update: `(state, reference) -> state`, one step of Adam.
      distances: `(state, reference) -> [m]` at the state's latents.
    """

    init: Callable[[jax.Array], LatentState]
    update: Callable[[LatentState, jax.Array], LatentState]
    distances: Callable[[LatentState, jax.Array], jax.Array]


def latent_inversion(
    generator: TrainedGenerator | LatentGenerator,
    distance: Distance,
    *,
    learning_rate: float | jax.Array = 0.1,
) -> LatentInversion:
    """Build the search for one generator and distance (`search` runs it)."""
    optimizer = optax.adam(learning_rate)

    def distances_at(z: jax.Array, reference: jax.Array) -> jax.Array:
        return perceptual.between(distance, reference, _images(generator, z))

    def init(z: jax.Array) -> LatentState:
        return LatentState(z, optimizer.init(z))

    def update(state: LatentState, reference: jax.Array) -> LatentState:
        gradient = jax.grad(lambda z: distances_at(z, reference).sum())(state.z)
        step, opt_state = optimizer.update(gradient, state.opt_state)
        return LatentState(state.z + cast(jax.Array, step), opt_state)

    def distances(state: LatentState, reference: jax.Array) -> jax.Array:
        return distances_at(state.z, reference)

    return LatentInversion(init, update, distances)


def starts(rng: jax.Array, images: jax.Array, restarts: jax.Array, latent_dim: int) -> jax.Array:
    """Latents `[m, latent_dim]` float32 from N(0, I), each from its image's and its own number.

    Args:
      rng: names the stream.
      images: `[m]` int, number of the image.
      restarts: `[m]` int, number of the start.
      latent_dim: their dimension.
    """

    def start(image, restart):
        own = jax.random.fold_in(jax.random.fold_in(rng, image), restart)
        return jax.random.normal(own, (latent_dim,), jnp.float32)

    return jax.vmap(start)(images, restarts)


def search(
    generator: TrainedGenerator | LatentGenerator,
    images: np.ndarray | jax.Array,
    rng: jax.Array,
    config: LatentInversionConfig = LatentInversionConfig(),
    *,
    network: Inception | None = None,
    first: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LatentSearch:
    """The latent whose image is nearest, for every image.

    Runs on the host around a compiled step, so it cannot itself be traced. Memory grows with
    `config.batch_size` and the generator; images and results stay on the host.

    Args:
      generator: one of ours, or any other as a `LatentGenerator`.
      images: `[n, h, w, c]`, uint8 or float in [-1, 1], of the size that the generator makes; n may
        be 0.
      rng: names the random starts; those of an image depend on its number and on nothing else.
      config: settings.
      network: weights of Inception-V3 (`inception.load`), for distance "inception" only.
      first: number of the first image. A long list searched in parts gives what it gives at once.
      progress: called with the steps done and those in all, every 25 and at the end of a batch.
    Returns:
      The best of `config.num_restarts` final latents, by the distance that was lowered.
    Raises:
      ValueError: if the images are of another size than the generator's or too small for the
        distance, a network is missing or of no use, a number is out of range, or the generator
        makes NaN or infinity of a random latent.
    """
    if first < 0:
        raise ValueError(f"{first=} must not be negative")
    images = data.check_images(images)
    distance = perceptual.distance(config.distance, network)
    shape = _check_generator(generator, distance, images)
    num_images, num_restarts = len(images), config.num_restarts
    latent = np.empty((num_images * num_restarts, generator.latent_dim), np.float32)
    distances = np.empty(num_images * num_restarts, np.float32)
    # One shape, so one compilation; equal batches, so that the last one is not mostly padding.
    num_batches = max(1, -(-len(latent) // config.batch_size))
    size = -(-len(latent) // num_batches)
    total = num_batches * config.num_steps
    learning_rate = np.float32(config.learning_rate)
    for batch in range(num_batches if num_images else 0):
        pairs = np.arange(batch * size, min((batch + 1) * size, len(latent)))
        # Filled up with the last pair.
        which, restart = np.divmod(np.pad(pairs, (0, size - pairs.size), "edge"), num_restarts)
        z = _starts(rng, first + which, restart, generator.latent_dim)
        rows = data.to_float(np.asarray(images[which]))
        state, reference, finite = _begin(generator, distance, z, rows)
        _check_starts(np.asarray(finite))
        for step in range(1, config.num_steps + 1):
            state = _update(generator, distance, learning_rate, state, reference)
            if step % _PROGRESS_EVERY == 0 or step == config.num_steps:
                jax.block_until_ready(state)
                if progress is not None:
                    progress(batch * config.num_steps + step, total)
        found = _distances(generator, distance, state, reference)
        distances[pairs] = np.asarray(found)[: pairs.size]
        latent[pairs] = np.asarray(state.z)[: pairs.size]
    by_image = np.where(np.isfinite(distances), distances, np.nan)
    by_image = by_image.reshape(num_images, num_restarts)
    best = np.argmin(np.where(np.isnan(by_image), np.inf, by_image), axis=1)
    each = np.arange(num_images)
    return LatentSearch(
        latent=latent[each * num_restarts + best],
        distance=by_image[each, best],
        restart=best,
        distances=by_image,
        name=config.distance,
        image_shape=shape,
    )


def score(found: LatentSearch) -> np.ndarray:
    """[P1] appendix D: how far the nearest image of our generator is; higher = less likely ours.

    With "l2" ||x - G(z)||_2 / D, D = h w c; with another distance that distance.

    Args:
      found: from `search`.
    Returns:
      `[n]` float32, not negative; NaN (no verdict) where every start diverged.
    """
    if found.name == "l2":
        return np.sqrt(found.distance / np.float32(math.prod(found.image_shape)))
    return found.distance


def _images(generator: TrainedGenerator | LatentGenerator, z: jax.Array) -> jax.Array:
    if isinstance(generator, TrainedGenerator):
        return cast(jax.Array, generator.module.apply(generator.variables, z))
    return generator.apply(generator.params, z)


_starts = jax.jit(starts, static_argnames="latent_dim")


@jax.jit
def _begin(generator, distance, z, images):
    """State, reference, and which `[m]` starts make images without NaN and infinity."""
    finite = jnp.isfinite(_images(generator, z)).all(axis=(1, 2, 3))
    state = latent_inversion(generator, distance).init(z)
    return state, perceptual.prepare(distance, images), finite


@functools.partial(jax.jit, donate_argnames="state")
def _update(generator, distance, learning_rate, state, reference):
    solver = latent_inversion(generator, distance, learning_rate=learning_rate)
    return solver.update(state, reference)


@jax.jit
def _distances(generator, distance, state, reference):
    return latent_inversion(generator, distance).distances(state, reference)


def _check_generator(
    generator: TrainedGenerator | LatentGenerator, distance: Distance, images: Any
) -> tuple[int, int, int]:
    """The shape of an image, once it is known that the generator makes such."""
    z = jax.ShapeDtypeStruct((2, generator.latent_dim), jnp.float32)
    made = jax.eval_shape(_images, generator, z)
    shape = getattr(made, "shape", None)
    if shape is None or len(shape) != 4 or shape[0] != 2:
        raise ValueError(
            f"the generator makes {made} of latents [2, {generator.latent_dim}], expected images "
            "[2, h, w, c]"
        )
    if not jnp.issubdtype(made.dtype, jnp.floating):
        raise ValueError(f"the generator makes {made.dtype} images, expected floating in [-1, 1]")
    if tuple(images.shape[1:]) != shape[1:]:
        raise ValueError(
            f"images are {list(images.shape)}, but the generator makes "
            f"[n, {', '.join(map(str, shape[1:]))}]: resize or crop them as those that it was "
            "trained on, or leave them out"
        )
    jax.eval_shape(perceptual.prepare, distance, made)
    return cast(tuple[int, int, int], tuple(shape[1:]))


def _check_starts(finite: np.ndarray) -> None:
    if not finite.all():
        raise ValueError(
            f"the generator makes NaN or infinity of {int((~finite).sum())} of {finite.size} "
            "latents from N(0, I); check its weights and the range that it expects of a latent"
        )
