"""Perturbations that gradients pass, for robust training ([P2] section 3, eq. 12).

Each function takes float images `[n, h, w, c]` in [-1, 1] and a strength, which may be traced, and
returns images of the same shape in [-1, 1]. Blur and crop are linear along rows and columns, so
each is two products with a small matrix: as quick as anything on an accelerator, and exact. JPEG
exists twice:

*   `jpeg_mask` keeps 25 of 64 DCT coefficients of the luminance and 9 of each chrominance channel,
    as HiDDeN and with it the published code do; it stands for no quality;
*   `jpeg` is the codec itself (tables of a quality, chroma at half size, rounding of coefficients
    and levels), whose rounding passes gradients as if it were not there.

`draw` picks the strength of a training batch at random, in the paper's ranges. What the real codec
does to the same images is in `perturbations.published`, and always reported beside at test time.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = [
    "NAMES",
    "STRONGEST",
    "blur",
    "crop",
    "draw",
    "jpeg",
    "jpeg_mask",
    "noise",
    "strongest",
]

NAMES = ("blur", "crop", "noise", "jpeg", "jpeg_mask", "combination")

# [P2]: Gaussian widths and, in the published code, sizes of the filters.
_BLUR_WIDTHS = tuple(k / 3 for k in (1, 3, 5, 7, 9))
_BLUR_SIZES = (3, 9, 15, 19, 25)
_CROP_SHARES = (0.8, 1.0)
_NOISE_STD = 0.3  # from 0 to this; in a combination a third of it
_NOISE_STD_COMBINED = 0.1
_JPEG_QUALITIES = (50.0, 95.0)

# What a test does: the far end of the training range.
STRONGEST = {"blur": 3.0, "crop": 0.8, "noise": 0.3, "jpeg": 50.0}

_HIGHEST = lax.Precision.HIGHEST


def _check(images: jax.Array) -> None:
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images have shape {images.shape}, expected [n, h, w, 1] or [n, h, w, 3]")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}, expected floating point in [-1, 1]")


def _rows_and_columns(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    return jnp.einsum("ih,jw,nhwc->nijc", rows, columns, images, precision=_HIGHEST)


def _blur_matrix(side: int, std: jax.Array, radius: jax.Array) -> jax.Array:
    """`[side, side]`: Gaussian window, mirrored at the border (which is not repeated)."""
    reach = max(_BLUR_SIZES) // 2
    offsets = np.arange(-reach, reach + 1)
    weights = jnp.where(np.abs(offsets) <= radius, jnp.exp(-0.5 * (offsets / std) ** 2), 0)
    weights = weights / weights.sum()
    # Where pixel i + offset lies once it is mirrored back into the image.
    period = max(2 * (side - 1), 1)
    place = np.abs((np.arange(side)[:, None] + offsets[None]) % period)
    place = np.where(place >= side, period - place, place)
    matrix = jnp.zeros((side, side), weights.dtype)
    return matrix.at[np.arange(side)[:, None], place].add(weights[None])


def blur(images: jax.Array, std: jax.Array | float, size: jax.Array | int = 25) -> jax.Array:
    """Gaussian blur.

    Args:
      images: `[n, h, w, c]` in [-1, 1].
      std: of the Gaussian, in pixels, above 0.
      size: of the window, odd, at most 25; a traced one is not checked.
    Returns:
      `[n, h, w, c]`, the border mirrored as in `published.blur`.
    Raises:
      ValueError: for images that are not floating point, or neither grey nor RGB, or a window that
        is even or too large.
    """
    _check(images)
    if not isinstance(size, jax.core.Tracer):
        largest = max(_BLUR_SIZES)
        if size % 2 != 1 or not 1 <= size <= largest:
            raise ValueError(f"size={size}: expected an odd number of pixels, at most {largest}")
    radius = jnp.asarray(size) // 2
    rows, columns = (_blur_matrix(side, jnp.asarray(std), radius) for side in images.shape[1:3])
    return _rows_and_columns(images, rows.astype(images.dtype), columns.astype(images.dtype))


def _crop_matrix(side: int, share: jax.Array) -> jax.Array:
    """`[side, side]`: the middle `share` of a side, stretched back bilinearly."""
    kept = jnp.round(share * side)
    start = jnp.round((side - kept) / 2)  # halves to the even number, as `published.crop`
    place = start + (jnp.arange(side) + 0.5) * kept / side - 0.5
    place = jnp.clip(place, start, start + kept - 1)  # what lies outside the crop is gone
    return jnp.maximum(0, 1 - jnp.abs(place[:, None] - jnp.arange(side)[None]))


def crop(images: jax.Array, share: jax.Array | float) -> jax.Array:
    """The central part, stretched back to the whole image.

    Args:
      images: `[n, h, w, c]` in [-1, 1].
      share: of each side that is kept, in (0, 1]; whole pixels.
    Returns:
      `[n, h, w, c]`.
    Raises:
      ValueError: for images that are not floating point, or neither grey nor RGB.
    """
    _check(images)
    rows, columns = (_crop_matrix(side, jnp.asarray(share)) for side in images.shape[1:3])
    return _rows_and_columns(images, rows.astype(images.dtype), columns.astype(images.dtype))


def noise(images: jax.Array, rng: jax.Array, std: jax.Array | float) -> jax.Array:
    """Independent normal noise, clipped.

    Args:
      images: `[n, h, w, c]` in [-1, 1].
      rng: key.
      std: on the scale of the images, twice that of `published.noise`.
    Returns:
      `[n, h, w, c]` in [-1, 1].
    Raises:
      ValueError: for images that are not floating point, or neither grey nor RGB.
    """
    _check(images)
    return jnp.clip(images + std * jax.random.normal(rng, images.shape, images.dtype), -1, 1)


# --- JPEG -------------------------------------------------------------------------------------

# ITU-T T.81, tables K.1 and K.2, which libjpeg scales by the quality.
_LUMINANCE = np.array(
    """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80
    62 18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98
    112 100 103 99""".split(),
    float,
).reshape(8, 8)
_CHROMINANCE = np.full((8, 8), 99.0)
_CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
# JFIF: Y, Cb, Cr of R, G, B.
_TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)
_TO_RGB = np.linalg.inv(_TO_YCC)
_KEPT = (25, 9, 9)  # coefficients of Y, U, V that HiDDeN's mask keeps


def _dct_matrix() -> np.ndarray:
    """Orthonormal DCT-II of 8 numbers."""
    k, j = np.mgrid[:8, :8]
    matrix = np.cos(np.pi * k * (2 * j + 1) / 16) / 2
    matrix[0] /= np.sqrt(2)
    return matrix


_DCT = _dct_matrix()


@functools.cache
def _zigzag() -> np.ndarray:
    """`[8, 8]`: place of every coefficient in JPEG's order."""
    order = np.zeros((8, 8), int)
    cells = sorted(
        ((i, j) for i in range(8) for j in range(8)),
        key=lambda cell: (sum(cell), cell[0] if sum(cell) % 2 else cell[1]),
    )
    for place, cell in enumerate(cells):
        order[cell] = place
    return order


