"""How fast and how exactly the last layer is inverted, beside everything else that can do it.

    python benchmarks/inversion.py --data=layer.npz --plot=inversion.png
    python benchmarks/inversion.py --layer=lsgan --num_images=4
    python benchmarks/inversion.py --layer=stable_diffusion --num_images=1 --repeats=0 \\
        --methods=primal_dual

Prints one JSON object per line:

* for each of our solvers and each kind of image: iterations and seconds per image to a relative
  duality gap of `--tol`, the largest gap recomputed in float64 with a SciPy matrix that is built by
  loops over the kernel (for the largest layers with SciPy's correlations), seconds per iteration
  and image, and how that compares with the floor, the two matrix products that an iteration cannot
  do without, timed in the same run;
* the peak memory of inverting one chunk of images, four and eight, each in a process of its own and
  above what the imports took: from four to eight it should grow by the output, and no more;
* for each peer the same to the same gap, on `--peer_images` images of each kind, and how many times
  faster the default solver is: FISTA in PyTorch with the published step 0.025 and with 1/L, images
  that are done leaving the batch; celer, coordinate descent on the sparse matrix; jaxopt's
  accelerated proximal gradient. A peer that is not installed or not done in `--peer_seconds` is
  reported as such.

The file holds `kernel [kh, kw, in, out]`, `mean_activation [h, w, in]`, `generated` and `real`
`[n, H, W, out]` uint8; without it the first generator of the zoo and its images are used, or with
`--layer` a layer of random weights in the shape of a known one. Seconds are the best of
`--repeats`: other people's load only ever adds.
"""

import functools
import json
import math
import multiprocessing
import os
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.signal
import scipy.sparse
from absl import app, flags

from flipad_jax import data
from flipad_jax.generators import sampling, zoo
from flipad_jax.inversion import final_layer, lasso, linops

_DATA = flags.DEFINE_string("data", None, "npz file with a layer and images; default: the zoo.")
_LAYER = flags.DEFINE_enum(
    "layer", None, ["lsgan", "stable_diffusion", "head", "dense"], "Random weights in this shape."
)
_STRIDE = flags.DEFINE_integer("stride", 2, "Stride of the layer in --data.", lower_bound=1)
_PADDING = flags.DEFINE_integer("padding", 1, "Padding of the layer in --data.", lower_bound=0)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 64, "Images of each kind.", lower_bound=1)
_TOL = flags.DEFINE_float("tol", 1e-2, "Relative duality gap.", lower_bound=0.0)
_LAM = flags.DEFINE_float("lam", 5e-4, "Lasso weight (1/2-scale).", lower_bound=0.0)
_METHODS = flags.DEFINE_list("methods", list(lasso.METHODS), "Our solvers, the default one first.")
_PEERS = flags.DEFINE_list(
    "peers", ["torch_1_over_L", "torch_published", "jaxopt", "celer"], "Other solvers."
)
_PEER_IMAGES = flags.DEFINE_integer("peer_images", 4, "Images of each kind for the peers.")
_PEER_SECONDS = flags.DEFINE_float("peer_seconds", 240, "A peer that takes longer is stopped.")
_MAX_ITERS = flags.DEFINE_integer("max_iters", 10_000, "Iterations at most.", lower_bound=1)
_REPEATS = flags.DEFINE_integer(
    "repeats", 3, "Runs of our solvers; 0: the first one counts, compiling included.", lower_bound=0
)
_PLOT = flags.DEFINE_string("plot", None, "PNG of the gap against seconds.")

# name -> builder of its last layer; [P1]'s LSGAN, a decoder of latent diffusion, a 1 x 1 head.
SHAPES = {
    "lsgan": (linops.conv, (3, 3, 64, 3), (64, 64, 64), {"padding": 1}, "tanh"),
    "stable_diffusion": (
        linops.conv,
        (3, 3, 128, 3),
        (512, 512, 128),
        {"padding": 1},
        "identity",
    ),
    "head": (linops.conv, (1, 1, 64, 3), (256, 256, 64), {}, "tanh"),
    "dense": (None, (1024, 768), (1024,), {}, "tanh"),
}


