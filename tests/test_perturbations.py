"""Perturbations against torchvision's semantics written anew, PyTorch, and Pillow itself."""

import jax
import numpy as np
import pytest
from PIL import Image

from flipad_jax import perturbations


def pictures(num=3, h=21, w=26, c=3, seed=0):
    """Noise over a gradient: every grey level, and nothing symmetric."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, h * w * c).reshape(h, w, c)
    return (ramp + rng.uniform(0, 55, (num, h, w, c))).astype(np.uint8)


EDITS = {
    "blur": lambda images: perturbations.blur(images, 5),
    "crop": lambda images: perturbations.crop(images, 15),
    "noise": lambda images: perturbations.noise(images, jax.random.key(3), 0.05),
    "jpeg": lambda images: perturbations.jpeg(images, 70),
    "resize": lambda images: perturbations.resize(images, 0.6),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("c", [1, 3])
def test_what_an_image_becomes_depends_on_no_neighbour(name, c):
    images = pictures(70, 16, 18, c)  # more than a batch
    before = images.copy()
    edited = EDITS[name](images)
    assert edited.shape == images.shape and edited.dtype == np.uint8
    assert (edited != images).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(EDITS[name](images), edited)
    np.testing.assert_array_equal(EDITS[name](images[:5]), edited[:5])
    if name != "noise":  # there the place in the batch names the noise
        np.testing.assert_array_equal(EDITS[name](images[[66, 2]]), edited[[66, 2]])
    assert EDITS[name](images[:0]).shape == (0, 16, 18, c)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("kernel_size", [3, 5, 9])
def test_blur_is_torchvisions(kernel_size, c):
    torch = pytest.importorskip("torch")
    images = pictures(c=c)
    # torchvision.transforms.GaussianBlur: samples of the Gaussian, reflection without the border.
    half = (kernel_size - 1) / 2
    line = torch.exp(
        -0.5 * (torch.linspace(-half, half, kernel_size, dtype=torch.float64) / 3) ** 2
    )
    line = line / line.sum()
    kernel = (line[:, None] * line[None]).expand(c, 1, kernel_size, kernel_size)
    x = torch.tensor(images).permute(0, 3, 1, 2).double()
    x = torch.nn.functional.pad(x, [kernel_size // 2] * 4, mode="reflect")
    expected = torch.nn.functional.conv2d(x, kernel, groups=c).round().permute(0, 2, 3, 1)
    np.testing.assert_array_equal(perturbations.blur(images, kernel_size), expected.numpy())


def test_blur_of_one_pixel_changes_nothing():
    np.testing.assert_array_equal(perturbations.blur(pictures(), 1), pictures())


# Offsets by hand: (h - size) / 2 and (w - size) / 2, halves to the even number.
@pytest.mark.parametrize(
    "h, w, size, top, left",
    [(12, 12, 10, 1, 1), (9, 12, 6, 2, 3), (9, 13, 4, 2, 4), (8, 8, 5, 2, 2)],
)
def test_crop_is_centre_crop_and_bilinear_enlargement(h, w, size, top, left):
    torch = pytest.importorskip("torch")
    images = pictures(h=h, w=w)
    kept = torch.tensor(images[:, top : top + size, left : left + size]).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        kept.float(), (h, w), mode="bilinear", align_corners=False, antialias=True
    ).permute(0, 2, 3, 1)
    found = perturbations.crop(images, size).astype(float)
    # Pillow rounds after either axis.
    assert np.abs(found - expected.numpy()).max() <= 1.01


def test_a_crop_of_everything_changes_nothing():
    images = pictures(h=12, w=12)
    np.testing.assert_array_equal(perturbations.crop(images, 12), images)


@pytest.mark.parametrize("c", [1, 3])
def test_noise_has_the_key_of_its_index_and_the_spread_asked_for(c):
    images = np.full((70, 12, 15, c), 128, np.uint8)
    rng = jax.random.key(5)
    found = perturbations.noise(images, rng, 0.02)
    for i in (0, 1, 63, 64, 69):
        drawn = jax.random.normal(jax.random.fold_in(rng, i), (12, 15, c), np.float32)
        expected = 128 + np.rint(np.asarray(drawn, np.float32) * np.float32(0.02 * 255))
        np.testing.assert_array_equal(found[i], expected)
    changes = found.astype(float) - 128
    # Rounding adds a variance of 1/12; 12 600 values or more: 3 % is five standard errors.
    np.testing.assert_allclose(changes.std(), np.sqrt((0.02 * 255) ** 2 + 1 / 12), rtol=0.03)
    assert (perturbations.noise(images, jax.random.key(6), 0.02) != found).any()
    np.testing.assert_array_equal(perturbations.noise(images, rng, 0.0), images)


def test_noise_is_clipped_not_wrapped():
    images = np.stack([np.zeros((16, 16, 1)), np.full((16, 16, 1), 255)]).astype(np.uint8)
    found = perturbations.noise(images, jax.random.key(0), 0.1)
    assert found[0].max() < 150 and (found[0] == 0).mean() > 0.4
    assert found[1].min() > 105 and (found[1] == 255).mean() > 0.4


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("quality", [1, 60, 90, 100])
def test_jpeg_is_a_file_of_pillow_with_half_the_colour_resolution(quality, c, tmp_path):
    images = pictures(2, c=c)
    found = perturbations.jpeg(images, quality)
    for image, decoded in zip(images, found):
        path = tmp_path / "image.jpg"
        Image.fromarray(image.squeeze()).save(path, quality=quality, subsampling="4:2:0")
        np.testing.assert_array_equal(decoded.squeeze(), np.asarray(Image.open(path)))
        if c == 3 and quality > 1:  # the worst keeps no colour at all
            Image.fromarray(image).save(path, quality=quality, subsampling="4:4:4")
            assert (decoded != np.asarray(Image.open(path))).any()


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("factor, size", [(0.5, (13, 10)), (0.75, (20, 16)), (2.0, (52, 42))])
def test_resize_is_pillow_there_and_back(factor, size, method, c):
    images = pictures(2, h=21, w=26, c=c)
    filter_ = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[method]
    for image, found in zip(images, perturbations.resize(images, factor, method)):
        small = Image.fromarray(image.squeeze()).resize(size, filter_)
        expected = np.asarray(small.resize((26, 21), filter_))
        np.testing.assert_array_equal(found.squeeze(), expected)


def test_resize_keeps_a_pixel_at_least():
    images = pictures(1, h=16, w=16)
    found = perturbations.resize(images, 0.01)
    assert (found == found[:, :1, :1]).all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: perturbations.blur(x, 4), "odd"),
        (lambda x: perturbations.blur(x, -3), "odd"),
        (lambda x: perturbations.blur(x, 43), "21"),  # reflection would need 21 pixels beyond
        (lambda x: perturbations.crop(x, 0), "1 to 21"),
        (lambda x: perturbations.crop(x, 22), "1 to 21"),
        (lambda x: perturbations.noise(x, jax.random.key(0), -0.1), "std=-0.1"),
        (lambda x: perturbations.noise(x, jax.random.key(0), float("nan")), "std=nan"),
        (lambda x: perturbations.jpeg(x, 0), "1 to 100"),  # Pillow would take it for 75
        (lambda x: perturbations.jpeg(x, 101), "1 to 100"),
        (lambda x: perturbations.jpeg(x, 90.5), "whole"),
        (lambda x: perturbations.resize(x, 0.0), "factor=0.0"),
        (lambda x: perturbations.resize(x, float("inf")), "factor=inf"),
        (lambda x: perturbations.resize(x, 0.5, "nearest"), "bicubic"),
        (lambda x: perturbations.blur(x / np.float32(255), 3), "uint8"),
        (lambda x: perturbations.jpeg(x[..., :2], 90), "uint8"),
        (lambda x: perturbations.crop(x[0], 5), r"\[n, h, w, c\]"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(pictures())
    assert "\n" not in str(error.value)
