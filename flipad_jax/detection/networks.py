"""How the small networks of `classifier` and `reconstruction` are trained and asked."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from flipad_jax import data, parallel
from flipad_jax.detection.feature_rows import FeatureRows
from flipad_jax.generators import layers

__all__ = ["ask", "train"]


def train(
    rng: jax.Array,
    network: nn.Module,
    input_shape: tuple[int, ...],
    loss: Callable[..., jax.Array],
    draw: Callable[[np.random.Generator], tuple[np.ndarray, ...]],
    *,
    num_rows: int,
    num_steps: int,
    learning_rate: float,
    weight_decay: float,
    what: str,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """AdamW with one learning-rate cycle, every batch divided among all devices of all processes.

    Args:
      rng: key of initialisation and batches; batch i is a function of it and of i.
      network: `network(x, train=...)`, with `params` and `batch_stats`.
      input_shape: of one x, without the batch axis.
      loss: `(predict, *batch) -> ` scalar, where `predict(x)` is the network in training mode;
        traced.
      draw: of a generator, makes the arrays of a batch, `[num_rows, ...]` each.
      num_rows: rows of a batch.
      num_steps: training steps; none leaves the network as it was initialised.
      learning_rate: the highest of the cycle.
      weight_decay: of AdamW.
      what: the network's name, for the error.
      progress: called with the number of steps done.
    Returns:
      Flax variables.
    Raises:
      ValueError: for a batch that cannot be divided among the processes, or weights that end in NaN
        or infinity.
    """
    mesh = parallel.mesh(num_rows)
    optimizer = optax.adamw(
        optax.cosine_onecycle_schedule(max(num_steps, 1), learning_rate), weight_decay=weight_decay
    )
    init_rng, batch_rng = jax.random.split(rng)
    init = layers.jit_for_one_run(functools.partial(network.init, train=False))
    variables = init(init_rng, jnp.zeros((1, *input_shape), jnp.float32))
    opt_state = jax.jit(optimizer.init)(variables["params"])
    variables, opt_state = parallel.replicate((variables, opt_state), mesh)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables, opt_state, batch):
        batch = parallel.constrain(batch, mesh)

        def loss_of(params):
            updated = {}

            def predict(x):
                found, changed = network.apply(
                    {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
                )
                updated.update(changed)
                return found

            return loss(predict, *batch), updated

        grads, updated = jax.grad(loss_of, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return parallel.constrain(({"params": params, **updated}, opt_state), mesh, axis=None)

    # A host loop of one compiled step: kernel gradients inside a compiled loop are slow on a CPU.
    mine = parallel.local_range(num_rows)
    seed = int(jax.random.randint(batch_rng, (), 0, np.iinfo(np.int32).max))
    for index in range(num_steps):
        rows = draw(np.random.default_rng([seed, index]))
        batch = parallel.shard(tuple(row[mine.start : mine.stop] for row in rows), mesh)
        variables, opt_state = step(variables, opt_state, batch)
        if progress is not None:
            progress(index + 1)
    variables = parallel.local(variables)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(variables)):
        raise ValueError(
            f"the network that {what} ended with weights that are not finite after {num_steps} "
            f"steps: lower learning_rate={learning_rate}, or look for extreme values in what it "
            "learns from"
        )
    return variables


def ask(
    compute: Callable[..., np.ndarray],
    model: Any,
    rows: np.ndarray | FeatureRows,
    batch_size: int,
) -> np.ndarray:
    """A number per row, batch by batch on the devices of this process.

    Args:
      compute: `(model, batch, put) -> [batch_size]`; `put` divides an array among the devices.
      model: a pytree, the same for all batches.
      rows: `[n, h, w, c]` images or activations; given as float32, the last batch filled up, so
        that every number of rows runs the same compiled program.
      batch_size: rows of a batch.
    Returns:
      `[n]` float64.
    """
    mesh = parallel.local_mesh(batch_size)
    model = parallel.replicate(model, mesh)
    put = functools.partial(parallel.shard, mesh=mesh)
    found = [np.zeros(0)]
    for start in range(0, len(rows), batch_size):
        batch = data.to_float(rows[start : start + batch_size])
        values = np.asarray(compute(model, data.filled(batch, batch_size), put), np.float64)
        found.append(values[: len(batch)])
    return np.concatenate(found)
