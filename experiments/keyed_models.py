"""Table 1 and Figure 2 of the decentralized attribution paper: keyed models and their theorems.

Users get keys at right angles and a model each by Algorithm 1. Measured: distinguishability D,
attributability A(G), the length of the shift in both readings of eq. 3, the price in Frechet
distance; and what Theorems 1 and 2 ask for and promise, computed from the same models. Then the
same for a few users whose keys are 45 degrees apart, where attribution breaks down.

    python run.py --experiment=keyed_models
    python run.py --experiment=keyed_models --root=FILE --dataset=photos
"""

import dataclasses
from typing import Any

import numpy as np

from experiments import _keyed
from experiments._config import Run, setting
from flipad_jax import frechet, report
from flipad_jax.registry import attributability, user_keys

_COSINE_45 = float(np.sqrt(0.5))

# The paper's Table 1: D, A(G), ||dx||, FID_0, FID.
_PAPER = {
    "MNIST, orthogonal": ("0.99", "0.99", "3.97 (0.29)", "7.82 (0.15)", "10.43 (0.77)"),
    "MNIST, 45 degrees": ("0.99", "0.13", "3.85 (0.12)", "", "11.02 (0.86)"),
    "CelebA, orthogonal": ("0.99", "0.93", "4.04 (0.32)", "35.95 (0.12)", "58.69 (5.21)"),
    "CelebA, 45 degrees": ("0.99", "0.15", "4.57 (0.35)", "", "59.81 (5.34)"),
}


@dataclasses.dataclass(frozen=True)
class Config(_keyed.Settings):
    """Settings of Table 1."""

    together: int = setting(
        1, "Models that are trained in one program; a CPU trains them in turn.", lower_bound=1
    )
    num_acute: int = setting(5, "Models whose keys are 45 degrees apart; 0: none.", lower_bound=0)


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {**_keyed.SMOKE, "num_acute": 2},
    "demo": {},
    "paper": {**_keyed.PAPER, "together": 20, "num_acute": 20},
}


def run(config: Config, record: Run) -> dict[str, Any]:
    """Both sets of keys and models; returns everything that the table and the figure show."""
    _keyed.check(config)
    if config.num_acute == 1:
        raise ValueError("--num_acute=1: an angle needs two keys; 0 leaves them out")
    root = _keyed.load_root(config)
    _keyed.check_room(config, root, f"--num_users={config.num_users}", config.num_users)
    if config.num_acute:  # They share a direction beside their own.
        _keyed.check_room(config, root, f"--num_acute={config.num_acute}", config.num_acute + 1)
    images = _keyed.load_images(
        config, root, num_validation=config.num_search, num_test=config.num_test
    )
    real = _keyed.frechet_statistics(config, images.test)
    root_images = _keyed.root_test_images(config, root, config.num_test)
    root_distance = frechet.distance(_keyed.frechet_statistics(config, root_images), real)
    sets = {"orthogonal": (config.num_users, 0.0)}
    if config.num_acute:
        sets["45 degrees"] = (config.num_acute, _COSINE_45)
    results: dict[str, Any] = {"root_distance": root_distance, "features": None, "sets": {}}
    results["features"] = _keyed.features_name(config)
    drawn: dict[str, Any] = {}
    for angle, (count, cosine) in sets.items():
        prefix = "" if angle == "orthogonal" else "acute_"
        keys = _keyed.make_keys(
            config, record, images, count, config.key_method, cosine=cosine, name=f"{prefix}keys"
        )
        models = _keyed.make_models(
            config,
            record,
            root,
            images,
            keys,
            together=config.together,
            name=f"{prefix}model",
        )
        measured = [
            _keyed.measure(
                config,
                record,
                root,
                keys,
                model.generator,
                index,
                model.gamma,
                real,
                name=f"{prefix}measured-{index}",
            )
            for index, model in enumerate(models)
        ]
        results["sets"][angle] = _described(config, keys, models, measured, images, root_images)
        drawn[angle] = (keys, measured)
    _write_page(config, record, results, drawn, images, root_images)
    return results


