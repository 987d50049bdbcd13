"""Figures 6 and 7 of the decentralized attribution paper: which keys disturb images least.

A shift must be as long as d_max(phi), the largest response of the data. The paper asks whether that
can be read off the generator: M = E[J] E[J]^T, J the Jacobian of an image by the weights, has large
eigenvalues along pictures and small ones along noise, and d_max grows with phi^T M phi. Here: the
correlation of the two over many keys, eigenvectors at both ends, models keyed by them, and models
of the keys with the smallest and the largest d_max.

    python run.py --experiment=key_quality
"""

import dataclasses
from typing import Any

import numpy as np
from scipy import stats

from experiments import _keyed
from experiments._config import Run, setting
from flipad_jax import frechet, report
from flipad_jax.registry import attributability, sensitivity


@dataclasses.dataclass(frozen=True)
class Config(_keyed.Settings):
    """Settings of Figures 6 and 7."""

    num_users: int = setting(100, "Keys that the correlation is over.", lower_bound=4)
    key_method: str = setting(
        "sequential",
        "Eq. 9 as in the paper; joint keys have no long d_max to foretell.",
        choices=_keyed.KEY_METHODS,
    )
    num_eigenvectors: int = setting(2, "At each end of the spectrum.", lower_bound=1)
    num_latents: int = setting(256, "That the mean Jacobian is over.", lower_bound=1)
    spectrum_tol: float = setting(1e-3, "Of the Lanczos iteration.", lower_bound=1e-6)


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        **_keyed.SMOKE,
        "num_users": 6,
        "num_eigenvectors": 1,
        "num_latents": 16,
        "spectrum_tol": 0.1,
        "max_rounds": 1,
    },
    "demo": {},
    "paper": {**_keyed.PAPER, "num_latents": 5000},
}

_PAPER = {"MNIST": 0.33, "CelebA": 0.53}


def run(config: Config, record: Run) -> dict[str, Any]:
    """Correlation, spectrum, models of extreme keys; returns their numbers."""
    _keyed.check(config)
    root = _keyed.load_root(config)
    sensitivity.check(root, config.num_eigenvectors)
    images = _keyed.load_images(
        config, root, num_validation=config.num_search, num_test=config.num_test
    )
    real = _keyed.frechet_statistics(config, images.test)
    keys = _keyed.make_keys(config, record, images, config.num_users, config.key_method)
    root_images = _keyed.root_test_images(config, root, config.num_test)
    d_max = attributability.extent(keys, [images.test, root_images]).d_max
    forms = record.stage(
        "quadratic_forms",
        lambda: {
            "values": sensitivity.quadratic_form(
                root, keys, _keyed.rng(config, 8), num_latents=config.num_latents
            )
        },
        text=f"phi^T M phi of {len(keys)} keys",
    )["values"]
    found = stats.pearsonr(forms, d_max)
    interval = found.confidence_interval()
    spectrum = record.stage(
        "spectrum", lambda: _spectrum(config, record, root), text="spectrum of M"
    )
    ends = np.concatenate([spectrum["largest_vectors"], spectrum["smallest_vectors"]])
    ends = _facing_away(ends, images)
    order = np.argsort(d_max)
    special = {
        "smallest d_max": keys[order[0]],
        "largest d_max": keys[order[-1]],
        **{_name(i, config): vector for i, vector in enumerate(ends)},
    }
    special_keys = np.stack(list(special.values()))
    models = []
    for index, name in enumerate(special):
        # One at a time: these keys are no registry, eigenvectors and keys may be close.
        models += _keyed.make_models(
            config,
            record,
            root,
            images,
            special_keys[index : index + 1],
            name=f"special-{index}",
        )
    extent = attributability.extent(special_keys, [images.test, root_images])
    rows = {}
    shown = {"root": root_images[:12]}
    for index, (name, model) in enumerate(zip(special, models)):
        measured = _keyed.measure(
            config,
            record,
            root,
            special_keys[index : index + 1],
            model.generator,
            0,
            model.gamma,
            real,
            name=f"measured-special-{index}",
        )
        real_responses = attributability.responses(special_keys[index : index + 1], images.test)
        rows[name] = {
            "d_max": extent.d_max[index],
            "compliance": extent.compliance[index],
            "gamma": model.gamma,
            "distinguishability": attributability.distinguishability(
                measured.responses[:, 0], real_responses[:, 0]
            ),
            "shift": measured.shift.mean,
            "distance": measured.distance,
        }
        picture = report.signed_pictures(special_keys[index : index + 1])
        shown[name] = np.concatenate([picture, measured.images[:11]])
    results = {
        "correlation": found.statistic,
        "correlation_interval": [interval.low, interval.high],
        "num_keys": len(keys),
        "d_max": d_max,
        "quadratic_form": forms,
        "largest": spectrum["largest"],
        "smallest": spectrum["smallest"],
        "residual": float(spectrum["residual"]),
        "models": rows,
        "root_distance": frechet.distance(_keyed.frechet_statistics(config, root_images), real),
        "features": _keyed.features_name(config),
    }
    _write_page(config, record, results, shown, images)
    return results


