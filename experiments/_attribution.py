"""What the tables of the FLIPAD paper have in common: settings, images, methods, cells.

A *cell* is one method, fitted to one generator of ours and asked about images of all sources. Every
cell is a stage of the run, so a killed run goes on at the cell where it was. Own training images,
calibration images and test images of a generator are parts of one stream that do not overlap; no
image of a rival is used before the test.

A repeat is one seed: generators that were trained from that seed, images drawn from it, detectors
initialised by it.
"""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import _generators, _plan
from experiments._config import Run, check_once, setting
from experiments._generators import FAMILY_NAMES
from experiments._record import write_atomically
from flipad_jax import (
    __version__,
    conventions,
    data,
    inception,
    metrics,
    parallel,
    perturbations,
)
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection import (
    bundle,
    calibration,
    features,
    fingerprint,
    latent_inversion,
    processing,
    proof,
    regeneration,
)
from flipad_jax.detection.attributor import AttributorConfig
from flipad_jax.detection.classifier import ClassifierConfig
from flipad_jax.detection.deepsad import ENCODER_WIDTHS, DeepSADConfig
from flipad_jax.detection.latent_inversion import LatentInversionConfig
from flipad_jax.detection.reconstruction import ReconstructionConfig
from flipad_jax.detection.regeneration import RegenerationConfig
from flipad_jax.generators import impostors, sampling
from flipad_jax.generators.sampling import TrainedGenerator
from flipad_jax.inversion.final_layer import FinalLayer

__all__ = [
    "METHODS",
    "PAPER",
    "SMOKE",
    "SOURCES_PAPER",
    "SOURCES_SMOKE",
    "Model",
    "Settings",
    "Sources",
    "cell",
    "check",
    "model",
    "own_rng",
    "plan",
    "real_images",
    "settings_texts",
    "sources_text",
    "tests",
]

# method -> shown name; the order of the paper's tables, ours last
METHODS = {
    "sm_f": "SM-F",
    "sm_inv_l2": "SM-Inv l2",
    "sm_inv_perceptual": "SM-Inv perceptual",
    "rawpad": "RawPAD",
    "dctpad": "DCTPAD",
    "flipad": "FLIPAD",
    "one_class": "one-class",
    "one_class_many": "one-class, many own",
    "one_class_impostors": "one-class + impostors",
    "regeneration": "regeneration",
}
_FEATURES = {"rawpad": "pixels", "dctpad": "dct", "flipad": "activations"}


