"""A gallery of judged images for the page: a card per image, sorted and filtered without a script.

Radio buttons and style rules do the sorting and the filtering, so that the page works from disk, in
a mail, and under a content policy that forbids scripts. Browsers that do not know the selector
`:has()` (all of them do since 2023) show every card in the given order, and no buttons.
"""

import base64
import dataclasses
import io
import math
import re
from typing import Callable, Literal, Sequence

import numpy as np
from PIL import Image

from flipad_jax.report.text import escape, has_value, p_value_text, score_text

__all__ = ["CSS", "Card", "Gallery", "departure_map", "gallery_html"]

Verdict = Literal["proved", "ours", "not_ours", "cannot_judge"]

# Verdict -> symbol and words: nobody has to tell colours apart.
_VERDICTS: dict[str, tuple[str, str]] = {
    "not_ours": ("\u2260", "not ours"),
    "ours": ("=", "ours"),
    "proved": ("\u2261", "proved"),
    "cannot_judge": ("?", "cannot judge"),
}
_SIDE = 128  # CSS pixels: small pictures are enlarged by a whole factor up to this
_MAX_SIDE = 256  # pixels: larger pictures are shrunk, so that a page of many stays readable
_NO_VALUE = (150, 150, 150)  # a grey: the colour map has none


@dataclasses.dataclass(frozen=True, eq=False)
class Card:
    """One judged image.

    Attributes:
      path: file name, as the verdicts name it.
      image: uint8 `[h, w, 1 or 3]`, or None where there is none to show (a broken file).
      verdict: "proved" (only where an image was regenerated), "ours", "not_ours" or
        "cannot_judge".
      score: higher = less likely ours; None or NaN where there is none.
      p_value: in [0, 1]; None or NaN where there is none.
      note: a reason or a warning, in one sentence.
      overlay: uint8 `[h', w', 3]`, shown beside the image at the same size (one of the image's own
        height: at its scale); see `departure_map`.
      overlay_text: what the overlay shows, in a few words (also its text for the blind).
    Raises:
      ValueError: for any other verdict, shape or dtype, or a p-value outside [0, 1].
    """

    path: str
    image: np.ndarray | None
    verdict: Verdict
    score: float | None
    p_value: float | None
    note: str = ""
    overlay: np.ndarray | None = None
    overlay_text: str = ""

    def __post_init__(self):
        if self.verdict not in _VERDICTS:
            raise ValueError(
                f"{self.path!r}: verdict {self.verdict!r}, expected one of {', '.join(_VERDICTS)}"
            )
        if has_value(self.p_value) and not 0 <= self.p_value <= 1:
            raise ValueError(f"{self.path!r}: p-value {self.p_value}, expected one in [0, 1]")
        for what, picture, channels in (
            ("image", self.image, (1, 3)),
            ("overlay", self.overlay, (3,)),
        ):
            if picture is not None and not (
                isinstance(picture, np.ndarray)
                and picture.dtype == np.uint8
                and picture.ndim == 3
                and picture.shape[-1] in channels
                and picture.size
            ):
                got = f"{getattr(picture, 'dtype', type(picture).__name__)} {np.shape(picture)}"
                raise ValueError(
                    f"{self.path!r}: expected a uint8 {what} "
                    f"[h, w, {' or '.join(map(str, channels))}], got {got}"
                )


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Cards in a grid, which the reader sorts by score, p-value or name and filters by verdict.

    Attributes:
      cards: in the order in which they are shown at first.
      caption: what is shown, in a sentence.
      vmax: where overlays come from `departure_map`, its `vmax`: the scale of colours is drawn.
    """

    cards: Sequence[Card]
    caption: str
    vmax: float | None = None


def departure_map(
    departure: np.ndarray, *, image_size: tuple[int, int] | None = None, vmax: float
) -> np.ndarray:
    """Where, and how far, the inverted activation of one image departs from that of own images.

    All maps of one `vmax` share their colours (perceptually uniform, dark = 0), so that images can
    be compared.

    Args:
      departure: `[h', w']` at least 0, in units of what is usual: root mean square over channels of
        (z - mean of own) / (standard deviation of own); 1 = as own images do. NaN is drawn grey.
      image_size: (h, w) of the image, at least (h', w'): every place becomes a block of pixels
        (nearest neighbour). None: a pixel per place.
      vmax: the value, above 1, from which on all have the last colour.
    Returns:
      uint8 `[h, w, 3]`.
    Raises:
      ValueError: if the map has another shape, no places, negative values, or does not fit.
    """
    from matplotlib import colormaps

    departure = np.asarray(departure, np.float64)
    if departure.ndim != 2 or not departure.size:
        raise ValueError(f"departure has shape {departure.shape}, expected [h, w], not empty")
    if (departure < 0).any():
        raise ValueError(f"departure goes down to {np.nanmin(departure):.4g}, expected 0 or more")
    if not 1 < vmax < math.inf:
        raise ValueError(f"vmax={vmax}, expected a finite number above 1 (as own images do)")
    rows, columns = departure.shape
    h, w = image_size or departure.shape
    if h < rows or w < columns:
        raise ValueError(f"a map of {rows} x {columns} places does not fit an image of {h} x {w}")
    # The place below the middle of each pixel.
    up = (2 * np.arange(h) + 1) * rows // (2 * h)
    across = (2 * np.arange(w) + 1) * columns // (2 * w)
    departure = departure[np.ix_(up, across)]
    unknown = np.isnan(departure)
    shares = np.where(unknown, 0.0, np.minimum(departure, vmax) / vmax)
    colours = colormaps["magma"](shares, bytes=True)[..., :3]
    return np.where(unknown[..., None], np.asarray(_NO_VALUE, np.uint8), colours)


def gallery_html(gallery: Gallery, name: str) -> str:
    """The gallery as HTML; `CSS` makes it work.

    Args:
      gallery: what to show.
      name: letters and digits that no other gallery of the page has.
    """
    cards = gallery.cards
    orders = [
        ("score", "highest score", _ranks(cards, lambda c: _number_key(c.score, -1))),
        (
            "p",
            "smallest p-value",
            _ranks(cards, lambda c: (_number_key(c.p_value, 1), _number_key(c.score, -1))),
        ),
        ("name", "file name", _ranks(cards, lambda c: _natural(c.path))),
    ]
    parts = [f'<figure class="gallery"><figcaption>{escape(gallery.caption)}</figcaption>']
    counts = {verdict: sum(c.verdict == verdict for c in cards) for verdict in _VERDICTS}
    found = {verdict: count for verdict, count in counts.items() if count}
    fields, states = [], []
    if len(cards) > 1:
        choices = [("by-given", "as given")] + [(f"by-{key}", what) for key, what, _ in orders]
        fields.append(_radios(f"{name}order", "Order", choices))
        states += [(f"by-{key}", f"Ordered by {what}.") for key, what, _ in orders]
    if len(found) > 1:
        choices = [("only-all", f"all {len(cards):,}")]
        for verdict, count in found.items():
            symbol, words = _VERDICTS[verdict]
            choices.append((f"only-{verdict}", f"{symbol} {words} {count:,}"))
            only = f"Only \u201c{words}\u201d is shown: {count:,} of {len(cards):,} images."
            states.append((f"only-{verdict}", only))
        fields.append(_radios(f"{name}show", "Show", choices))
    if fields:
        parts.append(f'<div class="controls">{"".join(fields)}</div>')
        said = " ".join(f'<span class="if-{key}">{escape(text)}</span>' for key, text in states)
        parts.append(f'<p class="state">{said}</p>')
    if gallery.vmax is not None:
        parts.append(_scale_html(gallery.vmax))
    parts.append('<ul class="cards" role="list">')
    for i, card in enumerate(cards):
        style = ";".join(f"--by-{key}:{ranks[i]}" for key, _, ranks in orders)
        parts.append(_card_html(card, style))
    parts.append("</ul></figure>")
    return "\n".join(parts)


def _radios(name: str, legend: str, choices: Sequence[tuple[str, str]]) -> str:
    # autocomplete: a browser that remembers a choice over a reload would hide cards unasked.
    labels = [
        f'<label><input type="radio" name="{name}" class="{key}" autocomplete="off"'
        f"{'' if i else ' checked'}><span>{escape(text)}</span></label>"
        for i, (key, text) in enumerate(choices)
    ]
    return f"<fieldset><legend>{escape(legend)}</legend>{''.join(labels)}</fieldset>"


def _scale_html(vmax: float) -> str:
    bar = _png_uri(departure_map(np.linspace(0.0, vmax, 256)[None], vmax=vmax))
    grey = "#" + "".join(f"{value:02x}" for value in _NO_VALUE)
    return (
        '<div class="scale"><p>Right picture of a pair: how far the inverted activation departs '
        "from that of own images, place by place. 1 (the mark): as own images do.</p>"
        f'<div class="bar"><span>0</span><span class="ramp"><img alt="dark to light" src="{bar}">'
        f'<i style="left:{100 / vmax:.2f}%"></i></span><span>{vmax:g} or more</span>'
        f'<span class="grey"><b style="background:{grey}"></b>no value</span></div></div>'
    )


def _card_html(card: Card, style: str) -> str:
    symbol, words = _VERDICTS[card.verdict]
    note = card.note
    if card.image is None:
        size = (_SIDE, _SIDE)
        shown = '<div class="nothing">no picture</div>'
        note = note or "There is no picture of this file."
    else:
        h, w = card.image.shape[:2]
        factor = -(-max(h, w) // _MAX_SIDE)
        zoom = max(1, _SIDE // max(h, w))
        size = (h * zoom // factor or 1, w * zoom // factor or 1)
        shown = _picture_html(card.image, size, f"the image {card.path}")
        small = f", shown at 1/{factor}" if factor > 1 else ""
        shown += f"<small>{w} \u00d7 {h}{small}</small>"
    pictures = f"<div>{shown}</div>"
    if card.overlay is not None:
        text = escape(card.overlay_text or "departure")
        rows, columns = card.overlay.shape[:2]
        # A map of any size covers the image; pictures of its own height stand at its scale.
        own_scale = card.image is not None and rows == card.image.shape[0]
        wide = (size[0], round(size[0] * columns / rows)) if own_scale else size
        overlay = _picture_html(card.overlay, wide, card.overlay_text or "map of the departure")
        pictures += f"<div>{overlay}<small>{text}</small></div>"
    *folders, file = card.path.split("/")
    # Isolated part by part, left to right: a right-to-left name changes places with nothing.
    path = "".join(f'<bdi dir="ltr">{escape(part)}</bdi>/<wbr>' for part in folders)
    path = f'<span class="folder">{path}</span>' if folders else ""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<li class="card {card.verdict}" style="{style}"><div class="pictures">{pictures}</div>'
        f'<div class="said"><p class="verdict"><span aria-hidden="true">{escape(symbol)}</span> '
        f'{words}</p><p class="file">{path}<bdi dir="ltr">{escape(file)}</bdi></p>'
        f"<dl><div><dt>score</dt><dd>{score_text(card.score)}</dd></div>"
        f"<div><dt>p-value</dt><dd>{p_value_text(card.p_value)}</dd></div></dl>{said}</div></li>"
    )


def _picture_html(pixels: np.ndarray, size: tuple[int, int], alt: str) -> str:
    height, width = size
    pixelated = ' class="pixels"' if max(pixels.shape[:2]) <= _SIDE else ""
    return (
        f'<img{pixelated} alt="{escape(alt)}" width="{width}" height="{height}" '
        f'src="{_png_uri(pixels)}">'
    )


def _png_uri(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    factor = -(-max(image.size) // _MAX_SIDE)
    if factor > 1:
        image = image.reduce(factor)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# --- order ------------------------------------------------------------------------------------


def _ranks(cards: Sequence[Card], key: Callable[[Card], object]) -> list[int]:
    """Place of every card if sorted; equal ones keep the given order."""
    order = sorted(range(len(cards)), key=lambda i: (key(cards[i]), i))  # type: ignore[arg-type]
    ranks = [0] * len(cards)
    for rank, i in enumerate(order):
        ranks[i] = rank
    return ranks


def _number_key(value: float | None, sign: int) -> tuple[bool, float]:
    """What is no number comes last, whichever way numbers are sorted."""
    return (False, sign * float(value)) if has_value(value) else (True, 0.0)


def _natural(path: str) -> list[str | int]:
    """2.png before 10.png. Texts and numbers take turns, so that like is compared with like."""
    return [int(p) if i % 2 else p for i, p in enumerate(re.split("([0-9]+)", path))]


CSS = """
body:has(.gallery) { max-width: 72rem; }
.gallery { margin: 0; }
.gallery > figcaption { margin: 0 0 1rem; }
.controls { display: none; flex-wrap: wrap; gap: .7rem 2rem; margin: 0 0 1rem; }
@supports selector(:has(*)) { .controls { display: flex; } }
.controls fieldset { border: 0; margin: 0; padding: 0; min-width: 0; display: flex;
  flex-wrap: wrap; gap: .35rem; align-items: center; }
