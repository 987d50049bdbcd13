"""An attributor's score as a function that can be differentiated, and the search that uses it.

`attribution.score` reads 8-bit images on the host. `score` here is the same number, of grey levels
in the graph: the target of every level, FISTA with as many iterations, the statistics, the networks
and Fisher's sum. What jumps is joined by straight lines:

*   all that is looked up per grey level (targets, the networks' inputs) is linear between levels,
    so that one level more of a black pixel has the slope that it has;
*   a tail probability is linear, in the logarithms, between two images of the reference.

With `rounded` (the default) the value is that of the rounded image to float32 rounding, and the
gradient that of the lines (straight through the rounding).

Two searches for the smallest l2 change, because 8 bits meet them differently. To leave our set a
few pixels by one level are enough: `leave` takes gradient steps of decoupled direction and length
(Rony et al., CVPR 2019) on the rounded image, with a budget per image that shrinks while it is
outside and grows while it is not, a bisection along the way. To enter it, a tiny change of every
pixel is enough and rounding undoes it: `enter` minimises score + weight ||change||^2 by Adam
without rounding, then rounds some pixels at a time, those next to a level first, while the others
make up for it; each round has another weight per image, larger where it had succeeded.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax

from flipad_jax.detection import classifier, one_class
from flipad_jax.detection.attributor import Attributor
from flipad_jax.detection.classifier import Classifier
from flipad_jax.detection.one_class import OneClass
from flipad_jax.inversion import final_layer, lasso, polyphase
from flipad_jax.inversion.fista import fista
from flipad_jax.inversion.polyphase import Polyphase

__all__ = [
    "Moved",
    "Surrogate",
    "activation",
    "enter",
    "leave",
    "make",
    "score",
    "statistics",
]

_GAMMA = 0.05  # by which a budget grows or shrinks
_STEPS = (1.0, 0.05)  # length of the first and the last step, over the budget
_FIRST_BUDGET = 0.5  # grey levels, root mean square
_RATE = 0.02  # of Adam, in grey levels
_FREE = 0.15  # share of Adam's steps before the first pixel is rounded
_FIRST_WEIGHT = 0.5  # score per squared grey level
_WEIGHT_FACTOR = 3.0  # by which the next round's weight is larger or smaller
_LEVELS = np.arange(256)


@struct.dataclass
class Surrogate:
    """What the score is made of; a pytree of float32 arrays.

    Attributes:
      operator: A, packed where `lasso.solve` packs it.
      lipschitz: at least ||A||^2.
      targets: `[256]` target of every grey level, before the bias is taken off.
      shift: `[h, w, c]`, bias + A z_bar: what to take off.
      model: the fitted detector.
      inputs: `[256, 5]` what the networks see of every grey level.
      log_reference: `[k, n]` sorted logarithms of the reference's statistics.
      log_p: `[n]` log tail probability at each of them, for those below the edge of the tail.
      edge: `[k]` logarithm of where the tail begins.
      index: `[k]` Hill's index.
      weights: `[k]` of Fisher's sum.
      tail: log probability at the edge (static).
      lam, max_iters: of the inversion (static).
    """

    operator: Any
    lipschitz: jax.Array
    targets: jax.Array
    shift: jax.Array
    model: OneClass
    inputs: jax.Array
    log_reference: jax.Array
    log_p: jax.Array
    edge: jax.Array
    index: jax.Array
    weights: jax.Array
    tail: float = struct.field(pytree_node=False)
    lam: float = struct.field(pytree_node=False)
    max_iters: int = struct.field(pytree_node=False)


class Moved(NamedTuple):
    """What `leave` and `enter` found.

    Attributes:
      images: `[n, h, w, c]` uint8, the nearest one found beyond the goal; where there is none, that
        which came nearest to the goal.
      reached: `[n]` bool, whether there is one.
      score: `[n]` of those images, by the surrogate.
    """

    images: np.ndarray
    reached: np.ndarray
    score: np.ndarray


def make(attributor: Attributor) -> Surrogate:
    """The surrogate of an attributor.

    Raises:
      ValueError: if it has another detector, or does not invert by a fixed number of FISTA's
        iterations, through which gradients pass.
    """
    config, model, layer = attributor.config, attributor.detector, attributor.layer
    if not isinstance(model, OneClass) or config.method != "fista" or config.tol:
        raise ValueError(
            "a gradient is known for the one-class detector and a fixed number of FISTA "
            f"iterations, not for {config.detector}, {config.method}, tol={config.tol:g}"
        )
    if "reconstruction" in model.classifiers:
        raise ValueError(
            "no gradient is known through a network that draws own images again, as an attributor "
            f"has that was immunised ({config.immunize})"
        )
    # From the library's own functions, so that a change there changes this.
    size = math.prod(attributor.image_shape)
    shown = np.resize(_LEVELS, -(-256 // size) * size).astype(np.uint8)
    unbiased = dataclasses.replace(layer, bias=None)
    targets = final_layer.targets(unbiased, shown.reshape(-1, *attributor.image_shape))
    inputs = classifier._inputs(jnp.asarray(_LEVELS / 127.5 - 1, jnp.float32)[:, None, None, None])
    shift = layer.operator.forward(jnp.asarray(attributor.z_bar, layer.operator.dtype))
    if layer.bias is not None:
        shift = shift + final_layer._bias(layer)
    operator, numbers = lasso._constants(cast(Any, layer.operator), "fista")
    tiny = np.finfo(np.float32).tiny
    log_reference = np.log(np.maximum(np.asarray(model.reference, np.float64), tiny))
    size = log_reference.shape[1]
    tail = one_class.tails(model.reference)
    at_least = size - np.arange(size)

    def narrow(values):
        return jnp.asarray(values, jnp.float32)

    return Surrogate(
        operator=operator,
        lipschitz=numbers["lipschitz"],
        targets=targets.ravel()[:256],
        shift=shift,
        model=model,
        inputs=inputs.reshape(256, -1),
        log_reference=narrow(log_reference),
        log_p=narrow(np.log((1 + at_least) / (size + 1))),
        edge=narrow(tail.edge),
        index=narrow(tail.hill),
        weights=narrow(one_class.fisher_weights(len(log_reference))),
        tail=tail.log_p,
        lam=config.lam,
        max_iters=config.max_iters,
    )


def _by_level(table: jax.Array, levels: jax.Array, rounded: bool) -> jax.Array:
    """`[256]` looked up at grey levels of any shape, linear in between."""
    lower = jnp.clip(jnp.floor(lax.stop_gradient(levels)), 0, 254).astype(jnp.int32)
    found = table[lower] + (levels - lower) * (table[lower + 1] - table[lower])
    if not rounded:
        return found
    nearest = jnp.clip(jnp.round(lax.stop_gradient(levels)), 0, 255).astype(jnp.int32)
    return found + lax.stop_gradient(table[nearest] - found)


def activation(surrogate: Surrogate, levels: jax.Array, *, rounded: bool = True) -> jax.Array:
    """z' of one image `[h, w, c]` of grey levels, as `final_layer.invert` finds it."""
    operator = surrogate.operator
    o = _by_level(surrogate.targets, levels, rounded) - surrogate.shift
    if isinstance(operator, Polyphase):
        o = polyphase.pack_output(operator, o)
    solver = fista(operator, lam=surrogate.lam, lipschitz=surrogate.lipschitz)
    state = solver.init(o)
    # The steps of `lasso.solve`, whose certificate may restart the momentum; of known number, so
    # that they can be differentiated.
    rounds, rest = divmod(surrogate.max_iters, lasso._GAP_EVERY)
    every = cast(jax.Array, lasso._GAP_EVERY)
    state = lax.fori_loop(0, rounds, lambda _, s: solver.advance(s, o, every)[0], state)
    state = lax.fori_loop(0, rest, lambda _, s: solver.update(s, o), state)
    z = state.z
    return polyphase.unpack_input(operator, z) if isinstance(operator, Polyphase) else z