def _described(config, keys, models, measured, images, root_images) -> dict[str, Any]:
    """Numbers of one set of keys: measured, asked for, promised."""
    gammas = np.array([model.gamma for model in models])
    real_responses = attributability.responses(keys, images.test)
    own = [found.responses[:, i] for i, found in enumerate(measured)]
    by_model = [
        float(((f.responses[:, i] > 0) & (np.delete(f.responses, i, axis=1) <= 0).all(1)).mean())
        for i, f in enumerate(measured)
    ]
    extent = attributability.extent(keys, [images.test, root_images])
    errors = [found.error for found in measured]
    certificate = attributability.certify(keys, gammas, extent, errors)
    sigma = np.array([error.std[i] for i, error in enumerate(errors)])
    mean = np.array([error.mean[i] for i, error in enumerate(errors)])
    allowed = [
        attributability.allowed_cosine(
            extent.d_min[j], extent.d_max[j], sigma[j], mean[j], config.delta
        )
        for j in range(len(keys))
    ]
    described = user_keys.describe(keys, images.test, root_images)
    return {
        "gamma": gammas,
        "rounds": [model.rounds for model in models],
        "reached": [model.reached for model in models],
        "seconds": [model.seconds for model in models],
        "distinguishability": [
            attributability.distinguishability(own[i], real_responses[:, i])
            for i in range(len(keys))
        ],
        "model_attributability": by_model,
        "attributability": attributability.attributability(f.responses for f in measured),
        "shift_of_mean": [found.shift.of_mean for found in measured],
        "shift_mean": [found.shift.mean for found in measured],
        "distance": [found.distance for found in measured],
        "compliance": described.compliance,
        "largest_cosine": described.largest_cosine,
        "d_min": extent.d_min,
        "d_max": extent.d_max,
        "required_gamma": attributability.required_gamma(extent.d_max, sigma, mean, config.delta),
        # Figure 2b: the smallest over earlier keys; of the first key there is none.
        "allowed_cosine": [float(np.min(allowed[:i])) for i in range(1, len(keys))],
        "smallest_allowed_cosine": float(np.min(allowed)),
        "sigma": sigma,
        "key_mean": mean,
        "certified_distinguishability": certificate.distinguishability,
        "certified_attributability": certificate.attributability,
    }


def tables(results: dict[str, Any]) -> list[report.Table]:
    """Table 1 in the paper's layout, the theorems, and the paper's own."""
    header = ["angle", "models", "D", "A(G)", "||dx||", "E||dx||", "distance of G_0", "distance"]
    rows: list[list[Any]] = []
    theorem_rows: list[list[Any]] = []
    for angle, found in results["sets"].items():
        rows.append(
            [
                angle,
                len(found["gamma"]),
                _keyed.mean_std(found["distinguishability"]),
                f"{found['attributability']:.2f}",
                _keyed.mean_std(found["shift_of_mean"]),
                _keyed.mean_std(found["shift_mean"]),
                f"{results['root_distance']:.2f}" if not theorem_rows else None,
                _keyed.mean_std(found["distance"]),
            ]
        )
        asked = np.asarray(found["required_gamma"])
        theorem_rows.append(
            [
                angle,
                _keyed.mean_std(found["gamma"]),
                _keyed.mean_std(asked.tolist()),
                f"{(np.asarray(found['gamma']) >= asked).mean():.0%}",
                f"{found['smallest_allowed_cosine']:.3f}",
                f"{max(found['largest_cosine']):.3f}",
                f"{min(found['certified_distinguishability']):.3f}",
                f"{found['certified_attributability']:.3f}",
            ]
        )
    paper = [[name, *(cell or None for cell in cells)] for name, cells in _PAPER.items()]
    return [
        report.Table(
            header,
            rows,
            caption="Mean and standard deviation over models; distances are of "
            f"{results['features']}.",
        ),
        report.Table(
            [
                "angle",
                "gamma",
                "gamma asked for (eq. 6)",
                "long enough",
                "cosine allowed (eq. 7)",
                "largest cosine",
                "D promised",
                "A(G) promised",
            ],
            theorem_rows,
            caption="Promised: lower bounds for the models as they are, smallest over models for "
            "D. They are 0 where a key is not compliant on all the data.",
        ),
        report.Table(
            ["the paper's Table 1", "D", "A(G)", "||dx||", "FID of G_0", "FID"],
            paper,
            caption="Other data, other sizes, other features: to compare shapes, not digits.",
        ),
    ]


