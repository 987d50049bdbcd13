"""Encoded images by number, however many there are: folders, ArrayRecord files, TFDS sets.

    source = open_source("crawl/*.array_record")
    source.images(1000, 1256, (64, 64, 3))     # the images 1000 to 1255, or why there is none

A source knows how many records it has, what each is called, and reads those that are asked for: of
a folder only the names are kept in memory, of ArrayRecord files not even these. Pixels come by the
rules of `data.decode_image`: as they are stored, never resized, rotated or flattened. A record that
cannot be used is a reason and not an error.

A record of an ArrayRecord file is an encoded image (what a file would hold), or a tf.train.Example
with such an image among its features, as TFDS writes them.
"""

import bisect
import collections
import glob
import hashlib
import importlib
import itertools
import os
import re
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from flipad_jax import data, tfds_images

__all__ = ["Decoded", "Source", "open_source"]

_ARRAY_RECORD = re.compile(r"\.array_?record(-\d+-of-\d+)?$")
# Random access: nothing is read ahead of what is asked for, and no threads are started.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_OPEN_FILES = 4  # more than the threads that read, which are at most two files apart

Decoded = tuple[np.ndarray | None, str | None]  # (uint8 [h, w, c], None), or (None, the reason)


class Source(Protocol):
    """Encoded images by number.

    Attributes:
      fingerprint: SHA-256 of the names, sizes and times of change of all files, in order: another
        one, and the records are not those of before.
    """

    fingerprint: str

    def __len__(self) -> int:
        """How many records there are."""

    def name(self, index: int) -> str:
        """What record `index` is called: no two have the same name."""

    def images(
        self, start: int, stop: int, image_shape: tuple[int, int, int] | None
    ) -> list[Decoded]:
        """Records start to stop - 1, decoded. May be called from several threads, by a caller that
        holds `data.decoding()`.

        Args:
          start, stop: a range within the source.
          image_shape: `(h, w, c)` that is expected; any, if None.
        Returns:
          An entry per record: an image and None, or None and the reason.
        Raises:
          ValueError: if a whole file cannot be read any more.
        """


def open_source(
    images: str | os.PathLike, *, data_dir: str = "", split: str = "", feature: str = ""
) -> Source:
    """Finds the records that a path, a pattern or a name stands for.

    Args:
      images: an image file or a folder of them (see `data.find_images`); an ArrayRecord file, a
        pattern for several, or a folder with some (names that end in .array_record, also followed
        by -00000-of-00042); or a name of TensorFlow Datasets that was prepared as ArrayRecord.
      data_dir: where TFDS sets are prepared; by default as TFDS has it.
      split: of a TFDS set, also a part of it as TFDS writes it: test, train[:10%].
      feature: name of the image in a tf.train.Example; by default what the TFDS set says of itself,
        and image where nothing is said.
    Raises:
      ValueError: for what is not there, holds nothing, or is no ArrayRecord file; for a split or
        data_dir of what is no name, and a feature of image files.
    """
    path = os.fspath(images)
    is_path = os.path.exists(path) or glob.has_magic(path)
    useless = [name for name, value in (("split", split), ("data_dir", data_dir)) if value]
    if is_path and useless:
        raise ValueError(
            f"{path!r} is a path, of which all records are taken: {' and '.join(useless)} go with "
            "a name of TensorFlow Datasets (mnist, say); leave them out, or give the name"
        )
    if os.path.isdir(path):
        source = _open_folder(path, feature)
    elif os.path.isfile(path):
        is_record = _ARRAY_RECORD.search(path)
        source = _whole_files([path], feature) if is_record else _Folder(data.find_images(path))
    elif glob.has_magic(path):
        # A pattern with two ** finds a file in several ways.
        found = sorted({os.path.normpath(name) for name in glob.glob(path, recursive=True)})
        found = [name for name in found if os.path.isfile(name)]
        others = [name for name in found if not _ARRAY_RECORD.search(name)]
        if not found or others:
            what = f"matches {others[0]}, which is none" if others else "matches no file"
            raise ValueError(f"{path!r}: expected a pattern for .array_record files; it {what}")
        source = _whole_files(found, feature)
    elif not tfds_images.NAME.fullmatch(path.partition("@")[0]):
        raise ValueError(
            f"{path!r} is neither there, nor a name of TensorFlow Datasets; expected a folder of "
            "images, ArrayRecord files, or such a name"
        )
    else:
        source = _open_tfds(path, data_dir, split, feature)
    if feature and isinstance(source, _Folder):
        raise ValueError(
            f"{path!r} holds image files, which have no feature {feature!r}: leave it out"
        )
    if not len(source):
        raise ValueError(f"{path!r} holds no records: there is nothing to score")
    return source


