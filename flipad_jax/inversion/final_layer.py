"""Final-layer inversion (FLIPAD paper, section 4.2): from images to activations.

A generator ends with x = sigma(A z + bias). For an image x, `targets` undoes sigma and the bias,
and `invert` finds the activation z that is closest to the mean activation z_bar in the l1 sense:

    minimise  ||A z - o||^2 + lambda ||z - z_bar||_1  over z,   o = sigma^{-1}(x) - bias   (eq. 5).

With z' = z - z_bar and o' = o - A z_bar that is an ordinary lasso (appendix B.1), and it has one
solution (Theorem 4.5). The library writes it with a half, 1/2 ||A z' - o'||^2 + lam ||z'||_1, so
its `lam` is HALF of the paper's lambda. The authors' published runs also used the half: lam = 5e-4
there is lam = 5e-4 here, and lambda = 1e-3 in the paper's notation.

Images are `[n, h, w, c]`, uint8 or float32 in [-1, 1], x = u / 127.5 - 1. The last activations:

* "tanh": x = tanh(a).
* "sigmoid": the generator makes p = sigmoid(a) in (0, 1) and the image is x = 2 p - 1, that is
  p = (x + 1) / 2; so x = tanh(a / 2).
* "identity": x = a, as in the decoders of latent diffusion.

tanh and sigmoid never reach -1 and 1, grey levels 0 and 255 do. x is therefore clipped to
+-(1 - 1e-4) first, as in the authors' code: |a| <= 4.95 for tanh, 9.90 for sigmoid. No other grey
level is touched.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flipad_jax.inversion import lasso
from flipad_jax.inversion.lasso import LassoInfo
from flipad_jax.inversion.linops import LinearOperator

__all__ = [
    "ACTIVATIONS",
    "FinalLayer",
    "activate",
    "forward",
    "invert",
    "mean_activation",
    "targets",
]

ACTIVATIONS = ("tanh", "sigmoid", "identity")

_CLIP = 1 - 1e-4
# Float images may overshoot by rounding (a resize, a sum of weights): not an error.
_RANGE_SLACK = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FinalLayer:
    """Last layer of a generator: linear operator, bias, invertible activation.

    Attributes:
      operator: A, whose `output_shape` is that of an image, `(h, w, c)`.
      bias: `[c]`, added to every pixel before the activation, or of the shape of an image, as a
        dense layer has it; None for none.
      activation: "tanh", "sigmoid" or "identity"; see the module docstring.
    """

    operator: LinearOperator
    bias: jax.Array | None = None
    activation: str = dataclasses.field(default="tanh", metadata={"static": True})

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r} has no inverse here; choose from {ACTIVATIONS}"
            )


def forward(layer: FinalLayer, z: jax.Array) -> jax.Array:
    """Image of one activation: sigma(A z + bias), `[h, w, c]`; batch with `jax.vmap`.

    In [-1, 1], but for the activation "identity", which bounds nothing.

    Raises:
      ValueError: if the shape or dtype of `z` or of the bias is not that of the operator.
    """
    return activate(layer, layer.operator.forward(z))


def activate(layer: FinalLayer, before: jax.Array) -> jax.Array:
    """Image of what the operator has made, `[h, w, c]` of any size: sigma(before + bias)."""
    if layer.bias is not None:
        before = before + _bias(layer)
    if layer.activation == "tanh":
        return jnp.tanh(before)
    if layer.activation == "sigmoid":
        return jnp.tanh(0.5 * before)
    return before


def targets(layer: FinalLayer, images: np.ndarray | jax.Array) -> jax.Array:
    """Undo activation and bias: the o that `A z` should equal.

    Args:
      layer: the last layer.
      images: `[n, h, w, c]`, uint8 or float32 in [-1, 1].

    Returns:
      `[n, h, w, c]` in the dtype of the operator, finite; unbounded units before the activation.

    Raises:
      ValueError: if the images have another shape or dtype, or hold NaN or values outside [-1, 1];
        the message names the images by index.
    """
    images, dtype = _check_images(layer, images), layer.operator.dtype
    # logit((x + 1) / 2) = 2 artanh(x), so the two activations differ by a factor.
    factor = {"tanh": 1, "sigmoid": 2, "identity": None}[layer.activation]
    if images.dtype == jnp.uint8:
        # All grey levels in float64 on the host. In float32 the slope of artanh, 5000 at the clip,
        # would turn the rounding of x into 1e-4 of o, a quarter of the usual lam.
        levels = np.arange(256) / 127.5 - 1
        if factor is not None:
            levels = factor * np.arctanh(np.clip(levels, -_CLIP, _CLIP))
        o = jnp.asarray(levels, dtype)[images]
    elif factor is None:
        o = images.astype(dtype)
    else:
        # For the same reason the clip is applied to o: 1 - 1e-4 is no float32.
        limit = float(np.arctanh(_CLIP))
        o = jnp.clip(jnp.arctanh(jnp.clip(images.astype(dtype), -1, 1)), -limit, limit) * factor
    return o if layer.bias is None else o - _bias(layer)[None]


def invert(
    layer: FinalLayer,
    images: np.ndarray | jax.Array,
    z_bar: np.ndarray | jax.Array,
    *,
    lam: float = 5e-4,
    **solve_options: Any,
) -> tuple[jax.Array, LassoInfo]:
    """Find the activations from which the last layer makes the images (FLIPAD paper, eq. 5).

    Args:
      layer: the last layer of one's own model.
      images: `[n, h, w, c]`, uint8 or float32 in [-1, 1].
      z_bar: mean activation, `layer.operator.input_shape`, see `mean_activation`.
      lam: weight in 1/2 ||A z - o||^2 + lam ||z - z_bar||_1, half of the paper's lambda.
      **solve_options: `method`, `tol`, `max_iters`, `lipschitz`, `chunk_size`, `z_init` (which
        starts z - z_bar) and `progress` of `lasso.solve`.

    Returns:
      `(z [n, *input_shape], info)`: full activations, z_bar included; `info` says for each image
      how far from optimal it is. Read it before using z.

    Raises:
      ValueError: if images, z_bar or an option are wrong, before anything is solved.
    """
    operator = layer.operator
    z_bar = jnp.asarray(z_bar)
    if z_bar.shape != operator.input_shape or not jnp.issubdtype(z_bar.dtype, jnp.floating):
        raise ValueError(
            f"z_bar has shape {z_bar.shape} and dtype {z_bar.dtype}, expected a floating array of "
            f"the operator's input shape {operator.input_shape}"
        )
    z_bar = z_bar.astype(operator.dtype)
    if not bool(jnp.all(jnp.isfinite(z_bar))):
        raise ValueError("z_bar holds NaN or infinite values")
    shifted = targets(layer, images) - operator.forward(z_bar)[None]
    z, info = lasso.solve(operator, shifted, lam=lam, **solve_options)
    return _add_in_place(z, z_bar), info


def mean_activation(
    activation_fn: Callable[[jax.Array], jax.Array],
    rng: jax.Array,
    *,
    latent_shape: int | Sequence[int],
    num_samples: int = 5000,
    batch_size: int = 128,
    sample_latents: Callable[..., jax.Array] = jax.random.normal,
) -> jax.Array:
    """Monte Carlo mean z_bar of the activation before the last layer.

    Streams: a running sum in float64 on the host, never all activations. Latent i is drawn from
    `jax.random.fold_in(rng, i)`, so the result does not depend on the batch size beyond rounding.

    Args:
      activation_fn: latents `[b, *latent_shape]` to activations `[b, *input_shape]`. It must treat
        samples independently: BatchNorm in evaluation mode.
      rng: random key.
      latent_shape: of one latent; an int d means `(d,)`.
      num_samples: draws; the authors' code uses 5000.
      batch_size: draws at once, for memory only.
      sample_latents: `(rng, shape)` to one latent in float32; standard normal by default.

    Returns:
      `input_shape`, in the dtype of the activations.

    Raises:
      ValueError: if a size is not positive or the activations are not finite.
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"{num_samples=} and {batch_size=} must be at least 1")
    shape = (latent_shape,) if isinstance(latent_shape, int) else tuple(latent_shape)
    batch_size = min(batch_size, num_samples)

    @jax.jit
    def batch_sum(rng, start):
        index = start + jnp.arange(batch_size, dtype=jnp.int32)
        latents = jax.vmap(lambda i: sample_latents(jax.random.fold_in(rng, i), shape))(index)
        # Random draws without a dtype are float64 under jax_enable_x64; networks are float32.
        activations = activation_fn(latents.astype(jnp.float32))
        mask = (index < num_samples).reshape(-1, *(1 for _ in activations.shape[1:]))
        wide = jnp.promote_types(activations.dtype, jnp.float32)
        total = jnp.sum(jnp.where(mask, activations, 0), axis=0, dtype=wide)
        return total, jnp.zeros((), activations.dtype)

    total, dtype = np.zeros(()), None
    for start in range(0, num_samples, batch_size):
        part, zero = batch_sum(rng, np.int32(start))
        dtype = zero.dtype
        total = total + np.asarray(part, np.float64)
    mean = total / num_samples
    if not np.isfinite(mean).all():
        bad = int(math.prod(mean.shape) - np.isfinite(mean).sum())
        raise ValueError(f"{bad} of {mean.size} entries of the mean activation are not finite")
    return jnp.asarray(mean, dtype)


