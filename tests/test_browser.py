"""The page about a folder in a real browser, opened from disk, with names that try to break it."""

import math
import re
import shutil
import subprocess

import browser
import numpy as np
import pytest
from markup import NAMES, shown

from flipad_jax import report
from flipad_jax.detection import calibration

PROGRAM = browser.find()
pytestmark = pytest.mark.skipif(
    PROGRAM is None or shutil.which("bash") is None,
    reason="no Chromium here (Debian: apt-get install chromium): pages are not opened",
)

OWN = np.random.default_rng(0).normal(0, 1, 199)
THRESHOLD = calibration.threshold(OWN, 0.01)
WORDS = {"ours": "ours", "not_ours": "not ours", "cannot_judge": "cannot judge"}


def make_rows():
    """Scores with ties and without a value, files named in no order.

    p-values of their own: real ones would order the cards as scores do.
    """
    scores = np.random.default_rng(1).normal(2, 2, 24).round(1)
    p_values = np.random.default_rng(4).integers(1, 9, 24) / 10
    names = [*NAMES, *(f"real/{(7 * i) % 16}.png" for i in range(15))]
    rows = []
    for i, (name, score) in enumerate(zip(names, scores, strict=True)):
        verdict = "not_ours" if score > THRESHOLD else "ours"
        row = {
            "path": name,
            "score": float(score),
            "p_value": float(p_values[i]),
            "verdict": verdict,
        }
        if i % 8 == 5:
            row.update(score=None, p_value=math.nan, verdict="cannot_judge", reason=name)
        rows.append(row)
    return rows


ROWS = make_rows()


def make_cards():
    rng = np.random.default_rng(2)
    cards = []
    for i, row in enumerate(ROWS):
        size, channels = ((32, 1), (64, 3), (300, 3))[i % 3]
        image = rng.integers(0, 256, (size, size, channels), dtype=np.uint8)
        overlay = report.departure_map(rng.gamma(2.0, 1.0, (16, 16)), vmax=6.0)
        if row["verdict"] == "cannot_judge":
            image = overlay = None
        numbers = row["verdict"], row["score"], row["p_value"]
        cards.append(report.Card(row["path"], image, *numbers, row.get("reason", ""), overlay))
    return cards


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "verdicts.html"
    maps = np.random.default_rng(3).normal(size=(8, 8, 5))
    report.write_verdict_page(
        path,
        title="Did our model make these?",
        lead=NAMES[0],
        rows=ROWS,
        cards=make_cards(),
        calibration_scores=OWN,
        threshold=THRESHOLD,
        fnr=0.01,
        vmax=6.0,
        averages=report.Averages(maps, maps, maps + 1, 100, 24),
        settings={"command": "python run.py " + "--flag=value " * 30, "x" * 80: "y" * 80},
        hashes={"model": "0123456789abcdef" * 8},
    )
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    tab = browser.Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.fixture
def tab(chromium, path):
    """A tab that shows the page, 1200 pixels wide, in daylight."""
    chromium.resize(1200)
    chromium.pretend()
    chromium.open(path.as_uri())
    return chromium


def choose(tab, key):
    tab.run(f"document.querySelector('.{key}').click()")


def cards(tab):
    """Text of the cards that are seen, row by row from left to right."""
    return tab.run("""
        [...document.querySelectorAll('.card')]
          .map(card => [card.getBoundingClientRect(), card])
          .filter(([box, card]) => box.height > 0)
          .sort(([a], [b]) => a.top - b.top || a.left - b.left)
          .map(([box, card]) => card.querySelector('.file').textContent)
        """)


def names(order):
    return [shown(ROWS[i]["path"]) for i in order]