def _blocks(x: jax.Array) -> jax.Array:
    """DCT coefficients `[n, rows, 8, columns, 8]` of a channel `[n, 8 rows, 8 columns]`."""
    n, h, w = x.shape
    blocks = x.reshape(n, h // 8, 8, w // 8, 8)
    return jnp.einsum("ka,lb,nraqb->nrkql", _DCT, _DCT, blocks, precision=_HIGHEST)


def _unblock(coefficients: jax.Array) -> jax.Array:
    n, rows, _, columns, _ = coefficients.shape
    x = jnp.einsum("ka,lb,nrkql->nraqb", _DCT, _DCT, coefficients, precision=_HIGHEST)
    return x.reshape(n, 8 * rows, 8 * columns)


def _filled(x: jax.Array, multiple: int) -> jax.Array:
    """Sides brought to a multiple by repeating the last row and column, as encoders do."""
    extra = [(0, -side % multiple) for side in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *extra, *[(0, 0)] * (x.ndim - 3)), mode="edge")


@jax.custom_jvp
def _round(x: jax.Array) -> jax.Array:
    return jnp.round(x)


@_round.defjvp
def _round_jvp(primals, tangents):
    return jnp.round(primals[0]), tangents[0]  # As if it were not there: the mean slope is 1.


def _quantised(x: jax.Array, table: np.ndarray, quality: jax.Array) -> jax.Array:
    """A channel `[n, h, w]` of whole levels around 0, after its coefficients were rounded."""
    scale = jnp.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    steps = jnp.clip(jnp.floor((table * scale + 50) / 100), 1, 255)[None, None, :, None, :]
    return jnp.clip(_round(_unblock(_round(_blocks(x) / steps) * steps)), -128, 127)


