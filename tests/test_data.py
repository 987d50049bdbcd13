"""Tests of image sets, decoding and conversion."""

import gc
import importlib.resources
import os
import re
import subprocess
import sys
import tracemalloc
import warnings
import zlib

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_files import broken_files, png, random_images
from PIL import Image

from flipad_jax import data

ALL_LEVELS = np.arange(256, dtype=np.uint8)


def keys(images):
    return {image.tobytes() for image in images}


# --- arrays -----------------------------------------------------------------------------------


def test_to_float_matches_definition_in_float64():
    exact = ALL_LEVELS.astype(np.float64) / 127.5 - 1.0
    x = data.to_float(ALL_LEVELS)
    assert isinstance(x, np.ndarray) and x.dtype == np.float32
    np.testing.assert_allclose(x, exact, atol=1e-7)
    assert x[0] == -1.0 and x[255] == 1.0


def test_to_float_of_jax_arrays_stays_on_device_and_traces():
    eager = data.to_float(jnp.asarray(ALL_LEVELS))
    traced = jax.jit(data.to_float)(jnp.asarray(ALL_LEVELS))
    assert isinstance(eager, jax.Array) and eager.dtype == traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, data.to_float(ALL_LEVELS), atol=2e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip_of_all_levels(dtype):
    x = data.to_float(ALL_LEVELS).astype(dtype)
    np.testing.assert_array_equal(data.to_uint8(x), ALL_LEVELS)
    # Nearest level, so that disturbances below half a level do not matter: this fails for the
    # biased encoder that adds 128 before rounding.
    for shift in (-0.49, 0.49):
        np.testing.assert_array_equal(data.to_uint8(x + dtype(shift / 127.5)), ALL_LEVELS)


def test_round_trip_through_jit_and_half_precision_input():
    x = jax.jit(data.to_float)(jnp.asarray(ALL_LEVELS))
    np.testing.assert_array_equal(data.to_uint8(x), ALL_LEVELS)
    assert data.to_uint8(jnp.ones((2,), jnp.bfloat16)).tolist() == [255, 255]


def test_to_uint8_clips_and_refuses_nan_and_integers():
    assert data.to_uint8(np.float32([-7.0, -1.001, 1.001, 50.0])).tolist() == [0, 0, 255, 255]
    x = np.zeros((2, 3), np.float32)
    for bad in (np.nan, np.inf):
        x[1, 2] = bad
        with pytest.raises(ValueError, match=r"\[1, 2\]"):
            data.to_uint8(x)
    with pytest.raises(ValueError, match="int64"):
        data.to_uint8(np.zeros((2,), np.int64))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_to_float_keeps_floating_images(dtype):
    x = np.linspace(-1, 1, 7, dtype=dtype)
    assert data.to_float(x).dtype == np.float32
    np.testing.assert_array_equal(data.to_float(x), x.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.uint16, bool])
def test_to_float_refuses_other_types(dtype):
    with pytest.raises(ValueError, match=np.dtype(dtype).name):
        data.to_float(np.zeros((1, 2, 2, 1), dtype))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_check_images_hands_good_batches_back(dtype, asarray):
    images = asarray(np.ones((2, 4, 5, 3), dtype))
    assert data.check_images(images) is images
    assert data.check_images(images, shape=(4, 5, 3)) is images


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((4, 4), np.uint8), r"\[n, h, w, c\].*\(4, 4\)"),
        (np.zeros((2, 4, 4), np.uint8), r"images\[None\]"),
        (np.zeros((2, 0, 4, 1), np.uint8), "no pixel"),
        (np.zeros((1, 4, 4, 1), np.int64), "int64.*uint8"),
        (np.zeros((1, 4, 4, 1), np.float16), "float16.*float32"),
        (np.zeros((1, 4, 4, 1), np.complex64), "complex64"),
        (np.full((1, 4, 4, 1), 200.0), r"200.*0\.\.255"),
        (np.full((1, 4, 4, 1), -1.01), "-1.01"),
        (np.full((1, 4, 4, 1), 1.01), "1.01"),
    ],
)
def test_check_images_refuses(images, message):
    with pytest.raises(ValueError, match=message):
        data.check_images(images)


