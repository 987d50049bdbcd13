"""Altered copies: what each alteration does, and that copies depend on nothing but their index."""

import io

import numpy as np
import pytest
from PIL import Image

from flipad_jax import perturbations
from flipad_jax.perturbations import alterations


def photographs(num, shape=(24, 24, 3), seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (num, 6, 6, shape[2]), dtype=np.uint8)
    return np.repeat(np.repeat(small, shape[0] // 6, 1), shape[1] // 6, 2)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_copy_depends_on_its_index_only(channels):
    images = photographs(5, (24, 18, channels))
    copies = perturbations.alter(images, 3, 40)
    assert copies.shape == (40, 24, 18, channels) and copies.dtype == np.uint8
    np.testing.assert_array_equal(perturbations.alter(images, 3, 12), copies[:12])
    np.testing.assert_array_equal(perturbations.alter(images, 3, 7, first=20), copies[20:27])
    assert np.any(perturbations.alter(images, 4, 40) != copies)
    assert perturbations.alter(images, 3, 0).shape == (0, 24, 18, channels)
    own = images[np.arange(40) % 5]
    assert np.mean([np.any(copy != image) for copy, image in zip(copies, own)]) > 0.9
    # Nobody would see it: what is moved by a pixel or turned aside, grey levels hardly change.
    assert np.median(np.abs(copies - own.astype(int)).mean((1, 2, 3))) < 40


def test_all_alterations_take_turns(monkeypatch):
    names = [f.__name__ for f in (*alterations._ANY, *alterations._OF_PICTURES)]
    seen = []
    for group in ("_ANY", "_OF_PICTURES"):
        wrapped = tuple(
            lambda image, draw, f=f: seen.append(f.__name__) or f(image, draw)
            for f in getattr(alterations, group)
        )
        monkeypatch.setattr(alterations, group, wrapped)
    perturbations.alter(photographs(2), 0, 700)
    for name in names:
        assert 60 < seen.count(name) < 140, (name, seen.count(name))
    seen.clear()
    perturbations.alter(photographs(2, (24, 24, 2)), 0, 100)
    assert set(seen) == set(names[:4])  # those that need no codec


class Draw:
    """A stand-in for a generator that gives what the test wants."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def uniform(self, low, high, size=None):
        number = self.numbers.pop(0)
        assert np.all(np.asarray(number) >= low) and np.all(np.asarray(number) <= high)
        return number

    def integers(self, low, high=None):
        return self.numbers.pop(0)

    def random(self):
        return self.numbers.pop(0)

    def standard_normal(self, shape):
        return np.ones(shape)


def test_what_each_does_to_one_image():
    image = photographs(1)[0]
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=83)
    np.testing.assert_array_equal(alterations._jpeg(image, Draw(83)), np.asarray(Image.open(file)))
    np.testing.assert_allclose(alterations._noise(image, Draw(2.5)), image + 2.5)
    # By a whole pixel the resampling is exact; what comes in from outside is black.
    moved = alterations._shift(image, Draw((1.0, 0.0)))
    np.testing.assert_array_equal(moved[:, :-1], image[:, 1:])
    half = alterations._shift(image, Draw((0.5, 0.0)))[8:16, 8:16].astype(float)
    between = (image[8:16, 8:16].astype(float) + image[8:16, 9:17]) / 2
    flat = np.abs(image[8:16, 8:16].astype(float) - image[8:16, 9:17]) == 0
    assert np.abs(half - between)[flat].mean() < 12
    np.testing.assert_allclose(
        alterations._contrast(image, Draw(0.9, -4.0)), 127.5 + (image - 127.5) * 0.9 - 4
    )
    np.testing.assert_array_equal(alterations._mirror(image, Draw(0.7)), image[:, ::-1])
    np.testing.assert_array_equal(alterations._mirror(image, Draw(0.2)), np.rot90(image))
    np.testing.assert_array_equal(alterations._mirror(image[:20], Draw(0.2)), image[:20, ::-1])
    np.testing.assert_array_equal(alterations._roll(image, Draw(2)), np.roll(image, (1, 1), (0, 1)))
    assert alterations._resize(image, Draw(0.8)).shape == image.shape
    np.testing.assert_array_equal(alterations._resize(image, Draw(1.0)), image)


def test_mistakes_are_refused():
    images = photographs(2)
    for arguments in (
        (images / 255.0, 0, 4),
        (images[:0], 0, 4),
        (images, -1, 4),
        (images, 0, -4),
        (images[0], 0, 4),
    ):
        with pytest.raises(ValueError, match="alter|images"):
            perturbations.alter(*arguments)
