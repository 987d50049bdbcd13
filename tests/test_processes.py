"""Two processes of one run on this machine: one record, the same decisions."""

import json
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent

EXPERIMENT = '''
"""A sum that two processes make together."""
import dataclasses
import os
import time
import jax
import numpy as np
from jax.experimental import multihost_utils
from experiments._config import setting
from flipad_jax import checkpoints, parallel

@dataclasses.dataclass(frozen=True)
class Config:
    waits: bool = setting(False, "Wait to be stopped.")
    breaks: bool = setting(False, "Stop between the stages.")

PRESETS = {"smoke": {}}

def run(config, record):
    def compute():
        mine = np.array([1.0 + jax.process_index()])
        return {"sum": multihost_utils.process_allgather(mine).sum(), "pid": os.getpid()}

    first = record.stage("first", compute)
    record.log_metrics(step=1, value=float(first["sum"]))
    (record.figures / "figure.png").write_bytes(b"picture")
    (record.common / f"part{jax.process_index()}").write_text("")
    record.say("said")
    if config.waits:
        record.note("waiting")
        while not parallel.anywhere(record.should_stop()):
            time.sleep(0.05)
        raise checkpoints.Preempted
    kept = record.kept("loop")
    like = {"x": jax.numpy.zeros(3)}
    state = kept.restore("state", like)
    record.note(f"state {None if state is None else state['x'].tolist()}")
    if state is None:
        kept._written = 0.0 if jax.process_index() else time.monotonic()  # due in one of them
        kept.save("state", 1, {"x": jax.numpy.arange(3.0)})
    if config.breaks and not (record.checkpoints / "broken").exists():
        multihost_utils.sync_global_devices("both have looked")
        if jax.process_index() == 0:
            (record.checkpoints / "broken").write_text("")
        multihost_utils.sync_global_devices("it is there")
        raise ValueError("broken off")
    second = record.stage("second", lambda: {"twice": 2 * first["sum"]})
    pids = multihost_utils.process_allgather(first["pid"])
    return {"twice": second["twice"], "same": len(set(pids.tolist())) == 1}

def summary(metrics):
    return f"TABLE {metrics['twice']}"
'''


@pytest.fixture
def folder(tmp_path):
    package = tmp_path / "twobox"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "demo.py").write_text(EXPERIMENT.lstrip())
    return tmp_path


def start(folder, *flags):
    """Both processes of a run, as two shells would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(folder)!r}]
        from experiments import _config
        sys.exit(_config.main(["run.py", *sys.argv[1:]], package="twobox"))
    """
    words = [sys.executable, "-c", textwrap.dedent(script), "--workdir=w", *flags]
    words += [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
    return [
        subprocess.Popen(
            [*words, f"--process_id={place}"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in range(2)
    ]


def ends(processes):
    ended = [process.communicate(timeout=100) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, ended)]


def test_process_0_writes_the_record_and_both_decide_alike(folder):
    # The run breaks off after its first stage: the next start loads it in both.
    (code, _, error), (code_1, _, error_1) = ends(start(folder, "--breaks"))
    assert code == code_1 == 2 and "broken off" in error, error + error_1
    assert "state None" in error
    (code, out, error), (code_1, out_1, error_1) = ends(start(folder, "--breaks"))
    assert (code, code_1) == (0, 0), error + error_1
    assert "state [0.0, 1.0, 2.0]" in error
    assert "TABLE 6.0" in out and "said" in out and "kept from an earlier start" in error
    # What JAX itself prints of its connections is not ours.
    assert "said" not in out_1 and "TABLE" not in out_1 and "first" not in error_1
    results = json.loads((folder / "w" / "results.json").read_text())
    assert results["metrics"] == {"twice": 6.0, "same": True}
    assert results["device"]["count"] == 2
    lines = (folder / "w" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2  # one of each start
    names = {path.relative_to(folder / "w").as_posix() for path in (folder / "w").rglob("*")}
    assert names == {
        ".lock",
        "checkpoints",
        "checkpoints/broken",
        "config.flags",
        "figures",
        "figures/figure.png",
        "metrics.jsonl",
        "part0",
        "part1",
        "results.json",
        "stages",
        "stages/first.npz",
        "stages/second.npz",
    }
    # A complete run is shown and not repeated, by both.
    (code, out, _), (code_1, out_1, _) = ends(start(folder, "--breaks"))
    assert (code, code_1) == (0, 0) and "is complete since" in out and "complete" not in out_1
    # And refused by both.
    (code, _, error), (code_1, _, error_1) = ends(start(folder))
    assert (code, code_1) == (2, 2)
    assert "breaks is true there" in error and "breaks is true there" in error_1


def test_sigterm_to_one_stops_both(folder):
    processes = start(folder, "--waits")
    for line in processes[0].stderr:
        if line.startswith("waiting"):
            break
    time.sleep(0.5)
    processes[1].send_signal(signal.SIGTERM)
    (code, _, error), (code_1, _, error_1) = ends(processes)
    assert (code, code_1) == (143, 143), error + error_1
    assert "stopped by SIGTERM; go on with" in error