def test_images_that_look_like_0_to_1_are_told(caplog):
    images = np.random.default_rng(0).random((3, 4, 4, 1), np.float32)
    with caplog.at_level("WARNING", logger="absl"):
        for good in (2 * images - 1, np.zeros_like(images), images[:0], np.uint8(255 * images)):
            data.check_images(good)
        assert not caplog.records
        data.check_images(images)
    assert "none of 3 float images" in caplog.text and "pass 2 * images - 1" in caplog.text


def test_check_images_names_the_bad_ones():
    images = np.zeros((12, 4, 4, 3), np.float32)
    images[7, 1, 2, 0] = np.nan
    with pytest.raises(ValueError, match="image 7 has NaN or infinity"):
        data.check_images(jnp.asarray(images))
    images[3:, 0, 0, 0] = -np.inf
    with pytest.raises(ValueError, match=r"images 3, 4, 5, 6, 7, \.\.\. \(9 of 12\) have NaN"):
        data.check_images(images)
    images = np.zeros((12, 4, 4, 3), np.float32)
    images[[2, 9]] = 3.0
    with pytest.raises(ValueError, match=r"images 2, 9 \(2 of 12\) have values beyond"):
        data.check_images(images)


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_any_number_of_rows_is_filled_up_to_one_of_a_few(asarray):
    sizes = set()
    for count in (1, 15, 16, 17, 64, 100):
        rows = asarray(np.arange(2 * count).reshape(count, 2))
        for full in (data.filled(rows), data.filled(rows, 128)):
            np.testing.assert_array_equal(full[:count], rows)
            np.testing.assert_array_equal(full[count:], np.tile(rows[-1], (len(full) - count, 1)))
        assert len(data.filled(rows, 128)) == 128
        sizes.add(len(data.filled(rows)))
    assert sizes == {16, 32, 64, 128}


def test_check_images_shape_and_channels_first():
    with pytest.raises(ValueError, match=r"\[n, 4, 4, 3\].*\(1, 4, 5, 3\)"):
        data.check_images(np.zeros((1, 4, 5, 3), np.uint8), shape=(4, 4, 3))
    with pytest.raises(ValueError, match="moveaxis"):
        data.check_images(np.zeros((1, 3, 4, 4), np.uint8), shape=(4, 4, 3))


# --- digits -----------------------------------------------------------------------------------


def test_digits_splits_partition_the_set():
    splits = {split: data.load("digits", split=split) for split in data.SPLITS}
    assert {k: v.shape for k, v in splits.items()} == {
        "train": (4000, 32, 32, 1),
        "validation": (500, 32, 32, 1),
        "test": (500, 32, 32, 1),
    }
    # All 5000 are distinct, so counting distinct images proves that nothing is in two splits.
    assert len(keys(np.concatenate(list(splits.values())))) == 5000
    assert all(v.dtype == np.uint8 and v.max() == 255 for v in splits.values())


def test_digits_are_padded_with_background():
    small = data.load("digits", split="test", image_size=28)
    large = data.load("digits", split="test", image_size=32)
    np.testing.assert_array_equal(large[:, 2:30, 2:30], small)
    assert large.astype(int).sum() == small.astype(int).sum()
    assert 0.1 < small.mean() / 255 < 0.16  # MNIST: 0.13, white on black


def test_digits_depend_on_the_seed_only():
    first = data.load("digits", split="test", seed=3)
    np.testing.assert_array_equal(first, data.load("digits", split="test", seed=3))
    np.testing.assert_array_equal(
        first[:10], data.load("digits", split="test", seed=3, num_images=10)
    )
    assert keys(first) != keys(data.load("digits", split="test", seed=4))
    assert data.load("digits", split="train", num_images=4000).shape[0] == 4000


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(name="digit", split="train"), "'digit'.*digits, photos"),
        (dict(name="digits", split="val"), "'val'.*train, validation, test"),
        (dict(name="digits", split="test", image_size=64), "28 x 28"),
        (dict(name="digits", split="test", num_images=501), "500 images, 501"),
        (dict(name="digits", split="test", num_images=0), "positive"),
        (dict(name="digits", split="test", num_images=2.0), "positive integer"),
        (dict(name="photos", split="test", image_size=-3), "positive"),
        (dict(name="photos", split="test", image_size=400), "up to 223 x 223.*400"),
        (dict(name="photos", split="test", seed=-1), "seed"),
        (dict(name="/no/such/folder", split="test"), "no such folder"),
    ],
)
def test_load_says_what_exists(kwargs, message):
    with pytest.raises(ValueError, match=message):
        data.load(kwargs.pop("name"), **kwargs)


