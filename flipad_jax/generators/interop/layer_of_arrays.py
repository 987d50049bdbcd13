"""The last layer of a generator, made of arrays, and whether it fits the generator's images."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from flipad_jax import data
from flipad_jax.inversion import linops, mismatch
from flipad_jax.inversion.final_layer import ACTIVATIONS, FinalLayer
from flipad_jax.inversion.linops import Conv, ConvTranspose, Dense

__all__ = [
    "LAYERS",
    "LAYOUTS",
    "NAMES_LISTED",
    "LoadedLayer",
    "final_layer",
    "find_bias",
    "finite",
    "make_operator",
    "to_own_layout",
]

LAYERS = ("conv_transpose", "conv", "dense")
LAYOUTS = ("torch", "flax", "flipad")

_CLEARLY_BETTER = 0.75  # times the other mismatch: the right orientation has at most 0.53 of it

NAMES_LISTED = 8  # in an error


class LoadedLayer(NamedTuple):
    """A last layer made of arrays.

    Attributes:
      layer: float32.
      z_bar: mean activation in the shape that the operator takes, float32.
      notes: what was found, one line each.
      warnings: what looks wrong, one line each.
    """

    layer: FinalLayer
    z_bar: jax.Array
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def final_layer(
    arrays: Mapping[str, np.ndarray],
    last_layer: str,
    *,
    layer: str,
    mean_activation: np.ndarray,
    generated: np.ndarray,
    strides: int | Sequence[int] = 1,
    padding: Any = 0,
    output_padding: int | Sequence[int] = 0,
    activation: str = "tanh",
    bias: str | None = None,
    layout: str = "torch",
) -> LoadedLayer:
    """The last layer of a generator, from arrays of any framework.

    Layouts:

    *   "torch": transposed convolution `[in, out, kh, kw]`, convolution `[out, in, kh, kw]`, dense
        `[out, in]` whose output is `[c, h, w]` flattened; mean activation `[c, h, w]`.
    *   "flax": `[kh, kw, in, out]`, dense `[in, out]` whose output is `[h, w, c]` flattened; mean
        activation `[h, w, c]`. A `flax.linen.ConvTranspose` with transpose_kernel=False holds the
        kernel flipped in both directions, others do not: that is found out from the images, by
        `mean_mismatch`, and Flax's default is taken where they do not tell.
    *   "flipad": as "flax", and kernels are those of `linops`: what `write` writes.

    A dense layer takes its mean activation flattened, `[d]`, in every layout; z_bar is `[1, 1, d]`,
    as the detectors expect maps. Dilated and grouped convolutions are not supported. The weights do
    not show them, but their channels do not fit, or the images do not.

    Args:
      arrays: name -> array, as from `read_arrays`.
      last_layer: name of the kernel ("main.12.weight") or of the module that has it ("main.12").
      layer: one of `LAYERS`; a 1x1 head is a "conv".
      mean_activation: mean of the activation before the layer, over latents; see `layout`.
      generated: images of the generator, `[n, h, w, c]` uint8.
      strides: int or (rows, columns).
      padding: counted as `torch.nn` counts it, whatever the layout; or "SAME" / "VALID" as in Flax.
      output_padding: of a transposed convolution, as in PyTorch.
      activation: one of `final_layer.ACTIVATIONS`.
      bias: name of its array. If None, an array called bias beside the kernel is used.
      layout: one of `LAYOUTS`.
    Returns:
      The layer, z_bar, what was found and what looks wrong.
    Raises:
      ValueError: if a name is unknown, something has the wrong shape or holds NaN, or the layer
        does not make images of this shape.
    """
    for name, value, known in (
        ("layer", layer, LAYERS),
        ("layout", layout, LAYOUTS),
        ("activation", activation, ACTIVATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
    generated = data.check_images(generated)
    if generated.dtype != np.uint8 or len(generated) < 2:
        raise ValueError(
            f"generated images are {generated.dtype}{list(generated.shape)}, expected uint8 "
            "[n, h, w, c] with n of 2 or more"
        )
    image_shape = cast(tuple[int, int, int], tuple(generated.shape[1:]))
    name = _find_kernel(arrays, last_layer)
    weights = finite(name, arrays[name])
    z_bar = finite("the mean activation", mean_activation)
    notes: list[str] = []
    warnings: list[str] = []
    offset = find_bias(arrays, name, bias, layer, image_shape, layout, notes)
    kernel = to_own_layout(name, weights, layer, layout, image_shape)
    z_bar = _mean_to_own_layout(z_bar, layer, layout)
    geometry = {"strides": strides, "padding": padding, "output_padding": output_padding}

    def build(kernel):
        operator = make_operator(layer, kernel, z_bar.shape, image_shape, geometry)
        made = FinalLayer(operator=operator, bias=offset, activation=activation)
        return made, mismatch.mean_mismatch(made, z_bar, generated)

    made, off = build(kernel)
    if layer == "conv_transpose" and layout == "flax":
        flipped, off_flipped = build(kernel[::-1, ::-1])
        as_it_is = off < _CLEARLY_BETTER * off_flipped
        clear = as_it_is or off_flipped < _CLEARLY_BETTER * off
        (notes if clear else warnings).append(
            f"the kernel is taken {'as it is' if as_it_is else 'flipped, as Flax holds it'}: the "
            f"mean of the images is off by {off:.2f} as it is, by {off_flipped:.2f} "
            f"flipped{'' if clear else ', which does not tell which is right'}"
        )
        if not as_it_is:
            made = flipped
    wrong = mismatch.warning(made, z_bar, generated)
    if wrong:
        warnings.append(wrong)
    return LoadedLayer(made, jnp.asarray(z_bar), tuple(notes), tuple(warnings))


def _find_kernel(arrays: Mapping[str, np.ndarray], last_layer: str) -> str:
    candidates = [last_layer]
    candidates += [f"{last_layer}{s}{end}" for s in "./" for end in ("weight", "kernel")]
    for name in candidates:
        if name in arrays:
            return name
    # What can be a kernel; the layer that is looked for is mostly the last one.
    kernels = {name: array for name, array in arrays.items() if np.ndim(array) in (2, 4)}
    modules = [_split_name(name)[0].rstrip("./") for name in kernels]
    known = dict.fromkeys(name for name in [*kernels, *modules] if name)
    close = difflib.get_close_matches(last_layer, known, n=3)
    last_first = sorted(kernels, key=data.natural_order, reverse=True)
    listed = ", ".join(f"{name} {list(kernels[name].shape)}" for name in last_first[:NAMES_LISTED])
    more = len(kernels) - NAMES_LISTED
    raise ValueError(
        f"no array or layer {last_layer!r}"
        + (f"; did you mean {' or '.join(close)}?" if close else ";")
        + (f" There are {listed}" if kernels else " There is no array [in, out] or [., ., ., .]")
        + (f" and {more} more" if more > 0 else "")
    )


def _split_name(name: str) -> tuple[str, str]:
    """Module with its separator, and the array's own name: "main.12.", "weight"."""
    at = max(name.rfind("."), name.rfind("/")) + 1
    return name[:at], name[at:]


