"""`--experiment=prove` as a user runs it, on a generator that is imported by its path."""

import csv
import dataclasses
import hashlib
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from experiments import _config, _record, _regeneration, prove
from flipad_jax import data, perturbations
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection import bundle, processing, proof, regeneration
from flipad_jax.generators import zoo

GENERATOR = toy_model.latent_generator()
NUM_OWN = 3


def run(workdir, *flags):
    return _config.main(
        ["run.py", "--experiment=prove", "--preset=smoke", f"--workdir={workdir}", *flags]
    )


def rows_of(path):
    with path.open(newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory):
    """Suspects: own images, others, one that is broken, one that is too large; foreign images."""
    root = tmp_path_factory.mktemp("prove")
    rng = np.random.default_rng(5)
    own = regeneration.make_bank(GENERATOR, jax.random.key(99), NUM_OWN).images
    data.write_images(root / "suspects" / "own", own)
    other = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    data.write_images(root / "suspects" / "other", other)
    data.write_images(root / "suspects" / "large", np.zeros((1, 16, 16, 3), np.uint8))
    (root / "suspects" / "broken.png").write_text("no image")
    data.write_images(root / "foreign", rng.integers(0, 256, (400, 8, 8, 3), dtype=np.uint8))
    return root, own


@pytest.fixture(scope="module", name="finished")
def _finished(folders):
    root, own = folders
    flags = (
        "--generator=toy_model:latent_generator",
        f"--images={root / 'suspects'}",
        f"--foreign={root / 'foreign'}",
        "--num_own=60",
        "--num_foreign=40",
        "--num_starts=4",
    )
    workdir = root / "run"
    assert run(workdir, *flags) == 0
    return workdir, flags, own


def test_own_images_are_proved_and_others_are_not(finished):
    workdir, _, _ = finished
    rows = rows_of(workdir / "verdicts.csv")
    assert [rows[f"own/0000{i}.png"]["verdict"] for i in range(NUM_OWN)] == ["proved"] * NUM_OWN
    assert [rows[f"other/0000{i}.png"]["verdict"] for i in range(2)] == ["not_ours"] * 2
    assert rows["broken.png"]["verdict"] == rows["large/00000.png"]["verdict"] == "cannot_judge"
    assert "16 x 16" in rows["large/00000.png"]["reason"] and rows["broken.png"]["reason"]
    found = json.loads((workdir / "results.json").read_text())["metrics"]
    assert (found["proved"], found["not_ours"], found["cannot_judge"]) == (NUM_OWN, 2, 2)
    assert found["rests_on"][0]["foreign_smallest"] > 3


def test_a_proof_can_be_repeated(finished):
    """From the file of proofs alone, with the weights."""
    workdir, _, own = finished
    with safe_open(workdir / "proofs.safetensors", framework="np") as file:
        latents, metadata = file.get_tensor("latents"), file.metadata()
    listed = json.loads(metadata["images"])
    assert [entry["path"] for entry in listed] == [f"own/0000{i}.png" for i in range(NUM_OWN)]
    made = regeneration.make_images(GENERATOR, latents)
    assert np.abs(made.astype(int) - own).max() <= 1
    rows = rows_of(workdir / "verdicts.csv")
    for latent, image, entry in zip(latents, own, listed, strict=True):
        assert entry["latent_sha256"] == hashlib.sha256(latent.tobytes()).hexdigest()
        assert entry["latent_sha256"] == rows[entry["path"]]["latent_sha256"]
        assert entry["pixels_sha256"] == hashlib.sha256(image.tobytes()).hexdigest()
    written = data.read_images(workdir / "regenerated").images
    np.testing.assert_array_equal(written, made)


def test_a_proof_is_repeated_and_compared_with_the_files(finished, folders):
    workdir, _, own = finished
    repeated = regeneration.repeat(
        GENERATOR, workdir / "proofs.safetensors", folders[0] / "suspects"
    )
    assert [row.path for row in repeated] == [f"own/0000{i}.png" for i in range(NUM_OWN)]
    rows = rows_of(workdir / "verdicts.csv")
    for row in repeated:
        assert row.is_the_file and row.reason == "" and row.processing == "none"
        assert row.largest == float(rows[row.path]["largest"]) <= 1
        assert row.rmse == pytest.approx(float(rows[row.path]["rmse"])) and row.rmse <= 0.5


