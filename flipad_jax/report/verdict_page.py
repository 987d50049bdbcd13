"""The page about a folder of suspicious images: verdicts, how to read them, a card per image."""

import collections
import math
import os
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

import flipad_jax
from flipad_jax.report import figures
from flipad_jax.report.gallery import Card, Gallery
from flipad_jax.report.page import KeyNumbers, Picture, Section, Table, write_page
from flipad_jax.report.text import has_value, p_value_text

__all__ = ["Averages", "write_verdict_page"]

_NUM_CHANNELS = 3
_MAX_ROWS = 300  # of a table; the list of verdicts itself is a file of its own
_VERDICTS = {"ours": "ours", "not_ours": "not ours", "cannot_judge": "cannot judge"}


class Averages(NamedTuple):
    """Average inverted activations, in activation units.

    Attributes:
      z_bar: `[h, w, c]` the model's mean activation.
      own: `[h, w, c]` average over `num_own` own images.
      suspects: `[h, w, c]` average over `num_suspects` suspect images.
      num_own: at least 1.
      num_suspects: at least 1.
    """

    z_bar: np.ndarray
    own: np.ndarray
    suspects: np.ndarray
    num_own: int
    num_suspects: int


def write_verdict_page(
    path: str | os.PathLike,
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    cards: Sequence[Card],
    calibration_scores: np.ndarray,
    threshold: float,
    fnr: float,
    lead: str | None = None,
    how_chosen: str = "",
    vmax: float | None = None,
    averages: Averages | None = None,
    settings: Mapping[str, Any] | None = None,
    hashes: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Writes one self-contained HTML page about the verdicts on a folder.

    Args:
      path: the file; it appears complete or not at all.
      title: of the page.
      rows: one per file, with the keys "path", "verdict" ("ours", "not_ours" or "cannot_judge"),
        "score" and "p_value" (None or NaN without a verdict) and, if wanted, "reason" (why none is
        given) and "warning"; other keys are ignored.
      cards: images to show, of files among the rows.
      calibration_scores: `[n]` finite scores of own images that fitted nothing.
      threshold: an image is not ours iff its score is above it.
      fnr: the share of own images for which the threshold was chosen, in [0, 1].
      lead: one paragraph below the title.
      how_chosen: how the cards were chosen, in a sentence; needed where not every row has one.
      vmax: that of `departure_map`, where the cards have overlays.
      averages: drawn, in the three channels that differ most.
      settings: name -> value, listed.
      hashes: what (model, attributor, list of verdicts) -> hash, listed.
      notes: paragraphs at the top: what the reader must know about this folder.
    Raises:
      ValueError: if rows contradict themselves, the threshold or the cards, or if calibration
        scores are not finite.
    """
    scores = np.asarray(calibration_scores, np.float64)
    _check(rows, cards, scores, threshold, fnr, how_chosen)
    judged = [row for row in rows if row["verdict"] != "cannot_judge"]
    sections = [
        Section("Result", [*notes, _key_numbers(rows, scores.size, threshold, fnr)]),
        Section("Images", _gallery(rows, cards, how_chosen, vmax)),
        Section("Scores", _scores(rows, judged, scores, threshold, fnr)),
    ]
    if averages is not None:
        sections.append(Section("What inversion sees", [_averages(averages)]))
    if len(judged) < len(rows):
        sections.append(Section("Files without a verdict", [_unjudged(rows)]))
    warnings = collections.Counter(row["warning"] for row in rows if row.get("warning"))
    if warnings:
        table = [[text, count] for text, count in warnings.most_common(_MAX_ROWS)]
        hint = _left_out(len(warnings), "kinds of warnings, the most frequent first")
        sections.append(Section("Warnings", [Table(["warning", "images"], table, caption=hint)]))
    sections.append(Section("How to read this", _how_to_read(scores.size, threshold, fnr)))
    record = [
        Table([what, "value"], [[name, _plain(value)] for name, value in values.items()])
        for what, values in (("setting", settings), ("hash of", hashes))
        if values
    ]
    if record:
        sections.append(Section("Settings and hashes", record))
    footer = f"Made by flipad_jax {flipad_jax.__version__}."
    write_page(path, title, sections, lead=lead, footer=footer)


def _check(rows, cards, scores, threshold, fnr, how_chosen) -> None:
    if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
        raise ValueError(
            f"calibration_scores: expected finite scores [n] of own images, got {scores.shape} "
            f"with {np.sum(~np.isfinite(scores))} that are not finite"
        )
    if math.isnan(threshold) or not 0 <= fnr <= 1:
        raise ValueError(f"{threshold=}, {fnr=}: expected a number and a rate in [0, 1]")
    for row in rows:
        name, verdict, score, p_value = (
            row[key] for key in ("path", "verdict", "score", "p_value")
        )
        if verdict not in _VERDICTS:
            raise ValueError(f"{name!r}: verdict {verdict!r}, expected {', '.join(_VERDICTS)}")
        if verdict == "cannot_judge":
            continue
        if not (has_value(score) and has_value(p_value)):
            raise ValueError(
                f"{name!r}: {verdict} with score {score} and p-value {p_value}; without numbers "
                'the verdict is "cannot_judge"'
            )
        if (verdict == "not_ours") != (score > threshold):
            raise ValueError(
                f"{name!r}: {verdict}, but its score is {score} and the threshold {threshold}"
            )
    known = {(row["path"], row["verdict"]) for row in rows}
    for card in cards:
        if (card.path, card.verdict) not in known:
            raise ValueError(f"{card.path!r}: no row has this file with verdict {card.verdict}")
    if len(cards) < len(rows) and not how_chosen:
        raise ValueError(
            f"{len(cards)} of {len(rows)} rows have a card: say in how_chosen how they were chosen"
        )


def _key_numbers(rows, num_own: int, threshold: float, fnr: float) -> KeyNumbers:
    count = collections.Counter(row["verdict"] for row in rows)
    num_judged = count["ours"] + count["not_ours"]
    smallest = min(
        (row["p_value"] for row in rows if row["verdict"] != "cannot_judge"), default=None
    )
    rate = max(fnr, 1 / (num_own + 1))  # Below that the largest calibration score decides.
    numbers = [
        (f"{count['not_ours']:,}", "not ours"),
        (f"{count['ours']:,}", "ours"),
        (f"{count['cannot_judge']:,}", "cannot judge"),
    ]
    hints = [
        f"Score above the threshold {threshold:.4g}. Had our model made all {num_judged:,} judged "
        f"files, up to {_expected(rate * num_judged)} would be expected here.",
        "Score not above the threshold: not told apart from our own images. What a model too "
        "much like ours made would be here as well.",
        (
            "No verdict in either direction; the reasons are listed below."
            if count["cannot_judge"]
            else "Every file has a verdict."
        ),
    ]
    if smallest is not None:
        least = 1 / (num_own + 1)
        by_chance = max(1 / (num_judged + 1), least)
        numbers.append((p_value_text(smallest), "smallest p-value"))
        hints.append(
            f"Among {num_judged:,} own images the smallest is about {by_chance:.2g} by chance. "
            f"{least:.2g} is the least that {num_own:,} calibration images can show."
        )
    return KeyNumbers(numbers, hints)


def _expected(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _gallery(rows, cards, how_chosen: str, vmax: float | None) -> list[str | Gallery]:
    if not cards:
        return [f"None of {len(rows):,} files is shown. {how_chosen}".strip()]
    if len(cards) < len(rows):
        caption = f"{len(cards):,} of {len(rows):,} files are shown. {how_chosen}"
    else:
        caption = f"All {len(rows):,} files. {how_chosen}".strip()
    return [Gallery(cards, caption, vmax)]


def _scores(rows, judged, own, threshold: float, fnr: float) -> list[str | Table | Picture]:
    table: list[list[Any]] = []
    for verdict, words in _VERDICTS.items():
        group = [row for row in rows if row["verdict"] == verdict]
        values: list[Any] = [None] * 4
        if group and verdict != "cannot_judge":
            scores = [float(row["score"]) for row in group]
            smallest = min(float(row["p_value"]) for row in group)
            values = [min(scores), float(np.median(scores)), max(scores), smallest]
        share = len(group) / len(rows) if rows else None
        table.append([words, len(group), share, *values])
    header = ["verdict", "files", "share", "lowest score", "median", "highest", "smallest p-value"]
    summary = Table(header, table, {"share": ".1%", "smallest p-value": ".2g"})
    if not judged:
        return [summary, "No file could be judged: there are no scores to compare."]
    suspects = np.asarray([row["score"] for row in judged], np.float64)
    figure = figures.score_histograms(own, {"judged files": suspects}, threshold, fnr=fnr)
    caption = (
        f"Scores of the {len(judged):,} judged files against those of {own.size:,} own images that "
        "fitted nothing. What lies right of the dashed line is not ours."
    )
    return [summary, Picture(figure, caption)]


def _averages(averages: Averages) -> Picture:
    difference = np.abs(averages.suspects - averages.own).mean(axis=(0, 1))
    channels = np.argsort(-difference)[:_NUM_CHANNELS]
    maps = {"own images": averages.own, "judged files": averages.suspects}
    figure = figures.average_activations(
        {name: values[..., channels] for name, values in maps.items()},
        averages.z_bar[..., channels],
        channels=[int(channel) for channel in channels],
        counts={"own images": averages.num_own, "judged files": averages.num_suspects},
    )
    return Picture(
        figure,
        f"Average inverted activation of own images and of the judged files, in the "
        f"{len(channels)} channels that differ most between the two (compare FLIPAD paper, Figure "
        "4). A few files differ by chance; the averages of many files of our own would be alike.",
    )


def _unjudged(rows) -> Table:
    table = [
        [row["path"], row.get("reason") or "no reason given"]
        for row in rows
        if row["verdict"] == "cannot_judge"
    ]
    return Table(["file", "reason"], table[:_MAX_ROWS], caption=_left_out(len(table), "files"))


def _left_out(total: int, what: str) -> str | None:
    return f"{_MAX_ROWS} of {total:,} {what}." if total > _MAX_ROWS else None


def _how_to_read(num_own: int, threshold: float, fnr: float) -> list[str]:
    least = 1 / (num_own + 1)
    certified = (
        f"{num_own:,} calibration images can certify rates down to 1 / (n + 1) = {least:.2g}"
    )
    if fnr < least:
        needed = f"at least {math.ceil(1 / fnr) - 1:,} images" if fnr > 0 else "no number of images"
        certified += (
            f". The fnr asked for, {fnr:g}, is smaller: the threshold is the largest score of "
            f"these images, above which {least:.2g} of own images are expected. "
            f"To certify it takes {needed}."
        )
    else:
        certified += f"; the fnr asked for, {fnr:g}, is within reach."
    return [
        "Score: how unlike the images of our own model an image is. Higher means less likely ours. "
        "Its unit has no meaning by itself; compare it with the scores of own images.",
        f"Threshold: {threshold:.6g}. An image is called not ours if its score is above it, and "
        "ours otherwise. It was set by own images alone.",
        "p-value: (1 + the number of calibration images that score as high or higher) / (n + 1), "
        f"with n = {num_own:,} own images that fitted nothing. About this share of our own "
        "model's images scores as high; it is not the chance that the image is ours. A large "
        "p-value is no proof: it says that the image is not told apart from ours.",
        f"fnr = {fnr:g}: the share of own images that may be called not ours by mistake, here up "
        f"to {_expected(1000 * max(fnr, least))} in 1,000. A smaller fnr raises the threshold: "
        "fewer own images are lost, more foreign ones pass.",
        certified,
        "Cannot judge is a verdict of its own: the file is broken, of another size or kind than "
        "what our model makes, or its inversion failed. Nothing is resized or rotated in silence.",
    ]


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float, str)) else str(value)
