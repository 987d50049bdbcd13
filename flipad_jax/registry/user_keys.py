"""Keys: unit vectors with real images on their negative side, as orthogonal as possible ([P2]).

A key phi must be *data compliant* (phi^T x < 0 for authentic x) and at an angle to every other key
that Theorem 2 allows; right angles are the paper's rule. Two ways to find them:

*   `sequential` solves eq. 9 as the paper does: one key after the other,

        E max(1 + phi^T x, 0) + sum_{j < i} max(phi_j^T phi, 0)

    over x from real and generated images with equal chance, by Adam, normalised afterwards.
    Deviations of the published code are not followed: its sign is the opposite one, its penalty is
    two-sided, its keys are never normalised.

*   `joint` finds all keys at once and exactly at the wanted angle, and by default keeps responses
    from being larger than they need to be (`KeyConfig.excess`). Keys are Phi = T U with U
    orthonormal and T the fixed root of the wanted Gram matrix (1 on the diagonal, `cosine`
    elsewhere), so there is no penalty: Adam moves U along the hinge of Phi, and a polar
    decomposition brings it back to orthonormal rows after every step. Earlier keys are left alone:
    U stays orthogonal to them.

How many keys there can be: with m = E[x], orthonormal keys have sum_i (phi_i^T m)^2 <= ||m||^2, so
the mean response of N keys is at most ||m|| / sqrt(N) in magnitude: every further key brings all of
them nearer to the data (`mean_response_bound`).

A key that both find looks like noise, and a blur wipes it out: of the length of 20 keys of digits,
a tenth is left. With `KeyConfig.bandwidth` keys are made of low frequencies only. They live in the
span of the first cosines of each side, where inner products are those of the images, so nothing
else changes; processing leaves more of them, and the shift they ask for is longer.

Images are `[n, ...]` uint8 or float32 in [-1, 1]; keys are float32 in the shape of an image.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from flipad_jax import files
from flipad_jax.registry import attributability

__all__ = [
    "JOINT",
    "KeyConfig",
    "KeyRecord",
    "describe",
    "joint",
    "load",
    "mean_response_bound",
    "save",
    "sequential",
]

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class KeyConfig:
    """Settings of the search.

    Attributes:
      num_steps: of Adam, for every key (`sequential`) or for all together (`joint`).
      batch_size: images per step, half real and half generated.
      learning_rate: of Adam; betas (0.9, 0.99), [P2] Table 3. Of `joint` at most 1 / sqrt(N D)
        for N keys of D numbers.
      margin: of the hinge, in units of phi^T x; the paper's 1.
      excess: weight of max(-phi^T x - 2 margin, 0), which the paper does not have: responses
        further from zero than compliance needs make d_max, and with it every shift, longer than it
        needs to be. 0 for the paper's objective.
      bandwidth: keys are sums of the first so many cosines (DCT-II) along each side; 0: of all,
        which is the paper's.
    """

    num_steps: int = 600
    batch_size: int = 256
    learning_rate: float = 1e-3
    margin: float = 1.0
    excess: float = 0.0
    bandwidth: int = 0

    def __post_init__(self):
        if self.num_steps < 1 or self.batch_size < 2:
            raise ValueError(f"{self.num_steps=} must be positive, {self.batch_size=} at least 2")
        if self.bandwidth < 0:
            raise ValueError(f"{self.bandwidth=} must not be negative; 0 keeps all frequencies")
        if not (self.learning_rate > 0 and self.margin >= 0 and self.excess >= 0):
            raise ValueError(
                f"{self.learning_rate=} must be positive, {self.margin=} and {self.excess=} not "
                "negative"
            )


# What `joint` does without being told: the excess makes d_max of 20 keys of digits 2.1, where it
# was 7.3, all of them compliant on held-out digits in both cases.
JOINT = KeyConfig(num_steps=150, learning_rate=3e-3, excess=0.3)


def _float(images: jax.Array) -> jax.Array:
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1
    return images.astype(jnp.float32)


def _flat(name: str, images: np.ndarray | jax.Array) -> jax.Array:
    images = jnp.asarray(images)
    if images.ndim < 2 or images.shape[0] < 2 or images.size == 0:
        raise ValueError(f"{name} images have shape {images.shape}, expected [n, ...], n >= 2")
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"{name} images are {images.dtype}, expected uint8 or float in [-1, 1]")
    if not bool(jnp.isfinite(images).all()):
        raise ValueError(f"{name} images hold NaN or infinity")
    return images.reshape(images.shape[0], -1)


def _check_data(real, generated) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
    flat = _flat("real", real), _flat("generated", generated)
    shape, other = tuple(np.shape(real)[1:]), tuple(np.shape(generated)[1:])
    if other != shape:
        raise ValueError(
            f"generated images are {other} each, the real ones {shape}: expected one size; load "
            "the data at the size of the root's images"
        )
    return *flat, shape


class _Band(NamedTuple):
    """The first cosines along each side, `[b, h]` and `[b, w]`, orthonormal rows."""

    rows: np.ndarray
    columns: np.ndarray
    shape: tuple[int, ...]  # of an image, (h, w, c)


def _band(shape: tuple[int, ...], bandwidth: int) -> _Band | None:
    """The span that keys of that bandwidth live in; None without one."""
    if not bandwidth:
        return None
    if len(shape) != 3:
        raise ValueError(f"bandwidth={bandwidth} needs images [n, h, w, c], these are {shape} each")
    height, width, _ = shape
    if bandwidth > min(height, width):
        raise ValueError(
            f"bandwidth={bandwidth}: images of {height} x {width} have no more than that"
        )
    import scipy.fft  # Here: it is slow to import.

    rows, columns = (
        scipy.fft.dct(np.eye(side), norm="ortho", axis=0)[:bandwidth] for side in (height, width)
    )
    return _Band(rows, columns, shape)


def _inside(band: _Band | None, flat: jax.Array) -> jax.Array:
    """Images or keys `[n, h w c]` as the key search sees them: `[n, b b c]`, if there is a band."""
    if band is None:
        return flat
    images = _float(flat).reshape(len(flat), *band.shape)
    rows, columns = (jnp.asarray(m, jnp.float32) for m in band[:2])
    low = jnp.einsum("kh,lw,nhwc->nklc", rows, columns, images, precision=lax.Precision.HIGHEST)
    return low.reshape(len(images), math.prod(low.shape[1:]))


def _outside(band: _Band | None, keys: np.ndarray) -> np.ndarray:
    """Back again, in the precision of the keys."""
    if band is None:
        return keys
    low = keys.reshape(len(keys), len(band.rows), len(band.columns), band.shape[2])
    rows, columns = (m.astype(keys.dtype) for m in band[:2])
    return np.einsum("kh,lw,nklc->nhwc", rows, columns, low, optimize=True).reshape(len(keys), -1)


def _check_earlier(earlier, shape: tuple[int, ...]) -> jax.Array:
    size = int(np.prod(shape))
    if earlier is None or not len(earlier):
        return jnp.zeros((0, size), jnp.float32)
    each = tuple(np.shape(earlier)[1:])
    if each not in (shape, (size,)):
        raise ValueError(
            f"earlier keys are {each} each, the images {shape}: they belong to images of another "
            "size"
        )
    return jnp.asarray(attributability.check_keys(earlier))


def _draw(rng: jax.Array, real: jax.Array, generated: jax.Array, batch_size: int) -> jax.Array:
    """Images `[batch_size, D]` from both sets with equal chance."""
    from_real, from_generated = jax.random.split(rng)
    half = batch_size // 2
    first = real[jax.random.randint(from_real, (half,), 0, real.shape[0])]
    rest = batch_size - half
    second = generated[jax.random.randint(from_generated, (rest,), 0, generated.shape[0])]
    return jnp.concatenate([_float(first), _float(second)])


def _hinge(keys: jax.Array, images: jax.Array, config: KeyConfig) -> jax.Array:
    """E max(margin + phi^T x, 0), and the excess on the other side, summed over keys."""
    found = images @ keys.T
    loss = jnp.maximum(config.margin + found, 0)
    if config.excess:
        loss += config.excess * jnp.maximum(-found - 2 * config.margin, 0)
    return loss.mean(axis=0).sum()


def _adam(config: KeyConfig) -> optax.GradientTransformation:
    return optax.adam(config.learning_rate, b1=0.9, b2=0.99)


@functools.partial(jax.jit, static_argnames="config")
def _solve_one(rng, real, generated, earlier, earlier_count, config):
    """Eq. 9 for one key; `earlier` is padded, the first `earlier_count` rows count."""
    optimizer = _adam(config)
    counts = jnp.arange(earlier.shape[0]) < earlier_count

    def loss(key, images):
        cosines = jnp.where(counts, earlier @ key, 0)
        return _hinge(key[None], images, config) + jnp.maximum(cosines, 0).sum()

    def step(carry, step_rng):
        key, state = carry
        images = _draw(step_rng, real, generated, config.batch_size)
        updates, state = optimizer.update(jax.grad(loss)(key, images), state)
        return (optax.apply_updates(key, updates), state), None

    start_rng, steps_rng = jax.random.split(rng)
    start = jax.random.normal(start_rng, (real.shape[1],), jnp.float32)
    rngs = jax.random.split(steps_rng, config.num_steps)
    (key, _), _ = lax.scan(step, (start, optimizer.init(start)), rngs)
    return key / jnp.linalg.norm(key)


def sequential(
    rng: jax.Array,
    real: np.ndarray | jax.Array,
    generated: np.ndarray | jax.Array,
    num_keys: int,
    *,
    earlier: np.ndarray | None = None,
    config: KeyConfig = KeyConfig(),
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Keys by eq. 9, one after the other, each penalised for cosines above 0 with all before it.

    Args:
      rng: key number i (counting earlier ones) is drawn from `fold_in(rng, i)`.
      real: authentic images `[n, ...]`.
      generated: images of the root model `[m, ...]`.
      num_keys: how many more.
      earlier: keys that were handed out before, `[k, ...]`; not touched.
      config: settings.
      progress: called with the number of keys found.
    Returns:
      `[num_keys, ...]` float32, each of norm 1.
    Raises:
      ValueError: for images or earlier keys that do not fit, or NaN.
      FloatingPointError: if a key diverges, as a learning rate that is far too high makes it.
    """
    real, generated, shape = _check_data(real, generated)
    band = _band(shape, config.bandwidth)
    before = _inside(band, _check_earlier(earlier, shape))
    real, generated = _inside(band, real), _inside(band, generated)
    if num_keys < 1:
        raise ValueError(f"num_keys={num_keys}: expected a positive number")
    first = before.shape[0]
    known = jnp.concatenate([before, jnp.zeros((num_keys, before.shape[1]), jnp.float32)])
    for index in range(first, first + num_keys):
        key = _solve_one(
            jax.random.fold_in(rng, index), real, generated, known, jnp.int32(index), config
        )
        if not bool(jnp.isfinite(key).all()):
            raise FloatingPointError(f"key {index} diverged: lower the learning rate")
        known = known.at[index].set(key)
        if progress is not None:
            progress(index - first + 1)
    return _outside(band, np.asarray(known[first:])).reshape(num_keys, *shape)


