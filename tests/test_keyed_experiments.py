"""The experiments of paper 2 as a user runs them: numbers recomputed from what the run kept."""

import contextlib
import csv
import dataclasses
import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import _config, _keyed, key_capacity, key_quality
from experiments import registry as registry_experiment
from experiments import robust_training, training_time
from flipad_jax import data
from flipad_jax.generators import sampling, zoo
from flipad_jax.registry import ledger, user_generators

# Enough for two copies of the zoo's first generator to be told apart.
TRAINED = (
    "--key_steps=300",
    "--num_generated=1000",
    "--num_steps=200",
    "--batch_size=32",
    "--max_rounds=8",
    "--num_search=300",
    "--num_test=200",
)


def run(workdir, experiment, *flags):
    arguments = ["run.py", f"--experiment={experiment}", "--preset=smoke", f"--workdir={workdir}"]
    return _config.main([*arguments, *flags])


def metrics_of(workdir):
    return json.loads((workdir / "results.json").read_text())["metrics"]


def settings_read(monkeypatch, module):
    """A set that fills, while the experiment runs, with the names of the settings that it reads."""
    read: set[str] = set()
    fields = {field.name for field in dataclasses.fields(module.Config)}

    class Watched(module.Config):
        def __getattribute__(self, name):
            if name in fields:
                read.add(name)
            return super().__getattribute__(name)

    def run_only(config, record):
        read.clear()  # Before and after a run all of them are written down.
        found = real_run(config, record)
        monkeypatch.setattr(Watched, "__getattribute__", object.__getattribute__)
        return found

    real_run = module.run
    monkeypatch.setattr(module, "Config", Watched)
    monkeypatch.setattr(module, "run", run_only)
    return read


def all_settings(module):
    return {field.name for field in dataclasses.fields(module.Config)}


