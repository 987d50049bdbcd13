"""Runs that are killed again and again at random moments end as if nothing had happened.

Thirty kills: ten each of a training, a fit (inverted images, epochs of DeepSAD) and a judgement of
a folder; every other one is SIGTERM, after which a run must end in good order.
"""

import csv
import json
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from image_files import random_images
from safetensors.numpy import save_file
from toy_model import BIAS, KERNEL, LAYER, own_images

import flipad_jax
from flipad_jax import AttributorConfig, data
from flipad_jax.detection.one_class import OneClassConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NUM_KILLS = 10

# As `run.py`, but for writing whatever there is to write: what is quick is not kept otherwise.
PROGRAM = """
import runpy
from experiments import _record
from flipad_jax.detection import attributor
_record._KEEP_EVERY, attributor._PART = 0.0, 1
runpy.run_path("run.py", run_name="__main__")
"""


class Command:
    """A command that can be started again, and killed a while after it has said something."""

    def __init__(self, *flags):
        self.words = [sys.executable, "-c", PROGRAM, *map(str, flags)]

    def start(self):
        process = subprocess.Popen(
            self.words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        select.select([process.stderr], [], [], 120)  # until it says what it is doing, or ends
        return process

    def run(self):
        """To the end; returns the seconds from the first word on."""
        process = self.start()
        begun = time.monotonic()
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error.decode()
        return time.monotonic() - begun

    def kill_after(self, seconds, number):
        """Whether it was killed before it ended by itself."""
        process = self.start()
        try:
            _, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            _, error = process.communicate(timeout=60)
            if number == signal.SIGKILL:
                assert process.returncode == -signal.SIGKILL, error.decode()
                return True
            last = error.decode().splitlines()[-1]
            if process.returncode == 143:
                assert last.startswith("stopped by SIGTERM; go on with: python run.py"), last
                return True
        assert process.returncode == 0, error.decode()  # it was just done
        return False


def disturbed(command, calm, folders, seed):
    """Kill a command ten times; returns the folders of all runs that came to an end on the way.

    Args:
      command: of a folder, the command that works in it.
      calm: folder of the run that is left alone.
      folders: where the others go; the next one is taken when one has ended before its kill.
      seed: of the moments, within a third of the time that is needed.
    """
    command(calm.with_name("warm")).run()  # compiles
    seconds = command(calm).run()
    moments, kills, ended = random.Random(seed), 0, []
    for attempt in range(4 * NUM_KILLS):
        number = (signal.SIGKILL, signal.SIGTERM)[attempt % 2]
        folder = folders / str(len(ended))
        if command(folder).kill_after(moments.uniform(0, seconds / 3), number):
            kills += 1
        else:
            ended.append(folder)
        if kills == NUM_KILLS:
            break
    assert kills == NUM_KILLS, f"{kills} kills, {len(ended)} runs ended before one"
    folder = folders / str(len(ended))
    command(folder).run()
    return [*ended, folder]


def results(workdir):
    return json.loads((workdir / "results.json").read_text())["metrics"]


def debris(workdir):
    names = [path.name for path in workdir.rglob("*")]
    return [name for name in names if name.endswith((".tmp", ".partial")) or "tmp" in name]


def test_a_training(tmp_path):
    flags = ["--experiment=train_generator", "--preset=smoke", "--num_steps=80"]
    flags += ["--checkpoint_every=5"]
    calm = tmp_path / "calm"
    runs = disturbed(lambda w: Command(*flags, f"--workdir={w}"), calm, tmp_path / "killed", seed=1)

    def losses(workdir):  # of a step that is logged twice, the last counts
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return {line["step"]: line for line in map(json.loads, lines)}

    for killed in runs:
        assert results(killed) == results(calm)
        assert (killed / "0.safetensors").read_bytes() == (calm / "0.safetensors").read_bytes()
        assert losses(killed)[80] == losses(calm)[80]
        assert not debris(killed)


def test_a_fit(tmp_path):
    images, activations = own_images(1, 800)
    weight = np.ascontiguousarray(KERNEL.transpose(2, 3, 0, 1))
    save_file({"last.weight": weight, "last.bias": BIAS}, tmp_path / "model.safetensors")
    np.save(tmp_path / "mean.npy", activations.mean(axis=0).transpose(2, 0, 1))
    data.write_images(tmp_path / "own", images)
    data.write_images(tmp_path / "real", random_images(400, seed=4))
    flags = ["--experiment=fit", "--preset=smoke", "--detector=deepsad", "--epochs=20"]
    flags += ["--last_layer=last", f"--generator={tmp_path / 'model.safetensors'}"]
    flags += [f"--mean_activation={tmp_path / 'mean.npy'}", f"--generated={tmp_path / 'own'}"]
    flags += [f"--real={tmp_path / 'real'}"]
    calm = tmp_path / "calm"
    runs = disturbed(lambda w: Command(*flags, f"--workdir={w}"), calm, tmp_path / "killed", seed=2)

    def facts(workdir):
        times = ("fit_seconds", "attributor")
        return {key: value for key, value in results(workdir).items() if key not in times}

    for killed in runs:
        assert facts(killed) == facts(calm)  # the digest of the attributor is among them
        assert not debris(killed) and not (killed / "parts").exists()


def test_a_folder_that_is_judged(tmp_path):
    images, activations = own_images(1, 800)
    config = AttributorConfig(
        one_class=OneClassConfig(num_components=10), batch_size=16, num_altered=0
    )
    fitted = flipad_jax.fit(
        LAYER, activations.mean(axis=0), images, rng=jax.random.key(0), config=config
    )
    flipad_jax.save(fitted, tmp_path / "attributor")
    suspects = tmp_path / "suspects"
    data.write_images(suspects / "own", own_images(2, 700)[0])
    data.write_images(suspects / "others", random_images(700, seed=3))
    (suspects / "broken.png").write_bytes(b"no image")
    flags = ["--experiment=attribute", "--preset=smoke", f"--images={suspects}"]
    flags += [f"--attributor={tmp_path / 'attributor'}"]

    runs = disturbed(
        lambda w: Command(*flags, f"--workdir={w}", f"--output={w}.csv"),
        tmp_path / "calm",
        tmp_path / "killed",
        seed=3,
    )
    fields = ("ours", "not_ours", "cannot_judge", "num_files", "threshold", "not_ours_at_fdr")
    expected = results(tmp_path / "calm")
    for killed in runs:
        output = killed.with_suffix(".csv")
        assert output.read_bytes() == (tmp_path / "calm.csv").read_bytes()
        with output.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 1401 and len({row["path"] for row in rows}) == 1401
        lines = (killed / "scores.jsonl").read_text().splitlines()[1:]
        counts = Counter(json.loads(line)["path"] for line in lines)
        assert len(counts) == 1401 and set(counts.values()) == {1}
        found = results(killed)
        assert {key: found[key] for key in fields} == {key: expected[key] for key in fields}
        assert not debris(killed)