def _figure_2(results: dict[str, Any]) -> Any:
    sets = results["sets"]
    ids = {angle: np.arange(len(found["gamma"])) for angle, found in sets.items()}

    def by_model(key: str, shift: int = 0) -> dict[str, Any]:
        return {angle: (ids[angle][shift:], found[key]) for angle, found in sets.items()}

    model = "model"
    return report.scatter_panels(
        [
            report.Panel(
                "(a) Theorem 1",
                "asked for by eq. 6",
                "gamma",
                {angle: (found["required_gamma"], found["gamma"]) for angle, found in sets.items()},
                diagonal=True,
            ),
            report.Panel(
                "(b) cosine that eq. 7 allows",
                model,
                "smallest over earlier keys",
                by_model("allowed_cosine", 1),
                level=0.0,
            ),
            report.Panel("(e) distinguishability", model, "D", by_model("distinguishability")),
            report.Panel("(f) attributability", model, "share", by_model("model_attributability")),
            report.Panel("(g) length of the shift", model, "gamma", by_model("gamma")),
            report.Panel("(h) largest cosine", model, "with any key", by_model("largest_cosine")),
        ]
    )


def _write_page(config, record, results, drawn, images, root_images) -> None:
    keys, measured = drawn["orthogonal"]
    shown = min(len(keys), 6)
    rows = {"root": root_images[:12]}
    for i in range(shown):
        rows[f"user {i + 1}"] = np.concatenate(
            [report.signed_pictures(keys[i : i + 1]), measured[i].images[:11]]
        )
    samples = report.image_grid(rows, num_columns=12)
    figure_2 = _figure_2(results)
    errors = {}
    for i in range(min(2, len(measured))):
        errors[f"mu, model {i + 1}"] = measured[i].error_mean
        errors[f"diag Sigma, model {i + 1}"] = measured[i].error_variance
    statistics = report.histograms(errors, "per pixel")
    for name, figure in (("figure_2", figure_2), ("samples", samples), ("errors", statistics)):
        report.save_figure(figure, record.figures / f"{name}.png")
    table_1, theorems, paper = tables(results)
    sections = [
        report.Section("Table 1", [table_1, paper]),
        report.Section("What the theorems say", [theorems]),
        report.Section(
            "Figure 2",
            [
                report.Picture(figure_2, "Every model: asked for and had, measured and allowed."),
                report.Picture(statistics, "(c, d) Error of two models, per pixel (eq. 11)."),
            ],
        ),
        report.Section(
            "Keys and images (Figure 3)",
            [report.Picture(samples, "The key (first picture of a row), images of its model.")],
        ),
        report.Section(
            "Settings",
            [
                _keyed.keys_text(config, images, config.key_method),
                _keyed.models_text(config, images),
                _keyed.measured_text(config, images),
            ],
        ),
    ]
    found = results["sets"]["orthogonal"]
    lead = (
        f"{len(found['gamma'])} copies of one generator, each with a key of its own: D "
        f"{np.mean(found['distinguishability']):.3f} on average, "
        f"{found['attributability']:.1%} of all images are attributed to their own copy alone."
    )
    report.write_page(record.workdir / "report.html", "Keyed models", sections, lead=lead)


def summary(metrics: dict[str, Any]) -> str:
    """Table 1 and the theorems, as the terminal shows them."""
    return "\n\n".join(report.table_text(table.header, table.rows) for table in tables(metrics)[:2])
