"""What a solver of the lasso is: pure functions for one image, and the loop that ends them.

A solver's factory (`fista`, `primal_dual`) takes an operator and numbers and returns a `Solver`. A
new one is written by giving `init`, `update`, `first_gap`, `advance` and `finish` to
`run_until_certified`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["Solver", "SolverInfo", "check_number", "finish_after", "run_until_certified"]


class SolverInfo(NamedTuple):
    """What came out, as scalars.

    Attributes:
      gap: duality gap at z, in objective units; NaN if the target holds NaN.
      relative_gap: gap / objective at z.
      num_iters: iterations done, int32.
      converged: whether relative_gap <= tol.
    """

    gap: jax.Array
    relative_gap: jax.Array
    num_iters: jax.Array
    converged: jax.Array


class Solver(NamedTuple):
    """A solver as pure functions of one image.

    Attributes:
      init: `(o, z_init=None) -> state`; every state has a field `num_iters`.
      update: `(state, o) -> state`, one iteration.
      first_gap: `(state, o) -> relative gap` of a state from `init`.
      advance: `(state, o, num_steps) -> (state, relative gap)`: at least one iteration and a bound
        or an estimate that tells when `finish` is worth its price. Under `vmap`, `num_steps` must
        not be batched: its loop then runs without selects.
      finish: `(state, o) -> (z, SolverInfo)`: the answer and its certificate (`prox`).
      first_threshold: `finish` is tried when what `advance` says is at most this many times the
        tolerance; 1 where that is the certificate.
      next_threshold: factor on that threshold after each time that the certificate missed.
      run: `(o, z_init=None) -> (z, SolverInfo)`: all of it.
    """

    init: Callable[..., Any]
    update: Callable[[Any, jax.Array], Any]
    first_gap: Callable[[Any, jax.Array], jax.Array]
    advance: Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array]]
    finish: Callable[[Any, jax.Array], tuple[jax.Array, SolverInfo]]
    first_threshold: float
    next_threshold: float
    run: Callable[..., tuple[jax.Array, SolverInfo]] | None = None


def run_until_certified(
    solver: Solver, *, tol: jax.Array, max_iters: int | jax.Array, gap_every: int
) -> Solver:
    """The solver with a `run`: iterations until the certificate is at most `tol`."""

    def run(o: jax.Array, z_init: jax.Array | None = None) -> tuple[jax.Array, SolverInfo]:
        def iterate(carry):
            state, relative, threshold = carry

            def unfinished(c):
                state, relative = c
                return going(state, relative, threshold) & (
                    state.num_iters + gap_every <= max_iters
                )

            return lax.while_loop(
                unfinished, lambda c: solver.advance(c[0], o, gap_every), (state, relative)
            )

        def going(state, relative, threshold):
            reached = (relative <= threshold) & (tol > 0)
            return jnp.isfinite(relative) & ~reached & (state.num_iters < max_iters)

        def attempt(carry):
            state, relative, threshold, _, _ = carry
            state, relative = iterate((state, relative, threshold))
            # What is left when max_iters is no multiple of gap_every.
            rest = jnp.where(going(state, relative, threshold), max_iters - state.num_iters, 0)
            z, info = finish_after(solver, state, o, rest)
            state = state._replace(num_iters=info.num_iters)
            # A second attempt comes after more iterations, whatever the estimate was.
            again = ~info.converged & jnp.isfinite(relative)
            relative = jnp.where(again, jnp.finfo(relative.dtype).max, relative)
            return state, relative, threshold * solver.next_threshold, z, info

        def missed(carry):
            state, relative, _, _, info = carry
            hopeful = jnp.isfinite(relative) & (state.num_iters < max_iters)
            return ~info.converged & hopeful & (tol > 0)

        state = solver.init(o, z_init)
        carry = attempt(
            (state, solver.first_gap(state, o), tol * solver.first_threshold, None, None)
        )
        _, _, _, z, info = lax.while_loop(missed, attempt, carry)
        return z, info

    return solver._replace(run=run)


def finish_after(
    solver: Solver, state: Any, o: jax.Array, num_steps: jax.Array
) -> tuple[jax.Array, SolverInfo]:
    """`finish` after some more iterations; without those, the state as it is."""
    state = lax.fori_loop(0, num_steps, lambda _, s: solver.update(s, o), state)
    return solver.finish(state, o)


def check_number(name: str, value: Any, holds: Callable[[float], bool], expected: str) -> None:
    """Refuse a number that is known while tracing.

    Raises:
      ValueError: unless `value` is traced, or a scalar for which `holds`.
    """
    if isinstance(value, jax.core.Tracer):
        return
    if np.ndim(value) != 0 or not holds(float(value)):
        raise ValueError(f"{name}={value!r} must be a scalar, {expected}")
