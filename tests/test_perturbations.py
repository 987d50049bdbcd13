"""Perturbations against torchvision's semantics written anew, PyTorch, and Pillow itself."""

import itertools
import re

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

# One name of every form in `FORMS`, and what it stands for on 16 x 18 pixels.
NAMED = {
    "blur-5": lambda images, rng, first: perturbations.blur(images, 5),
    "crop-55": lambda images, rng, first: perturbations.crop(images, 14),  # 55/64 of 16: 13.75
    "noise-0.05": lambda images, rng, first: perturbations.noise(images, rng, 0.05, first=first),
    "jpeg-70": lambda images, rng, first: perturbations.jpeg(images, 70),
    "resize-0.6": lambda images, rng, first: perturbations.resize(images, 0.6),
    "combination": lambda images, rng, first: perturbations.combination(images, rng, first=first),
    "any": lambda images, rng, first: perturbations.any_of_them(images, rng, first=first),
    "none": lambda images, rng, first: images,
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


# By hand: size of the shorter side and size * longer / shorter of the other, half of what is left
# before it, halves to the even number.
@pytest.mark.parametrize(
    "h, w, size, top, left, bottom, right",
    [
        (12, 12, 10, 1, 1, 11, 11),
        (9, 12, 6, 2, 2, 8, 10),
        (13, 9, 4, 4, 2, 10, 6),
        (8, 8, 5, 2, 2, 7, 7),
    ],
)
def test_crop_is_centre_crop_and_bilinear_enlargement(h, w, size, top, left, bottom, right):
    torch = pytest.importorskip("torch")
    images = pictures(h=h, w=w)
    kept = torch.tensor(images[:, top:bottom, left:right]).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        kept.float(), (h, w), mode="bilinear", align_corners=False, antialias=True
    ).permute(0, 2, 3, 1)
    found = perturbations.crop(images, size).astype(float)
    # Pillow rounds after either axis.
    assert np.abs(found - expected.numpy()).max() <= 1.01


def test_a_crop_of_everything_changes_nothing():
    for w in (12, 20):
        images = pictures(h=12, w=w)
        np.testing.assert_array_equal(perturbations.crop(images, 12), images)


def test_a_crop_of_a_wide_image_does_not_stretch_it():
    """A round spot stays round: as far across as it is high, and larger by the share."""
    y, x = np.mgrid[:40, :80]
    spot = (np.hypot(y - 19.5, x - 39.5) < 10) * np.uint8(255)
    found = perturbations.crop(spot[None, ..., None], 30)[0, ..., 0] > 127
    high, across = np.ptp(np.nonzero(found.any(1))), np.ptp(np.nonzero(found.any(0)))
    assert high == across == pytest.approx(19 * 4 / 3, abs=1)


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


@pytest.mark.parametrize("c", [1, 3])
def test_combination_is_the_four_in_order_where_the_coins_of_the_index_say_so(c):
    images = pictures(70, 16, 18, c)  # more than a batch
    rng = jax.random.key(8)
    strengths = {"kernel_size": 5, "size": 11, "std": 0.07, "quality": 60}
    found = perturbations.combination(images, rng, first=3, **strengths)
    rng_choice, rng_noise = jax.random.split(rng)
    seen = set()
    for i in (*range(30), 63, 64, 69):
        image = images[i : i + 1]
        choice = np.asarray(jax.random.bernoulli(jax.random.fold_in(rng_choice, 3 + i), shape=4))
        seen.add(tuple(choice))
        if choice[0]:
            image = perturbations.blur(image, 5)
        if choice[1]:
            image = perturbations.crop(image, 11)
        if choice[2]:
            drawn = jax.random.normal(
                jax.random.fold_in(rng_noise, 3 + i), image.shape[1:], np.float32
            )
            drawn = np.rint(np.asarray(drawn) * np.float32(0.07 * 255))
            image = np.clip(image + drawn, 0, 255).astype(np.uint8)
        if choice[3]:
            image = perturbations.jpeg(image, 60)
        np.testing.assert_array_equal(found[i], image[0])
    assert len(seen) > 8


def test_combination_tosses_fair_coins_and_has_the_papers_strengths():
    num = 300
    images = pictures(num, 16, 16, 1)
    found = perturbations.combination(images, jax.random.key(1), std=0.0)
    # Without noise what was done shows: exactly one of the eight ways gives the image found.
    matches = []
    for blurred, cropped, compressed in itertools.product((False, True), repeat=3):
        edited = perturbations.blur(images, 3) if blurred else images
        edited = perturbations.crop(edited, 14) if cropped else edited
        edited = perturbations.jpeg(edited, 80) if compressed else edited
        matches.append((edited == found).all(axis=(1, 2, 3)))
    np.testing.assert_array_equal(np.sum(matches, axis=0), 1)
    counts = np.sum(matches, axis=1)
    assert (np.abs(counts - num / 8) < 5 * np.sqrt(num * 7 / 64)).all()
    noisy = perturbations.combination(images, jax.random.key(1))
    changed = (noisy != found).any(axis=(1, 2, 3))
    assert abs(changed.sum() - num / 2) < 5 * np.sqrt(num / 4)
    # ... whatever else happens to an image; its spread where nothing else did is 0.1.
    assert all(0 < changed[match].mean() < 1 for match in matches)
    difference = noisy[changed & matches[0]].astype(float) - found[changed & matches[0]]
    inside = (found[changed & matches[0]] > 100) & (found[changed & matches[0]] < 155)
    np.testing.assert_allclose(difference[inside].std(), 25.5, rtol=0.1)


