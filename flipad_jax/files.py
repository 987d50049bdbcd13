"""Files that appear complete or not at all."""

import os
import pathlib

__all__ = ["write_atomically"]


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file under a hidden name beside it, then moves it; folders are made if missing.

    Whoever reads `path` sees what was there before, or all of `content`. After a failure the old
    file is untouched, and nothing else is left.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # on disk before its name is: a power cut leaves no empty file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
