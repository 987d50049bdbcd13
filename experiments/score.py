"""Score a corpus of any length: folder, ArrayRecord or TFDS; shards, restart, cluster.

--images is a folder of images, ArrayRecord files (a file, a pattern, or a folder with some), or a
name of TensorFlow Datasets with --split. WORKDIR/scores gets a file of rows (path, score, p_value,
threshold, verdict, reason) for every --shard_size records, complete or not there, and a
manifest.json; WORKDIR/report.html shows what they say. A record that cannot be judged is a row.

Start it again with the same command, whatever stopped it: shards that are complete are kept, if
their SHA-256 is that of when they were written. A corpus or an attributor that has changed since is
refused. See docs/corpora.md, also for clusters.

    python run.py --experiment=score --attributor=runs/mine/attributor \\
        --images='crawl/*.array_record' --workdir=runs/crawl
"""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments._config import Run, setting
from experiments._record import UsageError, now
from flipad_jax import cluster, corpora, data, parallel, records, report
from flipad_jax.corpora import Clock, Findings, Output
from flipad_jax.detection import bundle, calibration
from flipad_jax.detection.attributor import Attributor

_SECTIONS = {
    "not_ours": "The highest scores of all.",
    "ours": "The lowest scores of all.",
    "cannot_judge": "The first ones, with the reason.",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the scoring."""

    attributor: str = setting("", "Folder that --experiment=fit or `save` wrote.")
    images: str = setting("", "Folder, ArrayRecord files, or name of a TFDS set.")
    data_dir: str = setting("", "Where TFDS sets are prepared; by default as TFDS has it.")
    split: str = setting("", "Of a TFDS set, also a part: test, train[:10%].")
    feature: str = setting("", "Name of the image in a tf.train.Example; image by default.")
    format: str = setting("csv", "Of the files of rows.", choices=corpora.FORMATS)
    shard_size: int = setting(8192, "Records per file, and lost by a kill.", lower_bound=1)
    fnr: float = setting(
        0.005, "Share of own images that may be called not ours.", lower_bound=0.0, upper_bound=1.0
    )
    fdr: float = setting(
        0.05,
        "False-discovery rate over the whole corpus: share of own images among those called not "
        "ours, on average.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    cluster: str = setting("", "Ray cluster: local, auto, or an address; none by default.")
    num_actors: int = setting(
        0, "On a cluster; 0 for one per GPU, or per machine without.", lower_bound=0
    )


PRESETS: dict[str, dict[str, Any]] = {"smoke": {"shard_size": 32}, "demo": {}}
CHANGEABLE = ("fdr", "cluster", "num_actors")
MOVABLE = ("attributor", "images", "data_dir")  # the manifest knows them by their contents
TOGETHER = True  # each process its own shards


def run(config: Config, record: Run) -> dict[str, Any]:
    """Score what is missing; returns counts and speed."""
    for name in ("attributor", "images"):
        if not getattr(config, name):
            raise UsageError(f"--{name} is missing; see --experiment=score --help")
    corpora.one_heap()
    where = {name: getattr(config, name) for name in ("images", "data_dir", "split", "feature")}
    attributor = bundle.load(config.attributor)
    source = records.open_source(**where)
    process, num_processes = _process()
    output = corpora.open_output(
        record.common / "scores",
        source,
        config.attributor,
        fnr=config.fnr,
        shard_size=config.shard_size,
        format=config.format,
        write=process == 0,
    )
    parallel.check_same("what is scored, and by what,", output.facts())
    if not (output.folder / "manifest.json").exists():
        raise UsageError(f"{output.folder} is not where all processes see it: share the workdir")
    smallest = calibration.smallest_certifiable_fnr(len(attributor.calibration_scores))
    if config.fnr < smallest:
        record.warn(
            f"{len(attributor.calibration_scores)} calibration images certify no fnr below "
            f"{smallest:.3g}; no p-value can be smaller"
        )
    # Counts and speed are those of this process; every record of all is in the findings.
    mine = range(output.num_shards)[process::num_processes]
    left = corpora.missing(output, mine)
    kept = len(mine) - len(left)
    if kept:
        record.note(f"{kept} of {len(mine)} shards are complete and kept")
    num_left = sum(len(output.records(shard)) for shard in left)
    clock, start = Clock(), time.monotonic()
    if left:
        with record.progress(num_left, f"scoring {num_left} records") as bar:
            if config.cluster:
                cluster.score_on_cluster(
                    config.cluster,
                    where,
                    output,
                    config.attributor,
                    left,
                    num_actors=config.num_actors,
                    should_stop=record.should_stop,
                    progress=bar.update,
                )
            else:
                corpora.score_shards(
                    attributor,
                    source,
                    output,
                    left,
                    should_stop=record.should_stop,
                    progress=bar.update,
                    clock=clock,
                )
    seconds = time.monotonic() - start
    corpora.finish(
        output, others=num_processes > 1, should_stop=record.should_stop, write=process == 0
    )
    findings = corpora.collect(output)
    level = calibration.benjamini_hochberg_level(
        list(findings.p_values), list(findings.p_values.values()), config.fdr
    )
    metrics = {
        "attributor_sha256": output.attributor_sha256,
        "source_sha256": output.source_sha256,
        "scores": str(output.folder),
        "num_records": output.num_records,
        "num_shards": output.num_shards,
        **{verdict: findings.counts[verdict] for verdict in corpora.VERDICTS},
        "num_doubtful": findings.counts["doubtful"],
        "num_unconverged": findings.counts["unconverged"],
        "fnr": config.fnr,
        "threshold": calibration.verdict_threshold(attributor.calibration_scores, config.fnr),
        "smallest_certifiable_fnr": smallest,
        "fdr": config.fdr,
        "p_value_at_fdr": None if np.isnan(level) else level,
        "num_not_ours_at_fdr": sum(n for p, n in findings.p_values.items() if p <= level),
        "shards_kept": kept,
        "scored_now": num_left,
        "scoring_seconds": seconds if num_left else None,
        "records_per_second": num_left / seconds if num_left else None,
        "share_of_time_waiting": clock.waiting / clock.seconds if clock.records else None,
    }
    if process == 0:
        with record.progress(1, "writing the page") as bar:
            _write_page(config, record, attributor, source, output, findings, metrics)
            bar.update()
    record.say(f"Scores: {Path(record.shown) / 'scores'}")
    record.say(f"Report: {Path(record.shown) / 'report.html'}")
    return metrics


def _process() -> tuple[int, int]:
    """Which of how many processes this is: each takes its own shards."""
    return jax.process_index(), jax.process_count()


def _write_page(
    config: Config,
    record: Run,
    attributor: Attributor,
    source: records.Source,
    output: Output,
    findings: Findings,
    metrics: dict[str, Any],
) -> None:
    threshold = metrics["threshold"]
    sections = [
        report.Section("Result", [_key_numbers(config, findings, metrics), _at_fdr(metrics)]),
        report.Section("Scores", list(_scores(config, attributor, findings, threshold))),
    ]
    for verdict, how_chosen in _SECTIONS.items():
        if findings.examples[verdict]:
            cards = list(_cards(attributor, source, findings, verdict))
            caption = f"{len(cards):,} of {findings.counts[verdict]:,}. {how_chosen}"
            heading = f"Examples: {verdict.replace('_', ' ')}"
            sections.append(report.Section(heading, [report.Gallery(cards, caption)]))
    facts = {**dataclasses.asdict(config), **output.facts(), "folder": str(output.folder)}
    table = [
        [name, value if isinstance(value, int | float) else str(value)]
        for name, value in facts.items()
    ]
    sections.append(report.Section("Settings and hashes", [report.Table(["what", "value"], table)]))
    report.write_page(
        record.workdir / "report.html",
        "Which of these images came from this model?",
        sections,
        lead=f"{Path(config.images).name or config.images}: {output.num_records:,} records, scored "
        f"until {now()[:10]} by an attributor that knows its own model only.",
        footer=f"Rows of all records: {output.folder}, {output.num_shards} files, each under the "
        "hash that manifest.json gives.",
    )


def _key_numbers(config: Config, findings: Findings, metrics: dict[str, Any]) -> report.KeyNumbers:
    counts = findings.counts
    num_judged = counts["ours"] + counts["not_ours"]
    # Below what can be certified the largest calibration score decides.
    rate = max(config.fnr, metrics["smallest_certifiable_fnr"])
    numbers = [
        (f"{counts['not_ours']:,}", "not ours"),
        (f"{counts['ours']:,}", "ours"),
        (f"{counts['cannot_judge']:,}", "cannot judge"),
        (f"{counts['unconverged']:,}", "unconverged inversions"),
        (f"{counts['doubtful']:,}", "doubtful"),
    ]
    hints = [
        f"Score above the threshold {metrics['threshold']:.4g}. Had our model made all "
        f"{num_judged:,} judged records, up to {rate * num_judged:.3g} would be expected here.",
        "Score not above the threshold: not told apart from our own images.",
        "No verdict in either direction: the rows have the reasons.",
        "Of those that cannot be judged: the inversion missed its certificate.",
        "Verdicts on images that look processed after they were made.",
    ]
    if metrics["records_per_second"] is not None:
        numbers.append((f"{metrics['records_per_second']:,.0f}", "records per second"))
        waiting = metrics["share_of_time_waiting"]
        spent = "" if waiting is None else f", {waiting:.1%} of the time waiting for data"
        hints.append(f"{metrics['scored_now']:,} records since the last start{spent}.")
    return report.KeyNumbers(numbers, hints)


def _at_fdr(metrics: dict[str, Any]) -> str:
    """What Benjamini and Hochberg's procedure rejects."""
    count, level = metrics["num_not_ours_at_fdr"], metrics["p_value_at_fdr"]
    which = "" if level is None else f", those with p <= {level:.3g}"
    return (
        f"Over the whole corpus {count:,} records are not ours at a false-discovery rate of "
        f"{metrics['fdr']:g}{which}: on average at most that share of them are ours."
    )


def _scores(
    config: Config, attributor: Attributor, findings: Findings, threshold: float
) -> Iterator[str | report.Picture]:
    if not findings.sample.size:
        yield "No record could be judged: there are no scores to compare."
        return
    figure = report.score_histograms(
        attributor.calibration_scores, {"records": findings.sample}, threshold, fnr=config.fnr
    )
    yield report.Picture(
        figure,
        f"Scores of {findings.sample.size:,} records, evenly spread over the corpus, against those "
        f"of {len(attributor.calibration_scores):,} own images that fitted nothing. What lies "
        "right of the dashed line is not ours.",
    )


def _cards(
    attributor: Attributor, source: records.Source, findings: Findings, verdict: str
) -> Iterator[report.Card]:
    with data.decoding():
        for index, row in findings.examples[verdict]:
            ((image, _),) = source.images(index, index + 1, attributor.image_shape)
            yield report.Card(
                row.path,
                image,
                row.verdict,  # type: ignore[arg-type]
                row.score,
                row.p_value,
                row.reason,
            )


def summary(metrics: dict[str, Any]) -> str:
    """The counts, and how fast they came."""
    lines = [
        "",
        f"{metrics['num_records']} records: {metrics['ours']} ours, {metrics['not_ours']} not "
        f"ours, {metrics['cannot_judge']} cannot be judged (fnr {metrics['fnr']:g}).",
        f"{metrics['num_unconverged']} inversions did not converge; {metrics['num_doubtful']} "
        "verdicts are doubtful, their rows say why.",
        _at_fdr(metrics),
    ]
    if metrics["records_per_second"] is not None:
        lines.append(
            f"{metrics['scored_now']} scored now, {metrics['records_per_second']:.0f} per second."
        )
    return "\n".join([*lines, ""])
