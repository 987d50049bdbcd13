"""Proof of origin: the latent whose image is the suspect one, to the last grey level.

The owner of a generator knows every weight. An image that the generator made, and that nobody
touched since, has a latent z with |G(z) - x| below the rounding to 8 bits; no other image does, but
by a coincidence of some hundred numbers that hit some thousand. `latent_inversion` is the papers'
way to look for that latent (Adam, ten restarts) and often gets stuck. Here the residual is treated
as what it is, a nonlinear least-squares problem with few unknowns,

    minimize over z    1/2 || r(z) ||^2  (+ a small multiple of || z ||^2),

by Levenberg and Marquardt's method: with J the Jacobian of r, `[D, d]`, by forward mode (d passes
through the generator, all in one batch),

    z <- z - (J^T J + mu I)^-1 J^T r.

*   **First in target space, then in grey levels.** With r = 127.5 (G(z) + 1) - u, what is in the
    image's levels u, a search gets stuck where tanh is flat: a pixel that is white and should be
    black has no slope. So a search begins with the targets o = atanh(x) that FLIPAD inverts as
    well, r = 127.5 (atanh G(z) - o): without tanh a generator of ReLUs is piecewise linear in z. At
    the latent that is looked for both residuals are zero (up to rounding). Once the image is near,
    or nothing is gained any more, it goes on in levels, where rounding weighs the same for every
    pixel. (Of 16 digits of `digits_dcgan_1` one start at zero regenerates 50 % in levels alone and
    94 % so: `python benchmarks/regeneration.py --num_images=16`.)
*   Levels 0 and 255 are inequalities, not equations: the encoder cuts there. A pixel at level 0
    where G is darker still has no residual (`residual`).
*   Every step tries several mu at once. A pass forward costs a d-th of a Jacobian, and a step that
    is rejected would throw a Jacobian away.
*   A Jacobian serves as long as it is good for something (`linearize_every`, `renew_gain`): after
    a step along s it becomes, by Broyden's formula, the nearest matrix that maps s to what the
    residual really did. Steps cost hardly anything then; what they find is held to the same test.
*   It is not convex, so there are several starts: zero, in the middle of all images, then random
    ones; or first the nearest images of a *bank* of own images with known latents. Pairs of image
    and start fill the places of one compiled batch; a place is free again when its start has
    succeeded or got stuck, or another start of the same image has succeeded.
*   What happened to the image since it was made can be part of the model (`processing`): its
    unknowns, the width of a blur say, are searched together with z.

The residual of an untouched image of ours is rounding: uniform in +-1/2, root mean square 0.29.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from flipad_jax import data
from flipad_jax.detection import processing as kinds
from flipad_jax.detection.latent_inversion import LatentGenerator
from flipad_jax.detection.processing import Codec, Processing
from flipad_jax.generators import sampling
from flipad_jax.generators.sampling import TrainedGenerator

__all__ = [
    "Bank",
    "Regenerated",
    "RegenerationConfig",
    "RegenerationState",
    "Repeated",
    "check_generator",
    "init",
    "linearize",
    "make_bank",
    "make_images",
    "regenerate",
    "repeat",
    "residual",
    "target_residual",
    "update",
    "weights_sha256",
]

# Beyond it float32 has no digits left for atanh: |o| up to 7.6.
_EDGE = 1 - 1e-6
_PROBES = 4  # latents at which a generator is looked at before a search
_NOT_COMPRESSED = "not compressed"  # what is said where there was a codec to replay and no need to


@dataclasses.dataclass(frozen=True)
class RegenerationConfig:
    """Settings of the search.

    Attributes:
      num_starts: per image, at most; an image that was regenerated needs no more.
      max_iters: Jacobians of one start.
      linearize_every: steps that share a Jacobian, at most; 1 is Levenberg and Marquardt's method.
      renew_gain: a step that lowers the squared residual by less than this share is the last one
        with its Jacobian.
      damping: of the first step, relative to the mean of the diagonal of J^T J.
      factors: what the damping is multiplied with in one step, all tried at once.
      targets: whether a search begins in target space.
      slack: grey levels from 0 (and from 255) within which a pixel says in target space no more
        than "this dark (bright) or beyond". Rounding asks for 0.5; noise and lossy codecs for as
        much as they move a pixel.
      switch_levels: root mean square error, in grey levels, below which a search goes on in levels.
      patience: steps with a Jacobian of their own and a gain below `min_gain` after which a start
        is given up; half of it sends a search from targets to levels.
      min_gain: relative decrease of the squared residual that counts as progress; in target space
        three times that.
      far_levels: root mean square error, in grey levels, above which a search in levels has to
        hurry: half the patience, and `far_gain`. An image of ours is found long before it crawls
        there; what is not ours comes to rest. A processing that leaves own images further away
        raises it to its slack.
      far_gain: takes the place of a smaller `min_gain` there.
      start_scale: standard deviation of random starts; below that of the latents, because a start
        near zero is in the middle of the images.
      prior: weight of ||z||^2 beside the squared residual in target space, a hundredth of it in
        levels: latents are N(0, I), and what the image does not say of them stays there.
      max_levels: largest error of a pixel, in grey levels, that counts as regenerated.
      rmse_levels: root mean square error that does.
      places: pairs of image and start at once, for memory and speed; of an image several starts
        may then run side by side, and more of them be made than it needs. 0: 16, on a CPU one: a
        Jacobian is a batch of its own, and more of them leave the cache (a step of `digits_dcgan_1`
        takes the same 21 ms of processor time either way, and 17 more to get and give back memory).
    Raises:
      ValueError: for numbers out of their range.
    """

    num_starts: int = 4
    max_iters: int = 120
    linearize_every: int = 20
    renew_gain: float = 0.05
    damping: float = 0.1
    factors: tuple[float, ...] = (0.1, 0.5, 3.0, 30.0)
    targets: bool = True
    slack: float = 0.5
    switch_levels: float = 1.0
    patience: int = 8
    min_gain: float = 3e-3
    far_levels: float = 4.0
    far_gain: float = 2e-2
    start_scale: float = 0.7
    prior: float = 10.0
    max_levels: float = 1.0
    rmse_levels: float = 0.5
    places: int = 0

    def __post_init__(self):
        if min(self.num_starts, self.max_iters, self.patience) < 1 or self.places < 0:
            raise ValueError(
                f"RegenerationConfig: {self.num_starts=}, {self.max_iters=}, {self.patience=} must "
                f"be positive and {self.places=} not negative"
            )
        positive = (self.damping, self.start_scale, *self.factors)
        if not self.factors or not all(0 < value < math.inf for value in positive):
            raise ValueError(
                f"RegenerationConfig: {self.damping=}, {self.start_scale=} and {self.factors=} "
                "must be finite and positive"
            )
        if self.linearize_every < 1 or not 0 <= self.renew_gain <= 1:
            raise ValueError(
                f"RegenerationConfig: {self.linearize_every=} must be positive and "
                f"{self.renew_gain=} in [0, 1]"
            )
        if not 0 <= self.min_gain < 1 / 3:
            raise ValueError(f"RegenerationConfig: {self.min_gain=} must be in [0, 1/3)")
        if not 0 <= self.far_gain < 1:
            raise ValueError(f"RegenerationConfig: {self.far_gain=} must be in [0, 1)")
        if not 0 < self.slack < 127:
            raise ValueError(f"RegenerationConfig: {self.slack=} must be in (0, 127) grey levels")
        if not 0 <= self.prior < math.inf:
            raise ValueError(f"RegenerationConfig: {self.prior=} must be finite and not negative")
        levels = (self.max_levels, self.rmse_levels, self.switch_levels, self.far_levels)
        if not all(v >= 0 for v in levels):
            raise ValueError(
                f"RegenerationConfig: {self.max_levels=}, {self.rmse_levels=}, "
                f"{self.switch_levels=} and {self.far_levels=} must not be negative"
            )


class RegenerationState(NamedTuple):
    """What the next step needs, of one pair of image and start.

    Attributes:
      z: `[d]` latent, behind it the unknowns of the processing.
      damping: `[]` relative to the mean of the diagonal of J^T J.
      in_targets: `[]` bool, whether the residual is that of target space.
      stuck: `[]` int32, steps without progress so far; far from the image each counts twice.
      made: `[h, w, c]` the image of z, in [-1, 1].
      r: `[D]` its residual.
      jacobian: `[d, D]` of r at z, transposed, or what Broyden's formula has made of it since.
      age: `[]` int32, steps since it was computed.
      due: `[]` bool, whether it has to be computed before the next step.
    """

    z: jax.Array
    damping: jax.Array
    in_targets: jax.Array
    stuck: jax.Array
    made: jax.Array
    r: jax.Array
    jacobian: jax.Array
    age: jax.Array
    due: jax.Array


Model = tuple[TrainedGenerator | LatentGenerator, Processing | None]


def _exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Traces it without the short products that accelerators take by default: a level is 2^-8 of
    the scale, and their factors have no more digits than that."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return wrapped


@_exactly
def _image(model: Model, z: jax.Array) -> jax.Array:
    """The image of one latent, and of the unknowns behind it, in [-1, 1], not rounded."""
    generator, processing = model
    latent = z[: generator.latent_dim]
    if isinstance(generator, LatentGenerator):
        images = generator.apply(generator.params, latent[None])
    else:
        images = cast(jax.Array, generator.module.apply(generator.variables, latent[None]))
    if processing is not None:
        images = processing.apply(images, z[generator.latent_dim :])
    return images[0]


def _levels(image: jax.Array) -> jax.Array:
    return (image + 1) * 127.5


def residual(levels: jax.Array, image: jax.Array) -> jax.Array:
    """r of the module's second formula: what a generated image misses a suspect one by.

    Args:
      levels: float, grey levels that are not rounded.
      image: the suspect one, float, whole grey levels.
    Returns:
      the difference; 0 where the image is at level 0 (255) and `levels` is below 0.5 (above 254.5).
    """
    difference = levels - image
    cut_off = ((image <= 0) & (levels < 0.5)) | ((image >= 255) & (levels > 254.5))
    return jnp.where(cut_off, 0.0, difference)


def target_residual(made: jax.Array, image: jax.Array, slack: float) -> jax.Array:
    """The same difference in target space, 127.5 (atanh(made) - o).

    Args:
      made: float, a generated image in [-1, 1].
      image: the suspect one, float, whole grey levels.
      slack: `RegenerationConfig.slack`.
    Returns:
      the difference, in units that are grey levels where an image is grey; 0 where the image is
      within `slack` of level 0 (255) and `made` is as dark (bright) as that or more.
    """
    most = 1 - slack / 127.5
    suspect = image / 127.5 - 1
    target = jnp.arctanh(jnp.clip(suspect, -most, most))
    difference = jnp.arctanh(jnp.clip(made, -_EDGE, _EDGE)) - target
    cut_off = ((suspect <= -most) & (made < -most)) | ((suspect >= most) & (made > most))
    return jnp.where(cut_off, 0.0, 127.5 * difference)


def _residual(made, image, in_targets, slack):
    return jnp.where(
        in_targets, target_residual(made, image, slack), residual(_levels(made), image)
    )


def init(z: jax.Array, image: jax.Array, config: RegenerationConfig) -> RegenerationState:
    """The state of one start, whose Jacobian is due.

    Args:
      z: `[d]` where to start.
      image: `[h, w, c]` the suspect one; only its shape matters here.
      config: settings.
    """
    return RegenerationState(
        z,
        jnp.asarray(config.damping, z.dtype),
        jnp.asarray(config.targets),
        jnp.zeros((), jnp.int32),
        jnp.zeros(image.shape, z.dtype),
        jnp.zeros(image.size, z.dtype),
        jnp.zeros((z.size, image.size), z.dtype),
        jnp.zeros((), jnp.int32),
        jnp.asarray(True),
    )


def _linearized(function, z):
    """`jax.linearize`, also of what knows reverse mode only.

    A map of cotangents is linear, and its transpose is the map of tangents.
    """
    value, tangent = jax.linearize(function, z)
    try:
        # JAX says no as late as here, and of a single tangent not before it compiles.
        jax.eval_shape(jax.vmap(tangent), z[None])
    except TypeError:
        value, pullback = jax.vjp(function, z)
        push = jax.linear_transpose(lambda y: pullback(y)[0], value)
        return value, lambda tangent: push(tangent)[0]
    return value, tangent


def linearize(
    model: Model, image: jax.Array, state: RegenerationState, config: RegenerationConfig
) -> RegenerationState:
    """Image, residual and Jacobian at the state's latent; pure, made to be vmapped.

    Args:
      model: the generator, and the processing or None.
      image: `[h, w, c]` float32, whole grey levels.
      state: from `init` or `update`.
      config: settings.
    """
    made, tangent = _linearized(functools.partial(_image, model), state.z)
    # A function of each pixel alone: its derivative is a diagonal matrix times the image's.
    r, slope = jax.jvp(
        lambda made: _residual(made, image, state.in_targets, config.slack),
        (made,),
        (jnp.ones_like(made),),
    )
    size = state.z.shape[0]
    rows = jax.vmap(tangent)(jnp.eye(size, dtype=state.z.dtype))  # one batch of d images
    return state._replace(
        made=made,
        r=r.ravel(),
        jacobian=(rows * slope).reshape(size, -1),
        age=jnp.zeros_like(state.age),
        due=jnp.zeros_like(state.due),
    )


@_exactly
def update(
    model: Model,
    image: jax.Array,
    state: RegenerationState,
    config: RegenerationConfig,
) -> tuple[RegenerationState, jax.Array]:
    """One step of Levenberg and Marquardt's method for one pair; pure, made to be vmapped.

    Args:
      model: the generator, and the processing or None.
      image: `[h, w, c]` float32, whole grey levels.
      state: from `linearize`, or from `update` if its Jacobian is not due.
      config: settings.
    Returns:
      the state, and what it makes: `[h, w, c]` float32 whole grey levels.
    """
    size = state.z.shape[0]
    r, jacobian = state.r, state.jacobian
    # Of the latent; the unknowns of a processing are no draws from N(0, 1).
    latent = jnp.arange(size) < model[0].latent_dim
    prior = latent * jnp.where(state.in_targets, config.prior, 0.01 * config.prior)
    gram = jacobian @ jacobian.T + prior * jnp.eye(size, dtype=r.dtype)
    gradient = jacobian @ r + prior * state.z
    values, vectors = jnp.linalg.eigh(gram)
    dampings = state.damping * jnp.asarray(config.factors, state.z.dtype)
    # Eigenvectors once, a division for every damping.
    turned = vectors.T @ gradient
    scaled = dampings[:, None] * jnp.maximum(values.mean(), 1e-12)
    steps = (turned / (jnp.maximum(values, 0) + scaled)) @ vectors.T
    candidates = state.z - steps
    tried = jax.vmap(functools.partial(_image, model))(candidates)
    residuals = jax.vmap(
        lambda made: _residual(made, image, state.in_targets, config.slack).ravel()
    )(tried)
    costs = jnp.square(residuals).sum(axis=1) + jnp.square(candidates) @ prior
    costs = jnp.where(jnp.isfinite(costs), costs, jnp.inf)
    before = jnp.square(r).sum() + jnp.square(state.z) @ prior
    best = jnp.argmin(costs)
    better = costs[best] < before
    age = state.age + 1
    own_jacobian = state.age == 0
    made = jnp.where(better, tried[best], state.made)
    levels = jnp.clip(jnp.round(_levels(made)), 0, 255)
    rmse = jnp.sqrt(jnp.square(levels - image).mean())
    near = rmse < config.switch_levels
    far = ~state.in_targets & (rmse > config.far_levels)
    min_gain = jnp.where(state.in_targets, 3 * config.min_gain, config.min_gain)
    far_gain = max(config.far_gain, config.min_gain)
    gained = costs[best] < (1 - jnp.where(far, far_gain, min_gain)) * before
    # A borrowed Jacobian that leads nowhere says nothing about the place.
    stuck = jnp.where(gained, 0, state.stuck + own_jacobian * (1 + far))
    switch = state.in_targets & (near | (stuck >= -(-config.patience // 2)))
    rejected = jnp.where(own_jacobian, dampings.max(), state.damping)
    damping = jnp.clip(jnp.where(better, dampings[best], rejected), 1e-8, 1e8)
    # Broyden: the least change after which the matrix says what the step has shown.
    step = candidates[best] - state.z
    unforeseen = residuals[best] - r - step @ jacobian
    changed = jacobian + jnp.outer(step, unforeseen) / jnp.maximum(step @ step, 1e-30)
    slow = ~(costs[best] < (1 - config.renew_gain) * before)
    state = RegenerationState(
        z=jnp.where(better, candidates[best], state.z),
        # It is near: a step in levels begins almost undamped.
        damping=jnp.where(switch, jnp.minimum(config.damping, 1e-2), damping),
        in_targets=state.in_targets & ~switch,
        stuck=jnp.where(switch, 0, stuck),
        made=made,
        r=jnp.where(better, residuals[best], r),
        jacobian=jnp.where(better, changed, jacobian),
        age=age,
        due=slow | switch | (age >= config.linearize_every),
    )
    return state, levels


@functools.partial(jax.jit, static_argnames="config", donate_argnames="states")
def _linearize_due(model, images, states, config):
    """A Jacobian for every place whose own is due."""
    fresh = jax.vmap(functools.partial(linearize, config=config), in_axes=(None, 0, 0))(
        model, images, states
    )
    return jax.tree.map(
        lambda new, old: jnp.where(states.due.reshape(-1, *[1] * (old.ndim - 1)), new, old),
        fresh,
        states,
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="states")
def _update_all(model, images, states, config):
    """A step of every place; the errors that decide whether it was the last one."""
    step = functools.partial(update, config=config)
    states, levels = jax.vmap(step, in_axes=(None, 0, 0))(model, images, states)
    errors = jnp.abs(levels - images).reshape(len(images), -1)
    return states, jnp.sqrt(jnp.square(errors).mean(axis=1)), errors.max(axis=1)


def make_images(generator: TrainedGenerator | LatentGenerator, latents: np.ndarray) -> np.ndarray:
    """What latents make, before any processing.

    Args:
      generator: the model.
      latents: `[n, d]`.
    Returns:
      `[n, h, w, c]` uint8, rounded to the nearest grey level.
    """
    return _made((generator, None), np.asarray(latents, np.float32))


def _made(model: Model, z: np.ndarray) -> np.ndarray:
    """uint8 images of latents, and of the unknowns behind them."""
    blocks = []
    for start in range(0, len(z), 256):
        block = z[start : start + 256]
        blocks.append(np.asarray(_make_all(model, jnp.asarray(data.filled(block))))[: len(block)])
    return np.concatenate(blocks) if blocks else np.zeros((0, *check_generator(model[0])), np.uint8)


@jax.jit
def _make_all(model, z):
    made = jax.vmap(functools.partial(_image, model))(z)
    return jnp.clip(jnp.round(_levels(made)), 0, 255).astype(jnp.uint8)


class Bank(NamedTuple):
    """Own images with their latents, where searches start.

    Attributes:
      latents: `[n, d]` float32.
      images: `[n, h, w, c]` uint8.
    """

    latents: np.ndarray
    images: np.ndarray


def make_bank(
    generator: TrainedGenerator | LatentGenerator, rng: jax.Array, num_images: int = 4096
) -> Bank:
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
    latents = np.asarray(sampling.latents(rng, jnp.arange(num_images), generator.latent_dim))
    return Bank(latents, make_images(generator, latents))


class Regenerated(NamedTuple):
    """The best start of every image, n images; on the host.

    Attributes:
      latent: `[n, d]` float32.
      unknowns: `[n, p]` float32, of the processing; p = 0 without one.
      image: `[n, h, w, c]` uint8, what the latent makes, before any processing.
      processed: `[n, h, w, c]` uint8, the same after it, which was compared: `image` without one.
      rmse: `[n]` float32, root mean square error of `processed` in grey levels.
      largest: `[n]` float32, largest error of a pixel, in grey levels.
      misfit: `[n]` float32, mean square of r (in levels, not rounded) over the pixels that are
        equations; under "ours and untouched" that of rounding, 1/12.
      equations: `[n]` int, pixels whose level is not cut off at 0 or 255.
      proved: `[n]` bool, both within what the settings allow.
      starts: `[n]` int, starts that were made.
      iterations: `[n]` int, Jacobians over all of them.
      replayed: n words on what was replayed, empty if nothing was.
    """

    latent: np.ndarray
    unknowns: np.ndarray
    image: np.ndarray
    processed: np.ndarray
    rmse: np.ndarray
    largest: np.ndarray
    misfit: np.ndarray
    equations: np.ndarray
    proved: np.ndarray
    starts: np.ndarray
    iterations: np.ndarray
    replayed: tuple[str, ...]


def _nearest(bank: Bank, images: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the nearest images of the bank in target space, `[n, count]`, nearest first."""

    def targets(x: np.ndarray) -> np.ndarray:
        flat = x.reshape(len(x), -1).astype(np.float32)
        return np.arctanh(np.clip(flat / 127.5 - 1, -0.99, 0.99))

    found = []
    for start in range(0, len(images), 256):
        wanted = targets(images[start : start + 256])
        distances = []
        for first in range(0, len(bank.images), 512):  # Their targets together may be a gigabyte.
            known = targets(bank.images[first : first + 512])
            distances.append(np.square(known).sum(axis=1) - 2 * wanted @ known.T)
        order = np.argsort(np.concatenate(distances, axis=1), axis=1, kind="stable")
        found.append(order[:, :count])
    return np.concatenate(found)