def jpeg(images: jax.Array, quality: jax.Array | float) -> jax.Array:
    """Baseline JPEG with 4:2:0 chroma, as Pillow writes it by default; rounding passes gradients.

    Args:
      images: `[n, h, w, c]` in [-1, 1], grey or RGB.
      quality: 1 to 100, libjpeg's.
    Returns:
      `[n, h, w, c]` in [-1, 1], whole grey levels.
    Raises:
      ValueError: for images that are not floating point, or neither grey nor RGB.
    """
    _check(images)
    quality = jnp.asarray(quality, images.dtype)
    n, h, w, c = images.shape
    levels = _round((images + 1) * 127.5)
    if c == 1:
        decoded = _quantised(_filled(levels[..., 0] - 128, 8), _LUMINANCE, quality)[:, :h, :w]
        return jnp.clip((decoded + 128) / 127.5 - 1, -1, 1)[..., None]
    ycc = _round(jnp.einsum("kc,nhwc->knhw", _TO_YCC, levels, precision=_HIGHEST))
    luminance = _quantised(_filled(ycc[0] - 128, 8), _LUMINANCE, quality)[:, :h, :w] + 128
    channels = [luminance]
    for chroma in ycc[1:]:
        filled = _filled(chroma, 16)
        half = filled.reshape(n, filled.shape[1] // 2, 2, filled.shape[2] // 2, 2).mean(axis=(2, 4))
        small = _quantised(_round(half), _CHROMINANCE, quality)
        channels.append(_doubled(_doubled(small, 1), 2)[:, :h, :w])
    decoded = jnp.einsum("ck,knhw->nhwc", _TO_RGB, jnp.stack(channels), precision=_HIGHEST)
    return jnp.clip(_round(decoded) / 127.5 - 1, -1, 1)


def _doubled(x: jax.Array, axis: int) -> jax.Array:
    """Twice as long, each new pixel 3/4 of the nearest and 1/4 of the next: libjpeg's."""
    before = jnp.concatenate([lax.slice_in_dim(x, 0, 1, axis=axis), x], axis=axis)
    before = lax.slice_in_dim(before, 0, x.shape[axis], axis=axis)
    after = jnp.concatenate([x, lax.slice_in_dim(x, -1, None, axis=axis)], axis=axis)
    after = lax.slice_in_dim(after, 1, None, axis=axis)
    pair = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis=axis + 1)
    shape = list(x.shape)
    shape[axis] *= 2
    return _round(pair.reshape(shape))


def jpeg_mask(images: jax.Array) -> jax.Array:
    """HiDDeN's stand-in for JPEG: the first coefficients of every block, the others zero.

    Args:
      images: `[n, h, w, c]` in [-1, 1]; grey ones are treated as their luminance.
    Returns:
      `[n, h, w, c]` in [-1, 1].
    Raises:
      ValueError: for images that are not floating point, or neither grey nor RGB.
    """
    _check(images)
    h, w = images.shape[1:3]
    filled = _filled(images, 8)
    if images.shape[-1] == 1:
        channels = [filled[..., 0]]
    else:
        channels = list(jnp.einsum("kc,nhwc->knhw", _TO_YCC, filled, precision=_HIGHEST))
    kept = [
        _unblock(_blocks(channel) * (_zigzag() < count)[None, None, :, None, :])
        for channel, count in zip(channels, _KEPT)
    ]
    if images.shape[-1] == 1:
        masked = kept[0][..., None]
    else:
        masked = jnp.einsum("ck,knhw->nhwc", _TO_RGB, jnp.stack(kept), precision=_HIGHEST)
    return jnp.clip(masked[:, :h, :w], -1, 1).astype(images.dtype)