def test_files_that_were_changed_or_are_missing_are_rows_with_a_reason(finished, tmp_path):
    workdir, _, own = finished
    changed = own.copy()
    changed[1, 3, 4, 0] ^= 64
    data.write_images(tmp_path / "own", changed)
    (tmp_path / "own" / "00002.png").unlink()
    one, two, three = regeneration.repeat(GENERATOR, workdir / "proofs.safetensors", tmp_path)
    assert one.is_the_file
    assert not two.is_the_file and two.largest >= 63 and "SHA-256" in two.reason
    assert three[2:] == (False, None, None, f"no such file below {tmp_path}")
    data.write_images(tmp_path / "own", np.zeros((2, 16, 16, 3), np.uint8))
    one, *_ = regeneration.repeat(GENERATOR, workdir / "proofs.safetensors", tmp_path)
    assert one.largest is None and "is 16 x 16 pixels" in one.reason
    with pytest.raises(ValueError, match="there is no folder '.*nowhere': give that of the images"):
        regeneration.repeat(GENERATOR, workdir / "proofs.safetensors", tmp_path / "nowhere")


def test_a_proof_is_not_repeated_with_other_weights(finished, folders):
    changed = GENERATOR.replace(params={"mixing": GENERATOR.params["mixing"] + 1e-3})
    with pytest.raises(ValueError, match="load the generator that the proofs were made with"):
        regeneration.repeat(changed, finished[0] / "proofs.safetensors", folders[0] / "suspects")


def test_what_holds_no_proofs_or_is_damaged_is_refused(finished, tmp_path):
    def refuses(words):
        with pytest.raises(ValueError, match=words):
            regeneration.repeat(GENERATOR, tmp_path / "file", tmp_path)

    refuses("file holds no proofs .*expected the proofs.safetensors that --experiment=prove")
    (tmp_path / "file").write_text("no proofs")
    refuses("holds no proofs")
    whole = load_file(finished[0] / "proofs.safetensors")
    save_file(whole, tmp_path / "file")
    refuses("holds no proofs .*weights_sha256")
    with safe_open(finished[0] / "proofs.safetensors", framework="np") as file:
        metadata = file.metadata()
    save_file({"latents": whole["latents"] + 1}, tmp_path / "file", metadata)
    refuses("damaged: the latent of own/00000.png")
    save_file({"latents": whole["latents"][1:]}, tmp_path / "file", metadata)
    refuses(r"damaged: its latents are float32 \[2, 6\], expected float32 \[3, 6\]")
    listed = json.loads(metadata["images"])
    for entry, words in (
        (7, "holds no proofs"),
        ({**listed[0], "processing": "paint"}, "'paint' is unknown"),
        ({**listed[0], "unknowns": [1.0]}, "expected 0 numbers"),
        ({**listed[0], "processing": "jpeg", "unknowns": [float("nan")]}, "expected 1 numbers"),
    ):
        save_file(whole, tmp_path / "file", {**metadata, "images": json.dumps([entry] * 3)})
        refuses(words)


def suspect(path, kind, unknowns, replayed, image, latent):
    row = prove.Row(path, "proved", 0.0, 0.0, 0.0, 0.0, kind, "", "")
    row = row._replace(latent_sha256=hashlib.sha256(latent.tobytes()).hexdigest())
    unknowns = np.asarray(unknowns, np.float32)
    return prove.Suspect(row, image, image, image, latent, unknowns, replayed)


