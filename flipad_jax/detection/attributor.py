"""The attributor: last layer, fitted detector and calibration in one object that can be saved.

    attributor = fit(layer, z_bar, generated, rng=jax.random.key(0), impostors=impostors)
    verdicts(attributor, images, fnr=0.005)

`bundle` saves and loads it.

`fit` splits the generated images: some fit the detector, the rest (which it never sees) calibrate
the threshold. The scores of the calibration images are kept, so the false-negative rate is chosen
when a verdict is asked for, without fitting again.

Four detectors are one configuration away:

*   `AttributorConfig()`: the one-class detector, own images only (`one_class.py`), or own images
    and those of impostors of our own generator; the default.
*   `AttributorConfig(detector="deepsad")`: FLIPAD, DeepSAD on activations, own against real images.
*   the same with `features="pixels"` or `features="dct"`: RawPAD and DCTPAD, without inversion.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import struct

from flipad_jax import conventions, data, metrics, parallel, perturbations
from flipad_jax.detection import (
    calibration,
    classifier,
    deepsad,
    features,
    one_class,
    reconstruction,
    validity,
)
from flipad_jax.detection.classifier import Classifier, ClassifierConfig
from flipad_jax.detection.deepsad import ENCODER_WIDTHS, DeepSAD, DeepSADConfig
from flipad_jax.detection.feature_rows import FeatureRows
from flipad_jax.detection.one_class import OneClass, OneClassConfig
from flipad_jax.detection.reconstruction import ReconstructionConfig, Reconstructor
from flipad_jax.detection.validity import Validity
from flipad_jax.inversion import mismatch
from flipad_jax.inversion.final_layer import FinalLayer, invert

__all__ = [
    "ActivationProfile",
    "Attributor",
    "AttributorConfig",
    "DeepSADDetector",
    "Departures",
    "Kept",
    "Scores",
    "Verdicts",
    "decide",
    "departures",
    "fit",
    "kept_bytes",
    "num_altered_inverted",
    "score",
    "score_with_info",
    "verdicts",
]

DETECTORS = ("one_class", "deepsad")
_USUAL_FNR = 0.005  # of the FLIPAD paper
_FEWEST_FITTED = 30  # own images, as `one_class.fit` has it
_PART = 2**26  # bytes of activations that are kept at a time
_TRIED_ITERATIONS = (3, 10, 30, 100)
_TRIED_ON = 800  # own images at most
_AREA_LOST = 0.005  # of the area under the ROC curve, for fewer iterations
_MOST_INVERTED = 4096  # altered copies
_FEWEST_INVERTED = 512  # where there is no room for more; a network needs some to learn from
_ALTERED_BYTES = 2**30
_LEARNED = {
    "altered": "altered copies",
    "altered_activations": "activations of altered copies",
    "impostors": "impostors",
}
_PROCESSED_ANEW = 2  # times that own images are processed for the network that draws them again
_DOUBTED = 0.01  # p-value of "untouched" up to which a verdict is doubted


@dataclasses.dataclass(frozen=True)
class AttributorConfig:
    """All settings of an attributor.

    Attributes:
      detector: "one_class" (own images only) or "deepsad" (own against real images, [P1]).
      features: what DeepSAD looks at: "activations" (FLIPAD), "pixels" (RawPAD), "dct" (DCTPAD).
        The one-class detector reads activations only.
      convention: how DeepSAD's features are made smaller and scaled: "paper" (the text) or
        "reference" (the published code), see `features`.
      lam: lasso weight, half of the paper's lambda.
      tol: relative duality gap that every inversion must reach; 0 for exactly `max_iters`
        iterations on every image alike, without certificate (the gap reached is
        reported all the same).
      max_iters: iterations, at most these if `tol` is not 0. 0: as few as `fit` finds to tell own
        images from altered copies of them as well as many do; the attributor's own settings then
        name the number. One-class detector with `tol` 0 only.
      method: solver, see `lasso.METHODS`.
      one_class: settings of the one-class detector.
      classifier: settings of its networks: two that learn altered copies of own images, one from
        images and one from activations, and one more if `fit` is given images of impostors.
      num_altered: altered copies; at most 4096 are inverted, fewer where activations are large. 0
        for no such networks, which is quicker to fit and far worse.
      num_inverted: with a network, no more own images than this are inverted for the other
        statistics; all that neither calibrate nor serve as reference teach the networks, which are
        better the more they see.
      immunize: what happens to images before they are judged, a name of `perturbations.apply`:
        all that are learned from and calibrate are treated so first. "any" where it is not known
        which. A further network learns to draw untouched own images from such ones.
      reconstruction: its settings; `num_steps=0` for none. It takes some minutes on a CPU, and the
        one-class detector only; more own images make it better, ten thousand are good.
      deepsad: settings of DeepSAD; None for the paper's with the encoder that fits `features`.
      calibration_share: share of the generated images that calibrate; the one-class detector takes
        as many again as reference for its tail probabilities.
      check_untouched: learn, from own images, to tell processed images from untouched ones
        (`validity`); some seconds of fitting. Not where they are processed on purpose (`immunize`).
      batch_size: images inverted and scored at a time: memory does not grow with the number of
        images.
    """

    detector: str = "one_class"
    features: str = "activations"
    convention: str = "paper"
    lam: float = 5e-4
    tol: float = 0.0
    max_iters: int = 30
    method: str = "fista"
    one_class: OneClassConfig = OneClassConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    num_altered: int = 8192
    num_inverted: int = 2000
    immunize: str = "none"
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    deepsad: DeepSADConfig | None = None
    calibration_share: float = 0.25
    check_untouched: bool = True
    batch_size: int = 256

    def __post_init__(self):
        if self.detector not in DETECTORS:
            raise ValueError(f"detector={self.detector!r}: expected one of {DETECTORS}")
        if self.features not in features.KINDS:
            raise ValueError(f"features={self.features!r}: expected one of {features.KINDS}")
        conventions.check(self.convention)
        if self.detector == "one_class" and self.features != "activations":
            raise ValueError(
                f"the one-class detector reads activations, not {self.features}; "
                'use detector="deepsad"'
            )
        if not 0 < self.calibration_share < 0.5:
            raise ValueError(
                f"calibration_share={self.calibration_share}: expected above 0 and below 0.5"
            )
        perturbations.parse(self.immunize)
        if self.num_inverted < 30:
            raise ValueError(f"num_inverted={self.num_inverted}: expected 30 at least")
        if self.num_altered != 0 and self.num_altered < 16:
            raise ValueError(f"num_altered={self.num_altered}: expected 16 at least, or 0 for none")
        if self.max_iters == 0 and (self.detector != "one_class" or self.tol > 0):
            raise ValueError(
                "max_iters=0 (as few as are found to suffice) goes with the one-class detector and "
                f"tol=0, got detector={self.detector!r}, tol={self.tol}"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: expected 1 at least")
        if self.max_iters < 0 or not self.tol >= 0 or not self.lam >= 0:
            raise ValueError(f"{self.max_iters=}, {self.tol=}, {self.lam=}: must not be negative")

    @property
    def draws(self) -> bool:
        """Whether a network learns to draw own images: see `reconstruction`."""
        one_class_of_processed = self.detector == "one_class" and self.immunize != "none"
        return one_class_of_processed and self.reconstruction.num_steps > 0

    def deepsad_config(self) -> DeepSADConfig:
        """DeepSAD's settings: those given, or the paper's."""
        return self.deepsad or DeepSADConfig(widths=ENCODER_WIDTHS[self.features])


class DeepSADDetector(struct.PyTreeNode):
    """DeepSAD and the features that it was trained on."""

    features: features.FittedFeatures
    model: DeepSAD


class ActivationProfile(struct.PyTreeNode):
    """What the inverted activations z' = z - z_bar of own images are like, entry by entry.

    Attributes:
      mean: `[h, w, c]` float32.
      std: `[h, w, c]` float32, with a floor: entries that the lasso leaves at zero in nearly every
        own image would otherwise weigh without bound.
      num_images: how many own images they average (static).
    """

    mean: jax.Array
    std: jax.Array
    num_images: int = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Attributor:
    """What `fit` returns and `score`, `verdicts`, `save` take.

    Attributes:
      layer: the generator's last layer.
      z_bar: its mean activation.
      detector: `OneClass` or `DeepSADDetector`.
      calibration_scores: `[n]` float64 scores of own images that fitted nothing.
      config: settings.
      profile: own activations, for `departures`; None where the features are no activations.
      validity: what untouched own images look like, for `doubts`; None if that was not learned.
    """

    layer: FinalLayer
    z_bar: jax.Array
    detector: OneClass | DeepSADDetector
    calibration_scores: np.ndarray
    config: AttributorConfig
    profile: ActivationProfile | None = None
    validity: Validity | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the images it can judge."""
        return _image_shape(self.layer)