def load_file(path, num_images):
    """Layer, z_bar, own and real images of an npz file."""
    with np.load(path, allow_pickle=False) as arrays:
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


def load_shape(name, num_images):
    """A layer of random weights and the images it makes of sparse activations."""
    make, kernel_shape, shape, options, activation = SHAPES[name]
    # Makes the standard deviation of a pixel, before the activation, about a half.
    size = 0.5 / math.sqrt(0.5 * math.prod(kernel_shape[:-1]))
    rng = np.random.default_rng(0)
    kernel = size * rng.standard_normal(kernel_shape).astype(np.float32)
    if make is None:
        op = linops.dense(kernel, shape, (16, 16, 3))
    else:
        op = make(kernel, shape, **options)
    layer = final_layer.FinalLayer(op, activation=activation)

    def image(seed):
        values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        x = np.asarray(final_layer.forward(layer, jnp.maximum(values, 0)))[None]
        return data.to_uint8(np.clip(x, -1, 1))

    own = np.concatenate([image(seed) for seed in range(1, num_images + 1)])
    return layer, np.full(shape, 1 / math.sqrt(2 * math.pi), np.float32), {"own": own}


def sparse_matrix(op):
    """`[out_size, in_size]` float64 matrix of a layer, without its code."""
    if isinstance(op, linops.Dense):
        return scipy.sparse.csr_matrix(np.asarray(op.matrix, np.float64).T)
    transposed = isinstance(op, linops.ConvTranspose)
    # A convolution is the transpose of a transposed one with channels exchanged.
    small, large = (op.input_shape, op.output_shape)[:: 1 if transposed else -1]
    kernel = np.asarray(op.kernel, np.float64)
    if not transposed:
        kernel = kernel.swapaxes(2, 3)
    h, w, c_small = small
    tall, wide, c_large = large
    i, j, c = np.meshgrid(np.arange(h), np.arange(w), np.arange(c_small), indexing="ij")
    column = (i * w + j) * c_small + c
    rows, columns, values = [], [], []
    for a in range(kernel.shape[0]):
        for b in range(kernel.shape[1]):
            y = i * op.strides[0] + a - op.padding[0][0]
            x = j * op.strides[1] + b - op.padding[1][0]
            inside = (y >= 0) & (y < tall) & (x >= 0) & (x < wide)
            for k in range(c_large):
                rows.append(((y * wide + x) * c_large + k)[inside])
                columns.append(column[inside])
                values.append(kernel[a, b, :, k][c][inside])
    matrix = scipy.sparse.csr_matrix(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))),
        shape=(math.prod(large), math.prod(small)),
    )
    return matrix if transposed else matrix.T.tocsr()


class Correlations:
    """A convolution of stride 1 as SciPy's correlations in float64, for `@` and `.T @` only."""

    def __init__(self, op):
        self.shapes = op.input_shape, op.output_shape
        self.kernel = np.asarray(op.kernel, np.float64)
        self.pads = (*op.padding, (0, 0))

    @property
    def T(self):
        """The transpose: correlations with the turned kernel, and the padding that is left."""
        other = object.__new__(Correlations)
        other.shapes = self.shapes[::-1]
        other.kernel = self.kernel[::-1, ::-1].swapaxes(2, 3)
        sizes = self.kernel.shape[:2]
        turned = [(k - 1 - p, k - 1 - q) for k, (p, q) in zip(sizes, self.pads[:2], strict=True)]
        other.pads = (*turned, (0, 0))
        return other

    def __matmul__(self, vector):
        maps = np.pad(vector.reshape(self.shapes[0]), self.pads)
        out = np.zeros(self.shapes[1])
        for k in range(out.shape[2]):
            for c in range(maps.shape[2]):
                out[:, :, k] += scipy.signal.correlate(
                    maps[:, :, c], self.kernel[:, :, c, k], "valid", "direct"
                )
        return out.ravel()


