"""Images of models that are almost ours, made from nothing but our own model.

A detector that learns from own images alone does not know in which directions to look. Its owner
has more than images: the weights. An *impostor* is a copy of our generator that was changed and
still draws our pictures, as another training of the same architecture would:

1.  One or two hidden convolutions are jittered, W' = sqrt(1 - a^2) W + a std(W) N(0, 1), later ones
    more often, with a log-uniform from 0.2 to 1. Batch normalisation takes the statistics of its
    batch, as it would have learned them. Half of the time one of its scales and offsets is jittered
    as well.
2.  The last layer is refitted (60 %): by ridge regression it makes, of the changed activations, the
    pictures that our model makes of the same latents. Or it is jittered (20 %), or left as it is.
3.  30 % change the contrast before the last activation by N(1, 0.1).

No rival and no real image is involved. `detection.one_class` learns from them what only our own
weights do.

`generate` does all of it for a generator of this library. Whoever changes the hidden layers
elsewhere (`interop` does it in PyTorch) hands the changed activations to `finish`.
"""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from flipad_jax.generators import sampling
from flipad_jax.generators.sampling import TrainedGenerator
from flipad_jax.inversion import final_layer, polyphase
from flipad_jax.inversion.final_layer import FinalLayer
from flipad_jax.inversion.linops import Conv, ConvTranspose, Dense

__all__ = ["Choices", "finish", "generate", "num_refitted", "strength"]

_STRENGTH = (0.2, 1.0)
_IMAGES_REFITTED_ON = 96
_ROWS_REFITTED_ON = 100_000  # of one least-squares problem: memory for large images
_REFITTED, _JITTERED = 0.6, 0.2  # and the rest unchanged
_RIDGE = (1e-5, 1e-2)  # over the mean diagonal of the normal equations


class Choices(NamedTuple):
    """What is drawn for one impostor; numbers are float32 scalars, uniform in [0, 1) or normal.

    Attributes:
      strength: uniform, see `strength`.
      case: uniform; refit, jitter or keep the last layer.
      ridge: uniform; ridge of the refit, log-uniform.
      contrast: uniform; whether the contrast changes.
      contrast_noise: normal; how much.
      last_noise: normal, the shape of the last layer's weights; its jitter.
    """

    strength: jax.Array | np.ndarray
    case: jax.Array | np.ndarray
    ridge: jax.Array | np.ndarray
    contrast: jax.Array | np.ndarray
    contrast_noise: jax.Array | np.ndarray
    last_noise: jax.Array | np.ndarray


def generate(
    generator: TrainedGenerator,
    rng: jax.Array,
    num_images: int,
    *,
    images_per_impostor: int = 128,
    progress: Any = None,
) -> np.ndarray:
    """Images of impostors of a generator.

    Args:
      generator: our model.
      rng: names the stream; impostor i is drawn from `jax.random.fold_in(rng, i)`.
      num_images: how many images.
      images_per_impostor: consecutive images that one impostor makes, at least 2.
      progress: called with the number of images done.
    Returns:
      `[num_images, h, w, c]` uint8, on the host.
    Raises:
      ValueError: if a number is out of range or the generator has no hidden convolution.
    """
    if num_images < 0 or images_per_impostor < 2:
        raise ValueError(f"{num_images=} must not be negative, {images_per_impostor=} at least 2")
    if not _hidden(generator.variables["params"], "kernel"):
        raise ValueError("the generator has no hidden layer that could be changed")
    layer = sampling.final_layer(generator)
    images = np.empty((num_images, *generator.image_shape), np.uint8)
    for index, start in enumerate(range(0, num_images, images_per_impostor)):
        batch = _impostor(
            generator, layer, jax.random.fold_in(rng, index), num_images=images_per_impostor
        )
        images[start : start + images_per_impostor] = np.asarray(batch)[: num_images - start]
        if progress is not None:
            progress(min(start + images_per_impostor, num_images))
    return images


def _hidden(params: Any, name: str) -> list[tuple[str, ...]]:
    """Paths of the hidden arrays of a name, from the latent to the image."""
    flat = traverse_util.flatten_dict(params)
    hidden = [path for path in flat if path[-1] == name and path[0] != "last"]
    return sorted(hidden, key=_depth)


def _depth(path: tuple[str, ...]) -> tuple[bool, list[int], tuple[str, ...]]:
    """Sorts paths: a linear layer sees the latent, and convolutions are numbered from there."""
    return path[0] != "linear", [int(part) for part in re.findall(r"\d+", path[0])], path


