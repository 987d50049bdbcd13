"""Other people's generators: weights in files and live PyTorch modules.

Attribution needs little of a generator: its last layer (kernel, bias, stride, padding, activation),
the mean activation z_bar before it, and images that it made. There are two ways to that.

From files, whatever framework wrote them:

    arrays = read_arrays("generator.pth")
    loaded = final_layer(
        arrays, "main.12", layer="conv_transpose", strides=2, padding=1,
        mean_activation=np.load("mean_activation.npy"), generated=images,
    )
    attributor = fit(loaded.layer, loaded.z_bar, images, rng=jax.random.key(0))

From a module that runs, which knows its own geometry and makes the rest:

    imported = from_torch(module, "main.12", sample=sample, num_impostors=12_000)
    attributor = fit(imported.layer, imported.z_bar, imported.generated, rng=jax.random.key(0),
                     impostors=imported.impostors)
    write(imported, "my_generator")   # files without PyTorch, and flags of the experiment "fit"

A layer that is described wrongly still inverts every image, into activations that mean nothing. So
what can be checked is: `from_torch` compares with what the module computes, `final_layer` with the
images (`mean_mismatch`).

[P1] section 4 needs x = sigma(A z + bias) with a sigma that can be inverted: no ReLU at the end,
and nothing added after the last layer (a residual connection to the output).

Nothing is ever unpickled beyond the plain tensors that `torch.load(weights_only=True)` admits.
"""

import contextlib
import copy
import difflib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from flipad_jax import data, files
from flipad_jax.generators import impostors as _impostors
from flipad_jax.inversion import final_layer as _final_layer
from flipad_jax.inversion import linops
from flipad_jax.inversion.final_layer import ACTIVATIONS, FinalLayer
from flipad_jax.inversion.linops import Conv, ConvTranspose, Dense

__all__ = [
    "LAYERS",
    "LAYOUTS",
    "MISMATCH_BOUND",
    "ImportedGenerator",
    "LoadedLayer",
    "final_layer",
    "from_torch",
    "mean_mismatch",
    "read_arrays",
    "write",
]

LAYERS = ("conv_transpose", "conv", "dense")
LAYOUTS = ("torch", "flax", "flipad")

# `mean_mismatch`, measured on the zoo's three DCGANs and its WGAN-GP (1000 digits each, 72 % of the
# pixels at level 0) / on a DCGAN of 64 x 64 photographs (64 images, none at 0 or 255):
#   the right layer                              0.12 to 0.16  /  0.06
#     with 60 or 100 images                      0.06 to 0.15  /  0.03
#   kernel flipped in both directions            0.25 to 0.57  /  0.71
#   rows and columns of the kernel exchanged     0.19 to 0.53  /  0.68
#   rows and columns of z_bar exchanged          0.39 to 0.65  /  0.84
#   padding one pixel aside                      0.44 to 0.60  /  0.70
#   sigmoid for tanh                             0.86 to 1.04  /  0.48
#   identity for tanh                            0.19 to 0.20  /  0.00 (low contrast: tanh(a) = a)
#   a bias of 0.3 forgotten                      0.10 to 0.15  /  1.35
#   a bias of 1 forgotten                        0.32 to 0.48  /  4.22
#   kernel or z_bar of another seed              0.73 to 1.11
#   ... of the WGAN-GP that began as this DCGAN  0.20 to 0.44
#   channels of the image reversed                     -       /  0.87
#   another picture added, half as strong        0.11 to 0.46  /  0.46
#   another picture added, as strong             0.19 to 0.48  /  0.68
MISMATCH_BOUND = 0.175
_CLEARLY_BETTER = 0.75  # times the other mismatch: the right orientation has at most 0.53 of it

_MISMATCH_IMAGES = 1000
_MISMATCH_PIXELS = 1024
_IMAGES_PER_IMPOSTOR = 128
_NOTES_NAMES = 8  # names listed in an error
_MOST_VISITS = 100_000  # dictionaries, lists and leaves in a file of weights


class LoadedLayer(NamedTuple):
    """A last layer made of arrays.

    Attributes:
      layer: float32.
      z_bar: mean activation in the shape that the operator takes, float32.
      notes: what a user should know of it, one line each.
    """

    layer: FinalLayer
    z_bar: jax.Array
    notes: tuple[str, ...]


class ImportedGenerator(NamedTuple):
    """What attribution needs of a generator.

    Attributes:
      layer: the last layer, float32.
      z_bar: mean activation, float32.
      generated: `[n, h, w, c]` uint8 images.
      impostors: `[m, h, w, c]` uint8 images of changed copies, or None.
      notes: what a user should know of it, one line each.
    """

    layer: FinalLayer
    z_bar: jax.Array
    generated: np.ndarray
    impostors: np.ndarray | None
    notes: tuple[str, ...]


Progress = Callable[[str, int, int], None]

