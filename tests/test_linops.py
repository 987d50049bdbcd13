"""Operators against matrices built by loops, PyTorch, Flax, and the definition of an adjoint."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import convolution_matrix, transposed_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from flipad_jax.inversion import lasso, linops

pytestmark = pytest.mark.usefixtures("strict_ranks")

DTYPES = [(jnp.float32, 1e-5), (jnp.float64, 1e-13)]


def normal(seed, shape, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def assert_adjoint(op, dtype, tol):
    z = jnp.asarray(normal(1, op.input_shape, dtype))
    y = jnp.asarray(normal(2, op.output_shape, dtype))
    # One compilation for both, instead of one per primitive.
    az, aty = jax.jit(lambda op, z, y: (op.forward(z), op.adjoint(y)))(op, z, y)
    assert az.shape == op.output_shape and az.dtype == dtype
    assert aty.shape == op.input_shape and aty.dtype == dtype
    az, aty, z, y = (np.asarray(v, np.float64).ravel() for v in (az, aty, z, y))
    assert abs(az @ y - z @ aty) <= tol * np.linalg.norm(az) * np.linalg.norm(y)
    return az, z


geometries = st.fixed_dictionaries(
    {
        "size": st.tuples(st.integers(1, 5), st.integers(1, 5)),
        "window": st.tuples(st.integers(1, 5), st.integers(1, 4)),
        "channels": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "strides": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "padding": st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2),
        "dtype": st.sampled_from(DTYPES),
    }
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(geometry=geometries, extra=st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_conv_transpose_is_the_matrix_built_by_loops(geometry, extra):
    (dtype, tol), strides = geometry["dtype"], geometry["strides"]
    shape = (*geometry["size"], geometry["channels"][0])
    kernel = normal(0, (*geometry["window"], *geometry["channels"]), dtype)
    extra = tuple(min(e, s - 1) for e, s in zip(extra, strides, strict=True))
    expected = tuple(
        (n - 1) * s + k - sum(p) + e
        for n, s, k, p, e in zip(
            shape, strides, kernel.shape, geometry["padding"], extra, strict=False
        )
    )
    options = {"strides": strides, "padding": geometry["padding"], "output_padding": extra}
    if min(expected) < 1:
        with pytest.raises(ValueError, match="leaves no output"):
            linops.conv_transpose(kernel, shape, **options)
        return
    op = linops.conv_transpose(kernel, shape, **options)
    assert op.output_shape == (*expected, geometry["channels"][1])
    az, z = assert_adjoint(op, dtype, tol)
    crop = tuple(p[0] for p in geometry["padding"])
    matrix = transposed_matrix(kernel, shape, strides, crop, op.output_shape)
    np.testing.assert_allclose(az, matrix @ z, atol=20 * tol, rtol=0)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(geometry=geometries)
def test_conv_is_the_matrix_built_by_loops(geometry):
    (dtype, tol), strides = geometry["dtype"], geometry["strides"]
    shape = (*geometry["size"], geometry["channels"][0])
    kernel = normal(0, (*geometry["window"], *geometry["channels"]), dtype)
    expected = tuple(
        (n + sum(p) - k) // s + 1
        for n, s, k, p in zip(shape, strides, kernel.shape, geometry["padding"], strict=False)
    )
    options = {"strides": strides, "padding": geometry["padding"]}
    if min(expected) < 1:
        with pytest.raises(ValueError, match="larger than the padded input"):
            linops.conv(kernel, shape, **options)
        return
    op = linops.conv(kernel, shape, **options)
    assert op.output_shape == (*expected, geometry["channels"][1])
    az, z = assert_adjoint(op, dtype, tol)
    pad = tuple(p[0] for p in geometry["padding"])
    matrix = convolution_matrix(kernel, shape, strides, pad, op.output_shape)
    np.testing.assert_allclose(az, matrix @ z, atol=20 * tol, rtol=0)


@pytest.mark.parametrize("dtype, tol", DTYPES)
def test_adjoint_at_the_size_of_a_real_last_layer(dtype, tol):
    op = linops.conv_transpose(normal(0, (4, 4, 64, 3), dtype), (16, 16, 64), strides=2, padding=1)
    assert op.output_shape == (32, 32, 3)
    assert_adjoint(op, dtype, tol)
    assert_adjoint(linops.conv(normal(0, (1, 1, 64, 3), dtype), (16, 16, 64)), dtype, tol)


@pytest.mark.parametrize("dtype, tol", DTYPES)
def test_dense_is_its_matrix_and_reshapes(dtype, tol):
    matrix = normal(0, (12, 10), dtype)
    op = linops.dense(matrix, input_shape=(2, 2, 3), output_shape=(5, 2))
    assert_adjoint(op, dtype, tol)
    z = normal(1, (2, 2, 3), dtype)
    expected = (matrix.T.astype(np.float64) @ z.ravel()).reshape(5, 2)
    np.testing.assert_allclose(op.forward(jnp.asarray(z)), expected, atol=20 * tol)
    np.testing.assert_array_equal(linops.to_matrix(op), matrix.T)
    assert linops.dense(matrix).input_shape == (12,) and linops.dense(matrix).output_shape == (10,)


def test_to_matrix_is_the_matrix_of_forward():
    kernel = normal(0, (3, 2, 3, 2))
    # 108 columns: more than one batch of the loop that builds it, and not a multiple of it.
    op = linops.conv_transpose(kernel, (6, 6, 3), strides=(2, 1), padding=((1, 0), (0, 1)))
    expected = transposed_matrix(kernel, op.input_shape, (2, 1), (1, 0), op.output_shape)
    np.testing.assert_allclose(linops.to_matrix(op), expected, atol=1e-14)


@pytest.mark.parametrize(
    "window, strides, padding, output_padding",
    [((4, 4), 2, 1, 0), ((3, 5), (2, 1), (1, 2), (1, 0)), ((1, 1), 1, 0, 0), ((2, 3), 3, 0, 2)],
)
def test_conv_transpose_equals_pytorch(window, strides, padding, output_padding):
    torch = pytest.importorskip("torch")
    kernel, z = normal(0, (*window, 5, 3), np.float32), normal(1, (4, 6, 5), np.float32)
    op = linops.conv_transpose(
        kernel, z.shape, strides=strides, padding=padding, output_padding=output_padding
    )
    layer = torch.nn.ConvTranspose2d(5, 3, window, strides, padding, output_padding, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(kernel.transpose(2, 3, 0, 1).copy()))
        expected = layer(torch.from_numpy(z.transpose(2, 0, 1)[None].copy()))[0].numpy()
    np.testing.assert_allclose(
        op.forward(jnp.asarray(z)), expected.transpose(1, 2, 0), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    "window, strides, padding", [((4, 4), 2, 1), ((3, 5), (2, 1), (1, 2)), ((1, 1), 1, 0)]
)
def test_conv_equals_pytorch(window, strides, padding):
    torch = pytest.importorskip("torch")
    kernel, z = normal(0, (*window, 5, 3), np.float32), normal(1, (7, 6, 5), np.float32)
    op = linops.conv(kernel, z.shape, strides=strides, padding=padding)
    layer = torch.nn.Conv2d(5, 3, window, strides, padding, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()))
        expected = layer(torch.from_numpy(z.transpose(2, 0, 1)[None].copy()))[0].numpy()
    np.testing.assert_allclose(
        op.forward(jnp.asarray(z)), expected.transpose(1, 2, 0), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("window, strides", [((4, 4), (2, 2)), ((3, 2), (2, 3)), ((1, 5), (3, 1))])
def test_string_padding_equals_flax(window, strides, padding):
    kernel, z = normal(0, (*window, 5, 3), np.float32), normal(1, (5, 6, 5), np.float32)
    options = {"strides": strides, "padding": padding}
    with jax.numpy_rank_promotion("allow"):
        for build, module, array in [
            (linops.conv_transpose, nn.ConvTranspose, kernel[::-1, ::-1]),
            (linops.conv, nn.Conv, kernel),
        ]:
            layer = module(3, window, use_bias=False, precision="highest", **options)
            expected = layer.apply(
                {"params": {"kernel": jnp.asarray(array)}}, jnp.asarray(z)[None]
            )[0]
            op = build(kernel, z.shape, **options)
            assert op.output_shape == expected.shape
            np.testing.assert_allclose(op.forward(jnp.asarray(z)), expected, rtol=0, atol=1e-5)
            assert_adjoint(op, jnp.float32, 1e-5)


def test_flax_transpose_kernel_takes_the_kernel_with_channels_swapped():
    kernel, z = normal(0, (3, 3, 4, 2), np.float32), normal(1, (5, 5, 4), np.float32)
    layer = nn.ConvTranspose(2, (3, 3), (2, 2), use_bias=False, transpose_kernel=True)
    params = {"params": {"kernel": jnp.asarray(kernel.swapaxes(2, 3))}}
    op = linops.conv_transpose(kernel, z.shape, strides=2, padding="SAME")
    np.testing.assert_allclose(
        op.forward(jnp.asarray(z)), layer.apply(params, jnp.asarray(z)[None])[0], rtol=0, atol=1e-5
    )


def layer_like(dtype):
    kernel = normal(0, (4, 4, 16, 3), dtype)
    return linops.conv_transpose(kernel, (6, 6, 16), strides=2, padding=1)


@pytest.mark.parametrize(
    "build, dtype",
    [
        (layer_like, jnp.float32),
        (layer_like, jnp.float64),
        (lambda t: linops.conv(normal(1, (3, 2, 2, 9), t), (8, 7, 2), strides=2), jnp.float32),
        (lambda t: linops.dense(normal(2, (150, 140), t)), jnp.float32),
        # The largest singular value twice: no spectral gap to help.
        (lambda t: linops.dense(np.eye(40, dtype=t)), jnp.float64),
        # Many singular values close to the largest: slow convergence, where a factor is needed.
        (lambda t: linops.dense(np.diag(np.linspace(0.9, 1, 300)).astype(t)), jnp.float32),
    ],
)
def test_squared_norm_bounds_the_largest_singular_value_tightly(build, dtype):
    op = build(dtype)
    bound = linops.squared_norm(op)
    assert bound.dtype == dtype and bound.shape == ()
    true = np.linalg.norm(np.asarray(linops.to_matrix(op), np.float64), 2) ** 2
    assert true <= float(bound) <= 1.06 * true


def test_squared_norm_of_nothing():
    assert linops.squared_norm(linops.dense(np.zeros((3, 2), np.float32))) == 0
    with pytest.raises(ValueError, match="num_iters=1"):
        linops.squared_norm(linops.dense(np.eye(2)), num_iters=1)


def test_operators_are_pytrees_with_static_geometry():
    calls = []

    @jax.jit
    def apply(op, z):
        calls.append(1)
        return op.forward(z)

    first, second = (
        linops.conv_transpose(normal(s, (4, 4, 2, 3)), (3, 3, 2), strides=2, padding=1)
        for s in (0, 1)
    )
    z = jnp.asarray(normal(2, (3, 3, 2)))
    for op in (first, second):
        np.testing.assert_allclose(apply(op, z), op.forward(z), rtol=1e-12, atol=1e-12)
    assert len(calls) == 1
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    stacked = jax.vmap(lambda op: op.forward(z))(both)
    np.testing.assert_allclose(stacked[1], second.forward(z), rtol=1e-12, atol=1e-12)
    with pytest.raises(AttributeError):
        first.strides = (1, 1)


def test_operator_keeps_its_own_copy_of_the_weights():
    # Aligned to 64 bytes: such an array JAX shares on a CPU instead of copying it.
    memory = np.zeros(9 * 8 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    matrix = memory[start : start + 9 * 8].view(np.float64).reshape(3, 3)
    matrix[:] = np.eye(3)
    op = linops.dense(matrix)
    matrix[:] = 7
    np.testing.assert_array_equal(linops.to_matrix(op), np.eye(3))


KERNEL = np.ones((4, 4, 2, 3))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: linops.conv_transpose(KERNEL[0], (3, 3, 2)), r"laid out as \[kh, kw, in, out\]"),
        (lambda: linops.conv_transpose(KERNEL[:0], (3, 3, 2)), "no axis empty"),
        (lambda: linops.conv_transpose(KERNEL, (3, 3, 3)), "takes 2 channels.*has 3"),
        (lambda: linops.conv_transpose(KERNEL.astype(int), (3, 3, 2)), "dtype int64.*floating"),
        (lambda: linops.conv_transpose(KERNEL * np.nan, (3, 3, 2)), "NaN or infinite"),
        (lambda: linops.conv_transpose(KERNEL, (3, 3)), "without batch axis"),
        (lambda: linops.conv_transpose(KERNEL, (3, 0, 2)), "at least 1"),
        (lambda: linops.conv_transpose(KERNEL, (3, 3.5, 2)), "must hold integers"),
        (lambda: linops.conv_transpose(KERNEL, (3, 3, 2), strides=0), "strides=0"),
        (lambda: linops.conv_transpose(KERNEL, (3, 3, 2), strides=(1, 1, 1)), "strides"),
        (lambda: linops.conv_transpose(KERNEL, (3, 3, 2), padding="same"), "is not .SAME."),
        (lambda: linops.conv_transpose(KERNEL, (3, 3, 2), padding=-1), "non-negative"),
        (lambda: linops.conv_transpose(KERNEL, (3, 3, 2), padding=((1, 1), 2)), "padding="),
        (lambda: linops.conv_transpose(KERNEL, (1, 1, 2), padding=2), "leaves no output"),
        (
            lambda: linops.conv_transpose(KERNEL, (3, 3, 2), output_padding=1),
            "smaller than strides",
        ),
        (
            lambda: linops.conv_transpose(
                KERNEL, (3, 3, 2), strides=2, padding="SAME", output_padding=1
            ),
            "no meaning",
        ),
        (lambda: linops.conv(KERNEL, (3, 3, 2)), "larger than the padded input"),
        (lambda: linops.conv(KERNEL, (9, 9, 3)), "takes 2 channels.*has 3"),
        (lambda: linops.conv(KERNEL, (9, 9, 2), padding="FULL"), "is not .SAME."),
        (lambda: linops.dense(np.ones(3)), r"laid out as \[in, out\]"),
        (lambda: linops.dense(np.ones((4, 3)), input_shape=(3,)), "input_shape.*transposed"),
        (lambda: linops.dense(np.ones((4, 3)), output_shape=(2, 2)), "output_shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("narrow", [jnp.float16, jnp.bfloat16])
def test_weights_in_half_precision_are_widened_so_that_solvers_converge(narrow):
    """The same lasso as with the same numbers in float32; in half precision it gave gaps near 1."""
    kernel = jnp.asarray(0.3 * normal(3, (4, 4, 3, 1)), narrow)
    op = linops.conv_transpose(kernel, (4, 4, 3), strides=2, padding=1)
    assert op.dtype == linops.conv(kernel, (4, 4, 3)).dtype == jnp.float32
    assert linops.dense(np.ones((4, 3), narrow)).dtype == jnp.float32
    same = linops.conv_transpose(np.asarray(kernel, np.float32), (4, 4, 3), strides=2, padding=1)
    targets = jnp.asarray(normal(4, (2, *op.output_shape)), jnp.float32)
    z, info = lasso.solve(op, targets, lam=0.01, tol=1e-3)
    assert np.all(info.converged)
    np.testing.assert_array_equal(z, lasso.solve(same, targets, lam=0.01, tol=1e-3)[0])


def test_float64_needs_x64():
    with jax.enable_x64(False):
        assert linops.dense(np.eye(2)).dtype == jnp.float32
    assert linops.dense(np.eye(2)).dtype == jnp.float64


@pytest.mark.parametrize("name", ["forward", "adjoint"])
def test_wrong_samples_are_refused(name):
    for op in [
        linops.conv_transpose(KERNEL, (3, 3, 2), strides=2, padding=1),
        linops.conv(KERNEL, (9, 9, 2)),
        linops.dense(np.ones((4, 3))),
    ]:
        apply = getattr(op, name)
        shape = op.input_shape if name == "forward" else op.output_shape
        apply(jnp.zeros(shape))
        with pytest.raises(ValueError, match="use jax.vmap"):
            apply(jnp.zeros((5, *shape)))
        with pytest.raises(ValueError, match="the operator expects"):
            apply(jnp.zeros((*shape[:-1], shape[-1] + 1)))
        with pytest.raises(ValueError, match="dtype float32, the operator float64"):
            apply(jnp.zeros(shape, jnp.float32))
