"""Symbol and spectrum against a torus built by loops; the preconditioner against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_layer

from flipad_jax.inversion import linops, polyphase
from flipad_jax.inversion.preconditioner import preconditioner, spectrum, symbol


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape)


def torus_matrix(op, size):
    """A on a torus: `size` positions of the coarse grid an axis; pixels wrap around."""
    kernel, (s, t) = np.asarray(op.kernel), op.strides
    kh, kw, c_in, c_out = kernel.shape
    transposed = isinstance(op, linops.ConvTranspose)
    fine, coarse = (size * s, size * t), (size, size)
    if transposed:
        matrix = np.zeros((*fine, c_out, *coarse, c_in))
    else:
        matrix = np.zeros((*coarse, c_out, *fine, c_in))
    for i in range(size):
        for j in range(size):
            for a in range(kh):
                for b in range(kw):
                    y = (i * s + a - op.padding[0][0]) % fine[0]
                    x = (j * t + b - op.padding[1][0]) % fine[1]
                    if transposed:
                        matrix[y, x, :, i, j, :] += kernel[a, b].T
                    else:
                        matrix[i, j, :, y, x, :] += kernel[a, b].T
    outputs, inputs = np.prod(matrix.shape[:3]), np.prod(matrix.shape[3:])
    return matrix.reshape(outputs, inputs)


LAYERS = [
    (linops.conv_transpose, (4, 4), 2, 1),
    (linops.conv_transpose, (3, 5), (2, 1), (0, 2)),
    (linops.conv, (3, 3), 1, 1),
    (linops.conv, (4, 3), (2, 3), 1),
    (linops.conv, (1, 1), 1, 0),
]


@pytest.mark.parametrize("make, window, strides, padding", LAYERS)
def test_spectrum_is_that_of_the_torus(make, window, strides, padding):
    op = make(normal(0, (*window, 5, 2)), (6, 6, 5), strides=strides, padding=padding)
    packed = polyphase.polyphase(op)
    matrix = torus_matrix(op, 6)
    found = np.sort(spectrum(packed, 6).ravel())
    np.testing.assert_allclose(found, np.linalg.eigvalsh(matrix @ matrix.T), atol=1e-10)
    assert symbol(packed, 6).shape == (6, 6, packed.input_shape[2], packed.output_shape[2])


def dense(packed, function, shape):
    basis = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    columns = jax.jit(jax.vmap(function))(jnp.asarray(basis))
    return np.asarray(columns).reshape(len(basis), -1).T


@pytest.mark.parametrize("make, window, strides, padding", LAYERS)
def test_filter_is_positive_definite_and_its_bounds_hold(make, window, strides, padding):
    # A common part in all elements makes a spectrum as wide as that of trained layers.
    kernel = normal(0, (*window, 12, 2)) + normal(1, (12, 1))
    op = make(kernel, (8, 8, 12), strides=strides, padding=padding)
    packed = polyphase.polyphase(op)
    m = preconditioner(packed)
    a = dense(packed, packed.forward, packed.input_shape)
    b = dense(packed, m, packed.output_shape)
    np.testing.assert_allclose(b, b.T, atol=1e-12 * np.abs(b).max())
    values = np.linalg.eigvalsh(b)
    assert 0 < values[0] and values[-1] <= m.largest
    joint = np.linalg.eigvalsh(a.T @ b @ a)
    assert joint[-1] <= m.coupling <= 1.05 * joint[-1]
    # It does what it is for: the nonzero spectrum gets narrower, borders included.
    root = np.linalg.cholesky(b)
    inside = a.any(axis=1)  # Packed entries that no pixel has are not part of it.
    before = np.linalg.eigvalsh((a @ a.T)[np.ix_(inside, inside)])
    after = np.linalg.eigvalsh(root.T @ (a @ a.T) @ root)[-inside.sum() :]
    assert after[-1] / after[0] < 0.7 * before[-1] / before[0]


def test_a_large_map_is_measured_on_a_small_one():
    kernel = 0.2 * normal(0, (4, 4, 6, 1))
    exact, bounds = [], []
    for size in (40, 80):
        op = linops.conv_transpose(kernel, (size, size, 6), strides=2, padding=1)
        packed = polyphase.polyphase(op)
        m = preconditioner(packed)
        bounds.append(float(m.coupling))
        product = jax.jit(lambda v, p=packed, m=m: p.adjoint(m(p.forward(v))))
        v = jnp.asarray(normal(1, packed.input_shape))
        for _ in range(300):
            v = product(v)
            norm = jnp.linalg.norm(v)
            v = v / norm
        exact.append(float(norm))
    assert bounds[0] >= exact[0] and exact[1] <= bounds[1] <= 1.12 * exact[1]


def test_dense_and_unknown_operators():
    matrix = normal(0, (30, 20))
    m = preconditioner(linops.dense(matrix))
    gram = matrix.T @ matrix
    shift = 0.01 * np.linalg.norm(gram, 2)
    np.testing.assert_allclose(m.weights, np.linalg.inv(gram + shift * np.eye(20)), rtol=1e-9)
    plain = preconditioner(small_layer()[0])  # Not packed: nothing is known of its structure.
    assert plain.weights.shape == () and 0.9 < float(plain.coupling) < 1.05
    with pytest.raises(ValueError, match="operator that is zero"):
        preconditioner(polyphase.polyphase(linops.conv(np.zeros((3, 3, 2, 1)), (4, 4, 2))))
