"""Tables 4 and 8 of the FLIPAD paper: images that were blurred, cropped, made noisy, recompressed.

Immunised by default, as in the paper: what happens to the images under suspicion also happens to
those that are learned from. With --immunize=none it happens to the former only, with --immunize=any
all that is learned from suffers any one of them, as whoever cannot know which one comes would do
it: one detector for all columns. Accuracies are means over rivals and over the architectures that
are ours in turn; every repeat has its own generators.

    python run.py --experiment=perturbed_samples
    python run.py --experiment=perturbed_samples --immunize=none --methods=flipad,one_class
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from experiments import _attribution, _generators, _paper, _plan, _tables
from experiments._attribution import METHODS
from experiments._config import Run, check_once, setting
from experiments._generators import FAMILY_NAMES
from flipad_jax import perturbations, report
from flipad_jax.generators import sampling


@dataclasses.dataclass(frozen=True)
class Config(_attribution.Settings):
    """Settings of Table 4."""

    perturbations: tuple[str, ...] = setting(
        _paper.PERTURBATIONS, "Columns: names of `perturbations.apply`, or none."
    )
    immunize: str = setting(
        "same",
        "What happens to the images learned from: the same, any one of them, or none.",
        choices=("same", "any", "none"),
    )
    methods: tuple[str, ...] = setting(
        ("rawpad", "dctpad", "flipad", "one_class"), "Rows.", choices=tuple(METHODS)
    )
    ours: tuple[str, ...] = setting(
        (), "Architectures that are ours in turn, all of them rivals; () for all of --families."
    )
    num_own: int = setting(750, "Own images that a detector learns.", lower_bound=64)
    num_real: int = setting(750, "Real images that DeepSAD learns.", lower_bound=8)
    num_test: int = setting(200, "Test images of every source.", lower_bound=8)


PRESETS = {
    "smoke": {
        **_attribution.SMOKE,
        "seeds": (0,),
        "methods": ("rawpad", "flipad", "one_class"),
        "perturbations": ("blur-3", "jpeg-80"),
    },
    "demo": {"ours": ("dcgan",)},  # all four in turn take an hour
    "paper": _attribution.PAPER,
}


def run(config: Config, record: Run) -> dict[str, Any]:
    """All cells, the table, the page; returns accuracies per method and perturbation."""
    _attribution.check(config)
    check_once(config, "perturbations")
    if config.ours:
        check_once(config, "ours")
    unknown = sorted(set(config.ours) - set(config.families))
    if unknown:
        raise ValueError(
            f"--ours={','.join(config.ours)}: {', '.join(unknown)} is none of --families="
            f"{','.join(config.families)}"
        )
    grey = np.zeros((1, config.image_size, config.image_size, 1), np.uint8)
    for name in config.perturbations:  # Refuses a name or strength before anything is trained.
        perturbations.apply(name, grey, jax.random.key(0))
    generators = _generators.load(config, record, config.families, config.seeds)
    # [method][perturbation][seed][architecture]
    cells: dict[str, Any] = {
        method: {name: [] for name in config.perturbations} for method in config.methods
    }
    for seed in config.seeds:
        for method in config.methods:
            for name in config.perturbations:
                cells[method][name].append({})
        for family in _ours(config):
            ours = _attribution.model(config, record, family, seed, generators[family][seed])
            rivals = {
                f"{other}-{seed}": generators[other][seed]
                for other in config.families
                if other != family
            }
            sources = _attribution.tests(config, ours, rivals)
            for name in config.perturbations:
                for method in config.methods:
                    found = _attribution.cell(
                        config,
                        record,
                        method,
                        ours,
                        sources,
                        perturbation=name,
                        learned=name if config.immunize == "same" else config.immunize,
                    )
                    cells[method][name][-1][family] = {
                        key: found[key]
                        for key in ("mean_accuracy", "mean_auc", "achieved_fnr", "accuracy")
                    }
    results = {"cells": cells}
    _write_page(config, record, results, generators)
    return results


def _ours(config: Config) -> tuple[str, ...]:
    return config.ours or config.families


def _columns(cells, method: str, key: str) -> dict[str, list[float]]:
    """Means over architectures, one per repeat, for every perturbation and on average."""
    columns = {
        name: [float(np.mean([found[key] for found in repeat.values()])) for repeat in repeats]
        for name, repeats in cells[method].items()
    }
    return _tables.with_average(columns)


def _all_columns(cells, key: str) -> dict[str, dict[str, list[float]]]:
    return {METHODS[method]: _columns(cells, method, key) for method in cells}


def tables(config: Config, results: dict[str, Any]) -> list[report.Table]:
    """Table 4 (or 8), its areas, and the paper's where the setting is the same."""
    header = [*config.perturbations, "average"]
    found = [
        _tables.mean_table(title, header, _all_columns(results["cells"], key))
        for title, key in (("Table 4: accuracy, %", "mean_accuracy"), ("AUC, %", "mean_auc"))
    ]
    paper = _paper.comparable(config, _paper.TABLE_4) if config.immunize == "same" else None
    if paper is not None:
        rows = [[METHODS[m], *(paper[m].get(p) for p in config.perturbations)] for m in paper]
        found.append(report.Table(["The paper's, %", *config.perturbations], rows))
    return found


