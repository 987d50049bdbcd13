"""Tables 2, 5 and 6 of the decentralized attribution paper: keyed models that stand processing.

Every model of Algorithm 1 is trained on by eq. 12, its images blurred, cropped, made noisy,
recompressed, or all of that, in half of the batches. Distinguishability and attributability of
images so treated, before and after that training, and what it costs: length of the shift, Frechet
distance. A test treats all images, real ones too, as strongly as training ever did; where JPEG is
part of it, once by the differentiable codec that training saw and once by the real one.

    python run.py --experiment=robust_training
    python run.py --experiment=robust_training --qualities=10,100,1000 --num_users=5
    python run.py --experiment=robust_training --key_bandwidth=0    # the paper's keys
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _keyed
from experiments._config import Run, check_once, setting
from flipad_jax import data, perturbations, report
from flipad_jax.generators import sampling
from flipad_jax.perturbations import differentiable
from flipad_jax.registry import attributability, user_generators

_SHOWN = {
    "blur": "blurring",
    "crop": "cropping",
    "noise": "noise",
    "jpeg": "JPEG",
    "combination": "combination",
}
_BATCH = 250

# The paper's tables on DCGANs, perturbations in the order of `_SHOWN`. D and A(G) before / after
# robust training; Table 6 has its baseline first. At C = 10 its rows, and those of A(G) in Table 5,
# are what Table 2 has.
_TABLE_2 = """
D    MNIST    10 0.49/0.96 0.52/0.99 0.85/0.99 0.54/0.99 0.50/0.66
D    CelebA   10 0.49/0.99 0.49/0.99 0.95/0.98 0.51/0.99 0.50/0.85
A(G) MNIST    10 0.02/0.94 0.03/0.88 0.77/0.95 0.16/0.98 0.00/0.26
A(G) CelebA   10 0.00/0.98 0.00/0.99 0.89/0.93 0.07/0.98 0.00/0.70
"""
_TABLE_5 = """
D    MNIST    10 0.49/0.97 0.51/0.99 0.84/0.99 0.53/0.99 0.50/0.63
D    MNIST   100 0.49/0.61 0.51/0.98 0.76/0.98 0.53/0.99 0.50/0.52
D    MNIST  1000 0.49/0.50 0.51/0.81 0.69/0.91 0.53/0.97 0.50/0.51
D    CelebA   10 0.49/0.99 0.49/0.99 0.96/0.99 0.50/0.99 0.49/0.85
D    CelebA  100 0.50/0.96 0.49/0.99 0.92/0.93 0.50/0.99 0.49/0.61
D    CelebA 1000 0.50/0.62 0.49/0.97 0.88/0.91 0.50/0.99 0.49/0.51
A(G) MNIST    10 0.02/0.94 0.03/0.88 0.77/0.95 0.16/0.98 0.00/0.26
A(G) MNIST   100 0.00/0.87 0.00/0.85 0.73/0.90 0.10/0.95 0.00/0.13
A(G) MNIST  1000 0.00/0.75 0.00/0.80 0.63/0.80 0.10/0.91 0.00/0.05
A(G) CelebA   10 0.00/0.98 0.00/0.99 0.89/0.93 0.07/0.98 0.00/0.70
A(G) CelebA  100 0.00/0.95 0.00/0.93 0.82/0.85 0.02/0.93 0.00/0.61
A(G) CelebA 1000 0.00/0.90 0.00/0.89 0.77/0.81 0.00/0.88 0.00/0.43
"""
_TABLE_6 = """
||dx|| MNIST    10 5.05(0.09)   15.96(2.18)  9.17(0.65)   5.93(0.34)   6.48(0.94)   17.08(1.86)
||dx|| MNIST   100 4.09(0.53)   12.95(4.47)  7.62(1.55)   4.57(0.78)   4.70(1.02)   12.70(3.37)
||dx|| MNIST  1000 3.88(0.60)   7.17(2.10)   7.43(1.37)   4.22(0.77)   5.12(1.94)   7.56(1.41)
||dx|| CelebA   10 5.63(0.11)   11.83(0.65)  9.30(0.31)   4.75(0.17)   6.01(0.29)   13.69(0.59)
||dx|| CelebA  100 3.08(0.27)   10.00(1.61)  7.80(0.58)   3.20(0.45)   4.26(0.59)   11.65(1.48)
||dx|| CelebA 1000 2.55(0.36)   7.68(1.53)   7.13(0.47)   2.65(0.24)   3.39(0.58)   9.23(1.22)
FID    MNIST    10 5.36(0.12)   41.11(20.43) 21.58(2.44)  5.79(0.19)   6.50(1.70)   68.16(24.67)
FID    MNIST   100 5.32(0.11)   23.83(14.29) 18.39(3.70)  5.41(0.18)   5.46(0.11)   36.05(16.20)
FID    MNIST  1000 5.23(0.12)   10.85(4.28)  18.08(1.77)  5.37(0.14)   5.30(0.96)   21.86(4.16)
FID    CelebA   10 53.91(2.20)  73.62(6.70)  98.86(9.51)  59.51(1.60)  60.35(2.57)  87.29(9.29)
FID    CelebA  100 45.02(3.37)  73.12(11.03) 85.50(12.25) 47.60(2.57)  50.48(4.58)  78.11(12.95)
FID    CelebA 1000 40.85(3.41)  55.63(7.97)  72.11(13.81) 40.87(3.03)  45.46(5.03)  57.13(7.20)
"""


def _rows(text: str) -> dict[tuple[str, str], list[str]]:
    """(what and data set, C) -> cells."""
    found = {}
    for line in text.strip().splitlines():
        what, dataset, quality, *cells = line.split()
        shown = [cell.replace("/", " / ").replace("(", " (") for cell in cells]
        found[f"{what}, {dataset}", quality] = shown
    return found


_PAPER = {"Table 2": _rows(_TABLE_2), "Table 5": _rows(_TABLE_5), "Table 6": _rows(_TABLE_6)}
_PAPER_CAPTIONS = {
    "Table 2": "Means over 20 models.",
    "Table 5": "Means over five models for each C, which are others before training, too.",
    "Table 6": "Five models for each C, standard deviations in brackets. Baseline: not robust.",
}


@dataclasses.dataclass(frozen=True)
class Config(_keyed.Settings):
    """Settings of the robust training."""

    num_users: int = setting(5, "Keys and keyed models.", lower_bound=2)
    together: int = setting(
        1, "Models that are trained in one program; a CPU trains them in turn.", lower_bound=1
    )
    perturbations: tuple[str, ...] = setting(
        tuple(_SHOWN), "What models are trained against, one at a time.", choices=tuple(_SHOWN)
    )
    qualities: tuple[float, ...] = setting(
        (10.0, 100.0, 1000.0), "C of eq. 12, weight of the error per pixel.", lower_bound=0.0
    )
    robust_steps: int = setting(300, "Updates by eq. 12.", lower_bound=1)


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        **_keyed.SMOKE,
        "perturbations": ("blur", "jpeg"),
        "qualities": (10.0,),
        "robust_steps": 8,
    },
    # Keys of all frequencies do not survive a blur at C = 10, whatever the training (WORKSPACE.md).
    "demo": {"key_bandwidth": 6, "qualities": (10.0,)},
    # C = 10 with 20 models is Table 2; --qualities=10,100,1000 --num_users=5 Tables 5 and 6.
    "paper": {
        **_keyed.PAPER,
        "num_users": 20,
        "together": 20,
        "qualities": (10.0,),
        "robust_steps": 37_500,
    },
}


def run(config: Config, record: Run) -> dict[str, Any]:
    """All models before and after; returns D, A(G), shift and distance per C and perturbation."""
    _keyed.check(config)
    check_once(config, "perturbations", "qualities")
    root = _keyed.load_root(config)
    images = _keyed.load_images(
        config, root, num_validation=config.num_search, num_test=config.num_test
    )
    real = _keyed.frechet_statistics(config, images.test)
    keys = _keyed.make_keys(config, record, images, config.num_users, config.key_method)
    models = _keyed.make_models(config, record, root, images, keys, together=config.together)
    before = {
        name: _attacked(config, record, keys, [m.generator for m in models], images, name, "before")
        for name in config.perturbations
    }
    untreated = [
        _keyed.measure(
            config, record, root, keys, m.generator, i, m.gamma, real, name=f"measured-{i}"
        )
        for i, m in enumerate(models)
    ]
    results: dict[str, Any] = {
        "features": _keyed.features_name(config),
        "before": before,
        "shift_before": [found.shift.mean for found in untreated],
        "distance_before": [found.distance for found in untreated],
        "after": {},
    }
    shown = {"untreated": untreated[0].images}
    for number, quality in enumerate(config.qualities):
        by_name: dict[str, Any] = {}
        for name in config.perturbations:
            tag = f"{name}-{number}"  # Names files; a number as 1e+06 could not.
            robust, seconds = _train(config, record, root, models, keys, name, quality, tag)
            measured = [
                _keyed.measure(
                    config, record, root, keys, g, i, 0.0, real, name=f"measured-{tag}-{i}"
                )
                for i, g in enumerate(robust)
            ]
            by_name[name] = {
                **_attacked(config, record, keys, robust, images, name, f"after-{tag}"),
                "shift": [found.shift.mean for found in measured],
                "distance": [found.distance for found in measured],
                "seconds": seconds,
            }
            if quality == config.qualities[0]:
                shown[_SHOWN[name]] = measured[0].images
        results["after"][repr(quality).removesuffix(".0")] = by_name
    _write_page(config, record, results, shown, keys, images)
    return results


def _train(config, record: Run, root, models, keys, name: str, quality: float, tag: str):
    """Eq. 12 for all users, a stage per group; the models, and seconds per model."""
    keyed = config.keyed_config(num_steps=config.robust_steps, quality=quality)
    perturb = differentiable.draw(name)
    found, seconds = [], 0.0
    for first in range(0, len(keys), config.together):
        part = models[first : first + config.together]
        stage = f"robust-{tag}-{first}"

        def compute(first=first, part=part):
            state = user_generators.init(root, len(part), keyed, first=first)
            params = jax.tree.map(
                lambda *leaves: jnp.stack(leaves),
                *(model.generator.variables["params"] for model in part),
            )
            state = state._replace(params=params)
            total = keyed.num_steps * (len(part) if jax.default_backend() == "cpu" else 1)
            with record.progress(total, f"robust to {_SHOWN[name]}, C = {quality:g}") as bar:
                done = 0

                def progress(step, _):
                    nonlocal done
                    bar.update(step - done)
                    done = step

                state, losses = user_generators.train_robust(
                    root,
                    state,
                    keys[first : first + len(part)],
                    _keyed.rng(config, 5),
                    keyed,
                    perturb,
                    progress=progress,
                )
            if not np.isfinite(losses).all():
                raise FloatingPointError(f"losses {losses} of models from {first + 1} on")
            return _keyed.weights_of(state.params)

        text = f"model {first + 1} of {len(keys)}, robust to {_SHOWN[name]}, C = {quality:g}"
        arrays = record.stage(stage, compute, text=text)
        seconds += record.seconds[stage]
        for index in range(len(part)):
            weights = {key: value[index] for key, value in arrays.items()}
            found.append(_keyed.with_weights(root, weights))
    return found, seconds / len(keys)


@functools.partial(jax.jit, static_argnames=("name", "codec"))
def _treat(rng, first, images, name, codec):
    x = images.astype(jnp.float32) / 127.5 - 1
    treat = differentiable.strongest(name, codec=codec)
    rngs = jax.vmap(lambda i: jax.random.fold_in(rng, i))(first + jnp.arange(len(images)))
    treated = jax.vmap(lambda own, image: treat(own, image[None])[0])(rngs, x)
    return jnp.round((treated + 1) * 127.5).astype(jnp.uint8)


def _treated(images: np.ndarray, name: str, rng: jax.Array, *, real_codec: bool) -> np.ndarray:
    """Images as strongly processed as training ever saw, as 8-bit files have them."""
    found = []
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        full = jnp.asarray(data.filled(batch, _BATCH))
        done = np.asarray(_treat(rng, jnp.int32(start), full, name, not real_codec))
        found.append(done[: len(batch)])
    treated = np.concatenate(found)
    if real_codec and name in ("jpeg", "combination"):
        quality = round(differentiable.STRONGEST["jpeg"])
        treated = perturbations.apply(f"jpeg-{quality}", treated, rng)
    return treated


def _attacked(
    config, record: Run, keys, generators, images, name: str, when: str
) -> dict[str, Any]:
    """D of every model and A(G), on treated images, by codec."""
    codecs = {"": False}
    if name in ("jpeg", "combination"):
        codecs["real_codec_"] = True

    def compute():
        arrays = {}
        rng = _keyed.rng(config, 6)
        for prefix, real_codec in codecs.items():
            treat = functools.partial(_treated, name=name, real_codec=real_codec)
            real = treat(images.test, rng=jax.random.fold_in(rng, 0))
            arrays[f"{prefix}real"] = attributability.responses(keys, real)
            own = []
            for index, generator in enumerate(generators):
                made = sampling.generate(generator, _keyed.rng(config, 7, index), config.num_test)
                made = treat(made, rng=jax.random.fold_in(rng, 1 + index))
                own.append(attributability.responses(keys, made))
            arrays[f"{prefix}own"] = np.stack(own)
        return arrays

    arrays = record.stage(f"attacked-{when}-{name}", compute, text=f"{when}: {_SHOWN[name]}")
    found: dict[str, Any] = {}
    for prefix in codecs:
        own, real = arrays[f"{prefix}own"], arrays[f"{prefix}real"]
        found[f"{prefix}distinguishability"] = [
            attributability.distinguishability(own[i, :, i], real[:, i]) for i in range(len(keys))
        ]
        found[f"{prefix}attributability"] = attributability.attributability(own)
    return found


def _cell(found: dict[str, Any], key: str) -> str:
    value = found[key]
    return f"{np.mean(value):.2f}"


def tables(results: dict[str, Any]) -> list[report.Table]:
    """Table 2 (or 5) and Table 6; the paper's, of every C that was run."""
    before = results["before"]
    names = list(before)
    header = ["", "C", *(_SHOWN[name] for name in names)]
    rows = []
    for shown, key in (("D", "distinguishability"), ("A(G)", "attributability")):
        for quality, after in results["after"].items():
            for codec, prefix in (("", ""), (", real codec", "real_codec_")):
                if not any(prefix + key in after[name] for name in names):
                    continue
                cells = [
                    (
                        f"{_cell(before[name], prefix + key)} / {_cell(after[name], prefix + key)}"
                        if prefix + key in after[name]
                        else None
                    )
                    for name in names
                ]
                rows.append([shown + codec, quality, *cells])
    price = []
    for shown, key in (("E||dx||", "shift"), ("distance", "distance")):
        start = _keyed.mean_std(results[f"{key}_before"])
        for quality, after in results["after"].items():
            cells = [_keyed.mean_std(after[name][key]) for name in names]
            price.append([shown, quality, start, *cells])
    return [
        report.Table(header, rows, caption="Before / after robust training, mean over models."),
        report.Table(
            ["", "C", "before", *(_SHOWN[name] for name in names)],
            price,
            caption=f"After robust training; distances are of {results['features']}.",
        ),
        *(table for name in _PAPER for table in _paper_table(results, name)),
    ]


