"""Tests of the gallery and its pictures."""

import math
import re

import numpy as np
import pytest
from markup import HOSTILE, NAMES, assert_self_contained, parse, pictures, shown
from matplotlib import colormaps

from flipad_jax import report
from flipad_jax.report import gallery

VERDICTS = ("ours", "not_ours", "cannot_judge")


def rng(seed=0):
    return np.random.default_rng(seed)


def noise(h, w, c, seed=0):
    return rng(seed).integers(0, 256, (h, w, c), dtype=np.uint8)


def card(path="a.png", verdict="ours", score=1.0, p_value=0.5, image=None, **more):
    return report.Card(path, image, verdict, score, p_value, **more)


def page(*blocks):
    return report.page_html("t", [report.Section("s", blocks)])


# --- cards ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, drawn", [((32, 32, 1), (128, 128)), ((64, 64, 3), (128, 128)), ((28, 20, 3), (80, 112))]
)
def test_small_pictures_keep_every_pixel_and_are_enlarged_by_a_whole_factor(shape, drawn):
    image, overlay = noise(*shape), noise(8, 8, 3, seed=1)
    parser = parse(page(report.Gallery([card(image=image, overlay=overlay)], "c")))
    first, second = pictures(parser)
    np.testing.assert_array_equal(first, np.broadcast_to(image, first.shape))
    np.testing.assert_array_equal(second, overlay)
    sizes = [v for t, n, v in parser.attributes if t == "img" and n in ("width", "height")]
    assert sizes == [str(v) for v in drawn] * 2  # the overlay as large as the image
    assert ("img", "class", "pixels") in parser.attributes


def test_an_overlay_of_the_images_own_height_stands_at_its_scale():
    """Two pictures side by side, as the page about proofs has them."""
    block = report.Gallery([card(image=noise(32, 32, 1), overlay=noise(32, 66, 3))], "c")
    parser = parse(page(block))
    sizes = [v for t, n, v in parser.attributes if t == "img" and n in ("width", "height")]
    assert sizes == ["128", "128", "264", "128"]


def test_large_pictures_are_shrunk_by_block_means_and_say_so():
    image = noise(300, 600, 3)
    text = page(report.Gallery([card(image=image)], "c"))
    (small,) = pictures(parse(text))
    means = image.reshape(100, 3, 200, 3, 3).mean(axis=(1, 3))
    # Pillow's fixed-point means need not be the nearest whole number, only one beside the mean.
    assert small.shape == (100, 200, 3) and np.abs(small - means).max() < 1
    assert "600 \u00d7 300, shown at 1/3" in text
    exact = page(report.Gallery([card(image=noise(256, 256, 1))], "c"))
    assert pictures(parse(exact))[0].shape == (256, 256, 3) and "shown at" not in exact


def test_pages_stay_small():
    huge = page(report.Gallery([card(image=noise(3000, 4000, 3))], "c"))
    assert len(huge) < 400_000
    cards = [
        card(f"{i}.png", image=noise(64, 64, 3, i), overlay=noise(64, 64, 3, i)) for i in range(300)
    ]
    # Noise does not compress: 3 bytes a pixel, a third more for base64, and a tenth for the rest.
    assert len(page(report.Gallery(cards, "c"))) < 1.1 * 600 * 64 * 64 * 3 * 4 / 3


@pytest.mark.parametrize("name", NAMES)
def test_names_and_notes_come_out_whole_and_harmless(name):
    first = card(name, image=noise(8, 8, 3), overlay=noise(8, 8, 3), overlay_text=name)
    second = card(name, "cannot_judge", None, None, note=name)
    parser = parse(page(report.Gallery([first, second], name)))
    assert_self_contained(parser)
    paths = "".join(t for tag, t in parser.data if tag in ("bdi", "span") and t.strip(" "))
    assert paths.count(shown(name).strip(" ")) == 2
    texts = [t for _, t in parser.data]
    assert texts.count(shown(name)) >= 3  # caption, text of the overlay, note
    assert ("img", "alt", f"the image {shown(name)}") in parser.attributes
    assert ("img", "alt", shown(name)) in parser.attributes
    assert parser.tags.count("img") == 2


def test_verdicts_are_told_by_words_and_numbers_by_digits():
    cards = [card(v, v, s, p) for v, s, p in zip(VERDICTS, (3.14159, -2e7, None), (1, 4e-5, None))]
    text = re.sub("<[^>]*>", " ", page(report.Gallery(cards, "c")))
    said = re.sub(r"\s+", " ", text)
    assert "= ours ours score 3.142 p-value 1.0000" in said
    assert "\u2260 not ours not_ours score -2e+07 p-value 4e-05" in said
    assert "? cannot judge cannot_judge score \u2013 p-value \u2013" in said