def _polar(rows: jax.Array) -> jax.Array:
    """Nearest matrix with orthonormal rows, for rows that nearly are so: Newton-Schulz."""

    def improve(_, u):
        gram = jnp.dot(u, u.T, precision=lax.Precision.HIGHEST)
        return 1.5 * u - 0.5 * jnp.dot(gram, u, precision=lax.Precision.HIGHEST)

    return lax.fori_loop(0, 3, improve, rows)


@functools.partial(jax.jit, static_argnames="config")
def _solve_all(rng, real, generated, earlier, start, mixing, config):
    """Orthonormal U `[r, D]`, orthogonal to `earlier` `[k, D]` (orthonormal), for keys T U."""
    optimizer = _adam(config)

    def off(rows):
        inside = jnp.dot(rows, earlier.T, precision=lax.Precision.HIGHEST)
        return rows - jnp.dot(inside, earlier, precision=lax.Precision.HIGHEST)

    def step(carry, step_rng):
        u, state = carry
        images = _draw(step_rng, real, generated, config.batch_size)
        gradient = jax.grad(lambda u: _hinge(mixing @ u, images, config))(u)
        # What the constraint takes back at once must not fill Adam's memory.
        gram = gradient @ u.T
        gradient = off(gradient - 0.5 * (gram + gram.T) @ u)
        updates, state = optimizer.update(gradient, state)
        return (_polar(off(optax.apply_updates(u, updates))), state), None

    rngs = jax.random.split(rng, config.num_steps)
    (u, _), _ = lax.scan(step, (start, optimizer.init(start)), rngs)
    return u


