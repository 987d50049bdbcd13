"""Lasso for many images: chunks for the device, one compilation, a certificate per image.

Minimises 1/2 ||A z - o||^2 + lam ||z||_1 for each target o on its own. This is the one place where
the solvers, which know a single image, are vmapped and jitted. The operator and every number are
arguments of the compiled function, so only a new geometry, chunk size or method compiles again.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from flipad_jax.inversion import linops
from flipad_jax.inversion.fista import fista
from flipad_jax.inversion.linops import LinearOperator

__all__ = ["LassoInfo", "METHODS", "solve"]

# name -> factory(op, lam=, lipschitz=, max_iters=, tol=) with a `run(o, z_init) -> (z, info)`.
METHODS = {"fista": fista}


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
    method: str = "fista",
    tol: float = 1e-2,
    max_iters: int = 10_000,
    lipschitz: float | jax.Array | None = None,
    chunk_size: int | None = None,
    z_init: np.ndarray | jax.Array | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[jax.Array, LassoInfo]:
    """Minimise 1/2 ||A z - o||^2 + lam ||z||_1 for every target.

    Runs on the host around compiled chunks, so it cannot itself be traced; inside jit use
    `jax.vmap(fista(op, ...).run)`. A warning is logged when an image does not reach `tol`.

    Args:
      op: the operator A; everything is computed in its dtype.
      targets: `[n, *op.output_shape]`, floating; n may be 0.
      lam: weight, finite and at least 0. Half of the FLIPAD paper's lambda. At 0 there is no
        certificate: the relative gap stays at 1 until the residual is zero.
      method: a name in `METHODS`.
      tol: relative duality gap to reach; 0 for exactly `max_iters` iterations on every image. For
        targets of 8-bit images and lam = 5e-4, float32 cannot tell gaps below about 5e-4, as the
        residual is then 1e-4 of the target: build the operator in float64 for a tighter one.
      max_iters: iterations after which an image is given up (and reported unconverged).
      lipschitz: at least ||A||^2; `linops.squared_norm(op)` by default. The step is one over it.
      chunk_size: images solved at once. By default as many as fit the cache of a CPU or keep an
        accelerator busy. Memory grows with the output and one chunk, not more.
      z_init: `[n, *op.input_shape]` to start from, for instance the solution at a neighbouring lam.
      progress: called with the number of images done, after each chunk.

    Returns:
      `(z [n, *op.input_shape], LassoInfo)` on the default device.

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
    if chunk_size is None:
        chunk_size = _default_chunk_size(op)
    elif chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    # Few images: the next power of two, so that n = 1, 2, ... do not compile once each.
    chunk_size = min(chunk_size, 1 << max(num_images - 1, 0).bit_length())
    if lipschitz is None:
        lipschitz = linops.squared_norm(op)
    numbers: dict[str, Any] = {
        "lam": lam,
        "lipschitz": lipschitz,
        "max_iters": max_iters,
        "tol": tol,
    }
    METHODS[method](op, **numbers)  # Refuses numbers out of range, computes nothing.
    numbers = {
        name: np.asarray(value, np.int32 if name == "max_iters" else op.dtype)
        for name, value in numbers.items()
    }

    z = jnp.zeros((num_images, *op.input_shape), op.dtype)
    infos = []
    for start in range(0, num_images, chunk_size):
        stop = min(start + chunk_size, num_images)
        z_chunk, info = _solve_chunk(
            op,
            _padded(targets, start, stop, chunk_size, op.dtype),
            None if z_init is None else _padded(z_init, start, stop, chunk_size, op.dtype),
            numbers,
            method=method,
        )
        z = _write(z, z_chunk, np.int32(start))
        # Waits for the chunk: otherwise the inputs of all chunks would be queued in memory.
        infos.append(jax.tree.map(lambda v: np.asarray(v)[: stop - start], info))  # noqa: B023
        if progress is not None:
            progress(stop)
    if infos:
        info = LassoInfo(*(jnp.asarray(np.concatenate(values)) for values in zip(*infos)))
    else:
        nothing = jnp.zeros(0, op.dtype)
        info = LassoInfo(nothing, nothing, nothing.astype(jnp.int32), nothing.astype(bool))
    _warn_unconverged(info, tol)
    return z, info


def _run_chunk(op, targets, z_init, numbers, *, method):
    solver = METHODS[method](op, **numbers)
    z, info = jax.vmap(solver.run)(targets, z_init)
    return z, LassoInfo(info.gap, info.relative_gap, info.num_iters, info.converged)


_solve_chunk = jax.jit(_run_chunk, static_argnames="method")


@functools.partial(jax.jit, donate_argnums=0)
def _write(z: jax.Array, chunk: jax.Array, start: jax.Array) -> jax.Array:
    """Write a chunk into the output in place; rows beyond the end are padding and dropped."""
    return z.at[start + jnp.arange(chunk.shape[0])].set(chunk, mode="drop")


def _padded(
    batch: np.ndarray | jax.Array, start: int, stop: int, size: int, dtype: jnp.dtype
) -> np.ndarray:
    """Rows start to stop and zeros up to `size`; a zero target costs no iteration."""
    rows = np.zeros((size, *batch.shape[1:]), dtype)
    rows[: stop - start] = batch[start:stop]
    return rows


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
