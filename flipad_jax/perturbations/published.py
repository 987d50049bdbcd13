"""What happens to published images: blur, crop, noise, JPEG, resizing, with real codecs.

Every function takes uint8 images `[n, h, w, c]`, grey (c = 1) or RGB (c = 3), and returns images of
the same shape and dtype: what a file would hold after it was decoded, edited and saved again
without loss. They run on the host, image by image, so nothing depends on how images are batched.

Blur, crop, noise and JPEG do what the code of the FLIPAD paper [P1] does with torchvision and
Pillow on 8-bit images, before any scaling; as there, the blur's standard deviation is 3 pixels
whatever the size of its window. `combination` chains the four as [P2] does.

`apply` takes a perturbation by name, as experiments have it on their command line.

Randomness is folded from the index of an image in its set, so a set may be edited in pieces: give
`first`, the index of the first image, with each.
"""

import functools
import io
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flipad_jax import data

__all__ = [
    "FORMS",
    "RESAMPLING",
    "any_of_them",
    "apply",
    "blur",
    "combination",
    "crop",
    "jpeg",
    "noise",
    "parse",
    "resize",
]

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

_BLUR_SIGMA = 3.0
_BATCH = 64  # images at a time, for memory and speed only


def _checked(images: np.ndarray) -> np.ndarray:
    images = np.asarray(data.check_images(images))
    if images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"perturbations take uint8 images [n, h, w, 1] or [n, h, w, 3], got {images.dtype} "
            f"{list(images.shape)}; use data.to_uint8 on float images"
        )
    return images


def _each(images: np.ndarray, edit) -> np.ndarray:
    """`edit`, a function of Pillow images, of every image."""
    edited = np.empty_like(images)
    for i, image in enumerate(images):
        pixels = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        edited[i] = np.asarray(edit(pixels)).reshape(image.shape)
    return edited


def blur(images: np.ndarray, kernel_size: int) -> np.ndarray:
    """Gaussian blur with a window of kernel_size x kernel_size, standard deviation 3 pixels.

    torchvision's `GaussianBlur(kernel_size, sigma=3)`: the Gaussian is sampled at whole pixels,
    normalised, mirrored at the border (which is not repeated), and the result rounded.

    Args:
      images: `[n, h, w, c]` uint8.
      kernel_size: odd; 1 changes nothing.
    Returns:
      `[n, h, w, c]` uint8.
    Raises:
      ValueError: for an even or too large window, or bad images.
    """
    from scipy import ndimage

    images = _checked(images)
    radius = kernel_size // 2
    if kernel_size < 1 or kernel_size % 2 == 0 or radius >= min(images.shape[1:3]):
        raise ValueError(
            f"kernel_size={kernel_size}: expected an odd number whose half is below the side of "
            f"the images ({min(images.shape[1:3])})"
        )
    blurred = np.empty_like(images)
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH].astype(np.float64)
        blurred[start : start + len(batch)] = np.rint(
            ndimage.gaussian_filter(
                batch,
                (0, _BLUR_SIGMA, _BLUR_SIGMA, 0),
                radius=(0, radius, radius, 0),
                mode="mirror",
            )
        )
    return blurred


def crop(images: np.ndarray, size: int) -> np.ndarray:
    """The central part, enlarged to the image again.

    torchvision's `CenterCrop` and `Resize` on Pillow images: bilinear, rounded. Of images that are
    not square the same share of each side is kept, to the nearest pixel, so nothing is stretched.

    Args:
      images: `[n, h, w, c]` uint8.
      size: what is kept of the shorter side, in pixels; 60 and 55 of 64 in [P1].
    Returns:
      `[n, h, w, c]` uint8.
    Raises:
      ValueError: for a size outside [1, min(h, w)], or bad images.
    """
    images = _checked(images)
    h, w = images.shape[1:3]
    shorter = min(h, w)
    if not 1 <= size <= shorter:
        raise ValueError(f"size={size}: expected 1 to {shorter}, the side of the images")
    tall, wide = (size if side == shorter else round(size * side / shorter) for side in (h, w))
    # Halves go to the even number: Python's round, and so torchvision's.
    top, left = round((h - tall) / 2), round((w - wide) / 2)
    box = (left, top, left + wide, top + tall)
    return _each(images, lambda image: image.crop(box).resize((w, h), RESAMPLING["bilinear"]))


