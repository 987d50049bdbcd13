"""Attacks: what it costs an adversary who has everything but the calibration images.

He knows our generator, weights and all, and the fitted detector; not the images that set its
threshold, of which he draws others. For one generator:

*   *distil*: a narrower student of the same family learns our images of the same latents;
*   *fine_tune*: our generator is trained on, against a new discriminator;
*   *last_layer*: its last kernel alone is jittered, W' = sqrt(1 - a^2) W + a std(W) N(0, 1), or
    drawn anew and refitted to our pictures by ridge regression;
*   *evade*: own images are moved by gradient until they are called not ours;
*   *forge*: real images, and those of another seed, are moved until they pass as ours.

The first three ask whether a stolen model's images are still ours, and what they lose in PSNR
against our images of the same latents. The last two look for the smallest l2 change
(`_surrogate`); images are rounded to 8 bits before the attributor itself judges them. As large a
change at random, normal noise or single grey levels, stands beside them.

    python run.py --experiment=attacks
    python run.py --experiment=attacks --ours=digits_lsgan_0 --num_impostors=8192
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _generators, _regeneration, _surrogate
from experiments._config import Run, check_once, setting
from flipad_jax import metrics, report
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection import bundle, calibration
from flipad_jax.detection.attributor import Attributor, AttributorConfig
from flipad_jax.detection.classifier import ClassifierConfig
from flipad_jax.generators import impostors, sampling
from flipad_jax.generators.sampling import TrainedGenerator
from flipad_jax.inversion import final_layer

ATTACKS = ("distil", "fine_tune", "last_layer", "evade", "forge")
_BATCH = 64  # of distilling and training on
_STUDENT_RATE = 2e-3
_CHUNK = 16  # images that are moved in one program
_SHOWN = 10
_AMPLIFIED = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the attacks."""

    ours: str = setting(
        "digits_dcgan_0", "Our generator: of the zoo, or a file of train_generator."
    )
    other: str = setting(
        "", "Another seed of it, to forge from; by default the next one of the zoo."
    )
    attacks: tuple[str, ...] = setting(ATTACKS, "Which of them.", choices=ATTACKS)
    fnr: float = setting(
        0.005, "Share of own images that may be rejected.", lower_bound=0.0, upper_bound=1.0
    )
    num_own: int = setting(
        4000, "Own images for the attributor, a quarter of which calibrate.", lower_bound=80
    )
    num_impostors: int = setting(
        0, "Images of impostors of ours for the attributor; 0: own images only.", lower_bound=0
    )
    num_altered: int = setting(
        8192, "Altered copies of own images that the attributor learns.", lower_bound=0
    )
    classifier_steps: int = setting(
        ClassifierConfig.num_steps, "Training steps of its networks.", lower_bound=1
    )
    num_mean: int = setting(5000, "Latents that the mean activation averages.", lower_bound=1)
    num_test: int = setting(500, "Images of every copy of our model.", lower_bound=8)
    distil_steps: int = setting(3000, "Steps of the student.", lower_bound=1)
    student_features: tuple[int, ...] = setting(
        (), "Widths of the student; by default half of ours.", lower_bound=1
    )
    trained_on: tuple[int, ...] = setting(
        (50, 200, 1000), "Updates by which our model is trained on.", lower_bound=1
    )
    last_layer_noise: tuple[float, ...] = setting(
        (0.03, 0.1, 0.3, 1.0),
        "Jitter of the last kernel, as a share of its size.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    num_images: int = setting(32, "Images of every source that are moved.", lower_bound=2)
    evade_steps: int = setting(100, "Gradient steps to leave our set.", lower_bound=1)
    forge_steps: int = setting(300, "Gradient steps to enter it, each round.", lower_bound=2)
    forge_rounds: int = setting(2, "Rounds with another weight of the change.", lower_bound=1)
    num_adversary: int = setting(
        500, "Own images whose scores tell the adversary where to aim.", lower_bound=20
    )
    forge_aim: float = setting(
        0.9,
        "Quantile of these scores that a forged image shall reach; an evading one shall exceed "
        "all of them.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    budgets: tuple[float, ...] = setting(
        (50.0, 45.0, 40.0), "PSNR down to which a change counts as unseen, dB.", lower_bound=0.0
    )
    seed: int = setting(0, "All images, noise and networks are drawn from it.", lower_bound=0)


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "fnr": 0.05,
        "num_own": 160,
        "num_altered": 64,
        "classifier_steps": 10,
        "num_mean": 256,
        "num_test": 16,
        "distil_steps": 5,
        "student_features": (8, 8, 8),
        "trained_on": (2,),
        "last_layer_noise": (0.3, 1.0),
        "num_images": 4,
        "evade_steps": 10,
        "forge_steps": 10,
        "forge_rounds": 1,
        "num_adversary": 40,
    },
    "demo": {},
    "paper": {
        "num_own": 15_000,
        "num_altered": 20_480,
        "num_test": 2000,
        "distil_steps": 30_000,
        "trained_on": (50, 200, 1000, 5000),
        "num_images": 200,
        "evade_steps": 300,
        "forge_steps": 600,
        "forge_rounds": 5,
        "num_adversary": 5000,
    },
}