@pytest.mark.parametrize("name", NAMED)
def test_a_name_stands_for_its_function_also_in_pieces(name):
    images, rng = pictures(70, 16, 18), jax.random.key(2)
    found = perturbations.apply(name, images, rng)
    np.testing.assert_array_equal(found, NAMED[name](images, rng, 0))
    assert not np.shares_memory(found, images)
    pieces = [
        perturbations.apply(name, images[start:stop], rng, first=start)
        for start, stop in ((0, 5), (5, 5), (5, 70))
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), found)


def test_any_is_one_of_them_at_a_strength_of_its_own():
    images = pictures(300, 32, 32)
    found = perturbations.any_of_them(images, jax.random.key(1))
    crops = [perturbations.crop(images, size) for size in range(24, 33)]
    qualities = [perturbations.jpeg(images, quality) for quality in range(70, 96)]
    counts = dict.fromkeys(("none", "blur", "crop", "jpeg", "noise"), 0)
    for i, image in enumerate(found):
        if np.array_equal(image, images[i]):
            counts["none"] += 1
        elif np.array_equal(image, perturbations.blur(images[i : i + 1], 3)[0]):
            counts["blur"] += 1
        elif any(np.array_equal(image, cropped[i]) for cropped in crops):
            counts["crop"] += 1
        elif any(np.array_equal(image, coded[i]) for coded in qualities):
            counts["jpeg"] += 1
        else:
            counts["noise"] += 1
            inside = (images[i] > 80) & (images[i] < 175)
            assert np.std(image[inside].astype(float) - images[i][inside]) < 1.3 * 25.5
    assert all(35 < count < 90 for count in counts.values()), counts


def test_every_form_has_a_name_here_and_is_parsed():
    forms = [re.sub(r"-\d+\.\d+$", "-X", re.sub(r"-\d+$", "-N", name)) for name in NAMED]
    assert forms == list(perturbations.FORMS)
    assert perturbations.parse("blur-3") == ("blur", 3)
    assert perturbations.parse("noise-0.1") == ("noise", 0.1)
    assert perturbations.parse("none") == ("none", None)


@pytest.mark.parametrize("side, kept", [(64, 55), (32, 28), (128, 110), (16, 14)])
def test_a_crop_by_name_keeps_the_same_share_at_every_size(side, kept):
    images = pictures(1, side, side + 2, 1)
    found = perturbations.apply("crop-55", images, jax.random.key(0))
    np.testing.assert_array_equal(found, perturbations.crop(images, kept))


@pytest.mark.parametrize(
    "name",
    ["", "-", "blur", "blur-", "blur-3.5", "blur-x", "Blur-3", "jpeg80", "none-1", "combination-2"]
    + [form for form in perturbations.FORMS if "-" in form],  # not blur-N itself
)
def test_an_unknown_name_is_told_what_there_is(name):
    with pytest.raises(ValueError, match="blur-N, .*combination, any, none") as error:
        perturbations.apply(name, pictures(), jax.random.key(0))
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


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
        (lambda x: perturbations.jpeg(x, float("inf")), "quality=inf"),
        (lambda x: perturbations.resize(x, 0.0), "factor=0.0"),
        (lambda x: perturbations.resize(x, float("inf")), "factor=inf"),
        (lambda x: perturbations.resize(x, 0.5, "nearest"), "bicubic"),
        (lambda x: perturbations.noise(x, jax.random.key(0), 0.1, first=-1), "first=-1"),
        (lambda x: perturbations.combination(x, jax.random.key(0), first=-1), "first=-1"),
        (lambda x: perturbations.combination(x, jax.random.key(0), kernel_size=2), "odd"),
        (lambda x: perturbations.combination(x[:0], jax.random.key(0), size=0), "1 to 21"),
        (lambda x: perturbations.combination(x, jax.random.key(0), std=-1), "std=-1"),
        (lambda x: perturbations.combination(x, jax.random.key(0), quality=0), "1 to 100"),
        (lambda x: perturbations.apply("crop-65", x, jax.random.key(0)), "crop-65"),
        (lambda x: perturbations.apply("crop-0", x, jax.random.key(0)), "crop-0"),
        (lambda x: perturbations.apply("blur--3", x, jax.random.key(0)), "odd"),
        (lambda x: perturbations.apply("noise-nan", x, jax.random.key(0)), "std=nan"),
        (lambda x: perturbations.apply("none", x / np.float32(255), None), "uint8"),
        (lambda x: perturbations.blur(x / np.float32(255), 3), "uint8"),
        (lambda x: perturbations.jpeg(x[..., :2], 90), "uint8"),
        (lambda x: perturbations.crop(x[0], 5), r"\[n, h, w, c\]"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(pictures())
    assert "\n" not in str(error.value)
