"""Tables 2, 5 and 6 of the decentralized attribution paper: keyed models that stand processing.

Every model of Algorithm 1 is trained on by eq. 12, its images blurred, cropped, made noisy,
recompressed, or all of that, in half of the batches. Distinguishability and attributability of
images so treated, before and after that training, and what it costs: length of the shift, Frechet
distance. A test treats all images, real ones too, as strongly as training ever did; where JPEG is
part of it, once by the differentiable codec that training saw and once by the real one.

    python run.py --experiment=robust_training
    python run.py --experiment=robust_training --qualities=10,100,1000 --num_users=5
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _keyed
from experiments._config import Run, check_once, setting
from flipad_jax import perturbations, report
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

# The paper's Table 2, C = 10: (D before, after), (A(G) before, after).
_PAPER = {
    "D, MNIST": ("0.49 / 0.96", "0.52 / 0.99", "0.85 / 0.99", "0.54 / 0.99", "0.50 / 0.66"),
    "D, CelebA": ("0.49 / 0.99", "0.49 / 0.99", "0.95 / 0.98", "0.51 / 0.99", "0.50 / 0.85"),
    "A(G), MNIST": ("0.02 / 0.94", "0.03 / 0.88", "0.77 / 0.95", "0.16 / 0.98", "0.00 / 0.26"),
    "A(G), CelebA": ("0.00 / 0.98", "0.00 / 0.99", "0.89 / 0.93", "0.07 / 0.98", "0.00 / 0.70"),
}


@dataclasses.dataclass(frozen=True)
class Config(_keyed.Settings):
    """Settings of the robust training."""

    num_users: int = setting(5, "Keys and keyed models.", lower_bound=2)
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
    "demo": {},
    # C = 10 with 20 models is Table 2; --qualities=10,100,1000 --num_users=5 Tables 5 and 6.
    "paper": {**_keyed.PAPER, "num_users": 20, "qualities": (10.0,), "robust_steps": 37_500},
}


def run(config: Config, record: Run) -> dict[str, Any]:
    """All models before and after; returns D, A(G), shift and distance per C and perturbation."""
    _keyed.check(config)
    check_once(config, "perturbations", "qualities")
    root = _keyed.load_root(config)
    images = _keyed.load_images(config, root)
    real = _keyed.frechet_statistics(config, images.test)
    keys = _keyed.make_keys(config, record, images)
    models = _keyed.make_models(config, record, root, images, keys)
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
        padded = np.concatenate(
            [batch, np.zeros((_BATCH - len(batch), *batch.shape[1:]), np.uint8)]
        )
        done = np.asarray(_treat(rng, jnp.int32(start), jnp.asarray(padded), name, not real_codec))
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
    """Table 2 (or 5), Table 6, and the paper's."""
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
    paper_names = list(_SHOWN)
    paper = [
        [row, "10", *(cells[paper_names.index(name)] for name in names)]
        for row, cells in _PAPER.items()
    ]
    return [
        report.Table(header, rows, caption="Before / after robust training, mean over models."),
        report.Table(
            ["", "C", "before", *(_SHOWN[name] for name in names)],
            price,
            caption=f"After robust training; distances are of {results['features']}.",
        ),
        report.Table(["the paper's Table 2", *header[1:]], paper),
    ]


def _write_page(config, record, results, shown, keys, images) -> None:
    rows = {"key": report.signed_pictures(keys[:1]), **shown}
    samples = report.image_grid(rows, num_columns=12)
    report.save_figure(samples, record.figures / "samples.png")
    robustness, price, paper = tables(results)
    sections = [
        report.Section("Robustness (Tables 2 and 5)", [robustness, paper]),
        report.Section("Its price (Tables 2 and 6)", [price]),
        report.Section(
            "Images (Figure 5)",
            [report.Picture(samples, "One user's key, and images of the model made robust to ...")],
        ),
        report.Section(
            "Settings",
            [
                _keyed.keys_text(config, images),
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
