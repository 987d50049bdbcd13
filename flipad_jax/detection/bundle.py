"""The bundle: an attributor on disk, one folder of two files. Nothing is pickled.

*   `attributor.safetensors`: every array: last layer, mean activation, detector, calibration
    scores.
*   `attributor.json`: everything else, in plain words: format, version of the library, convention,
    what images it takes and in what range, settings, the hash of the last layer's weights, the hash
    of the other file, and its own.

A folder of another format, with a changed byte in either file, or with one of the two missing is
refused, and the message says which it is. What comes out of `load` does not depend on the device,
or the number of devices, that wrote it.
"""

import dataclasses
import hashlib
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util

from flipad_jax import files
from flipad_jax.detection import features, one_class
from flipad_jax.detection.attributor import (
    ActivationProfile,
    Attributor,
    AttributorConfig,
    DeepSADDetector,
)
from flipad_jax.detection.classifier import Classifier, ClassifierConfig
from flipad_jax.detection.deepsad import DeepSAD, DeepSADConfig
from flipad_jax.detection.one_class import OneClass, OneClassConfig
from flipad_jax.detection.reconstruction import ReconstructionConfig, Reconstructor
from flipad_jax.detection.validity import Validity
from flipad_jax.inversion import linops
from flipad_jax.inversion.final_layer import FinalLayer

__all__ = ["FORMAT", "describe", "load", "save"]

FORMAT = 4
_ARRAYS, _SETTINGS = "attributor.safetensors", "attributor.json"
_OPERATORS = {cls.__name__: cls for cls in (linops.ConvTranspose, linops.Conv, linops.Dense)}


def save(attributor: Attributor, path: str | os.PathLike) -> None:
    """Write an attributor as a folder of two files.

    Both appear complete or not at all, and a folder that was being replaced when the process died
    is refused by `load`: it never mixes an old and a new one.

    Raises:
      OSError: if the folder cannot be written.
    """
    from safetensors.numpy import save as save_arrays

    import flipad_jax

    layer = attributor.layer
    operator_arrays, geometry = _split_fields(layer.operator)
    tree: dict[str, Any] = {
        "operator": operator_arrays,
        "bias": layer.bias,
        "z_bar": attributor.z_bar,
        "detector": serialization.to_state_dict(attributor.detector),
        "calibration_scores": attributor.calibration_scores,
    }
    if attributor.profile is not None:
        tree["profile"] = {"mean": attributor.profile.mean, "std": attributor.profile.std}
    if attributor.validity is not None:
        tree["validity"] = serialization.to_state_dict(attributor.validity)
    flat = traverse_util.flatten_dict(tree, sep="/")
    content = save_arrays(
        {name: np.ascontiguousarray(value) for name, value in flat.items() if value is not None}
    )
    settings = {
        "format": FORMAT,
        "flipad_jax": flipad_jax.__version__,
        "convention": "paper",
        "images": {
            "shape": attributor.image_shape,
            "values": "uint8, or floating point in [-1, 1] with x = u / 127.5 - 1",
            "preprocessing": "none: pixels as they are stored, nothing resized or rotated",
        },
        "layer_sha256": _layer_digest(layer),
        "num_calibration": len(attributor.calibration_scores),
        "operator": {"kind": type(layer.operator).__name__, **geometry},
        "activation": layer.activation,
        "config": dataclasses.asdict(attributor.config),
        "files": {_ARRAYS: hashlib.sha256(content).hexdigest()},
    }
    if isinstance(attributor.detector, DeepSADDetector):
        fitted = attributor.detector.features
        settings["features"] = {
            "config": dataclasses.asdict(fitted.config),
            "input_shape": fitted.input_shape,
        }
        settings["deepsad"] = {
            "config": dataclasses.asdict(attributor.detector.model.config),
            "input_shape": attributor.detector.model.input_shape,
        }
    if attributor.profile is not None:
        settings["profile"] = {"num_images": attributor.profile.num_images}
    settings["sha256"] = _digest(settings)
    text = json.dumps(settings, indent=1) + "\n"
    # JSON last: until it names the new digest the old pair is broken, not mixed.
    files.write_atomically(os.path.join(path, _ARRAYS), content)
    files.write_atomically(os.path.join(path, _SETTINGS), text.encode())