# Streams of `_regeneration.rng`: disjoint images, whatever their number.
_FIT, _OWN, _ADVERSARY, _TEST, _OTHER, _CHANGE, _STUDENT, _BASELINE = range(10, 18)


def run(config: Config, record: Run) -> dict[str, Any]:
    """Fit the attributor, then all attacks."""
    check_once(config, "attacks", "trained_on", "last_layer_noise", "budgets")
    _settings(config)  # Refuses what no attributor can be fitted with.
    ours, entry = _generators.recorded("ours", config.ours)
    other = None
    if "forge" in config.attacks:
        name = config.other or _generators.next_seed("other", config.ours)
        other, _ = _generators.recorded("other", name)
    if other is not None and other.image_shape != ours.image_shape:
        raise ValueError(f"--other makes images {other.image_shape}, ours {ours.image_shape}")
    if "distil" in config.attacks:
        _generators.recorded_gan(
            entry, features=_student_features(config, entry)
        )  # Refused now and not after hours.
    fitted = record.stage(
        "attributor",
        functools.partial(_fit, config, record, ours),
        text=f"{Path(config.ours).stem}: the attributor",
    )
    attributor = bundle.load(record.workdir / "attributor")
    threshold = calibration.verdict_threshold(fitted["calibration"], config.fnr)
    results: dict[str, Any] = {
        "threshold": threshold,
        "aims": {
            "evade": float(fitted["adversary"].max()),
            "forge": float(np.quantile(fitted["adversary"], config.forge_aim)),
        },
        "copies": {},
        "moved": {},
    }
    own = sampling.generate(ours, _regeneration.rng(config, _TEST), config.num_test)
    for number, (name, make) in enumerate(_copies(config, record, ours, entry).items()):
        compute = functools.partial(_made_and_judged, record, attributor, name, make)
        found = record.stage(f"copy-{number}", compute, text=name)
        results["copies"][name] = _copy_row(found["score"], found["images"], own, threshold)
    surrogate = None
    pictures = {}
    for name, (enters, make) in _starts(config, ours, other, entry).items():
        surrogate = surrogate or _surrogate.make(attributor)
        compute = functools.partial(
            _move_all, config, record, attributor, surrogate, name, make, results["aims"], enters
        )
        found = record.stage(
            f"moved-{name.replace(' ', '-')}", compute, text=f"{name}, moved by gradient"
        )
        results["moved"][name] = _moved_row(config, found, threshold, enters)
        pictures[name] = found
    _write_page(config, record, results, pictures, threshold)
    return results


