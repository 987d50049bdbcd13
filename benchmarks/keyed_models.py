"""Keyed models, all users in one program against one user after the other.

    python benchmarks/keyed_models.py                          # 20 models, batches of 8, 16, 32
    python benchmarks/keyed_models.py --num_models=3 --num_steps=2 --repeats=2 --batch_sizes=8

Updates by eq. 10 of copies of the zoo's first generator (digits_dcgan_0), as
`registry.user_generators` makes them, with the same latents, targets and optimiser in both forms:

*   `together`: models are an array axis of one program, the update under `vmap` (on an accelerator
    the library trains so);
*   `in_turn`: the same update of a single model, compiled once, in a loop on the host (on a CPU the
    library trains so).

Prints JSON lines; all times are milliseconds per update of one model (median of the repeats,
compiled, warmed up, blocked on; the two forms take turns):

*   for every batch size, the updates: times by the clock and of processor time, seconds of the
    first call, how far the losses of the two forms are from each other, and the ratio (above 1:
    together is faster);
*   for every layer, the transposed convolution and its gradients at the input and at the kernel.
    Under `vmap` over kernels each of them is a grouped convolution, a group per model; the root's
    pass, whose kernel all share, is one convolution of a larger batch. Beside them the rate at
    which the layer's matrix product runs, [batch * positions, c] by [c, 16 k]: batched, and as
    separate calls;
*   the convolutions of an update in all, and what share of it they are;

then the rate of one large matrix product, which is as fast as this machine gets, and a table.
"""

import functools
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from flipad_jax import report
from flipad_jax.generators import layers, zoo
from flipad_jax.registry import user_generators
from flipad_jax.registry.user_generators import KeyedConfig

_NUM_MODELS = flags.DEFINE_integer("num_models", 20, "Users.", lower_bound=2)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 10, "Updates of a model in a call.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed calls of each form.", lower_bound=1)
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["8", "16", "32"], "Latents per update.")

FORMS = ("together", "in_turn")


def medians(contenders, repeats, share):
    """Milliseconds by the clock and of processor time, divided by `share`, and seconds of the first
    call, by contender; they take turns."""
    first, times = {}, {name: [] for name in contenders}
    for name, run in contenders.items():
        start = time.perf_counter()
        jax.block_until_ready(run())
        first[name] = time.perf_counter() - start
    for _ in range(repeats):
        for name, run in contenders.items():
            cpu, clock = time.process_time(), time.perf_counter()
            jax.block_until_ready(run())
            elapsed = time.perf_counter() - clock, time.process_time() - cpu
            times[name].append(1e3 * np.array(elapsed) / share)
    found = {name: np.median(values, axis=0) for name, values in times.items()}
    return (
        {name: float(clock) for name, (clock, _) in found.items()},
        {name: float(cpu) for name, (_, cpu) in found.items()},
        first,
    )


def rounded(values, digits=3):
    """Numbers of a line, by form."""
    return {name: float(f"{value:.{digits}g}") for name, value in values.items()}


def rates(gflop, ms):
    """GFLOP/s by form."""
    return {form: float(f"{1e3 * gflop / value:.3g}") for form, value in ms.items()}


def measure_updates(root, batch_size, num_models, num_steps, repeats):
    """The line of the updates."""
    config = KeyedConfig(num_steps=1, max_rounds=1, batch_size=batch_size)
    rng, key_rng = jax.random.split(jax.random.key(0))
    state = user_generators.init(root, num_models, config)
    shifts = jax.random.normal(key_rng, (num_models, *root.image_shape), jnp.float32)
    shifts *= 3 / jnp.linalg.norm(shifts.reshape(num_models, -1), axis=1)[:, None, None, None]
    alone = [jax.tree.map(lambda leaf: leaf[i : i + 1], state) for i in range(num_models)]
    own_shifts = [shifts[i : i + 1] for i in range(num_models)]
    step = functools.partial(
        user_generators._step, root, rng, update=user_generators._match, config=config
    )
    jax.block_until_ready((state, alone, own_shifts))

    def together():
        found = state
        for _ in range(num_steps):
            found, losses = step(found, shifts)
        return found, losses

    def in_turn():
        found, losses = [], []
        for own, shift in zip(alone, own_shifts):
            for _ in range(num_steps):
                own, loss = step(own, shift)
            found.append(own)
            losses.append(loss[0])
        return found, losses

    forms = dict(zip(FORMS, (together, in_turn)))
    clock, cpu, first = medians(forms, repeats, num_models * num_steps)
    losses = [np.asarray(run()[1], np.float64) for run in forms.values()]
    return {
        "batch_size": batch_size,
        "models": num_models,
        "steps": num_steps,
        "ms": rounded(clock),
        "processor_ms": rounded(cpu),
        "first_call_seconds": rounded(first),
        "losses_differ_by": float(f"{np.abs(losses[0] / losses[1] - 1).max():.2g}"),
        "in_turn_over_together": round(clock["in_turn"] / clock["together"], 2),
    }