@functools.partial(jax.jit, static_argnames="shape")
def _draw_noise(rng: jax.Array, indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(
        lambda i: jax.random.normal(jax.random.fold_in(rng, i), shape, dtype=jnp.float32)
    )(indices)


@jax.jit
def _draw_choices(rng: jax.Array, indices: jax.Array) -> jax.Array:
    return jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(rng, i), shape=(4,)))(indices)


@jax.jit
def _draw_kinds(rng: jax.Array, indices: jax.Array) -> jax.Array:
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(rng, i), (2,), jnp.float32))(
        indices
    )


def _draw(draw: Callable, rng: jax.Array, indices: np.ndarray, *args) -> np.ndarray:
    """What `draw` gives for up to `_BATCH` indices, filled up to them: one compilation."""
    filled = np.zeros(_BATCH, np.int32)
    filled[: len(indices)] = indices
    return np.asarray(draw(rng, filled, *args))[: len(indices)]


def _indices(images: np.ndarray, first: int) -> np.ndarray:
    if first < 0 or first + len(images) > np.iinfo(np.int32).max:
        raise ValueError(f"first={first}: expected the index of the first image, 0 or above")
    return np.arange(first, first + len(images), dtype=np.int32)


def noise(images: np.ndarray, rng: jax.Array, std: float, *, first: int = 0) -> np.ndarray:
    """Independent normal noise on every pixel and channel, rounded and clipped to 0..255.

    Args:
      images: `[n, h, w, c]` uint8.
      rng: key; the noise of image i comes from `fold_in(rng, first + i)`.
      std: standard deviation as a share of the 255 grey levels; 0.05 and 0.1 in [P1].
      first: index of the first image in its set.
    Returns:
      `[n, h, w, c]` uint8.
    Raises:
      ValueError: for a standard deviation that is negative or not finite, a negative index, or bad
        images.
    """
    images = _checked(images)
    return _noise(images, rng, std, _indices(images, first))


def _noise(images: np.ndarray, rng: jax.Array, std: float, indices: np.ndarray) -> np.ndarray:
    if not 0 <= std < np.inf:
        raise ValueError(f"std={std}: expected a finite number, 0 or above")
    noisy = np.empty_like(images)
    for start in range(0, len(images), _BATCH):
        part = slice(start, start + _BATCH)
        drawn = _draw(_draw_noise, rng, indices[part], images.shape[1:])
        noisy[part] = np.clip(images[part] + np.rint(drawn * np.float32(255 * std)), 0, 255)
    return noisy


def jpeg(images: np.ndarray, quality: int) -> np.ndarray:
    """Through a JPEG file and back: Pillow's codec, colour at half the resolution (4:2:0).

    Args:
      images: `[n, h, w, c]` uint8.
      quality: 1 (worst) to 100; 90 and 80 in [P1].
    Returns:
      `[n, h, w, c]` uint8.
    Raises:
      ValueError: for a quality out of range, or bad images.
    """
    images = _checked(images)
    if not 1 <= quality <= 100 or quality != int(quality):  # int() of infinity is an error
        raise ValueError(f"quality={quality}: expected a whole number from 1 to 100")

    def edit(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(quality))
        return Image.open(file)

    return _each(images, edit)