def regenerate(
    generator: TrainedGenerator | LatentGenerator,
    images: np.ndarray,
    rng: jax.Array,
    config: RegenerationConfig = RegenerationConfig(),
    *,
    bank: Bank | None = None,
    processing: Processing | None = None,
    names: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Regenerated:
    """Look for the latents that make images.

    Args:
      generator: the model; a latent makes one image, whatever else is in the batch.
      images: `[n, h, w, c]` uint8, as they were found: nothing resized.
      rng: random start s of image i is drawn from `fold_in(fold_in(rng, names[i]), s)`.
      config: settings.
      bank: own images with their latents; every other start, the first one among them, is the next
        nearest of it. The first of the others is zero.
      processing: what may have happened to the images; its slack takes the place of the settings'.
        Start s takes the next of its own starts for the unknowns.
      names: `[n]` in [0, 2^32), of the images' random streams, so that what is found of an image
        does not depend on the others; their places by default.
      progress: called with images that are decided, and all; then, from zero on, with those of a
        codec's second search.
    Returns:
      what was found, in the order of the images.
    Raises:
      ValueError: for images that are not uint8 or not of the generator's size, a bank of another
        size, another number of names, or a generator that is not differentiable, makes numbers that
        are not finite, or another image of the same latent when it is called again.
    """
    images = np.asarray(data.check_images(images, shape=check_generator(generator)))
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, as files hold them, got {images.dtype}")
    count = len(images)
    if names is None:
        names = range(count)
    elif len(names) != count:
        raise ValueError(f"{len(names)} names for {count} images")
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
    unknown_starts: tuple[tuple[float, ...], ...] = ((),)
    if processing is not None:
        far_levels = max(config.far_levels, processing.slack)
        config = dataclasses.replace(config, slack=processing.slack, far_levels=far_levels)
        unknown_starts = processing.starts
    unknowns = len(unknown_starts[0])

    def start_at(index: int, number: int) -> np.ndarray:
        place = number // 2
        if bank is not None and number % 2 == 0 and place < near.shape[1]:
            latent = bank.latents[near[index, place]]
        elif number == (0 if bank is None else 1):
            latent = np.zeros(size, np.float32)
        else:
            own = jax.random.fold_in(jax.random.fold_in(rng, int(names[index])), number)
            latent = np.asarray(config.start_scale * jax.random.normal(own, (size,), jnp.float32))
        start = np.asarray(unknown_starts[number % len(unknown_starts)], np.float32)
        return np.concatenate([latent, start])

    best = Regenerated(
        np.zeros((count, size), np.float32),
        np.zeros((count, unknowns), np.float32),
        np.zeros(images.shape, np.uint8),
        np.zeros(images.shape, np.uint8),
        np.full(count, np.inf, np.float32),
        np.full(count, np.inf, np.float32),
        np.full(count, np.inf, np.float32),
        np.zeros(count, int),
        np.zeros(count, bool),
        np.zeros(count, int),
        np.zeros(count, int),
        ("",) * count,
    )
    model = (generator, processing)
    _search(model, images, start_at, config, best, progress)
    _polish(model, images, config, best)
    _describe(model, images, config, best)
    if processing is not None and processing.codec is not None:
        return _through_codec(generator, processing, images, config, best, progress)
    return best


_POLISH_STEPS = 60
_POLISH_EVERY = 8  # steps with a Jacobian: along flat directions an older one leads nowhere


def _polish(model: Model, images: np.ndarray, config: RegenerationConfig, best: Regenerated):
    """A few more steps for what is proved: a search stops when it has succeeded, and what is left
    is then more than rounding."""
    config = dataclasses.replace(
        config,
        damping=1e-3,
        prior=0.0,
        targets=False,
        renew_gain=0.0,
        linearize_every=min(config.linearize_every, _POLISH_EVERY),
    )
    size, places = best.latent.shape[1], _num_places(config)
    proved = np.flatnonzero(best.proved)
    for start in range(0, len(proved), places):
        indices = proved[start : start + places]
        # Filled up with the first one: one program, whatever is left for the last batch.
        filled = np.concatenate([indices, np.full(places - len(indices), indices[0])])
        z = np.concatenate([best.latent[filled], best.unknowns[filled]], axis=1)
        asked = jnp.asarray(images[filled], jnp.float32)
        states = _init_all(jnp.asarray(z), asked, config)
        for _ in range(_POLISH_STEPS):
            if np.asarray(states.due).any():
                states = _linearize_due(model, asked, states, config)
            states, rmse, largest = _update_all(model, asked, states, config)
            if (np.asarray(states.stuck) > 1).all():
                break
        found, rmse, largest = jax.device_get((states.z, rmse, largest))
        for place, index in enumerate(indices):
            if _is_proved(rmse[place], largest[place], config):
                best.latent[index], best.unknowns[index] = np.split(found[place], [size])


@functools.partial(jax.jit, static_argnames="config")
def _init_all(z: jax.Array, images: jax.Array, config: RegenerationConfig) -> RegenerationState:
    return jax.vmap(functools.partial(init, config=config))(z, images)


def _num_places(config: RegenerationConfig) -> int:
    return config.places or (1 if jax.default_backend() == "cpu" else 16)


def _describe(
    model: Model, images: np.ndarray, config: RegenerationConfig, best: Regenerated
) -> None:
    """Fills in what the latents make, and how far it is off before and after rounding.

    The errors are those of the images that are returned: another program may round a tie in the
    other direction than the search did.
    """
    for start in range(0, len(images), 256):
        part = slice(start, start + 256)
        z = np.concatenate([best.latent[part], best.unknowns[part]], axis=1)
        described = jax.device_get(
            _describe_all(
                model, jnp.asarray(data.filled(images[part])), jnp.asarray(data.filled(z))
            )
        )
        before, after, misfit, equations = (values[: len(z)] for values in described)
        best.image[part], best.processed[part] = before, after
        best.misfit[part], best.equations[part] = misfit, equations
    errors = np.abs(best.processed.astype(np.float64) - images)
    found = np.isfinite(best.rmse)  # else no start has made an image
    best.rmse[found] = np.sqrt(np.square(errors).mean(axis=(1, 2, 3)))[found]
    best.largest[found] = errors.max(axis=(1, 2, 3))[found]
    best.proved[:] = [_is_proved(*pair, config) for pair in zip(best.rmse, best.largest)]


def _through_codec(
    generator: TrainedGenerator | LatentGenerator,
    processing: Processing,
    images: np.ndarray,
    config: RegenerationConfig,
    first: Regenerated,
    progress: Callable[[int, int], None] | None,
) -> Regenerated:
    """The second search, with a codec in the model, of what the first one has not proved; then the
    real codec."""
    codec = cast(Codec, processing.codec)
    todo = np.flatnonzero(~first.proved & np.isfinite(first.rmse))  # else there is no image
    guesses = [codec.guess(first.image[index], images[index]) for index in todo]
    words = [_NOT_COMPRESSED] * len(images)
    unknowns = np.zeros((len(images), codec.num_unknowns), np.float32)
    whole = first._replace(unknowns=unknowns, replayed=tuple(words))
    if not len(todo):
        return whole
    rows: dict[str, Any] = {
        name: field[todo] for name, field in whole._asdict().items() if name != "replayed"
    }
    part = whole._replace(**rows)
    part.rmse[:], part.largest[:] = np.inf, np.inf
    starts = part.latent.copy()
    config = dataclasses.replace(config, targets=False, num_starts=len(guesses[0]), damping=1e-2)

    def start_at(index: int, number: int) -> np.ndarray:
        return np.concatenate([starts[index], np.asarray(guesses[index][number], np.float32)])

    # Without the guesses: it is part of what is compiled.
    no_start = ((0.0,) * codec.num_unknowns,)
    model = (generator, Processing(processing.name, codec.apply, no_start, enough=0.0))
    _search(model, images[todo], start_at, config, part, progress)
    _describe(model, images[todo], config, part)
    found = np.flatnonzero(np.isfinite(part.rmse))  # of the others the first search's image stays
    for place in found:
        index = todo[place]
        made, words[index] = codec.replay(part.image[place], part.unknowns[place])
        errors = made.astype(np.float64) - images[index]
        part.processed[place] = made
        part.rmse[place] = np.sqrt(np.square(errors).mean())
        part.largest[place] = np.abs(errors).max()
        part.proved[place] = _is_proved(part.rmse[place], part.largest[place], config)
    part = part._replace(starts=first.starts[todo])  # guesses are no starts
    for name in rows:
        getattr(whole, name)[todo[found]] = getattr(part, name)[found]
    return whole._replace(replayed=tuple(words))


def _is_proved(rmse: float, largest: float, config: RegenerationConfig) -> bool:
    return bool(rmse <= config.rmse_levels and largest <= config.max_levels)


@jax.jit
def _describe_all(model, images, z):
    """Images of latents before and after processing, uint8; misfit and equations of the latter."""

    def levels(model):
        return _levels(jax.vmap(functools.partial(_image, model))(z))

    def whole(levels):
        return jnp.clip(jnp.round(levels), 0, 255).astype(jnp.uint8)

    after = levels(model)
    r = residual(after, images.astype(jnp.float32)).reshape(len(z), -1)
    counts = ((images > 0) & (images < 255)).reshape(len(z), -1)
    equations = counts.sum(axis=1)
    misfit = jnp.where(counts, jnp.square(r), 0).sum(axis=1) / jnp.maximum(equations, 1)
    return whole(levels((model[0], None))), whole(after), misfit, equations


@jax.jit
def _probe(model, z, directions):
    """Images of latents `[n, d]`, and their derivatives in one direction each."""

    def probe(z, direction):
        made, tangent = _linearized(functools.partial(_image, model), z)
        return made, tangent(direction)

    return jax.vmap(probe)(z, directions)


def check_generator(generator: TrainedGenerator | LatentGenerator) -> tuple[int, int, int]:
    """The shape `(h, w, c)` of a generator's images, if it can be searched at all.

    Raises:
      ValueError: if it makes something else than one image of one latent, is not differentiable or
        not deterministic, or makes numbers that are not finite or far outside of [-1, 1].
    """
    model = (generator, None)
    # At zero, the last one, ReLUs without a bias have no slope and norms no direction.
    z, directions = jax.random.normal(
        jax.random.key(0), (2, _PROBES, generator.latent_dim), jnp.float32
    )
    z = z.at[-1].set(0)
    if isinstance(generator, LatentGenerator):
        try:
            made = jax.eval_shape(generator.apply, generator.params, z[:1])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the generator takes no latents [1, {generator.latent_dim}]: "
                f"{str(error).splitlines()[0]}"
            ) from error
        shape: tuple[int, ...] = getattr(made, "shape", ())
        if len(shape) != 4 or shape[0] != 1:
            raise ValueError(
                f"the generator makes {made} of one latent, expected one image [1, h, w, c]"
            )
        if not jnp.issubdtype(made.dtype, jnp.floating):
            raise ValueError(
                f"the generator makes {made.dtype} images, expected floating in [-1, 1]"
            )
    try:
        images, slopes = jax.device_get(_probe(model, z, directions))
    except (TypeError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"the generator is not differentiable in its latent: {str(error).splitlines()[0]}"
        ) from error
    if not (np.isfinite(images[:-1]).all() and np.isfinite(slopes[:-1]).all()):
        raise ValueError("the generator makes numbers that are not finite, or its derivatives are")
    if np.abs(images[:-1]).max() > 2:
        raise ValueError(
            f"the generator makes numbers from {images[:-1].min():.3g} to {images[:-1].max():.3g}, "
            "expected images in [-1, 1]"
        )
    if not np.nan_to_num(slopes).any():
        raise ValueError(
            f"the generator is not differentiable in its latent: its derivative is zero at all of "
            f"{_PROBES} latents, as that of rounded images is"
        )
    again = np.asarray(_image(model, z[0]))
    difference = float(np.abs(again - images[0]).max()) * 127.5
    if not difference < 0.5:
        raise ValueError(
            "the generator is not deterministic: two images of one latent differ by "
            f"{difference:.3g} grey levels"
        )
    return images.shape[1:]


