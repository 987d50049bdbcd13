"""Tests of tables and the page."""

import io
import math
import re

import numpy as np
import pytest
from markup import HOSTILE, assert_self_contained, parse, pictures
from PIL import Image

from flipad_jax import files, report
from flipad_jax.report import figures


def rng(seed=0):
    return np.random.default_rng(seed)


def drawn_figures():
    scores = {"a": (rng().normal(size=50), {"r": rng(1).normal(1, 1, 40), HOSTILE: np.ones(3)})}
    digits = rng().integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    return [
        report.image_grid({"ours": digits, HOSTILE: digits}, title=HOSTILE),
        report.average_activations({"ours": np.eye(4), HOSTILE: np.ones((4, 4))}, np.eye(4)),
        report.score_histograms(*scores["a"], 0.5, title=HOSTILE),
        report.roc_curves(scores | {HOSTILE: scores["a"]}, fnr=0.01),
        report.accuracy_chart({"a": {"r": 0.9, HOSTILE: 0.6}}, title=HOSTILE),
    ]


def hostile_page():
    blocks = [
        HOSTILE,
        report.Table([HOSTILE, "n"], [[HOSTILE, 1]], caption=HOSTILE),
        report.KeyNumbers([(HOSTILE, HOSTILE)]),
        *(report.Picture(figure, HOSTILE) for figure in drawn_figures()),
    ]
    sections = [report.Section(HOSTILE, blocks)] * 3
    return report.page_html(HOSTILE, sections, lead=HOSTILE, footer=HOSTILE)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_page_is_self_contained_and_escapes_hostile_names():
    page = hostile_page()
    parser = parse(page.replace("<wbr>", ""))  # where the name in a header may break
    assert page.startswith("<!doctype html>")
    assert_self_contained(parser)
    # Every hostile name comes out as text, whole, except for what a terminal would act on.
    expected = HOSTILE.replace("\x1b", "\\x1b").replace("\ud800", "\\ud800")
    counts = {}
    for tag, text in parser.data:
        counts[tag] = counts.get(tag, 0) + (text == expected)
    assert {tag: n for tag, n in counts.items() if n} == {
        "title": 1,
        "h1": 1,
        "p": 4,
        "a": 3,
        "h2": 3,
        "th": 3,
        "td": 3,
        "dt": 3,
        "dd": 3,
        "figcaption": 18,
        "footer": 1,
    }
    assert parser.attributes.count(("img", "alt", expected)) == 15


@pytest.mark.filterwarnings("ignore:Glyph")
def test_pictures_of_the_page_are_the_drawn_figures():
    drawn = drawn_figures()
    parser = parse(
        report.page_html("t", [report.Section("s", [report.Picture(f, "c") for f in drawn])])
    )
    found = pictures(parser)
    assert len(found) == len(drawn)
    for picture, figure in zip(found, drawn):
        expected = np.round(figure.get_size_inches() * figure.dpi).astype(int)
        np.testing.assert_allclose(picture.shape[1::-1], expected, atol=1)
        image = Image.open(io.BytesIO(figures.png(figure)))
        np.testing.assert_array_equal(picture, np.asarray(image.convert("RGB")))


def test_hints_stand_below_their_numbers():
    block = report.KeyNumbers([("3", "ours"), ("4", "theirs")], ["few", HOSTILE])
    items = re.findall(
        "<dt>(.*?)</dt><dd>(.*?)</dd>(.*?)</div>",
        report.page_html("t", [report.Section("s", [block])]),
    )
    assert items[0] == ("ours", "3", '<dd class="hint">few</dd>')
    assert items[1][:2] == ("theirs", "4") and "<script" not in items[1][2]
    with pytest.raises(ValueError, match="2 numbers have 1 hints"):
        report.KeyNumbers(block.numbers, ["few"])


