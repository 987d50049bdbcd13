"""Judge a folder of images with a fitted attributor: a row per file, a page to show to others.

Rows (path, score, p_value, threshold, verdict, reason) appear in --output as they are computed:
CSV, or JSON Lines if its name ends in .jsonl. verdict is ours, not_ours or cannot_judge; the reason
says why a file cannot be judged, or what makes its verdict doubtful. Pixels are taken as they are
stored: nothing is resized, rotated or flattened.

Every score is kept in the workdir under the SHA-256 of the file: a killed run goes on where it was,
and another --fnr or --fdr scores nothing again. Exit code: 0 when every file has its row, whatever
the verdicts; --help lists the others.

    python run.py --experiment=attribute --attributor=runs/mine/attributor --images=suspects \\
        --output=verdicts.csv --fnr=0.005
"""

import collections
import csv
import dataclasses
import glob
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from experiments import _suspects
from experiments._config import Run, setting
from experiments._record import UsageError, now
from flipad_jax import data, files, report
from flipad_jax.corpora import COLUMNS, VERDICTS, Row
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection import bundle, calibration
from flipad_jax.detection.attributor import Attributor

_LOG = "scores.jsonl"
_DEPARTURE_MAX = 6.0  # times what is usual: the last colour of the maps
_STOPPED = "the inversion stopped"
_AVERAGED = 256  # suspects whose activations are averaged
_HASHES_SHOWN = 100


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the judgement."""

    attributor: str = setting("", "Folder that --experiment=fit or `save` wrote.")
    images: str = setting("", "A folder of images (with subfolders), or one image file.")
    output: str = setting("", "File of verdicts, .csv or .jsonl; WORKDIR/verdicts.csv by default.")
    fnr: float = setting(
        0.005, "Share of own images that may be called not ours.", lower_bound=0.0, upper_bound=1.0
    )
    fdr: float = setting(
        0.05,
        "Share of own images among those called not ours, over the whole folder.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    num_shown: int = setting(300, "Images shown on the page, at most.", lower_bound=0)


PRESETS: dict[str, dict[str, Any]] = {"smoke": {"num_shown": 20}, "demo": {}}
CHANGEABLE = ("output", "fnr", "fdr", "num_shown")


def default_workdir(config: Config) -> str:
    """Beside the output, so that the next folder with an output of its own finds its own scores."""
    return f"{config.output}.run" if config.output else ""


class Judged(NamedTuple):
    """What is known of one file before any rate is chosen; a line of scores.jsonl."""

    path: str
    sha256: str | None  # None: the file could not be read
    score: float | None
    relative_gap: float | None
    converged: bool
    doubt: str  # what makes a verdict doubtful
    reason: str  # why there is no score


def run(config: Config, record: Run) -> dict[str, Any]:
    """Judge all files; returns counts, rates and what a false-discovery rate would reject."""
    for name in ("attributor", "images"):
        if not getattr(config, name):
            raise UsageError(f"--{name} is missing; see --experiment=attribute --help")
    settings = bundle.describe(config.attributor)
    attributor = bundle.load(config.attributor)
    found = _suspects.find(config.images, record)
    output = Path(config.output) if config.output else record.workdir / "verdicts.csv"
    _suspects.check_output(output, COLUMNS, record)
    smallest = calibration.smallest_certifiable_fnr(len(attributor.calibration_scores))
    if config.fnr < smallest:
        record.warn(
            f"{len(attributor.calibration_scores)} calibration images certify no fnr below "
            f"{smallest:.3g}; no p-value can be smaller"
        )
    clock: dict[str, float] = collections.defaultdict(float)
    rows: list[Row] = []
    digests: dict[str, str | None] = {}
    num_unconverged = 0
    start = time.monotonic()
    with (
        _ScoreLog(record.workdir / _LOG, settings["sha256"]) as log,
        _Writer(output) as writer,
        record.progress(len(found.paths), f"judging {len(found.paths)} files") as bar,
    ):
        num_kept = len(log.known)
        for block in _judge(attributor, found, log, clock):
            new = _decide(attributor, block, config.fnr)
            writer.write(new)
            rows += new
            digests.update((judged.path, judged.sha256) for judged in block)
            num_unconverged += sum(judged.reason.startswith(_STOPPED) for judged in block)
            bar.update(len(block))
        rejected = [
            Row(path, None, None, _threshold(attributor, config.fnr), "cannot_judge", reason)
            for path, reason in found.rejected
        ]
        writer.write(rejected)
        rows += rejected
    seconds = time.monotonic() - start
    counts = collections.Counter(row.verdict for row in rows)
    p_values = np.array([np.nan if row.p_value is None else row.p_value for row in rows])
    discovered = calibration.benjamini_hochberg(p_values, config.fdr)
    num_new = int(clock["files_scored"])
    metrics: dict[str, Any] = {
        "attributor": config.attributor,
        "attributor_sha256": settings["sha256"],
        "output": str(output),
        "num_files": len(rows),
        **{verdict: counts[verdict] for verdict in VERDICTS},
        "num_unconverged": num_unconverged,
        "num_doubtful": sum(row.verdict != "cannot_judge" and row.reason != "" for row in rows),
        "fnr": config.fnr,
        "smallest_certifiable_fnr": smallest,
        "threshold": _threshold(attributor, config.fnr),
        "fdr": config.fdr,
        "not_ours_at_fdr": [row.path for row, hit in zip(rows, discovered) if hit],
        "scored_now": num_new,
        "scores_kept": min(num_kept, len(rows)),
        "judging_seconds": seconds,
        "images_per_second": num_new / seconds if num_new else None,
        "share_of_time_decoding": clock["decoding"] / seconds if num_new else None,
    }
    with record.progress(1, "writing the page") as bar:
        _write_page(config, record, attributor, settings, found, rows, digests, metrics)
        bar.update()
    record.say(f"Verdicts: {output}")
    record.say(f"Report: {Path(record.shown) / 'report.html'}")
    return metrics


def _judge(
    attributor: Attributor, found: data.Found, log: "_ScoreLog", clock: dict[str, float]
) -> Iterator[list[Judged]]:
    """All files in order, in blocks; what the log does not know is decoded and scored."""
    size = attributor.config.batch_size
    block: list[Judged | int] = []  # an int: number of a waiting image
    waiting: list[tuple[str, str, np.ndarray]] = []

    def finished() -> list[Judged]:
        start = time.monotonic()
        judged = _score(attributor, waiting)
        clock["scoring"] += time.monotonic() - start
        clock["files_scored"] += len(waiting)
        done = [judged[entry] if isinstance(entry, int) else entry for entry in block]
        log.add(done)
        block.clear()
        waiting.clear()
        return done

    for path in found.paths:
        start = time.monotonic()
        full = os.path.join(found.root, path)
        digest, reason = _file_digest(full)
        known = log.known.get((path, digest))
        if known is not None:
            block.append(known)
        else:
            image = None
            if reason is None:
                image, reason = data.decode_image(full, attributor.image_shape)
            if image is None or digest is None:
                block.append(Judged(path, digest, None, None, False, "", str(reason)))
            else:
                block.append(len(waiting))
                waiting.append((path, digest, image))
        clock["decoding"] += time.monotonic() - start
        if len(waiting) == size or len(block) >= 8 * size:
            yield finished()
    if block:
        yield finished()


def _file_digest(path: str) -> tuple[str | None, str | None]:
    """(SHA-256 of a file, None), or (None, why it cannot be read)."""
    if not os.path.isfile(path):  # a pipe would block
        return None, "not a regular file"
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), None
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"


def _score(attributor: Attributor, images: list[tuple[str, str, np.ndarray]]) -> list[Judged]:
    if not images:
        return []
    batch = np.stack([image for _, _, image in images])
    scores = attribution.score_with_info(attributor, batch)
    doubts = attribution.doubts(attributor, batch)
    judged = []
    for i, (path, digest, _) in enumerate(images):
        score, gap = _number(scores.score[i]), _number(scores.relative_gap[i])
        converged = bool(scores.converged[i])
        reason = ""
        if not converged:
            reason = f"{_STOPPED} at a relative gap of {scores.relative_gap[i]:.2g}"
        elif score is None:
            reason = "the score is not finite"
        judged.append(Judged(path, digest, score, gap, converged, str(doubts[i]), reason))
    return judged


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _threshold(attributor: Attributor, fnr: float) -> float:
    return calibration.verdict_threshold(attributor.calibration_scores, fnr)


def _decide(attributor: Attributor, block: list[Judged], fnr: float) -> list[Row]:
    scores = attribution.Scores(
        np.array([np.nan if j.score is None else j.score for j in block]),
        np.array([np.nan if j.relative_gap is None else j.relative_gap for j in block]),
        np.zeros(len(block), np.int32),
        np.array([j.converged for j in block], bool),
    )
    found = attribution.decide(attributor, scores, fnr)
    return [
        Row(
            judged.path,
            judged.score,
            _number(found.p_value[i]),
            found.threshold,
            str(found.verdict[i]),
            judged.reason or judged.doubt,
        )
        for i, judged in enumerate(block)
    ]


def _is_written(judged: Judged) -> bool:
    """Whether every value is of a kind that is written: the file may be damaged."""
    texts = (judged.path, judged.doubt, judged.reason)
    numbers = (judged.score, judged.relative_gap)
    return (
        all(isinstance(text, str) for text in texts)
        and isinstance(judged.sha256, str | None)
        and all(number is None or _is_finite(number) for number in numbers)
        and isinstance(judged.converged, bool)
    )


def _is_finite(number: object) -> bool:
    return isinstance(number, float) and bool(np.isfinite(number))


class _ScoreLog:
    """Scores that are known, on disk: a line per file below a line that names the attributor."""

    def __init__(self, path: Path, attributor_sha256: str) -> None:
        self._path = path
        self._head = json.dumps({"attributor_sha256": attributor_sha256})
        self.known: dict[tuple[str, str | None], Judged] = {}

    def __enter__(self) -> "_ScoreLog":
        lines = self._path.read_bytes().split(b"\n") if self._path.exists() else []
        complete = []  # a kill may have left half of the last line
        if lines and lines[0] == self._head.encode():
            for line in lines[1:-1]:
                try:
                    judged = Judged(**json.loads(line))
                except (ValueError, TypeError, RecursionError):
                    break
                if not _is_written(judged):
                    break
                complete.append(line)
                self.known[judged.path, judged.sha256] = judged
        files.write_atomically(self._path, b"\n".join([self._head.encode(), *complete, b""]))
        self._file = self._path.open("a")
        return self

    def add(self, block: list[Judged]) -> None:
        """Keep what is new, so that the next start finds it."""
        for judged in block:
            if (judged.path, judged.sha256) not in self.known:
                self._file.write(json.dumps(judged._asdict()) + "\n")
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _Writer:
    """The output: CSV or JSON Lines; each block is there for readers as soon as it is written.

    An earlier answer stays until the new one is complete.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        is_new = not path.exists() or not path.stat().st_size
        self._written = path if is_new else path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._file: TextIO

    def __enter__(self) -> "_Writer":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        for left in self._path.parent.glob(f".{glob.escape(self._path.name)}.*.partial"):
            left.unlink(missing_ok=True)  # by a start that was killed
        # File names are bytes, not always text.
        self._file = self._written.open("w", newline="", encoding="utf-8", errors="surrogateescape")
        if self._path.suffix != ".jsonl":
            csv.writer(files.CsvLines(self._file)).writerow(COLUMNS)
        return self

    def write(self, rows: list[Row]) -> None:
        """Append rows."""
        if self._path.suffix == ".jsonl":
            for row in rows:
                self._file.write(json.dumps(row._asdict()) + "\n")
        else:
            csv.writer(files.CsvLines(self._file)).writerows(rows)
        self._file.flush()

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if self._written != self._path:
            if kind is None:
                self._written.replace(self._path)
            else:
                self._written.unlink()


