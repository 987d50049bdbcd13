"""Was this image changed after it was made? Then a verdict about it may be wrong, and we say so.

An attributor is calibrated on own images as they are published. A copy that was recompressed,
resized, blurred, cropped or made noisy is something else: usually it is declared not ours, though
it is. `fit` learns from own images only what they look like beside processed copies of themselves,
and `check` gives a suspect image a p-value of "untouched" and the likeliest kind of processing.

*   *Features* (`_features`): logarithmic energies of the 63 frequencies of 8 x 8 blocks; a comb
    test for JPEG (below); shares of small second differences, of extreme grey levels, number of
    levels; the roughest residual; jumps across the borders of blocks. For colour also the energies
    of the two chroma planes. They are read from at most 256 x 256 pixels in the middle.
*   *Comb*: coefficients of a decoded JPEG lie near multiples of its quantisation steps. For every
    quality q from 30 to 98, e(q) is the mean squared distance of the luma coefficients to multiples
    of libjpeg's steps; the features are the deepest dips of log e(q) below its neighbours.
*   *Decision*: linear discriminant analysis of untouched images and of copies by five processes,
    with one Ledoit-Wolf covariance. With d_k the Mahalanobis distance to the mean of process k, 0
    meaning untouched, (d_0^2 - d_k^2) / 2 are the log odds of k against untouched. What is unlike
    all of them is no evidence of any: an eighth of the excess of d_k^2 over its 99 % quantile among
    other copies by process k is subtracted. The score is the maximum over k.
*   *p-value*: conformal, p = (1 + #{own >= score}) / (n + 1), on own images that fitted nothing.
    Scores below 0 (untouched is likelier) count as 0. The p-value stays valid, and an image is
    never called processed only because it is a little unlike ours.

What holds and what does not. P(p <= a) <= a for an untouched own image. For an untouched image of
somebody else nothing is guaranteed: it may differ from ours in what processing changes. Measured on
500 test digits at p <= 0.01 (`experiments/validity.py`): 0 to 2 % of real digits are called
processed with a DCGAN of the zoo as ours, but 44 % with the WGAN-GP (as enlarged crops); at most
1 % of the images of other generators. Processing that hardly changes an image, or that is not among
those learned, goes unnoticed: on digits_dcgan_0, JPEG is found in 59 % of images at quality 97 and
2 % at 98, WebP at quality 75 in 4 %, grey levels shifted by 10 never.

Chosen while looking at `digits_dcgan_0` of the zoo as ours and at digits_dcgan_1, digits_dcgan_2,
digits_wgan_gp_0, training digits and crops of photographs: the features, linear discriminant
analysis instead of logistic regression (far quicker, and fewer false alarms on foreign images), one
mean per process, the floor at 0, the eighth (without it all images of a DCGAN trained on
photographs pass as noisy copies of photographs, with it none). Held out until the end: other
streams of these generators, the test digits, and digits_wgan_gp_0 as ours.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from flipad_jax import data, perturbations
from flipad_jax.detection import calibration

__all__ = ["KINDS", "MIN_IMAGES", "MIN_SIDE", "Checks", "Validity", "check", "fit", "why_not"]

# What copies are made with -> the kind that is told: a blur and a shrunk copy look alike.
_PROCESSES = {
    "JPEG": "JPEG",
    "noise": "noise",
    "blur": "blur or resize",
    "resize": "blur or resize",
    "crop": "crop",
}
KINDS = tuple(dict.fromkeys(_PROCESSES.values()))
MIN_SIDE = 16  # pixels: four blocks of a JPEG
MIN_IMAGES = 200  # half of them calibrate, and p <= 0.01 takes 99

# Strengths that copies are made with, drawn with equal chance.
_QUALITIES = (96, 95, 93, 92, 90, 88, 85, 80, 75, 70, 60, 50, 40)
_NOISE_STDS = (0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08)
_BLUR_KERNELS = (3, 5)
_RESIZE_FACTORS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.25, 1.5, 2.0)
_CROP_SHARES = (24 / 32, 26 / 32, 27 / 32, 28 / 32, 29 / 32, 30 / 32, 31 / 32)

_LEARNING = 0.8  # share of the images fitted on that give means and covariance, the rest limits
_TYPICAL = 0.99  # share of copies that are not too strange for their kind
_STRANGENESS = 1 / 8  # log odds lost per squared distance beyond

_WINDOW = 256  # pixels a side that are read, a multiple of 8
_BATCH = 64  # images per compiled call
# Energies below this, in squared grey levels, are not told apart: rounding alone makes 1/12.
_FLOOR = 0.05
_COMB_FLOOR = 0.02
_COMB_QUALITIES = np.arange(30, 99)
# A quality's neighbours in the comb: its direct ones share many of its steps.
_COMB_NEIGHBOURS = (-3, -2, 2, 3)
_COMB_BANDS = ((30, 60), (60, 80), (80, 90), (90, 99))
# libjpeg's luma steps at quality 50 (ITU T.81, table K.1), by rows.
# fmt: off
_LUMA_STEPS = np.array([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
])
# fmt: on
# R, G, B to luma and the two chroma planes (JFIF).
_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32
)


@struct.dataclass
class Validity:
    """What `fit` learned; float32 arrays and the shape of an image.

    Attributes:
      offset: `[f]` subtracted from the features.
      scale: `[f]` divides them then.
      means: `[1 + p, f]` mean of untouched own images, and of their copies by each of p processes.
      precision: `[f, f]` inverse of the covariance that all share.
      limits: `[p]` 99 % quantile of the squared distance of copies to the mean of their process.
      calibration_scores: `[n]` sorted scores, 0 or above, of own images that fitted nothing.
      image_shape: (h, w, c) of the images it can check (static).
    """

    offset: jax.Array
    scale: jax.Array
    means: jax.Array
    precision: jax.Array
    limits: jax.Array
    calibration_scores: jax.Array
    image_shape: tuple[int, int, int] = struct.field(pytree_node=False)


class Checks(NamedTuple):
    """One entry per image.

    Attributes:
      p_value: `[n]` float64, small = looks processed; at most 1 % of untouched own images have p
        <= 0.01.
      kind: `[n]` text, the likeliest of `KINDS`; it means something where the p-value is small.
    """

    p_value: np.ndarray
    kind: np.ndarray


def why_not(image_shape: tuple[int, int, int], num_images: int) -> str | None:
    """Why nothing can be learned from so many own images of this shape; None if it can.

    `fit` returns None in these cases instead of raising: an attributor serves without a check too.
    """
    h, w, c = image_shape
    if c not in (1, 3):
        return f"images have {c} channels; processed copies are made of grey (1) and RGB (3) ones"
    if min(h, w) < MIN_SIDE:
        return f"images are {h} x {w} pixels; traces of processing take {MIN_SIDE} a side"
    if num_images < MIN_IMAGES:
        return f"{num_images} own images are too few; {MIN_IMAGES} are needed"
    return None


def fit(images: np.ndarray, rng: jax.Array, *, num_images: int = 2000) -> Validity | None:
    """Learn what untouched own images look like beside processed copies of them.

    Args:
      images: `[n, h, w, c]` uint8 own images exactly as they are published.
      rng: key of the split, of the strengths and of the noise.
      num_images: no more than this many are used, drawn at random; half of them calibrate.
    Returns:
      What `check` takes; None if `why_not` names a reason.
    Raises:
      ValueError: if the images are not uint8 `[n, h, w, c]`.
    """
    from sklearn.covariance import ledoit_wolf

    images = np.asarray(data.check_images(images))
    if images.dtype != np.uint8:
        raise ValueError(
            f"own images are {images.dtype}, expected uint8, as they are published; "
            "use data.to_uint8"
        )
    shape = images.shape[1:]
    num = min(len(images), num_images)
    if why_not(shape, num):
        return None
    order_rng, copy_rng = jax.random.split(rng)
    order = np.asarray(jax.random.permutation(order_rng, len(images)))[:num]
    fitting, calibrating = images[order[: num // 2]], images[order[num // 2 :]]
    described = [_describe(fitting)]
    for index, process in enumerate(_PROCESSES):
        copies = _processed(process, fitting, jax.random.fold_in(copy_rng, index))
        described.append(_describe(copies))
    features = np.stack(described).astype(np.float64)  # [1 + p, n, f]
    # Images that the covariance was fitted to lie nearer to their means than others will.
    learning = features[:, : round(_LEARNING * features.shape[1])]
    offset = learning[0].mean(axis=0)
    # A feature that hardly varies (no white pixel anywhere) must not be blown up to count.
    scale = learning.std(axis=(0, 1)) + 0.05
    means = ((learning - offset) / scale).mean(axis=1)
    apart = (features - offset) / scale - means[:, None]
    within = apart[:, : learning.shape[1]].reshape(-1, apart.shape[-1])
    covariance, _ = ledoit_wolf(within, assume_centered=True)
    precision = np.linalg.inv(covariance)
    fresh = apart[1:, learning.shape[1] :]
    distances = np.sum((fresh @ precision) * fresh, axis=-1)
    validity = Validity(
        offset=jnp.asarray(offset, jnp.float32),
        scale=jnp.asarray(scale, jnp.float32),
        means=jnp.asarray(means, jnp.float32),
        precision=jnp.asarray(precision, jnp.float32),
        limits=jnp.asarray(np.quantile(distances, _TYPICAL, axis=1), jnp.float32),
        calibration_scores=jnp.zeros(0, jnp.float32),
        image_shape=shape,
    )
    scores, _ = _scores(validity, calibrating)
    return dataclasses.replace(validity, calibration_scores=jnp.asarray(np.sort(scores)))


def check(validity: Validity, images: np.ndarray) -> Checks:
    """Does an image look as if it was processed after it was made?

    Args:
      validity: from `fit`.
      images: `[n, h, w, c]` of the shape fitted on, uint8 or float in [-1, 1] (rounded to the
        nearest grey level), n >= 0.
    Returns:
      p-values and kinds; warn where the p-value is at most 0.01, say.
    Raises:
      ValueError: for bad images or another shape.
    """
    images = np.asarray(data.check_images(images, shape=validity.image_shape))
    if images.dtype != np.uint8:
        images = data.to_uint8(images)
    scores, processes = _scores(validity, images)
    own = np.asarray(validity.calibration_scores)
    return Checks(
        calibration.conformal_p_values(own, scores), np.array(list(_PROCESSES.values()))[processes]
    )


def _scores(validity: Validity, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log odds of processed against untouched, 0 or above, float32 `[n]`, and the likeliest of
    `_PROCESSES` `[n]`."""
    offset, scale, means, precision, limits = (
        np.asarray(array, np.float64)
        for array in (
            validity.offset,
            validity.scale,
            validity.means,
            validity.precision,
            validity.limits,
        )
    )
    standard = (_describe(images) - offset) / scale
    apart = [standard - mean for mean in means]
    distances = np.stack([np.sum((x @ precision) * x, axis=1) for x in apart], axis=1)
    odds = (distances[:, :1] - distances[:, 1:]) / 2
    odds -= _STRANGENESS * np.maximum(distances[:, 1:] - limits, 0)
    # In float32, as the calibration scores are kept: equal scores must stay equal.
    return np.maximum(odds.max(axis=1), 0).astype(np.float32), odds.argmax(axis=1)


