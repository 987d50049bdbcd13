"""The main job: attribute images to one small generator, with four detectors, and show the result.

Our model is the first DCGAN of the zoo (32x32 handwritten digits). Four detectors learn what its
images look like: one-class from own images, altered copies of them, and images of impostors,
changed copies of our own model; FLIPAD, RawPAD and DCTPAD (FLIPAD paper) from own and real images.
They are then asked about images that nobody trained on: own ones, real ones, and those of rivals
that differ from ours in little more than the seed. Nothing of a rival is ever used before the test.

Writes a table, figures, report.html, the fitted attributor (WORKDIR/attributor) and the verdicts on
a folder of PNG files. Two cores: two to three minutes; --preset=smoke: seconds.

    python run.py
    python run.py --images=FOLDER      # verdicts on one's own folder of 32x32 images
"""

import csv
import dataclasses
import functools
import io
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _generators, _plan, train_generator
from experiments._config import Run, setting
from experiments._record import write_atomically
from flipad_jax import data, metrics, report
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection import bundle, calibration, features
from flipad_jax.detection.attributor import AttributorConfig
from flipad_jax.detection.classifier import ClassifierConfig
from flipad_jax.detection.deepsad import ENCODER_WIDTHS, DeepSADConfig
from flipad_jax.generators import impostors, sampling, training, zoo
from flipad_jax.inversion.final_layer import invert


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the main job."""

    seed: int = setting(0, "Seed of everything random.", lower_bound=0)
    ours: str = setting(
        "digits_dcgan_0", "Generator of the zoo that is ours; the others are rivals."
    )
    rivals: tuple[str, ...] = setting(
        ("digits_dcgan_0", "digits_dcgan_1", "digits_dcgan_2", "digits_wgan_gp_0"),
        "Generators of the zoo that are asked about; ours is left out of them.",
    )
    retrain: bool = setting(False, "Train all generators anew by their recorded settings (hours).")
    images: str = setting("", "Folder of images to judge; by default one is made from the test.")
    fnr: float = setting(
        0.005, "Share of own images that may be rejected.", lower_bound=0.0, upper_bound=1.0
    )
    num_generated: int = setting(
        15_000, "Own images that the one-class detector learns and calibrates on.", lower_bound=400
    )
    num_supervised: int = setting(
        2000, "How many of them FLIPAD, RawPAD, DCTPAD get.", lower_bound=400
    )
    num_impostors: int = setting(
        12_288,
        "Images of impostors of our own model, for the one-class detector; 0: none.",
        lower_bound=0,
    )
    num_altered: int = setting(
        8192, "Altered copies of own images, for the one-class detector; 0: none.", lower_bound=0
    )
    classifier_steps: int = setting(
        600, "Training steps on altered copies, and as many on impostors.", lower_bound=1
    )
    num_real: int = setting(1500, "Real images that FLIPAD, RawPAD, DCTPAD learn.", lower_bound=8)
    num_test: int = setting(500, "Test images of every source.", lower_bound=8)
    num_mean: int = setting(5000, "Latents that the mean activation averages.", lower_bound=1)
    lam: float = setting(5e-4, "Lasso weight (half of the paper's lambda).", lower_bound=0.0)
    tol: float = setting(
        0.0, "Relative duality gap of every inversion; 0: all take max_iters.", lower_bound=0.0
    )
    max_iters: int = setting(30, "FISTA iterations (at most, if tol is not 0).", lower_bound=1)
    epochs: int = setting(6, "Epochs of DeepSAD.", lower_bound=1)
    activation_widths: tuple[int, ...] = setting((32, 64, 32), "FLIPAD's encoder.", lower_bound=1)
    pixel_widths: tuple[int, ...] = setting(
        (16, 32, 64), "RawPAD's and DCTPAD's encoder.", lower_bound=1
    )


PRESETS = {
    "smoke": {
        "num_generated": 400,
        "num_supervised": 400,
        "num_impostors": 256,
        "num_altered": 256,
        "classifier_steps": 30,
        "num_real": 128,
        "num_test": 40,
        "num_mean": 500,
        "epochs": 1,
        "activation_widths": (8, 8, 8),
        "pixel_widths": (8, 8, 8),
    },
    "demo": {},
    "paper": {
        "num_generated": 20_000,
        "num_supervised": 13_334,  # 10 000 to train on, a quarter of all to calibrate on
        "num_impostors": 20_480,
        "num_altered": 20_480,
        "classifier_steps": 1800,
        "num_real": 4000,  # all training images there are
        "num_test": 500,
        "max_iters": 1000,  # this layer's gap is still above 1e-2 after 10 000
        "epochs": 50,
        "activation_widths": ENCODER_WIDTHS["activations"],
        "pixel_widths": ENCODER_WIDTHS["pixels"],
    },
}

# detector -> (shown name, what it learns from)
DETECTORS = {
    "one_class": ("one-class", "own model"),
    "flipad": ("FLIPAD", "own + real"),
    "rawpad": ("RawPAD", "own + real"),
    "dctpad": ("DCTPAD", "own + real"),
}


def _detector_configs(config: Config) -> dict[str, AttributorConfig]:
    inversion: dict[str, Any] = {
        "lam": config.lam,
        "tol": config.tol,
        "max_iters": config.max_iters,
    }
    drop = (max(config.epochs // 2, 1),)  # the paper: after 25 of 50
    many = config.num_generated >= 4000

    def deepsad(kind, widths):
        settings = DeepSADConfig(widths=widths, epochs=config.epochs, drop_epochs=drop)
        return AttributorConfig(
            detector="deepsad", features=kind, deepsad=settings, check_untouched=False, **inversion
        )

    return {
        "one_class": AttributorConfig(
            classifier=ClassifierConfig(num_steps=config.classifier_steps),
            num_altered=config.num_altered,
            calibration_share=0.15 if many else 0.25,
            check_untouched=many,  # Seconds of compiling, which smaller presets have not.
            **inversion,
        ),
        "flipad": deepsad("activations", config.activation_widths),
        "rawpad": deepsad("pixels", config.pixel_widths),
        "dctpad": deepsad("dct", config.pixel_widths),
    }


def run(config: Config, record: Run) -> dict[str, Any]:
    """Fit, test, draw, judge a folder; returns the metrics of results.json."""
    names = config.rivals
    for name in (config.ours, *names):
        zoo.record(name)  # Refuses one that is not there, and says which there are.
    # Everything that can be wrong with the user's folder is found before minutes are spent.
    folder = None
    if config.images:
        folder = data.read_images(
            config.images, image_shape=tuple(zoo.record(config.ours)["image_shape"])
        )
    generators = {
        name: _retrained(name, config, record) if config.retrain else zoo.load(name)
        for name in (config.ours, *(name for name in names if name != config.ours))
    }
    ours = generators[config.ours]
    rng = jax.random.key(config.seed)
    mean_rng, own_rng, rival_rng, fit_rng = jax.random.split(rng, 4)

    z_bar = record.stage(
        "mean_activation",
        lambda: {"z_bar": sampling.mean_activation(ours, mean_rng, config.num_mean)},
        text=f"mean activation over {config.num_mean} latents",
    )["z_bar"]
    layer = sampling.final_layer(ours)

    # Own test images come after the training images in one stream: no image is in both.
    generated = sampling.generate(ours, own_rng, config.num_generated)
    own = sampling.generate(ours, own_rng, config.num_test, first=config.num_generated)
    entry = zoo.record(config.ours)
    load = functools.partial(
        data.load, entry["dataset"], image_size=ours.image_shape[0], seed=entry["data_seed"]
    )
    real = load(split="train", num_images=config.num_real)
    sources = {"real": load(split="test", num_images=config.num_test)}
    for index, (name, generator) in enumerate(generators.items()):
        if name != config.ours:
            stream = jax.random.fold_in(rival_rng, index)
            sources[name] = sampling.generate(generator, stream, config.num_test)

    suspects = None
    if config.num_impostors:
        suspects = record.stage(
            "impostors",
            lambda: _impostors(ours, jax.random.fold_in(fit_rng, 1), config, record),
            text=f"{config.num_impostors} images of impostors, changed copies of our model",
        )["images"]
    num_tests = len(own) + sum(map(len, sources.values()))
    scores, found = {}, {}
    for name, settings in _detector_configs(config).items():
        shown, learns = DETECTORS[name]
        stage = record.stage(
            f"detector-{name}",
            functools.partial(
                _fit_and_score,
                record,
                layer,
                z_bar,
                generated if name == "one_class" else generated[: config.num_supervised],
                real if settings.detector == "deepsad" else None,
                suspects if name == "one_class" else None,
                {"own": own, **sources},
                fit_rng,
                settings,
                record.workdir / ("attributor" if name == "one_class" else f"attributors/{name}"),
                shown,
                record.kept(f"detector-{name}"),
            ),
            text=f"{shown}: learn from {learns}, score {num_tests} test images",
        )
        threshold = calibration.threshold(stage["calibration"], config.fnr)
        rivals = {source: stage[source] for source in sources}
        scores[name] = (stage["own"], rivals, threshold)
        found[name] = metrics.summary(stage["own"], rivals, threshold)
        found[name]["seconds"] = record.seconds[f"detector-{name}"]
        found[name]["fit_seconds"] = float(stage["fit_seconds"])
        found[name]["num_calibration"] = len(stage["calibration"])
        undecided = sum(counts["undecided"] for counts in found[name]["counts"].values())
        if undecided:
            record.warn(
                f"{shown}: {undecided} of {num_tests} test images are not decided: their inversion "
                f"did not reach tol {config.tol:g} in {config.max_iters} iterations"
            )

    inversion = record.stage(
        "average_activations",
        lambda: _average_activations(layer, z_bar, config, {"own": own, **sources}),
        text="average activation of every source",
    )
    gaps = {
        source: {
            "median": float(np.median(inversion[f"gap-{source}"])),
            "largest": float(np.max(inversion[f"gap-{source}"])),
        }
        for source in ("own", *sources)
    }

    if folder is None:
        _write_suspects(record.workdir / "suspects", {"own": own, **sources})
        folder_path = record.workdir / "suspects"
        folder = data.read_images(folder_path, image_shape=ours.image_shape)
    judged = _judge_folder(record, folder, config.fnr)
    figures = _figures(config, {"own": own, **sources}, z_bar, inversion, scores)
    for name, figure in figures.items():
        report.save_figure(figure, record.figures / f"{name}.png")
    results = {**found, "inversion_relative_gap": gaps, "folder": judged}
    _write_report(record, config, results, figures)
    record.say(f"Report: {Path(record.shown) / 'report.html'}")
    return results


def _retrained(name: str, config: Config, record: Run) -> sampling.TrainedGenerator:
    """Train a generator of the zoo anew, by the settings that are recorded for it."""
    entry = zoo.record(name)
    path = record.workdir / "zoo" / f"{name}.safetensors"
    if path.exists():
        return zoo.load_file(path)
    images = _generators.recorded_images(entry, "train")
    gan = _generators.recorded_gan(entry)
    states = train_generator.train(
        gan,
        images,
        record,
        name,
        seeds=(entry["seed"],),
        num_steps=entry["num_steps"],
        batch_size=entry["batch_size"],
        checkpoint_dir=str(record.checkpoints / name),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # What the record says of the shipped file is not true of this one.
    made = {key: value for key, value in entry.items() if key not in ("sha256", "command")}
    zoo.save_file(path, sampling.from_state(gan, training.take_seed(states, 0)), made)
    return zoo.load_file(path)


def _impostors(ours, rng, config, record) -> dict[str, np.ndarray]:
    with record.parts("impostors") as progress:
        images = impostors.generate(
            ours,
            rng,
            config.num_impostors,
            progress=lambda done: progress("drawing", done, config.num_impostors),
        )
    return {"images": images}


def _fit_and_score(
    record, layer, z_bar, generated, real, suspects, tests, rng, settings, path, shown, kept
) -> dict[str, np.ndarray]:
    start = time.monotonic()
    with record.parts(shown) as progress:
        attributor = attribution.fit(
            layer,
            z_bar,
            generated,
            real,
            rng=rng,
            impostors=suspects,
            config=settings,
            progress=progress,
            kept=kept,
        )
        bundle.save(attributor, path)
        # Scored by what was saved: what the numbers describe is what the user has.
        attributor = bundle.load(path)
        fit_seconds = time.monotonic() - start

        def scores_of(images):
            found = attribution.score_with_info(attributor, images, progress=progress)
            # Not decided, as a user's image would not be.
            return {"score": np.where(found.converged, found.score, np.nan)}

        scores = {
            source: kept.part(f"scores-{source}", functools.partial(scores_of, images))["score"]
            for source, images in tests.items()
        }
    return {
        "calibration": attributor.calibration_scores,
        "fit_seconds": np.asarray(fit_seconds),
        **scores,
    }


def _average_activations(layer, z_bar, config, sources) -> dict[str, np.ndarray]:
    found = {}
    for source, images in sources.items():
        z, info = invert(
            layer,
            images[:200],
            jnp.asarray(z_bar),
            lam=config.lam,
            tol=config.tol,
            max_iters=config.max_iters,
            method="fista",
        )
        found[f"mean-{source}"] = np.asarray(z).mean(axis=0)
        found[f"gap-{source}"] = np.asarray(info.relative_gap)
    return found


def _write_suspects(folder: Path, sources: dict[str, np.ndarray], count: int = 4) -> None:
    """A folder as a user may have one: the last test images of every source as PNG files."""
    for source, images in sources.items():
        data.write_images(folder / source, images[-count:])


def _judge_folder(record: Run, folder: data.Folder, fnr: float) -> dict[str, Any]:
    """Verdicts of the saved attributor on image files: WORKDIR/verdicts.csv, a row per file."""
    attributor = bundle.load(record.workdir / "attributor")
    found = attribution.verdicts(attributor, folder.images, fnr)
    header = ["path", "score", "p_value", "threshold", "verdict", "reason"]
    rows: list[list[Any]] = []
    for i, path in enumerate(folder.paths):
        reason = str(found.doubt[i])
        if found.verdict[i] == "cannot_judge":
            reason = "the inversion did not converge"
        numbers = [float(found.score[i]), float(found.p_value[i]), found.threshold]
        rows.append([path, *numbers, str(found.verdict[i]), reason])
    rows += [[r.path, None, None, None, "cannot_judge", r.reason] for r in folder.rejected]
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    write_atomically(record.workdir / "verdicts.csv", text.getvalue())
    return {"header": header, "rows": rows}


def _figures(config, sources, z_bar, inversion, scores) -> dict[str, Any]:
    rivals = [source for source in sources if source != "own"]
    maps = {source: inversion[f"mean-{source}"] for source in sources}
    # The channels in which the averages of other sources differ most from that of own images.
    spread = np.mean([np.abs(maps[s] - maps["own"]).mean(axis=(0, 1)) for s in rivals], axis=0)
    channels = np.argsort(-spread)[:3]
    counts = {source: min(200, len(images)) for source, images in sources.items()}
    figures = {
        "samples": report.image_grid(sources),
        "average_activations": report.average_activations(
            {source: values[..., channels] for source, values in maps.items()},
            z_bar[..., channels],
            channels=[int(c) for c in channels],
            counts=counts,
        ),
        "roc": report.roc_curves(
            {DETECTORS[name][0]: (own, rival) for name, (own, rival, _) in scores.items()},
            fnr=config.fnr,
        ),
    }
    for name, (own, rival, threshold) in scores.items():
        figures[f"scores_{name}"] = report.score_histograms(
            own, rival, threshold, title=DETECTORS[name][0], fnr=config.fnr
        )
    return figures


def _accuracy_table(results: dict[str, Any]) -> report.Table:
    rivals = list(results["one_class"]["accuracy"])
    header = ["detector", "learns from", "mean", *rivals, "AUC", "fnr", "95 % interval of fnr"]
    rows = []
    for name, (shown, learns) in DETECTORS.items():
        found = results[name]
        low, high = found["achieved_fnr_interval"]
        rows.append(
            [
                shown,
                learns,
                found["mean_accuracy"],
                *(found["accuracy"][rival] for rival in rivals),
                found["mean_auc"],
                found["achieved_fnr"],
                f"{100 * low:.1f} to {100 * high:.1f} %",
            ]
        )
    percent = {column: ".1%" for column in ("mean", *rivals, "fnr")}
    return report.Table(
        header,
        rows,
        formats={**percent, "AUC": ".3f"},
        best={column: "max" for column in ("mean", *rivals, "AUC")},
    )


def _verdict_table(judged: dict[str, Any], limit: int = 40) -> report.Table:
    rows = [
        [path, score, p_value, verdict if not reason else f"{verdict}: {reason}"]
        for path, score, p_value, _, verdict, reason in judged["rows"][:limit]
    ]
    return report.Table(
        ["file", "score", "p-value", "verdict"], rows, formats={"score": ".1f", "p-value": ".4f"}
    )


def summary(results: dict[str, Any]) -> str:
    """The two tables, as they are printed."""
    table, verdicts = _accuracy_table(results), _verdict_table(results["folder"])
    return "\n".join(
        [
            "",
            "Accuracy per rival at one threshold (own accepted and rival rejected, averaged):",
            "",
            report.table_text(table.header, table.rows, formats=table.formats, best=table.best),
            "",
            "Verdicts of the saved one-class attributor on a folder of image files:",
            "",
            report.table_text(verdicts.header, verdicts.rows, formats=verdicts.formats),
            "",
        ]
    )


def _write_report(record, config, results, figures) -> None:
    found = results["one_class"]
    table = _accuracy_table(results)
    gaps = results["inversion_relative_gap"]
    if config.tol > 0:
        treatment = f"solved to a relative duality gap of {config.tol:g}"
    else:
        low = min(gap["median"] for gap in gaps.values())
        high = max(gap["median"] for gap in gaps.values())
        treatment = (
            f"inverted by exactly {config.max_iters} FISTA iterations, all alike; the certificate "
            f"reached by then is loose (median relative duality gap {low:.2f} to {high:.2f} by "
            "source)"
        )
    learned = (
        f"The one-class detector was given {config.num_generated} own images and "
        f"{config.num_impostors} of impostors (changed copies of our own model), and made "
        f"{config.num_altered} altered copies of the former; no other model and no real image had "
        f"a part in it. FLIPAD, RawPAD and DCTPAD {config.num_supervised} own "
        f"and {config.num_real} real ones. {found['num_calibration']} of the former's own images "
        f"and {results['flipad']['num_calibration']} of the latter's only set the threshold. Each "
        f"source is tested on {config.num_test} images that nothing was fitted on. Images are "
        f"{treatment}."
    )
    widths = "-".join(map(str, config.activation_widths))
    pixel_widths = "-".join(map(str, config.pixel_widths))
    reduced = (
        f"DeepSAD trained {config.epochs} epochs with encoders of widths {widths} (FLIPAD) and "
        f"{pixel_widths} (RawPAD, DCTPAD). The paper: 50 epochs, 128-256-128 and 32-64-128, 10 000 "
        "own and 10 000 real images."
    )
    table = dataclasses.replace(
        table,
        caption=f"Threshold: the {100 * (1 - config.fnr):g} % quantile of the scores of "
        f"{found['num_calibration']} own images. The best possible accuracy at this rate is "
        f"{100 * (1 - config.fnr / 2):g} %.",
    )
    histograms = [
        report.Picture(figures[f"scores_{name}"], f"{shown}: scores of own and rival images.")
        for name, (shown, _) in DETECTORS.items()
    ]
    sections = [
        report.Section(
            "Result", [table, learned, reduced, *(f"{text}." for text in record.warnings)]
        ),
        report.Section(
            "What they were asked about",
            [report.Picture(figures["samples"], "Test images, one source a row. Own: our model.")],
        ),
        report.Section(
            "What inversion sees",
            [
                report.Picture(
                    figures["average_activations"],
                    "Average inverted activation per source, in the three channels that differ "
                    "most between own and other images (compare FLIPAD paper, Figure 4).",
                )
            ],
        ),
        report.Section("Scores", histograms),
        report.Section(
            "Every threshold",
            [report.Picture(figures["roc"], "Share of rival images rejected per own image lost.")],
        ),
        report.Section(
            "A folder of image files",
            [
                "Judged by the attributor as it was saved. p-value: the share of own images that "
                "score this high or higher.",
                _verdict_table(results["folder"]),
            ],
        ),
    ]
    lead = (
        f"Did this image come from our model, {config.ours}? Asked of {len(found['accuracy'])} "
        f"other sources. The one-class detector, which knows nothing but our own model, is right "
        f"in {100 * found['mean_accuracy']:.1f} % of cases on average."
    )
    report.write_page(record.workdir / "report.html", "Image attribution", sections, lead=lead)


def plan(config: Config) -> list[_plan.Stage]:
    """Stages for `--plan`; figures, and copies of images that were processed, are left out."""
    entry = zoo.record(config.ours)
    gan = _generators.recorded_gan(entry)
    ours = _plan.abstract_generator(gan)
    layer = jax.eval_shape(sampling.final_layer, ours)
    names = tuple(dict.fromkeys((config.ours, *config.rivals)))
    num_own = config.num_generated
    num_tests = config.num_test * (len(names) + 1)  # own, every rival, real
    stages = []
    if config.retrain:
        for name in names:
            entry = zoo.record(name)
            images = _plan.training_images(entry["dataset"], entry["image_shape"][0])
            stages.append(
                _plan.gan_training(
                    _generators.recorded_gan(entry),
                    entry["batch_size"],
                    entry["num_steps"],
                    num_images=images.shape[0],
                    name=f"{name}: training step",
                )
            )
    stages.append(_plan.mean_activation(ours, config.num_mean))
    stages.append(_plan.generation(ours, num_own + config.num_test * len(names)))
    if config.num_impostors:
        stages.append(_plan.impostor_images(ours, config.num_impostors))
    sizes, networks = {}, []
    for name, settings in _detector_configs(config).items():
        shown, _ = DETECTORS[name]
        if name == "one_class":
            shapes = {"images": ours.image_shape, "activations": layer.operator.input_shape}
            learned = [("altered copies", reads) for reads in shapes if config.num_altered]
            learned += [("impostors", "images")] * bool(config.num_impostors)
            parts = attribution.own_parts(
                settings, num_own, with_impostors=config.num_impostors > 0
            )
            networks += [
                _plan.classifier_training(shapes[reads], settings.classifier, images, reads=reads)
                for images, reads in learned
            ]
            sizes[name] = sum(parts) + num_tests
            sizes[name] += attribution.num_altered_inverted(layer, settings)
            num_features = math.prod(layer.operator.input_shape)
            num_directions = settings.one_class.num_components
            num_directions = min(num_directions, parts.inverted // 3, num_features // 2)
            networks.append(
                _plan.principal_directions(parts.inverted, num_features, num_directions)
            )
            if settings.check_untouched:  # 1000 images and copies by five processes, 1000 more
                networks.append(_plan.traces_of_processing(ours.image_shape, 7 * 1000))
            continue
        num_calibration = int(config.num_supervised * settings.calibration_share)
        num_fitted = config.num_supervised - num_calibration + config.num_real
        sizes[name] = num_fitted + num_calibration + num_tests
        shape = layer.operator.input_shape if name == "flipad" else ours.image_shape
        raw = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        extract = functools.partial(features.extract, features.preset(settings.features))
        shape = jax.eval_shape(extract, raw).shape[1:]
        network = settings.deepsad_config()
        networks.append(
            _plan.deepsad_training(network, shape, num_fitted, name=f"{shown}: training step")
        )
        networks.append(
            _plan.deepsad_scoring(network, shape, sizes[name], name=f"{shown}: centre and scores")
        )
    num_averaged = min(200, config.num_test) * (len(names) + 1)
    stages.append(
        _plan.inversion(
            layer,
            sizes["one_class"] + sizes["flipad"] + num_averaged,
            max_iters=config.max_iters,
            tol=config.tol,
            name="inversion, 10 iterations of 64 images",
        )
    )
    return stages + networks
