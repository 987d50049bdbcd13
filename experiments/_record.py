"""The run record: everything that one run of an experiment writes, in one folder.

    WORKDIR/config.flags     experiment, preset and every setting; replay with --flagfile
    WORKDIR/stages/*.npz     what the finished stages computed; a killed run goes on from there
    WORKDIR/parts/           what an unfinished stage has so far; gone when it is finished
    WORKDIR/metrics.jsonl    one line per logged step; of a step logged twice, the last counts
    WORKDIR/figures/, WORKDIR/checkpoints/
    WORKDIR/results.json     written last and at once: where it exists, the run is complete

Files that a reader relies on are written beside their place and moved there, so that a kill at any
moment leaves either the old file or the new one.

A run of several processes (`parallel.initialize`) is one program in all of them and one record:
process 0 writes it, and what it finds in the workdir the others are told, so that all decide alike.
These get a scratch folder as their `workdir`, which vanishes with them; they say nothing. Only
`checkpoints`, which Orbax writes, and `common` are the same folder for all, on a file system that
all see.
"""

import contextlib
import datetime
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tqdm

from experiments import _stopping
from flipad_jax import files

try:
    import fcntl
except ImportError:  # Not a POSIX system: two runs in one workdir are then not noticed.
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "Kept",
    "Progress",
    "Run",
    "UsageError",
    "open_workdir",
    "out_of_room",
    "read_flags",
    "read_results",
    "replacing",
    "write_atomically",
]

_HEADER = "# A run of flipad_jax."
_STAGE_RECORD = "__stage__"
_ASIDE = "results.earlier.json"
_KEEP_EVERY = 10.0  # seconds of work that a kill may cost; what is quicker is not worth writing
_SAY_EVERY = 60.0  # seconds, where there is no terminal to draw a bar on
_ROOM = 2**26  # bytes: below this no run begins


_Stage = tuple[dict[str, np.ndarray], dict[str, Any]]  # arrays, and what is recorded of them


class UsageError(Exception):
    """A mistake of the person who typed the command; shown as one line, without a trace."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """`files.replacing`, for which SIGTERM waits: what was computed is not lost."""
    with _stopping.held(), files.replacing(path) as file:
        yield file


def out_of_room(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that nothing more can be written."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in numbers:
            return True
        # TensorStore, below Orbax, has errors of its own.
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_atomically(path: Path, text: str) -> None:
    """Write a text file at once; see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def now() -> str:
    """The time as results record it: ISO 8601, seconds, with the offset from UTC."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def plain(value: Any, name: str, non_finite: list[str]) -> Any:
    """Turn a metric into what JSON holds; a NaN or an infinity becomes null and is listed.

    Args:
      value: numbers, strings, None, NumPy or JAX arrays, and mappings and sequences of them.
      name: dotted name of `value`, for the list.
      non_finite: names of values that were not finite are appended here.

    Raises:
      TypeError: if `value` is something that JSON cannot hold.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{name}.{k}", non_finite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, f"{name}[{i}]", non_finite) for i, v in enumerate(value)]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        non_finite.append(name)
        return None
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist(), name, non_finite)
    raise TypeError(f"{name} is a {type(value).__name__}, which results.json cannot hold")


