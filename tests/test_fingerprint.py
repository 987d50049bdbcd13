"""SM-F against the same steps by loops over images and channels, and against known patterns."""

import warnings

import numpy as np
import pytest
import pywt
from scipy import ndimage

from flipad_jax import conventions, data
from flipad_jax.detection import fingerprint

GREY = (0.29893602, 0.58704307, 0.11402090)


def wiener_noise(x, noise_variance):
    """What is noise in `[h, w]`, the signal's variance being the least of four windows'."""
    signal = [
        np.maximum(ndimage.uniform_filter(x**2, size, mode="constant") - noise_variance, 0)
        for size in (3, 5, 7, 9)
    ]
    return x * noise_variance / (np.min(signal, axis=0) + noise_variance)


def residual(image):
    """Of one image `[h, w, c]` uint8, `[h, w]` float64."""
    h, w, c = image.shape
    grey = np.zeros((h, w))
    for channel in range(c):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Level value of 4 is too high")
            approximation, *levels = pywt.wavedec2(
                image[..., channel].astype(np.float64), "db4", level=4
            )
        levels = [tuple(wiener_noise(band, 25.0) for band in level) for level in levels]
        back = pywt.waverec2([np.zeros_like(approximation), *levels], "db4")[:h, :w]
        grey += back * (GREY[channel] if c == 3 else 1)
    for i in (0, 1):
        for j in (0, 1):
            phase = grey[i::2, j::2].copy()
            phase -= phase.mean()
            rows, columns = phase.mean(axis=1), phase.mean(axis=0)
            grey[i::2, j::2] = phase - rows[:, None] - columns[None]
    spectrum = np.fft.fft2(grey)
    magnitude = np.abs(spectrum) / np.sqrt(h * w)
    kept = wiener_noise(magnitude, grey.var(ddof=1))
    scale = np.divide(kept, magnitude, out=np.zeros((h, w)), where=magnitude > 0)
    return np.fft.ifft2(spectrum * scale).real


def correlation(a, b):
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


BATCH = 4  # every test has this one, and few shapes: a shape is a compilation


