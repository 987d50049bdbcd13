"""Scores for a corpus of any length, in files that survive whatever kills the process.

    source = records.open_source("crawl/*.array_record")
    output = open_output("scores", source, "my_attributor")
    score_shards(load("my_attributor"), source, output, missing(output))
    finish(output)

The records are cut into shards of equal length. A shard is one file, scores-00000-of-00042.csv, or
.jsonl, with a row per record, and is complete or not there; beside it, in receipts/, lies what is
known of it: its SHA-256, its counts, a few of its rows. Where both are there and agree, the shard
is done, and a restart passes it over; where a byte was changed, it is computed again. Because
shards know nothing of each other, any number of processes and machines can share them out, and what
one leaves behind another takes up: see `cluster`.

`manifest.json` names what was scored by what, from the start, and at the end every shard. What was
begun with another source, attributor or rate is refused and never mixed.

Memory does not grow with the corpus, but for the names of a folder's files. A record that cannot be
judged is a row with a reason; a score that is not finite is no verdict.
"""

import collections
import contextlib
import csv
import ctypes
import dataclasses
import hashlib
import heapq
import io
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import flipad_jax
from flipad_jax import checkpoints, data, files
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection import bundle, calibration
from flipad_jax.detection.attributor import Attributor
from flipad_jax.records import Decoded, Source

__all__ = [
    "COLUMNS",
    "FORMATS",
    "VERDICTS",
    "Clock",
    "Findings",
    "Output",
    "Row",
    "collect",
    "finish",
    "missing",
    "one_heap",
    "open_output",
    "score_range",
    "score_shards",
]

FORMATS = ("csv", "jsonl")
VERDICTS = ("ours", "not_ours", "cannot_judge")
_MANIFEST = "manifest.json"
_NOT_IN_MANIFEST = ("output", "p_values", "sample", "examples")  # of a receipt
_SAMPLE = 20_000  # scores of a whole corpus, at most, that a histogram is drawn of
_EXAMPLES = 12  # rows of every verdict that are remembered
_THREADS = 4  # that decode
_AHEAD_BYTES = 2**28  # of images that wait for being scored
_POLL_SECONDS = 1.0
_M_ARENA_MAX = -8  # of malloc.h


def one_heap() -> None:
    """Have glibc give all threads that start from now on one heap; elsewhere nothing happens.

    By default each gets its own and keeps most of what it has freed, so that memory goes on growing
    for some hundred batches, by an eighth on two cores (python benchmarks/corpora.py). For a
    process that does nothing but score; it holds as long as the process lives.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


class Row(NamedTuple):
    """What is found about one record."""

    path: str
    score: float | None
    p_value: float | None
    threshold: float
    verdict: str
    reason: str


COLUMNS = Row._fields


@dataclasses.dataclass
class Clock:
    """Where the time goes.

    Attributes:
      records: scored so far, those that cannot be judged as well.
      seconds: since scoring began.
      first: seconds of these until the first block was scored: what compiling takes.
      waiting: seconds of these in which nothing was done but wait for records to be decoded.
    """

    records: int = 0
    seconds: float = 0.0
    first: float = 0.0
    waiting: float = 0.0


@dataclasses.dataclass(frozen=True)
class Output:
    """A folder of scores: what is scored by what, and how it is cut. Made by `open_output`.

    Attributes:
      folder: where the shards and the manifest are.
      source_sha256: `fingerprint` of the source.
      attributor_sha256: of the bundle.
      num_records: length of the source.
      shard_size: records per shard; the last may be shorter.
      fnr: share of own images that may be called not ours.
      format: of the shards, one of `FORMATS`.
    """

    folder: Path
    source_sha256: str
    attributor_sha256: str
    num_records: int
    shard_size: int
    fnr: float
    format: str

    @property
    def num_shards(self) -> int:
        """How many files there will be."""
        return -(-self.num_records // self.shard_size)

    def records(self, shard: int) -> range:
        """The records of a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_records))

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"scores-{shard:05d}-of-{self.num_shards:05d}.{self.format}"

    def receipt_path(self, shard: int) -> Path:
        """The file of what is known of a shard."""
        return self.folder / "receipts" / f"{shard:05d}-of-{self.num_shards:05d}.json"

    def facts(self) -> dict[str, Any]:
        """What must be the same for two shards to belong together."""
        facts = dataclasses.asdict(self)
        del facts["folder"]
        return facts