def test_the_page_asks_for_nothing_and_complains_about_nothing(tab, path):
    assert tab.requests == [path.as_uri()]
    assert tab.complaints == []
    assert tab.run("document.title") == "Did our model make these?"
    assert cards(tab) == names(range(24))
    # What is broken is an empty picture of the browser's own.
    sizes = tab.run("[...document.images].map(i => [i.naturalWidth, i.naturalHeight])")
    assert len(sizes) == 1 + 2 * 21 + 2 and [0, 0] not in sizes
    assert sizes[:6] == [[256, 1], [32, 32], [16, 16], [64, 64], [16, 16], [150, 150]]
    verdicts = tab.run("[...document.querySelectorAll('.verdict')].map(v => v.innerText)")
    assert [text[2:] for text in verdicts] == [WORDS[row["verdict"]] for row in ROWS]


def test_a_page_that_misbehaves_would_be_noticed(tab, path, tmp_path):
    """The same page with a script and an outside picture: the policy stops both, and we see it."""
    bad = tmp_path / "bad.html"
    attack = '<script>document.title = "ran"</script><img src="http://127.0.0.1:9/x.png">'
    bad.write_text(path.read_text("utf-8").replace("</main>", attack + "</main>"), "utf-8")
    tab.open(bad.as_uri())
    assert tab.run("document.title") == "Did our model make these?"
    assert any("Content Security Policy" in text for text in tab.complaints)
    # Without the policy both happen: it is the policy that stops them.
    policy = '<meta http-equiv="Content-Security-Policy"'
    bad.write_text(bad.read_text("utf-8").replace(policy, "<meta name='none'"), "utf-8")
    tab.open(bad.as_uri())
    assert tab.run("document.title") == "ran"
    assert "http://127.0.0.1:9/x.png" in tab.requests and tab.complaints


def test_sorting_changes_what_is_seen_first(tab):
    scores = np.array([-np.inf if row["score"] is None else row["score"] for row in ROWS])
    by_score = np.argsort(-scores, kind="stable")
    choose(tab, "by-score")
    assert cards(tab) == names(by_score)
    p_values = np.array([np.inf if math.isnan(row["p_value"]) else row["p_value"] for row in ROWS])
    choose(tab, "by-p")
    assert cards(tab) == names(by_score[np.argsort(p_values[by_score], kind="stable")])
    choose(tab, "by-name")
    real = [int(n) for n in re.findall(r"real/(\d+)\.png", " ".join(cards(tab)))]
    assert real == sorted(real) and len(real) == 15
    choose(tab, "by-given")
    assert cards(tab) == names(range(24))


@pytest.mark.parametrize("verdict", WORDS)
def test_filters_hide_the_other_cards_and_say_so_in_print(tab, verdict):
    expected = [i for i, row in enumerate(ROWS) if row["verdict"] == verdict]
    assert 0 < len(expected) < 24
    choose(tab, f"only-{verdict}")
    assert cards(tab) == names(expected)
    tab.pretend(medium="print")
    assert cards(tab) == names(expected)
    said = tab.run("document.querySelector('.state').innerText")
    assert f"\u201c{WORDS[verdict]}\u201d is shown: {len(expected)} of 24" in said
    choose(tab, "only-all")
    assert cards(tab) == names(range(24))
    assert tab.run("document.querySelector('.state').innerText").strip() == ""


def test_the_keyboard_is_enough_and_shows_where_it_is(tab):
    focus = "document.activeElement"
    for _ in range(30):
        tab.press("Tab")
        if tab.run(f"{focus}.className") == "by-given":
            break
    assert tab.run(f"{focus}.className") == "by-given"
    outline = f"getComputedStyle({focus}.nextElementSibling).outlineStyle"
    assert tab.run(outline) == "solid"
    assert (
        tab.run("getComputedStyle(document.querySelector('.by-p + span')).outlineStyle") == "none"
    )
    tab.press("ArrowRight")
    assert tab.run(f"{focus}.className") == "by-score" and tab.run(outline) == "solid"
    scores = np.array([-np.inf if row["score"] is None else row["score"] for row in ROWS])
    assert cards(tab) == names(np.argsort(-scores, kind="stable"))
    tab.press("Tab")
    assert tab.run(f"{focus}.className") == "only-all"
    tab.press("ArrowRight")
    assert tab.run(f"{focus}.className") == "only-not_ours"
    assert len(cards(tab)) == sum(row["verdict"] == "not_ours" for row in ROWS)
    # Every control says what it does and to which group it belongs.
    assert tab.run("""
        [...document.querySelectorAll('input')].every(
          i => i.labels.length == 1 && i.labels[0].innerText.trim()
            && i.closest('fieldset').querySelector('legend').innerText.trim())
        """)