.controls legend { float: left; padding: 0 .4rem 0 0; color: var(--soft); font-size: .9rem; }
.controls label { position: relative; }
.controls input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: pointer; }
.controls label span { display: block; padding: .2rem .7rem; border: 1px solid var(--line);
  border-radius: 99px; font-size: .9rem; line-height: 1.5; }
.controls input:hover + span { border-color: var(--accent); }
.controls input:checked + span { background: var(--accent); border-color: var(--accent);
  color: var(--card); }
.controls input:focus-visible + span { outline: 3px solid var(--ink); outline-offset: 2px; }
.state { display: none; color: var(--soft); font-size: .9rem; }
.state span { display: none; }
.scale { margin: 0 0 1.2rem; color: var(--soft); font-size: .9rem; }
.scale p { margin: 0 0 .3rem; }
.bar { display: flex; flex-wrap: wrap; align-items: center; gap: .2rem .6rem; }
.ramp { position: relative; flex: 1 1 8rem; max-width: 18rem; }
.ramp img { width: 100%; height: .8rem; border-radius: 3px; }
.ramp i { position: absolute; top: -.2rem; bottom: -.2rem; width: 2px; margin-left: -1px;
  background: var(--ink); }
.grey { white-space: nowrap; margin-left: .6rem; }
.grey b { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px;
  margin-right: .4rem; vertical-align: -.08rem; }
