"""SM-F: the noise that a model leaves in its images, as a camera's sensor does ([P1] appendix D).

The fingerprint of a model is the mean noise residual of its images (Marra et al. 2019), and an
image is ours if its own noise correlates with it. It needs neither network nor rivals, only own
images; the papers have it as a baseline.

The residual is that of camera identification (PRNU; Lukas, Fridrich, Goljan 2006), with the
settings of the published code:

1. Per channel, a wavelet transform (db4, four levels, symmetric borders). Of every detail
   coefficient the Wiener filter for noise of standard deviation 5 grey levels keeps the noise;
   the variance of the signal at its place is the least of those in windows of 3, 5, 7 and 9. The
   approximation goes to zero, and the transform back leaves the residual.
2. Colour becomes grey. From each of the four phases of the 2 x 2 grid the means of all rows and
   columns are taken away, which rids it of the patterns of interpolation.
3. In the Fourier domain the same filter, for noise of the standard deviation of what is there,
   flattens peaks: what is periodic is no noise.

Images of 32 or 64 pixels are too small for four levels without every coefficient feeling the
border: PyWavelets recommends two and three, warns, and computes four. The published code has four
at every size, and so has this one.

Conventions. The text correlates the fingerprint with the *image*, the published code, like Marra
et al., with the image's *residual*; and a round trip through float32 makes the code's grey levels
1 to 63 one too low, in fingerprint and image alike. "reference", the default, does what the code
does, because it is the stronger of the two, and a baseline must not be made weak; "paper" follows
the text.

Deviations: the published code averages in float32 (here float64) and divides by the norm of a
residual that may be zero. Here an image of one colour has a residual of exactly zero and a
correlation of 0.
"""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from flipad_jax import conventions, data

__all__ = ["Fingerprint", "fit", "residuals", "score"]

_WAVELET = "db4"
_LEVELS = 4
_NOISE_VARIANCE = 25.0  # in squared grey levels
_LARGEST_RADIUS = 4  # windows 3, 5, 7, 9
_GREY = np.asarray([0.29893602, 0.58704307, 0.11402090])  # red, green, blue
_SMALLEST_SIDE = 16  # below, all four levels have the length of the border


@struct.dataclass
class Fingerprint:
    """The fingerprint of a model.

    Attributes:
      pattern: `[h, w]` float32, mean 0, norm 1.
      num_images: images that it is the mean of (static).
      image_shape: (h, w, c) of an image (static); `score` refuses any other.
      convention: "paper" or "reference", see the module docstring (static).
    """

    pattern: np.ndarray | jax.Array
    num_images: int = struct.field(pytree_node=False)
    image_shape: tuple[int, int, int] = struct.field(pytree_node=False)
    convention: str = struct.field(pytree_node=False)


# ---------------------------------------------------------------------------------------------
# The residual