def exact_relative_gaps(matrix, targets, z, lam):
    """Relative gaps of z [n, ...] in float64, as primal minus dual objective."""
    gaps = []
    for o, solution in zip(targets, z, strict=True):
        solution = np.asarray(solution, np.float64).ravel()
        residual = o - matrix @ solution
        scale = min(1, lam / np.abs(matrix.T @ residual).max())
        value = 0.5 * residual @ residual + lam * np.abs(solution).sum()
        dual = 0.5 * o @ o - 0.5 * np.sum((o - scale * residual) ** 2)
        gaps.append((value - dual) / value)
    return np.array(gaps)


def exact_targets(matrix, images, z_bar, activation):
    """o - A z_bar `[n, out_size]` in float64, from the images on."""
    x = images.astype(np.float64) / 127.5 - 1
    if activation == "tanh":
        x = np.arctanh(np.clip(x, -1 + 1e-4, 1 - 1e-4))
    elif activation != "identity":
        raise ValueError(f"no exact targets for {activation}")
    return x.reshape(len(x), -1) - matrix @ z_bar.astype(np.float64).ravel()


def torch_fista(op, targets, lam, step, tol, max_seconds, gap_every=50):
    """Plain FISTA with PyTorch's convolutions until every image has reached the gap.

    Returns z `[n, *input_shape]`, iterations `[n]`, seconds, and the course of the median gap.
    """
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(num_cores())
    transposed = isinstance(op, linops.ConvTranspose)
    order = (2, 3, 0, 1) if transposed else (3, 2, 0, 1)
    weight = torch.from_numpy(np.array(op.kernel).transpose(order).copy())
    stride, padding = op.strides, tuple(p[0] for p in op.padding)
    options = {"stride": stride, "padding": padding}
    there, back = (F.conv_transpose2d, F.conv2d)[:: 1 if transposed else -1]
    forward = functools.partial(there, weight=weight, **options)
    adjoint = functools.partial(back, weight=weight, **options)
    o = torch.from_numpy(np.array(targets).transpose(0, 3, 1, 2).copy())
    z = torch.zeros(len(o), op.input_shape[2], *op.input_shape[:2])
    y, t, active = z.clone(), 1.0, torch.arange(len(o))
    out, iterations, course = torch.zeros_like(z), np.zeros(len(o), int), []
    gaps = np.ones(len(o))
    start, count = time.perf_counter(), 0
    with torch.no_grad():
        while len(active) and time.perf_counter() - start < max_seconds:
            for _ in range(gap_every):
                v = y - adjoint(forward(y) - o) * step
                z_next = F.softshrink(v, lam * step)
                t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
                y = z_next + (t - 1) / t_next * (z_next - z)
                z, t = z_next, t_next
            count += gap_every
            residual = o - forward(z)
            g = adjoint(residual)
            scale = (lam / g.abs().amax((1, 2, 3))).clamp(max=1)
            energy = 0.5 * residual.square().sum((1, 2, 3))
            slack = (lam * z.abs() - scale[:, None, None, None] * z * g).sum((1, 2, 3))
            value = energy + lam * z.abs().sum((1, 2, 3))
            relative = ((1 - scale) ** 2 * energy + slack) / value
            gaps[active.numpy()] = relative.numpy()
            course.append((time.perf_counter() - start, float(np.median(gaps))))
            out[active], iterations[active.numpy()] = z, count
            on = relative > tol
            o, z, y, active = o[on], z[on], y[on], active[on]
    seconds = time.perf_counter() - start
    return out.permute(0, 2, 3, 1).numpy(), iterations, seconds, course