.cards { list-style: none; margin: 0; padding: 0; display: grid; gap: .9rem; align-items: stretch;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 18.4rem), 1fr));
  reading-flow: grid-order; }
.card { --tint: var(--soft); border: 1px solid var(--line); border-left: 4px solid var(--tint);
  border-radius: 8px; padding: .75rem; min-width: 0; break-inside: avoid; }
.card.ours, .card.proved { --tint: var(--accent); }
.card.not_ours { --tint: var(--warn); }
.pictures { display: flex; gap: .6rem; margin: 0 0 .6rem; }
.pictures > div { flex: 0 1 auto; min-width: 0; }
.pictures img { border-radius: 4px; margin: 0; }
.pictures small { display: block; color: var(--soft); font-size: .78rem; line-height: 1.35;
  margin-top: .2rem; max-width: 8rem; }
.pixels { image-rendering: pixelated; }
.nothing { width: 8rem; height: 8rem; max-width: 100%; display: grid; place-items: center;
  border: 1px dashed var(--soft); border-radius: 4px; color: var(--soft); font-size: .85rem; }
.said p { margin: 0; }
.said .verdict { color: var(--tint); font-weight: 650; }
.said .file { font-size: .9rem; line-height: 1.4; overflow-wrap: anywhere; }
.folder { color: var(--soft); }
.said dl { display: flex; flex-wrap: wrap; gap: 0 1.1rem; margin: .15rem 0 0; font-size: .9rem; }
.said dl div { display: flex; gap: .4rem; }
.said dt { color: var(--soft); }
.said dd { margin: 0; font-variant-numeric: tabular-nums; }
.said .note { color: var(--soft); font-size: .85rem; line-height: 1.4; margin-top: .3rem;
  overflow-wrap: anywhere; }
.gallery:has(.by-score:checked) .card { order: var(--by-score); }
.gallery:has(.by-p:checked) .card { order: var(--by-p); }
.gallery:has(.by-name:checked) .card { order: var(--by-name); }
.gallery:has(.only-ours:checked) .card:not(.ours),
.gallery:has(.only-proved:checked) .card:not(.proved),
.gallery:has(.only-not_ours:checked) .card:not(.not_ours),
.gallery:has(.only-cannot_judge:checked) .card:not(.cannot_judge) { display: none; }
.gallery:has(.by-score:checked) .if-by-score, .gallery:has(.by-p:checked) .if-by-p,
.gallery:has(.by-name:checked) .if-by-name, .gallery:has(.only-ours:checked) .if-only-ours,
.gallery:has(.only-proved:checked) .if-only-proved,
.gallery:has(.only-not_ours:checked) .if-only-not_ours,
.gallery:has(.only-cannot_judge:checked) .if-only-cannot_judge { display: inline; }
@media print { .gallery { break-inside: auto; } .gallery .controls { display: none; }
  .state { display: block; } .scale { break-after: avoid; }
  .cards { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .6rem; }
  .card, .ramp, .ramp i, .grey b { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
