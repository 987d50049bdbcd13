"""Proximal step and certificate against brute force and a float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import lasso_gap, lasso_value, small_layer

from flipad_jax.inversion import linops, prox

pytestmark = pytest.mark.usefixtures("strict_ranks")


def test_soft_threshold_is_the_minimiser():
    v = np.linspace(-3, 3, 13)
    grid = np.linspace(-4, 4, 80001)
    for threshold in (0.0, 0.7, 10.0):
        costs = 0.5 * (grid[:, None] - v) ** 2 + threshold * np.abs(grid)[:, None]
        result = prox.soft_threshold(jnp.asarray(v), threshold)
        np.testing.assert_allclose(result, grid[np.argmin(costs, axis=0)], atol=1e-4)
    assert np.count_nonzero(prox.soft_threshold(jnp.asarray(v, jnp.float32), 1.0)) == 8


def case(seed=0, dtype=np.float64):
    op, matrix = small_layer(dtype)
    rng = np.random.default_rng(seed)
    z = rng.standard_normal(op.input_shape) * (rng.random(op.input_shape) < 0.2)
    o = rng.standard_normal(op.output_shape)
    return op, matrix, jnp.asarray(z, dtype), jnp.asarray(o, dtype)


def test_objective_and_gap_equal_the_definitions():
    op, matrix, z, o = case()
    for lam in (0.01, 0.5, 100.0):
        np.testing.assert_allclose(
            prox.objective(op, z, o, lam=lam), lasso_value(matrix, z, o, lam), rtol=1e-12
        )
        np.testing.assert_allclose(
            prox.duality_gap(op, z, o, lam=lam), lasso_gap(matrix, z, o, lam), rtol=1e-10
        )


def test_gap_of_a_dual_feasible_residual():
    # At lam above ||A^T r||_inf nothing is scaled: the branch s = 1.
    op, matrix, z, o = case()
    lam = 2 * float(np.max(np.abs(matrix.T @ (np.ravel(o) - matrix @ np.ravel(z)))))
    gap = float(prox.duality_gap(op, z, o, lam=lam))
    np.testing.assert_allclose(gap, lasso_gap(matrix, z, o, lam), rtol=1e-10)


def test_gap_keeps_its_digits_in_float32_near_the_optimum():
    # A = identity: z = soft_threshold(o) is optimal; one element off by h costs h^2 / 2.
    op = linops.dense(np.eye(400, dtype=np.float32))
    o = np.random.default_rng(0).uniform(2, 4, 400).astype(np.float32) * 100
    z = jnp.asarray(o - 0.5)
    assert float(prox.duality_gap(op, z, jnp.asarray(o), lam=0.5)) <= 1e-3
    worse = z.at[7].add(-0.01)
    exact = lasso_gap(np.eye(400), worse, o, 0.5)
    # The objective is 6e4, and float32 resolves 4e-3 of it; the gap is 3, known to four digits.
    np.testing.assert_allclose(
        prox.duality_gap(op, worse, jnp.asarray(o), lam=0.5), exact, rtol=1e-2
    )


def test_gap_is_never_negative():
    for seed in range(5):
        op, _, z, o = case(seed, np.float32)
        for lam in (0.0, 1e-3, 1.0, 1e3):
            assert float(prox.duality_gap(op, z, o, lam=lam)) >= 0


def test_relative_gap():
    values = [prox.relative_gap(jnp.asarray(g), jnp.asarray(p)) for g, p in [(0, 0), (1.0, 4.0)]]
    assert values == [0, 0.25]
    assert np.isnan(prox.relative_gap(jnp.asarray(np.nan), jnp.asarray(np.nan)))
    assert np.isnan(prox.relative_gap(jnp.asarray(np.nan), jnp.asarray(0.0)))
    # By hand: A = 1, o = 1, lam = 1, z = 3: primal 2 + 3, dual 1/2 - (1 + 1)^2 / 2. Above 1.
    one, o, z = linops.dense(np.eye(1)), jnp.ones(1), jnp.full(1, 3.0)
    gap, value = prox.duality_gap(one, z, o, lam=1.0), prox.objective(one, z, o, lam=1.0)
    assert float(prox.relative_gap(gap, value)) == pytest.approx(6.5 / 5)


def test_nan_anywhere_shows_in_the_gap():
    op, _, z, o = case()
    assert np.isnan(prox.duality_gap(op, z, o.at[1, 2, 0].set(np.nan), lam=0.1))
    assert np.isnan(prox.duality_gap(op, z.at[1, 2, 0].set(np.nan), o, lam=0.1))
    # Stride 2 with a 1 x 1 kernel: the second pixel has no influence on z, its NaN must still show.
    op = linops.conv_transpose(np.ones((1, 1, 1, 1)), (1, 1, 1), strides=2, output_padding=1)
    o = jnp.asarray([[[1.0], [np.nan]], [[0.0], [0.0]]])
    assert np.isnan(prox.duality_gap(op, jnp.zeros((1, 1, 1)), o, lam=0.1))


def test_critical_weight():
    op, matrix, _, o = case()
    expected = np.max(np.abs(matrix.T @ np.ravel(o)))
    np.testing.assert_allclose(prox.critical_weight(op, o), expected, rtol=1e-12)
    # Exactly there zero is optimal, just below it is not.
    zero = jnp.zeros(op.input_shape)
    assert float(prox.duality_gap(op, zero, o, lam=expected * (1 + 1e-12))) <= 1e-12
    assert float(prox.duality_gap(op, zero, o, lam=0.99 * expected)) > 1e-6


def test_gradient_scale_of_the_objective():
    # 1/2 without 1/n: the derivative of the smooth part is A^T (A z - o).
    op, matrix, z, o = case()
    gradient = jax.grad(lambda z: prox.objective(op, z, o, lam=0.0))(z)
    expected = matrix.T @ (matrix @ np.ravel(z) - np.ravel(o))
    np.testing.assert_allclose(np.ravel(gradient), expected, rtol=1e-10, atol=1e-12)
