"""How often is a verdict wrong because an image was processed, and does the warning say so?

An attributor is calibrated on own images as they are published. Here own test images, real ones and
those of the other generators of the zoo are judged untouched and after JPEG, noise, blur, crop and
resizing (`flipad_jax.perturbations`). Counted are own images that are declared not ours, and
warnings of the attributor (`flipad_jax.detection.validity`), which learned from own images alone.

Writes a table, a figure and report.html. Two cores: about two minutes; --preset=smoke: seconds.

    python run.py --experiment=validity --ours=digits_wgan_gp_0
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments import _generators
from experiments._config import Run, setting
from flipad_jax import metrics, perturbations, report
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection import calibration, validity
from flipad_jax.generators import sampling, zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNTOUCHED = "untouched"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    seed: int = setting(0, "Seed of everything random.", lower_bound=0)
    ours: str = setting("digits_dcgan_0", "Generator of the zoo that is ours.")
    rivals: tuple[str, ...] = setting(
        ("digits_dcgan_0", "digits_dcgan_1", "digits_dcgan_2", "digits_wgan_gp_0"),
        "Generators of the zoo that are asked about; ours is left out of them.",
    )
    num_generated: int = setting(2000, "Own images that are learned from.", lower_bound=400)
    num_test: int = setting(500, "Test images of every source.", lower_bound=8)
    num_mean: int = setting(5000, "Latents that the mean activation averages.", lower_bound=1)
    fnr: float = setting(
        0.005, "Share of own images that may be rejected.", lower_bound=0.0, upper_bound=1.0
    )
    level: float = setting(0.01, "Warn at p-values up to this.", lower_bound=0.0, upper_bound=1.0)
    qualities: tuple[int, ...] = setting((95, 90, 80, 60), "JPEG.", lower_bound=1, upper_bound=100)
    noise_stds: tuple[float, ...] = setting((0.01, 0.02, 0.05), "Noise.", lower_bound=0.0)
    blur_kernels: tuple[int, ...] = setting((3,), "Blur, side of the window.", lower_bound=1)
    crop_sizes: tuple[int, ...] = setting((30,), "Crop, pixels a side that stay.", lower_bound=1)
    resize_factors: tuple[float, ...] = setting((0.75, 0.5, 2.0), "Resizing, and back.")


PRESETS = {
    "smoke": {
        "num_generated": 500,
        "num_test": 60,
        "num_mean": 500,
        "qualities": (90,),
        "noise_stds": (0.02,),
        "resize_factors": (0.5,),
    },
    "demo": {},
    "paper": {"num_generated": 13_334, "num_test": 1000},
}

# treatment -> (the kind that a warning should name, function of images and a key)
Treatments = dict[str, tuple[str, Callable[[np.ndarray, jax.Array], np.ndarray]]]


def _treatments(config: Config) -> Treatments:
    def without_rng(edit, **options):
        return lambda images, rng: edit(images, **options)

    found: Treatments = {UNTOUCHED: ("", lambda images, rng: images)}
    for q in config.qualities:
        found[f"JPEG {q}"] = "JPEG", without_rng(perturbations.jpeg, quality=q)
    for std in config.noise_stds:
        found[f"noise {std:g}"] = "noise", functools.partial(perturbations.noise, std=std)
    for k in config.blur_kernels:
        found[f"blur {k}"] = "blur or resize", without_rng(perturbations.blur, kernel_size=k)
    for size in config.crop_sizes:
        found[f"crop {size}"] = "crop", without_rng(perturbations.crop, size=size)
    for factor in config.resize_factors:
        found[f"resize {factor:g}"] = "blur or resize", without_rng(
            perturbations.resize, factor=factor
        )
    return found


def run(config: Config, record: Run) -> dict[str, Any]:
    """Fit, process, judge, count; returns the metrics of results.json."""
    names = config.rivals
    for name in (config.ours, *names):
        zoo.record(name)  # Refuses one that is not there, and says which there are.
    ours = zoo.load(config.ours)
    treatments = _treatments(config)
    # Refused strengths are found before anything is computed.
    probe = np.zeros((1, *ours.image_shape), np.uint8)
    for _, treat in treatments.values():
        treat(probe, jax.random.key(0))
    mean_rng, own_rng, rival_rng, fit_rng, treat_rng = jax.random.split(
        jax.random.key(config.seed), 5
    )
    sources = {
        "own": sampling.generate(ours, own_rng, config.num_test, first=config.num_generated),
        "real": _generators.recorded_images(zoo.record(config.ours), "test", config.num_test),
    }
    for index, name in enumerate(names):
        if name != config.ours:
            stream = jax.random.fold_in(rival_rng, index)
            sources[name] = sampling.generate(zoo.load(name), stream, config.num_test)

    found = record.stage(
        "judged",
        lambda: _judge(
            config, record, ours, sources, treatments, mean_rng, own_rng, fit_rng, treat_rng
        ),
        text=f"fit to {config.num_generated} images of {config.ours}, "
        f"judge {len(treatments)} versions of {len(sources)} sources",
    )
    results = _count(config, treatments, list(sources), found)
    figure = _figure(results)
    report.save_figure(figure, record.figures / "warnings.png")
    own = {name: treat(sources["own"], treat_rng) for name, (_, treat) in treatments.items()}
    samples = report.image_grid(own)
    report.save_figure(samples, record.figures / "samples.png")
    _write_report(record, config, results, figure, samples)
    record.say(f"Report: {Path(record.shown) / 'report.html'}")
    return results


def _judge(
    config, record, ours, sources, treatments, mean_rng, own_rng, fit_rng, treat_rng
) -> dict[str, np.ndarray]:
    """Scores of own images, p-values and kinds of all, per treatment; the attributor is saved."""
    with record.parts("validity") as progress:
        attributor = attribution.fit(
            sampling.final_layer(ours),
            sampling.mean_activation(ours, mean_rng, config.num_mean),
            sampling.generate(ours, own_rng, config.num_generated),
            rng=fit_rng,
            progress=progress,
        )
        learned = attributor.validity
        if learned is None:
            reason = validity.why_not(ours.image_shape, config.num_generated)
            raise ValueError(f"nothing was learned about untouched images: {reason}")
        found = {"calibration": attributor.calibration_scores}
        for number, (name, (_, treat)) in enumerate(treatments.items()):
            for index, (source, images) in enumerate(sources.items()):
                stream = jax.random.fold_in(jax.random.fold_in(treat_rng, number), index)
                treated = treat(images, stream)
                checks = validity.check(learned, treated)
                found[f"p_value-{source}-{name}"] = checks.p_value
                found[f"kind-{source}-{name}"] = checks.kind
                if source == "own":
                    found[f"score-{name}"] = attribution.score(attributor, treated)
            progress("checking", number + 1, len(treatments))
    return found


def _count(config, treatments, sources, found) -> dict[str, Any]:
    threshold = calibration.verdict_threshold(found["calibration"], config.fnr)
    warned = {
        source: {name: found[f"p_value-{source}-{name}"] <= config.level for name in treatments}
        for source in sources
    }
    # An image without a verdict is not accepted either.
    wrong = {name: ~(found[f"score-{name}"] <= threshold) for name in treatments}
    processed = [name for name in treatments if name != UNTOUCHED]
    kinds = {}
    for name in processed:
        named = found[f"kind-own-{name}"][warned["own"][name]]
        kinds[name] = float(np.mean(named == treatments[name][0])) if named.size else None
    all_wrong = np.concatenate([wrong[name] for name in treatments])
    all_warned = np.concatenate([warned["own"][name] for name in treatments])
    false_alarms = {
        source: {
            "count": int(rows[UNTOUCHED].sum()),
            "share": float(rows[UNTOUCHED].mean()),
            "interval": list(
                metrics.clopper_pearson(int(rows[UNTOUCHED].sum()), rows[UNTOUCHED].size)
            ),
        }
        for source, rows in warned.items()
    }

    def right_among_warned(chosen):
        """Share really processed, if as many images are processed as untouched."""
        hit = np.mean([warned[s][name].mean() for s in chosen for name in processed])
        false = np.mean([warned[s][UNTOUCHED].mean() for s in chosen])
        return float(hit / (hit + false)) if hit + false > 0 else None

    return {
        "ours": config.ours,
        "level": config.level,
        "fnr": config.fnr,
        "num_test": config.num_test,
        "warned": {
            source: {name: float(values.mean()) for name, values in rows.items()}
            for source, rows in warned.items()
        },
        "own_not_ours": {name: float(values.mean()) for name, values in wrong.items()},
        "kind_right": kinds,
        "false_alarms": false_alarms,
        "processed_among_warned": {
            "own": right_among_warned(["own"]),
            "all_sources": right_among_warned(sources),
        },
        "own_wrong": int(all_wrong.sum()),
        "warned_among_own_wrong": (
            float(all_warned[all_wrong].mean()) if all_wrong.any() else None
        ),
    }


def _table(results: dict[str, Any]) -> report.Table:
    foreign = [source for source in results["warned"] if source != "own"]
    header = ["images", "own: not ours", "own: warned", "kind named", *foreign]
    rows = [
        [
            name,
            results["own_not_ours"][name],
            results["warned"]["own"][name],
            results["kind_right"].get(name),
            *(results["warned"][source][name] for source in foreign),
        ]
        for name in results["own_not_ours"]
    ]
    return report.Table(header, rows, formats={column: ".1%" for column in header[1:]})


def _sentences(results: dict[str, Any]) -> list[str]:
    def percent(value):
        return "none" if value is None else f"{100 * value:.1f} %"

    alarms = results["false_alarms"]
    low, high = alarms["own"]["interval"]
    worst = max((source for source in alarms if source != "own"), key=lambda s: alarms[s]["share"])
    right = results["processed_among_warned"]
    return [
        f"Untouched own images warned about: {percent(alarms['own']['share'])} "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %; at most "
        f"{percent(results['level'])} is promised). Untouched images of others: at most "
        f"{percent(alarms[worst]['share'])} ({worst}); nothing is promised for them.",
        f"Own images with a wrong verdict, untouched and processed together: "
        f"{results['own_wrong']}; warned about: {percent(results['warned_among_own_wrong'])}.",
        f"Of the images warned about, really processed, if as many are as are not: "
        f"{percent(right['own'])} of own ones, {percent(right['all_sources'])} over all sources.",
    ]


def summary(results: dict[str, Any]) -> str:
    """The table and what to read from it, as they are printed."""
    table = _table(results)
    text = report.table_text(table.header, table.rows, formats=table.formats)
    return "\n".join(
        [
            "",
            f"Share declared not ours, and shares warned about (ours: {results['ours']}):",
            "",
            text,
            "",
            *_sentences(results),
            "",
        ]
    )


def _figure(results: dict[str, Any]) -> "Figure":
    """Per treatment: own images lost, own images warned about, and the others' warnings."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    names = list(results["own_not_ours"])
    places = np.arange(len(names))
    figure = Figure(figsize=(7.2, 0.6 + 0.3 * len(names)), dpi=200, layout="constrained")
    axes = figure.subplots()
    lost = [results["own_not_ours"][name] for name in names]
    axes.barh(places, lost, height=0.62, color="#d5dbe1", label="own: declared not ours")
    markers = "osD^vP"
    for index, (source, rows) in enumerate(results["warned"].items()):
        own = source == "own"
        # Side by side within a row: many shares are equal.
        offset = (index - (len(results["warned"]) - 1) / 2) * 0.12
        axes.plot(
            [rows[name] for name in names],
            places + offset,
            ls="none",
            marker=markers[index % len(markers)],
            ms=5 if own else 3.5,
            color="#0072b2" if own else ("#d55e00", "#009e73", "#cc79a7", "#e69f00")[index % 4],
            label=f"{source}: warned",
            clip_on=False,
        )
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=8)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def _write_report(record, config, results, figure, samples) -> None:
    table = dataclasses.replace(
        _table(results),
        caption=f"{config.num_test} test images per source. Columns of the other sources: share "
        "warned about. Kind named: share of the own images warned about whose kind of processing "
        "was named rightly.",
    )
    explained = (
        "A warning says: this image looks as if it was processed after it was made, and the "
        "attributor was calibrated on untouched images. It was learned from own images and copies "
        "of them only. Processed images of others are declared not ours either way; for them the "
        "warning changes nothing."
    )
    learned = (
        f"The attributor was fitted to {config.num_generated} images of {config.ours} with its "
        f"default settings; the threshold allows {100 * config.fnr:g} % of own untouched images to "
        f"be rejected. Warned is at p <= {config.level:g}."
    )
    sections = [
        report.Section("Result", [table, *_sentences(results), explained, learned]),
        report.Section(
            "At a glance",
            [report.Picture(figure, "Bars: own images lost. Marks: images warned about.")],
        ),
        report.Section(
            "What was judged", [report.Picture(samples, "Own test images, one treatment a row.")]
        ),
    ]
    share = results["warned_among_own_wrong"]
    lead = "No own image got a wrong verdict."
    if share is not None:
        lead = (
            f"Of {results['own_wrong']} own images that were declared not ours, most because they "
            f"were processed, the attributor warned about {100 * share:.1f} %."
        )
    report.write_page(record.workdir / "report.html", "Processed images", sections, lead=lead)