@dataclasses.dataclass(frozen=True)
class Sources:
    """Settings of all experiments about several generators: which, their images, the inversion."""

    seeds: tuple[int, ...] = setting(
        (0, 1, 2), "Repeats: generators, images and detectors of each seed.", lower_bound=0
    )
    dataset: str = setting("digits", "digits, photos, a TFDS name, or a folder of images.")
    data_dir: str = setting("", "Where TFDS data sets lie; its default if empty.")
    data_seed: int = setting(0, "Seed of the data split, the same for all models.", lower_bound=0)
    image_size: int = setting(32, "Side of the images.", lower_bound=8)
    families: tuple[str, ...] = setting(
        tuple(FAMILY_NAMES), "Architectures, each in turn ours.", choices=tuple(FAMILY_NAMES)
    )
    recipe: str = setting(
        "small", "How generators are trained: paper, small or tiny.", choices=_generators.RECIPES
    )
    convention: str = setting(
        "paper",
        "Where the paper's text and code disagree (GAN recipes, DeepSAD's features).",
        choices=conventions.CONVENTIONS,
    )
    generators: str = setting("runs/generators", "Folder that keeps trained generators.")
    num_gan_images: int = setting(
        0, "Images that the generators are trained on; 0: all.", lower_bound=0
    )
    num_test: int = setting(500, "Test images of every source.", lower_bound=8)
    num_mean: int = setting(5000, "Latents that the mean activation averages.", lower_bound=1)
    lam: float = setting(5e-4, "Lasso weight (half of the paper's lambda).", lower_bound=0.0)
    tol: float = setting(
        0.0, "Relative duality gap of every inversion; 0: all take max_iters.", lower_bound=0.0
    )
    max_iters: int = setting(30, "FISTA iterations (at most, if tol is not 0).", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Settings(Sources):
    """Settings of the tables: those of the sources, and those of the methods."""

    # Regeneration takes more time than all others together.
    methods: tuple[str, ...] = setting(
        tuple(name for name in METHODS if name != "regeneration"), "Rows.", choices=tuple(METHODS)
    )
    fnr: float = setting(
        0.005, "Share of own images that may be rejected.", lower_bound=0.0, upper_bound=1.0
    )
    num_own: int = setting(1500, "Own images that a detector learns.", lower_bound=64)
    num_real: int = setting(1500, "Real images that DeepSAD learns.", lower_bound=8)
    num_calibration: int = setting(500, "Own images that set the threshold.", lower_bound=20)
    epochs: int = setting(6, "Epochs of DeepSAD.", lower_bound=1)
    activation_widths: tuple[int, ...] = setting((32, 64, 32), "FLIPAD's encoder.", lower_bound=1)
    pixel_widths: tuple[int, ...] = setting(
        (16, 32, 64), "RawPAD's and DCTPAD's encoder.", lower_bound=1
    )
    num_many: int = setting(
        10_000,
        "Own images for the one-class detector that is given many, and for that with impostors.",
        lower_bound=64,
    )
    num_impostors: int = setting(8192, "Images of impostors of ours.", lower_bound=64)
    num_altered: int = setting(
        8192,
        "Altered copies of own images that the one-class detector learns; 0: none.",
        lower_bound=0,
    )
    classifier_steps: int = setting(
        900,
        "Training steps on altered copies, and as many on impostors.",
        lower_bound=1,
    )
    reconstruction_steps: int = setting(
        ReconstructionConfig.num_steps,
        "Training steps of the network that draws own images again, where images were processed.",
        lower_bound=0,
    )
    inversion_images: int = setting(
        24, "SM-Inv: images of every source, and own ones that calibrate.", lower_bound=8
    )
    inversion_steps: int = setting(150, "SM-Inv: steps of Adam.", lower_bound=1)
    inversion_restarts: int = setting(2, "SM-Inv: starts per image.", lower_bound=1)
    perceptual: str = setting(
        "ms_ssim",
        "SM-Inv's second distance: multi-scale SSIM, which is not the paper's, or inception.",
        choices=("ms_ssim", "inception"),
    )
    inception_weights: str = setting("", "File of Inception-V3 weights, torchvision's names.")
    regeneration_images: int = setting(
        24,
        "Regeneration: images of every source, and own ones that calibrate.",
        lower_bound=4,
    )
    regeneration_starts: int = setting(4, "Regeneration: starts per image, at most.", lower_bound=1)
    regeneration_bank: int = setting(
        8192, "Regeneration: own images with known latents to start from.", lower_bound=1
    )
    reuse: str = setting("", "Workdir of another run, whose fitted attributors are taken.")


SOURCES_SMOKE: dict[str, Any] = {
    "seeds": (0, 1),
    "families": ("dcgan", "lsgan"),
    "num_test": 24,
    "num_mean": 256,
    "max_iters": 10,
}

SMOKE: dict[str, Any] = {
    **SOURCES_SMOKE,
    "fnr": 0.05,
    "num_own": 160,
    "num_real": 96,
    "num_calibration": 60,
    "epochs": 1,
    "activation_widths": (8, 8),
    "pixel_widths": (8, 8),
    "num_many": 300,
    "num_impostors": 128,
    "num_altered": 128,
    "classifier_steps": 10,
    "reconstruction_steps": 5,
    "inversion_images": 8,
    "inversion_steps": 10,
    "inversion_restarts": 2,
    "regeneration_images": 4,
    "regeneration_starts": 1,
    "regeneration_bank": 500,
}

SOURCES_PAPER: dict[str, Any] = {
    "dataset": "celeb_a",
    "image_size": 64,
    "recipe": "paper",
    "seeds": (1, 2, 3, 4, 5),
    "num_test": 1000,
    "max_iters": 1000,
}

PAPER: dict[str, Any] = {
    **SOURCES_PAPER,
    "num_own": 10_000,
    "num_real": 10_000,
    "num_calibration": 1000,
    "epochs": 50,
    "activation_widths": ENCODER_WIDTHS["activations"],
    "pixel_widths": ENCODER_WIDTHS["pixels"],
    "num_many": 15_000,
    "num_impostors": 20_480,
    "num_altered": 20_480,
    "classifier_steps": 1800,
    "reconstruction_steps": 8000,
    "inversion_images": 1000,
    "inversion_steps": 1000,
    "inversion_restarts": 10,
    "regeneration_images": 200,
}


class Model(NamedTuple):
    """A generator of ours and what attribution takes of it."""

    family: str
    seed: int
    generator: TrainedGenerator
    layer: FinalLayer
    z_bar: np.ndarray

    @property
    def name(self) -> str:
        """Names stages and files: family-seed."""
        return f"{self.family}-{self.seed}"


class _Question(NamedTuple):
    """What one cell is about."""

    settings: Settings
    record: Run
    method: str
    ours: Model
    name: str  # of the stage
    treatment: str  # of the images that are learned from: a perturbation, or "none"
    sources: Mapping[str, np.ndarray]  # test images, treated

    def untreated(self, count: int) -> np.ndarray:
        """The first images of our generator's stream."""
        return sampling.generate(self.ours.generator, own_rng(self.ours), count)

    def own(self, count: int) -> np.ndarray:
        """The same as they are seen."""
        return _perturbed(self.treatment, self.untreated(count), self.ours, 0)


def check(settings: Settings) -> None:
    """Find what cannot work before minutes are spent.

    Raises:
      ValueError: for doubled seeds, families or methods, or sizes that contradict each other.
    """
    check_once(settings, "seeds", "families")
    if settings.methods:  # An experiment may have rows of its own.
        check_once(settings, "methods")
    if 0 < settings.num_altered < 16:
        raise ValueError(f"--num_altered={settings.num_altered}: expected 16 at least, or 0")
    if settings.num_many < 2 * settings.num_calibration + 64:
        raise ValueError(
            f"--num_many={settings.num_many}: two parts of "
            f"{settings.num_calibration} are for reference and calibration, and 64 at least to fit"
        )
    if "one_class" in settings.methods and settings.num_own < settings.num_calibration + 64:
        raise ValueError(
            f"--num_own={settings.num_own}: as many as --num_calibration="
            f"{settings.num_calibration} of them are for reference, and 64 at least to fit"
        )
    searches = {"sm_inv": "inversion_images", "regeneration": "regeneration_images"}
    for method, name in searches.items():
        asked = any(row.startswith(method) for row in settings.methods)
        if asked and getattr(settings, name) > settings.num_test:
            raise ValueError(
                f"--{name}={getattr(settings, name)}: there are --num_test={settings.num_test} "
                "images of every source"
            )
        before = max(settings.num_own + settings.num_calibration, settings.num_many)
        if asked and getattr(settings, name) > before:  # Behind them are the test images.
            raise ValueError(
                f"--{name}={getattr(settings, name)}: there are {before} own images to calibrate, "
                "the larger one of --num_many and --num_own + --num_calibration"
            )
    if settings.perceptual == "inception" and not settings.inception_weights:
        raise ValueError("--perceptual=inception needs --inception_weights=FILE")


def model(settings: Sources, record: Run, family: str, seed: int, generator) -> Model:
    """A generator as ours, its mean activation computed once per run."""
    rng = jax.random.fold_in(jax.random.key(seed), 0)
    z_bar = record.stage(
        f"mean_activation-{family}-{seed}",
        lambda: {"z_bar": sampling.mean_activation(generator, rng, settings.num_mean)},
        text=f"{FAMILY_NAMES[family]}, seed {seed}: mean activation",
    )["z_bar"]
    return Model(family, seed, generator, sampling.final_layer(generator), z_bar)


def own_rng(ours: Model) -> jax.Array:
    """Names the stream of a generator's own images."""
    return jax.random.fold_in(jax.random.key(ours.seed), 1)


def real_images(settings: Sources, split: str, count: int) -> np.ndarray:
    """Real images of a split."""
    return data.load(
        settings.dataset,
        split=split,
        image_size=settings.image_size,
        num_images=count,
        seed=settings.data_seed,
        data_dir=settings.data_dir or None,
    )


def tests(
    settings: Sources, ours: Model, rivals: Mapping[str, TrainedGenerator]
) -> dict[str, np.ndarray]:
    """Test images by source: "own", "real" and the rivals, `num_test` of each."""
    first = 0
    if isinstance(settings, Settings):  # Own images before are learned from.
        first = max(settings.num_own + settings.num_calibration, settings.num_many)
    found = {
        "own": sampling.generate(ours.generator, own_rng(ours), settings.num_test, first=first),
        "real": real_images(settings, "test", settings.num_test),
    }
    for name, generator in rivals.items():
        # Named by the rival alone: the same images whoever is ours in this repeat.
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        stream = jax.random.fold_in(jax.random.fold_in(jax.random.key(ours.seed), 2), digest)
        found[name] = sampling.generate(generator, stream, settings.num_test)
    return found


def _attributor_config(
    method: str, settings: Settings, num_generated: int, treatment: str = "none"
) -> AttributorConfig:
    # Half an image more: the product with the number of images is cut to a whole number.
    share = (settings.num_calibration + 0.5) / num_generated
    common: dict[str, Any] = {
        "lam": settings.lam,
        "tol": settings.tol,
        "max_iters": settings.max_iters,
        "calibration_share": share,
        "check_untouched": False,
        "immunize": treatment,
        "convention": settings.convention,
    }
    if method in _FEATURES:
        widths = settings.activation_widths if method == "flipad" else settings.pixel_widths
        drop = (max(settings.epochs // 2, 1),)  # the paper: after 25 of 50
        deepsad = DeepSADConfig(widths=widths, epochs=settings.epochs, drop_epochs=drop)
        return AttributorConfig(
            detector="deepsad", features=_FEATURES[method], deepsad=deepsad, **common
        )
    return AttributorConfig(
        classifier=ClassifierConfig(num_steps=settings.classifier_steps),
        reconstruction=ReconstructionConfig(num_steps=settings.reconstruction_steps),
        num_altered=settings.num_altered,
        **common,
    )


def cell(
    settings: Settings,
    record: Run,
    method: str,
    ours: Model,
    sources: Mapping[str, np.ndarray],
    *,
    perturbation: str = "none",
    learned: str = "none",
) -> dict[str, Any]:
    """Fit a method to our generator and score images of all sources: a stage of the run.

    Args:
      settings, record: of the experiment.
      method: one of `METHODS`.
      ours: our generator.
      sources: test images by source, from `tests`.
      perturbation: what happens to the images, see `perturbations.apply`.
      learned: what happens to the images that are learned from, another name of that kind.
    Returns:
      `metrics.summary` of the scores, and the seconds that it took. Images whose inversion missed
      its tolerance are undecided; a warning counts them.
    """
    name = f"{method}-{ours.name}" + ("" if perturbation == "none" else f"-{perturbation}")
    text = f"{METHODS[method]}, ours is {FAMILY_NAMES[ours.family]} {ours.seed}"
    if perturbation != "none":
        text += f", {perturbation}"
        text += "" if learned == perturbation else f", learned from {learned}"

    def compute():
        shown = {
            source: _perturbed(perturbation, images, ours, 10 + i)
            for i, (source, images) in enumerate(sources.items())
        }
        question = _Question(settings, record, method, ours, name, learned, shown)
        return _SCORERS.get(method, _score_attributor)(question)

    arrays = record.stage(name, compute, text=text)
    threshold = calibration.threshold(arrays["calibration"], settings.fnr)
    rivals = {source: arrays[source] for source in sources if source != "own"}
    found = metrics.summary(arrays["own"], rivals, threshold)
    return {**found, "seconds": record.seconds[name]}


def _perturbed(perturbation: str, images: np.ndarray, ours: Model, index: int) -> np.ndarray:
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(ours.seed), 3), index)
    return perturbations.apply(perturbation, images, rng)


def _score_attributor(question: _Question) -> dict[str, np.ndarray]:
    """RawPAD, DCTPAD, FLIPAD and the one-class detectors."""
    settings, method, ours = question.settings, question.method, question.ours
    with_impostors = method == "one_class_impostors"
    count = settings.num_own + settings.num_calibration
    if with_impostors or method == "one_class_many":
        count = settings.num_many
    config = _attributor_config(method, settings, count, question.treatment)
    real = None
    if config.detector == "deepsad":
        real = real_images(settings, "train", settings.num_real)
    made_by = _made_by(question, config, count, real)
    treated = "" if question.treatment == "none" else f"-{question.treatment}"
    name = f"{method}-{ours.name}{treated}"
    path = question.record.workdir / "attributors" / name
    # This run's own one, where another cell has fitted it already, or that of the run to reuse.
    fitted = _reused(path, question, made_by)
    if fitted is None and settings.reuse:
        fitted = _reused(Path(settings.reuse) / "attributors" / name, question, made_by)
    # Other processes may have other folders. All fit, or none does: they fit together.
    if parallel.anywhere(fitted is None):
        fitted = None
    kept = question.record.kept(question.name)
    start = time.monotonic()
    with question.record.parts(METHODS[method]) as progress:
        if fitted is None:
            changed = None
            if with_impostors:
                rng = jax.random.fold_in(jax.random.key(ours.seed), 5)
                changed = impostors.generate(ours.generator, rng, settings.num_impostors)
            fitted = attribution.fit(
                ours.layer,
                ours.z_bar,
                question.untreated(count),
                real,
                rng=jax.random.fold_in(jax.random.key(ours.seed), 4),
                impostors=changed,
                config=config,
                progress=progress,
                kept=kept,
            )
            bundle.save(fitted, path)
            facts = {**made_by, "commit": question.record.commit}
            write_atomically(path.with_name(f"{name}.json"), json.dumps(facts, indent=1) + "\n")
        seconds = time.monotonic() - start

        def scores_of(images):
            found = attribution.score_with_info(fitted, images, progress=progress)
            # Not decided, as a user's image would not be.
            return {"score": np.where(found.converged, found.score, np.nan)}

        scores = {
            source: kept.part(f"scores-{source}", functools.partial(scores_of, images))["score"]
            for source, images in question.sources.items()
        }
    num_unconverged = sum(int(np.isnan(values).sum()) for values in scores.values())
    num_unconverged += settings.num_calibration - len(fitted.calibration_scores)
    if num_unconverged:
        question.record.warn(
            f"{question.name}: {num_unconverged} images are not decided: "
            + (
                f"their inversion did not reach tol {settings.tol:g} in {settings.max_iters} "
                "iterations"
                if settings.tol
                else "their inversion or their score is not finite"
            )
        )
    return {
        "calibration": fitted.calibration_scores,
        "fit_seconds": np.asarray(seconds),
        **scores,
    }


def _made_by(
    question: _Question, config: AttributorConfig, count: int, real: np.ndarray | None
) -> dict[str, Any]:
    """Everything that an attributor depends on but the code: equal facts, equal attributor."""
    settings, ours = question.settings, question.ours
    digest = hashlib.sha256(ours.z_bar.tobytes())
    for leaf in jax.tree.leaves(ours.generator):
        digest.update(np.asarray(leaf).tobytes())
    return {
        "version": __version__,
        "method": question.method,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),  # Tuples as they come back.
        "generator": digest.hexdigest(),
        "seed": ours.seed,
        "num_images": count,
        "real": "" if real is None else hashlib.sha256(real.tobytes()).hexdigest(),
        "num_impostors": settings.num_impostors,
    }


