"""Training batches of sets that do not fit in memory, by Grain.

`stream("celeb_a", image_size=64, batch_size=128)` gives the images that `data.load` gives for the
same arguments, pixel for pixel, a batch at a time and without an end. `training.train` takes it in
place of an array.

*   *Order.* Every epoch is a permutation that the seed and the number of the epoch fix, the same
    with every version of every library (Grain promises that of its own for none, and finding a
    record by it takes as long as decoding a digit). Epochs follow one another without a gap, so a
    batch may hold the end of one and the beginning of the next, and every record is seen exactly
    once per epoch.
*   *Hosts.* Of every batch, process i of n reads the i-th of n equal parts. What n processes read
    together is, row by row, the batch that one process would read.
*   *Bad records* are left out with a warning, and the next ones of that process move up. Whether a
    record is bad, its bytes decide and nothing else: a file that cannot be read at all is an error.
*   *Position.* How many records a process has passed, bad ones too: a number. A stream that is set
    to it goes on as the one that it was taken from.
*   *Workers* are threads, as Pillow decodes and resizes without holding Python's lock: what a
    process would have to be told (a data source, flags) is then never pickled or parsed again.
"""

import functools
import os
import sys
import threading
from typing import Callable, NamedTuple

import numpy as np
from absl import logging

from flipad_jax import data, idx_images, tfds_images

__all__ = ["Stream", "stream"]

_MAX_WORKERS = 16  # beyond these, threads wait for Python's lock more than they decode
_MAX_WARNINGS = 5
# Records that a worker reads at a time: handing one over costs as much as decoding a digit.
_GROUP = 16


class _Records(NamedTuple):
    """A split: how many images it has, of which shape, and one of them by its number."""

    size: int
    shape: tuple[int, int, int]
    name: Callable[[int], str]
    image: Callable[[int], tuple[np.ndarray | None, str | None]]  # or the reason why there is none