def test_what_was_done_to_an_image_is_done_again(tmp_path):
    """Every kind of processing, as `prove` writes it; also of a file whose name is no text."""
    bank = regeneration.make_bank(GENERATOR, jax.random.key(98), 7)
    done = [
        ("none", (), ""),
        ("noise", (), ""),
        ("jpeg", (70.0,), "JPEG of quality 70"),
        ("jpeg", (0.0,), "not compressed"),
        ("blur", (0.2, 0.05, 0.0, 0.01), ""),
        ("crop", (1.5, 0.3, -0.4), ""),
        ("brightness", (0.7, 0.1), ""),
    ]
    suspects, folder = [], tmp_path / "images"
    for number, (kind, unknowns, replayed) in enumerate(done):
        image = bank.images[number]
        if replayed.startswith("JPEG"):
            image = perturbations.jpeg(image[None], 70)[0]
        elif kind not in ("none", "jpeg"):
            floats = GENERATOR.apply(GENERATOR.params, bank.latents[number, None])
            image = data.to_uint8(processing.get(kind).apply(floats, jnp.array(unknowns)))[0]
        (file,) = data.write_images(folder, image[None])
        name = "caf\udce9.png" if number == 0 else f"{number}.png"
        os.rename(file, folder / name)
        suspects.append(suspect(name, kind, unknowns, replayed, image, bank.latents[number]))
    suspects.append(suspects[0]._replace(row=suspects[0].row._replace(path="../images/1.png")))
    prove._write_proofs(tmp_path, suspects, GENERATOR)
    *repeated, outside = regeneration.repeat(GENERATOR, tmp_path / "proofs.safetensors", folder)
    assert [row.processing for row in repeated] == [kind for kind, _, _ in done]
    for row in repeated:  # another program may round a tie otherwise
        assert row.is_the_file and row.largest <= 1 and row.rmse < 0.1, row
    assert outside.reason.startswith("no such file")  # whatever lies there