def noise_images(num, h=16, w=22, c=1, seed=0):
    """Uniform noise in the left half, which is loud; a few grey levels in the right one."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, h, w, c))
    images[:, :, w // 2 :] = 100 + images[:, :, w // 2 :] // 40
    return images.astype(np.uint8)


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(lambda: noise_images(3, 32, 32), id="noise-grey-32"),
        pytest.param(lambda: noise_images(3, 64, 64, 3), id="noise-rgb-64"),
        pytest.param(lambda: noise_images(3), id="noise-grey-16x22"),
        pytest.param(lambda: noise_images(3, c=3), id="noise-rgb-16x22"),
        pytest.param(lambda: data.load("digits", split="test", num_images=3), id="digits-32"),
        pytest.param(lambda: data.load("photos", split="test", num_images=3), id="photos-64"),
    ],
)
def test_residuals_are_those_of_the_loops(images):
    images = images()
    found = fingerprint.residuals(images, batch_size=BATCH)
    assert found.shape == images.shape[:3] and found.dtype == np.float32
    for image, ours in zip(images, found):
        expected = residual(image)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_residual_has_no_mean_in_any_row_or_column_of_a_phase():
    found = fingerprint.residuals(noise_images(2), batch_size=BATCH).astype(np.float64)
    phases = found.reshape(2, 8, 2, 11, 2)
    scale = np.abs(found).max()
    assert np.abs(phases.mean(axis=1)).max() < 1e-6 * scale
    assert np.abs(phases.mean(axis=3)).max() < 1e-6 * scale


@pytest.mark.parametrize("c", [1, 3])
def test_brightness_leaves_no_trace_and_one_colour_leaves_none_at_all(c):
    images = noise_images(3, c=c) // 2
    dark, bright = (
        fingerprint.residuals(images + np.uint8(more), batch_size=BATCH) for more in (0, 100)
    )
    np.testing.assert_array_equal(dark, bright)
    flat = np.full((3, 16, 22, c), [201, 57, 19][:c], np.uint8)
    assert not fingerprint.residuals(flat, batch_size=BATCH).any()
    for convention in conventions.CONVENTIONS:
        fitted = fingerprint.fit(images, convention=convention, batch_size=BATCH)
        found = fingerprint.score(fitted, flat, batch_size=BATCH)
        np.testing.assert_array_equal(found, np.zeros(3))


def test_an_image_depends_on_no_neighbour():
    images = noise_images(7)
    together = fingerprint.residuals(images, batch_size=BATCH)
    rounding = 1e-5 * np.abs(together).max()
    apart = fingerprint.residuals(images[[6, 1]], batch_size=BATCH)
    np.testing.assert_allclose(apart, together[[6, 1]], rtol=0, atol=rounding)
    found = fingerprint.residuals(images[:3], batch_size=1)
    np.testing.assert_allclose(found, together[:3], rtol=0, atol=rounding)
    assert fingerprint.residuals(images[:0]).shape == (0, 16, 22)


@pytest.mark.parametrize("c", [1, 3])
def test_fingerprint_is_the_mean_residual_and_the_score_its_negative_correlation(c):
    own, others = noise_images(5, c=c), noise_images(4, c=c, seed=1)
    # [P1]'s code: images in [-1, 1], float32, cut to 8 bits, which darkens what is dark.
    x = (own.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
    cut = ((x + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    assert (cut != own).any()
    pattern = np.mean([residual(image) for image in cut], axis=0)

    fitted = fingerprint.fit(own, batch_size=BATCH)
    assert fitted.convention == "reference" and fitted.num_images == 5
    assert fitted.pattern.shape == (16, 22) and fitted.pattern.dtype == np.float32
    np.testing.assert_allclose(np.mean(fitted.pattern), 0, atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(fitted.pattern), 1, rtol=1e-6)
    np.testing.assert_allclose(correlation(fitted.pattern, pattern), 1, rtol=1e-6)

    found = fingerprint.score(fitted, others, batch_size=BATCH)
    assert found.shape == (4,) and found.dtype == np.float32
    others_cut = others - ((others >= 1) & (others <= 63)).astype(np.uint8)
    expected = [-correlation(residual(image), pattern) for image in others_cut]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert fingerprint.score(fitted, others[:0]).shape == (0,)

    # The text of [P1]: the image itself, and grey levels as they are.
    fitted = fingerprint.fit(own, convention="paper", batch_size=BATCH)
    pattern = np.mean([residual(image) for image in own], axis=0)
    np.testing.assert_allclose(correlation(fitted.pattern, pattern), 1, rtol=1e-6)
    weights = GREY if c == 3 else (1,)
    expected = [-correlation(image @ np.array(weights), pattern) for image in others]
    found = fingerprint.score(fitted, others, batch_size=BATCH)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_levels_that_the_published_code_lowers():
    levels = np.arange(256, dtype=np.uint8)
    x = (levels.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
    cut = ((x + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    np.testing.assert_array_equal(fingerprint._as_read(levels, "reference"), cut)
    np.testing.assert_array_equal(fingerprint._as_read(levels, "paper"), levels)


def test_a_stream_gives_what_the_whole_set_gives_and_keeps_nothing():
    images = noise_images(11)
    whole = fingerprint.fit(images, batch_size=BATCH)

    def stream():
        buffer = np.empty((4, 16, 22, 1), np.uint8)
        for start, stop in ((0, 4), (4, 5), (5, 5), (5, 9), (9, 11)):
            buffer[: stop - start] = images[start:stop]
            yield buffer[: stop - start]
            buffer[:] = 0  # whoever kept the batch has lost it

    streamed = fingerprint.fit(stream(), batch_size=BATCH)
    assert streamed.num_images == whole.num_images == 11
    np.testing.assert_allclose(streamed.pattern, whole.pattern, atol=1e-6)


def test_the_only_image_correlates_with_its_fingerprint_entirely():
    image = noise_images(1)
    fitted = fingerprint.fit(image, batch_size=BATCH)
    found = fingerprint.score(fitted, image, batch_size=BATCH)
    np.testing.assert_allclose(found, -1, atol=1e-6)
    others = fingerprint.score(fitted, noise_images(20, seed=5), batch_size=BATCH)
    assert (np.abs(others) < 0.5).all()


def test_a_known_pattern_is_found_and_tells_its_camera_from_others():
    rng = np.random.default_rng(0)
    patterns = rng.standard_normal((2, 32, 32, 1))

    def photographs(pattern, num):
        # Smooth scenes, each pixel as sensitive as the pattern says, and noise of its own.
        scene = ndimage.gaussian_filter(rng.standard_normal((num, 32, 32, 1)), (0, 6, 6, 0))
        scene = 130 + 40 * scene / scene.std()
        shot = scene * (1 + 0.02 * pattern) + 2 * rng.standard_normal(scene.shape)
        return np.clip(np.rint(shot), 0, 255).astype(np.uint8)

    fitted = fingerprint.fit(photographs(patterns[0], 64), batch_size=BATCH)
    assert correlation(fitted.pattern, patterns[0]) > 0.8
    own, other = (
        fingerprint.score(fitted, photographs(pattern, 64), batch_size=BATCH)
        for pattern in patterns
    )
    assert own.max() < -0.3
    assert np.abs(other).max() < 0.2


def some_fingerprint():
    return fingerprint.fit(noise_images(2), batch_size=BATCH)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: fingerprint.residuals(x / np.float32(255)), "to_uint8"),
        (lambda x: fingerprint.residuals(x[0]), r"\[n, h, w, c\]"),
        (lambda x: fingerprint.residuals(np.repeat(x, 2, axis=-1)), r"\[2, 16, 22, 2\]"),
        (lambda x: fingerprint.residuals(x[:, :, :21]), "even"),
        (lambda x: fingerprint.residuals(x[:, :14]), "at least 16"),
        (lambda x: fingerprint.residuals(x, batch_size=0), "batch_size=0"),
        (lambda x: fingerprint.fit(x, convention="text"), "reference"),
        (lambda x: fingerprint.fit(x[:0]), "none"),
        (lambda x: fingerprint.fit([]), "none"),
        (lambda x: fingerprint.fit(0 * x, batch_size=BATCH), "one colour"),
        (
            lambda x: fingerprint.fit([x, noise_images(2, 16, 18)], batch_size=BATCH),
            r"n, 16, 22, 1",
        ),
        (lambda x: fingerprint.score(some_fingerprint(), noise_images(1, 16, 18)), "n, 16, 22, 1"),
        (lambda x: fingerprint.score(some_fingerprint(), x / np.float32(255)), "to_uint8"),
        (lambda x: fingerprint.score(some_fingerprint(), x, batch_size=-1), "batch_size=-1"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(noise_images(2))
    assert "\n" not in str(error.value)