class Findings(NamedTuple):
    """What all shards together say, small enough for any corpus.

    Attributes:
      counts: records by verdict; "doubtful" and "unconverged" are counted as well.
      p_values: how many records have which, of those that were judged; ascending.
      sample: `[m]` float64 scores, evenly spread over the corpus, 20 000 at most.
      examples: for every verdict (index, row) of a few records: the highest scores of not_ours, the
        lowest of ours, the first of cannot_judge.
    """

    counts: dict[str, int]
    p_values: dict[float, int]
    sample: np.ndarray
    examples: dict[str, list[tuple[int, Row]]]


# --- scoring ----------------------------------------------------------------------------------


def score_range(
    attributor: Attributor, source: Source, start: int, stop: int, *, fnr: float = 0.005
) -> list[Row]:
    """Scores and verdicts of the records start to stop - 1.

    Args:
      attributor: from `fit` or `load`.
      source: of the records.
      start, stop: a range within the source.
      fnr: as for `verdicts`.
    Returns:
      A row per record, in order.
    Raises:
      ValueError: for a range outside of the source, an fnr outside [0, 1], or a file of the source
        that cannot be read.
    """
    if not 0 <= start <= stop <= len(source):
        raise ValueError(f"records {start} to {stop} of {len(source)}: no range of these")
    # Refuses a bad rate, before work.
    calibration.verdict_threshold(attributor.calibration_scores, fnr)
    ranges = _blocks(range(start, stop), attributor.config.batch_size)
    scored = _scored(attributor, source, ranges, fnr, Clock())
    return list(itertools.chain.from_iterable(rows for _, rows, _ in scored))


def score_shards(
    attributor: Attributor,
    source: Source,
    output: Output,
    shards: Sequence[int],
    *,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[int], None] | None = None,
    clock: Clock | None = None,
) -> Clock:
    """Scores some shards, one after the other; each appears when it is complete.

    Records are read and decoded by other threads, some blocks ahead and across shards.

    Args:
      attributor: the one that `output` was opened for.
      source: the one that `output` was opened for.
      output: from `open_output`.
      shards: their numbers, as from `missing`.
      should_stop: asked after every block.
      progress: told how many more records are scored.
      clock: goes on counting; a new one by default.
    Returns:
      The clock.
    Raises:
      Preempted: if it should stop. The shard that it was at is computed anew by the next start.
      ValueError: if a file of the source cannot be read.
    """
    clock = clock or Clock()
    size = attributor.config.batch_size
    blocks = itertools.chain.from_iterable(_blocks(output.records(shard), size) for shard in shards)
    rows: list[Row] = []
    unconverged = 0
    with contextlib.closing(_scored(attributor, source, blocks, output.fnr, clock)) as scored:
        for block, new, failed in scored:
            shard = block.start // output.shard_size
            rows += new
            unconverged += failed
            if block.stop == output.records(shard).stop:
                _write_shard(output, shard, rows, unconverged)
                rows, unconverged = [], 0
            if progress is not None:
                progress(len(new))
            if should_stop is not None and should_stop():
                raise checkpoints.Preempted(
                    f"stopped after {clock.records} records; the shards that are complete are kept"
                )
    return clock


def _blocks(indices: range, size: int) -> Iterator[range]:
    for start in range(indices.start, indices.stop, size):
        yield range(start, min(start + size, indices.stop))


