"""Tests of the figures."""

import io
import math
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from flipad_jax import metrics, report
from flipad_jax.report import figures


def rng(seed=0):
    return np.random.default_rng(seed)


def pixels(figure):
    image = Image.open(io.BytesIO(figures.png(figure)))
    image.load()
    return np.asarray(image.convert("RGB"))


def texts(figure):
    """All texts drawn, empty ones left out."""
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def all_text(figure):
    return " | ".join(texts(figure))


@pytest.mark.parametrize("size, channels", [(32, 1), (64, 3), (28, 1)])
def test_image_grid_draws_every_pixel_unsmoothed(size, channels):
    images = {
        name: rng(seed).integers(0, 256, (n, size, size, channels), dtype=np.uint8)
        for seed, (name, n) in enumerate([("ours", 7), ("theirs", 3)])
    }
    canvas = pixels(report.image_grid(images, num_columns=5))
    zoom = round(100 / size)
    step = size * zoom
    for row, (name, batch) in enumerate(images.items()):
        for column, image in enumerate(batch[:5]):
            block = np.repeat(np.repeat(image, zoom, 0), zoom, 1)
            top, left = 16 + row * (step + 14), 270 + column * (step + 6)
            drawn = canvas[top : top + step, left : left + step]
            np.testing.assert_array_equal(drawn, np.broadcast_to(block, drawn.shape))
    assert texts(report.image_grid(images, num_columns=5)) == ["ours", "theirs"]


@pytest.mark.parametrize(
    "images, message",
    [
        ({}, "at least one"),
        ({"a": np.zeros((2, 8, 8, 1), np.float32)}, "uint8"),
        ({"a": np.zeros((2, 8, 8, 2), np.uint8)}, "1 or 3"),
        ({"a": np.zeros((2, 8, 8), np.uint8)}, r"\[n, h, w, c\]"),
        (
            {"a": np.zeros((2, 8, 8, 1), np.uint8), "b": np.zeros((2, 9, 8, 1), np.uint8)},
            "one size",
        ),
    ],
)
def test_image_grid_refuses(images, message):
    with pytest.raises(ValueError, match=message):
        report.image_grid(images)


def test_average_activations_share_a_colour_scale_per_row():
    maps = {"ours": rng(1).normal(size=(6, 5, 2)), "rival": 3 * rng(2).normal(size=(6, 5, 2))}
    z_bar = rng(3).normal(size=(6, 5, 2))
    figure = report.average_activations(
        maps, z_bar, channels=(4, 17), counts={"ours": 1500, "rival": 20}
    )
    images = [a.images[0] for a in figure.axes if a.images]
    assert len(images) == 6
    for row in range(2):
        expected = [z_bar[..., row], maps["ours"][..., row], maps["rival"][..., row]]
        for image, values in zip(images[3 * row : 3 * row + 3], expected):
            np.testing.assert_array_equal(image.get_array(), values)
            assert image.get_clim() == (np.min(expected), np.max(expected))
    shown = all_text(figure)
    for text in ("ours\nn = 1,500", "rival\nn = 20", "channel 4", "channel 17", "mean activation"):
        assert text in shown
    with pytest.raises(ValueError, match="one shape"):
        report.average_activations({"a": np.eye(3)}, np.eye(4))
    with pytest.raises(ValueError, match="2 channels"):
        report.average_activations(maps, z_bar, channels=(1,))


def stairs(figure):
    """(shares, edges) of each outline, own first in every panel."""
    patches = [p for p in figure.findobj(matplotlib.patches.StepPatch) if not p.get_fill()]
    return [p.get_data()[:2] for p in patches]


