"""One training loop for every GAN, for one seed or many at once.

A family (`dcgan.py`, `wgan_gp.py`, ...) is a `Gan`: two Flax modules, two losses, a recipe.
Everything here is a pure function of a `GanState`; all randomness is folded from the state's seed
key and the step, so a run that was interrupted and restored makes the same numbers as one that was
not. Images are an array that lies on the device, or a `pipeline.Stream` of batches, whose position
is then part of every checkpoint.
"""

import concurrent.futures
import functools
import hashlib
import re
import time
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from flipad_jax import checkpoints, data, parallel, pipeline
from flipad_jax.generators import layers

__all__ = [
    "Gan",
    "GanState",
    "Losses",
    "Report",
    "init",
    "init_seeds",
    "step_all",
    "step_batches",
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
      learning_rate: the optimiser's, for messages; None if nobody said it.

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
    learning_rate: float | None = None


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
    """Losses of one step, `[]` float32 each (the discriminator's: of its last update).

    One whose gradient is not finite is NaN.
    """

    generator: jax.Array
    discriminator: jax.Array


class Report(NamedTuple):
    """What `train` says of the steps since its last report.

    Attributes:
      generator, discriminator: mean losses, `[s]`.
      waiting: `[]`, the share of the time in which the device had nothing to do because the next
        batch of a stream was not there; 0 for an array.
    """

    generator: np.ndarray
    discriminator: np.ndarray
    waiting: np.ndarray


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
        return optax.apply_updates(params, updates), opt_state, _nan_unless_finite(loss, grads)

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
    grads = pull_back(image_grads)[0]
    updates, generator_opt = gan.optimizer.update(grads, state.generator_opt, params)
    state = GanState(
        step=state.step + 1,
        rng=state.rng,
        generator={"params": optax.apply_updates(params, updates), "batch_stats": batch_stats},
        discriminator=discriminator,
        generator_opt=generator_opt,
        discriminator_opt=discriminator_opt,
    )
    return state, Losses(_nan_unless_finite(generator_loss, grads), discriminator_loss)


def _nan_unless_finite(loss: jax.Array, grads: Any) -> jax.Array:
    """The loss; NaN if a gradient is not finite, which spoils the parameters before any loss."""
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)]
    return jnp.where(jnp.stack(finite).all(), loss, jnp.nan)


