"""A preconditioned primal-dual method for one image: the default solver of the lasso.

FISTA needs thousands of iterations for a certificate: with lam far below the critical weight the
residual is a ten-thousandth of the target, and the gap asks for it to a hundredth of that. So the
residual gets an unknown of its own, the dual y (at the solution y = A z - o), in

    min_z max_y  <A z - o, y> - 1/2 ||y||^2 + lam ||z||_1,

and the method of Chambolle and Pock (J. Math. Imaging Vision 40, 2011), with the smooth part of
Condat (J. Optim. Theory Appl. 158, 2013) and over-relaxed, takes turns:

    z^ = soft_threshold(z - s A^T y, s lam)
    y^ = y + M (A (2 z^ - z) - o - y) / kappa
    (z, y) <- (z, y) + rho (z^ - z, y^ - y).

M approximates (A A^T)^-1 by one short filter (`preconditioner`), kappa = s ||A^T M A|| + 5/2 ||M||
keeps it convergent for every s and rho = 1.8, and s, the primal step, balances the two distances to
go: it starts at ||A^T M o|| / (0.6 lam sqrt(n)), the length of the least-norm solution over that of
an A^T y whose entries fill [-lam, lam], and is corrected a few times as both become known.

Two bounds end it:

* While it runs: the gap between the objective at z^ and the dual objective at y, scaled to be
  feasible. It certifies the objective of z^, and costs nothing that the iteration does not compute.
* At the end: the certificate of `prox`, which needs no y. It asks that the residual of z alone
  be dual optimal, which z^ reaches much later than y does. `finish` therefore moves y towards
  feasibility (ten steps y - omega M A (u - clip(u, -lam, lam)) with u = A^T y, which take out the
  few entries beyond lam that decide the scaling), and then takes the difference between o - A z^
  and -y, small by then, out of z^: it adds the least-norm d with A d = o + y - A z^, by
  conjugate gradients with M, some ten products. What d adds to ||z||_1 is in the certificate. Of
  the entries that z^ had at exactly zero, d leaves values some 1e-4 times the largest.

If the certificate still misses, more iterations follow. The functions act on one image and carry no
decorator; `lasso.solve` is where they are vmapped and jitted.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flipad_jax.inversion import prox
from flipad_jax.inversion.linops import LinearOperator
from flipad_jax.inversion.preconditioner import Preconditioner
from flipad_jax.inversion.solver import Solver, SolverInfo, check_number, run_until_certified

__all__ = ["PrimalDualState", "primal_dual"]

_RELAXATION = 1.8
_ADAPTED_AT = (2, 4, 8, 16)  # checks after which s is corrected; finitely many keep convergence
_BALANCE = 0.65  # of ||z|| / ||A^T y||, measured; too short costs more than too long
_NUM_DUAL_STEPS = 10
_MAX_CORRECTION_ITERS = 40


class PrimalDualState(NamedTuple):
    """What the next iteration needs.

    Attributes:
      z: relaxed iterate that the last iteration started from, shape of the activation.
      az: A z, shape of the target.
      y: relaxed dual iterate, shape of the target.
      sparse_z: z^ of the last iteration; z is relaxed towards it as the next one begins.
      sparse_az: A z^.
      step: scalar, s.
      num_checks: scalar int32.
      num_iters: scalar int32.
    """

    z: jax.Array
    az: jax.Array
    y: jax.Array
    sparse_z: jax.Array
    sparse_az: jax.Array
    step: jax.Array
    num_checks: jax.Array
    num_iters: jax.Array


def primal_dual(
    op: LinearOperator,
    *,
    lam: float | jax.Array,
    preconditioner: Preconditioner,
    max_iters: int | jax.Array = 10_000,
    gap_every: int = 10,
    tol: float | jax.Array = 1e-2,
) -> Solver:
    """Build the solver for one operator.

    Args:
      op: the operator A; a packed one (`polyphase`) if it is a convolution.
      lam: weight of the l1 norm, at least 0. At 0 there is no certificate, see `prox.duality_gap`.
      preconditioner: `preconditioner.preconditioner(op)`.
      max_iters: no more iterations than this, at least 0. The products of `finish` come on top.
      gap_every: iterations between two looks at the gap.
      tol: relative duality gap to stop at. 0 never stops early: exactly `max_iters` iterations.

    Returns:
      The solver. An image whose gap is not finite, because its target holds NaN, ends at once and
      is reported unconverged.

    Raises:
      ValueError: if a number that is known while tracing is out of its range.
    """
    check_number("lam", lam, lambda v: 0 <= v < np.inf, "finite and not negative")
    check_number("max_iters", max_iters, lambda v: v >= 0, "at least 0")
    check_number("tol", tol, lambda v: v >= 0, "at least 0")
    check_number("gap_every", gap_every, lambda v: v >= 1, "at least 1")
    # Nothing below may be wider than the operator, whatever jax_enable_x64 says.
    lam, tol = jnp.asarray(lam, op.dtype), jnp.asarray(tol, op.dtype)
    tiny = jnp.asarray(jnp.finfo(op.dtype).tiny, op.dtype)
    precondition: Callable[[jax.Array], jax.Array] = preconditioner

    def init(o: jax.Array, z_init: jax.Array | None = None) -> PrimalDualState:
        if z_init is None:
            z, az = jnp.zeros(op.input_shape, op.dtype), jnp.zeros(op.output_shape, op.dtype)
        else:
            z, az = z_init, op.forward(z_init)
        residual = o - az
        largest = jnp.max(jnp.abs(op.adjoint(residual)))
        # The residual, made feasible: the solution itself if z is one.
        y = -residual * jnp.minimum(1, lam / jnp.maximum(largest, tiny))
        short = op.adjoint(precondition(o))
        # lam = 0 asks for a long step, not for an infinite one.
        width = jnp.maximum(0.6 * lam, 1e-7 * jnp.max(jnp.abs(op.adjoint(o))))
        root = jnp.asarray(np.sqrt(z.size), op.dtype)
        step = _norm(short) / jnp.maximum(width * root, tiny)
        return PrimalDualState(
            z=z,
            az=az,
            y=y,
            sparse_z=z,
            sparse_az=az,
            step=jnp.where(step > 0, step, 1),
            num_checks=jnp.zeros((), jnp.int32),
            num_iters=jnp.zeros((), jnp.int32),
        )

    def turn(carry, step, o):
        """One iteration, relaxing first what the last one found; and A^T y."""
        z, az, y, sparse_z, sparse_az = carry
        # In this order z is written before it is read, and the barrier keeps XLA from fusing the
        # two into two computations of z: either way it would copy z, a fifth of an iteration.
        z = lax.optimization_barrier(z + _RELAXATION * (sparse_z - z))
        az = lax.optimization_barrier(az + _RELAXATION * (sparse_az - az))
        correlation = op.adjoint(y)
        sparse_z = prox.soft_threshold(z - step * correlation, step * lam)
        sparse_az = op.forward(sparse_z)
        kappa = step * preconditioner.coupling + 2.5 * preconditioner.largest
        ascent = precondition(2 * sparse_az - az - o - y) / kappa
        return (z, az, y + _RELAXATION * ascent, sparse_z, sparse_az), correlation

    def update(state: PrimalDualState, o: jax.Array) -> PrimalDualState:
        return iterate(state, o, 1)[0]

    def iterate(state: PrimalDualState, o: jax.Array, num_steps: int | jax.Array):
        """So many iterations, at least one; and y and A^T y as they were before the last."""
        start = (state.z, state.az, state.y, state.sparse_z, state.sparse_az)
        before = lax.fori_loop(
            0, num_steps - 1, lambda _, carry: turn(carry, state.step, o)[0], start
        )
        (z, az, y, sparse_z, sparse_az), correlation = turn(before, state.step, o)
        after = PrimalDualState(
            z=z,
            az=az,
            y=y,
            sparse_z=sparse_z,
            sparse_az=sparse_az,
            step=state.step,
            num_checks=state.num_checks,
            num_iters=state.num_iters + jnp.asarray(num_steps, jnp.int32),
        )
        return after, before[2], correlation

    def pair_gap(z, az, y, correlation, o):
        """Relative gap of the objective at z and the dual objective at y, made feasible."""
        largest = jnp.max(jnp.abs(correlation))
        scale = jnp.where(largest > lam, lam / jnp.where(largest > lam, largest, 1), 1)
        residual = o - az
        # As in prox.certificate, no term is negative and nothing cancels.
        slack = jnp.sum(jnp.maximum(lam * jnp.abs(z) + scale * z * correlation, 0))
        gap = 0.5 * jnp.sum(jnp.square(residual + scale * y)) + slack
        value = 0.5 * jnp.sum(jnp.square(residual)) + lam * jnp.sum(jnp.abs(z))
        return prox.relative_gap(gap, value)

    def first_gap(state: PrimalDualState, o: jax.Array) -> jax.Array:
        return pair_gap(state.sparse_z, state.sparse_az, state.y, op.adjoint(state.y), o)

    def advance(
        state: PrimalDualState, o: jax.Array, num_steps: jax.Array
    ) -> tuple[PrimalDualState, jax.Array]:
        after, y, correlation = iterate(state, o, num_steps)
        relative = pair_gap(after.sparse_z, after.sparse_az, y, correlation, o)
        checks = state.num_checks + 1
        wanted = _BALANCE * _norm(after.sparse_z) / jnp.maximum(_norm(correlation), tiny)
        factor = jnp.sqrt(jnp.clip(wanted / state.step, 1 / 16, 16))
        now = jnp.any(checks == jnp.asarray(_ADAPTED_AT))
        step = jnp.where(now & (factor > 0), factor, 1) * state.step
        return after._replace(step=step, num_checks=checks), relative

    def finish(state: PrimalDualState, o: jax.Array) -> tuple[jax.Array, SolverInfo]:
        z = state.sparse_z
        omega = 1.95 / preconditioner.coupling

        def towards_feasible(_, y):
            correlation = op.adjoint(y)
            excess = correlation - jnp.clip(correlation, -lam, lam)
            return y - omega * precondition(op.forward(excess))

        y = lax.fori_loop(0, _NUM_DUAL_STEPS, towards_feasible, state.y)
        wanted = 0.05 * jnp.where(tol > 0, tol, 1e-4)
        correction = _least_norm(
            op,
            precondition,
            o + y - state.sparse_az,
            smallest=wanted * _norm(y),
        )
        corrected = z + correction

        def certify(z):
            residual = o - op.forward(z)
            gap, value = prox.certificate(residual, op.adjoint(residual), z, lam=lam)
            return gap, prox.relative_gap(gap, value)

        plain, better = certify(z), certify(corrected)
        use = better[1] < plain[1]
        gap, relative = (jnp.where(use, b, p) for b, p in zip(better, plain, strict=True))
        info = SolverInfo(
            gap=gap, relative_gap=relative, num_iters=state.num_iters, converged=relative <= tol
        )
        return jnp.where(use, corrected, z), info

    # With the dual steps of `finish` the certificate is usually a little below the running bound.
    solver = Solver(
        init, update, first_gap, advance, finish, first_threshold=1.4, next_threshold=0.8
    )
    return run_until_certified(solver, tol=tol, max_iters=max_iters, gap_every=gap_every)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def _least_norm(
    op: LinearOperator,
    precondition: Callable[[jax.Array], jax.Array],
    e: jax.Array,
    *,
    smallest: jax.Array,
) -> jax.Array:
    """d = A^T v with A A^T v = e until what is left is at most `smallest`, by conjugate gradients.

    Where A A^T is singular and e outside its range, it does what 40 iterations can.
    """
    tiny = jnp.finfo(op.dtype).tiny

    def go_on(carry):
        _, left, _, _, num_iters = carry
        return (_norm(left) > smallest) & (num_iters < _MAX_CORRECTION_ITERS)

    def body(carry):
        d, left, direction, energy, num_iters = carry
        seen = op.adjoint(direction)
        length = energy / jnp.maximum(jnp.sum(jnp.square(seen)), tiny)
        left = left - length * op.forward(seen)
        preconditioned = precondition(left)
        energy_next = jnp.sum(left * preconditioned)
        direction = preconditioned + energy_next / jnp.maximum(energy, tiny) * direction
        return d + length * seen, left, direction, energy_next, num_iters + 1

    start = precondition(e)
    carry = (
        jnp.zeros(op.input_shape, op.dtype),
        e,
        start,
        jnp.sum(e * start),
        jnp.zeros((), jnp.int32),
    )
    return lax.while_loop(go_on, body, carry)[0]