def _image_shape(layer: FinalLayer) -> tuple[int, int, int]:
    if len(layer.operator.output_shape) != 3:
        raise ValueError(
            f"the last layer makes outputs of shape {layer.operator.output_shape}, expected images "
            "(h, w, c); give a dense layer its output_shape"
        )
    h, w, c = layer.operator.output_shape
    return h, w, c


class Scores(NamedTuple):
    """Scores and how good the inversions behind them are.

    Attributes:
      score: `[n]` float64, higher = less likely ours; NaN where inversion or detector failed.
      relative_gap: `[n]` certificate of the inversion; NaN where the features need none.
      num_iters: `[n]` iterations of the inversion, 0 where there was none.
      converged: `[n]` bool: the certificate asked for was reached (`tol` > 0), or the inversion is
        finite (`tol` = 0).
    """

    score: np.ndarray
    relative_gap: np.ndarray
    num_iters: np.ndarray
    converged: np.ndarray


class Verdicts(NamedTuple):
    """One entry per image.

    Attributes:
      score: `[n]`, higher = less likely ours.
      p_value: `[n]` conformal: P(an own image scores this high or higher); NaN without a verdict.
      threshold: `calibration.verdict_threshold` of the calibration scores.
      accepted: `[n]` bool, attributed to our model. False without a verdict.
      converged: `[n]` bool, see `Scores`; no verdict is given where False.
      verdict: `[n]` text: "ours", "not_ours" or "cannot_judge".
      relative_gap: `[n]`, see `Scores`.
      doubt: `[n]` text, why a verdict is doubtful, "" where nothing speaks against it (`doubts`).
    """

    score: np.ndarray
    p_value: np.ndarray
    threshold: float
    accepted: np.ndarray
    converged: np.ndarray
    verdict: np.ndarray
    relative_gap: np.ndarray
    doubt: np.ndarray


