"""What happens to images after they were made: as files suffer it, and so that gradients pass.

`published` does it with the real codecs, on uint8 images on the host; its functions are those of
this package. `differentiable` has the same in JAX, on float images, for robust training ([P2]).
`alterations` makes the copies of own images that a detector learns to tell from own ones.
"""

from flipad_jax.perturbations import differentiable
from flipad_jax.perturbations.alterations import alter
from flipad_jax.perturbations.published import (
    FORMS,
    RESAMPLING,
    any_of_them,
    apply,
    blur,
    combination,
    crop,
    jpeg,
    noise,
    parse,
    resize,
)

__all__ = [
    "FORMS",
    "RESAMPLING",
    "alter",
    "any_of_them",
    "apply",
    "blur",
    "combination",
    "crop",
    "differentiable",
    "jpeg",
    "noise",
    "parse",
    "resize",
]
