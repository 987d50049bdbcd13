"""How fast and how exactly the last layer is inverted.

For every solver: iterations and seconds per image to a relative duality gap of `--tol` on own and
on real images, the largest gap recomputed in float64 with a SciPy matrix that is built by loops
over the kernel, and the speed per iteration relative to a plain FISTA at 1/L in PyTorch on the same
images and cores, with the same number of iterations. Prints one JSON object per line.

Run: python benchmarks/inversion.py --data=layer.npz

The file holds `kernel [kh, kw, in, out]`, `mean_activation [h, w, in]`, `generated` and `real`
`[n, H, W, out]` uint8; without it the first generator of the zoo and its own images are used.
"""

import json
import math
import os
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from absl import app, flags

from flipad_jax import data
from flipad_jax.generators import sampling, zoo
from flipad_jax.inversion import final_layer, lasso, linops

_DATA = flags.DEFINE_string("data", None, "npz file with a layer and images; default: the zoo.")
_STRIDE = flags.DEFINE_integer("stride", 2, "Stride of the layer in --data.", lower_bound=1)
_PADDING = flags.DEFINE_integer("padding", 1, "Padding of the layer in --data.", lower_bound=0)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 64, "Images of each kind.", lower_bound=1)
_TOL = flags.DEFINE_float("tol", 1e-2, "Relative duality gap.", lower_bound=0.0)
_LAM = flags.DEFINE_float("lam", 5e-4, "Lasso weight (1/2-scale).", lower_bound=0.0)
_METHODS = flags.DEFINE_list("methods", sorted(lasso.METHODS), "Solvers.")
_PEER_ITERS = flags.DEFINE_integer("peer_iters", 100, "Iterations of the comparison with PyTorch.")
_PEER_IMAGES = flags.DEFINE_integer("peer_images", 8, "Images of the comparison with PyTorch.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Interleaved repeats of that comparison.")


def load_file(path, num_images):
    """Layer, z_bar, own and real images of an npz file."""
    with np.load(path) as arrays:
        operator = linops.conv_transpose(
            arrays["kernel"],
            arrays["mean_activation"].shape,
            strides=_STRIDE.value,
            padding=_PADDING.value,
        )
        return (
            final_layer.FinalLayer(operator),
            arrays["mean_activation"],
            {
                kind: arrays[name][:num_images]
                for kind, name in [("own", "generated"), ("real", "real")]
            },
        )


def load_zoo(num_images):
    """Layer, z_bar, own and real images of the first generator of the zoo."""
    name = zoo.names()[0]
    generator, record = zoo.load(name), zoo.record(name)
    real = data.load(
        record["dataset"],
        split="test",
        image_size=generator.image_shape[0],
        num_images=num_images,
        seed=record["data_seed"],
    )
    return (
        sampling.final_layer(generator),
        np.asarray(sampling.mean_activation(generator, jax.random.key(0))),
        {"own": sampling.generate(generator, jax.random.key(1), num_images), "real": real},
    )


def sparse_matrix(op):
    """`[out_size, in_size]` float64 matrix of a transposed convolution, without its code."""
    h, w, c_in = op.input_shape
    tall, wide, c_out = op.output_shape
    kernel = np.asarray(op.kernel, np.float64)
    i, j, c = np.meshgrid(np.arange(h), np.arange(w), np.arange(c_in), indexing="ij")
    column = (i * w + j) * c_in + c
    rows, columns, values = [], [], []
    for a in range(kernel.shape[0]):
        for b in range(kernel.shape[1]):
            y = i * op.strides[0] + a - op.padding[0][0]
            x = j * op.strides[1] + b - op.padding[1][0]
            inside = (y >= 0) & (y < tall) & (x >= 0) & (x < wide)
            for k in range(c_out):
                rows.append(((y * wide + x) * c_out + k)[inside])
                columns.append(column[inside])
                values.append(kernel[a, b, :, k][c][inside])
    return scipy.sparse.csr_matrix(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))),
        shape=(math.prod(op.output_shape), math.prod(op.input_shape)),
    )


def exact_relative_gaps(matrix, images, z_bar, z, lam):
    """Relative gaps of z - z_bar in float64, from the images on, as primal minus dual objective."""
    x = np.clip(images.astype(np.float64) / 127.5 - 1, -1 + 1e-4, 1 - 1e-4)
    gaps = []
    for image, solution in zip(np.arctanh(x), z, strict=True):
        o = image.ravel() - matrix @ z_bar.astype(np.float64).ravel()
        shifted = (solution.astype(np.float64) - z_bar).ravel()
        residual = o - matrix @ shifted
        scale = min(1, lam / np.abs(matrix.T @ residual).max())
        value = 0.5 * residual @ residual + lam * np.abs(shifted).sum()
        dual = 0.5 * o @ o - 0.5 * np.sum((o - scale * residual) ** 2)
        gaps.append((value - dual) / value)
    return np.array(gaps)