def _processed(process: str, images: np.ndarray, rng: jax.Array) -> np.ndarray:
    """A copy of every image, its strength drawn at random."""
    strength_rng, noise_rng = jax.random.split(rng)
    side = min(images.shape[1:3])

    def noisy(batch, number, std):
        return perturbations.noise(batch, jax.random.fold_in(noise_rng, number), std)

    edits = {
        "JPEG": [functools.partial(perturbations.jpeg, quality=q) for q in _QUALITIES],
        "noise": [functools.partial(noisy, number=i, std=s) for i, s in enumerate(_NOISE_STDS)],
        "blur": [functools.partial(perturbations.blur, kernel_size=k) for k in _BLUR_KERNELS],
        "resize": [
            functools.partial(perturbations.resize, factor=factor, method=method)
            for factor in _RESIZE_FACTORS
            for method in perturbations.RESAMPLING
        ],
        "crop": [
            functools.partial(perturbations.crop, size=min(round(side * share), side - 1))
            for share in _CROP_SHARES
        ],
    }[process]
    drawn = np.asarray(jax.random.randint(strength_rng, (len(images),), 0, len(edits)))
    copies = np.empty_like(images)
    for number, edit in enumerate(edits):
        chosen = drawn == number
        copies[chosen] = edit(images[chosen])
    return copies


