"""Image sets of TensorFlow Datasets by name, read without TensorFlow.

`data.load("mnist", ...)`, `data.load("lsun/bedroom", data_dir=...)`: any set of TFDS whose images
are 8-bit grey or RGB and that was prepared as ArrayRecord, its format for random access. Preparing
one takes TensorFlow, once; the error message has the command. Nothing is downloaded here, and what
counts is what the folder of a set says of itself.

*   *Splits.* Those of the set, where it has them. Of validation and test, what it has not is cut
    out of its train split by the seed: one part for each that is missing, eight parts stay (MNIST:
    53 333 to train on and 6667 to validate on; a set with nothing but train: 80 / 10 / 10).
*   *Order.* A permutation that the seed fixes, as for the other sets of `data`; only the images
    that are asked for are read.
*   *Pixels.* Decoded by Pillow and by nothing else (TFDS would take OpenCV if it is there, whose
    JPEG decoder may round otherwise), never rotated by EXIF. What a folder may not hold (alpha, 16
    bits, CMYK) is left out with a warning; grey pictures in a set of RGB images become RGB.
*   *Size.* As the published code of FLIPAD does it, for CelebA and LSUN alike: the shorter side is
    resized to `image_size` by Pillow's bilinear filter, which averages over what it shrinks, and
    the middle is cut out (torchvision's `Resize` and `CenterCrop`). So MNIST at 32 x 32 is enlarged
    from 28 x 28, while the embedded digits are padded.
*   *Faces.* `celeb_a@cropped` is what the code of the decentralized attribution paper trains on:
    128 x 128 pixels around the face, which are cut out before they are resized.
"""

import difflib
import io
import json
import os
import pathlib
import re
import shlex
from typing import Any, Iterator, NamedTuple

import numpy as np
from absl import logging
from PIL import Image, UnidentifiedImageError

from flipad_jax import data

__all__ = [
    "NAME",
    "Split",
    "decode",
    "image_feature",
    "image_of_example",
    "load",
    "open_split",
    "prepared",
    "read",
]

# What can be the name of a set.
NAME = re.compile(r"[a-z][a-z0-9_]*(/[A-Za-z0-9_.=,-]+)?(:[0-9*]+\.[0-9*]+\.[0-9*]+)?(@[a-z]+)?")
_BATCH = 64  # records read at a time
# What NAME@CROP cuts out first: the size that images must have, and the box (left, top, right,
# bottom), here that of the celeba_cropped of the progressive GANs that [P2] starts from.
_BOXES = {("celeb_a", "cropped"): ((218, 178), (25, 57, 153, 185))}


class Split(NamedTuple):
    """A split whose images can be read in any order; nothing of it has been read yet.

    Attributes:
      name: as TFDS has it.
      path: of the folder, for messages.
      source: records of the set's own split, encoded, by number.
      indices: numbers of this split's images, `[n]` int64, in the order that the seed fixes.
      feature: what an example calls its image.
      shape: `(h, w, c)` of the images that `decode` makes.
      image_size: as asked for; None if images stay as they are.
      box: what is cut out before anything is resized; None for all.
    """

    name: str
    path: str
    source: Any
    indices: np.ndarray
    feature: str
    shape: tuple[int, int, int]
    image_size: int | None
    box: tuple[int, int, int, int] | None


