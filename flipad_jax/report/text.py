"""What a reader sees: text from outside made harmless, scores and p-values in one format."""

import html
import math
from typing import TypeGuard

__all__ = ["escape", "has_value", "p_value_text", "printable", "score_text"]


def printable(text: str) -> str:
    """Escapes what a terminal or a font would act on or choke on.

    Control characters, lone surrogates and the invisible marks that turn the direction of text come
    out as Python writes them: "\\n", "\\ud800", "\\u202e".
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def escape(text: str) -> str:
    """`printable` text for HTML, as content of an element or as a quoted attribute."""
    return html.escape(printable(text), quote=True)


def has_value(number: float | None) -> TypeGuard[float]:
    """Whether a score or p-value is there: neither None, nor NaN, nor infinite."""
    return number is not None and math.isfinite(number)


def score_text(score: float | None) -> str:
    """Four significant digits; a dash where there is no score."""
    return f"{score:.4g}" if has_value(score) else "\u2013"


def p_value_text(p_value: float | None) -> str:
    """Four decimals, or two significant digits of what is smaller; a dash where there is none."""
    if not has_value(p_value):
        return "\u2013"
    return f"{p_value:.4f}" if p_value >= 1e-3 else f"{p_value:.2g}"
