"""Oracles shared by the tests: slow, plain NumPy, independent of the library."""

import jax.numpy as jnp
import numpy as np

from flipad_jax.inversion import linops


def transposed_matrix(kernel, input_shape, strides, crop, output_shape):
    """Matrix `[out_size, in_size]` of a transposed convolution, by loops.

    Input pixel (i, j) stamps the kernel, as it is, at (i * stride - top, j * stride - left).

    Args:
      kernel: `[kh, kw, in, out]`.
      crop: (top, left) rows and columns cut.
      output_shape: (H, W, out); stamps beyond it are cut.
    """
    h, w, c_in = input_shape
    tall, wide, c_out = output_shape
    matrix = np.zeros((tall, wide, c_out, h, w, c_in))
    for i in range(h):
        for j in range(w):
            for a in range(kernel.shape[0]):
                for b in range(kernel.shape[1]):
                    row, column = i * strides[0] + a - crop[0], j * strides[1] + b - crop[1]
                    if 0 <= row < tall and 0 <= column < wide:
                        matrix[row, column, :, i, j, :] += kernel[a, b].T
    return matrix.reshape(tall * wide * c_out, h * w * c_in)


def convolution_matrix(kernel, input_shape, strides, pad, output_shape):
    """Matrix `[out_size, in_size]` of a convolution with (top, left) zeros `pad`, by loops."""
    h, w, c_in = input_shape
    tall, wide, c_out = output_shape
    matrix = np.zeros((tall, wide, c_out, h, w, c_in))
    for row in range(tall):
        for column in range(wide):
            for a in range(kernel.shape[0]):
                for b in range(kernel.shape[1]):
                    i, j = row * strides[0] + a - pad[0], column * strides[1] + b - pad[1]
                    if 0 <= i < h and 0 <= j < w:
                        matrix[row, column, :, i, j, :] += kernel[a, b].T
    return matrix.reshape(tall * wide * c_out, h * w * c_in)


def small_layer(dtype=jnp.float64, *, seed=0, channels=16, size=4):
    """A DCGAN's last layer in small, and its matrix by loops in float64."""
    kernel = 0.3 * np.random.default_rng(seed).standard_normal((4, 4, channels, 3))
    kernel = kernel.astype(dtype)
    op = linops.conv_transpose(kernel, (size, size, channels), strides=2, padding=1)
    matrix = transposed_matrix(kernel, op.input_shape, (2, 2), (1, 1), op.output_shape)
    return op, matrix


def lasso_value(matrix, z, o, lam):
    """Objective 1/2 ||A z - o||^2 + lam ||z||_1 in float64."""
    z, o = np.asarray(z, np.float64).ravel(), np.asarray(o, np.float64).ravel()
    return 0.5 * np.sum((matrix @ z - o) ** 2) + lam * np.sum(np.abs(z))


def lasso_gap(matrix, z, o, lam):
    """Duality gap in float64 as the difference of primal and dual objective (no clever formula)."""
    z, o = np.asarray(z, np.float64).ravel(), np.asarray(o, np.float64).ravel()
    residual = o - matrix @ z
    largest = np.max(np.abs(matrix.T @ residual))
    dual = residual * min(1.0, lam / largest) if largest > 0 else residual
    value = 0.5 * residual @ residual + lam * np.sum(np.abs(z))
    return value - (0.5 * o @ o - 0.5 * (o - dual) @ (o - dual))
