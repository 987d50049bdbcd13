"""Other people's generators: weights in files and live PyTorch modules.

Attribution needs little of a generator: its last layer (kernel, bias, stride, padding, activation),
the mean activation z_bar before it, and images that it made. There are two ways to that.

From files, whatever framework wrote them:

    arrays = read_arrays("generator.pth")
    loaded = final_layer(
        arrays, "main.12", layer="conv_transpose", strides=2, padding=1,
        mean_activation=np.load("mean_activation.npy"), generated=images,
    )
    attributor = fit(loaded.layer, loaded.z_bar, images, rng=jax.random.key(0))

From a module that runs, which knows its own geometry and makes the rest:

    imported = from_torch(module, "main.12", sample=sample, num_impostors=12_000)
    attributor = fit(imported.layer, imported.z_bar, imported.generated, rng=jax.random.key(0),
                     impostors=imported.impostors)
    write(imported, "my_generator")   # files without PyTorch, and flags of the experiment "fit"

A layer that is described wrongly still inverts every image, into activations that mean nothing. So
what can be checked is: `from_torch` compares with what the module computes, `final_layer` with the
images (`mean_mismatch`).

[P1] section 4 needs x = sigma(A z + bias) with a sigma that can be inverted: no ReLU at the end,
and nothing added after the last layer (a residual connection to the output).

Nothing is ever unpickled beyond the plain tensors that `torch.load(weights_only=True)` admits.
"""

from flipad_jax.generators.interop.layer_of_arrays import (
    LAYERS,
    LAYOUTS,
    LoadedLayer,
    final_layer,
)
from flipad_jax.generators.interop.torch_module import from_torch
from flipad_jax.generators.interop.weight_files import read_arrays
from flipad_jax.generators.interop.written import ImportedGenerator, write
from flipad_jax.inversion.mismatch import MISMATCH_BOUND, mean_mismatch

__all__ = [
    "LAYERS",
    "LAYOUTS",
    "MISMATCH_BOUND",
    "ImportedGenerator",
    "LoadedLayer",
    "final_layer",
    "from_torch",
    "mean_mismatch",
    "read_arrays",
    "write",
]
