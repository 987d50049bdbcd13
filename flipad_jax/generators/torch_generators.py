"""Whole generators of the papers' families from PyTorch weights: DCGAN, WGAN-GP, LSGAN, EBGAN.

`interop` brings the last layer of any model. `regeneration` and the registry need all of a
generator, so its weights have to meet an architecture that is known here: transposed convolutions 4
x 4 with batch normalisation in between (DCGAN, WGAN-GP, EBGAN: their generators are one), or a
linear layer and upsampled 3 x 3 convolutions (LSGAN). What is in the file decides which it is, how
wide and for which images. Read them with `interop.read_arrays`.

A state dict holds no activations, strides or padding: they are assumed to be the family's, ReLU
after every normalisation and tanh at the end. A model of the same shapes that has others (leaky
ReLU, say) is read without a complaint and makes other images, so compare an image of yours with
what the imported generator makes of the same latent.
"""

import math
import re
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from flipad_jax.generators import zoo
from flipad_jax.generators.sampling import TrainedGenerator

__all__ = ["from_arrays"]


def from_arrays(
    arrays: Mapping[str, np.ndarray], *, prefix: str = "", convention: str = "paper"
) -> TrainedGenerator:
    """A generator of this library with the weights of a PyTorch one.

    Args:
      arrays: a state dict, names as PyTorch has them: "main.0.weight" `[in, out, 4, 4]`,
        "main.1.running_mean", ...
      prefix: only names that begin with it count, if a file holds more than the generator.
      convention: of LSGAN, "reference" for its published code, whose batch normalisation has
        another epsilon.
    Returns:
      the generator; images are in [-1, 1], the last activation is tanh.
    Raises:
      ValueError: if the arrays are not those of such a generator, with what was found.
    """
    arrays = {name: array for name, array in arrays.items() if name.startswith(prefix)}
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        module, _, field = name.rpartition(".")
        modules.setdefault(module, {})[field] = np.asarray(array, np.float32)
    order = sorted(modules, key=_natural)
    norms = [modules[name] for name in order if "running_mean" in modules[name]]
    axes = {name: modules[name]["weight"].ndim for name in order if "weight" in modules[name]}
    kernels = [modules[name] for name in order if axes.get(name) == 4]
    linear = [modules[name] for name in order if axes.get(name) == 2]
    known = len(norms) + len(kernels) + len(linear)
    if known != len(modules) or len(norms) != len(kernels) - 1 or len(linear) > 1:
        raise ValueError(
            f"{len(kernels)} convolutions, {len(norms)} batch normalisations, {len(linear)} linear "
            f"and {len(modules) - known} other layers are no DCGAN, WGAN-GP, EBGAN or LSGAN "
            f"generator{_found(arrays)}"
        )
    norms = [dict(norm) for norm in norms]
    kernels = [dict(kernel) for kernel in kernels]
    for kernel, norm in zip(kernels, norms):
        if "bias" in kernel:  # before a normalisation it is a shift of the mean, and ours have none
            norm["running_mean"] = norm["running_mean"] - kernel.pop("bias")
    entry, flat = (_lsgan if linear else _dcgan)(kernels, linear, arrays)
    for index, norm in enumerate(norms):
        for ours, theirs in (
            ("params/{}/scale", "weight"),
            ("params/{}/bias", "bias"),
            ("batch_stats/{}/mean", "running_mean"),
            ("batch_stats/{}/var", "running_var"),
        ):
            if theirs not in norm:
                raise ValueError(f"batch normalisation {index + 1} has no {theirs}{_found(arrays)}")
            flat[ours.format(f"norms_{index}/BatchNorm_0")] = norm[theirs]
    gan = zoo.make(**entry, convention=convention)
    expected = traverse_util.flatten_dict(
        jax.eval_shape(
            gan.generator.init, jax.random.key(0), np.zeros((1, gan.latent_dim), np.float32)
        ),
        sep="/",
    )
    for name, leaf in expected.items():
        if name not in flat or flat[name].shape != leaf.shape:
            got = flat[name].shape if name in flat else "nothing"
            raise ValueError(
                f"{name} of a {entry['family']} has shape {leaf.shape}, the file has {got}"
                f"{_found(arrays)}"
            )
    for name, array in flat.items():
        if name not in expected:
            raise ValueError(f"a {entry['family']} has no {name}{_found(arrays)}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinity")
    variables: Any = traverse_util.unflatten_dict(
        {name: jnp.asarray(array) for name, array in flat.items()}, sep="/"
    )
    return TrainedGenerator(variables, gan.generator, gan.image_shape, gan.latent_dim)


def _natural(name: str) -> list[Any]:
    """main.2 before main.10."""
    return [int(p) if i % 2 else p for i, p in enumerate(re.split("([0-9]+)", name))]


def _found(arrays: Mapping[str, np.ndarray]) -> str:
    shown = [f"{name} {tuple(np.shape(array))}" for name, array in list(arrays.items())[:6]]
    more = ", ..." if len(arrays) > 6 else ""
    return f"; found {', '.join(shown) or 'nothing'}{more}"


def _kernels(kernels, axes, arrays) -> dict[str, np.ndarray]:
    flat = {}
    for index, module in enumerate(kernels):
        name = "last" if index == len(kernels) - 1 else f"convolutions_{index}"
        flat[f"params/{name}/kernel"] = module["weight"].transpose(axes)
        if "bias" in module:
            flat[f"params/{name}/bias"] = module["bias"]
    return flat


def _dcgan(kernels, linear, arrays):
    del linear
    shapes = [module["weight"].shape for module in kernels]
    features = tuple(shape[1] for shape in shapes[:-1])
    side = 4 * 2 ** len(features)
    entry = {
        "family": "dcgan",
        "image_shape": (side, side, shapes[-1][1]),
        "latent_dim": shapes[0][0],
        "features": features,
    }
    return entry, _kernels(kernels, (2, 3, 0, 1), arrays)


def _lsgan(kernels, linear, arrays):
    weight, bias = linear[0]["weight"], linear[0].get("bias")
    shapes = [module["weight"].shape for module in kernels]
    width = shapes[0][1]
    side = math.isqrt(weight.shape[0] // width)
    if bias is None or side * side * width != weight.shape[0]:
        raise ValueError(
            f"a linear layer {weight.shape} {'without a bias ' if bias is None else ''}before "
            f"{width} channels is not LSGAN's{_found(arrays)}"
        )
    entry = {
        "family": "lsgan",
        "image_shape": (8 * side, 8 * side, shapes[-1][0]),
        "latent_dim": weight.shape[1],
        "features": (width, *(shape[0] for shape in shapes[:-1])),
    }
    flat = _kernels(kernels, (2, 3, 1, 0), arrays)
    # PyTorch's maps are channels first.
    rows = np.arange(weight.shape[0]).reshape(width, side, side).transpose(1, 2, 0).ravel()
    flat["params/linear/kernel"] = weight[rows].T
    flat["params/linear/bias"] = bias[rows]
    return entry, flat
