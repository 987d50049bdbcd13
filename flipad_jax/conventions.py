"""The two conventions: where the papers' text and their published code disagree, a name decides.

"paper" is the text, "reference" the published code. Which numbers that changes is said where they
are: `generators` (recipes of LSGAN and EBGAN), `detection.features`, `detection.fingerprint`.
"""

__all__ = ["CONVENTIONS", "check"]

CONVENTIONS = ("paper", "reference")


def check(convention: str) -> None:
    """Refuse any other word.

    Raises:
      ValueError: if it is neither "paper" nor "reference".
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r}: expected one of {', '.join(CONVENTIONS)}")
