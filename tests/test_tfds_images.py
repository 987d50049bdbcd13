"""Sets of TensorFlow Datasets, written as TFDS writes them and read as a user does."""

import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tfds_sets import encoded, grey, prepare, real_features

from flipad_jax import data, tfds_images

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """180 + 20 pictures with MNIST's features."""
    folder = tmp_path_factory.mktemp("tfds")
    splits = {"train": range(180), "test": range(180, 200)}
    examples = {
        split: [{"image": encoded(grey(i)), "label": i % 10} for i in numbers]
        for split, numbers in splits.items()
    }
    prepare(folder, "mnist", real_features("mnist"), examples)
    return folder


def numbers(images):
    return images[:, 0, 0, 0].tolist()


def test_pictures_come_as_they_were_stored(mnist):
    images = data.load("mnist", split="test", data_dir=mnist)
    assert images.shape == (20, 28, 28, 1) and images.dtype == np.uint8
    assert sorted(numbers(images)) == list(range(180, 200))
    for image in images:
        np.testing.assert_array_equal(image[..., 0], grey(image[0, 0, 0]))


def test_a_split_that_is_missing_is_cut_out_of_train(mnist):
    parts = {s: numbers(data.load("mnist", split=s, data_dir=mnist)) for s in data.SPLITS}
    assert [len(parts[s]) for s in data.SPLITS] == [160, 20, 20]
    assert sorted(parts["train"] + parts["validation"]) == list(range(180))
    assert set(parts["test"]) == set(range(180, 200))
    again = numbers(data.load("mnist", split="validation", data_dir=mnist))
    other = numbers(data.load("mnist", split="validation", data_dir=mnist, seed=1))
    assert again == parts["validation"] != other and set(again) != set(other)


def test_the_first_images_do_not_depend_on_how_many_there_are(mnist):
    every = data.load("mnist", split="train", data_dir=mnist)
    some = data.load("mnist", split="train", data_dir=mnist, num_images=70)
    np.testing.assert_array_equal(some, every[:70])
    assert numbers(some) != sorted(numbers(some))
    with pytest.raises(ValueError, match="train split of mnist has 160 images, 161 were asked for"):
        data.load("mnist", split="train", data_dir=mnist, num_images=161)
    for bound in (70, 160, 161):
        few = data.load("mnist", split="train", data_dir=mnist, num_images=bound, exact=False)
        np.testing.assert_array_equal(few, every[:bound])
    with pytest.raises(ValueError, match="num_images must be a positive integer, got 0"):
        data.load("mnist", split="train", data_dir=mnist, num_images=0, exact=False)


def test_only_what_is_asked_for_is_read(mnist, monkeypatch):
    decoded, decode = [], tfds_images.decode
    monkeypatch.setattr(
        tfds_images, "decode", lambda *arguments: decoded.append(1) or decode(*arguments)
    )
    for exact in (True, False):
        decoded.clear()
        data.load("mnist", split="train", data_dir=mnist, num_images=3, exact=exact)
        assert len(decoded) == 3