# --- by name ----------------------------------------------------------------------------------


def _random_blur(rng: jax.Array, images: jax.Array) -> jax.Array:
    index = jax.random.randint(rng, (), 0, len(_BLUR_WIDTHS))
    return blur(images, jnp.asarray(_BLUR_WIDTHS)[index], jnp.asarray(_BLUR_SIZES)[index])


def _random_crop(rng: jax.Array, images: jax.Array) -> jax.Array:
    return crop(images, jax.random.uniform(rng, (), images.dtype, *_CROP_SHARES))


def _random_noise(rng: jax.Array, images: jax.Array, most: float = _NOISE_STD) -> jax.Array:
    std_rng, noise_rng = jax.random.split(rng)
    return noise(images, noise_rng, jax.random.uniform(std_rng, (), images.dtype, 0.0, most))


def _random_jpeg(rng: jax.Array, images: jax.Array) -> jax.Array:
    return jpeg(images, jax.random.uniform(rng, (), images.dtype, *_JPEG_QUALITIES))


def _random_combination(rng: jax.Array, images: jax.Array) -> jax.Array:
    """Blur, crop, noise, JPEG in this order, each with probability 1/2."""
    steps: list[Callable[[jax.Array, jax.Array], jax.Array]] = [
        _random_blur,
        _random_crop,
        functools.partial(_random_noise, most=_NOISE_STD_COMBINED),
        _random_jpeg,
    ]
    for index, step in enumerate(steps):
        coin_rng, step_rng = jax.random.split(jax.random.fold_in(rng, index))
        happens = jax.random.bernoulli(coin_rng)
        images = jnp.where(happens, step(step_rng, images), images)
    return images


_DRAWN: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "blur": _random_blur,
    "crop": _random_crop,
    "noise": _random_noise,
    "jpeg": _random_jpeg,
    "jpeg_mask": lambda rng, images: jpeg_mask(images),
    "combination": _random_combination,
}


def draw(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`(rng, images) -> images` with a strength drawn from the training range, one for the batch.

    Ranges of [P2]: blur of width 1/3 to 3, crop to 80 to 100 %, noise of 0 to 0.3, combination of
    all (its noise up to 0.1). JPEG's quality is 50 to 95: the paper's differentiable JPEG has none.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in _DRAWN:
        raise ValueError(f"perturbation {name!r} is unknown; there are {', '.join(NAMES)}")
    return _DRAWN[name]


def strongest(name: str, *, codec: bool = True) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`(rng, images) -> images` at the strength that the published code tests: `STRONGEST`; a
    combination does all four.

    Args:
      name: one of `NAMES`.
      codec: whether the JPEG step of "jpeg" and "combination" is done here; without, it is left to
        the real codec.
    Raises:
      ValueError: for an unknown name.
    """
    draw(name)
    if name == "blur":
        return lambda rng, images: blur(images, STRONGEST["blur"])
    if name == "crop":
        return lambda rng, images: crop(images, STRONGEST["crop"])
    if name == "noise":
        return lambda rng, images: noise(images, rng, STRONGEST["noise"])
    if name == "jpeg_mask":
        return _DRAWN["jpeg_mask"]

    def compress(images):
        return jpeg(images, STRONGEST["jpeg"]) if codec else images

    if name == "jpeg":
        return lambda rng, images: compress(images)

    def everything(rng, images):
        images = crop(blur(images, STRONGEST["blur"]), STRONGEST["crop"])
        return compress(noise(images, rng, _NOISE_STD_COMBINED))

    return everything