def _write_page(config, record, attributor, settings, found, rows, digests, metrics) -> None:
    shown, how_chosen = _shown(rows, config.num_shown)
    images = {}
    for row in shown:
        image, _ = data.decode_image(os.path.join(found.root, row.path), attributor.image_shape)
        if image is not None:
            images[row.path] = image
    maps: dict[str, np.ndarray] = {}
    averages = None
    if attributor.profile is not None and images:
        departures = attribution.departures(attributor, np.stack(list(images.values())))
        size = attributor.image_shape[:2]
        maps = {
            path: report.departure_map(values, image_size=size, vmax=_DEPARTURE_MAX)
            for path, values in zip(images, departures.maps)
            if size[0] >= values.shape[0] and size[1] >= values.shape[1]
        }
        averages = _averages(config, attributor, found, rows)
    cards = [
        report.Card(
            row.path,
            images.get(row.path),
            row.verdict,  # type: ignore[arg-type]
            row.score,
            row.p_value,
            row.reason,
            maps.get(row.path),
            "departure from own images" if row.path in maps else "",
        )
        for row in shown
    ]
    notes = []
    smallest = metrics["smallest_certifiable_fnr"]
    if config.fnr < smallest:
        notes.append(
            f"{len(attributor.calibration_scores)} own images calibrate: they certify no fnr below "
            f"{smallest:.3g}, and {config.fnr:g} was asked for."
        )
    at_fdr = len(metrics["not_ours_at_fdr"])
    if metrics["num_unconverged"]:
        notes.append(_unconverged(metrics) + ".")
    notes.append(
        f"Over the whole folder, Benjamini and Hochberg's procedure calls {at_fdr} images not "
        f"ours at a false-discovery rate of {config.fdr:g}: on average at most that share of them "
        "are ours."
    )
    report.write_verdict_page(
        record.workdir / "report.html",
        title="Did these images come from this model?",
        lead=f"{Path(config.images).name or config.images}: {metrics['num_files']} files, judged "
        f"on {now()[:10]} by an attributor that knows its own model only.",
        rows=[
            {
                **row._asdict(),
                "warning": row.reason if row.verdict != "cannot_judge" else "",
                "reason": row.reason if row.verdict == "cannot_judge" else "",
            }
            for row in rows
        ],
        cards=cards,
        how_chosen=how_chosen,
        vmax=_DEPARTURE_MAX if maps else None,
        calibration_scores=attributor.calibration_scores,
        threshold=metrics["threshold"],
        fnr=config.fnr,
        averages=averages,
        settings={
            **dataclasses.asdict(config),
            "detector": attributor.config.detector,
            "lam": attributor.config.lam,
            "method": attributor.config.method,
            "tol": attributor.config.tol,
            "max_iters": attributor.config.max_iters,
            "flipad_jax of the attributor": settings["flipad_jax"],
        },
        hashes={
            "attributor": settings["sha256"],
            "last layer": settings["layer_sha256"],
            "verdicts": hashlib.sha256(Path(metrics["output"]).read_bytes()).hexdigest(),
            **{row.path: digests[row.path] or "" for row in shown[:_HASHES_SHOWN]},
        },
        notes=notes,
    )


