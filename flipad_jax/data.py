"""Image sets: embedded ones, folders of image files, and the one check of image arrays.

Everywhere in this library images are `[n, h, w, c]`, either uint8 or floating point in [-1, 1]
with x = u / 127.5 - 1. This module is where they come in and go out:

*   `load` draws a fixed training, validation or test split of a named set or of a folder;
*   `read_images` and `iter_images` decode the files of a folder exactly as they are (nothing is
    resized, rotated or flattened) and give a reason for every file that they leave out; they are
    made of `find_images` and `decode_image`;
*   `check_images`, `to_float`, `to_uint8` check and convert arrays;
*   `write_images` writes PNG files.

Nothing here draws from a global random state or from a device: every draw is a function of the
seed, the split and the index of the item, made of integers only, so it is the same on every
machine and does not depend on how many items are asked for.
"""

import collections
import contextlib
import functools
import importlib.resources
import importlib.util
import io
import os
import pathlib
import re
import warnings
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np
from absl import logging
from PIL import ExifTags, Image, UnidentifiedImageError

__all__ = [
    "EXTENSIONS",
    "FORMATS",
    "NAMES",
    "SPLITS",
    "DecodedFile",
    "Folder",
    "FolderSplit",
    "Found",
    "Rejected",
    "check_arguments",
    "check_images",
    "decode",
    "decode_image",
    "decoding",
    "filled",
    "find_images",
    "iter_images",
    "load",
    "load_labels",
    "natural_order",
    "one_line",
    "open_folder",
    "permutation",
    "read_images",
    "to_float",
    "to_uint8",
    "why_unusable",
    "write_images",
]

NAMES = ("digits", "photos")
SPLITS = ("train", "validation", "test")
# The formats of these extensions, whatever a file is called, and the plain one of Netpbm. Pillow
# knows more, and runs another program, Ghostscript, to draw some of them.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
EXTENSIONS = (
    ".png",
    *(".jpg", ".jpeg", ".jpe", ".jfif"),
    ".bmp",
    ".webp",
    *(".tif", ".tiff"),
    ".gif",
    *(".ppm", ".pgm", ".pnm"),
)

# How many crops of the photographs a split has when no number is asked for; any number can be.
_PHOTOS_DEFAULT_COUNTS = {"train": 8000, "validation": 1000, "test": 1000}

# The natural colour photographs inside the wheels of scikit-learn and scikit-image. Left out:
# motorcycle_right (the scene of motorcycle_left again, a few pixels aside, so it would carry test
# content into training), and pictures that are not everyday photographs (hubble_deep_field,
# retina, ihc, color, phantom).
_PHOTOS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
)
_MAX_SCALE = 4  # a crop covers at most this many source pixels per pixel and axis


class Rejected(NamedTuple):
    """A file that could not be used."""

    path: str  # relative to the folder
    reason: str  # one line


class Folder(NamedTuple):
    """What `read_images` found."""

    images: np.ndarray  # uint8 [n, h, w, c]
    paths: tuple[str, ...]  # [n] relative to the folder, "/" between parts
    rejected: tuple[Rejected, ...]


class Found(NamedTuple):
    """What `find_images` found; nothing of it has been opened."""

    root: str  # the folder
    paths: tuple[str, ...]  # [n] relative to the folder, "/" between parts, in natural order
    rejected: tuple[Rejected, ...]  # what cannot be entered or is not followed
    num_passed_over: int = 0  # files with another name than an image's, hidden ones not counted


class FolderSplit(NamedTuple):
    """What `open_folder` found: files that `decode_image` reads one by one."""

    root: str  # the folder
    paths: tuple[str, ...]  # [n] relative to the folder, in the order that the seed fixes
    shape: tuple[int, int, int] | None  # (h, w, c) of those that count; None if none can be read
    rejected: tuple[Rejected, ...]  # what cannot be entered or is not followed, of all splits
    num_files: int  # image files of all splits


class DecodedFile(NamedTuple):
    """One file of `iter_images`: either an image or a reason why there is none."""

    path: str  # relative to the folder
    image: np.ndarray | None  # uint8 [h, w, c]
    reason: str | None


# --- arrays -----------------------------------------------------------------------------------