def load(path: str | os.PathLike) -> Attributor:
    """Read an attributor written by `save`, on whatever device is there.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if the files are damaged, do not belong together, or have another format.
    """
    from safetensors.numpy import load as load_arrays

    settings = describe(path)
    content = _read(path, _ARRAYS)
    try:
        same = hashlib.sha256(content).hexdigest() == settings["files"][_ARRAYS]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)} is not an attributor: {error}") from error
    if not same:
        raise ValueError(
            f"{os.fspath(path)}: {_ARRAYS} is damaged or not the file that {_SETTINGS} was "
            "written with; fit the attributor again or restore the folder from a copy"
        )
    try:
        return _assemble(settings, load_arrays(content))
    except Exception as error:  # Whatever an attributor's parts say to what no `save` wrote.
        raise ValueError(
            f"{os.fspath(path)} is not an attributor: {type(error).__name__}: {error}"
        ) from error


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """What the settings of a bundle say, without its arrays.

    Returns:
      The content of `attributor.json`: `format`, `flipad_jax` (version), `images`, `layer_sha256`,
      `num_calibration`, `config`, ...; `sha256` names the whole bundle, arrays included.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged or has another format.
    """
    name = os.fspath(path)
    try:
        settings = json.loads(_read(path, _SETTINGS))
    except (ValueError, RecursionError) as error:  # JSON, or its bytes
        raise ValueError(
            f"{name}: {_SETTINGS} is damaged ({error}); restore the folder from a copy"
        ) from error
    if not isinstance(settings, dict) or not isinstance(settings.get("format"), int):
        raise ValueError(f"{name} is not an attributor: {_SETTINGS} names no format")
    if settings["format"] != FORMAT:
        newer = settings["format"] > FORMAT
        raise ValueError(
            f"{name} has format {settings['format']}, written by flipad_jax "
            f"{settings.get('flipad_jax', 'of an early version')}; this version reads format "
            f"{FORMAT}: {'update flipad_jax' if newer else 'fit the attributor again'}"
        )
    if settings.get("sha256") != _digest(settings):
        raise ValueError(
            f"{name}: {_SETTINGS} was changed after it was written; restore it from a copy"
        )
    return settings


def _read(path: str | os.PathLike, name: str) -> bytes:
    try:
        with open(os.path.join(path, name), "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{os.fspath(path)} is not an attributor: {name} is missing; expected a folder that "
            "`save` or --experiment=fit wrote"
        ) from None


def _digest(settings: dict[str, Any]) -> str:
    """SHA-256 of all settings but the digest itself."""
    rest = {name: value for name, value in settings.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _layer_digest(layer: FinalLayer) -> str:
    """Names the weights of the last layer: two attributors of one model share it."""
    found = hashlib.sha256()
    arrays, _ = _split_fields(layer.operator)
    for value in (*arrays.values(), layer.bias):
        if value is not None:
            found.update(np.ascontiguousarray(value, np.float32).tobytes())
    return found.hexdigest()


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _split_fields(instance: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Array fields and settings of a dataclass whose static fields are plain values."""
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    arrays = {
        name: value for name, value in values.items() if isinstance(value, (jax.Array, np.ndarray))
    }
    return arrays, {name: value for name, value in values.items() if name not in arrays}


def _assemble(settings: dict[str, Any], flat: dict[str, np.ndarray]) -> Attributor:
    tree = traverse_util.unflatten_dict(flat, sep="/")
    image_shape = _tuples(settings["images"]["shape"])
    geometry = {name: _tuples(value) for name, value in settings["operator"].items()}
    operator_class = _OPERATORS[geometry.pop("kind")]
    operator = operator_class(**jax.tree.map(jnp.asarray, tree["operator"]), **geometry)
    bias = tree.get("bias")
    layer = FinalLayer(
        operator, None if bias is None else jnp.asarray(bias), settings["activation"]
    )
    stored = dict(settings["config"])
    stored["one_class"] = OneClassConfig(**stored["one_class"])
    stored["classifier"] = ClassifierConfig(**stored["classifier"])
    stored["reconstruction"] = ReconstructionConfig(**stored["reconstruction"])
    if stored["deepsad"] is not None:
        stored["deepsad"] = DeepSADConfig(**stored["deepsad"])
    config = AttributorConfig(**stored)
    arrays = jax.tree.map(jnp.asarray, tree["detector"])
    detector: OneClass | DeepSADDetector
    if config.detector == "one_class":
        classifiers: dict[str, Classifier | Reconstructor] = {
            name: Classifier(
                parts["variables"],
                parts.get("offset"),
                parts.get("scale"),
                geometry["input_shape"] if "offset" in parts else image_shape,
                config.classifier,
            )
            for name, parts in arrays.get("classifiers", {}).items()
            if name != "reconstruction"
        }
        if "reconstruction" in arrays.get("classifiers", {}):
            variables = arrays["classifiers"]["reconstruction"]["variables"]
            classifiers["reconstruction"] = Reconstructor(
                variables, image_shape, config.reconstruction
            )
        detector = OneClass(
            mean=arrays["mean"],
            directions=arrays["directions"],
            moments=one_class.Gaussian(**arrays["moments"]),
            quantiles=one_class.Gaussian(**arrays["quantiles"]),
            reference=arrays["reference"],
            classifiers=classifiers,
            input_shape=geometry["input_shape"],
            config=config.one_class,
        )
    else:
        fitted = features.FittedFeatures(
            **{name: arrays.get("features", {}).get(name) for name in ("mean", "std", "channels")},
            config=features.FeatureConfig(**settings["features"]["config"]),
            input_shape=_tuples(settings["features"]["input_shape"]),
        )
        model = DeepSAD(
            **arrays["model"],
            config=DeepSADConfig(**settings["deepsad"]["config"]),
            input_shape=_tuples(settings["deepsad"]["input_shape"]),
        )
        detector = DeepSADDetector(fitted, model)
    profile, untouched = (
        jax.tree.map(jnp.asarray, tree[name]) if name in tree else None
        for name in ("profile", "validity")
    )
    return Attributor(
        layer,
        jnp.asarray(tree["z_bar"]),
        detector,
        tree["calibration_scores"],
        config,
        profile and ActivationProfile(**profile, **settings["profile"]),
        untouched and Validity(**untouched, image_shape=image_shape),
    )