def _unconverged(metrics: dict[str, Any]) -> str:
    return (
        f"{metrics['num_unconverged']} of {metrics['num_files']} images cannot be judged because "
        "their inversion did not reach the accuracy that the attributor asks for"
    )


def _shown(rows: list[Row], limit: int) -> tuple[list[Row], str]:
    """The rows that get a picture, and how they were chosen."""
    judged = sorted((r for r in rows if r.score is not None), key=lambda r: -float(r.score or 0))
    if len(judged) <= limit:
        return judged, "Every image with a score is shown, the least like ours first."
    least = judged[: limit - limit // 3]
    most = judged[len(judged) - limit // 3 :]
    return least + most, (
        f"Of {len(judged)} images with a score, the {len(least)} least like ours are shown, and "
        f"the {len(most)} most like ours."
    )


def _averages(config, attributor, found, rows) -> "report.Averages | None":
    """Own activations against those of some suspects, spread over the folder."""
    paths = [row.path for row in rows if row.score is not None]
    paths = paths[:: -(-len(paths) // _AVERAGED)] if paths else []
    decoded = (
        data.decode_image(os.path.join(found.root, path), attributor.image_shape)[0]
        for path in paths
    )
    images = [image for image in decoded if image is not None]
    if not images:
        return None
    z_bar = np.asarray(attributor.z_bar)
    return report.Averages(
        z_bar=z_bar,
        own=z_bar + np.asarray(attributor.profile.mean),
        suspects=attribution.departures(attributor, np.stack(images)).mean_activation,
        num_own=attributor.profile.num_images,
        num_suspects=len(images),
    )


def summary(metrics: dict[str, Any]) -> str:
    """The counts, and how fast they came."""
    lines = [
        "",
        f"{metrics['num_files']} files: {metrics['ours']} ours, {metrics['not_ours']} not ours, "
        f"{metrics['cannot_judge']} cannot be judged (fnr {metrics['fnr']:g}).",
    ]
    if metrics["num_unconverged"]:
        lines.append(_unconverged(metrics) + "; their rows say how near they came.")
    if metrics["num_doubtful"]:
        lines.append(
            f"{metrics['num_doubtful']} verdicts are doubtful, their rows say why: the image does "
            "not look untouched."
        )
    lines.append(
        f"{len(metrics['not_ours_at_fdr'])} are not ours at a false-discovery rate of "
        f"{metrics['fdr']:g} over all files."
    )
    if metrics["images_per_second"] is not None:
        lines.append(
            f"{metrics['images_per_second']:.0f} images per second, "
            f"{metrics['share_of_time_decoding']:.0%} of the time reading and decoding."
        )
    return "\n".join([*lines, ""])
