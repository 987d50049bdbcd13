"""One training loop for every GAN, for one seed or many at once.

A family (`dcgan.py`, `wgan_gp.py`, ...) is a `Gan`: two Flax modules, two losses, a recipe.
Everything here is a pure function of a `GanState`; all randomness is folded from the state's seed
key and the step, so a run that was interrupted and restored makes the same numbers as one that was
not.
"""

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from flipad_jax import checkpoints, data, parallel
from flipad_jax.generators import layers

__all__ = [
    "Gan",
    "GanState",
    "Losses",
    "init",
    "init_seeds",
    "step_all",
    "take_seed",
    "train",
    "train_step",
]


class Gan(NamedTuple):
    """An adversarial model and its recipe; hashable, so that it can be a static argument.

    Attributes:
      family: the name under which `flipad_jax.generators` finds it.
      generator: module, latents `[n, latent_dim]` -> images `[n, *image_shape]`; has a method
        `activation`.
      discriminator: module, images -> one number each, or whatever the losses expect: any pytree.
      discriminator_loss: `(discriminate, real, fake, rng) -> scalar`, see below.
      generator_loss: `(discriminate, fake, rng) -> scalar`.
      optimizer: of both networks, each with a state of its own.
      discriminator_steps: discriminator updates per generator update; the last one shares its
        latents with the generator's.
      image_shape: `(h, w, c)`.
      latent_dim: dimension of the standard normal latent.

    A loss sees whole batches, `[n, h, w, c]`, and may depend on n. `discriminate(images, rng=None)`
    is the discriminator with the parameters of that moment; a discriminator with dropout needs
    `rng`, a different one in each call. The loss gets its `rng` from the step, and splits it.
    """

    family: str
    generator: nn.Module
    discriminator: nn.Module
    discriminator_loss: Callable[..., jax.Array]
    generator_loss: Callable[..., jax.Array]
    optimizer: optax.GradientTransformation
    discriminator_steps: int
    image_shape: tuple[int, int, int]
    latent_dim: int


class GanState(NamedTuple):
    """What the next step needs.

    Attributes:
      step: `[]` int32, generator updates made.
      rng: the seed's key; never changes, steps fold their number into it.
      generator: Flax variables, `params` and `batch_stats` (running averages, used when sampling).
      discriminator: Flax parameters. Its running averages are never used and not kept.
      generator_opt, discriminator_opt: optimiser states.
    """

    step: jax.Array
    rng: jax.Array
    generator: Any
    discriminator: Any
    generator_opt: optax.OptState
    discriminator_opt: optax.OptState


class Losses(NamedTuple):
    """Losses of one step, `[]` float32 each (the discriminator's: of its last update)."""

    generator: jax.Array
    discriminator: jax.Array


def init(gan: Gan, rng: jax.Array) -> GanState:
    """The state before the first step of one seed; `init_seeds` makes those of many."""
    generator_rng, discriminator_rng = jax.random.split(jax.random.fold_in(rng, 0))
    generator = gan.generator.init(generator_rng, jnp.zeros((1, gan.latent_dim), jnp.float32))
    discriminator = gan.discriminator.init(
        discriminator_rng, jnp.zeros((1, *gan.image_shape), jnp.float32)
    )["params"]
    return GanState(
        step=jnp.zeros((), jnp.int32),
        rng=rng,
        generator=generator,
        discriminator=discriminator,
        generator_opt=gan.optimizer.init(generator["params"]),
        discriminator_opt=gan.optimizer.init(discriminator),
    )


@functools.partial(layers.jit_for_one_run, static_argnames="gan")
def init_seeds(gan: Gan, seeds: jax.Array) -> GanState:
    """The states of many seeds `[s]` uint32, with a leading axis of seeds, in one compiled call."""
    return jax.vmap(lambda seed: init(gan, jax.random.key(seed)))(seeds)


