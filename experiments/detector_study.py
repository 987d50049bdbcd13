"""What tells our images from everybody else's: statistic by statistic, with own images alone.

Each architecture and seed is ours in turn. The one-class detector's statistics are fitted to own
images only, on activations, on the targets that are inverted, and on pixels, so that it shows what
the inversion brings; two networks learn altered copies of own images, one from pixels and one from
activations, a third one impostors. All of them are asked, one by one and combined, about real
images, other seeds of the architecture, other architectures, our own model after some more
training, and our own model with its last layer jittered. The methods of the FLIPAD paper stand
beside them (--methods).

Statistics, alterations and weights were chosen while a DCGAN or an LSGAN was ours. Families in
--held_out were not, and are reported apart; as rivals they had been seen. WORKSPACE.md tells what
was looked at when.

    python run.py --experiment=detector_study
    python run.py --experiment=detector_study --dataset=photos --generators=results/generators
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments import _attribution, _generators, _tables
from experiments._attribution import METHODS
from experiments._config import Run, check_once, setting
from experiments._generators import FAMILY_NAMES
from flipad_jax import data, metrics, perturbations, report
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection import calibration, classifier, one_class
from flipad_jax.detection.attributor import AttributorConfig
from flipad_jax.detection.classifier import ClassifierConfig
from flipad_jax.generators import impostors, sampling
from flipad_jax.inversion import final_layer

_PAPER_METHODS = ("sm_f", "rawpad", "dctpad", "flipad")
FEATURES = ("activations", "targets", "pixels")
_STATISTICS = {
    "residual": "subspace residual",
    "channel_moments": "channel moments",
    "quantiles": "quantiles",
}
_GROUPS = {
    "real": "real",
    "seeds": "other seeds",
    "architectures": "other architectures",
    "trained_on": "ours, trained on",
    "last_layer": "ours, last layer jittered",
}
_RIVALS = ("real", "seeds", "architectures")  # whose mean the goal is about; the others are ours


@dataclasses.dataclass(frozen=True)
class Config(_attribution.Settings):
    """Settings of the study."""

    methods: tuple[str, ...] = setting(
        (), "Methods of the paper beside them.", choices=_PAPER_METHODS
    )
    ours: tuple[str, ...] = setting(
        (), "Architectures that are ours in turn, all of them rivals; () for all of --families."
    )
    held_out: tuple[str, ...] = setting(
        ("wgan_gp", "ebgan"),
        "Architectures that were not ours in any choice, reported apart.",
        choices=tuple(FAMILY_NAMES),
    )
    changed: tuple[str, ...] = setting(
        ("trained_on", "last_layer"),
        "Changed copies of our own model that are asked about.",
        choices=("trained_on", "last_layer"),
    )
    num_test: int = setting(300, "Test images of every source.", lower_bound=8)
    trained_on_steps: int = setting(200, "Updates by which our model is trained on.", lower_bound=1)
    last_layer_noise: float = setting(
        0.3, "Jitter of the last kernel, as a share of its size.", lower_bound=0.0, upper_bound=1.0
    )


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        **_attribution.SMOKE,
        "methods": ("rawpad",),
        "held_out": ("lsgan",),
        "trained_on_steps": 2,
    },
    "demo": {},
    "paper": {**_attribution.PAPER, "methods": _PAPER_METHODS},
}


def run(config: Config, record: Run) -> dict[str, Any]:
    """All models, all statistics; tables and the page."""
    _attribution.check(config)
    for name in ("held_out", "changed", "ours"):
        if getattr(config, name):
            check_once(config, name)
    if len(config.seeds) < 2:
        raise ValueError("--seeds: give two at least, each is the other's rival")
    if config.tol:
        raise ValueError(
            f"--tol={config.tol:g}: the study inverts by --max_iters alone; inversion_accuracy is "
            "about what tol does"
        )
    if not config.num_altered:
        raise ValueError("--num_altered=0: the study is about what altered copies teach")
    unknown = sorted(set(config.ours) - set(config.families))
    if unknown:
        raise ValueError(f"--ours: {', '.join(unknown)} is none of --families")
    used = config.num_own + 2 * config.num_calibration
    if used > config.num_many:
        raise ValueError(
            f"--num_own={config.num_own} and twice --num_calibration={config.num_calibration} are "
            f"more than --num_many={config.num_many}, behind which the test "
            "images begin"
        )
    generators = _generators.load(config, record, config.families, config.seeds)
    found: dict[str, list[dict[str, Any]]] = {family: [] for family in _ours(config)}
    for family in found:
        for seed in config.seeds:
            ours = _attribution.model(config, record, family, seed, generators[family][seed])
            sources, groups = _sources(config, record, ours, generators)
            scored = _scored(config, record, ours, sources)
            rows = {
                name: _summary(config, scores, groups)
                for name, scores in _rows(scored, list(sources)).items()
            }
            for method in config.methods:
                cell = _attribution.cell(config, record, method, ours, sources)
                rows[METHODS[method]] = _grouped(cell["accuracy"], cell["auc"], groups) | {
                    "fnr": cell["achieved_fnr"]
                }
            found[family].append(rows)
    results = {"families": found}
    _write_page(config, record, results)
    return results


def _ours(config: Config) -> tuple[str, ...]:
    return config.ours or config.families


def _sources(config, record, ours, generators) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Test images by source, and the group that each source but our own belongs to."""
    rivals, groups = {}, {"real": "real"}
    for family in config.families:
        for seed in config.seeds:
            same = family == ours.family
            if same != (seed == ours.seed):  # Other seeds of ours; the same seed of others.
                rivals[f"{family}-{seed}"] = generators[family][seed]
                groups[f"{family}-{seed}"] = "seeds" if same else "architectures"
    sources = _attribution.tests(config, ours, rivals)
    if "trained_on" in config.changed:
        compute = functools.partial(_trained_on, config, record, ours)
        made = record.stage(f"trained_on-{ours.name}", compute, text=f"{ours.name}, trained on")
        sources["trained_on"] = made["images"]
    if "last_layer" in config.changed:
        sources["last_layer"] = sampling.generate(
            _generators.jittered(ours.generator, _test_rng(ours), config.last_layer_noise),
            _test_rng(ours),
            config.num_test,
        )
    return sources, groups | {name: name for name in config.changed}