def test_a_card_without_picture_shows_a_place_and_the_reason():
    text = page(report.Gallery([card("b.png", "cannot_judge", None, math.nan, note="cut off")], ""))
    assert parse(text).tags.count("img") == 0
    assert '<div class="nothing">no picture</div>' in text
    assert '<p class="note">cut off</p>' in text
    assert "There is no picture" in page(report.Gallery([card()], ""))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(verdict="theirs"), "verdict 'theirs', expected one of"),
        (dict(p_value=1.2), r"p-value 1.2, expected one in \[0, 1\]"),
        (
            dict(image=np.zeros((4, 4), np.uint8)),
            r"uint8 image \[h, w, 1 or 3\], got uint8 \(4, 4\)",
        ),
        (dict(image=np.zeros((4, 4, 3))), "got float64"),
        (dict(image=np.zeros((4, 4, 4), np.uint8)), r"got uint8 \(4, 4, 4\)"),
        (dict(image=np.zeros((0, 4, 3), np.uint8)), r"got uint8 \(0, 4, 3\)"),
        (dict(image="x.png"), "got str"),
        (dict(overlay=np.zeros((4, 4, 1), np.uint8)), r"uint8 overlay \[h, w, 3\]"),
    ],
)
def test_card_refuses(kwargs, message):
    with pytest.raises(ValueError, match="'odd.png': .*" + message):
        card("odd.png", **kwargs)


# --- order and filters ------------------------------------------------------------------------


def places(text, key):
    return [int(v) for v in re.findall(rf"--by-{key}:(\d+)", text)]


def in_order(cards, ranks):
    assert sorted(ranks) == list(range(len(cards)))
    return [c.path for _, c in sorted(zip(ranks, cards), key=lambda pair: pair[0])]


def test_order_by_score_and_p_value_puts_what_is_no_number_last():
    scores = list(rng().integers(-4, 5, 60).astype(float)) + [None, math.nan, math.inf, -math.inf]
    scores = [scores[i] for i in rng(1).permutation(64)]
    p_values = [[0.25, 0.5, None, math.nan, 0.0625][i] for i in rng(2).integers(0, 5, 64)]
    cards = [card(str(i), score=s, p_value=p) for i, (s, p) in enumerate(zip(scores, p_values))]
    text = gallery.gallery_html(report.Gallery(cards, "c"), "g")

    # Oracle: NumPy's stable sorts, missing numbers as infinities of the wrong end.
    finite = np.array([s if s is not None and math.isfinite(s) else -np.inf for s in scores])
    by_score = np.argsort(-finite, kind="stable")
    assert in_order(cards, places(text, "score")) == [str(i) for i in by_score]
    known = np.array([p if p is not None and math.isfinite(p) else np.inf for p in p_values])
    by_p = by_score[np.argsort(known[by_score], kind="stable")]  # ties: the higher score first
    assert in_order(cards, places(text, "p")) == [str(i) for i in by_p]


def test_order_by_name_is_natural_and_equal_names_keep_theirs():
    names = [
        "b10.png",
        "b9.png",
        "a/2.png",
        "B1.png",
        "a/10.png",
        "7.png",
        "b9.png",
        "a",
        "",
        "a1b",
    ]
    cards = [card(name, score=i) for i, name in enumerate(names)]
    ranks = places(gallery.gallery_html(report.Gallery(cards, "c"), "g"), "name")
    expected = ["", "7.png", "B1.png", "a", "a1b", "a/2.png", "a/10.png", "b9.png", "b9.png"]
    assert in_order(cards, ranks) == [*expected, "b10.png"]
    assert ranks[1] < ranks[6]


def test_galleries_of_a_page_share_no_radio_names():
    block = report.Gallery([card("a"), card("b", "not_ours")], "c")
    text = report.page_html("t", [report.Section("s", ["p", block, block])] * 2)
    groups = re.findall(r'<input type="radio" name="(\w+)"[^>]*?( checked)?>', text)
    names = [name for name, _ in groups]
    assert len(set(names)) == 8  # order and filter of four galleries
    assert {names.count(name) for name in names} == {3, 4}
    assert sorted(name for name, checked in groups if checked) == sorted(set(names))
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_only_choices_that_change_something_are_offered():
    many = [card("a"), card("b", "not_ours"), card("c", "not_ours")]
    text = page(report.Gallery(many, "c"))
    labels = re.findall(r"<label>.*?<span>(.*?)</span>", text)
    assert labels[4:] == ["all 3", "\u2260 not ours 2", "= ours 1"]
    assert "Show</legend>" not in page(report.Gallery(many[1:], "c"))
    assert "<input" not in page(report.Gallery(many[:1], "c"))
    assert "<input" not in page(report.Gallery([], "c"))


