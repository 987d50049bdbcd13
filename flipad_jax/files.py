"""Files that appear complete or not at all; lines of CSV."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import BinaryIO, TextIO

__all__ = ["CsvLines", "replacing", "write_atomically"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a file for writing under a hidden name beside `path`, and moves it there when the block
    ends well; folders are made if missing.

    Whoever reads `path` sees what was there before, or all that was written. After a failure the
    old file is untouched, and nothing else is left.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No process number: several machines that share a folder may have the same ones.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().int}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on disk before its name is: a power cut leaves no empty file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file at once; see `replacing`."""
    with replacing(path) as file:
        file.write(content)


class CsvLines:
    """A file for `csv.writer` whose lines end in "\\n", and whose names may hold any character.

    Told to end its lines so, the writer would no longer quote a name with "\\r", and readers would
    take that for the end of a line.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, line: str) -> None:
        """Write a line of the writer's."""
        self._file.write(line.removesuffix("\r\n") + "\n")
