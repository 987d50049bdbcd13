"""Distances between images, against scikit-image and against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.measure import block_reduce
from skimage.metrics import structural_similarity

from flipad_jax import data, inception, perceptual
from flipad_jax.inception import Inception

pytestmark = pytest.mark.usefixtures("strict_ranks")


def pictures(n, h, w, c, seed=0):
    """Smooth random fields in [-1, 1], which have structure at all scales."""
    draw = np.random.default_rng(seed).standard_normal((n, h, w, c)).cumsum(1).cumsum(2)
    return np.tanh(draw / draw.std())


@functools.partial(jax.jit, static_argnums=0)
def value(name, x, y):
    measure = perceptual.distance(name)
    return perceptual.between(measure, perceptual.prepare(measure, x), y)


similarity = jax.jit(perceptual.structural_similarity)


@pytest.mark.parametrize("shape, scales", [((32, 32, 1), 2), ((64, 47, 3), 3), ((11, 12, 2), 1)])
def test_every_scale_is_scikit_images(shape, scales):
    x, y = pictures(2, *shape), pictures(2, *shape, seed=1)
    y[0] = x[0] + 0.1 * y[0]  # one pair that is alike
    found = np.asarray(similarity(x, y))
    assert found.shape == (2, scales)
    expected = np.empty((2, scales))
    x, y = (x + 1) / 2, (y + 1) / 2
    for scale in range(scales):
        for i in range(2):
            expected[i, scale] = structural_similarity(
                x[i],
                y[i],
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=1,
                channel_axis=-1,
            )
        even = [slice(None), *(slice(size // 2 * 2) for size in x.shape[1:3])]
        x, y = (block_reduce(v[tuple(even)], (1, 2, 2, 1), np.mean) for v in (x, y))
    assert expected[0].min() > expected[1].max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_float32_is_exact_enough():
    x = pictures(3, 32, 32, 1) * 0.1 + 0.9  # nearly white: E[x^2] - E[x]^2 cancels
    y = np.clip(x + 0.02 * pictures(3, 32, 32, 1, seed=1), -1, 1)
    exact, single = value("ms_ssim", x, y), value("ms_ssim", np.float32(x), np.float32(y))
    assert single.dtype == np.float32 and exact.max() > 1e-3
    np.testing.assert_allclose(single, exact, rtol=0, atol=1e-4)


def test_ms_ssim_of_digits():
    digits = data.to_float(data.load("digits", split="test", num_images=30))
    x, y = jnp.asarray(digits[:15]), jnp.asarray(digits[15:])
    np.testing.assert_allclose(value("ms_ssim", x, x), 0, atol=1e-6)
    others = value("ms_ssim", x, y)
    np.testing.assert_allclose(others, value("ms_ssim", y, x), rtol=1e-5)
    blurred = 0.5 * x + 0.5 * jnp.roll(x, 1, axis=2)
    assert value("ms_ssim", x, blurred).max() < others.min()
    # Negatives are as far as can be, and still have a gradient.
    assert value("ms_ssim", x, -x).min() > others.max()
    gradient = jax.grad(lambda v: value("ms_ssim", x, v).sum())(-x)
    assert np.isfinite(gradient).all() and (np.abs(gradient).max(axis=(1, 2, 3)) > 1e-4).all()


def test_l2_is_the_mean_square():
    x, y = pictures(3, 5, 4, 2), pictures(3, 5, 4, 2, seed=1)
    np.testing.assert_allclose(value("l2", x, y), ((x - y) ** 2).reshape(3, -1).mean(axis=1))


def test_inception_takes_normalised_images_as_they_are(monkeypatch):
    def features(network, images, *, layer):
        assert layer == "Mixed_5d"
        return network.variables * images[:, ::2] ** 3

    monkeypatch.setattr(inception, "features", features)
    measure = perceptual.distance("inception", Inception(2.0, "torchvision"))
    grey = pictures(4, 6, 5, 1)
    colour = np.repeat(grey, 3, axis=-1)  # what a grey image stands for
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    made = 2 * ((colour[:, ::2] - mean) / std) ** 3
    expected = ((made[:2] - made[2:]) ** 2).reshape(2, -1).mean(axis=1)
    for images in (grey, colour):
        reference = perceptual.prepare(measure, jnp.asarray(images[:2]))
        found = perceptual.between(measure, reference, jnp.asarray(images[2:]))
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_bad_distances_and_images():
    with pytest.raises(ValueError, match="'lpips' is unknown; there are l2, ms_ssim, inception"):
        perceptual.distance("lpips")
    with pytest.raises(ValueError, match=r"needs network=inception.load\(FILE\)"):
        perceptual.distance("inception")
    network = Inception({}, "torchvision")
    with pytest.raises(ValueError, match="'l2' takes no network"):
        perceptual.distance("l2", network)
    with pytest.raises(
        ValueError, match=r"\[1, 10, 32, 1\], expected \[n, h, w, c\] with h, w >= "
    ):
        value("ms_ssim", np.zeros((1, 10, 32, 1)), np.zeros((1, 10, 32, 1)))
    with pytest.raises(ValueError, match=r"\[1, 64, 64, 4\], expected grey or RGB"):
        perceptual.prepare(perceptual.distance("inception", network), np.zeros((1, 64, 64, 4)))