class Stream:
    """Batches `[rows, h, w, c]` uint8 without an end; made by `stream`.

    Attributes:
      image_shape: `(h, w, c)`.
      batch_size: images per batch, of all processes together.
      rows: images per batch of this process.
      num_records: records of the split, bad ones too: those of an epoch.

    Raises:
      ValueError: for a split without a usable image.
    """

    def __init__(
        self,
        what: str,
        records: _Records,
        *,
        batch_size: int,
        seed: int,
        process_index: int,
        process_count: int,
        num_workers: int,
        prefetch: int,
    ) -> None:
        import grain

        self.image_shape = records.shape
        self.batch_size = batch_size
        self.rows = rows = batch_size // process_count
        self.num_records = records.size
        self._what = what
        self._records = records
        self._left_out: set[int] = set()
        self._lock = threading.Lock()
        self._position = 0
        self._held: list[tuple[int, np.ndarray]] = []  # of a group that was begun

        # Workers are in one epoch, or partly in the next one.
        order_of = functools.lru_cache(2)(functools.partial(data.permutation, records.size, seed))

        def image(position: int) -> np.ndarray | None:
            batch, row = divmod(position, rows)
            epoch, index = divmod(batch * batch_size + process_index * rows + row, records.size)
            with self._lock:  # Only one worker makes the order of an epoch.
                order = order_of(epoch)
            return self._image(int(order[index]))

        def group(index: int) -> list[tuple[int, np.ndarray]]:
            """The usable images of a group, each behind the number of records passed with it."""
            positions = range(index * _GROUP, (index + 1) * _GROUP)
            found = ((position + 1, image(position)) for position in positions)
            return [(passed, pixels) for passed, pixels in found if pixels is not None]

        # Otherwise a set without one would be searched for ever.
        if all(self._image(number) is None for number in range(records.size)):
            raise ValueError(f"{what} has no usable image among its {records.size} records")
        ahead = max(-(-prefetch * rows // _GROUP), num_workers)
        self._iterator = iter(
            grain.MapDataset.range(sys.maxsize)
            .map(group)
            .to_iter_dataset(grain.ReadOptions(num_workers, ahead))
        )

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> np.ndarray:
        while len(self._held) < self.rows:
            # After a jump into a group, its first records were passed before.
            self._held += [pair for pair in next(self._iterator) if pair[0] > self._position]
        taken, self._held = self._held[: self.rows], self._held[self.rows :]
        self._position = taken[-1][0]
        return np.stack([image for _, image in taken])

    @property
    def position(self) -> int:
        """Records that this process has passed; of those that were read ahead, none counts."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        self._position, self._held = int(value), []
        self._iterator.set_state({"next_index": self._position // _GROUP})

    def close(self) -> None:
        """Stop reading ahead; there are no more batches."""
        self._iterator.close()

    def _image(self, number: int) -> np.ndarray | None:
        """An image, or None where there is none."""
        image, reason = self._records.image(number)
        if image is None:
            self._warn(number, reason)
        return image

    def _warn(self, number: int, reason: str | None) -> None:
        with self._lock:  # Of the same record, the next epoch says nothing.
            if number in self._left_out:
                return
            self._left_out.add(number)
            count = len(self._left_out)
        if count <= _MAX_WARNINGS:
            name = self._records.name(number)
            more = "; of further ones nothing is said" if count == _MAX_WARNINGS else ""
            logging.warning("%s: left out %s: %s%s", self._what, name, reason, more)


def stream(
    name: str | os.PathLike,
    *,
    batch_size: int,
    split: str = "train",
    image_size: int | None = None,
    num_images: int | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int | None = None,
    prefetch: int = 8,
) -> Stream:
    """Opens a set for training; see the module docstring.

    Args:
      name: a name of TensorFlow Datasets, or the path of a folder of images, see `data.load`.
      batch_size: images per batch, of all processes together.
      split: one of `data.SPLITS`.
      image_size: height and width; a TFDS image is resized and cut to it, a file of another size is
        left out.
      num_images: the first so many records of the split instead of all; bad ones count here.
      seed: non-negative integer, of the split, as for `data.load`, and of the order.
      data_dir: where sets of TensorFlow Datasets are prepared, see `data.load`.
      process_index, process_count: which part of every batch is read here (`jax.process_index()`,
        `jax.process_count()`).
      num_workers: threads that read and decode; one per core, at most 16, by default.
      prefetch: batches that are read ahead.
    Returns:
      `Stream`, an iterator over `[batch_size / process_count, h, w, c]` uint8.
    Raises:
      ValueError: for what `data.load` refuses, a set that is kept in memory anyway, fewer records
        than a batch, a batch that cannot be shared equally, or a split without a usable image.
    """
    for what, value in (("batch_size", batch_size), ("prefetch", prefetch)):
        if value < 1:
            raise ValueError(f"{what} must be positive, got {value}")
    if not 0 <= process_index < process_count or batch_size % process_count:
        raise ValueError(
            f"process {process_index} of {process_count} cannot have its equal part of "
            f"{batch_size} images: give a batch size that the number of processes divides"
        )
    if num_workers is None:
        num_workers = min(_MAX_WORKERS, os.cpu_count() or 1)
    records = _open(name, split, image_size, seed, data_dir)
    if num_images is not None:
        if not 1 <= num_images <= records.size:
            raise ValueError(
                f"the {split} split of {os.fspath(name)} has {records.size} records, "
                f"{num_images} were asked for"
            )
        records = records._replace(size=num_images)
    if records.size < batch_size:
        raise ValueError(
            f"the {records.size} records of the {split} split of {os.fspath(name)} are fewer than "
            f"one batch of {batch_size}: lower the batch size"
        )
    return Stream(
        f"the {split} split of {os.fspath(name)}",
        records,
        batch_size=batch_size,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        num_workers=num_workers,
        prefetch=prefetch,
    )


def _open(
    name: str | os.PathLike,
    split: str,
    image_size: int | None,
    seed: int,
    data_dir: str | os.PathLike | None,
) -> _Records:
    data.check_arguments(split, image_size, None, seed)
    if name in data.NAMES or (os.path.isdir(name) and idx_images.is_folder(name)):
        raise ValueError(f"{os.fspath(name)} is read into memory as a whole: data.load does that")
    if os.path.isdir(name):
        return _folder_records(
            data.open_folder(name, split=split, image_size=image_size, seed=seed)
        )
    chosen = tfds_images.open_split(
        os.fspath(name), split=split, image_size=image_size, seed=seed, data_dir=data_dir
    )

    def image(number: int) -> tuple[np.ndarray | None, str | None]:
        record, reason = tfds_images.read(chosen, int(chosen.indices[number]))
        return (None, reason) if record is None else tfds_images.decode(chosen, record)

    return _Records(
        len(chosen.indices), chosen.shape, lambda i: f"number {chosen.indices[i]}", image
    )


def _folder_records(found: data.FolderSplit) -> _Records:
    for row in found.rejected:
        logging.warning("%s: left out %s: %s", found.root, row.path, row.reason)
    if found.shape is None:
        raise ValueError(f"none of the {found.num_files} image files in {found.root} can be read")

    def image(number: int) -> tuple[np.ndarray | None, str | None]:
        # Not `decode_image`: its filters of warnings are no matter of threads.
        return data.decode(os.path.join(found.root, found.paths[number]), found.shape)

    return _Records(len(found.paths), found.shape, lambda i: found.paths[i], image)
