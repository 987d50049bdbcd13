"""Every experiment at its smoke preset, as a user runs it."""

import csv
import json
import re

import chex
import numpy as np
import pytest
from PIL import Image

from experiments import _config
from experiments import demo as demo_module
from experiments._record import open_workdir
from flipad_jax import load, verdicts
from flipad_jax.generators import zoo


def run(tmp_path, *flags):
    return _config.main(["run.py", *flags, f"--workdir={tmp_path}"])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("demo")
    assert run(workdir, "--preset=smoke") == 0
    return workdir


@pytest.mark.slow
def test_demo_writes_what_it_promises(demo, capsys):
    results = json.loads((demo / "results.json").read_text())
    rivals = {"real", "digits_dcgan_1", "digits_dcgan_2", "digits_wgan_gp_0"}
    for detector in ("one_class", "flipad", "rawpad", "dctpad"):
        found = results["metrics"][detector]
        assert set(found["accuracy"]) == set(found["auc"]) == rivals
        np.testing.assert_allclose(
            found["mean_accuracy"], np.mean(list(found["accuracy"].values()))
        )
        assert 0 <= found["achieved_fnr"] <= found["achieved_fnr_interval"][1] <= 1
    # Even with a tenth of the images, own images alone tell ours from real and other seeds.
    assert results["metrics"]["one_class"]["mean_auc"] > 0.9
    assert load(demo / "attributor").image_shape == (32, 32, 1)
    page = (demo / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list((demo / "figures").glob("*.png"))) == 7
    assert not re.search(r"(src|href)=\"http", page)


@pytest.mark.slow
def test_demo_judges_a_folder(demo):
    with (demo / "verdicts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 5 and {row["verdict"] for row in rows} <= {"ours", "not_ours"}
    own = [row["verdict"] for row in rows if row["path"].startswith("own")]
    assert own.count("ours") >= 3
    row = rows[0]
    image = np.asarray(Image.open(demo / "suspects" / row["path"]))[None, :, :, None]
    found = verdicts(load(demo / "attributor"), image)
    np.testing.assert_allclose(found.score[0], float(row["score"]), rtol=1e-4)


@pytest.mark.slow
def test_a_model_is_trained_anew_by_its_record(tmp_path, monkeypatch):
    name = "digits_dcgan_1"
    entry = {**zoo.record(name), "num_steps": 1, "batch_size": 4}
    monkeypatch.setattr(zoo, "record", lambda _: entry)
    with open_workdir(tmp_path / "w", {}, commit=None) as record:
        first = demo_module._retrained(name, demo_module.Config(retrain=True), record)
        again = demo_module._retrained(name, demo_module.Config(retrain=True), record)
    assert first.image_shape == (32, 32, 1)
    chex.assert_trees_all_equal(first.variables, again.variables)


@pytest.mark.slow
def test_a_second_run_computes_nothing(demo, capsys, monkeypatch):
    monkeypatch.setattr("experiments.demo.run", lambda *_: pytest.fail("computed again"))
    assert run(demo, "--preset=smoke") == 0
    out = capsys.readouterr().out
    assert "is complete" in out and "one-class" in out


@pytest.mark.slow
def test_another_configuration_is_refused(demo, capsys):
    assert run(demo, "--preset=smoke", "--seed=1") == 2
    error = capsys.readouterr().err
    assert "seed" in error and "Traceback" not in error


def test_a_bad_folder_is_refused_before_anything_is_computed(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        flags = ("--preset=smoke", f"--images={tmp_path / folder}")
        assert run(tmp_path / "work", *flags) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert error[-1].startswith("error:") and folder in error[-1]
    assert not (tmp_path / "work" / "stages").exists()


def test_a_training_is_saved_and_can_be_read(tmp_path):
    assert run(tmp_path, "--experiment=train_generator", "--preset=smoke", "--seeds=3,4") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["metrics"]["files"]) == {"3.safetensors", "4.safetensors"}
    generator = zoo.load_file(tmp_path / "4.safetensors")
    assert generator.image_shape == (32, 32, 1)
    assert (tmp_path / "figures" / "samples.png").stat().st_size > 1000
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps[-1] == 4