def load(
    name: str,
    *,
    split: str,
    image_size: int | None = None,
    num_images: int | None = None,
    exact: bool = True,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
) -> np.ndarray:
    """Loads a split of a set of TensorFlow Datasets; see the module docstring and `data.load`.

    Args:
      name: as TFDS has it, `NAME`, `NAME/CONFIG`, with `:VERSION` if need be.
      split: one of `data.SPLITS`.
      image_size: height and width; by default images stay as they are, if all have one size.
      num_images: how many; all of the split, if None.
      exact: refuse a split that has fewer than `num_images`; if False, these are a bound.
      seed: non-negative integer, of the order and of splits that the set does not have.
      data_dir: where sets are prepared; by default $TFDS_DATA_DIR, or ~/tensorflow_datasets.
    Returns:
      uint8 `[n, h, w, c]`.
    Raises:
      ValueError: for a name that TFDS does not know, a set that is not prepared (with the command
        that does it), one without images, or (if `exact`) more images than there are.
    """
    chosen = open_split(name, split=split, image_size=image_size, seed=seed, data_dir=data_dir)
    total = len(chosen.indices)
    if exact and num_images is not None and num_images > total:
        raise ValueError(
            f"the {split} split of {name} has {total} images, {num_images} were asked for"
        )
    images = np.empty(
        (total if num_images is None else min(num_images, total), *chosen.shape), np.uint8
    )
    count, left_out = 0, []
    for index, (record, reason) in _read_in_order(chosen):
        image = None
        if record is not None:
            image, reason = decode(chosen, record)
        if image is None:
            left_out.append(f"number {index}: {reason}")
            continue
        images[count] = image
        count += 1
        if count == len(images):
            break
    if left_out:
        more = "; ..." if len(left_out) > 3 else ""
        shown = "; ".join(left_out[:3])
        logging.warning("%s: left out %d images (%s%s)", name, len(left_out), shown, more)
    if count < (num_images if exact and num_images is not None else 1):
        raise ValueError(
            f"the {split} split of {name} has {count} usable images of {total}, "
            f"{num_images or 'some'} were asked for"
        )
    return images[:count]


def open_split(
    name: str,
    *,
    split: str,
    image_size: int | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
) -> Split:
    """Finds a split and the order of its images, which `read` and `decode` then give one by one.

    Args:
      name, split, image_size, seed, data_dir: as for `load`.
    Raises:
      ValueError: as `load` does for what is not there or holds no images of ours.
    """
    builder = prepared(name, data_dir)
    from tensorflow_datasets.core import decode as tfds_decode

    known, _, crop = name.partition("@")
    feature, (height, width, channels) = image_feature(name, builder)
    box = None
    if crop:
        size, box = _BOXES[re.split("[/:]", known)[0], crop]
        if (height, width) != size:
            raise ValueError(
                f"{crop} is a part of images of {size[1]} x {size[0]} pixels (width x height); "
                f"those of {known} are {width} x {height}"
            )
        height, width = box[3] - box[1], box[2] - box[0]
    if image_size is not None:
        height = width = image_size
    if height is None or width is None:
        raise ValueError(f"the images of {name} differ in size; give an image_size")
    source_split, indices = _split(name, builder, split, seed)
    source = builder.as_data_source(
        split=source_split,
        file_format="array_record",
        deserialize_method=tfds_decode.DeserializeMethod.RAW_BYTES,
    )
    return Split(
        name=name,
        path=str(builder.data_path),
        source=source,
        indices=indices,
        feature=feature,
        shape=(height, width, channels),
        image_size=image_size,
        box=box,
    )


def prepared(name: str, data_dir: str | os.PathLike | None) -> Any:
    """The set as it lies on disk, in ArrayRecord files: a builder of TFDS that only reads.

    Raises:
      ValueError: for a name that is unknown or not prepared there; the message says how to.
    """
    if not NAME.fullmatch(name):
        raise _unknown(name, [])
    name, _, crop = name.partition("@")
    if crop and (re.split("[/:]", name)[0], crop) not in _BOXES:
        there_are = ", ".join("@".join(pair) for pair in _BOXES)
        raise ValueError(f"unknown crop {name}@{crop}; there is {there_are}")
    # A second's import, so only for who asks for such a set.
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import file_adapters, read_only_builder, registered

    folder = os.path.expanduser(os.fspath(data_dir)) if data_dir else None
    where = folder or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        _check_features(pathlib.Path(where).expanduser() / re.split("[/:]", name)[0])
        # Not `tfds.builder`, which takes the code of the set and knows no version but that.
        builder = read_only_builder.builder_from_files(name, data_dir=folder)
    except registered.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        if re.split("[/:]", name)[0] not in known:
            raise _unknown(name, known) from None
        raise ValueError(
            f"{name} is a set of TensorFlow Datasets that is not prepared in {where}; "
            f"{_how_to_prepare(name, folder)}"
        ) from None
    except Exception as error:  # What damaged descriptions make TFDS stumble over is its guess.
        raise ValueError(
            f"{name} in {where} cannot be read, prepare it once more: {data.one_line(error)}"
        ) from error
    formats = builder.info.available_file_formats()
    if file_adapters.FileFormat.ARRAY_RECORD not in formats:
        found = ", ".join(sorted(format.value for format in formats))
        raise ValueError(
            f"{builder.data_path} holds {name} as {found}; read is array_record, which needs no "
            "TensorFlow and which another FOLDER can hold: " + _how_to_prepare(name, "FOLDER")
        )
    return builder


