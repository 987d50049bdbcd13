"""Reading faces from ArrayRecord, alone and while a GAN trains on them.

    python benchmarks/pipeline.py
    python benchmarks/pipeline.py --families=wgan_gp --widths=small --batch_size=64
    python benchmarks/pipeline.py --dataset=celeb_a --data_dir=FOLDER      # a set of one's own

Without --dataset it writes a set with CelebA's features to a temporary folder: JPEGs of 178 x 218
pixels and 7 to 8 kB each, as CelebA has. Prints a JSON line for

*   reading alone: images per second that come out of `pipeline.stream`, decoded, resized and cut,
    by the number of threads;
*   training at 64 x 64: the share of the time in which the device had nothing to do because a batch
    was not there (`training.Report.waiting`), and seconds per step from the stream and from an
    array on the device. On a CPU the threads that decode and the device share the cores, so the
    ratio of the two is what a stream costs there; on an accelerator the share of waiting is.

All is taken after warm-up (compiled, buffers full); what is timed ends with a look at the losses,
which waits for the device. The two kinds of training take turns.
"""

import contextlib
import io
import json
import os
import tempfile
import time

import jax
import numpy as np
from absl import app, flags
from PIL import Image

from flipad_jax import data, pipeline
from flipad_jax.generators import training, zoo

_DATASET = flags.DEFINE_string("dataset", "", "A TFDS name or a folder; one is written if empty.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Where TFDS sets lie; its default if empty.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 2048, "Of the set that is written.", lower_bound=1)
_SIZE = flags.DEFINE_integer("size", 64, "Side of the images.", lower_bound=8)
_THREADS = flags.DEFINE_list("threads", ["1", "2", "4"], "Threads that read, for reading alone.")
_READ = flags.DEFINE_integer("read", 4096, "Images that are read for a rate.", lower_bound=1)
_FAMILIES = flags.DEFINE_list("families", ["dcgan", "wgan_gp"], "Of zoo.FAMILIES; may be empty.")
_WIDTHS = flags.DEFINE_enum("widths", "paper", ["paper", "small"], "Of their networks.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images in a batch.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 4, "Timed steps between two looks.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed looks of each kind.", lower_bound=1)

# Networks whose steps are short, so that images must come quickly; of sides of 64.
SMALL = {"features": (128, 64, 64, 64), "discriminator_features": (64, 64, 64, 128)}


def write_faces(folder, num_images):
    """A train split with CelebA's features, prepared as `tfds build` does."""
    import tensorflow_datasets as tfds

    features = tfds.builder("celeb_a", data_dir="/nonexistent").info.features
    others = {key: features[key] for key in features if key != "image"}
    blank = {key: {inner: 0 for inner in others[key]} for key in others}

    def photo(number):
        """Shapes of all sizes under a little noise, which compress about as well as faces."""
        rng = np.random.default_rng(number)
        image = np.zeros((218, 178, 3))
        for side in (3, 9, 27, 81):
            coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
            image += np.asarray(coarse.resize((178, 218), Image.Resampling.BICUBIC)) / side
        image = 255 * (image - image.min()) / np.ptp(image) + rng.normal(0, 2, image.shape)
        file = io.BytesIO()
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        return file.getvalue()

    class Faces(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "celeb_a"
        VERSION = tfds.core.Version("2.0.1")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            def examples():
                for i in range(num_images):
                    yield i, {"image": photo(i), **blank}

            return {"train": examples()}

        def _generate_examples(self):
            raise AssertionError

    tfds.disable_progress_bar()
    Faces(data_dir=folder).download_and_prepare(file_format="array_record")


def say(**line):
    """A JSON line, with what the machine was."""
    print(json.dumps({**line, "cores": len(os.sched_getaffinity(0))}), flush=True)


def reading(options):
    """Images per second, by the number of threads."""
    for threads in map(int, _THREADS.value):
        with contextlib.closing(pipeline.stream(num_workers=threads, **options)) as stream:
            for _ in range(16):  # the buffer is full and then taken from
                next(stream)
            start, processor = time.perf_counter(), time.process_time()
            count = -(-_READ.value // stream.rows)
            for _ in range(count):
                next(stream)
            seconds = time.perf_counter() - start
            processor = time.process_time() - processor
        images = count * stream.rows
        say(
            what="reading",
            threads=threads,
            images_per_second=round(images / seconds, 1),
            processor_ms_per_image=round(1000 * processor / images, 3),
            image_size=stream.image_shape,
        )


def train(gan, images, num_steps, reports):
    """Training under a clock: seconds and share of waiting, by look."""
    start = time.perf_counter()

    def progress(step, report):
        nonlocal start
        now = time.perf_counter()
        reports.append(((now - start) / _STEPS.value, float(report.waiting)))
        start = time.perf_counter()

    size = {} if isinstance(images, pipeline.Stream) else {"batch_size": _BATCH_SIZE.value}
    training.train(
        gan,
        images,
        seeds=(0,),
        num_steps=num_steps,
        report_every=_STEPS.value,
        progress=progress,
        **size,
    )


def trainings(options):
    """Share of waiting, and seconds per step from a stream and from an array."""
    array = data.load(
        options["name"],
        split="train",
        image_size=options["image_size"],
        num_images=256,
        exact=False,
        data_dir=options["data_dir"],
    )
    for family in _FAMILIES.value:
        widths = {} if _WIDTHS.value == "paper" else SMALL
        gan = zoo.make(family, array.shape[1:], **widths)
        found = {"stream": [], "array": []}
        with contextlib.closing(pipeline.stream(**options)) as stream:
            for _ in range(_REPEATS.value):
                for kind, images in (("stream", stream), ("array", array)):
                    reports = []
                    # The first look of every turn is warm-up: the very first one compiles. The last
                    # step fetches nothing for a next one, so it is beyond what is timed.
                    train(gan, images, 2 * _STEPS.value + 1, reports)
                    found[kind].append(reports[1])
        seconds = {kind: np.median([s for s, _ in values]) for kind, values in found.items()}
        total = sum(seconds for seconds, _ in found["stream"])
        say(
            what="training",
            family=family,
            widths=_WIDTHS.value,
            batch_size=_BATCH_SIZE.value,
            batches_per_step=gan.discriminator_steps,
            image_size=array.shape[1:],
            waiting=round(sum(s * share for s, share in found["stream"]) / total, 5),
            worst_waiting=round(max(share for _, share in found["stream"]), 5),
            seconds_per_step={kind: round(value, 4) for kind, value in seconds.items()},
            stream_over_array=round(seconds["stream"] / seconds["array"], 3),
            device=jax.devices()[0].device_kind,
        )


def main(argv):
    """Measure what was asked for."""
    if len(argv) > 1 or not set(_FAMILIES.value) <= set(zoo.FAMILIES):
        raise app.UsageError(f"unknown: {argv[1:] or _FAMILIES.value}")
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "name": _DATASET.value or "celeb_a",
            "data_dir": _DATA_DIR.value or None,
            "image_size": _SIZE.value,
            "batch_size": _BATCH_SIZE.value,
        }
        if not _DATASET.value:
            write_faces(folder, _NUM_IMAGES.value)
            options["data_dir"] = folder
        reading(options)
        trainings(options)


if __name__ == "__main__":
    app.run(main)