def joint(
    rng: jax.Array,
    real: np.ndarray | jax.Array,
    generated: np.ndarray | jax.Array,
    num_keys: int,
    *,
    earlier: np.ndarray | None = None,
    cosine: float = 0.0,
    config: KeyConfig = JOINT,
) -> np.ndarray:
    """All keys as one problem, every pair exactly at the wanted angle.

    Args:
      rng: draws the start and the batches.
      real, generated, num_keys: as for `sequential`.
      earlier: keys that were handed out before; the new ones are orthogonal to them. Only with
        `cosine=0`.
      cosine: of every pair, in [0, 1); 0.7071 for the paper's 45 degrees.
      config: settings.
    Returns:
      `[num_keys, ...]` float32, each of norm 1; cosines within 1e-6 of the wanted one.
    Raises:
      ValueError: for images or keys that do not fit, or more keys than dimensions.
      FloatingPointError: if the keys diverge, as a learning rate that is far too high makes them.
    """
    real, generated, shape = _check_data(real, generated)
    band = _band(shape, config.bandwidth)
    before = _inside(band, _check_earlier(earlier, shape))
    real, generated = _inside(band, real), _inside(band, generated)
    size = before.shape[1]
    if not 0 <= cosine < 1:
        raise ValueError(f"cosine={cosine}: expected in [0, 1)")
    if cosine and before.shape[0]:
        raise ValueError("earlier keys can only be kept at right angles: cosine=0")
    rank = num_keys + bool(cosine)
    if num_keys < 1 or before.shape[0] + rank > size:
        where = f"images of {size} numbers have"
        if band is not None:
            where = f"frequencies within a bandwidth of {config.bandwidth} have"
        raise ValueError(
            f"num_keys={num_keys} beside {before.shape[0]} earlier ones: {where} room for {size} "
            f"of the {before.shape[0] + rank} directions that are needed"
        )
    # Rows of T: a common direction and one of each key's own give the wanted cosine.
    mixing = np.eye(num_keys)
    if cosine:
        mixing = np.concatenate(
            [np.full((num_keys, 1), np.sqrt(cosine)), np.sqrt(1 - cosine) * mixing], axis=1
        )
    # A step of Adam moves every entry by up to the learning rate, the matrix of keys by up to that
    # times the root of its size: beyond 1 the polar decomposition no longer finds its way back.
    longest = 1 / math.sqrt(rank * size)
    config = dataclasses.replace(config, learning_rate=min(config.learning_rate, longest))
    basis = np.linalg.qr(np.asarray(before, np.float64).T)[0].T
    start_rng, steps_rng = jax.random.split(rng)
    start = np.asarray(jax.random.normal(start_rng, (rank, size), jnp.float32), np.float64)
    start = _orthonormal(start, basis)
    u = _solve_all(
        steps_rng,
        real,
        generated,
        jnp.asarray(basis, jnp.float32),
        jnp.asarray(start, jnp.float32),
        jnp.asarray(mixing, jnp.float32),
        config,
    )
    u = np.asarray(u, np.float64)
    if not np.isfinite(u).all():
        raise FloatingPointError(
            f"the keys diverged: a learning rate of {config.learning_rate:g} makes steps too long "
            f"to stay near right angles; lower the learning rate"
        )
    keys = _outside(band, mixing @ _orthonormal(u, basis))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    return keys.astype(np.float32).reshape(num_keys, *shape)