def _logit(network: Classifier, inputs: jax.Array) -> jax.Array:
    """Of what one image shows the network, `[h, w, c']`: mean over its squares, as
    `classifier.logits`."""
    module = classifier._network(network.input_shape, network.config)
    h, w = classifier._seen(network.input_shape)
    corners = classifier._corners(network.input_shape, classifier._SQUARE)
    squares = jnp.stack([inputs[y : y + h, x : x + w] for y, x in corners])
    logits = cast(jax.Array, module.apply(network.variables, squares, train=False))
    return logits.mean()


def statistics(surrogate: Surrogate, levels: jax.Array, *, rounded: bool = True) -> jax.Array:
    """Logarithms `[k]` of the detector's statistics of one image `[h, w, c]` of grey levels."""
    model = surrogate.model
    z = activation(surrogate, levels, rounded=rounded)
    quantiles = jnp.quantile(z.ravel(), jnp.asarray(model.config.quantiles, z.dtype))
    values = one_class._statistics_of_one(model, z, quantiles)
    found = list(jnp.log(jnp.maximum(values, jnp.finfo(jnp.float32).tiny)))
    networks = [
        cast(Classifier, model.classifiers[name])
        for name in one_class.CLASSIFIERS
        if name in model.classifiers
    ]
    for network in networks:
        if network.reads == "activations":
            found.append(_logit(network, classifier._shown(network, z)))
            continue
        columns = [_by_level(column, levels, rounded) for column in surrogate.inputs.T]
        found.append(_logit(network, jnp.concatenate(columns, axis=-1)))
    return jnp.stack(found)


