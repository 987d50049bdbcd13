"""The command that trains a generator, on sets that it reads while it trains."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tfds_sets import encoded, prepare, real_features

from experiments import _config, train_generator
from flipad_jax import data
from flipad_jax.generators import zoo

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Forty photographs with CelebA's features, one of which is none."""
    folder = tmp_path_factory.mktemp("faces")
    features = real_features("celeb_a")
    others = {key: features[key] for key in features if key != "image"}
    blank = {key: {inner: 0 for inner in others[key]} for key in others}
    rng = np.random.default_rng(0)

    def photo():
        coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8))
        return encoded(coarse.resize((178, 218)), "JPEG")

    examples = [{"image": photo(), **blank} for _ in range(40)]
    examples[7]["image"] = examples[7]["image"][:-400]
    splits = {"train": examples, "validation": examples[:2], "test": examples[:2]}
    prepare(folder, "celeb_a", features, splits)
    return folder


def command(faces, workdir, **settings):
    settings = {
        "experiment": "train_generator",
        "preset": "smoke",
        "dataset": "celeb_a",
        "data_dir": faces,
        "stream": "true",
        "image_size": 16,
        "workdir": workdir,
        **settings,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def test_a_stream_is_a_flag(faces, tmp_path):
    assert _config.main(["run.py", *command(faces, tmp_path / "run", num_steps=2)]) == 0
    entry = zoo.record_file(tmp_path / "run" / "0.safetensors")
    assert entry["dataset"] == "celeb_a" and entry["stream"] is True
    assert entry["image_shape"] == [16, 16, 3]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2]
    assert 0 <= json.loads(lines[0])["waiting"] <= 1
    assert (tmp_path / "run" / "figures" / "samples.png").exists()


def test_a_set_that_is_not_there_is_told_with_the_command(tmp_path, capsys):
    for stream in ("true", "false"):
        arguments = command(tmp_path, tmp_path / stream, dataset="lsun/bedroom", stream=stream)
        assert _config.main(["run.py", *arguments]) == 2
        error = capsys.readouterr().err
        assert "pip install 'flipad_jax[prepare]'" in error
        assert f"tfds build lsun/bedroom --file_format=array_record --data_dir={tmp_path}" in error
    arguments = command(tmp_path, tmp_path / "digits", dataset="digits")
    assert _config.main(["run.py", *arguments]) == 2
    assert "digits is read into memory as a whole" in capsys.readouterr().err


def test_a_stream_is_planned_without_the_whole_set_on_the_device():
    stages = [
        train_generator.plan(
            _config.make_config(train_generator, "smoke", stream=stream, num_images=5000)
        )[0]
        for stream in (True, False)
    ]
    assert [stage.arguments[1].shape[0] for stage in stages] == [8, 5000]


@pytest.mark.slow
def test_killed_and_started_again_it_makes_the_same_generator(faces, tmp_path):
    settings = {"num_steps": 400, "checkpoint_every": 20, "batch_size": 6}

    def start(name):
        arguments = command(faces, tmp_path / name, **settings)
        return subprocess.Popen(
            [sys.executable, "run.py", *arguments],
            cwd=ROOT,
            env={**os.environ, "JAX_ENABLE_X64": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def steps():
        folder = tmp_path / "killed" / "checkpoints"
        names = os.listdir(folder) if folder.is_dir() else []
        return [int(name) for name in names if name.isdigit()]

    whole = start("whole")
    _, error = whole.communicate()
    assert whole.returncode == 0, error
    for target in (60, 220):
        process = start("killed")
        while process.poll() is None and max(steps(), default=0) < target:
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "killed" / "results.json").exists()
    process = start("killed")
    _, error = process.communicate()
    assert process.returncode == 0, error
    found, wanted = (
        json.loads((tmp_path / name / "results.json").read_text())["metrics"]
        for name in ("killed", "whole")
    )
    assert found == wanted
    assert found["files"]["0.safetensors"]["num_steps"] == 400
    images = data.load("celeb_a", split="train", image_size=16, data_dir=faces)
    assert len(images) == 39