def test_histograms_count_every_score_and_state_what_is_left_out():
    own = np.concatenate([rng(0).normal(0, 1, 400), [np.nan]])
    rival = np.concatenate([rng(1).normal(3, 1, 300), [np.nan] * 3, [np.inf, np.inf]])
    figure = report.score_histograms(
        own, {"other": rival, "real": rng(2).normal(1, 1, 200)}, 1.25, fnr=0.005, title="FLIPAD"
    )
    data = stairs(figure)
    assert len(data) == 4
    for (shares, edges), scores, total in zip(
        data, (own, rival, own, rng(2).normal(1, 1, 200)), (400, 302, 400, 200)
    ):
        finite = scores[np.isfinite(scores)]
        np.testing.assert_allclose(shares, np.histogram(finite, edges)[0] / total)
        assert abs(shares.sum() - len(finite) / total) < 1e-9  # no score lies outside of the axis
    shown = all_text(figure)
    assert "FLIPAD" in shown and "threshold 1.25 (fnr 0.005)" in shown
    own_rejected = 100 * np.mean(own[:400] > 1.25)
    rival_rejected = 100 * (np.sum(rival[:300] > 1.25) + 2) / 302
    assert f"ours, n = 400, 1 NaN left out, {own_rejected:.1f} % rejected" in shown
    assert (
        f"n = 302, 3 NaN left out\n2 infinite, not drawn\n{rival_rejected:.1f} % rejected" in shown
    )
    lines = [
        line.get_xdata()[0]
        for line in figure.findobj(matplotlib.lines.Line2D)
        if line.get_linestyle() == "--"
    ]
    assert lines == [1.25, 1.25]


def test_a_score_at_the_threshold_is_not_rejected():
    figure = report.score_histograms(np.float64([1, 2]), {"r": np.float64([2, 2, 2, 3])}, 2.0)
    assert "ours, n = 2, 0.0 % rejected" in all_text(figure)
    assert "n = 4\n25.0 % rejected" in all_text(figure)


@pytest.mark.parametrize(
    "own, rival, scale",
    [
        (rng().normal(0, 1, 90), rng(1).normal(3, 1, 90), "linear"),
        (rng().normal(20, 1, 90), rng(1).normal(23, 1, 90), "linear"),
        (np.exp(rng().normal(0, 1, 90)), np.exp(rng(1).normal(6, 1, 90)), "log"),
        (rng().normal(0, 1, 90), np.exp(rng(1).normal(6, 1, 90)), "asinh"),
        (np.zeros(9), np.zeros(9), "linear"),
        (np.full(9, np.nan), np.full(9, np.nan), "linear"),
        (np.zeros(0), np.zeros(0), "linear"),
    ],
)
def test_score_axis_follows_the_spread(own, rival, scale):
    figure = report.score_histograms(own, {"r": rival}, 2.0)
    axes = figure.axes[0]
    assert axes.get_xscale() == scale
    for shares, edges in stairs(figure):
        assert len(own[np.isfinite(own)]) == 0 or abs(shares.sum() - 1) < 1e-9
    low, high = axes.get_xlim()
    assert low < 2.0 < high  # the threshold is always in sight
    assert pixels(figure).std() > 5
    (label,) = [t for t in texts(figure) if t.startswith("score (")]
    note = {"linear": "ours)", "log": "logarithmic)", "asinh": "asinh scale)"}[scale]
    assert note in label and "mathdefault" not in all_text(figure)


@pytest.mark.parametrize("log_x", [True, False])
def test_roc_curves_show_all_detectors_and_rivals(log_x):
    def scores(shift, seed):
        own = rng(seed).normal(0, 1, 200)
        return own, {"other": rng(seed + 9).normal(shift, 1, 100), "real": np.full(50, 99.0)}

    by_detector = {"FLIPAD": scores(2.0, 0), "RawPAD": scores(0.1, 1)}
    by_detector["RawPAD"][0][:7] = np.nan
    by_detector["FLIPAD"][1]["other"][:2] = np.nan
    figure = report.roc_curves(by_detector, log_x=log_x, fnr=0.005)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["other", "real"]
    shown = texts(figure)
    for detector, (own, rivals) in by_detector.items():
        kept, other = own[~np.isnan(own)], rivals["other"][~np.isnan(rivals["other"])]
        labels = np.r_[np.zeros(len(kept)), np.ones(len(other))]
        assert f"{roc_auc_score(labels, np.r_[kept, other]):.3f}" in shown
        assert detector in shown
    assert shown.count("1.000") == 2 and {"chance", "fnr 0.5 %"} <= set(shown)
    (label,) = [text for text in shown if text.startswith("own images rejected")]
    assert "n = 200" in label and "9 NaN scores left out" in label
    assert ("logarithmic" in label) == log_x
    for axes in figure.axes:
        assert axes.get_xlim() == ((1 / 200 if log_x else 0.0), 1.0)
        assert axes.get_xscale() == ("log" if log_x else "linear")
    assert pixels(figure).std() > 5


