"""What the experiments of paper 2 have in common: root, keys, keyed models, what is measured.

Real images of the training split make the keys, those of the validation split steer Algorithm 1,
those of the test split judge. Every user's model is a stage of the run, so a killed run goes on at
the user where it was; randomness is folded from the number of the user.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments._config import Run, setting
from flipad_jax import data, embedded_features, frechet, inception
from flipad_jax.generators import sampling, zoo
from flipad_jax.generators.sampling import TrainedGenerator
from flipad_jax.registry import attributability, user_generators, user_keys
from flipad_jax.registry.attributability import ErrorStatistics
from flipad_jax.registry.user_generators import KeyedConfig
from flipad_jax.registry.user_keys import KeyConfig

__all__ = [
    "KEY_METHODS",
    "PAPER",
    "PAPER_KEYS",
    "PAPER_MODELS",
    "SMOKE",
    "SMOKE_KEYS",
    "SMOKE_MODELS",
    "Images",
    "KeySettings",
    "Measured",
    "ModelSettings",
    "Settings",
    "UserModel",
    "check",
    "check_room",
    "features_name",
    "frechet_statistics",
    "keys_text",
    "load_images",
    "load_root",
    "make_keys",
    "make_models",
    "mean_std",
    "measure",
    "measured_text",
    "models_text",
    "rng",
    "root_test_images",
    "weights_of",
    "why_missed",
    "with_weights",
]

KEY_METHODS = ("joint", "sequential")
_BATCH = 250


@dataclasses.dataclass(frozen=True)
class KeySettings:
    """Settings of every experiment of paper 2: root, data, search of keys."""

    seed: int = setting(0, "Keys, latents and perturbations are drawn from it.", lower_bound=0)
    root: str = setting(
        "digits_dcgan_0", "Root model: a generator of the zoo, or a file of train_generator."
    )
    dataset: str = setting("digits", "Authentic images: digits, photos, a TFDS name, or a folder.")
    data_dir: str = setting("", "Where TFDS data sets lie; its default if empty.")
    data_seed: int = setting(0, "Seed of the data split, that of the root's.", lower_bound=0)
    key_steps: int = setting(300, "Steps of Adam for the keys.", lower_bound=1)
    key_bandwidth: int = setting(
        0,
        "Keys are made of so many of the lowest frequencies along each side, so that processing "
        "leaves more of them; 0: of all, as in the paper.",
        lower_bound=0,
    )
    num_generated: int = setting(
        4000, "Images of the root that keys are optimised on, as many real ones.", lower_bound=8
    )

    def key_config(self, method: str) -> KeyConfig:
        """Settings of the key search by one of `KEY_METHODS`."""
        if method == "joint":
            start = user_keys.JOINT
        else:
            start = KeyConfig()
        return dataclasses.replace(start, num_steps=self.key_steps, bandwidth=self.key_bandwidth)


@dataclasses.dataclass(frozen=True)
class ModelSettings(KeySettings):
    """Settings of experiments that train keyed models."""

    num_users: int = setting(20, "Keys and keyed models.", lower_bound=2)
    num_steps: int = setting(300, "Updates of a model, per round of Algorithm 1.", lower_bound=1)
    batch_size: int = setting(32, "Latents per update.", lower_bound=1)
    learning_rate: float = setting(1e-3, "Of Adam, betas 0.9 and 0.99.", lower_bound=0.0)
    delta: float = setting(0.01, "Algorithm 1 wants D of at least 1 minus this.", lower_bound=0.0)
    alpha: float = setting(1.1, "Factor of gamma from round to round.", lower_bound=1.0)
    max_rounds: int = setting(10, "Rounds of Algorithm 1, at most.", lower_bound=1)
    num_search: int = setting(
        1000, "Images of a model, and real ones, that Algorithm 1 looks at.", lower_bound=8
    )

    def keyed_config(self, **changes: Any) -> KeyedConfig:
        """Settings of Algorithm 1, eq. 10 and eq. 12."""
        common = {
            "num_steps": self.num_steps,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "delta": self.delta,
            "alpha": self.alpha,
            "max_rounds": self.max_rounds,
        }
        return KeyedConfig(**{**common, **changes})


@dataclasses.dataclass(frozen=True)
class Settings(ModelSettings):
    """Settings of experiments that measure the models they train."""

    key_method: str = setting(
        "joint", "All keys as one problem, or eq. 9 one after the other.", choices=KEY_METHODS
    )
    num_test: int = setting(1000, "Images of every model that judge it.", lower_bound=8)
    features: str = setting(
        "embedded",
        "Of the Frechet distance: the embedded classifier, or inception (pool3, as FID has it).",
        choices=("embedded", "inception"),
    )
    inception_weights: str = setting("", "File of Inception-V3 weights (pytorch-fid's).")


# Presets of the three classes.
SMOKE_KEYS: dict[str, Any] = {"key_steps": 40, "num_generated": 200}
SMOKE_MODELS: dict[str, Any] = {
    **SMOKE_KEYS,
    "num_users": 2,
    "num_steps": 12,
    "batch_size": 8,
    "max_rounds": 2,
    "num_search": 60,
}
SMOKE: dict[str, Any] = {**SMOKE_MODELS, "num_test": 60}

# MNIST in the paper: 10 epochs of its 60 000 images, batch 16 ([P2] Table 3).
PAPER_KEYS: dict[str, Any] = {
    "root": "",  # to be trained on all of MNIST: none ships
    "dataset": "mnist",
    "key_steps": 37_500,
    "num_generated": 50_000,
}
PAPER_MODELS: dict[str, Any] = {
    **PAPER_KEYS,
    "num_users": 100,
    "num_steps": 37_500,
    "batch_size": 16,
}
PAPER: dict[str, Any] = {**PAPER_MODELS, "key_method": "sequential", "num_test": 5000}


class Images(NamedTuple):
    """Real images by use, and the root's that keys are made of; uint8 `[n, h, w, c]`.

    A split that an experiment does not look at is not read: `[0, h, w, c]`.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    generated: np.ndarray