class Kept(Protocol):
    """What a `fit` that was killed had done: where that lies, and how often, is the caller's."""

    def part(
        self, name: str, compute: Callable[[], Mapping[str, np.ndarray]]
    ) -> Mapping[str, np.ndarray]:
        """The arrays that `compute` returns, or that it returned when it was called before."""

    def restore(self, name: str, like: Any) -> Any | None:
        """The state that was saved last, a tree of arrays (NumPy's will do) such as `like`; None
        if there is none."""

    def save(self, name: str, step: int, state: Any) -> None:
        """A state that the work could go on from, after so many steps; it need not be written."""


class _NothingKept:
    def part(self, name, compute):
        del name
        return compute()

    def restore(self, name, like):
        del name, like

    def save(self, name, step, state):
        del name, step, state


Progress = Callable[[str, int, int], None]


def _no_progress(what: str, done: int, total: int) -> None:
    del what, done, total


def _activations(layer, z_bar, config, images):
    """z' of one batch of images, and the inversion's info."""
    z, info = invert(
        layer,
        images,
        z_bar,
        lam=config.lam,
        tol=config.tol,
        max_iters=config.max_iters,
        method=config.method,
    )
    return z - jnp.asarray(z_bar)[None], info


def _raw_features(
    layer, z_bar, config, images, what, first, last, *, progress
) -> Iterator[tuple[int, np.ndarray | jax.Array]]:
    """(first image, activations z' or images in [-1, 1] `[b, h, w, c]` float32), batch by batch,
    of the images from `first` to before `last`.

    Of several processes each inverts its part of every batch, and all get all of it.
    """
    for start, count, batch in _batches(images, config.batch_size, first, last):
        if config.features != "activations":
            yield start, np.asarray(data.to_float(batch[:count]), np.float32)
            continue
        z, info = parallel.in_parts(functools.partial(_activations, layer, z_bar, config), batch)
        converged = np.asarray(info.converged)[:count]
        if config.tol > 0 and not converged.all():
            raise ValueError(
                f"{int((~converged).sum())} of {count} inversions did not reach tol={config.tol} "
                f"in {config.max_iters} iterations ({what}): allow more iterations or a larger tol"
            )
        yield start, z[:count]
        progress(what, start + count, len(images))


def _batches(
    images: np.ndarray | jax.Array, size: int, first: int = 0, last: int | None = None
) -> Iterator[tuple[int, int, Any]]:
    """(first image, how many count, batch) for all images, or those from `first` to before `last`.

    The last batch is filled up, see `data.filled`.
    """
    last = len(images) if last is None else last
    for start in range(first, last, size):
        batch = images[start : min(start + size, last)]
        yield start, len(batch), data.filled(batch)[:size]


