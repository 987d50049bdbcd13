"""Folders of IDX files, the format that MNIST and the sets made like it are handed out in.

`data.load("/usr/share/datasets/fashion-mnist", ...)`: `train-images-idx3-ubyte` and
`t10k-images-idx3-ubyte`, as they are or with `.gz` (Debian's package `dataset-fashion-mnist` has
them, and so do the originals of MNIST, EMNIST and KMNIST).

*   *Splits.* The test split is that of the set; one part in nine of its train split, chosen by the
    seed, is the validation split (53 333 / 6667 / 10 000).
*   *Size.* Images stay as they are, or are zero-padded to `image_size` on all sides alike, as the
    embedded digits are.
"""

import gzip
import os
import zlib

import numpy as np

from flipad_jax import data

__all__ = ["is_folder", "load"]

_FILES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_MAGIC = 0x00000803  # unsigned bytes, three dimensions
_MOST_EXPANDED = 1032  # times as long as what it was packed into: no deflate stream is longer


def _find(folder: str | os.PathLike, which: str) -> str | None:
    for ending in ("", ".gz"):
        path = os.path.join(folder, _FILES[which] + ending)
        if os.path.isfile(path):
            return path
    return None


def is_folder(path: str | os.PathLike) -> bool:
    """Whether a folder holds the images of such a set, train or test."""
    return any(_find(path, which) for which in _FILES)


def load(
    path: str | os.PathLike,
    *,
    split: str,
    image_size: int | None = None,
    num_images: int | None = None,
    exact: bool = True,
    seed: int = 0,
) -> np.ndarray:
    """Loads a split; see the module docstring and `data.load`.

    Args:
      path: the folder.
      split: one of `data.SPLITS`.
      image_size: height and width; by default those of the file.
      num_images: how many; all of the split, if None.
      exact: refuse a split that has fewer than `num_images`; if False, these are a bound.
      seed: non-negative integer, of the order and of the validation split.
    Returns:
      uint8 `[n, h, w, 1]`.
    Raises:
      ValueError: if the file of the split is missing or damaged, if images are larger than
        `image_size`, or (if `exact`) for more images than there are.
    """
    which = "test" if split == "test" else "train"
    found = _find(path, which)
    if found is None:
        raise ValueError(f"{os.fspath(path)} has no {_FILES[which]} (.gz) for its {split} split")
    images = _read(found)
    order = data.permutation(len(images), seed)
    if which == "train":
        kept = len(images) * 8 // 9
        order = order[:kept] if split == "train" else order[kept:]
    if exact and num_images is not None and num_images > len(order):
        raise ValueError(
            f"the {split} split of {os.fspath(path)} has {len(order)} images, {num_images} were "
            "asked for"
        )
    images = images[order[:num_images]]
    height, width = images.shape[1:]
    if image_size is not None:
        if image_size < max(height, width):
            raise ValueError(
                f"{found} has images of {height} x {width}, which are only padded: "
                f"image_size={image_size} is too small"
            )
        sides = [
            ((image_size - side) // 2, -(-(image_size - side) // 2)) for side in images.shape[1:]
        ]
        images = np.pad(images, ((0, 0), *sides))
    return images[..., None]


def _read(path: str) -> np.ndarray:
    """`[n, h, w]` uint8."""
    opened = gzip.open if path.endswith(".gz") else open
    try:
        with opened(path, "rb") as file:
            header = file.read(16)
            if len(header) < 16 or int.from_bytes(header[:4]) != _MAGIC:
                raise ValueError(f"{path} is no IDX file of 8-bit images")
            count, height, width = (int.from_bytes(header[i : i + 4]) for i in (4, 8, 12))
            promised = count * height * width
            # Before memory is taken for what cannot be there.
            expanded = _MOST_EXPANDED if path.endswith(".gz") else 1
            if not 0 < promised <= expanded * os.path.getsize(path):
                raise ValueError(
                    f"{path} promises {count} images of {height} x {width}, "
                    f"and has {os.path.getsize(path)} bytes"
                )
            # One byte more than promised would show that the header is not of this file.
            content = file.read(promised + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(content) != promised:
        raise ValueError(
            f"{path} promises {count} images of {height} x {width} and has "
            f"{'more' if len(content) > promised else 'fewer'} bytes"
        )
    return np.frombuffer(content, np.uint8).reshape(count, height, width)
