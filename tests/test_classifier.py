"""The networks that tell own images from lookalikes: they learn, repeat themselves, refuse."""

import jax
import numpy as np
import pytest

from flipad_jax import data, metrics
from flipad_jax.detection import classifier
from flipad_jax.detection.classifier import ClassifierConfig
from flipad_jax.detection.feature_rows import FeatureRows

CONFIG = ClassifierConfig(widths=(8, 16), num_steps=60, batch_size=32)


def images(seed, num, level):
    """Squares on a background whose darkest grey levels are all that differs."""
    rng = np.random.default_rng(seed)
    made = (rng.random((num, 16, 16, 1)) < 0.3).astype(np.uint8) * level
    for image in made:
        row, column = rng.integers(0, 10, 2)
        image[row : row + 6, column : column + 6] = rng.integers(100, 255)
    return made


def test_learns_what_no_eye_sees():
    model = classifier.fit(
        jax.random.key(0), images(1, 300, level=1), images(2, 300, level=2), CONFIG
    )
    own, others = (
        classifier.logits(model, images(seed, 100, level)) for seed, level in ((3, 1), (4, 2))
    )
    assert metrics.auc(own, others) > 0.95
    assert own.shape == (100,) and own.dtype == np.float64


def test_batches_and_dtypes_do_not_matter():
    steps = []
    config = ClassifierConfig(widths=(4,), num_steps=3)
    own, others = images(1, 40, 1), images(2, 40, 2)
    fit = lambda **options: classifier.fit(  # noqa: E731
        jax.random.key(3), own, others, config, **options
    )
    model, again = fit(progress=steps.append), fit()
    assert steps == [1, 2, 3]
    scores = classifier.logits(model, own)
    np.testing.assert_array_equal(scores, classifier.logits(again, own))
    np.testing.assert_allclose(classifier.logits(model, own, batch_size=7), scores, atol=1e-5)
    floats = (own / 127.5 - 1).astype(np.float32)
    np.testing.assert_allclose(classifier.logits(model, floats), scores, atol=1e-5)
    assert classifier.logits(model, own[:0]).shape == (0,)


