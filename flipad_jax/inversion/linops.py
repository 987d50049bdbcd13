"""Linear operators: what the last layer of a generator does, without bias and activation.

Three operators, each a frozen dataclass and a JAX pytree. The weights are leaves and the geometry
is static, so two operators of the same geometry share one compilation, and a stack of operators
(many models) can be vmapped. Build them with `conv_transpose`, `conv` and `dense`, which check that
the weights fit the input; the classes themselves check nothing when they are constructed.

Every operator acts on ONE sample without a batch axis: `forward(z)` maps `input_shape` to
`output_shape`, `adjoint(o)` maps back, and `<forward(z), o> == <z, adjoint(o)>` up to rounding.
Use `jax.vmap(op.forward)` for more samples. All products run at `lax.Precision.HIGHEST`, because
accelerators multiply in reduced precision by default and the adjoint would then not be one.

An operator is float32 or float64. Samples must have its dtype and are never cast. Weights are, as
they come in: narrower ones (float16, bfloat16) are widened to float32, as solvers do not converge
in less, and float64 needs `jax_enable_x64`, without which JAX makes float32 of it.

Kernel layout is `[kh, kw, in, out]`, images are `[h, w, c]`. Orientation:

* `conv` correlates, as `lax.conv_general_dilated`, `flax.linen.Conv` (same array) and
  `torch.nn.Conv2d` (weight `kernel.transpose(3, 2, 0, 1)`) do.
* `conv_transpose` is the adjoint of the convolution with the same array, in and out exchanged. That
  is `torch.nn.ConvTranspose2d` with weight `kernel.transpose(2, 3, 0, 1)`, and
  `lax.conv_transpose(..., transpose_kernel=True)` with `kernel.swapaxes(2, 3)`.
  `flax.linen.ConvTranspose` leaves the kernel unflipped by default, so its array is
  `kernel[::-1, ::-1]`.
"""

import dataclasses
import math
import operator as _operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

__all__ = [
    "Conv",
    "ConvTranspose",
    "Dense",
    "LinearOperator",
    "conv",
    "conv_transpose",
    "dense",
    "largest_eigenvalue",
    "squared_norm",
    "to_matrix",
]

Padding: TypeAlias = int | str | Sequence[int] | Sequence[Sequence[int]]
_Pads: TypeAlias = tuple[tuple[int, int], tuple[int, int]]

_STATIC = {"static": True}
_DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")