@pytest.mark.parametrize("name", data.NAMES)
@pytest.mark.parametrize("num", [3, 1000, 1200])
def test_a_bound_gives_the_first_images_of_the_split(name, num):
    # The test split of digits has 500 images, that of photos, unless more are asked for, 1000.
    kwargs = dict(split="test", image_size=32)
    found = data.load(name, num_images=num, exact=False, **kwargs)
    np.testing.assert_array_equal(found, data.load(name, **kwargs)[:num])


@pytest.mark.parametrize("num", [0, -1, 2.0, True])
def test_a_bound_is_a_positive_number(num):
    with pytest.raises(ValueError, match="num_images must be a positive integer"):
        data.load("digits", split="test", num_images=num, exact=False)


# --- photos -----------------------------------------------------------------------------------


def pixel_index_photos(sizes):
    """Images whose colour is the number of the pixel, counted over all images, in 24 bits."""
    photos, start = [], 0
    for width, height in sizes:
        index = start + np.arange(width * height).reshape(height, width)
        start += width * height
        rgb = np.stack([index >> 16, (index >> 8) & 255, index & 255], -1)
        photos.append(Image.fromarray(rgb.astype(np.uint8)))
    return photos


@pytest.mark.parametrize("seed", range(3))
def test_photo_splits_share_no_source_pixel(seed, monkeypatch):
    # Without shrinking, a crop shows the very numbers of the pixels that it covers.
    monkeypatch.setattr(data, "_MAX_SCALE", 1)
    photos = pixel_index_photos([(101, 60), (60, 83), (200, 90)])
    seen = {}
    for split in data.SPLITS:
        crops = data._crop_photos(photos, split=split, image_size=16, num_images=400, seed=seed)
        r, g, b = np.moveaxis(crops.astype(np.int64), -1, 0)
        seen[split] = set(((r << 16) | (g << 8) | b).ravel().tolist())
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    # ... and the crops reach nearly all of the photographs: nothing is disjoint by being unused.
    covered = sum(len(s) for s in seen.values())
    assert covered > 0.8 * (101 * 60 + 60 * 83 + 200 * 90)


def test_photo_labels_name_the_photograph_that_a_crop_is_from(monkeypatch):
    # Every photograph in one colour of its own; one of them too small for the crops.
    colours = [(10, 0, 0), (0, 20, 0), (0, 0, 30), (40, 40, 40)]
    sizes = [(90, 60), (12, 12), (60, 83), (100, 90)]
    photos = [Image.new("RGB", size, colour) for size, colour in zip(sizes, colours)]
    monkeypatch.setattr(data, "_read_photos", lambda: photos)
    kwargs = dict(split="validation", image_size=16, num_images=200, seed=3)
    labels = data.load_labels("photos", **kwargs)
    assert labels.dtype == np.int32 and set(labels) == {0, 2, 3}
    crops = data.load("photos", **kwargs)
    np.testing.assert_array_equal(crops[:, 5, 5], np.array(colours)[labels])


def test_digit_labels_are_those_of_the_file_and_in_the_order_of_the_images():
    images, labels = data.load("digits", split="test"), data.load_labels("digits", split="test")
    source = importlib.resources.files("flipad_jax") / "embedded" / "digits.npz"
    with source.open("rb") as file, np.load(file) as arrays:
        known = {image.tobytes(): label for image, label in zip(arrays["images"], arrays["labels"])}
    found = [known[np.ascontiguousarray(image[2:-2, 2:-2, 0]).tobytes()] for image in images]
    np.testing.assert_array_equal(labels, found)
    np.testing.assert_array_equal(
        data.load_labels("digits", split="test", num_images=7), labels[:7]
    )


@pytest.mark.parametrize("arguments", [("mnist", "test"), ("digits", "all")])
def test_labels_that_are_not_known_are_refused(arguments):
    with pytest.raises(ValueError, match="labels are known of digits|unknown split"):
        data.load_labels(arguments[0], split=arguments[1])


