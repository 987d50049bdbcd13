"""Train the small classifier whose features the embedded Frechet distance compares.

Ten digits and seven photographs are its classes; its last hidden layer is what
`flipad_jax.embedded_features` measures. Crops of photographs are 32 x 32, mirrored and shifted
copies of all images are added. WORKDIR/features.safetensors is the file that ships.

    python run.py --experiment=train_features
"""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from experiments._config import Run, setting
from flipad_jax import data, embedded_features, files, report
from flipad_jax.generators import layers

_NUM_DIGITS = 10


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the training."""

    seed: int = setting(0, "Initial weights and order of the images.", lower_bound=0)
    num_photos: int = setting(8000, "Crops of photographs to train on.", lower_bound=32)
    num_test: int = setting(500, "Images of each data set to test on.", lower_bound=8)
    epochs: int = setting(12, "Passes over all images.", lower_bound=1)
    batch_size: int = setting(128, "Images per update.", lower_bound=2)
    learning_rate: float = setting(1e-3, "Of Adam, decaying to zero by a cosine.", lower_bound=0.0)


PRESETS = {"smoke": {"num_photos": 300, "num_test": 50, "epochs": 1}, "demo": {}}


def _images(split: str, count: int | None, digits: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Digits and crops of photographs as the network takes them (uint8), and their classes."""
    grey = data.load("digits", split=split, image_size=32, num_images=digits)
    colour = data.load("photos", split=split, image_size=32, num_images=count)
    labels = [
        data.load_labels("digits", split=split, image_size=32, num_images=digits),
        _NUM_DIGITS + data.load_labels("photos", split=split, image_size=32, num_images=count),
    ]
    return np.concatenate([np.repeat(grey, 3, axis=3), colour]), np.concatenate(labels)


def _moved(rng: jax.Array, images: jax.Array) -> jax.Array:
    """Every image moved by up to two pixels, its border repeated."""
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    corners = jax.random.randint(rng, (len(images), 2), 0, 5)
    return jax.vmap(
        lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])
    )(padded, corners)


def _with_unit_features(params: Any, images: np.ndarray) -> Any:
    """The same classifier with features of variance 1 on its training images.

    The layer behind takes max(feature, 0), which a positive factor passes through.
    """
    apply = jax.jit(lambda x: embedded_features.Network().apply({"params": params}, x)[0])
    batches = [images[i : i + 500] for i in range(0, len(images), 500)]
    found = [np.asarray(apply(embedded_features.prepare(jnp.asarray(b)))) for b in batches]
    std = np.concatenate(found).std(axis=0)
    std = np.where(std > 0, std, 1).astype(np.float32)
    hidden, last = params["Linear_0"], params["Linear_1"]
    return {
        **params,
        "Linear_0": {name: value / std for name, value in hidden.items()},
        "Linear_1": {**last, "kernel": last["kernel"] * std[:, None]},
    }


def run(config: Config, record: Run) -> dict[str, Any]:
    """Train, test, save; returns the accuracies and the hash of the file."""
    images, labels = _images("train", config.num_photos, None)
    network = embedded_features.Network()
    init_rng, order_rng, move_rng = jax.random.split(jax.random.key(config.seed), 3)
    per_epoch = len(images) // config.batch_size
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.epochs * per_epoch)
    optimizer = optax.adamw(schedule, weight_decay=1e-3)
    init = layers.jit_for_one_run(network.init)
    params = init(init_rng, jnp.zeros((1, 32, 32, 3)))["params"]

    @jax.jit
    def step(params, state, rng, batch, classes):
        x = _moved(rng, embedded_features.prepare(batch))

        def loss(params):
            logits = network.apply({"params": params}, x)[1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    with record.progress(config.epochs * per_epoch, "training the classifier") as bar:
        for epoch in range(config.epochs):
            shuffled = jax.random.permutation(jax.random.fold_in(order_rng, epoch), len(images))
            order = np.asarray(shuffled)
            for i in range(per_epoch):
                chosen = order[i * config.batch_size : (i + 1) * config.batch_size]
                rng = jax.random.fold_in(move_rng, epoch * per_epoch + i)
                params, state, value = step(params, state, rng, images[chosen], labels[chosen])
                bar.update()
            loss = float(value)
            if not np.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} in epoch {epoch + 1}")
            record.log_metrics(step=(epoch + 1) * per_epoch, loss=loss)
    params = _with_unit_features(params, images)
    # The rounded weights are the network: they are what is tested and what ships.
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    halves = {name: np.ascontiguousarray(value, np.float16) for name, value in flat.items()}
    rounded = traverse_util.unflatten_dict(
        {name: value.astype(np.float32) for name, value in halves.items()}, sep="/"
    )
    test_images, test_labels = _images("test", config.num_test, config.num_test)
    logits = np.asarray(
        network.apply({"params": rounded}, embedded_features.prepare(jnp.asarray(test_images)))[1]
    )
    right = logits.argmax(axis=1) == test_labels
    from safetensors.numpy import save

    content = save(halves)
    files.write_atomically(record.workdir / "features.safetensors", content)
    metrics = {
        "accuracy_digits": float(right[test_labels < _NUM_DIGITS].mean()),
        "accuracy_photos": float(right[test_labels >= _NUM_DIGITS].mean()),
        "num_test": len(test_labels),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    report.write_page(
        record.workdir / "report.html",
        "Classifier for Frechet distances",
        [report.Section("Result", [_table(metrics)])],
        lead="A network whose last hidden layer stands in for Inception's where nothing can be "
        "downloaded.",
    )
    return metrics


def _table(metrics: dict[str, Any]) -> report.Table:
    rows = [[name, metrics[f"accuracy_{name}"]] for name in ("digits", "photos")]
    return report.Table(["held-out images", "accuracy"], rows, formats={"accuracy": ".1%"})


def summary(metrics: dict[str, Any]) -> str:
    """Accuracies, as the terminal shows them."""
    table = _table(metrics)
    return report.table_text(table.header, table.rows, formats=table.formats)
