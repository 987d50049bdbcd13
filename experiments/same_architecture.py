"""Table 3 of the FLIPAD paper: the same architecture and data, another seed.

The hardest rival there is: each generator of an architecture is ours in turn, those of the other
seeds are the rivals, trained together on the same images. Real images are asked about as well and
reported beside the table, which is about seeds alone.

    python run.py --experiment=same_architecture
    python run.py --experiment=same_architecture --reuse=runs/single_model_attribution-demo

The second takes the attributors that the first table's run has fitted: they are the same.
"""

import dataclasses
from typing import Any

import numpy as np

from experiments import _attribution, _generators, _paper, _plan, _tables
from experiments._attribution import METHODS
from experiments._config import Run, setting
from experiments._generators import FAMILY_NAMES
from flipad_jax import report


@dataclasses.dataclass(frozen=True)
class Config(_attribution.Settings):
    """Settings of Table 3."""

    methods: tuple[str, ...] = setting(
        ("sm_f", "rawpad", "dctpad", "flipad", "one_class", "one_class_impostors"),
        "Rows.",
        choices=tuple(METHODS),
    )


PRESETS = {
    "smoke": {
        **_attribution.SMOKE,
        "families": ("dcgan",),
        "methods": ("rawpad", "flipad", "one_class"),
    },
    "demo": {},
    "paper": _attribution.PAPER,
}


def run(config: Config, record: Run) -> dict[str, Any]:
    """All cells, the table, the page; returns accuracies per method, architecture and seed."""
    _attribution.check(config)
    if len(config.seeds) < 2:
        raise ValueError("--seeds: give two at least, each is the other's rival")
    generators = _generators.load(config, record, config.families, config.seeds)
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {
        method: {family: [] for family in config.families} for method in config.methods
    }
    samples: dict[str, np.ndarray] = {}
    for family in config.families:
        for seed in config.seeds:
            ours = _attribution.model(config, record, family, seed, generators[family][seed])
            rivals = {
                f"{family}-{other}": generators[family][other]
                for other in config.seeds
                if other != seed
            }
            sources = _attribution.tests(config, ours, rivals)
            samples[f"{FAMILY_NAMES[family]} {seed}"] = sources["own"][:16]
            for method in config.methods:
                found = _attribution.cell(config, record, method, ours, sources)
                cells[method][family].append(_seeds_and_real(found))
    results = {"cells": cells}
    _write_page(config, record, results, samples)
    return results


def _seeds_and_real(summary: dict[str, Any]) -> dict[str, Any]:
    """Means over the other seeds; real images apart."""
    fields = {}
    for key in ("accuracy", "auc"):
        by_source = dict(summary[key])
        fields[f"real_{key}"] = by_source.pop("real")
        fields[f"seeds_{key}"] = float(np.mean(list(by_source.values())))
        fields[key] = by_source
    kept = ("achieved_fnr", "seconds")
    return {**fields, **{key: summary[key] for key in kept}}


def _all_columns(cells, key: str) -> dict[str, dict[str, list[float]]]:
    return {METHODS[m]: _tables.columns_by_family(cells, m, key) for m in cells}


def tables(config: Config, results: dict[str, Any]) -> list[report.Table]:
    """Table 3, its areas, the same for real images, and the paper's where the setting is its."""
    cells = results["cells"]
    header = [*(FAMILY_NAMES[family] for family in config.families), "average"]
    found = [
        _tables.mean_table(title, header, _all_columns(cells, key))
        for title, key in (
            ("Table 3: accuracy against other seeds, %", "seeds_accuracy"),
            ("AUC against other seeds, %", "seeds_auc"),
            ("Accuracy against real images, %", "real_accuracy"),
        )
    ]
    paper = _paper.comparable(config, _paper.TABLE_3)
    if paper is not None:
        rows = [[METHODS[m], *(paper[m].get(f) for f in config.families)] for m in paper]
        found.append(report.Table(["The paper's Table 3, %", *header[:-1]], rows))
    return found


def _write_page(config, record, results, samples) -> None:
    grid = report.image_grid(samples, num_columns=16)
    report.save_figure(grid, record.figures / "samples.png")
    columns = _all_columns(results["cells"], "seeds_accuracy")
    chart = _tables.chart(columns, "seeds")
    report.save_figure(chart, record.figures / "accuracy.png")
    sections = [
        report.Section(
            "Result",
            [
                report.Picture(chart, "Accuracy by architecture, mean over other seeds."),
                *tables(config, results),
                f"Cells: mean over {len(config.seeds)} generators that are ours in turn, and half "
                "the width of its 95 % interval.",
            ],
        ),
        report.Section(
            "What they were asked about",
            [report.Picture(grid, "Samples; a row per generator. Seeds draw alike.")],
        ),
        report.Section("Settings", _attribution.settings_texts(config, record)),
    ]
    lead = (
        "Which method tells images of our generator from those of the same architecture, trained "
        f"on the same images from another seed? Best on average: {_tables.best(columns)}"
    )
    report.write_page(record.workdir / "report.html", "Same architecture", sections, lead=lead)


def summary(metrics: dict[str, Any]) -> str:
    """Table 3, as the terminal shows it."""
    columns = _all_columns(metrics["cells"], "seeds_accuracy")
    return _tables.text_table("other seeds, accuracy, %", columns)


def plan(config: Config) -> list[_plan.Stage]:
    """Stages for `--plan`; samples, figures and perturbations are left out."""
    return _attribution.plan(config, len(config.seeds) + 1, len(config.seeds))