def _kept_parts(
    layer: FinalLayer,
    config: AttributorConfig,
    num_images: int,
    name: str,
    kept: Kept,
    compute: Callable[[int, int], Mapping[str, np.ndarray]],
) -> Iterator[tuple[int, Mapping[str, np.ndarray]]]:
    """(first image, arrays) of some whole batches at a time, where images are inverted kept.

    Inverting an image takes milliseconds to seconds, reading its activations back next to nothing.
    """
    image_bytes = 4 * math.prod(layer.operator.input_shape)
    size = config.batch_size * max(_PART // (image_bytes * config.batch_size), 1)
    for first in range(0, num_images, size):
        last = min(first + size, num_images)
        once = functools.partial(compute, first, last)
        inverts = config.features == "activations"
        yield first, kept.part(f"{name}-{first}", once) if inverts else once()


_extract = jax.jit(features.extract, static_argnums=0)
_prepare = jax.jit(features.prepare)
_moments = jax.jit(features.moments)
_merge_moments = jax.jit(features.merge_moments)


def _profile(own: features.Moments) -> ActivationProfile:
    variance = own.sum_squares / own.num_samples
    floor = 0.01 * variance.mean() + jnp.finfo(jnp.float32).tiny
    return ActivationProfile(own.mean, jnp.sqrt(variance + floor), int(own.num_samples))


def _eight_bits(images: Any) -> Any:
    """Images as a file has them. Those that are fitted to and those that are judged must be alike:
    what was rounded is told from what was not. Of uint8 a device array stays one."""
    return images if images.dtype == np.uint8 else data.to_uint8(images)


def _treated(
    config: AttributorConfig, images: np.ndarray, rng: jax.Array, number: int
) -> np.ndarray:
    """Images of the set of that number, as `config.immunize` says that they are seen."""
    if config.immunize == "none":
        return images
    treatment = jax.random.fold_in(jax.random.fold_in(rng, 4), number)
    return perturbations.apply(config.immunize, images, treatment)


def _with_enough_iterations(layer, z_bar, config, own, copies, progress) -> AttributorConfig:
    """The settings with the fewest iterations whose statistics tell own images from altered copies
    of them nearly as well as the best of `_TRIED_ITERATIONS` do (area under the ROC curve).

    Half of the own images fit the statistics and a quarter are their reference; the last quarter
    and copies of the last half are told apart.
    """
    num_fitted, num_reference = len(own) // 2, len(own) // 4
    if num_reference < 20:  # Too few to fit anything to.
        usual = AttributorConfig.max_iters
        logging.warning(
            "%d own images are too few to find how many iterations suffice (80 are needed): %d",
            len(own),
            usual,
        )
        return dataclasses.replace(config, max_iters=usual)
    areas = []
    for place, max_iters in enumerate(_TRIED_ITERATIONS):
        tried = dataclasses.replace(config, max_iters=max_iters)

        def activations(images, tried=tried):
            found = _raw_features(
                layer, z_bar, tried, images, "", 0, len(images), progress=_no_progress
            )
            return np.concatenate([np.asarray(batch) for _, batch in found])

        mine, theirs = activations(own), activations(copies)
        parts = np.split(mine, [num_fitted, num_fitted + num_reference])
        fitted = one_class.fit(parts[0], parts[1], config.one_class)
        areas.append(
            metrics.auc(one_class.score(fitted, parts[2]), one_class.score(fitted, theirs))
        )
        progress("how many iterations it takes", place + 1, len(_TRIED_ITERATIONS))
    # Areas are of floating-point sums, which another device makes otherwise: one process decides.
    areas = list(parallel.gather(np.asarray(areas)[None])[0])
    enough = next(i for i, area in enumerate(areas) if area >= max(areas) - _AREA_LOST)
    logging.info(
        "areas of own images against altered copies by iterations: %s",
        ", ".join(f"{n}: {area:.4f}" for n, area in zip(_TRIED_ITERATIONS, areas)),
    )
    return dataclasses.replace(config, max_iters=_TRIED_ITERATIONS[enough])


class OwnParts(NamedTuple):
    """How `fit` divides own images for the one-class detector.

    Attributes:
      calibration: images that calibrate.
      reference: images that give tail probabilities, as many.
      inverted: images that are inverted and fitted to, of all others.
    """

    calibration: int
    reference: int
    inverted: int


def own_parts(
    config: AttributorConfig, num_generated: int, *, with_impostors: bool = False
) -> OwnParts:
    """The parts of so many own images. Where networks learn they see all of the rest."""
    num_calibration = int(num_generated * config.calibration_share)
    rest = num_generated - 2 * num_calibration
    taught = with_impostors or config.num_altered > 0 or config.draws
    inverted = min(rest, config.num_inverted) if taught else rest
    return OwnParts(num_calibration, num_calibration, inverted)


def num_altered_inverted(layer: FinalLayer, config: AttributorConfig) -> int:
    """How many altered copies `fit` inverts: 4096 at most, of large activations fewer or none."""
    wanted = min(config.num_altered, _MOST_INVERTED)
    room = _ALTERED_BYTES // (4 * math.prod(layer.operator.input_shape))
    return wanted if wanted <= room else room if room >= _FEWEST_INVERTED else 0


def _report(progress: Progress, what: str, total: int, done: int) -> None:
    progress(what, done, total)


def _deepsad_detector(raw, kept_parts, own_images, real_images, rng, config, progress, kept):
    """DeepSAD and, if it looks at activations, the profile of own ones.

    Features of all images are never in memory at once if they are large: see `feature_rows`.
    """
    settings = config.deepsad_config()
    chosen = features.preset(config.features, config.convention)

    def stream(images, name):
        what = f"inverting {name} images"
        if not len(images):
            raise ValueError(f"{what}: there are none, and the deepsad detector needs both kinds")

        def compute(first, last):
            reduced, moments, raw_shape = [], [], ()
            for _, batch in raw(images, what, first, last):
                raw_shape = batch.shape[1:]
                if config.features == "activations":
                    moments.append(_moments(batch))
                reduced.append(np.asarray(_extract(chosen, jnp.asarray(batch))))
            found = {"rows": np.concatenate(reduced), "raw_shape": np.asarray(raw_shape)}
            if moments:
                stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *moments)
                found |= stacked._asdict()
            return found

        rows, moments = None, None
        for first, part in kept_parts(len(images), name, compute):
            for place in range(len(part["mean"]) if config.features == "activations" else 0):
                once = features.Moments(*(part[field][place] for field in features.Moments._fields))
                moments = once if moments is None else _merge_moments(moments, once)
            if rows is None:
                rows = FeatureRows((len(images), *part["rows"].shape[1:]))
            rows[first : first + len(part["rows"])] = part["rows"]
        return rows, moments, tuple(int(side) for side in part["raw_shape"])

    own, moments, raw_shape = stream(own_images, "own")
    real, _, _ = stream(real_images, "real")
    # The rows are resized and transformed already: what is left to learn is their scale.
    scale = features.fit(
        dataclasses.replace(chosen, kind="activations", size=None),
        own.batches(config.batch_size),
        real.batches(config.batch_size),
    )
    for rows in (own, real):
        for start in range(0, len(rows), config.batch_size):
            part = slice(start, min(start + config.batch_size, len(rows)))
            rows[part] = np.asarray(_prepare(scale, rows[part]))
    like = deepsad.init(rng, own.shape[1:], settings)

    def after_epoch(state):
        progress("training DeepSAD, epochs", int(state.epoch), settings.epochs)
        kept.save("deepsad", int(state.epoch), state)

    state = kept.restore("deepsad", like)
    if state is not None:
        state = jax.tree.map(jnp.asarray, state)
    model, _ = deepsad.fit(rng, own, real, settings, state=state, progress=after_epoch)
    fitted = dataclasses.replace(scale, config=chosen, input_shape=tuple(raw_shape))
    return DeepSADDetector(fitted, model), None if moments is None else _profile(moments)


