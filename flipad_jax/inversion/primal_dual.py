"""A preconditioned primal-dual method for one image: the default solver of the lasso.

FISTA needs thousands of iterations for a certificate: with lam far below the critical weight the
residual is a ten-thousandth of the target, and the gap asks for it to a hundredth of that. So the
residual gets an unknown of its own, the dual y (at the solution y = A z - o), in

    min_z max_y  <A z - o, y> - 1/2 ||y||^2 + lam ||z||_1,

and the method of Chambolle and Pock (J. Math. Imaging Vision 40, 2011), with the smooth part of
Condat (J. Optim. Theory Appl. 158, 2013), takes turns:

    z^ = soft_threshold(z - s A^T y, s lam)
    y^ = y + M (A (2 z^ - z) - o - y) / kappa.

From there (z, y) is over-relaxed and pulled back towards an anchor w, as in Halpern's iteration
(with restarts and over-relaxation that of Lu and Yang for linear programs, arXiv 2407.16144):

    (z, y) <- b (z + rho (z^ - z), y + rho (y^ - y)) + (1 - b) w,    b = (k + 16) / (k + 17)

k iterations after the last restart, which made (z^, y^) both iterate and anchor. A restart is due
when a look finds that an iteration moves half as far as at the last restart, or that it moves
further than at the look before and less than 0.9 times as far as at the last restart.
The pull takes out what rho = 1.9 alone would let swing; with 1/2 in place of 1/17, Halpern's own,
it is too strong for so few iterations.

M approximates (A A^T)^-1 by one short filter (`preconditioner`). kappa = s ||A^T M A|| + ||M|| /
(2 (2 - rho)) keeps it convergent for every s, and rho, between 1 and 2, is the one with the largest
rho / kappa. s, the primal step, balances the two distances to go: it starts at ||A^T M o|| / (0.6
lam sqrt(n)), the length of the least-norm solution over that of an A^T y whose entries fill
[-lam, lam], and is corrected at restarts as both become known.

Three numbers end it:

* The gap between the objective at z^ and the dual objective at y, scaled to be feasible. It
  certifies the objective of z^, and costs nothing that the iteration does not compute. But z^ may
  be certified long before that, for y misses feasibility by a few entries only.
* At the end: the certificate of `prox`, which needs no y. It asks that the residual of z alone
  be dual optimal, which z^ reaches much later than y does. `finish` therefore moves y towards
  feasibility (twelve accelerated steps y - omega M A (u - clip(u, -lam, lam)) with u = A^T y, which
  take out the few entries beyond lam that decide the scaling), and then takes the difference
  between o - A z^ and -y, small by then, out of z^: it adds the least-norm d with
  A d = o + y - A z^, by conjugate gradients with M, some ten products. What d adds to ||z||_1 is in
  the certificate. Of the entries that z^ had at exactly zero, d leaves values some 1e-4 times the
  largest.
* While it runs, when to try: d decides, and its length is known without conjugate gradients, for
  ||d||^2 is about <e, M e> with e = A d. 1.6 lam sqrt(n) ||d|| foretells the certificate within a
  tenth where the spectrum is even, and is too low where it is not; a fifth of the gap of the pair
  keeps it from what is not optimal at all.

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

_PULL = 16  # the anchor's weight, at first 1/17, has halved after 17 iterations
_ENOUGH, _STALLED = 0.5, 0.9  # of the movement at the last restart: when the next one is due
_MAX_CORRECTIONS = 8  # of s; finitely many keep convergence
_BALANCE = 1.2  # of ||z|| / ||A^T y||, measured; too short costs more than too long
_NUM_DUAL_STEPS = 12
_OF_CORRECTION, _OF_PAIR = 1.6, 0.2  # of these two what the certificate turns out to be, measured
_MAX_CORRECTION_ITERS = 40


class PrimalDualState(NamedTuple):
    """What the next iteration needs.

    Attributes:
      z: iterate that the last iteration started from, shape of the activation.
      az: A z, shape of the target.
      y: dual iterate that the next iteration starts from, shape of the target.
      sparse_z: z^ of the last iteration; z is moved towards it as the next one begins.
      sparse_az: A z^.
      anchor_z: z at the last restart.
      anchor_az: A z there.
      anchor_y: y there.
      step: scalar, s.
      movement_then: scalar, how far the iteration before the last restart went; inf before it.
      movement: scalar, how far the one before the last look went; inf if none was since then.
      age: scalar int32, iterations since the last restart.
      num_restarts: scalar int32.
      num_iters: scalar int32.
    """

    z: jax.Array
    az: jax.Array
    y: jax.Array
    sparse_z: jax.Array
    sparse_az: jax.Array
    anchor_z: jax.Array
    anchor_az: jax.Array
    anchor_y: jax.Array
    step: jax.Array
    movement_then: jax.Array
    movement: jax.Array
    age: jax.Array
    num_restarts: jax.Array
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
            anchor_z=z,
            anchor_az=az,
            anchor_y=y,
            step=jnp.where(step > 0, step, 1),
            movement_then=jnp.asarray(np.inf, op.dtype),
            movement=jnp.asarray(np.inf, op.dtype),
            age=jnp.zeros((), jnp.int32),
            num_restarts=jnp.zeros((), jnp.int32),
            num_iters=jnp.zeros((), jnp.int32),
        )

    def relaxation(step):
        """rho, and kappa: of the pairs with which the method converges that of largest rho / kappa.

        They are those with kappa = s ||A^T M A|| + ||M|| / (2 (2 - rho)).
        """
        coupled = step * preconditioner.coupling
        short_of_2 = 2 / (1 + jnp.sqrt(1 + 4 * coupled / preconditioner.largest))
        return 2 - short_of_2, coupled + 0.5 * preconditioner.largest / short_of_2

    def mix(rho, age, x, x_hat, anchor):
        """Where x goes: almost to its mirror image in x^, and some way back to the anchor."""
        ahead = jnp.asarray((age + _PULL) / (age + (_PULL + 1)), op.dtype)
        return (ahead * (1 - rho)) * x + (ahead * rho) * x_hat + (1 - ahead) * anchor

    def turn(carry, state, o):
        """One iteration, moving z first to where the last one said; and what `advance` looks at.

        Of `state` only what changes at restarts is read: anchors and step.
        """
        z, az, y, sparse_z, sparse_az, age = carry
        # In this order z is written before it is read, and the barrier keeps XLA from fusing the
        # two into two computations of z: either way it would copy z, a fifth of an iteration.
        # Right after a restart z, z^ and the anchor are the same, and the age does not matter.
        step, (rho, kappa) = state.step, relaxation(state.step)
        z = lax.optimization_barrier(mix(rho, age - 1, z, sparse_z, state.anchor_z))
        az = lax.optimization_barrier(mix(rho, age - 1, az, sparse_az, state.anchor_az))
        correlation = op.adjoint(y)
        sparse_z = prox.soft_threshold(z - step * correlation, step * lam)
        sparse_az = op.forward(sparse_z)
        error = 2 * sparse_az - az - o - y
        ascent = precondition(error) / kappa
        next_y = mix(rho, age, y, y + ascent, state.anchor_y)
        return (z, az, next_y, sparse_z, sparse_az, age + 1), (y, correlation, ascent, error)

    def update(state: PrimalDualState, o: jax.Array) -> PrimalDualState:
        return iterate(state, o, 1)[0]

    def iterate(state: PrimalDualState, o: jax.Array, num_steps: int | jax.Array):
        """So many iterations, at least one; and what the last one saw."""
        start = (state.z, state.az, state.y, state.sparse_z, state.sparse_az, state.age)
        before = lax.fori_loop(0, num_steps - 1, lambda _, carry: turn(carry, state, o)[0], start)
        (z, az, y, sparse_z, sparse_az, age), seen = turn(before, state, o)
        after = state._replace(
            z=z,
            az=az,
            y=y,
            sparse_z=sparse_z,
            sparse_az=sparse_az,
            age=age,
            num_iters=state.num_iters + jnp.asarray(num_steps, jnp.int32),
        )
        return after, seen

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

    def correction_cost(state: PrimalDualState, o: jax.Array) -> jax.Array:
        """What `finish` would add to lam ||z||_1 were its d of equal entries, of the objective."""
        left = o + state.y - state.sparse_az
        length = jnp.sqrt(jnp.maximum(jnp.sum(left * precondition(left)), 0))
        residual = o - state.sparse_az
        size = jnp.sum(jnp.abs(state.sparse_z))
        value = 0.5 * jnp.sum(jnp.square(residual)) + lam * size
        root = jnp.asarray(np.sqrt(state.z.size), op.dtype)
        return prox.relative_gap(lam * root * length, value)

    def first_gap(state: PrimalDualState, o: jax.Array) -> jax.Array:
        return pair_gap(state.sparse_z, state.sparse_az, state.y, op.adjoint(state.y), o)

    def advance(
        state: PrimalDualState, o: jax.Array, num_steps: jax.Array
    ) -> tuple[PrimalDualState, jax.Array]:
        after, (y, correlation, ascent, error) = iterate(state, o, num_steps)
        relative = jnp.maximum(
            _OF_PAIR * pair_gap(after.sparse_z, after.sparse_az, y, correlation, o),
            _OF_CORRECTION * correction_cost(after, o),
        )
        # In the norm in which an iteration never takes two points further apart.
        square = (
            jnp.sum(jnp.square(after.sparse_z - after.z)) / state.step
            - 2 * jnp.sum(ascent * (after.sparse_az - after.az))
            + jnp.sum(ascent * error)
        )
        movement = jnp.sqrt(jnp.maximum(square, 0))
        due = (movement <= _ENOUGH * state.movement_then) | (
            (movement <= _STALLED * state.movement_then) & (movement > state.movement)
        )
        due &= movement > 0  # rounding may say 0, after which nothing would be due any more
        wanted = _BALANCE * _norm(after.sparse_z) / jnp.maximum(_norm(correlation), tiny)
        factor = jnp.sqrt(jnp.clip(wanted / state.step, 1 / 16, 16))
        correct = due & (factor > 0) & (state.num_restarts < _MAX_CORRECTIONS)

        def restarted(new, old):
            return jnp.where(due, new, old)

        z, az = (restarted(after.sparse_z, after.z), restarted(after.sparse_az, after.az))
        y = restarted(y + ascent, after.y)
        return (
            after._replace(
                z=z,
                az=az,
                y=y,
                anchor_z=restarted(z, state.anchor_z),
                anchor_az=restarted(az, state.anchor_az),
                anchor_y=restarted(y, state.anchor_y),
                step=jnp.where(correct, factor, 1) * state.step,
                movement_then=restarted(movement, state.movement_then),
                movement=restarted(jnp.inf, movement),
                age=restarted(0, after.age),
                num_restarts=state.num_restarts + due,
            ),
            relative,
        )

    def finish(state: PrimalDualState, o: jax.Array) -> tuple[jax.Array, SolverInfo]:
        z = state.sparse_z
        # Longer than one over the curvature, which an accelerated step may be by up to a third.
        omega = 1.2 / preconditioner.coupling
        # A little inside the box: what is still beyond it then costs no scaling.
        bound = (1 - 0.15 * jnp.minimum(tol, 1)) * lam

        def towards_feasible(k, carry):
            y, y_before = carry
            ahead = y + jnp.asarray(k / (k + 3), op.dtype) * (y - y_before)
            correlation = op.adjoint(ahead)
            excess = correlation - jnp.clip(correlation, -bound, bound)
            return ahead - omega * precondition(op.forward(excess)), y

        y, _ = lax.fori_loop(0, _NUM_DUAL_STEPS, towards_feasible, (state.y, state.y))
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

    # An estimate that was too low is so again a little later.
    solver = Solver(
        init, update, first_gap, advance, finish, first_threshold=1.0, next_threshold=0.85
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