@pytest.mark.parametrize(
    "shape, corners",
    [
        ((64, 32, 1), [(0, 0)]),
        ((65, 64, 1), [(0, 0)]),  # a last row that no square at a multiple of 8 reaches
        ((100, 64, 3), [(0, 0), (32, 0)]),
        ((128, 72, 1), [(0, 0), (0, 8), (64, 0), (64, 8)]),
    ],
)
def test_large_images_are_seen_in_squares(shape, corners):
    assert classifier._corners(shape, 64) == corners
    rng = np.random.default_rng(0)
    own = rng.integers(0, 256, (40, *shape), np.uint8)
    config = ClassifierConfig(widths=(4,), num_steps=2, batch_size=8)
    model = classifier.fit(jax.random.key(0), own, own[::-1] // 2, config)
    seen = (64, min(64, shape[1]), shape[2])
    small = classifier.Classifier(model.variables, None, None, seen, config)
    parts = [
        classifier.logits(small, np.ascontiguousarray(own[:5, y : y + 64, x : x + 64]))
        for y, x in corners
    ]
    np.testing.assert_allclose(
        classifier.logits(model, own[:5]), np.mean(parts, axis=0), rtol=1e-4, atol=1e-5
    )


def test_training_sees_squares_at_multiples_of_eight():
    images = np.arange(80 * 88).reshape(1, 80, 88, 1) % 251
    images = np.repeat(images, 200, axis=0).astype(np.uint8)
    corners = classifier._corners((80, 88, 1), 8)
    assert len(corners) == 3 * 4
    shown = classifier._squares(images, np.arange(200), corners, np.random.default_rng(0))
    assert shown.shape == (200, 64, 64, 1)
    seen = {int(square[0, 0, 0]) for square in data.to_uint8(shown)}
    assert seen == {int(images[0, y, x, 0]) for y, x in corners}


def test_activations_are_told_by_their_channels(tmp_path):
    """Of two correlated channels, one is turned over in the others; means and spreads are alike."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((900, 8, 8, 1)).astype(np.float32)
    own = np.concatenate([base, base + 0.1 * rng.standard_normal(base.shape)], 3) * (1, 200) + 5
    others = np.concatenate([base[:400], -base[:400]], 3) * (1, 200) + 5
    own, others = own.astype(np.float32), others.astype(np.float32)
    rows = FeatureRows((600, 8, 8, 2), in_memory=0)
    rows[0:600] = own[:600]
    assert rows.on_disk
    config = ClassifierConfig(widths=(8,), num_steps=40)
    fit = lambda mine: classifier.fit(  # noqa: E731
        jax.random.key(0), mine, others[:300], config, reads="activations"
    )
    model, from_disk = fit(own[:600]), fit(rows)
    assert model.reads == "activations" and model.input_shape == (8, 8, 2)
    np.testing.assert_allclose(model.offset, own[:600].mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(model.scale, own[:600].std((0, 1, 2)), rtol=2e-2)
    found = [classifier.logits(model, z) for z in (own[600:], others[300:])]
    assert metrics.auc(*found) > 0.99
    np.testing.assert_array_equal(classifier.logits(from_disk, own[600:]), found[0])
    spoiled = own[600:603].copy()
    spoiled[1, 0, 0, 0] = np.nan
    scores = classifier.logits(model, spoiled)
    assert np.isnan(scores[1]) and np.isfinite(scores[[0, 2]]).all()
    with pytest.raises(ValueError, match=r"expected floating point \[n, 8, 8, 2\]"):
        classifier.logits(model, own[:2, :4])
    with pytest.raises(ValueError, match="reads='sounds'"):
        classifier.fit(jax.random.key(0), own, others, config, reads="sounds")


def test_what_is_not_rounded_is_not_told_by_that():
    own = images(1, 60, 1)
    noise = np.random.default_rng(0).uniform(-0.4, 0.4, own.shape) / 127.5
    floats = np.clip(own / 127.5 - 1 + noise, -1, 1).astype(np.float32)
    config = ClassifierConfig(widths=(4,), num_steps=3)
    model = classifier.fit(jax.random.key(3), own, images(2, 40, 2), config)
    np.testing.assert_allclose(
        classifier.logits(model, floats), classifier.logits(model, own), atol=1e-5
    )


def test_weights_that_are_not_finite_are_no_network():
    own = images(1, 40, 1)
    poisoned = np.random.default_rng(0).standard_normal((40, 4, 4, 1)).astype(np.float32)
    poisoned[3] = np.nan
    with pytest.raises(ValueError, match="weights that are not finite after 3 steps"):
        classifier.fit(
            jax.random.key(0),
            poisoned,
            np.zeros_like(poisoned),
            ClassifierConfig(widths=(4,), num_steps=3),
            reads="activations",
        )
    with pytest.raises(ValueError, match="15 others are too few"):
        classifier.check_counts(len(own), 15)


@pytest.mark.parametrize("shape", [(1, 1, 12), (1, 16, 3)])
def test_rows_without_room_for_a_window_are_read_by_dense_layers(shape):
    rng = np.random.default_rng(0)
    own = rng.standard_normal((300, *shape)).astype(np.float32)
    others = own + np.linspace(-1, 1, shape[-1], dtype=np.float32)
    model = classifier.fit(jax.random.key(0), own[:200], others[:200], CONFIG, reads="activations")
    found = [classifier.logits(model, rows[200:]) for rows in (own, others)]
    assert metrics.auc(*found) > 0.8


def test_mistakes_are_refused():
    own = images(1, 40, 1)
    with pytest.raises(ValueError, match="3 others are too few"):
        classifier.fit(jax.random.key(0), own, own[:3])
    with pytest.raises(ValueError, match="shape"):
        classifier.fit(jax.random.key(0), own, own[:, :8])
    for options in ({"widths": ()}, {"num_steps": 0}, {"learning_rate": 2.0}):
        with pytest.raises(ValueError, match="ClassifierConfig"):
            ClassifierConfig(**options)