def to_float(images: Any) -> Any:
    """Maps 8-bit images to [-1, 1]: x = u / 127.5 - 1.

    Args:
      images: uint8 array of any shape, NumPy or JAX (also traced); float32 or float64 images are in
        [-1, 1] already and keep their values.
    Returns:
      float32 array of the same shape and kind; 0 becomes exactly -1 and 255 exactly 1.
    Raises:
      ValueError: for any other dtype.
    """
    images = images if hasattr(images, "dtype") else np.asarray(images)
    if images.dtype in (np.float32, np.float64):
        return images.astype(np.float32)
    if images.dtype != np.uint8:
        raise ValueError(
            f"to_float takes uint8 images, or floating ones in [-1, 1], got {images.dtype}; cast "
            "integers of another type to uint8 first"
        )
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def to_uint8(x: Any) -> np.ndarray:
    """Rounds images in [-1, 1] to the nearest of 256 levels: round(127.5 (x + 1)), clipped.

    The inverse of `to_float` on all 256 levels. This departs from the code that goes with the
    FLIPAD paper, which adds 128 instead of 127.5 before rounding, so that its decoded images are
    on average half a level (0.0039) brighter than what the generator made.

    Args:
      x: float array of any shape; values beyond [-1, 1] are clipped.
    Returns:
      uint8 NumPy array of the same shape.
    Raises:
      ValueError: if `x` is not floating point or holds NaN or infinity.
    """
    x = np.asarray(x)
    if not _is_float(x.dtype):
        raise ValueError(f"to_uint8 takes float images in [-1, 1], got {x.dtype}")
    if x.dtype not in (np.float32, np.float64):
        x = x.astype(np.float32)  # half precision has too few levels to round in
    bad = ~np.isfinite(x)
    if bad.any():
        raise ValueError(
            f"images hold NaN or infinity, first at index {_first_indices(bad)}; "
            "there is no 8-bit value for them"
        )
    return np.rint(127.5 * (np.clip(x, -1.0, 1.0) + 1.0)).astype(np.uint8)


def filled(rows: Any, size: int | None = None) -> Any:
    """A batch, filled up with its last row: any number of rows runs one of a few programs.

    Args:
      rows: `[n, ...]`, NumPy or JAX, n >= 1.
      size: rows to fill up to, n or more; by default a power of two, 16 at least.
    Returns:
      `[size, ...]`, the first n of them `rows`.
    """
    if size is None:
        size = max(16, 1 << (len(rows) - 1).bit_length())
    if size == len(rows):
        return rows
    return rows[np.minimum(np.arange(size), len(rows) - 1)]


def check_images(images: Any, *, shape: tuple[int, int, int] | None = None) -> Any:
    """The one check of a batch of images, made before anything is computed.

    Args:
      images: `[n, h, w, c]`, NumPy or JAX (concrete), uint8, or float32 or float64 in [-1, 1]
        (values may exceed the range by 1e-6, which rounding can do).
      shape: the `(h, w, c)` that every image must have; any, if None.
    Returns:
      `images` itself (a NumPy array if it was a list).
    Raises:
      ValueError: naming what came, the first few bad indices, and what to do.
    """
    images = images if hasattr(images, "dtype") else np.asarray(images)
    if images.ndim != 4:
        hint = ""
        if images.ndim == 3:
            hint = "; add the batch axis of one image with images[None], or the channel axis of "
            hint += "grey images with images[..., None]"
        raise ValueError(f"images must be [n, h, w, c], got shape {tuple(images.shape)}{hint}")
    if 0 in images.shape[1:]:
        raise ValueError(f"images of shape {tuple(images.shape)} hold no pixel")
    if shape is not None and tuple(images.shape[1:]) != tuple(shape):
        h, w, c = shape
        hint = ""
        if tuple(images.shape[1:]) == (c, h, w):
            hint = "; the channels come first, use numpy.moveaxis(images, 1, -1)"
        raise ValueError(
            f"images must be [n, {h}, {w}, {c}], got shape {tuple(images.shape)}{hint}"
        )
    if images.dtype == np.uint8:
        return images
    if images.dtype not in (np.float32, np.float64):
        hint = "cast it to float32"
        if not _is_float(images.dtype):
            hint = "cast values in 0..255 to uint8"
        raise ValueError(
            f"images must be uint8 or float32/float64 in [-1, 1], got {images.dtype}; {hint}"
        )
    values = np.asarray(images)
    if values.size and values.min() >= 0 and 0 < values.max() <= 1:
        logging.warning(
            "none of %d float images is anywhere darker than grey: they look like [0, 1], and "
            "[-1, 1] is expected; pass 2 * images - 1, or uint8",
            len(values),
        )
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(
            f"images must be finite, but {_bad_images(bad)} NaN or infinity; remove them"
        )
    bad = np.abs(values) > 1.0 + 1e-6
    if bad.any():
        low, high = float(values.min()), float(values.max())
        hint = "scale them so that black is -1 and white is 1"
        if low >= 0.0 and 1.5 < high <= 255.0:
            hint = "they look like 0..255: pass them as uint8, or as images / 127.5 - 1"
        raise ValueError(
            f"float images must lie in [-1, 1], but values run from {low:g} to {high:g} and "
            f"{_bad_images(bad)} values beyond; {hint}"
        )
    return images


