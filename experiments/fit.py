"""Fit an attributor to your own model, from its last layer and images that it made.

What it needs: a file with the last layer's weights (PyTorch .pth, .safetensors, .npz, Flax .msgpack
or an Orbax folder), the geometry of that layer, the mean activation before it (.npy), and a folder
of images that the model made, as it publishes them. From a live PyTorch module,
`flipad_jax.interop.from_torch` and `interop.write` make all of that, and a flag file for this
command. Own images are enough; images that the model was trained on are asked for by
--detector=deepsad only.

Writes WORKDIR/attributor, for --experiment=attribute and `flipad_jax.load`, and report.html.

    python run.py --experiment=fit --generator=dcgan.pth --last_layer=main.12 \\
        --mean_activation=mean.npy --generated=own_images --workdir=runs/mine
    python run.py --experiment=fit --flagfile=my_model/fit.flags --workdir=runs/mine
"""

import dataclasses
import hashlib
import os
import shlex
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments._config import Run, setting
from experiments._record import UsageError
from flipad_jax import data, metrics, perturbations, report
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection import bundle, calibration
from flipad_jax.detection.attributor import DETECTORS, AttributorConfig
from flipad_jax.detection.classifier import ClassifierConfig
from flipad_jax.detection.deepsad import ENCODER_WIDTHS, DeepSADConfig
from flipad_jax.detection.reconstruction import ReconstructionConfig
from flipad_jax.generators import interop
from flipad_jax.inversion import lasso