# ---------------------------------------------------------------------------------------------
# Features


def _describe(images: np.ndarray) -> np.ndarray:
    """Features `[n, f]` float32 of uint8 images `[n, h, w, c]`."""
    images = _window(images)
    rows = []
    for start in range(0, max(len(images), 1), _BATCH):
        batch = images[start : start + _BATCH]
        # Filled up to one shape: one compilation, and no result depends on the batch.
        full = np.zeros((_BATCH, *images.shape[1:]), np.uint8)
        full[: len(batch)] = batch
        rows.append(np.asarray(_features_batch(full))[: len(batch)])
    return np.concatenate(rows)


def _window(images: np.ndarray) -> np.ndarray:
    """At most `_WINDOW` pixels a side from the middle, starting on the grid of JPEG blocks."""
    starts = [max(side - _WINDOW, 0) // 16 * 8 for side in images.shape[1:3]]
    top, left = starts
    return images[:, top : top + _WINDOW, left : left + _WINDOW]


def _features(image: jax.Array) -> jax.Array:
    """Features `[f]` of one uint8 image `[h, w, c]`."""
    levels = image.astype(jnp.float32)
    planes = [levels[..., 0]]
    if image.shape[-1] == 3:
        ycc = jnp.einsum("hwc,kc->khw", levels, _YCC, precision=lax.Precision.HIGHEST)
        planes = list(ycc)
    luma, chroma = planes[0], planes[1:]
    coefficients = _block_dct(luma - 128)
    return jnp.concatenate(
        [
            _log_energies(coefficients),
            _comb_dips(coefficients),
            _small_differences(luma),
            _grey_levels(image),
            _roughness(luma),
            _block_borders(luma),
            *(_log_energies(_block_dct(plane)) for plane in chroma),
        ]
    )


_features_batch = jax.jit(jax.vmap(_features))


def _dct_matrix() -> np.ndarray:
    k, n = np.arange(8)[:, None], np.arange(8)[None]
    matrix = 0.5 * np.cos(np.pi * (2 * n + 1) * k / 16)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


def _block_dct(plane: jax.Array) -> jax.Array:
    """Orthonormal DCT `[blocks, 64]` of the whole 8 x 8 blocks of a plane `[h, w]`."""
    h, w = plane.shape[0] // 8, plane.shape[1] // 8
    blocks = plane[: 8 * h, : 8 * w].reshape(h, 8, w, 8)
    dct = _dct_matrix()
    found = jnp.einsum("ui,hiwj,vj->hwuv", dct, blocks, dct, precision=lax.Precision.HIGHEST)
    return found.reshape(h * w, 64)


def _log_energies(coefficients: jax.Array) -> jax.Array:
    """`[63]`: how much of every frequency but the mean there is."""
    return jnp.log(jnp.mean(coefficients**2, axis=0)[1:] + _FLOOR)


def _quantisation_steps(quality: int) -> np.ndarray:
    """libjpeg's luma steps `[64]` at a quality."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((_LUMA_STEPS * percent + 50) // 100, 1, 255)


def _comb_dips(coefficients: jax.Array) -> jax.Array:
    """`[4]`: the deepest dip in every band of qualities."""
    steps = np.stack([_quantisation_steps(int(q)) for q in _COMB_QUALITIES]).astype(np.float32)

    def distance(step):
        return jnp.mean((coefficients - step * jnp.round(coefficients / step)) ** 2)

    logs = jnp.log(lax.map(distance, jnp.asarray(steps)) + _COMB_FLOOR)
    reach = max(_COMB_NEIGHBOURS)
    padded = jnp.pad(logs, reach, mode="reflect")
    shifted = [padded[reach + k : reach + k + len(logs)] for k in _COMB_NEIGHBOURS]
    dips = jnp.mean(jnp.stack(shifted), axis=0) - logs
    first = int(_COMB_QUALITIES[0])
    return jnp.stack([dips[low - first : high - first].max() for low, high in _COMB_BANDS])


def _small_differences(luma: jax.Array) -> jax.Array:
    """`[8]`: square roots of the shares of second differences of 0, 1, 2 to 3, 4 to 7 levels."""
    edges = (-1.0, 0.5, 1.5, 3.5, 8.0)
    found = []
    for axis in (0, 1):
        sizes = jnp.abs(jnp.diff(luma, 2, axis=axis))
        for low, high in zip(edges, edges[1:]):
            found.append(jnp.mean((sizes >= low) & (sizes < high), dtype=jnp.float32))
    return jnp.sqrt(jnp.stack(found))


def _grey_levels(image: jax.Array) -> jax.Array:
    """`[5]`: roots of the shares of black, nearly black, dark and white; levels in use over 16."""
    bounds = ((0, 0), (1, 3), (4, 11), (252, 255))
    shares = [jnp.mean((image >= low) & (image <= high), dtype=jnp.float32) for low, high in bounds]
    used = jnp.zeros(256, jnp.float32).at[image.ravel()].set(1.0).sum()
    return jnp.concatenate([jnp.sqrt(jnp.stack(shares)), used[None] / 16])


def _roughness(luma: jax.Array) -> jax.Array:
    """`[1]`: energy of the second difference along both axes."""
    both = jnp.diff(jnp.diff(luma, 2, axis=0), 2, axis=1) / 4
    return jnp.log(jnp.mean(both**2) + _FLOOR)[None]


def _block_borders(luma: jax.Array) -> jax.Array:
    """`[2]`: jumps between 8 x 8 blocks against jumps within."""
    found = []
    for jumps in (jnp.abs(jnp.diff(luma, axis=0)), jnp.abs(jnp.diff(luma, axis=1)).T):
        between = np.arange(jumps.shape[0]) % 8 == 7
        found.append(jnp.log(jumps[between].mean() + 0.1) - jnp.log(jumps[~between].mean() + 0.1))
    return jnp.stack(found)