@functools.lru_cache(maxsize=16)
def _wavelet_matrices(side: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Per level, finest first: analysis `[2 l, m]` of a line, synthesis `[m, 2 l]`; float32.

    The first l coefficients are approximations, the others details. Border and filter are in the
    matrix, which is PyWavelets' transform of unit vectors.
    """
    import pywt

    matrices = []
    for _ in range(_LEVELS):
        analysis = np.concatenate(pywt.dwt(np.eye(side), _WAVELET, axis=0))
        unit = np.eye(len(analysis) // 2)
        # A line of odd length comes back one longer; the rest is cut, as PyWavelets does it.
        low = pywt.idwt(unit, None, _WAVELET, axis=0)[:side]
        high = pywt.idwt(None, unit, _WAVELET, axis=0)[:side]
        matrices.append((analysis, np.concatenate([low, high], axis=1)))
        side = len(unit)
    # Step 2 is linear and separable too: its share of the rows (columns) joins the last synthesis.
    analysis, synthesis = matrices[0]
    matrices[0] = analysis, _phase_means_off(len(synthesis)) @ synthesis
    return tuple((a.astype(np.float32), s.astype(np.float32)) for a, s in matrices)


def _phase_means_off(side: int) -> np.ndarray:
    """`[side, side]`: takes the mean of the even places from these, and likewise the odd."""
    parity = np.arange(side) % 2
    same = parity[:, None] == parity[None]
    return np.eye(side) - same / same.sum(axis=1, keepdims=True)


def _columns(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    """x matrix^T of every x in `[n, h, w]`."""
    return jnp.einsum("nij,bj->nib", x, matrix, precision=lax.Precision.HIGHEST)


def _rows(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    """matrix x of every x in `[n, h, w]`."""
    return jnp.einsum("ai,nij->naj", matrix, x, precision=lax.Precision.HIGHEST)


def _window_sums(x: jax.Array, axis: int, largest: int) -> list[jax.Array]:
    """Sums along an axis over windows of radius 1 to `largest`, zeros beyond the border.

    Shifted copies are added: differences of cumulative sums would lose, in float32, a quiet place
    beside a loud one.
    """
    size = x.shape[axis]
    padding = [(0, 0)] * x.ndim
    padding[axis] = (largest, largest)
    padded = jnp.pad(x, padding)

    def shifted(by):
        return lax.slice_in_dim(padded, largest + by, largest + by + size, axis=axis)

    sums = [x]
    for radius in range(1, largest + 1):
        sums.append(sums[-1] + shifted(-radius) + shifted(radius))
    return sums[1:]


def _noise_share(energy: jax.Array, noise_variance: float | jax.Array) -> jax.Array:
    """The Wiener filter's gain for noise: variance of the noise / (that of the signal + noise).

    Args:
      energy: `[..., h, w]` squared coefficients.
      noise_variance: scalar or `[..., 1, 1]`.
    Returns:
      `[..., h, w]` in (0, 1].
    """
    local = jnp.full_like(energy, jnp.inf)
    columns = _window_sums(energy, energy.ndim - 2, _LARGEST_RADIUS)
    for radius, column in enumerate(columns, start=1):
        sums = _window_sums(column, energy.ndim - 1, radius)[-1]
        local = jnp.minimum(local, sums / (2 * radius + 1) ** 2)
    # An image without noise has no energy either; any gain will do, but not 0 / 0.
    noise = jnp.maximum(noise_variance, jnp.finfo(energy.dtype).tiny)
    return noise / (jnp.maximum(local - noise, 0) + noise)


def _fourier_wiener(x: jax.Array) -> jax.Array:
    """Step 3, of `[n, h, w]`."""
    spectrum = jnp.fft.fft2(x)
    energy = (spectrum.real**2 + spectrum.imag**2) / (x.shape[1] * x.shape[2])
    noise = jnp.var(x, axis=(1, 2), keepdims=True, ddof=1)
    return jnp.fft.ifft2(spectrum * _noise_share(energy, noise)).real


@jax.jit
def _residuals_of_batch(images: jax.Array) -> jax.Array:
    """`[n, h, w, c]` uint8 -> `[n, h, w]` float32."""
    n, h, w, c = images.shape
    levels = list(zip(_wavelet_matrices(h), _wavelet_matrices(w)))
    x = jnp.moveaxis(images, 3, 0).reshape(c * n, h, w).astype(jnp.float32)
    # A constant is all approximation, so it may go first: what remains rounds less, and an image
    # of one colour becomes exactly zero.
    x = x - x[:, :1, :1]
    weights = (_GREY if c == 3 else np.ones(1)).astype(np.float32)
    details = []
    for (rows, _), (columns, _) in levels:
        coefficients = _rows(_columns(x, columns), rows)
        tall, wide = rows.shape[0] // 2, columns.shape[0] // 2
        x = coefficients[:, :tall, :wide]
        bands = jnp.stack(
            [
                coefficients[:, :tall, wide:],
                coefficients[:, tall:, :wide],
                coefficients[:, tall:, wide:],
            ]
        )
        bands = bands * _noise_share(bands**2, _NOISE_VARIANCE)
        bands = bands.reshape(3, c, n, tall, wide)
        # Grey here and not in the end: the transform back is linear, one instead of three.
        details.append(sum(bands[:, i] * weight for i, weight in enumerate(weights)))
    x = jnp.zeros((n, *x.shape[1:]), jnp.float32)
    # Four products and not one of a matrix of all bands: XLA would compute the gains once more for
    # every corner of it (measured on CPU: a quarter of the whole time).
    for ((_, rows), (_, columns)), (above, left, corner) in zip(levels[::-1], details[::-1]):
        (row_low, row_high), (low, high) = np.split(rows, 2, axis=1), np.split(columns, 2, axis=1)
        top = _columns(x, low) + _columns(above, high)
        bottom = _columns(left, low) + _columns(corner, high)
        x = _rows(top, row_low) + _rows(bottom, row_high)
    return _fourier_wiener(x)


def residuals(images: np.ndarray, *, batch_size: int = 32) -> np.ndarray:
    """The noise residual of every image, see the module docstring.

    Args:
      images: `[n, h, w, c]` uint8, grey or RGB, h and w even and at least 16, n >= 0.
      batch_size: images per compiled call; changes time and memory only.
    Returns:
      `[n, h, w]` float32 in grey levels.
    Raises:
      ValueError: for other images, or a batch size below 1.
    """
    images = _checked(images)
    found = [np.zeros((0, *images.shape[1:3]), np.float32)]
    found += [_filled_residuals(batch, batch_size) for batch in _batches(images, batch_size)]
    return np.concatenate(found)


def _batches(images: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    if batch_size < 1:
        raise ValueError(f"{batch_size=}: expected 1 or more")
    for start in range(0, len(images), batch_size):
        yield images[start : start + batch_size]


def _filled_residuals(batch: np.ndarray, batch_size: int) -> np.ndarray:
    """Residuals of up to `batch_size` images, filled up to them: one shape, one compilation."""
    return np.asarray(_residuals_of_batch(data.filled(batch, batch_size)))[: len(batch)]


def _checked(
    images: np.ndarray | jax.Array, shape: tuple[int, int, int] | None = None
) -> np.ndarray:
    images = np.asarray(data.check_images(images, shape=shape))
    if images.dtype != np.uint8:
        raise ValueError(
            f"fingerprints are of 8-bit files, got {images.dtype} images; use data.to_uint8 on "
            "float images"
        )
    h, w, c = images.shape[1:]
    if c not in (1, 3) or h % 2 or w % 2 or min(h, w) < _SMALLEST_SIDE:
        raise ValueError(
            f"fingerprints take images [n, h, w, 1] or [n, h, w, 3] with even sides of at least "
            f"{_SMALLEST_SIDE}, got {list(images.shape)}; crop all images alike"
        )
    return images


# ---------------------------------------------------------------------------------------------
# Fingerprint and score


def _as_read(images: np.ndarray, convention: str) -> np.ndarray:
    """The grey levels that the convention computes with."""
    if convention == "paper":
        return images
    # (u / 255 - 0.5) / 0.5, then (x + 1) * 127.5 cut to 8 bits, all in float32: u falls just short
    # of itself for these levels and no others.
    return images - ((images >= 1) & (images <= 63)).astype(np.uint8)


def _grey(images: np.ndarray) -> np.ndarray:
    """`[n, h, w, c]` uint8 -> `[n, h, w]` float64; an image of one colour is exactly zero."""
    weights = _GREY if images.shape[-1] == 3 else np.ones(1)
    return (images - images[:, :1, :1].astype(np.float64)) @ weights


def _standardised(x: np.ndarray) -> np.ndarray:
    """`[n, h, w]` -> `[n, h w]` float64 rows of mean 0 and norm 1; zero where x is constant."""
    rows = x.reshape(len(x), -1).astype(np.float64)
    rows -= rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def fit(
    images: np.ndarray | jax.Array | Iterable[np.ndarray],
    *,
    convention: str = "reference",
    batch_size: int = 32,
) -> Fingerprint:
    """The mean residual of own images ([P1] E.4: 10 000 of them, 2000 for Stable Diffusion).

    Memory does not grow with the number of images: batches are read once, one at a time.

    Args:
      images: own images `[n, h, w, c]` uint8, as `residuals` takes them, or an iterable of such
        batches.
      convention: "paper" or "reference", see the module docstring.
      batch_size: images per compiled call; an incoming batch is best a multiple of it.
    Returns:
      The fingerprint.
    Raises:
      ValueError: for an unknown convention, bad images, images that differ in shape, none at all,
        or nothing but images of one colour.
    """
    conventions.check(convention)
    shape: tuple[int, int, int] | None = None
    total, num_images = np.zeros(()), 0
    for batch in [images] if isinstance(images, (np.ndarray, jax.Array)) else images:
        batch = _checked(batch, shape)
        h, w, c = batch.shape[1:]
        shape = h, w, c
        for part in _batches(batch, batch_size):
            found = _filled_residuals(_as_read(part, convention), batch_size)
            total = total + found.sum(axis=0, dtype=np.float64)
            num_images += len(part)
    if shape is None or num_images == 0:
        raise ValueError("a fingerprint is a mean over own images, got none")
    pattern = _standardised(total[None] / num_images).reshape(shape[:2]).astype(np.float32)
    if not pattern.any():
        raise ValueError(
            f"the {num_images} images leave no residual: every one has one colour only; give "
            "images of the model"
        )
    return Fingerprint(pattern, num_images=num_images, image_shape=shape, convention=convention)


def score(fingerprint: Fingerprint, images: np.ndarray, *, batch_size: int = 32) -> np.ndarray:
    """The negative correlation with the fingerprint ([P1] appendix D): higher = less likely ours.

    Args:
      fingerprint: from `fit`.
      images: `[n, h, w, c]` uint8 of the shape of those in `fit`, n >= 0.
      batch_size: images per compiled call.
    Returns:
      `[n]` float32 in [-1, 1]; 0 for an image of one colour, which shows no noise.
    Raises:
      ValueError: for images of another shape or dtype, or a batch size below 1.
    """
    images = _checked(images, fingerprint.image_shape)
    pattern = np.asarray(fingerprint.pattern, np.float64).ravel()
    scores = [np.zeros(0)]
    for batch in _batches(images, batch_size):
        if fingerprint.convention == "paper":
            compared = _grey(batch)
        else:
            compared = _filled_residuals(_as_read(batch, "reference"), batch_size)
        scores.append(-_standardised(compared) @ pattern)
    return np.clip(np.concatenate(scores), -1, 1).astype(np.float32)
