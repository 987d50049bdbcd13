"""Proof of origin: the latent whose image is the suspect one, to the last grey level.

The owner of a generator knows every weight. An image that the generator made, and that nobody
touched since, has a latent z with |G(z) - x| below the rounding to 8 bits; no other image does, but
by a coincidence of some hundred numbers that hit some thousand. `latent_inversion` is the papers'
way to look for that latent (Adam, ten restarts) and often gets stuck. Here the residual is treated
as what it is, a nonlinear least-squares problem with few unknowns:

    minimize over z    1/2 || r(z) ||^2,    r = 127.5 (G(z) + 1) - u    (grey levels)

by Levenberg and Marquardt's method: with J the Jacobian of r, `[D, d]`, by forward mode (d passes
through the generator, all in one batch),

    z <- z - (J^T J + mu I)^-1 J^T r.

*   Levels 0 and 255 are inequalities, not equations: the encoder cuts there. A pixel at level 0
    where G is darker still has no residual (`residual`).
*   Every step tries several mu at once. A pass forward costs a d-th of a Jacobian, and a step that
    is rejected would throw a Jacobian away.
*   It is not convex, so there are several starts: the nearest images of a *bank* of own images with
    known latents first, then random ones. Pairs of image and start fill the places of one compiled
    batch; a place is free again when its start has succeeded or got stuck, or another start of the
    same image has succeeded.

The residual of an untouched image of ours is rounding: uniform in +-1/2, root mean square 0.29.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flipad_jax import data
from flipad_jax.detection.latent_inversion import LatentGenerator
from flipad_jax.generators import sampling
from flipad_jax.generators.sampling import TrainedGenerator

__all__ = [
    "Bank",
    "Regenerated",
    "RegenerationConfig",
    "RegenerationState",
    "init",
    "make_bank",
    "regenerate",
    "residual",
    "update",
]


@dataclasses.dataclass(frozen=True)
class RegenerationConfig:
    """Settings of the search.

    Attributes:
      num_starts: per image, at most; an image that was regenerated needs no more.
      max_iters: steps of one start.
      damping: of the first step, relative to the mean of the diagonal of J^T J.
      factors: what the damping is multiplied with in one step, all tried at once.
      patience: steps with a gain below `min_gain` after which a start is given up.
      min_gain: relative decrease of the squared residual that counts as progress.
      start_scale: standard deviation of random starts; below that of the latents, because a start
        near zero is in the middle of the images.
      max_levels: largest error of a pixel, in grey levels, that counts as regenerated.
      rmse_levels: root mean square error that does.
      places: pairs of image and start at once, for memory and speed only.
    Raises:
      ValueError: for numbers out of their range.
    """

    num_starts: int = 8
    max_iters: int = 60
    damping: float = 0.1
    factors: tuple[float, ...] = (0.1, 0.5, 3.0, 30.0)
    patience: int = 4
    min_gain: float = 1e-2
    start_scale: float = 0.7
    max_levels: float = 1.0
    rmse_levels: float = 0.5
    places: int = 16

    def __post_init__(self):
        if min(self.num_starts, self.max_iters, self.patience, self.places) < 1:
            raise ValueError(
                f"RegenerationConfig: {self.num_starts=}, {self.max_iters=}, {self.patience=}, "
                f"{self.places=} must be positive"
            )
        positive = (self.damping, self.start_scale, *self.factors)
        if not self.factors or not all(0 < value < math.inf for value in positive):
            raise ValueError(
                f"RegenerationConfig: {self.damping=}, {self.start_scale=} and {self.factors=} "
                "must be finite and positive"
            )
        if not (0 <= self.min_gain < 1 and self.max_levels >= 0 and self.rmse_levels >= 0):
            raise ValueError(
                f"RegenerationConfig: {self.min_gain=} must be in [0, 1), {self.max_levels=} and "
                f"{self.rmse_levels=} not negative"
            )


class RegenerationState(NamedTuple):
    """What the next step needs, of one pair of image and start.

    Attributes:
      z: `[d]` latent.
      cost: `[]` squared residual, in grey levels.
      damping: `[]` relative to the mean of the diagonal of J^T J.
      stuck: `[]` int32, steps without progress so far.
    """

    z: jax.Array
    cost: jax.Array
    damping: jax.Array
    stuck: jax.Array


def _levels(generator: TrainedGenerator | LatentGenerator, z: jax.Array) -> jax.Array:
    """The image of one latent in grey levels, not rounded, `[h, w, c]`."""
    if isinstance(generator, LatentGenerator):
        image = generator.apply(generator.params, z[None])[0]
    else:
        image = generator.module.apply(generator.variables, z[None])[0]
    return (image + 1) * 127.5


def residual(levels: jax.Array, image: jax.Array) -> jax.Array:
    """r of the module's formula: what a generated image misses a suspect one by.

    Args:
      levels: float, grey levels that are not rounded.
      image: the suspect one, float, whole grey levels.
    Returns:
      the difference; 0 where the image is at level 0 (255) and `levels` is below 0.5 (above 254.5).
    """
    difference = levels - image
    cut_off = ((image <= 0) & (levels < 0.5)) | ((image >= 255) & (levels > 254.5))
    return jnp.where(cut_off, 0.0, difference)


def init(
    generator: TrainedGenerator | LatentGenerator,
    image: jax.Array,
    z: jax.Array,
    config: RegenerationConfig,
) -> RegenerationState:
    """The state of one start.

    Args:
      generator: the model.
      image: `[h, w, c]` float32, whole grey levels.
      z: `[d]` where to start.
      config: settings.
    """
    cost = jnp.square(residual(_levels(generator, z), image)).sum()
    return RegenerationState(
        z, cost, jnp.asarray(config.damping, z.dtype), jnp.zeros((), jnp.int32)
    )


def update(
    generator: TrainedGenerator | LatentGenerator,
    image: jax.Array,
    state: RegenerationState,
    config: RegenerationConfig,
) -> RegenerationState:
    """One step of Levenberg and Marquardt's method for one pair; pure, made to be vmapped.

    Args:
      generator: the model.
      image: `[h, w, c]` float32, whole grey levels.
      state: from `init` or `update`.
      config: settings.
    """
    size = state.z.shape[0]
    levels, tangent = jax.linearize(functools.partial(_levels, generator), state.z)
    r = residual(levels, image)
    # One batch of d images; pixels that are cut off have no equation.
    rows = jax.vmap(tangent)(jnp.eye(size, dtype=state.z.dtype))
    rows = jnp.where((r == 0) & (levels != image), 0.0, rows).reshape(size, -1)
    precision = jax.lax.Precision.HIGHEST
    gram = jnp.dot(rows, rows.T, precision=precision)
    gradient = jnp.dot(rows, r.ravel(), precision=precision)
    values, vectors = jnp.linalg.eigh(gram)
    dampings = state.damping * jnp.asarray(config.factors, state.z.dtype)
    # Eigenvectors once, a division for every damping.
    turned = vectors.T @ gradient
    scaled = dampings[:, None] * jnp.maximum(values.mean(), 1e-12)
    steps = (turned / (jnp.maximum(values, 0) + scaled)) @ vectors.T
    candidates = state.z - steps
    made = jax.vmap(functools.partial(_levels, generator))(candidates)
    costs = jnp.square(residual(made, image)).reshape(len(candidates), -1).sum(axis=1)
    costs = jnp.where(jnp.isfinite(costs), costs, jnp.inf)
    best = jnp.argmin(costs)
    better = costs[best] < state.cost
    gained = costs[best] < (1 - config.min_gain) * state.cost
    damping = jnp.where(better, dampings[best], dampings[-1])
    return RegenerationState(
        z=jnp.where(better, candidates[best], state.z),
        cost=jnp.where(better, costs[best], state.cost),
        damping=jnp.clip(damping, 1e-8, 1e8),
        stuck=jnp.where(gained, 0, state.stuck + 1),
    )


_init_all = jax.jit(jax.vmap(init, in_axes=(None, 0, 0, None)), static_argnums=3)


@functools.partial(jax.jit, static_argnames="config")
def _update_all(generator, images, states, config):
    """A step of every place; the errors that decide whether it was the last one."""
    states = jax.vmap(update, in_axes=(None, 0, 0, None))(generator, images, states, config)
    made = jax.vmap(functools.partial(_levels, generator))(states.z)
    errors = jnp.abs(jnp.clip(jnp.round(made), 0, 255) - images)
    errors = errors.reshape(len(images), -1)
    return states, jnp.sqrt(jnp.square(errors).mean(axis=1)), errors.max(axis=1)


class Bank(NamedTuple):
    """Own images with their latents, where searches start.

    Attributes:
      latents: `[n, d]` float32.
      images: `[n, h, w, c]` uint8.
    """

    latents: np.ndarray
    images: np.ndarray


def make_bank(generator: TrainedGenerator, rng: jax.Array, num_images: int = 4096) -> Bank:
    """Images of the generator and the latents that made them.

    Args:
      generator: the model.
      rng: names the stream.
      num_images: how many.
    Raises:
      ValueError: if there shall be none.
    """
    if num_images < 1:
        raise ValueError(f"num_images={num_images}: expected a positive number")
    images = sampling.generate(generator, rng, num_images)
    latents = sampling.latents(rng, jnp.arange(num_images), generator.latent_dim)
    return Bank(np.asarray(latents), images)


class Regenerated(NamedTuple):
    """The best start of every image, n images; on the host.

    Attributes:
      latent: `[n, d]` float32.
      image: `[n, h, w, c]` uint8, what it makes.
      rmse: `[n]` float32, root mean square error in grey levels, of the rounded images.
      largest: `[n]` float32, largest error of a pixel, in grey levels.
      proved: `[n]` bool, both within what the settings allow.
      starts: `[n]` int, starts that were made.
      iterations: `[n]` int, steps over all of them.
    """

    latent: np.ndarray
    image: np.ndarray
    rmse: np.ndarray
    largest: np.ndarray
    proved: np.ndarray
    starts: np.ndarray
    iterations: np.ndarray


def _nearest(bank: Bank, images: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the nearest images of the bank, `[n, count]`, nearest first."""
    known = bank.images.reshape(len(bank.images), -1).astype(np.float32)
    squares = np.square(known).sum(axis=1)
    found = []
    for start in range(0, len(images), 256):
        x = images[start : start + 256].reshape(-1, known.shape[1]).astype(np.float32)
        distances = squares - 2 * x @ known.T
        found.append(np.argsort(distances, axis=1, kind="stable")[:, :count])
    return np.concatenate(found)


