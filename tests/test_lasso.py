"""Batches of lasso problems against a closed form, scikit-learn, and one another."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import lasso_gap, lasso_value, small_layer
from sklearn.linear_model import Lasso

from flipad_jax.inversion import lasso, linops, prox
from flipad_jax.inversion.primal_dual import primal_dual

pytestmark = pytest.mark.usefixtures("strict_ranks")

LAM = 0.05


@pytest.fixture(scope="module")
def problem():
    # The matrix of a transposed convolution, as a dense operator: it compiles faster.
    layer, matrix = small_layer()
    op = linops.dense(matrix.T, layer.input_shape, layer.output_shape)
    targets = np.random.default_rng(1).standard_normal((5, *op.output_shape))
    return op, matrix, targets


def test_identity_operator_has_a_closed_form():
    op = linops.dense(np.eye(12), (2, 2, 3), (2, 2, 3))
    o = np.random.default_rng(0).standard_normal((4, 2, 2, 3))
    z, info = lasso.solve(op, o, lam=0.3, tol=1e-12)
    np.testing.assert_allclose(z, np.sign(o) * np.maximum(np.abs(o) - 0.3, 0), rtol=0, atol=1e-9)
    assert info.converged.all()


@pytest.mark.parametrize("method", sorted(lasso.METHODS))
def test_equals_scikit_learn_on_the_materialised_operator(problem, method):
    _, _, targets = problem
    op, matrix = small_layer()
    z, info = lasso.solve(op, targets[:2], lam=LAM, tol=1e-9, max_iters=50_000, method=method)
    assert info.converged.all()
    for solution, o in zip(np.asarray(z), targets[:2], strict=True):
        # scikit-learn minimises 1 / (2 n) ||A z - o||^2 + alpha ||z||_1, n = size of o.
        model = Lasso(alpha=LAM / o.size, fit_intercept=False, tol=1e-13, max_iter=100_000)
        model.fit(matrix, o.ravel())
        ours, theirs = (lasso_value(matrix, v, o, LAM) for v in (solution, model.coef_))
        np.testing.assert_allclose(ours, theirs, rtol=1e-8)
        np.testing.assert_allclose(solution.ravel(), model.coef_, rtol=0, atol=1e-3)
        assert 0.02 < np.mean(np.abs(solution) > 1e-6) < 0.98


def _hard_layer(num_inputs, num_outputs, smallest):
    """A dense layer whose A A^T falls geometrically to `smallest`, its targets and foreign ones."""
    rng = np.random.default_rng(0)
    rank = min(num_inputs, num_outputs)
    left, _ = np.linalg.qr(rng.standard_normal((num_inputs, rank)))
    right, _ = np.linalg.qr(rng.standard_normal((num_outputs, rank)))
    matrix = (left * np.sqrt(np.logspace(0, np.log10(smallest), rank))) @ right.T
    own = (np.maximum(rng.standard_normal((2, num_inputs)), 0) - 0.4) @ matrix
    foreign = rng.standard_normal((2, num_outputs))
    foreign *= np.linalg.norm(own) / np.linalg.norm(foreign)
    return matrix, np.concatenate([own, foreign])


@pytest.mark.parametrize(
    "num_inputs, num_outputs, smallest, most",
    [(400, 144, 1e-5, 3000), (144, 400, 0.3, 300)],
    ids=["nearly singular", "fewer activations"],
)
def test_layers_that_the_primal_dual_method_is_slow_on(num_inputs, num_outputs, smallest, most):
    matrix, targets = _hard_layer(num_inputs, num_outputs, smallest)
    op = linops.dense(matrix.astype(np.float32), output_shape=(1, 1, num_outputs))
    o = targets.reshape(4, 1, 1, -1).astype(np.float32)
    z, info = lasso.solve(op, o, lam=5e-4, tol=1e-2)
    assert info.converged.all() and info.num_iters.max() <= most
    for solution, target in zip(np.asarray(z, np.float64), np.float64(o), strict=True):
        gap = lasso_gap(matrix.T, solution, target, 5e-4)
        assert gap <= 1.05e-2 * lasso_value(matrix.T, solution, target, 5e-4)


def test_gap_is_never_below_the_true_suboptimality(problem):
    op, matrix, targets = problem
    best, info = lasso.solve(op, targets, lam=LAM, tol=1e-10, max_iters=50_000)
    assert info.converged.all()
    for max_iters in (0, 3, 20, 100):
        z, info = lasso.solve(op, targets, lam=LAM, tol=0, max_iters=max_iters)
        for i, o in enumerate(targets):
            lost = lasso_value(matrix, z[i], o, LAM) - lasso_value(matrix, best[i], o, LAM)
            assert float(info.gap[i]) >= lost * (1 - 1e-9) - 1e-9
            np.testing.assert_allclose(info.gap[i], lasso_gap(matrix, z[i], o, LAM), rtol=1e-8)


def test_zero_above_the_critical_weight(problem):
    op, matrix, targets = problem
    critical = jax.vmap(lambda o: prox.critical_weight(op, o))(jnp.asarray(targets))
    z, info = lasso.solve(op, targets, lam=float(critical.max()) * 1.001, tol=1e-9)
    assert not z.any() and info.converged.all() and not info.num_iters.any()
    z, _ = lasso.solve(op, targets, lam=float(critical.min()) * 0.99, tol=1e-9)
    assert all(np.any(row) for row in np.asarray(z))


def test_scaling_target_and_weight_scales_the_solution(problem):
    op, _, targets = problem
    z, info = lasso.solve(op, targets, lam=LAM, tol=1e-6)
    scaled, scaled_info = lasso.solve(op, 8 * targets, lam=8 * LAM, tol=1e-6)
    np.testing.assert_allclose(scaled, 8 * z, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(info.num_iters, scaled_info.num_iters)
    np.testing.assert_allclose(scaled_info.gap, 64 * info.gap, rtol=1e-6)


@pytest.mark.parametrize(
    "method, max_iters", [("fista", 10_000), ("primal_dual", 10_000), ("primal_dual", 27)]
)
def test_batch_equals_loop_whatever_the_chunk(problem, method, max_iters):
    op, _, targets = problem
    _, constants = lasso._constants(op, method)
    solver = lasso.METHODS[method](op, lam=LAM, tol=1e-5, max_iters=max_iters, **constants)
    run = jax.jit(solver.run)
    alone = [run(jnp.asarray(o)) for o in targets]
    if max_iters == 10_000:
        assert (
            len({int(info.num_iters) for _, info in alone}) > 1
        ), "the images must differ in effort"
    for chunk_size in (None, 1, 3):
        done = []
        z, info = lasso.solve(
            op,
            jnp.asarray(targets),
            lam=LAM,
            tol=1e-5,
            method=method,
            max_iters=max_iters,
            chunk_size=chunk_size,
            progress=done.append,
        )
        assert z.shape == (5, *op.input_shape) and z.dtype == op.dtype
        assert done[-1] == 5 and done == sorted(done)
        for i, (solution, single) in enumerate(alone):
            np.testing.assert_allclose(z[i], solution, rtol=0, atol=1e-10)
            assert info.num_iters[i] == single.num_iters
            assert info.converged[i] == single.converged == (max_iters == 10_000)
            np.testing.assert_allclose(info.gap[i], single.gap, rtol=1e-6)


def test_methods_agree_to_the_radius_of_the_gap(problem):
    op, matrix, targets = problem
    by_method = {
        method: lasso.solve(op, targets, lam=LAM, tol=1e-8, method=method)[0]
        for method in lasso.METHODS
    }
    first, *others = by_method.values()
    for z in others:
        for one, other, o in zip(first, z, targets, strict=True):
            values = [lasso_value(matrix, v, o, LAM) for v in (one, other)]
            assert abs(values[0] - values[1]) <= 1e-8 * max(values)
            # The objective is strongly convex in A z: a gap bounds that distance.
            apart = np.linalg.norm(matrix @ (np.ravel(one) - np.ravel(other)))
            assert apart <= 2 * np.sqrt(2 * 1e-8 * max(values))


@pytest.mark.parametrize("method", sorted(lasso.METHODS))
def test_jit_changes_nothing(method):
    rng = np.random.default_rng(0)
    op, targets = linops.dense(rng.standard_normal((6, 4))), rng.standard_normal((2, 4))
    options = {"lam": LAM, "tol": 0, "max_iters": 12, "method": method}
    z, info = lasso.solve(op, targets, **options)
    with jax.disable_jit():
        slow, slow_info = lasso.solve(op, targets, **options)
    np.testing.assert_allclose(z, slow, rtol=0, atol=1e-12)
    np.testing.assert_allclose(info.gap, slow_info.gap, rtol=1e-9)


def test_a_second_batch_compiles_nothing(monkeypatch):
    traces = []

    def counted(op, **numbers):
        solver = primal_dual(op, **numbers)

        def advance(state, o, num_steps):
            traces.append(o.shape)
            return solver.advance(state, o, num_steps)

        return solver._replace(advance=advance)

    monkeypatch.setitem(lasso.METHODS, "counted", counted)
    rng = np.random.default_rng(0)
    for _ in range(2):
        op = linops.dense(rng.standard_normal((7, 5)).astype(np.float32))
        for n, lam, tol, max_iters in [(3, 0.1, 1e-2, 50), (4, 0.2, 1e-3, 61), (9, 0.3, 0, 17)]:
            targets = rng.standard_normal((n, 5)).astype(np.float32)
            options = {"lam": lam, "tol": tol, "max_iters": max_iters, "chunk_size": 4}
            lasso.solve(op, targets, method="counted", **options)
    assert len(traces) == 1
    # Few images: one shape for 5 to 8 of them.
    for n in (5, 6, 7, 8):
        lasso.solve(op, np.ones((n, 5), np.float32), lam=0.1, method="counted")
    assert len(traces) == 2


def test_same_answer_on_eight_devices(tmp_path):
    script = """
