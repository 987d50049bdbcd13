"""FISTA for one image (Beck and Teboulle, SIAM J. Imaging Sciences 2, 2009).

The solver of the FLIPAD paper.

Minimises 1/2 ||A z - o||^2 + lam ||z||_1 by the proximal gradient method with momentum: constant
step, t_1 = 1, and

    z_{k+1} = soft_threshold(y_k - step A^T (A y_k - o), step lam)
    t_{k+1} = (1 + sqrt(1 + 4 t_k^2)) / 2
    y_{k+1} = z_{k+1} + (t_k - 1) / t_{k+1} (z_{k+1} - z_k).

Differences from the paper's own code:

* The step is 1 / lipschitz instead of a number set by hand, and a larger one is refused: it
  diverges.
* An image stops when the relative duality gap at z (never at the extrapolated y) is at most tol;
  not when the batch moves little, which depends on the step and on the other images.
* The start is z = 0, that is the mean activation once z_bar is added back, not twice that.
* The momentum is restarted when the objective rises (`restart=False` is the algorithm as
  published).
* A y is not computed but combined from A z and the previous A z, which are. A gap check then costs
  one adjoint product and no forward product.

The functions act on one image and carry no decorator; `lasso.solve` is where they are vmapped and
jitted.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flipad_jax.inversion import prox
from flipad_jax.inversion.linops import LinearOperator
from flipad_jax.inversion.solver import Solver, SolverInfo, check_number, run_until_certified

__all__ = ["FistaState", "fista"]


class FistaState(NamedTuple):
    """What the next iteration needs.

    Attributes:
      z: iterate, shape of the activation.
      y: extrapolated point, shape of the activation.
      az: A z, shape of the target.
      ay: A y, shape of the target.
      t: scalar, momentum, 1 at the start.
      value: scalar, the objective at the last gap check, infinite before the first.
      num_iters: scalar int32.
    """

    z: jax.Array
    y: jax.Array
    az: jax.Array
    ay: jax.Array
    t: jax.Array
    value: jax.Array
    num_iters: jax.Array


def fista(
    op: LinearOperator,
    *,
    lam: float | jax.Array,
    lipschitz: float | jax.Array,
    step: float | jax.Array | None = None,
    max_iters: int | jax.Array = 10_000,
    gap_every: int = 10,
    tol: float | jax.Array = 1e-2,
    restart: bool = True,
) -> Solver:
    """Build the solver for one operator.

    Args:
      op: the operator A.
      lam: weight of the l1 norm, at least 0. At 0 there is no certificate, see `prox.duality_gap`.
      lipschitz: at least ||A||^2, see `linops.squared_norm`.
      step: length of the gradient step, 1 / lipschitz by default and at most.
      max_iters: no more iterations than this, at least 0.
      gap_every: iterations between two tests of the gap.
      tol: relative duality gap to stop at. 0 never stops early: exactly `max_iters` iterations.
      restart: forget the momentum when the objective has risen since the last gap check (O'Donoghue
        and Candes, Found. Comput. Math. 15, 2015, function scheme). It costs nothing, as the check
        has the objective at hand. On a DCGAN's last layer it saves a tenth of the iterations to a
        relative gap of 1e-2 and half of those to 1e-3. Only `run` does it: `update` never restarts.

    Returns:
      The solver. An image whose gap is not finite, because its target holds NaN,
      ends at once and is reported unconverged.

    Raises:
      ValueError: if a number that is known while tracing is out of its range.
    """
    check_number("lam", lam, lambda v: 0 <= v < np.inf, "finite and not negative")
    check_number(
        "lipschitz",
        lipschitz,
        lambda v: 0 < v < np.inf,
        "finite and positive; it is 0 only for an operator that is zero",
    )
    check_number("max_iters", max_iters, lambda v: v >= 0, "at least 0")
    check_number("tol", tol, lambda v: v >= 0, "at least 0")
    check_number("gap_every", gap_every, lambda v: v >= 1, "at least 1")
    if step is None:
        step = 1 / lipschitz
    check_number("step", step, lambda v: 0 < v < np.inf, "finite and positive")
    if not _is_traced(step, lipschitz) and step * lipschitz > 1 + 1e-5:
        raise ValueError(
            f"step={float(step):.6g} is above 1 / lipschitz = {1 / float(lipschitz):.6g}, where "
            "FISTA may diverge; leave it out or give a smaller one"
        )
    # Nothing below may be wider than the operator, whatever jax_enable_x64 says.
    lam, step, tol = (jnp.asarray(v, op.dtype) for v in (lam, step, tol))

    def init(o: jax.Array, z_init: jax.Array | None = None) -> FistaState:
        if z_init is None:
            z, az = jnp.zeros(op.input_shape, op.dtype), jnp.zeros(op.output_shape, op.dtype)
        else:
            z, az = z_init, op.forward(z_init)
        del o  # Other solvers look at it; FISTA starts at the same point for every target.
        return FistaState(
            z=z,
            y=z,
            az=az,
            ay=az,
            t=jnp.ones((), op.dtype),
            value=jnp.full((), jnp.inf, op.dtype),
            num_iters=jnp.zeros((), jnp.int32),
        )

    def update(state: FistaState, o: jax.Array) -> FistaState:
        descended = state.y + step * op.adjoint(o - state.ay)
        z = prox.soft_threshold(descended, step * lam)
        az = op.forward(z)
        move = z - state.z
        t_next = 0.5 * (1 + jnp.sqrt(1 + 4 * jnp.square(state.t)))
        beta = (state.t - 1) / t_next
        return FistaState(
            z=z,
            y=z + beta * move,
            az=az,
            ay=az + beta * (az - state.az),
            t=t_next,
            value=state.value,
            num_iters=state.num_iters + 1,
        )

    def certify(state: FistaState, o: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        residual = o - state.az
        gap, value = prox.certificate(residual, op.adjoint(residual), state.z, lam=lam)
        return gap, prox.relative_gap(gap, value), value

    def first_gap(state: FistaState, o: jax.Array) -> jax.Array:
        return certify(state, o)[1]

    def advance(
        state: FistaState, o: jax.Array, num_steps: jax.Array
    ) -> tuple[FistaState, jax.Array]:
        state = lax.fori_loop(0, num_steps, lambda _, s: update(s, o), state)
        _, relative, value = certify(state, o)
        if restart:
            worse = value > state.value
            state = state._replace(
                y=jnp.where(worse, state.z, state.y),
                ay=jnp.where(worse, state.az, state.ay),
                t=jnp.where(worse, 1, state.t),
            )
        return state._replace(value=value), relative

    def finish(state: FistaState, o: jax.Array) -> tuple[jax.Array, SolverInfo]:
        gap, relative, _ = certify(state, o)
        return state.z, SolverInfo(
            gap=gap, relative_gap=relative, num_iters=state.num_iters, converged=relative <= tol
        )

    solver = Solver(
        init, update, first_gap, advance, finish, first_threshold=1.0, next_threshold=1.0
    )
    return run_until_certified(solver, tol=tol, max_iters=max_iters, gap_every=gap_every)


def _is_traced(*values: Any) -> bool:
    return any(isinstance(value, jax.core.Tracer) for value in values)