def _reused(
    path: Path, question: _Question, made_by: dict[str, Any]
) -> attribution.Attributor | None:
    """The attributor that lies there, if there is one and it was made by the same settings."""
    try:
        facts = json.loads(path.with_name(f"{path.name}.json").read_text())
    except (OSError, ValueError, RecursionError):  # None was made, or the file is damaged.
        return None
    commit = facts.pop("commit", None) if isinstance(facts, dict) else None
    if facts != made_by:
        return None
    if commit != question.record.commit:
        question.record.warn(
            f"the attributor {path.name} was fitted by commit {commit}, this is "
            f"{question.record.commit}"
        )
    return bundle.load(path)


def _score_fingerprint(question: _Question) -> dict[str, np.ndarray]:
    settings = question.settings
    own = question.own(settings.num_own + settings.num_calibration)
    fitted = fingerprint.fit(own[: settings.num_own])
    score = functools.partial(fingerprint.score, fitted)
    return {
        "calibration": np.sort(score(own[settings.num_own :])),
        **{source: score(images) for source, images in question.sources.items()},
    }


def _score_latent_inversion(question: _Question) -> dict[str, np.ndarray]:
    """SM-Inv; it fits nothing, own images set the threshold.

    Deviation: the published code takes its threshold from the training images of the others, "to
    make it fair"; where nothing is trained these are own images like any other.
    """
    settings, ours = question.settings, question.ours
    config = LatentInversionConfig(
        num_steps=settings.inversion_steps,
        num_restarts=settings.inversion_restarts,
        distance="l2" if question.method == "sm_inv_l2" else settings.perceptual,
    )
    network = inception.load(settings.inception_weights) if config.distance == "inception" else None
    count = settings.inversion_images
    asked = {source: images[:count] for source, images in question.sources.items()}
    asked["calibration"] = question.own(count)
    scores = {}
    with question.record.progress(sum(map(len, asked.values())), METHODS[question.method]) as bar:
        for index, (source, images) in enumerate(asked.items()):
            rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(ours.seed), 6), index)
            found = latent_inversion.search(ours.generator, images, rng, config, network=network)
            scores[source] = latent_inversion.score(found)
            bar.update(len(images))
    scores["calibration"] = np.sort(scores["calibration"])
    return scores