class LinearOperator(Protocol):
    """What a solver may use of an operator."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample before the operator."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one sample after the operator."""

    @property
    def dtype(self) -> jnp.dtype:
        """Floating dtype of the weights, and of everything that goes in and comes out; float32 or
        float64."""

    def forward(self, z: jax.Array) -> jax.Array:
        """Apply A to one sample."""

    def adjoint(self, o: jax.Array) -> jax.Array:
        """Apply the transpose of A to one sample."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ConvTranspose:
    """Transposed convolution; build it with `conv_transpose`.

    Attributes:
      kernel: `[kh, kw, in, out]`.
      input_shape: `(h, w, in)`.
      output_shape: `(H, W, out)`, `H = (h - 1) * strides[0] + kh - sum(padding[0])`.
      strides: one per axis.
      padding: `((top, bottom), (left, right))` of the convolution whose adjoint this is, that is
        the rows and columns cut from the full result. Output padding makes the second one smaller,
        even negative.
    """

    kernel: jax.Array
    input_shape: tuple[int, int, int] = dataclasses.field(metadata=_STATIC)
    output_shape: tuple[int, int, int] = dataclasses.field(metadata=_STATIC)
    strides: tuple[int, int] = dataclasses.field(metadata=_STATIC)
    padding: _Pads = dataclasses.field(metadata=_STATIC)

    @property
    def dtype(self) -> jnp.dtype:
        """Floating dtype of the kernel."""
        return self.kernel.dtype

    def forward(self, z: jax.Array) -> jax.Array:
        """Map `z [h, w, in]` to `[H, W, out]`.

        Raises:
          ValueError: if the shape or dtype of `z` is not that of the operator.
        """
        _check_sample("z", z, self.input_shape, self.dtype)
        return _dilated(z, self.kernel.swapaxes(2, 3), self.strides, self.padding)

    def adjoint(self, o: jax.Array) -> jax.Array:
        """Map `o [H, W, out]` to `[h, w, in]`.

        Raises:
          ValueError: if the shape or dtype of `o` is not that of the operator.
        """
        _check_sample("o", o, self.output_shape, self.dtype)
        return _strided(o, self.kernel.swapaxes(2, 3), self.strides, self.padding)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Conv:
    """Convolution in the sense of deep learning (a correlation); build it with `conv`.

    Attributes:
      kernel: `[kh, kw, in, out]`.
      input_shape: `(h, w, in)`.
      output_shape: `(H, W, out)`, `(H - 1) * strides[0] + kh = h + sum(padding[0])`.
      strides: one per axis.
      padding: `((top, bottom), (left, right))` zeros around the input. The second one is what the
        kernel really reaches: rows that the last stride does not reach are taken off, so it may be
        negative.
    """

    kernel: jax.Array
    input_shape: tuple[int, int, int] = dataclasses.field(metadata=_STATIC)
    output_shape: tuple[int, int, int] = dataclasses.field(metadata=_STATIC)
    strides: tuple[int, int] = dataclasses.field(metadata=_STATIC)
    padding: _Pads = dataclasses.field(metadata=_STATIC)

    @property
    def dtype(self) -> jnp.dtype:
        """Floating dtype of the kernel."""
        return self.kernel.dtype

    def forward(self, z: jax.Array) -> jax.Array:
        """Map `z [h, w, in]` to `[H, W, out]`.

        Raises:
          ValueError: if the shape or dtype of `z` is not that of the operator.
        """
        _check_sample("z", z, self.input_shape, self.dtype)
        return _strided(z, self.kernel, self.strides, self.padding)

    def adjoint(self, o: jax.Array) -> jax.Array:
        """Map `o [H, W, out]` to `[h, w, in]`.

        Raises:
          ValueError: if the shape or dtype of `o` is not that of the operator.
        """
        _check_sample("o", o, self.output_shape, self.dtype)
        return _dilated(o, self.kernel, self.strides, self.padding)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """Fully connected layer; build it with `dense`.

    Attributes:
      matrix: `[in_size, out_size]`, like a Flax kernel: `forward(z) = z @ matrix`.
      input_shape: any shape of `in_size` elements, flattened in row-major order.
      output_shape: any shape of `out_size` elements.
    """

    matrix: jax.Array
    input_shape: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    output_shape: tuple[int, ...] = dataclasses.field(metadata=_STATIC)

    @property
    def dtype(self) -> jnp.dtype:
        """Floating dtype of the matrix."""
        return self.matrix.dtype

    def forward(self, z: jax.Array) -> jax.Array:
        """Map `z` of `input_shape` to `output_shape`.

        Raises:
          ValueError: if the shape or dtype of `z` is not that of the operator.
        """
        _check_sample("z", z, self.input_shape, self.dtype)
        product = jnp.dot(z.reshape(-1), self.matrix, precision=lax.Precision.HIGHEST)
        return product.reshape(self.output_shape)

    def adjoint(self, o: jax.Array) -> jax.Array:
        """Map `o` of `output_shape` to `input_shape`.

        Raises:
          ValueError: if the shape or dtype of `o` is not that of the operator.
        """
        _check_sample("o", o, self.output_shape, self.dtype)
        product = jnp.dot(self.matrix, o.reshape(-1), precision=lax.Precision.HIGHEST)
        return product.reshape(self.input_shape)


def conv_transpose(
    kernel: ArrayLike,
    input_shape: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = 0,
    output_padding: int | Sequence[int] = 0,
) -> ConvTranspose:
    """Build a transposed convolution.

    Args:
      kernel: `[kh, kw, in, out]`, floating. `forward` is the adjoint of the convolution with the
        same array, in and out exchanged; see the module docstring for PyTorch and Flax.
      input_shape: `(h, w, in)` of one sample.
      strides: int or `(rows, columns)`.
      padding: numbers are those of PyTorch, the padding of the convolution whose adjoint this is:
        `p`, `(rows, columns)` or `((top, bottom), (left, right))` are cut from the full result of
        size `(h - 1) * stride + kh`. "SAME" and "VALID" are those of `lax.conv_transpose` and
        `flax.linen.ConvTranspose`: outputs of size `h * stride` and `h * stride + max(kh - stride,
        0)`. (Numbers mean something else there: the padding of the dilated input, `kh - 1 - p`.)
      output_padding: int or `(rows, columns)` added at the bottom and right, smaller than the
        stride, as in PyTorch; only with numeric padding.

    Returns:
      The operator, in the dtype of the kernel, at least float32; float64 needs `jax_enable_x64`.

    Raises:
      ValueError: if the kernel does not fit the input, is not floating or not finite, or an option
        makes no sense.
    """
    kernel = _check_weights("kernel", kernel, "[kh, kw, in, out]")
    shape = _check_map_shape(input_shape)
    _check_channels(kernel, shape)
    steps = _pair("strides", strides, minimum=1)
    extra = _pair("output_padding", output_padding, minimum=0)
    sizes = kernel.shape[:2]
    if isinstance(padding, str):
        if any(extra):
            raise ValueError(
                f"output_padding={output_padding!r} has no meaning with padding={padding!r}; "
                "give the padding in numbers"
            )
        rule = _transposed_string_padding
        rows, columns = (rule(k, s, padding) for k, s in zip(sizes, steps, strict=True))
    else:
        for e, s in zip(extra, steps, strict=True):
            if e >= s:
                raise ValueError(
                    f"output_padding={output_padding!r} must be smaller than strides={strides!r}"
                )
        rows, columns = (
            (low, high - e) for (low, high), e in zip(_numeric_padding(padding), extra, strict=True)
        )
    height, width = (
        (n - 1) * s + k - low - high
        for n, s, k, (low, high) in zip(shape[:2], steps, sizes, (rows, columns), strict=True)
    )
    if min(height, width) < 1:
        raise ValueError(
            f"padding={padding!r} leaves no output: input {shape[:2]}, kernel {sizes} and strides "
            f"{steps} would give {(height, width)}"
        )
    return ConvTranspose(
        kernel=kernel,
        input_shape=shape,
        output_shape=(height, width, kernel.shape[3]),
        strides=steps,
        padding=(rows, columns),
    )


def conv(
    kernel: ArrayLike,
    input_shape: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = 0,
) -> Conv:
    """Build a convolution.

    Args:
      kernel: `[kh, kw, in, out]`, floating, as in `flax.linen.Conv`.
      input_shape: `(h, w, in)` of one sample.
      strides: int or `(rows, columns)`.
      padding: zeros around the input: `p`, `(rows, columns)`, `((top, bottom), (left, right))`, or
        "SAME" / "VALID" as in `lax.conv_general_dilated`.

    Returns:
      The operator, in the dtype of the kernel, at least float32; float64 needs `jax_enable_x64`.

    Raises:
      ValueError: if the kernel does not fit the input, is not floating or not finite, or an option
        makes no sense.
    """
    kernel = _check_weights("kernel", kernel, "[kh, kw, in, out]")
    shape = _check_map_shape(input_shape)
    _check_channels(kernel, shape)
    steps = _pair("strides", strides, minimum=1)
    sizes = kernel.shape[:2]
    if isinstance(padding, str):
        _check_padding_name(padding)
        given: Any = lax.padtype_to_pads(shape[:2], sizes, steps, padding)
    else:
        given = _numeric_padding(padding)
    output: list[int] = []
    pads: list[tuple[int, int]] = []
    for n, s, k, (low, high) in zip(shape[:2], steps, sizes, given, strict=True):
        room = n + low + high - k
        if room < 0:
            raise ValueError(
                f"kernel {sizes} is larger than the padded input: input {shape[:2]} with "
                f"padding {padding!r}"
            )
        output.append(room // s + 1)
        # Rows that the last stride does not reach are cut, so that sizes and padding obey one exact
        # relation and the adjoint is the same formula as in ConvTranspose.
        pads.append((low, high - room % s))
    return Conv(
        kernel=kernel,
        input_shape=shape,
        output_shape=(output[0], output[1], kernel.shape[3]),
        strides=steps,
        padding=(pads[0], pads[1]),
    )


def dense(
    matrix: ArrayLike,
    input_shape: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
) -> Dense:
    """Build a fully connected operator.

    Args:
      matrix: `[in_size, out_size]`, floating, the layout of a Flax kernel: `forward(z) = z @
        matrix`. A PyTorch `Linear` weight is its transpose.
      input_shape: shape of one sample, `(in_size,)` by default; flattened in row-major order.
      output_shape: shape of one result, `(out_size,)` by default.

    Returns:
      The operator, in the dtype of the matrix, at least float32; float64 needs `jax_enable_x64`.

    Raises:
      ValueError: if the matrix does not fit the shapes, is not floating or not finite.
    """
    matrix = _check_weights("matrix", matrix, "[in, out]")
    shapes = []
    for axis, (name, shape) in enumerate(
        [("input_shape", input_shape), ("output_shape", output_shape)]
    ):
        size = matrix.shape[axis]
        ints = (size,) if shape is None else _ints(name, shape, minimum=1)
        if math.prod(ints) != size:
            raise ValueError(
                f"{name}={ints} has {math.prod(ints)} elements, but axis {axis} of the matrix "
                f"[in, out] of shape {matrix.shape} has {size}; a PyTorch weight must be transposed"
            )
        shapes.append(ints)
    return Dense(matrix=matrix, input_shape=shapes[0], output_shape=shapes[1])


def squared_norm(op: LinearOperator, *, num_iters: int = 500) -> jax.Array:
    """Upper bound on `||A||^2`, the Lipschitz constant of the smooth part of a lasso.

    Power iteration on the smaller of `A^T A` and `A A^T` from a fixed Gaussian start, then the
    Rayleigh quotient times a safety factor, as the quotient itself comes from below. With a start
    uniform on the sphere the quotient after k products is less than (1 - eps) times the eigenvalue
    with probability at most `0.354 / sqrt(eps (k - 1)) * sqrt(n) * (1 - eps)^(k - 1/2)` for n
    unknowns, whatever the spectrum (Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13,
    1992, Theorem 4.1). The factor 1.03 corresponds to eps = 0.029; with 500 products that is 4e-6
    for a 64 x 64 image of three channels and 4e-5 for a million unknowns. So a step of one over the
    result is safe, and at most 3 % shorter than it could be.

    Args:
      op: the operator.
      num_iters: number of products with `A^T A`, at least 2. Fewer weaken the bound above.

    Returns:
      Scalar of the operator's dtype; 0 for an operator that is zero.

    Raises:
      ValueError: if `num_iters` is below 2.
    """
    if num_iters < 2:
        raise ValueError(f"num_iters={num_iters} must be at least 2")
    return _power_iteration(op, num_iters=num_iters)


def to_matrix(op: LinearOperator) -> jax.Array:
    """Dense matrix of `op.forward`, `[out_size, in_size]`, so that `A z` is `matrix @ z.ravel()`.

    Mind the size: for 64 x 64 RGB images and 32 x 32 x 64 activations it takes 3 GB in float32.
    """
    return _materialise(op)


def largest_eigenvalue(
    product: Callable[[jax.Array], jax.Array],
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    *,
    num_iters: int = 500,
) -> jax.Array:
    """Upper bound on the largest eigenvalue of a positive semidefinite map; see `squared_norm`.

    Args:
      product: the map, from an array of `shape` to an array of `shape`.
      shape: of its argument.
      dtype: of its argument.
      num_iters: products, at least 2.

    Returns:
      Scalar; 0 for the zero map. Can be traced.
    """

    def normalise(v):
        return v / jnp.maximum(jnp.linalg.norm(v.reshape(-1)), jnp.finfo(v.dtype).tiny)

    start = normalise(jax.random.normal(jax.random.key(0), shape, dtype))
    v = lax.fori_loop(0, num_iters - 1, lambda _, v: normalise(product(v)), start)
    return jnp.asarray(1.03, dtype) * jnp.vdot(v, product(v), precision=lax.Precision.HIGHEST)


def _run_power_iteration(op: LinearOperator, *, num_iters: int) -> jax.Array:
    shape = op.input_shape
    products: tuple[Callable, Callable] = (op.forward, op.adjoint)
    if math.prod(op.output_shape) < math.prod(shape):
        shape, products = op.output_shape, products[::-1]
    first, second = products
    return largest_eigenvalue(lambda v: second(first(v)), shape, op.dtype, num_iters=num_iters)


_power_iteration = jax.jit(_run_power_iteration, static_argnames="num_iters")


@jax.jit
def _materialise(op: LinearOperator) -> jax.Array:
    size = math.prod(op.input_shape)

    def column(i):
        basis = jnp.zeros(size, op.dtype).at[i].set(1)
        return op.forward(basis.reshape(op.input_shape)).reshape(-1)

    # In batches, so that the identity matrix is never stored.
    return lax.map(column, jnp.arange(size), batch_size=64).T


def _strided(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: _Pads
) -> jax.Array:
    """Correlate `x [H, W, wide]` with `kernel [kh, kw, wide, narrow]` at every stride."""
    return lax.conv_general_dilated(
        x[None],
        kernel,
        window_strides=strides,
        padding=padding,
        dimension_numbers=_DIMENSION_NUMBERS,
        precision=lax.Precision.HIGHEST,
    )[0]


def _dilated(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: _Pads
) -> jax.Array:
    """Adjoint of `_strided` with the same arguments: `x [h, w, narrow]` to `[H, W, wide]`."""
    full = tuple(
        (k - 1 - low, k - 1 - high)
        for k, (low, high) in zip(kernel.shape[:2], padding, strict=True)
    )
    return lax.conv_general_dilated(
        x[None],
        kernel[::-1, ::-1].swapaxes(2, 3),
        window_strides=(1, 1),
        padding=full,
        lhs_dilation=strides,
        dimension_numbers=_DIMENSION_NUMBERS,
        precision=lax.Precision.HIGHEST,
    )[0]


def _transposed_string_padding(size: int, stride: int, name: str) -> tuple[int, int]:
    """Padding of `lax.conv_transpose` for one axis, as rows cut from the full result."""
    _check_padding_name(name)
    if name == "SAME":
        total = size + stride - 2
        before = size - 1 if stride > size - 1 else -(-total // 2)
    else:
        total = size + stride - 2 + max(size - stride, 0)
        before = size - 1
    return size - 1 - before, size - 1 - (total - before)


def _check_padding_name(name: str) -> None:
    if name not in ("SAME", "VALID"):
        raise ValueError(f'padding={name!r} is not "SAME", "VALID" or numbers')


def _numeric_padding(padding: Any) -> _Pads:
    try:
        if np.ndim(padding) == 0:
            rows = columns = (_int("padding", padding),) * 2
        elif np.shape(padding) == (2,):
            rows, columns = ((_int("padding", p),) * 2 for p in padding)
        elif np.shape(padding) == (2, 2):
            rows, columns = ((_int("padding", a), _int("padding", b)) for a, b in padding)
        else:
            raise ValueError
        if min(*rows, *columns) < 0:
            raise ValueError
    except (ValueError, TypeError):
        raise ValueError(
            f"padding={padding!r} must be a non-negative int, (rows, columns), "
            '((top, bottom), (left, right)), "SAME" or "VALID"'
        ) from None
    return rows, columns


def _int(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be an integer")
    try:
        return _operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be an integer") from None


def _ints(name: str, values: Any, *, minimum: int) -> tuple[int, ...]:
    try:
        ints = tuple(_int(name, v) for v in values)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={values!r} must hold integers") from None
    if any(v < minimum for v in ints):
        raise ValueError(f"{name}={values!r} must hold integers of at least {minimum}")
    return ints


def _pair(name: str, value: int | Sequence[int], *, minimum: int) -> tuple[int, int]:
    try:
        ints = _ints(name, (value, value) if np.ndim(value) == 0 else value, minimum=minimum)
        if len(ints) != 2:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{name}={value!r} must be an int or (rows, columns), at least {minimum}"
        ) from None
    return ints


def _check_map_shape(input_shape: Sequence[int]) -> tuple[int, int, int]:
    shape = _ints("input_shape", input_shape, minimum=1)
    if len(shape) != 3:
        raise ValueError(f"input_shape={shape} must be (h, w, c) of one sample, without batch axis")
    return shape


def _check_weights(name: str, weights: ArrayLike, layout: str) -> jax.Array:
    shape, rank = np.shape(weights), layout.count(",") + 1
    if len(shape) != rank or min(shape) < 1:
        raise ValueError(f"{name} of shape {shape} must be laid out as {layout}, no axis empty")
    if not isinstance(weights, jax.Array):
        # A copy: on a CPU, jax.Array may share the memory of an aligned NumPy array.
        weights = np.array(weights)
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {weights.dtype}, expected a floating dtype")
    if not isinstance(weights, jax.core.Tracer) and not np.isfinite(weights).all():
        raise ValueError(f"{name} holds NaN or infinite values")
    weights = jnp.asarray(weights)
    # Half precision would leave a solver with gaps near 1, or NaN.
    return weights.astype(jnp.promote_types(weights.dtype, jnp.float32))


def _check_channels(kernel: jax.Array, shape: tuple[int, int, int]) -> None:
    if kernel.shape[2] != shape[2]:
        raise ValueError(
            f"kernel [kh, kw, in, out] of shape {kernel.shape} takes {kernel.shape[2]} channels, "
            f"but input_shape={shape} has {shape[2]}; see the module docstring for the layouts of "
            "other libraries"
        )


def _check_sample(name: str, sample: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    if sample.shape != shape:
        hint = "; use jax.vmap for a batch" if sample.shape[1:] == shape else ""
        raise ValueError(f"{name} has shape {sample.shape}, the operator expects {shape}{hint}")
    if sample.dtype != dtype:
        raise ValueError(f"{name} has dtype {sample.dtype}, the operator {dtype}; cast one of them")
