"""Devices and processes: the one file that knows how many there are.

One program runs on one core, on eight GPUs and on a pod. Two ways of dividing work cover all of it:

*   *Training* is one program over the devices of all processes (`mesh`). Every process calls it
    with the same arguments, at the same time. The batch is split (`shard`, `constrain`), parameters
    are on every device (`replicate`), and the compiler adds what devices must tell each other: a
    loss, a mean of BatchNorm, a gradient is that of the whole batch, as on one device.
*   *Everything that looks at one image or one model at a time* (inversion, scores, keyed models)
    runs on the devices of its own process (`local_mesh`) and knows nothing of other processes.
    Whoever has work for several processes gives each its part (`local_range`) and puts the results
    together (`gather`), or both (`in_parts`).

With one device nothing here does anything: the arrays and the compiled programs are those of a
library that has never heard of devices.

A batch that cannot be divided among all devices uses fewer: as many as divide it (`mesh`). Nothing
is padded, since a padded batch would have another mean.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = [
    "anywhere",
    "check_same",
    "constrain",
    "each_device",
    "gather",
    "in_parts",
    "initialize",
    "is_main",
    "local",
    "local_mesh",
    "local_range",
    "mesh",
    "replicate",
    "shard",
]

_AXIS = "batch"


# ---------------------------------------------------------------------------------------------
# Processes


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Make this process one of several; before anything else touches JAX's devices.

    Waits, up to five minutes, until all processes have called it. Once is enough; and
    `num_processes=1` does nothing, so that a process can stay alone on a cluster, too.

    Args:
      coordinator_address: host and port of process 0, as the others reach it, "10.0.0.1:1234".
      num_processes: how many there are.
      process_id: number of this one, from 0. All three or, where Slurm, Open MPI or a TPU pod
        started the processes, none: JAX finds them.
    Raises:
      ValueError: for some of the three without the others, numbers out of range, or none where
        JAX finds nothing.
      RuntimeError: if JAX was used before, or the processes did not find each other.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    said = ", ".join(f"{name}={value!r}" for name, value in given.items())
    if num_processes == 1 and process_id in (None, 0):
        return
    found_by_jax = all(value is None for value in given.values())
    if not found_by_jax:
        if coordinator_address is None or num_processes is None or process_id is None:
            raise ValueError(
                f"{said}: give all three, or none where Slurm, Open MPI or a TPU pod starts the "
                "processes"
            )
        host, _, port = coordinator_address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"{said}: the address of process 0 must be HOST:PORT")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"{said}: process_id must be from 0 to num_processes - 1")
    if jax.distributed.is_initialized():
        return
    # JAX would take SIGTERM for itself; a run that is told to stop saves first and agrees on when
    # (`anywhere`).
    jax.config.update("jax_enable_preemption_service", False)
    method = None if found_by_jax else "deactivate"
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, cluster_detection_method=method
        )
    except ValueError as error:
        raise ValueError(
            f"{said}: JAX finds nobody who started several processes ({error}); start them with "
            "srun, mpirun or on a TPU pod, or give all three"
        ) from error


def is_main() -> bool:
    """Whether this is process 0, the one that writes results. Asks no device if it is alone."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def local_range(num_items: int) -> range:
    """The part of 0, ..., num_items - 1 that is this process's: those of all processes, in order,
    cover it, and differ in length by one at most."""
    count, index = jax.process_count(), jax.process_index()
    return range(num_items * index // count, num_items * (index + 1) // count)


def gather(array: np.ndarray | jax.Array) -> np.ndarray:
    """The rows of all processes, one process after the other, on every process.

    Every process must call it. What travels are bytes, so nothing is rounded.

    Args:
      array: `[n, ...]`; n may differ between processes and be 0, the rest must not.
    Returns:
      `[sum of n, ...]`, of the same dtype.
    """
    rows = np.ascontiguousarray(array)
    if jax.process_count() == 1:
        return rows
    from jax.experimental import multihost_utils

    counts = multihost_utils.process_allgather(np.int32(len(rows)))
    sent = np.zeros((int(counts.max()), *rows.shape[1:]), rows.dtype)
    sent[: len(rows)] = rows
    if sent.nbytes == 0:
        return np.zeros((int(counts.sum()), *rows.shape[1:]), rows.dtype)
    everyone = multihost_utils.process_allgather(sent.reshape(-1).view(np.uint8))
    parts = everyone.view(rows.dtype).reshape(-1, *sent.shape)
    return np.concatenate([part[:count] for part, count in zip(parts, counts, strict=True)])


def in_parts(function: Callable[[Any], Any], rows: Any) -> Any:
    """`function(rows)`, of which each process computes its part (`local_range`).

    Args:
      function: rows `[n, ...]` -> a tree of arrays `[n, ...]`, each row from its own row alone; n
        may be 0.
      rows: the same on every process.
    Returns:
      what one process would get alone, as NumPy arrays if there are several.
    """
    if jax.process_count() == 1:
        return function(rows)
    own = local_range(len(rows))
    return jax.tree.map(gather, function(rows[own.start : own.stop]))


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true on any process: all stop after the same step, or none does.

    Every process must call it equally often.
    """
    return bool(gather(np.array([flag])).any())


def check_same(what: str, *values: Any) -> None:
    """Refuse to go on if processes that should do the same were told different things.

    Args:
      what: what is compared, for the message.
      values: arrays, or anything whose text says all that matters.
    Raises:
      ValueError: on every process, if the values differ.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256()
    for value in values:
        value = np.asarray(value) if isinstance(value, jax.Array) else value
        if isinstance(value, np.ndarray):
            digest.update(f"{value.dtype}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        else:
            digest.update(repr(value).encode())
    found = gather(np.frombuffer(digest.digest(), np.uint8)[None])
    others = np.flatnonzero((found != found[0]).any(axis=1))
    if others.size:
        raise ValueError(
            f"{what} of process {', '.join(map(str, others))} is not that of process 0: start all "
            "processes with the same flags and the same data"
        )


# ---------------------------------------------------------------------------------------------
# Devices


def mesh(batch_size: int | None = None) -> Mesh:
    """The devices of all processes, along one axis "batch", those of a process side by side.

    Args:
      batch_size: of this many rows every device gets as many as the others. If that cannot be, so
        many devices per process as divide them are used, and a warning says so.
    Raises:
      ValueError: if the rows cannot even be divided among the processes.
    """
    count = jax.process_count()
    if batch_size is not None and batch_size % count:
        raise ValueError(
            f"a batch of {batch_size} cannot be divided among {count} processes: use a multiple of "
            f"{count}, best of {jax.device_count()}, one per device"
        )
    per_process = None if batch_size is None else batch_size // count
    used = _num_used(per_process, jax.local_device_count())
    if used < jax.local_device_count():
        _say_idle(batch_size, used * count, jax.device_count())
    chosen: dict[int, list[jax.Device]] = {process: [] for process in range(count)}
    for device in sorted(jax.devices(), key=lambda device: device.id):
        if len(chosen[device.process_index]) < used:
            chosen[device.process_index].append(device)
    return Mesh(np.array(sum(chosen.values(), [])), (_AXIS,))


def local_mesh(batch_size: int | None = None) -> Mesh:
    """The devices of this process alone, or as many as divide `batch_size`."""
    devices = jax.local_devices()
    return Mesh(np.array(devices[: _num_used(batch_size, len(devices))]), (_AXIS,))


def _num_used(batch_size: int | None, num_devices: int) -> int:
    if batch_size is None:
        return num_devices
    return max(n for n in range(1, num_devices + 1) if batch_size % n == 0)


@functools.cache  # once per batch size, not once per call
def _say_idle(batch_size: int, used: int, there: int) -> None:
    logging.warning(
        "a batch of %d uses %d of %d devices; a multiple of %d would use all",
        batch_size,
        used,
        there,
        there,
    )


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if _is_key(leaf):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf  # lies on all processes already
    return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))