_DEFAULTS = AttributorConfig()
_LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
_LAYOUTS_BY_ENDING = {".npz": "flax", ".msgpack": "flax", "": "flax"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the fit."""

    generator: str = setting("", "Weights: .safetensors, .pth, .npz, .msgpack, an Orbax folder.")
    last_layer: str = setting("", "Name of the last layer in it, as main.12 or main.12.weight.")
    layer: str = setting(
        "conv_transpose", "Kind of the last layer (1x1 heads: conv).", choices=interop.LAYERS
    )
    strides: int = setting(2, "Strides of the last layer.", lower_bound=1)
    padding: int = setting(1, "Its padding, as PyTorch counts it.", lower_bound=0)
    output_padding: int = setting(0, "Output padding of a transposed one.", lower_bound=0)
    activation: str = setting(
        "tanh", "What follows the last layer.", choices=("tanh", "sigmoid", "identity")
    )
    bias: str = setting("", "Name of its bias; by default the one beside the kernel, if any.")
    layout: str = setting(
        "auto",
        "Axes of kernel and mean activation: torch, flax, or this library's own; auto: torch for "
        ".safetensors and .pth.",
        choices=("auto", *interop.LAYOUTS),
    )
    mean_activation: str = setting("", "Mean activation before the last layer: FILE.npy.")
    generated: str = setting("", "Folder of images that the model made.")
    impostors: str = setting("", "Folder of images of changed copies of the model, if there is.")
    real: str = setting("", "Folder of real images: DeepSAD learns them, others are tested on it.")
    detector: str = setting("one_class", "one_class or deepsad.", choices=DETECTORS)
    fnr: float = setting(
        0.005, "Rate of rejected own images to report.", lower_bound=0.0, upper_bound=1.0
    )
    seed: int = setting(0, "Seed of everything random.", lower_bound=0)
    lam: float = setting(
        _DEFAULTS.lam, "Lasso weight (half of the paper's lambda).", lower_bound=0.0
    )
    tol: float = setting(
        _DEFAULTS.tol,
        "Relative duality gap of every inversion; 0: all take max_iters.",
        lower_bound=0.0,
    )
    max_iters: int = setting(
        _DEFAULTS.max_iters,
        "Iterations (at most, if tol is not 0); 0: as few as are found to suffice.",
        lower_bound=0,
    )
    method: str = setting(_DEFAULTS.method, "Solver.", choices=tuple(sorted(lasso.METHODS)))
    num_altered: int = setting(
        _DEFAULTS.num_altered,
        "Altered copies of own images that the one-class detector learns; 0: none.",
        lower_bound=0,
    )
    classifier_steps: int = setting(
        _DEFAULTS.classifier.num_steps,
        "Training steps on altered copies, and as many on impostors.",
        lower_bound=1,
    )
    reconstruction_steps: int = setting(
        _DEFAULTS.reconstruction.num_steps,
        "With --immunize: training steps of a network that draws own images again; 0: none.",
        lower_bound=0,
    )
    immunize: str = setting(
        "none",
        "What happened to the images that will be judged: jpeg-80, noise-0.05, any, ...; own "
        "images are treated so before anything is learned.",
    )
    epochs: int = setting(50, "Epochs of DeepSAD.", lower_bound=1)
    widths: tuple[int, ...] = setting(
        ENCODER_WIDTHS["activations"], "Encoder of DeepSAD.", lower_bound=1
    )


PRESETS = {
    "smoke": {
        "epochs": 1,
        "widths": (8, 8),
        "num_altered": 64,
        "classifier_steps": 5,
        "reconstruction_steps": 5,
    },
    "demo": {"epochs": 6, "widths": (32, 64, 32)},
    "paper": {"tol": 1e-2, "max_iters": 10_000, "method": "primal_dual"},
}


def run(config: Config, record: Run) -> dict[str, Any]:
    """Fit and save; returns what was found about layer, images and calibration."""
    _check_named(config)
    own = _read_folder(config.generated, "generated", record)
    shape = own.images.shape[1:]
    loaded = _read_layer(config, own.images)
    for note in loaded.notes:
        record.note(note)
    for warning in loaded.warnings:
        record.warn(warning)
    real, impostors = (
        _read_folder(path, name, record, shape).images if path else None
        for path, name in ((config.real, "real"), (config.impostors, "impostors"))
    )
    settings = AttributorConfig(
        detector=config.detector,
        lam=config.lam,
        tol=config.tol,
        max_iters=config.max_iters,
        method=config.method,
        classifier=ClassifierConfig(num_steps=config.classifier_steps),
        reconstruction=ReconstructionConfig(num_steps=config.reconstruction_steps),
        num_altered=config.num_altered,
        immunize=config.immunize,
        deepsad=DeepSADConfig(widths=config.widths, epochs=config.epochs),
    )
    start = time.monotonic()
    # Named by all that is fitted to: what an earlier start kept of other images is not taken.
    digest = hashlib.sha256(loaded.z_bar.tobytes())
    for array in (own.images, real, impostors, *jax.tree.leaves(loaded.layer)):
        digest.update(b"" if array is None else np.asarray(array).tobytes())
    kept_bytes = attribution.kept_bytes(
        loaded.layer,
        settings,
        len(own.images),
        0 if real is None else len(real),
        with_impostors=impostors is not None,
    )
    record.need_room(kept_bytes, "features of all images, which are kept until all is done,")
    with record.parts("fit") as progress:
        attributor = attribution.fit(
            loaded.layer,
            loaded.z_bar,
            own.images,
            real if config.detector == "deepsad" else None,
            rng=jax.random.key(config.seed),
            impostors=impostors,
            config=settings,
            progress=progress,
            kept=record.kept(f"fit-{digest.hexdigest()[:12]}"),
        )
    fit_seconds = time.monotonic() - start
    path = record.workdir / "attributor"
    bundle.save(attributor, path)
    own_scores = attributor.calibration_scores
    threshold = calibration.verdict_threshold(own_scores, config.fnr)
    found: dict[str, Any] = {
        "attributor": str(path),
        "attributor_sha256": bundle.describe(path)["sha256"],
        "image_shape": attributor.image_shape,
        "num_generated": len(own.images),
        "left_out": [row._asdict() for row in own.rejected],
        "max_iters": attributor.config.max_iters,
        "num_calibration": len(own_scores),
        "num_unconverged": int(len(own.images) * settings.calibration_share) - len(own_scores),
        "smallest_certifiable_fnr": calibration.smallest_certifiable_fnr(len(own_scores)),
        "fnr": config.fnr,
        "threshold": threshold,
        "mean_mismatch": interop.mean_mismatch(loaded.layer, loaded.z_bar, own.images),
        "notes": [*loaded.notes, *loaded.warnings],
        "fit_seconds": fit_seconds,
    }
    if found["num_unconverged"]:
        record.warn(
            _unconverged(
                config, found["max_iters"], found["num_unconverged"], "own images that calibrate"
            )
        )
    if found["smallest_certifiable_fnr"] > config.fnr > 0:
        record.warn(_too_few(found))
    rivals = {}
    if real is not None and config.detector != "deepsad":
        # Not 0 to 5: `attribution.fit` has these, two of them by `split`.
        treatment = jax.random.fold_in(jax.random.key(config.seed), 100)
        shown = perturbations.apply(config.immunize, real, treatment)
        scored = attribution.score_with_info(attributor, shown)
        rivals["real"] = np.where(scored.converged, scored.score, np.nan)
        # No accuracy: the own scores at hand are those that set the threshold.
        rejected = int((rivals["real"] > threshold).sum())
        found["real"] = {
            "num_images": len(real),
            "rejected": rejected,
            "rejected_interval": list(metrics.clopper_pearson(rejected, len(real))),
            "auc": metrics.auc(own_scores, rivals["real"]),
            "num_unconverged": int((~scored.converged).sum()),
        }
        if found["real"]["num_unconverged"]:
            record.warn(
                _unconverged(
                    config, found["max_iters"], found["real"]["num_unconverged"], "real images"
                )
            )
    _write_page(config, record, found, attributor, own, real, rivals)
    record.say(f"Report: {Path(record.shown) / 'report.html'}")
    return found


def _check_named(config: Config) -> None:
    for name in ("generator", "last_layer", "mean_activation", "generated"):
        if not getattr(config, name):
            raise UsageError(f"--{name} is missing; see --experiment=fit --help")
    if config.detector == "deepsad" and not config.real:
        raise UsageError("--detector=deepsad learns from real images too: give --real=FOLDER")
    perturbations.parse(config.immunize)
    if config.detector == "deepsad" and config.impostors:
        raise UsageError("--impostors are for the one-class detector; leave them out for deepsad")


def _read_folder(
    path: str, name: str, record: Run, shape: tuple[int, ...] | None = None
) -> data.Folder:
    if not os.path.isdir(path):
        raise UsageError(f"--{name}={path} is not a folder")
    record.note(f"reading {path} ...")
    folder = data.read_images(path, image_shape=shape)  # type: ignore[arg-type]
    if folder.rejected:
        first = "; ".join(f"{row.path} {row.reason}" for row in folder.rejected[:3])
        record.warn(f"--{name}: left out {len(folder.rejected)} files ({first})")
    lossy = [file for file in folder.paths if file.lower().endswith(_LOSSY)]
    if lossy and name == "generated":
        record.warn(
            f"--generated: {len(lossy)} of {len(folder.paths)} files ({lossy[0]}, ...) are of a "
            "format that mostly loses something, which untouched images of the model then differ "
            "by: give them as the model made them (PNG), and --immunize=jpeg-90 or the like if "
            "suspects are recompressed"
        )
    if not len(folder.images):
        raise UsageError(f"--{name}={path} holds no usable image of {shape or 'one'} shape")
    return folder


def _read_layer(config: Config, generated: np.ndarray) -> interop.LoadedLayer:
    ending = os.path.splitext(config.generator)[1].lower()
    layout = config.layout
    if layout == "auto":
        layout = _LAYOUTS_BY_ENDING.get(ending, "torch")
    return interop.final_layer(
        interop.read_arrays(config.generator),
        config.last_layer,
        layer=config.layer,
        mean_activation=_read_array(config.mean_activation),
        generated=generated,
        strides=config.strides,
        padding=config.padding,
        output_padding=config.output_padding,
        activation=config.activation,
        bias=config.bias or None,
        layout=layout,
    )


def _read_array(path: str) -> np.ndarray:
    if not os.path.isfile(path):
        raise UsageError(f"--mean_activation={path} is not a file")
    try:
        # Of this format alone: `numpy.load` also opens archives.
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # What a damaged file makes NumPy stumble over is its guess.
        raise UsageError(
            f"--mean_activation={path} is no .npy file of numbers "
            f"({' '.join(str(error).split()) or type(error).__name__}); write it with numpy.save"
        ) from None


def _too_few(found: dict[str, Any]) -> str:
    needed = int(np.ceil(1 / found["fnr"])) - 1
    return (
        f"{found['num_calibration']} calibration images certify no fnr below "
        f"{found['smallest_certifiable_fnr']:.3g}; {found['fnr']:g} takes {needed}, that is about "
        f"{int(np.ceil(needed / _DEFAULTS.calibration_share))} own images in all"
    )


def _unconverged(config: Config, max_iters: int, count: int, what: str) -> str:
    why = (
        f"their inversion did not reach --tol={config.tol:g} in {max_iters} iterations"
        if config.tol
        else "their inversion or their score is not finite"
    )
    return f"{count} {what} are left out or not decided: {why}"


def _write_page(config, record, found, attributor, own, real, rivals) -> None:
    samples = {"own": own.images[:24]} | ({} if real is None else {"real": real[:24]})
    figures = {"samples": report.image_grid(samples, num_columns=24)}
    blocks: list[Any] = [
        report.KeyNumbers(
            [
                (f"{found['num_generated']}", "own images"),
                (f"{found['num_calibration']}", "of them only calibrate"),
                (f"{found['smallest_certifiable_fnr']:.2g}", "smallest fnr they certify"),
                (f"{found['fit_seconds']:.0f} s", "to fit"),
            ]
        ),
        f"An image is called not ours if its score is above {found['threshold']:.4g}: "
        f"at most {100 * max(config.fnr, found['smallest_certifiable_fnr']):.3g} % of the model's "
        "own images are. The rate can be chosen anew with "
        "every question; nothing has to be fitted again.",
    ]
    if found["smallest_certifiable_fnr"] > config.fnr > 0:
        blocks.append(_too_few(found) + ".")
    if found["num_unconverged"]:
        what = "own images that calibrate"
        blocks.append(
            _unconverged(config, found["max_iters"], found["num_unconverged"], what) + "."
        )
    blocks += [note + "." for note in found["notes"]]
    sections = [
        report.Section("Result", blocks),
        report.Section(
            "What it was fitted to",
            [report.Picture(figures["samples"], "Images of every folder, one folder a row.")],
        ),
    ]
    if rivals:
        figures["scores"] = report.score_histograms(
            attributor.calibration_scores, rivals, found["threshold"], fnr=config.fnr
        )
        missed = found["real"]["num_unconverged"]
        sections.append(
            report.Section(
                "Real images",
                [
                    f"Nothing was fitted on them. {_rejected(found['real'])} Area under the ROC "
                    f"curve, against the own images that calibrate: {found['real']['auc']:.3f}.",
                    *(
                        [_unconverged(config, found["max_iters"], missed, "real images") + "."]
                        if missed
                        else []
                    ),
                    report.Picture(figures["scores"], "Scores of own and of real images."),
                ],
            )
        )
    for name, figure in figures.items():
        report.save_figure(figure, record.figures / f"{name}.png")
    rows = [[name, str(value)] for name, value in dataclasses.asdict(config).items()]
    rows += [
        ["attributor, SHA-256", found["attributor_sha256"]],
        [f"{Path(config.generator).name}, SHA-256", _file_digest(config.generator)],
        ["iterations per inversion", str(found["max_iters"])],
        ["mean image against mean activation", f"{found['mean_mismatch']:.3f}"],
    ]
    sections.append(
        report.Section("Settings and hashes", [report.Table(["setting", "value"], rows)])
    )
    report.write_page(
        record.workdir / "report.html",
        "An attributor for your model",
        sections,
        lead=f"It knows {found['num_generated']} images of one model, and its last layer. Ask it "
        f"with: {_next_command(found)}",
    )


def _rejected(real: dict[str, Any]) -> str:
    share = real["rejected"] / real["num_images"]
    low, high = real["rejected_interval"]
    return (
        f"Of {real['num_images']} real images {share:.1%} are called not ours "
        f"(95 % interval {low:.1%} to {high:.1%})."
    )


def _file_digest(path: str) -> str:
    if not os.path.isfile(path):
        return "a folder"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _next_command(found: dict[str, Any]) -> str:
    path = os.path.relpath(found["attributor"])
    return (
        f"python run.py --experiment=attribute --attributor={shlex.quote(path)} "
        "--images=FOLDER --output=verdicts.csv"
    )


def summary(found: dict[str, Any]) -> str:
    """What was fitted, and the command that asks it."""
    height, width, channels = found["image_shape"]
    lines = [
        "",
        f"Attributor for {width} x {height} images, {channels} channel(s): {found['attributor']}",
        f"Fitted to {found['num_generated']} own images in {found['fit_seconds']:.1f} s; "
        f"{found['num_calibration']} of them calibrate.",
        f"Smallest fnr that they certify: {found['smallest_certifiable_fnr']:.3g} "
        "(0.005 takes 199).",
    ]
    if "real" in found:
        lines.append(_rejected(found["real"]))
    return "\n".join([*lines, "", _next_command(found), ""])