def train_step(
    gan: Gan, state: GanState, real: jax.Array, mesh: Mesh | None = None
) -> tuple[GanState, Losses]:
    """One generator update and the discriminator updates before it.

    Args:
      gan: the model.
      state: one seed's state.
      real: images `[discriminator_steps, n, h, w, c]` float32 in [-1, 1].
      mesh: devices among which the batches are divided, real and generated ones; the sums over a
        batch are still those of the whole.
    """
    rng = jax.random.fold_in(state.rng, state.step + 1)
    batch_size = real.shape[1]
    real = parallel.constrain(real, mesh, axis=1)

    def discriminate(params, images, rng=None):
        # Batch statistics always; "batch_stats" would be running averages, which nobody reads.
        return gan.discriminator.apply(
            {"params": params},
            images,
            mutable=["batch_stats"],
            rngs=None if rng is None else {"dropout": rng},
        )[0]

    def generate(params, batch_stats, rng):
        latents = jax.random.normal(rng, (batch_size, gan.latent_dim), jnp.float32)
        latents = parallel.constrain(latents, mesh)
        variables = {"params": params, "batch_stats": batch_stats}
        images, updates = gan.generator.apply(
            variables, latents, train=True, mutable=["batch_stats"]
        )
        return images, updates["batch_stats"]

    def update_discriminator(params, opt_state, real, fake, rng):
        loss, grads = jax.value_and_grad(
            lambda p: gan.discriminator_loss(functools.partial(discriminate, p), real, fake, rng)
        )(params)
        updates, opt_state = gan.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params, batch_stats = state.generator["params"], state.generator["batch_stats"]
    discriminator, discriminator_opt = state.discriminator, state.discriminator_opt

    def warm_up(carry, inputs):
        discriminator, discriminator_opt, batch_stats = carry
        index, images = inputs
        fake_rng, loss_rng = jax.random.split(jax.random.fold_in(rng, index))
        fake, batch_stats = generate(params, batch_stats, fake_rng)
        discriminator, discriminator_opt, _ = update_discriminator(
            discriminator, discriminator_opt, images, fake, loss_rng
        )
        return (discriminator, discriminator_opt, batch_stats), None

    last = gan.discriminator_steps - 1
    if last:
        carry = (discriminator, discriminator_opt, batch_stats)
        # XLA's CPU backend runs the kernel gradients of convolutions ten times slower inside a loop
        # than outside one.
        unroll = jax.default_backend() == "cpu"
        carry, _ = jax.lax.scan(warm_up, carry, (jnp.arange(last), real[:last]), unroll=unroll)
        discriminator, discriminator_opt, batch_stats = carry

    # One pass through the generator serves both updates: its pullback waits for the gradient at the
    # images.
    fake_rng, loss_rng = jax.random.split(jax.random.fold_in(rng, last))
    fake, pull_back, batch_stats = jax.vjp(
        lambda p: generate(p, batch_stats, fake_rng), params, has_aux=True
    )
    discriminator, discriminator_opt, discriminator_loss = update_discriminator(
        discriminator, discriminator_opt, real[last], fake, loss_rng
    )
    generator_loss, image_grads = jax.value_and_grad(
        lambda images: gan.generator_loss(
            functools.partial(discriminate, discriminator),
            images,
            jax.random.fold_in(rng, gan.discriminator_steps),
        )
    )(fake)
    updates, generator_opt = gan.optimizer.update(
        pull_back(image_grads)[0], state.generator_opt, params
    )
    state = GanState(
        step=state.step + 1,
        rng=state.rng,
        generator={"params": optax.apply_updates(params, updates), "batch_stats": batch_stats},
        discriminator=discriminator,
        generator_opt=generator_opt,
        discriminator_opt=discriminator_opt,
    )
    return state, Losses(generator_loss, discriminator_loss)


