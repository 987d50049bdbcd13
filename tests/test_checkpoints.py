"""Checkpoints under kill -9 and with several processes."""

import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from flipad_jax import checkpoints

ROOT = Path(__file__).resolve().parent.parent
NUM_ARRAYS, SIZE = 24, 200_000


def start(script, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SAVES_FOR_EVER = """
    import sys
    import numpy as np
    from flipad_jax import checkpoints

    folder, num_arrays, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    template = {str(i): np.zeros(size, np.float32) for i in range(num_arrays)}
    restored = checkpoints.restore_latest(folder, template)
    step = 0 if restored is None else restored[0]
    print("ready", flush=True)
    while True:
        step += 1
        state = {str(i): np.full(size, step, np.float32) for i in range(num_arrays)}
        checkpoints.save(folder, step, state)
        print(step, flush=True)
"""


@pytest.mark.slow
def test_a_checkpoint_is_whole_or_not_there_whenever_the_process_is_killed(tmp_path):
    """Every number in a checkpoint is that of its step, and what was reported as saved is there."""
    folder, rng = tmp_path / "c", random.Random(0)
    template = {str(i): np.zeros(SIZE, np.float32) for i in range(NUM_ARRAYS)}
    debris = []
    for _ in range(8):
        process = start(SAVES_FOR_EVER, folder, NUM_ARRAYS, SIZE)
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        told = process.stdout.readline()
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        out, _ = process.communicate()
        told = int((told + out).split("\n")[-2])
        debris.append(sum("tmp" in path.name for path in folder.iterdir()))
        step, state = checkpoints.restore_latest(folder, template)
        assert step in (told, told + 1)
        for array in state.values():
            assert (np.asarray(array) == step).all()
    # Some were killed while they wrote; what they left behind, the next one writes over.
    assert max(debris) == 1, debris


TWO_PROCESSES = """
    import sys
    import jax
    import numpy as np

    port, index, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from flipad_jax import checkpoints, parallel

    everywhere = NamedSharding(Mesh(np.asarray(jax.devices()), "batch"), PartitionSpec())

    def state(value):
        array = np.full((3, 5), value, np.float32)
        weights = jax.make_array_from_process_local_data(everywhere, array)
        return {"weights": weights, "position": parallel.gather(np.array([value + index * 2**40]))}

    for step in (1, 2, 3):
        checkpoints.save(folder, step, state(step))
    step, found = checkpoints.restore_latest(folder, state(0))
    assert step == 3 and (np.asarray(found["weights"]) == 3).all()
    assert found["position"].tolist() == [3, 3 + 2**40], found["position"]
    print("done", checkpoints.steps(folder))
"""


@pytest.mark.slow
def test_two_processes_save_one_checkpoint(tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = [start(TWO_PROCESSES, port, i, tmp_path / "c") for i in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert out.endswith("done [2, 3]\n"), err
    # Another process reads it; with another number of processes a position means nothing.
    template = {"weights": jnp.zeros((3, 5), jnp.float32), "position": np.zeros(2, np.int64)}
    step, state = checkpoints.restore_latest(tmp_path / "c", template)
    assert step == 3 and (np.asarray(state["weights"]) == 3).all()
    with pytest.raises(ValueError, match="'position'. is .2. there and .1. here"):
        checkpoints.restore_latest(tmp_path / "c", {**template, "position": np.zeros(1, np.int64)})