def check(settings: KeySettings) -> None:
    """Find what cannot work before minutes are spent.

    Raises:
      ValueError: naming the setting.
    """
    if isinstance(settings, Settings):
        if settings.features == "inception" and not settings.inception_weights:
            raise ValueError("--features=inception needs --inception_weights=FILE")
    if not settings.root:
        raise ValueError(
            "--root is missing: a file of --experiment=train_generator, trained on the same data "
            f"set, or a generator of the zoo: {', '.join(zoo.names())}"
        )
    for method in KEY_METHODS:
        settings.key_config(method)
    if isinstance(settings, ModelSettings):
        settings.keyed_config()


def check_room(settings: KeySettings, root: TrainedGenerator, flag: str, needed: int) -> None:
    """Every key at right angles to all others takes a direction of its own.

    Args:
      settings: may keep keys to the lowest frequencies, which leaves fewer directions.
      root: G_0.
      flag: what asks for the keys, for the message.
      needed: directions.
    Raises:
      ValueError: if there are fewer.
    """
    height, width, channels = root.image_shape
    band = settings.key_bandwidth
    room = min(band or height, height) * min(band or width, width) * channels
    if needed > room:
        where = f"images of {room} numbers have"
        if band:
            where = f"their lowest {band} x {band} frequencies (--key_bandwidth={band}) have"
        raise ValueError(
            f"{flag}: so many keys do not fit the root's images: {where} room for {room} of "
            f"the {needed} directions that are needed"
        )


def load_root(settings: KeySettings) -> TrainedGenerator:
    """G_0, by its name in the zoo or from a file.

    Raises:
      ValueError: if it is neither.
    """
    if settings.root in zoo.names():
        return zoo.load(settings.root)
    if not Path(settings.root).is_file():
        raise ValueError(
            f"--root={settings.root} is no file, and no generator of the zoo: "
            f"{', '.join(zoo.names())}"
        )
    return zoo.load_file(settings.root)


