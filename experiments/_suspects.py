"""Files that are asked about, and the file of answers: of `attribute`, `prove` and `registry`."""

import csv
import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments._record import UsageError, replacing
from flipad_jax import data, files

__all__ = ["check_output", "find", "write_rows"]

_OF_A_RUN = "config.flags"  # lies in every workdir


def find(path: str, workdir: Path) -> data.Found:
    """The files to judge; what a run, this one or another, drew into its workdir is none of them.

    Raises:
      ValueError, UsageError: if there are none.
    """
    found = data.find_images(path)
    root, own = Path(found.root).resolve(), workdir.resolve()

    @functools.cache
    def is_drawn(folder: Path) -> bool:
        if folder == Path():  # The folder that was asked for may be a run's.
            return False
        inside = root / folder == own or (root / folder / _OF_A_RUN).is_file()
        return inside or is_drawn(folder.parent)

    paths = tuple(p for p in found.paths if not is_drawn(Path(p).parent))
    if found.paths and not paths:
        raise UsageError(
            f"all {len(found.paths)} images below {path!r} were drawn by runs of ours, in folders "
            f"that hold a {_OF_A_RUN}; give one of these, if they are meant"
        )
    return found._replace(paths=paths)


def check_output(path: Path, columns: Sequence[str], workdir: Path) -> None:
    """Refuse an output that would destroy something else.

    Args:
      path: of the answers.
      columns: that a file of answers begins with.
      workdir: of this run.
    Raises:
      UsageError: for another extension, a file that holds no answers, or those of another run, in
        the workdir that belongs to the output.
    """
    if path.suffix not in (".csv", ".jsonl"):
        raise UsageError(f"--output={path}: expected a name that ends in .csv or .jsonl")
    if not path.exists():
        return
    if not path.is_file():
        raise UsageError(f"--output={path} is there and no file; give another name")
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline().strip()
    ours = first.startswith((",".join(columns), f'{{"{columns[0]}": '))
    if first and not ours:
        raise UsageError(f"--output={path} is there and holds no rows of ours; give another name")
    other = path.with_name(f"{path.name}.run")
    if (other / _OF_A_RUN).is_file() and other.resolve() != workdir.resolve():
        raise UsageError(f"--output={path} is what the run in {other} wrote; give another name")


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """All rows at once: the file is complete or not there.

    Args:
      path: of the answers, .csv or .jsonl.
      columns: of the .csv, in order; every row has them.
      rows: a value for every column.
    """
    with replacing(path) as file:
        # File names are bytes, not always text.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        if path.suffix == ".jsonl":
            text.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.writer(files.CsvLines(text))
            writer.writerow(columns)
            writer.writerows([row[column] for column in columns] for row in rows)
        text.detach()  # `replacing` closes the file