def _one_class_detector(
    layer, raw, kept_parts, given, generated, rest, impostors, rng, train_rng, config, progress
) -> tuple[OneClass, ActivationProfile]:
    """The one-class detector and the profile of own activations.

    `given` are all own images as they came, `generated` as they are judged (`config.immunize`),
    `rest` the places of those that do not calibrate. The first of these are for reference.
    """
    parts = own_parts(config, len(generated), with_impostors=impostors is not None)
    reference, fitting = rest[: parts.reference], rest[parts.reference :]

    def inverted(images, name, what):
        rows = FeatureRows((len(images), *layer.operator.input_shape))

        def activations(first, last):
            found = raw(images, f"inverting {what}", first, last)
            return {"rows": np.concatenate([np.asarray(batch) for _, batch in found])}

        for start, part in kept_parts(len(images), name, activations):
            rows[start : start + len(part["rows"])] = part["rows"]
        return rows

    held_out = inverted(generated[reference], "reference", "own images for reference")
    fitted_on = inverted(generated[fitting[: parts.inverted]], "own", "own images")
    moments = map(_moments, fitted_on.batches(config.batch_size))
    profile = _profile(functools.reduce(_merge_moments, moments))
    lookalikes = {}
    if config.num_altered:
        progress("altering own images", 0, config.num_altered)
        stream = int(jax.random.randint(jax.random.fold_in(rng, 3), (), 0, 2**31 - 1))
        copies = perturbations.alter(given[fitting], stream, config.num_altered)
        # Altered first: what is done to all images is done to a rival's, too.
        lookalikes["altered"] = _treated(config, copies, rng, 2)
        progress("altering own images", config.num_altered, config.num_altered)
    if impostors is not None:
        lookalikes["impostors"] = _treated(config, impostors, rng, 3)
    own = generated[fitting] if lookalikes else generated[:0]
    learned: dict[str, tuple[Any, Any, str]] = {
        name: (own, others, "images") for name, others in lookalikes.items()
    }
    if config.num_altered:
        copies = lookalikes["altered"][: num_altered_inverted(layer, config)]
        if len(copies):
            rows = inverted(copies, "altered", "altered copies")
            learned["altered_activations"] = (fitted_on, rows, "activations")
    classifiers: dict[str, Classifier | Reconstructor] = {}
    for number, name in enumerate(one_class.CLASSIFIERS):
        if name in learned:
            mine, others, reads = learned[name]
            what = f"learning from {_LEARNED[name]}, steps"
            classifiers[name] = classifier.fit(
                jax.random.fold_in(train_rng, number),
                mine,
                others,
                config.classifier,
                reads=reads,
                progress=functools.partial(_report, progress, what, config.classifier.num_steps),
            )
    if config.draws:
        what = "learning to draw own images, steps"
        steps = config.reconstruction.num_steps
        processed = [
            _treated(config, given[fitting], rng, 6 + number) for number in range(_PROCESSED_ANEW)
        ]
        number = one_class.CLASSIFIERS.index("reconstruction")
        classifiers["reconstruction"] = reconstruction.fit(
            jax.random.fold_in(train_rng, number),
            given[fitting],
            processed,
            config.reconstruction,
            progress=functools.partial(_report, progress, what, steps),
        )
    detector = one_class.fit(
        fitted_on,
        held_out,
        config.one_class,
        classifiers=classifiers,
        reference_images=generated[reference],
    )
    return detector, profile