def shard(tree: Any, mesh: Mesh, *, axis: int = 0) -> Any:
    """Arrays cut along one axis, a piece on each device.

    Args:
      tree: arrays `[..., n, ...]`. On a mesh of several processes, this process's rows only: the
        whole array is that of all processes one after the other.
      mesh: from `mesh` or `local_mesh`; n is a multiple of its devices of this process.
      axis: which one is cut.
    Returns:
      the same values on the mesh; unchanged if it is one device.
    """
    if mesh.size == 1:
        return tree
    sharding = NamedSharding(mesh, _spec(axis))
    return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Whole arrays (random keys, too) on each device; every process gives the same.

    Returns:
      the same values on the mesh; unchanged if it is one device.
    """
    if mesh.size == 1:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)


def constrain(tree: Any, mesh: Mesh | None, *, axis: int | None = 0) -> Any:
    """Inside a compiled program: arrays cut along `axis`, or whole on each device if it is None.

    Without a mesh, or with one device, the program does not change.
    """
    if mesh is None or mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, _spec(axis)))


def each_device(
    function: Callable[[Any, Any], Any], mesh: Mesh | None
) -> Callable[[Any, Any], Any]:
    """Inside a compiled program: `function` on every device's own rows, which need no others.

    Args:
      function: `(whole, rows)`, trees of arrays, -> a tree of arrays; the first axis of the rows
        and of what it returns is divided among the devices, `whole` is on each of them.
      mesh: without one, or with one device, `function` is called as it is.
    """
    if mesh is None or mesh.size == 1:
        return function
    rows = PartitionSpec(_AXIS)
    # Without the check: a loop that starts from constants would have to declare that it differs
    # between devices.
    return jax.shard_map(
        function, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False
    )


def local(tree: Any) -> Any:
    """Whole arrays on one device of this process, of what lies on several.

    Args:
      tree: from `replicate`, or from `shard` on a `local_mesh`.
    """

    def one(leaf):
        if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
            return leaf
        if _is_key(leaf):
            data = one(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if leaf.is_fully_replicated:
            return leaf.addressable_data(0)
        return jax.device_put(leaf, jax.local_devices()[0])

    return jax.tree.map(one, tree)


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, _AXIS)