def torch_fista(op, targets, lam, lipschitz, num_iters):
    """Plain FISTA with PyTorch's convolutions, for a fixed number of iterations."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(num_cores())
    weight = torch.from_numpy(np.array(op.kernel).transpose(2, 3, 0, 1).copy())
    o = torch.from_numpy(np.array(targets).transpose(0, 3, 1, 2).copy())
    stride, padding = op.strides, tuple(p[0] for p in op.padding)
    zero = torch.zeros(len(o), op.input_shape[2], *op.input_shape[:2])

    def run():
        with torch.no_grad():
            z, y, t = zero, zero, 1.0
            for _ in range(num_iters):
                residual = F.conv_transpose2d(y, weight, stride=stride, padding=padding) - o
                v = y - F.conv2d(residual, weight, stride=stride, padding=padding) / lipschitz
                z_next = F.softshrink(v, lam / lipschitz)
                t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
                y = z_next + (t - 1) / t_next * (z_next - z)
                z, t = z_next, t_next
            return z.permute(0, 2, 3, 1).numpy()

    return run


def num_cores():
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def compare_with_torch(layer, z_bar, images, method, lipschitz):
    """Seconds of PyTorch over ours, same iterations, same images; None without PyTorch."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return None
    op, count = layer.operator, _PEER_ITERS.value
    targets = final_layer.targets(layer, images[: _PEER_IMAGES.value])
    targets = targets - op.forward(jnp.asarray(z_bar))[None]
    options = {"lam": _LAM.value, "tol": 0, "max_iters": count, "lipschitz": lipschitz}

    def ours():
        return jax.block_until_ready(lasso.solve(op, targets, method=method, **options))[0]

    theirs = torch_fista(op, targets, _LAM.value, lipschitz, count)
    difference = np.abs(np.asarray(ours()) - theirs()).max()  # Also the warm-up of both.
    seconds = {ours: [], theirs: []}
    for _ in range(_REPEATS.value):  # Interleaved, so that a busy machine slows both.
        for run in (ours, theirs):
            start = time.perf_counter()
            run()
            seconds[run].append(time.perf_counter() - start)
    ratios = np.array(seconds[theirs]) / np.array(seconds[ours])
    per_iteration = 1e6 / (count * len(targets))
    return {
        "iterations": count,
        "images": len(targets),
        "ratio_median": float(np.median(ratios)),
        "ratio_min": float(ratios.min()),
        "ratio_max": float(ratios.max()),
        "us_per_image_iteration": float(np.median(seconds[ours]) * per_iteration),
        "torch_us_per_image_iteration": float(np.median(seconds[theirs]) * per_iteration),
        "max_abs_difference_of_z": float(difference),
    }


def main(argv):
    """Run every solver and print its line."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    source = _DATA.value or "zoo"
    if _DATA.value is None:
        layer, z_bar, images = load_zoo(_NUM_IMAGES.value)
    else:
        layer, z_bar, images = load_file(_DATA.value, _NUM_IMAGES.value)
    op = layer.operator
    matrix = sparse_matrix(op)
    lipschitz = float(linops.squared_norm(op))
    options = {"lam": _LAM.value, "tol": _TOL.value, "lipschitz": lipschitz}
    for method in _METHODS.value:
        row = {
            "benchmark": "inversion",
            "data": os.path.basename(source),
            "method": method,
            "tol": _TOL.value,
            "lam": _LAM.value,
        }
        row |= {"device": jax.devices()[0].device_kind, "machine": platform.machine()}
        row |= {"jax": jax.__version__, "lipschitz_bound": lipschitz}
        for kind, batch in images.items():
            # Warm-up with the same chunk shape: compile time stays outside.
            final_layer.invert(
                layer, batch, z_bar, method=method, max_iters=1, **options | {"tol": 0}
            )
            start = time.perf_counter()
            z, info = jax.block_until_ready(
                final_layer.invert(layer, batch, z_bar, method=method, **options)
            )
            seconds = time.perf_counter() - start
            exact = exact_relative_gaps(matrix, batch, z_bar, np.asarray(z), _LAM.value)
            reported = np.asarray(info.relative_gap)
            row[kind] = {
                "images": len(batch),
                "seconds_per_image": seconds / len(batch),
                "iterations_mean": float(np.mean(info.num_iters)),
                "iterations_max": int(np.max(info.num_iters)),
                "unconverged": int(np.sum(~np.asarray(info.converged))),
                "max_relative_gap_reported": float(reported.max()),
                "max_relative_gap_float64": float(exact.max()),
                "max_error_of_reported_gap": float(np.abs(exact - reported).max()),
                "nonzero_fraction": float(np.mean(np.asarray(z) != np.asarray(z_bar)[None])),
            }
        row["torch"] = compare_with_torch(layer, z_bar, images["own"], method, lipschitz)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app.run(main)