def _test_rng(ours) -> jax.Array:
    return jax.random.fold_in(jax.random.key(ours.seed), 7)


def _trained_on(config, record, ours) -> dict[str, np.ndarray]:
    images = data.load(
        config.dataset,
        split="train",
        image_size=config.image_size,
        num_images=config.num_gan_images or None,
        seed=config.data_seed,
        data_dir=config.data_dir or None,
    )
    gan, recipe = _generators.gan(config, ours.family, images.shape)
    after = _generators.trained_on(
        gan,
        ours.generator,
        images,
        record,
        seed=ours.seed + 1000,
        num_steps=config.trained_on_steps,
        batch_size=recipe.batch_size,
    )
    return {"images": sampling.generate(after, _test_rng(ours), config.num_test)}


def _scored(config, record, ours, sources) -> dict[str, np.ndarray]:
    """Every statistic of all images: a stage. Arrays `{feature}-{set}` [n, 3] and
    `{network}-{set}` [n] odds, sets reference, calibration and the sources."""
    shown = f"{FAMILY_NAMES[ours.family]} {ours.seed}"
    found = record.stage(
        f"statistics-{ours.name}",
        lambda: _compute(config, record, ours, sources),
        text=f"{shown}: all statistics",
    )
    more = record.stage(
        f"activation_network-{ours.name}",
        lambda: _from_activations(config, record, ours, sources),
        text=f"{shown}: the network that reads activations",
    )
    return {**found, **more}


