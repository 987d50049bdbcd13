"""Figures 4, 7, 8, 9 and 10 of the FLIPAD paper: average features of every source.

One generator is ours. Images of all sources are averaged as images (Figure 8), as DCT features
(Figure 9) and as inverted activations in the channels that differ most (Figures 4 and 10), beside
our generator's mean activation. What the eye sees is also measured: how far a source's average is
from that of our own images, in units of what two halves of our own images differ by.

    python run.py --experiment=average_features
    python run.py --experiment=average_features --families=lsgan,dcgan,wgan_gp,ebgan
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _attribution, _generators, _plan
from experiments._config import Run, check_once, setting
from experiments._generators import FAMILY_NAMES
from flipad_jax import data, report
from flipad_jax.detection import features
from flipad_jax.generators import sampling
from flipad_jax.inversion.final_layer import invert


@dataclasses.dataclass(frozen=True)
class Config(_attribution.Sources):
    """Settings of the figures; the first architecture is ours, the first seed is taken."""

    seeds: tuple[int, ...] = setting((0,), "The first one is taken.", lower_bound=0)
    num_channels: int = setting(2, "Channels of the activation to draw.", lower_bound=1)


PRESETS = {
    "smoke": {**_attribution.SOURCES_SMOKE, "seeds": (0,), "num_test": 64},
    "demo": {},
    "paper": {**_attribution.SOURCES_PAPER, "seeds": (1,)},
}

_KINDS = {"images": "Figure 8", "dct": "Figure 9", "activations": "Figures 4 and 10"}
_BATCH = 128


def run(config: Config, record: Run) -> dict[str, Any]:
    """Averages and figures; returns the distances of the averages."""
    check_once(config, "seeds", "families")
    seed, family = config.seeds[0], config.families[0]
    generators = _generators.load(config, record, config.families, (seed,))
    ours = _attribution.model(config, record, family, seed, generators[family][seed])
    rivals = {f"{other}-{seed}": generators[other][seed] for other in config.families[1:]}
    sources = _attribution.tests(config, ours, rivals)
    shown = {"own": FAMILY_NAMES[family], "real": "real"}
    shown |= {f"{other}-{seed}": FAMILY_NAMES[other] for other in config.families[1:]}
    averages = record.stage(
        "averages",
        lambda: {
            f"{kind}.{name}": average
            for name, images in sources.items()
            for kind, average in _averages(config, ours, images).items()
        },
        text=f"averages of {config.num_test} images of {len(sources)} sources",
    )
    distances = {
        kind: {
            shown[name]: _distance(averages[f"{kind}.own"], averages[f"{kind}.{name}"])
            for name in sources
        }
        for kind in _KINDS
    }
    figures = _figures(config, ours, sources, averages, shown)
    for name, figure in figures.items():
        report.save_figure(figure, record.figures / f"{name}.png")
    _write_page(config, record, distances, figures, shown)
    return {"ours": ours.name, "distances": distances}


def _averages(config: Config, ours, images: np.ndarray) -> dict[str, np.ndarray]:
    """Mean features of both halves of the images, `[2, h, w, c]`, by kind."""
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in _KINDS}
    for half in (images[::2], images[1::2]):
        totals: dict[str, Any] = dict.fromkeys(_KINDS, 0.0)
        for start in range(0, len(half), _BATCH):
            batch = half[start : start + _BATCH]
            x = jnp.asarray(data.to_float(batch), jnp.float32)
            z, _ = invert(
                ours.layer,
                batch,
                ours.z_bar,
                lam=config.lam,
                tol=config.tol,
                max_iters=config.max_iters,
                method="fista" if config.tol == 0 else "primal_dual",
            )
            parts = {"images": x, "dct": features.log_dct(x), "activations": z}
            for kind, part in parts.items():
                totals[kind] = totals[kind] + np.asarray(part.sum(axis=0), np.float64)
        for kind, total in totals.items():
            found[kind].append(total / len(half))
    return {kind: np.stack(halves).astype(np.float32) for kind, halves in found.items()}


def _distance(own: np.ndarray, other: np.ndarray) -> float:
    """Distance of the averages, in units of that between the halves of our own images.

    Each average is of as many images as a half; for own images against themselves it is 1.
    """
    unit = np.linalg.norm(own[0] - own[1])
    if other is own:
        return 1.0
    return float(np.sqrt(np.mean([np.sum((a - b) ** 2) for a in own for b in other])) / unit)


def _figures(config: Config, ours, sources, averages, shown) -> dict[str, Any]:
    def means(kind, channels=slice(None)):
        return {shown[s]: averages[f"{kind}.{s}"].mean(axis=0)[..., channels] for s in sources}

    counts = {shown[name]: len(images) for name, images in sources.items()}
    activation = means("activations")
    own = activation[shown["own"]]
    others = np.stack([value for name, value in activation.items() if name != shown["own"]])
    differ = features.select_channels(
        jnp.asarray(own), jnp.asarray(others.mean(axis=0)), config.num_channels
    )
    channels = [int(channel) for channel in differ]
    return {
        "samples": report.image_grid(
            {shown[name]: images[:12] for name, images in sources.items()}, num_columns=12
        ),
        "average_images": report.average_activations(means("images"), None, counts=counts),
        "average_dct": report.average_activations(means("dct"), None, counts=counts),
        "average_activations": report.average_activations(
            means("activations", channels),
            ours.z_bar[..., channels],
            channels=channels,
            counts=counts,
        ),
    }


def _table(distances: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    names = list(next(iter(distances.values())))
    rows: list[list[Any]] = [[kind, *row.values()] for kind, row in distances.items()]
    return ["average", *names], rows


def _write_page(config, record, distances, figures, shown) -> None:
    header, rows = _table(distances)
    table = report.Table(
        header,
        rows,
        formats=dict.fromkeys(header[1:], ".1f"),
        caption="Distance from the average of our own images; 1 is that between two halves of "
        "these.",
    )
    captions = {
        "average_activations": "Average inverted activation in the channels that differ most, and "
        "our generator's mean activation (Figures 4 and 10).",
        "average_images": "Average image, a row per colour (Figure 8).",
        "average_dct": "Average log-DCT, a row per colour (Figure 9).",
        "samples": "Samples of every source (Figure 7).",
    }
    pictures = [report.Picture(figures[name], text) for name, text in captions.items()]
    report.write_page(
        record.workdir / "report.html",
        "Average features",
        [
            report.Section("How far apart", [table]),
            report.Section("Averages", pictures[:3]),
            report.Section("Samples", pictures[3:]),
            report.Section("Settings", [_attribution.sources_text(config)]),
        ],
        lead=f"Ours is {shown['own']}. In which features do averages of other sources differ from "
        "ours?",
    )


def summary(metrics: dict[str, Any]) -> str:
    """Distances of the averages, as the terminal shows them."""
    header, rows = _table(metrics["distances"])
    return report.table_text(header, rows, formats=dict.fromkeys(header[1:], ".1f"))


def plan(config: Config) -> list[_plan.Stage]:
    """Stages for `--plan`: generators and inversions."""
    one_seed = dataclasses.replace(config, seeds=config.seeds[:1])
    stages = [_generators.plan(one_seed, family) for family in config.families]
    images = _plan.training_images(config.dataset, config.image_size, config.num_gan_images)
    gan, _ = _generators.gan(config, config.families[0], images.shape)
    layer = jax.eval_shape(sampling.final_layer, _plan.abstract_generator(gan))
    num_images = config.num_test * (len(config.families) + 1)
    return [*stages, _plan.inversion(layer, num_images, max_iters=config.max_iters, tol=config.tol)]
