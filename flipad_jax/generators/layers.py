"""Layers that every generator here is built from.

The one idea of this file is the gradient of a transposed convolution with respect to its kernel.
JAX derives a convolution for it that is dilated on one side and strided on the other, for which
XLA's CPU backend has no fast code (`python benchmarks/transposed_convolution.py` measures it; known
upstream as jax-ml/jax#31662). The same numbers are the kernel gradient of the strided convolution
with input and output exchanged, which every backend computes at full speed. `conv_transpose` says
so in a `jax.custom_jvp`: a rule for tangents whose transpose is that gradient. Because it is no
rule for cotangents, everything keeps working: forward and reverse mode, `vmap` over kernels, second
derivatives.
"""

import functools
import math
from typing import Any, Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

__all__ = [
    "BatchNorm",
    "Conv",
    "ConvTranspose",
    "Linear",
    "SameConv",
    "UpsampledConv",
    "conv",
    "conv_transpose",
    "jit_for_one_run",
    "normal_init",
    "pytorch_init",
    "same_conv",
    "scale_init",
    "upsampled_conv",
]

_NHWC = ("NHWC", "HWIO", "NHWC")


def _convolve_dilated(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    height, width = kernel.shape[:2]
    return lax.conv_general_dilated(
        x,
        kernel[::-1, ::-1],
        window_strides=(1, 1),
        padding=[(height - 1 - padding,) * 2, (width - 1 - padding,) * 2],
        lhs_dilation=(stride, stride),
        dimension_numbers=_NHWC,
    )


# Positions from which `_convolve_phases` is as fast or faster, up to ten times (8 x 8 and more, 32
# to 128 channels in; `python benchmarks/convolution_rates.py --wide` shows the widest).
_MANY = 64


def _convolve_phases(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """The same map as `_convolve_dilated`, for windows whose sides the stride divides: all of the
    stride's phases as the channels of one small convolution, between whose pixels no zeros lie."""
    (height, width, c, k), (n, h, w, _) = kernel.shape, x.shape
    rows, columns = height // stride, width // stride
    # Entry d stride + a of the window puts pixel i down on row (i + d) stride + a.
    small = kernel.reshape(rows, stride, columns, stride, c, k)[::-1, :, ::-1]
    small = small.transpose(0, 2, 4, 1, 3, 5).reshape(rows, columns, c, -1)
    ends = [(rows - 1,) * 2, (columns - 1,) * 2]
    out = lax.conv_general_dilated(x, small, (1, 1), ends, dimension_numbers=_NHWC)
    out = out.reshape(n, h + rows - 1, w + columns - 1, stride, stride, k)
    out = out.transpose(0, 1, 3, 2, 4, 5).reshape(n, (h - 1) * stride + height, -1, k)
    return out[:, padding : out.shape[1] - padding, padding : out.shape[2] - padding]


def _convolve_dilated_kernel_tangent(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int
) -> jax.Array:
    """The same map as `_convolve_dilated`, spelt so that its transpose with respect to `kernel` is
    a fast convolution.

    The strided convolution with input and output exchanged has the kernel gradient that is wanted
    here, and it is linear in the exchanged input: so this is that gradient's transpose, and what
    reverse mode makes of it is the gradient itself. On a CPU in pieces of the batch, as
    `_kernel_gradient`.
    """
    sizes = [(n - 1) * stride - 2 * padding + k for n, k in zip(x.shape[1:3], kernel.shape[:2])]
    out = jax.ShapeDtypeStruct((x.shape[0], *sizes, kernel.shape[3]), x.dtype)
    size = _piece(x, out)
    if size < x.shape[0]:
        parts = [x[i : i + size] for i in range(0, x.shape[0], size)]
        # The transpose of this product is a sum that is computed once, see `_kernel_gradient`.
        kernels = jnp.tensordot(jnp.ones(len(parts), kernel.dtype), kernel, 0)
        return jnp.concatenate(
            [
                _convolve_dilated_kernel_tangent(part, k, stride, padding)
                for part, k in zip(parts, kernels)
            ]
        )

    def kernel_gradient(out):
        convolve = lambda k: lax.conv_general_dilated(  # noqa: E731
            out, k, (stride, stride), [(padding, padding)] * 2, dimension_numbers=_NHWC
        )
        exchanged = jax.ShapeDtypeStruct(
            (*kernel.shape[:2], kernel.shape[3], kernel.shape[2]), kernel.dtype
        )
        return jax.linear_transpose(convolve, exchanged)(x)[0].swapaxes(2, 3)

    return jax.linear_transpose(kernel_gradient, out)(kernel)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def conv_transpose(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Transposed convolution of a batch, with a kernel gradient that is fast on every backend.

    Args:
      x: `[n, h, w, c]`.
      kernel: `[kh, kw, c, k]`; the adjoint of the convolution with `kernel.swapaxes(2, 3)`, as in
        `linops.conv_transpose`. A PyTorch `ConvTranspose2d` weight is `kernel.transpose(2, 3, 0,
        1)`.
      stride: the same in both directions.
      padding: cut from every side of the full output, as PyTorch counts it.
    Returns:
      `[n, (h - 1) * stride - 2 * padding + kh, (w - 1) * stride - 2 * padding + kw, k]`.
    """
    divides = kernel.shape[0] % stride == kernel.shape[1] % stride == 0
    many = x.shape[1] * x.shape[2] >= _MANY
    # Tangents are left to the other form, whose transpose is the strided convolution.
    if jax.default_backend() == "cpu" and stride > 1 and divides and many:
        return _convolve_phases(x, kernel, stride, padding)
    return _convolve_dilated(x, kernel, stride, padding)


@conv_transpose.defjvp
def _conv_transpose_jvp(stride, padding, primals, tangents):
    x, kernel = primals
    x_dot, kernel_dot = tangents
    out_dot = _convolve_dilated(x_dot, kernel, stride, padding) + _convolve_dilated_kernel_tangent(
        x, kernel_dot, stride, padding
    )
    return conv_transpose(x, kernel, stride, padding), out_dot


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Convolution of a batch whose *second* derivatives are fast too, as a gradient penalty needs
    them.

    The derivative with respect to the input is `conv_transpose`, so differentiating it once more by
    the kernel takes the fast way. Reverse mode only.

    Args:
      x: `[n, h, w, c]`.
      kernel: `[kh, kw, c, k]`; a PyTorch `Conv2d` weight is `kernel.transpose(3, 2, 0, 1)`.
      stride: the same in both directions.
      padding: zeros added on every side.
    Returns:
      `[n, (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1, k]`.
    """
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=_NHWC
    )


def _conv_forward(x, kernel, stride, padding):
    return conv(x, kernel, stride, padding), (x, kernel)


def _conv_backward(stride, padding, residuals, cotangent):
    x, kernel = residuals
    # All that the windows reached, then the part that is the input: rows at its end that no window
    # reached get zeros.
    x_bar = conv_transpose(cotangent, kernel.swapaxes(2, 3), stride, 0)
    ends = [(0, max(padding + n - m, 0)) for n, m in zip(x.shape[1:3], x_bar.shape[1:3])]
    x_bar = jnp.pad(x_bar, ((0, 0), *ends, (0, 0)))
    x_bar = x_bar[:, padding : padding + x.shape[1], padding : padding + x.shape[2]]
    convolve = lambda x, k: lax.conv_general_dilated(  # noqa: E731
        x, k, (stride, stride), [(padding, padding)] * 2, dimension_numbers=_NHWC
    )
    return x_bar, _kernel_gradient(convolve, kernel.shape, x, cotangent)


conv.defvjp(_conv_forward, _conv_backward)


# Entries of the operands of a kernel gradient beyond which it is taken in pieces: a mebibyte.
_PIECE = 2**18


def _piece(x, out):
    """How many images of the operands `x` and `out` are taken at once."""
    if jax.default_backend() != "cpu":
        return x.shape[0]
    return max(1, x.shape[0] * _PIECE // max(x.size, out.size, 1))


def _kernel_gradient(convolve, kernel_shape, x, cotangent):
    """Gradient of `convolve(x, kernel)`, linear in the kernel, summed over pieces of the batch.

    XLA's CPU backend transposes both operands so that the batch comes last, and takes one product
    over all positions of all images. As soon as they leave the cache, pieces are two to ten times
    faster.
    """
    size = _piece(x, cotangent)
    shape = jax.ShapeDtypeStruct(kernel_shape, x.dtype)
    gradients = [
        jax.linear_transpose(functools.partial(convolve, x[i : i + size]), shape)(
            cotangent[i : i + size]
        )[0]
        for i in range(0, x.shape[0], size)
    ]
    if len(gradients) == 1:
        return gradients[0]
    # A sum would become a chain of additions, fused into all that follows and computed anew there
    # for every entry that is read; a product is computed once.
    return jnp.tensordot(jnp.ones(len(gradients), x.dtype), jnp.stack(gradients), 1)


def same_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution with stride 1 whose output has the size of its input, with gradients that are
    fast on a CPU too (`python benchmarks/training.py --steps=deepsad16,deepsad32` measures it).

    Where the window has more places than the image, XLA's CPU backend exchanges the two and ends in
    a plain loop, twenty times slower: such a convolution is computed as the dense product that it
    is. Kernel gradients are taken in pieces, see `_kernel_gradient`. Reverse mode only, and only
    once.

    Args:
      x: `[n, h, w, c]`.
      kernel: `[kh, kw, c, k]`, kh and kw odd.
    Returns:
      `[n, h, w, k]`.
    Raises:
      ValueError: if kh or kw is even.
    """
    height, width = kernel.shape[:2]
    if not height % 2 or not width % 2:
        raise ValueError(f"the window {kernel.shape[:2]} has no middle: expected odd sides")
    if jax.default_backend() == "cpu" and height * width > x.shape[1] * x.shape[2]:
        return _dense_same_conv(x, kernel)
    return _same_conv(x, kernel)


def _dense_same_conv(x, kernel):
    n, h, w, c = x.shape
    matrix = kernel
    # Output i sees input a through entry a - i + size // 2 of the kernel; first the rows, then the
    # columns.
    for axis, side in ((0, h), (2, w)):
        middle = matrix.shape[axis] // 2 + side - 1
        padding = [(side - 1,) * 2 if i == axis else (0, 0) for i in range(matrix.ndim)]
        padded = jnp.pad(matrix, padding)
        seen = [
            lax.slice_in_dim(padded, middle - i, middle - i + side, axis=axis) for i in range(side)
        ]
        matrix = jnp.stack(seen, axis=axis + 1)
    matrix = matrix.transpose(0, 2, 4, 1, 3, 5).reshape(h * w * c, -1)
    return (x.reshape(n, -1) @ matrix).reshape(n, h, w, -1)


def _convolve_same(x, kernel):
    padding = [(size // 2,) * 2 for size in kernel.shape[:2]]
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=_NHWC)


_same_conv = jax.custom_vjp(_convolve_same)


def _same_conv_forward(x, kernel):
    return _same_conv(x, kernel), (x, kernel)


def _same_conv_backward(residuals, cotangent):
    x, kernel = residuals
    # The adjoint of a convolution with stride 1 is one: the kernel turned, in and out exchanged.
    x_bar = _convolve_same(cotangent, kernel[::-1, ::-1].swapaxes(2, 3))
    return x_bar, _kernel_gradient(_convolve_same, kernel.shape, x, cotangent)


_same_conv.defvjp(_same_conv_forward, _same_conv_backward)


def upsampled_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Nearest upsampling x2, then a 3x3 convolution with stride 1 and padding 1.

    Computed as the transposed convolution that the two make together (4x4, stride 2, padding 1): a
    pixel is put down on 2 x 2 places, and of the window's nine weights those that meet the same
    pixel are added first. That takes 4 products per output and channel instead of 9. Its output in
    turn is computed as that of a 2x2 convolution with four times the channels, for which no zeros
    have to be put between the pixels. Reverse mode only, and only once.

    Args:
      x: `[n, h, w, c]`.
      kernel: `[3, 3, c, k]`, as in `conv`.
    Returns:
      `[n, 2 h, 2 w, k]`.
    """
    # conv correlates and conv_transpose stamps, hence the flip.
    flipped = kernel[::-1, ::-1]
    places = [(0, 1), (1, 0)]
    stamp = sum(
        jnp.pad(flipped, (rows, cols, (0, 0), (0, 0))) for rows in places for cols in places
    )
    return _stamped(x, stamp)


@jax.custom_vjp
def _stamped(x, stamp):
    """`conv_transpose(x, stamp, 2, 1)` for a stamp of 4 x 4."""
    n, h, w, c = x.shape
    features = stamp.shape[-1]
    # Output row 2 b - 1 + q, q = 0 or 1, sees input row b - 1 + e through row 2 + q - 2 e of the
    # stamp; columns alike.
    packed = stamp.reshape(2, 2, 2, 2, c, features)[::-1, :, ::-1]
    packed = packed.transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, c, 4 * features)
    blocks = lax.conv_general_dilated(x, packed, (1, 1), [(1, 1)] * 2, dimension_numbers=_NHWC)
    blocks = blocks.reshape(n, h + 1, w + 1, 2, 2, features).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(n, 2 * h + 2, 2 * w + 2, features)[:, 1:-1, 1:-1]


def _stamped_forward(x, stamp):
    return _stamped(x, stamp), (x, stamp)


def _stamped_backward(residuals, cotangent):
    x, stamp = residuals

    def down(y, kernel):
        return lax.conv_general_dilated(y, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=_NHWC)

    adjoint = stamp.swapaxes(2, 3)
    # <stamp x, y> = <x, down(y, adjoint)>: the gradient at x on its right, at the stamp anywhere.
    gradient = _kernel_gradient(down, adjoint.shape, cotangent, x)
    return down(cotangent, adjoint), gradient.swapaxes(2, 3)


_stamped.defvjp(_stamped_forward, _stamped_backward)


def jit_for_one_run(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit(function, **options)` for what runs once, as initialisation does.

    Initial weights are many draws of normal numbers, each of which XLA's CPU backend optimises for
    half a second: compiling a network of four layers took 8.5 s, and 1.1 s like this, on a busy
    machine. Other backends compile as always, and under another transformation nothing is jitted.
    """

    @functools.cache
    def jitted():
        # When it is first called: importing this file must not start a backend.
        on_cpu = jax.default_backend() == "cpu"
        level = {"xla_backend_optimization_level": 0} if on_cpu else None
        return jax.jit(function, compiler_options=level, **options)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        # Inside a trace what is made is a tracer, and options of a nested jit are refused.
        if isinstance(jnp.zeros(()), jax.core.Tracer):
            return function(*args, **kwargs)
        return jitted()(*args, **kwargs)

    return wrapped


def normal_init(rng: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """N(0, 0.02), the DCGAN initialisation of every convolution."""
    return 0.02 * jax.random.normal(rng, shape, dtype)


def scale_init(rng: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """N(1, 0.02), the DCGAN initialisation of the scales of batch normalisation."""
    return 1.0 + 0.02 * jax.random.normal(rng, shape, dtype)


@functools.cache
def pytorch_init(fan_in_axis: int) -> Callable[..., jax.Array]:
    """PyTorch's default: uniform in +-1 / sqrt(fan in), where the fan in counts `fan_in_axis` and
    the window.

    PyTorch counts the second axis of its weight: the input channels of a convolution (axis 2 of
    `[kh, kw, in, out]`) but the *output* channels of a transposed convolution (axis 3).
    """

    def init(rng: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        bound = (shape[0] * shape[1] * shape[fan_in_axis]) ** -0.5
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return init


def _bias(module: nn.Module, features: int, fan_in: int) -> jax.Array:
    """The parameter `bias`, `[features]`, with PyTorch's initialisation."""

    def init(rng):
        return jax.random.uniform(rng, (features,), jnp.float32, -(fan_in**-0.5), fan_in**-0.5)

    return module.param("bias", init)


class ConvTranspose(nn.Module):
    """Transposed convolution without bias: `[n, h, w, c]` -> `[n, H, W, features]`."""

    features: int
    kernel_size: int = 4
    stride: int = 2
    padding: int = 1
    kernel_init: Callable[..., jax.Array] = normal_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        return conv_transpose(x, kernel.astype(x.dtype), self.stride, self.padding)


class Conv(nn.Module):
    """Convolution, by default without bias: `[n, h, w, c]` -> `[n, H, W, features]`.

    One that keeps the size is `same_conv`, which knows no second derivatives.
    """

    features: int
    kernel_size: int = 4
    stride: int = 2
    padding: int = 1
    use_bias: bool = False
    kernel_init: Callable[..., jax.Array] = normal_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        kernel = kernel.astype(x.dtype)
        if self.stride == 1 and 2 * self.padding + 1 == self.kernel_size:
            x = same_conv(x, kernel)
        else:
            x = conv(x, kernel, self.stride, self.padding)
        if self.use_bias:
            x = x + _bias(self, self.features, math.prod(shape[:3])).astype(x.dtype)
        return x


class SameConv(nn.Module):
    """Convolution without bias that keeps the size: `[n, h, w, c]` -> `[n, h, w, features]`."""

    features: int
    kernel_size: int = 5
    kernel_init: Callable[..., jax.Array] = normal_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        return same_conv(x, kernel.astype(x.dtype))


class UpsampledConv(nn.Module):
    """Nearest upsampling x2 and a 3x3 convolution without bias: `[n, h, w, c]` -> `[n, 2 h, 2 w,
    features]`."""

    features: int
    kernel_init: Callable[..., jax.Array] = normal_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        return upsampled_conv(x, kernel.astype(x.dtype))


class Linear(nn.Module):
    """Dense layer with bias and PyTorch's initialisation: `[n, d]` -> `[n, features]`."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fan_in = x.shape[-1]
        bound = fan_in**-0.5
        kernel = self.param(
            "kernel",
            lambda rng: jax.random.uniform(
                rng, (fan_in, self.features), jnp.float32, -bound, bound
            ),
        )
        bias = _bias(self, self.features, fan_in)
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation with PyTorch's constants: momentum 0.1 (0.9 in Flax's counting) and, by
    default, eps 1e-5.

    Unlike PyTorch's, the running variance is the biased one (divides by n); over the 64 x 4 x 4
    values of the smallest layer here the two differ by a thousandth.
    """

    scale_init: Callable[..., jax.Array] = nn.initializers.ones
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=self.epsilon,
            scale_init=self.scale_init,
            use_fast_variance=False,
        )(x)