def _student_features(config: Config, entry: dict[str, Any]) -> tuple[int, ...]:
    return config.student_features or tuple(max(width // 2, 1) for width in entry["features"])


# --- the attributor -------------------------------------------------------------------------------


def _settings(config: Config) -> AttributorConfig:
    return AttributorConfig(
        num_altered=config.num_altered,
        classifier=ClassifierConfig(num_steps=config.classifier_steps),
    )


def _fit(config: Config, record: Run, ours: TrainedGenerator) -> dict[str, np.ndarray]:
    def rng(*path):
        return _regeneration.rng(config, *path)

    with record.parts("attributor") as progress:
        changed = None
        if config.num_impostors:
            changed = impostors.generate(ours, rng(_FIT, 0), config.num_impostors)
        fitted = attribution.fit(
            sampling.final_layer(ours),
            sampling.mean_activation(ours, rng(_FIT, 1), config.num_mean),
            sampling.generate(ours, rng(_OWN), config.num_own),
            rng=rng(_FIT, 2),
            impostors=changed,
            config=_settings(config),
            progress=progress,
            kept=record.kept("attributor"),
        )
        bundle.save(fitted, record.workdir / "attributor")
        his = sampling.generate(ours, rng(_ADVERSARY), config.num_adversary)
        scores = attribution.score(fitted, his)
    return {"calibration": fitted.calibration_scores, "adversary": scores}


# --- copies of our model --------------------------------------------------------------------------


def _copies(
    config: Config, record: Run, ours: TrainedGenerator, entry: dict[str, Any]
) -> dict[str, Callable[[], np.ndarray]]:
    """By shown name, what makes the images: of the same latents as our own test images."""
    rng = _regeneration.rng(config, _TEST)

    def images_of(make: Callable[[], TrainedGenerator]) -> np.ndarray:
        return sampling.generate(make(), rng, config.num_test)

    copies: dict[str, Callable[[], np.ndarray]] = {
        "ours, unchanged": functools.partial(images_of, lambda: ours)
    }
    if "distil" in config.attacks:
        widths = "-".join(map(str, _student_features(config, entry)))
        make = functools.partial(_student, config, record, ours, entry)
        copies[f"distilled into {widths}, {config.distil_steps} steps"] = functools.partial(
            images_of, make
        )
    for num_steps in config.trained_on if "fine_tune" in config.attacks else ():
        make = functools.partial(_trained_on, config, record, ours, entry, num_steps)
        copies[f"trained on for {num_steps} updates"] = functools.partial(images_of, make)
    if "last_layer" in config.attacks:
        for strength in config.last_layer_noise:
            make = functools.partial(_jittered, config, ours, strength)
            copies[f"last layer jittered by {strength:g}"] = functools.partial(images_of, make)
        copies["last layer refitted"] = functools.partial(_refitted, config, ours)
    return copies


def _student(
    config: Config, record: Run, ours: TrainedGenerator, entry: dict[str, Any]
) -> TrainedGenerator:
    """A narrower generator that was shown (latent, 8-bit image) pairs of ours."""
    gan = _generators.recorded_gan(entry, features=_student_features(config, entry))
    module = gan.generator
    init_rng, draw_rng = jax.random.split(_regeneration.rng(config, _STUDENT))
    variables = module.init(init_rng, jnp.zeros((1, ours.latent_dim), jnp.float32))
    optimizer = optax.adam(optax.cosine_decay_schedule(_STUDENT_RATE, config.distil_steps))
    opt_state = optimizer.init(variables["params"])

    @jax.jit
    def step(variables, opt_state, ours, index):
        shape = (_BATCH, ours.latent_dim)
        z = jax.random.normal(jax.random.fold_in(draw_rng, index), shape, jnp.float32)
        shown = ours.module.apply(ours.variables, z)
        wanted = jnp.round((shown + 1) * 127.5) / 127.5 - 1

        def loss(params):
            made, updated = module.apply(
                {**variables, "params": params}, z, train=True, mutable=["batch_stats"]
            )
            return jnp.mean((made - wanted) ** 2), updated

        (error, updated), slope = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(slope, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, "params": params, **updated}, opt_state, error

    # A host loop of one compiled step: kernel gradients inside a compiled loop are slow on a CPU.
    for index in record.progress(config.distil_steps, "distilling"):
        variables, opt_state, error = step(variables, opt_state, ours, jnp.int32(index))
    if not np.isfinite(float(error)):
        raise FloatingPointError("distilling diverged")
    return dataclasses.replace(ours, variables=variables, module=module)


def _trained_on(
    config: Config, record: Run, ours: TrainedGenerator, entry: dict[str, Any], num_steps: int
) -> TrainedGenerator:
    return _generators.trained_on(
        _generators.recorded_gan(entry),
        ours,
        _generators.recorded_images(entry, "train"),
        record,
        seed=config.seed,
        num_steps=num_steps,
        batch_size=_BATCH,
    )


def _jittered(config: Config, ours: TrainedGenerator, strength: float) -> TrainedGenerator:
    return _generators.jittered(ours, _regeneration.rng(config, _CHANGE), strength)


def _refitted(config: Config, ours: TrainedGenerator) -> np.ndarray:
    """Images of our hidden layers under a last kernel that was fitted to 8-bit images of ours."""
    layer = sampling.final_layer(ours)
    count = impostors.num_refitted(layer, 4 * _BATCH)
    rng = _regeneration.rng(config, _CHANGE, 1)
    shown = sampling.generate(ours, rng, count)
    latents = [
        sampling.latents(stream, jnp.arange(number), ours.latent_dim)
        for stream, number in ((rng, count), (_regeneration.rng(config, _TEST), config.num_test))
    ]
    choices = impostors.Choices(
        strength=jnp.float32(0),
        case=jnp.float32(0),  # Refitted, by the smallest ridge, its contrast kept.
        ridge=jnp.float32(0),
        contrast=jnp.float32(1),
        contrast_noise=jnp.float32(0),
        last_noise=jnp.zeros(np.shape(ours.variables["params"]["last"]["kernel"]), jnp.float32),
    )
    activations = sampling.activations(ours, jnp.concatenate(latents))
    wanted = final_layer.targets(layer, shown)
    return np.asarray(impostors.finish(layer, activations, wanted, choices))[count:]


def _made_and_judged(
    record: Run, attributor: Attributor, name: str, make: Callable[[], np.ndarray]
) -> dict[str, np.ndarray]:
    images = make()
    with record.parts(name) as progress:
        found = attribution.score_with_info(attributor, images, progress=progress)
    return {"images": images, "score": np.where(found.converged, found.score, np.nan)}


def _psnr(mean_square: np.ndarray | float) -> np.ndarray:
    """dB, of squared grey levels; what is equal gets NaN."""
    mean_square = np.asarray(mean_square, np.float64)
    positive = np.where(mean_square > 0, mean_square, np.nan)
    return 10 * np.log10(255**2 / positive)


def _mean_square(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`[n]` squared grey levels."""
    difference = images.astype(np.float64) - others.astype(np.float64)
    return np.mean(difference**2, axis=(1, 2, 3))


def _share(hits: np.ndarray) -> dict[str, Any]:
    count, total = int(np.sum(hits)), len(hits)
    return {
        "share": count / total if total else None,
        "interval": list(metrics.clopper_pearson(count, total)) if total else None,
        "total": total,
    }


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _copy_row(
    scores: np.ndarray, images: np.ndarray, own: np.ndarray, threshold: float
) -> dict[str, Any]:
    error = _mean_square(images, own)
    return {
        "accepted": _share(scores <= threshold),
        # Of the error averaged over images, so that those that are equal count.
        "psnr": _number(_psnr(error.mean())),
        "score": _number(np.median(scores)),
    }


# --- images moved by gradient ---------------------------------------------------------------------


def _starts(
    config: Config, ours: TrainedGenerator, other: TrainedGenerator | None, entry: dict[str, Any]
) -> dict[str, tuple[bool, Callable[[], np.ndarray]]]:
    """By shown name: whether our set is entered (or left), and what makes the images."""
    count = config.num_images
    found: dict[str, tuple[bool, Callable[[], np.ndarray]]] = {}
    if "evade" in config.attacks:
        rng = _regeneration.rng(config, _OTHER, 0)
        found["own"] = (False, lambda: sampling.generate(ours, rng, count))
    if other is not None:
        other_rng = _regeneration.rng(config, _OTHER, 1)
        found["real"] = (True, lambda: _generators.recorded_images(entry, "test", count))
        found["other seed"] = (True, lambda: sampling.generate(other, other_rng, count))
    return found


def _move_all(
    config: Config,
    record: Run,
    attributor: Attributor,
    surrogate: _surrogate.Surrogate,
    name: str,
    make: Callable[[], np.ndarray],
    aims: dict[str, float],
    enters: bool,
) -> dict[str, np.ndarray]:
    """Images before and after, baselines of the same size, and the attributor's own scores."""
    images = make()
    moved = np.empty_like(images)
    reached = np.empty(len(images), bool)
    if enters:
        search = functools.partial(
            _surrogate.enter,
            surrogate,
            goal=aims["forge"],
            num_steps=config.forge_steps,
            num_rounds=config.forge_rounds,
        )
    else:
        search = functools.partial(
            _surrogate.leave, surrogate, goal=aims["evade"], num_steps=config.evade_steps
        )
    size = min(_CHUNK, len(images))
    kept = record.kept(f"moved-{name.replace(' ', '-')}")
    with record.progress(len(images), f"moving images, {name}") as bar:
        for start in range(0, len(images), size):
            part = np.arange(start, min(start + size, len(images)))
            # One program: the last chunk is filled up with its last image.
            filled = np.minimum(np.arange(start, start + size), len(images) - 1)

            def search_part(filled=filled):
                found = search(images=images[filled])
                return {"images": found.images, "reached": found.reached}

            found = kept.part(f"chunk-{start}", search_part)
            moved[part], reached[part] = found["images"][: len(part)], found["reached"][: len(part)]
            bar.update(len(part))
    seed = int(jax.random.randint(_regeneration.rng(config, _BASELINE), (), 0, 2**31 - 1))
    draw = np.random.default_rng([seed, len(name)])
    arrays = {
        "images": images,
        "moved": moved,
        "noise": same_size_noise(images, moved, draw),
        "levels": same_size_levels(images, moved, draw),
    }
    scores = {f"score_{key}": attribution.score(attributor, arrays[key]) for key in arrays}
    doubted = attribution.doubts(attributor, moved) != ""
    return {**arrays, **scores, "reached": reached, "doubted": doubted}


def same_size_noise(images: np.ndarray, moved: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Images `[n, h, w, c]` uint8 with normal noise that changes each, once it is rounded, by as
    much in l2 as `moved` does, or barely more."""
    wanted = _mean_square(moved, images)
    noise = draw.standard_normal(images.shape)
    low, high = np.zeros(len(images)), np.full(len(images), 512.0)

    def noisy(std):
        return np.clip(np.rint(images + std[:, None, None, None] * noise), 0, 255).astype(np.uint8)

    for _ in range(40):
        middle = (low + high) / 2
        is_less = _mean_square(noisy(middle), images) < wanted
        low, high = np.where(is_less, middle, low), np.where(is_less, high, middle)
    return noisy(high)


def same_size_levels(
    images: np.ndarray, moved: np.ndarray, draw: np.random.Generator
) -> np.ndarray:
    """Images `[n, h, w, c]` uint8 with some pixels, at random, one grey level up or down, as many
    as it takes for the l2 change that `moved` has; more levels than one if all would not do."""
    found = images.astype(np.int64)
    size = found[0].size
    for image, energy in zip(found, size * _mean_square(moved, images)):
        step = max(int(np.ceil(np.sqrt(energy / size) - 1e-9)), 1)
        places = draw.permutation(size)[: round(energy / step**2)]
        flat = image.reshape(-1)
        up = draw.random(len(places)) < 0.5
        up = np.where(flat[places] < step, True, np.where(flat[places] > 255 - step, False, up))
        flat[places] += np.where(up, step, -step)
    return found.astype(np.uint8)


def _moved_row(
    config: Config, found: dict[str, np.ndarray], threshold: float, enters: bool
) -> dict[str, Any]:
    def fooled(scores):
        return scores <= threshold if enters else scores > threshold

    # What the attributor got wrong without any attack is none of the attack's.
    right = ~fooled(found["score_images"])
    success = right & fooled(found["score_moved"])
    square = _mean_square(found["moved"], found["images"])
    psnr = _psnr(square)
    changed = np.mean((found["moved"] != found["images"]).any(axis=3), axis=(1, 2))
    row: dict[str, Any] = {
        "wrong_before": int(np.sum(~right)),
        "success": _share(success[right]),
        "within": {
            f"{budget:g}": _share((success & (psnr >= budget))[right]) for budget in config.budgets
        },
        "noise": _share(fooled(found["score_noise"])[success]),
        "levels": _share(fooled(found["score_levels"])[success]),
        "doubted": _share(found["doubted"][success]),
        "aim_reached": float(found["reached"].mean()),
    }
    quantiles = {"lowest": 0, "tenth": 0.1, "median": 0.5, "highest": 1}
    row["psnr"] = {
        name: float(np.quantile(psnr[success], level)) if success.any() else None
        for name, level in quantiles.items()
    }
    row["changed_pixels"] = float(np.median(changed[success])) if success.any() else None
    return row


# --- tables and the page --------------------------------------------------------------------------

_QUESTIONS = {
    "own": "own images leave",
    "real": "real images enter",
    "other seed": "images of another seed enter",
}


def _percent(found: dict[str, Any], *, interval: bool = False) -> str | None:
    if found["share"] is None:
        return None
    text = f"{found['share']:.1%}"
    if interval:
        low, high = found["interval"]
        text += f" [{low:.0%}, {high:.0%}]"
    return text


def tables(results: dict[str, Any]) -> list[report.Table]:
    """Copies of our model; images moved."""
    found = []
    if results["copies"]:
        rows = [
            [
                name,
                _percent(row["accepted"], interval=True),
                "equal" if row["psnr"] is None else f"{row['psnr']:.1f}",
                None if row["score"] is None else f"{row['score']:.1f}",
            ]
            for name, row in results["copies"].items()
        ]
        header = ["copies of our model", "called ours", "PSNR to ours, dB", "median score"]
        found.append(report.Table(header, rows))
    if results["moved"]:
        budgets = list(next(iter(results["moved"].values()))["within"])
        header = [
            "moved by gradient",
            "images",
            "succeeds",
            "PSNR median / lowest",
            *(f"with {budget} dB" for budget in budgets),
            "pixels changed",
            "doubted",
            "noise as large",
            "levels as large",
        ]
        rows = []
        for name, row in results["moved"].items():
            psnr, changed = row["psnr"], row["changed_pixels"]
            rows.append(
                [
                    _QUESTIONS[name],
                    str(row["success"]["total"]),
                    _percent(row["success"], interval=True),
                    (
                        None
                        if psnr["median"] is None
                        else f"{psnr['median']:.1f} / {psnr['lowest']:.1f}"
                    ),
                    *(_percent(row["within"][budget]) for budget in budgets),
                    None if changed is None else f"{changed:.1%}",
                    _percent(row["doubted"]),
                    _percent(row["noise"]),
                    _percent(row["levels"]),
                ]
            )
        caption = (
            "Of images that the attributor judged rightly before. Judged by the attributor itself, "
            "in 8 bits. 'as large': share that a random change of the same l2 norm carries over."
        )
        found.append(report.Table(header, rows, caption=caption))
    return found


def _write_page(config: Config, record: Run, results, pictures, threshold: float) -> None:
    sections = [report.Section("Result", tables(results))]
    shown = []
    for name, found in pictures.items():
        before, after = (found[key][:_SHOWN].astype(int) for key in ("images", "moved"))
        difference = np.clip(128 + _AMPLIFIED * (after - before), 0, 255).astype(np.uint8)
        if before.shape[-1] not in (1, 3):
            continue
        rows = {
            "before": found["images"][:_SHOWN],
            "moved": found["moved"][:_SHOWN],
            f"difference x {_AMPLIFIED}": difference,
        }
        figure = report.image_grid(rows, num_columns=_SHOWN)
        report.save_figure(figure, record.figures / f"{name.replace(' ', '-')}.png")
        shown.append(report.Picture(figure, f"{_QUESTIONS[name]}; grey is no difference."))
    if shown:
        sections.append(report.Section("Images moved", shown))
    sections.append(report.Section("Settings", [_settings_text(config, results, threshold)]))
    lead = "What does it cost to get our images past the attributor, or others in?"
    report.write_page(record.workdir / "report.html", "Attacks", sections, lead=lead)


def _settings_text(config: Config, results: dict[str, Any], threshold: float) -> str:
    learned = f"{config.num_own} own images"
    learned += f", {config.num_altered} altered copies" if config.num_altered else ""
    learned += f" and {config.num_impostors} images of impostors" if config.num_impostors else ""
    aims = results["aims"]
    return (
        f"Ours is {Path(config.ours).stem}. The attributor learned {learned}; threshold "
        f"{threshold:.1f} at fnr {config.fnr:g}. The adversary knows all of it but the calibration "
        f"images: from {config.num_adversary} own images he aims above {aims['evade']:.1f} (their "
        f"highest score) to leave, and at {aims['forge']:.1f} at most (their "
        f"{config.forge_aim:g} quantile) to enter. {config.num_test} images of each copy, of the "
        f"same latents as our own; PSNR of the mean squared error over all. {config.num_images} "
        f"images of each source are moved, by {config.evade_steps} gradient steps to leave and "
        f"{config.forge_rounds} rounds of {config.forge_steps} to enter."
    )


def summary(metrics_found: dict[str, Any]) -> str:
    """Both tables, as the terminal shows them."""
    return "\n\n".join(report.table_text(t.header, t.rows) for t in tables(metrics_found))