def _open_folder(path: str, feature: str) -> "Source":
    found: list[str] = []
    unseen: list[str] = []  # folders whose records would be missing without a word
    for folder, subfolders, files in os.walk(path, onerror=lambda e: unseen.append(e.filename)):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inside = [os.path.join(folder, name) for name in subfolders]
        unseen += [name for name in inside if os.path.islink(name)]
        found += [
            os.path.join(folder, name)
            for name in files
            if _ARRAY_RECORD.search(name) and not name.startswith(".")
        ]
    if not found:
        return _Folder(data.find_images(path))
    if unseen:
        raise ValueError(
            f"{unseen[0]!r} is a link to a folder, or a folder that cannot be read, and its "
            f"records would be missing: give a pattern, such as {path!r}/**/*.array_record, or "
            "move it away"
        )
    try:
        pictures = data.find_images(path).paths
    except ValueError:
        pictures = ()
    if pictures:
        raise ValueError(
            f"{path!r} holds {len(found)} ArrayRecord files and {len(pictures)} image files: "
            "give the pattern of the ones, or a folder of the others"
        )
    return _whole_files(found, feature)


class _Folder:
    """Image files; what of the folder cannot be entered comes last, with its reason."""

    def __init__(self, found: data.Found) -> None:
        self._found = found
        self.fingerprint = _fingerprint(
            itertools.chain(
                ((name, os.path.join(found.root, name)) for name in found.paths),
                ((row.path, None) for row in found.rejected),
            )
        )

    def __len__(self) -> int:
        return len(self._found.paths) + len(self._found.rejected)

    def name(self, index: int) -> str:
        paths = self._found.paths
        return paths[index] if index < len(paths) else self._found.rejected[index - len(paths)].path

    def images(
        self, start: int, stop: int, image_shape: tuple[int, int, int] | None
    ) -> list[Decoded]:
        known = len(self._found.paths)
        decoded: list[Decoded] = [
            data.decode(os.path.join(self._found.root, name), image_shape)
            for name in self._found.paths[start : min(stop, known)]
        ]
        rejected = self._found.rejected[max(start - known, 0) : max(stop - known, 0)]
        return decoded + [(None, row.reason) for row in rejected]


class _Part(NamedTuple):
    """Records first to first + size - 1 of an ArrayRecord file."""

    path: str
    name: str  # of the file, as it is shown
    first: int
    size: int