def test_contents_lead_to_the_sections():
    sections = [report.Section(f"part {i}", ["text"]) for i in range(4)]
    parser = parse(report.page_html("t", sections))
    targets = [v for t, n, v in parser.attributes if (t, n) == ("a", "href")]
    ids = [v for t, n, v in parser.attributes if (t, n) == ("section", "id")]
    assert targets == ["#" + i for i in ids] and len(ids) == 4
    assert "nav" not in parse(report.page_html("t", sections[:2])).tags


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    report.write_page(path, "old", [])
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_page(path, "new", [])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_write_page_is_complete_or_absent(tmp_path):
    path = tmp_path / "new" / "report.html"
    sections = [report.Section("s", [HOSTILE])]
    report.write_page(path, "t", sections)
    assert path.read_text("utf-8") == report.page_html("t", sections)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds text, Table.*got int"):
        report.write_page(path, "t", [report.Section("s", [3])])
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


# --- tables -----------------------------------------------------------------------------------

HEADER = ["detector", "accuracy", "n", "loss"]
ROWS = [
    ["one-class", 0.98765, 500, 1.5],
    ["b", None, 20, 0.25],
    ["c", np.float32(0.5), 7, math.nan],
]


def test_table_text_is_aligned():
    text = report.table_text(
        HEADER, ROWS, formats={"accuracy": ".1%"}, best={"accuracy": "max", "loss": "min"}
    )
    assert text.split("\n") == [
        "detector   accuracy     n  loss",
        "---------  ---------  ---  -----",
        "one-class     98.8%*  500   1.5",
        "b                 –    20  0.25*",
        "c             50.0%     7   nan",
    ]


def test_table_text_shows_control_characters():
    text = report.table_text(["file"], [["a\x1b[2Jb\nc"], ["\u00e4\u4e2d"]])
    assert text.split("\n")[2:] == ["a\\x1b[2Jb\\nc", "\u00e4\u4e2d"]


def test_html_table_aligns_numbers_and_marks_the_best():
    table = report.Table(HEADER, ROWS, {"accuracy": ".1%"}, {"accuracy": "max", "loss": "min"})
    page = report.page_html("t", [report.Section("s", [table])])
    parse(page)
    rows = re.findall("<tr>(.*?)</tr>", page)
    assert (
        re.findall("<th[^>]*>", rows[0])
        == ['<th scope="col">'] + ['<th scope="col" class="num">'] * 3
    )
    assert rows[1] == (
        '<td>one-class</td><td class="num"><strong>98.8%</strong></td>'
        '<td class="num">500</td><td class="num">1.5</td>'
    )
    assert rows[2].endswith('<td class="num"><strong>0.25</strong></td>')
    assert rows[3].endswith('<td class="num">nan</td>') and "<strong>" not in rows[3]


def test_long_names_in_a_header_may_break():
    table = report.Table(["detector", "digits_dcgan_0<"], [["one-class", 0.5]])
    page = report.page_html("t", [report.Section("s", [table])])
    parse(page)
    assert '<th scope="col" class="num">digits_<wbr>dcgan_<wbr>0&lt;</th>' in page


def test_values_that_look_alike_are_all_marked_and_text_columns_are_not_numeric():
    table = report.Table(
        ["x", "y"], [[0.9991, 1], [0.9993, "two"], [0.5, 3]], {"x": ".2f"}, {"x": "max"}
    )
    page = report.page_html("t", [report.Section("s", [table])])
    assert page.count("<strong>1.00</strong>") == 2
    assert page.count('class="num"') == 4  # the column x only, with its header
    assert report.table_text(["v"], [[True], [12345678], [0.123456]]).split("\n")[2:] == [
        "True",
        "12345678",
        "0.1235",
    ]


@pytest.mark.parametrize("best, winner", [("max", "2*"), ("min", "1*")])
def test_nan_is_never_the_best(best, winner):
    rows = [[math.nan], [1.0], [2.0], [math.nan]]
    text = report.table_text(["v"], rows, best={"v": best})
    assert re.findall(r"\S+\*", text) == [winner]
    assert "*" not in report.table_text(["v"], [[math.nan], [None]], best={"v": best})


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(header=["a", "b"], rows=[[1, 2], [3]]), "row 1 has 1 cells"),
        (dict(header=["a"], rows=[], formats={"z": ".2f"}), "no column 'z'; there are a"),
        (dict(header=["a"], rows=[], best={"a": "biggest"}), "max"),
    ],
)
def test_table_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        report.Table(**kwargs)
