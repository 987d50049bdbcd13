"""Prints the oldest versions that setup.cfg admits, `name==bound` a line, as constraints for pip.

    python .ci/oldest.py >oldest.txt
    pip install --constraint oldest.txt --editable '.[test]'

Extras are named as arguments; without one, those of the package itself and of "test".
"""

import configparser
import re
import sys
from pathlib import Path


def pins(setup_cfg: str, extras: list[str]) -> list[str]:
    """The lower bound of every requirement, as a pin.

    Args:
      setup_cfg: the text of the file.
      extras: names of extras whose requirements are pinned beside those of the package.
    Returns:
      `name==bound`, sorted.
    Raises:
      ValueError: for a requirement without a lower bound.
    """
    parser = configparser.ConfigParser()
    parser.read_string(setup_cfg)
    text = parser["options"]["install_requires"]
    for extra in extras:
        text += parser["options.extras_require"][extra]
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        match = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\d.]+)", line)
        if match is None:
            raise ValueError(f"setup.cfg: {line!r} is not of the form name>=bound")
        found.append(f"{match[1]}=={match[2]}")
    return sorted(found, key=str.casefold)


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    print("\n".join(pins((root / "setup.cfg").read_text(), sys.argv[1:] or ["test"])))
