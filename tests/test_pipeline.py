"""Batches of sets that do not fit in memory, read from the real formats."""

import collections
import io

import numpy as np
import pytest
from image_files import random_images
from PIL import Image
from tfds_sets import encoded, grey, prepare, real_features

from flipad_jax import data, pipeline

NUM_RECORDS = 42
BAD = (5, 17, 30)


def shard_order(stream, num_records):
    """(records passed, number in the picture) until every record of an epoch was passed."""
    seen = []
    while stream.position < num_records:
        batch = next(stream)
        assert len(batch) == 1
        seen.append((stream.position, int(batch[0, 0, 0, 0])))
    return [pair for pair in seen if pair[0] <= num_records]


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """42 records with MNIST's features that are all trained on; three of them are no images."""
    folder = tmp_path_factory.mktemp("tfds")
    examples = [{"image": encoded(grey(i)), "label": i % 10} for i in range(NUM_RECORDS)]
    for i in BAD:
        examples[i]["image"] = b"nonsense"
    some = [{"image": encoded(grey(200)), "label": 0}]
    features = real_features("mnist")
    prepare(folder, "mnist", features, {"train": examples, "validation": some, "test": some})
    return folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The same without the bad ones, and with a split that must be cut out of train."""
    folder = tmp_path_factory.mktemp("clean")
    examples = [{"image": encoded(grey(i)), "label": i % 10} for i in range(45)]
    prepare(folder, "mnist", real_features("mnist"), {"train": examples, "test": examples[:1]})
    return folder


GOOD = sorted(set(range(NUM_RECORDS)) - set(BAD))


# --- which images, which pixels -------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [None, 32])
def test_an_epoch_holds_the_images_that_load_gives(clean, image_size):
    options = {"split": "train", "image_size": image_size, "data_dir": clean, "seed": 3}
    loaded = data.load("mnist", **options)
    stream = pipeline.stream("mnist", batch_size=len(loaded) // 4, **options)
    assert stream.image_shape == loaded.shape[1:] and stream.num_records == len(loaded) == 40
    epoch = np.concatenate([next(stream) for _ in range(4)])
    stream.close()
    assert epoch.dtype == np.uint8
    assert sorted(x.tobytes() for x in epoch) == sorted(x.tobytes() for x in loaded)
    assert (epoch != loaded).any()


def test_faces_are_cut_as_both_papers_cut_them(tmp_path):
    features = real_features("celeb_a")
    rng = np.random.default_rng(0)
    others = {key: features[key] for key in features if key != "image"}
    blank = {key: {inner: 0 for inner in others[key]} for key in others}
    jpegs = [
        encoded(
            Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).resize((178, 218)), "JPEG"
        )
        for _ in range(2)
    ]
    examples = [{"image": jpeg, **blank} for jpeg in jpegs]
    prepare(tmp_path, "celeb_a", features, {split: examples for split in data.SPLITS})
    photos = [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs]
    bilinear = Image.Resampling.BILINEAR
    wanted = {
        # [P1]: the shorter side to 64, then the middle; of 78 rows, 7 go at the top.
        ("celeb_a", 64): [np.asarray(p.resize((64, 78), bilinear))[7:71] for p in photos],
        # [P2]: 128 x 128 around column 89 and row 121, then to 64.
        ("celeb_a@cropped", None): [np.asarray(p)[57:185, 25:153] for p in photos],
        ("celeb_a@cropped", 64): [
            np.asarray(Image.fromarray(np.asarray(p)[57:185, 25:153]).resize((64, 64), bilinear))
            for p in photos
        ],
    }
    for (name, image_size), images in wanted.items():
        options = {"split": "test", "image_size": image_size, "data_dir": tmp_path}
        stream = pipeline.stream(name, batch_size=2, **options)
        for found in (next(stream), data.load(name, **options)):
            assert sorted(x.tobytes() for x in found) == sorted(x.tobytes() for x in images)
        stream.close()
    with pytest.raises(ValueError, match="unknown crop celeb_a@face; there is celeb_a@cropped"):
        data.load("celeb_a@face", split="test", data_dir=tmp_path)


def test_a_folder_is_streamed_as_it_is_loaded(tmp_path, caplog):
    images = random_images(12, 8, 8, 3)
    data.write_images(tmp_path / "a", images)
    (tmp_path / "a" / "b.png").write_bytes(b"nonsense")
    data.write_images(tmp_path / "a" / "large", random_images(1, 9, 9, 3))
    loaded = data.load(tmp_path / "a", split="train")
    stream = pipeline.stream(tmp_path / "a", batch_size=3)
    assert stream.num_records == 14 * 8 // 10 == 11
    seen = np.concatenate([next(stream) for _ in range(len(loaded) // 3 + 1)])[: len(loaded)]
    stream.close()
    assert sorted(x.tobytes() for x in seen) == sorted(x.tobytes() for x in loaded)
    assert "left out" in caplog.text


# --- each record once -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_hosts", [1, 2, 3])
def test_every_record_once_per_epoch_over_hosts_also_after_a_kill(mnist, num_hosts):
    """Batches of one image per host, as then a host can be read to the very end of its epoch."""
    per_host = NUM_RECORDS // num_hosts
    for epoch in (1, 2):
        counts = collections.Counter()
        for host in range(num_hosts):
            options = {
                "batch_size": num_hosts,
                "data_dir": mnist,
                "process_index": host,
                "process_count": num_hosts,
                "seed": 4,
            }
            killed = pipeline.stream("mnist", **options)
            whole = shard_order(killed, epoch * per_host)
            # One that went on after its last checkpoint, and whose work since then is lost.
            saved = whole[len(whole) // 2][0]
            resumed = pipeline.stream("mnist", **options)
            resumed.position = saved
            rest = shard_order(resumed, epoch * per_host)
            killed.close()
            resumed.close()
            assert [pair for pair in whole if pair[0] > saved] == rest
            counts.update(number for _, number in whole)
        assert counts == {number: epoch for number in GOOD}


def test_hosts_together_read_what_one_would(clean):
    options = {"batch_size": 12, "data_dir": clean, "seed": 1}
    alone = pipeline.stream("mnist", **options)
    wanted = [next(alone) for _ in range(9)]
    alone.close()
    for num_hosts in (2, 3):
        hosts = [
            pipeline.stream("mnist", process_index=i, process_count=num_hosts, **options)
            for i in range(num_hosts)
        ]
        for batch in wanted:
            np.testing.assert_array_equal(np.concatenate([next(host) for host in hosts]), batch)
        assert [host.position for host in hosts] == [9 * 12 // num_hosts] * num_hosts
        for host in hosts:
            host.close()


def test_epochs_and_seeds_have_orders_of_their_own(clean):
    def epochs(**options):
        stream = pipeline.stream("mnist", batch_size=20, data_dir=clean, **options)
        numbers = [next(stream)[:, 0, 0, 0].tolist() for _ in range(4)]
        stream.close()
        return numbers[0] + numbers[1], numbers[2] + numbers[3]

    first, second = epochs(seed=2)
    assert first != second and sorted(first) == sorted(second) and len(set(first)) == 40
    assert epochs(seed=2, num_workers=1, prefetch=1) == (first, second)
    assert epochs(seed=2, num_workers=7, prefetch=3) == (first, second)
    assert epochs(seed=3)[0] != first


# --- what is bad or not there ---------------------------------------------------------------------


def test_bad_records_are_left_out_and_told_once(mnist, caplog):
    stream = pipeline.stream("mnist", batch_size=13, data_dir=mnist)
    numbers = np.concatenate([next(stream)[:, 0, 0, 0] for _ in range(9)])
    stream.close()
    # Three epochs of 39 usable images: nothing is missing and nothing comes too often.
    assert [sorted(numbers[i : i + 39].tolist()) for i in (0, 39, 78)] == [GOOD] * 3
    assert caplog.text.count("left out") == 3 and caplog.text.count("no known format") == 3


def test_a_damaged_record_is_left_out_and_a_missing_file_stops(tmp_path, caplog):
    examples = [{"image": encoded(grey(i)), "label": 0} for i in range(30)]
    folder = prepare(tmp_path, "mnist", real_features("mnist"), {"test": examples})
    file = next(folder.glob("*array_record*"))
    content = bytearray(file.read_bytes())
    content[3000] ^= 255  # inside the data of one record
    file.write_bytes(content)
    options = {"split": "test", "data_dir": tmp_path}
    loaded = data.load("mnist", **options)
    stream = pipeline.stream("mnist", batch_size=29, **options)
    found = next(stream)
    assert sorted(x.tobytes() for x in found) == sorted(x.tobytes() for x in loaded)
    assert len(set(loaded[:, 0, 0, 0].tolist())) == 29
    assert caplog.text.count("damaged: Corrupted Riegeli/records") == 2
    stream.close()
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read, prepare it once more"):
        pipeline.stream("mnist", batch_size=4, **options)


def test_streams_that_cannot_be(mnist, tmp_path):
    def opened(name="mnist", **options):
        return pipeline.stream(name, **{"batch_size": 4, "data_dir": mnist, **options})

    for options, message in (
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"process_count": 3}, "number of processes divides"),
        ({"process_index": 1}, "process 1 of 1"),
        ({"seed": -1}, "seed must be a non-negative integer"),
        ({"num_images": 43}, "has 42 records, 43 were asked for"),
        ({"batch_size": 43}, "fewer than one batch of 43"),
        ({"split": "rest"}, "unknown split"),
        ({"name": "digits"}, "digits is read into memory as a whole"),
        ({"name": "mnits"}, "unknown image set 'mnits'"),
        ({"name": "celeb_a"}, "tfds build celeb_a --file_format=array_record"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(**options)
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="none of the 3 image files"):
        opened(tmp_path, batch_size=1)
    useless = [{"image": b"nonsense", "label": 0}] * 4
    prepare(tmp_path, "mnist", real_features("mnist"), {"test": useless})
    with pytest.raises(ValueError, match="has no usable image among its 4 records"):
        opened(data_dir=tmp_path, split="test")