def test_the_snippet_of_the_documentation_repeats_a_proof(
    finished, folders, tmp_path, monkeypatch, capsys
):
    text = (Path(__file__).parent.parent / "docs" / "proof.md").read_text()
    snippet = text.partition("To repeat a proof:\n\n```python\n")[2].partition("```")[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "proofs").symlink_to(finished[0], target_is_directory=True)
    (tmp_path / "suspects").symlink_to(folders[0] / "suspects", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "load", lambda name: GENERATOR)
    exec(compile(snippet, "docs/proof.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said] == [
        [f"own/0000{i}.png", "True"] for i in range(NUM_OWN)
    ]


def test_the_page_shows_what_a_verdict_rests_on(finished):
    page = (finished[0] / "report.html").read_text()
    for words in ("proved", "regenerated, and difference times 32", "codimension", "own/00000.png"):
        assert words in page
    assert "<script" not in page


def test_another_rate_searches_nothing_again(finished, monkeypatch):
    workdir, _, _ = finished
    before = rows_of(workdir / "verdicts.csv")

    def never(*_, **__):
        raise AssertionError("searched again")

    monkeypatch.setattr(regeneration, "regenerate", never)
    assert run(workdir, "--fnr=0.5", "--output=" + str(workdir / "again.csv")) == 0
    after = rows_of(workdir / "again.csv")
    assert {p: r["rmse"] for p, r in after.items()} == {p: r["rmse"] for p, r in before.items()}


def test_another_folder_takes_the_calibration_of_the_first(
    finished, folders, tmp_path, monkeypatch
):
    workdir, flags, own = finished
    data.write_images(tmp_path / "one", own[:1])
    flags = [flag for flag in flags if not flag.startswith("--images")] + [
        f"--images={tmp_path / 'one'}",
        f"--reuse={workdir}",
    ]
    searched, regenerate = [], regeneration.regenerate

    def counted(generator, images, *args, **kwargs):
        searched.append(len(images))
        return regenerate(generator, images, *args, **kwargs)

    monkeypatch.setattr(regeneration, "regenerate", counted)
    assert run(tmp_path / "second", *flags) == 0
    assert searched == [1]
    first, second = (
        json.loads((folder / "results.json").read_text())["metrics"]["rests_on"]
        for folder in (workdir, tmp_path / "second")
    )
    assert first == second
    # It is a run of its own now; and other settings of the search are not the same calibration.
    assert {path.name for path in (tmp_path / "second" / "stages").glob("own-*")} == {
        path.name for path in (workdir / "stages").glob("own-*")
    }
    assert run(tmp_path / "third", *flags, "--num_starts=1") == 0
    assert searched[1:] == [32, 28, 32, 8, 1]
    warned = json.loads((tmp_path / "third" / "results.json").read_text())["warnings"]
    assert any("calibrating anew" in text for text in warned)


def test_processed_images_are_found_by_the_search_that_knows(folders, tmp_path):
    root, own = folders
    dark = np.clip(np.round(own * 0.8), 0, 255).astype(np.uint8)
    data.write_images(tmp_path / "dark", dark)
    flags = (
        "--generator=toy_model:latent_generator",
        f"--images={tmp_path / 'dark'}",
        f"--foreign={root / 'foreign'}",
        "--num_own=60",
        "--num_foreign=40",
        "--processing=none,brightness",
        f"--output={tmp_path / 'found.jsonl'}",
    )
    assert run(tmp_path / "run", *flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert {row["processing"] for row in rows} == {"brightness"}
    assert {row["verdict"] for row in rows} <= {"proved", "ours"}
    assert "proved" in {row["verdict"] for row in rows}
    file = tmp_path / "run" / "proofs.safetensors"
    for row, again in zip(rows, regeneration.repeat(GENERATOR, file, tmp_path / "dark")):
        assert again.path == row["path"] and again.is_the_file
        assert again.processing == "brightness"
        assert again.largest == row["largest"] and again.rmse == pytest.approx(row["rmse"])


def test_noise_of_any_strength_is_no_reason_to_refuse():
    """Calibrated at 0.05: errors under 0.1 are beyond those of foreign images, an excess is not."""
    generator = zoo.load("digits_dcgan_0")
    ramp = np.linspace(20, 200, 32 * 32).reshape(32, 32, 1)
    made = np.repeat(np.round(ramp).astype(np.uint8)[None], 3, axis=0)
    wrong = np.round(ramp + 40 * np.sin(ramp / 10)).astype(np.uint8)[None]
    images = np.concatenate(
        [
            perturbations.noise(picture, jax.random.key(i), std)
            for i, (picture, std) in enumerate(((made[:1], 0.02), (made[:1], 0.1), (wrong, 0.05)))
        ]
    )
    errors = images.astype(float) - made
    result = {
        "rmse": np.sqrt(np.square(errors).mean(axis=(1, 2, 3))),
        "largest": np.abs(errors).max(axis=(1, 2, 3)),
        "proved": np.zeros(3, bool),
        "equations": np.full(3, 1024),
        "misfit": np.ones(3),
        "latent": np.zeros((3, 64), np.float32),
        "unknowns": np.zeros((3, 0), np.float32),
        "image": made,
        "processed": made,
        "replayed": np.array(["", "", ""]),
    }
    rng = np.random.default_rng(0)
    foreign = rng.uniform(14, 40, 100)
    known = prove.Calibration(
        rng.uniform(12, 13, 60),
        np.zeros(60, bool),
        foreign,
        (rng.normal(0, 1.5, 60), rng.uniform(6, 60, 100)),
        np.full(100, 1024),
        proof.foreign_tail(foreign),
    )
    config = prove.Config(processing=("noise",))
    rows = [
        prove._judged(
            config, generator, known, proof.ProofConfig(), "noise", result, place, images[place]
        ).row
        for place in range(3)
    ]
    assert rows[1].rmse > foreign.min() and rows[0].rmse < foreign.min() / 2
    assert [row.verdict for row in rows][1:] == ["cannot_judge", "not_ours"]
    assert rows[0].verdict in ("ours", "cannot_judge")
    for row, std in zip(rows, (0.02, 0.1)):
        told = float(row.reason.partition("noise of some ")[2].split()[0])
        assert told == pytest.approx(255 * std, rel=0.15)


def test_noise_is_searched_and_told(folders, tmp_path):
    root, own = folders
    data.write_images(tmp_path / "noisy", perturbations.noise(own, jax.random.key(3), 0.02))
    flags = (f"--images={tmp_path / 'noisy'}", f"--foreign={root / 'foreign'}")
    assert run(tmp_path / "run", *FLAGS, *flags, "--processing=noise") == 0
    rows = rows_of(tmp_path / "run" / "verdicts.csv").values()
    assert {row["processing"] for row in rows} == {"noise"}
    for row in rows:  # 0.02 is 5.1 levels; there are 48 squares of 2 x 2 to tell it by
        told = float(row["reason"].partition("noise of some ")[2].split()[0])
        assert 3.5 < told < 7


@pytest.mark.parametrize(
    "flags, words",
    [
        ((), "--images is missing"),
        (("--generator=nothing",), "no file, no MODULE:FUNCTION"),
        (("--generator=toy_model:missing",), "cannot be imported"),
        (("--generator=toy_model:no_generator",), "returned int"),
        (("--generator=toy_model:latent_generator",), "--foreign is missing"),
        (("--reuse=nowhere",), "--reuse=nowhere is no workdir"),
    ],
)
def test_mistakes_are_named(folders, tmp_path, capsys, flags, words):
    images = (f"--images={folders[0] / 'suspects'}",) if flags else ()
    assert run(tmp_path / "run", *flags, *images) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


FLAGS = ("--generator=toy_model:latent_generator", "--num_own=60", "--num_foreign=40")


@pytest.mark.parametrize(
    "processings", ["none", pytest.param("none,brightness,crop", marks=pytest.mark.slow)]
)
def test_a_plain_image_is_no_proof(processings, folders, tmp_path):
    """Black and white have no equation, and any generator of high contrast comes near them."""
    root, _ = folders
    plain = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (0, 255)])
    data.write_images(tmp_path / "plain", plain)
    flags = (f"--images={tmp_path / 'plain'}", f"--foreign={root / 'foreign'}")
    assert run(tmp_path / "run", *FLAGS, *flags, f"--processing={processings}") == 0
    rows = rows_of(tmp_path / "run" / "verdicts.csv").values()
    assert {row["verdict"] for row in rows} == {"cannot_judge"}
    assert all("too few" in row["reason"] for row in rows)