def _score_regeneration(question: _Question) -> dict[str, np.ndarray]:
    """How far the nearest image that our generator can be found to make is off, in grey levels;
    under noise that the detector is told of, by how much more than that noise (`noise_excess`).

    Where images were processed and the detector is told how (`learned`), so is the search. One that
    is told "any" or nothing searches for untouched images, and finds none.
    """
    settings, ours = question.settings, question.ours
    rng = jax.random.fold_in(jax.random.key(ours.seed), 8)
    bank = regeneration.make_bank(
        ours.generator, jax.random.fold_in(rng, 0), settings.regeneration_bank
    )
    config = RegenerationConfig(num_starts=settings.regeneration_starts)
    # What is known to have happened to the images is searched with the latent.
    kind, _, strength = question.treatment.partition("-")
    known = processing.get(kind) if kind in processing.NAMES else None
    count = settings.regeneration_images
    asked = {source: images[:count] for source, images in question.sources.items()}
    asked["calibration"] = question.own(count)
    kept = question.record.kept(question.name)
    scores = {}
    with question.record.parts(METHODS[question.method]) as progress:
        for index, (source, images) in enumerate(asked.items()):

            def search(index=index, source=source, images=images):
                found = regeneration.regenerate(
                    ours.generator,
                    images,
                    jax.random.fold_in(rng, 1 + index),
                    config,
                    bank=bank,
                    processing=known,
                    progress=functools.partial(progress, f"searching {source}"),
                )
                if kind == "noise" and float(strength) > 0:
                    excess = proof.noise_excess(found.image, images, 255 * float(strength))
                    return {"score": excess}
                return {"score": found.rmse}

            scores[source] = kept.part(f"scores-{source}", search)["score"]
    scores["calibration"] = np.sort(scores["calibration"])
    return scores