class Progress:
    """A bar on stderr with the time left; where that is no terminal plain lines, one a minute.

    Iterate over it, or use it as a context and call `update` after every part.
    """

    def __init__(self, items: Iterable[Any] | int, what: str, *, stream: Any = None) -> None:
        self._items = range(items) if isinstance(items, int) else items
        self._what = what
        self._stream = sys.stderr if stream is None else stream
        self._total = len(self._items) if isinstance(self._items, Sized) else None
        self._bar: Any = None
        self._done = 0
        self._started = self._said = 0.0

    def __enter__(self) -> "Progress":
        self._started = self._said = time.monotonic()
        if self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=self._total, desc=self._what, file=self._stream, dynamic_ncols=True
            )
        else:
            print(f"{self._what} ...", file=self._stream, flush=True)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            state = "done in" if kind is None else "stopped after"
            seconds = time.monotonic() - self._started
            print(f"{self._what}: {state} {seconds:.1f} s", file=self._stream, flush=True)

    def update(self, count: int = 1, **values: Any) -> None:
        """Say that `count` more parts are done; `values` (a loss, say) are shown behind the bar."""
        if self._bar is not None:
            if values:
                self._bar.set_postfix(values, refresh=False)
            self._bar.update(count)
            return
        self._done += count
        clock = time.monotonic()
        if clock - self._said >= _SAY_EVERY and self._done != self._total:
            self._said = clock
            line = f"{self._what}: {self._so_far(clock - self._started)}"
            line += "".join(f", {name} {value:.4g}" for name, value in values.items())
            print(line, file=self._stream, flush=True)

    def _so_far(self, seconds: float) -> str:
        if not self._total or not self._done:
            return f"{self._done} in {tqdm.tqdm.format_interval(seconds)}"
        left = tqdm.tqdm.format_interval(seconds * (self._total - self._done) / self._done)
        return f"{self._done} of {self._total}, some {left} left"

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._items:
                yield item
                self.update()