def test_other_weights_are_searched_anew(folders, tmp_path, monkeypatch):
    """The same command with another model in the file: no latent of the old one is stamped."""
    root, own = folders
    data.write_images(tmp_path / "own", own)
    flags = (*FLAGS, f"--images={tmp_path / 'own'}", f"--foreign={root / 'foreign'}")
    assert run(tmp_path / "run", *flags) == 0
    assert {row["verdict"] for row in rows_of(tmp_path / "run" / "verdicts.csv").values()} == {
        "proved"
    }
    changed = toy_model.latent_generator()
    changed = changed.replace(params={"mixing": jnp.roll(changed.params["mixing"], 1, 1)})
    monkeypatch.setattr(toy_model, "latent_generator", lambda: changed)
    assert run(tmp_path / "run", *flags) == 0
    rows = rows_of(tmp_path / "run" / "verdicts.csv").values()
    assert "proved" not in {row["verdict"] for row in rows}
    assert not (tmp_path / "run" / "regenerated").exists()


@pytest.fixture(name="searched")
def _searched(monkeypatch):
    """How many images every search was given."""
    counts = []
    real = regeneration.regenerate

    def counting(generator, images, *args, **kwargs):
        counts.append(len(images))
        return real(generator, images, *args, **kwargs)

    monkeypatch.setattr(regeneration, "regenerate", counting)
    return counts


def test_copies_are_searched_once(folders, tmp_path, searched):
    root, own = folders
    data.write_images(tmp_path / "images", np.stack([own[0], own[0]]))
    flags = (*FLAGS, f"--images={tmp_path / 'images'}", f"--foreign={root / 'foreign'}")
    assert run(tmp_path / "run", *flags) == 0
    assert searched == [32, 28, 32, 8, 1]
    rows = rows_of(tmp_path / "run" / "verdicts.csv")
    one, two = rows["00000.png"], rows["00001.png"]
    assert {**one, "path": ""} == {**two, "path": ""} and one["verdict"] == "proved"


