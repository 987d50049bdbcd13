"""Scoring a corpus: peak memory, time, and the share of it spent waiting for records.

    python benchmarks/corpora.py
    python benchmarks/corpora.py --counts=1000,10000
    python benchmarks/corpora.py --image_size=64 --counts=1000 --num_own=800

Images of a zoo generator (32 x 32, grey) are made and written as PNG into ArrayRecord files, as
many as each count says; with --image_size=64, those of an untrained DCGAN (colour, a narrow one):
noise, which PNG takes longest to decode. A one-class attributor fitted to others scores them by
`corpora.score_shards`, with shards and manifest on disk, in a process of its own per count.

Prints a JSON line per count: peak memory of the process, seconds by the clock and of processor
time, of these the seconds until the first block was scored (compiling), the rate after it, and the
share of the time in which scoring waited for records. Processor time hardly notices other work on
the machine; the clock does.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from absl import app, flags
from PIL import Image

from flipad_jax import corpora, fit, load, records, save
from flipad_jax.detection.attributor import AttributorConfig
from flipad_jax.generators import sampling, training, zoo

_COUNTS = flags.DEFINE_list("counts", ["1000", "100000"], "Records of the corpora.")
_SIZE = flags.DEFINE_enum("image_size", "32", ["32", "64"], "Side of the images.")
_SHARD = flags.DEFINE_integer("shard_size", 8192, "Records per shard.", lower_bound=1)
_NUM_OWN = flags.DEFINE_integer("num_own", 2000, "Images that the attributor is fitted to.")
_FOLDER = flags.DEFINE_string("folder", None, "Where corpora are kept; a temporary folder else.")
_MEASURE = flags.DEFINE_string("measure", None, "Score this file, in this process.")

_BATCH = 250


def generator():
    """The model whose images are scored."""
    if _SIZE.value == "32":
        return zoo.load("digits_dcgan_0")
    gan = zoo.make("dcgan", (64, 64, 3), features=(64, 64, 64, 64))
    return sampling.from_state(gan, training.init(gan, jax.random.key(0)))


def write(model, path, count):
    """`count` images as an ArrayRecord file, a batch in memory at a time."""
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for start in range(0, count, _BATCH):
        num = min(_BATCH, count - start)
        for image in sampling.generate(model, jax.random.key(1), num, first=start):
            file = io.BytesIO()
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
            writer.write(file.getvalue())
    writer.close()


def peak_mib():
    """Memory that this process had at most. `getrusage` would count that of the parent as well: it
    remembers the moment between fork and exec."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return round(int(line.split()[1]) / 2**10, 1)


def measure(folder, path):
    """Score a file; the figures."""
    attributor = load(folder / "attributor")
    start, processor = time.monotonic(), time.process_time()
    source = records.open_source(path)
    with tempfile.TemporaryDirectory(dir=folder) as scores:
        output = corpora.open_output(scores, source, folder / "attributor", shard_size=_SHARD.value)
        marks = []

        def progress(count):
            marks.append((count, time.monotonic(), time.process_time()))

        clock = corpora.score_shards(
            attributor, source, output, range(output.num_shards), progress=progress
        )
        manifest = corpora.finish(output)
    assert manifest["complete"] and clock.records == len(source)
    rest = clock.records - marks[0][0]
    return {
        "records": clock.records,
        "image_size": attributor.image_shape[0],
        "peak_mib": peak_mib(),
        "seconds": round(time.monotonic() - start, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "seconds_to_first_block": round(clock.first, 2),
        "records_per_second_after": round(rest / (marks[-1][1] - marks[0][1]), 1),
        "processor_ms_per_record_after": round(1e3 * (marks[-1][2] - marks[0][2]) / rest, 3),
        "waiting_share": round(clock.waiting / clock.seconds, 5),
        "ours": sum(shard["ours"] for shard in manifest["shards"]),
    }


def main(argv):
    """Prepare what is missing, then a process per count, so that each has a peak of its own."""
    del argv
    if _MEASURE.value is not None:
        corpora.one_heap()  # as --experiment=score does
        path = Path(_MEASURE.value)
        print(json.dumps(measure(path.parent, path)), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(_FOLDER.value or temporary) / _SIZE.value
        folder.mkdir(parents=True, exist_ok=True)
        model = generator()
        if not (folder / "attributor").exists():
            own = sampling.generate(model, jax.random.key(4), _NUM_OWN.value)
            z_bar = sampling.mean_activation(model, jax.random.key(2))
            fitted = fit(
                sampling.final_layer(model),
                z_bar,
                own,
                rng=jax.random.key(3),
                config=AttributorConfig(),
            )
            save(fitted, folder / "attributor")
        for count in map(int, _COUNTS.value):
            path = folder / f"{count}.array_record"
            if not path.exists():
                write(model, path, count)
            command = [sys.executable, os.path.abspath(__file__), f"--measure={path}"]
            command += [f"--image_size={_SIZE.value}", f"--shard_size={_SHARD.value}"]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    app.run(main)
