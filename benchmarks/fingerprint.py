"""Noise residuals (SM-F): the library against NumPy, SciPy and PyWavelets.

    python benchmarks/fingerprint.py

Prints a JSON line per size: microseconds per image (median of the rounds, compiled, warmed up,
blocked on), by the clock and of processor time, of `fingerprint.residuals` and of the same steps in
NumPy, once image by image, as the published code has them, and once with whole batches handed to
PyWavelets and SciPy; their ratios; and how far the residuals are apart. The contenders take turns
in one process. On a machine that does other things too the processor time is what can be believed.
"""

import json
import time
import warnings

import jax
import numpy as np
import pywt
from absl import app, flags
from scipy import ndimage

from flipad_jax import data
from flipad_jax.detection import fingerprint

_REPEATS = flags.DEFINE_integer("repeats", 7, "Rounds.", lower_bound=1)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 96, "Images in a round.", lower_bound=1)

GREY = np.asarray([0.29893602, 0.58704307, 0.11402090], np.float32)


def wiener_noise(x, noise_variance):
    """What is noise in `[..., h, w]`."""
    signal = np.full_like(x, np.inf)
    energy = x * x
    for size in (3, 5, 7, 9):
        window = (1,) * (x.ndim - 2) + (size, size)
        local = ndimage.uniform_filter(energy, window, mode="constant")
        np.minimum(signal, local, out=signal)
    return x * (noise_variance / (np.maximum(signal - noise_variance, 0) + noise_variance))


def numpy_residuals(images):
    """`[n, h, w, c]` uint8 -> `[n, h, w]` float32, a batch in every call."""
    n, h, w, c = images.shape
    x = np.moveaxis(images, 3, 1).astype(np.float32)
    approximation, *levels = pywt.wavedec2(x, "db4", level=4, axes=(2, 3))
    levels = [tuple(wiener_noise(band, np.float32(25)) for band in level) for level in levels]
    back = pywt.waverec2([np.zeros_like(approximation), *levels], "db4", axes=(2, 3))
    grey = back[:, 0, :h, :w] if c == 1 else np.einsum("nchw,c->nhw", back[..., :h, :w], GREY)
    phases = np.reshape(grey, (n, h // 2, 2, w // 2, 2))
    phases = phases - phases.mean(axis=1, keepdims=True)
    grey = (phases - phases.mean(axis=3, keepdims=True)).reshape(n, h, w)
    spectrum = np.fft.fft2(grey)
    magnitude = np.abs(spectrum) / np.float32(np.sqrt(h * w))
    kept = wiener_noise(magnitude, grey.var(axis=(1, 2), keepdims=True, ddof=1))
    gain = np.divide(kept, magnitude, out=np.zeros_like(kept), where=magnitude > 0)
    return np.fft.ifft2(spectrum * gain).real


def main(argv):
    """Measure grey images of 32 and RGB images of 64 pixels."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    warnings.filterwarnings("ignore", message="Level value of 4 is too high")
    num = _NUM_IMAGES.value
    for name in ("digits", "photos"):
        images = data.load(name, split="test", num_images=num)
        contenders = {
            "ours": lambda images: fingerprint.residuals(images),
            "numpy_loop": lambda images: np.concatenate(
                [numpy_residuals(images[i : i + 1]) for i in range(len(images))]
            ),
            "numpy_batched": numpy_residuals,
        }
        results = {key: run(images) for key, run in contenders.items()}
        times = {key: [] for key in contenders}
        for _ in range(_REPEATS.value):
            for key, run in contenders.items():
                start = time.perf_counter(), time.process_time()
                run(images)
                stop = time.perf_counter(), time.process_time()
                times[key].append(1e6 * np.subtract(stop, start) / num)
        found = {key: np.median(values, axis=0) for key, values in times.items()}
        scale = np.abs(results["numpy_loop"]).max()
        row = {
            "benchmark": "fingerprint",
            "images": f"{name} {num} x {list(images.shape[1:])}",
            "clock_us": {key: round(float(value[0]), 1) for key, value in found.items()},
            "processor_us": {key: round(float(value[1]), 1) for key, value in found.items()},
        }
        for key in ("numpy_loop", "numpy_batched"):
            ratios = found[key] / found["ours"]
            row[f"{key}_over_ours"] = {
                "clock": round(float(ratios[0]), 1),
                "processor": round(float(ratios[1]), 1),
            }
        row |= {
            "difference": float(np.abs(results["ours"] - results["numpy_batched"]).max() / scale),
            "device": jax.devices()[0].device_kind,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app.run(main)