def test_what_is_found_of_an_image_does_not_depend_on_the_others(
    folders, tmp_path, monkeypatch, searched
):
    """Blocks of four: one file more, and only its block is searched anew, with the same end."""
    monkeypatch.setattr("experiments.prove._BLOCK", 4)
    root, own = folders
    more = regeneration.make_bank(GENERATOR, jax.random.key(100), 45).images
    data.write_images(tmp_path / "images", np.concatenate([own, more[:40]]))
    # Starts that miss, so that random ones are made.
    flags = (*FLAGS, f"--images={tmp_path / 'images'}", f"--foreign={root / 'foreign'}", "--bank=0")
    assert run(tmp_path / "run", *flags) == 0
    before = rows_of(tmp_path / "run" / "verdicts.csv")
    searched.clear()
    data.write_images(tmp_path / "images" / "more", more[40:41])
    assert run(tmp_path / "run", *flags) == 0
    after = rows_of(tmp_path / "run" / "verdicts.csv")
    assert {path: after[path] for path in before} == before and len(after) == 44
    assert len(searched) == 1 and searched[0] < 15


def test_plain_foreign_images_are_passed_over(folders, tmp_path, capsys):
    """A blank page among them is regenerated by anything, and says nothing of anybody."""
    root, own = folders
    data.write_images(tmp_path / "own", own)
    foreign = data.read_images(root / "foreign").images
    plain = np.zeros((60, *foreign.shape[1:]), np.uint8)
    data.write_images(tmp_path / "foreign", np.concatenate([plain, foreign[:45]]))
    flags = (f"--images={tmp_path / 'own'}", f"--foreign={tmp_path / 'foreign'}")
    assert run(tmp_path / "run", *FLAGS, *flags) == 0
    said = capsys.readouterr().err
    assert "images of --foreign" in said and "too few pixels between black and white" in said
    (rests,) = json.loads((tmp_path / "run/results.json").read_text())["metrics"]["rests_on"]
    assert rests["num_foreign"] == 40 and rests["foreign_smallest"] > 3
    data.write_images(tmp_path / "blank", plain)
    flags = (f"--images={tmp_path / 'own'}", f"--foreign={tmp_path / 'blank'}")
    assert run(tmp_path / "other", *FLAGS, *flags) == 2
    assert "has no usable image (8, 8, 3)" in capsys.readouterr().err


def test_an_attributor_that_refuses_processed_own_images_is_refused(
    folders, tmp_path, capsys, monkeypatch
):
    """It would doubt, but what is done to these images leaves no trace that it knows."""
    root, own = folders
    read = bundle.load
    monkeypatch.setattr(
        bundle, "load", lambda path: dataclasses.replace(read(path), validity=object())
    )
    monkeypatch.setattr(attribution, "doubts", lambda _, images: np.full(len(images), ""))
    data.write_images(tmp_path / "own", own)
    toy_model.save_attributor(tmp_path / "attributor", 800)
    flags = (
        *FLAGS,
        f"--images={tmp_path / 'own'}",
        f"--foreign={root / 'foreign'}",
        f"--attributor={tmp_path / 'attributor'}",
    )
    assert run(tmp_path / "run", *flags) == 0
    said = capsys.readouterr().err
    assert "more than --fnr" not in said
    assert run(tmp_path / "dark", *flags, "--processing=none,brightness") == 2
    said = capsys.readouterr().err
    assert "own images (brightness-0.9) not ours: leave it out, or this --processing" in said