def triangle(image, size):
    """Pillow's bilinear filter by its definition: a triangle as wide as what it shrinks, in
    float64."""
    for axis in (0, 1):
        length = image.shape[axis]
        scale = length / size[axis]
        centres = (np.arange(size[axis]) + 0.5) * scale
        distance = np.abs(np.arange(length) + 0.5 - centres[:, None]) / max(scale, 1)
        weights = np.maximum(1 - distance, 0)
        weights /= weights.sum(axis=1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
    return image


def test_mnist_is_resized(mnist):
    images = data.load("mnist", split="test", data_dir=mnist, image_size=32)
    stored = data.load("mnist", split="test", data_dir=mnist)
    assert images.shape == (20, 32, 32, 1)
    for image, small in zip(images, stored):
        wanted = triangle(small[..., 0].astype(float), (32, 32))
        assert np.abs(image[..., 0] - wanted).max() <= 1  # two roundings to 8 bits


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Six photographs with CelebA's features, all three splits; and what Pillow decodes."""
    folder = tmp_path_factory.mktemp("faces")
    features = real_features("celeb_a")
    rng = np.random.default_rng(0)
    others = {key: features[key] for key in features if key != "image"}
    splits, decoded = {}, {}
    for split in data.SPLITS:
        splits[split] = []
        for _ in range(2):
            coarse = rng.integers(0, 256, (8, 7, 3), dtype=np.uint8)
            photo = Image.fromarray(coarse).resize((178, 218), Image.Resampling.BICUBIC)
            jpeg = encoded(photo, "JPEG", quality=90)
            decoded.setdefault(split, []).append(np.asarray(Image.open(io.BytesIO(jpeg))))
            example = {k: {inner: 0 for inner in others[k]} for k in others}
            splits[split].append({"image": jpeg, **example})
    prepare(folder, "celeb_a", features, splits)
    return folder, decoded


def test_photographs_are_decoded_by_pillow(faces):
    folder, decoded = faces
    for split in data.SPLITS:
        images = data.load("celeb_a", split=split, data_dir=folder)
        assert images.shape == (2, 218, 178, 3)
        assert sorted(x.tobytes() for x in images) == sorted(x.tobytes() for x in decoded[split])


def test_faces_are_resized_and_cut_as_the_published_code_does(faces):
    folder, _ = faces
    whole = data.load("celeb_a", split="train", data_dir=folder)
    images = data.load("celeb_a", split="train", data_dir=folder, image_size=64)
    assert images.shape == (2, 64, 64, 3)
    for image, photo in zip(images, whole):
        # torchvision: the longer side is int(64 * 218 / 178) = 78, and 7 rows go at the top.
        wanted = triangle(photo.astype(float), (78, 64))[7:71]
        assert np.abs(image - wanted).max() <= 1


def test_an_odd_rest_is_cut_as_torchvision_cuts_it():
    # round((h - size) / 2) of Python: 0.5 goes to 0 and 1.5 to 2.
    for rest, first in ((1, 0), (3, 2), (5, 2), (4, 2)):
        strip = Image.fromarray(np.arange(8 + rest, dtype=np.uint8)[:, None].repeat(8, axis=1))
        assert np.asarray(tfds_images._resized(strip, 8))[0, 0] == first


def test_a_set_of_train_alone_gives_all_three(tmp_path):
    """Pictures of many sizes; those that cannot be used are left out, with a reason."""
    rng = np.random.default_rng(0)

    def photo(height, width):
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)

    good = [encoded(photo(16 + i, 20)) for i in range(17)]
    bad = [b"nonsense", encoded(photo(20, 20)[:10]), encoded(Image.new("RGBA", (20, 20)))]
    bad[1] = bad[1][:-40]
    grey_one = encoded(np.full((20, 20), 77, np.uint8))
    examples = [{"image": x, "id": str(i)} for i, x in enumerate([*good, *bad, grey_one] * 2)]
    prepare(tmp_path, "lsun/bedroom", real_features("lsun/bedroom"), {"train": examples})

    def load(split, **options):
        return data.load("lsun/bedroom", split=split, data_dir=tmp_path, image_size=16, **options)

    parts = {split: load(split) for split in data.SPLITS}
    assert sum(map(len, parts.values())) == 36  # 6 of 42 cannot be used
    assert all(
        0 < 42 * share - len(parts[s]) <= 5.3 for s, share in zip(data.SPLITS, (0.8, 0.1, 0.1))
    )
    assert sum((x == 77).all() for images in parts.values() for x in images) == 2
    with pytest.raises(ValueError, match="usable images of 33, 33 were asked for"):
        load("train", num_images=33)
    np.testing.assert_array_equal(load("train", num_images=33, exact=False), parts["train"])
    with pytest.raises(ValueError, match="differ in size; give an image_size"):
        data.load("lsun/bedroom", split="train", data_dir=tmp_path)


def test_what_is_left_out_is_told(tmp_path, caplog):
    examples = [{"image": encoded(Image.new("LA", (28, 28))), "label": 0}]
    examples += [{"image": encoded(np.zeros((28, 28, 3), np.uint8)), "label": 1}]
    prepare(tmp_path, "mnist", real_features("mnist"), {"test": examples * 2})
    with pytest.raises(ValueError, match="0 usable images of 4, some were asked for"):
        data.load("mnist", split="test", data_dir=tmp_path)
    with pytest.raises(ValueError, match="0 usable images of 4, 9 were asked for"):
        data.load("mnist", split="test", data_dir=tmp_path, num_images=9, exact=False)
    text = caplog.text
    assert "left out 4 images" in text and "alpha channel" in text and "in colour" in text
    with pytest.raises(ValueError, match="has no train split, and none .* it has test"):
        data.load("mnist", split="train", data_dir=tmp_path)