def _epoch_batch(rng: jax.Array, batch: jax.Array, num_images: int, batch_size: int) -> jax.Array:
    """Indices of a batch: every epoch is a permutation, what does not fill a batch is left out."""
    per_epoch = num_images // batch_size
    order = jax.random.permutation(jax.random.fold_in(rng, batch // per_epoch), num_images)
    return jax.lax.dynamic_slice_in_dim(order, (batch % per_epoch) * batch_size, batch_size)


def _step_indices(
    gan: Gan, rng: jax.Array, step: jax.Array | int, num_images: int, batch_size: int
) -> jax.Array:
    """Indices of the images that a seed is shown in a step, `[discriminator_steps, n]`."""
    order_rng = jax.random.fold_in(rng, 0)
    batches = step * gan.discriminator_steps + jnp.arange(gan.discriminator_steps)
    return jax.vmap(lambda b: _epoch_batch(order_rng, b, num_images, batch_size))(batches)


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
        indices = _step_indices(gan, state.rng, state.step, images.shape[0], batch_size)
        batch = parallel.constrain(images[indices], mesh, axis=1)
        return train_step(gan, state, batch.astype(jnp.float32) / 127.5 - 1, mesh)

    return _each_seed(one_seed, states, mesh)


@functools.partial(jax.jit, static_argnames=("gan", "mesh"), donate_argnames="states")
def step_batches(
    states: GanState, batches: jax.Array, *, gan: Gan, mesh: Mesh | None = None
) -> tuple[GanState, Losses]:
    """`step_all` on batches that are given: every seed sees the same ones.

    Args:
      states: with a leading axis of seeds, `[s, ...]`; donated.
      batches: images `[discriminator_steps, n, h, w, c]` uint8; divided among the devices along n
        (`parallel.shard`).
      gan: static.
      mesh: static; devices among which the batches are divided (`parallel.shard`), and on each of
        which the states are whole.
    Returns:
      the states and losses, each with the axis of seeds.
    """
    real = batches.astype(jnp.float32) / 127.5 - 1
    return _each_seed(lambda state: train_step(gan, state, real, mesh), states, mesh)


def _each_seed(
    one_seed: Callable[[GanState], tuple[GanState, Losses]], states: GanState, mesh: Mesh | None
) -> tuple[GanState, Losses]:
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
    images: np.ndarray | pipeline.Stream,
    *,
    seeds: tuple[int, ...],
    num_steps: int,
    batch_size: int | None = None,
    checkpoint_dir: str | None = None,
    checkpoint_every: int = 500,
    report_every: int = 10,
    progress: Callable[[int, Report], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> GanState:
    """Train `gan` once per seed, all seeds together, on all devices of all processes.

    Every batch is divided among the devices; the result is that of one device up to rounding. Of
    several processes each calls this with the same arguments.

    Args:
      gan: from `dcgan.dcgan`, `wgan_gp.wgan_gp`, ...
      images: the training set, `[n, h, w, c]` uint8, which is kept on the device and shown to each
        seed in an order of its own; or a stream from `pipeline.stream`, of whose batches every seed
        sees the same ones, and which is left where training ended.
      seeds: one model each.
      num_steps: generator updates. An epoch of the paper is `n // (batch_size *
        discriminator_steps)` of them.
      batch_size: the paper's 128 by default; a stream has its own.
      checkpoint_dir: where to save, and where to go on from.
      checkpoint_every: steps between two checkpoints; another is made at the end.
      report_every: steps between two looks at the losses, each of which waits for the device.
      progress: called at every look with the steps made so far and a `Report`.
      should_stop: asked at every look; where it says yes (of several processes: one of them),
        training saves and raises.
    Returns:
      the states with a leading axis of seeds, on one device; `take_seed` picks one.
    Raises:
      ValueError: if the images do not fit the model, or are fewer than a batch, or a batch cannot
        be divided among the processes; if the checkpoint is of another model, of other seeds, of
        more steps, or of a stream that another number of processes read.
      FloatingPointError: if a loss or a gradient is not finite, naming the step, the learning rate
        and the batch; checkpoints from before remain.
      checkpoints.Preempted: if `should_stop` said so; the same call goes on.
    """
    source: _Array | _Batches
    if isinstance(images, pipeline.Stream):
        source = _Batches(gan, images, batch_size)
    else:
        source = _Array(gan, images, 128 if batch_size is None else batch_size)
    if not seeds or num_steps < 0 or report_every < 1 or checkpoint_every < 1:
        raise ValueError(
            "seeds must not be empty, num_steps not negative, report_every and checkpoint_every "
            "positive"
        )
    states = parallel.replicate(init_seeds(gan, jnp.asarray(seeds, jnp.uint32)), source.mesh)
    step = 0
    if checkpoint_dir is not None:
        restored = _restored(checkpoint_dir, source.with_position(states))
        if restored is not None:
            rng, step, states = states.rng, restored[0], source.at_position(restored[1])
            _check_resumed(checkpoint_dir, step, states.rng, rng, seeds, num_steps)
    losses: list[Losses] = []
    since = time.perf_counter()
    try:
        while step < num_steps:
            states, loss = source.step(states, more=step + 1 < num_steps)
            losses.append(loss)
            step += 1
            saves = step % checkpoint_every == 0 or step == num_steps
            if not (saves or step % report_every == 0):
                continue
            # The only place that waits for the device.
            values = jax.tree.map(lambda *steps: np.stack(steps), *jax.device_get(losses))
            first = step - len(losses)
            bad = np.argwhere(~np.all([np.isfinite(value) for value in values], axis=0))
            if len(bad):
                raise _diverged(gan, source, states, seeds, values, first, *bad[0])
            seconds = time.perf_counter() - since
            report = Report(
                generator=np.mean(values.generator, axis=0),
                discriminator=np.mean(values.discriminator, axis=0),
                waiting=np.asarray(source.looked() / seconds),
            )
            losses, since = [], time.perf_counter()
            if progress is not None:
                progress(step, report)
            stops = (
                should_stop is not None and step < num_steps and parallel.anywhere(should_stop())
            )
            if (saves or stops) and checkpoint_dir is not None:
                checkpoints.save(checkpoint_dir, step, source.with_position(states))
            if stops:
                kept = f"kept in {checkpoint_dir}" if checkpoint_dir else "nothing was kept"
                raise checkpoints.Preempted(f"stopped after step {step} of {num_steps}, {kept}")
    finally:
        source.close()
    return parallel.local(states)


def _restored(folder: str, template: Any) -> tuple[int, Any] | None:
    """The newest checkpoint; one of another number of processes is no damage, and is named."""
    try:
        return checkpoints.restore_latest(folder, template)
    except ValueError as error:
        # Each process has a row of its own; this is how `checkpoints` says that there are others.
        found = re.search(r"position_per_process'\] is \[(\d+)\] there", str(error))
        if found is None:
            raise
        then, now = int(found[1]), jax.process_count()
        raise ValueError(
            f"what is in {folder} was trained by {then} process{'es' if then != 1 else ''}, this "
            f"is {now}: start as many, or train anew in another folder"
        ) from error


def _check_resumed(
    folder: str,
    step: int,
    found: jax.Array,
    expected: jax.Array,
    seeds: tuple[int, ...],
    num_steps: int,
) -> None:
    """A checkpoint of the same shapes may be another training's: the seeds' keys tell, `[s]`."""
    then, now = (jax.random.key_data(parallel.local(keys)) for keys in (found, expected))
    if not np.array_equal(then, now):
        raise ValueError(
            f"checkpoint {step} in {folder} is of other seeds than {', '.join(map(str, seeds))}: "
            "give the seeds that it was trained with, or another folder to train these from the "
            "start"
        )
    if step > num_steps:
        raise ValueError(
            f"checkpoint {step} in {folder} has more steps than num_steps={num_steps}: give at "
            f"least {step} to go on from it, or another folder to train anew"
        )


class _Array:
    """Training images that lie on the device; where a seed is in them, its state tells."""

    def __init__(self, gan: Gan, images: np.ndarray, batch_size: int) -> None:
        data.check_images(images, shape=gan.image_shape)
        if images.dtype != np.uint8:
            raise ValueError(
                f"training images must be uint8, got {images.dtype}; see data.to_uint8"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be positive")
        if len(images) < batch_size:
            raise ValueError(
                f"{len(images)} images are fewer than one batch of {batch_size}: lower the batch "
                "size"
            )
        self._gan, self._images, self._batch_size = gan, images, batch_size
        self.mesh = parallel.mesh(batch_size)
        self._on_device = parallel.replicate(jnp.asarray(images), self.mesh)

    def step(self, states: GanState, *, more: bool) -> tuple[GanState, Losses]:
        del more
        return step_all(
            states,
            self._on_device,
            gan=self._gan,
            batch_size=self._batch_size,
            mesh=self.mesh,
        )

    def looked(self) -> float:
        return 0.0

    def close(self) -> None:
        """Nothing is open."""

    def with_position(self, states: GanState) -> Any:
        return states

    def at_position(self, saved: Any) -> GanState:
        return saved

    def batches(self, rng: jax.Array, step: int, since_look: int) -> np.ndarray:
        """What a seed was shown in a step, `[discriminator_steps, n, h, w, c]`."""
        del since_look
        indices = _step_indices(self._gan, rng, step, len(self._images), self._batch_size)
        return self._images[np.asarray(indices)]


class _Batches:
    """Training images that come from a stream.

    The batches of the next step are fetched, and sent to the device, while it makes this one.
    """

    def __init__(self, gan: Gan, stream: pipeline.Stream, batch_size: int | None) -> None:
        if stream.image_shape != gan.image_shape:
            raise ValueError(
                f"images must be [n, {', '.join(map(str, gan.image_shape))}], the stream has "
                f"{list(stream.image_shape)}; give it an image_size"
            )
        if batch_size not in (None, stream.batch_size):
            raise ValueError(
                f"the batch size is {batch_size}, but that of the stream is {stream.batch_size}"
            )
        if stream.rows * jax.process_count() != stream.batch_size:
            raise ValueError(
                f"the stream gives {stream.rows} of {stream.batch_size} images to each of "
                f"{stream.batch_size // stream.rows} processes, there are {jax.process_count()}: "
                "give it jax.process_index() and jax.process_count()"
            )
        self._gan, self._stream = gan, stream
        self.mesh = parallel.mesh(stream.batch_size)
        self._next: jax.Array | None = None
        self._position = stream.position  # before the next batches
        self._positions: list[int] = []  # before each step since the last look
        self._waited = 0.0
        # Learns when a step has ended, without keeping the loop from starting others.
        self._watch = concurrent.futures.ThreadPoolExecutor(1, "flipad-step-ended")

    def _read(self) -> np.ndarray:
        return np.stack([next(self._stream) for _ in range(self._gan.discriminator_steps)])

    def _fetch(self) -> jax.Array:
        batches = self._read()
        if self.mesh.size == 1:
            return jnp.asarray(batches)
        return parallel.shard(batches, self.mesh, axis=1)

    def step(self, states: GanState, *, more: bool) -> tuple[GanState, Losses]:
        if self._next is None:
            start = time.perf_counter()
            self._next = self._fetch()
            self._waited += time.perf_counter() - start
        self._positions.append(self._position)
        states, losses = step_batches(states, self._next, gan=self._gan, mesh=self.mesh)
        ended = self._watch.submit(_when_ready, losses.generator)
        self._position, self._next = self._stream.position, None
        if more:
            start = time.perf_counter()
            self._next = self._fetch()
            if ended.done():  # else the device has not waited
                self._waited += time.perf_counter() - max(start, ended.result())
        return states, losses

    def close(self) -> None:
        """Let go of the thread; the stream is the caller's."""
        self._watch.shutdown(wait=False, cancel_futures=True)

    def looked(self) -> float:
        """Seconds since the last look in which the device had nothing to do for want of data."""
        waited, self._waited, self._positions = self._waited, 0.0, []
        return waited

    def with_position(self, states: GanState) -> Any:
        # A row per process, as bad records may have carried one of them further than another.
        position = parallel.gather(np.array([self._position]))
        return {"states": states, "position_per_process": position}

    def at_position(self, saved: Any) -> GanState:
        self._position = int(saved["position_per_process"][jax.process_index()])
        self._stream.position = self._position
        return saved["states"]

    def batches(self, rng: jax.Array, step: int, since_look: int) -> np.ndarray:
        """What this process showed in a step, `[discriminator_steps, n, h, w, c]`."""
        del rng, step
        self._stream.position = self._positions[since_look]
        return self._read()


def _when_ready(array: jax.Array) -> float:
    jax.block_until_ready(array)
    return time.perf_counter()


def _diverged(
    gan: Gan,
    source: _Array | _Batches,
    states: GanState,
    seeds: tuple[int, ...],
    losses: Losses,
    first: int,
    since_look: int,
    index: int,
) -> FloatingPointError:
    """The error that says which step was the first to spoil a seed, and on what."""
    step = first + since_look
    values = {name: value[since_look, index] for name, value in losses._asdict().items()}
    which = " and the ".join(f"{name}'s" for name, v in values.items() if not np.isfinite(v))
    batches = source.batches(parallel.local(states.rng)[index], step, since_look)
    digest = hashlib.sha256(batches.tobytes()).hexdigest()[:12]
    rate = "" if gan.learning_rate is None else f", learning rate {gan.learning_rate:g}"
    return FloatingPointError(
        f"the {which} loss or its gradient is not finite in step {step + 1} (seed {seeds[index]}"
        f"{rate}, images {digest}); checkpoints from before remain"
    )


def take_seed(states: GanState, index: int) -> GanState:
    """The state of one seed out of `train`'s result."""
    return jax.tree.map(lambda leaf: leaf[index], states)
