"""Keyed generators: copies of a root model whose images carry a shift gamma phi ([P2]).

A user's model starts at the root's weights theta_0 and is fine-tuned:

*   `train`: eq. 10, E ||G_theta(z) - (G_0(z) + gamma phi)||^2, the training that Theorems 1 and 2
    speak of;
*   `search`: Algorithm 1, eq. 10 with gamma = d_max(phi), times alpha until the model is
    distinguishable, D >= 1 - delta;
*   `train_robust`: eq. 12, E [max(1 - phi^T T(G_theta(z)), 0) + C ||G_0(z) - G_theta(z)||^2] with a
    perturbation T in half of the batches.

User models are an array axis: weights, optimiser states and keys of all users are stacked, and one
program trains all of them. On a CPU the users of a step stand one after the other in a loop on the
host: a kernel per user makes grouped convolutions under `vmap`, for which XLA has no fast code
there (`training.step_all` does the same). With several devices each has its own users, with several
processes each has its own part of them; no user needs anything of another.

Deviations from the paper. Batch normalisation uses the root's running statistics, in training as
in deployment: user and root are then the same function at the start and an image depends on its own
latent only (the published code trains with batch statistics against a root without). Targets are
clipped to [-1, 1], as no image can leave it. `search` goes on from the weights of the last round
instead of starting again at theta_0, and leaves out the first rungs of the ladder, on which even a
perfect model could not be seen (`_first_gamma`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flipad_jax import data, parallel
from flipad_jax.generators import sampling
from flipad_jax.generators.sampling import TrainedGenerator
from flipad_jax.registry import attributability

__all__ = [
    "KeyedConfig",
    "KeyedState",
    "Searched",
    "init",
    "search",
    "take_user",
    "train",
    "train_robust",
]

Perturb = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class KeyedConfig:
    """Settings of the training.

    Attributes:
      num_steps: updates, per round of `search`.
      batch_size: latents per update; the paper's 16 (MNIST) and 64 (CelebA).
      learning_rate: of Adam, betas (0.9, 0.99) ([P2] Table 3).
      delta: `search` wants D >= 1 - delta; the paper's 1e-2.
      alpha: factor of gamma from round to round; the paper's 1.1.
      max_rounds: of `search`; a model that is not distinguishable then is reported so.
      quality: C of eq. 12, weight of the mean squared error *per pixel*, as in the published code;
        the paper writes the squared norm.
      robust_share: share of batches that are perturbed in `train_robust`; the paper's one half.
    """

    num_steps: int = 300
    batch_size: int = 32
    learning_rate: float = 1e-3
    delta: float = 1e-2
    alpha: float = 1.1
    max_rounds: int = 10
    quality: float = 10.0
    robust_share: float = 0.5

    def __post_init__(self):
        if min(self.num_steps, self.batch_size, self.max_rounds) < 1:
            raise ValueError(
                f"{self.num_steps=}, {self.batch_size=}, {self.max_rounds=} must be positive"
            )
        if not (self.learning_rate > 0 and self.alpha > 1 and self.quality >= 0):
            raise ValueError(
                f"{self.learning_rate=} must be positive, {self.alpha=} above 1, {self.quality=} "
                "not negative"
            )
        if not (0 < self.delta < 1 and 0 <= self.robust_share <= 1):
            raise ValueError(f"{self.delta=} must be in (0, 1), {self.robust_share=} in [0, 1]")


class KeyedState(NamedTuple):
    """All users' models; every array has a leading axis of users.

    Attributes:
      params: weights theta.
      opt_state: Adam's moments.
      step: updates made.
      user: `[N]` int32, number of the user; randomness is folded from it.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    user: jax.Array


def _optimizer(config: KeyedConfig) -> optax.GradientTransformation:
    return optax.adam(config.learning_rate, b1=0.9, b2=0.99)


def init(
    root: TrainedGenerator, num_users: int, config: KeyedConfig, *, first: int = 0
) -> KeyedState:
    """Every user's model at the root's weights; users are numbered from `first`."""
    if num_users < 1:
        raise ValueError(f"num_users={num_users}: expected a positive number")
    params = root.variables["params"]
    opt_state = _optimizer(config).init(params)
    stack = functools.partial(
        jax.tree.map, lambda leaf: jnp.broadcast_to(leaf, (num_users, *jnp.shape(leaf)))
    )
    return KeyedState(
        params=stack(params),
        opt_state=stack(opt_state),
        step=jnp.zeros(num_users, jnp.int32),
        user=first + jnp.arange(num_users, dtype=jnp.int32),
    )


