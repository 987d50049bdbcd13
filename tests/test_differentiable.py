"""Differentiable perturbations against SciPy, Pillow, the real codec and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import fft, ndimage

from flipad_jax import data, perturbations
from flipad_jax.perturbations import differentiable

RNG = jax.random.key(0)
PHOTOS = data.load("photos", split="test", image_size=32, num_images=6)
DIGITS = data.load("digits", split="test", num_images=6, image_size=28)


def floats(images):
    return jnp.asarray(data.to_float(images), jnp.float32)


@pytest.mark.parametrize("std, size", [(1 / 3, 3), (1.0, 9), (3.0, 25)])
def test_blur_is_scipys(std, size):
    images = floats(PHOTOS)
    expected = ndimage.gaussian_filter(
        np.asarray(images, np.float64),
        (0, std, std, 0),
        radius=(0, size // 2, size // 2, 0),
        mode="mirror",
    )
    np.testing.assert_allclose(differentiable.blur(images, std, size), expected, atol=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.875, 0.8125])
def test_crop_is_pillows(share):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 1)).astype(np.float32)
    kept = round(32 * share)
    start = (32 - kept) // 2
    for image, found in zip(images, differentiable.crop(jnp.asarray(images), share)):
        part = Image.fromarray(image[start : start + kept, start : start + kept, 0])
        expected = part.resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(found[..., 0], np.asarray(expected), atol=1e-5)


@pytest.mark.parametrize("kept", range(25, 32))
def test_crop_is_the_published_one(kept):
    """Pillow rounds after either axis; another start would be a pixel off."""
    expected = perturbations.crop(PHOTOS, kept).astype(float)
    found = (np.asarray(differentiable.crop(floats(PHOTOS), kept / 32)) + 1) * 127.5
    assert np.abs(found - expected).max() <= 1.01


@pytest.mark.parametrize("quality", [50, 75, 90])
@pytest.mark.parametrize("images", [PHOTOS, DIGITS], ids=["colour", "grey"])
def test_jpeg_is_the_codec_to_a_level_or_two(images, quality):
    real = perturbations.jpeg(images, quality).astype(float)
    soft = (np.asarray(differentiable.jpeg(floats(images), quality), np.float64) + 1) * 127.5
    # Whole numbers on both sides: what is left are ties that the integer arithmetic breaks anew.
    assert np.abs(soft - real).mean() < 0.75
    assert np.quantile(np.abs(soft - real), 0.99) < 6
    lost = np.abs(images.astype(float) - real).mean()
    assert np.abs(soft - real).mean() < lost / 4


def test_jpeg_mask_keeps_the_first_coefficients():
    images = 0.5 * floats(DIGITS)[:, :24, :24]  # Weak, so that nothing is clipped.
    masked = differentiable.jpeg_mask(images)
    assert jnp.abs(masked).max() < 1
    after, before = (
        fft.dctn(np.asarray(x[0, 8:16, 8:16, 0], np.float64), norm="ortho")
        for x in (masked, images)
    )
    # The standard's zigzag.
    order = differentiable._zigzag()
    assert order[0].tolist() == [0, 1, 5, 6, 14, 15, 27, 28] and order[7, 7] == 63
    np.testing.assert_allclose(after[order < 25], before[order < 25], atol=1e-5)
    np.testing.assert_allclose(after[order >= 25], 0, atol=1e-5)
    np.testing.assert_allclose(differentiable.jpeg_mask(masked), masked, atol=1e-5)


@pytest.mark.parametrize("name", ["blur", "crop", "noise", "jpeg_mask"])
def test_gradients_are_finite_differences(name):
    perturb = differentiable.strongest(name)
    if name == "noise":  # Weak enough that nothing is clipped: there is no derivative there.
        perturb = lambda rng, x: differentiable.noise(x, rng, 0.05)  # noqa: E731
    images = 0.3 * floats(PHOTOS)[:1, :16, :16]
    weights = jax.random.normal(RNG, images.shape)

    def value(x):
        return jnp.sum(weights * perturb(RNG, x))

    step = jax.random.normal(jax.random.key(1), images.shape) * 1e-3
    numeric = (value(images + step) - value(images - step)) / 2
    np.testing.assert_allclose(jnp.vdot(jax.grad(value)(images), step), numeric, rtol=2e-2)


def test_jpeg_passes_the_gradient_of_its_linear_part():
    images = 0.2 * floats(PHOTOS)[:1]
    gradient = jax.grad(lambda x: differentiable.jpeg(x, 100.0).sum())(images)
    # Constant pictures pass unchanged, so the sum has slope 1 in every pixel.
    np.testing.assert_allclose(gradient.sum(), images.size, rtol=1e-3)


@pytest.mark.parametrize("name", differentiable.NAMES)
def test_named_ones_are_random_pure_and_in_range(name):
    perturb = jax.jit(differentiable.draw(name))
    images = floats(PHOTOS)
    first = perturb(RNG, images)
    np.testing.assert_array_equal(first, perturb(RNG, images))
    assert first.shape == images.shape and jnp.abs(first).max() <= 1 + 1e-5
    if name != "jpeg_mask":
        others = [perturb(jax.random.key(i), images) for i in range(1, 4)]
        assert any(jnp.abs(first - other).max() > 1e-3 for other in others)
    assert jnp.abs(differentiable.strongest(name)(RNG, images) - images).max() > 0.05


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="fog"):
        differentiable.draw("fog")
    with pytest.raises(ValueError, match="floating"):
        differentiable.blur(jnp.zeros((1, 8, 8, 1), jnp.uint8), 1.0)
    images = floats(DIGITS)
    for size in (4, 24, 27, 0, -3):
        with pytest.raises(ValueError, match=f"size={size}: expected an odd number .* most 25"):
            differentiable.blur(images, 3.0, size)