def _log_uniform(uniform: jax.Array, limits: tuple[float, float]) -> jax.Array:
    low, high = map(math.log, limits)
    return jnp.exp(low + (high - low) * uniform)


def _jittered(weights: jax.Array, noise: jax.Array, strength: jax.Array) -> jax.Array:
    return jnp.sqrt(1 - strength**2) * weights + strength * weights.std() * noise


def strength(uniform: jax.Array | np.ndarray) -> jax.Array:
    """How strongly weights are jittered: log-uniform from 0.2 to 1."""
    return _log_uniform(jnp.asarray(uniform, jnp.float32), _STRENGTH)


def num_refitted(layer: FinalLayer, num_images: int) -> int:
    """On how many of an impostor's images its last layer is refitted.

    The first ones, and not all: what is left over is not what the last layer was fitted to.
    """
    rows = 1
    if isinstance(layer.operator, (Conv, ConvTranspose)):
        rows = math.prod(polyphase.polyphase(layer.operator).output_shape[:2])
    most = min(_IMAGES_REFITTED_ON, _ROWS_REFITTED_ON // rows, 3 * num_images // 4)
    return max(2, most)


def finish(
    layer: FinalLayer, activations: jax.Array, wanted: jax.Array, choices: Choices
) -> jax.Array:
    """Images of an impostor whose hidden layers were changed: steps 2 and 3.

    Args:
      layer: our own last layer. A dense one is jittered where another would be refitted: it has
        more weights than there are images.
      activations: `[n, *input_shape]` that the changed layers make.
      wanted: `[m, h, w, c]`, what our own model makes of the first m latents before bias and
        activation, m = `num_refitted(layer, n)`.
      choices: what was drawn.
    Returns:
      `[n, h, w, c]` uint8.
    """
    operator = layer.operator
    name = "matrix" if isinstance(operator, Dense) else "kernel"
    weights = getattr(operator, name)

    def jitter():
        return _jittered(weights, choices.last_noise, 0.3 * strength(choices.strength))

    def refit():
        if isinstance(operator, Dense):
            return jitter()
        ridge = _log_uniform(choices.ridge, _RIDGE)
        return _refitted(cast(ConvTranspose, operator), activations[: len(wanted)], wanted, ridge)

    changed = jax.lax.switch(
        (choices.case > _REFITTED).astype(jnp.int32) + (choices.case > _REFITTED + _JITTERED),
        [refit, jitter, lambda: weights],
    )
    changed_operator = dataclasses.replace(cast(Any, operator), **{name: changed})
    before = jax.vmap(changed_operator.forward)(activations)
    before = before * jnp.where(choices.contrast < 0.3, 1 + 0.1 * choices.contrast_noise, 1)
    images = jax.vmap(functools.partial(final_layer.activate, layer))(before)
    return jnp.round(jnp.clip((images + 1) * 127.5, 0, 255)).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames="num_images")
def _impostor(
    generator: TrainedGenerator, layer: FinalLayer, rng: jax.Array, *, num_images: int
) -> jax.Array:
    latent_rng, choice_rng, noise_rng = jax.random.split(rng, 3)
    latents = jax.random.normal(latent_rng, (num_images, generator.latent_dim), jnp.float32)
    strength_u, case_u, ridge_u, contrast_u = jax.random.uniform(choice_rng, (4,), jnp.float32)
    changed, last_noise, contrast = _with_changed_layers(
        generator.variables, noise_rng, strength(strength_u)
    )
    activations, _ = generator.module.apply(
        changed, latents, train=True, mutable=["batch_stats"], method="activation"
    )
    few = latents[: num_refitted(layer, num_images)]
    wanted = jax.vmap(layer.operator.forward)(sampling.activations(generator, few))
    choices = Choices(strength_u, case_u, ridge_u, contrast_u, contrast, last_noise)
    return finish(layer, activations, wanted, choices)