@pytest.mark.parametrize("count, length, columns", [(6, 6, 6), (6, 12, 3), (7, 12, 4), (3, 90, 1)])
def test_legends_fill_their_rows_evenly(count, length, columns):
    assert figures._legend_columns(["x" * length] * count, 6.0) == columns


def test_near_perfect_area_is_not_called_one():
    own, rival = np.arange(2000.0), np.arange(1999.0, 4000.0)
    assert figures._short(metrics.auc(own, rival)) == ">0.999"
    assert figures._short(metrics.auc(own, rival + 5)) == "1.000"


def test_accuracy_chart_puts_dots_and_intervals_at_their_values():
    accuracy = {"a": {"real": 0.97, "seed 1": 0.9}, "b": {"real": 0.52}}
    intervals = {"a": {"real": (0.95, 0.98)}}
    figure = report.accuracy_chart(accuracy, intervals=intervals)
    lines = figure.axes[0].get_lines()
    dots = {
        line.get_label(): list(line.get_xdata()) for line in lines if line.get_marker() != "None"
    }
    assert dots["a"] == [0.97, 0.9]
    assert dots["b"][0] == 0.52 and math.isnan(dots["b"][1])
    assert [0.95, 0.98] in [list(line.get_xdata()) for line in lines]
    low, high = figure.axes[0].get_xlim()
    assert low < 0.5 and high > 1.0
    assert {"real", "seed 1"} <= set(texts(figure))
    low = report.accuracy_chart({"a": {"r": 0.31}}).axes[0].get_xlim()[0]
    assert low < 0.31  # nothing is cut off


@pytest.mark.parametrize(
    "draw",
    [
        lambda: report.score_histograms(np.ones(3), {}, 1.0),
        lambda: report.roc_curves({}),
        lambda: report.roc_curves({"a": (np.ones(3), {})}),
        lambda: report.accuracy_chart({}),
        lambda: report.accuracy_chart({"a": {}}),
    ],
)
def test_figures_without_content_are_refused(draw):
    with pytest.raises(ValueError, match="at least one"):
        draw()


def test_names_are_not_read_as_formulas():
    figure = report.score_histograms(
        np.arange(3.0), {"$\\frac{": np.arange(3.0)}, 1.0, title="a_$b$"
    )
    assert pixels(figure).std() > 5 and "a_$b$" in texts(figure)


def test_figures_do_not_depend_on_nor_change_the_users_style(tmp_path):
    def draw(path):
        report.save_figure(
            report.score_histograms(np.arange(9.0), {"r": np.arange(5.0)}, 3.0), path
        )
        return path.read_bytes()

    plain = draw(tmp_path / "a.png")
    with matplotlib.rc_context():
        matplotlib.rcParams.update({"font.size": 20, "axes.grid": True, "savefig.dpi": 30})
        matplotlib.rcParams.update({"savefig.bbox": "tight", "figure.facecolor": "red"})
        before = dict(matplotlib.rcParams)
        assert draw(tmp_path / "b.png") == plain
        assert dict(matplotlib.rcParams) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_no_pyplot_and_a_light_import():
    code = (
        "import sys; from flipad_jax import report\n"
        "assert not {'matplotlib', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "import numpy as np\n"
        "report.figures.png(report.score_histograms(np.arange(9.), {'r': np.arange(5.)}, 3.))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
