"""Tables 2, 6 and 7 of the FLIPAD paper: every method against every architecture.

Each architecture is ours in turn; the others, trained on the same images from the same seed, and
the real images are the rivals. A method learns own images (and real ones, if it takes any), sets
its threshold on other own images, and is asked about 500 images of every source. Everything is
repeated once per seed: generators, images, detectors.

Writes Table 2 (mean accuracy over rivals), Table 6 (each rival), Table 7 (area under the curve)
in the paper's layout, samples of every source (Figure 7) and a page.

    python run.py --experiment=single_model_attribution
    python run.py --experiment=single_model_attribution --dataset=photos --image_size=64
    python run.py --experiment=single_model_attribution --preset=paper --dataset=celeb_a --plan
"""

import dataclasses
from typing import Any

import numpy as np

from experiments import _attribution, _generators, _paper, _plan, _tables
from experiments._attribution import METHODS
from experiments._config import Run
from experiments._generators import FAMILY_NAMES
from flipad_jax import report


@dataclasses.dataclass(frozen=True)
class Config(_attribution.Settings):
    """Settings of Table 2."""


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {**_attribution.SMOKE, "methods": tuple(METHODS)},
    "demo": {},
    "paper": _attribution.PAPER,
}


def run(config: Config, record: Run) -> dict[str, Any]:
    """All cells, the tables, the page; returns accuracies and areas per method, model and seed."""
    _attribution.check(config)
    if len(config.families) < 2:
        raise ValueError("--families: give two at least, each is the other's rival")
    generators = _generators.load(config, record, config.families, config.seeds)
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {
        method: {family: [] for family in config.families} for method in config.methods
    }
    samples: dict[str, np.ndarray] = {}
    for seed in config.seeds:
        for family in config.families:
            ours = _attribution.model(config, record, family, seed, generators[family][seed])
            rivals = {
                f"{other}-{seed}": generators[other][seed]
                for other in config.families
                if other != family
            }
            sources = _attribution.tests(config, ours, rivals)
            if seed == config.seeds[0]:
                samples["real"] = sources["real"][:16]
                samples[FAMILY_NAMES[family]] = sources["own"][:16]
            for method in config.methods:
                found = _attribution.cell(config, record, method, ours, sources)
                cells[method][family].append(_by_family(found))
    results = {"cells": cells}
    _write_page(config, record, results, samples)
    return results


def _by_family(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary whose rivals are named by architecture alone: the seed is that of the repeat."""

    def renamed(values):
        return {name.partition("-")[0]: value for name, value in values.items()}

    fields = {key: renamed(summary[key]) for key in ("accuracy", "auc")}
    kept = ("mean_accuracy", "mean_auc", "achieved_fnr", "seconds")
    return {**fields, **{key: summary[key] for key in kept}}


def _all_columns(cells, key: str) -> dict[str, dict[str, list[float]]]:
    return {METHODS[m]: _tables.columns_by_family(cells, m, key) for m in cells}


def tables(config: Config, results: dict[str, Any]) -> list[report.Table]:
    """Tables 2, 6 and 7, and the paper's figures beside the first where the setting is the same."""
    cells = results["cells"]
    ours = [FAMILY_NAMES[family] for family in config.families]
    header = [*ours, "average"]
    found = []
    for title, key in (("Table 2: accuracy, %", "mean_accuracy"), ("Table 7: AUC, %", "mean_auc")):
        found.append(_tables.mean_table(title, header, _all_columns(cells, key)))
    rivals = ["real", *config.families]
    detail = {}
    for method in config.methods:
        for family in config.families:
            detail[f"{METHODS[method]}: {FAMILY_NAMES[family]}"] = {
                FAMILY_NAMES.get(rival, rival): [r["accuracy"][rival] for r in repeats]
                for rival in rivals
                if rival != family
                for repeats in [cells[method][family]]
            }
    found.insert(
        1,
        _tables.mean_table(
            "Table 6: accuracy, %; ours",
            [FAMILY_NAMES.get(rival, rival) for rival in rivals],
            detail,
            caption="Columns: where the other images come from.",
        ),
    )
    paper = _paper.comparable(config, _paper.TABLE_2)
    if paper is not None:
        theirs = [[METHODS[m], *(paper[m].get(f) for f in config.families)] for m in paper]
        found.append(report.Table(["The paper's Table 2, %", *ours], theirs))
    return found


def _write_page(config, record, results, samples) -> None:
    grid = report.image_grid(samples, num_columns=16)
    report.save_figure(grid, record.figures / "samples.png")
    columns = _all_columns(results["cells"], "mean_accuracy")
    chart = _tables.chart(columns, "repeats")
    report.save_figure(chart, record.figures / "accuracy.png")
    sections = [
        report.Section(
            "Result",
            [
                report.Picture(
                    chart, "Accuracy by architecture of ours, mean over rivals; a row per method."
                ),
                *tables(config, results),
                f"Cells: mean over {len(config.seeds)} repeats and half the width of its 95 % "
                "interval.",
            ],
        ),
        report.Section(
            "What they were asked about",
            [report.Picture(grid, "Real images and samples of every generator (Figure 7).")],
        ),
        report.Section("Settings", _attribution.settings_texts(config, record)),
    ]
    lead = (
        "Which method tells images of our generator from those of other architectures and from "
        f"real ones? Best on average: {_tables.best(columns)}"
    )
    report.write_page(
        record.workdir / "report.html", "Single-model attribution", sections, lead=lead
    )


def summary(metrics: dict[str, Any]) -> str:
    """Table 2, as the terminal shows it."""
    columns = _all_columns(metrics["cells"], "mean_accuracy")
    return _tables.text_table("accuracy, %", columns)


def plan(config: Config) -> list[_plan.Stage]:
    """Stages for `--plan`; samples, figures and perturbations are left out."""
    return _attribution.plan(config, len(config.families) + 1, len(config.seeds))