def resize(images: np.ndarray, factor: float, method: str = "bilinear") -> np.ndarray:
    """To another size and back, as an upload or a screenshot does it.

    Pillow's resampling both times: smoothed when it shrinks, rounded to 8 bits in between.

    Args:
      images: `[n, h, w, c]` uint8.
      factor: size in between over size; its sides are rounded to whole pixels, 1 at least.
      method: a name of `RESAMPLING`.
    Returns:
      `[n, h, w, c]` uint8.
    Raises:
      ValueError: for a factor that is not positive and finite, an unknown method, or bad images.
    """
    images = _checked(images)
    if not 0 < factor < np.inf:
        raise ValueError(f"factor={factor}: expected a finite number above 0")
    if method not in RESAMPLING:
        raise ValueError(f"method={method!r}: expected one of {tuple(RESAMPLING)}")
    h, w = images.shape[1:3]
    between = (max(round(w * factor), 1), max(round(h * factor), 1))
    filter_ = RESAMPLING[method]
    return _each(images, lambda image: image.resize(between, filter_).resize((w, h), filter_))


def combination(
    images: np.ndarray,
    rng: jax.Array,
    *,
    kernel_size: int = 3,
    size: int | None = None,
    std: float = 0.1,
    quality: int = 80,
    first: int = 0,
) -> np.ndarray:
    """Blur, crop, noise and JPEG in this order, each with probability 1/2 ([P2] section 3).

    One image in sixteen stays as it is. [P1] has no combination; the strengths are the stronger
    ones that it has for each alone, where [P2] draws strengths at random.

    Args:
      images: `[n, h, w, c]` uint8.
      rng: key; with `choice, noise = split(rng)`, what happens to image i is
        `bernoulli(fold_in(choice, first + i), shape=(4,))`, and its noise is that of `noise`.
      kernel_size: window of `blur`.
      size: what `crop` keeps of the shorter side; 55 of 64 pixels if None, see `apply`.
      std: standard deviation of `noise`.
      quality: quality of `jpeg`.
      first: index of the first image in its set.
    Returns:
      `[n, h, w, c]` uint8.
    Raises:
      ValueError: for a strength that one of the four refuses, a negative index, or bad images.
    """
    images = _checked(images)
    indices = _indices(images, first)
    size = _share_of_64(images, 55) if size is None else size
    rng_choice, rng_noise = jax.random.split(rng)
    edits = (
        lambda part, _: blur(part, kernel_size),
        lambda part, _: crop(part, size),
        lambda part, part_indices: _noise(part, rng_noise, std, part_indices),
        lambda part, _: jpeg(part, quality),
    )
    for edit in edits:
        edit(images[:0], indices[:0])  # a bad strength is refused even if no image would meet it
    edited = images.copy()
    for start in range(0, len(images), _BATCH):
        batch, batch_indices = edited[start : start + _BATCH], indices[start : start + _BATCH]
        choices = _draw(_draw_choices, rng_choice, batch_indices)
        for chosen, edit in zip(choices.T, edits):
            batch[chosen] = edit(batch[chosen], batch_indices[chosen])
    return edited


def any_of_them(images: np.ndarray, rng: jax.Array, *, first: int = 0) -> np.ndarray:
    """One perturbation or none, at a strength of its own, of every image.

    What a detector learns that cannot know which one comes: with equal chance nothing, `blur` with
    a window of 3, `crop` to 48 to 63 of 64 pixels, `noise` of up to 0.1, `jpeg` of quality 70 to
    95, strengths uniform.

    Args:
      images: `[n, h, w, c]` uint8.
      rng: key; what happens to image i is drawn from `fold_in(rng, first + i)`.
      first: index of the first image in its set.
    Returns:
      `[n, h, w, c]` uint8.
    Raises:
      ValueError: for a negative index, or bad images.
    """
    images = _checked(images)
    indices = _indices(images, first)
    rng_choice, rng_noise = jax.random.split(rng)
    edited = images.copy()
    for start in range(0, len(images), _BATCH):
        batch, batch_indices = (
            edited[start : start + _BATCH],
            indices[start : start + _BATCH],
        )
        kinds = _draw(_draw_kinds, rng_choice, batch_indices)
        drawn = _draw(_draw_noise, rng_noise, batch_indices, images.shape[1:])
        for i, (kind, strength) in enumerate(kinds):
            one = batch[i : i + 1]
            if kind < 0.2:
                batch[i : i + 1] = blur(one, 3)
            elif kind < 0.4:
                batch[i : i + 1] = crop(one, _share_of_64(one, 48 + int(16 * strength)))
            elif kind < 0.6:
                batch[i] = np.clip(one[0] + np.rint(drawn[i] * (25.5 * strength)), 0, 255)
            elif kind < 0.8:
                batch[i : i + 1] = jpeg(one, 70 + int(26 * strength))
    return edited


