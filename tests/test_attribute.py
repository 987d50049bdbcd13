"""A folder of suspicious files, judged as a user does it."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import toy_model
from image_files import encode, random_images
from PIL import Image
from scipy import stats
from toy_model import LAYER, own_images

import flipad_jax
from experiments import _config, _suspects
from experiments import attribute as experiment
from flipad_jax import AttributorConfig, data
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection.calibration import verdict_threshold
from flipad_jax.detection.one_class import OneClassConfig

ROOT = Path(__file__).resolve().parent.parent
OF_A_RUN = "# A run of flipad_jax.\n--experiment=attribute\n"


@pytest.fixture(scope="module")
def attributor_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("attributor")
    return toy_model.save_attributor(path, 1600, num_components=10, batch_size=64)


@pytest.fixture
def suspects(tmp_path):
    """Those of `toy_model`, and more that are no images."""
    folder = toy_model.write_suspects(tmp_path / "suspects")
    image = Image.fromarray(random_images(1)[0])
    good = encode(image, "PNG")
    for i in range(9):
        (folder / f"cut{i}.png").write_bytes(good[: 20 * i])
    (folder / "bild.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / 'r\u00e9sum\u00e9 \u7532\u9aa8 \U0001f600 "a,b"\n<b>.png').write_bytes(good)
    return folder


def run(*flags):
    return _config.main(["run.py", "--experiment=attribute", "--preset=smoke", *flags])


def read(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_every_good_file_gets_its_verdict_and_every_bad_one_its_row(
    attributor_folder, suspects, tmp_path, capsys
):
    output = tmp_path / "verdicts.csv"
    assert (
        run(f"--attributor={attributor_folder}", f"--images={suspects}", f"--output={output}") == 0
    )
    assert "cannot be judged" in capsys.readouterr().out
    rows = read(output)
    assert tuple(rows[0]) == ("path", "score", "p_value", "threshold", "verdict", "reason")
    judged = {row["path"]: row for row in rows if row["verdict"] != "cannot_judge"}
    bad = {row["path"]: row for row in rows if row["verdict"] == "cannot_judge"}
    assert len(judged) == 50 + 20 + 2 and len(bad) >= 39 and len(judged) + len(bad) == len(rows)
    assert all(row["reason"] and not row["score"] and not row["p_value"] for row in bad.values())
    assert "caf\udce9.png" in judged
    assert {"pipe.png", "bild.png", "round", "empty.png", "cmyk.jpg", "wrong_size.png"} <= set(bad)
    own = [judged[f"{i:05d}.png"]["verdict"] for i in range(50)]
    foreign = [judged[f"others/{i:05d}.png"]["verdict"] for i in range(20)]
    assert own.count("ours") >= 47 and foreign.count("not_ours") >= 18

    # Every number as the library gives it, the p-value by its definition.
    attributor = flipad_jax.load(attributor_folder)
    images = data.read_images(suspects / "others").images
    found = flipad_jax.verdicts(attributor, images)
    calibration = attributor.calibration_scores
    for i, row in enumerate(judged[f"others/{i:05d}.png"] for i in range(20)):
        np.testing.assert_allclose(float(row["score"]), found.score[i], rtol=1e-4)
        above = int((calibration >= float(row["score"])).sum())
        assert float(row["p_value"]) == (1 + above) / (len(calibration) + 1)
        assert float(row["threshold"]) == verdict_threshold(calibration, 0.005)
        assert (row["verdict"] == "not_ours") == (float(row["score"]) > float(row["threshold"]))
    page = (tmp_path / "verdicts.csv.run" / "report.html").read_text()
    assert "<script" not in page and "cannot judge" in page and "\U0001f600" in page
    results = json.loads((tmp_path / "verdicts.csv.run" / "results.json").read_text())["metrics"]
    assert results["num_files"] == len(rows) and results["cannot_judge"] == len(bad)
    assert len(results["not_ours_at_fdr"]) >= 18


def test_another_rate_scores_nothing_again(attributor_folder, suspects, tmp_path, monkeypatch):
    flags = (f"--attributor={attributor_folder}", f"--images={suspects}")
    output = tmp_path / "v.jsonl"
    assert run(*flags, f"--output={output}") == 0
    first = [json.loads(line) for line in output.read_text().splitlines()]
    monkeypatch.setattr(attribution, "score_with_info", lambda *_: pytest.fail("scored again"))
    assert run(*flags, f"--output={output}", "--fnr=0.3") == 0
    second = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["score"] for row in first] == [row["score"] for row in second]
    assert second[0]["threshold"] < first[0]["threshold"]
    ours = [[row["path"] for row in rows if row["verdict"] == "ours"] for rows in (first, second)]
    assert set(ours[1]) < set(ours[0])


def test_new_and_changed_files_are_scored_and_only_they(
    attributor_folder, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "suspects"
    data.write_images(folder, own_images(2, 40)[0])
    flags = (f"--attributor={attributor_folder}", f"--images={folder}")
    output = f"--output={tmp_path / 'v.csv'}"
    assert run(*flags, output) == 0
    before = {row["path"]: row for row in read(tmp_path / "v.csv")}
    other = random_images(2, seed=5)
    data.write_images(folder, other[:1])  # another image under the name of the first
    Image.fromarray(other[1]).save(folder / "new.png")
    scored = []
    score = attribution.score_with_info

    def counting(attributor, images):
        scored.append(len(images))
        return score(attributor, images)

    monkeypatch.setattr(attribution, "score_with_info", counting)
    assert run(*flags, output) == 0
    after = {row["path"]: row for row in read(tmp_path / "v.csv")}
    assert scored == [2] and set(after) == set(before) | {"new.png"}
    assert after["00000.png"]["verdict"] == after["new.png"]["verdict"] == "not_ours"
    assert after["00001.png"] == before["00001.png"]


def test_a_killed_run_goes_on_and_scores_nothing_twice(attributor_folder, tmp_path):
    folder, output = tmp_path / "suspects", tmp_path / "v.csv"
    data.write_images(folder, own_images(2, 3000)[0])
    command = [sys.executable, str(ROOT / "run.py"), "--experiment=attribute"]
    command += [f"--attributor={attributor_folder}", f"--images={folder}", f"--output={output}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    log = tmp_path / "v.csv.run" / "scores.jsonl"
    deadline = time.monotonic() + 120
    while not (output.exists() and output.read_text().count("\n") > 64):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = log.read_bytes()
    known = kept.count(b"\n") - 1
    assert 64 <= known < 3000  # rows were there while it ran
    log.write_bytes(kept[:-7])  # as if the kill had cut a line
    assert run(*(flag for flag in command[3:])) == 0
    rows = read(output)
    assert [row["path"] for row in rows] == [f"{i:05d}.png" for i in range(3000)]
    lines = log.read_text().splitlines()[1:]
    assert len(lines) == len({json.loads(line)["path"] for line in lines}) == 3000
    results = json.loads((tmp_path / "v.csv.run" / "results.json").read_text())["metrics"]
    assert results["scored_now"] == 3000 - (known - 1)
    p_values = [float(row["p_value"]) for row in rows[:1000]]
    # 400 calibration scores: p-values are uniform up to the draw of those, hence two samples.
    calibration = flipad_jax.load(attributor_folder).calibration_scores
    scores = [float(row["score"]) for row in rows[:1000]]
    assert stats.ks_2samp(scores, calibration).pvalue > 0.01
    assert np.mean(np.array(p_values) <= 0.05) < 0.1


def test_inversions_that_missed_their_bound_are_counted(attributor_folder, tmp_path, capsys):
    fitted = flipad_jax.load(attributor_folder)
    strict = dataclasses.replace(fitted.config, tol=1e-9, max_iters=3)
    flipad_jax.save(dataclasses.replace(fitted, config=strict), tmp_path / "strict")
    data.write_images(tmp_path / "s", own_images(2, 5)[0])
    (tmp_path / "s" / "broken.png").write_bytes(b"no image")
    output = tmp_path / "v.csv"
    flags = (f"--attributor={tmp_path / 'strict'}", f"--images={tmp_path / 's'}")
    for _ in range(2):  # the second time from the scores that are kept
        assert run(*flags, f"--output={output}") == 0
        results = json.loads((tmp_path / "v.csv.run" / "results.json").read_text())["metrics"]
        assert results["num_unconverged"] == 5 and results["cannot_judge"] == 6
        words = "5 of 6 images cannot be judged because their inversion"
        assert words in capsys.readouterr().out
        assert words in (tmp_path / "v.csv.run" / "report.html").read_text()


def test_a_single_file_is_judged(attributor_folder, tmp_path):
    (path,) = data.write_images(tmp_path / "one", own_images(4, 1)[0])
    output = tmp_path / "v.csv"
    assert run(f"--attributor={attributor_folder}", f"--images={path}", f"--output={output}") == 0
    (row,) = read(output)
    assert row["path"] == "00000.png" and row["verdict"] == "ours"


def test_the_workdir_may_lie_among_the_images(attributor_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.write_images(tmp_path, own_images(4, 3)[0])
    flags = (f"--attributor={attributor_folder}", "--images=.", "--output=v.csv")
    assert run(*flags) == 0
    data.write_images(tmp_path / "v.csv.run" / "figures", own_images(4, 1)[0])
    assert run(*flags) == 0
    assert len(read("v.csv")) == 3


def find(path, workdir, told=None):
    warn = [].append if told is None else told.append
    return _suspects.find(str(path), SimpleNamespace(workdir=workdir, warn=warn))


def test_what_is_passed_over_is_told(tmp_path):
    """And nobody hides images by a file that only has the name of a run's."""
    own = own_images(7, 3)[0]
    data.write_images(tmp_path / "sub", own)
    (tmp_path / "sub" / "config.flags").touch()
    for name in ("photo.heic", "IMG_0001", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    Image.fromarray(own[0]).save(tmp_path / "grid.ppm")
    data.write_images(tmp_path / "run", own[:2])
    (tmp_path / "run" / "config.flags").write_text(OF_A_RUN)
    told = []
    found = find(tmp_path, tmp_path / "elsewhere", told)
    assert found.paths == ("grid.ppm", *(f"sub/0000{i}.png" for i in range(3)))
    names, drawn = told  # photo.heic, IMG_0001 and two times config.flags; two images
    assert " 4 files whose names do not end in .png, " in names and "passed over" in names
    assert " 2 images that runs of ours drew" in drawn


def test_an_answer_stays_until_the_next_is_complete(attributor_folder, tmp_path, monkeypatch):
    """And where an answer is not that of results.json, there is none."""
    data.write_images(tmp_path / "s", own_images(7, 3)[0])
    output, workdir = tmp_path / "v.csv", tmp_path / "w"
    flags = (f"--attributor={attributor_folder}", f"--images={tmp_path / 's'}")
    flags += (f"--output={output}", f"--workdir={workdir}")
    assert run(*flags) == 0
    before = output.read_bytes()
    data.write_images(tmp_path / "s" / "more", own_images(8, 2)[0])
    decide = experiment._decide

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "_decide", interrupted)
    assert run(*flags) == 130
    assert output.read_bytes() == before and not (workdir / "results.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "v.csv", "w"]
    (tmp_path / ".v.csv.123.partial").touch()  # of one that was killed
    assert run(*flags, "--attributor=nowhere") == 2
    monkeypatch.setattr(experiment, "_decide", decide)
    assert run(*flags) == 0
    assert len(read(output)) == 5 and (workdir / "results.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "v.csv", "w"]
    results = (workdir / "results.json").read_bytes()
    assert run(*flags, f"--output={tmp_path / 's' / '00000.png'}") == 2
    assert (workdir / "results.json").read_bytes() == results
    assert not (workdir / "results.earlier.json").exists()


def test_what_another_run_drew_is_not_judged(tmp_path):
    """Nor what lies in its subfolders; a run's own folder, if it is asked for, is."""
    (tmp_path / "images/other.run/figures").mkdir(parents=True)
    own = own_images(7, 3)[0]
    data.write_images(tmp_path / "images", own[:1])
    data.write_images(tmp_path / "images/kept", own[1:2])
    data.write_images(tmp_path / "images/other.run/figures", own[2:])
    (tmp_path / "images/other.run/config.flags").write_text(OF_A_RUN)
    found = find(tmp_path / "images", tmp_path / "run")
    assert found.paths == ("00000.png", "kept/00000.png")
    found = find(tmp_path / "images/other.run", tmp_path / "run")
    assert found.paths == ("figures/00000.png",)
    (tmp_path / "outer").mkdir()
    (tmp_path / "images/other.run").rename(tmp_path / "outer/other.run")
    with pytest.raises(_config.UsageError, match="all 1 images below .*outer. were drawn by runs"):
        find(tmp_path / "outer", tmp_path / "run")
    found = find(tmp_path / "images/kept", tmp_path / "images")
    assert found.paths == ("00000.png",)


def test_the_answers_of_another_run_are_not_overwritten(tmp_path):
    """As whoever follows the advice to give another workdir would do it."""
    output = tmp_path / "v.csv"
    output.write_text(",".join(experiment.COLUMNS) + "\n")
    own = tmp_path / "v.csv.run"

    def check(workdir, has_kept):
        record = SimpleNamespace(
            workdir=tmp_path / workdir, shown=workdir, has_kept_anything=lambda: has_kept
        )
        _suspects.check_output(output, experiment.COLUMNS, record)

    check("other", False)  # nothing but the head
    own.mkdir()
    (own / "config.flags").write_text(OF_A_RUN)
    check("v.csv.run", False)
    with pytest.raises(_config.UsageError, match="v.csv.run wrote; give another name"):
        check("other", True)
    shutil.rmtree(own)
    with output.open("a") as file:
        file.write("a.png,1.0,0.5,2.0,ours,\n")
    check("other", True)
    with pytest.raises(_config.UsageError, match="answers of another run than that in other"):
        check("other", False)


def test_mistakes_are_one_line_before_anything_is_computed(attributor_folder, tmp_path, capsys):
    folder = tmp_path / "suspects"
    data.write_images(folder, own_images(2, 3)[0])
    notes = tmp_path / "notes.csv"
    notes.write_text("my,notes\n1,2\n")
    good = {"attributor": attributor_folder, "images": folder, "output": tmp_path / "v.csv"}
    for change, message in (
        ({"attributor": ""}, "--attributor is missing"),
        ({"images": ""}, "--images is missing"),
        ({"attributor": tmp_path / "nothing"}, "not an attributor"),
        ({"images": tmp_path / "nothing"}, "no such file or folder"),
        ({"output": tmp_path / "v.txt"}, ".csv or .jsonl"),
        ({"output": notes}, "holds no rows of ours"),
        ({"fnr": 1.5}, "at most 1"),
    ):
        flags = {**good, **change, "workdir": tmp_path / "w"}
        assert run(*(f"--{name}={value}" for name, value in flags.items())) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error:") and message in error, error
    assert notes.read_text() == "my,notes\n1,2\n" and not (tmp_path / "v.csv").exists()
    assert run(*(f"--{name}={value}" for name, value in good.items())) == 0
    # Another folder must not mix with the scores and verdicts that are there.
    data.write_images(tmp_path / "more", own_images(3, 3)[0])
    good["images"] = tmp_path / "more"
    assert run(*(f"--{name}={value}" for name, value in good.items())) == 2
    assert "other settings: images" in capsys.readouterr().err


def test_few_calibration_images_are_said_on_the_way(tmp_path, capsys):
    images, z = own_images(1, 100)
    config = AttributorConfig(
        one_class=OneClassConfig(num_components=5), batch_size=64, num_altered=0
    )
    fitted = flipad_jax.fit(LAYER, z.mean(0), images, rng=jax.random.key(0), config=config)
    flipad_jax.save(fitted, tmp_path / "a")
    data.write_images(tmp_path / "s", images[:4])
    flags = (f"--attributor={tmp_path / 'a'}", f"--images={tmp_path / 's'}")
    assert run(*flags, f"--workdir={tmp_path / 'w'}") == 0
    assert "certify no fnr below 0.0385" in capsys.readouterr().err  # 1 / 26
    assert run(f"--workdir={tmp_path / 'w'}", "--fnr=0") == 0
    assert "certify no fnr below 0.0385" in capsys.readouterr().err  # 0 is no exception
    assert len(read(tmp_path / "w" / "verdicts.csv")) == 4


def test_only_whole_lines_of_the_log_are_believed(tmp_path):
    path = tmp_path / "scores.jsonl"
    judged = experiment.Judged("a.png", "00", 1.5, 0.1, True, "", "")
    with experiment._ScoreLog(path, "model") as log:
        log.add([judged])
    with experiment._ScoreLog(path, "model") as log:
        assert log.known == {("a.png", "00"): judged}
        log.add([judged])
    assert path.read_text().count("\n") == 2  # nothing is written twice
    with path.open("a") as file:
        file.write('{"path": "b.png"}\n{"path": "c')
    with experiment._ScoreLog(path, "model") as log:
        assert set(log.known) == {("a.png", "00")}
    with experiment._ScoreLog(path, "another model") as log:
        assert not log.known
