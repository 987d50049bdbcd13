"""Figures of a run: Matplotlib `Figure` objects that no global state of pyplot knows.

They look the same whatever style the user has set. Throughout, a score is higher the less likely an
image is ours, and an image is rejected when its score exceeds the threshold. Scores that are NaN
are left out, and the figure says how many.
"""

import contextlib
import io
import math
import os
import textwrap
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, NamedTuple, Sequence, cast

import numpy as np

from flipad_jax import data, metrics
from flipad_jax.files import write_atomically
from flipad_jax.report.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "accuracy_chart",
    "average_activations",
    "image_grid",
    "png",
    "roc_curves",
    "save_figure",
    "score_histograms",
]

_DPI = 200
_INK, _SOFT, _FAINT = "#1f2933", "#5f6c7b", "#d5dbe1"
_OWN = "#0072b2"
# Okabe and Ito's palette, which colour-blind readers can tell apart, without blue (ours) and
# yellow (too light on white); line styles and markers tell the same once more.
_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_MARKERS = ("o", "s", "D", "^", "v", "P")
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with Matplotlib, so the same everywhere
    "font.size": 8.0,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "axes.axisbelow": True,
    "grid.color": "#e9edf1",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.labelcolor": _INK,
    "text.color": _INK,
    "text.parse_math": False,  # a source called "$x" is a name, not a formula
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.dpi": _DPI,
    "savefig.dpi": _DPI,
}


