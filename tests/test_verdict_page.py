"""Tests of the page about a folder of suspicious images."""

import collections
import math
import re
import time

import matplotlib
import numpy as np
import pytest
from markup import HOSTILE, NAMES, assert_self_contained, parse, pictures, shown

from flipad_jax import report
from flipad_jax.detection import calibration
from flipad_jax.report import verdict_page

OWN = np.random.default_rng(7).normal(0, 1, 299)
FNR = 0.01
THRESHOLD = calibration.threshold(OWN, FNR)


def make_rows(num_files, *, broken_every=10, seed=0):
    scores = np.random.default_rng(seed).normal(1, 2, num_files)
    p_values = calibration.conformal_p_values(OWN, scores)
    rows = []
    for i, (score, p_value) in enumerate(zip(scores, p_values)):
        row = {"path": f"f/{i}.png", "score": score, "p_value": p_value, "threshold": THRESHOLD}
        row |= {"verdict": "not_ours" if score > THRESHOLD else "ours", "reason": "", "warning": ""}
        if i % broken_every == 3:
            row |= {"verdict": "cannot_judge", "score": None, "p_value": math.nan}
            row |= {"reason": f"broken in way {i}"}
        rows.append(row)
    return rows


def make_cards(rows):
    image = np.zeros((4, 4, 1), np.uint8)
    return [
        report.Card(r["path"], image, r["verdict"], r["score"], r["p_value"], r["reason"])
        for r in rows
    ]


def write(path, rows, cards=None, **kwargs):
    kwargs = {"calibration_scores": OWN, "threshold": THRESHOLD, "fnr": FNR} | kwargs
    cards = make_cards(rows) if cards is None else cards
    report.write_verdict_page(path, title="t", rows=rows, cards=cards, **kwargs)
    return path.read_text("utf-8")


def sections(text):
    """Heading -> HTML below it."""
    return dict(re.findall(r"<section[^>]*><h2>(.*?)</h2>(.*?)</section>", text, re.S))


def key_numbers(text):
    found = re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd><dd class", sections(text)["Result"])
    return dict(found)


@pytest.mark.parametrize("num_files", [0, 1, 57])
def test_key_numbers_are_those_of_the_rows(tmp_path, num_files):
    rows = make_rows(num_files)
    text = write(tmp_path / "p.html", rows)
    assert_self_contained(parse(text))
    counts = collections.Counter(row["verdict"] for row in rows)
    numbers = key_numbers(text)
    assert numbers["ours"] == str(counts["ours"])
    assert numbers["not ours"] == str(counts["not_ours"])
    assert numbers["cannot judge"] == str(counts["cannot_judge"])
    p_values = [row["p_value"] for row in rows if row["verdict"] != "cannot_judge"]
    assert ("smallest p-value" in numbers) == bool(p_values)
    if p_values:
        assert float(numbers["smallest p-value"]) == pytest.approx(min(p_values), rel=0.05)
    assert text.count('<li class="card') == num_files
    assert ("Files without a verdict" in sections(text)) == (counts["cannot_judge"] > 0)


def test_a_folder_in_which_nothing_can_be_judged(tmp_path):
    rows = make_rows(4, broken_every=1000)
    for row in rows:
        row.update(verdict="cannot_judge", score=math.nan, p_value=None, reason=HOSTILE)
    text = write(tmp_path / "p.html", rows)
    found = sections(text)
    assert "no scores to compare" in found["Scores"] and "<img" not in found["Scores"]
    cells = [t for tag, t in parse(text).data if tag == "td"]
    assert cells.count(shown(HOSTILE)) == 4
    assert set(key_numbers(text).values()) == {"0", "4"}


def test_ten_thousand_files_of_which_some_have_a_card(tmp_path):
    rows = make_rows(10_000)
    start = time.perf_counter()
    text = write(tmp_path / "p.html", rows, make_cards(rows[::40]), how_chosen="Every 40th.")
    assert time.perf_counter() - start < 20
    assert len(text) < 1_000_000
    assert "<figcaption>250 of 10,000 files are shown. Every 40th.</figcaption>" in text
    unjudged = sections(text)["Files without a verdict"]
    assert unjudged.count("<tr>") == 1 + 300 and "300 of 1,000 files." in unjudged
    judged = [row for row in rows if row["verdict"] != "cannot_judge"]
    expected = FNR * len(judged)
    words = f"made all {len(judged):,} judged files, up to {expected:.0f} would be expected here"
    assert words in text
    with pytest.raises(ValueError, match="10 of 50 rows have a card: say in how_chosen"):
        write(tmp_path / "q.html", rows[:50], make_cards(rows[:10]))
    text = write(tmp_path / "q.html", rows[:50], [], how_chosen="Not asked for.")
    assert "None of 50 files is shown. Not asked for." in text