def finite(name: str, array: Any) -> np.ndarray:
    """A floating array as float32; ValueError where it is none, or holds NaN or infinity."""
    array = np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} is {array.dtype}, expected floating point")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    bad = int(np.sum(~np.isfinite(array)))
    if bad:
        raise ValueError(f"{name} holds NaN or values beyond float32: {bad} of {array.size}")
    return array


def find_bias(
    arrays: Mapping[str, np.ndarray],
    kernel_name: str,
    bias: str | None,
    layer: str,
    image_shape: tuple[int, int, int],
    layout: str,
    notes: list[str],
) -> jax.Array | None:
    """Bias `[c]` or, of a dense layer, `[h, w, c]`; None if there is none. `notes` is added to."""
    name = bias
    if name is None:
        name = _split_name(kernel_name)[0] + "bias"
        if name not in arrays or name == kernel_name:
            return None
        notes.append(f"{name} lies beside {kernel_name} and is used as its bias")
    elif name not in arrays:
        close = difflib.get_close_matches(name, arrays, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"no array {name!r} for the bias{hint}")
    value = finite(name, arrays[name])
    h, w, c = image_shape
    if layer == "dense" and value.size == h * w * c:
        if layout == "torch":
            return jnp.asarray(np.moveaxis(value.reshape(c, h, w), 0, -1))
        return jnp.asarray(value.reshape(h, w, c))
    if value.shape != (c,):
        expected = f"[{c}]" if layer != "dense" else f"[{h * w * c}]"
        raise ValueError(
            f"bias {name} has shape {list(value.shape)}, expected {expected} for images "
            f"{list(image_shape)}"
        )
    return jnp.asarray(value)


