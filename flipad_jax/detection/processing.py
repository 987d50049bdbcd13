"""What may have happened to an image since a generator made it, as part of the model.

`regeneration` looks for a latent z with G(z) = x. Of a processed image it looks for z and for the
unknowns t of the processing together, with P(G(z), t) = x. A `Processing` is that P, differentiable
in both, and where to begin with t. Noise is no function of a few unknowns: it stays in the
residual. So does, at first, what a codec does. But a codec is a function, of the image and a
quality, so once an image is found that is about right, a second search has the codec in the model
(`Codec`), and at its end the real one is replayed on the host.

========== ======================================================= =================================
kind       model                                                   unknowns
========== ======================================================= =================================
noise      nothing                                                 none
jpeg       nothing, then the differentiable codec, then Pillow's   quality
blur       any symmetric window up to 9 x 9 that is the same       four weights
           along rows and columns: Gaussian, box, ...
crop       part of the image, stretched back bilinearly            its side and its place
brightness levels times a gain plus an offset, clipped             both
========== ======================================================= =================================

Unknowns have bounds (a gain of 0.5 to 2, an offset of a quarter of the scale, at most half of a
side lost): without them any plain image is an own one, made very dark or cropped to a pixel.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flipad_jax.perturbations import differentiable, published

__all__ = ["NAMES", "Codec", "Processing", "get"]

_REACH = 4  # pixels to either side of a blur's window
_HIGHEST = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Codec:
    """The second search, and what the real codec makes of its result.

    Attributes:
      num_unknowns: how many.
      apply: as that of `Processing`; its unknowns are given, and not searched any further.
      guess: `(found [h, w, c] uint8, suspect [h, w, c] uint8) -> ` unknowns to try, the likeliest
        first, always as many.
      replay: `(found, unknowns) -> (image [h, w, c] uint8, what was done)`.
    """

    num_unknowns: int
    apply: Callable[[jax.Array, jax.Array], jax.Array]
    guess: Callable[[np.ndarray, np.ndarray], tuple[tuple[float, ...], ...]]
    replay: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, str]]


@dataclasses.dataclass(frozen=True)
class Processing:
    """A kind of processing.

    Attributes:
      name: of `NAMES`.
      apply: `(images [n, h, w, c] in [-1, 1], unknowns [p]) -> images` of the same shape, not
        clipped: the search takes the ends of the grey scale as inequalities.
      starts: where a search begins with the unknowns, the first one first.
      slack: `RegenerationConfig.slack`, in grey levels: how far it moves a pixel beyond `apply`.
      enough: root mean square error, in grey levels, at which a search that came to rest needs no
        other start.
      codec: what the second search is for.
    """

    name: str
    apply: Callable[[jax.Array, jax.Array], jax.Array]
    starts: tuple[tuple[float, ...], ...]
    slack: float = 0.5
    enough: float = 0.5
    codec: Codec | None = None

    @property
    def num_unknowns(self) -> int:
        """How many `apply` takes."""
        return len(self.starts[0])


jax.tree_util.register_static(Processing)


def _nothing(images: jax.Array, unknowns: jax.Array) -> jax.Array:
    del unknowns
    return images


def _shifts(side: int) -> np.ndarray:
    """`[_REACH, side, side]`: to both sides by 1, 2, ..., the border mirrored and not repeated."""
    period = max(2 * (side - 1), 1)
    matrices = np.zeros((_REACH, side, side), np.float32)
    rows = np.arange(side)
    for reach in range(1, _REACH + 1):
        for offset in (-reach, reach):
            place = np.abs((rows + offset) % period)
            place = np.where(place >= side, period - place, place)
            np.add.at(matrices[reach - 1], (rows, place), 1)
    return matrices


def _blur(images: jax.Array, weights: jax.Array) -> jax.Array:
    weights = jnp.clip(weights, -0.1, 0.5)
    matrices = [
        jnp.eye(side, dtype=images.dtype) * (1 - 2 * weights.sum())
        + jnp.einsum("k,kij->ij", weights, _shifts(side), precision=_HIGHEST)
        for side in images.shape[1:3]
    ]
    return jnp.einsum("ih,jw,nhwc->nijc", *matrices, images, precision=_HIGHEST)


def _gaussian(std: float) -> tuple[float, ...]:
    weights = np.exp(-0.5 * (np.arange(-_REACH, _REACH + 1) / std) ** 2)
    return tuple(float(w) for w in (weights / weights.sum())[_REACH + 1 :])


def _crop(images: jax.Array, unknowns: jax.Array) -> jax.Array:
    """Tenths of a side that are lost, and where the middle of the rest lies, in pixels."""
    matrices = []
    lost = jnp.clip(unknowns[0], 0, 5)
    for side, shift in zip(images.shape[1:3], unknowns[1:]):
        kept = side * (1 - lost / 10)
        start = (side - kept) / 2 + shift
        pixels = jnp.arange(side, dtype=images.dtype)
        place = start + (pixels + 0.5) * kept / side - 0.5
        place = jnp.clip(place, jnp.maximum(start, 0), jnp.minimum(start + kept, side) - 1)
        matrices.append(jnp.maximum(0, 1 - jnp.abs(place[:, None] - pixels)))
    return jnp.einsum("ih,jw,nhwc->nijc", *matrices, images, precision=_HIGHEST)


def _brightness(images: jax.Array, unknowns: jax.Array) -> jax.Array:
    gain, offset = jnp.clip(unknowns[0], 0.5, 2), jnp.clip(unknowns[1], -0.5, 0.5)
    return (images + 1) * gain + offset - 1


def _jpeg(images: jax.Array, unknowns: jax.Array) -> jax.Array:
    return differentiable.jpeg(images, lax.stop_gradient(unknowns[0])).astype(images.dtype)


_GUESSES = 3


def _guess_jpeg(found: np.ndarray, suspect: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Qualities at which the found image comes nearest to the suspect one."""
    qualities = np.arange(100, 0, -1)
    errors = []
    for quality in qualities:
        image = published.jpeg(found[None], int(quality))[0]
        errors.append(np.square(image.astype(np.float64) - suspect).mean())
    order = np.argsort(errors, kind="stable")[:_GUESSES]
    return tuple((float(quality),) for quality in qualities[order])


def _replay_jpeg(found: np.ndarray, unknowns: np.ndarray) -> tuple[np.ndarray, str]:
    quality = round(float(unknowns[0]))
    return published.jpeg(found[None], quality)[0], f"JPEG of quality {quality}"


_ALL = {
    processing.name: processing
    for processing in (
        Processing("noise", _nothing, ((),), slack=25.0),
        Processing(
            "jpeg",
            _nothing,
            ((),),
            slack=8.0,
            # Of digits at quality 90 nine in ten come to rest within it, most of the rest after
            # another start; at 4 levels one in fifty stays as far away as the nearest foreign one.
            enough=2.5,
            codec=Codec(1, _jpeg, _guess_jpeg, _replay_jpeg),
        ),
        Processing("blur", _blur, (_gaussian(0.8), _gaussian(2.0), _gaussian(0.4))),
        Processing(
            "crop", _crop, ((1.0, 0.0, 0.0), (0.4, 0.0, 0.0), (1.6, 0.0, 0.0), (2.4, 0.0, 0.0))
        ),
        Processing("brightness", _brightness, ((1.0, 0.0),)),
    )
}

NAMES = tuple(_ALL)


def get(name: str) -> Processing:
    """A kind of processing by its name.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in _ALL:
        raise ValueError(f"processing {name!r} is unknown; there are {', '.join(NAMES)}")
    return _ALL[name]