@pytest.mark.parametrize("split", data.SPLITS)
def test_shrunk_photo_crops_do_not_depend_on_pixels_outside_their_region(split):
    # Shrinking filters are wider than a pixel: destroy everything outside, nothing may change.
    rng = np.random.default_rng(0)
    sizes = [(301, 200), (200, 230)]
    photos = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    kwargs = dict(split=split, image_size=16, num_images=300, seed=1)
    crops = data._crop_photos(photos, **kwargs)
    ruined, kept = [], 0
    for k, photo in enumerate(photos):
        layout = data._draw(2, 1, 0, k)
        box = data._regions(
            *photo.size,
            flip_x=bool(data._below(layout[0], 2)),
            flip_y=bool(data._below(layout[1], 2)),
        )[split]
        pixels = rng.integers(0, 256, np.asarray(photo).shape, dtype=np.uint8)
        inside = (slice(box.top, box.bottom), slice(box.left, box.right))
        pixels[inside] = np.asarray(photo)[inside]
        kept += (box.bottom - box.top) * (box.right - box.left)
        ruined.append(Image.fromarray(pixels))
    np.testing.assert_array_equal(data._crop_photos(ruined, **kwargs), crops)
    share = kept / sum(w * h for w, h in sizes)
    assert abs(share - {"train": 0.7, "validation": 0.15, "test": 0.15}[split]) < 0.01


@pytest.mark.parametrize("flip_x", [False, True])
@pytest.mark.parametrize("flip_y", [False, True])
def test_regions_tile_the_photo(flip_x, flip_y):
    painted = np.zeros((31, 47), int)
    for box in data._regions(47, 31, flip_x=flip_x, flip_y=flip_y).values():
        painted[box.top : box.bottom, box.left : box.right] += 1
    assert (painted == 1).all()


def test_photos_are_drawn_from_the_seed_and_the_index():
    crops = data.load("photos", split="test", num_images=40)
    assert crops.shape == (40, 64, 64, 3) and crops.dtype == np.uint8
    np.testing.assert_array_equal(data.load("photos", split="test", num_images=7), crops[:7])
    assert len(keys(crops)) == 40
    other = data.load("photos", split="test", num_images=40, seed=1)
    assert not keys(crops) & keys(other)
    assert not keys(crops) & keys(data.load("photos", split="train", num_images=40))


def test_photos_vary_in_scale_and_mirroring_and_use_every_photo(monkeypatch):
    # A ramp in x tells the scale by its slope and the mirroring by its sign.
    ramp = np.broadcast_to(np.arange(250, dtype=np.uint8)[None, :, None], (200, 250, 3))
    photos = [Image.fromarray(np.ascontiguousarray(ramp))] * 3
    crops = data._crop_photos(photos, split="train", image_size=16, num_images=200, seed=0)
    slope = np.diff(crops[:, 8, 2:-2, 0].astype(float), axis=1).mean(1)
    assert 70 < (slope > 0).sum() < 130
    assert np.abs(slope).min() < 1.15 and np.abs(slope).max() > 3.8
    flat = [Image.new("RGB", (100, 100), (k, 0, 0)) for k in range(7)]
    crops = data._crop_photos(flat, split="test", image_size=8, num_images=200, seed=0)
    assert (np.bincount(crops[:, 0, 0, 0], minlength=7) > 10).all()
    other = data._crop_photos(flat, split="train", image_size=8, num_images=200, seed=0)
    assert np.mean(crops[:, 0, 0, 0] == other[:, 0, 0, 0]) < 0.3  # 1 / 7: splits draw apart


def test_scale_of_photo_crops_is_the_same_in_all_splits():
    # The training region is larger, but its crops must not be coarser than those of the others.
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3))
    photo = Image.fromarray(np.ascontiguousarray(ramp))
    largest = []
    for split in data.SPLITS:
        crops = data._crop_photos([photo], split=split, image_size=30, num_images=300, seed=0)
        slope = np.diff(crops[:, 8, 2:-2, 0].astype(float), axis=1).mean(1)
        largest.append(np.abs(slope).max())
    np.testing.assert_allclose(largest, 60 / 30, rtol=0.05)  # 200 - 140 pixels are left to two


