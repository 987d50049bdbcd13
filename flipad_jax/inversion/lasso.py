"""Lasso for many images: slots for the device, a certificate per image, one compilation.

Minimises 1/2 ||A z - o||^2 + lam ||z||_1 for each target o on its own. This is the one place where
the solvers, which know a single image, are vmapped and jitted. The operator and every number are
arguments of the compiled functions, so only a new geometry, number of slots or method compiles
again.

Images differ in the iterations they need, two- to fivefold in one batch, and a batched loop runs
until its slowest image is done. Here a chunk is a set of slots: all of them advance a few
iterations at a time, an image that is certified leaves its slot and the next one enters. What an
image gets does not depend on its neighbours.

With several devices each has its own slots; images enter and leave on all of them in one compiled
call, and no device waits for data of another. Processes know nothing of each other here.
"""

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from flipad_jax import parallel
from flipad_jax.inversion import linops, polyphase
from flipad_jax.inversion.fista import fista
from flipad_jax.inversion.linops import Conv, ConvTranspose, LinearOperator
from flipad_jax.inversion.polyphase import Polyphase
from flipad_jax.inversion.preconditioner import preconditioner
from flipad_jax.inversion.primal_dual import primal_dual
from flipad_jax.inversion.solver import Solver, finish_after

__all__ = ["LassoInfo", "METHODS", "solve"]

# name -> factory(op, lam=, max_iters=, tol=, **what `_constants` measures) -> Solver
METHODS: dict[str, Callable[..., Solver]] = {"primal_dual": primal_dual, "fista": fista}

_LEAVING = 8  # one slot in so many is emptied at a time
_PATIENCE = 2000  # iterations of the primal-dual method, at least, before FISTA is tried
_GAP_EVERY = 10  # iterations between two looks at the gap
_NOT_YET = float(np.finfo(np.float32).max)  # a bound above every threshold, yet finite


class LassoInfo(NamedTuple):
    """One entry per image.

    Attributes:
      gap: `[n]` duality gap at z, in units of the objective (no 1/n); NaN where the target holds
        NaN.
      relative_gap: `[n]` gap / objective at z, 0 at the solution; it may exceed 1 far from it.
      num_iters: `[n]` int32.
      converged: `[n]` bool, relative_gap <= tol. Look at it before using z.
    """

    gap: jax.Array
    relative_gap: jax.Array
    num_iters: jax.Array
    converged: jax.Array