def _share_of_64(images: np.ndarray, size: int) -> int:
    if not 1 <= size <= 64:
        raise ValueError(f"crop-{size}: expected 1 to 64, the pixels kept of 64")
    return max(round(size * min(images.shape[1:3]) / 64), 1)


_NUMBERS = {"N": int, "X": float}

# By name: what its number is called in `FORMS`, and a function of images, key, number, first index.
_NAMED: dict[str, tuple[str, Callable]] = {
    "blur": ("N", lambda images, rng, number, first: blur(images, number)),
    "crop": ("N", lambda images, rng, number, first: crop(images, _share_of_64(images, number))),
    "noise": ("X", lambda images, rng, number, first: noise(images, rng, number, first=first)),
    "jpeg": ("N", lambda images, rng, number, first: jpeg(images, number)),
    "resize": ("X", lambda images, rng, number, first: resize(images, number)),
    "combination": ("", lambda images, rng, number, first: combination(images, rng, first=first)),
    "any": ("", lambda images, rng, number, first: any_of_them(images, rng, first=first)),
    "none": ("", lambda images, rng, number, first: _checked(images).copy()),
}

# What a name may look like; N is a whole number, X a decimal one.
FORMS = tuple(f"{name}-{number}" if number else name for name, (number, _) in _NAMED.items())


def parse(name: str) -> tuple[str, int | float | None]:
    """Takes a name of the form in `FORMS` apart, so that an experiment can refuse a bad one early.

    Args:
      name: such as "blur-3", "noise-0.1" or "combination".
    Returns:
      What is done, and how strongly; None where the name has no number.
    Raises:
      ValueError: for a name of no such form. Whether the strength is one that the perturbation
        takes shows when it is applied.
    """
    kind, _, number = name.partition("-")
    if name in _NAMED and not _NAMED[name][0]:  # it has no number
        return kind, None
    try:
        return kind, _NUMBERS[_NAMED[kind][0]](number)
    except (KeyError, ValueError):
        pass
    raise ValueError(
        f"unknown perturbation {name!r}; there are {', '.join(FORMS)}, with N a whole number and X "
        "a decimal one, such as blur-3 or noise-0.1"
    )


def apply(name: str, images: np.ndarray, rng: jax.Array, *, first: int = 0) -> np.ndarray:
    """A perturbation by its name.

    =============== ===========================================================================
    blur-N          `blur` with a window of N x N
    crop-N          `crop` to N pixels of 64; from images of another size the same share of their
                    sides is kept, to the nearest pixel, halves to the even number: crop-55 keeps
                    28 of 32
    noise-X         `noise` of standard deviation X
    jpeg-N          `jpeg` of quality N
    resize-X        `resize` by X and back, bilinear
    combination     `combination` with its default strengths
    any             `any_of_them`: one of them, or nothing, at a strength of its own
    none            nothing
    =============== ===========================================================================

    [P1] has blur-1 (which changes nothing), blur-3, crop-60, crop-55, noise-0.05, noise-0.1,
    jpeg-90 and jpeg-80.

    Args:
      name: as in the table.
      images: `[n, h, w, c]` uint8.
      rng: key, for noise, combination and any; others ignore it.
      first: index of the first image in its set.
    Returns:
      `[n, h, w, c]` uint8.
    Raises:
      ValueError: for an unknown name, a strength that the perturbation refuses, a negative index,
        or bad images.
    """
    kind, strength = parse(name)
    return _NAMED[kind][1](images, rng, strength, first)
