"""One's own model: from files of weights and images to an attributor, as a user does it."""

import json

import jax
import numpy as np
import pytest
from image_files import random_images
from PIL import Image
from safetensors.numpy import save_file
from toy_model import BIAS, KERNEL, LAYER, own_images

import flipad_jax
from experiments import _config
from flipad_jax import data
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection.deepsad import DeepSADConfig

IMAGES, ACTIVATIONS = own_images(1, 800)
Z_BAR = ACTIVATIONS.mean(axis=0)


def run(*flags):
    return _config.main(["run.py", *flags])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What a user of PyTorch has: a state dict, a mean activation [c, h, w], images."""
    folder = tmp_path_factory.mktemp("mine")
    hidden = np.zeros((5, 5, 4, 4), np.float32)
    weight = np.ascontiguousarray(KERNEL.transpose(2, 3, 0, 1))
    state = {"main.0.weight": hidden, "main.3.weight": weight, "main.3.bias": BIAS}
    save_file(state, folder / "model.safetensors")
    np.save(folder / "mean.npy", Z_BAR.transpose(2, 0, 1))
    data.write_images(folder / "own", IMAGES)
    data.write_images(folder / "real", random_images(300, seed=4))
    (folder / "own" / "broken.png").write_bytes(b"no image")
    return folder


def flags_of(files, **changes):
    flags = {
        "generator": files / "model.safetensors",
        "last_layer": "main.3",
        "mean_activation": files / "mean.npy",
        "generated": files / "own",
        **changes,
    }
    return ["--experiment=fit", *(f"--{name}={value}" for name, value in flags.items())]


@pytest.fixture(scope="module")
def workdir(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("fit")
    assert run(*flags_of(files, real=files / "real", workdir=workdir)) == 0
    return workdir


def test_the_files_give_the_attributor_that_the_library_gives(workdir):
    fitted = flipad_jax.fit(LAYER, Z_BAR, IMAGES, rng=jax.random.key(0))
    loaded = flipad_jax.load(workdir / "attributor")
    np.testing.assert_array_equal(loaded.layer.operator.kernel, KERNEL)
    np.testing.assert_array_equal(loaded.layer.bias, BIAS)
    images = np.concatenate([own_images(2, 20)[0], random_images(20)])
    np.testing.assert_allclose(
        flipad_jax.score(loaded, images), flipad_jax.score(fitted, images), rtol=1e-5
    )


def test_results_and_page_say_what_was_fitted(workdir):
    results = json.loads((workdir / "results.json").read_text())
    found = results["metrics"]
    assert not any("bias" in warning for warning in results["warnings"])  # a fact
    assert found["num_generated"] == 800 and found["num_calibration"] == 200
    assert found["smallest_certifiable_fnr"] == pytest.approx(1 / 201)
    assert [row["path"] for row in found["left_out"]] == ["broken.png"]
    assert any("bias" in note for note in found["notes"])  # taken without being named
    assert found["mean_mismatch"] < 0.1
    real = found["real"]  # nothing was fitted on these
    assert real["rejected"] / real["num_images"] > 0.9 and real["auc"] > 0.9
    low, high = real["rejected_interval"]
    assert low < real["rejected"] / real["num_images"] <= high
    page = (workdir / "report.html").read_text()
    assert "--experiment=attribute" in page and found["attributor_sha256"] in page


def test_what_was_fitted_judges_a_folder(workdir, tmp_path):
    data.write_images(tmp_path / "s" / "own", own_images(2, 16)[0])
    data.write_images(tmp_path / "s" / "foreign", random_images(16, seed=9))
    flags = (f"--attributor={workdir / 'attributor'}", f"--images={tmp_path / 's'}")
    output = tmp_path / "v.jsonl"
    assert run("--experiment=attribute", "--preset=smoke", *flags, f"--output={output}") == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    right = [(row["verdict"] == "ours") == row["path"].startswith("own") for row in rows]
    assert len(right) == 32 and np.mean(right) > 0.9


def test_deepsad_learns_real_images_too(files, tmp_path):
    changes = {"detector": "deepsad", "real": files / "real", "workdir": tmp_path / "w"}
    assert run("--preset=smoke", *flags_of(files, **changes)) == 0
    config = flipad_jax.load(tmp_path / "w" / "attributor").config
    assert config.detector == "deepsad" and config.deepsad == DeepSADConfig((8, 8), epochs=1)


def test_few_images_go_on_and_say_what_they_certify(files, tmp_path, capsys):
    data.write_images(tmp_path / "few", IMAGES[:100])
    assert run(*flags_of(files, generated=tmp_path / "few", workdir=tmp_path / "w")) == 0
    said = capsys.readouterr()
    assert "25 calibration images certify no fnr below 0.0385; 0.005 takes 199" in said.err
    assert "0.0385" in said.out and "199" in (tmp_path / "w" / "report.html").read_text()


def test_own_images_that_were_compressed_are_told(files, tmp_path, capsys):
    data.write_images(tmp_path / "own", IMAGES[:100])
    assert run(*flags_of(files, generated=tmp_path / "own", workdir=tmp_path / "png")) == 0
    assert "format that mostly loses" not in capsys.readouterr().err
    for i in range(3):
        Image.fromarray(IMAGES[i].squeeze()).save(tmp_path / "own" / f"lossy{i}.JPG")
    assert run(*flags_of(files, generated=tmp_path / "own", workdir=tmp_path / "jpg")) == 0
    said = capsys.readouterr().err
    assert "3 of 103 files (lossy0.JPG, ...) are of a format that mostly loses" in said


def test_no_room_is_told_before_anything_is_fitted(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attribution, "fit", lambda *_, **__: pytest.fail())
    monkeypatch.setattr(attribution, "kept_bytes", lambda *_, **__: 2**60)
    assert run(*flags_of(files, workdir=tmp_path / "w")) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert "has" in line and "free, features of all images" in line and "make room" in line


def test_inversions_that_missed_their_bound_are_counted(files, tmp_path, monkeypatch):
    honest = attribution.score_with_info

    def marked(*args, **kwargs):
        found = honest(*args, **kwargs)
        return found._replace(converged=np.arange(len(found.score)) >= 3)

    monkeypatch.setattr(attribution, "score_with_info", marked)
    assert run(*flags_of(files, real=files / "real", workdir=tmp_path / "w")) == 0
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    found = results["metrics"]
    assert found["num_calibration"] == 197 and found["num_unconverged"] == 3
    assert found["real"]["num_unconverged"] == 3
    assert found["real"]["rejected"] <= found["real"]["num_images"] - 3
    page = (tmp_path / "w" / "report.html").read_text()
    for what in ("3 own images that calibrate", "3 real images"):
        assert any(what in warning for warning in results["warnings"])
        assert what in page


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"generator": ""}, "--generator is missing"),
        ({"mean_activation": ""}, "--mean_activation is missing"),
        ({"generator": "nothing.pth"}, "nothing.pth"),
        ({"generated": "nothing"}, "--generated=nothing is not a folder"),
        ({"mean_activation": "nothing.npy"}, "is not a file"),
        ({"last_layer": "main.4"}, "main.3"),
        ({"layer": "conv"}, "error"),
        ({"strides": 4}, "strides"),
        ({"layout": "flax"}, "layout"),
        ({"detector": "deepsad"}, "--real"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_computed(
    files, tmp_path, capsys, changes, message, monkeypatch
):
    monkeypatch.setattr("flipad_jax.detection.attributor.fit", lambda *_, **__: pytest.fail())
    assert run(*flags_of(files, **changes, workdir=tmp_path / "w")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error:") and message in error, error
    assert not (tmp_path / "w" / "attributor").exists()


def test_a_layer_that_did_not_make_these_images_is_told(files, tmp_path, capsys):
    state = {"last.weight": np.ascontiguousarray(KERNEL[::-1, ::-1].transpose(2, 3, 0, 1))}
    save_file(state, tmp_path / "flipped.safetensors")
    changes = {"generator": tmp_path / "flipped.safetensors", "last_layer": "last"}
    assert run(*flags_of(files, **changes, workdir=tmp_path / "w")) == 0
    assert "warning" in capsys.readouterr().err
    found = json.loads((tmp_path / "w" / "results.json").read_text())
    assert any("fit" in warning and "image" in warning for warning in found["warnings"])


def test_an_array_that_would_be_unpickled_is_refused(files, tmp_path, capsys):
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    changes = {"mean_activation": tmp_path / "objects.npy", "workdir": tmp_path / "w"}
    assert run(*flags_of(files, **changes)) == 2
    assert "is no .npy file of numbers" in capsys.readouterr().err