def _spectrum(config: Config, record: Run, root) -> dict[str, Any]:
    with record.progress(1, "products with M") as bar:
        found = sensitivity.spectrum(
            root,
            _keyed.rng(config, 9),
            num_vectors=config.num_eigenvectors,
            num_latents=config.num_latents,
            tol=config.spectrum_tol,
        )
        bar.update()
    return found._asdict()


def _facing_away(vectors: np.ndarray, images: _keyed.Images) -> np.ndarray:
    """Each vector with the sign that has most real images on its negative side."""
    found = attributability.responses(vectors, images.train)
    signs = np.where((found < 0).mean(axis=0) >= 0.5, 1, -1)
    return vectors * signs[:, None, None, None].astype(np.float32)


def _name(index: int, config: Config) -> str:
    if index < config.num_eigenvectors:
        return f"eigenvector {index + 1}"
    return f"eigenvector {index - config.num_eigenvectors + 1} from the end"


def tables(results: dict[str, Any]) -> list[report.Table]:
    """Models of extreme keys; the correlation beside the paper's."""
    header = ["key", "d_max", "compliant", "gamma", "D", "E||dx||", "distance"]
    rows = [
        [
            name,
            f"{row['d_max']:.2f}",
            f"{row['compliance']:.1%}",
            f"{row['gamma']:.2f}",
            f"{row['distinguishability']:.3f}",
            f"{row['shift']:.2f}",
            f"{row['distance']:.2f}",
        ]
        for name, row in results["models"].items()
    ]
    low, high = results["correlation_interval"]
    correlation = [
        ["here", f"{results['correlation']:.2f} [{low:.2f}, {high:.2f}]", results["num_keys"]],
        *([f"the paper, {name}", f"{value:.2f}", 100] for name, value in _PAPER.items()),
    ]
    return [
        report.Table(
            ["correlation of d_max and phi^T M phi", "Pearson", "keys"],
            correlation,
            caption="In brackets: 95 % interval.",
        ),
        report.Table(
            header,
            rows,
            caption=f"Distances are of {results['features']}; that of the root is "
            f"{results['root_distance']:.2f}.",
        ),
    ]


def _write_page(config, record, results, shown, images) -> None:
    scatter = report.scatter_panels(
        [
            report.Panel(
                "What decides the length of a shift",
                "phi^T M phi",
                "d_max",
                {"keys": (results["quadratic_form"], results["d_max"])},
            )
        ]
    )
    samples = report.image_grid(shown, num_columns=12)
    report.save_figure(scatter, record.figures / "correlation.png")
    report.save_figure(samples, record.figures / "samples.png")
    values = ", ".join(f"{v:.3g}" for v in results["largest"])
    small = ", ".join(f"{v:.3g}" for v in results["smallest"])
    sections = [
        report.Section(
            "Can d_max be foretold?",
            [report.Picture(scatter, "A point per key."), tables(results)[0]],
        ),
        report.Section(
            "Extreme keys (Figures 6 and 7)",
            [
                tables(results)[1],
                report.Picture(samples, "The key (first picture), images of its model."),
                f"Largest eigenvalues of M: {values}; smallest: {small}; ||M v - lambda v|| is at "
                f"most {results['residual']:.1g} of the largest.",
            ],
        ),
        report.Section(
            "Settings",
            [
                _keyed.keys_text(config, images, config.key_method),
                _keyed.models_text(config, images),
                _keyed.measured_text(config, images),
                f"The mean Jacobian is over {config.num_latents} latents. The interval of the "
                "correlation takes keys for independent draws; eq. 9 makes each depend a little on "
                "those before it.",
            ],
        ),
    ]
    lead = "Which keys leave the images alone, and whether the generator knows it beforehand."
    report.write_page(record.workdir / "report.html", "Quality of keys", sections, lead=lead)


def summary(metrics: dict[str, Any]) -> str:
    """Correlation and models, as the terminal shows them."""
    return "\n\n".join(report.table_text(t.header, t.rows) for t in tables(metrics))