def _how_to_prepare(name: str, data_dir: str | None) -> str:
    build = ["tfds", "build", name, "--file_format=array_record"]
    if data_dir is not None:
        build.append(f"--data_dir={data_dir}")
    return (
        "to prepare it, which downloads it and takes TensorFlow once: "
        f"pip install 'flipad_jax[prepare]' && {shlex.join(build)}"
    )


def _check_features(folder: pathlib.Path) -> None:
    """Refuse a description that names code: TFDS imports the module of every class in it."""

    def check(tree: Any) -> None:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if isinstance(value, dict | list):
                check(value)
            elif key in ("type", "pythonClassName", "python_class_name"):
                if not str(value).startswith("tensorflow_datasets."):
                    raise ValueError(f"features.json names {value!r}, which is none of TFDS's own")

    for path in sorted(folder.rglob("features.json")):
        check([json.loads(path.read_bytes())])


def _unknown(name: str, known: list[str]) -> ValueError:
    close = difflib.get_close_matches(re.split("[/:]", name)[0], known, n=3)
    like = f" such as {', '.join(close)}" if close else ", as mnist or lsun/bedroom"
    return ValueError(
        f"unknown image set {name!r}; give one of {', '.join(data.NAMES)}, the path of a folder of "
        f"images (no such folder exists), or a name of TensorFlow Datasets{like}"
    )


def image_feature(name: str, builder: Any) -> tuple[str, tuple[int | None, int | None, int]]:
    """Name and shape of the images; `None` for a side that differs from image to image.

    Args:
      name: of the set, for messages.
      builder: from `prepared`.
    Raises:
      ValueError: if an example has no image or several, or images of another kind.
    """
    from tensorflow_datasets.core import features as tfds_features

    features = builder.info.features
    found = [key for key in sorted(features) if isinstance(features[key], tfds_features.Image)]
    if "image" in found:
        found = ["image"]
    if len(found) != 1:
        what = f"several images ({', '.join(found)})" if found else "no image"
        raise ValueError(
            f"an example of {name} has {what} among its features {', '.join(sorted(features))}; "
            "expected one, or one that is called image"
        )
    feature = features[found[0]]
    if len(feature.shape) != 3 or feature.shape[2] not in (1, 3) or feature.np_dtype != np.uint8:
        raise ValueError(
            f"the images of {name} are {np.dtype(feature.np_dtype)} {list(feature.shape)}; "
            "expected uint8 [h, w, 1 or 3]"
        )
    height, width, channels = feature.shape
    return found[0], (height, width, channels)


