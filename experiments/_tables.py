"""Cells made into tables and charts: mean over repeats and the half-width of its 95 % interval (t).

Columns are `{shown name: values over repeats}`, the last one the average over the others; a table
is `{row: columns}`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments._generators import FAMILY_NAMES
from flipad_jax import metrics, report

__all__ = [
    "best",
    "chart",
    "columns_by_family",
    "mean_table",
    "mean_text",
    "text_table",
    "with_average",
]


def columns_by_family(cells: Any, method: str, key: str) -> dict[str, list[float]]:
    """`cells[method][family]` is a list of repeats: their values of `key`, by shown name of every
    family, and of the average over families."""
    columns = {
        FAMILY_NAMES[family]: [repeat[key] for repeat in repeats]
        for family, repeats in cells[method].items()
    }
    return with_average(columns)


def with_average(columns: dict[str, list[float]]) -> dict[str, list[float]]:
    """Columns of repeats, and one more: the mean over columns of every repeat."""
    return {**columns, "average": np.mean(list(columns.values()), axis=0).tolist()}


def chart(columns: Mapping[str, Mapping[str, Sequence[float]]], what: str) -> Any:
    """Accuracy by column, a row of dots per method (shown name), lines from the smallest to the
    largest of `what` (repeats, seeds)."""
    accuracy, intervals = {}, {}
    for method, by_name in columns.items():
        accuracy[method] = {name: float(np.mean(values)) for name, values in by_name.items()}
        intervals[method] = {name: (min(values), max(values)) for name, values in by_name.items()}
    return report.accuracy_chart(accuracy, intervals=intervals, interval_name=f"range of {what}")


def best(columns: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The method with the best average, and the average."""
    means = {method: float(np.mean(by_name["average"])) for method, by_name in columns.items()}
    method = max(means, key=lambda name: means[name])
    return f"{method}, {100 * means[method]:.1f} %"


def text_table(title: str, columns: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """`mean_table` for the terminal."""
    header = list(next(iter(columns.values())))
    table = mean_table(title, header, columns)
    return report.table_text(table.header, table.rows)


def mean_text(values: Sequence[float]) -> str:
    """Percent with the half-width of the 95 % interval of the mean: "97.3 ± 1.2"."""
    mean, half_width = metrics.mean_interval(values)
    text = f"{100 * mean:.1f}"
    return text if half_width is None else f"{text} ± {100 * half_width:.1f}"


def mean_table(
    title: str,
    header: Sequence[str],
    cells: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    caption: str | None = None,
) -> report.Table:
    """Rows by shown name, columns by name: mean and interval over repeats of every cell."""
    rows = [
        [name, *(mean_text(columns[column]) if column in columns else None for column in header)]
        for name, columns in cells.items()
    ]
    return report.Table([title, *header], rows, caption=caption)
