"""A strided convolution as one matrix product and shifted sums.

Pixel (s i + a, s j + b) of a map whose stride is s belongs to phase (a, b). With every phase a
channel block of a grid s times coarser, a transposed convolution (or a convolution) does not stride
any more: its kernel element k takes each coarse position j to the coarse position j + e(k), from
one phase to one phase. So A z is one product `[positions, in] x [in, kh kw out]` followed by
shifted sums over few channels, and A^T y gathers shifted copies of few channels into
`[positions, kh kw out]` before one product with the transposed weights. No zero of a dilated map
is multiplied, and all arithmetic runs at the speed of matrix products.

`polyphase(op)` gives such an operator between the packed maps, and `pack_*`, `unpack_*` go between
packed and plain ones. Packing permutes entries (and adds zeros where the stride does not divide
the size), so norms, gaps and solutions are those of `op`. The lasso packs its targets once and
iterates on packed maps.

Two forms make the same numbers up to rounding: "products", as above, and "convolution", the
convolutions of XLA with packing around them. Time of A z and A^T o together, products over
convolution, two x86-64 cores (AVX2), float32 (`python benchmarks/polyphase.py`):

    transposed 4x4, stride 2, 64 -> 3, 32x32 -> 64x64 (DCGAN), 8 images    0.62
    the same, one image                                                    0.71
    transposed 4x4, stride 2, 64 -> 1, 16x16 -> 32x32, 32 images           0.56
    transposed 5x5, stride 2, 64 -> 3, 8 images                            0.72
    convolution 3x3, 64 -> 3 at 64x64 (LSGAN), 4 images                    0.82
    convolution 3x3, 128 -> 3 at 512x512 (Stable Diffusion), one image     0.75
    convolution 1x1, 64 -> 3 at 256x256, one image                         0.28
    convolution 4x4, stride 2, 64 -> 3 at 64x64, 2 images                  0.40

So a CPU takes products. On accelerators, where nothing was measured, it is the convolutions.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from flipad_jax.inversion.linops import Conv, ConvTranspose

__all__ = [
    "Polyphase",
    "Tap",
    "moved",
    "pack_input",
    "pack_output",
    "polyphase",
    "preferred_form",
    "taps",
    "unpack_input",
    "unpack_output",
]

FORMS = ("products", "convolution")
_STATIC = {"static": True}


@dataclasses.dataclass(frozen=True)
class Tap:
    """Where one kernel row (or column) goes: coarse j in `input_phase` to j + `shift`."""

    input_phase: int
    output_phase: int
    shift: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Polyphase:
    """The operator between packed maps; build it with `polyphase`.

    Attributes:
      op: the operator between plain maps.
      form: "products" or "convolution".
    """

    op: ConvTranspose | Conv
    form: str = dataclasses.field(metadata=_STATIC)

    @property
    def dtype(self) -> jnp.dtype:
        """Floating dtype of the kernel."""
        return self.op.dtype

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(h', w', phases x channels) of one packed activation."""
        return _packed_shape(self.op.input_shape, _input_strides(self.op))

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(h', w', phases x channels) of one packed target."""
        return _packed_shape(self.op.output_shape, _output_strides(self.op))

    def forward(self, z: jax.Array) -> jax.Array:
        """A z of a packed activation, packed."""
        if self.form == "convolution":
            return pack_output(self, self.op.forward(unpack_input(self, z)))
        return _mask_output(self.op, _spread(self, _mask_input(self.op, z)))

    def adjoint(self, o: jax.Array) -> jax.Array:
        """A^T o of a packed target, packed."""
        if self.form == "convolution":
            return pack_input(self, self.op.adjoint(unpack_output(self, o)))
        return _mask_input(self.op, _gather(self, _mask_output(self.op, o)))


def polyphase(op: ConvTranspose | Conv, form: str | None = None) -> Polyphase:
    """The same operator between packed maps.

    Args:
      op: from `linops.conv_transpose` or `linops.conv`.
      form: "products" or "convolution"; by default the faster one, see `preferred_form`.
    Raises:
      ValueError: for another form.
    """
    form = form or preferred_form(op)
    if form not in FORMS:
        raise ValueError(f"form={form!r}: expected one of {FORMS}")
    return Polyphase(op, form)


def preferred_form(op: ConvTranspose | Conv) -> str:
    """The faster form on this device, by the measurements in the module docstring."""
    if jax.default_backend() != "cpu":
        # Unmeasured there. The convolutions of cuDNN and of a TPU are what everybody tunes.
        return "convolution"
    return "products"


def pack_input(op: Polyphase, z: jax.Array) -> jax.Array:
    """`[..., h, w, c]` to `[..., *op.input_shape]`."""
    return _pack(z, _input_strides(op.op))


def unpack_input(op: Polyphase, z: jax.Array) -> jax.Array:
    """`[..., *op.input_shape]` to `[..., h, w, c]`."""
    return _unpack(z, op.op.input_shape, _input_strides(op.op))


def pack_output(op: Polyphase, o: jax.Array) -> jax.Array:
    """`[..., H, W, c]` to `[..., *op.output_shape]`."""
    return _pack(o, _output_strides(op.op))


def unpack_output(op: Polyphase, o: jax.Array) -> jax.Array:
    """`[..., *op.output_shape]` to `[..., H, W, c]`."""
    return _unpack(o, op.op.output_shape, _output_strides(op.op))


def _input_strides(op: ConvTranspose | Conv) -> tuple[int, int]:
    return op.strides if isinstance(op, Conv) else (1, 1)


def _output_strides(op: ConvTranspose | Conv) -> tuple[int, int]:
    return op.strides if isinstance(op, ConvTranspose) else (1, 1)


def taps(op: ConvTranspose | Conv) -> tuple[list[Tap], list[Tap]]:
    """What each kernel row and each kernel column does on the coarse grid."""
    axes = []
    for size, stride, (low, _) in zip(op.kernel.shape[:2], op.strides, op.padding, strict=True):
        axis = []
        for k in range(size):
            # The fine position that k reaches from s i (transposed), or reads for s i (convolution)
            # is s i + k - low.
            coarse, phase = divmod(k - low, stride)
            if isinstance(op, ConvTranspose):
                axis.append(Tap(0, phase, coarse))
            else:
                axis.append(Tap(phase, 0, -coarse))
        axes.append(axis)
    return axes[0], axes[1]


def _packed_shape(shape: tuple[int, int, int], strides: tuple[int, int]) -> tuple[int, int, int]:
    (h, w, c), (s, t) = shape, strides
    return -(-h // s), -(-w // t), s * t * c


def _pack(x: jax.Array, strides: tuple[int, int]) -> jax.Array:
    (s, t), batch, (h, w, c) = strides, x.shape[:-3], x.shape[-3:]
    if (s, t) == (1, 1):
        return x
    tall, wide, channels = _packed_shape((h, w, c), strides)
    x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, tall * s - h), (0, wide * t - w), (0, 0)])
    x = jnp.moveaxis(x.reshape(*batch, tall, s, wide, t, c), -4, -3)
    return x.reshape(*batch, tall, wide, channels)


def _unpack(x: jax.Array, shape: tuple[int, int, int], strides: tuple[int, int]) -> jax.Array:
    (s, t), batch, (h, w, c) = strides, x.shape[:-3], shape
    if (s, t) == (1, 1):
        return x
    tall, wide, _ = _packed_shape(shape, strides)
    x = jnp.moveaxis(x.reshape(*batch, tall, wide, s, t, c), -3, -4)
    return x.reshape(*batch, tall * s, wide * t, c)[..., :h, :w, :]


def _masked(shape: tuple[int, int, int], strides: tuple[int, int], x: jax.Array) -> jax.Array:
    """Zero what packing has added, where the stride does not divide the size."""
    if shape[0] % strides[0] == 0 and shape[1] % strides[1] == 0:
        return x
    return x * _pack(jnp.ones(shape, x.dtype), strides)


def _mask_input(op: ConvTranspose | Conv, z: jax.Array) -> jax.Array:
    return _masked(op.input_shape, _input_strides(op), z)


def _mask_output(op: ConvTranspose | Conv, o: jax.Array) -> jax.Array:
    return _masked(op.output_shape, _output_strides(op), o)


def moved(x: jax.Array, shift: int, axis: int, size: int) -> jax.Array:
    """`out[m] = x[m - shift]` along an axis, zero outside, `size` entries: what a tap does."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (shift, size - x.shape[axis] - shift, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _by_input_phase(op: ConvTranspose | Conv) -> list[list[tuple[int, int]]]:
    """Kernel elements (row, column) that read each input phase."""
    rows, columns = taps(op)
    s, t = _input_strides(op)
    return [
        [
            (k, q)
            for k, row in enumerate(rows)
            for q, column in enumerate(columns)
            if (row.input_phase, column.input_phase) == (a, b)
        ]
        for a in range(s)
        for b in range(t)
    ]


