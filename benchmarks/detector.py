"""An attributor: seconds to fit and milliseconds to score, part by part, beside FLIPAD.

    python benchmarks/detector.py
    python benchmarks/detector.py --num_images=10000 --contenders=one_class

Prints a JSON line per contender: seconds of the fit to so many own images of a generator of the
zoo (inversion included; FLIPAD learns from as many real ones beside them) for the first time, which
compiles, and the fastest of the repeats, with the seconds of every part of that one; milliseconds
per scored image, by the clock and of processor time; and what it is worth: the mean accuracy over
real images and another seed at fnr 0.005, and the share of own images that it loses. The contenders
take turns in one process.
"""

import json
import time

import jax
import numpy as np
from absl import app, flags

from flipad_jax import data, zoo
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection import calibration
from flipad_jax.detection.attributor import AttributorConfig
from flipad_jax.detection.deepsad import DeepSADConfig
from flipad_jax.generators import sampling

_NUM_IMAGES = flags.DEFINE_integer("num_images", 2000, "Own images.", lower_bound=100)
_NUM_SCORED = flags.DEFINE_integer("num_scored", 500, "Images of every source.", lower_bound=20)
_REPEATS = flags.DEFINE_integer("repeats", 2, "Fits of each, the first included.", lower_bound=1)
_GENERATOR = flags.DEFINE_string("generator", "digits_dcgan_0", "Ours, of the zoo.")
_RIVAL = flags.DEFINE_string("rival", "digits_dcgan_1", "Another seed, of the zoo.")
_CONTENDERS = flags.DEFINE_list("contenders", "one_class,flipad", "Which of these two.")

CONTENDERS = {
    "one_class": AttributorConfig(),
    # The encoder and epochs of the tables in WORKSPACE.md; the paper's take hours on a CPU.
    "flipad": AttributorConfig(
        detector="deepsad", deepsad=DeepSADConfig(widths=(32, 64, 32), epochs=6)
    ),
}


class Parts:
    """A progress callback that adds up the time between calls under the part that was named."""

    def __init__(self):
        self.seconds = {}
        self._last = time.perf_counter()

    def __call__(self, what, done, total):
        """What was just done took the time since the last call."""
        what = what.removesuffix(", steps").removesuffix(", epochs")
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._last
        self._last = now


def main(argv):
    """Fit and score."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    unknown = sorted(set(_CONTENDERS.value) - set(CONTENDERS))
    if unknown:
        raise app.UsageError(f"--contenders={','.join(unknown)}: there are {', '.join(CONTENDERS)}")
    ours, rival = zoo.load(_GENERATOR.value), zoo.load(_RIVAL.value)
    record = zoo.record(_GENERATOR.value)
    own = sampling.generate(ours, jax.random.key(1), _NUM_IMAGES.value + _NUM_SCORED.value)
    own, held_out = own[: _NUM_IMAGES.value], own[_NUM_IMAGES.value :]

    def real_images(split, count):
        return data.load(
            record["dataset"],
            split=split,
            image_size=own.shape[1],
            num_images=count,
            exact=False,
            seed=record["data_seed"],
        )

    real = real_images("train", _NUM_IMAGES.value)
    sources = {
        "real": real_images("test", _NUM_SCORED.value),
        "other_seed": sampling.generate(rival, jax.random.key(2), _NUM_SCORED.value),
    }
    layer = sampling.final_layer(ours)
    z_bar = sampling.mean_activation(ours, jax.random.key(3), 10_000)
    fits = {name: [] for name in _CONTENDERS.value}
    scored = {name: [] for name in _CONTENDERS.value}
    found = {}
    for repeat in range(_REPEATS.value):
        for name in _CONTENDERS.value:
            config = CONTENDERS[name]
            learned = real if config.detector == "deepsad" else None
            parts, start = Parts(), time.perf_counter()
            fitted = attribution.fit(
                layer, z_bar, own, learned, rng=jax.random.key(4), config=config, progress=parts
            )
            fits[name].append((time.perf_counter() - start, parts.seconds))
            attribution.score(fitted, held_out)  # compiles
            start = time.perf_counter(), time.process_time()
            scores = attribution.score(fitted, held_out)
            times = time.perf_counter() - start[0], time.process_time() - start[1]
            scored[name].append([1e3 * seconds / len(held_out) for seconds in times])
            if repeat:
                continue
            threshold = calibration.threshold(fitted.calibration_scores, 0.005)
            lost = float(np.mean(scores > threshold))
            found[name] = {"achieved_fnr": lost}
            for source, images in sources.items():
                rejected = np.mean(attribution.score(fitted, images) > threshold)
                found[name][source] = round(float(rejected + 1 - lost) / 2, 4)
    for name in _CONTENDERS.value:
        quickest, parts = min(fits[name], key=lambda fit: fit[0])
        clock, processor = np.min(scored[name], axis=0)
        row = {
            "contender": name,
            "generator": _GENERATOR.value,
            "own_images": len(own),
            "fit_seconds_first": round(fits[name][0][0], 1),
            "fit_seconds": round(quickest, 1),
            "parts": {what: round(seconds, 1) for what, seconds in parts.items()},
            "score_ms_per_image": round(clock, 2),
            "score_processor_ms_per_image": round(processor, 2),
            "accuracy": found[name],
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app.run(main)