def image_grid(
    images_by_source: Mapping[str, np.ndarray], *, num_columns: int = 12, title: str | None = None
) -> "Figure":
    """Samples of every source, one source a row, pixels drawn without smoothing.

    Args:
      images_by_source: for every source uint8 `[n, h, w, 1 or 3]`, all of one size; the first
        `num_columns` images are shown.
      num_columns: images per row.
      title: above the rows.
    Raises:
      ValueError: without a source, or for images of several sizes or of another kind.
    """
    if not images_by_source:
        raise ValueError("image_grid needs at least one source")
    shapes = set()
    for images in images_by_source.values():
        data.check_images(images)
        if images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
            raise ValueError(
                f"image_grid draws uint8 images [n, h, w, 1 or 3], got {images.dtype} "
                f"{tuple(images.shape)}; flipad_jax.data.to_uint8 converts"
            )
        shapes.add(tuple(images.shape[1:3]))
    if len(shapes) > 1:
        raise ValueError(f"image_grid needs images of one size, got {sorted(shapes)}")
    ((h, w),) = shapes
    num_columns = min(num_columns, max(len(images) for images in images_by_source.values()))
    zoom = max(1, round(100 / max(h, w)))  # about half an inch an image, in whole pixels
    gap, row_gap, label, margin = 6, 14, 270, 16
    cell_h, cell_w = h * zoom, w * zoom
    top = 56 if title else margin
    width = label + num_columns * (cell_w + gap) - gap + margin
    height = top + len(images_by_source) * (cell_h + row_gap) - row_gap + margin
    with _style():
        figure = _new_figure(width / _DPI, height / _DPI)
        if title:
            figure.text(
                margin / width, 1 - 20 / height, printable(title), weight="bold", size=9, va="top"
            )
        for row, (source, images) in enumerate(images_by_source.items()):
            strip = np.full((cell_h, num_columns * (cell_w + gap) - gap, 3), 255, np.uint8)
            for column, image in enumerate(np.asarray(images[:num_columns])):
                big = np.repeat(np.repeat(image, zoom, axis=0), zoom, axis=1)
                left = column * (cell_w + gap)
                strip[:, left : left + cell_w] = big
            y = top + row * (cell_h + row_gap)
            # An axes of exactly as many pixels as the strip: nothing is resampled.
            axes = figure.add_axes(
                (label / width, 1 - (y + cell_h) / height, strip.shape[1] / width, cell_h / height)
            )
            axes.imshow(strip, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            middle = 1 - (y + cell_h / 2) / height
            figure.text(margin / width, middle, _wrapped(source, 20), va="center", size=8)
    return figure


def average_activations(
    channel_maps: Mapping[str, np.ndarray],
    z_bar: np.ndarray | None,
    *,
    channels: Sequence[int] | None = None,
    counts: Mapping[str, int] | None = None,
) -> "Figure":
    """Mean inverted activation per source beside the mean activation z_bar ([P1] Figure 4), or mean
    images or DCT features per source ([P1] Figures 8 and 9).

    A row shows one channel; the maps of a row share one colour scale, that of the row's bar.

    Args:
      channel_maps: for every source the average over its images, `[h, w]` or `[h, w, k]` for k
        channels (activation units).
      z_bar: the mean activation of the model, of the same shape; None for features that the model
        has no mean of.
      channels: numbers of the k channels, for the labels.
      counts: how many images each average is taken over, for the labels.
    Raises:
      ValueError: for maps of several shapes, or another number of channels than of `channels`.
    """
    maps = {} if z_bar is None else {"mean activation z\u0304": np.asarray(z_bar)}
    for source, values in channel_maps.items():
        name = _wrapped(source, 16)
        maps[name + (f"\nn = {counts[source]:,}" if counts else "")] = np.asarray(values)
    maps = {k: v[..., None] if v.ndim == 2 else v for k, v in maps.items()}
    shapes = {v.shape for v in maps.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise ValueError(
            f"average_activations needs maps [h, w] or [h, w, k] of one shape, got {sorted(shapes)}"
        )
    h, w, k = next(iter(shapes))
    if channels is not None and len(channels) != k:
        raise ValueError(f"{k} channels are drawn, but {len(channels)} numbers were given")
    side, left, right, top, bottom, gap = 1.05, 0.35, 0.55, 0.52, 0.12, 0.1
    width = left + len(maps) * (side + gap) + right
    height = top + k * (side * h / w + gap) + bottom
    with _style():
        figure = _new_figure(width, height)
        for row in range(k):
            finite = np.concatenate([m[..., row].ravel() for m in maps.values()])
            finite = finite[np.isfinite(finite)]
            low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
            y = 1 - (top + (row + 1) * (side * h / w + gap) - gap) / height
            size = (side / width, side * h / w / height)
            for column, (name, values) in enumerate(maps.items()):
                apart = 0.08 if column and z_bar is not None else 0.0
                x = (left + column * (side + gap) + apart) / width
                axes = figure.add_axes((x, y, *size))
                image = axes.imshow(values[..., row], vmin=low, vmax=high, cmap="viridis")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if row == 0:
                    axes.set_title(name, size=8, weight="normal", loc="center", pad=5)
                if column == 0 and channels is not None:
                    axes.set_ylabel(f"channel {channels[row]}", color=_SOFT)
            x = (left + len(maps) * (side + gap) + 0.1) / width
            bar = figure.colorbar(image, cax=figure.add_axes((x, y, 0.09 / width, size[1])))
            bar.outline.set_visible(False)
            bar.locator = _max_n_locator(4)
            bar.update_ticks()
    return figure


def score_histograms(
    own: np.ndarray,
    rivals: Mapping[str, np.ndarray],
    threshold: float | None,
    *,
    title: str | None = None,
    fnr: float | None = None,
    own_name: str = "ours",
    num_bins: int = 60,
) -> "Figure":
    """Scores of one detector: own images against each rival, one rival a row.

    The score axis is logarithmic where positive scores spread over decades, and like asinh where
    scores of both signs do.

    Args:
      own: `[n]` scores of own images.
      rivals: `[m]` scores for every rival.
      threshold: scores above it are rejected; None draws no line.
      title: name of the detector.
      fnr: the rate that the threshold was chosen for, for the label.
      own_name: how own images are called.
      num_bins: number of bins over the whole axis.
    Raises:
      ValueError: without a rival.
    """
    if not rivals:
        raise ValueError("score_histograms needs at least one rival")
    own_name = printable(own_name)
    own, own_nans = _without_nan(own)
    rows = {name: _without_nan(scores) for name, scores in rivals.items()}
    drawn = np.concatenate([own, *(kept for kept, _ in rows.values())])
    if threshold is not None:
        drawn = np.append(drawn, threshold)
    drawn = drawn[np.isfinite(drawn)]

    def describe(scores: np.ndarray, num_nans: int) -> list[str]:
        lines = [f"n = {len(scores):,}" + (f", {num_nans:,} NaN left out" if num_nans else "")]
        if not np.isfinite(scores).all():
            lines.append(f"{np.sum(~np.isfinite(scores)):,} infinite, not drawn")
        if threshold is not None and len(scores):
            lines.append(f"{_percent(float(np.mean(scores > threshold)))} rejected")
        return lines

    top = 0.58 if title else 0.46
    height = top + 0.82 * len(rows) + 0.42
    left, right = 0.19, 0.985
    with _style():
        figure = _new_figure(7.2, height)
        scale = _score_scale(drawn, own)
        edges = _bin_edges(scale.forward(drawn), num_bins)
        panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
        figure.subplots_adjust(
            left=left, right=right, top=1 - top / height, bottom=0.42 / height, hspace=0.22
        )
        own_share = _shares(own, edges, scale)
        shares = {name: _shares(kept, edges, scale) for name, (kept, _) in rows.items()}
        highest = max([own_share.max(), *(share.max() for share in shares.values()), 1e-9])
        for row, (axes, (name, (kept, num_nans))) in enumerate(zip(panels, rows.items())):
            colour = _COLOURS[row % len(_COLOURS)]
            for share, tint in ((own_share, _OWN), (shares[name], colour)):
                axes.stairs(share, scale.backward(edges), fill=True, color=tint, alpha=0.3, lw=0)
                axes.stairs(share, scale.backward(edges), color=tint, lw=1.0)
            axes.set_xscale(scale.name, **scale.options)
            axes.set(ylim=(0, 1.12 * highest), yticks=[])
            axes.set_xlim(scale.backward(edges[0]), scale.backward(edges[-1]))
            axes.spines["left"].set_visible(False)
            if threshold is not None:
                axes.axvline(threshold, color=_INK, lw=1.0, ls=(0, (4, 2)))
            axes.tick_params(axis="x", which="both", length=3 if row == len(rows) - 1 else 0)
            place = {"transform": axes.transAxes, "ha": "right", "linespacing": 1.25}
            axes.text(
                -0.015,
                0.56,
                _wrapped(name, 20),
                va="bottom",
                color=_darker(colour),
                weight="bold",
                **place,
            )
            axes.text(
                -0.015,
                0.48,
                "\n".join(describe(kept, num_nans)),
                va="top",
                color=_SOFT,
                size=7,
                **place,
            )
        panels[-1].xaxis.set_major_formatter(_plain_formatter())
        if title:
            figure.text(0.012, 1 - 0.08 / height, printable(title), weight="bold", size=9, va="top")
        label = f"{own_name}, " + ", ".join(describe(own, own_nans))
        figure.text(
            right, 1 - 0.08 / height, label, color=_OWN, weight="bold", ha="right", va="top"
        )
        if threshold is not None:
            label = f"threshold {threshold:.4g}" + (f" (fnr {fnr:g})" if fnr is not None else "")
            low, high = edges[0], edges[-1]
            x = float(np.clip((scale.forward(threshold) - low) / (high - low), 0.0, 1.0))
            panels[0].annotate(
                label,
                (x, 1.0),
                xycoords="axes fraction",
                xytext=(0, 3),
                size=7.5,
                textcoords="offset points",
                annotation_clip=False,
                ha="right" if x > 0.85 else "left" if x < 0.15 else "center",
            )
        panels[-1].set_xlabel(
            f"score (higher: less likely {own_name}{scale.note}); height: share of the images"
        )
    return figure


def roc_curves(
    scores: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]],
    *,
    log_x: bool = True,
    fnr: float | None = None,
) -> "Figure":
    """ROC: one panel per rival, one curve per detector, with the area below it.

    Args:
      scores: for every detector a pair: scores of own images `[n]`, and scores `[m]` per rival.
      log_x: draw the share of rejected own images logarithmically, from 1 / n on. A curve begins
        at the left border with what is rejected while no own image is.
      fnr: a rate to mark.
    Raises:
      ValueError: without a detector or a rival.
    """
    names: list[str] = []
    for _, rivals in scores.values():
        names += [name for name in rivals if name not in names]
    if not names:
        raise ValueError("roc_curves needs at least one detector and one rival")
    owns = {detector: _without_nan(own) for detector, (own, _) in scores.items()}
    num_own = max(max(len(own) for own, _ in owns.values()), 2)
    first = 1.0 / num_own if log_x else 0.0
    num_rows = -(-len(names) // 3)
    num_columns = -(-len(names) // num_rows)
    left, right, bottom, gap = 0.72, 0.22, 0.5, 0.12
    side = min((7.2 - left - right - gap * (num_columns - 1)) / num_columns, 2.7)
    row_gap = 0.62
    width = max(left + num_columns * (side + gap) - gap + right, 4.6)
    legend_columns = _legend_columns([*scores, "chance", "fnr 0.5 %"], width - left)
    top = 0.54 + 0.19 * -(-(len(scores) + 2) // legend_columns)
    height = top + num_rows * (side + row_gap) - row_gap + bottom
    with _style():
        figure = _new_figure(width, height)
        handles: dict[str, Any] = {}
        num_nans = sum(count for _, count in owns.values())
        for k, name in enumerate(names):
            row, column = divmod(k, num_columns)
            x, y = left + column * (side + gap), top + row * (side + row_gap) + side
            axes = figure.add_axes((x / width, 1 - y / height, side / width, side / height))
            diagonal = np.geomspace(first, 1, 100) if log_x else np.linspace(0, 1, 2)
            (handles["chance"],) = axes.plot(diagonal, diagonal, color="#9aa5b1", lw=0.8, ls=":")
            if fnr is not None:
                handles[f"fnr {100 * fnr:g} %"] = axes.axvline(fnr, color="#9aa5b1", lw=0.8)
            for i, (detector, (_, rivals)) in enumerate(scores.items()):
                rival, count = _without_nan(rivals.get(name, np.zeros(0)))
                num_nans += count
                own = owns[detector][0]
                area, colour = "\u2013", (_OWN, *_COLOURS)[i % 7]
                if len(own) and len(rival):
                    curve, value = metrics.roc(own, rival), metrics.auc(own, rival)
                    own_rate, rival_rate = curve.own_rejected, curve.rival_rejected
                    area = _short(value)
                    (handles[detector],) = axes.step(
                        np.maximum(own_rate, first),
                        rival_rate,
                        where="post",
                        lw=1.6,
                        color=colour,
                        ls=_LINES[i % len(_LINES)],
                    )
                axes.annotate(
                    area,
                    (0, 1),
                    xycoords="axes fraction",
                    textcoords="offset points",
                    size=7.5,
                    xytext=(24 + 34 * i, 4),
                    color=_darker(colour),
                    annotation_clip=False,
                )
            axes.annotate(
                "AUC",
                (0, 1),
                xycoords="axes fraction",
                textcoords="offset points",
                size=7.5,
                xytext=(0, 4),
                color=_SOFT,
                annotation_clip=False,
            )
            axes.set_title(_wrapped(name, 40), pad=16)
            if log_x:
                axes.set_xscale("log")
                axes.minorticks_off()
            axes.xaxis.set_major_formatter(_percent_formatter())
            axes.yaxis.set_major_formatter(_percent_formatter())
            axes.set(xlim=(first, 1.0), ylim=(0, 1.015))
            axes.grid(True)
            if column:
                axes.tick_params(labelleft=False)
            else:
                axes.set_ylabel("rival's images rejected")
        middle = (left + (num_columns * (side + gap) - gap) / 2) / width
        note = ", logarithmic" if log_x else ""
        note += f"; {num_nans:,} NaN scores left out" if num_nans else ""
        figure.text(
            middle,
            0.1 / height,
            f"own images rejected (n = {num_own:,}{note})",
            color=_SOFT,
            ha="center",
        )
        order = [name for name in scores if name in handles]
        order += [name for name in handles if name not in scores]
        figure.legend(
            [handles[name] for name in order],
            [printable(name) for name in order],
            loc="upper left",
            ncols=legend_columns,
            bbox_to_anchor=(left / width - 0.01, 1.0),
            handlelength=2.2,
            columnspacing=1.4,
        )
    return figure


def accuracy_chart(
    accuracy: Mapping[str, Mapping[str, float]],
    *,
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    interval_name: str = "95 % interval",
    title: str | None = None,
) -> "Figure":
    """Accuracy per rival and detector as dots on one axis, with intervals if given.

    Args:
      accuracy: `accuracy[detector][rival]` in [0, 1].
      intervals: `(low, high)` in the same layout.
      interval_name: what the intervals are, for the label.
      title: above the chart.
    Raises:
      ValueError: without a detector or a rival.
    """
    if not accuracy or not any(accuracy.values()):
        raise ValueError("accuracy_chart needs at least one detector and one rival")
    names: list[str] = []
    for row in accuracy.values():
        names += [name for name in row if name not in names]
    step = 0.15
    band = max(0.42, step * len(accuracy) + 0.16)
    legend_columns = _legend_columns(list(accuracy), 5.6)
    above = 0.24 if title else 0.0
    top = 0.12 + 0.17 * -(-len(accuracy) // legend_columns) + above
    height = top + band * len(names) + 0.5
    with _style():
        figure = _new_figure(7.2, height)
        axes = figure.add_axes(
            (0.2, 0.48 / height, 0.78, band * len(names) / height), ylim=(len(names) * band, 0)
        )
        values = [v for row in accuracy.values() for v in row.values() if math.isfinite(v)]
        low = min([0.5, *values])
        axes.set_xlim(math.floor(low * 20 - 0.4) / 20, 1.008)
        axes.axvline(0.5, color="#9aa5b1", lw=0.8, ls=":")
        for i in range(1, len(names)):
            axes.axhline(i * band, color="#e9edf1", lw=0.8)
        for k, (detector, row) in enumerate(accuracy.items()):
            colour = (_OWN, *_COLOURS)[k % 7]
            places = (np.arange(len(names)) + 0.5) * band + (k - (len(accuracy) - 1) / 2) * step
            for place, name in zip(places, names):
                bounds = intervals and intervals.get(detector, {}).get(name)
                if bounds:
                    axes.plot(
                        bounds,
                        (place, place),
                        color=colour,
                        lw=1.6,
                        alpha=0.45,
                        solid_capstyle="round",
                    )
            axes.plot(
                [row.get(name, math.nan) for name in names],
                places,
                ls="none",
                ms=5.5,
                marker=_MARKERS[k % 6],
                color=colour,
                mec="white",
                mew=0.6,
                label=printable(detector),
                clip_on=False,
            )
        axes.set_yticks((np.arange(len(names)) + 0.5) * band, [_wrapped(n, 22) for n in names])
        axes.tick_params(axis="y", length=0, labelcolor=_INK, labelsize=8)
        axes.xaxis.set_major_formatter(_percent_formatter())
        axes.grid(True, axis="x")
        axes.spines["left"].set_visible(False)
        note = f"; lines: {interval_name}" if intervals else ""
        axes.set_xlabel(f"accuracy (mean of own accepted and rival rejected; 50 % is chance{note})")
        figure.legend(
            loc="upper left",
            bbox_to_anchor=(0.19, 1 - above / height),
            ncols=legend_columns,
            handletextpad=0.2,
            columnspacing=1.4,
            borderaxespad=0.4,
        )
        if title:
            figure.text(0.012, 1 - 0.08 / height, printable(title), weight="bold", size=9, va="top")
    return figure


def save_figure(figure: "Figure", path: str | os.PathLike) -> None:
    """Writes a figure as PNG; the file appears complete or not at all."""
    write_atomically(path, png(figure))


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """The look of this module, whatever the user's Matplotlib is set to, and only inside."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(cast(Any, _STYLE))
        yield


def _new_figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def png(figure: "Figure") -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    with _style():  # Software=None: no version in the file, the same run gives the same bytes
        figure.savefig(buffer, format="png", dpi=figure.dpi, metadata={"Software": None})
    return buffer.getvalue()


def _without_nan(scores: np.ndarray) -> tuple[np.ndarray, int]:
    scores = np.asarray(scores, np.float64).ravel()
    kept = scores[~np.isnan(scores)]
    return kept, len(scores) - len(kept)


class _Scale(NamedTuple):
    """A score axis: Matplotlib's name for it, and the transform in which bins are even."""

    name: str
    options: dict[str, float]
    note: str
    forward: Callable[[Any], Any]
    backward: Callable[[Any], Any]


def _score_scale(drawn: np.ndarray, own: np.ndarray) -> _Scale:
    linear = _Scale("linear", {}, "", lambda x: x, lambda t: t)
    if len(drawn) < 2:
        return linear
    low, high = float(drawn.min()), float(drawn.max())
    if low > 0 and high / low > 50:
        return _Scale("log", {}, ", logarithmic", np.log10, lambda t: 10.0**t)
    # Where the bulk of own scores is a fiftieth of the axis, it would be a needle.
    own = own[np.isfinite(own)]
    bulk = own if len(own) else drawn
    width = float(np.subtract(*np.quantile(bulk, [0.95, 0.05])))
    if high - low > 50 * width > 0:
        return _Scale(
            "asinh",
            {"linear_width": width},
            ", asinh scale",
            lambda x: np.arcsinh(np.asarray(x) / width),
            lambda t: width * np.sinh(t),
        )
    return linear


def _bin_edges(values: np.ndarray, num_bins: int) -> np.ndarray:
    """Even in the transform of the axis, with a margin, also around a single value."""
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    margin = 0.02 * (high - low) or 0.5
    return np.linspace(low - margin, high + margin, num_bins + 1)


def _shares(scores: np.ndarray, edges: np.ndarray, scale: _Scale) -> np.ndarray:
    values = scale.forward(scores[np.isfinite(scores)])
    return np.histogram(values, edges)[0] / max(len(scores), 1)


def _wrapped(name: str, width: int) -> str:
    return "\n".join(textwrap.wrap(printable(name), width, max_lines=3, placeholder=" ..."))


def _legend_columns(names: Sequence[str], width: float) -> int:
    """Columns of a legend `width` inches wide, filled evenly (7.5 point letters: 0.066 inches)."""
    widths = [0.48 + 0.066 * len(name) for name in names]
    if sum(widths) <= width:
        return len(names)
    most = max(1, int(width / max(widths)))
    return -(-len(names) // -(-len(names) // most))


def _darker(colour: str) -> str:
    """Text needs more contrast than an area does."""
    return "#" + "".join(f"{int(int(colour[i : i + 2], 16) * 0.8):02x}" for i in (1, 3, 5))


def _short(value: float) -> str:
    """0.9964 as 0.996, and 0.99996 as 1.000 only where it is 1."""
    text = f"{value:.3f}"
    return ">0.999" if text == "1.000" and value < 1 else text


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _percent_formatter() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{100 * value:g} %")


def _plain_formatter() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}".replace("-", "\u2212"))


def _max_n_locator(num: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(num)