def load_images(
    settings: KeySettings, root: TrainedGenerator, *, num_validation: int = 0, num_test: int = 0
) -> Images:
    """Real images of the splits and images of the root.

    Args:
      settings: `num_generated` says how many images of the training split and of the root.
      root: G_0.
      num_validation, num_test: images of the other two splits, or as many as there are; 0: none.
    Raises:
      ValueError: if the data set has images of another size or colour than the root.
    """

    def load(split: str, most: int) -> np.ndarray:
        if not most:
            return np.zeros((0, *root.image_shape), np.uint8)
        return data.load(
            settings.dataset,
            split=split,
            image_size=root.image_shape[0],
            num_images=most,
            exact=False,
            seed=settings.data_seed,
            data_dir=settings.data_dir or None,
        )

    train = load("train", settings.num_generated)
    if train.shape[1:] != root.image_shape:
        raise ValueError(
            f"--dataset={settings.dataset} has images {train.shape[1:]}, the root makes "
            f"{root.image_shape}: a key belongs to one size"
        )
    return Images(
        train,
        load("validation", num_validation),
        load("test", num_test),
        sampling.generate(root, rng(settings, 0), settings.num_generated),
    )


def rng(settings: KeySettings, *path: int) -> jax.Array:
    """The key of one use: 0 images of the root, 1 keys, 2 training, 3 measuring, ..."""
    found = jax.random.key(settings.seed)
    for part in path:
        found = jax.random.fold_in(found, part)
    return found


def make_keys(
    settings: KeySettings,
    record: Run,
    images: Images,
    num_keys: int,
    method: str,
    *,
    cosine: float = 0.0,
    name: str = "keys",
) -> np.ndarray:
    """Keys `[num_keys, h, w, c]` by one of `KEY_METHODS`: a stage of the run.

    A cosine other than 0 is always found jointly.
    """
    method = method if not cosine else "joint"
    config = settings.key_config(method)

    def compute() -> dict[str, np.ndarray]:
        key_rng = rng(settings, 1, round(1000 * cosine))
        if method == "joint":
            found = user_keys.joint(
                key_rng, images.train, images.generated, num_keys, cosine=cosine, config=config
            )
            return {"keys": found}
        with record.progress(num_keys, f"{num_keys} keys by eq. 9") as bar:
            found = user_keys.sequential(
                key_rng,
                images.train,
                images.generated,
                num_keys,
                config=config,
                progress=lambda _: bar.update(),
            )
        return {"keys": found}

    return record.stage(name, compute, text=f"{num_keys} keys ({method})")["keys"]


def root_test_images(settings: KeySettings, root: TrainedGenerator, num_images: int) -> np.ndarray:
    """Images of G_0 that no key and no model was made of."""
    return sampling.generate(root, rng(settings, 4), num_images)


class UserModel(NamedTuple):
    """A keyed model as Algorithm 1 left it."""

    generator: TrainedGenerator
    gamma: float
    rounds: int
    reached: bool
    seconds: float  # of its training; of a group of models, its share


def make_models(
    settings: ModelSettings,
    record: Run,
    root: TrainedGenerator,
    images: Images,
    keys: np.ndarray,
    *,
    together: int = 1,
    name: str = "model",
) -> list[UserModel]:
    """Algorithm 1 for every key, `together` of them in a stage."""
    config = settings.keyed_config()
    found = []
    for first in range(0, len(keys), together):
        part = keys[first : first + together]
        last = first + len(part) - 1
        stage = f"{name}-{first}" if last == first else f"{name}-{first}-{last}"
        compute = functools.partial(_search, settings, record, root, images, part, first, config)
        text = f"{name} {first + 1}" + (f" to {last + 1}" if last > first else "")
        arrays = record.stage(stage, compute, text=f"{text} of {len(keys)}: Algorithm 1")
        for index in range(len(part)):
            weights = {key: value[index] for key, value in arrays.items() if "." in key}
            found.append(
                UserModel(
                    with_weights(root, weights),
                    float(arrays["gamma"][index]),
                    int(arrays["rounds"][index]),
                    bool(arrays["reached"][index]),
                    record.seconds[stage] / len(part),
                )
            )
            if not found[-1].reached:
                rounds = found[-1].rounds
                record.warn(
                    f"{name} {first + index + 1}: D is below {1 - settings.delta:g} after {rounds} "
                    f"rounds; {why_missed(rounds)}"
                )
    return found