# --- files ------------------------------------------------------------------------------------


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All floating arrays of a file of weights.

    Names of nested dictionaries are joined: with "." for PyTorch ("generator.main.12.weight"), with
    "/" for Flax and Orbax ("params/last/kernel"). Half precision becomes float32; whole numbers
    and anything that is no array are left out.

    Args:
      path: `.safetensors`, `.npz`, a PyTorch state dict (`.pth`, `.pt`, `.bin`; also inside a
        dictionary), a Flax `.msgpack`, or the folder of an Orbax checkpoint (or of its manager:
        the newest step).
    Returns:
      Name -> array, in the order of the file.
    Raises:
      FileNotFoundError: if there is nothing at `path`.
      ValueError: if it cannot be read, needs code to be unpickled, holds no floating array, or
        PyTorch is not installed.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if path.is_dir():
        reader: Callable[[pathlib.Path], Mapping[str, Any]] = _read_orbax
    elif path.suffix.lower() in _READERS:
        reader = _READERS[path.suffix.lower()]
    else:
        endings = ", ".join(_READERS)
        raise ValueError(f"{path}: unknown ending; weights are read from {endings} and folders")
    try:
        found = reader(path)
    except _Refused as refused:
        raise ValueError(f"{path}: {refused}") from None
    except Exception as error:  # What a damaged file raises is any library's guess.
        raise ValueError(
            f"{path} cannot be read: it is damaged or no {path.suffix or 'checkpoint'} file "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error
    arrays = {
        name: _at_least_float32(array)
        for name, array in found.items()
        if jnp.issubdtype(array.dtype, jnp.floating)
    }
    if not arrays:
        raise ValueError(f"{path} holds no floating array")
    return arrays


class _Refused(Exception):
    """A file that is not read, and why."""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or "no message"


def _at_least_float32(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.itemsize >= 4 else array.astype(np.float32)


def _flatten(tree: Any, separator: str) -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries and lists, with their joined names."""
    visits = 0

    def flatten(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        nonlocal visits
        visits += 1
        if visits > _MOST_VISITS:  # A few bytes can name a list that holds another one twice, ...
            raise _Refused(f"it holds more than {_MOST_VISITS} entries")
        if isinstance(tree, (list, tuple)):
            tree = dict(enumerate(tree))
        if not isinstance(tree, Mapping):
            yield prefix, tree
            return
        for name, value in tree.items():
            yield from flatten(value, f"{prefix}{separator}{name}" if prefix else str(name))

    return flatten(tree, "")


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    # Importing JAX has taught NumPy the name of bfloat16.
    with safe_open(os.fspath(path), framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        # A member that is no array comes as its bytes.
        found = {name: file[name] for name in file.files}
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    import pickle

    try:
        import torch
    except ImportError:
        raise _Refused(
            "reading it needs PyTorch: pip install 'flipad_jax[torch]', or save the weights as "
            "safetensors"
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error)
        if "WeightsUnpickler" not in reason and "weights_only" not in reason:
            raise
        raise _Refused(
            "it is damaged, or holds more than weights, and reading that would run code from the "
            "file; save it with torch.save(module.state_dict(), ...) or as safetensors"
        ) from None
    tensors = {
        name: tensor
        for name, tensor in _flatten(content, ".")
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    }
    # With strides of 0 a tensor can have any size and no memory, until it is worked with.
    most = max(path.stat().st_size, 1 << 20)
    for name, tensor in tensors.items():
        if tensor.numel() > most:
            raise _Refused(f"{name} claims {tensor.numel()} numbers, more than the file has bytes")
    return {
        name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).numpy()
        for name, tensor in tensors.items()
    }


def _read_msgpack(path: pathlib.Path) -> dict[str, np.ndarray]:
    from flax import serialization

    content = serialization.msgpack_restore(path.read_bytes())
    return {k: v for k, v in _flatten(content, "/") if isinstance(v, np.ndarray)}


def _read_orbax(path: pathlib.Path) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    items = _orbax_items(path.resolve())
    if not items:
        raise _Refused("the folder holds no Orbax checkpoint")
    arrays: dict[str, np.ndarray] = {}
    for item, folder in items.items():
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata.tree
            # As NumPy arrays: the devices that it was written on need not be here.
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            content = checkpointer.restore(
                folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy)
            )
        tree = {item: content} if item else content
        arrays |= {k: v for k, v in _flatten(tree, "/") if isinstance(v, np.ndarray)}
    return arrays


def _orbax_items(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """The trees of a checkpoint by their names: the folder itself, its items, its newest step."""

    def is_tree(folder):
        return (folder / "_METADATA").is_file()

    if is_tree(path):
        return {"": path}
    children = sorted(child for child in path.iterdir() if child.is_dir())
    items = {c.name if c.name != "default" else "": c for c in children if is_tree(c)}
    steps = [child for child in children if child.name.isdecimal()]
    if items or not steps:
        return items
    return _orbax_items(max(steps, key=lambda step: int(step.name)))


_READERS: dict[str, Callable[[pathlib.Path], Mapping[str, Any]]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
    ".msgpack": _read_msgpack,
}

# --- from arrays to a layer ---------------------------------------------------------------------


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
      The layer, z_bar, and notes: what was found and what looks wrong.
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
    weights = _finite(name, arrays[name])
    z_bar = _finite("the mean activation", mean_activation)
    notes: list[str] = []
    offset = _find_bias(arrays, name, bias, layer, image_shape, layout, notes)
    kernel = _to_own_layout(name, weights, layer, layout, image_shape)
    z_bar = _mean_to_own_layout(z_bar, layer, layout)
    geometry = {"strides": strides, "padding": padding, "output_padding": output_padding}

    def build(kernel):
        operator = _operator(layer, kernel, z_bar.shape, image_shape, geometry)
        made = FinalLayer(operator=operator, bias=offset, activation=activation)
        return made, mean_mismatch(made, z_bar, generated)

    made, mismatch = build(kernel)
    if layer == "conv_transpose" and layout == "flax":
        flipped, mismatch_flipped = build(kernel[::-1, ::-1])
        as_it_is = mismatch < _CLEARLY_BETTER * mismatch_flipped
        clear = as_it_is or mismatch_flipped < _CLEARLY_BETTER * mismatch
        notes.append(
            f"the kernel is taken {'as it is' if as_it_is else 'flipped, as Flax holds it'}: the "
            f"mean of the images is off by {mismatch:.2f} as it is, by {mismatch_flipped:.2f} "
            f"flipped{'' if clear else ', which does not tell which is right'}"
        )
        if not as_it_is:
            made, mismatch = flipped, mismatch_flipped
    if not mismatch <= MISMATCH_BOUND:
        notes.append(
            f"the layer does not fit the images: their mean is off by {mismatch:.2f} (at most "
            f"{MISMATCH_BOUND} is expected), so weights, layout, strides, padding, bias, "
            "activation or mean activation may not be those that made them, or something is added "
            "after the last layer"
        )
    return LoadedLayer(made, jnp.asarray(z_bar), tuple(notes))


def _find_kernel(arrays: Mapping[str, np.ndarray], last_layer: str) -> str:
    candidates = [last_layer]
    candidates += [f"{last_layer}{s}{end}" for s in "./" for end in ("weight", "kernel")]
    for name in candidates:
        if name in arrays:
            return name
    modules = [_split_name(name)[0] for name in arrays]
    close = difflib.get_close_matches(last_layer, dict.fromkeys([*arrays, *modules]), n=3)
    listed = ", ".join(
        f"{name} {list(array.shape)}" for name, array in list(arrays.items())[:_NOTES_NAMES]
    )
    more = len(arrays) - _NOTES_NAMES
    raise ValueError(
        f"no array or layer {last_layer!r}"
        + (f"; did you mean {' or '.join(close)}?" if close else ";")
        + f" There are {listed}"
        + (f" and {more} more" if more > 0 else "")
    )


def _split_name(name: str) -> tuple[str, str]:
    """Module with its separator, and the array's own name: "main.12.", "weight"."""
    at = max(name.rfind("."), name.rfind("/")) + 1
    return name[:at], name[at:]


def _finite(name: str, array: Any) -> np.ndarray:
    array = np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} is {array.dtype}, expected floating point")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    bad = int(np.sum(~np.isfinite(array)))
    if bad:
        raise ValueError(f"{name} holds NaN or values beyond float32: {bad} of {array.size}")
    return array


def _find_bias(
    arrays: Mapping[str, np.ndarray],
    kernel_name: str,
    bias: str | None,
    layer: str,
    image_shape: tuple[int, int, int],
    layout: str,
    notes: list[str],
) -> jax.Array | None:
    """Bias `[c]` or, of a dense layer, `[h, w, c]`."""
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
    value = _finite(name, arrays[name])
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


def _to_own_layout(
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


def _operator(
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


# --- does the layer fit the images? --------------------------------------------------------------


def mean_mismatch(layer: FinalLayer, z_bar: np.ndarray | jax.Array, generated: np.ndarray) -> float:
    """How far the mean of a generator's images is from what layer and mean activation say.

    Before its activation an image is A z + bias, so the mean over images is A z_bar + bias. Levels
    0 and 255 hide by how much a value was beyond them, so pixels are compared as if their values
    were normal around A z_bar + bias, with that spread at which the 256 levels have the spread that
    is observed: what mean level (before the activation) would be expected, and what is there? The
    root mean square of the difference, less what the number of images explains, is taken relative
    to the spread of a pixel; over 1024 pixels and at most 1000 images.

    The right layer has about 0.05 where pixels keep away from 0 and 255, and 0.16 where three
    quarters of them lie there, which is what the normal distribution costs; `MISMATCH_BOUND` and
    the comment beside it say what wrong ones have. A small mismatch proves little: where contrast
    is low the activations all look alike, and dark images hide a small bias or residual.

    Args:
      layer: what is said to be the last layer.
      z_bar: what is said to be its mean activation, `layer.operator.input_shape`.
      generated: own images, `[n, h, w, c]` uint8, n of 2 or more.
    Returns:
      0 for a perfect fit; infinite if the images are all alike and not the mean.
    """
    from scipy.special import ndtr

    generated = np.asarray(generated[:_MISMATCH_IMAGES])
    n = len(generated)
    expected = layer.operator.forward(jnp.asarray(z_bar, layer.operator.dtype))
    if layer.bias is not None:
        expected = expected + layer.bias
    mean = np.asarray(expected, np.float64).reshape(-1)
    picked = np.random.default_rng(0).permutation(mean.size)[:_MISMATCH_PIXELS]
    mean = mean[picked]
    levels = _before_activation(layer.activation, np.arange(256, dtype=np.uint8))
    between = _before_activation(
        layer.activation, ((np.arange(255) + 0.5) / 127.5 - 1).astype(np.float32)
    )
    values = levels[generated.reshape(n, -1)[:, picked]]
    observed, spread = values.mean(axis=0), values.std(axis=0, ddof=1)

    def moments(log_scale):
        below = ndtr((between - mean[:, None]) / np.exp(log_scale)[:, None])
        share = np.diff(below, axis=1, prepend=0.0, append=1.0)
        first = share @ levels
        return first, np.sqrt(np.maximum(share @ levels**2 - first**2, 0))

    # The spread over levels grows with the scale, so the scale is found by bisection.
    low, high = np.full(mean.size, -8.0), np.full(mean.size, 5.0)
    for _ in range(20):
        middle = (low + high) / 2
        too_small = moments(middle)[1] < spread
        low, high = np.where(too_small, middle, low), np.where(too_small, high, middle)
    difference = np.mean((moments(low)[0] - observed) ** 2 - spread**2 / n)
    scale = np.mean(spread**2)
    if scale == 0:
        return math.inf if difference > 0 else 0.0
    return float(np.sqrt(max(difference, 0) / scale))


def _before_activation(activation: str, x: np.ndarray) -> np.ndarray:
    """Targets of single values, float64 `[n]`."""
    column = FinalLayer(
        operator=linops.conv(np.ones((1, 1, 1, 1), np.float32), (len(x), 1, 1)),
        activation=activation,
    )
    return np.asarray(_final_layer.targets(column, x.reshape(1, -1, 1, 1)), np.float64).reshape(-1)


# --- from a live PyTorch module ------------------------------------------------------------------


def from_torch(
    module: Any,
    last_layer: str,
    *,
    sample: Callable[[int, int], Any],
    num_images: int = 2000,
    num_mean: int = 5000,
    num_impostors: int = 0,
    batch_size: int = 100,
    activation: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ImportedGenerator:
    """All that attribution needs of a PyTorch generator.

    The module runs in evaluation mode, on the device where it is; its training flags are restored.
    Kind and geometry of the layer are read off it, which of the invertible activations follows
    is found by comparing. What `sample` gives depends on the numbers alone, so nothing here depends
    on `batch_size` beyond rounding:

        def sample(start, count):
            return torch.stack([
                torch.randn(100, 1, 1, generator=torch.Generator().manual_seed(i))
                for i in range(start, start + count)
            ])

    Images are the first `num_images` of the stream, z_bar is the mean of the first `num_mean`,
    impostors go on after both.

    Args:
      module: `torch.nn.Module`; what `sample` gives -> images `[n, c, h, w]`, in [-1, 1] (or in
        [0, 1] if it ends with a sigmoid, or a tanh scaled to [0, 1]).
      last_layer: name of its last `ConvTranspose2d`, `Conv2d` or `Linear`.
      sample: (start, count) -> inputs of images number start to start + count - 1: a tensor, or a
        tuple of tensors, the positional arguments of the module.
      num_images: own images, to fit on and calibrate with.
      num_mean: activations averaged for z_bar; the paper's code uses 5000.
      num_impostors: images of changed copies of the module (`generators.impostors`); some ten
        thousand tell other seeds of one's architecture far better. They are made 128 at a time,
        because batch normalisation takes the statistics of its batch.
      batch_size: images at once, for memory and speed only.
      activation: one of `final_layer.ACTIVATIONS`, if it shall be that one; found if None.
      seed: of the impostors.
      progress: called with (what is being done, how much is done, of how much).
    Returns:
      Layer, z_bar, images, impostors, notes.
    Raises:
      ValueError: if there is no such layer, it or what follows is not of the form that [P1]
        inverts, the module is not deterministic, or its images depend on their batch.
    """
    import torch

    if min(num_images, batch_size) < 3 or num_mean < 1 or num_impostors < 0:
        raise ValueError(
            f"{num_images=} and {batch_size=} must be at least 3, {num_mean=} 1, "
            f"{num_impostors=} 0"
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"{activation=}: expected one of {', '.join(ACTIVATIONS)}")
    progress = progress or (lambda what, done, total: None)
    last = _torch_last_layer(module, last_layer)
    total = max(num_images, num_mean)
    with torch.no_grad(), _evaluating(module):
        first = _run(module, last, sample, 0, min(batch_size, total))
        _check_deterministic(module, last, sample, first)
        image_shape = _torch_image_shape(last, last_layer, first)
        ending = _torch_ending(first, activation)
        layer = _torch_layer(last, last_layer, first, image_shape, ending)
        generated = np.empty((num_images, *image_shape), np.uint8)
        z_sum = np.zeros(first.z.shape[1:], np.float64)
        clipped = 0
        for start in range(0, total, batch_size):
            count = min(batch_size, total - start)
            batch = first if start == 0 else _run(module, last, sample, start, count)
            if start:
                _check_ending(batch, ending)
            z_sum += batch.z[: max(0, num_mean - start)].cpu().double().sum(dim=0).numpy()
            if start < num_images:
                x = _in_range(batch.out[: num_images - start], ending)
                clipped += int(np.sum(np.abs(x) > 1))
                generated[start : start + len(x)] = data.to_uint8(x)
            progress("making own images", min(start + count, total), total)
        z_mean = _channels_last(z_sum[None] / num_mean)[0].reshape(layer.operator.input_shape)
        z_bar = jnp.asarray(z_mean, jnp.float32)
        impostor_images = None
        if num_impostors:
            impostor_images = _torch_impostors(
                module, last_layer, layer, sample, total, num_impostors, seed, progress
            )
    notes = [f"the last activation is {ending.description}"]
    if clipped:
        share = clipped / generated.size
        notes.append(
            f"{share:.2%} of the values of the images lie outside [-1, 1] and were clipped, as an "
            "8-bit file does it"
        )
    return ImportedGenerator(layer, z_bar, generated, impostor_images, tuple(notes))


class _Batch(NamedTuple):
    """One forward pass: input and output of the last layer, and of the module (torch tensors)."""

    inputs: tuple[Any, ...]
    z: Any
    before: Any
    out: Any


class _Ending(NamedTuple):
    """What follows the last layer in a module."""

    activation: str
    description: str
    function: Callable[[Any], Any]
    zero_to_one: bool


def _endings() -> tuple[_Ending, ...]:
    import torch

    return (
        _Ending("tanh", "tanh", torch.tanh, False),
        _Ending("sigmoid", "sigmoid", torch.sigmoid, True),
        _Ending("identity", "identity", lambda a: a, False),
        _Ending("tanh", "tanh, scaled to [0, 1]", lambda a: (torch.tanh(a) + 1) / 2, True),
        _Ending("sigmoid", "sigmoid, scaled to [-1, 1]", lambda a: torch.tanh(a / 2), False),
        _Ending("identity", "identity, clipped", lambda a: torch.clamp(a, -1, 1), False),
    )


def _torch_kinds() -> dict[str, Any]:
    from torch import nn

    return {"conv_transpose": nn.ConvTranspose2d, "conv": nn.Conv2d, "dense": nn.Linear}


def _torch_last_layer(module: Any, name: str) -> Any:
    """The submodule, if it is one that can be inverted."""
    kinds = tuple(_torch_kinds().values())
    submodules = dict(module.named_modules())
    last = submodules.get(name)
    if not isinstance(last, kinds):
        candidates = [n for n, m in submodules.items() if isinstance(m, kinds)]
        found = "there is none of that name" if last is None else f"it is a {type(last).__name__}"
        listed = ", ".join(f"{n!r}" for n in candidates[::-1][:_NOTES_NAMES]) or "none"
        raise ValueError(
            f"{name!r} is no ConvTranspose2d, Conv2d or Linear of the module ({found}); these are, "
            f"from the last on: {listed}"
        )
    for setting, allowed in (("groups", 1), ("dilation", 1), ("padding_mode", "zeros")):
        value = getattr(last, setting, allowed)
        if value not in (allowed, (allowed, allowed)):
            raise ValueError(
                f"{name!r} has {setting}={value}; only {setting}={allowed} is supported"
            )
    return last


@contextlib.contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    flags = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in flags:
            part.training = training


def _device(module: Any) -> Any:
    import torch

    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _inputs(module: Any, sample: Callable[[int, int], Any], start: int, count: int) -> tuple:
    import torch

    inputs = sample(start, count)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    for tensor in inputs:
        if not isinstance(tensor, torch.Tensor) or len(tensor) != count:
            got = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(
                f"sample({start}, {count}) must return a tensor, or a tuple of tensors, with "
                f"{count} rows; got {got}"
            )
    return tuple(tensor.to(_device(module)) for tensor in inputs)


def _run(
    module: Any, last: Any, sample: Callable[[int, int], Any], start: int, count: int
) -> _Batch:
    return _forward(module, last, _inputs(module, sample, start, count))


def _forward(module: Any, last: Any, inputs: tuple) -> _Batch:
    import torch

    calls: list[tuple[Any, Any]] = []

    def watch(_, args, kwargs, output):
        calls.append((args[0] if args else kwargs["input"], output))

    handle = last.register_forward_hook(watch, with_kwargs=True)
    try:
        out = module(*inputs)
    finally:
        handle.remove()
    if len(calls) != 1:
        raise ValueError(
            f"the last layer runs {len(calls)} times in a forward pass, expected once: it is not "
            "the last layer of one chain, or shared"
        )
    z, before = calls[0]
    if not isinstance(out, torch.Tensor) or out.ndim != 4 or len(out) != len(inputs[0]):
        got = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(f"the module returns {got}, expected a tensor of images [n, c, h, w]")
    if not (torch.isfinite(out).all() and torch.isfinite(z).all()):
        raise ValueError("the module makes NaN or infinity")
    return _Batch(inputs, z, before, out)


def _tolerance(tensor: Any) -> float:
    """Of values in [-1, 1] that were computed twice in the dtype of a tensor."""
    import torch

    return max(1e-5, 4 * torch.finfo(tensor.dtype).eps)


def _check_deterministic(
    module: Any, last: Any, sample: Callable[[int, int], Any], batch: _Batch
) -> None:
    def differs(a, b):
        return float((a - b).abs().max()) > _tolerance(batch.out)

    if differs(_forward(module, last, batch.inputs).out, batch.out):
        raise ValueError(
            "the module makes another image of the same input every time: random numbers are drawn "
            "inside (noise, dropout); make them part of what sample returns, or switch them off"
        )
    again = _inputs(module, sample, 0, 2)  # Batch statistics refuse a single one.
    if any((a != b[:2]).any() for a, b in zip(again, batch.inputs, strict=True)):
        raise ValueError(
            "sample(0, 2) is not the start of a larger sample from 0: its inputs must depend on "
            "their numbers alone"
        )
    if differs(_forward(module, last, again).out, batch.out[:2]):
        raise ValueError(
            "an image depends on the others of its batch (batch normalisation without running "
            "statistics?), so the module is not one function of its latent"
        )


def _torch_image_shape(last: Any, name: str, batch: _Batch) -> tuple[int, int, int]:
    c, h, w = batch.out.shape[1:]
    z, before = batch.z, batch.before
    dense = isinstance(last, _torch_kinds()["dense"])
    if z.ndim != (2 if dense else 4):
        raise ValueError(
            f"{name!r} is given {list(z.shape)}, expected {'[n, d]' if dense else '[n, c, h, w]'}"
        )
    if before[0].numel() != batch.out[0].numel() or (not dense and before.shape != batch.out.shape):
        raise ValueError(
            f"{name!r} makes {list(before.shape)} but the module {list(batch.out.shape)}: it is "
            "not the last layer, or the image is resized or cropped after it"
        )
    return h, w, c


def _deviation(batch: _Batch, ending: _Ending) -> float:
    predicted = ending.function(batch.before).reshape(batch.out.shape)
    return float((predicted - batch.out).abs().max())


def _torch_ending(batch: _Batch, activation: str | None) -> _Ending:
    """What follows the layer: the ending that deviates least."""
    endings = [e for e in _endings() if activation in (None, e.activation)]
    deviations = [_deviation(batch, ending) for ending in endings]
    best = int(np.argmin(deviations))
    _raise_if_off(deviations[best], endings[best], batch)
    return endings[best]


def _check_ending(batch: _Batch, ending: _Ending) -> None:
    _raise_if_off(_deviation(batch, ending), ending, batch)


def _raise_if_off(deviation: float, ending: _Ending, batch: _Batch) -> None:
    largest = max(1.0, float(batch.out.abs().max()))
    if not deviation <= _tolerance(batch.out) * largest:
        raise ValueError(
            f"the module's images are no known activation of the layer's output: "
            f"{ending.activation} comes closest and is off by up to {deviation:.3g}; final-layer "
            "inversion needs tanh, sigmoid or identity right after the layer, nothing that cannot "
            "be inverted (ReLU) and nothing added afterwards (a residual connection)"
        )


def _channels_last(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def _in_range(out: Any, ending: _Ending) -> np.ndarray:
    """Images `[n, h, w, c]` in [-1, 1] (beyond it for the identity), float32 on the host."""
    x = _channels_last(out.float().cpu().numpy())
    return 2 * x - 1 if ending.zero_to_one else x


def _torch_geometry(last: Any, batch: _Batch) -> tuple[str, dict[str, Any]]:
    kind = next(name for name, cls in _torch_kinds().items() if isinstance(last, cls))
    if kind == "dense":
        return kind, {"strides": 1, "padding": 0, "output_padding": 0}
    padding = last.padding
    if padding == "valid":
        padding = 0
    elif padding == "same":  # Stride 1; what is odd goes to the bottom and the right.
        padding = tuple(((k - 1) // 2, k // 2) for k in last.kernel_size)
    output_padding: Any = 0
    if kind == "conv_transpose":
        # Of this call: an output_size, if one was given, overrides the module's own.
        output_padding = tuple(
            int(tall) - ((n - 1) * s - 2 * p + k)
            for tall, n, s, p, k in zip(
                batch.before.shape[2:],
                batch.z.shape[2:],
                last.stride,
                padding,
                last.kernel_size,
                strict=True,
            )
        )
    return kind, {"strides": last.stride, "padding": padding, "output_padding": output_padding}


def _torch_layer(
    last: Any, name: str, batch: _Batch, image_shape: tuple[int, int, int], ending: _Ending
) -> FinalLayer:
    """The layer, compared with what the module has computed."""
    kind, geometry = _torch_geometry(last, batch)
    arrays = {"weight": last.weight.detach().float().cpu().numpy()}
    if last.bias is not None:
        arrays["bias"] = last.bias.detach().float().cpu().numpy()
    kernel = _to_own_layout(name, _finite(name, arrays["weight"]), kind, "torch", image_shape)
    bias = _find_bias(arrays, "weight", None, kind, image_shape, "torch", [])
    z = _own_activations(batch.z[:2])
    operator = _operator(kind, kernel, z.shape[1:], image_shape, geometry)
    layer = FinalLayer(operator=operator, bias=bias, activation=ending.activation)
    forward = jax.vmap(operator.forward)(jnp.asarray(z, jnp.float32))
    made = np.asarray(forward if bias is None else forward + bias)
    before = batch.before[:2].reshape(len(z), *batch.out.shape[1:])
    before = _channels_last(before.float().cpu().numpy())
    off = np.abs(made - before).max()
    if not off <= 10 * _tolerance(batch.before) * max(1.0, np.abs(before).max()):
        raise ValueError(
            f"{name!r} does not compute what its weights say (off by up to {off:.3g}): a hook or a "
            "forward method of its own changes it"
        )
    return layer


def _own_activations(z: Any) -> np.ndarray:
    """Torch activations as an operator here takes them: `[n, h, w, c]` or `[n, 1, 1, d]`."""
    z = _channels_last(z.float().cpu().numpy())
    return z if z.ndim == 4 else z[:, None, None, :]


def _weights(layer: FinalLayer) -> jax.Array:
    operator = cast(Any, layer.operator)
    return operator.matrix if isinstance(operator, Dense) else operator.kernel


_finish = jax.jit(_impostors.finish)


def _torch_impostors(
    module: Any,
    last_layer: str,
    layer: FinalLayer,
    sample: Callable[[int, int], Any],
    first: int,
    num_images: int,
    seed: int,
    progress: Progress,
) -> np.ndarray:
    """`generators.impostors`, with the hidden layers changed in PyTorch."""
    size = _IMAGES_PER_IMPOSTOR
    few = _impostors.num_refitted(layer, size)
    forward = jax.jit(jax.vmap(layer.operator.forward))
    weights = _weights(layer)
    last = module.get_submodule(last_layer)
    images = np.empty((num_images, *layer.operator.output_shape), np.uint8)
    for index, start in enumerate(range(0, num_images, size)):
        rng = np.random.default_rng([seed, index])
        inputs = _inputs(module, sample, first + start, size)
        ours = _forward(module, last, tuple(tensor[:few] for tensor in inputs))
        strength, case, ridge, contrast = rng.random(4, dtype=np.float32)
        changed = _changed_copy(module, last_layer, rng, float(_impostors.strength(strength)))
        theirs = _forward(changed, changed.get_submodule(last_layer), inputs)
        noise = rng.standard_normal(1 + weights.size, dtype=np.float32)
        choices = _impostors.Choices(
            strength, case, ridge, contrast, noise[0], noise[1:].reshape(weights.shape)
        )
        batch = _finish(
            layer,
            jnp.asarray(_own_activations(theirs.z)),
            forward(jnp.asarray(_own_activations(ours.z))),
            choices,
        )
        images[start : start + size] = np.asarray(batch)[: num_images - start]
        progress("making impostors", min(start + size, num_images), num_images)
    return images


def _changed_copy(module: Any, last_layer: str, rng: np.random.Generator, strength: float) -> Any:
    """A copy with one or two hidden weights and perhaps one normalisation jittered.

    Batch normalisation takes the statistics of its batch.
    """
    import torch
    from torch import nn

    changed = copy.deepcopy(module)
    for part in changed.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()
    before = []
    for name, part in changed.named_modules():
        if name == last_layer:
            break
        before.append(part)
    kinds = tuple(_torch_kinds().values())
    hidden = [part for part in before if isinstance(part, kinds)]
    if not hidden:
        raise ValueError(
            f"no ConvTranspose2d, Conv2d or Linear comes before {last_layer!r} that impostors "
            "could change"
        )
    norms = [
        part
        for part in before
        if isinstance(part, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))
        and part.weight is not None
        and part.bias is not None
    ]

    def noise(like):
        drawn = rng.standard_normal(tuple(like.shape), dtype=np.float32)
        return torch.from_numpy(drawn).to(like)

    # Later layers leave more of a mark and come oftener.
    likely = np.arange(1, len(hidden) + 1) / math.comb(len(hidden) + 1, 2)
    how_many = min(len(hidden), 1 + int(rng.integers(2)))
    for i in rng.choice(len(hidden), size=how_many, replace=False, p=likely):
        w = hidden[i].weight
        w.copy_(math.sqrt(1 - strength**2) * w + strength * w.std(correction=0) * noise(w))
    chosen = int(rng.integers(-len(norms), len(norms))) if norms else -1
    if chosen >= 0:  # Half of the time.
        scale, offset = norms[chosen].weight, norms[chosen].bias
        offset.add_(strength * offset.std(correction=0) * noise(offset))
        scale.mul_(1 + 0.5 * strength * noise(scale))
    return changed


# --- to files without PyTorch --------------------------------------------------------------------


def write(imported: ImportedGenerator, folder: str | os.PathLike) -> None:
    """Write an imported generator as files of which PyTorch is not needed any more.

    `last_layer.safetensors` (arrays "kernel" and "bias", layout "flipad"), `mean_activation.npy`,
    `generated/*.png`, `impostors/*.png` if there are any, and, last, `fit.flags`:

        python run.py --experiment=fit --flagfile=FOLDER/fit.flags --workdir=WORKDIR

    Args:
      imported: from `from_torch`.
      folder: made if missing.
    Raises:
      ValueError: if the geometry cannot be said in single numbers, images have neither 1 nor 3
        channels, or the folder holds images already.
    """
    from safetensors.numpy import save

    folder = pathlib.Path(folder).resolve()
    operator = imported.layer.operator
    kind, geometry = _as_flags(operator)
    images = {"generated": imported.generated}
    if imported.impostors is not None:
        images["impostors"] = imported.impostors
    for name, batch in images.items():
        if batch.shape[-1] not in (1, 3):
            raise ValueError(f"PNG files have 1 or 3 channels, not {batch.shape[-1]}")
        if (folder / name).is_dir() and any((folder / name).iterdir()):
            raise ValueError(f"{folder / name} holds files already: remove it or take a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"kernel": np.asarray(_weights(imported.layer))}
    if imported.layer.bias is not None:
        arrays["bias"] = np.asarray(imported.layer.bias)
    metadata = {"layer": kind, "layout": "flipad", "activation": imported.layer.activation}
    metadata |= {name: str(value) for name, value in geometry.items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    files.write_atomically(
        folder / "last_layer.safetensors",
        save(arrays, metadata={"flipad_jax": json.dumps(metadata, sort_keys=True)}),
    )
    mean_path = folder / "mean_activation.npy"
    with files.replacing(mean_path) as file:
        np.save(file, np.asarray(imported.z_bar), allow_pickle=False)
    for name, batch in images.items():
        data.write_images(folder / name, batch)
    flags = {
        "generator": folder / "last_layer.safetensors",
        "last_layer": "kernel",
        "layer": kind,
        "layout": "flipad",
        **geometry,
        "activation": imported.layer.activation,
        "mean_activation": mean_path,
        **{name: folder / name for name in images},
    }
    text = "".join(f"--{name}={value}\n" for name, value in flags.items())
    files.write_atomically(folder / "fit.flags", text.encode())


def _as_flags(operator: Any) -> tuple[str, dict[str, int]]:
    """Kind, and the settings in single numbers that build this very operator."""
    if isinstance(operator, Dense):
        return "dense", {"strides": 1, "padding": 0}
    low, high = operator.padding[0]
    geometry = {"strides": operator.strides[0], "padding": low}
    if isinstance(operator, ConvTranspose):
        kind = "conv_transpose"
        if low != high:
            geometry["output_padding"] = low - high
    else:
        kind = "conv"
    try:
        build = getattr(linops, kind)
        again = build(operator.kernel, operator.input_shape, **geometry)
        same = again.padding == operator.padding and again.strides == operator.strides
    except ValueError:
        same = False
    if not same:
        raise ValueError(
            f"strides {operator.strides} and padding {operator.padding} cannot be written as one "
            "number each, alike on both axes"
        )
    return kind, geometry
