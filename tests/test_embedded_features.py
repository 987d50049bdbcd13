"""The embedded classifier: what it is fed, and that distances of its features mean something."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flipad_jax import data, embedded_features, frechet, perturbations


@pytest.fixture(scope="module", name="digits")
def _digits():
    return data.load("digits", split="test", image_size=32)


def distance(a, b):
    features = embedded_features.features
    return frechet.distance(frechet.statistics([features(a)]), frechet.statistics([features(b)]))


def test_prepare_repeats_grey_and_averages_larger_images():
    grey = np.arange(64 * 64, dtype=np.int64).reshape(1, 64, 64, 1) % 256
    prepared = embedded_features.prepare(jnp.asarray(grey, jnp.uint8))
    assert prepared.shape == (1, 32, 32, 3) and prepared.dtype == jnp.float32
    np.testing.assert_array_equal(prepared[..., 0], prepared[..., 2])
    flat = jnp.full((1, 48, 80, 3), 0.25)
    np.testing.assert_allclose(embedded_features.prepare(flat), 0.25, atol=1e-6)
    x = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), jnp.float32, -1)
    np.testing.assert_array_equal(embedded_features.prepare(x), x)


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), int)])
def test_other_arrays_are_refused(images):
    with pytest.raises(ValueError, match="expected"):
        embedded_features.prepare(jnp.asarray(images))
    with pytest.raises(ValueError, match="expected"):
        embedded_features.features(images)


def test_features_do_not_depend_on_the_batch(digits):
    whole = embedded_features.features(digits[:70], batch_size=64)
    parts = embedded_features.features(digits[:70], batch_size=32)
    assert whole.shape == (70, embedded_features.NUM_FEATURES) and whole.dtype == np.float32
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-5)


def test_the_network_classifies_images_that_it_was_not_trained_on(digits):
    labels = data.load_labels("digits", split="test", image_size=32)
    logits = embedded_features.Network().apply(
        {"params": embedded_features.load()}, embedded_features.prepare(jnp.asarray(digits))
    )[1]
    assert (np.asarray(logits).argmax(axis=1) == labels).mean() > 0.95


def test_distance_grows_with_the_strength_of_a_perturbation(digits):
    rng = jax.random.key(0)
    found = [distance(digits[:250], digits[250:])]
    for name in ("noise-0.05", "noise-0.1", "noise-0.3"):
        found.append(distance(digits[:250], perturbations.apply(name, digits[250:], rng)))
    assert found == sorted(found) and found[-1] > 5 * found[0]


def test_a_changed_file_is_refused(monkeypatch):
    monkeypatch.setattr(embedded_features, "_SHA256", "0" * 64)
    embedded_features.load.cache_clear()
    with pytest.raises(ValueError, match="reinstall"):
        embedded_features.load()
    embedded_features.load.cache_clear()
