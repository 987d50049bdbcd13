"""DeepSAD: a network that puts own samples near a centre and real samples far from it.

FLIPAD paper, appendix A and E.4; the method is Ruff et al., "Deep Semi-Supervised Anomaly
Detection" (ICLR 2020). Without unlabelled samples eq. 6 becomes

    mean_i eta (||phi(x_i) - c||^2 + eps)^{y_i} + weight decay,   y = +1 own, -1 real,

and the score is ||phi(x) - c||^2: higher = less likely ours. RawPAD, DCTPAD and FLIPAD are this
file on three kinds of features (`features.py`).

Deviations from the published code:

- The centre is the mean over all training samples (published: the last, incomplete batch is left
  out), and a coordinate of exactly 0 is pushed to +0.1 (published: stays 0).
- The running variance of BatchNorm takes the biased variance of a batch (PyTorch: times m/(m-1),
  m the number of positions in the batch: 1.0001 and less at the paper's sizes).
- A tie in max-pooling shares its gradient among the tied positions (PyTorch: the first takes it).
- No pre-training as an autoencoder, as in the published code of FLIPAD; Ruff et al. have one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from flipad_jax import parallel
from flipad_jax.detection.feature_rows import FeatureRows
from flipad_jax.generators import layers

__all__ = [
    "DeepSAD",
    "DeepSADConfig",
    "DeepSADState",
    "ENCODER_WIDTHS",
    "LeNet",
    "embed",
    "finish",
    "fit",
    "init",
    "loss",
    "push_from_zero",
    "score",
    "train_epoch",
    "train_step",
    "with_centre",
]

# Channels of the paper's encoders by kind of feature; "large": Stable Diffusion, 128x128.
ENCODER_WIDTHS = {
    "pixels": (32, 64, 128),
    "dct": (32, 64, 128),
    "activations": (128, 256, 128),
    "large": (32, 64, 128, 64),
}

_CENTRE_MARGIN = 0.1


@dataclasses.dataclass(frozen=True)
class DeepSADConfig:
    """All that training depends on besides data and seed; defaults: the paper's for GANs.

    For Stable Diffusion the published code has widths "large", 100 epochs, batches of 32 and drops
    at epochs 25 and 50.

    Attributes:
      widths: channels of the encoder's convolutions, e.g. `ENCODER_WIDTHS["activations"]`.
      rep_dim: length of a representation.
      eta: weight of the labelled terms in eq. 6 (all terms, here).
      eps: added to squared distances, which keeps the inverse finite.
      epochs: passes over the data.
      batch_size: samples in a step; an incomplete last batch is dropped.
      learning_rate: Adam's, in the first epochs.
      drop_epochs: epochs (from 0) at whose start the learning rate is multiplied by `drop_factor`.
      drop_factor: see above.
      weight_decay: coupled L2, added to the gradient before Adam (as `torch.optim.Adam` does it).
    """

    widths: tuple[int, ...] = ENCODER_WIDTHS["pixels"]
    rep_dim: int = 128
    eta: float = 1.0
    eps: float = 1e-6
    epochs: int = 50
    batch_size: int = 128
    learning_rate: float = 5e-4
    drop_epochs: tuple[int, ...] = (25,)
    drop_factor: float = 0.1
    weight_decay: float = 0.5e-6

    def __post_init__(self):
        for name in ("widths", "drop_epochs"):  # a list, say from JSON, could not be hashed
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.widths or min(*self.widths, self.rep_dim) < 1:
            raise ValueError(
                f"DeepSADConfig: widths={self.widths}, rep_dim={self.rep_dim}: expected > 0."
            )
        for name in ("epochs", "eta", "eps", "learning_rate", "drop_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"DeepSADConfig: {name}={getattr(self, name)}: expected > 0.")
        if self.batch_size < 2 or self.weight_decay < 0 or min(self.drop_epochs, default=1) < 1:
            raise ValueError(
                f"DeepSADConfig: batch_size={self.batch_size}, weight_decay={self.weight_decay}, "
                f"drop_epochs={self.drop_epochs}: expected batch_size >= 2, weight_decay >= 0, "
                "drop_epochs >= 1."
            )


# ---------------------------------------------------------------------------------------------
# The network


def _halve(x: jax.Array) -> jax.Array:
    """2x2 maximum of `[n, h, w, c]`, an odd last row or column left out.

    Maxima of rows, then of columns: on a CPU the gradient of a window reduction is several times
    slower, and that of one maximum over a reshaped array by a third to a half (32 and 16 pixels).
    """
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = jnp.maximum(x[:, 0:h:2], x[:, 1:h:2])
    return jnp.maximum(x[:, :, 0:w:2], x[:, :, 1:w:2])


# PyTorch's default for layers without bias: uniform in +-1/sqrt(fan_in).
_init_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LeNet(nn.Module):
    """The encoder phi: blocks of convolution, BatchNorm, leaky ReLU, max-pooling; a dense layer.

    Nothing has a bias and BatchNorm has no parameters, so that phi cannot be made constant.

    Attributes:
      widths: channels of the 5x5 convolutions; every block halves the sides.
      rep_dim: length of the representation.
    """

    widths: tuple[int, ...] = ENCODER_WIDTHS["pixels"]
    rep_dim: int = 128

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map features `[n, h, w, c]` float32 to representations `[n, rep_dim]` float32.

        With `train` BatchNorm uses the statistics of the batch and updates the collection
        "batch_stats".
        """
        for i, width in enumerate(self.widths):
            # Named as Flax names its own, for detectors that were saved.
            x = layers.SameConv(width, 5, _init_kernel, name=f"Conv_{i}")(x)
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-4,
                use_bias=False,
                use_scale=False,
                use_fast_variance=False,
                dtype=jnp.float32,
                param_dtype=jnp.float32,
            )(x)
            x = _halve(nn.leaky_relu(x, 0.01))
        return nn.Dense(
            self.rep_dim,
            use_bias=False,
            kernel_init=_init_kernel,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
        )(x.reshape(x.shape[0], -1))