_SCORERS: dict[str, Callable[[_Question], dict[str, np.ndarray]]] = {
    "sm_f": _score_fingerprint,
    "sm_inv_l2": _score_latent_inversion,
    "sm_inv_perceptual": _score_latent_inversion,
    "regeneration": _score_regeneration,
}


# --- what it costs ------------------------------------------------------------------------------


def plan(
    settings: Settings,
    num_sources: int,
    num_cells: int,
    *,
    num_fits: int | None = None,
    num_drawn: int = 0,
    ours: tuple[str, ...] = (),
) -> list[_plan.Stage]:
    """Stages for `--plan`: generators of all families and seeds, then the cells.

    Args:
      settings: of the experiment.
      num_sources: test sets that a cell is asked about, own ones among them.
      num_cells: cells of each method and family.
      num_fits: how many of them fit a detector, where others take that of an earlier cell.
      num_drawn: how many fit to images that were processed, and learn to draw own ones again.
      ours: families that have cells; () for all.
    """
    images = _plan.training_images(settings.dataset, settings.image_size, settings.num_gan_images)
    stages: list[_plan.Stage] = []
    num_fits = num_cells if num_fits is None else num_fits
    num_tests = num_sources * settings.num_test * num_cells
    num_supervised = settings.num_own + settings.num_calibration
    for family in settings.families:
        gan, _ = _generators.gan(settings, family, images.shape)
        stages.append(_generators.plan(settings, family))
        if ours and family not in ours:
            continue
        generator = _plan.abstract_generator(gan)
        layer = jax.eval_shape(sampling.final_layer, generator)
        inverted = 0
        cells: list[_plan.Stage] = []
        for method in settings.methods:
            shown = f"{FAMILY_NAMES[family]}, {METHODS[method]}"
            if method in _FEATURES:
                config = _attributor_config(method, settings, num_supervised)
                shape = layer.operator.input_shape if method == "flipad" else generator.image_shape
                extract = functools.partial(
                    features.extract, features.preset(_FEATURES[method], settings.convention)
                )
                raw = jax.ShapeDtypeStruct((1, *shape), np.float32)
                shape = jax.eval_shape(extract, raw).shape[1:]
                count = settings.num_own + settings.num_real
                step = _plan.deepsad_training(
                    config.deepsad_config(), shape, count, name=f"{shown}: training step"
                )
                cells.append(step._replace(calls=step.calls * num_fits))
                if method == "flipad":
                    inverted += (count + settings.num_calibration) * num_fits + num_tests
            elif method.startswith("one_class"):
                shapes = {
                    "images": generator.image_shape,
                    "activations": layer.operator.input_shape,
                }
                learned = [("altered copies", reads) for reads in shapes if settings.num_altered]
                count = num_supervised if method == "one_class" else settings.num_many
                config = _attributor_config(method, settings, count)
                with_impostors = method == "one_class_impostors"
                parts = attribution.own_parts(config, count, with_impostors=with_impostors)
                learned_from = sum(parts)
                learned_from += attribution.num_altered_inverted(layer, config)
                inverted += learned_from * num_fits + num_tests
                if method == "one_class_impostors":
                    learned.append(("impostors", "images"))
                    made = _plan.impostor_images(generator, settings.num_impostors * num_fits)
                    cells.append(made._replace(name=f"{FAMILY_NAMES[family]}, {made.name}"))
                for lookalikes, reads in learned:
                    steps = ClassifierConfig(num_steps=settings.classifier_steps)
                    step = _plan.classifier_training(shapes[reads], steps, lookalikes, reads=reads)
                    name = f"{shown}, {step.name}"
                    cells.append(step._replace(name=name, calls=step.calls * num_fits))
                if num_drawn and settings.reconstruction_steps:
                    drawn = ReconstructionConfig(num_steps=settings.reconstruction_steps)
                    step = _plan.reconstruction_training(generator.image_shape, drawn)
                    name = f"{shown}, {step.name}"
                    cells.append(step._replace(name=name, calls=step.calls * num_drawn))
            elif method == "sm_inv_l2":
                cells.append(
                    _plan.latent_search(
                        generator,
                        settings.inversion_images * (num_sources + 1) * num_cells,
                        settings.inversion_steps,
                        settings.inversion_restarts,
                        name=f"{shown}: step",
                    )
                )
            elif method == "regeneration":
                searched = settings.regeneration_images * (num_sources + 1) * num_cells
                cells.append(
                    _plan.regeneration_search(
                        generator,
                        searched * settings.regeneration_starts,
                        name=f"{shown}: Jacobian of a start",
                    )
                )
        if inverted:
            stages.append(
                _plan.inversion(
                    layer,
                    inverted,
                    max_iters=settings.max_iters,
                    tol=settings.tol,
                    name=f"{FAMILY_NAMES[family]}: inversion, 10 iterations of 64 images",
                )
            )
        stages += cells
    return stages