def _write_page(config, record, results, generators) -> None:
    family, seed = config.families[0], config.seeds[0]
    images = sampling.generate(generators[family][seed], jax.random.key(seed), 16)
    rows = {"untouched": images}
    for name in config.perturbations:
        rows[name] = perturbations.apply(name, images, jax.random.key(seed))
    grid = report.image_grid(rows, num_columns=16)
    report.save_figure(grid, record.figures / "perturbations.png")
    chart = _tables.chart(_all_columns(results["cells"], "mean_accuracy"), "repeats")
    report.save_figure(chart, record.figures / "accuracy.png")
    how = {
        "same": "All images, those learned from and those under suspicion, were treated alike.",
        "any": "What the methods learned from suffered any one of several perturbations or none, "
        "each at a strength of its own: they did not know which one was to come.",
        "none": "Only the images under suspicion were treated; the methods learned untouched ones.",
    }[config.immunize]
    sections = [
        report.Section(
            "Result",
            [
                how,
                report.Picture(chart, "Mean accuracy over architectures and rivals."),
                *tables(config, results),
                f"Cells: mean over {len(config.seeds)} repeats and half the width of its 95 % "
                "interval.",
            ],
        ),
        report.Section(
            "What it does to an image",
            [report.Picture(grid, "Images of one generator (Figure 11).")],
        ),
        report.Section(
            "Settings",
            [
                *_attribution.settings_texts(config, record),
                f"Ours in turn: {', '.join(FAMILY_NAMES[family] for family in _ours(config))}.",
            ],
        ),
    ]
    lead = "Can an image still be attributed after it was processed? " + how
    report.write_page(record.workdir / "report.html", "Perturbed samples", sections, lead=lead)


def summary(metrics: dict[str, Any]) -> str:
    """Table 4, as the terminal shows it."""
    return _tables.text_table("accuracy, %", _all_columns(metrics["cells"], "mean_accuracy"))


def _num_immunized(config: Config) -> int:
    """Of how many columns a detector is fitted to images that were processed."""
    if config.immunize == "same":
        return sum(name != "none" for name in config.perturbations)
    return int(config.immunize == "any")


def plan(config: Config) -> list[_plan.Stage]:
    """Stages for `--plan`; samples, figures and perturbations are left out."""
    return _attribution.plan(
        config,
        len(config.families) + 1,
        len(config.seeds) * len(config.perturbations),
        # Of images processed alike each cell learns anew; else one detector serves all columns.
        num_fits=len(config.seeds)
        * (len(config.perturbations) if config.immunize == "same" else 1),
        num_drawn=len(config.seeds) * _num_immunized(config),
        ours=_ours(config),
    )
