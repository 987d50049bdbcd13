"""The network that knows own images from impostors': it learns, repeats itself, refuses."""

import jax
import numpy as np
import pytest

from flipad_jax import metrics
from flipad_jax.detection import impostor_classifier
from flipad_jax.detection.impostor_classifier import ImpostorClassifierConfig

CONFIG = ImpostorClassifierConfig(widths=(8, 16), num_steps=60, batch_size=32)


def images(seed, num, level):
    """Squares on a background whose darkest grey levels are all that differs."""
    rng = np.random.default_rng(seed)
    made = (rng.random((num, 16, 16, 1)) < 0.3).astype(np.uint8) * level
    for image in made:
        row, column = rng.integers(0, 10, 2)
        image[row : row + 6, column : column + 6] = rng.integers(100, 255)
    return made


def test_learns_what_no_eye_sees():
    model = impostor_classifier.fit(
        jax.random.key(0), images(1, 300, level=1), images(2, 300, level=2), CONFIG
    )
    own, others = (
        impostor_classifier.logits(model, images(seed, 100, level))
        for seed, level in ((3, 1), (4, 2))
    )
    assert metrics.auc(own, others) > 0.95
    assert own.shape == (100,) and own.dtype == np.float64


def test_batches_and_dtypes_do_not_matter():
    steps = []
    config = ImpostorClassifierConfig(widths=(4,), num_steps=3)
    own, others = images(1, 40, 1), images(2, 40, 2)
    fit = lambda **options: impostor_classifier.fit(  # noqa: E731
        jax.random.key(3), own, others, config, **options
    )
    model, again = fit(progress=steps.append), fit()
    assert steps == [1, 2, 3]
    scores = impostor_classifier.logits(model, own)
    np.testing.assert_array_equal(scores, impostor_classifier.logits(again, own))
    np.testing.assert_allclose(
        impostor_classifier.logits(model, own, batch_size=7), scores, atol=1e-5
    )
    floats = (own / 127.5 - 1).astype(np.float32)
    np.testing.assert_allclose(impostor_classifier.logits(model, floats), scores, atol=1e-5)
    assert impostor_classifier.logits(model, own[:0]).shape == (0,)


def test_mistakes_are_refused():
    own = images(1, 40, 1)
    with pytest.raises(ValueError, match="3 of impostors are too few"):
        impostor_classifier.fit(jax.random.key(0), own, own[:3])
    with pytest.raises(ValueError, match="shape"):
        impostor_classifier.fit(jax.random.key(0), own, own[:, :8])
    for options in ({"widths": ()}, {"num_steps": 0}, {"learning_rate": 2.0}):
        with pytest.raises(ValueError, match="ImpostorClassifierConfig"):
            ImpostorClassifierConfig(**options)