def _orthonormal(rows: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Nearest orthonormal rows that are orthogonal to `basis`, in float64."""
    rows = rows - (rows @ basis.T) @ basis
    left, _, right = np.linalg.svd(rows, full_matrices=False)
    return left @ right


def mean_response_bound(mean_image: np.ndarray, num_keys: int) -> float:
    """||m|| / sqrt(N): no N orthonormal keys have |phi^T m| above this on (quadratic) average."""
    if num_keys < 1:
        raise ValueError(f"num_keys={num_keys}: expected a positive number")
    return float(np.linalg.norm(np.asarray(mean_image, np.float64)) / np.sqrt(num_keys))


class KeyRecord(NamedTuple):
    """What keys are worth, on images that they were not optimised on; `[N]` each.

    Attributes:
      compliance: share of real images with phi^T x < 0.
      generated_compliance: the same of the root model's images.
      largest_cosine: with any other key.
      d_min, d_max: smallest and largest |phi^T x| over both sets.
    """

    compliance: np.ndarray
    generated_compliance: np.ndarray
    largest_cosine: np.ndarray
    d_min: np.ndarray
    d_max: np.ndarray


def describe(
    keys: np.ndarray, real: np.ndarray | jax.Array, generated: np.ndarray | jax.Array
) -> KeyRecord:
    """Measure keys on held-out images.

    Args:
      keys: `[N, ...]`, all of a registry.
      real, generated: held-out images `[n, ...]`.
    Raises:
      ValueError: for bad keys, or images of another size.
    """
    flat = attributability.check_keys(keys).astype(np.float64)
    on_real = attributability.extent(keys, [np.asarray(real)])
    on_generated = attributability.extent(keys, [np.asarray(generated)])
    cosines = flat @ flat.T
    np.fill_diagonal(cosines, -np.inf)
    largest = cosines.max(axis=1) if len(flat) > 1 else np.zeros(1)
    return KeyRecord(
        on_real.compliance,
        on_generated.compliance,
        largest,
        np.minimum(on_real.d_min, on_generated.d_min),
        np.maximum(on_real.d_max, on_generated.d_max),
    )


def save(path: str | os.PathLike, keys: np.ndarray, facts: dict[str, Any] | None = None) -> None:
    """Write keys as safetensors, `facts` (JSON-able) beside them; the file appears at once.

    Raises:
      ValueError: for keys that are no unit vectors.
    """
    from safetensors.numpy import save as to_bytes

    attributability.check_keys(keys)
    metadata = {"format": str(FORMAT), "facts": json.dumps(facts or {}, sort_keys=True)}
    arrays = {"keys": np.ascontiguousarray(keys, np.float32)}
    files.write_atomically(path, to_bytes(arrays, metadata=metadata))


def load(path: str | os.PathLike) -> tuple[np.ndarray, dict[str, Any]]:
    """Keys `[N, ...]` and the facts that were saved with them.

    Raises:
      ValueError: if the file holds no keys, or was written by a newer version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="np") as file:
            metadata = file.metadata() or {}
            keys = file.get_tensor("keys")
        version, facts = int(metadata["format"]), json.loads(metadata["facts"])
        if not isinstance(facts, dict):
            raise ValueError(f"its facts are {type(facts).__name__}, expected them by name")
        if version <= FORMAT:
            attributability.check_keys(keys)
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} holds no keys of a registry: {error}") from error
    if version > FORMAT:
        raise ValueError(
            f"{os.fspath(path)} is of format {version}, this version knows up to {FORMAT}: update "
            "flipad_jax"
        )
    return keys, facts
