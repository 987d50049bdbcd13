"""Which directions of image space a generator's weights reach ([P2] section 4, Figure 7).

With J(z) the Jacobian of an image G(z; theta) with respect to the weights, `[D, P]`, the paper
looks at M = E[J] E[J]^T, `[D, D]`: keys along its large eigenvalues are pictures, keys along its
small ones look like noise, and d_max(phi), which decides how long a shift must be, grows with
phi^T M phi.

Neither J nor M is ever formed. E[J]^T v is the gradient of the mean image along v, E[J] u the
derivative of the mean image along u, so M v costs two passes over a fixed set of latents, and
eigenvectors come from ARPACK's Lanczos iteration. (E[J] is the Jacobian of the mean image: the
expectation is inside.)

The layers must know forward mode: DCGAN, WGAN-GP, EBGAN; not LSGAN.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import linalg as sparse_linalg

from flipad_jax.generators import sampling
from flipad_jax.generators.sampling import TrainedGenerator
from flipad_jax.registry import attributability

__all__ = ["Spectrum", "check", "quadratic_form", "spectrum"]

_BATCH = 64


def _mean_image(root: TrainedGenerator, params: Any, z: jax.Array) -> jax.Array:
    images = cast(jax.Array, root.module.apply({**root.variables, "params": params}, z))
    return images.mean(axis=0).ravel()


@jax.jit
def _gradients(root: TrainedGenerator, z: jax.Array, vectors: jax.Array) -> Any:
    """E[J]^T v of every v `[k, D]`, over the latents z."""
    params = root.variables["params"]
    _, pull_back = jax.vjp(lambda p: _mean_image(root, p, z), params)
    return jax.vmap(lambda v: pull_back(v)[0])(vectors)


@jax.jit
def _derivative(root: TrainedGenerator, z: jax.Array, direction: Any) -> jax.Array:
    """E[J] u, `[D]`."""
    params = root.variables["params"]
    return jax.jvp(lambda p: _mean_image(root, p, z), (params,), (direction,))[1]


def _batches(root: TrainedGenerator, rng: jax.Array, num_latents: int) -> list[jax.Array]:
    if num_latents < 1:
        raise ValueError(f"num_latents={num_latents}: expected a positive number")
    size = min(_BATCH, num_latents)
    count = -(-num_latents // size)
    z = sampling.latents(rng, jnp.arange(count * size), root.latent_dim)
    return list(z.reshape(count, size, -1))


def _mean(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def quadratic_form(
    root: TrainedGenerator,
    keys: np.ndarray | jax.Array,
    rng: jax.Array,
    *,
    num_latents: int = 256,
) -> np.ndarray:
    """phi^T M phi = ||E[J]^T phi||^2 of every key.

    Args:
      root: G_0.
      keys: `[N, h, w, c]`, unit vectors.
      rng: names the latents.
      num_latents: how many, rounded up to whole batches.
    Returns:
      `[N]` float64.
    Raises:
      ValueError: for bad keys, or keys of another size than the root's images.
    """
    flat = attributability.check_keys(keys)
    size = int(np.prod(root.image_shape))
    if flat.shape[1] != size:
        raise ValueError(
            f"keys have {flat.shape[1]} numbers, images of the root {size}: they belong to images "
            "of another size"
        )
    batches = _batches(root, rng, num_latents)
    found = []
    for start in range(0, len(flat), 8):
        part = jnp.asarray(flat[start : start + 8])
        gradients = _mean([_gradients(root, z, part) for z in batches])
        squares = [
            jnp.square(leaf).reshape(len(part), -1).sum(1) for leaf in jax.tree.leaves(gradients)
        ]
        found.append(np.asarray(sum(squares), np.float64))
    return np.concatenate(found)


class Spectrum(NamedTuple):
    """Ends of the spectrum of M.

    Attributes:
      largest: `[k]` float64, descending.
      largest_vectors: `[k, h, w, c]` float32, unit vectors.
      smallest: `[k]` float64, ascending.
      smallest_vectors: `[k, h, w, c]` float32, unit vectors.
      residual: largest ||M v - lambda v|| over all of them, relative to the largest eigenvalue.
    """

    largest: np.ndarray
    largest_vectors: np.ndarray
    smallest: np.ndarray
    smallest_vectors: np.ndarray
    residual: float


def _converged(eigsh: Callable[..., Any], matrix: Any) -> tuple[np.ndarray, np.ndarray]:
    try:
        return eigsh(matrix, which="LA")
    except sparse_linalg.ArpackError as error:  # not converged, or no start
        raise ValueError(f"the Lanczos iteration failed ({error}): a larger tol helps") from error


def check(root: TrainedGenerator, num_vectors: int = 1) -> None:
    """Refuse what `spectrum` would refuse, before anything is computed.

    Raises:
      ValueError: for a generator whose layers know no forward mode, or more vectors than half of
        the numbers of an image.
    """
    size = int(np.prod(root.image_shape))
    if not 1 <= num_vectors < size // 2:
        raise ValueError(f"num_vectors={num_vectors}: expected 1 to {size // 2 - 1}")
    z = jax.ShapeDtypeStruct((1, root.latent_dim), jnp.float32)
    try:
        _derivative.lower(root, z, root.variables["params"])
    except TypeError as error:
        raise ValueError(
            f"{type(root.module).__module__.rpartition('.')[2]}: its layers know no forward mode, "
            "which products with M need; use a DCGAN, WGAN-GP or EBGAN"
        ) from error


def spectrum(
    root: TrainedGenerator,
    rng: jax.Array,
    *,
    num_vectors: int = 2,
    num_latents: int = 256,
    tol: float = 1e-3,
    progress: Callable[[int], None] | None = None,
) -> Spectrum:
    """Eigenvectors of M at both ends, by Lanczos iteration on products M v.

    Among thousands of eigenvalues near zero no two are told apart: those returned as smallest are
    vectors whose value is within `tol` times the largest of the smallest.

    Args:
      root: G_0.
      rng: names the latents, and the first vector of the iteration.
      num_vectors: k, at each end.
      num_latents: that the means are over, rounded up to whole batches.
      tol: of ARPACK.
      progress: called with the number of products so far.
    Raises:
      ValueError: for a generator whose layers know no forward mode, too many vectors, or an
        iteration that does not converge.
    """
    check(root, num_vectors)
    size = int(np.prod(root.image_shape))
    latent_rng, start_rng = jax.random.split(rng)
    batches = _batches(root, latent_rng, num_latents)
    start = np.asarray(jax.random.normal(start_rng, (size,), jnp.float32), np.float64)
    count = 0

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal count
        row = jnp.asarray(vector.reshape(1, -1), jnp.float32)
        gradient = _mean([_gradients(root, z, row) for z in batches])
        direction = jax.tree.map(lambda leaf: leaf[0], gradient)
        image = sum(_derivative(root, z, direction) for z in batches) / len(batches)
        count += 1
        if progress is not None:
            progress(count)
        return np.asarray(image, np.float64)

    eigsh = functools.partial(sparse_linalg.eigsh, k=num_vectors, v0=start, tol=tol)
    matrix = sparse_linalg.LinearOperator((size, size), matvec=product, dtype=np.float64)
    values, vectors = _converged(eigsh, matrix)
    order = np.argsort(values)[::-1]
    largest, largest_vectors = values[order], vectors[:, order].T
    top = float(largest[0])
    # The small end as the large end of top - M, so that the tolerance is relative to the top.
    turned = sparse_linalg.LinearOperator(
        (size, size), matvec=lambda v: top * v.ravel() - product(v), dtype=np.float64
    )
    values, vectors = _converged(eigsh, turned)
    order = np.argsort(values)[::-1]
    smallest, smallest_vectors = top - values[order], vectors[:, order].T
    pairs = [*zip(largest, largest_vectors), *zip(smallest, smallest_vectors)]
    residual = max(float(np.linalg.norm(product(v) - value * v)) for value, v in pairs) / top
    shape = (num_vectors, *root.image_shape)
    return Spectrum(
        largest,
        largest_vectors.astype(np.float32).reshape(shape),
        smallest,
        smallest_vectors.astype(np.float32).reshape(shape),
        residual,
    )
