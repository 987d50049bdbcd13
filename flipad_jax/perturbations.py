"""What happens to published images: blur, crop, noise, JPEG, resizing, with real codecs.

Every function takes uint8 images `[n, h, w, c]`, grey (c = 1) or RGB (c = 3), and returns images of
the same shape and dtype: what a file would hold after it was decoded, edited and saved again
without loss. They run on the host, image by image, so nothing depends on how images are batched.

Blur, crop, noise and JPEG do what the code of the FLIPAD paper [P1] does with torchvision and
Pillow on 8-bit images, before any scaling; as there, the blur's standard deviation is 3 pixels
whatever the size of its window.
"""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flipad_jax import data

__all__ = ["RESAMPLING", "blur", "crop", "jpeg", "noise", "resize"]

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
    """The central size x size pixels, enlarged to the image again.

    torchvision's `CenterCrop(size)` and `Resize` on Pillow images: bilinear, rounded.

    Args:
      images: `[n, h, w, c]` uint8.
      size: side of what is kept, in pixels; 60 and 55 of 64 in [P1].
    Returns:
      `[n, h, w, c]` uint8.
    Raises:
      ValueError: for a size outside [1, min(h, w)], or bad images.
    """
    images = _checked(images)
    h, w = images.shape[1:3]
    if not 1 <= size <= min(h, w):
        raise ValueError(f"size={size}: expected 1 to {min(h, w)}, the side of the images")
    # Halves go to the even number: Python's round, and so torchvision's.
    top, left = round((h - size) / 2), round((w - size) / 2)
    box = (left, top, left + size, top + size)
    return _each(images, lambda image: image.crop(box).resize((w, h), RESAMPLING["bilinear"]))


@functools.partial(jax.jit, static_argnames="shape")
def _draw_noise(rng: jax.Array, indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(
        lambda i: jax.random.normal(jax.random.fold_in(rng, i), shape, dtype=jnp.float32)
    )(indices)


def noise(images: np.ndarray, rng: jax.Array, std: float) -> np.ndarray:
    """Independent normal noise on every pixel and channel, rounded and clipped to 0..255.

    Args:
      images: `[n, h, w, c]` uint8.
      rng: key; the noise of image i comes from `fold_in(rng, i)`.
      std: standard deviation as a share of the 255 grey levels; 0.05 and 0.1 in [P1].
    Returns:
      `[n, h, w, c]` uint8.
    Raises:
      ValueError: for a standard deviation that is negative or not finite, or bad images.
    """
    images = _checked(images)
    if not 0 <= std < np.inf:
        raise ValueError(f"std={std}: expected a finite number, 0 or above")
    noisy = np.empty_like(images)
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        indices = jnp.arange(start, start + _BATCH, dtype=jnp.int32)
        drawn = np.asarray(_draw_noise(rng, indices, images.shape[1:]))[: len(batch)]
        changed = batch + np.rint(drawn * np.float32(255 * std))
        noisy[start : start + len(batch)] = np.clip(changed, 0, 255)
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
    if quality != int(quality) or not 1 <= quality <= 100:
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
