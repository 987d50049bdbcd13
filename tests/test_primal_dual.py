"""The primal-dual method for one image: both its bounds, what it reaches, where it ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import lasso_gap, lasso_value, small_layer

from flipad_jax.inversion import linops
from flipad_jax.inversion.preconditioner import preconditioner
from flipad_jax.inversion.primal_dual import primal_dual

pytestmark = pytest.mark.usefixtures("strict_ranks")

LAM = 0.05


@functools.partial(jax.jit, static_argnames="gap_every")
def solve(op, m, o, tol, lam=LAM, max_iters=10_000, z_init=None, *, gap_every=10):
    """One compilation for all tests that differ in numbers only."""
    solver = primal_dual(
        op, lam=lam, preconditioner=m, tol=tol, max_iters=max_iters, gap_every=gap_every
    )
    return solver.run(o, z_init)


@pytest.fixture(scope="module")
def problem():
    # The matrix of a transposed convolution, as a dense operator: it compiles faster.
    layer, matrix = small_layer()
    op = linops.dense(matrix.T, layer.input_shape, layer.output_shape)
    o = jnp.asarray(np.random.default_rng(1).standard_normal(op.output_shape))
    return op, matrix, o, preconditioner(op)


@pytest.mark.parametrize("lam", [5e-4, 0.05, 0.5])
def test_stops_on_a_certificate_that_holds(problem, lam):
    op, matrix, o, m = problem
    for tol in (1e-1, 1e-2, 1e-5):
        z, info = solve(op, m, o, tol, lam)
        value = lasso_value(matrix, z, o, lam)
        exact = lasso_gap(matrix, z, o, lam) / value
        np.testing.assert_allclose(info.relative_gap, exact, rtol=1e-6, atol=1e-14)
        assert info.converged and exact <= tol


def test_bound_while_it_runs_is_above_the_truth_and_falls(problem):
    op, matrix, o, m = problem
    best = lasso_value(matrix, solve(op, m, o, 1e-12)[0], o, LAM)
    solver = primal_dual(op, lam=LAM, preconditioner=m)
    advance = jax.jit(solver.advance)
    state, bounds = jax.jit(solver.init)(o), []
    for _ in range(12):
        state, bound = advance(state, o, jnp.int32(10))
        value = lasso_value(matrix, state.sparse_z, o, LAM)
        assert float(bound) * value >= value - best - 1e-12
        bounds.append(float(bound))
    assert bounds[-1] < 1e-2 * bounds[0]
    assert state.num_iters == 120 and state.num_checks == 12


def test_finish_moves_the_residual_onto_the_dual(problem):
    op, matrix, o, m = problem
    solver = primal_dual(op, lam=LAM, preconditioner=m, tol=1e-2)
    state = jax.jit(solver.init)(o)
    state, _ = jax.jit(solver.advance)(state, o, jnp.int32(60))
    before = lasso_gap(matrix, state.sparse_z, o, LAM) / lasso_value(matrix, state.sparse_z, o, LAM)
    z, info = jax.jit(solver.finish)(state, o)
    assert float(info.relative_gap) < 0.5 * before
    # It asks little of z: nothing but the exact zeros is lost.
    assert np.linalg.norm(z - state.sparse_z) < 0.05 * np.linalg.norm(z)


def test_init_keeps_a_solution(problem):
    op, _, o, m = problem
    z, _ = solve(op, m, o, 1e-6)
    again, info = solve(op, m, o, 1e-5, z_init=z)
    assert info.num_iters == 0 and info.converged
    np.testing.assert_allclose(again, z, atol=1e-6)


def test_above_the_critical_weight_zero_is_found_at_once(problem):
    op, matrix, o, m = problem
    critical = np.abs(matrix.T @ np.ravel(o)).max()
    z, info = solve(op, m, o, 1e-6, 1.001 * critical)
    assert not np.any(z) and info.num_iters == 0 and info.converged


@pytest.mark.parametrize("max_iters, gap_every", [(0, 10), (3, 10), (10, 10), (25, 10), (9, 1)])
def test_runs_exactly_max_iters(problem, max_iters, gap_every):
    op, _, o, m = problem
    _, info = solve(op, m, o, 1e-13, max_iters=max_iters, gap_every=gap_every)
    assert info.num_iters == max_iters and not info.converged
    _, info = solve(op, m, o, 0.0, max_iters=max_iters, gap_every=gap_every)
    assert info.num_iters == max_iters


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_target_that_is_not_finite_ends_at_once(problem, bad):
    op, _, o, m = problem
    _, info = solve(op, m, o.at[0, 0, 0].set(bad), 1e-3)
    assert info.num_iters == 0 and not info.converged and np.isnan(info.gap)


def test_weight_zero_fits_the_target(problem):
    op, matrix, o, m = problem
    z, info = solve(op, m, o, 0.0, 0.0, max_iters=400)
    left = np.linalg.norm(matrix @ np.ravel(z) - np.ravel(o))
    assert left < 1e-3 * np.linalg.norm(o) and np.isfinite(z).all()


def test_needs_a_tenth_of_the_iterations_of_fista(problem):
    from flipad_jax.inversion.fista import fista

    op, matrix, o, m = problem
    lipschitz = 1.01 * np.linalg.norm(matrix, 2) ** 2
    lam, tol = 5e-4, 1e-3
    _, ours = solve(op, m, o, tol, lam)
    _, theirs = jax.jit(fista(op, lam=lam, lipschitz=lipschitz, tol=tol, max_iters=50_000).run)(o)
    assert ours.converged and theirs.converged and 10 * ours.num_iters < theirs.num_iters


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lam": -1.0}, "lam=-1.0 must be a scalar, finite and not negative"),
        ({"tol": np.nan}, "tol=nan"),
        ({"max_iters": -1}, "max_iters=-1"),
        ({"gap_every": 0}, "gap_every=0"),
    ],
)
def test_numbers_out_of_range_are_refused(problem, options, message):
    op, _, _, m = problem
    with pytest.raises(ValueError, match=message):
        primal_dual(op, preconditioner=m, **{"lam": LAM, **options})
