"""Files that are asked about, and the file of answers: of `attribute`, `prove` and `registry`."""

import csv
import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments._record import Run, UsageError, read_flags, replacing
from flipad_jax import data, files

__all__ = ["check_output", "find", "write_rows"]

_OF_A_RUN = "config.flags"  # lies in every workdir


def find(path: str, record: Run) -> data.Found:
    """The files to judge; what a run, this one or another, drew into its workdir is none of them.

    What is passed over is told.

    Raises:
      ValueError, UsageError: if there are none.
    """
    found = data.find_images(path)
    root, own = Path(found.root).resolve(), record.workdir.resolve()

    @functools.cache
    def is_drawn(folder: Path) -> bool:
        if folder == Path():  # The folder that was asked for may be a run's.
            return False
        inside = root / folder == own or _is_workdir(root / folder)
        return inside or is_drawn(folder.parent)

    paths = tuple(p for p in found.paths if not is_drawn(Path(p).parent))
    if found.paths and not paths:
        raise UsageError(
            f"all {len(found.paths)} images below {path!r} were drawn by runs of ours, in folders "
            f"that hold a {_OF_A_RUN}; give one of these, if they are meant"
        )
    passed_over = {
        f"files whose names do not end in {', '.join(data.EXTENSIONS)}": found.num_passed_over,
        "images that runs of ours drew": len(found.paths) - len(paths),
    }
    for what, count in passed_over.items():
        if count:
            record.warn(f"below {path} {count} {what} are passed over")
    return found._replace(paths=paths)


def _is_workdir(folder: Path) -> bool:
    try:
        return read_flags(folder) is not None
    except OSError:  # Somebody else's file, which we may not read.
        return False


def check_output(path: Path, columns: Sequence[str], record: Run) -> None:
    """Refuse an output that would destroy something else.

    Args:
      path: of the answers.
      columns: that a file of answers begins with.
      record: of this run, before it has kept anything.
    Raises:
      UsageError: for another extension, a file that holds no answers, or those of another run: the
        one whose workdir belongs to the output, or any, if this one has just begun.
    """
    if path.suffix not in (".csv", ".jsonl"):
        raise UsageError(f"--output={path}: expected a name that ends in .csv or .jsonl")
    if not path.exists():
        return
    if not path.is_file():
        raise UsageError(f"--output={path} is there and no file; give another name")
    with path.open(encoding="utf-8", errors="replace") as file:
        first, second = file.readline().strip(), file.readline()
    ours = first.startswith((",".join(columns), f'{{"{columns[0]}": '))
    if first and not ours:
        raise UsageError(f"--output={path} is there and holds no rows of ours; give another name")
    other = path.with_name(f"{path.name}.run")
    if (other / _OF_A_RUN).is_file() and other.resolve() != record.workdir.resolve():
        raise UsageError(f"--output={path} is what the run in {other} wrote; give another name")
    rows = first if path.suffix == ".jsonl" else second
    if rows and not record.has_kept_anything():
        raise UsageError(
            f"--output={path} holds the answers of another run than that in {record.shown}: give "
            "another name, or that run's --workdir"
        )


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