def _scored(
    attributor: Attributor, source: Source, blocks: Iterable[range], fnr: float, clock: Clock
) -> Generator[tuple[range, list[Row], int], None, None]:
    """(records, rows, how many inversions did not converge), block after block."""
    shape = attributor.image_shape

    def load(block: range) -> tuple[range, list[Decoded]]:
        return block, source.images(block.start, block.stop, shape)

    begun = time.monotonic() - clock.seconds
    rest = iter(blocks)
    loading: collections.deque[Future[tuple[range, list[Decoded]]]] = collections.deque()
    with data.decoding(), ThreadPoolExecutor(_THREADS, "decoding") as pool:
        try:
            # One more than there are threads: none is idle while a block is being scored. Fewer
            # where a block is large.
            largest = attributor.config.batch_size * math.prod(shape)
            ahead = max(1, min(_THREADS + 1, _AHEAD_BYTES // largest))
            for block in itertools.islice(rest, ahead):
                loading.append(pool.submit(load, block))
            while loading:
                start = time.monotonic()
                block, decoded = loading.popleft().result()
                clock.waiting += time.monotonic() - start
                for following in itertools.islice(rest, 1):
                    loading.append(pool.submit(load, following))
                names = [source.name(index) for index in block]
                rows, unconverged = _judge(attributor, names, decoded, fnr)
                clock.first = clock.first or time.monotonic() - begun
                clock.seconds = time.monotonic() - begun
                clock.records += len(rows)
                yield block, rows, unconverged
        finally:
            for future in loading:
                future.cancel()


def _judge(
    attributor: Attributor, names: Sequence[str], decoded: Sequence[Decoded], fnr: float
) -> tuple[list[Row], int]:
    """A row per record, and how many inversions did not converge."""
    good = [i for i, (image, _) in enumerate(decoded) if image is not None]
    empty = np.zeros((0, *attributor.image_shape), np.uint8)
    images = np.stack([image for image, _ in decoded if image is not None]) if good else empty
    scores = attribution.score_with_info(attributor, images)
    found = attribution.decide(attributor, scores, fnr)
    doubts = attribution.doubts(attributor, images)
    rows = [
        Row(name, None, None, found.threshold, "cannot_judge", str(reason))
        for name, (_, reason) in zip(names, decoded)
    ]
    for k, i in enumerate(good):
        reason = str(doubts[k])
        if not found.converged[k]:
            gap = found.relative_gap[k]
            reason = f"the inversion stopped at a relative gap of {gap:.2g}"
        elif not np.isfinite(found.score[k]):
            reason = "the score is not finite"
        rows[i] = Row(
            names[i],
            _number(found.score[k]),
            _number(found.p_value[k]),
            found.threshold,
            str(found.verdict[k]),
            reason,
        )
    return rows, int(len(good) - found.converged.sum())


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


# --- shards on disk ---------------------------------------------------------------------------


def open_output(
    folder: str | os.PathLike,
    source: Source,
    attributor: str | os.PathLike,
    *,
    fnr: float = 0.005,
    shard_size: int = 8192,
    format: str = "csv",
    write: bool = True,
) -> Output:
    """Begins a folder of scores, or goes on with it.

    Args:
      folder: made if missing.
      source: what is scored.
      attributor: the bundle that scores.
      fnr: as for `verdicts`.
      shard_size: records per shard, for a new folder; best a multiple of the attributor's batch
        size.
      format: one of `FORMATS`.
      write: whether to write the manifest if there is none; one of several processes does.
    Returns:
      What is scored by what, for the other functions here.
    Raises:
      ValueError: for a bad shard_size, format or rate, or a bundle that cannot be read; or if the
        folder holds scores of another source, attributor, rate, size or format;
        nothing in it is changed then.
    """
    if shard_size < 1 or format not in FORMATS:
        raise ValueError(f"{shard_size=}, {format=}: expected 1 or more, and one of {FORMATS}")
    settings = bundle.describe(attributor)
    calibration.verdict_threshold(np.zeros(1), fnr)  # Refuses a bad rate.
    output = Output(
        Path(folder),
        source.fingerprint,
        settings["sha256"],
        len(source),
        shard_size,
        float(fnr),
        format,
    )
    path = output.folder / _MANIFEST
    if path.exists():
        _check_manifest(path, output)
    elif write:
        _write_manifest(output, _manifest(output, complete=False))
    return output


def _check_manifest(path: Path, output: Output) -> None:
    try:
        there = json.loads(path.read_bytes())
        facts = {name: there[name] for name in output.facts()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged or no manifest of ours; give another folder"
        ) from error
    ours = output.facts()
    if facts == ours:
        return
    words = {
        "source_sha256": "the source has changed (names, sizes or times of its files)",
        "attributor_sha256": "the attributor is another one",
    }
    reasons = [
        words.get(name, f"{name} is {facts[name]} there and {ours[name]} here")
        for name in ours
        if facts[name] != ours[name]
    ]
    raise ValueError(
        f"{path.parent} holds scores that cannot be gone on with: {'; '.join(reasons)}. "
        "Give another folder"
    )


def _manifest(output: Output, *, complete: bool, shards: Sequence[Any] = ()) -> dict[str, Any]:
    return {
        **output.facts(),
        "columns": COLUMNS,
        "flipad_jax": flipad_jax.__version__,
        "complete": complete,
        "shards": shards,
    }


def _write_manifest(output: Output, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(manifest, indent=1) + "\n"
    files.write_atomically(output.folder / _MANIFEST, text.encode())


def _write_shard(output: Output, shard: int, rows: list[Row], unconverged: int) -> None:
    """The rows first, then the receipt that makes them count."""
    content = _csv(rows) if output.format == "csv" else _jsonl(rows)
    counts = collections.Counter(row.verdict for row in rows)
    p_values = collections.Counter(row.p_value for row in rows if row.p_value is not None)
    first = output.records(shard).start
    every = -(-output.num_records // _SAMPLE)
    numbered = [(first + i, row) for i, row in enumerate(rows)]
    receipt = {
        "output": _output_digest(output),
        "file": output.path(shard).name,
        "first_record": first,
        "rows": len(rows),
        "sha256": hashlib.sha256(content).hexdigest(),
        **{verdict: counts[verdict] for verdict in VERDICTS},
        "doubtful": sum(row.verdict != "cannot_judge" and row.reason != "" for row in rows),
        "unconverged": unconverged,
        "p_values": sorted(p_values.items()),
        "sample": [r.score for i, r in numbered if i % every == 0 and r.score is not None],
        "examples": {verdict: _most_telling(numbered, verdict) for verdict in VERDICTS},
    }
    files.write_atomically(output.path(shard), content)
    files.write_atomically(output.receipt_path(shard), json.dumps(receipt).encode())


def _csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(files.CsvLines(text))
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")  # names are bytes, not always text


def _jsonl(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row._asdict()) + "\n" for row in rows).encode()


def _most_telling(numbered: Iterable[tuple[int, Row]], verdict: str) -> list[tuple[int, Row]]:
    chosen = [(index, row) for index, row in numbered if row.verdict == verdict]
    if verdict == "cannot_judge":
        return heapq.nsmallest(_EXAMPLES, chosen, key=lambda pair: pair[0])
    sign = -1 if verdict == "not_ours" else 1
    return heapq.nsmallest(
        _EXAMPLES, chosen, key=lambda pair: (sign * float(pair[1].score or 0), pair[0])
    )


def _output_digest(output: Output) -> str:
    return hashlib.sha256(json.dumps(output.facts(), sort_keys=True).encode()).hexdigest()


def missing(output: Output, shards: Iterable[int] | None = None) -> list[int]:
    """The shards, of all or of these, that are not there as their receipts say."""
    numbers = range(output.num_shards) if shards is None else shards
    return [shard for shard in numbers if _receipt(output, shard) is None]


def _receipt(output: Output, shard: int, *, verify: bool = True) -> dict[str, Any] | None:
    """What is known of a shard; None if it is not complete, or not what was written."""
    try:
        receipt = json.loads(output.receipt_path(shard).read_bytes())
        if receipt["output"] != _output_digest(output):
            return None
        if verify:
            with output.path(shard).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != receipt["sha256"]:
                    return None
        return receipt if "p_values" in receipt else None  # older ones have none
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def finish(
    output: Output,
    *,
    others: bool = False,
    should_stop: Callable[[], bool] | None = None,
    write: bool = True,
) -> dict[str, Any]:
    """Writes the complete manifest, once all shards are there.

    Args:
      output: from `open_output`.
      others: whether other processes are at work, whose shards are waited for.
      should_stop: asked while it waits.
      write: whether to write it; one of several processes does.
    Returns:
      The manifest: the facts, `complete`, and `shards`: per shard file, first_record, rows, sha256
      and the counts of verdicts, doubts and unconverged inversions.
    Raises:
      Preempted: if it should stop before all are there.
      ValueError: if shards are missing and `others` is false. If it is true they are waited for
        until `should_stop`, also those of a process that has died.
    """
    left = missing(output)
    if left and not others:
        raise ValueError(
            f"{len(left)} of {output.num_shards} files in {output.folder} are gone or damaged; "
            "start once more"
        )
    while left:
        if should_stop is not None and should_stop():
            raise checkpoints.Preempted(f"stopped while {len(left)} shards were still missing")
        time.sleep(_POLL_SECONDS)
        left = missing(output, left)
    shards = []
    for shard in range(output.num_shards):
        receipt = _known(output, shard)
        shards.append({k: v for k, v in receipt.items() if k not in _NOT_IN_MANIFEST})
    manifest = _manifest(output, complete=True, shards=shards)
    if write:
        _write_manifest(output, manifest)
    return manifest


def _known(output: Output, shard: int) -> dict[str, Any]:
    receipt = _receipt(output, shard, verify=False)
    if receipt is None:
        raise ValueError(f"{output.receipt_path(shard)} is gone or damaged; start once more")
    return receipt


def collect(output: Output) -> Findings:
    """What all shards together say, read from their receipts.

    Raises:
      ValueError: if one is missing.
    """
    counts = dict.fromkeys((*VERDICTS, "doubtful", "unconverged"), 0)
    p_values: collections.Counter[float] = collections.Counter()
    sample: list[float] = []
    examples: dict[str, list[tuple[int, Row]]] = {verdict: [] for verdict in VERDICTS}
    for shard in range(output.num_shards):
        receipt = _known(output, shard)
        for name in counts:
            counts[name] += receipt[name]
        p_values.update(dict(receipt["p_values"]))
        sample += receipt["sample"]
        for verdict, known in examples.items():
            new = [(index, Row(*row)) for index, row in receipt["examples"][verdict]]
            examples[verdict] = _most_telling([*known, *new], verdict)
    return Findings(counts, dict(sorted(p_values.items())), np.array(sample, np.float64), examples)
