"""One device, many devices, many processes: the same numbers."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import parallel_tasks
import pytest
from safetensors.numpy import load_file

from flipad_jax import parallel
from flipad_jax.inversion import lasso

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
TRAININGS = "gan,gradient_penalty,resumed,sad,keyed"
SCORES = "certified,started,alike,few,attributor,processes"


def run(tasks, folder, *, num_devices, launcher=()):
    """What the tasks of parallel_tasks.py return where there are so many devices per process."""
    out = folder / "found.npz"
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    done = subprocess.run(
        [*launcher, sys.executable, str(ROOT / "tests" / "parallel_tasks.py"), str(out), tasks],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with np.load(out) as found:
        return dict(found)


def assert_same(found, expected):
    """Equal to 1e-5 of the largest entry, array by array; certificates as far as they go."""
    assert found.keys() >= expected.keys()
    for name, values in expected.items():
        if name.endswith("/flops"):
            share = found["num_devices"] * found[name] / values
            assert 0.9 < share < 1.2, f"devices do {share:.2f} times the work of one device"
        elif name.endswith("/gap"):
            np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-4, err_msg=name)
        elif name != "num_devices":
            scale = np.nanmax(np.abs(values))
            np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5 * scale, err_msg=name)


# ---------------------------------------------------------------------------------------------
# Without processes


@pytest.mark.parametrize(
    "given, said",
    [
        (("host:1", None, None), "give all three"),
        ((None, 2, None), "give all three"),
        ((None, 2, 1), "give all three"),
        ((None, None, 0), "give all three"),
        (("host:1", 2, 2), "process_id must be from 0"),
        (("host:1", 2, -1), "process_id must be from 0"),
        (("host:1", 1, 1), "process_id must be from 0"),
        (("host", 2, 0), "HOST:PORT"),
        (("host:", 2, 0), "HOST:PORT"),
        ((":1234", 2, 0), "HOST:PORT"),
    ],
)
def test_half_a_group_is_refused_in_one_line(given, said):
    with pytest.raises(ValueError, match=said) as caught:
        parallel.initialize(*given)
    assert "\n" not in str(caught.value) and f"num_processes={given[1]}" in str(caught.value)


@pytest.mark.parametrize(
    "given, expected",
    [
        ((), (None, None, None, None)),  # JAX looks for Slurm, a pod, ...
        (("a:1", 2, 1), ("a:1", 2, 1, "deactivate")),  # ... or must not
        ((None, 1), None),
        (("a:1", 1, 0), None),
    ],
)
def test_who_finds_the_processes(monkeypatch, given, expected):
    calls, before = [], jax.config.jax_enable_preemption_service

    def initialize(*group, cluster_detection_method):
        assert not jax.config.jax_enable_preemption_service
        calls.append((*group, cluster_detection_method))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    try:
        parallel.initialize(*given)
        assert calls == ([] if expected is None else [expected])
        # Once is enough.
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
        parallel.initialize(*given)
        assert len(calls) <= 1
    finally:
        jax.config.update("jax_enable_preemption_service", before)


def test_nobody_to_be_found_is_said_in_one_line(monkeypatch):
    def initialize(*group, **options):
        raise ValueError("coordinator_address should be defined.")

    before = jax.config.jax_enable_preemption_service
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    try:
        with pytest.raises(ValueError, match="finds nobody .*srun") as caught:
            parallel.initialize()
        assert "\n" not in str(caught.value)
    finally:
        jax.config.update("jax_enable_preemption_service", before)


def test_parts_of_processes_are_disjoint_cover_all_and_are_as_long(monkeypatch):
    for count in range(1, 9):
        for num_items in range(30):
            parts = []
            for index in range(count):
                monkeypatch.setattr(jax, "process_count", lambda count=count: count)
                monkeypatch.setattr(jax, "process_index", lambda index=index: index)
                parts.append(parallel.local_range(num_items))
            assert [i for part in parts for i in part] == list(range(num_items))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_alone_nothing_is_moved_and_no_program_changes():
    mesh, tree = parallel.mesh(), {"a": np.arange(3.0), "b": [jax.numpy.ones(2)]}
    assert mesh.size == parallel.mesh(7).size == 1 and parallel.is_main()
    for same in (parallel.shard(tree, mesh), parallel.replicate(tree, mesh), parallel.local(tree)):
        leaves = zip(jax.tree.leaves(same), jax.tree.leaves(tree), strict=True)
        assert all(a is b for a, b in leaves)
    plain = jax.make_jaxpr(lambda x: 2 * x)(1.0)
    constrained = jax.make_jaxpr(lambda x: parallel.constrain(2 * x, mesh))(1.0)
    assert str(plain) == str(constrained)
    assert parallel.each_device(max, mesh) is max and parallel.each_device(max, None) is max
    np.testing.assert_array_equal(parallel.gather(np.arange(3)), np.arange(3))
    assert parallel.in_parts(list, range(3)) == [0, 1, 2]


def test_rows_of_slots_by_brute_force():
    draw = np.random.default_rng(0)
    for _ in range(100):
        devices = np.sort(draw.integers(0, 4, size=draw.integers(0, 12)))
        per_device = max(np.bincount(devices).max(initial=0), 1)
        rows, used = lasso._rows(devices, per_device), set()
        for device, row in zip(devices, rows):
            free = [r for r in range(device * per_device, (device + 1) * per_device)]
            assert row == next(r for r in free if r not in used)
            used.add(int(row))


def test_inversions_on_four_devices_and_what_a_mesh_is(tmp_path):
    expected = {f"certified/{k}": np.asarray(v) for k, v in parallel_tasks.certified().items()}
    found = run("processes,certified", tmp_path, num_devices=4)
    assert found["num_devices"] == 4
    assert_same(found, expected)


def test_two_processes_end_together():
    launch = str(SCRIPTS / "two_processes.sh")
    command = 'case "$*" in *id=1*) exit 7 ;; *) exec sleep 60 ;; esac'
    failed = subprocess.run([launch, "bash", "-c", command, "x"], timeout=30, check=False)
    assert failed.returncode == 7
    said = subprocess.run(
        [launch, "echo", "hello"], timeout=30, check=True, capture_output=True, text=True
    ).stdout
    lines = sorted(line.split() for line in said.splitlines())
    assert [line[0] for line in lines] == ["[1]", "hello"]
    assert lines[0][2:4] == lines[1][1:3] and lines[1][-1] == "--process_id=0"
    assert subprocess.run([launch], check=False, capture_output=True).returncode == 2


@pytest.mark.parametrize("script", ["slurm.sh", "tpu_pod.sh", "two_processes.sh"])
def test_launch_scripts_are_shell_and_can_be_started(script):
    assert os.access(SCRIPTS / script, os.X_OK)
    subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=True)


# ---------------------------------------------------------------------------------------------
# All of it


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    found = run(f"{TRAININGS},{SCORES}", tmp_path_factory.mktemp("one"), num_devices=1)
    assert found["num_devices"] == 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_devices_share_the_work_and_the_result_is_that_of_one(one_device, num_devices, tmp_path):
    found = run(f"{TRAININGS},{SCORES}", tmp_path, num_devices=num_devices)
    assert found["num_devices"] == num_devices
    assert_same(found, one_device)


@pytest.mark.slow
def test_two_processes_of_two_devices_get_what_one_device_gets(one_device, tmp_path):
    launcher = (str(SCRIPTS / "two_processes.sh"),)
    found = run(f"{TRAININGS},{SCORES}", tmp_path, num_devices=2, launcher=launcher)
    assert found["num_devices"] == 4
    assert_same(found, one_device)


@pytest.mark.slow
def test_a_command_in_two_processes_writes_once_what_one_process_writes(tmp_path):
    command = [sys.executable, "run.py", "--experiment=train_generator", "--preset=smoke"]
    weights = []
    for name, launcher in (("one", ()), ("two", (str(SCRIPTS / "two_processes.sh"),))):
        done = subprocess.run(
            [*launcher, *command, f"--workdir={tmp_path / name}"],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("Results: ") == 1
        weights.append(load_file(tmp_path / name / "0.safetensors"))
    one, two = weights
    assert one.keys() == two.keys()
    for key in one:  # kept in float16: rounding may fall on the other side
        np.testing.assert_allclose(two[key], one[key], rtol=1e-3, atol=1e-6, err_msg=key)