def test_pages_without_a_gallery_have_none_of_its_rules():
    assert ".cards" not in page("text") and ".cards" in page(report.Gallery([], "c"))


# --- departure maps ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 8), (3, 4), (7, 11), (5, 9), None])
def test_departure_map_repeats_the_nearest_place(size):
    departure = rng().uniform(0, 5, (3, 4))
    drawn = report.departure_map(departure, image_size=size, vmax=5.0)
    h, w = size or (3, 4)
    assert drawn.shape == (h, w, 3) and drawn.dtype == np.uint8
    colours = report.departure_map(departure, vmax=5.0)
    for i in range(h):
        for j in range(w):
            row, column = math.floor((i + 0.5) * 3 / h), math.floor((j + 0.5) * 4 / w)
            np.testing.assert_array_equal(drawn[i, j], colours[row, column])
            expected = np.float64(colormaps["magma"](departure[row, column] / 5)[:3]) * 255
            assert np.abs(colours[row, column] - expected).max() <= 1


def test_colours_mean_the_same_in_every_map_and_grow_lighter():
    values = np.linspace(0, 4, 200)
    scale = report.departure_map(values[None], vmax=4.0)[0]
    weights = np.array([0.2126, 0.7152, 0.0722])
    light = ((scale / 255.0) ** 2.2) @ weights
    assert (np.diff(light) > -1e-3).all() and light[0] < 0.01 and light[-1] > 0.9
    one = report.departure_map(np.array([[1.0, 4.0], [9.0, np.inf]]), vmax=4.0)
    other = report.departure_map(np.array([[1.0, 0.0]]), vmax=4.0)
    np.testing.assert_array_equal(one[0, 0], other[0, 0])
    np.testing.assert_array_equal(one[1], [scale[-1], scale[-1]])
    np.testing.assert_array_equal(one[0, 1], scale[-1])
    np.testing.assert_array_equal(other[0, 1], scale[0])


def test_no_value_is_grey_and_no_colour_of_the_scale_is():
    grey = report.departure_map(np.array([[np.nan, 0.0]]), vmax=2.0)[0, 0]
    assert grey[0] == grey[1] == grey[2]
    scale = report.departure_map(np.linspace(0, 2, 500)[None], vmax=2.0)[0].astype(int)
    assert np.abs(scale - grey).max(axis=1).min() > 20


@pytest.mark.parametrize(
    "departure, kwargs, message",
    [
        (np.zeros((2, 2, 1)), {}, r"shape \(2, 2, 1\), expected \[h, w\]"),
        (np.zeros((0, 2)), {}, "not empty"),
        (np.array([[np.nan, -0.5]]), {}, "down to -0.5"),
        (np.zeros((2, 2)), {"vmax": 1.0}, "vmax=1.0"),
        (np.zeros((2, 2)), {"vmax": np.inf}, "vmax=inf"),
        (np.zeros((2, 2)), {"vmax": np.nan}, "vmax=nan"),
        (np.zeros((4, 2)), {"image_size": (3, 9)}, "4 x 2 places does not fit an image of 3 x 9"),
    ],
)
def test_departure_map_refuses(departure, kwargs, message):
    with pytest.raises(ValueError, match=message):
        report.departure_map(departure, **{"vmax": 3.0, **kwargs})


def test_the_scale_is_that_of_the_maps():
    text = page(report.Gallery([card()], "c", vmax=4.0))
    (bar,) = pictures(parse(text))
    values = np.linspace(0, 4, 256)[None]
    np.testing.assert_array_equal(bar, report.departure_map(values, vmax=4.0))
    assert 'style="left:25.00%"' in text and "4 or more" in text
    assert 'class="scale"' not in page(report.Gallery([card()], "c"))
    with pytest.raises(ValueError, match="vmax"):
        page(report.Gallery([card()], "c", vmax=0.5))


def test_hostile_text_breaks_no_attribute():
    text = page(report.Gallery([card(HOSTILE, image=noise(4, 4, 1))] * 2, HOSTILE, vmax=2.0))
    assert_self_contained(parse(text))