def _network(config: DeepSADConfig) -> LeNet:
    return LeNet(widths=config.widths, rep_dim=config.rep_dim)


# ---------------------------------------------------------------------------------------------
# State, loss, step


@struct.dataclass
class DeepSADState:
    """Everything that the next epoch needs; a pytree of arrays, to be written to a checkpoint as it
    is."""

    params: Any  # weights of `LeNet`
    batch_stats: Any  # running statistics of BatchNorm
    centre: jax.Array  # [rep_dim]
    opt_state: Any  # Adam's moments
    epoch: jax.Array  # [] int32, epochs done
    losses: jax.Array  # [config.epochs] mean loss of each epoch, NaN for those to come


@struct.dataclass
class DeepSAD:
    """A trained detector: what `score` needs and nothing else."""

    params: Any
    batch_stats: Any
    centre: jax.Array  # [rep_dim]
    config: DeepSADConfig = struct.field(pytree_node=False)
    input_shape: tuple[int, ...] = struct.field(pytree_node=False)  # (h, w, c) of features


def finish(state: DeepSADState, config: DeepSADConfig, input_shape: tuple[int, ...]) -> DeepSAD:
    """The detector as it is after the epochs that `state` has seen."""
    return DeepSAD(
        params=state.params,
        batch_stats=state.batch_stats,
        centre=state.centre,
        config=config,
        input_shape=tuple(input_shape),
    )


def _optimizer(config: DeepSADConfig) -> optax.GradientTransformation:
    # Weight decay before Adam is the coupled L2 of torch.optim.Adam; optax.adamw would decouple it.
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.scale_by_adam())


def _learning_rate(config: DeepSADConfig, epoch: jax.Array) -> jax.Array:
    drops = {drop: config.drop_factor for drop in config.drop_epochs}
    schedule = optax.piecewise_constant_schedule(config.learning_rate, drops)
    return jnp.asarray(schedule(epoch), jnp.float32)


def _init_network(rng, *, input_shape, config):
    sample = jnp.zeros((1, *input_shape), jnp.float32)
    return _network(config).init(rng, sample, train=False)


_init_network_jit = layers.jit_for_one_run(_init_network, static_argnames=("input_shape", "config"))


