"""A last layer as matrix products and shifts, against XLA's convolutions.

    python benchmarks/polyphase.py

Prints a JSON line per layer: microseconds per image of A z and of A^T o in both forms of
`inversion.polyphase` (best of the repeats, compiled, warmed up, blocked on; the forms take turns),
and their ratio, on which `polyphase.preferred_form` rests.
"""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from flipad_jax.inversion import linops, polyphase

_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed rounds of each form.", lower_bound=1)

# name: builder, kernel size, channels in and out, side, stride, padding, images at once
LAYERS = {
    "dcgan 64x64": (linops.conv_transpose, 4, 64, 3, 32, 2, 1, 8),
    "dcgan 64x64, one image": (linops.conv_transpose, 4, 64, 3, 32, 2, 1, 1),
    "dcgan 32x32 grey": (linops.conv_transpose, 4, 64, 1, 16, 2, 1, 32),
    "lsgan 64x64": (linops.conv, 3, 64, 3, 64, 1, 1, 4),
    "stable diffusion 512x512": (linops.conv, 3, 128, 3, 512, 1, 1, 1),
    "1x1 head 256x256": (linops.conv, 1, 64, 3, 256, 1, 0, 1),
    "strided conv 64x64": (linops.conv, 4, 64, 3, 64, 2, 1, 2),
    "5x5 transposed": (linops.conv_transpose, 5, 64, 3, 32, 2, 2, 8),
}


def microseconds(functions, argument, images):
    """Best microseconds per image of each function."""
    seconds = {}
    for function in functions:
        jax.block_until_ready(function(argument))
        start = time.perf_counter()
        jax.block_until_ready(function(argument))
        seconds[function] = [time.perf_counter() - start]
    calls = max(1, int(0.1 / max(s[0] for s in seconds.values())))
    for _ in range(_REPEATS.value):
        for function in functions:
            start = time.perf_counter()
            for _ in range(calls):
                result = function(argument)
            jax.block_until_ready(result)
            seconds[function].append((time.perf_counter() - start) / calls)
    return [1e6 * min(seconds[function]) / images for function in functions]


def main(argv):
    """Print one line per layer."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    rng = np.random.default_rng(0)
    for name, (make, size, c_in, c_out, side, stride, padding, images) in LAYERS.items():
        kernel = rng.standard_normal((size, size, c_in, c_out)).astype(np.float32)
        op = make(kernel, (side, side, c_in), strides=stride, padding=padding)
        forms = [polyphase.polyphase(op, form) for form in polyphase.FORMS]
        z = jnp.asarray(rng.standard_normal((images, *forms[0].input_shape)), jnp.float32)
        o = jnp.asarray(rng.standard_normal((images, *forms[0].output_shape)), jnp.float32)
        forward = microseconds([jax.jit(jax.vmap(form.forward)) for form in forms], z, images)
        adjoint = microseconds([jax.jit(jax.vmap(form.adjoint)) for form in forms], o, images)
        row = {"benchmark": "polyphase", "layer": name, "images": images}
        for form, there, back in zip(polyphase.FORMS, forward, adjoint, strict=True):
            row[form] = {"forward_us": round(there, 1), "adjoint_us": round(back, 1)}
        row["products_over_convolution"] = round(
            (forward[0] + adjoint[0]) / (forward[1] + adjoint[1]), 2
        )
        row["device"] = jax.devices()[0].device_kind
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app.run(main)