def score(surrogate: Surrogate, levels: jax.Array, *, rounded: bool = True) -> jax.Array:
    """The score of one image `[h, w, c]` of grey levels, float; batch with `jax.vmap`."""
    logs = statistics(surrogate, levels, rounded=rounded)
    below = jax.vmap(jnp.interp, in_axes=(0, 0, None))(
        logs, surrogate.log_reference, surrogate.log_p
    )
    beyond = surrogate.tail - (logs - surrogate.edge) / surrogate.index
    log_p = jnp.where(logs > surrogate.edge, beyond, below)
    return -2 * jnp.sum(surrogate.weights * log_p)


class _State(NamedTuple):
    change: jax.Array  # [n, h, w, c] grey levels, not rounded
    budget: jax.Array  # [n] l2 norm
    best: jax.Array  # [n, h, w, c] whole grey levels
    best_size: jax.Array  # [n] its l2 norm, infinite before the first beyond the goal
    best_score: jax.Array  # [n]


def _norm(images: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(images**2, axis=(1, 2, 3)))


def _each(values: jax.Array) -> jax.Array:
    """`[n]` beside images."""
    return values[:, None, None, None]


@functools.partial(jax.jit, static_argnames="num_steps")
def _leave(
    surrogate: Surrogate, images: jax.Array, goal: jax.Array, *, num_steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    value_and_slope = jax.vmap(jax.value_and_grad(functools.partial(score, surrogate)))

    def unit(x):
        return x / _each(jnp.maximum(_norm(x), 1e-20))

    def step(state: _State, index: jax.Array) -> tuple[_State, None]:
        levels = images + state.change
        value, slope = value_and_slope(levels)
        rounded = jnp.round(levels)
        size = _norm(rounded - images)
        outside = value > goal
        # Before one is outside, that which is nearest to it.
        nearer = jnp.isinf(state.best_size) & (value > state.best_score)
        better = jnp.where(outside, size < state.best_size, nearer)
        best = jnp.where(_each(better), rounded, state.best)
        best_size = jnp.where(better & outside, size, state.best_size)
        best_score = jnp.where(better, value, state.best_score)
        # Beyond black and white nothing can be had.
        ends = ((levels <= 0) & (slope < 0)) | ((levels >= 255) & (slope > 0))
        slope = jnp.where(ends | ~jnp.isfinite(slope), 0, slope)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * index / num_steps))
        length = (_STEPS[1] + (_STEPS[0] - _STEPS[1]) * cosine) * state.budget
        change = state.change + _each(length) * unit(slope)
        budget = state.budget * jnp.where(outside, 1 - _GAMMA, 1 + _GAMMA)
        budget = jnp.minimum(budget, best_size)  # What is known to do is not exceeded.
        change = jnp.clip(images + _each(budget) * unit(change), 0, 255) - images
        return _State(change, budget, best, best_size, best_score), None

    first = _FIRST_BUDGET * math.sqrt(math.prod(images.shape[1:]))
    infinite = jnp.full(len(images), jnp.inf, jnp.float32)
    state = _State(
        change=jnp.zeros_like(images),
        budget=jnp.full(len(images), first, jnp.float32),
        best=images,
        best_size=infinite,
        best_score=-infinite,
    )
    steps = jnp.arange(num_steps, dtype=jnp.float32)
    state, _ = lax.scan(step, state, steps)
    return state.best, state.best_score, jnp.isfinite(state.best_size)


