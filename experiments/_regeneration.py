"""What `prove` and `regeneration_study` share: generators by name, processing, one search."""

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments._config import Run
from flipad_jax import perturbations
from flipad_jax.detection import processing, regeneration
from flipad_jax.detection.latent_inversion import LatentGenerator
from flipad_jax.detection.regeneration import Bank, RegenerationConfig
from flipad_jax.generators import interop, torch_generators, zoo
from flipad_jax.generators.sampling import TrainedGenerator

__all__ = [
    "CALIBRATED_AT",
    "PROCESSINGS",
    "Generator",
    "codimension_text",
    "load_generator",
    "make_bank",
    "num_unknowns",
    "processed",
    "rng",
    "search",
    "weights_sha256",
]

PROCESSINGS = ("none", *processing.NAMES)
_GAIN = 0.9
# How strongly own and foreign images are processed to calibrate a search.
CALIBRATED_AT = {
    "none": "untouched",
    "noise": "noise-0.05",
    "jpeg": "jpeg-90",
    "blur": "blur-3",
    "crop": "crop-55",
    "brightness": f"brightness {_GAIN:g}",
}

Generator = TrainedGenerator | LatentGenerator


def load_generator(name: str, convention: str = "paper") -> tuple[Generator, dict[str, Any]]:
    """A generator by name, file or import path, and what is recorded of it.

    A file of PyTorch weights has no record, and those of LSGAN a convention.

    Raises:
      ValueError: if it is none of them, or the function returns something else.
    """
    if name in zoo.names():
        return zoo.load(name), zoo.record(name)
    if Path(name).is_file():
        if name.endswith(".safetensors") and zoo.is_record(name):
            return zoo.load_file(name), zoo.record_file(name)
        arrays = interop.read_arrays(name)
        try:
            return torch_generators.from_arrays(arrays, convention=convention), {}
        except ValueError as error:
            raise ValueError(f"--generator={name}: {error}") from error
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(
            f"--generator={name} is no file, no MODULE:FUNCTION, and no generator of the zoo: "
            f"{', '.join(zoo.names())}"
        )
    try:
        made = getattr(importlib.import_module(module), function)()
    except Exception as error:  # What another's function raises is its own affair.
        raise ValueError(
            f"--generator={name} cannot be imported and called: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, TrainedGenerator | LatentGenerator):
        raise ValueError(
            f"--generator={name} returned {type(made).__name__}, expected a LatentGenerator "
            "(params, apply, latent_dim) or a TrainedGenerator"
        )
    return made, {}


def rng(settings: Any, *path: int) -> jax.Array:
    """0 bank, 1 own images, 2 processing, 3 calibration, 4 suspects, 5 the study's sources, 6 own
    images that an attributor is tried on."""
    found = jax.random.key(settings.seed)
    for part in path:
        found = jax.random.fold_in(found, part)
    return found


def processed(name: str, images: np.ndarray, noise_rng: jax.Array) -> np.ndarray:
    """Images `[n, h, w, c]` uint8 as the search of that name is calibrated on: `CALIBRATED_AT`."""
    if name == "none":
        return images
    if name == "brightness":
        return np.clip(np.round(images * _GAIN), 0, 255).astype(np.uint8)
    return perturbations.apply(CALIBRATED_AT[name], images, noise_rng)


def num_unknowns(name: str) -> int:
    """How many unknowns a search of that name ends with, behind the latent."""
    if name == "none":
        return 0
    kind = processing.get(name)
    return kind.codec.num_unknowns if kind.codec else kind.num_unknowns


def make_bank(settings: Any, generator: Generator) -> Bank | None:
    """Own images to start from, `settings.bank` of them."""
    if not settings.bank:
        return None
    return regeneration.make_bank(generator, rng(settings, 0), settings.bank)


def search(
    settings: Any,
    record: Run,
    generator: Generator,
    bank: Bank | None,
    images: np.ndarray,
    name: str,
    search_rng: jax.Array,
    what: str,
) -> dict[str, np.ndarray]:
    """`regeneration.regenerate` under a progress bar, its result as the arrays of a stage.

    Args:
      settings: has `num_starts` and `places`.
      record: of the run.
      generator, bank, images: as `regenerate` takes them.
      name: one of `PROCESSINGS`.
      search_rng: of the starts.
      what: the progress bar's text.
    """
    with record.progress(len(images), what) as bar:
        done = 0

        def progress(decided, _):
            nonlocal done
            bar.update(decided - done)
            done = decided

        result = regeneration.regenerate(
            generator,
            images,
            search_rng,
            RegenerationConfig(num_starts=settings.num_starts, places=settings.places),
            bank=bank,
            processing=None if name == "none" else processing.get(name),
            progress=progress,
        )
    return {**result._asdict(), "replayed": np.array(result.replayed, np.str_)}


def weights_sha256(generator: Generator) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights, in the order of the pytree."""
    weights = generator.variables if isinstance(generator, TrainedGenerator) else generator.params
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def codimension_text(row: Mapping[str, Any]) -> str:
    """Estimate and lower end; what no tail could be fitted to has none."""
    if not row["codimension"] or not np.isfinite(row["codimension"]):
        return "-"
    return f"{row['codimension']:.1f} [{row['codimension_low']:.1f}, )"
