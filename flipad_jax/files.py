"""Files that appear complete or not at all; lines of CSV."""

import os
import pathlib
import uuid
from typing import TextIO

__all__ = ["CsvLines", "write_atomically"]


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file under a hidden name beside it, then moves it; folders are made if missing.

    Whoever reads `path` sees what was there before, or all of `content`. After a failure the old
    file is untouched, and nothing else is left.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No process number: several machines that share a folder may have the same ones.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().int}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # on disk before its name is: a power cut leaves no empty file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