def _is_float(dtype: Any) -> bool:
    # bfloat16 is no np.floating: it tells itself by name.
    return np.issubdtype(dtype, np.floating) or "float" in str(dtype)


def _first_indices(bad: np.ndarray) -> str:
    index = np.unravel_index(int(np.argmax(bad)), bad.shape)
    return "[" + ", ".join(str(int(i)) for i in index) + "]"


def _bad_images(bad: np.ndarray) -> str:
    """'image 3 has' or 'images 3, 5, 8 ... (12 of 100) have', from a mask [n, h, w, c]."""
    which = np.flatnonzero(bad.any(axis=(1, 2, 3)))
    if len(which) == 1:
        return f"image {which[0]} has"
    listed = ", ".join(str(i) for i in which[:5]) + (", ..." if len(which) > 5 else "")
    return f"images {listed} ({len(which)} of {len(bad)}) have"


# --- named sets and their splits --------------------------------------------------------------


def load(
    name: str | os.PathLike,
    *,
    split: str,
    image_size: int | None = None,
    num_images: int | None = None,
    exact: bool = True,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
) -> np.ndarray:
    """Loads a split of an image set.

    The three splits of one seed never overlap. Another seed makes other splits, so never compare
    across seeds. The first images of a split do not depend on `num_images`.

    *   `"digits"`: 5000 handwritten digits of MNIST, 28 x 28 grey, shipped with this package.
        Split 4000 / 500 / 500. `image_size` is 32 (zero-padded by 2 on each side; the default)
        or 28.
    *   `"photos"`: square RGB crops of seven photographs that scikit-learn and scikit-image
        carry. Each photograph is cut into one region per split (70 % of its area for training,
        15 % and 15 %), and a crop lies inside its region: no test crop shares a source pixel
        with a training crop. Place, scale (1 to 4 source pixels per pixel, never enlarged) and
        mirroring are drawn. `image_size` is 64 by default. There is no end of crops; 8000 / 1000 /
        1000 without `num_images`.
    *   a folder: its image files, also in subfolders, split 80 / 10 / 10. `image_size` refuses
        images of another size; without it the most common shape of the folder is taken. Files
        that cannot be used are left out with a warning (see `read_images`). Copies of one image
        under two names may fall into two splits. To load a folder that is called like a set,
        write "./digits".
    *   a folder with IDX files, as MNIST and Fashion-MNIST are handed out: their own splits,
        zero-padded to `image_size` (`idx_images`).
    *   a name of TensorFlow Datasets, `"mnist"`, `"celeb_a"`, `"lsun/bedroom"`, that is no folder
        here: its own splits, or parts of its train split; the shorter side resized to
        `image_size`, then the middle (`tfds_images`, also for the faces of `"celeb_a@cropped"`).

    Args:
      name: one of `NAMES`, the path of a folder, or a name of TensorFlow Datasets.
      split: one of `SPLITS`.
      image_size: height and width of the images, in pixels.
      num_images: how many; all of the split, if None. Files beyond these are not decoded.
      exact: refuse a split that has fewer than `num_images`. If False, `num_images` is a bound: the
        first of the images that `load` gives without it.
      seed: non-negative integer.
      data_dir: where sets of TensorFlow Datasets are prepared; by default $TFDS_DATA_DIR, or
        ~/tensorflow_datasets. Other sets do not look there.
    Returns:
      uint8 `[n, h, w, c]`.
    Raises:
      ValueError: for an unknown name or split, an image size that the set cannot give, a number
        of images that is not positive, or (if `exact`) more images than there are; the message
        says what exists.
    """
    check_arguments(split, image_size, num_images, seed)
    seed = int(seed)
    if name == "digits":
        return _load_digits(split, image_size, num_images, seed, exact=exact)[0]
    if name == "photos":
        default = _PHOTOS_DEFAULT_COUNTS[split]
        count = num_images or default
        return _crop_photos(
            _read_photos(),
            split=split,
            image_size=image_size or 64,
            num_images=count if exact else min(count, default),
            seed=seed,
        )
    if os.path.isdir(name):
        from flipad_jax import idx_images  # Here: it imports this module.

        if idx_images.is_folder(name):
            return idx_images.load(
                name,
                split=split,
                image_size=image_size,
                num_images=num_images,
                exact=exact,
                seed=seed,
            )
        return _load_folder(name, split, image_size, num_images, seed, exact=exact)
    from flipad_jax import tfds_images  # Here: it imports this module.

    return tfds_images.load(
        os.fspath(name),
        split=split,
        image_size=image_size,
        num_images=num_images,
        exact=exact,
        seed=seed,
        data_dir=data_dir,
    )