def _search(model, images, start_at, config, best: Regenerated, progress) -> None:
    """Fills `best`: places of a batch, refilled from a queue of starts."""
    count = len(images)
    if not count:
        return
    size = best.latent.shape[1]
    places = min(_num_places(config), count * config.num_starts)
    # Every image's first start before any image's second.
    queue = ((i, s) for s in range(config.num_starts) for i in range(count))
    running: list[tuple[int, int] | None] = [None] * places
    left = np.zeros(places, int)
    shown = np.zeros((places, *images.shape[1:]), np.float32)
    starts = np.zeros((places, size + best.unknowns.shape[1]), np.float32)
    remaining = np.full(count, config.num_starts)
    settled = np.zeros(count, bool)
    enough = -np.inf if model[1] is None else model[1].enough
    decided = 0
    states, asked, due = None, None, np.zeros(places, bool)
    while True:
        fresh = _refill(queue, running, settled, places)
        if fresh:
            for place, (index, number) in fresh:
                running[place] = (index, number)
                left[place] = config.max_iters
                shown[place] = images[index]
                starts[place] = start_at(index, number)
                best.starts[index] += 1
            asked = jnp.array(shown)  # a copy, moved when it changes and not in every step
            states = _enter(starts, asked, states, [place for place, _ in fresh], config)
            due = np.asarray(states.due)
        if not any(running):
            break
        taken = [pair is not None for pair in running]
        counts = due & taken
        if counts.any():
            states = _linearize_due(model, asked, states, config)
        left -= counts
        states, rmse, largest = _update_all(model, asked, states, config)
        rmse, largest, stuck, in_targets, due = jax.device_get(
            (rmse, largest, states.stuck, states.in_targets, states.due)
        )
        z = None
        for place, pair in enumerate(running):
            if pair is None:
                continue
            index = pair[0]
            best.iterations[index] += counts[place]
            done = _is_proved(rmse[place], largest[place], config)
            # A proof is kept, and nothing takes its place that is none.
            if done > best.proved[index] or (
                done == best.proved[index] and rmse[place] < best.rmse[index]
            ):
                z = np.asarray(states.z) if z is None else z
                best.latent[index], best.unknowns[index] = np.split(z[place], [size])
                best.rmse[index], best.largest[index] = rmse[place], largest[place]
            best.proved[index] |= done
            given_up = not in_targets[place] and stuck[place] >= config.patience
            if done or given_up or (left[place] == 0 and due[place]):
                running[place] = None
                remaining[index] -= 1
                # It came to rest as near as what is not modelled lets it.
                if not settled[index]:
                    settled[index] = done or best.rmse[index] <= enough
                    decided += bool(settled[index] or remaining[index] == 0)
        # Another start of the same image has succeeded.
        for place, pair in enumerate(running):
            if pair is not None and settled[pair[0]]:
                running[place] = None
        if progress is not None:
            progress(decided, count)