@pytest.mark.parametrize("image_size", [16, 32, 150])
def test_photos_in_other_sizes(image_size):
    crops = data.load("photos", split="validation", image_size=image_size, num_images=30)
    assert crops.shape == (30, image_size, image_size, 3)
    assert crops.std(axis=(1, 2)).max() > 20  # pictures, not flat colour


def test_draws_are_pinned():
    # Splits must never move between versions of NumPy or of this package: a generator trained on
    # one split would be judged on its own training images.
    assert data._draw(3, 0, 1, 2).tolist() == [1016617948, 2153178893, 1736804435]
    assert zlib.crc32(data.load("digits", split="test", image_size=28).tobytes()) == 1186260089


# --- broken and unusual files -----------------------------------------------------------------


def test_every_broken_file_gets_its_row_and_the_rest_goes_on(tmp_path):
    good = random_images(3)
    data.write_images(tmp_path, good)
    cases = broken_files()
    for name, (content, _) in cases.items():
        (tmp_path / name).write_bytes(content)
    os.symlink(tmp_path / "gone", tmp_path / "dangling.png")
    os.mkfifo(tmp_path / "pipe.png")  # would block a reader for ever
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing leaks to the user's terminal either
        folder = data.read_images(tmp_path, image_shape=(8, 8, 3))
    np.testing.assert_array_equal(folder.images, good)
    assert folder.paths == ("00000.png", "00001.png", "00002.png")
    reasons = {row.path: row.reason for row in folder.rejected}
    assert set(reasons) == set(cases) | {"dangling.png", "pipe.png"}
    for name, (_, pattern) in cases.items():
        assert re.search(pattern, reasons[name]), (name, reasons[name])
    assert reasons["dangling.png"] == reasons["pipe.png"] == "not a regular file"
    assert all("\n" not in r and str(tmp_path) not in r and len(r) < 200 for r in reasons.values())


@pytest.mark.parametrize("name", sorted(broken_files()))
def test_streaming_gives_the_same_rows(name, tmp_path):
    (tmp_path / name).write_bytes(broken_files()[name][0])
    (row,) = data.iter_images(tmp_path, (8, 8, 3))
    folder = data.read_images(tmp_path / name, image_shape=(8, 8, 3))
    assert row.image is None and row.path == name
    assert folder.rejected == (data.Rejected(name, row.reason),)


@pytest.mark.parametrize(
    "extension, kwargs",
    [
        ("png", {}),
        ("jpg", {}),
        ("jpg", {"progressive": True}),
        ("bmp", {}),
        ("webp", {}),
        ("webp", {"lossless": True}),
        ("gif", {}),
        ("tif", {}),
        ("tif", {"compression": "tiff_lzw"}),
        ("tif", {"compression": "tiff_deflate"}),
    ],
)
def test_a_cut_file_never_gives_other_pixels(extension, kwargs, tmp_path):
    path = tmp_path / f"a.{extension}"
    Image.fromarray(random_images(1, 40, 48)[0]).save(path, **kwargs)
    whole, content = data.read_images(path).images, path.read_bytes()
    num_rejected = 0
    for length in np.linspace(0, len(content) - 3, 40).astype(int):
        path.write_bytes(content[:length])
        folder = data.read_images(path, image_shape=(40, 48, 3))
        num_rejected += len(folder.rejected)
        assert len(folder.rejected) or (folder.images == whole).all(), length
    assert num_rejected >= 36


def test_files_whose_pixels_can_be_had_unchanged(tmp_path):
    rgb = random_images(1)[0]
    grey = np.ascontiguousarray(rgb[..., 0])
    for extension, kwargs in [
        ("png", {}),
        ("bmp", {}),
        ("tif", {}),
        ("tiff", {"compression": "tiff_lzw"}),
        ("webp", {"lossless": True}),
        ("PNG", {}),
    ]:
        Image.fromarray(rgb).save(tmp_path / f"a.{extension}", **kwargs)
    folder = data.read_images(tmp_path)
    assert len(folder.paths) == 6 and not folder.rejected
    assert (folder.images == rgb).all()

    palette = Image.fromarray(rgb).quantize(64)
    palette.save(tmp_path / "p.png")
    got = data.read_images(tmp_path / "p.png").images[0]
    np.testing.assert_array_equal(got, np.asarray(palette.convert("RGB")))

    Image.fromarray(grey > 127).save(tmp_path / "one_bit.png")
    got = data.read_images(tmp_path / "one_bit.png").images[0, :, :, 0]
    np.testing.assert_array_equal(got, np.where(grey > 127, 255, 0))