def regenerate(
    generator: TrainedGenerator | LatentGenerator,
    images: np.ndarray,
    rng: jax.Array,
    config: RegenerationConfig = RegenerationConfig(),
    *,
    bank: Bank | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Regenerated:
    """Look for the latents that make images.

    Args:
      generator: the model; a latent makes one image, whatever else is in the batch, and the layers
        know forward mode (DCGAN, WGAN-GP, EBGAN).
      images: `[n, h, w, c]` uint8, as they were found: nothing resized.
      rng: random start s of image i is drawn from `fold_in(fold_in(rng, i), s)`.
      config: settings.
      bank: own images with their latents; half of the starts, the first one among them, are the
        nearest of it.
      progress: called with images that are decided, and all.
    Returns:
      what was found, in the order of the images.
    Raises:
      ValueError: for images that are not uint8 or not of the generator's size, a bank of another
        size, or a generator that knows no forward mode.
    """
    data.check_images(images, shape=_checked_shape(generator))
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, as files hold them, got {images.dtype}")
    count = len(images)
    size = generator.latent_dim
    near = np.zeros((count, 0), int)
    if bank is not None and (
        bank.images.shape[1:] != images.shape[1:]
        or bank.latents.shape != (len(bank.images), size)
        or not len(bank.images)
    ):
        raise ValueError(
            f"the bank has latents {bank.latents.shape} and images {bank.images.shape}, expected "
            f"some, [n, {size}] and [n, {', '.join(map(str, images.shape[1:]))}]"
        )
    if bank is not None and count:
        near = _nearest(bank, images, min(-(-config.num_starts // 2), len(bank.latents)))

    def start_at(index: int, number: int) -> np.ndarray:
        # Nearest of the bank and random ones in turn.
        place = number // 2
        if bank is not None and number % 2 == 0 and place < near.shape[1]:
            return bank.latents[near[index, place]]
        own = jax.random.fold_in(jax.random.fold_in(rng, index), number)
        return np.asarray(config.start_scale * jax.random.normal(own, (size,), jnp.float32))

    best = Regenerated(
        np.zeros((count, size), np.float32),
        np.zeros(images.shape, np.uint8),
        np.full(count, np.inf, np.float32),
        np.full(count, np.inf, np.float32),
        np.zeros(count, bool),
        np.zeros(count, int),
        np.zeros(count, int),
    )
    _search(generator, images, start_at, config, best, progress)
    for start in range(0, count, 256):
        z = jnp.asarray(best.latent[start : start + 256])
        best.image[start : start + 256] = np.asarray(_round_all(generator, z))
    return best


@jax.jit
def _round_all(generator, z):
    made = jax.vmap(functools.partial(_levels, generator))(z)
    return jnp.clip(jnp.round(made), 0, 255).astype(jnp.uint8)


def _checked_shape(generator: TrainedGenerator | LatentGenerator) -> tuple[int, int, int]:
    """Shape of its images; refuses what cannot be differentiated, before anything is computed."""
    z = jax.ShapeDtypeStruct((generator.latent_dim,), jnp.float32)
    if isinstance(generator, LatentGenerator):
        batch = jax.ShapeDtypeStruct((1, generator.latent_dim), jnp.float32)
        made = jax.eval_shape(generator.apply, generator.params, batch).shape
        if len(made) != 4 or made[0] != 1:
            raise ValueError(
                f"the generator makes {made} of one latent, expected one image [1, h, w, c]"
            )

    def derivative(generator, z):
        return jax.jvp(functools.partial(_levels, generator), (z,), (z,))[1]

    try:
        return jax.jit(derivative).lower(generator, z).out_info.shape
    except TypeError as error:
        raise ValueError(
            "the generator knows no forward-mode derivative, which the Jacobian is made of "
            f"(of this library: DCGAN, WGAN-GP, EBGAN): {str(error).splitlines()[0]}"
        ) from error


def _search(generator, images, start_at, config, best: Regenerated, progress) -> None:
    """Fills `best`: places of a batch, refilled from a queue of starts."""
    count = len(images)
    if not count:
        return
    places = min(config.places, count * config.num_starts)
    # Every image's first start before any image's second.
    queue = ((i, s) for s in range(config.num_starts) for i in range(count))
    running: list[tuple[int, int] | None] = [None] * places
    left = np.zeros(places, int)
    shown = np.zeros((places, *images.shape[1:]), np.float32)
    latents = np.zeros((places, generator.latent_dim), np.float32)
    remaining = np.full(count, config.num_starts)
    decided = 0
    states, asked = None, None
    while True:
        fresh = _refill(queue, running, best.proved, places)
        if fresh:
            for place, (index, number) in fresh:
                running[place] = (index, number)
                left[place] = config.max_iters
                shown[place] = images[index]
                latents[place] = start_at(index, number)
                best.starts[index] += 1
            asked = jnp.array(shown)  # a copy, moved when it changes and not in every step
            states = _enter(generator, asked, latents, states, [p for p, _ in fresh], config)
        if not any(running):
            break
        states, rmse, largest = _update_all(generator, asked, states, config)
        rmse, largest, stuck = jax.device_get((rmse, largest, states.stuck))
        z = None
        for place, pair in enumerate(running):
            if pair is None:
                continue
            index = pair[0]
            left[place] -= 1
            best.iterations[index] += 1
            if rmse[place] < best.rmse[index]:
                z = np.asarray(states.z) if z is None else z
                best.latent[index] = z[place]
                best.rmse[index], best.largest[index] = rmse[place], largest[place]
            done = rmse[place] <= config.rmse_levels and largest[place] <= config.max_levels
            if done and not best.proved[index]:
                best.proved[index] = True
                decided += 1
            if done or left[place] == 0 or stuck[place] >= config.patience:
                running[place] = None
                remaining[index] -= 1
                if remaining[index] == 0 and not best.proved[index]:
                    decided += 1
        # Another start of the same image has succeeded.
        for place, pair in enumerate(running):
            if pair is not None and best.proved[pair[0]]:
                running[place] = None
        if progress is not None:
            progress(decided, count)


def _refill(
    queue: Iterator[tuple[int, int]], running: list, proved: np.ndarray, places: int
) -> list[tuple[int, tuple[int, int]]]:
    """What enters free places next; starts of images that are proved are left out."""
    fresh = []
    for place in range(places):
        if running[place] is None:
            pair = next((pair for pair in queue if not proved[pair[0]]), None)
            if pair is None:
                break
            fresh.append((place, pair))
    return fresh


def _enter(generator, shown, latents, states, entering: list[int], config) -> RegenerationState:
    """New states in the places that are entered, the others as they were."""
    new = _init_all(generator, shown, jnp.array(latents), config)
    if states is None:
        return new
    mask = np.zeros(len(shown), bool)
    mask[entering] = True
    choose: Callable[[Any, Any], Any] = lambda a, b: jnp.where(  # noqa: E731
        mask.reshape(-1, *[1] * (a.ndim - 1)), a, b
    )
    return jax.tree.map(choose, new, states)
