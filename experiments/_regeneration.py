"""What `prove` and `regeneration_study` share: generators by name, processing, one search."""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments._config import Run
from flipad_jax import perturbations
from flipad_jax.detection import processing, regeneration
from flipad_jax.detection.latent_inversion import LatentGenerator
from flipad_jax.detection.regeneration import Bank, RegenerationConfig, weights_sha256
from flipad_jax.generators import interop, torch_generators, zoo
from flipad_jax.generators.sampling import TrainedGenerator

__all__ = [
    "CALIBRATED_AT",
    "PROCESSINGS",
    "Generator",
    "codimension_text",
    "kind_of",
    "load_generator",
    "make_bank",
    "num_unknowns",
    "processed",
    "rng",
    "search",
    "search_in_blocks",
    "weights_sha256",
]

PROCESSINGS = ("none", *processing.NAMES)
# How strongly own and foreign images are processed to calibrate a search.
CALIBRATED_AT = {
    "none": "untouched",
    "noise": "noise-0.05",
    "jpeg": "jpeg-90",
    "blur": "blur-3",
    "crop": "crop-55",
    "brightness": "brightness-0.9",
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
            raise ValueError(
                f"--generator={name}: {error}. For another architecture give MODULE:FUNCTION, see "
                "docs/proof.md"
            ) from error
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(
            f"--generator={name} is no file, no MODULE:FUNCTION, and no generator of the zoo: "
            f"{', '.join(zoo.names())}"
        )
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # A module beside the user, too, not only beside run.py.
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


def kind_of(name: str) -> str:
    """Which of `PROCESSINGS` looks for images that were processed in that way.

    Args:
      name: one of them, or one of them at a strength: a name of `perturbations.apply` such as
        "jpeg-80", or "brightness-X" for levels times X.
    Raises:
      ValueError: if it is neither.
    """
    kind, dash, strength = name.partition("-")
    if kind not in PROCESSINGS or (kind == "none" and dash):
        raise ValueError(
            f"unknown processing {name!r}; there are {', '.join(PROCESSINGS)}, all but the first "
            "also at a strength, such as jpeg-80, noise-0.01, crop-60 or brightness-0.8"
        )
    if kind == "brightness" and dash:
        try:
            gain = float(strength)
        except ValueError:
            gain = 0.0
        if not 0.5 <= gain <= 2:
            raise ValueError(f"{name}: levels are multiplied by 0.5 to 2")
    elif dash:
        perturbations.parse(name)
    return kind


def processed(name: str, images: np.ndarray, noise_rng: jax.Array) -> np.ndarray:
    """Images `[n, h, w, c]` uint8, processed: `CALIBRATED_AT`, or what `kind_of` knows."""
    if name == "none":
        return images
    name = CALIBRATED_AT.get(name, name)
    if kind_of(name) == "brightness":
        gain = float(name.partition("-")[2])
        return np.clip(np.round(images * gain), 0, 255).astype(np.uint8)
    return perturbations.apply(name, images, noise_rng)


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
    names: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """`regeneration.regenerate` under a progress bar, its result as the arrays of a stage.

    Args:
      settings: has `num_starts` and `places`.
      record: of the run.
      generator, bank, images: as `regenerate` takes them.
      name: one of `PROCESSINGS`.
      search_rng: of the starts.
      what: the progress bar's text.
      names: of the images' random streams, as `regenerate` takes them.
    """
    with record.parts(what) as report:
        part, before = "searching", 0

        def progress(decided, total):
            nonlocal part, before
            if decided < before:
                part = "with its codec"
            before = decided
            report(part, decided, total)

        return _regenerated(settings, generator, bank, images, name, search_rng, names, progress)


def search_in_blocks(
    settings: Any,
    record: Run,
    generator: Generator,
    bank: Bank | None,
    images: np.ndarray,
    name: str,
    search_rng: jax.Array,
    what: str,
    stage: str,
    size: int,
) -> dict[str, np.ndarray]:
    """`search` inside a stage, in blocks that are kept one by one: a stop costs one of them.

    What is found of an image does not depend on its block: its random streams are named by its
    place among all images.

    Args:
      settings, record, generator, bank, images, name, search_rng, what: as `search` takes them, at
        least one image.
      stage: its name.
      size: images of a block.
    """
    kept, found, shown = record.kept(stage), [], 0
    with record.progress(len(images), f"{what}: searching") as bar:

        def show(first: int, decided: int, total: int = 0) -> None:
            del total
            nonlocal shown
            # A codec's second search counts from zero again; the bar waits for it.
            if first + decided > shown:
                bar.update(first + decided - shown)
                shown = first + decided

        for first in range(0, len(images), size):
            names = range(first, min(first + size, len(images)))
            compute = functools.partial(
                _regenerated,
                settings,
                generator,
                bank,
                images[first : first + size],
                name,
                search_rng,
                names,
                functools.partial(show, first),
            )
            found.append(kept.part(f"{names.start}-{names.stop}", compute))
            show(first, len(names))
    return {key: np.concatenate([block[key] for block in found]) for key in found[0]}


def _regenerated(
    settings: Any,
    generator: Generator,
    bank: Bank | None,
    images: np.ndarray,
    name: str,
    search_rng: jax.Array,
    names: Sequence[int] | None,
    progress: Callable[[int, int], None],
) -> dict[str, np.ndarray]:
    """The arrays of `regeneration.regenerate`."""
    result = regeneration.regenerate(
        generator,
        images,
        search_rng,
        RegenerationConfig(num_starts=settings.num_starts, places=settings.places),
        bank=bank,
        processing=None if name == "none" else processing.get(name),
        names=names,
        progress=progress,
    )
    return {**result._asdict(), "replayed": np.array(result.replayed, np.str_)}


def codimension_text(row: Mapping[str, Any]) -> str:
    """Estimate and lower end; what no tail could be fitted to has none."""
    if not row["codimension"] or not np.isfinite(row["codimension"]):
        return "-"
    return f"{row['codimension']:.1f} [{row['codimension_low']:.1f}, )"
