"""Run an experiment: `python run.py --experiment=NAME --preset=PRESET`; `--help` lists them."""

import sys

from experiments import _config

if __name__ == "__main__":
    sys.exit(_config.main(sys.argv))
