"""Settings, flags, presets and the run record, on a toy experiment that the tests write."""

import dataclasses
import errno
import gzip
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from experiments import _config, _record, _stopping
from flipad_jax import checkpoints, parallel

ROOT = Path(__file__).resolve().parent.parent

DEMO = '''
"""Measure a toy.

More text, which help leaves out.
"""
import dataclasses
import errno
import os
import signal
import time
import numpy as np
from experiments._config import setting
from flipad_jax import checkpoints

CALLS = []

@dataclasses.dataclass(frozen=True)
class Config:
    num_images: int = setting(100, "Images per source.", lower_bound=1)
    lam: float = setting(5e-4, "Lasso weight.", lower_bound=0.0, upper_bound=1.0)
    detector: str = setting("one_class", "Who decides.", choices=("one_class", "deepsad"))
    images: str = setting("", "A folder.")
    rivals: tuple[str, ...] = setting(("a", "b"), "Rivals.")
    weights: tuple[float, ...] = setting((0.1, 2.0), "Weights.")
    retrain: bool = setting(False, "Train anew.")
    seed: int = setting(0, "Seed.")

PRESETS = {"smoke": {"num_images": 3}, "demo": {}, "paper": {"num_images": 10_000}}

def run(config, record):
    CALLS.append(config)
    record.stage("first", lambda: {"z": np.arange(config.num_images)}, text="first part")
    if config.images == "missing":
        open("missing/0.png")
    if config.images == "bad":
        raise ValueError("images have two sizes,\\n32x32 and 64x64")
    if config.images == "bug":
        raise RuntimeError("a bug")
    if config.images == "interrupt":
        raise KeyboardInterrupt
    if config.images == "term":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    if config.images == "preempt":
        assert not record.should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        while not record.should_stop():
            time.sleep(0.01)
        raise checkpoints.Preempted
    if config.images == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")
    z = record.stage("second", lambda: {"z": np.full(2, config.seed)})["z"]
    return {"sum": z.sum(), "auc": np.float32("nan"), "per_rival": {"a": np.ones(2)}}

def summary(metrics):
    return f"TABLE {metrics['sum']}"
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package of experiments, imported afresh, with the working directory beside it."""
    name = f"toybox_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "demo.py").write_text(DEMO.lstrip())
    (folder / "broken.py").write_text('"""Must not be imported."""\nraise RuntimeError("imported")')
    (folder / "_private.py").write_text('"""No experiment."""')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    yield name
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


@pytest.fixture
def demo(toy):
    return importlib.import_module(f"{toy}.demo")


def command(toy, *arguments):
    return _config.main(["run.py", *arguments], package=toy)


def one_error(capsys):
    """The single line on stderr of a refused command."""
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert "Traceback" not in captured.err
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


# Settings and flags.


def test_presets_and_overrides(toy, demo):
    Path("seed.flags").write_text("--seed=7\n--workdir=other\n")
    assert command(toy, "--preset=smoke", "--lam=0.25", "--rivals=x,y,z", "--retrain") == 0
    config = demo.CALLS[-1]
    assert config == demo.Config(num_images=3, lam=0.25, rivals=("x", "y", "z"), retrain=True)
    assert command(toy, "--lam", "0.5", "--preset", "smoke", "--flagfile=seed.flags") == 0
    assert demo.CALLS[-1] == demo.Config(num_images=3, lam=0.5, seed=7)


def test_defaults_are_the_demo_preset_and_its_folder(toy, demo):
    assert command(toy) == 0
    assert demo.CALLS == [demo.Config()]
    assert json.loads(Path("runs/demo-demo/results.json").read_text())["preset"] == "demo"


def test_flagfile_repeats_a_run(toy, demo):
    arguments = [
        "--preset=smoke",
        "--lam=1e-07",
        "--rivals=",
        "--weights=0.1,1e9",
        "--images=a b=c",
    ]
    assert command(toy, *arguments, "--workdir=one") == 0
    assert command(toy, "--flagfile=one/config.flags", "--workdir=two") == 0
    assert demo.CALLS[0] == demo.CALLS[1]
    assert demo.CALLS[1] == demo.Config(
        num_images=3, lam=1e-7, rivals=(), weights=(0.1, 1e9), images="a b=c"
    )
    one, two = (_record.read_results(Path(folder)) for folder in ("one", "two"))
    for name in ("experiment", "preset", "settings", "metrics", "seed"):
        assert one[name] == two[name]
    assert command(toy, "--flagfile=one/config.flags", "--seed=5", "--workdir=three") == 0
    assert demo.CALLS[-1] == dataclasses.replace(demo.CALLS[0], seed=5)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--sed=1"], ["sed", "seed"]),
        (["--seed=one"], ["--seed=one", "whole number"]),
        (["--seed=1.5"], ["--seed=1.5", "whole number"]),
        (["--num_images=0"], ["num_images", "at least 1"]),
        (["--lam=2"], ["lam", "at most 1.0"]),
        (["--lam=nan"], ["lam", "finite"]),
        (["--weights=1,x"], ["weights", "number"]),
        (["--retrain=perhaps"], ["retrain", "true or false"]),
        (["--detector=deepsat"], ["one_class, deepsad", "did you mean deepsad?"]),
        (["--experiment=dmo"], ["broken, demo", "did you mean demo?"]),
        (["--experiment=_private"], ["--experiment=_private", "demo"]),
        (["--preset=smoky"], ["smoke, demo, paper", "did you mean smoke?"]),
        (["--flagfile=nowhere"], ["nowhere"]),
        (["demo"], ["unexpected argument 'demo'", "--experiment=demo"]),
        (["--seed=1", "stray"], ["unexpected argument 'stray'"]),
        (["--plan_devices=2"], ["--plan_devices=2", "and --plan"]),
        (["--plan", "--plan_devices=0"], ["--plan_devices=0", "1 or more"]),
        (["--num_processes=2"], ["--num_processes and --process_id belong together"]),
        (["--num_processes=2", "--process_id=2"], ["--process_id=2", "expected 0 to 1"]),
        (["--num_processes=2", "--process_id=0"], ["--coordinator_address is missing"]),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(toy, demo, capsys, arguments, words):
    assert command(toy, *arguments) == 2
    line = one_error(capsys)
    assert all(word in line for word in words), line
    assert demo.CALLS == [] and not Path("runs").exists()


def test_help_shows_experiments_and_settings_without_running(toy, demo, capsys):
    assert command(toy, "--preset=smoke", "--help") == 0
    text = capsys.readouterr().out
    assert "Measure a toy." in text and "More text" not in text
    assert "Must not be imported." in text and "_private" not in text
    assert "--num_images=3" in text and "Images per source." in text
    for field in dataclasses.fields(demo.Config):
        assert f"--{field.name}=" in text and field.metadata["help"] in text
    exits = text.partition("Exit codes:")[2].split("\n")
    assert [line.split()[0] for line in exits if line[2:3].strip()] == "0 1 2 74 130 143".split()
    assert demo.CALLS == []


PLAN = """

def plan(config):
    import jax
    from experiments._plan import Stage
    x = jax.ShapeDtypeStruct((10, 10), "float32")
    return [Stage("product", lambda x: x @ x, (x,), calls=config.num_images)]
"""


def test_plan_tells_what_a_run_would_cost_without_running(toy, capsys):
    Path(toy, "demo.py").write_text(DEMO.lstrip() + PLAN)
    assert command(toy, "--preset=smoke", "--num_images=5", "--plan") == 0
    text = capsys.readouterr().out
    assert "--preset=smoke --num_images=5 was not run" in text
    assert "product" in text and "10 k" in text
    assert importlib.import_module(f"{toy}.demo").CALLS == [] and not Path("runs").exists()


def test_an_experiment_without_a_plan_says_so(toy, demo, capsys):
    assert command(toy, "--plan") == 2
    assert "--experiment=demo has no plan" in one_error(capsys)
    assert demo.CALLS == [] and not Path("runs").exists()


def test_an_experiment_that_runs_anew_runs_in_one_process(toy, demo, capsys, monkeypatch):
    monkeypatch.setattr(demo, "CHANGEABLE", (), raising=False)
    assert command(toy, "--coordinator_address=localhost:1") == 2
    assert "--experiment=demo runs in one process" in one_error(capsys)
    joined = []
    monkeypatch.setattr(parallel, "initialize", lambda *where: joined.append(where))
    monkeypatch.setattr(demo, "TOGETHER", True, raising=False)
    place = ("--num_processes=2", "--process_id=1")
    assert command(toy, "--coordinator_address=localhost:1", *place) == 0
    assert command(toy, "--coordinator_address=auto") == 0
    assert command(toy) == 0
    assert joined == [("localhost:1", 2, 1), (None, None, None)]


@pytest.fixture
def no_cache_set():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_a_folder_of_ones_own(toy, demo, no_cache_set):
    assert command(toy, "--preset=smoke", "--compilation_cache=programs/here") == 0
    assert jax.config.jax_compilation_cache_dir == str(Path("programs/here").absolute())
    assert Path("programs/here").stat().st_mode & 0o777 == 0o700
    assert "compilation_cache" not in Path("runs/demo-smoke/config.flags").read_text()


@pytest.mark.parametrize("place, mode", [("a/b", 0o777), ("a/b", 0o1777), ("a", 0o777)])
def test_programs_that_others_can_exchange_are_not_run(toy, demo, capsys, place, mode):
    Path("a/b").mkdir(parents=True)
    Path(place).chmod(mode)
    before = jax.config.jax_compilation_cache_dir
    assert command(toy, "--compilation_cache=a/b") == 2
    assert "everybody can write to" in one_error(capsys)
    assert jax.config.jax_compilation_cache_dir == before and demo.CALLS == []


def test_programs_of_somebody_else_are_not_run(toy, demo, capsys, monkeypatch):
    Path("theirs").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    monkeypatch.setattr(_config, "_TRUSTED", ())
    assert command(toy, "--compilation_cache=theirs") == 2
    assert "belongs to somebody else" in one_error(capsys)


def test_a_trace_is_what_the_viewers_open(toy, demo, capsys, monkeypatch):
    def run(config, record):
        jax.jit(lambda x: x @ x)(jnp.ones((64, 64))).block_until_ready()
        return {"sum": 1}

    monkeypatch.setattr(demo, "run", run)
    assert command(toy, "--profile=trace") == 0
    assert "Trace: trace" in capsys.readouterr().err
    (space,) = Path("trace").rglob("*.xplane.pb")
    (events,) = Path("trace").rglob("perfetto_trace.json.gz")
    names = {event.get("name", "") for event in json.loads(gzip.open(events).read())["traceEvents"]}
    assert space.stat().st_size and any("dot" in name for name in names)


def test_a_trace_ends_before_the_run_does(toy, demo, capsys, monkeypatch):
    def run(config, record):
        for _ in range(200):
            time.sleep(0.05)
            if list(Path("trace").rglob("*.xplane.pb")):
                return {"sum": 1}
        pytest.fail("it goes on")

    monkeypatch.setattr(_config, "_PROFILED_SECONDS", 0.1)
    monkeypatch.setattr(demo, "run", run)
    assert command(toy, "--profile=trace") == 0
    assert capsys.readouterr().err.count("Trace: trace") == 1


def test_nothing_is_defined_in_the_global_flags(toy):
    before = set(flags.FLAGS)
    assert command(toy, "--preset=smoke") == 0
    assert set(flags.FLAGS) == before


def test_make_config(demo):
    assert _config.make_config(demo, "smoke", seed=4) == demo.Config(num_images=3, seed=4)
    with pytest.raises(_config.UsageError, match="did you mean seed"):
        _config.make_config(demo, "smoke", sede=4)
    with pytest.raises(_config.UsageError, match="at least 1"):
        _config.make_config(demo, "smoke", num_images=0)


def test_a_config_that_cannot_be_flags_is_refused(demo, monkeypatch):
    def refuse(fields, match, preset="paper"):
        made = dataclasses.make_dataclass("Config", fields, frozen=True)
        monkeypatch.setattr(demo, "Config", made)
        with pytest.raises(TypeError, match=match):
            _config.make_config(demo, preset)

    refuse([("num_images", list, _config.setting(3, ""))], "cannot be")
    refuse([("num_images", int)], "no default", preset="demo")
    refuse([("seed", int, _config.setting(0, ""))], "sets .*num_images")
    many = [("num_images", int, _config.setting(0, "")), ("workdir", str, _config.setting("", ""))]
    refuse(many, "meaning already")


# What a run writes.


def test_results_hold_what_was_promised(toy, demo):
    assert command(toy, "--preset=smoke", "--seed=2") == 0
    text = Path("runs/demo-smoke/results.json").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    results = json.loads(text, parse_constant=refuse)
    assert results["experiment"] == "demo" and results["preset"] == "smoke"
    assert results["settings"] == json.loads(json.dumps(dataclasses.asdict(demo.CALLS[0])))
    assert results["metrics"] == {"sum": 4, "auc": None, "per_rival": {"a": [1.0, 1.0]}}
    assert any("metrics.auc" in warning for warning in results["warnings"])
    assert results["convention"] == "paper" and results["seed"] == 2
    for name in ("flipad_jax", "jax", "jaxlib", "flax", "optax", "numpy", "python"):
        assert results["versions"][name][0].isdigit()
    assert results["device"]["count"] >= 1 and results["device"]["kind"]
    assert set(results["seconds"]) == {"first", "second"}
    assert results["started"] <= results["finished"]
    assert "--seed=2" in results["command"]


def test_commit_is_the_revision_of_this_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(_config, "_ROOT", tmp_path.resolve())
    assert _config._commit() is None
    git("init", "-q")
    assert _config._commit() is None
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "m")
    assert _config._commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert _config._commit() == git("rev-parse", "HEAD") + "+dirty"
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(_config, "_ROOT", tmp_path.resolve() / "inner")
    assert _config._commit() is None


def test_a_complete_run_is_shown_and_not_repeated(toy, demo, capsys):
    assert command(toy, "--preset=smoke", "--seed=3") == 0
    assert "TABLE 6" in capsys.readouterr().out
    before = Path("runs/demo-smoke/results.json").read_bytes()
    assert command(toy, "--preset=smoke", "--seed=3") == 0
    output = capsys.readouterr().out
    assert "TABLE 6" in output and "complete" in output
    assert len(demo.CALLS) == 1
    assert Path("runs/demo-smoke/results.json").read_bytes() == before


def test_a_workdir_of_other_settings_is_refused(toy, demo, capsys):
    assert command(toy, "--preset=smoke") == 0
    capsys.readouterr()
    assert command(toy, "--preset=smoke", "--seed=3", "--lam=0.5") == 2
    line = one_error(capsys)
    assert "seed is 0 there and 3 here" in line and "lam is 0.0005 there and 0.5 here" in line
    assert "num_images" not in line and "--overwrite" in line
    assert _record.read_results(Path("runs/demo-smoke"))["settings"]["seed"] == 0
    # The same settings under another preset's name are the same run.
    assert command(toy, "--num_images=3", "--workdir=runs/demo-smoke") == 0
    assert len(demo.CALLS) == 1


def test_an_experiment_may_run_anew_with_some_settings_changed(toy, demo, capsys, monkeypatch):
    monkeypatch.setattr(demo, "CHANGEABLE", ("lam",), raising=False)
    assert command(toy, "--preset=smoke") == 0
    assert command(toy, "--preset=smoke", "--lam=0.5") == 0  # done again, on the stages kept
    assert "kept from an earlier start" in capsys.readouterr().err
    assert [config.lam for config in demo.CALLS] == [5e-4, 0.5]
    assert _record.read_results(Path("runs/demo-smoke"))["settings"]["lam"] == 0.5
    assert "--lam=0.5" in Path("runs/demo-smoke/config.flags").read_text()
    assert command(toy, "--preset=smoke", "--lam=0.25", "--seed=3") == 2
    line = one_error(capsys)
    assert "seed is 0 there and 3 here" in line and "lam" not in line


def test_a_run_of_before_a_setting_existed_had_its_default(toy, demo, capsys):
    """And a setting that is gone cannot be another one."""
    assert command(toy, "--preset=smoke") == 0
    flags = Path("runs/demo-smoke/config.flags")
    kept = [line for line in flags.read_text().splitlines() if not line.startswith("--lam=")]
    flags.write_text("\n".join([*kept, "--gone=7"]) + "\n")
    assert command(toy, "--preset=smoke") == 0
    assert len(demo.CALLS) == 1
    capsys.readouterr()
    assert command(toy, "--preset=smoke", "--lam=0.5") == 2
    assert "lam is 0.0005 there and 0.5 here" in one_error(capsys)


def test_an_experiment_may_choose_its_workdir(toy, demo, monkeypatch):
    choose = lambda config: f"by-{config.seed}" if config.seed else ""  # noqa: E731
    monkeypatch.setattr(demo, "default_workdir", choose, raising=False)
    assert command(toy, "--preset=smoke", "--seed=3") == 0
    assert command(toy, "--preset=smoke", "--seed=3", "--workdir=mine") == 0
    assert command(toy, "--preset=smoke") == 0
    for folder in ("by-3", "mine", "runs/demo-smoke"):
        assert Path(folder, "results.json").exists()


def test_overwrite_starts_over_but_only_in_our_own_folders(toy, demo, capsys, monkeypatch):
    assert command(toy, "--preset=smoke") == 0
    assert command(toy, "--preset=smoke", "--seed=3", "--overwrite") == 0
    assert [config.seed for config in demo.CALLS] == [0, 3]
    assert _record.read_results(Path("runs/demo-smoke"))["metrics"]["sum"] == 6
    theirs = Path("theirs")
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    (theirs / "config.flags").write_text("--seed=1\n")
    capsys.readouterr()
    assert command(toy, "--overwrite", "--workdir=theirs") == 2
    assert "not empty" in one_error(capsys)
    assert (theirs / "thesis.txt").read_text() == "years of work"
    monkeypatch.chdir("runs/demo-smoke")
    assert command(toy, "--overwrite", "--workdir=.") == 2
    assert "folder you are in" in one_error(capsys)
    assert Path("results.json").exists()


def test_workdirs_that_are_files_or_foreign_are_refused(toy, demo, capsys):
    Path("file").write_text("")
    Path("foreign").mkdir()
    Path("foreign/photo.png").write_text("")
    for folder, words in [("file", "is a file"), ("foreign", "not empty")]:
        assert command(toy, f"--workdir={folder}") == 2
        assert words in one_error(capsys)
    Path("empty").mkdir()
    assert command(toy, "--workdir=empty") == 0
    assert len(demo.CALLS) == 1


def test_a_second_process_is_kept_out(toy, demo, capsys):
    texts = _config._flag_texts(demo, "demo", "demo", demo.Config())
    with _record.open_workdir("busy", texts):
        with pytest.raises(_config.UsageError, match="still going on"):
            with _record.open_workdir("busy", texts):
                pass
    with _record.open_workdir("busy", texts):
        pass


# Errors inside an experiment.


@pytest.mark.parametrize(
    "images, words",
    [("bad", "images have two sizes, 32x32 and 64x64"), ("missing", "missing/0.png: No such file")],
)
def test_refused_input_is_one_line_and_can_be_mended(toy, capsys, images, words):
    assert command(toy, f"--images={images}") == 2
    lines = capsys.readouterr().err.splitlines()
    assert words in lines[-1] and lines[-1].startswith("error: ") and "--debug" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert command(toy, f"--images={images}", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_mistake_before_anything_was_computed_leaves_the_workdir_free(toy, demo, monkeypatch):
    def refuse(config, record):
        raise ValueError("no such data set")

    with monkeypatch.context() as patch:
        patch.setattr(demo, "run", refuse)
        assert command(toy, "--images=wrong") == 2
    assert command(toy, "--images=right") == 0
    assert "--images=right" in Path("runs/demo-demo/config.flags").read_text()


def test_a_bug_keeps_its_trace(toy):
    with pytest.raises(RuntimeError, match="a bug"):
        command(toy, "--images=bug")


def test_an_interrupted_run_says_how_to_go_on(toy, demo, capsys):
    assert command(toy, "--images=interrupt", "--workdir=my runs/a") == 130
    error = capsys.readouterr().err
    assert "'--flagfile=my runs/a/config.flags' '--workdir=my runs/a'" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("images", ["term", "preempt"])
def test_sigterm_ends_a_run_in_good_order(toy, demo, capsys, images):
    assert command(toy, f"--images={images}", "--workdir=w") == 143
    *_, line = capsys.readouterr().err.splitlines()
    assert line == (
        "stopped by SIGTERM; go on with: python run.py --flagfile=w/config.flags --workdir=w"
    )
    assert Path("w/stages/first.npz").exists() and not Path("w/results.json").exists()
    assert not list(Path("w").rglob("*.partial"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_before_the_run_begins_is_said(toy, demo, capsys, monkeypatch):
    monkeypatch.setattr(_config, "_names", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert command(toy) == 143
    assert capsys.readouterr().err == (
        "stopped by SIGTERM; nothing was begun; give the same command again\n"
    )


def test_workers_that_die_of_sigterm_as_well_are_no_error_of_ours(toy, demo, monkeypatch, capsys):
    def run(config, record):
        assert not record.should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        raise RuntimeError("a worker is gone")

    monkeypatch.setattr(demo, "run", run)
    assert command(toy) == 143
    error = capsys.readouterr().err
    assert "a worker is gone" in error and "go on with" in error.splitlines()[-1]


def test_a_library_that_takes_the_signal_for_itself_is_no_obstacle(toy, demo, monkeypatch, capsys):
    def run(config, record):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(demo, "run", run)
    assert command(toy) == 143
    assert capsys.readouterr().err.startswith("stopped by SIGTERM; go on with")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# The disk.


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_later(toy, demo, capsys):
    assert command(toy, "--images=full", "--workdir=w") == 74
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: nothing more could be written (some/file: No space left")
    assert "--flagfile=w/config.flags" in line
    assert Path("w/stages/first.npz").exists()


def test_no_room_is_told_before_anything_is_computed(toy, demo, capsys, monkeypatch):
    monkeypatch.setattr(_record, "_ROOM", 2**60)
    assert command(toy, "--workdir=w") == 2
    line = one_error(capsys)
    assert "--workdir=w has" in line and "free" in line and "1,099,511,627,776 MiB" in line
    assert demo.CALLS == []


def test_a_complete_run_is_shown_on_a_full_disk(toy, demo, capsys, monkeypatch):
    assert command(toy, "--workdir=w") == 0
    monkeypatch.setattr(_record, "_ROOM", 2**60)
    assert command(toy, "--workdir=w") == 0
    assert len(demo.CALLS) == 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("refused", ["mkdir", "open", "write_bytes"])
def test_a_workdir_that_cannot_be_written_is_one_line(
    toy, demo, capsys, monkeypatch, number, refused
):
    real = getattr(Path, refused)

    def refuse(path, *args, **kwargs):
        if path.name in ("w", ".lock") or path.name.startswith(".trial"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, refused, refuse)
    assert command(toy, "--workdir=w") == 2
    line = one_error(capsys)
    assert "--workdir=w cannot be written to" in line and os.strerror(number) in line
    assert demo.CALLS == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two mebibytes, and a function that mounts it anew with other options."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(*arguments):
        command = ["mount", *arguments, str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if sys.platform != "linux" or not mount("-t", "tmpfs", "-o", "size=2m", "none"):
        pytest.skip("no right to mount a file system")
    yield folder, lambda options: mount("-o", f"remount,{options}")
    subprocess.run(["umount", str(folder)], check=True)


def test_a_run_that_fills_its_disk_goes_on_when_there_is_room(
    toy, demo, capsys, monkeypatch, small_disk
):
    folder, remount = small_disk
    monkeypatch.setattr(_record, "_ROOM", 2**20)
    computed = []

    def run(config, record):
        def compute(i):
            computed.append(i)
            return {"z": np.full(90_000, float(i))}

        return {"sum": sum(record.stage(f"s{i}", lambda i=i: compute(i))["z"][0] for i in range(4))}

    monkeypatch.setattr(demo, "run", run)
    workdir = folder / "w"
    assert command(toy, f"--workdir={workdir}") == 74
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: nothing more could be written (") and "No space left" in line
    assert computed == [0, 1, 2]
    assert {path.name for path in (workdir / "stages").iterdir()} == {"s0.npz", "s1.npz"}
    assert command(toy, f"--workdir={workdir}") == 2  # told before anything is computed
    assert f"--workdir={workdir} has 1 MiB free" in one_error(capsys) and len(computed) == 3
    remount("size=16m")
    assert command(toy, f"--workdir={workdir}") == 0
    assert computed == [0, 1, 2, 2, 3]
    assert _record.read_results(workdir)["metrics"] == {"sum": 6.0}


def test_a_read_only_disk_is_told_before_anything_is_computed(toy, demo, capsys, small_disk):
    folder, remount = small_disk
    remount("ro")
    assert command(toy, f"--workdir={folder / 'w'}") == 2
    line = one_error(capsys)
    assert f"--workdir={folder / 'w'} cannot be written to (Read-only file system)" in line
    assert demo.CALLS == []


def test_a_checkpoint_that_fills_the_disk_is_no_checkpoint(small_disk):
    folder, remount = small_disk
    state = {"x": jnp.asarray(np.random.default_rng(0).standard_normal(90_000))}
    checkpoints.save(folder / "c", 1, state)
    (folder / "filler").write_bytes(bytes(2**20))
    with pytest.raises(Exception) as caught:
        checkpoints.save(folder / "c", 2, state)
    assert _record.out_of_room(caught.value)
    step, found = checkpoints.restore_latest(folder / "c", {"x": jnp.zeros_like(state["x"])})
    assert step == 1
    np.testing.assert_array_equal(found["x"], state["x"])
    remount("size=16m")
    checkpoints.save(folder / "c", 2, state)
    assert checkpoints.restore_latest(folder / "c", found)[0] == 2


def test_what_causes_an_error_may_be_a_full_disk():
    full = OSError(errno.ENOSPC, "full")
    try:
        try:
            raise full
        except OSError as error:
            raise ValueError("cannot save") from error
    except ValueError as error:
        assert _record.out_of_room(error)
    assert _record.out_of_room(ValueError("RESOURCE_EXHAUSTED: pwrite: No space left on device"))
    assert not _record.out_of_room(FileNotFoundError(errno.ENOENT, "no such file"))
    assert not _record.out_of_room(None)


# Parts of what is not finished.


@pytest.fixture
def resumable(tmp_path):
    """Opens the same workdir again and again, as restarts of one command would."""

    def start(commit="c0"):
        return _record.open_workdir(tmp_path / "run", {"experiment": "demo"}, commit=commit)

    return start


def test_parts_are_kept_until_their_stage_is_finished(resumable, tmp_path, monkeypatch):
    monkeypatch.setattr(_record, "_KEEP_EVERY", 0.0)
    calls = []

    def compute(value):
        calls.append(value)
        return {"a": np.full(3, value)}

    def stage(record, dies):
        def all_parts():
            kept = record.kept("sum")
            parts = [kept.part(f"p{i}", lambda i=i: compute(i))["a"] for i in range(3)]
            if dies:
                kept.save("state", 6, {"x": jnp.zeros(3)})
                kept.save("state", 7, {"x": jnp.arange(3.0)})
                raise KeyboardInterrupt
            state = kept.restore("state", {"x": jnp.zeros(3)})
            return {"sum": np.sum(parts, axis=0), "x": np.asarray(state["x"])}

        return record.stage("sum", all_parts)

    with resumable() as record, pytest.raises(KeyboardInterrupt):
        stage(record, dies=True)
    damaged = tmp_path / "run/parts/sum/p1.npz"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    (tmp_path / "run/parts/sum/.p2.npz.77.partial").write_bytes(b"half")
    with resumable(commit="c1") as record:
        found = stage(record, dies=False)
        other, damaged = record.warnings  # said once
        assert "parts of sum were computed by commit c0, this is c1" in other
        assert "parts/sum/p1.npz is damaged" in damaged
    assert calls == [0, 1, 2, 1]
    np.testing.assert_array_equal(found["sum"], np.full(3, 3))
    np.testing.assert_array_equal(found["x"], np.arange(3))
    assert not (tmp_path / "run/parts/sum").exists()


def test_what_is_quick_is_not_written(resumable, tmp_path):
    with resumable() as record:
        kept = record.kept("quick")
        for i in range(3):
            kept.part(f"p{i}", lambda: {"a": np.ones(2)})
            kept.save("state", i, {"x": jnp.zeros(2)})
        assert kept.restore("state", {"x": jnp.zeros(2)}) is None
    assert not list((tmp_path / "run").rglob("*.npz"))


def test_sigterm_keeps_what_is_there_and_ends(resumable, tmp_path):
    with _stopping.listening(), resumable() as record:
        kept = record.kept("slow")

        def compute():
            os.kill(os.getpid(), signal.SIGTERM)
            return {"a": np.ones(2)}

        with pytest.raises(checkpoints.Preempted):
            kept.part("p0", compute)
        with pytest.raises(checkpoints.Preempted):
            kept.save("state", 3, {"x": jnp.ones(2)})
        with pytest.raises(checkpoints.Preempted):
            kept.part("p1", lambda: pytest.fail("computed"))
    with resumable() as record:
        kept = record.kept("slow")
        np.testing.assert_array_equal(kept.part("p0", lambda: pytest.fail())["a"], np.ones(2))
        assert kept.restore("state", {"x": jnp.zeros(2)})["x"].sum() == 2
        record.finish({}, {})
    assert not (tmp_path / "run/parts").exists()


# Stages.


def test_a_restart_keeps_what_was_computed(resumable, tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::-1],
        "names": np.array(["x", "yy"]),
        "scalar": np.float64(2.5),
        "empty": np.zeros((0, 4), np.int8),
    }
    with resumable() as record:
        first = record.stage("part", lambda: record.warn("2 images not converged") or arrays)
        seconds = dict(record.seconds)
        started = record.started
    file, long_ago = tmp_path / "run/config.flags", "2020-02-20T20:20:20+00:00"
    file.write_text(file.read_text().replace(started, long_ago))
    with resumable() as record:
        again = record.stage("part", lambda: pytest.fail("computed again"))
        assert record.seconds == seconds
        assert record.started == long_ago
        assert record.warnings == ["2 images not converged"]
    assert set(first) == set(again) == set(arrays)
    for name, value in arrays.items():
        assert first[name].dtype == again[name].dtype == np.asarray(value).dtype
        np.testing.assert_array_equal(again[name], value)
        np.testing.assert_array_equal(first[name], value)


def test_a_killed_command_goes_on_where_it_was(toy, demo, capsys):
    assert command(toy, "--images=interrupt", "--workdir=w") == 130
    stage = Path("w/stages/first.npz")
    written = stage.stat().st_mtime_ns
    demo_run = demo.run
    try:
        demo.run = lambda config, record: demo_run(dataclasses.replace(config, images=""), record)
        assert command(toy, "--images=interrupt", "--workdir=w") == 0
    finally:
        demo.run = demo_run
    assert stage.stat().st_mtime_ns == written
    assert "first part: kept from an earlier start" in capsys.readouterr().err


def test_a_stage_of_another_commit_is_used_but_said(resumable):
    with resumable() as record:
        record.stage("part", lambda: {"a": np.ones(2)})
    with resumable(commit="c1") as record:
        record.stage("part", lambda: pytest.fail("computed again"))
        assert "commit c0, this is c1" in record.warnings[0]


def damage_truncate(data):
    return data[: len(data) // 2]


def damage_flip(data):
    middle = data.index(np.full(100, 7.0).tobytes()) + 300
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_flip, lambda data: b"", lambda data: b"not a zip file"]
)
def test_a_damaged_stage_is_computed_again(resumable, tmp_path, damage):
    with resumable() as record:
        record.stage("part", lambda: {"a": np.full(100, 7.0)})
    path = tmp_path / "run/stages/part.npz"
    path.write_bytes(damage(path.read_bytes()))
    with resumable() as record:
        np.testing.assert_array_equal(
            record.stage("part", lambda: {"a": np.full(100, 8.0)})["a"], np.full(100, 8.0)
        )
        assert "part.npz is damaged" in record.warnings[0]
    with resumable() as record:
        assert record.stage("part", lambda: pytest.fail("computed again"))["a"][0] == 8.0


def test_a_stage_whose_arrays_were_exchanged_is_not_trusted(resumable, tmp_path):
    """A valid file that is not what was written: only the checksum can tell."""
    with resumable() as record:
        record.stage("part", lambda: {"a": np.ones(3)})
    path = tmp_path / "run/stages/part.npz"
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "a": np.zeros(3)})
    with resumable() as record:
        assert record.stage("part", lambda: {"a": np.full(3, 5.0)})["a"][0] == 5.0


def test_a_kill_while_writing_leaves_no_stage(resumable, tmp_path):
    """The process dies in the middle of a write, without a chance to clean up."""
    script = f"""
        import os
        import numpy as np
        from experiments import _record
        np.savez = lambda file, **_: (file.write(b"half"), file.flush(), os._exit(9))
        with _record.open_workdir({str(tmp_path / "run")!r}, {{"experiment": "demo"}}) as record:
            record.log_metrics(step=1, loss=1.0)
            open(record.workdir / "metrics.jsonl", "a").write('{{"step": 2, "lo')
            record.stage("part", lambda: {{"a": np.ones(2)}})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 9, done.stderr
    assert [path.suffix for path in (tmp_path / "run/stages").iterdir()] == [".partial"]
    with resumable() as record:
        assert not list((tmp_path / "run/stages").iterdir())
        assert record.stage("part", lambda: {"a": np.full(2, 3.0)})["a"][0] == 3.0
        record.log_metrics(step=2, loss=0.5)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_stages_refuse_what_they_cannot_keep(resumable, tmp_path):
    with resumable() as record:
        with pytest.raises(TypeError, match="object"):
            record.stage("objects", lambda: {"a": np.array([None])})
        with pytest.raises(TypeError, match="cannot name"):
            record.stage("names", lambda: {"allow_pickle": np.ones(1)})
        with pytest.raises(RuntimeError, match="names a file"):
            record.stage("../outside", lambda: {"a": np.ones(1)})
        record.stage("part", lambda: {"a": np.ones(1)})
        with pytest.raises(RuntimeError, match="two stages"):
            record.stage("part", lambda: {"a": np.ones(1)})
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.glob("outside*"))


def test_writing_at_once_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    _record.write_atomically(path, "old")
    with pytest.raises(OSError, match="disk full"):
        with _record.replacing(path) as file:
            file.write(b"ne")
            raise OSError("disk full")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


# Metrics and progress.


def test_metrics_are_valid_json_lines(resumable, tmp_path):
    with resumable() as record:
        record.log_metrics(step=1, loss=np.float32(0.5), grid=np.ones((1, 2)))
        record.log_metrics(step=2, loss=math.inf, ok=np.bool_(True))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5, "grid": [[1.0, 1.0]]},
        {"step": 2, "loss": None, "ok": True},
    ]


def test_what_json_cannot_hold_is_named():
    names = []
    assert _record.plain({"a": [1.0, math.nan]}, "metrics", names) == {"a": [1.0, None]}
    assert names == ["metrics.a[1]"]
    with pytest.raises(TypeError, match="metrics.x is a Thread"):
        _record.plain({"x": threading.Thread()}, "metrics", [])


class Stream:
    def __init__(self, terminal):
        self.text, self.terminal = "", terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return self.terminal


def test_progress_is_a_bar_in_a_terminal_and_two_lines_elsewhere():
    pipe, terminal = Stream(False), Stream(True)
    assert list(_record.Progress([1, 2, 3], "inverting", stream=pipe)) == [1, 2, 3]
    first, last = pipe.text.splitlines()
    assert first == "inverting ..." and last.startswith("inverting: done in")
    with _record.Progress(4, "training", stream=terminal) as bar:
        bar.update(4, loss=0.25)
    assert "training: 100%" in terminal.text and "4/4" in terminal.text
    assert "loss=0.25" in terminal.text
    broken = Stream(False)
    with pytest.raises(ZeroDivisionError):
        with _record.Progress(2, "dividing", stream=broken):
            1 / 0
    assert "dividing: stopped after" in broken.text and "done" not in broken.text


def test_a_log_is_told_once_a_minute_how_far_it_is(monkeypatch):
    clock = iter(range(0, 1000, 25))  # seconds, at every look
    monkeypatch.setattr(_record.time, "monotonic", lambda: next(clock))
    log = Stream(False)
    with _record.Progress(100, "training", stream=log) as bar:
        for _ in range(9):
            bar.update(10, loss=0.12345)
    said = log.text.splitlines()[1:-1]
    assert said[0] == "training: 30 of 100, some 02:55 left, loss 0.1235"
    assert 1 < len(said) < 9
    with _record.Progress(iter("abcdefgh"), "reading", stream=log) as found:
        assert list(found) == list("abcdefgh")
    assert "reading: 3 in " in log.text


def test_every_part_of_a_work_has_a_bar_of_its_own(tmp_path, monkeypatch):
    """Another name, a count that starts over, or more after the end: all of them are parts."""
    stream = Stream(False)
    monkeypatch.setattr(_record.sys, "stderr", stream)
    record = _record.Run(tmp_path, {}, None)
    reports = [("fit", 1, 2), ("fit", 2, 2), ("scores", 2, 2), ("scores", 2, 2), ("scores", 1, 2)]
    with record.parts("ours") as progress:
        for report in reports:
            progress(*report)
    lines = [line.partition(" done")[0] for line in stream.text.splitlines()]
    scores = ["ours: scores ...", "ours: scores:"]
    assert lines == ["ours: fit ...", "ours: fit:", *3 * scores]
    with pytest.raises(KeyboardInterrupt), record.parts("theirs") as progress:
        progress("fit", 1, 2)
        raise KeyboardInterrupt
    assert "theirs: fit: stopped after" in stream.text


def test_a_path_at_home_is_found_and_help_names_the_choices(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["run.py", "--experiment=prove", "--images=~/nothing", f"--workdir={tmp_path / 'run'}"]
    assert _config.main(flags) == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err
    assert _config.main(["run.py", "--experiment=prove", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the likeliest first. One of: none, noise, jpeg, blur, crop, brightness." in shown
    assert _config.main(["run.py", "--experiment=prove", "--image=x"]) == 2
    assert "--experiment=prove: Unknown command line flag 'image'" in capsys.readouterr().err
