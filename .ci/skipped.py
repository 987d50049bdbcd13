"""The tests that a run skipped for want of a module, as arguments for pytest, each ended by NUL.

    pytest --junitxml=tests.xml; python .ci/skipped.py tests.xml torch | xargs -0 pytest

Only what a run wrote itself is read: JUnit's XML names a test by module, class and name.
"""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def main(path, module):
    """Print the tests of a report that were skipped because a module is not there."""
    root = Path(__file__).parent.parent
    for case in ElementTree.parse(path).iter("testcase"):
        skipped = case.find("skipped")
        if skipped is None or f"could not import '{module}'" not in skipped.get("message", ""):
            continue
        # Of a file that was skipped as a whole there is only the name.
        parts = (case.get("classname") or case.get("name")).split(".")
        # The longest beginning that is a file; what follows are classes.
        length = next(
            n
            for n in range(len(parts), 0, -1)
            if root.joinpath(*parts[:n]).with_suffix(".py").is_file()
        )
        names = ["/".join(parts[:length]) + ".py", *parts[length:]]
        names += [case.get("name")] if case.get("classname") else []
        print("::".join(names), end="\0")


if __name__ == "__main__":
    main(*sys.argv[1:])
