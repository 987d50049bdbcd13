"""How many own images it takes: accuracy and achieved fnr by their number, with intervals.

A one-class attributor is fitted to so many own images, several times to other ones, and asked about
own images that it never saw, real ones and those of the rivals. Two thresholds are tried per rate:
the paper's, a quantile of the calibration scores, and the one that verdicts take, which loses at
most the rate that was asked for wherever so few images can certify that.

    python run.py --experiment=sample_size
    python run.py --experiment=sample_size --counts=2000 --num_refits=20
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from experiments import _generators, _tables
from experiments._config import Run, check_once, setting
from flipad_jax import metrics, report
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection import calibration
from flipad_jax.detection.attributor import AttributorConfig
from flipad_jax.detection.classifier import ClassifierConfig
from flipad_jax.generators import sampling


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    ours: str = setting("digits_dcgan_0", "A generator of the zoo, or a file of train_generator.")
    rivals: tuple[str, ...] = setting(
        ("digits_dcgan_1", "digits_dcgan_2", "digits_wgan_gp_0", "digits_lsgan_0"),
        "Generators that are not ours.",
    )
    counts: tuple[int, ...] = setting(
        (100, 200, 500, 1000, 2000, 5000, 10_000), "Numbers of own images.", lower_bound=80
    )
    num_refits: int = setting(5, "Fits to as many other own images.", lower_bound=2)
    fnrs: tuple[float, ...] = setting(
        (0.005, 0.05), "Rates of rejected own images.", lower_bound=0.0, upper_bound=1.0
    )
    num_own_test: int = setting(1000, "Own test images per fit, others each time.", lower_bound=20)
    num_test: int = setting(300, "Test images of every rival, and real ones.", lower_bound=8)
    num_mean: int = setting(5000, "Latents that the mean activation averages.", lower_bound=1)
    num_altered: int = setting(8192, "Altered copies that are learned from.", lower_bound=0)
    classifier_steps: int = setting(
        ClassifierConfig.num_steps, "Training steps on them.", lower_bound=1
    )
    seed: int = setting(0, "Images and fits are drawn from it.", lower_bound=0)


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "rivals": ("digits_dcgan_1",),
        "counts": (100, 160),
        "num_refits": 2,
        "fnrs": (0.05,),
        "num_own_test": 60,
        "num_test": 30,
        "num_mean": 256,
        "num_altered": 64,
        "classifier_steps": 5,
    },
    "demo": {},
    "paper": {"num_refits": 20},
}


def run(config: Config, record: Run) -> dict[str, Any]:
    """All fits, the table, the page."""
    check_once(config, "rivals", "counts", "fnrs")
    _settings(config)  # Refuses what no attributor can be fitted with.
    ours, entry = _generators.recorded("ours", config.ours)
    sources = {"real": _generators.recorded_images(entry, "test", config.num_test)}
    for number, name in enumerate(config.rivals):
        rival, _ = _generators.recorded("rivals", name)
        rng = jax.random.fold_in(_rng(config, 0), number)
        sources[name] = sampling.generate(rival, rng, config.num_test)
    z_bar = record.stage(
        "mean_activation",
        lambda: {"z_bar": sampling.mean_activation(ours, _rng(config, 1), config.num_mean)},
        text="mean activation",
    )["z_bar"]
    rows = []
    for count in config.counts:
        scored = []
        for refit in range(config.num_refits):
            compute = functools.partial(_scores, config, record, ours, z_bar, sources, count, refit)
            text = f"{count} own images, fit {refit + 1} of {config.num_refits}"
            stage = f"fit-{count}-{refit}"
            scored.append(record.stage(stage, compute, text=text))
        rows += [_row(count, fnr, scored, list(sources)) for fnr in config.fnrs]
    results = {"rows": rows}
    _write_page(config, record, results)
    return results


def _rng(config: Config, number: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.seed), number)


def _settings(config: Config) -> AttributorConfig:
    return AttributorConfig(
        num_altered=config.num_altered,
        classifier=ClassifierConfig(num_steps=config.classifier_steps),
        check_untouched=False,
    )


def _scores(config, record, ours, z_bar, sources, count: int, refit: int) -> dict[str, np.ndarray]:
    rng = jax.random.fold_in(jax.random.fold_in(_rng(config, 2), count), refit)
    own_rng, fit_rng = jax.random.split(rng)
    own = sampling.generate(ours, own_rng, count + config.num_own_test)
    start = time.monotonic()
    with record.parts("fit") as progress:
        fitted = attribution.fit(
            sampling.final_layer(ours),
            z_bar,
            own[:count],
            rng=fit_rng,
            config=_settings(config),
            progress=progress,
        )
    seconds = time.monotonic() - start
    found = {
        name: attribution.score(fitted, images)
        for name, images in {"own": own[count:], **sources}.items()
    }
    found["calibration"] = fitted.calibration_scores
    return {**found, "fit_seconds": np.asarray(seconds)}


def _row(count: int, fnr: float, scored, names: list[str]) -> dict[str, Any]:
    """Means over fits of accuracy, and the pooled rate of rejected own images."""
    num_calibration = min(len(arrays["calibration"]) for arrays in scored)
    row: dict[str, Any] = {
        "count": count,
        "fnr": fnr,
        "num_calibration": num_calibration,
        "certified": calibration.smallest_certifiable_fnr(num_calibration) <= fnr,
        "fit_seconds": float(np.median([arrays["fit_seconds"] for arrays in scored])),
    }
    for name, choose in (
        ("verdict", calibration.verdict_threshold),
        ("quantile", calibration.threshold),
    ):
        thresholds = [choose(arrays["calibration"], fnr) for arrays in scored]
        rejected = sum(int((~(a["own"] <= t)).sum()) for a, t in zip(scored, thresholds))
        asked = sum(len(arrays["own"]) for arrays in scored)
        accuracy = {
            source: [
                metrics.pair_accuracy(arrays["own"], arrays[source], t)
                for arrays, t in zip(scored, thresholds)
            ]
            for source in names
        }
        row[name] = {
            "achieved_fnr": rejected / asked,
            "interval": list(metrics.clopper_pearson(rejected, asked)),
            "mean": np.mean(list(accuracy.values()), axis=0).tolist(),
            "accuracy": accuracy,
            "worst": min(float(np.mean(values)) for values in accuracy.values()),
        }
    return row


def tables(results: dict[str, Any]) -> list[report.Table]:
    """One table: a row per number of own images and rate."""
    return [
        report.Table(
            [
                "own images",
                "fnr asked for",
                "they certify it",
                "achieved, %",
                "95 % interval",
                "the paper's threshold: achieved, %",
                "mean accuracy, %",
                "hardest rival, %",
                "seconds to fit",
            ],
            [
                [
                    row["count"],
                    f"{100 * row['fnr']:g} %",
                    "yes" if row["certified"] else "no",
                    f"{100 * row['verdict']['achieved_fnr']:.2f}",
                    "{:.2f} to {:.2f}".format(*(100 * x for x in row["verdict"]["interval"])),
                    f"{100 * row['quantile']['achieved_fnr']:.2f}",
                    _tables.mean_text(row["verdict"]["mean"]),
                    f"{100 * row['verdict']['worst']:.1f}",
                    f"{row['fit_seconds']:.0f}",
                ]
                for row in results["rows"]
            ],
        )
    ]


def _write_page(config: Config, record: Run, results) -> None:
    columns = {
        f"fnr {100 * fnr:g} %": {
            f"{row['count']}": row["verdict"]["mean"]
            for row in results["rows"]
            if row["fnr"] == fnr
        }
        for fnr in config.fnrs
    }
    chart = _tables.chart(columns, "fits")
    report.save_figure(chart, record.figures / "accuracy.png")
    sections = [
        report.Section(
            "Result",
            [
                report.Picture(chart, "Mean accuracy over rivals by number of own images."),
                *tables(results),
            ],
        ),
        report.Section(
            "Settings",
            [
                f"Ours: {config.ours}; rivals: real images and {', '.join(config.rivals)}, "
                f"{config.num_test} images of each; {config.num_refits} fits per number, each with "
                f"{config.num_own_test} own test images of its own. A quarter of the own images "
                "calibrates, another gives the tail probabilities, the rest is learned. The "
                "interval is of the pooled rate, as if all own test images had met one threshold: "
                "thresholds of single fits scatter more.",
            ],
        ),
    ]
    last = max(results["rows"], key=lambda row: row["count"])
    lead = (
        f"With {last['count']} own images: mean accuracy "
        f"{_tables.mean_text(last['verdict']['mean'])} % at fnr {100 * last['fnr']:g} %, of which "
        f"{100 * last['verdict']['achieved_fnr']:.2f} % were lost."
    )
    report.write_page(record.workdir / "report.html", "How many own images", sections, lead=lead)


def summary(metrics_found: dict[str, Any]) -> str:
    """The table, as the terminal shows it."""
    (table,) = tables(metrics_found)
    return report.table_text(table.header, table.rows)