def test_sets_without_pictures_of_ours_are_refused(tmp_path):
    image = tfds.features.Image(shape=(4, 4, 3))
    wide = tfds.features.Image(shape=(4, 4, 1), dtype=np.uint16, encoding_format="png")
    picture = encoded(np.zeros((4, 4, 3), np.uint8))
    for name, features, example, message in (
        ("words", {"text": tfds.features.Text()}, {"text": "a"}, "no image among .* text"),
        ("pair", {"a": image, "b": image}, {"a": picture, "b": picture}, "several images .a, b"),
        ("deep", {"image": wide}, {"image": picture}, r"uint16 \[4, 4, 1\]"),
    ):
        features = tfds.features.FeaturesDict(features)
        prepare(tmp_path, name, features, {"train": [example]})
        with pytest.raises(ValueError, match=message):
            data.load(name, split="train", data_dir=tmp_path)


# What is not there.


def test_a_set_that_is_not_prepared_is_told_with_the_command(tmp_path):
    with pytest.raises(ValueError) as error:
        data.load("lsun/bedroom", split="train", data_dir=tmp_path / "my data")
    text = str(error.value)
    assert "pip install 'flipad_jax[prepare]'" in text
    assert "tfds build lsun/bedroom --file_format=array_record" in text
    assert f"'--data_dir={tmp_path}/my data'" in text
    assert not (tmp_path / "my data").exists()


def test_the_command_of_the_error_is_one_that_tfds_has():
    source = Path(tfds.__file__).parent / "scripts" / "cli"
    options = (source / "cli_utils.py").read_text()
    assert "file_format: str" in options and "data_dir: epath.Path" in options
    assert (source / "build.py").exists()


@pytest.mark.parametrize(
    "name, words",
    [
        ("mnits", ["mnist"]),
        ("celeba", ["celeb_a"]),
        ("./mnist", ["no such folder"]),
        ("mnist; rm", ["no such folder"]),
    ],
)
def test_unknown_names_are_told_what_there_is(name, words):
    with pytest.raises(ValueError, match="unknown image set") as error:
        data.load(name, split="train")
    text = str(error.value)
    assert all(word in text for word in ["digits, photos", "folder", "TensorFlow Datasets", *words])


def test_records_without_random_access_are_refused(mnist, tmp_path):
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    for file in (mnist / "mnist" / "3.0.1").iterdir():
        text = file.read_bytes()
        if file.name == "dataset_info.json":
            text = json.dumps({**json.loads(text), "fileFormat": "tfrecord"}).encode()
        (folder / file.name).write_bytes(text)
    with pytest.raises(ValueError, match="holds mnist as tfrecord.*--file_format=array_record"):
        data.load("mnist", split="test", data_dir=tmp_path)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_damaged_set_is_told(tmp_path, damage):
    examples = [{"image": encoded(grey(i)), "label": 0} for i in range(3)]
    folder = prepare(tmp_path, "mnist", real_features("mnist"), {"test": examples})
    damage(next(folder.glob("*array_record*")))
    with pytest.raises(ValueError, match="cannot be read"):
        data.load("mnist", split="test", data_dir=tmp_path)


def python(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_neither_tensorflow_nor_opencv_is_needed(mnist):
    """Another process; other sets do not even import TFDS."""
    done = python(f"""
        import sys
        from flipad_jax import data

        data.load("digits", split="test")
        assert "tensorflow_datasets" not in sys.modules
        images = data.load("mnist", split="validation", image_size=64, data_dir={str(mnist)!r})
        assert images.shape == (20, 64, 64, 1)
        loaded = [name for name in ("tensorflow", "cv2", "jax") if name in sys.modules]
        assert not loaded, loaded
        """)
    assert done.returncode == 0, done.stderr


def test_the_default_folder_is_that_of_tfds(mnist):
    script = """
        from flipad_jax import data
        print(data.load("mnist", split="test", num_images=2).shape)
        """
    done = python(script, TFDS_DATA_DIR=str(mnist))
    assert done.stdout.strip() == "(2, 28, 28, 1)", done.stderr