def test_summary_of_verdicts(tmp_path):
    rows = make_rows(80)
    found = sections(write(tmp_path / "p.html", rows))["Scores"]
    table = [re.findall("<td[^>]*>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", found)]
    for words, *cells in table[1:]:
        group = [r for r in rows if r["verdict"] == words.replace(" ", "_")]
        assert cells[:2] == [str(len(group)), f"{100 * len(group) / 80:.1f}%"]
        if words == "cannot judge":
            assert cells[2:] == ["\u2013"] * 4
        else:
            scores = [r["score"] for r in group]
            expected = [min(scores), np.median(scores), max(scores)]
            expected.append(min(r["p_value"] for r in group))
            np.testing.assert_allclose(np.float64(cells[2:]), expected, rtol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files_break_nothing(tmp_path, name):
    rows = make_rows(20)
    for row in rows[2:4]:  # one with a verdict, one without
        row.update(path=name, reason=name, warning=name)
    text = write(tmp_path / "p.html", rows, lead=name, notes=[name], settings={name: name})
    parser = parse(text)
    assert_self_contained(parser)
    cells = [t for tag, t in parser.data if tag == "td"]
    assert cells.count(shown(name)) == 5  # file, reason, warning, setting, value


def test_warnings_are_counted(tmp_path):
    rows = make_rows(30)
    for i, row in enumerate(rows):
        row["warning"] = ("", "a JPEG", "turned by EXIF")[0 if i < 10 else 1 if i < 25 else 2]
    found = sections(write(tmp_path / "p.html", rows))["Warnings"]
    assert re.findall("<td[^>]*>(.*?)</td>", found) == ["a JPEG", "15", "turned by EXIF", "5"]
    for row in rows:
        del row["warning"], row["reason"], row["threshold"]
    found = sections(write(tmp_path / "p.html", rows, make_cards(make_rows(30))))
    assert "Warnings" not in found and "no reason given" in found["Files without a verdict"]


def test_scores_are_drawn_against_own_ones(tmp_path, monkeypatch):
    drawn = []
    draw = verdict_page.figures.score_histograms
    monkeypatch.setattr(
        verdict_page.figures,
        "score_histograms",
        lambda *a, **k: drawn.append((a, k)) or draw(*a, **k),
    )
    rows = make_rows(40)
    write(tmp_path / "p.html", rows)
    (own, rivals, threshold), options = drawn[0]
    np.testing.assert_array_equal(own, OWN)
    expected = [row["score"] for row in rows if row["verdict"] != "cannot_judge"]
    np.testing.assert_array_equal(rivals["judged files"], expected)
    assert threshold == THRESHOLD and options["fnr"] == FNR


def test_averages_show_the_channels_that_differ_most(tmp_path):
    own = np.random.default_rng(0).normal(size=(6, 5, 9))
    suspects = own.copy()
    suspects[..., 7] += 3
    suspects[..., 2] -= 2  # less than 7 and more than 4, whatever the sign
    suspects[..., 4] += 1
    averages = report.Averages(own + 0.1, own, suspects, 250, 40)
    figure = verdict_page._averages(averages).figure
    text = " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))
    assert re.findall(r"channel (\d)", text) == ["7", "2", "4"]
    assert "n = 250" in text and "n = 40" in text
    page = write(tmp_path / "p.html", make_rows(5), averages=averages)
    assert len(pictures(parse(sections_only(page, "What inversion sees")))) == 1


def sections_only(text, heading):
    return f"<section>{sections(text)[heading]}</section>"


@pytest.mark.parametrize("fnr", [0.1, 0.05, 0.005, 0.003, 0.001])
def test_what_calibration_images_can_certify(tmp_path, fnr):
    """Oracle: the smallest n for which the conformal threshold is finite."""
    needed = next(
        n for n in range(1, 2000) if calibration.conformal_threshold(np.zeros(n), fnr) < 1
    )
    for num_own, within in ((needed, True), (needed - 1, False)):
        own = np.arange(num_own, dtype=float)
        text = write(tmp_path / "p.html", [], calibration_scores=own, threshold=1.0, fnr=fnr)
        said = sections(text)["How to read this"]
        assert ("within reach" in said) == within
        assert (f"takes at least {needed:,} images" in said) == (not within)
        assert f"1 / (n + 1) = {1 / (num_own + 1):.2g}" in said


def test_settings_and_hashes_are_listed(tmp_path):
    settings = {"lam": 5e-4, "tol": None, "exact": True, "widths": (64, 32), "folder": HOSTILE}
    text = write(tmp_path / "p.html", [], settings=settings, hashes={"model": "ab" * 32})
    cells = [t for tag, t in parse(text).data if tag == "td"]
    for cell in ("lam", "0.0005", "\u2013", "True", "(64, 32)", shown(HOSTILE), "ab" * 32):
        assert cell in cells
    assert "Settings and hashes" not in write(tmp_path / "p.html", [])


def changed(i, **values):
    rows = make_rows(6)
    rows[i].update(values)
    return rows


@pytest.mark.parametrize(
    "rows, kwargs, message",
    [
        (changed(0, verdict="theirs"), {"cards": []}, "'f/0.png': verdict 'theirs'"),
        (changed(0, score=math.nan), {}, "'f/0.png': .* with score nan"),
        (changed(0, p_value=None), {}, "and p-value None"),
        (changed(0, verdict="ours", score=9.0), {}, "ours, but its score is 9.0 and the threshold"),
        (changed(0, verdict="not_ours", score=THRESHOLD), {}, "not_ours, but its score"),
        (make_rows(2), {"cards": make_cards(make_rows(3))}, "'f/2.png': no row has this file"),
        ([], {"calibration_scores": np.array([1.0, np.nan])}, "1 that are not finite"),
        ([], {"calibration_scores": np.zeros(0)}, r"got \(0,\)"),
        ([], {"threshold": math.nan}, "threshold=nan"),
        ([], {"fnr": 1.5}, "fnr=1.5"),
    ],
)
def test_contradictions_are_refused_and_nothing_is_written(tmp_path, rows, kwargs, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "p.html", rows, **kwargs)
    assert list(tmp_path.iterdir()) == []
