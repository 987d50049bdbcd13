"""Train a GAN, one seed or several at once, and save its generator as safetensors.

Makes the generators of `flipad_jax/generators/zoo` (their commands are in its zoo.json) and those
of one's own experiments. Recipes: FLIPAD paper, appendix E.1. A killed run goes on at its last
checkpoint. WORKDIR/SEED.safetensors is read by `zoo.load_file`. With --stream the images of a TFDS
set or of a folder are read while it trains, and metrics.jsonl says which share of the time the
device waited for them.

    python run.py --experiment=train_generator --family=dcgan --dataset=digits --seeds=0,1,2
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import _plan
from experiments._config import Run, setting
from flipad_jax import conventions, data, pipeline, report
from flipad_jax.generators import sampling, training, zoo

_NUM_SHOWN = 24  # images per row of figures/samples.png


def _small(family, features, discriminator_features):
    """Widths with which three generators train on a laptop; those of the zoo's."""
    if family == "lsgan":
        return (64, 64, 32, 32), discriminator_features  # its last map is as large as the image
    inner = [64] * (len(discriminator_features) - 1)
    return (128, *[64] * (len(features) - 1)), (*inner, 128)


# Of a family, and the paper's widths of its two networks at this image size, makes those to train.
_WIDTHS: dict[str, Callable[..., tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "paper": lambda family, features, discriminator_features: (features, discriminator_features),
    "small": _small,
    "tiny": lambda family, *networks: tuple((8,) * len(widths) for widths in networks),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a training run."""

    family: str = setting("dcgan", "Architecture and recipe.", choices=tuple(sorted(zoo.FAMILIES)))
    dataset: str = setting(
        "digits", "digits, photos, a TFDS name, or a folder; its training split."
    )
    image_size: int = setting(32, "Side of the images.", lower_bound=8)
    seeds: tuple[int, ...] = setting((0,), "One model is trained per seed.", lower_bound=0)
    data_dir: str = setting("", "Where TFDS data sets lie; its default if empty.")
    data_seed: int = setting(0, "Seed of the data split, the same for all models.", lower_bound=0)
    latent_dim: int = setting(64, "Dimension of the latent.", lower_bound=1)
    convention: str = setting(
        "paper",
        "Recipe of LSGAN and EBGAN: that of the text, or that of its published code.",
        choices=conventions.CONVENTIONS,
    )
    widths: str = setting("paper", "Widths that are not named below.", choices=tuple(_WIDTHS))
    features: tuple[int, ...] = setting(
        (), "Generator widths, smallest map first; () for --widths."
    )
    discriminator_features: tuple[int, ...] = setting(
        (), "Discriminator widths, from the image inwards; () for --widths."
    )
    num_images: int = setting(0, "Training images; 0 for all there are.", lower_bound=0)
    stream: bool = setting(
        False, "Read a TFDS set or a folder batch by batch, for sets that do not fit in memory."
    )
    num_steps: int = setting(2500, "Generator updates.", lower_bound=1)
    batch_size: int = setting(64, "Images per update.", lower_bound=2)
    checkpoint_every: int = setting(250, "Generator updates between checkpoints.", lower_bound=1)


PRESETS = {
    "smoke": {
        "widths": "tiny",
        "num_steps": 4,
        "batch_size": 8,
        "checkpoint_every": 2,
    },
    "demo": {"widths": "small"},
    "paper": {
        "dataset": "celeb_a",
        "image_size": 64,
        "latent_dim": 100,
        "batch_size": 128,
        "num_steps": 50_000,
    },
}


def train(
    gan: training.Gan,
    images: np.ndarray | pipeline.Stream,
    record: Run,
    what: str,
    *,
    num_steps: int,
    log: Callable[[int, training.Report], None] | None = None,
    **options: Any,
) -> training.GanState:
    """`training.train` under a progress bar; `options` are its own, `log` hears its reports."""
    with record.progress(num_steps, f"training {what}") as bar:
        done = 0

        def progress(step, report):
            nonlocal done
            bar.update(step - done, **{k: float(np.mean(v)) for k, v in report._asdict().items()})
            done = step
            if log is not None:
                log(step, report)

        return training.train(
            gan,
            images,
            num_steps=num_steps,
            progress=progress,
            should_stop=record.should_stop,
            **options,
        )


def gan(
    family: str,
    image_shape: tuple[int, ...],
    *,
    latent_dim: int,
    convention: str,
    widths: str,
    features: tuple[int, ...] = (),
    discriminator_features: tuple[int, ...] = (),
) -> training.Gan:
    """A model of named widths (`--widths`), each of which may be given instead."""
    height, width, channels = image_shape
    make = functools.partial(
        zoo.make, family, (height, width, channels), latent_dim=latent_dim, convention=convention
    )
    paper = make()
    usual, discriminator_usual = _WIDTHS[widths](
        family, paper.generator.features, paper.discriminator.features
    )
    return make(
        features=features or usual,
        discriminator_features=discriminator_features or discriminator_usual,
    )


def entry(
    gan: training.Gan,
    seed: int,
    *,
    dataset: str,
    data_seed: int,
    num_images: int,
    num_steps: int,
    batch_size: int,
    convention: str,
) -> dict[str, Any]:
    """Everything that makes a generator what it is: what its file says of it."""
    return {
        "family": gan.family,
        "convention": convention,
        "image_shape": list(gan.image_shape),
        "latent_dim": gan.latent_dim,
        "features": list(gan.generator.features),
        "discriminator_features": list(gan.discriminator.features),
        "seed": seed,
        "dataset": dataset,
        "data_seed": data_seed,
        "num_images": num_images,
        "num_steps": num_steps,
        "batch_size": batch_size,
    }


def _configured(config: Config, image_shape: tuple[int, ...]) -> training.Gan:
    return gan(
        config.family,
        image_shape,
        latent_dim=config.latent_dim,
        convention=config.convention,
        widths=config.widths,
        features=config.features,
        discriminator_features=config.discriminator_features,
    )


def run(config: Config, record: Run) -> dict[str, Any]:
    """Train, save weights and samples; returns the files and the last losses per seed."""
    read: dict[str, Any] = {
        "split": "train",
        "image_size": config.image_size,
        "num_images": config.num_images or None,
        "seed": config.data_seed,
        "data_dir": config.data_dir or None,
    }
    last: dict[str, list[float]] = {}

    def log(step, report):
        last.update({"generator": report.generator.tolist()})
        last.update({"discriminator": report.discriminator.tolist()})
        record.log_metrics(step=step, **last, waiting=report.waiting)

    with contextlib.ExitStack() as stack:
        images: np.ndarray | pipeline.Stream
        if config.stream:
            images = pipeline.stream(
                config.dataset,
                batch_size=config.batch_size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                **read,
            )
            stack.callback(images.close)
            shown = data.load(config.dataset, **{**read, "num_images": _NUM_SHOWN}, exact=False)
        else:
            images = shown = data.load(config.dataset, **read)
        model = _configured(config, shown.shape[1:])
        states = train(
            model,
            images,
            record,
            f"{config.family}, seed {', '.join(map(str, config.seeds))}",
            log=log,
            seeds=config.seeds,
            num_steps=config.num_steps,
            batch_size=config.batch_size,
            checkpoint_dir=str(record.checkpoints),
            checkpoint_every=config.checkpoint_every,
        )
    files: dict[str, Any] = {}
    samples = {"training images": shown}
    for index, seed in enumerate(config.seeds):
        generator = sampling.from_state(model, training.take_seed(states, index))
        facts = entry(
            model,
            seed,
            dataset=config.dataset,
            data_seed=config.data_seed,
            num_images=config.num_images,
            num_steps=config.num_steps,
            batch_size=config.batch_size,
            convention=config.convention,
        )
        if config.stream:  # Another order of the images makes another generator.
            facts["stream"] = True
        name = f"{seed}.safetensors"
        facts["sha256"] = zoo.save_file(record.workdir / name, generator, facts)
        files[name] = facts
        # Samples of the file, not of the state: its weights are rounded to float16.
        saved = zoo.load_file(record.workdir / name)
        samples[f"seed {seed}"] = sampling.generate(saved, jax.random.key(0), _NUM_SHOWN)
    report.save_figure(
        report.image_grid(samples, num_columns=_NUM_SHOWN), record.figures / "samples.png"
    )
    return {"files": files, "last_losses": last}


def summary(metrics: dict[str, Any]) -> str:
    """The files that were written."""
    rows = [
        [name, entry["family"], entry["seed"], entry["num_steps"], entry["sha256"][:12]]
        for name, entry in metrics["files"].items()
    ]
    header = ["file", "family", "seed", "steps", "sha256"]
    return report.table_text(header, rows)


def plan(config: Config) -> list[_plan.Stage]:
    """Stages for `--plan`: training; samples and files cost next to nothing beside it."""
    images = _plan.training_images(config.dataset, config.image_size, config.num_images)
    model = _configured(config, images.shape[1:])
    on_device = config.batch_size * model.discriminator_steps if config.stream else images.shape[0]
    return [
        _plan.gan_training(
            model,
            config.batch_size,
            config.num_steps,
            len(config.seeds),
            num_images=on_device,
        )
    ]