def why_missed(rounds: int) -> str:
    """What to say of a model that Algorithm 1 left below the wanted D, after so many rounds."""
    if rounds:
        return "more --max_rounds or --num_steps may help"
    return (
        "it was not trained, as no gamma would do: too many real images are on its side of the "
        "key, or no shift within the pixels' range is seen"
    )


def _search(settings, record, root, images, keys, first, config) -> dict[str, np.ndarray]:
    with record.parts(f"models {first + 1} to {first + len(keys)}") as progress:
        found = user_generators.search(
            root,
            keys,
            images.validation,
            rng(settings, 2),
            config,
            first=first,
            num_images=settings.num_search,
            progress=progress,
        )
    return {
        **weights_of(found.state.params),
        "gamma": found.gammas,
        "rounds": found.rounds,
        "reached": found.reached,
    }


def weights_of(params: Any) -> dict[str, np.ndarray]:
    """Weights as the arrays of a stage, "params.a.b" each."""
    flat = traverse_util.flatten_dict(jax.device_get(params), sep=".")
    return {f"params.{name}": value for name, value in flat.items()}


def with_weights(root: TrainedGenerator, weights: Mapping[str, np.ndarray]) -> TrainedGenerator:
    """The root with weights that `weights_of` wrote."""
    flat = {name.removeprefix("params."): value for name, value in weights.items()}
    params = traverse_util.unflatten_dict(flat, sep=".")
    return dataclasses.replace(root, variables={**root.variables, "params": params})


# --- what is measured -----------------------------------------------------------------------------


class Measured(NamedTuple):
    """A model on `num_test` latents that no training saw.

    Attributes:
      responses: `[n, N]` of its images, as 8-bit files have them, to all keys.
      error: eps of eq. 5 along every key.
      error_mean, error_variance: mu and the diagonal of Sigma, `[D]`.
      shift: ||Delta x|| in both readings.
      distance: Frechet distance to real images.
      images: the first 16, uint8.
    """

    responses: np.ndarray
    error: ErrorStatistics
    error_mean: np.ndarray
    error_variance: np.ndarray
    shift: attributability.ShiftLength
    distance: float
    images: np.ndarray


@jax.jit
def _float_images(generator: TrainedGenerator, z: jax.Array) -> jax.Array:
    return cast(jax.Array, generator.module.apply(generator.variables, z))


def measure(
    settings: Settings,
    record: Run,
    root: TrainedGenerator,
    keys: np.ndarray,
    generator: TrainedGenerator,
    index: int,
    gamma: float,
    real: frechet.FeatureStatistics,
    *,
    name: str,
) -> Measured:
    """Measure one user's model: a stage of the run.

    Args:
      settings, record, root: of the experiment.
      keys: of all users.
      generator: the model.
      index: of its user.
      gamma: its shift; 0 where eq. 5 says nothing (robust training), then the error is the whole
        difference.
      real: features of real images, from `frechet_statistics`.
      name: of the stage.
    """

    def compute() -> dict[str, Any]:
        latent_rng = rng(settings, 3, index)
        found, errors, shown = [], [], []
        total, squares, norms = 0.0, 0.0, 0.0

        def batches():
            nonlocal total, squares, norms
            for start in range(0, settings.num_test, _BATCH):
                count = min(_BATCH, settings.num_test - start)
                z = sampling.latents(latent_rng, start + jnp.arange(_BATCH), root.latent_dim)
                made = np.asarray(_float_images(generator, z))[:count]
                difference = made - np.asarray(_float_images(root, z))[:count]
                error = difference - gamma * keys[index]
                images = data.to_uint8(made)
                found.append(attributability.responses(keys, images))
                errors.append(attributability.project(keys, error))
                flat = error.reshape(count, -1).astype(np.float64)
                total, squares = total + flat.sum(axis=0), squares + np.square(flat).sum(axis=0)
                norms += np.linalg.norm(difference.reshape(count, -1), axis=1).sum(dtype=np.float64)
                shown.append(images[:16])
                yield images

        features = _feature_function(settings)
        statistics = frechet.statistics(features(images) for images in batches())
        along = np.concatenate(errors).astype(np.float64)
        mean = total / settings.num_test
        return {
            "responses": np.concatenate(found),
            "error_along_mean": along.mean(axis=0),
            "error_along_std": along.std(axis=0, ddof=1),
            "error_mean": mean,
            "error_variance": np.maximum(squares / settings.num_test - np.square(mean), 0),
            # The mean difference is mu + gamma phi.
            "shift": np.array(
                [np.linalg.norm(mean + gamma * keys[index].ravel()), norms / settings.num_test]
            ),
            "distance": frechet.distance(statistics, real),
            "images": shown[0],
        }

    arrays = record.stage(name, compute, text=f"{name}: measured")
    return Measured(
        arrays["responses"],
        ErrorStatistics(arrays["error_along_mean"], arrays["error_along_std"], settings.num_test),
        arrays["error_mean"],
        arrays["error_variance"],
        attributability.ShiftLength(*map(float, arrays["shift"])),
        float(arrays["distance"]),
        arrays["images"],
    )