@pytest.mark.parametrize(
    "num_own, p_value, edge, words",
    [
        (10, 1 / 11, 5.0, "10 own images are too few to call anything not ours"),
        (60, 0.5, 5.0, "no further away than own images, and too near to foreign images"),
        (60, 0.5, np.nan, "no further away than own images, and too few foreign images"),
        (60, 1 / 61, 5.0, "further away than own images, and not as far as foreign ones"),
    ],
)
def test_why_nothing_can_be_said(num_own, p_value, edge, words):
    tail = proof.ForeignTail(edge, 0.1, 3.0, 2.0, 4.0)
    zeros, ones = np.zeros(num_own), np.ones(90)
    known = prove.Calibration(zeros, zeros, ones, None, ones, tail)
    assert prove._why_undecided(p_value, known, proof.ProofConfig()).startswith(words)


def test_foreign_images_that_are_ours_stop_the_run(folders, tmp_path, capsys):
    root, own = folders
    data.write_images(tmp_path / "mixed", np.concatenate([own, own[::-1] // 2]))
    flags = (*FLAGS, f"--images={root / 'suspects'}", f"--foreign={tmp_path / 'mixed'}")
    assert run(tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err
    assert "3 of 6 foreign images are regenerated" in said and "40 were wanted" in said
    assert f"take what it made out of --foreign={tmp_path / 'mixed'};" in said
    assert {name for name in (f"0000{i}.png" for i in range(6)) if name in said} == {
        f"0000{i}.png" for i in range(3)
    }


def test_foreign_images_of_a_data_set_that_are_ours_are_numbered(
    folders, tmp_path, capsys, monkeypatch
):
    root, own = folders
    others = data.read_images(root / "foreign").images[:4]
    monkeypatch.setattr(data, "load", lambda *_, **__: np.concatenate([others, own[:2]]))
    flags = (*FLAGS, f"--images={root / 'suspects'}", "--foreign=digits")
    assert run(tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err
    assert "number 4 of the test split, number 5 of the test split (counted from 0)" in said
    assert "give a folder without what it made as --foreign, not digits;" in said


def test_of_many_foreign_images_that_are_ours_some_are_named():
    names = [f"{i}.png" for i in range(9)]
    known = prove.Known(np.zeros(0), np.zeros(0), names, "folder", True)
    hits = np.array([False, *[True] * 8])
    with pytest.raises(
        _record.UsageError, match=r"8 of 9 .*: 1.png, 2.png, 3.png, 4.png, 5.png and 3 more\. If"
    ):
        prove._refuse_hits(known, hits, 9, "none")
    prove._refuse_hits(known, hits & False, 9, "none")


def test_blocks_find_what_one_search_finds_with_its_codec(tmp_path, capsys):
    images = perturbations.jpeg(regeneration.make_bank(GENERATOR, jax.random.key(97), 5).images, 60)
    config = prove.Config(num_starts=2)
    with _record.open_workdir(tmp_path / "run", {"experiment": "prove"}) as record:
        asked = (config, record, GENERATOR, None, images, "jpeg", jax.random.key(4), "five")
        whole = _regeneration.search(*asked)
        capsys.readouterr()
        parts = _regeneration.search_in_blocks(*asked, "stage", 2)
    assert capsys.readouterr().err.count("five: searching ...") == 1
    assert set(parts) == set(whole) and len(set(whole["replayed"])) > 1
    for key, values in whole.items():
        if key == "misfit":  # a sum in float32, of another program
            np.testing.assert_allclose(parts[key], values, rtol=1e-4)
        else:
            np.testing.assert_array_equal(parts[key], values, err_msg=key)


def test_a_stop_costs_a_block_of_the_calibration(finished, tmp_path, capsys, monkeypatch, searched):
    """And what is found of an image does not depend on its block."""
    workdir, flags, _ = finished
    monkeypatch.setattr(prove, "_BLOCK", 25)
    monkeypatch.setattr(_record, "_KEEP_EVERY", 0.0)
    counting = regeneration.regenerate

    def stopped_in_the_second(*args, **kwargs):
        if len(searched) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return counting(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(regeneration, "regenerate", stopped_in_the_second)
        assert run(tmp_path / "run", *flags) == 128 + signal.SIGTERM
    assert searched == [25, 25]
    capsys.readouterr()
    assert run(tmp_path / "run", *flags) == 0
    assert searched[2:] == [10, 25, 15, NUM_OWN + 2]
    assert capsys.readouterr().err.count("60 own images: searching ...") == 1
    assert not any((tmp_path / "run" / "parts").glob("*"))
    whole = sorted((workdir / "stages").glob("*-none-*.npz"))
    assert [path.name.split("-")[0] for path in whole] == ["foreign", "own", "search"]
    for path in whole:
        with np.load(path) as before, np.load(tmp_path / "run" / "stages" / path.name) as after:
            for key in ("latent", "rmse", "image", "proved", "starts", "iterations", "equations"):
                np.testing.assert_array_equal(after[key], before[key], err_msg=key)


def test_processing_is_named_as_perturbations_are_and_may_have_a_strength(tmp_path, capsys):
    images = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8, 1)
    rng = jax.random.key(0)
    for name, kind, done in (
        ("none", "none", images),
        ("jpeg", "jpeg", perturbations.jpeg(images, 90)),
        ("jpeg-80", "jpeg", perturbations.jpeg(images, 80)),
        ("blur-5", "blur", perturbations.blur(images, 5)),
        ("brightness", "brightness", np.round(0.9 * images)),
        ("brightness-1.5", "brightness", np.round(1.5 * images)),
    ):
        assert _regeneration.kind_of(name) == kind
        np.testing.assert_array_equal(_regeneration.processed(name, images, rng), done)
    for name in (
        "none-1",
        "jpeg-",
        "resize-0.5",
        "brightness-3",
        "brightness-x",
        "blur-0.5",
        "blur-4",
        "jpeg-0",
    ):
        flags = ("--experiment=regeneration_study", f"--processing={name}")
        assert _config.main(["run.py", *flags, f"--workdir={tmp_path / 'run'}"]) == 2
        assert name in capsys.readouterr().err


@pytest.mark.slow
def test_the_study_counts_what_its_searches_found(tmp_path, monkeypatch):
    # Own images, the first that are asked about, have none; the others have.
    excesses = iter([0.0, 1.0, 1.0])
    monkeypatch.setattr(proof, "noise_excess", lambda made, _: np.full(len(made), next(excesses)))
    flags = (
        "--experiment=regeneration_study",
        "--preset=smoke",
        "--sources=real,trained_on",
        "--processing=none,jpeg-80,noise-0.05",
        f"--workdir={tmp_path / 'run'}",
    )
    assert _config.main(["run.py", *flags]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["models"]
    found = results["digits_dcgan_0"]["none"]
    with np.load(tmp_path / "run" / "stages" / "searched-0-none-own.npz") as own:
        assert found["proved"] == own["proved"].mean() >= 0.5
        assert found["proved_by_starts"] == [
            (own["proved"] & (own["starts"] <= count)).mean() for count in (1, 2)
        ]
        threshold = own["rmse"][:3].max()
        accepted = (own["rmse"][3:] <= threshold).mean()
    for source in ("real", "trained_on"):
        with np.load(tmp_path / "run" / "stages" / f"searched-0-none-{source}.npz") as other:
            rejected = (other["rmse"] > threshold).mean()
            assert found["sources"][source]["proved"] == 0
            assert found["sources"][source]["smallest"] == pytest.approx(other["rmse"].min())
        accuracy = found["sources"][source]["accuracy"]
        assert accuracy == pytest.approx((accepted + rejected) / 2)
    with np.load(tmp_path / "run" / "stages" / "searched-0-jpeg-80-own.npz") as own:
        named = [str(name) for name in own["replayed"] if name]
    replayed = results["digits_dcgan_0"]["jpeg-80"]["sources"]["own"]["replayed"]
    assert sum(replayed.values()) == len(named) and set(replayed) == set(named)
    noisy = results["digits_dcgan_0"]["noise-0.05"]["sources"]
    assert noisy["real"]["accuracy"] == noisy["trained_on"]["accuracy"] == 1
    assert noisy["own"]["smallest"] > 5  # of errors, all the same
    page = (tmp_path / "run" / "report.html").read_text()
    assert "own, trained on" in page and "jpeg-80" in page
