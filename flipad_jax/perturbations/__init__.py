"""What happens to images after they were made: as files suffer it, and so that gradients pass.

`published` does it with the real codecs, on uint8 images on the host; its functions are those of
this package. `differentiable` has the same in JAX, on float images, for robust training ([P2]).
"""

from flipad_jax.perturbations import differentiable
from flipad_jax.perturbations.published import (
    FORMS,
    RESAMPLING,
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