def jaxopt_fista(op, targets, lam, lipschitz, num_iters):
    """jaxopt's accelerated proximal gradient for given iterations, image by image."""
    import jaxopt

    def smooth(z, o):
        return 0.5 * jnp.sum((op.forward(z) - o) ** 2)

    def solve(o, maxiter):
        solver = jaxopt.ProximalGradient(
            smooth, jaxopt.prox.prox_lasso, stepsize=1 / lipschitz, maxiter=maxiter, tol=0
        )
        return solver.run(jnp.zeros(op.input_shape), lam, o=o).params

    solved, seconds = [], 0.0
    for o, count in zip(targets, num_iters, strict=True):
        run = jax.jit(functools.partial(solve, maxiter=int(count)))
        compiled = run.lower(o).compile()
        start = time.perf_counter()
        solved.append(jax.block_until_ready(compiled(o)))
        seconds += time.perf_counter() - start
    return np.stack([np.asarray(z) for z in solved]), seconds


def celer_lasso(matrix, o, lam, tol):
    """celer on the sparse matrix, one target; its tolerance is relative to the target."""
    from celer import Lasso

    model = Lasso(alpha=lam / o.size, fit_intercept=False, tol=tol, max_iter=1000)
    x = scipy.sparse.csc_matrix(matrix)
    start = time.perf_counter()
    model.fit(x, o)
    return model.coef_, int(model.n_iter_), time.perf_counter() - start