def test_jpeg_orientation_is_not_applied(tmp_path):
    ramp = np.zeros((8, 16, 3), np.uint8)
    ramp[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    Image.fromarray(ramp).save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = data.read_images(tmp_path / "a.jpg").images[0]
    assert image.shape == (8, 16, 3)
    assert np.abs(image.astype(int) - ramp).max() < 10


def test_rgb_counts_as_grey_only_if_nothing_is_lost(tmp_path):
    grey = random_images(2, c=1)
    rgb = np.repeat(grey, 3, axis=-1)
    rgb[1, 3, 3, 2] ^= 1
    data.write_images(tmp_path, rgb)
    folder = data.read_images(tmp_path, image_shape=(8, 8, 1))
    np.testing.assert_array_equal(folder.images, grey[:1])
    assert folder.rejected == (data.Rejected("00001.png", "is in colour, expected grey"),)


# --- folders ----------------------------------------------------------------------------------


def test_folder_is_recursive_in_natural_order_without_hidden_files(tmp_path):
    names = ["2.png", "10.png", "b/1.png", "b/c/img9.png", "b/c/img10.png", "a1/x.png"]
    names += [".hidden.png", ".git/y.png", "b/.c/z.png", "notes.txt", "png"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(random_images(1)[0]))
    folder = data.read_images(str(tmp_path))
    assert folder.paths == (
        "2.png",
        "10.png",
        "a1/x.png",
        "b/1.png",
        "b/c/img9.png",
        "b/c/img10.png",
    )
    assert folder.rejected == ()


def test_links_to_files_are_read_and_links_to_folders_are_not_followed(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    data.write_images(outside, np.zeros((2, 4, 4, 1), np.uint8))
    inside.mkdir()
    (inside / "link.png").symlink_to(outside / "00000.png")
    (inside / "gone.png").symlink_to(outside / "nothing.png")
    (inside / "elsewhere").symlink_to(outside, target_is_directory=True)
    (inside / "round").symlink_to(inside, target_is_directory=True)
    found = data.find_images(inside)
    assert found.paths == ("gone.png", "link.png")
    assert [row.path for row in found.rejected] == ["elsewhere", "round"]
    folder = data.read_images(inside)
    assert folder.paths == ("link.png",)
    reasons = dict(folder.rejected)
    assert "regular file" in reasons["gone.png"] and "not followed" in reasons["round"]


def test_most_common_shape_is_taken(tmp_path):
    data.write_images(tmp_path / "a", random_images(3, 8, 8))
    data.write_images(tmp_path / "b", random_images(4, 16, 8))
    data.write_images(tmp_path / "c", random_images(2, 16, 8, 1))
    folder = data.read_images(tmp_path)
    assert folder.images.shape == (4, 16, 8, 3)
    assert {row.path.split("/")[0] for row in folder.rejected} == {"a", "c"}
    assert all("expected 8 x 16" in row.reason for row in folder.rejected[:3])


def test_folder_without_images(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    for path, message in [
        (tmp_path, r"no images found in .*looked for files \*\.png, \*\.jpg"),
        (tmp_path / "missing", "no such file or folder"),
    ]:
        for read in (data.read_images, data.iter_images):  # at the call, before any item
            with pytest.raises(ValueError, match=message):
                read(path)
    (tmp_path / "a.png").write_text("x")
    folder = data.read_images(tmp_path, image_shape=(8, 8, 3))
    assert folder.images.shape == (0, 8, 8, 3) and len(folder.rejected) == 1
    assert len(data.read_images(tmp_path).rejected) == 1


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 2), (0, 8, 3)])
def test_image_shape_is_checked(shape, tmp_path):
    data.write_images(tmp_path, random_images(1))
    with pytest.raises(ValueError, match="image_shape"):
        data.read_images(tmp_path, image_shape=shape)