def stage(workdir, name):
    with np.load(workdir / "stages" / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def real_responses(keys, num):
    x = data.to_float(data.load("digits", split="test", image_size=32)[:num])
    return x.reshape(num, -1).astype(float) @ keys.reshape(len(keys), -1).astype(float).T


@pytest.fixture(scope="module", name="table_1")
def _table_1(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("table1")
    assert run(workdir, "keyed_models", *TRAINED) == 0
    return workdir


@pytest.mark.slow
def test_table_1_tells_copies_apart_at_right_angles_only(table_1):
    metrics = metrics_of(table_1)
    right, acute = metrics["sets"]["orthogonal"], metrics["sets"]["45 degrees"]
    assert min(right["distinguishability"]) > 0.95 and right["attributability"] > 0.95
    assert acute["attributability"] < right["attributability"] - 0.1
    np.testing.assert_allclose(acute["largest_cosine"], np.sqrt(0.5), atol=1e-5)
    np.testing.assert_allclose(right["largest_cosine"], 0, atol=1e-5)
    assert "Inception" in metrics["features"] and "not Inception" in metrics["features"]


@pytest.mark.slow
def test_table_1_is_what_the_kept_responses_say(table_1):
    right = metrics_of(table_1)["sets"]["orthogonal"]
    keys = stage(table_1, "keys")["keys"]
    real = real_responses(keys, 200)
    tables = [stage(table_1, f"measured-{i}") for i in range(2)]
    for i, arrays in enumerate(tables):
        own = arrays["responses"]
        d = ((own[:, i] > 0).mean() + (real[:, i] < 0).mean()) / 2
        assert right["distinguishability"][i] == pytest.approx(d)
        # eps = difference - gamma phi, so the mean difference is mu + gamma phi.
        shift = arrays["error_mean"] + right["gamma"][i] * keys[i].ravel()
        assert right["shift_of_mean"][i] == pytest.approx(np.linalg.norm(shift), rel=1e-4)
        assert right["shift_of_mean"][i] <= right["shift_mean"][i]
    a = [
        ((t["responses"][:, i] > 0) & (t["responses"][:, 1 - i] <= 0)).mean()
        for i, t in enumerate(tables)
    ]
    assert right["attributability"] == pytest.approx(np.mean(a))
    page = (table_1 / "report.html").read_text()
    for text in ("Table 1", "45 degrees", "Figure 2", "not Inception"):
        assert text in page


@pytest.mark.slow
def test_a_finished_user_is_not_trained_again(table_1, tmp_path, monkeypatch, capsys):
    (table_1 / "results.json").unlink()
    monkeypatch.setattr(user_generators, "search", lambda *_, **__: pytest.fail("trained"))
    assert run(table_1, "keyed_models", *TRAINED) == 0
    assert "orthogonal" in capsys.readouterr().out


@pytest.mark.slow
def test_robust_training_reports_both_codecs(tmp_path):
    assert run(tmp_path, "robust_training", "--num_test=80") == 0
    metrics = metrics_of(tmp_path)
    after = metrics["after"]["10"]
    assert set(after) == {"blur", "jpeg"}
    arrays = stage(tmp_path, "attacked-after-jpeg-0-jpeg")
    for prefix in ("", "real_codec_"):
        own, real = arrays[f"{prefix}own"], arrays[f"{prefix}real"]
        d = [((own[i, :, i] > 0).mean() + (real[:, i] < 0).mean()) / 2 for i in range(2)]
        np.testing.assert_allclose(after["jpeg"][f"{prefix}distinguishability"], d)
    # The two codecs are not the same program, and agree nearly.
    difference = np.abs(arrays["own"] - arrays["real_codec_own"])
    assert 0 < difference.max() < 0.5 * np.abs(arrays["own"]).max()
    assert "real_codec_distinguishability" not in after["blur"]


@pytest.mark.slow
def test_key_quality_and_capacity_hold_to_their_definitions(tmp_path, monkeypatch):
    read = settings_read(monkeypatch, key_quality)
    assert run(tmp_path / "q", "key_quality") == 0
    assert read == all_settings(key_quality) - {"inception_weights"}  # for --features=inception
    metrics = metrics_of(tmp_path / "q")
    keys = stage(tmp_path / "q", "keys")["keys"]
    own = sampling.generate(
        zoo.load("digits_dcgan_0"), jax.random.fold_in(jax.random.key(0), 4), 60
    )
    flat = data.to_float(own).reshape(60, -1) @ keys.reshape(len(keys), -1).T
    d_max = np.abs(np.concatenate([flat, real_responses(keys, 60)])).max(axis=0)
    np.testing.assert_allclose(metrics["d_max"], d_max, rtol=1e-4)
    correlation = np.corrcoef(d_max, metrics["quadratic_form"])[0, 1]
    assert metrics["correlation"] == pytest.approx(correlation, abs=1e-4)
    assert metrics["models"]["smallest d_max"]["d_max"] == pytest.approx(min(d_max), rel=1e-4)
    assert metrics["largest"][0] > metrics["smallest"][0] >= -1e-3 * metrics["largest"][0]

    read = settings_read(monkeypatch, key_capacity)
    assert run(tmp_path / "c", "key_capacity") == 0
    assert read == all_settings(key_capacity)
    for row in metrics_of(tmp_path / "c")["rows"]:
        # No orthonormal keys can exceed the bound; those of eq. 9 are only nearly orthogonal.
        slack = 1e-3 if row["method"] == "joint" else 0.1
        assert row["mean_response"] <= row["mean_response_bound"] * (1 + slack)


@pytest.mark.slow
def test_training_time_times_all_of_table_4(tmp_path, monkeypatch):
    read = settings_read(monkeypatch, training_time)
    assert run(tmp_path, "training_time") == 0
    seconds = metrics_of(tmp_path)["seconds"]
    assert len(seconds) == 8 and min(seconds.values()) > 0
    assert read == all_settings(training_time)


@pytest.fixture(scope="module", name="registry")
def _registry(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("registry")
    assert run(workdir, "registry", "--users=ann,bob", *TRAINED) == 0
    return workdir


@pytest.mark.slow
def test_a_registry_finds_who_made_images(registry, tmp_path, capsys):
    held = ledger.load(registry)
    suspects = tmp_path / "suspects"
    for index, name in enumerate(("ann", "bob")):
        model = ledger.load_model(held, name)
        made = sampling.generate(model, jax.random.key(77 + index), 30)
        data.write_images(suspects / name, made)
    data.write_images(suspects / "real", data.load("digits", split="test", image_size=32)[:30])
    (suspects / "broken.png").write_text("no image")
    output = tmp_path / "rows.csv"
    flags = (f"--images={suspects}", f"--output={output}", "--ask=bob", *TRAINED)
    assert run(registry, "registry", *flags) == 0
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 91
    right = {"ann": "ann", "bob": "bob", "real": "nobody"}
    read = [row for row in rows if not row["reason"]]
    hits = [row["user"] == right[row["path"].split("/")[0]] for row in read]
    assert len(read) == 90 and np.mean(hits) > 0.9
    # A claim is a response above zero: of bob's key as it was asked for.
    for row in read:
        if row["user"] == "bob":
            assert float(row["towards_bob"]) == pytest.approx(float(row["margin"]), abs=1e-6)
    assert metrics_of(registry)["attributed"]["cannot be read"] == 1
    capsys.readouterr()
    assert run(registry, "registry", "--ask=dan") == 2
    assert "no such user" in capsys.readouterr().err
    # An output that is somebody's file is left alone.
    output.write_text("my diary\n")
    assert run(registry, "registry", f"--images={suspects}", f"--output={output}") == 2
    assert output.read_text() == "my diary\n"


def test_a_question_founds_no_registry(tmp_path, capsys):
    data.write_images(tmp_path / "images", np.zeros((1, 32, 32, 1), np.uint8))
    assert run(tmp_path / "run", "registry", f"--images={tmp_path / 'images'}") == 2
    assert "there is no registry in" in capsys.readouterr().err
    assert not (tmp_path / "run" / "registry.json").exists()


@pytest.mark.slow
def test_a_new_user_changes_nothing_for_the_others(registry):
    before = ledger.load(registry)
    files = {p.name: p.read_bytes() for p in (registry / "models").iterdir()}
    assert run(registry, "registry", "--users=ann,cleo", *TRAINED) == 0
    after = ledger.load(registry)
    assert after.names == ("ann", "bob", "cleo")
    np.testing.assert_array_equal(after.keys[:2], before.keys)
    np.testing.assert_allclose(after.keys[2].ravel() @ before.keys.reshape(2, -1).T, 0, atol=1e-5)
    for name, content in files.items():
        assert (registry / "models" / name).read_bytes() == content


@pytest.mark.slow
def test_a_registry_remembers_its_settings_and_cannot_be_overwritten(registry, capsys):
    before = {p.name: p.read_bytes() for p in registry.iterdir() if p.suffix == ".safetensors"}
    assert _config.main(["run.py", "--experiment=registry", f"--workdir={registry}"]) == 0
    assert "--num_generated=1000" in (registry / "config.flags").read_text()
    assert run(registry, "registry", "--overwrite") == 2
    assert "cannot be made again" in capsys.readouterr().err
    assert run(registry, "registry", "--seed=1") == 2
    said = capsys.readouterr().err
    assert "seed is 0 there and 1 here" in said and "overwrite" not in said
    after = {p.name: p.read_bytes() for p in registry.iterdir() if p.suffix == ".safetensors"}
    assert after == before


@pytest.mark.slow
def test_a_copy_that_cannot_be_told_is_not_handed_out(tmp_path, capsys):
    flags = ("--users=ann", "--nohand_out_unreached", "--max_rounds=1")
    assert run(tmp_path, "registry", *flags) == 0
    assert "no copy yet" in capsys.readouterr().err
    assert ledger.load(tmp_path).users[0].sha256 is None
    assert "none yet" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_a_killed_registry_goes_on_at_the_user_where_it_was(tmp_path, monkeypatch):
    real_search = user_generators.search
    calls = []

    def search(*args, **kwargs):
        calls.append(kwargs["first"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real_search(*args, **kwargs)

    monkeypatch.setattr(user_generators, "search", search)
    assert run(tmp_path, "registry", "--users=ann,bob,cleo") == 130
    held = ledger.load(tmp_path)
    assert [user.sha256 is not None for user in held.users] == [True, False, False]
    assert run(tmp_path, "registry") == 0
    assert calls == [0, 1, 1, 2]
    np.testing.assert_array_equal(ledger.load(tmp_path).keys, held.keys)


@pytest.mark.parametrize(
    "experiment, flag, said",
    [
        ("keyed_models", "--root=nothing", "no generator of the zoo"),
        ("keyed_models", "--dataset=photos", "a key belongs to one size"),
        ("keyed_models", "--num_acute=1", "two keys"),
        ("keyed_models", "--features=inception", "inception_weights"),
        ("robust_training", "--qualities=1,1", "each one once"),
        ("key_capacity", "--counts=2000", "--counts=2000: so many keys do not fit"),
        ("key_capacity", "--key_bandwidth=2", "--counts=8: so many keys do not fit"),
        ("keyed_models", "--key_bandwidth=1", "--num_users=2: so many keys do not fit"),
        ("keyed_models", "--num_acute=1024", "room for 1024 of the 1025 directions"),
        ("registry", "--users=a,a", "each one once"),
        ("registry", "--users=../x", "begins with a letter"),
        ("registry", "--output=rows.txt", ".csv or .jsonl"),
        ("registry", "--dataset=photos", "a key belongs to one size"),
        ("registry", "--ask=nobody_there", "there is no such user"),
        ("registry", "--users=root", "stands for something else"),
        ("key_capacity", "--counts=4,4", "each one once"),
        ("key_quality", "--root=digits_lsgan_0", "forward mode"),
        ("keyed_models", "--root=", "train_generator"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(
    tmp_path, capsys, monkeypatch, experiment, flag, said
):
    monkeypatch.setattr(user_generators, "search", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(
        registry_experiment.user_keys, "joint", lambda *_, **__: pytest.fail("computed")
    )
    assert run(tmp_path / "w", experiment, flag) == 2
    assert said in capsys.readouterr().err
    # Nothing was begun: other settings may be tried in the same place.
    assert {path.name for path in (tmp_path / "w").rglob("*")} <= {"config.flags", ".lock"}


def test_a_model_that_missed_is_told_by_its_number_on_the_page_and_why():
    root = zoo.load("digits_dcgan_0")
    said: list[str] = []
    arrays = {
        "gamma": np.ones(2),
        "rounds": np.array([3, 0]),
        "reached": np.zeros(2, bool),
    }
    seconds = {"model-0-1": 1.0, "model-2-3": 1.0}
    record = types.SimpleNamespace(
        stage=lambda name, compute, text: arrays, seconds=seconds, warn=said.append
    )
    settings = _keyed.ModelSettings()
    _keyed.make_models(settings, record, root, None, np.zeros((4, 32, 32, 1)), together=2)
    assert [text.partition(":")[0] for text in said] == [f"model {i}" for i in (1, 2, 3, 4)]
    for trained in (said[0], said[2]):
        assert "after 3 rounds; more --max_rounds or --num_steps may help" in trained
    for hopeless in (said[1], said[3]):
        assert "too many real images" in hopeless and "no shift within" in hopeless
        assert "--max_rounds" not in hopeless


@pytest.mark.slow
def test_what_a_registry_advises_can_be_given_at_the_next_start(tmp_path, capsys):
    """Keys and copies that are there stay; a copy that no gamma would do for is told so."""
    assert run(tmp_path, "registry", "--users=ann", "--delta=0.2") == 0
    before = ledger.load(tmp_path)
    flags = ("--key_steps=50", "--learning_rate=0.0005", "--batch_size=4")
    assert run(tmp_path, "registry", "--users=ann,bob", *flags) == 0
    after = ledger.load(tmp_path)
    assert after.names == ("ann", "bob") and after.users[0] == before.users[0]
    np.testing.assert_array_equal(after.keys[:1], before.keys)


def test_a_copy_that_was_not_trained_is_not_advised_to_train_longer(monkeypatch):
    root, said = zoo.load("digits_dcgan_0"), []
    found = types.SimpleNamespace(
        reached=[False], rounds=np.zeros(1, int), distinguishability=np.full(1, 0.5)
    )
    monkeypatch.setattr(user_generators, "search", lambda *_, **__: found)
    monkeypatch.setattr(zoo, "record_file", lambda path: {})
    record = types.SimpleNamespace(warn=said.append, parts=lambda text: contextlib.nullcontext())
    held = types.SimpleNamespace(
        root=root, keys=np.zeros((1, 32, 32, 1)), path=Path("there"), users=[_user("ann")]
    )
    images = types.SimpleNamespace(validation=None)
    registry_experiment._train_models(registry_experiment.Config(), record, held, images)
    assert "no gamma would do" in said[0] and "--" not in said[0]
    found.rounds += 2
    registry_experiment._train_models(registry_experiment.Config(), record, held, images)
    assert "after 2 rounds" in said[1] and "more --max_rounds or --num_steps" in said[1]


def _user(name):
    return types.SimpleNamespace(name=name, sha256=None)


def test_the_papers_tables_stand_beside_ours_for_every_c_that_was_run():
    found = {
        "distinguishability": [0.5],
        "attributability": 0.25,
        "shift": [1.0],
        "distance": [2.0],
    }
    results = {
        "features": "some features",
        "before": {"jpeg": found, "blur": found},
        "shift_before": [1.0],
        "distance_before": [2.0],
        "after": {quality: {"jpeg": found, "blur": found} for quality in ("1000", "7", "10")},
    }
    papers = {table.header[0]: table for table in robust_training.tables(results)[2:]}
    assert list(papers) == [f"the paper's Table {number}" for number in (2, 5, 6)]
    rows = {name: {tuple(row[:2]): row[2:] for row in table.rows} for name, table in papers.items()}
    # [P2] Tables 2, 5 and 6, read off the page; columns in the order that was run.
    assert papers["the paper's Table 2"].header[1:] == ["C", "JPEG", "blurring"]
    assert papers["the paper's Table 6"].header[1:] == ["C", "baseline", "JPEG", "blurring"]
    assert rows["the paper's Table 2"]["A(G), MNIST", "10"] == ["0.16 / 0.98", "0.02 / 0.94"]
    assert rows["the paper's Table 5"]["D, CelebA", "1000"] == ["0.50 / 0.99", "0.50 / 0.62"]
    price = rows["the paper's Table 6"]
    assert price["||dx||, MNIST", "10"] == ["5.05 (0.09)", "6.48 (0.94)", "15.96 (2.18)"]
    assert price["FID, CelebA", "1000"] == ["40.85 (3.41)", "45.46 (5.03)", "55.63 (7.97)"]
    for name, qualities in (("2", {"10"}), ("5", {"10", "1000"}), ("6", {"10", "1000"})):
        assert {quality for _, quality in rows[f"the paper's Table {name}"]} == qualities
    results["after"] = {"7": results["after"]["7"]}
    assert len(robust_training.tables(results)) == 2


def test_an_experiment_has_only_the_settings_that_it_uses():
    models = {"num_steps", "batch_size", "learning_rate", "max_rounds", "num_search"}
    measured = {"features", "inception_weights"}
    for module, without in (
        (key_capacity, {*models, *measured, "num_users", "key_method", "together"}),
        (training_time, {*measured, "key_method", "together", "num_test"}),
        (key_quality, {"together"}),
        (registry_experiment, {*measured, "together"}),
    ):
        fields = {field.name for field in dataclasses.fields(module.Config)}
        assert not fields & without
        for preset in module.PRESETS:
            _config.make_config(module, preset)