@pytest.mark.parametrize("width", [375, 320, 800, 1200])
def test_nothing_sticks_out_at_the_side(tab, width):
    tab.resize(width)
    assert tab.run("document.documentElement.scrollWidth") == width
    cut = tab.run("""
        [...document.querySelectorAll('.card *, .controls *, .scale *, p, h1, h2, dd, dt')]
          .filter(e => e.getBoundingClientRect().right > innerWidth)
          .map(e => e.outerHTML.slice(0, 80))
        """)
    assert cut == []
    rows = len(set(tab.run("[...document.querySelectorAll('.card')].map(c => c.offsetTop)")))
    assert math.ceil(24 / rows) == {320: 1, 375: 1, 800: 2, 1200: 3}[width]


def contrasts(tab):
    """The least contrast (WCAG) between the texts of the page and what is behind them."""
    return tab.run(r"""
        (() => {
          const light = c => {
            const [r, g, b] = c.map(v => v / 255).map(
              v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const numbers = c => c.match(/[\d.]+/g).map(Number);
          const behind = e => {
            for (; e; e = e.parentElement) {
              const c = numbers(getComputedStyle(e).backgroundColor);
              if (c.length == 3 || c[3] == 1) return c.slice(0, 3);
            }
            return [255, 255, 255];
          };
          const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          let least = [99, ''];
          while (walk.nextNode()) {
            const e = walk.currentNode.parentElement;
            if (!walk.currentNode.data.trim() || !e.getClientRects().length) continue;
            const [a, b] = [numbers(getComputedStyle(e).color).slice(0, 3), behind(e)].map(light);
            const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            if (ratio < least[0]) least = [ratio, walk.currentNode.data];
          }
          return least;
        })()
        """)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(tab, scheme):
    tab.pretend(scheme=scheme)
    red, *_ = re.findall(r"\d+", tab.run("getComputedStyle(document.body).backgroundColor"))
    assert (int(red) < 60) == (scheme == "dark")
    ratio, text = contrasts(tab)
    assert ratio >= 4.5, text


def test_print_hides_the_controls_and_wastes_no_pages(tab):
    tab.pretend(medium="print")
    assert tab.run("getComputedStyle(document.querySelector('.controls')).display") == "none"
    assert tab.run("getComputedStyle(document.querySelector('.gallery')).breakInside") == "auto"
    pdf = tab.pdf()
    assert pdf.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert 4 <= pages <= 12


@pytest.mark.skipif(
    shutil.which("pdftotext") is None,
    reason="no pdftotext here (Debian: apt-get install poppler-utils): prints are not read",
)
def test_print_breaks_no_card_and_cuts_nothing_off(tab, tmp_path):
    (tmp_path / "p.pdf").write_bytes(tab.pdf())
    done = subprocess.run(
        ["pdftotext", "-layout", tmp_path / "p.pdf", "-"], check=True, capture_output=True
    )
    text = done.stdout.decode()
    # The verdict and the numbers of a card are on one page.
    verdicts, p_values = r"\u2260 not ours|= ours|\? cannot judge", "p-value\\s+[0-9\u2013]"
    found = [[len(re.findall(p, page)) for p in (verdicts, p_values)] for page in text.split("\f")]
    assert np.sum(found, axis=0).tolist() == [24, 24]
    assert all(a == b for a, b in found), found
    # A hash that reaches beyond the paper would be lost.
    assert "0123456789abcdef" * 8 in re.sub(r"\s", "", text)
