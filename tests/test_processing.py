"""Models of processing against SciPy, Pillow and NumPy, and searched for together with a latent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from flipad_jax import data
from flipad_jax.detection import processing, regeneration
from flipad_jax.detection.latent_inversion import LatentGenerator
from flipad_jax.detection.regeneration import RegenerationConfig
from flipad_jax.generators import dcgan, sampling
from flipad_jax.perturbations import published

RNG = jax.random.key(7)
PHOTOS = data.load("photos", split="test", image_size=32, num_images=4)
CONFIG = RegenerationConfig(num_starts=6, max_iters=60, places=6)


def applied(name, images, unknowns):
    """Grey levels that are not rounded; `images` are levels."""
    floats = jnp.asarray(images / 127.5 - 1, jnp.float32)
    apply = jax.jit(processing.get(name).apply)
    found = apply(floats, jnp.asarray(unknowns, jnp.float32))
    assert found.dtype == jnp.float32 and found.shape == floats.shape
    return (np.asarray(found, np.float64) + 1) * 127.5


def window(std, radius):
    """Weights right of the middle of a Gaussian window, to four pixels."""
    weights = np.zeros(9)
    offsets = np.arange(-radius, radius + 1)
    weights[4 - radius : 5 + radius] = np.exp(-0.5 * (offsets / std) ** 2)
    return (weights / weights.sum())[5:]


# --- each alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (20, 13), (5, 8)])
@pytest.mark.parametrize("std, radius", [(0.6, 4), (2.0, 4), (1.0, 2)])
def test_blur_is_scipys(std, radius, shape):
    images = np.random.default_rng(0).uniform(0, 255, (2, *shape, 3))
    expected = ndimage.gaussian_filter(
        images, (0, std, std, 0), radius=(0, radius, radius, 0), mode="mirror"
    )
    found = applied("blur", images, window(std, radius))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_blur_takes_any_symmetric_window():
    rng = np.random.default_rng(1)
    images, weights = rng.uniform(0, 255, (2, 11, 9, 1)), rng.uniform(-0.1, 0.5, 4)
    taps = np.concatenate([weights[::-1], [1 - 2 * weights.sum()], weights])
    expected = ndimage.correlate1d(images, taps, axis=1, mode="mirror")
    expected = ndimage.correlate1d(expected, taps, axis=2, mode="mirror")
    found = applied("blur", images, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("size", [3, 5, 9])
def test_blur_is_the_published_one(size):
    """A box of the same size is a window too."""
    found = applied("blur", PHOTOS, window(3.0, size // 2))
    assert np.abs(found - published.blur(PHOTOS, size)).max() <= 0.5 + 1e-3
    box = np.where(np.arange(1, 5) <= size // 2, 1 / size, 0)
    floats = PHOTOS.astype(float)
    expected = ndimage.uniform_filter(floats, (0, size, size, 0), mode="mirror")
    np.testing.assert_allclose(applied("blur", floats, box), expected, atol=1e-3)


@pytest.mark.parametrize("size", [31, 30, 28, 27, 20])
def test_crop_is_the_published_one(size):
    """Pillow rounds after the columns and again after the rows."""
    lost, start = 32 - size, round((32 - size) / 2)
    unknowns = (10 * lost / 32, start - lost / 2, start - lost / 2)
    found = applied("crop", PHOTOS, unknowns)
    difference = np.abs(found - published.crop(PHOTOS, size))
    assert difference.max() <= 1 + 0.05 and difference.mean() < 0.5


def test_crop_knows_where_the_middle_lies():
    """Against two interpolations of the part in NumPy: rows first, then columns."""
    image = PHOTOS[0, :, :, 0].astype(float)
    top, left, size = 3, 7, 22
    part = image[top : top + size, left : left + size]
    place = np.clip((np.arange(32) + 0.5) * size / 32 - 0.5, 0, size - 1)
    rows = np.stack([np.interp(place, np.arange(size), column) for column in part.T], axis=1)
    expected = np.stack([np.interp(place, np.arange(size), row) for row in rows])
    unknowns = (10 * 10 / 32, top - 5, left - 5)
    found = applied("crop", image[None, :, :, None], unknowns)[0, :, :, 0]
    np.testing.assert_allclose(found, expected, atol=2e-2)


def test_unknowns_have_bounds():
    """Beyond them a plain image would be an own one, made dark or cropped to a pixel."""
    for name, beyond, bound in (
        ("brightness", (0.0, 2.0), (0.5, 0.5)),
        ("crop", (9.5, 0.0, 0.0), (5.0, 0.0, 0.0)),
        ("blur", (0.9, 0.0, 0.0, -0.9), (0.5, 0.0, 0.0, -0.1)),
    ):
        np.testing.assert_array_equal(applied(name, PHOTOS, beyond), applied(name, PHOTOS, bound))


def test_brightness_is_a_gain_and_an_offset_of_levels():
    images = np.random.default_rng(0).uniform(0, 255, (2, 7, 5, 3))
    found = applied("brightness", images, (1.3, -0.2))
    # Not clipped: the ends of the scale are for the residual.
    np.testing.assert_allclose(found, 1.3 * images - 0.2 * 127.5, atol=1e-3)
    assert found.max() > 255 and found.min() < 0


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [95, 80, 40])
def test_jpeg_guesses_the_quality_and_replays_the_codec(quality, channels):
    codec = processing.get("jpeg").codec
    image = PHOTOS[0, :, :, :channels]
    suspect = published.jpeg(image[None], quality)[0]
    guesses = codec.guess(image, suspect)
    assert guesses[0] == (quality,) and len(guesses) == len(set(guesses)) == 3
    # Its model makes nearly what the codec makes, and the replay exactly that.
    floats = jnp.asarray(image[None] / 127.5 - 1, jnp.float32)
    soft = codec.apply(floats, jnp.asarray(guesses[0], jnp.float32))
    assert soft.dtype == jnp.float32
    soft = (np.asarray(soft[0], np.float64) + 1) * 127.5
    lost = np.abs(suspect.astype(float) - image).mean()
    assert np.abs(soft - suspect).mean() < min(0.75, lost / 2)
    again, what = codec.replay(image, np.float32(guesses[0]))
    np.testing.assert_array_equal(again, suspect)
    assert what == f"JPEG of quality {quality}"


def test_guesses_are_the_nearest_of_all_qualities():
    """Also of an image that is not quite the one that was compressed."""
    image = PHOTOS[1]
    suspect = published.jpeg(image[None], 70)[0]
    found = np.clip(
        image.astype(int) + np.random.default_rng(0).integers(-1, 2, image.shape), 0, 255
    )
    found = found.astype(np.uint8)
    guesses = processing.get("jpeg").codec.guess(found, suspect)
    errors = {
        float(q): np.square(published.jpeg(found[None], q)[0].astype(float) - suspect).sum()
        for q in range(1, 101)
    }
    assert [errors[q] for q, in guesses] == sorted(errors.values())[:3]
    assert abs(guesses[0][0] - 70) <= 2


@pytest.mark.parametrize(
    "name, unknowns",
    [
        ("noise", ()),
        ("jpeg", ()),
        ("blur", (0, 0, 0, 0)),
        ("crop", (0, 0, 0)),
        ("brightness", (1, 0)),
    ],
)
def test_nothing_happens_at_the_unknowns_of_nothing(name, unknowns):
    assert len(unknowns) == processing.get(name).num_unknowns
    np.testing.assert_allclose(applied(name, PHOTOS, unknowns), PHOTOS, atol=1e-3)


@pytest.mark.parametrize("name", ["blur", "crop", "brightness"])
def test_derivatives_are_finite_differences(name):
    kind = processing.get(name)
    with jax.enable_x64(True):
        images = jnp.asarray(PHOTOS[:1] / 127.5 - 1)
        # Where no pixel falls on another, at which an interpolation has a kink.
        unknowns = jnp.asarray(kind.starts[0], jnp.float64) + 0.0123
        step = np.random.default_rng(0).normal(size=len(unknowns)) * 1e-6
        images_step = np.random.default_rng(1).normal(size=images.shape) * 1e-6
        _, found = jax.jvp(kind.apply, (images, unknowns), (images_step, step))
        ends = [kind.apply(images + s * images_step, unknowns + s * step) for s in (0.5, -0.5)]
        np.testing.assert_allclose(found, ends[0] - ends[1], rtol=1e-3, atol=1e-10)


# --- as they are looked up and compiled ---------------------------------------------------------


def test_kinds_are_found_by_name():
    assert processing.NAMES == ("noise", "jpeg", "blur", "crop", "brightness")
    for name in processing.NAMES:
        kind = processing.get(name)
        assert kind.name == name and kind is processing.get(name)
        assert {len(start) for start in kind.starts} == {kind.num_unknowns}
    with pytest.raises(ValueError, match="'fog' is unknown; there are noise, jpeg, blur"):
        processing.get("fog")


def test_kinds_are_static_under_jit():
    """No leaves, equal to themselves and to nothing else: one compilation each."""
    kinds = [processing.get(name) for name in processing.NAMES]
    assert len(set(kinds)) == len(kinds) and jax.tree.leaves(kinds) == []
    assert dataclasses.replace(kinds[2]) == kinds[2] and hash(kinds[1].codec) is not None
    traces = []

    @jax.jit
    def apply(kind, images, unknowns):
        traces.append(kind.name)
        return kind.apply(images, unknowns)

    images = jnp.ones((1, 16, 16, 1), jnp.float32)
    for kind in kinds * 2:
        apply(kind, images, jnp.asarray(kind.starts[0], jnp.float32))
    assert traces == list(processing.NAMES)


# --- searched for together with the latent ------------------------------------------------------


def make_generator(seed):
    """An untrained model with strong weights and offsets, which draws pictures."""
    module, rng = dcgan.Generator(1, (8, 8)), jax.random.key(seed)
    variables = module.init(rng, jnp.zeros((1, 4), jnp.float32))

    def stronger(path, x):
        if path[-1].key == "bias":
            return 0.5 * jax.random.normal(rng, x.shape, jnp.float32)
        if path[0].key == "last":
            return 40 * x
        return 8 * x if x.ndim == 4 else x

    params = jax.tree.map_with_path(stronger, variables["params"])
    return sampling.TrainedGenerator({**variables, "params": params}, module, (16, 16, 1), 4)


OURS = make_generator(3)


@pytest.fixture(scope="module", name="own")
def _own():
    return sampling.generate(OURS, jax.random.key(5), 4)


def regenerated(images, name, **settings):
    config = dataclasses.replace(CONFIG, **settings)
    kind = None if name is None else processing.get(name)
    return regeneration.regenerate(OURS, images, RNG, config, processing=kind)


def assert_found(found, images, own):
    """The processed image to about a level, and under it the one that was processed."""
    np.testing.assert_array_equal(
        found.image, regeneration.make_images(OURS, found.latent), err_msg="before processing"
    )
    errors = found.processed.astype(float) - images
    np.testing.assert_allclose(found.rmse, np.sqrt(np.square(errors).mean(axis=(1, 2, 3))), 1e-6)
    np.testing.assert_array_equal(found.largest, np.abs(errors).max(axis=(1, 2, 3)))
    assert found.rmse.max() < 1
    before = np.sqrt(np.square(found.image.astype(float) - own).mean(axis=(1, 2, 3)))
    assert before.max() < 2


def assert_without_is_worse(found, images):
    without = regenerated(images, None, num_starts=2)
    assert without.rmse.min() > 3 * found.rmse.max() and not without.proved.any()


def test_a_blurred_image_is_found_with_its_window(own):
    images = published.blur(own, 3)
    found = regenerated(images, "blur")
    assert_found(found, images, own)
    np.testing.assert_allclose(found.unknowns, np.tile(window(3.0, 1), (4, 1)), atol=0.01)
    assert_without_is_worse(found, images)


def test_a_cropped_image_is_found_with_its_place(own):
    images = published.crop(own, 13)  # from row and column round(1.5) = 2
    found = regenerated(images, "crop")
    assert_found(found, images, own)
    np.testing.assert_allclose(found.unknowns, np.tile([30 / 16, 0.5, 0.5], (4, 1)), atol=0.03)
    assert_without_is_worse(found, images)


def test_a_brighter_image_is_found_with_its_gain(own):
    images = np.clip(np.rint(1.2 * own + 20.0), 0, 255).astype(np.uint8)
    assert (images == 255).any()  # clipped, and still an exact model
    found = regenerated(images, "brightness")
    assert_found(found, images, own)
    np.testing.assert_allclose(found.unknowns, np.tile([1.2, 20 / 127.5], (4, 1)), atol=0.02)
    assert_without_is_worse(found, images)


def test_a_noisy_image_is_found_under_its_noise(own):
    images = published.noise(own, RNG, 0.05)
    found = regenerated(images, "noise")
    added = np.sqrt(np.square(images.astype(float) - own).mean(axis=(1, 2, 3)))
    # Four unknowns take up 4 / 256 of the noise, and clipped pixels some more.
    np.testing.assert_allclose(found.rmse, added, rtol=0.05)
    assert np.square(found.image.astype(float) - own).mean() < 0.1 * np.square(added).min()
    assert not found.proved.any() and set(found.replayed) == {""}


def test_a_compressed_image_is_found_and_the_codec_replayed(own):
    images = published.jpeg(own, 80)
    found = regenerated(images, "jpeg")
    for index, image in enumerate(found.image):
        quality = int(found.unknowns[index, 0])
        again = published.jpeg(image[None], quality)[0]
        np.testing.assert_array_equal(found.processed[index], again)
        assert found.replayed[index] == f"JPEG of quality {quality}"
        assert abs(quality - 80) <= 2
    errors = found.processed.astype(float) - images
    np.testing.assert_allclose(found.rmse, np.sqrt(np.square(errors).mean(axis=(1, 2, 3))), 1e-6)
    np.testing.assert_array_equal(found.largest, np.abs(errors).max(axis=(1, 2, 3)))
    # Nearer to the original than the file is: the codec's losses are undone.
    lost = np.sqrt(np.square(images.astype(float) - own).mean(axis=(1, 2, 3)))
    left = np.sqrt(np.square(found.image.astype(float) - own).mean(axis=(1, 2, 3)))
    assert (left < lost / 2).all() and (found.rmse < lost).all()
    assert all(len(field) == 0 for field in regenerated(images[:0], "jpeg"))


def test_where_no_start_makes_an_image_there_is_nothing_to_compress(own):
    """A generator that normalises its latent has no image at zero, where this search begins."""

    def apply(params, z):
        return OURS.module.apply(params, z / jnp.linalg.norm(z, axis=1, keepdims=True))

    normed = LatentGenerator(OURS.variables, apply, OURS.latent_dim)
    config = dataclasses.replace(CONFIG, num_starts=1)
    found = regeneration.regenerate(normed, own, RNG, config, processing=processing.get("jpeg"))
    assert np.isinf(found.rmse).all() and not found.proved.any()
    assert set(found.replayed) == {"not compressed"}


def test_a_second_search_that_finds_nothing_takes_nothing_away(own, monkeypatch):
    search, results = regeneration._search, []

    def only_the_first(model, images, start_at, config, best, progress):
        if not results:
            search(model, images, start_at, config, best, progress)
        results.append(best)

    monkeypatch.setattr(regeneration, "_search", only_the_first)
    images = published.jpeg(own, 80)
    found = regenerated(images, "jpeg")
    assert len(results) == 2 and not found.proved.any()
    np.testing.assert_array_equal(found.latent, results[0].latent)
    errors = found.image.astype(float) - images
    np.testing.assert_allclose(found.rmse, np.sqrt(np.square(errors).mean(axis=(1, 2, 3))), 1e-6)
    assert set(found.replayed) == {"not compressed"}


@pytest.mark.parametrize("with_bank", [False, True])
@pytest.mark.parametrize("kind", ["crop", "blur", "brightness", "noise"])
def test_no_start_is_made_twice(own, kind, with_bank, monkeypatch):
    """Zero is tried once; every start of the unknowns comes before one comes again."""
    starts = []

    def spy(model, images, start_at, config, *rest):
        starts.extend(start_at(0, number) for number in range(8))

    monkeypatch.setattr(regeneration, "_search", spy)
    bank = regeneration.make_bank(OURS, jax.random.key(6), 2) if with_bank else None
    known = processing.get(kind)
    config = dataclasses.replace(CONFIG, num_starts=8)
    regeneration.regenerate(OURS, own[:1], RNG, config, bank=bank, processing=known)
    assert len({start.tobytes() for start in starts}) == 8
    latents, unknowns = np.split(np.stack(starts), [OURS.latent_dim], axis=1)
    assert np.flatnonzero(~latents.any(axis=1)).tolist() == [int(with_bank)]
    first = unknowns[: len(known.starts)]
    np.testing.assert_array_equal(first, np.asarray(known.starts, np.float32))


def test_every_guess_starts_where_the_first_search_ended(own, monkeypatch):
    search, starts = regeneration._search, []

    def spy(model, images, start_at, config, *rest):
        pairs = [(i, s) for i in range(len(images)) for s in range(config.num_starts)]
        before = [start_at(*pair) for pair in pairs]
        search(model, images, start_at, config, *rest)
        np.testing.assert_array_equal(before, [start_at(*pair) for pair in pairs])
        starts.append(np.reshape(before, (len(images), config.num_starts, -1)))

    monkeypatch.setattr(regeneration, "_search", spy)
    images = published.jpeg(own, 80)
    found = regenerated(images, "jpeg")
    latents, qualities = np.split(starts[1], [4], axis=2)
    assert latents.shape == (4, 3, 4) and not np.allclose(latents[:, 0], found.latent, atol=1e-6)
    first = regeneration.make_images(OURS, latents[:, 0])
    for index, image in enumerate(images):
        assert (latents[index] == latents[index, 0]).all()
        guesses = processing.get("jpeg").codec.guess(first[index], image)
        np.testing.assert_array_equal(qualities[index], guesses)


def test_the_slack_is_that_of_the_processing(own, monkeypatch):
    settings = []
    monkeypatch.setattr(regeneration, "_search", lambda *args: settings.append(args[3]))
    for name in ("noise", "blur"):
        regenerated(own, name, slack=3.0)
    regenerated(own, None, slack=3.0)
    assert [config.slack for config in settings] == [25.0, 0.5, 3.0]


def test_another_quality_is_not_compiled_anew():
    calls = []
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)) / 3, jnp.float32)

    def picture(matrix, z):
        calls.append(len(z))
        return jnp.tanh(z @ matrix).reshape(-1, 8, 8, 1)

    generator = LatentGenerator(matrix, picture, 4)
    images = regeneration.make_images(generator, np.random.default_rng(1).normal(size=(3, 4)))
    counts = []
    for quality in (90, 40):
        del calls[:]
        regeneration.regenerate(
            generator,
            published.jpeg(images, quality),
            RNG,
            dataclasses.replace(CONFIG, max_iters=3),
            processing=processing.get("jpeg"),
        )
        counts.append(len(calls))
    # What is left is `check_generator`, which calls it.
    assert counts[1] <= 2 < counts[0]


def test_foreign_images_are_not_found():
    foreign = sampling.generate(make_generator(4), jax.random.key(5), 3)
    for name in ("blur", "brightness"):
        found = regenerated(foreign, name, num_starts=2)
        assert found.rmse.min() > 10 and not found.proved.any()
