"""Table 4 of the decentralized attribution paper: how long a key and a keyed model take.

A key by eq. 9, a key among all found at once, a model by Algorithm 1, a model made robust by eq. 12
to each perturbation. Every program is compiled and has run once before it is timed; the clock stops
when the result is there. The paper's minutes are of a V100 and 64 x 64 images.

    python run.py --experiment=training_time
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments import _keyed
from experiments._config import Run, setting
from flipad_jax import report
from flipad_jax.perturbations import differentiable
from flipad_jax.registry import user_generators, user_keys

_PERTURBATIONS = ("blur", "crop", "noise", "jpeg", "combination")
_PAPER = {
    "MNIST": (1.77, None, 14, 4.12, 3.96, 4.19, 5.71, 5.12),
    "CelebA": (5.31, None, 15, 10.33, 9.56, 10.35, 10.25, 10.76),
}


@dataclasses.dataclass(frozen=True)
class Config(_keyed.Settings):
    """Settings of Table 4; `num_users` is the number of keys that are found at once."""

    robust_steps: int = setting(300, "Updates by eq. 12.", lower_bound=1)


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {**_keyed.SMOKE, "robust_steps": 8},
    "demo": {},
    "paper": {**_keyed.PAPER, "robust_steps": 37_500},
}


def run(config: Config, record: Run) -> dict[str, Any]:
    """Time everything once; returns seconds."""
    _keyed.check(config)
    root = _keyed.load_root(config)
    images = _keyed.load_images(config, root)
    sequential = dataclasses.replace(config, key_method="sequential").key_config()
    joint = dataclasses.replace(config, key_method="joint").key_config()
    seconds: dict[str, float] = {}
    keys: np.ndarray | None = None

    def timed(name: str, call: Callable[[], Any], share: int = 1) -> Any:
        call()  # compiles
        start = time.monotonic()
        found = call()
        seconds[name] = (time.monotonic() - start) / share
        return found

    with record.progress(2 + 1 + len(_PERTURBATIONS), "timing") as bar:
        key_rng = _keyed.rng(config, 1)
        timed(
            "key, eq. 9",
            lambda: user_keys.sequential(
                key_rng, images.train, images.generated, 1, config=sequential
            ),
        )
        bar.update()
        keys = timed(
            "key, all at once",
            lambda: user_keys.joint(
                key_rng, images.train, images.generated, config.num_users, config=joint
            ),
            share=config.num_users,
        )
        bar.update()
        config_10 = config.keyed_config()
        found = timed(
            "model",
            lambda: user_generators.search(
                root,
                keys[:1],
                images.validation,
                _keyed.rng(config, 2),
                config_10,
                num_images=config.num_search,
            ),
        )
        bar.update()
        config_12 = config.keyed_config(num_steps=config.robust_steps)
        start = user_generators.init(root, 1, config_12)._replace(params=found.state.params)
        for name in _PERTURBATIONS:
            robust = functools.partial(
                user_generators.train_robust,
                root,
                start,
                keys[:1],
                _keyed.rng(config, 5),
                config_12,
                differentiable.draw(name),
            )
            timed(name, robust)
            bar.update()
    results = {
        "seconds": seconds,
        "rounds": int(found.rounds[0]),
        "num_keys": config.num_users,
        "steps": {
            "key": config.key_steps,
            "model": config.num_steps,
            "robust": config.robust_steps,
        },
    }
    _write_page(config, record, results)
    return results


def tables(results: dict[str, Any]) -> list[report.Table]:
    """Table 4: minutes."""
    names = list(results["seconds"])
    here = [f"{value / 60:.3g}" for value in results["seconds"].values()]
    rows: list[list[Any]] = [["here", *here]]
    for name, cells in _PAPER.items():
        rows.append([f"the paper, {name}", *(None if v is None else f"{v:g}" for v in cells)])
    return [
        report.Table(
            ["minutes", *names],
            rows,
            caption=f"Here: {results['num_keys']} keys at once, {results['rounds']} rounds of "
            f"Algorithm 1 of {results['steps']['model']} updates, {results['steps']['key']} steps "
            f"for keys, {results['steps']['robust']} robust updates.",
        )
    ]


def _write_page(config, record, results) -> None:
    sections = [
        report.Section("Table 4", tables(results)),
        report.Section("Settings", [_keyed.settings_text(config)]),
    ]
    lead = "What a registry pays for one more user."
    report.write_page(record.workdir / "report.html", "Training time", sections, lead=lead)


def summary(metrics: dict[str, Any]) -> str:
    """Table 4, as the terminal shows it."""
    return "\n\n".join(report.table_text(t.header, t.rows) for t in tables(metrics))
