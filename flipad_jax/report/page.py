"""Tables, and one self-contained HTML page of text, tables, figures and galleries.

The page has no script and not a single outside resource, so that it can be mailed or archived.
Whatever comes from outside (file names, source names) is escaped.
"""

import base64
import dataclasses
import math
import numbers
import os
from typing import TYPE_CHECKING, Any, Literal, Mapping, Sequence

import numpy as np

from flipad_jax.files import write_atomically
from flipad_jax.report import figures, gallery
from flipad_jax.report.gallery import Gallery
from flipad_jax.report.text import escape, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "KeyNumbers",
    "Picture",
    "Section",
    "Table",
    "page_html",
    "table_text",
    "write_page",
]

# --- tables -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Table:
    """A table for the page or the terminal.

    Attributes:
      header: names of the columns.
      rows: cells: text, numbers, or None (drawn as a dash).
      formats: format specification per column name, as ".1%" or ".3f"; floats without one get
        four significant digits.
      best: per column name "max" or "min": that value is marked (all of them, if several look
        alike).
      caption: a line below the table.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    formats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    best: Mapping[str, Literal["max", "min"]] = dataclasses.field(default_factory=dict)
    caption: str | None = None

    def __post_init__(self):
        for i, row in enumerate(self.rows):
            if len(row) != len(self.header):
                raise ValueError(f"row {i} has {len(row)} cells, the header has {len(self.header)}")
        for name in (*self.formats, *self.best):
            if name not in self.header:
                raise ValueError(f"no column {name!r}; there are {', '.join(self.header)}")
        if not set(self.best.values()) <= {"max", "min"}:
            raise ValueError(f'best is "max" or "min" per column, got {dict(self.best)}')


def table_text(
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    formats: Mapping[str, str] | None = None,
    best: Mapping[str, Literal["max", "min"]] | None = None,
) -> str:
    """The same table for a terminal: columns aligned, numbers to the right, best marked by *.

    Arguments as in `Table`. Control characters in cells are shown as escapes, so that a file name
    cannot steer the terminal.
    """
    table = Table(header, rows, formats or {}, best or {})
    cells, numeric, marked = _rendered(table)
    starred = [column in table.best for column in table.header]
    texts = [[printable(name) for name in table.header]]
    texts += [
        [cell + ("*" if mark else "") for cell, mark in zip(*row)] for row in zip(cells, marked)
    ]
    # In a column with a mark, cells without it leave its place free: digits stay below digits.
    for row, marks in zip(texts[1:], marked):
        for j, mark in enumerate(marks):
            if starred[j] and not mark:
                row[j] += " "
    if any(starred):
        texts[0] = [name + (" " if s else "") for name, s in zip(texts[0], starred)]
    widths = [max(len(row[j]) for row in texts) for j in range(len(table.header))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric)
        ).rstrip()
        for row in texts
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _rendered(table: Table) -> tuple[list[list[str]], list[bool], list[list[bool]]]:
    """Cells as text, which columns are numeric, and which cells are the best of their column."""
    columns = [[row[j] for row in table.rows] for j in range(len(table.header))]
    numeric = [
        any(_is_number(v) for v in column) and all(v is None or _is_number(v) for v in column)
        for column in columns
    ]
    texts, marks = [], []
    for name, column in zip(table.header, columns):
        cells = [_cell(value, table.formats.get(name)) for value in column]
        texts.append(cells)
        finite = [(v, c) for v, c in zip(column, cells) if _is_number(v) and math.isfinite(v)]
        winner = None
        if name in table.best and finite:
            winner = (max if table.best[name] == "max" else min)(finite, key=lambda pair: pair[0])[
                1
            ]
        marks.append([winner is not None and cell == winner for cell in cells])
    return [list(row) for row in zip(*texts)], numeric, [list(row) for row in zip(*marks)]


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def _cell(value: Any, spec: str | None) -> str:
    if value is None:
        return "\u2013"
    if _is_number(value):
        if not math.isfinite(value):
            return str(float(value))
        if spec is None:
            spec = "" if isinstance(value, numbers.Integral) else ".4g"
        return format(value if isinstance(value, int) else np.asarray(value).item(), spec)
    return printable(str(value))


# --- the page ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure on the page, with what it shows in a sentence (also its text for the blind)."""

    figure: "Figure"
    caption: str