def _refill(
    queue: Iterator[tuple[int, int]], running: list, settled: np.ndarray, places: int
) -> list[tuple[int, tuple[int, int]]]:
    """What enters free places next; starts of images that are settled are left out."""
    fresh = []
    for place in range(places):
        if running[place] is None:
            pair = next((pair for pair in queue if not settled[pair[0]]), None)
            if pair is None:
                break
            fresh.append((place, pair))
    return fresh


def _enter(
    starts: np.ndarray,
    images: jax.Array,
    states: RegenerationState | None,
    entering: list[int],
    config: RegenerationConfig,
) -> RegenerationState:
    """New states in the places that are entered, the others as they were."""
    new = _init_all(jnp.array(starts), images, config)
    if states is None:
        return new
    mask = np.zeros(len(starts), bool)
    mask[entering] = True
    choose: Callable[[Any, Any], Any] = lambda a, b: jnp.where(  # noqa: E731
        mask.reshape(-1, *[1] * (a.ndim - 1)), a, b
    )
    return jax.tree.map(choose, new, states)


def weights_sha256(generator: TrainedGenerator | LatentGenerator) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights, in the order of the pytree."""
    weights = generator.variables if isinstance(generator, TrainedGenerator) else generator.params
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class Repeated(NamedTuple):
    """An image of a file of proofs, made again.

    Attributes:
      path: of the image, below the folder.
      processing: that was found, and done again to what the latent makes; "none" without any.
      is_the_file: whether the file has the very pixels that were searched for, by their SHA-256.
      largest: difference of the pixel that differs most between the file and what was made again,
        in grey levels; None if there is no image to compare with.
      rmse: root mean square of the differences; None as well.
      reason: why it is not the file; empty if it is.
    """

    path: str
    processing: str
    is_the_file: bool
    largest: float | None
    rmse: float | None
    reason: str


def repeat(
    generator: TrainedGenerator | LatentGenerator,
    path: str | os.PathLike,
    folder: str | os.PathLike,
) -> list[Repeated]:
    """Repeat proofs: make every image again, with its processing, and compare it with the file.

    Args:
      generator: the model, with the weights that the proofs were made with.
      path: WORKDIR/proofs.safetensors, as `--experiment=prove` writes it.
      folder: of the images that were searched for (or the one file), what `--images` was.
    Returns:
      a row per latent of the file, in its order. A file that is missing, cannot be read or was
      changed is a row with a reason.
    Raises:
      ValueError: if `path` holds no proofs or is damaged, the generator has other weights than
        they were made with, or there is no such folder.
    """
    root = os.fspath(folder)
    if os.path.isfile(root):
        root = os.path.dirname(root)
    elif not os.path.isdir(root):
        raise ValueError(f"there is no folder {root!r}: give that of the images that were proved")
    latents, proofs = _read_proofs(generator, os.fspath(path))
    made = _made_again(generator, latents, proofs)
    return [_compared(root, proof, image) for proof, image in zip(proofs, made, strict=True)]


class _Proof(NamedTuple):
    """What a file of proofs says of a latent."""

    path: str
    pixels_sha256: str
    latent_sha256: str
    processing: str
    unknowns: np.ndarray  # [p]
    replayed: str


def _read_proofs(
    generator: TrainedGenerator | LatentGenerator, path: str
) -> tuple[np.ndarray, list[_Proof]]:
    """Latents `[n, d]` float32, and what is said of each."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata, latents = file.metadata() or {}, file.get_tensor("latents")
        weights = metadata["weights_sha256"]
        proofs = [_proof(entry) for entry in json.loads(metadata["images"])]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no proofs ({type(error).__name__}: {error}): expected the "
            "proofs.safetensors that --experiment=prove writes into its workdir"
        ) from error
    own = weights_sha256(generator)
    if weights != own:
        raise ValueError(
            f"{path} was made with weights of SHA-256 {weights[:12]}..., those of this generator "
            f"have {own[:12]}...: load the generator that the proofs were made with"
        )
    expected = (len(proofs), generator.latent_dim)
    if latents.shape != expected or latents.dtype != np.float32:
        raise ValueError(
            f"{path} is damaged: its latents are {latents.dtype} {list(latents.shape)}, expected "
            f"float32 {list(expected)}; take another copy"
        )
    for latent, proof in zip(latents, proofs, strict=True):
        if hashlib.sha256(latent.tobytes()).hexdigest() != proof.latent_sha256:
            raise ValueError(
                f"{path} is damaged: the latent of {proof.path} is not the one whose SHA-256 it "
                "names; take another copy"
            )
    return latents, proofs


