"""Experiments: one file per job, table or figure; `python run.py --help` lists them."""