def fit(
    layer: FinalLayer,
    z_bar: np.ndarray | jax.Array,
    generated: np.ndarray,
    real: np.ndarray | None = None,
    *,
    rng: jax.Array,
    impostors: np.ndarray | None = None,
    config: AttributorConfig = AttributorConfig(),
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> Attributor:
    """Fit a detector to a generator, on all devices of all processes.

    Of several processes each calls this with the same arguments; all get the same attributor.

    Args:
      layer: its last layer.
      z_bar: its mean activation, see `final_layer.mean_activation`.
      generated: own images, `[n, h, w, c]` uint8 (as they are published) or float32 in [-1, 1],
        which are rounded to 8 bits, as everything is that they are compared with.
      real: images that the model was trained on; DeepSAD needs them, the one-class detector takes
        none.
      rng: key of the split and of what is trained.
      impostors: images of changed copies of our generator (`generators.impostors.generate`), some
        thousands, for the one-class detector. With them it tells our own model better once that
        was trained on; other seeds it tells as well without.
      config: settings.
      progress: called with (what is being done, how much is done, of how much).
      kept: what an earlier call with the same arguments had done, which is not done again: inverted
        images and epochs of DeepSAD. The result is the same where training repeats itself to the
        bit. (The one-class detector's networks learn anew, in a minute or two, in several where
        images are immunised.)
    Returns:
      The attributor. Calibration images whose inversion missed its tolerance are left out of its
      `calibration_scores`; fnr below 1 / (their number + 1) cannot be certified with it.
    Raises:
      ValueError: for bad images, missing or superfluous `real` or `impostors`, too few images (80
        at least, for the one-class detector), inversions that miss their tolerance, or processes
        that were given different images.
    """
    progress, kept = progress or _no_progress, kept or _NothingKept()
    shape = _image_shape(layer)
    generated = data.check_images(generated, shape=shape)
    if (real is None) != (config.detector == "one_class"):
        need = (
            "learns from own images alone: leave real out"
            if real is not None
            else "needs real images beside own ones"
        )
        raise ValueError(f"the {config.detector} detector {need}")
    if real is not None:
        real = data.check_images(real, shape=shape)
    if impostors is not None:
        if config.detector != "one_class":
            raise ValueError(f"the {config.detector} detector takes no images of impostors")
        impostors = data.check_images(impostors, shape=shape)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((layer, z_bar))]
    seed = np.asarray(jax.random.key_data(rng))
    parallel.check_same(
        "what is fitted, and to what,", config, generated, real, impostors, seed, *leaves
    )
    generated = np.asarray(_eight_bits(generated))
    real = None if real is None else np.asarray(_eight_bits(real))
    impostors = None if impostors is None else np.asarray(_eight_bits(impostors))
    # Here, and not after hours of inversion: a batch must be one that processes can share.
    if config.detector == "deepsad":
        parallel.mesh(config.deepsad_config().batch_size)
    elif impostors is not None or config.num_altered:
        parallel.mesh(2 * config.classifier.batch_size)
    if config.draws:
        parallel.mesh(config.reconstruction.batch_size)
    split_rng, train_rng = jax.random.split(rng)
    order = np.asarray(jax.random.permutation(split_rng, len(generated)))
    num_calibration = int(len(generated) * config.calibration_share)
    if num_calibration < 20:
        raise ValueError(
            f"{len(generated)} generated images leave {num_calibration} for calibration, "
            f"expected 20 at least, of {math.ceil(20 / config.calibration_share)} images; "
            "fnr 0.005 takes 199"
        )
    num_fitted = len(generated) - 2 * num_calibration
    if config.detector == "one_class" and num_fitted < _FEWEST_FITTED:
        raise ValueError(
            f"{len(generated)} generated images, of which {num_calibration} calibrate and as many "
            f"are for reference, leave {num_fitted} to fit, expected {_FEWEST_FITTED} at least: "
            f"lower calibration_share={config.calibration_share} or give more"
        )
    if impostors is not None:  # `num_altered` has its own bound.
        classifier.check_counts(num_fitted, len(impostors))
    if config.features == "activations":
        wrong = mismatch.warning(layer, z_bar, generated)
        if wrong:
            logging.warning("%s", wrong)
    smallest = calibration.smallest_certifiable_fnr(num_calibration)
    if smallest > _USUAL_FNR:
        logging.warning(
            "%d own images leave %d for calibration: no fnr below %.3g can be certified "
            "(%g takes %d of them)",
            len(generated),
            num_calibration,
            smallest,
            _USUAL_FNR,
            round(1 / _USUAL_FNR) - 1,
        )
    given, generated = generated, _treated(config, generated, rng, 0)
    if real is not None:
        real = _treated(config, real, rng, 1)
    untouched = None
    if config.check_untouched and config.immunize == "none":
        progress("learning what untouched images look like", 0, 1)
        untouched = validity.fit(generated, jax.random.fold_in(rng, 2))
        progress("learning what untouched images look like", 1, 1)
    z_bar = jnp.array(z_bar)  # A copy, for the attributor keeps it.
    if config.max_iters == 0:
        stream = int(jax.random.randint(jax.random.fold_in(rng, 5), (), 0, 2**31 - 1))
        # Images that calibrate nothing: what is chosen by them must not favour them.
        few = given[order[num_calibration:][:_TRIED_ON]]
        copies = perturbations.alter(few[len(few) // 2 :], stream, len(few) // 2)
        trials = _treated(config, few, rng, 4), _treated(config, copies, rng, 5)
        config = _with_enough_iterations(layer, z_bar, config, *trials, progress)
    raw = functools.partial(_raw_features, layer, z_bar, config, progress=progress)

    def kept_parts(num_images, name, compute):
        return _kept_parts(layer, config, num_images, name, kept, compute)

    calibrating, rest = order[:num_calibration], order[num_calibration:]
    profile = None
    detector: OneClass | DeepSADDetector
    if config.detector == "one_class":
        detector, profile = _one_class_detector(
            layer,
            raw,
            kept_parts,
            given,
            generated,
            rest,
            impostors,
            rng,
            train_rng,
            config,
            progress,
        )
    else:
        detector, profile = _deepsad_detector(
            raw, kept_parts, generated[rest], real, train_rng, config, progress, kept
        )
    attributor = Attributor(layer, z_bar, detector, np.zeros(0), config, profile, untouched)

    # A detector that was trained anew since, on another device say, has other scores.
    fitted = hashlib.sha256()
    for leaf in jax.tree.leaves(detector):
        fitted.update(np.ascontiguousarray(leaf).tobytes())
    judged = f"calibration-{fitted.hexdigest()[:12]}"

    def calibration_scores(first, last):
        def report(what, done, total):
            progress(what, first + done * (last - first) // total, num_calibration)

        judge = functools.partial(score_with_info, attributor, progress=report)
        found = parallel.in_parts(judge, generated[calibrating[first:last]])
        # What would get no verdict sets no threshold.
        return {"score": found.score[found.converged & np.isfinite(found.score)]}

    scores = np.concatenate(
        [part["score"] for _, part in kept_parts(num_calibration, judged, calibration_scores)]
    )
    if len(scores) < num_calibration:
        logging.warning(
            "%d of %d calibration images are left out: their inversion did not reach tol=%g, or "
            "their score is not finite",
            num_calibration - len(scores),
            num_calibration,
            config.tol,
        )
    if not len(scores):
        raise ValueError(
            f"none of {num_calibration} inversions of calibration images reached tol={config.tol} "
            f"in {config.max_iters} iterations and has a finite score: allow more iterations or a "
            "larger tol"
        )
    return dataclasses.replace(attributor, calibration_scores=np.sort(scores))


def kept_bytes(
    layer: FinalLayer,
    config: AttributorConfig,
    num_generated: int,
    num_real: int = 0,
    *,
    with_impostors: bool = False,
) -> int:
    """How much of features `fit` hands to `kept`, at most.

    Args:
      layer: the last layer.
      config: settings.
      num_generated: own images.
      num_real: real images.
      with_impostors: whether images of impostors are given.
    Returns:
      Bytes; states of DeepSAD, which are small, are not counted.
    """
    if config.features != "activations":
        return 0
    shape = layer.operator.input_shape
    num_rows = num_generated - int(num_generated * config.calibration_share)
    if config.detector == "deepsad":
        chosen = features.preset(config.features, config.convention)
        raw = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        shape = jax.eval_shape(functools.partial(features.extract, chosen), raw).shape[1:]
        num_rows += num_real
    else:
        parts = own_parts(config, num_generated, with_impostors=with_impostors)
        num_rows = parts.reference + parts.inverted + num_altered_inverted(layer, config)
    return 4 * num_rows * math.prod(shape)


def score_with_info(
    attributor: Attributor, images: np.ndarray, *, progress: Progress | None = None
) -> Scores:
    """As `score`, with the certificate of every inversion.

    On all devices of this process, whatever others do: `parallel.in_parts` has several share work.
    """
    progress = progress or _no_progress
    config, detector = attributor.config, attributor.detector
    images = _eight_bits(data.check_images(images, shape=attributor.image_shape))
    total = len(images)
    columns: list[Scores] = [
        Scores(np.zeros(0), np.zeros(0), np.zeros(0, np.int32), np.zeros(0, bool))
    ]
    for start, count, batch in _batches(images, config.batch_size):
        if config.features == "activations":
            raw, info = _activations(attributor.layer, attributor.z_bar, config, batch)
            gap, num_iters = np.asarray(info.relative_gap, np.float64), np.asarray(info.num_iters)
            converged = np.asarray(info.converged) if config.tol > 0 else np.isfinite(gap)
        else:
            raw = data.to_float(batch)
            gap, num_iters = np.full(len(batch), np.nan), np.zeros(len(batch), np.int32)
            converged = np.ones(len(batch), bool)
        if isinstance(detector, OneClass):
            values = one_class.score(detector, raw, batch)
        else:
            values = deepsad.score(
                detector.model, _prepare(detector.features, jnp.asarray(raw, jnp.float32))
            )
        found = Scores(np.asarray(values, np.float64), gap, num_iters, converged)
        columns.append(Scores(*(column[:count] for column in found)))
        progress("scoring", start + count, total)
    return Scores(*(np.concatenate(parts) for parts in zip(*columns)))


def doubts(attributor: Attributor, images: np.ndarray) -> np.ndarray:
    """What makes a verdict doubtful: traces of processing after the image was made (`validity`).

    Own images that were recompressed, resized, blurred or made noisy are usually declared not ours;
    the attributor is calibrated on untouched ones.

    Args:
      attributor: from `fit` or `load`.
      images: as for `score`.
    Returns:
      `[n]` text, "" for no doubt; of untouched own images 1 % are doubted. All empty if the
      attributor has no `validity`.
    Raises:
      ValueError: for bad images.
    """
    images = data.check_images(images, shape=attributor.image_shape)
    if attributor.validity is None:
        return np.full(len(images), "")
    checks = validity.check(attributor.validity, images)
    said = {
        kind: f"looks processed ({kind}) after it was made; calibrated for untouched images"
        for kind in validity.KINDS
    }
    texts = [
        said[kind] if p_value <= _DOUBTED else ""
        for p_value, kind in zip(checks.p_value, checks.kind)
    ]
    return np.array(texts, dtype=np.str_) if texts else np.full(0, "")


class Departures(NamedTuple):
    """Where inverted activations are unlike those of own images.

    Attributes:
      maps: `[n, h, w]` float32 over the places of the activation, root mean square over channels of
        (z' - own mean) / own standard deviation: about 1 on average for own images.
      mean_activation: `[h, w, c]` float32, mean of z over the images; NaN if there is none.
    """

    maps: np.ndarray
    mean_activation: np.ndarray


def departures(attributor: Attributor, images: np.ndarray) -> Departures:
    """Look inside: how far the activations of these images depart from own ones, place by place.

    Args:
      attributor: from `fit` or `load`, one that inverts images.
      images: as for `score`.
    Returns:
      The maps and the mean activation. They explain a score to the eye; they are not the score.
    Raises:
      ValueError: for bad images, or an attributor without activations (RawPAD, DCTPAD).
    """
    profile, config = attributor.profile, attributor.config
    if profile is None:
        raise ValueError(f"this attributor reads {config.features}: it inverts no images")
    images = _eight_bits(data.check_images(images, shape=attributor.image_shape))
    shape = attributor.layer.operator.input_shape
    total = np.zeros(shape)
    maps = [np.zeros((0, *shape[:2]), np.float32)]
    for _, count, batch in _batches(images, config.batch_size):
        z, _ = _activations(attributor.layer, attributor.z_bar, config, batch)
        maps.append(np.asarray(_departure_maps(profile, z))[:count])
        total += np.asarray(z)[:count].sum(axis=0, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        mean = total / len(images) if len(images) else np.full(shape, np.nan)
    return Departures(
        np.concatenate(maps), (mean + np.asarray(attributor.z_bar)).astype(np.float32)
    )


@jax.jit
def _departure_maps(profile: ActivationProfile, z: jax.Array) -> jax.Array:
    standardised = (z - profile.mean) / profile.std
    return jnp.sqrt(jnp.mean(standardised**2, axis=-1)).astype(jnp.float32)


def score(attributor: Attributor, images: np.ndarray) -> np.ndarray:
    """How unlike our own images these are.

    Args:
      attributor: from `fit` or `load`.
      images: `[n, h, w, c]` uint8 or float32 in [-1, 1], which are rounded to 8 bits as in `fit`,
        of the attributor's `image_shape`; n may be 0.
    Returns:
      `[n]` float64, higher = less likely ours; compare with `attributor.calibration_scores`. NaN
      where nothing could be computed.
    Raises:
      ValueError: for images of another shape or dtype, with NaN, or outside [-1, 1].
    """
    return score_with_info(attributor, images).score


def verdicts(
    attributor: Attributor,
    images: np.ndarray,
    fnr: float = 0.005,
    *,
    progress: Progress | None = None,
) -> Verdicts:
    """Decide for every image whether our model made it.

    Args:
      attributor: from `fit` or `load`.
      images: as for `score`.
      fnr: share of own images that may be called not ours; can be changed without fitting again.
      progress: as for `fit`.
    Returns:
      The verdicts. Where the inversion missed its certificate or a score is not finite there is
      none: "cannot_judge".
    Raises:
      ValueError: for bad images, or an fnr outside [0, 1].
    """
    # Refuses a bad rate, before work.
    calibration.verdict_threshold(attributor.calibration_scores, fnr)
    scores = score_with_info(attributor, images, progress=progress)
    return decide(attributor, scores, fnr)._replace(doubt=doubts(attributor, images))


def decide(attributor: Attributor, scores: Scores, fnr: float = 0.005) -> Verdicts:
    """From scores that are there already to verdicts: another fnr costs no inversion.

    Args:
      attributor: the one that gave the scores.
      scores: from `score_with_info`.
      fnr: as for `verdicts`.
    Returns, errors:
      As for `verdicts`, without doubts, which take the images.
    """
    threshold = calibration.verdict_threshold(attributor.calibration_scores, fnr)
    judged = np.isfinite(scores.score) & scores.converged
    accepted = judged & (scores.score <= threshold)
    p_value = np.where(
        judged, calibration.conformal_p_values(attributor.calibration_scores, scores.score), np.nan
    )
    text = np.where(accepted, "ours", np.where(judged, "not_ours", "cannot_judge"))
    return Verdicts(
        scores.score,
        p_value,
        threshold,
        accepted,
        scores.converged,
        text,
        scores.relative_gap,
        np.full(len(text), ""),
    )