def _proof(entry: dict[str, Any]) -> _Proof:
    """One entry of the metadata.

    Raises:
      KeyError, TypeError, ValueError: for something else.
    """
    path, name = str(entry["path"]), str(entry["processing"])
    unknowns = np.array(entry["unknowns"], np.float32)
    count = 0
    if name != "none":
        kind = kinds.get(name)
        count = kind.codec.num_unknowns if kind.codec else kind.num_unknowns
    if unknowns.shape != (count,) or not np.isfinite(unknowns).all():
        raise ValueError(
            f"{path}: {name} with unknowns {entry['unknowns']}, expected {count} numbers"
        )
    pixels, latent = str(entry["pixels_sha256"]), str(entry["latent_sha256"])
    return _Proof(path, pixels, latent, name, unknowns, str(entry["replayed"]))


def _made_again(
    generator: TrainedGenerator | LatentGenerator, latents: np.ndarray, proofs: Sequence[_Proof]
) -> np.ndarray:
    """What `Regenerated.processed` was, `[n, h, w, c]` uint8."""
    images = make_images(generator, latents)
    for name in sorted({proof.processing for proof in proofs} - {"none"}):
        kind = kinds.get(name)
        places = [i for i, proof in enumerate(proofs) if proof.processing == name]
        if kind.codec is None:
            unknowns = np.stack([proofs[i].unknowns for i in places])
            z = np.concatenate([latents[places], unknowns], axis=1)
            images[places] = _made((generator, kind), z)
            continue
        for i in places:
            if proofs[i].replayed != _NOT_COMPRESSED:
                images[i], _ = kind.codec.replay(images[i], proofs[i].unknowns)
    return images


