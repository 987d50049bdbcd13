"""M = E[J] E[J]^T without J and without M: against the dense matrices of a small root."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flipad_jax.generators import dcgan, lsgan, sampling, training
from flipad_jax.registry import sensitivity

NUM_LATENTS = 64


def strong(gan, seed=3):
    """An untrained model; weights of N(0, 0.02) draw grey, stronger ones draw pictures."""
    root = sampling.from_state(gan, training.init(gan, jax.random.key(seed)))
    params = jax.tree.map(lambda x: 8 * x if x.ndim == 4 else x, root.variables["params"])
    return dataclasses.replace(root, variables={**root.variables, "params": params})


@pytest.fixture(scope="module", name="root")
def _root():
    return strong(dcgan.dcgan((8, 8, 1), latent_dim=4, features=(8,)))


def dense(root, latent_rng):
    z = sampling.latents(latent_rng, jnp.arange(NUM_LATENTS), root.latent_dim)

    def images(params):
        return root.module.apply({**root.variables, "params": params}, z).reshape(NUM_LATENTS, -1)

    jacobians = jax.jacrev(images)(root.variables["params"])  # of every image: [n, D, ...]
    mean = [np.asarray(leaf, np.float64).mean(0) for leaf in jax.tree.leaves(jacobians)]
    matrix = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in mean], axis=1)
    return matrix @ matrix.T


def test_quadratic_form_is_that_of_the_dense_matrix(root):
    rng = jax.random.key(1)
    matrix = dense(root, rng)
    keys = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 11)))[0].T.reshape(11, 8, 8, 1)
    found = sensitivity.quadratic_form(root, keys, rng, num_latents=NUM_LATENTS)
    flat = keys.reshape(11, -1)
    np.testing.assert_allclose(found, np.einsum("nd,de,ne->n", flat, matrix, flat), rtol=1e-4)


def test_spectrum_has_the_ends_of_the_dense_spectrum(root):
    rng = jax.random.key(2)
    matrix = dense(root, jax.random.split(rng)[0])
    values = np.linalg.eigvalsh(matrix)
    counts = []
    found = sensitivity.spectrum(
        root, rng, num_vectors=3, num_latents=NUM_LATENTS, tol=1e-6, progress=counts.append
    )
    np.testing.assert_allclose(found.largest, values[::-1][:3], rtol=1e-3)
    np.testing.assert_allclose(found.smallest, values[:3], atol=1e-3 * values[-1])
    for value, vector in zip(found.largest, found.largest_vectors.reshape(3, -1)):
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(matrix @ vector, value * vector, atol=2e-3 * values[-1])
    assert found.residual < 1e-2 and counts == list(range(1, len(counts) + 1))


def test_bad_requests_are_named(root):
    with pytest.raises(ValueError, match="another size"):
        key = np.ones((1, 4, 4, 1), np.float32) / 4
        sensitivity.quadratic_form(root, key, jax.random.key(0))
    with pytest.raises(ValueError, match="num_vectors"):
        sensitivity.spectrum(root, jax.random.key(0), num_vectors=64)
    other = strong(lsgan.lsgan((16, 16, 1), latent_dim=4, features=(4, 4, 4, 4)))
    with pytest.raises(ValueError, match="forward mode"):
        sensitivity.spectrum(other, jax.random.key(0), num_latents=4)
