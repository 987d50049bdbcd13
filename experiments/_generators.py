"""The generators of an experiment: from the zoo, from an earlier run, or trained now.

Those of the tables are named by families and seeds (`load`), others by the name or the file of one
generator (`recorded`). For `load` a generator is named by everything that made it (family, widths,
data, seed, steps, ...). If the zoo has one of exactly these settings it is taken; if the folder
`--generators` has one, that; if not it is trained, all missing seeds of a family together, and kept
there. So experiments share generators, and no experiment ever meets one of other settings than its
own.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _plan, train_generator
from experiments._config import Run
from flipad_jax import data
from flipad_jax.generators import sampling, training, zoo
from flipad_jax.generators.sampling import TrainedGenerator

__all__ = [
    "FAMILY_NAMES",
    "RECIPES",
    "Recipe",
    "gan",
    "jittered",
    "load",
    "next_seed",
    "plan",
    "recipe",
    "recorded",
    "recorded_gan",
    "recorded_images",
    "trained_on",
]

FAMILY_NAMES = {"dcgan": "DCGAN", "wgan_gp": "WGAN-GP", "lsgan": "LSGAN", "ebgan": "EBGAN"}
RECIPES = ("paper", "small", "tiny")

# [P1] E.1, (CelebA, LSUN): passes over the training images.
_PAPER_EPOCHS = {"dcgan": (50, 10), "wgan_gp": (200, 10), "lsgan": (100, 10), "ebgan": (100, 5)}
# What two cores train in minutes: steps by family for (grey, colour) images, and narrow networks
# where images are large.
_SMALL_STEPS = {
    "dcgan": (2500, 1500),
    "wgan_gp": (1000, 500),
    "lsgan": (750, 750),
    "ebgan": (1500, 1000),
}
_SMALL_64: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "dcgan": ((64, 64, 32, 32), (16, 32, 64, 64)),
    "wgan_gp": ((64, 64, 32, 32), (16, 32, 64, 64)),
    "lsgan": ((64, 64, 32, 32), (16, 32, 64, 64, 64)),
    "ebgan": ((64, 64, 32, 32), (16, 32, 64)),
}


class Recipe(NamedTuple):
    """How a generator of a family is trained; widths (): those that `widths` names."""

    latent_dim: int
    convention: str
    num_steps: int
    batch_size: int
    widths: str
    features: tuple[int, ...] = ()
    discriminator_features: tuple[int, ...] = ()


def recipe(
    name: str,
    family: str,
    convention: str,
    dataset: str,
    image_size: int,
    num_images: int,
    channels: int,
) -> Recipe:
    """The recipe of that name.

    Args:
      name: "paper" ([P1] E.1), "small" (two cores, minutes), "tiny" (nothing but a test). The last
        two train LSGAN and EBGAN as the published code does, a discriminator step per generator
        step: their digits are better after as many minutes.
      family: one of `zoo.FAMILIES`.
      convention: of the paper's recipe.
      dataset: decides between the paper's epochs for CelebA (all others take these) and LSUN.
      image_size: side of the images.
      num_images: training images, which make epochs into steps.
      channels: of an image.
    """
    if name == "paper":
        epochs = _PAPER_EPOCHS[family][dataset.startswith("lsun")]
        model = zoo.make(family, (image_size, image_size, 3))
        per_epoch = max(num_images // (128 * model.discriminator_steps), 1)
        return Recipe(100, convention, epochs * per_epoch, 128, "paper")
    convention = "reference" if family in ("lsgan", "ebgan") else "paper"
    if name == "tiny":
        return Recipe(8, convention, 2, 8, "tiny")
    features, discriminator_features = _SMALL_64[family] if image_size == 64 else ((), ())
    steps = _SMALL_STEPS[family][channels > 1]
    return Recipe(64, convention, steps, 64, "small", features, discriminator_features)


def gan(settings: Any, family: str, shape: tuple[int, ...]) -> tuple[training.Gan, Recipe]:
    """The model and the recipe of a family, for training images of shape `[n, h, w, c]`."""
    chosen = recipe(
        settings.recipe,
        family,
        settings.convention,
        settings.dataset,
        settings.image_size,
        shape[0],
        shape[3],
    )
    model = train_generator.gan(
        family,
        shape[1:],
        latent_dim=chosen.latent_dim,
        widths=chosen.widths,
        features=chosen.features,
        discriminator_features=chosen.discriminator_features,
        convention=chosen.convention,
    )
    return model, chosen


def _entry(family: str, seed: int, settings: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """What names a generator: the metadata of its file, as `train_generator` writes them."""
    model, chosen = gan(settings, family, shape)
    return train_generator.entry(
        model,
        seed,
        dataset=settings.dataset,
        data_seed=settings.data_seed,
        num_images=settings.num_gan_images,
        num_steps=chosen.num_steps,
        batch_size=chosen.batch_size,
        convention=chosen.convention,
    )


def _path(folder: Path, entry: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
    return folder / f"{entry['family']}-{entry['seed']}-{digest[:12]}.safetensors"


def _in_zoo(entry: dict[str, Any]) -> TrainedGenerator | None:
    for name in zoo.names():
        known = zoo.record(name)
        if all(known[key] == value for key, value in entry.items()):
            return zoo.load(name)
    return None


def load(
    settings: Any, record: Run, families: Sequence[str], seeds: Sequence[int]
) -> dict[str, dict[int, TrainedGenerator]]:
    """The generators of every family and seed, `[family][seed]`; trains those that are nowhere.

    Args:
      settings: has `dataset`, `data_dir`, `data_seed`, `image_size`, `num_gan_images`, `recipe`,
        `convention` and `generators`, see `_attribution.Settings`.
      record: the run, for progress and checkpoints.
      families: names in `zoo.FAMILIES`.
      seeds: one generator each.
    """

    def training_images(num_images: int | None) -> np.ndarray:
        return data.load(
            settings.dataset,
            split="train",
            image_size=settings.image_size,
            num_images=num_images,
            seed=settings.data_seed,
            data_dir=settings.data_dir or None,
        )

    # What names a generator is the shape of the images only. Where their number is given, one of
    # them tells it; all are read when something is to be trained.
    count = settings.num_gan_images or None
    images = training_images(count and 1)
    shape = (count or len(images), *images.shape[1:])
    folder = Path(settings.generators)
    found: dict[str, dict[int, TrainedGenerator]] = {}
    for family in families:
        entries = {seed: _entry(family, seed, settings, shape) for seed in seeds}
        missing = [
            seed
            for seed, entry in entries.items()
            if _in_zoo(entry) is None and not _path(folder, entry).exists()
        ]
        if missing:
            if len(images) < shape[0]:
                images = training_images(count)
            _train(family, missing, entries, images, settings, folder, record)
        found[family] = {
            seed: _in_zoo(entry) or zoo.load_file(_path(folder, entry))
            for seed, entry in entries.items()
        }
    return found


def _train(family, seeds, entries, images: np.ndarray, settings, folder: Path, record: Run) -> None:
    model, chosen = gan(settings, family, images.shape)
    name = "-".join(map(str, seeds))
    states = train_generator.train(
        model,
        images,
        record,
        f"{family}, seeds {', '.join(map(str, seeds))}",
        seeds=tuple(seeds),
        num_steps=chosen.num_steps,
        batch_size=chosen.batch_size,
        checkpoint_dir=str(record.checkpoints / f"{family}-{name}"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(seeds):
        generator = sampling.from_state(model, training.take_seed(states, index))
        zoo.save_file(_path(folder, entries[seed]), generator, entries[seed])


def recorded(flag: str, name: str) -> tuple[TrainedGenerator, dict[str, Any]]:
    """A generator of the zoo, or of a file of `train_generator`, and its record.

    Raises:
      ValueError: if it is neither; what it was trained on would not be known. Names the flag.
    """
    if name in zoo.names():
        return zoo.load(name), zoo.record(name)
    if Path(name).is_file() and name.endswith(".safetensors") and zoo.is_record(name):
        entry = zoo.record_file(name)
        if {"dataset", "discriminator_features"} <= entry.keys():
            return zoo.load_file(name), entry
    raise ValueError(
        f"--{flag}={name}: expected a generator of the zoo ({', '.join(zoo.names())}) or a file of "
        "train_generator, which say what they were trained on"
    )


def next_seed(flag: str, name: str) -> str:
    """The next seed of a generator of the zoo; the first one after the last.

    Raises:
      ValueError: if the zoo has no other. Names the flag that would name one.
    """
    family = name.rpartition("_")[0]
    seeds = sorted(
        (other for other in zoo.names() if other.rpartition("_")[0] == family),
        key=lambda other: int(other.rpartition("_")[2]),
    )
    if name not in seeds or len(seeds) < 2:
        raise ValueError(f"--{flag} is missing: no other seed of {name} is known")
    return seeds[(seeds.index(name) + 1) % len(seeds)]


def recorded_gan(entry: Mapping[str, Any], **options: Any) -> training.Gan:
    """The model that a record describes, with other options of `zoo.make`."""
    described = {
        "convention": entry.get("convention", "paper"),
        "latent_dim": entry["latent_dim"],
        "features": tuple(entry["features"]),
        "discriminator_features": tuple(entry["discriminator_features"]),
    }
    return zoo.make(entry["family"], tuple(entry["image_shape"]), **{**described, **options})


def recorded_images(
    entry: Mapping[str, Any], split: str, num_images: int | None = None
) -> np.ndarray:
    """Images of the data set that a record names, as `data.load` returns them."""
    return data.load(
        entry["dataset"],
        split=split,
        image_size=entry["image_shape"][0],
        num_images=num_images,
        seed=int(entry.get("data_seed", 0)),
    )


def trained_on(
    gan: training.Gan,
    generator: TrainedGenerator,
    images: np.ndarray,
    record: Run,
    *,
    seed: int,
    num_steps: int,
    batch_size: int,
) -> TrainedGenerator:
    """A generator after more updates, against a discriminator that begins anew.

    Raises:
      FloatingPointError: if the training diverged.
    """
    states = training.init_seeds(gan, jnp.array([seed], jnp.uint32))
    states = states._replace(
        generator=jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], generator.variables)
    )
    on_device = jnp.asarray(images)
    with record.progress(num_steps, "training on") as bar:
        for _ in range(num_steps):
            states, losses = training.step_all(states, on_device, gan=gan, batch_size=batch_size)
            bar.update(1)
    if not np.isfinite(np.asarray(losses.generator)).all():
        raise FloatingPointError("training on diverged")
    return sampling.from_state(gan, training.take_seed(states, 0))


def jittered(generator: TrainedGenerator, rng: jax.Array, strength: float) -> TrainedGenerator:
    """A generator with noise in its last kernel, whose size stays what it was:
    W' = sqrt(1 - a^2) W + a std(W) N(0, 1), a the strength in [0, 1]."""
    params = dict(generator.variables["params"])
    kernel = np.asarray(params["last"]["kernel"])
    noise = np.asarray(jax.random.normal(rng, kernel.shape, np.float32))
    changed = np.sqrt(1 - strength**2) * kernel + strength * kernel.std() * noise
    params["last"] = {**params["last"], "kernel": changed.astype(kernel.dtype)}
    return dataclasses.replace(generator, variables={**generator.variables, "params": params})


def plan(settings: Any, family: str) -> _plan.Stage:
    """The training of a family's seeds, for `--plan`; as if none were there already."""
    images = _plan.training_images(settings.dataset, settings.image_size, settings.num_gan_images)
    model, chosen = gan(settings, family, images.shape)
    return _plan.gan_training(
        model,
        chosen.batch_size,
        chosen.num_steps,
        len(settings.seeds),
        num_images=images.shape[0],
        name=f"{FAMILY_NAMES[family]}: training step",
    )
