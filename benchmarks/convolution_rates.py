"""How near to the machine's peak the convolutions of a small DCGAN run, forward and backward.

    python benchmarks/convolution_rates.py

The layers of the zoo's generators and discriminators (32 x 32 x 1, batch 64), one at a time: the
layer, its gradient at the input and at the kernel, through `generators.layers`. Prints a JSON line
per layer: milliseconds (median) and GFLOP/s; then the rate of one large matrix product, which is as
fast as this machine gets, and how many milliseconds the products of a whole training step take:
generator forward and backward once, discriminator forward three times, backward to its kernels
twice, backward to its input three times.

    python benchmarks/convolution_rates.py --wide

The layers of networks for 64 x 64 images instead, batch 128, beside what JAX itself makes of the
same convolutions and their gradients.
"""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

from flipad_jax.generators import layers

_REPEATS = flags.DEFINE_integer("repeats", 15, "Timed calls.", lower_bound=1)

_WIDE = flags.DEFINE_bool("wide", False, "Layers for 64 x 64, ours beside JAX's own.")

# (side of the input, channels in, out, stride, padding), windows of 4 x 4.
GENERATOR = ((1, 64, 128, 1, 0), (4, 128, 64, 2, 1), (8, 64, 64, 2, 1), (16, 64, 1, 2, 1))
DISCRIMINATOR = ((32, 1, 64, 2, 1), (16, 64, 64, 2, 1), (8, 64, 128, 2, 1))
WIDE = (
    ("convolution", (64, 15, 32, 2, 1)),
    ("convolution", (32, 32, 64, 2, 1)),
    ("transposed", (32, 32, 15, 2, 1)),
    ("transposed", (16, 64, 32, 2, 1)),
)


def plain(x, kernel, stride, padding):
    """A convolution whose gradients are JAX's."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def plain_transposed(x, kernel, stride, padding):
    """A transposed convolution as JAX's documentation writes it, with its gradients."""
    pads = [(size - 1 - padding,) * 2 for size in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x,
        kernel[::-1, ::-1],
        (1, 1),
        pads,
        lhs_dilation=(stride, stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def milliseconds(function, *args):
    """Median of a compiled, warmed-up call."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(_REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def measure(layer, side, c, k, stride, padding, *, batch=64):
    """Milliseconds of a layer and its two gradients, and GFLOP of each of them."""
    x_rng, kernel_rng = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_rng, (batch, side, side, c))
    kernel = jax.random.normal(kernel_rng, (4, 4, c, k))

    def forward(x, kernel):
        return layer(x, kernel, stride, padding)

    def at_input(x, kernel, out):
        return jax.vjp(lambda x: forward(x, kernel), x)[1](out)

    def at_kernel(x, kernel, out):
        return jax.vjp(lambda kernel: forward(x, kernel), kernel)[1](out)

    out = forward(x, kernel)
    positions = min(side, out.shape[1]) ** 2
    found = {
        "forward": milliseconds(forward, x, kernel),
        "at_input": milliseconds(at_input, x, kernel, out),
        "at_kernel": milliseconds(at_kernel, x, kernel, out),
    }
    return found, 2 * batch * positions * 16 * c * k / 1e9


def wide():
    """Ours and JAX's own, layer by layer."""
    forms = {
        "convolution": {"ours": layers.conv, "jax": plain},
        "transposed": {"ours": layers.conv_transpose, "jax": plain_transposed},
    }
    for kind, shape in WIDE:
        line = {"layer": f"{kind} {shape[0]} x {shape[0]} x {shape[1]} to {shape[2]}"}
        for name, layer in forms[kind].items():
            found, _ = measure(layer, *shape, batch=128)
            line[name] = {f"{what}_ms": round(value, 1) for what, value in found.items()}
        print(json.dumps(line), flush=True)


def main(_):
    """Measure all layers."""
    if _WIDE.value:
        return wide()
    step = {"milliseconds": 0.0, "gflop": 0.0}
    for name, layer, shapes in (
        ("generator", layers.conv_transpose, GENERATOR),
        ("discriminator", layers.conv, DISCRIMINATOR),
    ):
        times = {"forward": 1, "at_input": 1, "at_kernel": 1}
        if name == "discriminator":
            times = {"forward": 3, "at_input": 3, "at_kernel": 2}
        for number, shape in enumerate(shapes):
            found, gflop = measure(layer, *shape)
            line = {"layer": f"{name} {number}", "gflop": round(gflop, 3)}
            for what, value in found.items():
                line[f"{what}_ms"] = round(value, 2)
                line[f"{what}_gflops"] = round(1e3 * gflop / value)
                step["milliseconds"] += times[what] * value
                step["gflop"] += times[what] * gflop
            print(json.dumps(line), flush=True)
    square = jax.random.normal(jax.random.key(1), (2048, 2048))
    peak = 2 * 2.048**3 / milliseconds(jnp.matmul, square, square) * 1e3
    print(json.dumps({"matrix product, gflops": round(peak)}))
    rate = 1e3 * step["gflop"] / step["milliseconds"]
    step = {**step, "gflops": rate, "milliseconds_at_peak": 1e3 * step["gflop"] / peak}
    print(json.dumps({f"training step, {key}": round(value, 1) for key, value in step.items()}))


if __name__ == "__main__":
    app.run(main)