@dataclasses.dataclass(frozen=True)
class KeyNumbers:
    """The few numbers a reader came for.

    Attributes:
      numbers: (value as text, what it is).
      hints: how to read each of them, in a sentence or two; none, or one per number.
    """

    numbers: Sequence[tuple[str, str]]
    hints: Sequence[str] = ()

    def __post_init__(self):
        if self.hints and len(self.hints) != len(self.numbers):
            raise ValueError(f"{len(self.numbers)} numbers have {len(self.hints)} hints")


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, and below it in order: paragraphs (plain text), tables, figures, key numbers,
    galleries."""

    heading: str
    blocks: Sequence["str | Table | Picture | KeyNumbers | Gallery"]


def page_html(
    title: str, sections: Sequence[Section], *, lead: str | None = None, footer: str | None = None
) -> str:
    """The page as text: no script, no outside resource (a content policy forbids both).

    Args:
      title: of the page.
      sections: in order.
      lead: one paragraph below the title.
      footer: small print at the end: how the page was made.
    """
    body = [f"<header><h1>{escape(title)}</h1>"]
    if lead:
        body.append(f'<p class="lead">{escape(lead)}</p>')
    body.append("</header>")
    if len(sections) > 2:
        links = [
            f'<li><a href="#s{i}">{escape(section.heading)}</a></li>'
            for i, section in enumerate(sections)
        ]
        body.append(f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>')
    body.append("<main>")
    for i, section in enumerate(sections):
        body.append(f'<section id="s{i}"><h2>{escape(section.heading)}</h2>')
        body += [_block_html(block, f"g{i}x{j}") for j, block in enumerate(section.blocks)]
        body.append("</section>")
    body.append("</main>")
    if footer:
        body.append(f"<footer>{escape(footer)}</footer>")
    shows_cards = any(isinstance(block, Gallery) for s in sections for block in s.blocks)
    style = _CSS + gallery.CSS if shows_cards else _CSS
    return _PAGE.format(title=escape(title), style=style, body="\n".join(body))


def write_page(
    path: str | os.PathLike,
    title: str,
    sections: Sequence[Section],
    *,
    lead: str | None = None,
    footer: str | None = None,
) -> None:
    """Writes `page_html` to a file, which appears complete or not at all."""
    text = page_html(title, sections, lead=lead, footer=footer)
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def _block_html(block: "str | Table | Picture | KeyNumbers | Gallery", name: str) -> str:
    """One block; `name` is one that no other block of the page has."""
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>"
    if isinstance(block, Table):
        return _table_html(block)
    if isinstance(block, KeyNumbers):
        hints = [f'<dd class="hint">{escape(hint)}</dd>' for hint in block.hints]
        items = "".join(
            f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd>{hint}</div>"
            for (value, what), hint in zip(block.numbers, hints or [""] * len(block.numbers))
        )
        return f'<dl class="numbers{" hinted" if hints else ""}">{items}</dl>'
    if isinstance(block, Picture):
        png = base64.b64encode(figures.png(block.figure)).decode("ascii")
        width, height = (round(inches * 110) for inches in block.figure.get_size_inches())
        caption = escape(block.caption)
        return (
            f'<figure><div class="plate"><img alt="{caption}" width="{width}" height="{height}" '
            f'src="data:image/png;base64,{png}"></div><figcaption>{caption}</figcaption></figure>'
        )
    if isinstance(block, Gallery):
        return gallery.gallery_html(block, name)
    raise ValueError(
        f"a section holds text, Table, Picture, KeyNumbers or Gallery, got {type(block).__name__}"
    )


def _table_html(table: Table) -> str:
    cells, numeric, marked = _rendered(table)
    kinds = [' class="num"' if is_number else "" for is_number in numeric]
    head = "".join(
        # Long names of models may break, or the last columns end beyond the page.
        f'<th scope="col"{kind}>{escape(name).replace("_", "_<wbr>")}</th>'
        for name, kind in zip(table.header, kinds)
    )
    rows = []
    for row, marks in zip(cells, marked):
        tags = []
        for cell, mark, kind in zip(row, marks, kinds):
            text = f"<strong>{escape(cell)}</strong>" if mark else escape(cell)
            tags.append(f"<td{kind}>{text}</td>")
        rows.append(f"<tr>{''.join(tags)}</tr>")
    caption = f"<figcaption>{escape(table.caption)}</figcaption>" if table.caption else ""
    return (
        f'<figure class="table"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{caption}</figure>"
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_CSS = """
:root { --page: #f7f8fa; --card: #fff; --ink: #1f2933; --soft: #5f6c7b; --line: #e1e6eb;
  --accent: #005a8f; --warn: #a63c00; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --card: #1c2229; --ink: #e6e9ed; --soft: #9aa7b5; --line: #313a44;
    --accent: #7cc4f2; --warn: #ff9e5e; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 58rem; background: var(--page);
  color: var(--ink); font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: clamp(1.6rem, 5vw, 2.2rem); line-height: 1.2; margin: 0 0 .6rem;
  letter-spacing: -.015em; text-wrap: balance; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 .8rem; letter-spacing: -.01em; }
p { margin: 0 0 1rem; max-width: 44rem; }
.lead { font-size: 1.1rem; color: var(--soft); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 1rem 0 2rem;
  padding: 0; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; }
a:hover, a:focus { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.5rem; margin: 0 0 1.25rem; }
section > :last-child { margin-bottom: 0; }
figure { margin: 0 0 1.5rem; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .5rem; max-width: 44rem; }
.plate { background: #fff; border-radius: 8px; padding: .5rem; overflow-x: auto; }
@media (prefers-color-scheme: dark) { .plate { background: #fff; filter: brightness(.93); } }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 100%; font-size: .94rem; }
th, td { padding: .45rem .8rem; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: baseline; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
th:first-child, td:first-child { padding-left: 0; min-width: 5.5rem; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.num { white-space: normal; }
strong { color: var(--accent); }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
  gap: 1.2rem; margin: 0 0 1.5rem; }
.numbers div { display: flex; flex-direction: column; }
.numbers dd { margin: 0; font-size: 1.9rem; font-weight: 650; line-height: 1.2;
  letter-spacing: -.02em; font-variant-numeric: tabular-nums; color: var(--accent); }
.numbers dt { order: 1; color: var(--soft); font-size: .9rem; line-height: 1.4; }
.hinted dt { color: var(--ink); font-weight: 650; }
.numbers .hint { order: 2; color: var(--soft); font-size: .85rem; font-weight: 400;
  line-height: 1.45; letter-spacing: 0; margin-top: .2rem; }
footer { color: var(--soft); font-size: .85rem; padding: .5rem 0; }
@media (max-width: 34rem) { body { padding: 1.5rem .75rem 3rem; } section { padding: 1rem; }
  .plate img { max-width: 36rem; } }
@media print { body { max-width: none; background: #fff; } section { border: 0; padding: 0; }
  nav { display: none; } figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll, .plate { overflow: visible; } td { overflow-wrap: anywhere; } }
"""