def load_labels(
    name: str,
    *,
    split: str = "train",
    image_size: int | None = None,
    num_images: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Labels of the images that `load` returns for the same arguments, in the same order.

    Args:
      name: "digits" (the digit, 0 to 9) or "photos" (which of the seven photographs).
      split, image_size, num_images, seed: as for `load`.
    Returns:
      int32 `[n]`.
    Raises:
      ValueError: for another set, whose labels are not read, or what `load` refuses.
    """
    if name not in NAMES:
        raise ValueError(f"labels are known of {', '.join(NAMES)}, not of {name!r}")
    check_arguments(split, image_size, num_images, seed)
    if name == "digits":
        return _load_digits(split, image_size, num_images, seed)[1]
    sources = _photo_sources(_read_photos(), split, image_size or 64, seed)
    count = num_images or _PHOTOS_DEFAULT_COUNTS[split]
    return _photo_labels(sources, split=split, num_images=count, seed=seed)


def check_arguments(split: str, image_size: Any, num_images: Any, seed: Any) -> None:
    """Refuse, with a ValueError, what no set can be loaded with; see `load`."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    _check_count("image_size", image_size)
    _check_count("num_images", num_images)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed!r}")


def _check_count(what: str, value: int | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{what} must be a positive integer, got {value!r}")


def _draw(num_words: int, seed: int, *path: int) -> np.ndarray:
    """uint64 [num_words] in [0, 2^32), a function of the seed and the path alone.

    `SeedSequence` is the part of `numpy.random` whose output is promised not to change.
    """
    words = np.random.SeedSequence(seed, spawn_key=path).generate_state(num_words)
    return words.astype(np.uint64)


def _below(word: np.uint64, bound: int) -> int:
    """Maps a word of `_draw` to {0, ..., bound - 1}, uniformly up to bound / 2^32."""
    return (int(word) * bound) >> 32


def permutation(num: int, seed: int, *path: int) -> np.ndarray:
    """`range(num)` in an order that the seed and the path fix, `[num]` int64."""
    return np.argsort(_draw(num, seed, *path), kind="stable")


def _split_indices(num: int, split: str, seed: int) -> np.ndarray:
    """80 / 10 / 10 of a permutation of range(num) that the seed fixes."""
    order = permutation(num, seed)
    bounds = (0, num * 8 // 10, num * 9 // 10, num)
    which = SPLITS.index(split)
    return order[bounds[which] : bounds[which + 1]]


def _load_digits(
    split: str, image_size: int | None, num_images: int | None, seed: int, *, exact: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels."""
    if image_size not in (None, 28, 32):
        raise ValueError(
            f"digits are 28 x 28, or 32 x 32 by zero-padding; image_size={image_size} is neither"
        )
    source = importlib.resources.files("flipad_jax") / "embedded" / "digits.npz"
    with source.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    indices = _split_indices(len(images), split, seed)
    if exact and num_images is not None and num_images > len(indices):
        raise ValueError(
            f"the {split} split of digits has {len(indices)} images, {num_images} were asked for"
        )
    images, labels = images[indices[:num_images], :, :, None], labels[indices[:num_images]]
    if image_size != 28:
        images = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return images, labels.astype(np.int32)


# --- photos -----------------------------------------------------------------------------------


class _Box(NamedTuple):
    """A rectangle of pixels, the right and lower border excluded (Pillow's order)."""

    left: int
    top: int
    right: int
    bottom: int


def _read_photos() -> list[Image.Image]:
    photos = []
    for package, path in _PHOTOS:
        spec = importlib.util.find_spec(package)  # finds the files without importing the package
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"the image set photos needs the package {package}: install it")
        with Image.open(pathlib.Path(spec.submodule_search_locations[0]) / path) as image:
            photos.append(image.convert("RGB"))
    return photos


def _regions(width: int, height: int, *, flip_x: bool, flip_y: bool) -> dict[str, _Box]:
    """Cuts a photograph: 70 % of its width for training, the rest halved for the other two."""
    x, y = width * 7 // 10, height // 2
    boxes = {
        "train": _Box(0, 0, x, height),
        "validation": _Box(x, 0, width, y),
        "test": _Box(x, y, width, height),
    }
    if flip_x:
        boxes = {
            k: _Box(width - b.right, b.top, width - b.left, b.bottom) for k, b in boxes.items()
        }
    if flip_y:
        boxes = {
            k: _Box(b.left, height - b.bottom, b.right, height - b.top) for k, b in boxes.items()
        }
    return boxes


class _Source(NamedTuple):
    """What crops of one split are cut from."""

    photo: int  # its number
    region: _Box
    max_side: int  # of a crop, before it is shrunk


def _photo_sources(
    photos: Sequence[Image.Image], split: str, image_size: int, seed: int
) -> list[_Source]:
    """The photographs that are large enough, and their part that belongs to the split.

    Which corner of a photograph belongs to validation and to test is drawn per photograph, so that
    not all of test is ground and all of validation sky.
    """
    sources, largest = [], 0
    for k, photo in enumerate(photos):
        # Word 0 onwards of path (0, k) lays out photograph k; path (1, split, i) draws crop i.
        layout = _draw(2, seed, 0, k)
        regions = _regions(
            *photo.size, flip_x=bool(_below(layout[0], 2)), flip_y=bool(_below(layout[1], 2))
        )
        # The smallest region bounds the scale in all splits, so that they differ in place only.
        side = min(min(b.right - b.left, b.bottom - b.top) for b in regions.values())
        largest = max(largest, side)
        if side >= image_size:
            sources.append(_Source(k, regions[split], min(side, _MAX_SCALE * image_size)))
    if not sources:
        raise ValueError(
            f"photos gives crops of up to {largest} x {largest}, image_size={image_size} is larger"
        )
    return sources


def _photo_labels(
    sources: Sequence[_Source], *, split: str, num_images: int, seed: int
) -> np.ndarray:
    """Which photograph crop i is from: word 0 of its draw, as in `_crop_photos`."""
    which = SPLITS.index(split)
    words = [_draw(1, seed, 1, which, i)[0] for i in range(num_images)]
    return np.array([sources[_below(word, len(sources))].photo for word in words], np.int32)


def _crop_photos(
    photos: Sequence[Image.Image], *, split: str, image_size: int, num_images: int, seed: int
) -> np.ndarray:
    """Crops of photographs, uint8 [num_images, image_size, image_size, 3]."""
    sources = _photo_sources(photos, split, image_size, seed)
    crops = np.empty((num_images, image_size, image_size, 3), np.uint8)
    for i in range(num_images):
        words = _draw(5, seed, 1, SPLITS.index(split), i)
        index, region, max_side = sources[_below(words[0], len(sources))]
        side = image_size + _below(words[1], max_side - image_size + 1)
        left = region.left + _below(words[2], region.right - region.left - side + 1)
        top = region.top + _below(words[3], region.bottom - region.top - side + 1)
        # Cut first, then shrink: resize(box=...) would let its filter read beyond the box.
        crop = photos[index].crop((left, top, left + side, top + side))
        if side > image_size:
            crop = crop.resize((image_size, image_size), Image.Resampling.LANCZOS)
        if _below(words[4], 2):
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crops[i] = np.asarray(crop)
    return crops


# --- folders ----------------------------------------------------------------------------------


def find_images(path: str | os.PathLike) -> Found:
    """Lists an image file, or the image files of a folder and its subfolders, without opening any.

    Args:
      path: a file (whatever its name), or a folder; there hidden files and folders are passed over,
        and files whose name does not end in one of `EXTENSIONS` (in any case). Links to files are
        taken, links to folders are not followed: they are rejected with a reason.
    Returns:
      `Found`: paths in natural order (2.png before 10.png).
    Raises:
      ValueError: if `path` does not exist, or no file there has the name of an image.
    """
    path = os.fspath(path)
    looked_for = f"looked for files *{', *'.join(EXTENSIONS)}"
    if os.path.isfile(path):  # named by the user: tried whatever its extension
        return Found(os.path.dirname(path), (os.path.basename(path),), ())
    if not os.path.isdir(path):
        raise ValueError(f"no images found in {path!r}: there is no such file or folder")
    names: list[str] = []
    rejected: list[Rejected] = []
    num_passed_over = 0

    def relative(full: str) -> str:
        return os.path.relpath(full, path).replace(os.sep, "/")

    def on_error(error: OSError) -> None:
        where = relative(error.filename or path)
        rejected.append(Rejected(where, f"folder cannot be read: {error.strerror}"))

    for folder, subfolders, files in os.walk(path, onerror=on_error):
        subfolders[:] = [f for f in subfolders if not f.startswith(".")]
        for subfolder in map(functools.partial(os.path.join, folder), subfolders):
            if os.path.islink(subfolder):  # may lead round in a circle, or to anywhere
                rejected.append(Rejected(relative(subfolder), "link to a folder, not followed"))
        visible = [file for file in files if not file.startswith(".")]
        chosen = [file for file in visible if file.lower().endswith(EXTENSIONS)]
        names += [relative(os.path.join(folder, file)) for file in chosen]
        num_passed_over += len(visible) - len(chosen)
    if not names and not rejected:
        raise ValueError(f"no images found in {path!r} ({looked_for}, also in subfolders)")
    rejected.sort(key=lambda row: natural_order(row.path))
    names.sort(key=natural_order)
    return Found(path, tuple(names), tuple(rejected), num_passed_over)


def read_images(
    path: str | os.PathLike, *, image_shape: tuple[int, int, int] | None = None
) -> Folder:
    """Reads an image file, or all image files of a folder and its subfolders.

    Pixels come as they were stored: 8 bits, grey or RGB (palettes without transparency are
    expanded), never resized, rotated (the EXIF orientation is not applied), flattened or
    colour-managed, because each of these destroys the traces that attribution lives on. A file
    for which that cannot be done is left out with a reason, and the rest goes on: unreadable or
    truncated files, text files with an image's name, transparency, 16 bits, CMYK, animations,
    decompression bombs, another shape. An RGB file whose three channels are identical counts as
    grey where grey is expected, since nothing is lost.

    Args:
      path: a file or a folder, see `find_images`.
      image_shape: `(h, w, c)` that is expected, c = 1 (grey) or 3 (RGB). If None, the most common
        shape of the folder.
    Returns:
      `Folder`: images in natural order of their paths (2.png before 10.png), and the rejected
      files. If every file was rejected, `images` is `[0, h, w, c]`.
    Raises:
      ValueError: if `path` does not exist, or no file there has the name of an image.
    """
    root, names, found, _ = find_images(path)
    rejected = list(found)
    image_shape = _resolve_shape(root, names, image_shape)
    images, paths = [], []
    for name in names:
        image, reason = decode_image(os.path.join(root, name), image_shape)
        if image is None:
            rejected.append(Rejected(name, str(reason)))
        else:
            images.append(image)
            paths.append(name)
    rejected.sort(key=lambda row: natural_order(row.path))
    stacked = np.stack(images) if images else np.zeros((0, *(image_shape or (0, 0, 0))), np.uint8)
    return Folder(stacked, tuple(paths), tuple(rejected))


def iter_images(
    path: str | os.PathLike, image_shape: tuple[int, int, int] | None = None
) -> Iterator[DecodedFile]:
    """`read_images` one file at a time, so that memory does not grow with the folder.

    Args:
      path: as in `read_images`.
      image_shape: as in `read_images`; if None, the headers of all files are read first.
    Returns:
      An iterator over `DecodedFile(path, image, reason)`: an image and None, or None and a reason.
    Raises:
      ValueError: as `read_images`, at the call and not at the first item.
    """
    root, names, rejected, _ = find_images(path)
    image_shape = _resolve_shape(root, names, image_shape)

    def decode_all() -> Iterator[DecodedFile]:
        for row in rejected:
            yield DecodedFile(row.path, None, row.reason)
        for name in names:
            yield DecodedFile(name, *decode_image(os.path.join(root, name), image_shape))

    return decode_all()


def decode_image(
    path: str | os.PathLike, image_shape: tuple[int, int, int] | None = None
) -> tuple[np.ndarray | None, str | None]:
    """Reads one image file by the rules of `read_images`.

    Args:
      path: the file.
      image_shape: `(h, w, c)` that is expected; any, if None.
    Returns:
      `(uint8 [h, w, c], None)`, or `(None, the reason why there is no image)`; a bad file is never
      an exception.
    """
    with decoding():
        return decode(os.fspath(path), image_shape)


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """What `decode` wants around it: Pillow's complaints about metadata are not shown (the pixels
    decide), its suspicion of a decompression bomb is an error.

    Filters of warnings belong to the whole process and not to a thread: who decodes in several
    threads enters this once, around all of them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode(
    file: str | bytes, image_shape: tuple[int, int, int] | None = None
) -> tuple[np.ndarray | None, str | None]:
    """`decode_image` for many threads, also of files that are in memory; see `decoding`.

    Args:
      file: a path, or what a file would hold.
      image_shape: as in `decode_image`.
    Returns:
      As `decode_image`.
    """
    try:
        with _opened(file) as image:
            height, width, channels = _shape(image)
            if image_shape is not None and (height, width) != image_shape[:2]:
                raise _Unusable(  # before any pixel is decoded
                    f"is {width} x {height} pixels (width x height), "
                    f"expected {image_shape[1]} x {image_shape[0]}"
                )
            if image_shape is not None and channels < image_shape[2]:
                raise _Unusable("is grey, expected RGB")
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except _Unusable as error:
        return None, str(error)
    pixels = pixels.reshape(height, width, channels)
    if image_shape is not None and channels > image_shape[2]:
        if not (pixels == pixels[..., :1]).all():
            return None, "is in colour, expected grey"
        pixels = np.ascontiguousarray(pixels[..., :1])
    return pixels, None


def write_images(folder: str | os.PathLike, images: Any) -> list[pathlib.Path]:
    """Writes a batch as PNG files 00000.png, 00001.png, ...; files of these names are replaced.

    Each file appears complete or not at all: it is written under a hidden name, then renamed.

    Args:
      folder: made if missing.
      images: `[n, h, w, 1 or 3]`, uint8, or float in [-1, 1] (rounded by `to_uint8`).
    Returns:
      The paths, in the order of the images.
    Raises:
      ValueError: for what `check_images` refuses, or another number of channels.
    """
    images = check_images(images)
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"PNG files are grey (1) or RGB (3), got {images.shape[-1]} channels")
    images = np.asarray(images) if images.dtype == np.uint8 else to_uint8(images)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digits = max(5, len(str(len(images) - 1)))
    paths = []
    for i, image in enumerate(images):
        path = folder / f"{i:0{digits}d}.png"
        partial = folder / f".{path.name}.{os.getpid()}.partial"
        try:
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(partial, "PNG")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        paths.append(path)
    return paths


def open_folder(
    path: str | os.PathLike, *, split: str, image_size: int | None = None, seed: int = 0
) -> FolderSplit:
    """Finds a split of a folder as `load` would read it; only the headers of files are read.

    Args:
      path, split, image_size, seed: as for `load`.
    Raises:
      ValueError: if `path` does not exist, or no file there has the name of an image.
    """
    check_arguments(split, image_size, None, seed)
    root, names, rejected, _ = find_images(path)
    shape = _resolve_shape(root, names, None, image_size)
    paths = tuple(names[i] for i in _split_indices(len(names), split, int(seed)))
    return FolderSplit(root, paths, shape, rejected, len(names))


def _load_folder(
    path: str | os.PathLike,
    split: str,
    image_size: int | None,
    num_images: int | None,
    seed: int,
    *,
    exact: bool,
) -> np.ndarray:
    found = open_folder(path, split=split, image_size=image_size, seed=seed)
    rejected = list(found.rejected)
    images: list[np.ndarray] = []
    for name in found.paths:
        if num_images is not None and len(images) == num_images:
            break
        image, reason = decode_image(os.path.join(found.root, name), found.shape)
        if image is None:
            rejected.append(Rejected(name, str(reason)))
        else:
            images.append(image)
    if rejected:
        first = "; ".join(f"{row.path}: {row.reason}" for row in rejected[:3])
        more = "; ..." if len(rejected) > 3 else ""
        logging.warning("%s: left out %d files (%s%s)", path, len(rejected), first, more)
    if not images or (exact and num_images is not None and len(images) < num_images):
        wanted = "" if num_images is None else f", {num_images} were asked for"
        raise ValueError(
            f"the {split} split of {os.fspath(path)} has {len(images)} usable images of "
            f"{len(found.paths)} files{wanted}; the folder holds {found.num_files} image files"
        )
    return np.stack(images)


def natural_order(name: str) -> tuple:
    """Sort key under which 2.png comes before 10.png, folder by folder."""
    parts = []
    for part in name.split("/"):
        pieces = re.split("([0-9]+)", part)
        parts.append(tuple((int(p), "") if i % 2 else (-1, p) for i, p in enumerate(pieces)))
    return tuple(parts), name  # the name itself settles "01" against "1"


def _resolve_shape(
    root: str,
    names: Sequence[str],
    image_shape: tuple[int, int, int] | None,
    image_size: int | None = None,
) -> tuple[int, int, int] | None:
    """The shape asked for, or the most common one, read from the headers of the files.

    Of shapes that are equally common the one that comes first wins. None, if no file is usable.
    """
    if image_shape is not None:
        if len(image_shape) != 3 or image_shape[2] not in (1, 3) or min(image_shape) < 1:
            raise ValueError(
                f"image_shape must be (height, width, 1 or 3), got {tuple(image_shape)}"
            )
        height, width, channels = image_shape
        return int(height), int(width), int(channels)
    counts: collections.Counter[tuple[int, int, int]] = collections.Counter()
    for name in names:
        shape = _header_shape(os.path.join(root, name))
        if shape is not None and (image_size is None or shape[:2] == (image_size, image_size)):
            counts[shape] += 1
    if counts:
        return counts.most_common(1)[0][0]
    return None if image_size is None else (image_size, image_size, 3)


class _Unusable(Exception):
    """Carries the reason why a file is rejected."""


@contextlib.contextmanager
def _opened(source: str | bytes) -> Iterator[Image.Image]:
    """Opens an image file, reads its header and checks that its pixels can be had unchanged."""
    try:
        # A pipe would block, a dangling link has no pixels.
        if isinstance(source, str) and not os.path.isfile(source):
            raise _Unusable("not a regular file")
        with open(source, "rb") if isinstance(source, str) else io.BytesIO(source) as file:
            header = file.read(26)
            if not header:
                raise _Unusable("empty file")
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                reason = why_unusable(image, header)
                if reason:
                    raise _Unusable(reason)
                yield image
    except _Unusable:
        raise
    except UnidentifiedImageError as error:
        raise _Unusable("not an image: no known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _Unusable(f"too large, refused as a decompression bomb: {one_line(error)}") from error
    except Exception as error:  # decoders raise whatever a broken file makes them stumble over
        raise _Unusable(f"cannot be decoded: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an exception says, as part of the reason why a file is left out."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


def why_unusable(image: Image.Image, header: bytes) -> str | None:
    """Why the pixels of a file cannot be had unchanged; None if they can.

    Args:
      image: as Pillow opened it, of one of `FORMATS`.
      header: the file's first 26 bytes.
    """
    if getattr(image, "n_frames", 1) > 1:
        return f"holds {getattr(image, 'n_frames')} pictures (animation or pages), one is expected"
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return f"has an alpha channel ({image.mode}); save it without transparency"
    if "transparency" in image.info:
        return "has transparent colours; save it without transparency"
    bits = 8
    if image.format == "PNG" and header[12:16] == b"IHDR":
        bits = header[24]  # Pillow cuts 16-bit RGB to 8 bits without a word
    elif image.format == "TIFF":
        bits = max(getattr(image, "tag_v2").get(258, (1,)))  # BitsPerSample
        orientation = getattr(image, "tag_v2").get(ExifTags.Base.Orientation, 1)
        if orientation != 1:  # Pillow would turn the pixels while it loads them
            return f"TIFF with orientation {orientation}; save it upright"
    if bits > 8 or image.mode.startswith("I") or image.mode == "F":
        bits = max(bits, 16 if ";16" in image.mode else 32 if image.mode in "IF" else bits)
        return f"has {bits} bits per channel, 8 are expected"
    if image.mode not in ("1", "L", "P", "RGB"):
        return f"has colour mode {image.mode}, grey or RGB is expected"
    return None


def _shape(image: Image.Image) -> tuple[int, int, int]:
    return image.height, image.width, 1 if image.mode in ("1", "L") else 3


def _header_shape(path: str) -> tuple[int, int, int] | None:
    try:
        with decoding(), _opened(path) as image:
            return _shape(image)
    except _Unusable:
        return None