def _paper_table(results: dict[str, Any], table: str) -> list[report.Table]:
    """A table of the paper, laid out as ours are; none, if it has no C that was run."""
    names = list(results["before"])
    places = [list(_SHOWN).index(name) - len(_SHOWN) for name in names]  # from the right
    rows = [
        [what, quality, *cells[: -len(_SHOWN)], *(cells[place] for place in places)]
        for (what, quality), cells in _PAPER[table].items()
        if quality in results["after"]
    ]
    if not rows:
        return []
    before = ["baseline"] if table == "Table 6" else []
    header = [f"the paper's {table}", "C", *before, *(_SHOWN[name] for name in names)]
    caption = "Other data, other sizes, other features: to compare shapes, not digits."
    return [report.Table(header, rows, caption=f"{_PAPER_CAPTIONS[table]} {caption}")]


def _write_page(config, record, results, shown, keys, images) -> None:
    rows = {"key": report.signed_pictures(keys[:1]), **shown}
    samples = report.image_grid(rows, num_columns=12)
    report.save_figure(samples, record.figures / "samples.png")
    robustness, price = tables(results)[:2]
    sections = [
        report.Section(
            "Robustness (Tables 2 and 5)",
            [robustness, *_paper_table(results, "Table 2"), *_paper_table(results, "Table 5")],
        ),
        report.Section("Its price (Tables 2 and 6)", [price, *_paper_table(results, "Table 6")]),
        report.Section(
            "Images (Figure 5)",
            [report.Picture(samples, "One user's key, and images of the model made robust to ...")],
        ),
        report.Section(
            "Settings",
            [
                _keyed.keys_text(config, images, config.key_method),
                _keyed.models_text(config, images),
                _keyed.measured_text(config, images),
                f"Then {config.robust_steps} updates by eq. 12; strength drawn anew for every "
                "batch. Tests: blur of width 3, crop to 80 %, noise of 0.3 (0.1 in a "
                "combination), JPEG of quality 50.",
            ],
        ),
    ]
    lead = "Can a copy still be told when its images were processed, and what does that cost?"
    report.write_page(record.workdir / "report.html", "Robust training", sections, lead=lead)


def summary(metrics: dict[str, Any]) -> str:
    """Robustness and its price, as the terminal shows them."""
    return "\n\n".join(report.table_text(table.header, table.rows) for table in tables(metrics)[:2])