def within(seconds, function, *args):
    """`function(*args)` in a process of its own, or None if it takes longer."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        try:
            return pool.apply_async(function, args).get(timeout=seconds)
        except multiprocessing.TimeoutError:
            return None


def peak_memory(layer, num_images, lam, method):
    """MiB of inverting at its peak, above what this process has needed until now."""

    def peak():
        # Not ru_maxrss, which a new process inherits from the one that started it.
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024

    before = peak()
    op = layer.operator
    images = np.random.default_rng(0).integers(0, 256, (num_images, *op.output_shape), np.uint8)
    z_bar = np.zeros(op.input_shape, np.float32)
    jax.block_until_ready(
        final_layer.invert(layer, images, z_bar, lam=lam, method=method, tol=0, max_iters=12)
    )
    return peak() - before


def memory_rows(layer):
    """Yield lines for one chunk of images, four chunks and eight; from four on nothing compiles."""
    op = layer.operator
    few = lasso._default_chunk_size(op)
    for method in _METHODS.value:
        for count in (few, 4 * few, 8 * few):
            row = {"benchmark": "inversion", "memory_of": method, "images": count}
            if count * math.prod(op.input_shape) > 1e8:
                continue  # Many large images: their output alone would fill a small machine.
            if not os.path.exists("/proc/self/status"):
                yield row | {"missing": "needs Linux"}
                continue
            yield row | {
                "peak_MiB_above_import": within(600, peak_memory, layer, count, _LAM.value, method),
                "output_MiB": count * math.prod(op.input_shape) * 4 / 2**20,
                "targets_MiB": count * math.prod(op.output_shape) * 4 / 2**20,
            }


def num_cores():
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def best_seconds(function):
    """Best of `--repeats` after a warm-up (of the warm-up alone if there are none); the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    seconds = [] if _REPEATS.value else [time.perf_counter() - start]
    for _ in range(_REPEATS.value):
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def floor_seconds(op, num_images):
    """Seconds per image of the two matrix products of one iteration."""
    if isinstance(op, linops.Dense):
        positions, inner, outer = 1, *op.matrix.shape
    else:
        narrow = op.input_shape if isinstance(op, linops.ConvTranspose) else op.output_shape
        positions, inner = narrow[0] * narrow[1], op.kernel.shape[2]
        outer = math.prod(op.kernel.shape) // inner
    wide, tall = jnp.ones((num_images * positions, inner)), jnp.ones((inner, outer))
    there = jax.jit(lambda a, b: a @ b)
    back = jax.jit(lambda a, b: a @ b.T)
    thin = there(wide, tall)
    calls = max(1, int(2e9 // (4 * wide.size * outer)))

    def run():
        for _ in range(calls):
            result = (there(wide, tall), back(thin, tall))
        return result

    return best_seconds(run)[0] / (calls * num_images)


def measure(layer, z_bar, images, method, matrix):
    """The line of one of our solvers on one kind of image; z is measured against the matrix."""
    op = layer.operator
    options = {"lam": _LAM.value, "method": method}
    seconds, (z, info) = best_seconds(
        lambda: final_layer.invert(
            layer, images, z_bar, tol=_TOL.value, max_iters=_MAX_ITERS.value, **options
        )
    )
    chunk = images[: lasso._default_chunk_size(op)]
    # Of large images a few iterations take long enough.
    span = 100 if math.prod(op.input_shape) < 1e6 else 20
    few, many = (
        best_seconds(
            lambda n=n: final_layer.invert(layer, chunk, z_bar, tol=0, max_iters=n, **options)
        )[0]
        for n in (5, 5 + span)
    )
    per_iteration = (many - few) / (span * len(chunk))
    floor = floor_seconds(op, len(chunk))
    row = {
        "images": len(images),
        "seconds_per_image": seconds / len(images),
        "iterations_mean": float(np.mean(info.num_iters)),
        "iterations_max": int(np.max(info.num_iters)),
        "unconverged": int(np.sum(~np.asarray(info.converged))),
        "max_relative_gap_reported": float(np.max(info.relative_gap)),
        "us_per_image_iteration": 1e6 * per_iteration,
        "over_floor": per_iteration / floor,
        "floor_us": 1e6 * floor,
    }
    shifted = np.asarray(z) - z_bar
    targets = exact_targets(matrix, images, z_bar, layer.activation)
    exact = exact_relative_gaps(matrix, targets, shifted, _LAM.value)
    row["max_relative_gap_float64"] = float(exact.max())
    row["max_error_of_reported_gap"] = float(np.abs(exact - info.relative_gap).max())
    row["fraction_above_1e-3_of_largest"] = float(
        np.mean(np.abs(shifted) > 1e-3 * np.abs(shifted).max())
    )
    return row


def peer_rows(layer, z_bar, images, matrix, default):
    """Yield the line of every peer: `default` is seconds per image of our default solver."""
    op, lam, tol = layer.operator, _LAM.value, _TOL.value
    kinds = list(images)
    some = np.concatenate([images[kind][: _PEER_IMAGES.value] for kind in kinds])
    ours = np.mean([default[kind] for kind in kinds])
    targets = final_layer.targets(layer, some) - op.forward(jnp.asarray(z_bar))[None]
    exact_o = exact_targets(matrix, some, z_bar, layer.activation)
    lipschitz = float(linops.squared_norm(op))
    counts = None
    for peer in _PEERS.value:
        row = {"benchmark": "inversion", "peer": peer, "images": len(some), "tol": tol}
        course = None
        try:
            if peer.startswith("torch"):
                step = 0.025 if peer == "torch_published" else 1 / lipschitz
                z, iterations, seconds, course = torch_fista(
                    op, targets, lam, step, tol, _PEER_SECONDS.value
                )
                row["iterations_mean"] = float(iterations.mean())
                counts = iterations if peer == "torch_1_over_L" else counts
            elif peer == "jaxopt":
                if counts is None:
                    raise ImportError("needs the iterations of torch_1_over_L; list that first")
                z, seconds = jaxopt_fista(op, targets, lam, lipschitz, counts)
                row["iterations_mean"] = float(np.mean(counts))
            elif peer == "celer":
                # One image, at a tolerance that amounts to ours: relative to the objective.
                z0, _ = lasso.solve(op, targets[:1], lam=lam, tol=tol)
                value = lam * float(jnp.abs(z0).sum())
                found = within(
                    _PEER_SECONDS.value,
                    celer_lasso,
                    matrix,
                    exact_o[0],
                    lam,
                    tol * value / float(exact_o[0] @ exact_o[0]),
                )
                if found is None:
                    row["not_done_after_seconds"] = _PEER_SECONDS.value
                    row["default_is_faster_by_at_least"] = _PEER_SECONDS.value / ours
                    yield row, None
                    continue
                z, row["iterations_mean"], seconds = found
                z, row["images"] = z[None], 1
            else:
                raise ValueError(f"--peers={peer} is unknown")
        except ImportError as error:
            yield row | {"missing": str(error)}, None
            continue
        gaps = exact_relative_gaps(matrix, exact_o[: row["images"]], z, lam)
        row |= {
            "seconds_per_image": seconds / row["images"],
            "max_relative_gap_float64": float(gaps.max()),
            "reached": bool(gaps.max() <= 1.05 * tol),
        }
        # Who was stopped before the end would have needed longer.
        name = "default_is_faster_by" if row["reached"] else "default_is_faster_by_at_least"
        row[name] = row["seconds_per_image"] / ours
        # Whoever tells no course is a point.
        course = course or [(seconds, float(np.median(gaps)))]
        yield row, (row["images"], course)


def our_course(layer, z_bar, images, method):
    """(seconds per image, median gap) after 10, 20, 40, ... iterations."""
    course = []
    for count in (10, 20, 40, 80, 160, 320, 640, 1280):
        seconds, (_, info) = best_seconds(
            lambda n=count: final_layer.invert(
                layer, images, z_bar, tol=0, max_iters=n, lam=_LAM.value, method=method
            )
        )
        course.append((seconds, float(np.median(info.relative_gap))))
    return len(images), course


def draw(courses, path):
    """Gap against seconds per image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, (count, course) in courses.items():
        seconds, gaps = np.array(course).T
        axes.loglog(seconds / count, gaps, label=name, marker="o" if len(gaps) < 20 else None, ms=4)
    axes.set_xlabel("seconds per image")
    axes.set_ylabel("relative duality gap (median)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main(argv):
    """Run every solver and print its lines."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    if _LAYER.value:
        layer, z_bar, images = load_shape(_LAYER.value, _NUM_IMAGES.value)
    elif _DATA.value:
        layer, z_bar, images = load_file(_DATA.value, _NUM_IMAGES.value)
    else:
        layer, z_bar, images = load_zoo(_NUM_IMAGES.value)
    op = layer.operator
    elements = 0
    if not isinstance(op, linops.Dense):
        elements = math.prod(op.output_shape) * math.prod(op.kernel.shape[:3])
    # A matrix of more than 50 million nonzeros is not built; peers are then left out.
    large = elements > 5e7
    matrix = Correlations(op) if large else sparse_matrix(op)
    default = {}
    for method in _METHODS.value:
        for kind, batch in images.items():
            row = {
                "benchmark": "inversion",
                "layer": _LAYER.value or os.path.basename(_DATA.value or zoo.names()[0]),
                "method": method,
                "kind": kind,
                "tol": _TOL.value,
                "lam": _LAM.value,
                "device": jax.devices()[0].device_kind,
                "machine": platform.machine(),
                "jax": jax.__version__,
            }
            row |= measure(layer, z_bar, batch, method, matrix)
            if method == _METHODS.value[0]:
                default[kind] = row["seconds_per_image"]
            print(json.dumps(row), flush=True)
    for row in memory_rows(layer):
        print(json.dumps(row), flush=True)
    courses = {}
    if not large and not isinstance(op, linops.Dense):
        for row, course in peer_rows(layer, z_bar, images, matrix, default):
            print(json.dumps(row), flush=True)
            if course:
                courses[row["peer"]] = course
    if _PLOT.value:
        some = np.concatenate([batch[: _PEER_IMAGES.value] for batch in images.values()])
        ours = {m: our_course(layer, z_bar, some, m) for m in _METHODS.value}
        draw(ours | courses, _PLOT.value)


if __name__ == "__main__":
    app.run(main)
