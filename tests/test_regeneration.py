"""Regeneration on an 8 x 8 generator: one step against NumPy, own images proved, others not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flipad_jax.detection import regeneration
from flipad_jax.detection.latent_inversion import LatentGenerator
from flipad_jax.detection.regeneration import RegenerationConfig
from flipad_jax.generators import dcgan, lsgan, sampling, training

CONFIG = RegenerationConfig(num_starts=6, max_iters=40, places=5)


def strong(gan, seed):
    """An untrained model; weights of N(0, 0.02) draw grey, stronger ones draw pictures."""
    root = sampling.from_state(gan, training.init(gan, jax.random.key(seed)))
    params = jax.tree.map(lambda x: 8 * x if x.ndim == 4 else x, root.variables["params"])
    return dataclasses.replace(root, variables={**root.variables, "params": params})


@pytest.fixture(scope="module", name="ours")
def _ours():
    return strong(dcgan.dcgan((8, 8, 1), latent_dim=4, features=(8,)), 3)


@pytest.fixture(scope="module", name="own")
def _own(ours):
    return sampling.generate(ours, jax.random.key(5), 12)


@pytest.fixture(scope="module", name="found")
def _found(ours, own):
    bank = regeneration.make_bank(ours, jax.random.key(6), 64)
    return regeneration.regenerate(ours, own, jax.random.key(7), CONFIG, bank=bank)


def test_residual_leaves_out_what_the_encoder_cut():
    image = jnp.array([0.0, 0.0, 0.0, 255.0, 255.0, 255.0, 7.0])
    levels = jnp.array([-20.0, 0.4, 2.0, 300.0, 254.6, 250.0, 7.5])
    found = regeneration.residual(levels, image)
    np.testing.assert_allclose(found, [0, 0, 2, 0, 0, -5, 0.5], atol=1e-5)


def test_a_step_is_that_of_levenberg_and_marquardt(ours, own):
    """Against dense algebra in float64, with one damping."""
    config = dataclasses.replace(CONFIG, factors=(1.0,), damping=0.5)
    image = jnp.asarray(own[0], jnp.float32)
    z = jnp.array([0.3, -0.2, 0.5, 0.1], jnp.float32)
    state = regeneration.init(ours, image, z, config)
    after = jax.jit(regeneration.update, static_argnums=3)(ours, image, state, config)

    def residuals(z):
        x = ours.module.apply(ours.variables, z[None])[0]
        return regeneration.residual((x + 1) * 127.5, image).ravel()

    r = np.asarray(residuals(z), np.float64)
    jacobian = np.asarray(jax.jacrev(residuals)(z), np.float64)
    gram = jacobian.T @ jacobian
    mu = 0.5 * np.trace(gram) / 4
    step = np.linalg.solve(gram + mu * np.eye(4), jacobian.T @ r)
    assert float(state.cost) == pytest.approx(r @ r, rel=1e-5)
    expected = np.sum(np.square(np.asarray(residuals(z - jnp.asarray(step, jnp.float32)))))
    assert expected < r @ r  # the step is taken
    np.testing.assert_allclose(after.z, z - step, rtol=1e-3, atol=1e-4)
    assert float(after.cost) == pytest.approx(expected, rel=1e-3)


def test_own_images_are_regenerated_to_the_last_level(ours, own, found):
    assert found.proved.all()
    made = ours.module.apply(ours.variables, jnp.asarray(found.latent))
    levels = np.clip(np.round((np.asarray(made) + 1) * 127.5), 0, 255)
    errors = np.abs(levels - own).reshape(12, -1)
    np.testing.assert_array_equal(found.image, levels)
    np.testing.assert_array_equal(found.largest, errors.max(axis=1))
    np.testing.assert_allclose(found.rmse, np.sqrt((errors**2).mean(axis=1)), rtol=1e-5)
    assert errors.max() <= 1 and (found.rmse <= 0.5).all()
    assert (found.starts <= CONFIG.num_starts).all() and (found.iterations >= 1).all()


def test_images_of_another_seed_are_not(ours):
    other = strong(dcgan.dcgan((8, 8, 1), latent_dim=4, features=(8,)), 4)
    images = sampling.generate(other, jax.random.key(5), 6)
    found = regeneration.regenerate(ours, images, jax.random.key(7), CONFIG)
    assert not found.proved.any() and found.rmse.min() > 3
    assert (found.starts == CONFIG.num_starts).all()


def test_an_image_depends_on_no_other_and_on_no_number_of_places(ours, own, found):
    bank = regeneration.make_bank(ours, jax.random.key(6), 64)
    config = dataclasses.replace(CONFIG, places=2)
    again = regeneration.regenerate(ours, own[:4], jax.random.key(7), config, bank=bank)
    np.testing.assert_array_equal(again.proved, found.proved[:4])
    np.testing.assert_array_equal(again.image, found.image[:4])


def test_any_function_will_do(ours, own):
    """A linear map: one undamped step solves it."""
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)) / 20, jnp.float32)
    linear = LatentGenerator(matrix, lambda m, z: (z @ m).reshape(-1, 8, 8, 1), 4)
    z = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    images = np.round((np.asarray(linear.apply(matrix, z)) + 1) * 127.5).astype(np.uint8)
    found = regeneration.regenerate(linear, images, jax.random.key(0), CONFIG)
    assert found.proved.all()
    np.testing.assert_allclose(found.latent, z, atol=0.05)
    none = regeneration.regenerate(linear, images[:0], jax.random.key(0), CONFIG)
    assert none.proved.shape == (0,)


def test_mistakes_are_named(ours, own):
    rng = jax.random.key(0)
    with pytest.raises(ValueError, match="uint8"):
        regeneration.regenerate(ours, own.astype(np.float32) / 255, rng)
    with pytest.raises(ValueError, match="8"):
        regeneration.regenerate(ours, np.zeros((1, 16, 16, 1), np.uint8), rng)
    other = strong(lsgan.lsgan((16, 16, 1), latent_dim=4, features=(4, 4, 4, 4)), 0)
    with pytest.raises(ValueError, match="forward-mode"):
        regeneration.regenerate(other, np.zeros((1, 16, 16, 1), np.uint8), rng)
    flat = LatentGenerator(None, lambda _, z: z, 4)
    with pytest.raises(ValueError, match="one image"):
        regeneration.regenerate(flat, own, rng)
    with pytest.raises(ValueError, match="the bank has"):
        wrong = regeneration.Bank(np.zeros((2, 4), np.float32), np.zeros((2, 16, 16, 1), np.uint8))
        regeneration.regenerate(ours, own, rng, bank=wrong)
    for bad in ({"num_starts": 0}, {"min_gain": 1.0}, {"damping": -1.0}):
        with pytest.raises(ValueError, match="RegenerationConfig"):
            RegenerationConfig(**bad)
    with pytest.raises(ValueError, match="positive"):
        regeneration.make_bank(ours, rng, 0)
