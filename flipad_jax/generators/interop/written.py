"""What attribution needs of a generator, and the folder that holds it without PyTorch."""

import json
import os
import pathlib
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from flipad_jax import data, files
from flipad_jax.inversion import linops
from flipad_jax.inversion.final_layer import FinalLayer
from flipad_jax.inversion.linops import ConvTranspose, Dense

__all__ = ["ImportedGenerator", "weights_of", "write"]


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


def weights_of(layer: FinalLayer) -> jax.Array:
    """Kernel of a convolution, matrix of a dense layer."""
    operator = cast(Any, layer.operator)
    return operator.matrix if isinstance(operator, Dense) else operator.kernel


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
    arrays = {"kernel": np.asarray(weights_of(imported.layer))}
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
