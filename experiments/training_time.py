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
from flipad_jax.registry.user_generators import KeyedConfig

_PERTURBATIONS = ("blur", "crop", "noise", "jpeg", "combination")
_PAPER = {
    "MNIST": (1.77, None, 14, 4.12, 3.96, 4.19, 5.71, 5.12),
    "CelebA": (5.31, None, 15, 10.33, 9.56, 10.35, 10.25, 10.76),
}


@dataclasses.dataclass(frozen=True)
class Config(_keyed.ModelSettings):
    """Settings of Table 4."""

    num_users: int = setting(20, "Keys that are found at once.", lower_bound=2)
    robust_steps: int = setting(300, "Updates by eq. 12.", lower_bound=1)


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {**_keyed.SMOKE_MODELS, "robust_steps": 8},
    "demo": {},
    "paper": {**_keyed.PAPER_MODELS, "robust_steps": 37_500},
}


def run(config: Config, record: Run) -> dict[str, Any]:
    """Time everything once; returns seconds."""
    _keyed.check(config)
    root = _keyed.load_root(config)
    images = _keyed.load_images(config, root, num_validation=config.num_search)
    sequential, joint = config.key_config("sequential"), config.key_config("joint")
    seconds: dict[str, float] = {}

    def timed(name: str, stage: str, warm_up: Callable, call: Callable, share: int = 1) -> None:
        """Time a call in a stage of its own, after one that compiles the same programs."""

        def compute():
            warm_up()
            start = time.monotonic()
            call()
            return {"seconds": np.asarray((time.monotonic() - start) / share)}

        seconds[name] = float(record.stage(stage, compute, text=name)["seconds"])

    def sequential_keys(num_steps: int) -> np.ndarray:
        chosen = dataclasses.replace(sequential, num_steps=num_steps)
        return user_keys.sequential(key_rng, images.train, images.generated, 1, config=chosen)

    def joint_keys(num_keys: int) -> np.ndarray:
        return user_keys.joint(key_rng, images.train, images.generated, num_keys, config=joint)

    def search(matching: KeyedConfig) -> user_generators.Searched:
        return user_generators.search(
            root,
            keys,
            images.validation,
            _keyed.rng(config, 2),
            matching,
            num_images=config.num_search,
        )

    def robust(num_steps: int, name: str) -> None:
        settings = config.keyed_config(num_steps=num_steps)
        start = user_generators.init(root, 1, settings)
        perturb = differentiable.draw(name)
        user_generators.train_robust(root, start, keys, _keyed.rng(config, 5), settings, perturb)

    key_rng = _keyed.rng(config, 1)
    steps = config.key_steps
    timed(
        "key, eq. 9",
        "key",
        functools.partial(sequential_keys, steps),  # its steps are one program
        functools.partial(sequential_keys, steps),
    )
    keys = record.stage("keys", lambda: {"keys": joint_keys(config.num_users)})["keys"][:1]
    timed(
        "key, all at once",
        "joint_keys",
        functools.partial(joint_keys, config.num_users),
        functools.partial(joint_keys, config.num_users),
        share=config.num_users,
    )
    matching = config.keyed_config()
    short = dataclasses.replace(matching, num_steps=2, max_rounds=1)
    timed("model", "model", lambda: search(short), lambda: search(matching))
    for name in _PERTURBATIONS:
        timed(
            name,
            f"robust-{name}",
            functools.partial(robust, 2, name),
            functools.partial(robust, config.robust_steps, name),
        )
    results = {
        "seconds": seconds,
        "num_keys": config.num_users,
        "steps": {
            "key": config.key_steps,
            "model": config.num_steps,
            "robust": config.robust_steps,
        },
    }
    _write_page(config, record, results, images)
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
            caption=f"Here: {results['num_keys']} keys at once, {results['steps']['key']} steps "
            f"for keys, Algorithm 1 in rounds of {results['steps']['model']} updates, "
            f"{results['steps']['robust']} robust updates.",
        )
    ]


def _write_page(config, record, results, images) -> None:
    sections = [
        report.Section("Table 4", tables(results)),
        report.Section(
            "Settings",
            [
                _keyed.keys_text(config, images, "sequential"),
                _keyed.keys_text(config, images, "joint"),
                _keyed.models_text(config, images),
            ],
        ),
    ]
    lead = "What a registry pays for one more user."
    report.write_page(record.workdir / "report.html", "Training time", sections, lead=lead)


def summary(metrics: dict[str, Any]) -> str:
    """Table 4, as the terminal shows it."""
    return "\n\n".join(report.table_text(t.header, t.rows) for t in tables(metrics))