def _with_changed_layers(
    variables: Any, rng: jax.Array, strength: jax.Array
) -> tuple[Any, jax.Array, jax.Array]:
    """Variables with one or two kernels and perhaps one batch normalisation jittered.

    Also noise for the last kernel, and one normal number: all normal numbers are one draw, because
    each draw of its own is compiled for half a second.
    """
    flat = traverse_util.flatten_dict(variables["params"])
    kernels, scales = (_hidden(variables["params"], name) for name in ("kernel", "scale"))
    # A bias beside a scale is the offset of a normalisation; convolutions may have biases too.
    norms = [(path, (*path[:-1], "bias")) for path in scales if (*path[:-1], "bias") in flat]
    offsets = [offset for _, offset in norms]
    last = ("last", "kernel")
    noisy = [*kernels, *scales, *offsets, last]
    sizes = [flat[path].size for path in noisy]
    noise_rng, layer_rng, norm_rng = jax.random.split(rng, 3)
    *parts, contrast = jnp.split(
        jax.random.normal(noise_rng, (sum(sizes) + 1,), jnp.float32), np.cumsum(sizes)
    )
    noise = {path: part.reshape(flat[path].shape) for path, part in zip(noisy, parts, strict=True)}

    # Gumbel's trick draws without replacement; later layers leave more of a mark and come oftener.
    gumbel = jax.random.gumbel(layer_rng, (len(kernels) + 1,), jnp.float32)
    likely = jnp.log(jnp.arange(1, len(kernels) + 1, dtype=jnp.float32))
    rank = jnp.argsort(jnp.argsort(-(likely + gumbel[:-1])))
    how_many = 1 + (gumbel[-1] > -math.log(math.log(2)))  # Above its median: two.
    for i, path in enumerate(kernels):
        flat[path] = _jittered(flat[path], noise[path], jnp.where(rank[i] < how_many, strength, 0))
    if norms:
        chosen = jax.random.randint(norm_rng, (), -len(norms), len(norms))  # Negative: none.
        for i, (scale, offset) in enumerate(norms):
            a = jnp.where(chosen == i, strength, 0)
            flat[offset] = flat[offset] + a * flat[offset].std() * noise[offset]
            flat[scale] = flat[scale] * (1 + 0.5 * a * noise[scale])
    changed = {**variables, "params": traverse_util.unflatten_dict(flat)}
    return changed, noise[last], contrast[0]


def _refitted(
    op: ConvTranspose | Conv, activations: jax.Array, wanted: jax.Array, ridge: jax.Array
) -> jax.Array:
    """Kernel that best makes `wanted` [n, H, W, out] of `activations` [n, h, w, in].

    Output pixels of one phase (`polyphase`) share their kernel elements with no other phase, so
    there is one small least-squares problem per phase. A convolution has one phase, and the problem
    is that of its patches.
    """
    packed = polyphase.polyphase(op)
    rows, columns = polyphase.taps(op)
    inputs = polyphase.pack_input(packed, activations)
    wanted = polyphase.pack_output(packed, wanted)
    # Where the stride does not divide the image, packing adds pixels that nobody wants.
    real = polyphase.pack_output(packed, jnp.ones(op.output_shape, wanted.dtype))
    tall, wide, _ = packed.output_shape
    c_in, c_out = op.kernel.shape[2:]
    in_columns = op.strides[1] if isinstance(op, Conv) else 1
    out_rows, out_columns = op.strides if isinstance(op, ConvTranspose) else (1, 1)
    divides = op.output_shape[0] % out_rows == 0 and op.output_shape[1] % out_columns == 0

    def seen(k, q):
        phase = rows[k].input_phase * in_columns + columns[q].input_phase
        x = inputs[..., phase * c_in : (phase + 1) * c_in]
        return polyphase.moved(
            polyphase.moved(x, rows[k].shift, 1, tall), columns[q].shift, 2, wide
        )

    problems = []
    for a in range(out_rows):
        for b in range(out_columns):
            elements = [
                (k, q)
                for k, row in enumerate(rows)
                for q, column in enumerate(columns)
                if (row.output_phase, column.output_phase) == (a, b)
            ]
            if not elements:
                continue
            phase = a * out_columns + b
            x = jnp.concatenate([seen(k, q) for k, q in elements], axis=-1)
            if not divides:
                x = x * real[None, :, :, phase * c_out, None]
            x = x.reshape(-1, len(elements) * c_in)
            y = wanted[..., phase * c_out : (phase + 1) * c_out].reshape(-1, c_out)
            gram = x.T @ x
            gram = gram + ridge * jnp.trace(gram) / len(gram) * jnp.eye(len(gram), dtype=x.dtype)
            problems.append((elements, gram, x.T @ y))
    kernel = jnp.zeros_like(op.kernel)
    # All phases of a size in one call: each call is compiled anew.
    for size in sorted({len(elements) for elements, _, _ in problems}):
        alike = [problem for problem in problems if len(problem[0]) == size]
        solutions = jnp.linalg.solve(
            jnp.stack([gram for _, gram, _ in alike]), jnp.stack([right for _, _, right in alike])
        )
        for (elements, _, _), solved in zip(alike, solutions.reshape(-1, size, c_in, c_out)):
            for (k, q), part in zip(elements, solved, strict=True):
                kernel = kernel.at[k, q].set(part)
    return kernel