def solve(
    op: LinearOperator,
    targets: np.ndarray | jax.Array,
    *,
    lam: float,
    method: str = "primal_dual",
    tol: float = 1e-2,
    max_iters: int = 10_000,
    lipschitz: float | jax.Array | None = None,
    chunk_size: int | None = None,
    z_init: np.ndarray | jax.Array | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[jax.Array, LassoInfo]:
    """Minimise 1/2 ||A z - o||^2 + lam ||z||_1 for every target.

    Runs on the host around compiled chunks, so it cannot itself be traced; inside jit use
    `jax.vmap(primal_dual(op, ...).run)`. A warning is logged when an image does not reach `tol`.

    Args:
      op: the operator A; everything is computed in its dtype.
      targets: `[n, *op.output_shape]`, floating; n may be 0.
      lam: weight, finite and at least 0. Half of the FLIPAD paper's lambda. At 0 there is no
        certificate: the relative gap stays at 1 until the residual is zero.
      method: a name in `METHODS`: "primal_dual", or "fista" as in the FLIPAD paper. The first is
        far quicker where the layer has more activations than outputs, as last layers mostly have.
        With a `tol`, FISTA takes its place where there are fewer (a dense decoder), and goes on
        where it has not certified an image after a quarter of `max_iters` and 2000 iterations, as
        with foreign images where some of A A^T is next to nothing.
      tol: relative duality gap to reach; 0 for exactly `max_iters` iterations on every image. For
        targets of 8-bit images and lam = 5e-4, float32 cannot tell gaps below about 5e-4, as the
        residual is then 1e-4 of the target: build the operator in float64 for a tighter one.
      max_iters: iterations after which an image is given up (and reported unconverged).
      lipschitz: at least ||A||^2, for FISTA, whose step is one over it; `linops.squared_norm(op)`
        by default.
      chunk_size: images in work at once, divided among the devices of this process (rounded up).
        By default as many as fit the cache of a CPU or keep an accelerator busy, for each device.
        Memory grows with the output and one chunk, not more.
      z_init: `[n, *op.input_shape]` to start from, for instance the solution at a neighbouring lam.
      progress: called with the number of images done, after each chunk.

    Returns:
      `(z [n, *op.input_shape], LassoInfo)` on the default device. Entries that are zero at the
      solution are exactly zero with "fista"; "primal_dual" leaves up to some 1e-4 of the largest.

    Raises:
      ValueError: if a shape, dtype or number is wrong, before anything is computed.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose from {sorted(METHODS)}")
    targets = _check_batch("targets", targets, op.output_shape)
    num_images = targets.shape[0]
    if z_init is not None:
        z_init = _check_batch("z_init", z_init, op.input_shape)
        if z_init.shape[0] != num_images:
            raise ValueError(f"z_init holds {z_init.shape[0]} samples, targets {num_images}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    mesh = parallel.local_mesh()
    if num_images < mesh.size:
        mesh = parallel.local_mesh(1)
    if chunk_size is None:
        num_slots = _default_chunk_size(op)
    else:
        num_slots = -(-chunk_size // mesh.size)
    # Few images: the next power of two, so that n = 1, 2, ... do not compile once each.
    num_slots = min(num_slots, 1 << max(-(-num_images // mesh.size) - 1, 0).bit_length())
    if lipschitz is not None and method != "fista":
        raise ValueError(f"lipschitz={lipschitz!r} is FISTA's; method={method!r} takes none")
    if method == "primal_dual" and tol > 0 and _has_fewer_activations(op):
        method = "fista"
    given = {} if lipschitz is None else {"lipschitz": lipschitz}
    packed, numbers = _numbers(op, method, lam=lam, tol=tol, max_iters=max_iters, **given)
    if num_images == 0:
        nothing = jnp.zeros(0, op.dtype)
        info = LassoInfo(nothing, nothing, nothing.astype(jnp.int32), nothing.astype(bool))
        return jnp.zeros((0, *op.input_shape), op.dtype), info
    progress = progress or (lambda _: None)
    in_slots = functools.partial(_solve_in_slots, num_slots=num_slots, mesh=mesh)
    first = max(max_iters // 4, _PATIENCE) if method == "primal_dual" and tol > 0 else max_iters
    numbers["max_iters"] = np.asarray(min(first, max_iters), np.int32)
    z, info = in_slots(packed, numbers, targets, z_init, method=method, progress=progress)
    left = np.flatnonzero(~np.asarray(info.converged) & np.isfinite(np.asarray(info.gap)))
    if left.size and first < max_iters:
        packed, numbers = _numbers(op, "fista", lam=lam, tol=tol, max_iters=max_iters - first)
        again = in_slots(
            packed, numbers, targets[left], z[left], method="fista", progress=lambda _: None
        )
        z, info = _better((z, info), again, left)
    _warn_unconverged(info, tol)
    return z, info


def _has_fewer_activations(op: LinearOperator) -> bool:
    """A A^T is singular then, and own targets fill a part of its range that the primal-dual method
    is slow to find: a dense layer of 400 activations and 784 outputs takes FISTA 200 iterations."""
    return math.prod(op.input_shape) < math.prod(op.output_shape)


def _numbers(
    op: LinearOperator, method: str, *, lam: float, tol: float, max_iters: int, **given: Any
) -> tuple[LinearOperator, dict[str, Any]]:
    """The operator as it is iterated, and all that the solver takes; refuses what it would not."""
    packed, constants = _constants(cast(Hashable, op), method)
    constants = constants | given
    METHODS[method](packed, lam=lam, tol=tol, max_iters=max_iters, **constants)
    numbers = {"lam": np.asarray(lam, op.dtype), "tol": np.asarray(tol, op.dtype)}
    return packed, {**numbers, "max_iters": np.asarray(max_iters, np.int32), **constants}


def _better(
    first: tuple[jax.Array, LassoInfo], again: tuple[jax.Array, LassoInfo], which: np.ndarray
) -> tuple[jax.Array, LassoInfo]:
    """What a second attempt at some images made better; all of its iterations count."""
    (z, info), (new_z, new) = first, again
    better = np.asarray(new.relative_gap) < np.asarray(info.relative_gap)[which]
    won = which[better]
    fields = {
        name: getattr(info, name).at[won].set(getattr(new, name)[better])
        for name in ("gap", "relative_gap", "converged")
    }
    num_iters = info.num_iters.at[which].add(new.num_iters)
    return z.at[won].set(new_z[better]), LassoInfo(num_iters=num_iters, **fields)


@functools.lru_cache(maxsize=16)
def _constants(op: Any, method: str) -> tuple[LinearOperator, dict[str, Any]]:
    """The operator in the form that is iterated, and what its solver must know of it.

    Remembered per operator object (its weights never change): callers solve in many batches.
    """
    packed: LinearOperator = op
    if isinstance(op, Conv | ConvTranspose):
        packed = polyphase.polyphase(op)
    if method == "fista":
        return packed, {"lipschitz": linops.squared_norm(packed)}
    return packed, {"preconditioner": preconditioner(packed)}


def _solve_in_slots(
    op: LinearOperator,
    numbers: dict[str, Any],
    targets: np.ndarray | jax.Array,
    z_init: np.ndarray | jax.Array | None,
    *,
    method: str,
    num_slots: int,
    mesh: Mesh,
    progress: Callable[[int], None],
) -> tuple[jax.Array, LassoInfo]:
    """Solve all images, `num_slots` at a time on each device; packed inside, plain outside.

    Slot s is on device s // num_slots. What is done with a few slots of every device is done in
    arrays with as many rows for each device: `_rows` says which row a slot has there.
    """
    num_images = targets.shape[0]
    # On the host: a slice of a device array is compiled for each place that it starts at.
    targets = np.asarray(targets)
    z_init = None if z_init is None else np.asarray(z_init)
    tol, max_iters = float(numbers["tol"]), int(numbers["max_iters"])
    solver = METHODS[method](op, **numbers)
    first_threshold = tol * solver.first_threshold
    # `finish` costs some twenty iterations, so it runs on the few images that are due, not on all.
    num_leaving = max(num_slots // _LEAVING, 1)
    plain = op.op.input_shape if isinstance(op, Polyphase) else op.input_shape
    static = {"method": method, "mesh": mesh}
    op, numbers = parallel.replicate((op, numbers), mesh)

    def enter(images: np.ndarray, where: np.ndarray, size: int):
        rows = _placed(targets, images, where, size * mesh.size, op.dtype)
        starts = None
        if z_init is not None:
            starts = _placed(z_init, images, where, size * mesh.size, op.dtype)
        return _enter(op, *parallel.shard((rows, starts), mesh), numbers, **static)

    out = jnp.zeros((num_images, *plain), op.dtype)
    info = (
        np.full(num_images, np.nan, op.dtype),
        np.full(num_images, np.nan, op.dtype),
        np.zeros(num_images, np.int32),
        np.zeros(num_images, bool),
    )
    all_slots, all_leaving = num_slots * mesh.size, num_leaving * mesh.size
    image = np.full(all_slots, -1)  # what is in a slot; -1: nothing
    first = np.arange(min(all_slots, num_images))
    slots = first % mesh.size * num_slots + first // mesh.size  # as many on each device
    image[slots] = first
    waiting, num_done = first.size, 0
    state, o, bound = enter(first, slots, num_slots)
    relative = np.array(bound)
    threshold = np.full(all_slots, first_threshold)
    iters = np.zeros(all_slots, np.int64)
    while num_done < num_images:
        taken = image >= 0
        broken = taken & ~np.isfinite(relative)
        due = broken | (taken & (tol > 0) & (relative <= threshold))
        last = taken & ~due & (iters + _GAP_EVERY > max_iters)
        if due.any() or last.any():
            # At once, so that what an image gets does not depend on when its neighbours are due.
            given_up = broken | last
            slots = np.flatnonzero(due if due.any() else last)
            slots = slots[_ranks(slots // num_slots) < num_leaving]
            rows = _rows(slots // num_slots, num_leaving)
            num_steps = 0 if due.any() else max_iters % _GAP_EVERY
            where = _filled(slots % num_slots, rows, all_leaving, 0)
            z, found = _finish(op, state, o, where, np.int32(num_steps), numbers, **static)
            found = tuple(np.asarray(values)[rows] for values in found)
            leaves = found[-1] | given_up[slots]
            images = np.where(leaves, image[slots], num_images)  # Beyond the end: not written.
            out = _write(out, parallel.local(z), _filled(images, rows, all_leaving, num_images))
            for all_values, values in zip(info, found, strict=True):
                all_values[images[leaves]] = values[leaves]
            threshold[slots] *= solver.next_threshold
            relative[slots] = _NOT_YET  # A second attempt comes after more iterations.
            freed = slots[leaves]
            image[freed] = -1
            num_done += freed.size
            progress(num_done)
            entering = np.arange(waiting, min(waiting + freed.size, num_images))
            waiting += entering.size
            if entering.size:
                freed = freed[: entering.size]
                rows = _rows(freed // num_slots, num_leaving)
                new_state, new_o, bound = enter(entering, rows, num_leaving)
                where = _filled(freed % num_slots, rows, all_leaving, num_slots)
                state, o = _replace((state, o), (new_state, new_o), where, mesh=mesh)
                image[freed], iters[freed], threshold[freed] = entering, 0, first_threshold
                relative[freed] = np.asarray(bound)[rows]
            continue
        state, bound = _advance(op, state, o, np.int32(_GAP_EVERY), numbers, **static)
        iters[taken] += _GAP_EVERY
        # Waits for the device: nothing is queued up.
        relative = np.array(bound)
    return out, LassoInfo(*(jnp.asarray(values) for values in info))


@functools.partial(jax.jit, static_argnames=("method", "mesh"))
def _enter(op, targets, z_init, numbers, *, method, mesh=None):
    def enter(whole, rows):
        (op, numbers), (targets, z_init) = whole, rows
        solver = METHODS[method](op, **numbers)
        if isinstance(op, Polyphase):
            targets = polyphase.pack_output(op, targets)
            z_init = None if z_init is None else polyphase.pack_input(op, z_init)
        state = jax.vmap(solver.init)(targets, z_init)
        return state, targets, jax.vmap(solver.first_gap)(state, targets)

    return parallel.each_device(enter, mesh)((op, numbers), (targets, z_init))


@functools.partial(jax.jit, static_argnames=("method", "mesh"), donate_argnames="state")
def _advance(op, state, o, num_steps, numbers, *, method, mesh=None):
    def advance(whole, rows):
        op, num_steps, numbers = whole
        solver = METHODS[method](op, **numbers)
        return jax.vmap(solver.advance, in_axes=(0, 0, None))(*rows, num_steps)

    return parallel.each_device(advance, mesh)((op, num_steps, numbers), (state, o))


@functools.partial(jax.jit, static_argnames=("method", "mesh"))
def _finish(op, state, o, slots, num_steps, numbers, *, method, mesh=None):
    def finish(whole, rows):
        (op, num_steps, numbers), (state, o, slots) = whole, rows
        solver = METHODS[method](op, **numbers)
        state, o = jax.tree.map(lambda x: x[slots], (state, o))
        z, info = jax.vmap(functools.partial(finish_after, solver), in_axes=(0, 0, None))(
            state, o, num_steps
        )
        if isinstance(op, Polyphase):
            z = polyphase.unpack_input(op, z)
        return z, LassoInfo(*info)

    return parallel.each_device(finish, mesh)((op, num_steps, numbers), (state, o, slots))


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _replace(slots, new, where, *, mesh):
    """Put `new` into the slots `where`; an index beyond a device's last slot is dropped."""

    def replace(_, rows):
        slots, new, where = rows
        return jax.tree.map(lambda all_, some: all_.at[where].set(some, mode="drop"), slots, new)

    return parallel.each_device(replace, mesh)((), (slots, new, where))


@functools.partial(jax.jit, donate_argnums=0)
def _write(out, z, images):
    """Write solutions into the output in place; an index beyond the end is dropped."""
    return out.at[images].set(z, mode="drop")


def _ranks(devices: np.ndarray) -> np.ndarray:
    """Of ascending devices: how many entries before each have the same one."""
    return np.arange(devices.size) - np.searchsorted(devices, devices)


def _rows(devices: np.ndarray, per_device: int) -> np.ndarray:
    """Rows for entries on ascending devices, in arrays with `per_device` rows for each."""
    return devices * per_device + _ranks(devices)


def _filled(values: np.ndarray, rows: np.ndarray, size: int, value: int) -> np.ndarray:
    """`[size]` int32: values in their rows, and one value everywhere else."""
    filled = np.full(size, value, np.int32)
    filled[rows] = values
    return filled


def _placed(
    batch: np.ndarray, images: np.ndarray, rows: np.ndarray, size: int, dtype: jnp.dtype
) -> np.ndarray:
    """`[size, ...]`: some images in their rows, and zeros everywhere else."""
    placed = np.zeros((size, *batch.shape[1:]), dtype)
    placed[rows] = batch[images]
    return placed


def _default_chunk_size(op: LinearOperator) -> int:
    """Largest power of two whose iterates fit the budget of the device.

    On a CPU the budget is what the cache holds: beyond it each iteration waits for memory. An
    accelerator wants one large batch; the budget leaves room for the half dozen arrays of a solver.
    """
    budget = 2**21 if jax.default_backend() == "cpu" else 2**28
    sample = math.prod(op.input_shape) * jnp.dtype(op.dtype).itemsize
    return 1 << (max(budget // sample, 1).bit_length() - 1)


def _check_batch(
    name: str, batch: np.ndarray | jax.Array, shape: tuple[int, ...]
) -> np.ndarray | jax.Array:
    if not isinstance(batch, jax.Array):
        batch = np.asarray(batch)
    if batch.ndim != len(shape) + 1 or batch.shape[1:] != shape:
        hint = "; add a batch axis" if batch.shape == shape else ""
        raise ValueError(f"{name} has shape {batch.shape}, expected {('n', *shape)}{hint}")
    if not jnp.issubdtype(batch.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {batch.dtype}, expected a floating dtype")
    return batch


def _warn_unconverged(info: LassoInfo, tol: float) -> None:
    failed = np.flatnonzero(~np.asarray(info.converged))
    # With tol = 0 the caller asked for a number of iterations, not for a certificate.
    if tol > 0 and failed.size:
        logging.warning(
            "lasso: %d of %d images did not reach a relative duality gap of %g "
            "(worst %g); first indices %s",
            failed.size,
            info.converged.size,
            tol,
            np.max(np.asarray(info.relative_gap)[failed]),
            failed[:10].tolist(),
        )