def _split(name: str, builder: Any, split: str, seed: int) -> tuple[str, np.ndarray]:
    """The set's own split to read, and which of its images in which order."""
    sizes = {key: info.num_examples for key, info in builder.info.splits.items()}
    own = split in sizes
    if not own and "train" not in sizes:
        raise ValueError(
            f"{name} has no {split} split, and none called train to cut it out of; it has "
            f"{', '.join(sorted(sizes)) or 'nothing'}"
        )
    if own and split != "train":
        return split, data.permutation(sizes[split], seed)
    order = data.permutation(sizes["train"], seed)
    # Train, and what is missing, share it: 8 parts and 1 for each.
    parts = {"train": 8, **{key: 1 for key in data.SPLITS if key not in sizes}}
    before, total = 0, sum(parts.values())
    for key, part in parts.items():
        if key == split:
            bounds = [len(order) * n // total for n in (before, before + part)]
            return "train", order[bounds[0] : bounds[1]]
        before += part
    raise AssertionError(split)


def read(split: Split, index: int) -> tuple[bytes | None, str | None]:
    """The record of one image, encoded.

    Args:
      split: from `open_split`.
      index: which one, an element of `split.indices`. May be called from many threads.
    Returns:
      `(record, None)`, or `(None, the reason why there is none)` where its checksum is wrong.
    Raises:
      ValueError: if the file cannot be read at all: that is no matter of one record, and what
        stands there today may be readable tomorrow.
    """
    try:
        return split.source[index], None
    except (RuntimeError, OSError) as error:
        # One chunk holds one record, so that the others are still to be had.
        if "chunk data hash mismatch" in str(error):
            return None, f"damaged: {data.one_line(error)}"
        raise ValueError(
            f"{split.path} cannot be read, prepare it once more: {data.one_line(error)}"
        ) from error


def _read_in_order(split: Split) -> Iterator[tuple[int, tuple[bytes | None, str | None]]]:
    """Number and record of every image, in order, a batch at a time."""
    for start in range(0, len(split.indices), _BATCH):
        batch = [int(index) for index in split.indices[start : start + _BATCH]]
        records: list[tuple[bytes | None, str | None]]
        try:
            records = [(record, None) for record in split.source.__getitems__(batch)]
        except (RuntimeError, OSError):
            # Which one it was, only reading them one by one can tell.
            records = [read(split, index) for index in batch]
        yield from zip(batch, records, strict=True)


def image_of_example(record: bytes, feature: str) -> tuple[bytes | None, str | None]:
    """The encoded image in a tf.train.Example.

    Only it is looked at: the forty attributes of a face would take TFDS longer to decode than the
    face.

    Args:
      record: an Example, serialised.
      feature: name of the image in it.
    Returns:
      `(bytes, None)`, or `(None, the reason why there is none)`; never an exception.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        features = tf_example_pb2.Example.FromString(record).features.feature
    except Exception:  # what protocol buffers raise is a matter of their own
        return None, "neither an image nor a tf.train.Example"
    if feature not in features:
        names = ", ".join(sorted(features)) or "none"
        return None, f"has no feature {feature}; its features are: {names}"
    values = features[feature].bytes_list.value
    if len(values) != 1:
        return None, f"holds {len(values)} pictures in {feature}, one is expected"
    return values[0], None


def decode(split: Split, record: bytes) -> tuple[np.ndarray | None, str | None]:
    """The image of a record, a tf.train.Example, cut and resized.

    Args:
      split: from `open_split`.
      record: from `read`.
    Returns:
      `(uint8 [h, w, c], None)`, or `(None, the reason why there is no image)`; a bad record is
      never an exception.
    """
    channels = split.shape[2]
    encoded, missing = image_of_example(record, split.feature)
    if encoded is None:
        return None, missing
    try:
        with Image.open(io.BytesIO(encoded), formats=data.FORMATS) as opened:
            reason = data.why_unusable(opened, encoded[:26])
            if reason is None and channels == 1 and opened.mode not in ("1", "L"):
                reason = "is in colour, expected grey"
            if reason is not None:
                return None, reason
            image = opened.convert("RGB" if channels == 3 else "L")
        if split.box is not None:
            image = image.crop(split.box)
        if split.image_size is not None:
            image = _resized(image, split.image_size)
        if (image.height, image.width) != split.shape[:2]:
            return None, f"is {image.width} x {image.height}, not as the set says of itself"
        return np.asarray(image).reshape(split.shape), None
    except UnidentifiedImageError:
        return None, "not an image: no known format"
    except Exception as error:  # Decoders raise whatever a broken image makes them stumble over.
        return None, f"cannot be decoded: {data.one_line(error)}"


def _resized(image: Image.Image, size: int) -> Image.Image:
    """The shorter side brought to `size`, then the middle: `Resize(size)`, `CenterCrop(size)` of
    torchvision on Pillow images."""
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    if short != size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))
