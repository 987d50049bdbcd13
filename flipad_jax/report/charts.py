"""Charts of keys and keyed models: points, histograms, matrices; in the look of `figures`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flipad_jax.report import figures
from flipad_jax.report.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Panel", "histograms", "matrix_map", "scatter_panels", "signed_pictures"]

_COLUMNS = 3
_WIDTH, _HEIGHT = 2.4, 2.0  # of a panel, inches


class Panel(NamedTuple):
    """One coordinate system of `scatter_panels`.

    Attributes:
      title: above it.
      x_label, y_label: of the axes.
      points: `(x, y)` by series.
      diagonal: whether to draw y = x.
      level: a horizontal line, if any.
    """

    title: str
    x_label: str
    y_label: str
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    diagonal: bool = False
    level: float | None = None


def _grid(count: int) -> "tuple[Figure, list]":
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure = figures._new_figure(columns * _WIDTH, rows * _HEIGHT)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def scatter_panels(panels: Sequence[Panel]) -> "Figure":
    """Points of several series, a panel per question, up to three side by side.

    Points that are not finite are left out.

    Raises:
      ValueError: without a panel.
    """
    if not panels:
        raise ValueError("scatter_panels needs at least one panel")
    with figures._style():
        figure, all_axes = _grid(len(panels))
        for axes, panel in zip(all_axes, panels):
            shown = []
            for k, (name, (x, y)) in enumerate(panel.points.items()):
                place = np.stack([np.asarray(x, float), np.asarray(y, float)])
                place = place[:, np.isfinite(place).all(axis=0)]
                colour = (figures._OWN, *figures._COLOURS)[k % 7]
                axes.plot(
                    *place,
                    ls="none",
                    marker=figures._MARKERS[k % 6],
                    ms=3.2,
                    color=colour,
                    alpha=0.8,
                    mec="white",
                    mew=0.3,
                    label=printable(name),
                )
                shown += place.ravel().tolist()
            if panel.diagonal and shown:
                ends = (min(shown), max(shown))
                axes.plot(ends, ends, color=figures._SOFT, lw=0.8, ls=":")
            if panel.level is not None:
                axes.axhline(panel.level, color=figures._SOFT, lw=0.8, ls=":")
            axes.set_title(printable(panel.title))
            axes.set_xlabel(panel.x_label)
            axes.set_ylabel(panel.y_label)
            axes.grid(True)
            if len(panel.points) > 1:
                axes.legend(handletextpad=0.1, borderaxespad=0.2)
        figure.tight_layout(pad=0.6)
    return figure


def histograms(values: Mapping[str, np.ndarray], x_label: str) -> "Figure":
    """A histogram per name, side by side, each on a range of its own; the y axis counts.

    Raises:
      ValueError: without values.
    """
    if not values:
        raise ValueError("histograms needs at least one set of values")
    finite = {name: np.asarray(v, float).ravel() for name, v in values.items()}
    finite = {name: v[np.isfinite(v)] for name, v in finite.items()}
    with figures._style():
        figure, all_axes = _grid(len(finite))
        for axes, (name, v) in zip(all_axes, finite.items()):
            axes.hist(v, bins=40, color=figures._OWN)
            axes.set_title(printable(name))
            axes.set_xlabel(x_label)
            axes.grid(True, axis="y")
        figure.tight_layout(pad=0.6)
    return figure


def matrix_map(
    matrix: np.ndarray, names: Sequence[str], title: str, *, smallest: float = 0.0
) -> "Figure":
    """A square matrix with its names; blue below zero, red above, white at zero.

    Args:
      matrix: `[n, n]`; NaN stays grey.
      names: n of them; left out where there are more than 30.
      title: above it.
      smallest: the scale of colours reaches this far at least, so that rounding errors stay white.
    Raises:
      ValueError: for another number of names.
    """
    matrix = np.asarray(matrix, float)
    if matrix.shape != (len(names),) * 2:
        raise ValueError(f"matrix {matrix.shape} has {len(names)} names")
    side = min(1.6 + 0.24 * len(names), 6.0)
    most = float(np.nanmax(np.abs(matrix), initial=max(smallest, 1e-12)))
    with figures._style():
        figure = figures._new_figure(side + 1.2, side + 0.4)
        axes = figure.subplots()
        axes.set_facecolor(figures._FAINT)
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
        axes.set_title(printable(title))
        if len(names) <= 30:
            shown = [printable(name) for name in names]
            axes.set_xticks(range(len(names)), shown, rotation=90)
            axes.set_yticks(range(len(names)), shown)
        figure.colorbar(image, ax=axes, shrink=0.8)
        figure.tight_layout(pad=0.6)
    return figure


def signed_pictures(vectors: np.ndarray) -> np.ndarray:
    """Keys as pictures: zero is mid grey, the largest entry of each black or white.

    Args:
      vectors: float `[n, h, w, 1 or 3]`.
    Returns:
      uint8, the same shape, for `image_grid`.
    """
    vectors = np.asarray(vectors, np.float64)
    most = np.abs(vectors).reshape(len(vectors), -1).max(axis=1)
    scaled = vectors / np.where(most > 0, most, 1)[:, None, None, None]
    return np.round(127.5 + 127.5 * scaled).astype(np.uint8)