def take_user(root: TrainedGenerator, state: KeyedState, index: int) -> TrainedGenerator:
    """One user's model, as a generator like the root."""
    params = jax.tree.map(lambda leaf: leaf[index], state.params)
    return dataclasses.replace(root, variables={**root.variables, "params": params})


def _images(root: TrainedGenerator, params: Any, z: jax.Array) -> jax.Array:
    return cast(jax.Array, root.module.apply({**root.variables, "params": params}, z))


def _latents(rng: jax.Array, state: KeyedState, root: TrainedGenerator, size: int):
    own = jax.random.fold_in(jax.random.fold_in(rng, state.user), state.step)
    latent_rng, rest = jax.random.split(own)
    return jax.random.normal(latent_rng, (size, root.latent_dim), jnp.float32), rest


def _apply(gradient: Any, state: KeyedState, config: KeyedConfig) -> KeyedState:
    updates, opt_state = _optimizer(config).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(params=params, opt_state=opt_state, step=state.step + 1)


def _match(root, state, shift, rng, config):
    """One update of eq. 10 for one user; `shift` is gamma phi."""
    z, _ = _latents(rng, state, root, config.batch_size)
    wanted = jnp.clip(_images(root, root.variables["params"], z) + shift, -1, 1)

    def loss(params):
        return jnp.mean(jnp.square(_images(root, params, z) - wanted))

    value, gradient = jax.value_and_grad(loss)(state.params)
    return _apply(gradient, state, config), value


def _resist(root, state, key, rng, config, perturb):
    """One update of eq. 12 for one user."""
    z, rest = _latents(rng, state, root, config.batch_size)
    coin_rng, perturb_rng = jax.random.split(rest)
    perturbed = jax.random.bernoulli(coin_rng, config.robust_share)
    clean = _images(root, root.variables["params"], z)

    def loss(params):
        images = _images(root, params, z)
        seen = jax.lax.cond(
            perturbed, lambda x: perturb(perturb_rng, x).astype(x.dtype), lambda x: x, images
        )
        responses = seen.reshape(len(seen), -1) @ key.ravel()
        hinge = jnp.maximum(1 - responses, 0).mean()
        return hinge + config.quality * jnp.mean(jnp.square(images - clean))

    value, gradient = jax.value_and_grad(loss)(state.params)
    return _apply(gradient, state, config), value


@functools.partial(jax.jit, static_argnames=("update", "config", "extra", "mesh"))
def _step(root, rng, state, vectors, *, update, config, extra=(), mesh=None):
    """One update of every user, of whom each device has as many as the others."""

    def of_device(whole, rows):
        root, rng = whole

        def one(state, vector):
            return update(root, state, vector, rng, config, *extra)

        if len(rows[0].user) > 1:
            return jax.vmap(one)(*rows)
        only = jax.tree.map(lambda leaf: leaf[0], rows)
        return jax.tree.map(lambda leaf: leaf[None], one(*only))

    return parallel.each_device(of_device, mesh)((root, rng), (state, vectors))