def init(rng: jax.Array, input_shape: tuple[int, ...], config: DeepSADConfig) -> DeepSADState:
    """A fresh state; its centre is zero until `with_centre` has seen the data.

    Args:
      rng: key for the weights.
      input_shape: (h, w, c) of a feature map.
      config: settings.

    Raises:
      ValueError: if a feature map is too small for the encoder's halvings.
    """
    smallest = 2 ** len(config.widths)
    if len(input_shape) != 3 or min(input_shape[:2]) < smallest:
        raise ValueError(
            f"DeepSAD: features of shape {list(input_shape)}, but an encoder of "
            f"{len(config.widths)} blocks needs [h, w, c] with h, w >= {smallest}; use fewer "
            "widths or larger features."
        )
    variables = _init_network_jit(rng, input_shape=tuple(input_shape), config=config)
    return DeepSADState(
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        centre=jnp.zeros(config.rep_dim, jnp.float32),
        opt_state=_optimizer(config).init(variables["params"]),
        epoch=jnp.zeros((), jnp.int32),
        losses=jnp.full(config.epochs, jnp.nan, jnp.float32),
    )


def loss(
    distances: jax.Array, labels: jax.Array, *, eta: float = 1.0, eps: float = 1e-6
) -> jax.Array:
    """[P1] eq. 6 without unlabelled samples and weight decay: mean of eta (d + eps)^y.

    Args:
      distances: `[n]` squared distances d to the centre.
      labels: `[n]` y, +1 for own, -1 for real samples.
      eta: weight.
      eps: keeps the inverse finite; not in the paper, 1e-6 in its code.

    Returns:
      [] the mean.
    """
    distances = distances + eps
    return eta * jnp.mean(jnp.where(labels > 0, distances, 1 / distances))


def train_step(
    state: DeepSADState, x: jax.Array, labels: jax.Array, config: DeepSADConfig
) -> tuple[DeepSADState, jax.Array]:
    """One step of Adam. Pure; `config` is static under jit.

    Args:
      state: before the step.
      x: `[batch, h, w, c]` features.
      labels: `[batch]` +1 own, -1 real.
      config: settings.

    Returns:
      The state after the step (epoch and losses untouched) and the loss before it.
    """

    def objective(params):
        representation, updates = _network(config).apply(
            {"params": params, "batch_stats": state.batch_stats},
            x.astype(jnp.float32),
            train=True,
            mutable=["batch_stats"],
        )
        distances = jnp.square(representation - state.centre[None]).sum(axis=-1)
        return loss(distances, labels, eta=config.eta, eps=config.eps), updates["batch_stats"]

    (value, batch_stats), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    updates, opt_state = _optimizer(config).update(grads, state.opt_state, state.params)
    rate = _learning_rate(config, state.epoch)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    return (
        dataclasses.replace(state, params=params, batch_stats=batch_stats, opt_state=opt_state),
        value,
    )


def _train_on_batch(state, x, labels, config, mesh=None):
    """`train_step` with the batch divided among the devices of `mesh`."""
    x, labels = parallel.constrain((x, labels), mesh)
    return parallel.constrain(train_step(state, x, labels, config), mesh, axis=None)


def _train_on_rows(state, own, real, index, config, mesh):
    """`train_step` on rows `index` of own and real samples put one after the other, which would
    copy them."""
    index = parallel.constrain(index, mesh)
    is_own = index < own.shape[0]
    own_rows = own[jnp.where(is_own, index, 0)]
    real_rows = real[jnp.where(is_own, 0, index - own.shape[0])]
    x = jnp.where(is_own[:, None, None, None], own_rows, real_rows)
    return _train_on_batch(state, x, jnp.where(is_own, 1, -1), config, mesh)


_train_step_jit = jax.jit(_train_on_batch, static_argnames=("config", "mesh"))
_train_on_rows_jit = jax.jit(_train_on_rows, static_argnames=("config", "mesh"))