def features_name(settings: Settings) -> str:
    """What stands beside every Frechet distance."""
    return embedded_features.NAME if settings.features == "embedded" else "Inception-V3 pool3 (FID)"


@functools.cache
def _inception(path: str) -> inception.Inception:
    return inception.load(path, variant="fid")


@jax.jit
def _pool3(network: inception.Inception, images: jax.Array) -> jax.Array:
    """As pytorch-fid feeds its network: RGB in [-1, 1], 299 x 299, bilinear."""
    x = images.astype(jnp.float32) / 127.5 - 1
    x = jax.image.resize(x, (x.shape[0], 299, 299, x.shape[3]), "bilinear")
    x = jnp.broadcast_to(x, (*x.shape[:3], 3))
    return inception.features(network, x, layer="pool3")


def _feature_function(settings: Settings) -> Callable[[np.ndarray], np.ndarray]:
    if settings.features == "embedded":
        return embedded_features.features
    network = _inception(settings.inception_weights)
    return lambda images: np.asarray(_pool3(network, jnp.asarray(images)))


def frechet_statistics(settings: Settings, images: np.ndarray) -> frechet.FeatureStatistics:
    """Feature statistics of images."""
    features = _feature_function(settings)
    return frechet.statistics(
        features(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)
    )


def mean_std(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation over models, as the paper's tables have it: 0.98 (0.01)."""
    array = np.asarray(values, float)
    deviation = array.std(ddof=1) if len(array) > 1 else 0.0
    return f"{array.mean():.{digits}f} ({deviation:.{digits}f})"


def keys_text(settings: KeySettings, images: Images, method: str) -> str:
    """How the keys were found, for the page."""
    config = settings.key_config(method)
    how = "all at once" if method == "joint" else "one after the other by eq. 9"
    excess = (
        f", with weight {config.excess:g} on responses beyond -2, which eq. 9 does not have"
        if config.excess
        else ""
    )
    band = (
        f", made of the lowest {config.bandwidth} x {config.bandwidth} frequencies, which the "
        "paper does not ask for"
        if config.bandwidth
        else ""
    )
    return (
        f"Root {settings.root}, authentic images {settings.dataset}. Keys {how}{band}: "
        f"{config.num_steps} steps of Adam on {len(images.train)} training images and "
        f"{len(images.generated)} of the root{excess}."
    )


def models_text(settings: ModelSettings, images: Images) -> str:
    """How the models were trained, for the page."""
    return (
        f"Algorithm 1: {settings.num_steps} updates of {settings.batch_size} latents a round, "
        f"gamma times {settings.alpha:g} until D is {1 - settings.delta:g} on "
        f"{settings.num_search} own and {len(images.validation)} validation images, at most "
        f"{settings.max_rounds} rounds; it begins at the first gamma with which a perfect model "
        "would be seen."
    )


def measured_text(settings: Settings, images: Images) -> str:
    """What models were measured on, for the page."""
    return (
        f"Measured on {settings.num_test} images of every model and {len(images.test)} test images."
        f" Frechet distances: {features_name(settings)}."
    )