def _weights(op: ConvTranspose | Conv, elements: list[tuple[int, int]]) -> jax.Array:
    """`[in, len(elements) * out]`, the kernel elements side by side."""
    c_in, c_out = op.kernel.shape[2:]
    parts = jnp.stack([op.kernel[k, q] for k, q in elements], axis=1)
    return parts.reshape(c_in, len(elements) * c_out)


def _spread(packed: Polyphase, z: jax.Array) -> jax.Array:
    op = packed.op
    kh, kw, c_in, c_out = op.kernel.shape
    tall, wide, _ = packed.input_shape
    phases = z.reshape(tall, wide, -1, c_in)
    products: dict[tuple[int, int], jax.Array] = {}
    for phase, elements in enumerate(_by_input_phase(op)):
        if not elements:  # A stride above the kernel size: nothing reads this phase.
            continue
        product = jnp.dot(
            phases[:, :, phase], _weights(op, elements), precision=lax.Precision.HIGHEST
        ).reshape(tall, wide, len(elements), c_out)
        products |= {element: product[:, :, i] for i, element in enumerate(elements)}
    if phases.shape[2] == 1:
        columns = product.reshape(tall, wide, kh, kw, c_out)
    else:
        parts = [products[k, q] for k in range(kh) for q in range(kw)]
        columns = jnp.stack(parts, axis=2).reshape(tall, wide, kh, kw, c_out)
    rows_of, columns_of = taps(op)
    s, t = _output_strides(op)
    out_tall, out_wide, _ = packed.output_shape
    blocks = []
    for a in range(s):
        # Rows first, all kernel columns at once.
        parts = [
            moved(columns[:, :, k], tap.shift, 0, out_tall)
            for k, tap in enumerate(rows_of)
            if tap.output_phase == a
        ]
        summed = sum(parts[1:], parts[0]) if parts else None
        for b in range(t):
            picked = [
                moved(summed[:, :, q], tap.shift, 1, out_wide)
                for q, tap in enumerate(columns_of)
                if tap.output_phase == b and summed is not None
            ]
            if picked:
                blocks.append(sum(picked[1:], picked[0]))
            else:
                blocks.append(jnp.zeros((out_tall, out_wide, c_out), z.dtype))
    return jnp.concatenate(blocks, axis=-1)


def _gather(packed: Polyphase, o: jax.Array) -> jax.Array:
    op = packed.op
    kh, kw, c_in, c_out = op.kernel.shape
    s, t = _output_strides(op)
    tall, wide, _ = packed.input_shape
    o = o.reshape(*o.shape[:2], s, t * c_out)
    rows_of, columns_of = taps(op)
    rows = jnp.stack(
        [moved(o[:, :, tap.output_phase], -tap.shift, 0, tall) for tap in rows_of], axis=2
    ).reshape(tall, o.shape[1], kh, t, c_out)
    gathered = jnp.stack(
        [moved(rows[..., tap.output_phase, :], -tap.shift, 1, wide) for tap in columns_of], axis=3
    )
    blocks = []
    for elements in _by_input_phase(op):
        if not elements:
            blocks.append(jnp.zeros((tall, wide, c_in), o.dtype))
            continue
        if len(elements) == kh * kw:
            part = gathered
        else:
            part = jnp.stack([gathered[:, :, k, q] for k, q in elements], axis=2)
        blocks.append(
            jnp.dot(
                part.reshape(tall, wide, len(elements) * c_out),
                _weights(op, elements).T,
                precision=lax.Precision.HIGHEST,
            )
        )
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=-1)