class Run:
    """The run record that an experiment's `run(config, record)` is given.

    Attributes:
      workdir: absolute path of the folder that holds everything; where this is not process 0 of
        several, a scratch folder.
      common: the workdir in all processes; for what each writes a part of.
      shown: the workdir as the user wrote it, for messages.
      started: when the first process of this run began (a resumed run keeps the time).
      seconds: seconds per stage, of the process that computed it.
      warnings: what `warn` was told; ends up in results.json.
    """

    def __init__(self, workdir: str | os.PathLike[str], flags: Mapping[str, str], commit: Any):
        """Enter a workdir; use `open_workdir`, which checks first whose it is."""
        self.shown = str(workdir)
        self.workdir = self.common = Path(workdir).expanduser().absolute()
        self._num_processes, self._is_main = _processes()
        self.started = now()
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self._flags = flags
        self.commit = commit
        self._entered: list[str] = []
        self._is_new = False

    @property
    def figures(self) -> Path:
        """Folder for pictures, made when asked for."""
        return self._folder(self.workdir / "figures")

    @property
    def checkpoints(self) -> Path:
        """Folder for checkpoints (absolute, as Orbax wants it), made when asked for; the same in
        all processes."""
        return self._folder(self.common / "checkpoints")

    def _folder(self, path: Path) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        return path

    def should_stop(self) -> bool:
        """Whether SIGTERM came to this process: for loops that then save and raise
        `checkpoints.Preempted`; those that run in step in several processes ask
        `parallel.anywhere(should_stop())`."""
        return _stopping.asked()

    def need_room(self, num_bytes: float = 0, what: str = "results") -> None:
        """Refuse to begin what cannot be written, or what the file system has no room for.

        Args:
          num_bytes: that will be written, beside what every run writes.
          what: they are.

        Raises:
          UsageError: naming the folder, what is free and what is needed.
        """
        refusal = ""
        if self._is_main:  # The others write elsewhere, or what this one counts in.
            try:
                self._check_room(num_bytes, what)
            except UsageError as error:
                refusal = str(error)
        if self._num_processes > 1:
            refusal = _broadcast(refusal.encode()).decode()
        if refusal:
            raise UsageError(refusal)

    def _check_room(self, num_bytes: float, what: str) -> None:
        trial = self.workdir / f".trial.{os.getpid()}.partial"
        with _refused_writes(self):
            try:
                trial.write_bytes(bytes(4096))
            finally:
                trial.unlink(missing_ok=True)
        free = shutil.disk_usage(self.workdir).free
        if free < num_bytes + _ROOM:
            raise UsageError(
                f"--workdir={self.shown} has {_mebibytes(free)} free, {what} and what else is "
                f"written take {_mebibytes(num_bytes + _ROOM)}: make room, or give another folder"
            )

    def has_kept_anything(self) -> bool:
        """Whether this or an earlier start has written more than the settings."""
        return _has_results(self)

    def set_results_aside(self) -> None:
        """Of an earlier start: what is computed from here on may be other results."""
        if self._is_main and (self.workdir / "results.json").exists():
            (self.workdir / "results.json").replace(self.workdir / _ASIDE)

    def put_results_back(self) -> None:
        """After a mistake, which has computed nothing."""
        if self._is_main and (self.workdir / _ASIDE).exists():
            (self.workdir / _ASIDE).replace(self.workdir / "results.json")

    def withdraw(self) -> None:
        """After a mistake: remove the workdir, if this run made it and has kept nothing there."""
        if self._is_main and self._is_new and not _has_results(self):
            shutil.rmtree(self.workdir, ignore_errors=True)

    def say(self, text: str) -> None:
        """Print a line for the user on stdout, without breaking a bar that is being drawn."""
        if self._is_main:
            tqdm.tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """Print a line about the course of the run on stderr."""
        if self._is_main:
            tqdm.tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def warn(self, text: str) -> None:
        """Print a warning on stderr and keep it for results.json."""
        self.warnings.append(text)
        self.note(f"warning: {text}")

    def progress(self, items: Iterable[Any] | int, what: str) -> Progress:
        """A progress bar: `for batch in record.progress(batches, "inverting 512 images")`.

        With a number instead of things to iterate over:
        `with record.progress(3000, "training") as bar: ... bar.update(100, loss=0.7)`.
        """
        return Progress(items, what, stream=None if self._is_main else io.StringIO())

    @contextlib.contextmanager
    def parts(self, what: str) -> Iterator[Callable[[str, int, int], None]]:
        """A callback `(part, done, total)` for work that goes through parts, a bar for each.

        `with record.parts("FLIPAD") as progress: fit(..., progress=progress)`.
        """
        bar: Progress | None = None
        current, before, all_done = None, 0, False

        def progress(part: str, done: int, total: int) -> None:
            nonlocal bar, current, before, all_done
            # Work that starts over (the next set of images) is a part of its own.
            if part != current or done < before or all_done:
                close()
                bar, current, before = self.progress(total, f"{what}: {part}"), part, 0
                bar.__enter__()
            bar.update(done - before)
            before, all_done = done, done >= total

        def close() -> None:
            if bar is not None:
                bar.__exit__(sys.exc_info()[0])

        try:
            yield progress
        finally:
            close()

    def log_metrics(self, *, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl: the step, and numbers by name (NaN becomes null)."""
        line = plain({"step": step, **values}, "metrics", [])
        with (self.workdir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def stage(
        self,
        name: str,
        compute: Callable[[], Mapping[str, Any]],
        *,
        text: str | None = None,
        reuse: str = "",
    ) -> dict[str, np.ndarray]:
        """Compute a part of the run once; a run that is started again loads it instead.

        Args:
          name: names the stage and its file: letters, digits, `_`, `-` and `.`; once per run.
          compute: returns arrays by name (NumPy or JAX; no objects). Called without arguments.
          text: what is being done, shown to the user; the name by default.
          reuse: workdir of another run, whose stage of this name is taken if it has one: for names
            that tell all that the stage rests on.

        Returns:
          The arrays as NumPy arrays, the same whether they were computed or loaded.

        Raises:
          RuntimeError: if the name was used before or cannot name a file.
          TypeError: if `compute` returns something that is no plain array.
        """
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise RuntimeError(f"a stage cannot be named {name!r}: it names a file")
        if name in self._entered:
            raise RuntimeError(f"two stages of one run are named {name!r}")
        self._entered.append(name)
        text = text or name
        path = self.workdir / "stages" / f"{name}.npz"
        _stopping.check()
        loaded, origin = self._of_main(self._load(path)), "kept from an earlier start"
        if loaded is None and reuse:
            there = Path(reuse).expanduser().absolute() / "stages" / path.name
            loaded, origin = self._of_main(self._load(there)), f"taken from {reuse}"
            if loaded is not None and self._is_main:
                with replacing(path) as file:
                    _write_stage(file, loaded[0], {**loaded[1], "sha256": _digest(loaded[0])})
        if loaded is not None:
            arrays, meta = loaded
            self.seconds[name] = meta["seconds"]
            self.warnings += meta["warnings"]
            if meta["commit"] != self.commit:
                self.warn(
                    f"stage {name} was computed by commit {meta['commit']}, this is {self.commit}"
                )
            self.note(f"{text}: {origin} ({meta['seconds']:.1f} s then)")
            return arrays
        self.note(f"{text} ...")
        start, num_warnings = time.monotonic(), len(self.warnings)
        # The conversion waits for the device, so that its work counts into the stage.
        arrays = {key: _checked(name, key, value) for key, value in compute().items()}
        seconds = self.seconds[name] = round(time.monotonic() - start, 3)
        meta = {
            "seconds": seconds,
            "commit": self.commit,
            "warnings": self.warnings[num_warnings:],
            "sha256": _digest(arrays),
        }
        if self._is_main:
            with replacing(path) as file:
                _write_stage(file, arrays, meta)
        shared = self._of_main((arrays, meta))
        self._drop_parts(name)
        self.note(f"{text}: {seconds:.1f} s")
        return arrays if shared is None else shared[0]

    def kept(self, name: str) -> "Kept":
        """What a long computation inside stage `name` keeps at intervals, and finds again.

        For work outside of stages any other name that a stage could have; what is kept then stays
        until the run is complete.
        """
        return Kept(self, name)

    def _drop_parts(self, name: str = "") -> None:
        if self._is_main:
            shutil.rmtree(self.workdir / "parts" / name, ignore_errors=True)

    def _of_main(self, stage: _Stage | None) -> _Stage | None:
        """What process 0 has of a stage, in all processes."""
        if self._num_processes == 1:
            return stage
        content = io.BytesIO()
        if self._is_main and stage is not None:
            _write_stage(content, *stage)
        told = _broadcast(content.getvalue())
        return _read_stage(io.BytesIO(told)) if told else None

    def results(self) -> dict[str, Any] | None:
        """What results.json holds, if the run is complete; the same in all processes."""
        found = read_results(self.workdir)
        if self._num_processes == 1:
            return found
        return json.loads(_broadcast(json.dumps(found).encode() if self._is_main else b""))

    def _load(self, path: Path) -> _Stage | None:
        """Read a stage; None where there is none or where the file is not what was written."""
        if not path.exists():
            return None
        try:
            arrays, meta = _read_stage(path)
            if meta["sha256"] != _digest(arrays):
                raise ValueError("its checksum differs")
            return arrays, {key: meta[key] for key in ("seconds", "commit", "warnings")}
        except Exception as error:  # What NumPy and zipfile raise depends on the byte hit.
            shown = path.relative_to(self.workdir) if self.workdir in path.parents else path
            self.warn(f"{shown} is damaged and is computed again ({_one_line(error)})")
            return None

    def finish(self, facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write results.json, which makes the run complete, and return what it holds."""
        non_finite: list[str] = []
        metrics = plain(metrics, "metrics", non_finite)
        if non_finite:
            self.warn(f"not finite, written as null: {', '.join(non_finite)}")
        results = {
            **plain(facts, "facts", []),
            "metrics": metrics,
            "seconds": dict(self.seconds),
            "started": self.started,
            "finished": now(),
            "warnings": list(self.warnings),
        }
        text = json.dumps(results, indent=2, allow_nan=False)
        write_atomically(self.workdir / "results.json", text + "\n")
        (self.workdir / _ASIDE).unlink(missing_ok=True)
        self._drop_parts()
        return json.loads(text)


class Kept:
    """What a long computation has so far, in WORKDIR/parts/NAME: see `attributor.Kept`.

    Written at most every ten seconds, and when SIGTERM came; what a kill costs is as much.
    """

    def __init__(self, run: Run, name: str) -> None:
        self._run = run
        self._folder = run.workdir / "parts" / name
        self._checkpoints = run.common / "parts" / name
        self._written = time.monotonic()
        self._is_warned = False

    def _is_due(self, stops: bool) -> bool:
        return stops or time.monotonic() - self._written >= _KEEP_EVERY

    def part(
        self, name: str, compute: Callable[[], Mapping[str, np.ndarray]]
    ) -> Mapping[str, np.ndarray]:
        """The arrays of a part, computed, or as an earlier start computed them.

        Raises:
          Preempted: if SIGTERM came.
        """
        path = self._folder / f"{name}.npz"
        loaded = self._run._of_main(self._run._load(path))
        if loaded is not None:
            if loaded[1]["commit"] != self._run.commit and not self._is_warned:
                self._is_warned = True
                self._run.warn(
                    f"parts of {self._folder.name} were computed by commit "
                    f"{loaded[1]['commit']}, this is {self._run.commit}"
                )
            return loaded[0]
        self._end_if(_anywhere(self._run.should_stop()))
        arrays = {key: _checked(name, key, value) for key, value in compute().items()}
        stops = _anywhere(self._run.should_stop())
        if self._is_due(stops) and self._run._is_main:
            meta: dict[str, Any] = {
                "seconds": 0,
                "commit": self._run.commit,
                "warnings": [],
                "sha256": _digest(arrays),
            }
            with replacing(path) as file:
                _write_stage(file, arrays, meta)
            self._written = time.monotonic()
        if stops:
            _anywhere(False)  # None leaves before it is written: who starts them may then kill.
        self._end_if(stops)
        return arrays

    def restore(self, name: str, like: Any) -> Any | None:
        """The newest state that was saved under this name, or None; of NumPy arrays in a run of
        several processes."""
        from flipad_jax import checkpoints

        found = checkpoints.restore_latest(self._checkpoints / name, self._common_to_all(like))
        return None if found is None else found[1]

    def _common_to_all(self, state: Any) -> Any:
        # Orbax writes no array that is one process's own; NumPy's it writes in process 0.
        if self._run._num_processes == 1:
            return state
        import jax

        return jax.tree.map(np.asarray, state)

    def save(self, name: str, step: int, state: Any) -> None:
        """Keep a state, if it is time to.

        Raises:
          Preempted: if SIGTERM came; the state is saved.
        """
        from flipad_jax import checkpoints

        stops = _anywhere(self._run.should_stop())
        if _anywhere(self._is_due(stops)):
            checkpoints.save(self._checkpoints / name, step, self._common_to_all(state))
            self._written = time.monotonic()
        self._end_if(stops)

    def _end_if(self, stops: bool) -> None:
        if stops:
            from flipad_jax import checkpoints

            raise checkpoints.Preempted("SIGTERM")


def _write_stage(file: BinaryIO, arrays: Mapping[str, np.ndarray], meta: dict[str, Any]) -> None:
    encoded = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    contents: dict[str, Any] = {_STAGE_RECORD: encoded, **arrays}
    np.savez(file, **contents)


def _read_stage(file: Path | BinaryIO) -> _Stage:
    with np.load(file, allow_pickle=False) as opened:
        arrays = {key: opened[key] for key in opened.files}
    return arrays, json.loads(arrays.pop(_STAGE_RECORD).tobytes())


def _processes() -> tuple[int, bool]:
    """(number of processes, whether this one writes), without starting a device."""
    import jax  # Here, so that the settings can be read and checked without it.

    from flipad_jax import parallel

    return (jax.process_count() if jax.distributed.is_initialized() else 1), parallel.is_main()


def _anywhere(flag: bool) -> bool:
    from flipad_jax import parallel

    return parallel.anywhere(flag)


def _broadcast(content: bytes) -> bytes:
    """What process 0 gives, in all processes."""
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.uint32(len(content))))
    own = np.frombuffer(content, np.uint8) if len(content) == size else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own)).tobytes() if size else b""


