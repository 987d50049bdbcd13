"""A few small trained generators that ship with the library, so that attribution can start at once.

`zoo.json` says of each file what made it: family, widths, data, seed, command and SHA-256. Weights
are stored as float16 (and used as float32): the rounded weights *are* the model, every image here
is made by them.
"""

import hashlib
import importlib.resources
import json
import os
from typing import Any, Mapping

import jax
import numpy as np
from flax import traverse_util

from flipad_jax import conventions, files
from flipad_jax.generators import dcgan, ebgan, lsgan, training, wgan_gp
from flipad_jax.generators.sampling import TrainedGenerator

__all__ = [
    "FAMILIES",
    "is_record",
    "load",
    "load_file",
    "make",
    "names",
    "record",
    "record_file",
    "save_file",
]

FAMILIES = {
    "dcgan": dcgan.dcgan,
    "ebgan": ebgan.ebgan,
    "lsgan": lsgan.lsgan,
    "wgan_gp": wgan_gp.wgan_gp,
}

# Families of which text and published code tell two stories.
_WITH_CONVENTION = ("ebgan", "lsgan")


def make(
    family: str, image_shape: tuple[int, int, int], *, convention: str = "paper", **options: Any
) -> training.Gan:
    """A model by the name of its family.

    Args:
      family: a key of `FAMILIES`.
      image_shape: `(h, w, c)`.
      convention: "paper" or "reference"; DCGAN and WGAN-GP are the same in both.
      **options: `latent_dim`, `features`, `discriminator_features`, as the families take them.
    Raises:
      ValueError: for an unknown family or convention, or what the family itself refuses.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is unknown; there are {', '.join(FAMILIES)}")
    conventions.check(convention)
    if family in _WITH_CONVENTION:
        options["convention"] = convention
    return FAMILIES[family](image_shape, **options)


def _records() -> dict[str, Any]:
    text = importlib.resources.files(__name__).joinpath("zoo.json").read_text()
    return json.loads(text)


def names() -> tuple[str, ...]:
    """Names of the generators that ship with the library."""
    return tuple(_records())


def record(name: str) -> dict[str, Any]:
    """How a generator was made: family, image_shape, latent_dim, features, data, seed, command,
    sha256, ...

    Raises:
      ValueError: for an unknown name.
    """
    records = _records()
    if name not in records:
        raise ValueError(f"no generator {name!r} in the zoo; there are {', '.join(records)}")
    return records[name]


def load(name: str) -> TrainedGenerator:
    """A generator of the zoo.

    Raises:
      ValueError: for an unknown name, or a file that is not the one that was recorded.
    """
    entry = record(name)
    content = importlib.resources.files(__name__).joinpath(f"{name}.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry["sha256"]:
        raise ValueError(
            f"{name}.safetensors has SHA-256 {digest}, recorded is {entry['sha256']}: "
            "reinstall flipad_jax"
        )
    return _build(entry, content)


def load_file(path: str | os.PathLike) -> TrainedGenerator:
    """A generator written by `save_file`.

    Raises:
      ValueError: if the file is not one.
    """
    entry = record_file(path)
    with open(path, "rb") as file:
        content = file.read()
    try:
        return _build(entry, content)
    except Exception as error:  # Whatever a family says to a record that no `save_file` wrote.
        raise ValueError(
            f"{os.fspath(path)} is not a generator saved by flipad_jax: "
            f"{type(error).__name__}: {error}"
        ) from error


def is_record(path: str | os.PathLike) -> bool:
    """Whether a safetensors file was written by `save_file`; False for what cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="np") as file:
            return "generator" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def record_file(path: str | os.PathLike) -> dict[str, Any]:
    """How a generator written by `save_file` was made: its `entry`.

    Raises:
      ValueError: if the file is not one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="np") as file:
            metadata = file.metadata() or {}
        entry = json.loads(metadata["generator"])
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{os.fspath(path)} is not a generator saved by flipad_jax: {error}"
        ) from error
    if not isinstance(entry, dict):
        raise ValueError(
            f"{os.fspath(path)} is not a generator saved by flipad_jax: its record is "
            f"{type(entry).__name__}, expected settings by name"
        )
    return entry


def save_file(
    path: str | os.PathLike, generator: TrainedGenerator, entry: Mapping[str, Any]
) -> str:
    """Write weights as float16 and `entry` (family, features, ...) beside them.

    Args:
      path: `.safetensors` file to write.
      generator: the model; its family and widths must be those of `entry`.
      entry: at least `family`, `image_shape`, `latent_dim`, `features`, and `convention` if it is
        not "paper"; JSON-able.
    Returns:
      SHA-256 of the file.
    Raises:
      ValueError: if a weight is not finite or does not fit float16.
    """
    from safetensors.numpy import save

    flat = traverse_util.flatten_dict(jax.device_get(generator.variables), sep="/")
    with np.errstate(over="ignore"):
        halves = {name: np.ascontiguousarray(value, np.float16) for name, value in flat.items()}
    bad = [name for name, value in halves.items() if not np.isfinite(value).all()]
    if bad:
        raise ValueError(f"weights that are not finite in float16: {', '.join(bad)}")
    content = save(halves, metadata={"generator": json.dumps(dict(entry), sort_keys=True)})
    files.write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def _build(entry: Mapping[str, Any], content: bytes) -> TrainedGenerator:
    from safetensors.numpy import load as load_arrays

    shape = tuple(entry["image_shape"])
    gan = make(
        entry["family"],
        shape,
        convention=entry.get("convention", "paper"),
        latent_dim=entry["latent_dim"],
        features=tuple(entry["features"]),
    )
    flat = {name: value.astype(np.float32) for name, value in load_arrays(content).items()}
    variables = traverse_util.unflatten_dict(flat, sep="/")
    expected = jax.eval_shape(
        gan.generator.init, jax.random.key(0), np.zeros((1, entry["latent_dim"]), np.float32)
    )
    if jax.tree.map(np.shape, variables) != jax.tree.map(lambda leaf: leaf.shape, expected):
        raise ValueError(
            f"the stored weights are not those of a {entry['family']} with widths "
            f"{entry['features']}"
        )
    return TrainedGenerator(variables, gan.generator, shape, entry["latent_dim"])