class _ArrayRecords:
    """Parts of ArrayRecord files, one after the other; a few of the files are open at a time."""

    def __init__(self, parts: list[_Part], feature: str, origin: str = "") -> None:
        # Not when the first Example is met: while TFDS is being imported, it replaces __import__
        # for the whole process, and a thread in which Pillow imports a plugin meanwhile cannot
        # decode its image.
        importlib.import_module("tensorflow_datasets.proto")
        self._parts = [part for part in parts if part.size]
        self._ends = list(itertools.accumulate(part.size for part in self._parts))
        self._feature = feature or "image"
        self._readers: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        known: dict[str, str | None] = {part.name: part.path for part in parts}
        self.fingerprint = _fingerprint(known.items(), origin)
        if self._parts:
            self._check_first()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name(self, index: int) -> str:
        part, number = self._find(index)
        return f"{part.name}[{number}]"

    def images(
        self, start: int, stop: int, image_shape: tuple[int, int, int] | None
    ) -> list[Decoded]:
        with self._lock:  # the readers know no threads; decoding, which takes longer, has them
            records = list(self._read(start, stop))
        return [self._decode(record, reason, image_shape) for record, reason in records]

    def _find(self, index: int) -> tuple[_Part, int]:
        """The part that holds a record, and the record's number within the file."""
        k = bisect.bisect_right(self._ends, index)
        part = self._parts[k]
        return part, part.first + index - (self._ends[k] - part.size)

    def _read(self, start: int, stop: int) -> Iterator[tuple[bytes | None, str | None]]:
        while start < stop:
            part, number = self._find(start)
            end = min(number + stop - start, part.first + part.size)
            reader = self._reader(part.path)
            try:
                records: list[bytes | None] = reader.read(number, end)
                yield from ((record, None) for record in records)
            except RuntimeError:  # one of them is damaged: the others can be had alone
                for single in range(number, end):
                    yield _read_alone(reader, part.path, single)
            start += end - number

    def _reader(self, path: str) -> Any:
        if path not in self._readers:
            if len(self._readers) == _OPEN_FILES:
                self._readers.popitem(last=False)[1].close()
            self._readers[path] = _open_reader(path)
        self._readers.move_to_end(path)
        return self._readers[path]

    def _decode(
        self, record: bytes | None, reason: str | None, shape: tuple[int, int, int] | None
    ) -> Decoded:
        if record is not None and record.startswith(b"\n"):  # as no image does
            record, reason = tfds_images.image_of_example(record, self._feature)
        return (None, reason) if record is None else data.decode(record, shape)

    def _check_first(self) -> None:
        """Refuse a wrong name of a feature before all records are found to have none."""
        with self._lock:
            ((record, _),) = self._read(0, 1)
        if record is not None and record.startswith(b"\n"):
            _, reason = tfds_images.image_of_example(record, self._feature)
            if reason is not None and "no feature" in reason:
                raise ValueError(f"{self.name(0)} {reason}. Give the one that is the image")


def _whole_files(paths: list[str], feature: str) -> _ArrayRecords:
    paths = sorted(paths, key=data.natural_order)
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    parts = []
    for path in paths:
        reader = _open_reader(path)
        name = os.path.relpath(path, root).replace(os.sep, "/")
        parts.append(_Part(path, name, 0, reader.num_records()))
        reader.close()
    return _ArrayRecords(parts, feature)


def _open_tfds(name: str, data_dir: str, split: str, feature: str) -> _ArrayRecords:
    if "@" in name:
        raise ValueError(
            f"{name}: pixels are scored as they are stored; leave out the crop after @"
        )
    builder = tfds_images.prepared(name, data_dir or None)
    feature = feature or tfds_images.image_feature(name, builder)[0]
    known = ", ".join(sorted(builder.info.splits))
    if not split:
        raise ValueError(f"{name} is a set of TensorFlow Datasets; give a split: {known}")
    builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise ValueError(f"{name} has no split {split!r}; it has {known}") from error
    parts = [
        _Part(part.filename, os.path.basename(part.filename), part.skip, part.take)
        for part in instructions
    ]
    for path in {part.path for part in parts}:
        _open_reader(path).close()  # a file that is missing is noticed now
    return _ArrayRecords(parts, feature, f"{name} {split}")


def _open_reader(path: str) -> Any:
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(path, _OPTIONS)
    if not reader.ok():  # nothing is raised, whatever the file is
        raise ValueError(f"{path} cannot be read as an ArrayRecord file: missing, cut or damaged")
    return reader


def _read_alone(reader: Any, path: str, number: int) -> tuple[bytes | None, str | None]:
    try:
        return reader.read(number, number + 1)[0], None
    except RuntimeError as error:
        text = data.one_line(error)
        # Wrong bytes stay wrong. A disk or a network that fails is no matter of the record.
        if not text.startswith("Corrupted"):
            raise ValueError(f"{path} cannot be read any more: {text}") from error
        return None, f"cannot be read: {text}"


def _fingerprint(named: Iterable[tuple[str, str | None]], origin: str = "") -> str:
    digest = hashlib.sha256(origin.encode())
    for name, path in named:
        try:
            status = None if path is None else os.stat(path)
        except OSError:  # a dangling link
            status = None
        facts = f"{status.st_size} {status.st_mtime_ns}" if status else "-"
        digest.update(f"\n{name!r} {facts}".encode())
    return digest.hexdigest()