@jax.jit
def _broken_images(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    flat = images.reshape(images.shape[0], -1)
    outside = (jnp.abs(flat) > 1 + _RANGE_SLACK).any(axis=1)
    return jnp.isnan(flat).any(axis=1), outside


def _check_images(layer: FinalLayer, images: np.ndarray | jax.Array) -> jax.Array:
    if not isinstance(images, jax.Array):
        images = np.asarray(images)
    shape = layer.operator.output_shape
    if images.ndim != len(shape) + 1 or images.shape[1:] != shape:
        hint = "; add a batch axis" if images.shape == shape else ""
        raise ValueError(
            f"images have shape {images.shape}, "
            f"the layer makes images of shape {('n', *shape)}{hint}"
        )
    if images.dtype not in (np.uint8, np.float32):
        raise ValueError(f"images have dtype {images.dtype}, expected uint8 or float32 in [-1, 1]")
    images = jnp.asarray(images)
    if images.dtype == jnp.float32:
        flags = zip(["are NaN", "are outside [-1, 1]"], _broken_images(images), strict=True)
        problems = [
            f"values of images {_indices(np.flatnonzero(flag))} {what}"
            for what, flag in flags
            if np.any(flag)
        ]
        if problems:
            raise ValueError(
                "; ".join(problems) + "; expected uint8 or float32 in [-1, 1] (x = u / 127.5 - 1)"
            )
    return images


def _indices(found: np.ndarray) -> str:
    more = f" and {found.size - 10} more" if found.size > 10 else ""
    return f"{found[:10].tolist()}{more}"


def _bias(layer: FinalLayer) -> jax.Array:
    """Bias in the shape `[1, 1, c]` or `[h, w, c]` of the output, checked."""
    shape = layer.operator.output_shape
    bias = jnp.asarray(layer.bias, layer.operator.dtype)
    if bias.shape == shape:
        return bias
    if bias.shape != shape[-1:]:
        raise ValueError(
            f"bias has shape {bias.shape}, expected {shape[-1:]}, one per channel, or {shape}"
        )
    return bias.reshape((1,) * (len(shape) - 1) + bias.shape)


# Donating the sum's first argument: the output of a large solve must not exist twice.
_add_in_place = jax.jit(lambda z, z_bar: z + z_bar[None], donate_argnums=0)
