"""The examples of the README run as they stand there."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments import _config
from flipad_jax import data

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.write_images(tmp_path / "suspects", data.load("digits", split="test", num_images=3))
    examples = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(examples) == 2
    scope: dict = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), scope)  # noqa: S102
    assert list(scope["found"].verdict).count("not_ours") >= 2  # real digits
    assert np.asarray(scope["info"].relative_gap).max() <= 1e-2


def test_commands_name_what_exists():
    for command in re.findall(r"^(?:make|python run\.py)[^\n]*$", TEXT, re.M):
        if command.startswith("make"):
            target = command.split()[1]
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), command
        for name in re.findall(r"--experiment=(\w+)", command):
            assert (ROOT / "experiments" / f"{name}.py").exists(), command
    for link in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / link).exists(), link
    assert shutil.which("python3")


def test_the_guide_to_your_own_model_runs(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run.py"])
    text = (ROOT / "docs" / "your_model.md").read_text()
    scope: dict = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(example, "your_model.md", "exec"), scope)  # noqa: S102
    assert scope["found"].verdict.shape == (8,) and (scope["found"].verdict == "ours").sum() >= 6
    # Its command, in the folder that the example made; images of the model are the suspects.
    (fit,) = re.findall(r"^python run\.py --experiment=fit --flagfile.*$", text, re.M)
    assert _config.main(shlex.split(fit)[1:]) == 0
    attribute = re.search(r"^python run\.py --experiment=attribute.*\n.*$", text, re.M)
    data.write_images(tmp_path / "suspects", scope["imported"].generated[:40])
    assert _config.main(shlex.split(attribute[0].replace("\\\n", " "))[1:]) == 0
    lines = (tmp_path / "verdicts.csv").read_text().splitlines()
    assert len(lines) == 41 and sum(",ours," in line for line in lines) >= 36