def _compared(root: str, proof: _Proof, made: np.ndarray) -> Repeated:
    file = _file_below(root, proof.path)
    image: np.ndarray | None = None
    reason: str | None = f"no such file below {root}"
    if file is not None:
        image, reason = data.decode_image(file, made.shape)
    if image is None:
        return Repeated(proof.path, proof.processing, False, None, None, str(reason))
    difference = np.abs(made.astype(np.float64) - image)
    is_the_file = hashlib.sha256(image.tobytes()).hexdigest() == proof.pixels_sha256
    return Repeated(
        proof.path,
        proof.processing,
        is_the_file,
        float(difference.max()),
        float(np.sqrt(np.square(difference).mean())),
        "" if is_the_file else "its pixels are not those that were searched for (SHA-256)",
    )


def _file_below(root: str, path: str) -> str | None:
    """The file of a proof, if there is one; none outside of the folder, whatever the proof says."""
    if os.path.isabs(path) or ".." in path.split("/"):
        return None
    # Bytes of a name that are no text were written as \udcXX.
    name = re.sub(r"\\udc([89a-f][0-9a-f])", lambda found: chr(0xDC00 + int(found[1], 16)), path)
    files = (os.path.join(root, tried) for tried in (path, name))
    return next((file for file in files if os.path.isfile(file)), None)
