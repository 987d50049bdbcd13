"""IDX folders: files written by the format's own rules, read as a user's data set."""

import gzip
import struct

import numpy as np
import pytest

from flipad_jax import data


def write(path, images, *, magic=0x803, count=None, opened=open):
    with opened(path, "wb") as file:
        count = len(images) if count is None else count
        file.write(struct.pack(">4I", magic, count, *images.shape[1:]) + images.tobytes())


@pytest.fixture(name="folder")
def _folder(tmp_path):
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (90, 6, 6)), rng.integers(0, 256, (20, 6, 6))
    write(tmp_path / "train-images-idx3-ubyte", train.astype(np.uint8))
    write(tmp_path / "t10k-images-idx3-ubyte.gz", test.astype(np.uint8), opened=gzip.open)
    return tmp_path, train, test


def rows(images):
    return sorted(map(bytes, images))


def test_splits_are_disjoint_and_complete(folder):
    path, train, test = folder
    found = {split: data.load(str(path), split=split) for split in data.SPLITS}
    assert [len(found[split]) for split in data.SPLITS] == [80, 10, 20]
    assert found["train"].shape[1:] == (6, 6, 1) and found["train"].dtype == np.uint8
    both = np.concatenate([found["train"], found["validation"]])
    assert rows(both) == rows(train.astype(np.uint8))
    assert rows(found["test"]) == rows(test.astype(np.uint8))
    other = data.load(str(path), split="train", seed=1)
    assert rows(other) != rows(found["train"])


def test_padding_and_numbers_of_images(folder):
    path = str(folder[0])
    small = data.load(path, split="train")
    padded = data.load(path, split="train", image_size=9, num_images=5)
    np.testing.assert_array_equal(padded[:, 1:7, 1:7], small[:5])
    assert padded.shape == (5, 9, 9, 1) and padded.sum() == small[:5].sum()
    assert len(data.load(path, split="test", num_images=50, exact=False)) == 20


def test_mistakes_are_named(folder, tmp_path):
    path = folder[0]
    with pytest.raises(ValueError, match="has 20 images, 50"):
        data.load(str(path), split="test", num_images=50)
    with pytest.raises(ValueError, match="image_size=4 is too small"):
        data.load(str(path), split="test", image_size=4)
    images = np.zeros((3, 2, 2), np.uint8)
    file = path / "train-images-idx3-ubyte"
    for options, message in (
        ({"magic": 0x801}, "no IDX file"),
        ({"count": 4}, "fewer bytes"),
        ({"count": 2}, "more bytes"),
        ({"count": 0}, "promises 0 images"),
        ({"count": 2**32 - 1}, "promises"),
    ):
        write(file, images, **options)
        with pytest.raises(ValueError, match=message):
            data.load(str(path), split="train")
    file.unlink()
    with pytest.raises(ValueError, match="has no train-images"):
        data.load(str(path), split="train")
    (path / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bgarbage")
    with pytest.raises(ValueError, match="cannot be read"):
        data.load(str(path), split="train")