# --- for the page ---------------------------------------------------------------------------------


def sources_text(settings: Sources) -> str:
    """Which images there are and how they are inverted, for the page."""
    treatment = (
        f"inverted to a relative gap of {settings.tol:g}"
        if settings.tol
        else f"inverted by {settings.max_iters} FISTA iterations"
    )
    return (
        f"{settings.dataset}, {settings.image_size} x {settings.image_size}; generators by the "
        f"recipe '{settings.recipe}', convention '{settings.convention}', seeds "
        f"{', '.join(map(str, settings.seeds))}. {settings.num_test} test images of every source, "
        f"{treatment} at lam {settings.lam:g}."
    )


def settings_texts(settings: Settings, record: Run) -> list[str]:
    """What was compared, for the page, and what the run was warned of."""
    return [_settings_text(settings), *(f"{text}." for text in record.warnings)]


def _settings_text(settings: Settings) -> str:
    widths = "-".join(map(str, settings.activation_widths))
    pixel_widths = "-".join(map(str, settings.pixel_widths))
    return (
        f"{sources_text(settings)} Each method learns {settings.num_own} own images, "
        f"DeepSAD (RawPAD, DCTPAD, FLIPAD) {settings.num_real} real ones beside them in "
        f"{settings.epochs} epochs with encoders {pixel_widths} and {widths}; "
        f"{settings.num_calibration} other own images set the threshold at fnr {settings.fnr:g}. "
        f"One-class learns own images and {settings.num_altered} altered copies of them; with "
        f"many {settings.num_many} of them, with impostors as many and {settings.num_impostors} of "
        "changed copies of our generator. SM-Inv: "
        f"{settings.inversion_images} images of every source, "
        f"{settings.inversion_steps} steps, {settings.inversion_restarts} starts, second distance "
        f"{settings.perceptual}. Regeneration, if it is asked: {settings.regeneration_images} "
        f"images of every source, {settings.regeneration_starts} starts at most, a bank of "
        f"{settings.regeneration_bank}. These two learn nothing, and as many own images set their "
        "threshold. SM-F correlates residuals, as the published code does. "
        "Accuracy is the mean of own accepted and rival rejected, at best "
        f"{100 * (1 - settings.fnr / 2):g} %."
    )