def test_streaming_memory_does_not_grow(tmp_path):
    data.write_images(tmp_path, random_images(40, 128, 128))  # 1.9 MiB of pixels
    for _ in data.iter_images(tmp_path):  # fills the caches of the decoder
        pass
    gc.collect()
    tracemalloc.start()
    count = sum(row.image is not None for row in data.iter_images(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40 and peak < 10 * 128 * 128 * 3


def test_write_images_round_trip_and_leaves_no_partial_file(tmp_path):
    for c in (1, 3):
        images = random_images(12, c=c)
        paths = data.write_images(tmp_path / str(c), images)
        assert [p.name for p in paths][-1] == "00011.png"
        np.testing.assert_array_equal(data.read_images(tmp_path / str(c)).images, images)
        data.write_images(tmp_path / str(c), data.to_float(images[::-1]))  # float, and again
        np.testing.assert_array_equal(data.read_images(tmp_path / str(c)).images, images[::-1])
        assert len(os.listdir(tmp_path / str(c))) == 12
    with pytest.raises(ValueError, match="2 channels"):
        data.write_images(tmp_path, random_images(1, c=2))


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    (old,) = data.write_images(tmp_path, random_images(1))
    before = old.read_bytes()

    def fail(self, path, format):
        open(path, "wb").write(b"half a fi")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        data.write_images(tmp_path, random_images(1, seed=1))
    assert old.read_bytes() == before and os.listdir(tmp_path) == ["00000.png"]


def test_load_folder_splits_partition_the_files(tmp_path):
    images = random_images(50)
    data.write_images(tmp_path / "x", images[:20])
    data.write_images(tmp_path / "y", images[20:])
    splits = [data.load(tmp_path, split=split, seed=5) for split in data.SPLITS]
    assert [len(s) for s in splits] == [40, 5, 5]
    assert keys(np.concatenate(splits)) == keys(images)
    np.testing.assert_array_equal(
        data.load(str(tmp_path), split="train", seed=5, num_images=9), splits[0][:9]
    )
    assert keys(data.load(tmp_path, split="test", seed=6)) != keys(splits[2])


def test_load_folder_with_a_bound_decodes_no_more_than_that(tmp_path, monkeypatch):
    data.write_images(tmp_path, random_images(20))
    (tmp_path / "bad.png").write_text("x")
    every = data.load(tmp_path, split="train")
    decode, decoded = data.decode_image, []

    def count(path, shape):
        image, reason = decode(path, shape)
        decoded.append(image is not None)
        return image, reason

    monkeypatch.setattr(data, "decode_image", count)
    for num in (1, 7, len(every), len(every) + 1):
        decoded.clear()
        few = data.load(tmp_path, split="train", num_images=num, exact=False)
        np.testing.assert_array_equal(few, every[:num])
        assert sum(decoded) == len(few)
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "bad.png").write_text("x")
    with pytest.raises(ValueError, match="0 usable images"):
        data.load(tmp_path / "only", split="test", num_images=5, exact=False)


def test_load_folder_leaves_out_bad_files_with_a_warning(tmp_path, caplog):
    data.write_images(tmp_path, random_images(20))
    (tmp_path / "bad1.png").write_text("x")
    (tmp_path / "bad2.png").write_bytes(png(random_images(1, 9, 9)[0]))
    absl.logging.use_absl_handler()
    with caplog.at_level("WARNING", logger="absl"):
        splits = [data.load(tmp_path, split=split) for split in data.SPLITS]
    assert sum(map(len, splits)) == 20
    assert "bad1.png: not an image" in caplog.text and "bad2.png: is 9 x 9" in caplog.text
    with pytest.raises(ValueError, match="usable images.*99 were asked for"):
        data.load(tmp_path, split="train", num_images=99)
    with pytest.raises(ValueError, match="0 usable images"):
        data.load(tmp_path, split="train", image_size=32)
    assert data.load(tmp_path, split="train", image_size=8).shape[1:] == (8, 8, 3)


def test_import_is_light():
    code = (
        "import sys; from flipad_jax import data\n"
        "bad = {'matplotlib', 'sklearn', 'skimage', 'scipy', 'tensorflow'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