def to_own_layout(
    name: str, weights: np.ndarray, layer: str, layout: str, image_shape: tuple[int, int, int]
) -> np.ndarray:
    """Kernel `[kh, kw, in, out]`, or matrix `[in, h w c]`."""
    axes = {
        ("conv_transpose", "torch"): "[in, out, kh, kw]",
        ("conv", "torch"): "[out, in, kh, kw]",
        ("dense", "torch"): "[out, in]",
        ("dense", "flax"): "[in, out]",
        ("dense", "flipad"): "[in, out]",
    }.get((layer, layout), "[kh, kw, in, out]")
    if weights.ndim != axes.count(",") + 1:
        raise ValueError(
            f"{name} has shape {list(weights.shape)}, expected {axes} for a {layer} layer of "
            f"layout {layout}"
        )
    if layout != "torch":
        return weights
    if layer != "dense":
        return weights.transpose((2, 3, 0, 1) if layer == "conv_transpose" else (2, 3, 1, 0))
    h, w, c = image_shape
    if len(weights) != h * w * c:
        raise ValueError(
            f"{name} makes {len(weights)} numbers, the images {list(image_shape)} have {h * w * c}"
        )
    return weights.reshape(c, h, w, -1).transpose(3, 1, 2, 0).reshape(-1, h * w * c)


def _mean_to_own_layout(z_bar: np.ndarray, layer: str, layout: str) -> np.ndarray:
    if layer == "dense":
        return z_bar.reshape(1, 1, -1)
    if z_bar.ndim != 3:
        axes = "[c, h, w]" if layout == "torch" else "[h, w, c]"
        raise ValueError(
            f"the mean activation has shape {list(z_bar.shape)}, expected {axes} of layout {layout}"
        )
    return z_bar.transpose(1, 2, 0) if layout == "torch" else z_bar


def make_operator(
    layer: str,
    kernel: np.ndarray,
    z_shape: tuple[int, ...],
    image_shape: tuple[int, int, int],
    geometry: Mapping[str, Any],
) -> ConvTranspose | Conv | Dense:
    """The operator, checked against the shapes of its input and of the images."""
    c_in, c_out = kernel.shape[-2:]
    images = f"the images are {list(image_shape)}"
    if layer == "dense":
        if c_in != math.prod(z_shape) or c_out != math.prod(image_shape):
            raise ValueError(
                f"the dense layer makes {c_out} numbers of {c_in}, but the mean activation has "
                f"{math.prod(z_shape)} and {images}; check the layout"
            )
        return linops.dense(kernel, z_shape, image_shape)
    if c_in != z_shape[-1] or c_out != image_shape[-1]:
        raise ValueError(
            f"the kernel makes {c_out} channels of {c_in}, but the mean activation [h, w, c] is "
            f"{list(z_shape)} and {images}; check the layout (grouped convolutions are not "
            "supported)"
        )
    operator: ConvTranspose | Conv
    if layer == "conv":
        if np.any(geometry["output_padding"]):
            raise ValueError("output_padding belongs to a conv_transpose layer, not to a conv")
        flags = "strides and padding"
        operator = linops.conv(
            kernel, z_shape, strides=geometry["strides"], padding=geometry["padding"]
        )
    else:
        flags = "strides, padding and output_padding"
        operator = linops.conv_transpose(kernel, z_shape, **geometry)
    if operator.output_shape != image_shape:
        settings = ", ".join(f"{name}={geometry[name]}" for name in geometry)
        raise ValueError(
            f"a {layer} layer with kernel {kernel.shape[0]}x{kernel.shape[1]}, {settings} makes "
            f"{list(operator.output_shape)} of a mean activation {list(z_shape)}, but {images}; "
            f"check {flags} (padding is counted as PyTorch does, also for Flax layers)"
        )
    return operator