def _own_sets(config, ours, sources) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Own images that are fitted to; reference, calibration and test images by name of the set."""
    count, held = config.num_own, config.num_calibration
    own = sampling.generate(ours.generator, _attribution.own_rng(ours), count)
    # What `_attribution.tests` has for own test images lies behind these.
    more = sampling.generate(ours.generator, _attribution.own_rng(ours), 2 * held, first=count)
    return own, {"reference": more[:held], "calibration": more[held:], **sources}


def _compute(config, record, ours, sources) -> dict[str, np.ndarray]:
    own, sets = _own_sets(config, ours, sources)
    arrays: dict[str, np.ndarray] = {}
    with record.parts(ours.name) as progress:
        for kind in FEATURES:
            read = functools.partial(_features, config, ours, kind)
            fitted = one_class.fit(read(own), read(sets["reference"]))
            for place, (name, images) in enumerate(sets.items()):
                arrays[f"{kind}-{name}"] = one_class.statistics(fitted, read(images))
                progress(f"statistics of {kind}", place + 1, len(sets))
        for number, (name, others) in enumerate(_lookalikes(config, ours, own).items()):
            network = classifier.fit(
                jax.random.fold_in(jax.random.fold_in(jax.random.key(ours.seed), 8), number),
                own,
                others,
                ClassifierConfig(num_steps=config.classifier_steps),
                progress=functools.partial(_report, progress, name, config.classifier_steps),
            )
            for label, images in sets.items():
                arrays[f"{name}-{label}"] = one_class.odds(network, images)
    return arrays


def _from_activations(config, record, ours, sources) -> dict[str, np.ndarray]:
    """Odds of the network that reads activations: a stage of its own."""
    own, sets = _own_sets(config, ours, sources)
    read = functools.partial(_features, config, ours, "activations")
    settings = AttributorConfig(num_altered=config.num_altered)
    copies = perturbations.alter(
        own, ours.seed, attribution.num_altered_inverted(ours.layer, settings)
    )
    with record.parts(ours.name) as progress:
        network = classifier.fit(
            jax.random.fold_in(jax.random.key(ours.seed), 9),
            read(own),
            read(copies),
            ClassifierConfig(num_steps=config.classifier_steps),
            reads="activations",
            progress=functools.partial(
                _report, progress, "activations of altered copies", config.classifier_steps
            ),
        )
    return {
        f"altered_activations-{label}": one_class.odds(network, read(images))
        for label, images in sets.items()
    }


def _report(progress, name: str, total: int, done: int) -> None:
    progress(f"learning from {name}, steps", done, total)


def _lookalikes(config, ours, own: np.ndarray) -> dict[str, np.ndarray]:
    rng = jax.random.fold_in(jax.random.key(ours.seed), 5)
    return {
        "altered": perturbations.alter(own, ours.seed, config.num_altered),
        "impostors": impostors.generate(ours.generator, rng, config.num_impostors),
    }


def _features(config, ours, kind: str, images: np.ndarray) -> np.ndarray:
    """`[n, h, w, c]`: pixels in [-1, 1], targets before the last activation, or z' = z - z_bar."""
    if kind == "pixels":
        return np.asarray(data.to_float(images), np.float32)
    rows = []
    for start in range(0, len(images), 256):
        part = images[start : start + 256]
        if kind == "targets":
            rows.append(np.asarray(final_layer.targets(ours.layer, part)))
            continue
        z, _ = final_layer.invert(
            ours.layer,
            part,
            ours.z_bar,
            lam=config.lam,
            tol=config.tol,
            max_iters=config.max_iters,
            method="fista",
        )
        rows.append(np.asarray(z) - ours.z_bar)
    return np.concatenate(rows)


