"""The network that draws own images again: it learns, repeats itself, takes any shape, refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flipad_jax
from flipad_jax import AttributorConfig, data, linops, metrics, perturbations
from flipad_jax.detection import networks, one_class, reconstruction
from flipad_jax.detection.one_class import OneClassConfig
from flipad_jax.detection.reconstruction import ReconstructionConfig
from flipad_jax.inversion import final_layer
from flipad_jax.inversion.final_layer import FinalLayer

CONFIG = ReconstructionConfig(widths=(8, 16), code_dim=8, num_steps=300, batch_size=32)


def waves(seed, num, size=16, *, horizontal=True):
    """Waves of random frequency and phase; upright ones are not ours."""
    rng = np.random.default_rng(seed)
    x = np.arange(size)
    rows = 127 + 100 * np.sin(rng.uniform(0.3, 0.9, (num, 1)) * x + rng.uniform(0, 6, (num, 1)))
    made = np.repeat(rows[:, :, None], size, axis=2)[..., None]
    return (made if horizontal else made.swapaxes(1, 2)).astype(np.uint8)


def noisy(images, seed):
    return perturbations.apply("noise-0.1", images, jax.random.key(seed))


@pytest.fixture(scope="module")
def trained():
    own = waves(0, 600)
    return reconstruction.fit(jax.random.key(0), own, [noisy(own, 1), noisy(own, 2)], CONFIG)


def test_what_own_pictures_never_show_is_drawn_badly(trained):
    own, others = (noisy(waves(3, 100, horizontal=h), 5) for h in (True, False))
    found = [reconstruction.errors(trained, images) for images in (own, others)]
    assert found[0].shape == (100,) and found[0].dtype == np.float64 and (found[0] > 0).all()
    assert metrics.auc(*found) > 0.99


def test_batches_dtypes_and_runs_do_not_matter(trained):
    images = noisy(waves(4, 40), 6)
    found = reconstruction.errors(trained, images)
    np.testing.assert_allclose(reconstruction.errors(trained, images, batch_size=7), found, 1e-4)
    floats = data.to_float(images).astype(np.float32)
    np.testing.assert_allclose(reconstruction.errors(trained, floats), found, rtol=1e-4)
    assert reconstruction.errors(trained, images[:0]).shape == (0,)
    few = ReconstructionConfig(widths=(4,), code_dim=4, num_steps=3, batch_size=8)
    steps = []
    a, b = (
        reconstruction.fit(jax.random.key(7), images, [images], few, progress=steps.append)
        for _ in range(2)
    )
    assert steps == [1, 2, 3] * 2
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)


@pytest.mark.parametrize(
    "shape, seen", [((8, 8, 1), (8, 8, 1)), ((13, 21, 3), (13, 21, 3)), ((200, 72, 1), (50, 18, 1))]
)
def test_any_shape_is_seen_in_at_most_64_pixels_a_side(shape, seen):
    assert reconstruction._seen_shape(shape) == (seen, shape[0] // seen[0])
    own = np.random.default_rng(0).integers(0, 256, (20, *shape), np.uint8)
    few = ReconstructionConfig(widths=(4,), code_dim=4, num_steps=1, batch_size=8)
    model = reconstruction.fit(jax.random.key(0), own, [own], few)
    found = reconstruction.errors(model, own)
    assert found.shape == (20,) and np.isfinite(found).all()


def test_means_over_cells_are_means_over_their_pixels():
    images = np.random.default_rng(0).normal(size=(2, 7, 5, 3))
    found = reconstruction._cells(jnp.asarray(images), 3, 2)
    for row, (a, b) in enumerate(((0, 3), (3, 6), (6, 7))):
        for column, (c, d) in enumerate(((0, 2), (2, 4), (4, 5))):
            expected = images[:, a:b, c:d].mean(axis=(1, 2))
            np.testing.assert_allclose(found[:, row, column], expected, rtol=1e-5)


def test_mistakes_are_refused(monkeypatch):
    own = waves(0, 20)
    for wrong in ([], [own[:5]]):
        with pytest.raises(ValueError, match="20 own images and .* processed ones"):
            reconstruction.fit(jax.random.key(0), own, wrong, CONFIG)
    with pytest.raises(ValueError, match="shape"):
        reconstruction.fit(jax.random.key(0), own, [own[:, :8]], CONFIG)
    for options in ({"widths": ()}, {"num_steps": -1}, {"learning_rate": 2.0}, {"code_dim": 0}):
        with pytest.raises(ValueError, match="ReconstructionConfig"):
            ReconstructionConfig(**options)
    monkeypatch.setattr(
        networks.optax, "apply_updates", lambda p, _: jax.tree.map(lambda x: x * jnp.nan, p)
    )
    with pytest.raises(ValueError, match="not finite after 3 steps"):
        explodes = ReconstructionConfig(num_steps=3, batch_size=8)
        reconstruction.fit(jax.random.key(0), own, [own], explodes)


def test_an_immunised_attributor_has_one_and_is_saved_with_it(tmp_path):
    kernel = np.ones((1, 1, 1, 1), np.float32)
    layer = FinalLayer(linops.conv(kernel, (16, 16, 1)), None, "tanh")
    own, others = waves(0, 800), waves(1, 100, horizontal=False)
    settings = {
        "immunize": "noise-0.1",
        "num_altered": 0,
        "one_class": OneClassConfig(num_components=5),
    }
    config = AttributorConfig(reconstruction=CONFIG, **settings)
    z_bar = np.zeros((16, 16, 1), np.float32)
    fitted = flipad_jax.fit(layer, z_bar, own, rng=jax.random.key(0), config=config)
    assert list(fitted.detector.classifiers) == ["reconstruction"]
    shown = noisy(np.concatenate([waves(2, 100), others]), 9)
    accepted = flipad_jax.verdicts(fitted, shown, fnr=0.05).accepted
    assert accepted[:100].mean() > 0.85 and accepted[100:].mean() < 0.05
    # It is the network's doing: its own column tells them, and weighs in the score.
    column = reconstruction.errors(fitted.detector.classifiers["reconstruction"], shown)
    assert metrics.auc(column[:100], column[100:]) > 0.99
    assert fitted.detector.reference.shape == (4, 200)
    z = np.asarray(final_layer.invert(layer, shown, z_bar, lam=5e-4, tol=0, max_iters=30)[0])
    found = one_class.statistics(fitted.detector, z - z_bar, shown)
    np.testing.assert_allclose(found[:, 3], column, rtol=1e-4)
    flipad_jax.save(fitted, tmp_path)
    loaded = flipad_jax.load(tmp_path)
    np.testing.assert_array_equal(flipad_jax.score(loaded, shown), flipad_jax.score(fitted, shown))
    none = ReconstructionConfig(num_steps=0)
    for config in (
        AttributorConfig(reconstruction=none, **settings),
        AttributorConfig(**settings | {"immunize": "none"}),
    ):
        assert not config.draws