import sys
import jax, numpy as np
from helpers import small_layer
from flipad_jax import lasso
assert jax.device_count() == 8
op, _ = small_layer(np.float32)
targets = np.random.default_rng(1).standard_normal((9, *op.output_shape)).astype(np.float32)
z, info = lasso.solve(op, targets, lam=0.05, chunk_size=4)
assert info.converged.all()
np.save(sys.argv[1], z)
"""
    path = tmp_path / "z.npy"
    subprocess.run(
        [sys.executable, "-c", script, str(path)],
        check=True,
        cwd=Path(__file__).parent,
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
        },
    )
    op, matrix = small_layer(np.float32)
    targets = np.random.default_rng(1).standard_normal((9, *op.output_shape)).astype(np.float32)
    # One at a time, here and now: both are within the gap's radius of the solution.
    z, _ = lasso.solve(op, targets, lam=LAM, chunk_size=1)
    for one, other, o in zip(z, np.load(path), targets, strict=True):
        values = [lasso_value(matrix, v, o, LAM) for v in (one, other)]
        apart = np.linalg.norm(matrix @ (np.ravel(one) - np.ravel(other)).astype(float))
        assert apart <= 2 * np.sqrt(2 * 1e-2 * max(values))


def test_an_image_gets_the_same_whatever_its_neighbours(problem):
    op, _, targets = problem
    z, info = lasso.solve(op, targets, lam=LAM, tol=1e-5, chunk_size=2)
    order = np.array([3, 1, 4, 0, 2])
    mixed, mixed_info = lasso.solve(op, targets[order], lam=LAM, tol=1e-5, chunk_size=2)
    # Another place in the batch may round another way, and no more.
    np.testing.assert_allclose(mixed, z[order], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(mixed_info.num_iters, info.num_iters[order])


def test_64_at_once_get_what_each_gets_alone(problem):
    op, _, _ = problem
    targets = np.random.default_rng(2).standard_normal((64, *op.output_shape))
    z, info = lasso.solve(op, targets, lam=LAM, tol=1e-3, chunk_size=64)
    alone, alone_info = lasso.solve(op, targets, lam=LAM, tol=1e-3, chunk_size=1)
    np.testing.assert_allclose(z, alone, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(info.num_iters, alone_info.num_iters)
    assert info.converged.all() and len(np.unique(info.num_iters)) > 1


def test_one_bad_image_disturbs_no_other(problem):
    op, _, targets = problem
    z, info = lasso.solve(op, targets, lam=LAM, tol=1e-5)
    broken = targets.copy()
    broken[2, 0, 1, 0] = np.nan
    z_broken, info_broken = lasso.solve(op, broken, lam=LAM, tol=1e-5)
    good = np.array([0, 1, 3, 4])
    np.testing.assert_array_equal(z[good], z_broken[good])
    np.testing.assert_array_equal(info.num_iters[good], info_broken.num_iters[good])
    assert info_broken.converged.tolist() == [True, True, False, True, True]
    assert np.isnan(info_broken.gap[2]) and info_broken.num_iters[2] == 0


def test_unconverged_images_are_reported(problem, caplog):
    op, _, targets = problem
    with caplog.at_level("WARNING", logger="absl"):
        _, info = lasso.solve(op, targets, lam=LAM, tol=1e-6, max_iters=17)
    assert not info.converged.any() and (info.num_iters == 17).all()
    assert (info.relative_gap > 1e-6).all() and "5 of 5 images" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="absl"):
        lasso.solve(op, targets, lam=LAM, tol=0, max_iters=17)
        lasso.solve(op, targets, lam=LAM, tol=0.5)
    assert not caplog.text


def test_warm_start_at_a_neighbouring_weight(problem):
    op, _, targets = problem
    z, _ = lasso.solve(op, targets, lam=LAM, tol=1e-6)
    _, again = lasso.solve(op, targets, lam=LAM, tol=1e-6, z_init=z, chunk_size=2)
    assert not again.num_iters.any() and again.converged.all()
    _, cold = lasso.solve(op, targets, lam=1.01 * LAM, tol=1e-3)
    near, warm = lasso.solve(op, targets, lam=1.01 * LAM, tol=1e-3, z_init=np.asarray(z))
    assert warm.converged.all() and warm.num_iters.sum() < 0.5 * cold.num_iters.sum()


def test_no_images():
    op = linops.dense(np.eye(3, dtype=np.float32))
    z, info = lasso.solve(op, np.zeros((0, 3), np.float32), lam=0.1)
    assert z.shape == (0, 3) and z.dtype == jnp.float32
    assert [v.shape for v in info] == [(0,)] * 4
    assert [v.dtype for v in info] == [jnp.float32, jnp.float32, jnp.int32, jnp.bool_]


def test_dtype_follows_the_operator():
    op, _ = small_layer(np.float32)
    z, info = lasso.solve(op, np.ones((3, *op.output_shape)), lam=LAM)
    assert [v.dtype for v in (z, *info)] == [jnp.float32] * 3 + [jnp.int32, jnp.bool_]


def test_default_chunk_fits_the_cache_of_a_cpu():
    op = linops.conv_transpose(np.zeros((4, 4, 64, 3), np.float32), (32, 32, 64), strides=2)
    assert lasso._default_chunk_size(op) == 8
    huge = linops.conv(np.zeros((1, 1, 256, 3), np.float32), (256, 256, 256))
    assert lasso._default_chunk_size(huge) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"targets": np.ones(3)}, r"shape \(3,\), expected \('n', 3\); add a batch axis"),
        ({"targets": np.ones((2, 4))}, r"shape \(2, 4\)"),
        ({"targets": np.ones((2, 3), int)}, "dtype int64"),
        ({"z_init": np.ones((1, 3))}, "z_init holds 1 samples, targets 2"),
        ({"z_init": np.ones((2, 2))}, "z_init has shape"),
        ({"method": "newton"}, "method='newton' is unknown.*fista"),
        ({"lam": -0.1}, "lam="),
        ({"lam": np.nan}, "lam="),
        ({"tol": -0.1}, "tol="),
        ({"max_iters": -1}, "max_iters="),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"lipschitz": np.nan, "method": "fista"}, "lipschitz="),
        ({"lipschitz": 1.0}, "lipschitz=1.0 is FISTA's"),
        ({"op": linops.dense(np.zeros((3, 3))), "method": "fista"}, "operator that is zero"),
        ({"op": linops.dense(np.zeros((3, 3)))}, "operator that is zero"),
    ],
)
def test_mistakes_are_refused(options, message):
    settings = {"op": linops.dense(np.eye(3)), "targets": np.ones((2, 3)), "lam": 0.1, **options}
    with pytest.raises(ValueError, match=message):
        lasso.solve(settings.pop("op"), settings.pop("targets"), **settings)