def _run(update, root, state, vectors, rng, config, extra, progress):
    """`config.num_steps` updates of every user; the state and the last losses `[N]`."""
    num_steps = config.num_steps
    config = dataclasses.replace(config, num_steps=1, max_rounds=1)  # one program for any number
    users = parallel.local_range(len(state.user))
    mesh = parallel.local_mesh()
    # As many as there are devices; all where a program is good at many users.
    together = mesh.size
    if jax.default_backend() != "cpu":
        together *= max(-(-len(users) // mesh.size), 1)
    root, rng = parallel.replicate((root, rng), mesh)
    parts = [jax.tree.map(lambda leaf: leaf[:0], (state, vectors[:, 0, 0, 0]))]
    firsts = range(0, len(users), together)
    for group, first in enumerate(firsts):
        # The last group is filled up with its last user.
        index = users.start + np.minimum(np.arange(first, first + together), len(users) - 1)
        own, wanted = jax.tree.map(lambda leaf: leaf[index], (state, vectors))
        own, wanted = parallel.shard((own, wanted), mesh)
        for step in range(num_steps):
            own, losses = _step(
                root, rng, own, wanted, update=update, config=config, extra=extra, mesh=mesh
            )
            if progress is not None and (step + 1) % 10 == 0:
                jax.block_until_ready(losses)
                progress(group * num_steps + step + 1, len(firsts) * num_steps)
        count = min(together, len(users) - first)
        parts.append(jax.tree.map(lambda leaf: leaf[:count], parallel.local((own, losses))))
    state, losses = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    if jax.process_count() > 1:
        gathered = jax.tree.map(parallel.gather, (state, losses))
        state, losses = jax.tree.map(jnp.asarray, gathered)
    return state, np.asarray(losses)


def _check(root: TrainedGenerator, state: KeyedState, keys: np.ndarray) -> jax.Array:
    shape = (len(state.user), *root.image_shape)
    if tuple(np.shape(keys)) != shape:
        raise ValueError(
            f"keys have shape {tuple(np.shape(keys))}, expected {shape}: one per user, of the size "
            "of the root's images"
        )
    attributability.check_keys(keys)
    return jnp.asarray(keys, jnp.float32)


def train(
    root: TrainedGenerator,
    state: KeyedState,
    keys: np.ndarray,
    gammas: np.ndarray,
    rng: jax.Array,
    config: KeyedConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[KeyedState, np.ndarray]:
    """Eq. 10 for all users; of several processes each calls this with the same arguments.

    Args:
      root: G_0.
      state: from `init`, or from an earlier call.
      keys: `[N, h, w, c]`, one per user.
      gammas: `[N]` length of every shift.
      rng: latents of user u in step t are drawn from `fold_in(fold_in(rng, u), t)`.
      config: settings; `num_steps` updates.
      progress: called with updates done and to be done.
    Returns:
      the state, and the last mean squared error per pixel of every user, `[N]`.
    Raises:
      ValueError: for keys of another size or norm, or gammas that are not finite and positive.
    """
    phi = _check(root, state, keys)
    gammas = np.asarray(gammas, np.float32)
    if gammas.shape != (len(phi),) or not (np.isfinite(gammas).all() and (gammas > 0).all()):
        raise ValueError(f"gammas {gammas}: expected {len(phi)} finite numbers above 0")
    shifts = jnp.asarray(gammas)[:, None, None, None] * phi
    return _run(_match, root, state, shifts, rng, config, (), progress)


def train_robust(
    root: TrainedGenerator,
    state: KeyedState,
    keys: np.ndarray,
    rng: jax.Array,
    config: KeyedConfig,
    perturb: Perturb,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[KeyedState, np.ndarray]:
    """Eq. 12 for all users: the hinge on perturbed images, quality on clean ones.

    Args:
      root, state, keys, rng, config, progress: as for `train`. The published code starts from
        models that `train` or `search` made.
      perturb: `(rng, images [n, h, w, c]) -> images`, differentiable; draws its own strength.
    Returns:
      the state, and the last loss of every user, `[N]`.
    Raises:
      ValueError: as for `train`.
    """
    phi = _check(root, state, keys)
    return _run(_resist, root, state, phi, rng, config, (perturb,), progress)


class Searched(NamedTuple):
    """What Algorithm 1 found, `[N]` each.

    Attributes:
      state: the models.
      gammas: length of every shift.
      distinguishability: D (eq. 1) on the images that the search looked at.
      rounds: trainings with a gamma of their own.
      reached: bool, D >= 1 - delta.
    """

    state: KeyedState
    gammas: np.ndarray
    distinguishability: np.ndarray
    rounds: np.ndarray
    reached: np.ndarray


def _first_gamma(
    x: np.ndarray, key: np.ndarray, d_max: float, real: np.ndarray, config: KeyedConfig
) -> float:
    """The first rung of the ladder d_max alpha^k on which the targets themselves are seen.

    Pixels are clipped, so a shift of gamma moves an image by less than gamma; where even a model
    that hit clip(x + gamma phi) exactly were not distinguishable, none needs to be trained.

    Args:
      x: `[n, D]` float32, images of the root.
      key: `[D]`.
      d_max: of the key.
      real: responses of real images.
      config: settings.
    Returns:
      gamma, or NaN if none is long enough: too many real images are on the wrong side, or a shift
      from one end of the pixels' range to the other is not seen.
    """
    gamma = d_max
    wanted = 2 * (1 - config.delta) - float((real < 0).mean())  # share of own images above zero
    while wanted <= 1 and gamma <= 2 * config.alpha * key.size**0.5:
        if (np.clip(x + np.float32(gamma) * key, -1, 1) @ key > 0).mean() >= wanted:
            return gamma
        gamma *= config.alpha
    return np.nan


def search(
    root: TrainedGenerator,
    keys: np.ndarray,
    real: np.ndarray,
    rng: jax.Array,
    config: KeyedConfig = KeyedConfig(),
    *,
    first: int = 0,
    num_images: int = 1000,
    progress: Callable[[str, int, int], None] | None = None,
) -> Searched:
    """Algorithm 1 for all users: the shortest shift, on a geometric ladder, that is seen.

    Args:
      root: G_0.
      keys: `[N, h, w, c]`.
      real: authentic images `[n, h, w, c]`; d_max comes from them and the root's images, D is
        measured on them. Not those that the keys were optimised on.
      rng: names all draws.
      config: settings.
      first: number of the first user.
      num_images: images of each user's model that D is measured on.
      progress: called with what is being done, how much is done, of how much.
    Returns:
      The models. Those that are not distinguishable after `max_rounds` are reported, not hidden;
      one that no gamma makes distinguishable (a key that is not data compliant, say) is not
      trained: it is the root, after 0 rounds, with gamma d_max.
    Raises:
      ValueError: for keys or real images of another size.
      FloatingPointError: if a training diverges.
    """
    state = init(root, len(keys), config, first=first)
    keys = np.asarray(_check(root, state, keys))
    own_rng, train_rng, test_rng = jax.random.split(rng, 3)
    images = sampling.generate(root, own_rng, num_images)
    d_max = attributability.extent(keys, [np.asarray(real), images]).d_max
    real_responses = attributability.responses(keys, real)
    num = len(keys)
    x = data.to_float(images).reshape(num_images, -1)
    gammas = np.array(
        [
            _first_gamma(x, key.ravel(), float(longest), seen, config)
            for key, longest, seen in zip(keys, d_max, real_responses.T)
        ]
    )
    own_responses = attributability.responses(keys, images)
    found = np.array(
        [
            attributability.distinguishability(own_responses[:, i], real_responses[:, i])
            for i in range(num)
        ]
    )
    rounds = np.zeros(num, np.int64)
    hopeless = np.isnan(gammas)
    gammas = np.where(hopeless, d_max, gammas)
    open_users = np.flatnonzero(~hopeless)
    for round_index in range(config.max_rounds if open_users.size else 0):
        part = jax.tree.map(lambda leaf: leaf[open_users], state)
        say = None
        if progress is not None:
            text = f"round {round_index + 1}, {len(open_users)} models"
            say = functools.partial(progress, text)
        part, losses = train(
            root, part, keys[open_users], gammas[open_users], train_rng, config, progress=say
        )
        if not np.isfinite(losses).all():
            raise FloatingPointError(
                f"the training of models {(first + open_users)[~np.isfinite(losses)].tolist()} "
                f"diverged in round {round_index + 1}: lower the learning rate"
            )
        state = jax.tree.map(lambda all_, some: all_.at[open_users].set(some), state, part)
        for place, user in enumerate(open_users):
            model = take_user(root, part, place)
            made = sampling.generate(model, jax.random.fold_in(test_rng, first + user), num_images)
            own = attributability.responses(keys[user][None], made)[:, 0]
            found[user] = attributability.distinguishability(own, real_responses[:, user])
        rounds[open_users] += 1
        open_users = np.flatnonzero((found < 1 - config.delta) & ~hopeless)
        if not open_users.size or round_index + 1 == config.max_rounds:
            break
        gammas[open_users] *= config.alpha
    return Searched(state, gammas, found, rounds, found >= 1 - config.delta)
