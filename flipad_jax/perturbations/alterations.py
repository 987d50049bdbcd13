"""Copies of own images that our model would not have made, though one hardly sees it.

Who holds own images alone knows what ours look like and not what else there is. A rival whose
images look like ours leaves *other traces* in them, and so does whatever happens to an image after
it was made. `alter` makes such copies, each by one of seven alterations that take turns at random:

*   JPEG of quality 80 to 98;
*   normal noise of 0.5 to 6 grey levels;
*   a shift by a fraction of a pixel, up to one, in both directions (bicubic; from half a pixel on
    Pillow leaves the row or column that comes in from outside black);
*   to 0.8 to 1.25 times the size and back (bicubic);
*   contrast times 0.85 to 1.15, brightness plus up to 8 levels;
*   mirrored, or turned by 90 degrees where the image is square;
*   rolled by a pixel along one side or both.

The last two move nothing but the grid that a stride leaves behind. `detection.classifier` learns
to tell own images from their altered copies, and tells images of others by the way.

Chosen while a DCGAN or an LSGAN was ours, each on digits and on photographs. Leaving any one
of them out changes little; without the mirrored ones other seeds are missed more often. What was
tried beside them and left out is in WORKSPACE.md.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from flipad_jax import data

__all__ = ["alter"]


def _pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _jpeg(image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    _pillow(image).save(file, "JPEG", quality=int(draw.integers(80, 99)))
    return np.asarray(Image.open(file)).reshape(image.shape)


def _noise(image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return image + draw.uniform(0.5, 6) * draw.standard_normal(image.shape)


def _shift(image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    right, down = draw.uniform(-1, 1, 2)
    h, w = image.shape[:2]
    moved = _pillow(image).transform(
        (w, h), Image.Transform.AFFINE, (1, 0, right, 0, 1, down), resample=Image.Resampling.BICUBIC
    )
    return np.asarray(moved).reshape(image.shape)


def _resize(image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    h, w = image.shape[:2]
    factor = draw.uniform(0.8, 1.25)
    between = (max(round(w * factor), 1), max(round(h * factor), 1))
    bicubic = Image.Resampling.BICUBIC
    return np.asarray(_pillow(image).resize(between, bicubic).resize((w, h), bicubic)).reshape(
        image.shape
    )


def _contrast(image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return 127.5 + (image - 127.5) * draw.uniform(0.85, 1.15) + draw.uniform(-8, 8)


def _mirror(image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    turned = draw.random() < 0.5 and image.shape[0] == image.shape[1]
    return np.rot90(image) if turned else image[:, ::-1]


def _roll(image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return np.roll(image, ((1, 0), (0, 1), (1, 1))[draw.integers(3)], (0, 1))


_Alteration = Callable[[np.ndarray, np.random.Generator], np.ndarray]
_ANY: tuple[_Alteration, ...] = (_noise, _contrast, _mirror, _roll)
_OF_PICTURES: tuple[_Alteration, ...] = (_jpeg, _shift, _resize)  # Pillow: grey or RGB


def alter(images: np.ndarray, seed: int, num_copies: int, *, first: int = 0) -> np.ndarray:
    """Altered copies of images.

    Args:
      images: `[n, h, w, c]` uint8, n >= 1. Images of other than one or three channels get the four
        alterations that need no codec and no resampling.
      seed: names the stream. Copy i is altered by numbers drawn from (seed, i).
      num_copies: how many; copy i is of the image i modulo n.
      first: index of the first copy, for a stream that is made in pieces.
    Returns:
      `[num_copies, h, w, c]` uint8. A copy may equal its image (a white one that is mirrored).
    Raises:
      ValueError: for bad images, none, images that are not uint8, or a negative number.
    """
    images = np.asarray(data.check_images(images))
    if images.dtype != np.uint8 or not len(images) or min(num_copies, first, seed) < 0:
        raise ValueError(
            f"alter takes one uint8 image at least, got {images.dtype} {list(images.shape)}, and "
            f"numbers that are not negative: {seed=}, {num_copies=}, {first=}"
        )
    alterations = _ANY + (_OF_PICTURES if images.shape[-1] in (1, 3) else ())
    copies = np.empty((num_copies, *images.shape[1:]), np.uint8)
    for i in range(num_copies):
        index = first + i
        draw = np.random.default_rng([seed, index])
        alteration = alterations[draw.integers(len(alterations))]
        altered = alteration(images[index % len(images)], draw)
        copies[i] = np.clip(np.rint(altered), 0, 255)
    return copies
