"""The lasso: proximal step, objective, and a certificate of how far a point is from optimal.

Everywhere in this library the objective is

    P(z) = 1/2 ||A z - o||^2 + lam ||z||_1,

summed over all elements, without 1/n. The FLIPAD paper writes ||A z - o||^2 + lambda ||z -
z_bar||_1 (eq. 5), so its lambda is 2 lam; scikit-learn's `alpha` is lam / (number of elements of
o).

The certificate is the duality gap. With the residual r = o - A z, the correlation g = A^T r and
s = min(1, lam / ||g||_inf), the point s r is feasible for the dual problem, and P(z) minus the dual
objective at s r equals

    gap = 1/2 (1 - s)^2 ||r||^2 + sum_i (lam |z_i| - s z_i g_i) >= P(z) - min P.

No term is negative (|s g_i| <= lam), so nothing cancels in float32; the difference of the two
objectives would. All functions act on one sample; batch them with `jax.vmap`.
"""

import jax
import jax.numpy as jnp

from flipad_jax.inversion.linops import LinearOperator

__all__ = [
    "certificate",
    "critical_weight",
    "duality_gap",
    "objective",
    "relative_gap",
    "soft_threshold",
]


def soft_threshold(v: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """Proximal map of `threshold * ||.||_1`: shrink all towards zero by `threshold >= 0`."""
    # v minus its projection on the box: exact zeros, and no product of sign and size.
    return v - jnp.clip(v, -threshold, threshold)


def objective(
    op: LinearOperator, z: jax.Array, o: jax.Array, *, lam: jax.Array | float
) -> jax.Array:
    """Lasso objective 1/2 ||A z - o||^2 + lam ||z||_1 of one sample.

    Args:
      op: the operator A.
      z: unknown, `op.input_shape`.
      o: target, `op.output_shape`.
      lam: weight, at least 0.

    Returns:
      Scalar in the dtype of the operator.
    """
    residual = o - op.forward(z)
    return 0.5 * jnp.sum(jnp.square(residual)) + lam * jnp.sum(jnp.abs(z))


def duality_gap(
    op: LinearOperator, z: jax.Array, o: jax.Array, *, lam: jax.Array | float
) -> jax.Array:
    """Duality gap at z: an upper bound on `objective(z) - min objective`, in objective units.

    Args:
      op: the operator A.
      z: unknown, `op.input_shape`.
      o: target, `op.output_shape`.
      lam: weight, at least 0. At 0 the dual point is 0, and the bound is the objective itself.

    Returns:
      Non-negative scalar in the dtype of the operator; NaN if anything is.
    """
    residual = o - op.forward(z)
    return certificate(residual, op.adjoint(residual), z, lam=lam)[0]


def certificate(
    residual: jax.Array, correlation: jax.Array, z: jax.Array, *, lam: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Duality gap and objective at z from products that a solver has at hand.

    Args:
      residual: `o - A z`.
      correlation: `A^T (o - A z)`, shape of z.
      z: unknown.
      lam: weight, at least 0.

    Returns:
      `(gap, objective)`, scalars; see the module docstring.
    """
    largest = jnp.max(jnp.abs(correlation))
    # The inner `where` keeps 0 / 0 out: at lam = 0 and g = 0 the scaled point is the residual
    # itself.
    scale = jnp.where(largest > lam, lam / jnp.where(largest > lam, largest, 1), 1)
    energy = 0.5 * jnp.sum(jnp.square(residual))
    # A z_i that is tiny beside its neighbours may leave -1 ulp here; a gap is never negative.
    slack = jnp.sum(jnp.maximum(lam * jnp.abs(z) - scale * z * correlation, 0))
    return jnp.square(1 - scale) * energy + slack, energy + lam * jnp.sum(jnp.abs(z))


def relative_gap(gap: jax.Array, objective: jax.Array) -> jax.Array:
    """Gap divided by the objective at the same point; 0 / 0 is 0, and NaN stays NaN.

    At least 0, and 0 at the solution; far from it, where the dual value is negative, it exceeds 1.
    The objective at z, not that at zero: for real images the latter is hundreds of times larger and
    would certify nothing.
    """
    optimal = (gap == 0) & (objective == 0)
    return jnp.where(optimal, 0, gap / jnp.where(optimal, 1, objective))


def critical_weight(op: LinearOperator, o: jax.Array) -> jax.Array:
    """Smallest lam at which z = 0 is optimal, `||A^T o||_inf`."""
    return jnp.max(jnp.abs(op.adjoint(o)))
