"""The command line as a user meets it: in a process of its own, from another folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--experiment=no_such_experiment"], "--experiment=no_such_experiment is not one of"),
        (["--no_such_flag=1"], "no_such_flag"),
        (["--preset=no_such_preset"], "smoke"),
        (["--overwrite=perhaps"], "--overwrite=perhaps"),
        (["no_such_argument"], "unexpected argument 'no_such_argument'"),
        (["--flagfile=no_such_file"], "no_such_file"),
        (["--preset=smoke", "--workdir=foreign"], "not empty"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, arguments, words):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    done = run(tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and words in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["foreign", "notes.txt"]


def test_help_lists_every_experiment_with_a_summary(tmp_path):
    done = run(tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    files = [path.stem for path in (ROOT / "experiments").glob("[!_]*.py")]
    assert files
    table = done.stdout.partition("Experiments:\n")[2].partition("\n\n")[0]
    listed = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line[2] != " "}
    assert set(listed) == set(files)
    assert all(len(summary) > 2 for summary in listed.values())
    assert not list(tmp_path.iterdir())


def test_jax_waits_until_the_flags_are_read(tmp_path):
    script = (
        "import sys; sys.modules['jax'] = None; "  # Any import of jax now fails.
        "from experiments import _config; sys.exit(_config.main(['run.py', '--experiment=nix']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "--experiment=nix is not one of" in done.stderr


def test_a_reader_that_stops_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 0 and done.stderr == ""
