"""Peak memory of fitting an attributor: activations of all images are never in memory at once.

    python benchmarks/feature_memory.py
    python benchmarks/feature_memory.py --counts=2000,20000
    python benchmarks/feature_memory.py --detector=one_class

For every count a process of its own fits DeepSAD on the activations (32 x 32 x 64, a quarter of a
megabyte each) of that many images, half own and half real, 64 x 64 RGB; or the one-class detector
on that many own ones. One FISTA iteration, one epoch and a narrow encoder, or thirty principal
directions: what is measured is memory, which the first three do not change. Prints a JSON
line per count: bytes that all features together take, and the peak of the process above what it had
once the images and the library were there.
"""

import json
import os
import resource
import subprocess
import sys

import jax
import numpy as np
from absl import app, flags

from flipad_jax import FinalLayer, linops
from flipad_jax.detection import attributor
from flipad_jax.detection.attributor import AttributorConfig
from flipad_jax.detection.deepsad import DeepSADConfig
from flipad_jax.detection.one_class import OneClassConfig

_COUNTS = flags.DEFINE_list("counts", ["2000", "20000"], "Images, own and real ones together.")
_DETECTOR = flags.DEFINE_enum("detector", "deepsad", ["deepsad", "one_class"], "What is fitted.")
_COUNT = flags.DEFINE_integer("count", None, "Measure this one, in this process.", lower_bound=200)

MIB = 2**20


def peak():
    """Bytes of memory that the process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(count):
    """Fit once; the figures."""
    draw = np.random.default_rng(0)
    kernel = 0.05 * draw.standard_normal((4, 4, 64, 3), np.float32)
    layer = FinalLayer(linops.conv_transpose(kernel, (32, 32, 64), strides=2, padding=1))
    z_bar = np.abs(0.1 * draw.standard_normal((32, 32, 64), np.float32))
    alone = _DETECTOR.value == "one_class"
    own = draw.integers(0, 256, (count if alone else count // 2, 64, 64, 3), dtype=np.uint8)
    real = None if alone else draw.integers(0, 256, own.shape, dtype=np.uint8)
    before = peak()
    config = AttributorConfig(
        detector=_DETECTOR.value,
        max_iters=1,
        check_untouched=False,
        deepsad=DeepSADConfig(widths=(8,), rep_dim=8, epochs=1),
        one_class=OneClassConfig(num_components=30),
    )
    attributor.fit(layer, z_bar, own, real, rng=jax.random.key(0), config=config)
    features = count * 32 * 32 * 64 * 4
    return {
        "images": count,
        "features_mib": round(features / MIB),
        "peak_mib": round(peak() / MIB),
        "peak_above_images_mib": round((peak() - before) / MIB),
    }


def main(argv):
    """A process per count, so that each has a peak of its own."""
    del argv
    if _COUNT.value is not None:
        print(json.dumps(measure(_COUNT.value)), flush=True)
        return
    for count in _COUNTS.value:
        command = [sys.executable, os.path.abspath(__file__), f"--count={count}"]
        command.append(f"--detector={_DETECTOR.value}")
        subprocess.run(command, check=True)


if __name__ == "__main__":
    app.run(main)
