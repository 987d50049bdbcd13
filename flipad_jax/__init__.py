"""Did this image come from my model? Attribution of generated images, in JAX.

    from flipad_jax import FinalLayer, fit, invert, lasso, linops, load, save, score, verdicts

Importing this package touches no device, no flag and no warning filter; its parts are imported when
they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module it lives in (the module itself where that is the name).
_PUBLIC = {
    "Attributor": "flipad_jax.detection.attributor",
    "AttributorConfig": "flipad_jax.detection.attributor",
    "FinalLayer": "flipad_jax.inversion.final_layer",
    "Verdicts": "flipad_jax.detection.attributor",
    "data": "flipad_jax.data",
    "fit": "flipad_jax.detection.attributor",
    "interop": "flipad_jax.generators.interop",
    "invert": "flipad_jax.inversion.final_layer",
    "lasso": "flipad_jax.inversion.lasso",
    "linops": "flipad_jax.inversion.linops",
    "load": "flipad_jax.detection.bundle",
    "mean_activation": "flipad_jax.inversion.final_layer",
    "parallel": "flipad_jax.parallel",
    "perturbations": "flipad_jax.perturbations",
    "save": "flipad_jax.detection.bundle",
    "score": "flipad_jax.detection.attributor",
    "verdicts": "flipad_jax.detection.attributor",
    "zoo": "flipad_jax.generators.zoo",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from flipad_jax import data, parallel, perturbations
    from flipad_jax.detection.attributor import (
        Attributor,
        AttributorConfig,
        Verdicts,
        fit,
        score,
        verdicts,
    )
    from flipad_jax.detection.bundle import load, save
    from flipad_jax.generators import interop, zoo
    from flipad_jax.inversion import lasso, linops
    from flipad_jax.inversion.final_layer import FinalLayer, invert, mean_activation


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    value = module if _PUBLIC[name].rpartition(".")[2] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
