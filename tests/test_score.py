"""A corpus, scored as a user does it: killed, started again, on a cluster."""

import csv
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import toy_model
from image_files import broken_files, png, random_images
from test_corpora import write_records
from toy_model import own_images

import flipad_jax
from experiments import _config
from experiments import score as experiment
from experiments._record import Run, read_flags
from flipad_jax import checkpoints, corpora, data, records
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection import calibration

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def attributor_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("attributor")
    return toy_model.save_attributor(path, 400, batch_size=16, max_iters=5)


@pytest.fixture
def suspects(tmp_path):
    return toy_model.write_suspects(tmp_path / "suspects")


def run(*flags):
    return _config.main(["run.py", "--experiment=score", "--preset=smoke", *flags])


def read(workdir):
    """All rows of a workdir, shard after shard."""
    rows = []
    for path in sorted((workdir / "scores").glob("scores-*")):
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv_file = path.suffix == ".csv"
            rows += csv.DictReader(file) if csv_file else map(json.loads, file)
    return rows


def metrics(workdir):
    return json.loads((workdir / "results.json").read_text())["metrics"]


def files(workdir):
    folder = workdir / "scores"
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_gets_the_verdicts_of_attribute(attributor_folder, suspects, tmp_path, capsys):
    flags = (f"--attributor={attributor_folder}", f"--images={suspects}")
    workdir = tmp_path / "w"
    assert run(*flags, f"--workdir={workdir}") == 0
    assert "cannot be judged" in capsys.readouterr().out
    other = ["run.py", "--experiment=attribute", *flags, f"--output={tmp_path / 'v.csv'}"]
    assert _config.main(other) == 0
    with open(tmp_path / "v.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        wanted = list(csv.DictReader(file))
    rows = read(workdir)
    assert len(rows) == 50 + 20 + 1 + len(broken_files()) + 1
    for row, same in zip(rows, wanted, strict=True):
        for name in ("path", "p_value", "threshold", "verdict", "reason"):
            assert row[name] == same[name]
        if row["score"]:  # batches are cut in other places
            np.testing.assert_allclose(float(row["score"]), float(same["score"]), rtol=1e-5)
    names = sorted(p.name for p in (workdir / "scores").glob("scores-*"))
    assert names == [f"scores-{i:05d}-of-00004.csv" for i in range(4)]
    found = metrics(workdir)
    assert found["num_records"] == len(rows) == found["scored_now"]
    for verdict in corpora.VERDICTS:
        assert found[verdict] == sum(row["verdict"] == verdict for row in rows) > 15
    page = (workdir / "report.html").read_text()
    assert "<script" not in page and "Examples: not ours" in page and "unconverged" in page
    assert page.count("data:image/png;base64,") >= 1 + 12 + 12

    # The same as JSON Lines.
    assert run(*flags, f"--workdir={tmp_path / 'j'}", "--format=jsonl") == 0
    lines = read(tmp_path / "j")
    assert [line["verdict"] for line in lines] == [row["verdict"] for row in rows]
    assert [str(line["score"] or "") for line in lines] == [row["score"] for row in rows]


def test_a_second_start_scores_only_what_is_damaged(
    attributor_folder, suspects, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "w"
    flags = (f"--attributor={attributor_folder}", f"--images={suspects}", f"--workdir={workdir}")
    assert run(*flags) == 0
    before = files(workdir)
    path = workdir / "scores" / "scores-00002-of-00004.csv"
    path.write_bytes(path.read_bytes().replace(b"not_ours", b"ours", 1))
    scored = []
    score = attribution.score_with_info
    monkeypatch.setattr(
        attribution, "score_with_info", lambda a, x: scored.append(len(x)) or score(a, x)
    )
    assert _config.main(["run.py", "--experiment=score", f"--workdir={workdir}"]) == 0
    assert "3 of 4 shards are complete and kept" in capsys.readouterr().err
    assert 0 < sum(scored) <= 32 and metrics(workdir)["scored_now"] == 32
    assert files(workdir) == before
    scored.clear()
    assert run(*flags) == 0
    assert not scored and files(workdir) == before
    assert metrics(workdir)["records_per_second"] is None


def test_a_run_that_is_asked_to_stop_says_so_and_goes_on(
    attributor_folder, suspects, tmp_path, monkeypatch
):
    flags = (f"--attributor={attributor_folder}", f"--images={suspects}")
    config = _config.make_config(
        experiment, "smoke", attributor=str(attributor_folder), images=str(suspects)
    )
    workdir = tmp_path / "w"
    asked = iter([False, False, False, True])
    monkeypatch.setattr(Run, "should_stop", lambda self: next(asked))
    with pytest.raises(checkpoints.Preempted):
        _config.execute(experiment, config, workdir=workdir, preset="smoke")
    assert len(list((workdir / "scores" / "receipts").iterdir())) == 2
    monkeypatch.setattr(Run, "should_stop", lambda self: False)
    assert run(*flags, f"--workdir={workdir}") == 0
    assert metrics(workdir)["shards_kept"] == 2


def test_a_false_discovery_rate_over_the_corpus(attributor_folder, suspects, tmp_path, capsys):
    """That of all rows together, and another one scores nothing."""
    workdir = tmp_path / "w"
    flags = (f"--attributor={attributor_folder}", f"--images={suspects}", f"--workdir={workdir}")
    found = []
    for rate in (0.05, 0.3, 0.0):
        assert run(*flags, f"--fdr={rate}") == 0
        p_values = np.array([float(row["p_value"] or "nan") for row in read(workdir)])
        hits = calibration.benjamini_hochberg(p_values, rate)
        values = metrics(workdir)
        assert values["num_not_ours_at_fdr"] == hits.sum()
        if hits.any():
            assert values["p_value_at_fdr"] == p_values[hits].max()
        else:
            assert values["p_value_at_fdr"] is None
        found.append(hits.sum())
        assert f"{hits.sum()} records are not ours at a false-discovery" in capsys.readouterr().out
    assert found[1] > 0 and found[2] == 0 and values["scored_now"] == 0


def test_a_copy_of_the_corpus_goes_on_with_its_scores(attributor_folder, suspects, tmp_path):
    """By whatever path it and the attributor are named, if the times are kept."""
    workdir = tmp_path / "w"
    flags = (f"--attributor={attributor_folder}", f"--images={suspects}", f"--workdir={workdir}")
    assert run(*flags) == 0
    before = files(workdir)
    for path, folder in ((suspects, "moved"), (attributor_folder, "attributor")):
        subprocess.run(["cp", "-a", path, tmp_path / folder], check=True)
    assert run(*flags, f"--images={tmp_path / 'moved'}") == 0
    assert files(workdir) == before and metrics(workdir)["scored_now"] == 0
    # It is remembered, as everything else is.
    flags = ["run.py", "--experiment=score", f"--workdir={workdir}"]
    assert _config.main([*flags, f"--attributor={tmp_path / 'attributor'}"]) == 0
    assert files(workdir) == before and metrics(workdir)["scored_now"] == 0
    remembered = read_flags(workdir)
    assert remembered["images"] == str(tmp_path / "moved")
    assert remembered["attributor"] == str(tmp_path / "attributor")


def test_a_corpus_or_an_attributor_that_has_changed_is_refused(
    attributor_folder, suspects, tmp_path, capsys
):
    workdir = tmp_path / "w"
    flags = (f"--attributor={attributor_folder}", f"--images={suspects}", f"--workdir={workdir}")
    assert run(*flags) == 0
    before = files(workdir)
    data.write_images(suspects, own_images(7, 1)[0])
    assert run(*flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error:") and "the source has changed" in error
    assert run(*flags, "--fnr=0.1") == 2
    assert "fnr is 0.005 there and 0.1 here" in capsys.readouterr().err
    assert files(workdir) == before


def test_mistakes_are_one_line_before_anything_is_computed(
    attributor_folder, tmp_path, capsys, monkeypatch
):
    data.write_images(tmp_path / "suspects", own_images(2, 3)[0])
    write_records(tmp_path / "empty.array_record", [])
    good = {"attributor": attributor_folder, "images": tmp_path / "suspects"}
    for change, message in (
        ({"attributor": ""}, "--attributor is missing"),
        ({"images": ""}, "--images is missing"),
        ({"attributor": tmp_path / "nothing"}, "not an attributor"),
        ({"images": tmp_path / "nothing"}, "is neither there"),
        ({"images": tmp_path / "empty.array_record"}, "holds no records"),
        ({"images": tmp_path / "*.array"}, "matches no file"),
        ({"format": "xml"}, "expected one of csv, jsonl"),
        ({"shard_size": 0}, "at least 1"),
        ({"fnr": 1.5}, "at most 1"),
    ):
        flags = {**good, **change, "workdir": tmp_path / "w"}
        assert run(*(f"--{name}={value}" for name, value in flags.items())) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error:") and message in error, error
    assert not (tmp_path / "w" / "scores").exists()
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it was not installed
    flags = {**good, "cluster": "local", "workdir": tmp_path / "w"}
    assert run(*(f"--{name}={value}" for name, value in flags.items())) == 2
    assert "pip install 'flipad_jax[cluster]'" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_many_kills_lose_and_double_nothing(attributor_folder, tmp_path):
    write_records(tmp_path / "c.array_record", map(png, own_images(2, 3000)[0]))
    flags = [f"--attributor={attributor_folder}", f"--images={tmp_path / 'c.array_record'}"]
    flags += ["--shard_size=48"]
    workdir = tmp_path / "w"
    command = [sys.executable, str(ROOT / "run.py"), "--experiment=score", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_ENABLE_X64": "true"}
    draw = np.random.default_rng(0)
    receipts = workdir / "scores" / "receipts"
    for _ in range(5):
        process = subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        count = len(list(receipts.glob("*.json")))
        while process.poll() is None and len(list(receipts.glob("*.json"))) == count:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.2))  # at any moment of a shard
        process.kill()
        process.wait()
    kept = len(list(receipts.glob("*.json")))
    assert 5 <= kept < 63 and not (workdir / "results.json").exists()
    assert run(*flags, f"--workdir={workdir}") == 0
    assert metrics(workdir)["shards_kept"] == kept
    assert metrics(workdir)["scored_now"] == 3000 - 48 * kept
    assert [row["path"] for row in read(workdir)] == [f"c.array_record[{i}]" for i in range(3000)]
    assert run(*flags, f"--workdir={tmp_path / 'whole'}") == 0
    assert files(workdir) == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_cluster_of_two_loses_one_and_no_record(attributor_folder, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_ENABLE_X64", "true")  # as this process has it: the bytes must be equal
    from ray.cluster_utils import Cluster

    write_records(tmp_path / "c.array_record", [*map(png, own_images(2, 1500)[0]), b"none"])
    where = {"attributor": str(attributor_folder), "images": str(tmp_path / "c.array_record")}
    flags = tuple(f"--{name}={value}" for name, value in where.items())
    node = {"num_cpus": 1, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        second = cluster.add_node(**node)
        receipts = tmp_path / "w" / "scores" / "receipts"

        def count():
            return len(list(receipts.glob("*.json")))

        # First a run that is asked to stop when it has the first shards.
        monkeypatch.setattr(Run, "should_stop", lambda self: True)
        config = _config.make_config(experiment, "smoke", **where, cluster=cluster.address)
        with pytest.raises(checkpoints.Preempted):
            _config.execute(experiment, config, workdir=tmp_path / "w", preset="smoke")
        assert 0 < count() < 47
        monkeypatch.setattr(Run, "should_stop", lambda self: False)
        there, at_kill = count(), []

        def kill():
            while count() < there + 10:
                time.sleep(0.02)
            cluster.remove_node(second, allow_graceful=False)
            at_kill.append(count())

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        assert run(*flags, f"--workdir={tmp_path / 'w'}", f"--cluster={cluster.address}") == 0
        killer.join(timeout=60)
        assert at_kill and at_kill[0] < 47
    finally:
        cluster.shutdown()
    rows = read(tmp_path / "w")
    assert [row["path"] for row in rows] == [f"c.array_record[{i}]" for i in range(1501)]
    assert rows[1500]["verdict"] == "cannot_judge"
    assert run(*flags, f"--workdir={tmp_path / 'alone'}") == 0
    assert files(tmp_path / "w") == files(tmp_path / "alone")


def test_what_a_machine_of_a_cluster_does(attributor_folder, tmp_path):
    """The actor without Ray around it: its arguments are plain, what it writes is what counts."""
    from flipad_jax import cluster

    write_records(tmp_path / "c.array_record", map(png, own_images(2, 50)[0]))
    where = {"images": str(tmp_path / "c.array_record")}
    source = records.open_source(**where)
    settings = {"fnr": 0.005, "shard_size": 20, "format": "csv"}
    job = {
        "version": flipad_jax.__version__,
        "attributor": str(attributor_folder),
        "folder": str(tmp_path / "out"),
        "source": where,
        "settings": settings,
    }
    json.dumps(job)
    with pytest.raises(ValueError, match="not where all machines"):
        cluster._Scorer(job)
    output = corpora.open_output(tmp_path / "out", source, attributor_folder, **settings)
    scorer = cluster._Scorer(job)
    assert scorer({"shard": np.array([1])})["shard"].tolist() == [1]
    assert corpora.missing(output) == [0, 2]
    written = output.path(1).stat().st_mtime_ns
    scorer({"shard": np.array([1])})  # again, after a machine died before it could say so
    assert output.path(1).stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="install the same on all"):
        cluster._Scorer({**job, "version": "0.0.1"})
    with pytest.raises(ValueError, match="fnr is"):
        cluster._Scorer({**job, "settings": {**settings, "fnr": 0.1}})


def test_the_examples_of_the_guide_run(attributor_folder, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "corpora.md").read_text()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(attributor_folder, "runs/mine/attributor")
    for name, images in (("a", own_images(2, 30)[0]), ("b", random_images(9))):
        write_records(Path("crawl") / f"{name}.array_record", map(png, images))
    scope: dict = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(example, "corpora.md", "exec"), scope)  # noqa: S102
    assert scope["manifest"]["complete"] and len(scope["manifest"]["shards"]) == 3
    assert scope["found"].counts["cannot_judge"] == 40  # digits are no 8 x 8 colour images
    commands = re.findall(r"^python run\.py [^\\\n]*(?:\\\n[^\\\n]*)*", text, re.M)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "))
        names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
        known = {field.name for field in dataclasses.fields(experiment.Config)}
        assert set(names) <= known | {"experiment", "workdir"}
    assert _config.main(shlex.split(commands[0].replace("\\\n", " "))[1:]) == 0
    rows = list(scope["rows"]("runs/crawl/scores"))
    assert [row["path"][0] for row in rows] == ["a"] * 30 + ["b"] * 9
    assert [row["verdict"] for row in rows].count("ours") >= 28
    # What the guide says of files and flags.
    for flag in re.findall(r"`--(\w+)", text):
        assert flag in known | {"experiment", "workdir"}, flag
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / "docs" / link).exists()
