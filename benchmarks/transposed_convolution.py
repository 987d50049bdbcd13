"""The gradient of a transposed convolution: ours against JAX's own and against PyTorch.

    python benchmarks/transposed_convolution.py

Prints JSON lines. One per layer shape: milliseconds of forward plus both gradients (median of the
repeats, compiled, warmed up, blocked on), the ratios, and how far the kernel gradient is from JAX's
own. One with "seeds": three models side by side under `vmap` against three in turn. The contenders
take turns in one process, so other people's load hits all of them.
"""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

from flipad_jax.generators import layers

_REPEATS = flags.DEFINE_integer("repeats", 15, "Timed calls of each contender.", lower_bound=1)

# images, side, channels in and out: the stages of the zoo's generators, and one of a 64x64 model.
SHAPES = ((64, 4, 128, 64), (64, 8, 64, 64), (64, 16, 64, 1), (16, 16, 64, 64))


def plain(x, kernel):
    """The same layer with the derivative that JAX derives."""
    return lax.conv_general_dilated(
        x,
        kernel[::-1, ::-1],
        (1, 1),
        [(2, 2), (2, 2)],
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def ours(x, kernel):
    """The layer as generators use it."""
    return layers.conv_transpose(x, kernel, 2, 1)


def gradients(layer, x, kernel, out_bar):
    """Output and both gradients."""
    out, pull_back = jax.vjp(layer, x, kernel)
    return out, *pull_back(out_bar)


def pytorch(x, kernel, out_bar):
    """A function that does the same in PyTorch, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    x = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2)).requires_grad_()
    kernel = torch.tensor(np.asarray(kernel).transpose(2, 3, 0, 1)).requires_grad_()
    out_bar = torch.tensor(np.asarray(out_bar).transpose(0, 3, 1, 2))

    def run():
        out = torch.nn.functional.conv_transpose2d(x, kernel, stride=2, padding=1)
        return torch.autograd.grad(out, (x, kernel), out_bar)

    return run


def medians(contenders, repeats):
    """Milliseconds of each contender, taking turns."""
    times = {name: [] for name in contenders}
    for run in contenders.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def main(argv):
    """Measure every shape."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    for num, side, c_in, c_out in SHAPES:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (num, side, side, c_in), jnp.float32)
        kernel = 0.02 * jax.random.normal(keys[1], (4, 4, c_in, c_out), jnp.float32)
        out_bar = jax.random.normal(keys[2], (num, 2 * side, 2 * side, c_out), jnp.float32)
        step = {f.__name__: jax.jit(functools.partial(gradients, f)) for f in (ours, plain)}
        contenders = {
            name: functools.partial(run, x, kernel, out_bar) for name, run in step.items()
        }
        torch_run = pytorch(x, kernel, out_bar)
        if torch_run is not None:
            contenders["pytorch"] = torch_run
        found = medians(contenders, _REPEATS.value)
        a, b = (run(x, kernel, out_bar)[2] for run in step.values())
        line = {"layer": f"{num}x{side}x{side}x{c_in} -> {c_out}", "ms": found}
        line["plain_over_ours"] = found["plain"] / found["ours"]
        if torch_run is not None:
            line["pytorch_over_ours"] = found["pytorch"] / found["ours"]
        line["relative_difference"] = float(abs(a - b).max() / abs(b).max())
        print(json.dumps(line), flush=True)

        stacked = [jnp.stack([v] * 3) for v in (x, kernel, out_bar)]
        together = jax.jit(jax.vmap(functools.partial(gradients, ours)))
        seeds = medians(
            {
                "vmap": lambda: together(*stacked),  # noqa: B023
                "in_turn": lambda: [
                    step["ours"](x, kernel, out_bar) for _ in range(3)
                ],  # noqa: B023
            },
            max(_REPEATS.value // 5, 1),
        )
        line = {"seeds": 3, "layer": f"{num}x{side}x{side}x{c_in} -> {c_out}", "ms": seeds}
        line["vmap_over_in_turn"] = seeds["vmap"] / seeds["in_turn"]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    app.run(main)
