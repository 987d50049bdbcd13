"""Inception-V3 as a source of features, with weights that the user brings.

The network of Szegedy et al. (CVPR 2016) as torchvision lays it out, under torchvision's names, up
to two layers:

*   "Mixed_5d": `[n, h', w', 288]`, what SM-Inv compares ([P1] appendix D, `perceptual`);
*   "pool3": `[n, 2048]`, the mean over places of the last block, what the Frechet distance takes.

No weights are shipped and none are downloaded. Two public sets are laid out like this, and their
networks are not the same function ("variant"):

*   "torchvision": `torchvision.models.inception_v3`;
*   "fid": the network of the Frechet Inception distance (Heusel et al. 2017), converted from
    TensorFlow for the PyPI package pytorch-fid. Average pooling does not count the zeros of the
    padding, and the pooling branch of the very last block takes the maximum.

Both were trained on images in [-1, 1]; `features` hands its input to the network as it is.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct, traverse_util

from flipad_jax.generators import interop

__all__ = ["LAYERS", "VARIANTS", "Inception", "InceptionV3", "features", "from_arrays", "load"]

LAYERS = ("Mixed_5d", "pool3")
VARIANTS = ("torchvision", "fid")

_SMALLEST = {"Mixed_5d": 27, "pool3": 75}  # sides at which a layer still has one place
_IGNORED = ("AuxLogits.", "fc.")  # parts of these files behind or beside "pool3"
_NAMES_IN_ERRORS = 5


# --- the network --------------------------------------------------------------------------------


class _Conv(nn.Module):
    """Convolution without bias, batch normalisation in evaluation mode, ReLU."""

    features: int
    kernel: tuple[int, int]
    strides: int
    padding: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(
            self.features,
            self.kernel,
            self.strides,
            padding=self.padding,
            use_bias=False,
            name="conv",
        )(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


def _conv(x, name, features, kernel=1, *, strides=1, padding="SAME"):
    """One `_Conv` of the module that calls; SAME pads odd kernels alike on both sides."""
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    return _Conv(features, kernel, strides, padding, name=name)(x)


def _halve(x):
    return nn.max_pool(x, (3, 3), (2, 2))


def _average(x, variant):
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=variant == "torchvision")


def _join(*branches):
    return jnp.concatenate(branches, axis=-1)


class _BlockA(nn.Module):
    pool_features: int
    variant: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        narrow = _conv(x, "branch1x1", 64)
        wide = _conv(x, "branch5x5_1", 48)
        wide = _conv(wide, "branch5x5_2", 64, 5)
        double = _conv(x, "branch3x3dbl_1", 64)
        double = _conv(double, "branch3x3dbl_2", 96, 3)
        double = _conv(double, "branch3x3dbl_3", 96, 3)
        pooled = _conv(_average(x, self.variant), "branch_pool", self.pool_features)
        return _join(narrow, wide, double, pooled)


class _BlockB(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        single = _conv(x, "branch3x3", 384, 3, strides=2, padding="VALID")
        double = _conv(x, "branch3x3dbl_1", 64)
        double = _conv(double, "branch3x3dbl_2", 96, 3)
        double = _conv(double, "branch3x3dbl_3", 96, 3, strides=2, padding="VALID")
        return _join(single, double, _halve(x))


class _BlockC(nn.Module):
    width: int
    variant: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        narrow = _conv(x, "branch1x1", 192)
        single = _conv(x, "branch7x7_1", self.width)
        single = _conv(single, "branch7x7_2", self.width, (1, 7))
        single = _conv(single, "branch7x7_3", 192, (7, 1))
        double = _conv(x, "branch7x7dbl_1", self.width)
        double = _conv(double, "branch7x7dbl_2", self.width, (7, 1))
        double = _conv(double, "branch7x7dbl_3", self.width, (1, 7))
        double = _conv(double, "branch7x7dbl_4", self.width, (7, 1))
        double = _conv(double, "branch7x7dbl_5", 192, (1, 7))
        pooled = _conv(_average(x, self.variant), "branch_pool", 192)
        return _join(narrow, single, double, pooled)


class _BlockD(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        single = _conv(x, "branch3x3_1", 192)
        single = _conv(single, "branch3x3_2", 320, 3, strides=2, padding="VALID")
        crossed = _conv(x, "branch7x7x3_1", 192)
        crossed = _conv(crossed, "branch7x7x3_2", 192, (1, 7))
        crossed = _conv(crossed, "branch7x7x3_3", 192, (7, 1))
        crossed = _conv(crossed, "branch7x7x3_4", 192, 3, strides=2, padding="VALID")
        return _join(single, crossed, _halve(x))


class _BlockE(nn.Module):
    variant: str
    last: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        narrow = _conv(x, "branch1x1", 320)
        single = _conv(x, "branch3x3_1", 384)
        row = _conv(single, "branch3x3_2a", 384, (1, 3))
        column = _conv(single, "branch3x3_2b", 384, (3, 1))
        double = _conv(x, "branch3x3dbl_1", 448)
        double = _conv(double, "branch3x3dbl_2", 384, 3)
        double_row = _conv(double, "branch3x3dbl_3a", 384, (1, 3))
        double_column = _conv(double, "branch3x3dbl_3b", 384, (3, 1))
        if self.variant == "fid" and self.last:
            pooled = nn.max_pool(x, (3, 3), padding="SAME")
        else:
            pooled = _average(x, self.variant)
        pooled = _conv(pooled, "branch_pool", 192)
        return _join(narrow, row, column, double_row, double_column, pooled)


class InceptionV3(nn.Module):
    """Images `[n, h, w, 3]` -> features of one of `LAYERS`; always in evaluation mode.

    Attributes:
      variant: one of `VARIANTS`.
    """

    variant: str = "torchvision"

    @nn.compact
    def __call__(self, x: jax.Array, *, layer: str = "pool3") -> jax.Array:
        x = _conv(x, "Conv2d_1a_3x3", 32, 3, strides=2, padding="VALID")
        x = _conv(x, "Conv2d_2a_3x3", 32, 3, padding="VALID")
        x = _halve(_conv(x, "Conv2d_2b_3x3", 64, 3))
        x = _conv(x, "Conv2d_3b_1x1", 80)
        x = _halve(_conv(x, "Conv2d_4a_3x3", 192, 3, padding="VALID"))
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = _BlockA(pool_features, self.variant, name=name)(x)
        if layer == "Mixed_5d":
            return x
        x = _BlockB(name="Mixed_6a")(x)
        widths = (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192))
        for name, width in widths:
            x = _BlockC(width, self.variant, name=name)(x)
        x = _BlockD(name="Mixed_7a")(x)
        x = _BlockE(self.variant, False, name="Mixed_7b")(x)
        x = _BlockE(self.variant, True, name="Mixed_7c")(x)
        return x.mean(axis=(1, 2))


# --- weights ------------------------------------------------------------------------------------


@struct.dataclass
class Inception:
    """A network with weights; a pytree whose leaves are the weights, float32.

    Attributes:
      variables: Flax variables of `InceptionV3`.
      variant: one of `VARIANTS` (static).
    """

    variables: Any
    variant: str = struct.field(pytree_node=False)


def load(path: str | os.PathLike, *, variant: str = "torchvision") -> Inception:
    """The network with the weights of a file, whose names are torchvision's.

    Args:
      path: any file that `interop.read_arrays` reads: `.pth` (weights only, nothing is unpickled),
        `.safetensors`, `.npz`.
      variant: one of `VARIANTS`, whichever the weights were made for: the file does not tell.
    Raises:
      FileNotFoundError, ValueError: as `read_arrays` and `from_arrays`.
    """
    _check_variant(variant)
    arrays = interop.read_arrays(path)
    try:
        return from_arrays(arrays, variant=variant)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_arrays(arrays: Mapping[str, np.ndarray], *, variant: str = "torchvision") -> Inception:
    """The network with weights that are already in memory.

    Args:
      arrays: torchvision's names ("Mixed_5b.branch1x1.conv.weight", "....bn.running_mean") and
        layouts, kernels `[out, in, kh, kw]`. "AuxLogits...." and "fc...." are left aside.
      variant: one of `VARIANTS`.
    Raises:
      ValueError: for an unknown variant; for arrays that are missing, not part of the network, of
        another shape or not finite, by name.
    """
    _check_variant(variant)
    names = {path: _torchvision_name(path) for path in _shapes()}
    given = {name for name in arrays if not name.startswith(_IGNORED)}
    missing = [name for name in names.values() if name not in given]
    extra = sorted(given - set(names.values()))
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(names)} arrays are missing: {_listed(missing)}")
    if extra:
        problems.append(f"{len(extra)} arrays do not belong to it: {_listed(extra)}")
    variables = {}
    misshaped, not_finite = [], []
    for path, expected in _shapes().items():
        if names[path] not in given:
            continue
        array = np.asarray(arrays[names[path]])
        shape = expected.shape
        if len(shape) == 4:
            shape = (shape[3], shape[2], shape[0], shape[1])
        if array.shape != shape:
            misshaped.append(f"{names[path]} {list(array.shape)} instead of {list(shape)}")
            continue
        if not np.isfinite(array).all():
            not_finite.append(names[path])
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
        variables[path] = jnp.asarray(array, jnp.float32)
    if misshaped:
        problems.append(f"{len(misshaped)} arrays have another shape: {_listed(misshaped)}")
    if not_finite:
        problems.append(f"{len(not_finite)} arrays hold NaN or infinity: {_listed(not_finite)}")
    if problems:
        raise ValueError("no weights of torchvision's Inception-V3: " + "; ".join(problems))
    return Inception(traverse_util.unflatten_dict(variables), variant)


def features(network: Inception, images: jax.Array, *, layer: str) -> jax.Array:
    """Features of one layer; pure, to be jitted by the caller.

    Args:
      network: from `load` or `from_arrays`.
      images: `[n, h, w, 3]` float, as the network takes them: nothing is resized or normalised. 299
        pixels a side in training; "Mixed_5d" has one place from 27 on, "pool3" from 75 on.
      layer: one of `LAYERS`.
    Returns:
      "Mixed_5d": `[n, h', w', 288]`, not negative; "pool3": `[n, 2048]`.
    Raises:
      ValueError: while tracing, for an unknown layer or images of a shape that it cannot take.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer {layer!r} is unknown; there are {', '.join(LAYERS)}")
    smallest = _SMALLEST[layer]
    if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < smallest:
        raise ValueError(
            f"Inception-V3 got images {list(images.shape)}; {layer} takes [n, h, w, 3] with h and "
            f"w >= {smallest}"
        )
    model = InceptionV3(network.variant)
    return cast(jax.Array, model.apply(network.variables, images, layer=layer))


def _check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown; there are {', '.join(VARIANTS)}")


@functools.cache
def _shapes() -> dict[tuple[str, ...], Any]:
    """Shape and dtype of every variable, by its path; the same in all variants."""
    side = _SMALLEST["pool3"]
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    tree = jax.eval_shape(InceptionV3().init, jax.random.key(0), images)
    return traverse_util.flatten_dict(tree)


_LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


def _torchvision_name(path: tuple[str, ...]) -> str:
    collection, *modules, leaf = path
    return ".".join([*modules, _LEAVES[collection, leaf]])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_IN_ERRORS} more" if len(names) > _NAMES_IN_ERRORS else ""
    return ", ".join(names[:_NAMES_IN_ERRORS]) + more