def shapes(root):
    """Side of the input, channels in and out, stride and padding of every layer of a DCGAN."""
    params = root.variables["params"]
    names = [f"convolutions_{i}" for i in range(len(root.module.features))] + ["last"]
    found, side = [], 1
    for index, name in enumerate(names):
        stride, padding = (2, 1) if index else (1, 0)
        found.append((side, *params[name]["kernel"].shape[2:], stride, padding))
        side = (side - 1) * stride - 2 * padding + 4
    assert (side, side) == root.image_shape[:2]
    return found


def both_forms(function, *arrays, shared=()):
    """A call for all models at once, and one that calls the function for each.

    The arrays are `[N, ...]`, an entry per model; `shared` are the same for all.
    """
    axes = (0,) * len(arrays) + (None,) * len(shared)
    batched, single = jax.jit(jax.vmap(function, axes)), jax.jit(function)
    own = [tuple(array[i] for array in arrays) for i in range(len(arrays[0]))]
    jax.block_until_ready(own)
    return {
        "together": functools.partial(batched, *arrays, *shared),
        "in_turn": lambda: [single(*of_one, *shared) for of_one in own],
    }


def measure_layer(shape, batch_size, num_models, repeats):
    """The line of a layer."""
    side, c, k, stride, padding = shape
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (num_models, batch_size, side, side, c), jnp.float32)
    kernels = 0.02 * jax.random.normal(keys[1], (num_models, 4, 4, c, k), jnp.float32)

    def forward(x, kernel):
        return layers.conv_transpose(x, kernel, stride, padding)

    def at_input(x, kernel, out):
        return jax.vjp(lambda x: forward(x, kernel), x)[1](out)[0]

    def at_kernel(x, kernel, out):
        return jax.vjp(lambda kernel: forward(x, kernel), kernel)[1](out)[0]

    out_shape = jax.eval_shape(forward, x[0], kernels[0]).shape
    out = jax.random.normal(keys[2], (num_models, *out_shape), jnp.float32)
    parts = {
        "root_forward": both_forms(forward, x, shared=(kernels[0],)),
        "forward": both_forms(forward, x, kernels),
        "at_kernel": both_forms(at_kernel, x, kernels, out),
    }
    if side > 1:  # what comes before the first layer are latents: nobody asks for their gradient
        parts["at_input"] = both_forms(at_input, x, kernels, out)
    rows = x.reshape(num_models, -1, c)
    columns = kernels.transpose(0, 3, 1, 2, 4).reshape(num_models, c, 16 * k)
    parts["matrix_product"] = both_forms(jnp.matmul, rows, columns)
    gflop = 2 * batch_size * side**2 * 16 * c * k / 1e9
    ms = {name: medians(forms, repeats, num_models)[0] for name, forms in parts.items()}
    return {
        "layer": f"{side}x{side}x{c} -> {k}",
        "batch_size": batch_size,
        "gflop": float(f"{gflop:.3g}"),
        "ms": {name: rounded(values) for name, values in ms.items()},
        "gflops": {name: rates(gflop, values) for name, values in ms.items()},
    }


def in_all(lines, update):
    """The convolutions of an update: milliseconds, GFLOP/s, and their share of the update."""
    gflop, ms = 0.0, dict.fromkeys(FORMS, 0.0)
    for line in lines:
        for name, values in line["ms"].items():
            if name != "matrix_product":
                gflop += line["gflop"]
                ms = {form: ms[form] + values[form] for form in FORMS}
    return {
        "convolutions of an update, batch_size": update["batch_size"],
        "gflop": float(f"{gflop:.3g}"),
        "ms": rounded(ms),
        "gflops": rates(gflop, ms),
        "share_of_update": {form: round(ms[form] / update["ms"][form], 2) for form in FORMS},
    }


def main(argv):
    """Measure every batch size."""
    if len(argv) > 1 or not all(text.isdecimal() and int(text) for text in _BATCH_SIZES.value):
        raise app.UsageError(f"unknown: {argv[1:] or _BATCH_SIZES.value}")
    root = zoo.load("digits_dcgan_0")
    device = jax.devices()[0].device_kind
    print(json.dumps({"device": device, "threads": len(os.sched_getaffinity(0))}), flush=True)
    table = []
    for batch_size in map(int, _BATCH_SIZES.value):
        update = measure_updates(
            root, batch_size, _NUM_MODELS.value, _NUM_STEPS.value, _REPEATS.value
        )
        print(json.dumps(update), flush=True)
        lines = []
        for shape in shapes(root):
            lines.append(measure_layer(shape, batch_size, _NUM_MODELS.value, _REPEATS.value))
            print(json.dumps(lines[-1]), flush=True)
        total = in_all(lines, update)
        print(json.dumps(total), flush=True)
        for what, found in (("update", update), ("its convolutions", total)):
            ms = [found["ms"][form] for form in FORMS]
            table.append([batch_size, what, *ms, f"{ms[1] / ms[0]:.2f}"])
    square = jax.random.normal(jax.random.key(2), (2048, 2048), jnp.float32)
    run = functools.partial(jax.jit(jnp.matmul), square, square)
    peak = medians({"square": run}, _REPEATS.value, 1)[0]["square"]
    print(json.dumps({"matrix product, gflops": round(2 * 2.048**3 / peak * 1e3)}))
    header = ["batch", "ms per model", "together", "in turn", "in turn / together"]
    print(report.table_text(header, table))


if __name__ == "__main__":
    app.run(main)