def _rows(arrays: Mapping[str, np.ndarray], sources: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Shown name of a row -> scores by set, from the statistics alone."""
    sets = ["reference", "calibration", *sources]

    def column(kind: str, number: int) -> dict[str, np.ndarray]:
        return {name: arrays[f"{kind}-{name}"][:, number] for name in sets}

    def alone(network: str) -> dict[str, np.ndarray]:
        return {name: arrays[f"{network}-{name}"] for name in sets}

    def together(kind: str, *networks: str) -> dict[str, np.ndarray]:
        values = {
            name: np.column_stack(
                [arrays[f"{kind}-{name}"], *(arrays[f"{network}-{name}"] for network in networks)]
            )
            for name in sets
        }
        reference = np.sort(values["reference"], axis=0).T
        return {name: one_class.fisher_sum(reference, found) for name, found in values.items()}

    rows = {}
    for kind in FEATURES:
        for number, statistic in enumerate(one_class.STATISTICS):
            rows[f"{_STATISTICS[statistic]}, {kind}"] = column(kind, number)
        rows[f"all three, {kind}"] = together(kind)
    rows["altered copies alone"] = alone("altered")
    rows["altered copies' activations alone"] = alone("altered_activations")
    rows["impostors alone"] = alone("impostors")
    for kind in FEATURES:
        rows[f"three and altered copies, {kind}"] = together(kind, "altered")
    learned = ("altered", "altered_activations")
    rows["one-class"] = together("activations", *learned)
    rows["one-class + impostors"] = together("activations", *learned, "impostors")
    return rows


# From own images, and with the generator's weights. A user's `fit` has them, and its own number of
# steps and its own threshold (`calibration.verdict_threshold`), where tables have the paper's.
DEFAULT_ROWS = ("one-class", "one-class + impostors")


def _summary(config, scores: Mapping[str, np.ndarray], groups: Mapping[str, str]):
    threshold = calibration.threshold(scores["calibration"], config.fnr)
    own = scores["own"]
    accuracy = {name: metrics.pair_accuracy(own, scores[name], threshold) for name in groups}
    auc = {name: metrics.auc(own, scores[name]) for name in groups}
    return _grouped(accuracy, auc, groups) | {"fnr": float(np.mean(~(own <= threshold)))}


def _grouped(accuracy, auc, groups: Mapping[str, str]) -> dict[str, Any]:
    """Means over the sources of each group; the mean over the groups that are rivals; the worst
    source among rivals."""
    by_group: dict[str, list[float]] = {}
    for name, group in groups.items():
        by_group.setdefault(group, []).append(accuracy[name])
    means = {group: float(np.mean(values)) for group, values in by_group.items()}
    rivals = {name: accuracy[name] for name, group in groups.items() if group in _RIVALS}
    worst = min(rivals, key=lambda name: rivals[name])
    return {
        "accuracy": means,
        "mean": float(np.mean([means[group] for group in _RIVALS if group in means])),
        "worst": rivals[worst],
        "worst_source": worst,
        "accuracy_by_source": {name: float(accuracy[name]) for name in groups},
        "auc": {name: float(auc[name]) for name in groups},
    }


def _columns(config, results, families) -> dict[str, dict[str, list[float]]]:
    """Row -> column -> a value per repeat, the mean over families."""
    found = results["families"]
    columns: dict[str, dict[str, list[float]]] = {}
    for row in found[families[0]][0]:
        repeats = [[found[family][i][row] for family in families] for i in range(len(config.seeds))]
        groups = [group for group in _GROUPS if group in repeats[0][0]["accuracy"]]
        columns[row] = {
            "mean": [float(np.mean([cell["mean"] for cell in cells])) for cells in repeats],
            **{
                _GROUPS[group]: [
                    float(np.mean([cell["accuracy"][group] for cell in cells])) for cells in repeats
                ]
                for group in groups
            },
            "fnr": [float(np.mean([cell["fnr"] for cell in cells])) for cells in repeats],
        }
    return columns


def _family_sets(config) -> dict[str, tuple[str, ...]]:
    held = tuple(family for family in _ours(config) if family in config.held_out)
    seen = tuple(family for family in _ours(config) if family not in config.held_out)
    sets = {"ours in choices": seen, "held out as ours": held}
    return {name: families for name, families in sets.items() if families}


def tables(config: Config, results: dict[str, Any]) -> list[report.Table]:
    """A table per set of families, and one of the default rows by family."""
    shown = []
    for title, families in _family_sets(config).items():
        columns = _columns(config, results, families)
        header = ["mean", *_GROUPS.values(), "fnr"]
        header = [name for name in header if name in next(iter(columns.values()))]
        shown.append(
            _tables.mean_table(
                f"accuracy, %: {', '.join(FAMILY_NAMES[family] for family in families)}",
                header,
                columns,
                caption=f"{title.capitalize()}. Mean: over {', '.join(_RIVALS)}.",
            )
        )
    rows = []
    for family, repeats in results["families"].items():
        for row in (*DEFAULT_ROWS, *(METHODS[method] for method in config.methods)):
            worst = min(repeats, key=lambda cell: cell[row]["worst"])[row]
            held = "held out" if family in config.held_out else ""
            means = _tables.mean_text([cell[row]["mean"] for cell in repeats])
            text = f"{100 * worst['worst']:.1f} ({worst['worst_source']})"
            rows.append([FAMILY_NAMES[family], held, row, means, text])
    shown.append(
        report.Table(
            ["ours", "", "detector", "mean accuracy, %", "worst source of all repeats, %"], rows
        )
    )
    return shown


def _write_page(config, record, results) -> None:
    every = _columns(config, results, _ours(config))
    shown = {
        row: {name: values for name, values in columns.items() if name in _GROUPS.values()}
        for row, columns in every.items()
        if row in DEFAULT_ROWS or row in METHODS.values() or row.startswith("all three")
    }
    chart = _tables.chart(shown, "repeats")
    report.save_figure(chart, record.figures / "accuracy.png")
    sections = [
        report.Section(
            "Result",
            [
                report.Picture(chart, "Accuracy by rival, mean over architectures."),
                *tables(config, results),
                f"Cells: mean over {len(config.seeds)} repeats, each the mean over architectures, "
                "and half the width of its 95 % interval.",
            ],
        ),
        report.Section(
            "Settings",
            [
                *_attribution.settings_texts(config, record),
                f"Here the one-class detector's statistics and networks were fitted to "
                f"{config.num_own} own images, {config.num_calibration} more gave the tail "
                f"probabilities. Ours trained on: {config.trained_on_steps} updates against a new "
                f"discriminator. Last layer jittered: by {config.last_layer_noise:g} of the "
                "kernel's standard deviation.",
            ],
        ),
    ]
    best = {row: columns for row, columns in every.items() if row in DEFAULT_ROWS}
    lead = "From own images alone, which statistic knows our images? " + "; ".join(
        f"{row}: {100 * np.mean(columns['mean']):.1f} %" for row, columns in best.items()
    )
    report.write_page(record.workdir / "report.html", "Detector study", sections, lead=lead)


def summary(metrics_found: dict[str, Any]) -> str:
    """The default rows by family, as the terminal shows them."""
    rows = []
    for family, repeats in metrics_found["families"].items():
        for row, first in repeats[0].items():
            if row in DEFAULT_ROWS or row in METHODS.values():
                cells = [repeat[row] for repeat in repeats]
                rows.append(
                    [FAMILY_NAMES[family], row, _tables.mean_text([c["mean"] for c in cells])]
                    + [
                        _tables.mean_text([c["accuracy"][group] for c in cells])
                        for group in first["accuracy"]
                    ]
                )
    groups = list(next(iter(metrics_found["families"].values()))[0][DEFAULT_ROWS[0]]["accuracy"])
    header = ["ours", "accuracy, %", "mean", *(_GROUPS[group] for group in groups)]
    return report.table_text(header, rows)