def _epoch_batch(rng: jax.Array, batch: jax.Array, num_images: int, batch_size: int) -> jax.Array:
    """Indices of a batch: every epoch is a permutation, what does not fill a batch is left out."""
    per_epoch = num_images // batch_size
    order = jax.random.permutation(jax.random.fold_in(rng, batch // per_epoch), num_images)
    return jax.lax.dynamic_slice_in_dim(order, (batch % per_epoch) * batch_size, batch_size)


@functools.partial(
    jax.jit, static_argnames=("gan", "batch_size", "mesh"), donate_argnames=("states",)
)
def step_all(
    states: GanState, images: jax.Array, *, gan: Gan, batch_size: int, mesh: Mesh | None = None
) -> tuple[GanState, Losses]:
    """One step of every seed in one compiled program.

    Args:
      states: with a leading axis of seeds, `[s, ...]`; donated.
      images: all training images `[n, h, w, c]` uint8, on the device, shared by the seeds.
      gan, batch_size: static.
      mesh: static; devices among which every batch is divided. States and images are whole on each
        of them (`parallel.replicate`).
    Returns:
      the states and losses, each with the axis of seeds.
    """

    def one_seed(state):
        order_rng = jax.random.fold_in(state.rng, 0)
        batches = state.step * gan.discriminator_steps + jnp.arange(gan.discriminator_steps)
        indices = jax.vmap(lambda b: _epoch_batch(order_rng, b, images.shape[0], batch_size))(
            batches
        )
        batch = parallel.constrain(images[indices], mesh, axis=1)
        return train_step(gan, state, batch.astype(jnp.float32) / 127.5 - 1, mesh)

    if jax.default_backend() != "cpu" and (mesh is None or mesh.size == 1):
        return jax.vmap(one_seed)(states)
    # A kernel per seed makes grouped convolutions under vmap, for which XLA's CPU backend has no
    # fast code (python benchmarks/transposed_convolution.py measures it), and which its partitioner
    # does not divide among devices but computes on each: there the seeds stand one after the other
    # in the program.
    count = jax.tree.leaves(states)[0].shape[0]
    results = [one_seed(take_seed(states, index)) for index in range(count)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
    return parallel.constrain(stacked, mesh, axis=None)


def train(
    gan: Gan,
    images: np.ndarray,
    *,
    seeds: tuple[int, ...],
    num_steps: int,
    batch_size: int = 128,
    checkpoint_dir: str | None = None,
    checkpoint_every: int = 500,
    report_every: int = 10,
    progress: Callable[[int, Losses], None] | None = None,
) -> GanState:
    """Train `gan` once per seed, all seeds together, on all devices of all processes.

    Every batch is divided among the devices; the result is that of one device up to rounding. Of
    several processes each calls this with the same arguments.

    Args:
      gan: from `dcgan.dcgan`, `wgan_gp.wgan_gp`, ...
      images: `[n, h, w, c]` uint8, the training set; kept on the device.
      seeds: one model each.
      num_steps: generator updates. An epoch of the paper is `n // (batch_size *
        discriminator_steps)` of them.
      batch_size: the paper's 128 by default.
      checkpoint_dir: where to save, and where to go on from.
      checkpoint_every: steps between two checkpoints; another is made at the end.
      report_every: steps between two looks at the losses, each of which waits for the device.
      progress: called with the steps made so far and the mean losses, `[s]` each, since the last
        call.
    Returns:
      the states with a leading axis of seeds, on one device; `take_seed` picks one.
    Raises:
      ValueError: if the images do not fit the model, or are fewer than a batch, or a batch cannot
        be divided among the processes.
      FloatingPointError: if a loss is not finite; checkpoints from before remain.
    """
    data.check_images(images, shape=gan.image_shape)
    if images.dtype != np.uint8:
        raise ValueError(f"training images must be uint8, got {images.dtype}; see data.to_uint8")
    if len(images) < batch_size:
        raise ValueError(
            f"{len(images)} images are fewer than one batch of {batch_size}: lower the batch size"
        )
    if not seeds or num_steps < 0 or report_every < 1 or checkpoint_every < 1:
        raise ValueError(
            "seeds must not be empty; num_steps, report_every and checkpoint_every must be positive"
        )
    mesh = parallel.mesh(batch_size)
    states = parallel.replicate(init_seeds(gan, jnp.asarray(seeds, jnp.uint32)), mesh)
    step = 0
    if checkpoint_dir is not None:
        restored = checkpoints.restore_latest(checkpoint_dir, states)
        if restored is not None:
            step, states = restored
    device_images = parallel.replicate(jnp.asarray(images), mesh)
    losses = []
    while step < num_steps:
        states, loss = step_all(states, device_images, gan=gan, batch_size=batch_size, mesh=mesh)
        losses.append(loss)
        step += 1
        saves = step % checkpoint_every == 0 or step == num_steps
        if saves or step % report_every == 0 or step == num_steps:
            # The only place that waits for the device.
            mean = jax.tree.map(lambda *values: np.mean(values, axis=0), *jax.device_get(losses))
            losses = []
            if not all(np.isfinite(value).all() for value in mean):
                raise FloatingPointError(f"a loss is not finite before step {step}: {mean}")
            if progress is not None:
                progress(step, mean)
        if saves and checkpoint_dir is not None:
            checkpoints.save(checkpoint_dir, step, states)
    return parallel.local(states)


def take_seed(states: GanState, index: int) -> GanState:
    """The state of one seed out of `train`'s result."""
    return jax.tree.map(lambda leaf: leaf[index], states)