def leave(surrogate: Surrogate, images: np.ndarray, goal: float, *, num_steps: int) -> Moved:
    """Move images by as little as can be found so that their score is above a goal.

    Args:
      surrogate: from `make`.
      images: `[n, h, w, c]` uint8; all in one program, whose memory grows with n.
      goal: the score to exceed.
      num_steps: gradient steps.
    Returns:
      The images moved, in 8 bits; judge them by the attributor itself.
    """
    found = _leave(
        surrogate, jnp.asarray(images, jnp.float32), jnp.float32(goal), num_steps=num_steps
    )
    best, best_score, reached = map(np.asarray, found)
    return Moved(best.astype(np.uint8), reached, best_score)


@functools.partial(jax.jit, static_argnames="num_steps")
def _enter(
    surrogate: Surrogate, images: jax.Array, weights: jax.Array, *, num_steps: int
) -> tuple[jax.Array, jax.Array]:
    """Images rounded, `[n, h, w, c]`, and their scores."""
    optimizer = optax.adam(_RATE, b2=0.99)
    free = int(_FREE * num_steps)
    size = math.prod(images.shape[1:])

    def loss(levels, image, weight):
        change = jnp.sum((levels - image) ** 2)
        return score(surrogate, levels, rounded=False) + weight * change

    slope_of = jax.vmap(jax.grad(loss))

    def step(carry, index):
        levels, is_fixed, opt_state = carry
        slope = slope_of(levels, images, weights)
        slope = jnp.where(is_fixed | ~jnp.isfinite(slope), 0, slope)
        updates, opt_state = optimizer.update(slope, opt_state)
        levels = jnp.where(is_fixed, levels, jnp.clip(levels + updates, 0, 255))
        # As many as are to be whole by now: those that are, and those next to a level.
        share = jnp.maximum(index + 1 - free, 0) / (num_steps - free)
        number = jnp.floor(size * share + 0.5).astype(jnp.int32)
        away = jnp.where(is_fixed, -1, jnp.abs(levels - jnp.round(levels)))
        away = away.reshape(len(images), size)
        last = jnp.sort(away, axis=1)[:, jnp.maximum(number - 1, 0)]
        is_fixed |= ((away <= last[:, None]) & (number > 0)).reshape(images.shape)
        levels = jnp.where(is_fixed, jnp.round(levels), levels)
        return (levels, is_fixed, opt_state), None

    carry = (images, jnp.zeros(images.shape, bool), optimizer.init(images))
    steps = jnp.arange(num_steps, dtype=jnp.float32)
    (levels, _, _), _ = lax.scan(step, carry, steps)
    levels = jnp.round(levels)
    return levels, jax.vmap(functools.partial(score, surrogate))(levels)


def enter(
    surrogate: Surrogate, images: np.ndarray, goal: float, *, num_steps: int, num_rounds: int = 1
) -> Moved:
    """Move images by as little as can be found so that their score is at most a goal.

    Args:
      surrogate, images: as for `leave`.
      goal: the score to reach.
      num_steps: gradient steps of a round.
      num_rounds: searches with another weight of the change each, larger for images that had
        reached the goal, smaller for the others.
    Returns:
      The images moved, in 8 bits; judge them by the attributor itself.
    """
    start = jnp.asarray(images, jnp.float32)
    weights = np.full(len(images), _FIRST_WEIGHT, np.float32)
    best, best_size = np.array(images), np.full(len(images), np.inf)
    best_score = np.full(len(images), np.inf, np.float32)
    for _ in range(num_rounds):
        levels, scores = map(
            np.asarray, _enter(surrogate, start, jnp.asarray(weights), num_steps=num_steps)
        )
        size = np.sqrt(np.sum((levels - images) ** 2, axis=(1, 2, 3)))
        inside = scores <= goal
        nearer = np.isinf(best_size) & (scores < best_score)
        better = np.where(inside, size < best_size, nearer)
        best[better] = levels[better].astype(np.uint8)
        best_score[better] = scores[better]
        best_size = np.where(better & inside, size, best_size)
        weights = weights * np.where(inside, _WEIGHT_FACTOR, 1 / _WEIGHT_FACTOR).astype(np.float32)
    return Moved(best, np.isfinite(best_size), best_score)