def train_epoch(
    rng: jax.Array,
    state: DeepSADState,
    own: jax.Array | np.ndarray | FeatureRows,
    real: jax.Array | np.ndarray | FeatureRows,
    config: DeepSADConfig,
) -> tuple[DeepSADState, jax.Array]:
    """One pass over the shuffled samples, an incomplete last batch left out.

    Every batch is divided among all devices of all processes (`parallel.mesh`), with the loss and
    the BatchNorm of the whole. Of several processes each calls this with the same arguments.

    The order depends on `rng` and `state.epoch` only, so that a run taken up from a checkpoint goes
    on as if it had never stopped. A step is one compiled call, and the calls are queued without
    waiting for results. No `lax.scan` over the steps: XLA's CPU backend runs convolutions inside a
    loop on a slow path (measured: 40 times slower).

    Args:
      rng: the same key in every epoch.
      state: with its centre set.
      own: `[n, h, w, c]` features of own samples. A JAX array stays on its device; rows of a NumPy
        array or of a `FeatureRows` are moved batch by batch: for sets larger than the memory.
      real: `[m, h, w, c]` features of real samples, the same kind of array.
      config: settings.

    Returns:
      The state with `epoch` and `losses` brought up to date, and the mean loss [] of the epoch;
      with several devices, whole on each of them.

    Raises:
      ValueError: if a batch cannot be divided among the processes.
    """
    size, batch_size = own.shape[0] + real.shape[0], config.batch_size
    mesh = parallel.mesh(batch_size)
    mine = parallel.local_range(batch_size)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(rng, int(state.epoch)), size))
    on_host = not (isinstance(own, jax.Array) and isinstance(real, jax.Array))
    state = parallel.replicate(state, mesh)
    if not on_host:
        own, real = parallel.replicate((own, real), mesh)
    values = []
    for start in range(0, size - batch_size + 1, batch_size):
        # This process's part of the batch.
        index = order[start + mine.start : start + mine.stop].astype(np.int32)
        if on_host:
            is_own = index < own.shape[0]
            x = np.empty((len(index), *own.shape[1:]), np.float32)
            x[is_own] = own[index[is_own]]
            x[~is_own] = real[index[~is_own] - own.shape[0]]
            x, labels = parallel.shard((x, np.where(is_own, 1, -1)), mesh)
            state, value = _train_step_jit(state, x, labels, config, mesh)
        else:
            index = parallel.shard(index, mesh)
            state, value = _train_on_rows_jit(state, own, real, index, config, mesh)
        values.append(value)
    mean = jnp.stack(values).mean()
    losses = state.losses.at[state.epoch].set(mean)
    return dataclasses.replace(state, epoch=state.epoch + 1, losses=losses), mean


# ---------------------------------------------------------------------------------------------
# Representations, centre, score


def _embed(params, batch_stats, x, config):
    """Eval-mode representations; a row of NaN where a sample holds NaN or infinity."""
    x = x.astype(jnp.float32)
    representation = _network(config).apply(
        {"params": params, "batch_stats": batch_stats}, x, train=False
    )
    # Said outright: an infinite sample may otherwise end in an infinite score, which looks decided.
    finite = jnp.isfinite(x).all(axis=(1, 2, 3))
    return jnp.where(finite[:, None], representation, jnp.nan)


_embed_jit = jax.jit(_embed, static_argnames="config")


def embed(
    model: DeepSAD | DeepSADState,
    x: jax.Array | np.ndarray | FeatureRows,
    config: DeepSADConfig,
) -> np.ndarray:
    """Representations phi(x) with BatchNorm in eval mode, on the devices of this process.

    Args:
      model: weights and running statistics.
      x: `[n, h, w, c]` features, n >= 0.
      config: settings; `batch_size` samples at a time, the last batch filled up with zeros, so that
        every number of samples runs the same compiled program and a sample's result does not depend
        on its batch.

    Returns:
      `[n, rep_dim]` float32; a row is NaN if its sample is not finite.
    """
    mesh = parallel.local_mesh(config.batch_size)
    variables = parallel.replicate((model.params, model.batch_stats), mesh)
    rows = [np.zeros((0, config.rep_dim), np.float32)]
    for start in range(0, x.shape[0], config.batch_size):
        batch = x[start : start + config.batch_size]
        count = batch.shape[0]
        if count < config.batch_size:
            array = np if isinstance(batch, np.ndarray) else jnp
            batch = array.pad(batch, [(0, config.batch_size - count), (0, 0), (0, 0), (0, 0)])
        batch = parallel.shard(batch, mesh)
        rows.append(np.asarray(_embed_jit(*variables, batch, config))[:count])
    return np.concatenate(rows)


def push_from_zero(centre: jax.Array, margin: float = _CENTRE_MARGIN) -> jax.Array:
    """Move coordinates with abs(c_i) < margin to +-margin: a zero weight could match a centre of 0.

    An exact 0 goes to +margin (in the published code it stays).
    """
    pushed = jnp.where(centre < 0, -margin, margin).astype(centre.dtype)
    return jnp.where(jnp.abs(centre) < margin, pushed, centre)


