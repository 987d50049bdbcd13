"""Run an experiment: `python run.py --experiment=NAME --preset=PRESET`; `--help` lists them."""

import os
import sys

from experiments import _config

if __name__ == "__main__":
    code = _config.main(sys.argv)
    if code > 128:
        # Interrupted: threads of libraries that were at work would complain of what they miss while
        # the interpreter is taken down. All that counts is on disk.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