def _mebibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _checked(stage: str, key: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    # npz cannot hold objects without pickle and loses the names of dtypes such as bfloat16.
    if array.dtype.kind in "OV":
        raise TypeError(f"stage {stage} cannot keep {key!r} of dtype {array.dtype}")
    if key in (_STAGE_RECORD, "file", "allow_pickle"):  # The last two are arguments of np.savez.
        raise TypeError(f"stage {stage} cannot name an array {key!r}")
    return array


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key in sorted(arrays):
        array = arrays[key]
        digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return digest.hexdigest()


def read_results(workdir: Path) -> dict[str, Any] | None:
    """What a complete run wrote; None where results.json is missing or cannot be read."""
    try:
        results = json.loads((workdir / "results.json").read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return results if isinstance(results, dict) and "metrics" in results else None


def _read_flags(path: Path) -> tuple[dict[str, str], str] | None:
    """The flags of a run and when it started; None if no run of ours wrote the file."""
    try:
        lines = path.read_text().splitlines()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, UnicodeDecodeError):
        return None
    if not lines or not lines[0].startswith(_HEADER):
        return None
    pairs = [line[2:].partition("=") for line in lines if line.startswith("--")]
    started = re.search(r"Started (\S+)", lines[0])
    return {name: value for name, _, value in pairs}, started[1].rstrip(".") if started else now()


def read_flags(workdir: str | os.PathLike[str]) -> dict[str, str] | None:
    """The settings of the run that a workdir holds, as flag texts; None if it holds none."""
    found = _read_flags(Path(workdir).expanduser() / "config.flags")
    return None if found is None else found[0]


def _write_flags(run: Run, flags: Mapping[str, str]) -> None:
    lines = [f"{_HEADER} Started {run.started}"]
    lines.append("# Again: python run.py --flagfile=THIS_FILE --workdir=ANOTHER_FOLDER")
    lines += [f"--{name}={value}" for name, value in flags.items()]
    write_atomically(run.workdir / "config.flags", "\n".join(lines) + "\n")


def _differences(
    theirs: Mapping[str, str], ours: Mapping[str, str], defaults: Mapping[str, str]
) -> dict[str, str]:
    # A run of before a setting existed had its default, and one that is gone cannot be another.
    theirs = {**{name: text for name, text in defaults.items() if name in ours}, **theirs}
    # The preset only names defaults; two names for equal settings are the same run.
    names = [n for n in ours if n != "preset" and theirs.get(n) != ours[n]]
    texts = ((name, theirs.get(name, "unset"), ours.get(name, "unset")) for name in names)
    return {name: f"{name} is {there} there and {here} here" for name, there, here in texts}


@contextlib.contextmanager
def open_workdir(
    workdir: str | os.PathLike[str],
    flags: Mapping[str, str],
    *,
    overwrite: bool = False,
    commit: str | None = None,
    changeable: Sequence[str] = (),
    precious: str | None = None,
    defaults: Mapping[str, str] | None = None,
) -> Iterator[Run]:
    """Enter a workdir for one run: a new or empty folder, or one of the same settings.

    Args:
      workdir: the folder; made if missing.
      flags: experiment, preset and every setting as flag text; decides whether a run that is there
        already may go on.
      overwrite: delete what an earlier run left there. Never deletes a folder that no run made.
      commit: revision of the code, remembered with every stage.
      changeable: flags that may differ from those of the run that is there.
      precious: name of a file; a workdir that has one is never deleted, whatever `overwrite` says.
      defaults: flags of the settings' defaults, for those that the run that is there did not know.

    Raises:
      UsageError: if the folder belongs to something else, to a run of other settings, or to a run
        that is still going on.
    """
    run = Run(workdir, flags, commit)
    if run._num_processes > 1 and not run._is_main:
        answer = _broadcast(b"").decode()
        if answer != "entered":
            raise UsageError(answer)
        with tempfile.TemporaryDirectory(prefix="flipad_jax-") as scratch:
            run.workdir = Path(scratch)
            yield run
        return
    with contextlib.ExitStack() as stack:
        try:
            _enter(stack, run, flags, overwrite, changeable, precious, defaults or {})
        except Exception as error:
            if run._num_processes > 1:
                _broadcast(f"process 0: {error}".encode())
            raise
        if run._num_processes > 1:
            _broadcast(b"entered")
        yield run


def _enter(
    stack: contextlib.ExitStack,
    run: Run,
    flags: Mapping[str, str],
    overwrite: bool,
    changeable: Sequence[str],
    precious: str | None,
    defaults: Mapping[str, str],
) -> None:
    """What `open_workdir` does in the process that writes; `stack` then holds the lock."""
    path = run.workdir
    if path.exists() and not path.is_dir():
        raise UsageError(f"--workdir={run.shown} is a file; give a folder")
    found = _read_flags(path / "config.flags")
    if found is None and path.is_dir() and any(not _is_debris(p) for p in path.iterdir()):
        raise UsageError(
            f"--workdir={run.shown} is not empty and no run of ours made it; give another folder"
        )
    run._is_new = not path.exists()
    with _refused_writes(run):
        path.mkdir(parents=True, exist_ok=True)
    kept = precious and (path / precious).exists()
    if kept and overwrite:
        raise UsageError(
            f"--overwrite would delete {run.shown}/{precious} and what it lists, which cannot "
            "be made again; give another --workdir, or delete the folder yourself"
        )
    stack.enter_context(_lock(run))
    if found is not None and overwrite:
        _clear(run)
        found = None
    if found is None:
        _write_flags(run, flags)
    else:
        theirs, run.started = found
        different = _differences(theirs, flags, defaults)
        fixed = {name: text for name, text in different.items() if name not in changeable}
        other = "experiment" in fixed
        if different and (not fixed or not (other or _has_results(run))):
            # Without results an earlier start failed before it made anything, on a mistyped
            # path, say.
            _write_flags(run, flags)
        elif fixed:
            raise UsageError(
                f"--workdir={run.shown} holds a run of other settings: "
                f"{'; '.join(fixed.values())}. Give another --workdir"
                + ("" if kept else ", or --overwrite to start over")
            )
        _repair(run)


@contextlib.contextmanager
def _refused_writes(run: Run) -> Iterator[None]:
    """A folder of somebody else, or of a file system that is read-only or full, as one line."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--workdir={run.shown} cannot be written to ({error.strerror}): give another folder"
            + (", or make room" if out_of_room(error) and error.errno != errno.EROFS else "")
        ) from None


@contextlib.contextmanager
def _lock(run: Run) -> Iterator[None]:
    """Keep a second process out; the system drops the lock when this one dies."""
    with _refused_writes(run):
        file = (run.workdir / ".lock").open("w")
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"--workdir={run.shown} is in use by a run that is still going on"
                ) from None
        yield


def _has_results(run: Run) -> bool:
    """Whether a run kept anything beside its flags."""
    files = (path for path in run.workdir.rglob("*") if not path.is_dir())
    return any(path.name != "config.flags" and not _is_debris(path) for path in files)


def _clear(run: Run) -> None:
    """Delete what an earlier run left; the lock file stays, as it is held."""
    here = Path.cwd()
    if here == run.workdir.resolve() or run.workdir.resolve() in here.parents:
        raise UsageError(f"--overwrite would delete the folder you are in, {run.shown}")
    # config.flags goes last: a kill in between leaves a folder that is still known as ours.
    for path in sorted(run.workdir.iterdir(), key=lambda path: path.name == "config.flags"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _is_debris(path: Path) -> bool:
    """Whether a file is the lock, or what was being written by `files.replacing` (in older runs
    under NAME.PID.tmp) when the process was killed."""
    return path.name == ".lock" or bool(
        re.fullmatch(r"\..+\.\d+\.partial|.+\.(csv|flags|jsonl?|npz)\.\d+\.tmp", path.name)
    )


def _repair(run: Run) -> None:
    """Remove what a killed process left half written."""
    inside = [run.workdir.glob(pattern) for pattern in ("*", "*/*", "parts/*/*", "scores/*/*")]
    for path in itertools.chain(*inside):
        if _is_debris(path) and path.name != ".lock":
            path.unlink()
    (run.workdir / _ASIDE).unlink(missing_ok=True)  # of a start that was killed later on
    metrics = run.workdir / "metrics.jsonl"
    if metrics.exists():
        data = metrics.read_bytes()
        if data and not data.endswith(b"\n"):
            with replacing(metrics) as file:
                file.write(data[: data.rfind(b"\n") + 1])