def with_centre(
    state: DeepSADState,
    own: jax.Array | np.ndarray | FeatureRows,
    real: jax.Array | np.ndarray | FeatureRows,
    config: DeepSADConfig,
) -> DeepSADState:
    """Set the centre: mean eval-mode representation of own and real samples together, off zero.

    Raises:
      ValueError: if features contain NaN or infinity, with their number.
    """
    own_rows, real_rows = embed(state, own, config), embed(state, real, config)
    bad = [int((~np.isfinite(rows).all(axis=1)).sum()) for rows in (own_rows, real_rows)]
    if any(bad):
        raise ValueError(
            f"DeepSAD: NaN or infinity in {bad[0]} of {len(own_rows)} own and {bad[1]} of "
            f"{len(real_rows)} real samples; leave these out."
        )
    mean = np.concatenate([own_rows, real_rows]).mean(axis=0, dtype=np.float64)
    return dataclasses.replace(state, centre=push_from_zero(jnp.asarray(mean, jnp.float32)))


def _check_features(own, real, config):
    for name, x in (("own", own), ("real", real)):
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"DeepSAD: {name} features are {x.dtype}{list(x.shape)}, expected floating point "
                "[n, h, w, c]."
            )
    if own.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"DeepSAD: own features {list(own.shape[1:])} and real features {list(real.shape[1:])} "
            f"differ in shape."
        )
    if min(own.shape[0], real.shape[0]) < 1 or own.shape[0] + real.shape[0] < config.batch_size:
        raise ValueError(
            f"DeepSAD: {own.shape[0]} own and {real.shape[0]} real samples; expected some of both, "
            f"and at least one batch (batch_size={config.batch_size}) together."
        )


def fit(
    rng: jax.Array,
    own: jax.Array | np.ndarray | FeatureRows,
    real: jax.Array | np.ndarray | FeatureRows,
    config: DeepSADConfig = DeepSADConfig(),
    *,
    state: DeepSADState | None = None,
    progress: Callable[[DeepSADState], None] | None = None,
) -> tuple[DeepSAD, np.ndarray]:
    """Train a detector on own against real samples ([P1] appendix A), on all devices.

    Args:
      rng: key; the same key, data and config give the same detector.
      own: `[n, h, w, c]` features of own samples, JAX, NumPy or `FeatureRows` (see `train_epoch`).
      real: `[m, h, w, c]` features of real samples.
      config: settings.
      state: go on from here, with the same `rng`; default: start anew.
      progress: called with the state after every epoch: to show `losses`, or to save the state.

    Returns:
      The detector and the mean loss of every epoch, `[config.epochs]` float32.

    Raises:
      ValueError: for features that do not fit or are not finite.
      FloatingPointError: if the loss of an epoch is not finite.
    """
    _check_features(own, real, config)
    init_rng, shuffle_rng = jax.random.split(rng)
    if state is None:
        state = with_centre(init(init_rng, own.shape[1:], config), own, real, config)
    if isinstance(own, jax.Array) and isinstance(real, jax.Array):  # to all devices once
        own, real = parallel.replicate((own, real), parallel.mesh(config.batch_size))
    while (epoch := int(state.epoch)) < config.epochs:
        state, value = train_epoch(shuffle_rng, state, own, real, config)
        if not np.isfinite(value):
            raise FloatingPointError(
                f"DeepSAD: the loss is {float(value)} in epoch {epoch + 1} of {config.epochs}; "
                f"lower the learning rate ({config.learning_rate}) or look at the scale of the "
                "features."
            )
        if progress is not None:
            progress(state)
    state = parallel.local(state)
    return finish(state, config, own.shape[1:]), np.asarray(state.losses)


def score(model: DeepSAD, x: jax.Array | np.ndarray) -> np.ndarray:
    """Squared distance to the centre, [P1] eq. 7 squared: higher = less likely ours.

    Args:
      model: from `fit`.
      x: `[n, h, w, c]` features as in training, n >= 0.

    Returns:
      `[n]` float32; NaN for a sample that is not finite.

    Raises:
      ValueError: if the features do not have the shape of those in training.
    """
    if tuple(x.shape[1:]) != model.input_shape:
        raise ValueError(
            f"DeepSAD: features {list(x.shape)}, expected [n, "
            f"{', '.join(map(str, model.input_shape))}] as in training."
        )
    return np.square(embed(model, x, model.config) - np.asarray(model.centre)).sum(axis=-1)
