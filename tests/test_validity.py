"""The check for processed images: features against SciPy and Pillow, verdicts on copies."""

import io
import json

import jax
import numpy as np
import pytest
from flax import serialization
from PIL import Image
from scipy import fft
from scipy.spatial import distance

from experiments import _config
from flipad_jax import data, perturbations, zoo
from flipad_jax.detection import calibration, validity
from flipad_jax.generators import sampling


@pytest.fixture(scope="module")
def own():
    """Images of the zoo: 500 to learn from, 200 to test."""
    images = sampling.generate(zoo.load("digits_dcgan_0"), jax.random.key(1), 700)
    return images[:500], images[500:]


@pytest.fixture(scope="module")
def learned(own):
    return validity.fit(own[0], jax.random.key(0))


def textures(num, h, w, c, seed=0):
    """Smooth random pictures with a little grain, all levels, correlated colours."""
    rng = np.random.default_rng(seed)
    falling = 1 / (
        1 + np.hypot(*np.meshgrid(fft.fftfreq(h) * h, fft.fftfreq(w) * w, indexing="ij"))
    )
    spectrum = fft.fft2(rng.standard_normal((num, c, h, w))) * falling**1.5
    smooth = np.moveaxis(fft.ifft2(spectrum).real, 1, -1)
    smooth = smooth.mean(-1, keepdims=True) + 0.4 * smooth
    smooth /= smooth.std(axis=(1, 2, 3), keepdims=True)
    grain = rng.normal(0, 2, smooth.shape)
    return np.clip(128 + 45 * smooth + grain, 0, 255).astype(np.uint8)


def decoded_jpeg(plane, quality):
    file = io.BytesIO()
    Image.fromarray(plane).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


# --- features ---------------------------------------------------------------------------------


def test_block_coefficients_are_those_of_scipy():
    plane = textures(1, 21, 30, 1)[0, ..., 0].astype(np.float32)
    found = np.asarray(validity._block_dct(plane)).reshape(2, 3, 8, 8)
    for i in range(2):
        for j in range(3):
            block = plane[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
            np.testing.assert_allclose(found[i, j], fft.dctn(block, norm="ortho"), atol=2e-3)


@pytest.mark.parametrize("quality", [10, 30, 49, 50, 75, 90, 98])
def test_quantisation_steps_are_those_of_the_codec(quality):
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG", quality=quality)
    np.testing.assert_array_equal(
        validity._quantisation_steps(quality), Image.open(file).quantization[0]
    )


@pytest.mark.parametrize("quality, band", [(50, 0), (70, 1), (85, 2)])
def test_the_comb_tells_the_quality_of_a_jpeg(quality, band):
    for plane in textures(5, 64, 64, 1)[..., 0]:
        dips = [
            np.asarray(validity._comb_dips(validity._block_dct(p.astype(np.float32) - 128)))
            for p in (plane, decoded_jpeg(plane, quality))
        ]
        # A comb of half the steps fits as well, a coarser one does not. From quality 90 on many
        # steps are 1 or 2, and rounding alone makes a dip.
        assert dips[0][:3].max() < 0.2 and dips[1][band] > 1
        assert (dips[1][:band] < 0.5).all()


def test_shares_of_levels_and_differences_are_counts():
    image = textures(1, 24, 17, 3)[0]
    image[:9] = 0
    image[9:12, :, 1] = 3
    image[12:15, :, 2] = 255
    shares = [np.mean(image == 0), np.mean((image >= 1) & (image <= 3))]
    shares += [np.mean((image >= 4) & (image <= 11)), np.mean(image >= 252)]
    expected = [*np.sqrt(shares), len(np.unique(image)) / 16]
    np.testing.assert_allclose(validity._grey_levels(image), expected, rtol=1e-5)

    luma = image[..., 0].astype(np.float32)
    expected = []
    for second in (
        luma[2:] - 2 * luma[1:-1] + luma[:-2],
        luma[:, 2:] - 2 * luma[:, 1:-1] + luma[:, :-2],
    ):
        sizes = np.abs(second)
        expected += [np.mean(sizes == 0), np.mean(sizes == 1)]
        expected += [np.mean((sizes == 2) | (sizes == 3)), np.mean((sizes >= 4) & (sizes < 8))]
    np.testing.assert_allclose(validity._small_differences(luma), np.sqrt(expected), rtol=1e-5)


def test_borders_of_blocks_are_where_a_jpeg_has_them():
    tiles = np.kron(np.arange(12).reshape(3, 4) * 20.0, np.ones((8, 8))).astype(np.float32)
    found = np.asarray(validity._block_borders(tiles))
    np.testing.assert_allclose(found, np.log([80.1 / 0.1, 20.1 / 0.1]), rtol=1e-5)
    assert (np.asarray(validity._block_borders(tiles[3:, 3:])) < 0).all()


@pytest.mark.parametrize("side, start", [(255, 0), (256, 0), (264, 0), (272, 8), (600, 168)])
def test_large_images_are_read_in_the_middle_on_the_grid(side, start):
    images = np.broadcast_to(np.arange(side, dtype=np.int32)[None, :, None, None], (1, side, 20, 1))
    window = validity._window(images)
    assert window.shape == (1, min(side - start, 256), 20, 1)
    assert window[0, 0, 0, 0] == start and start % 8 == 0


# --- the decision -----------------------------------------------------------------------------


def test_untouched_own_images_are_rarely_called_processed(learned, own):
    for level in (0.01, 0.05):
        # 200 images: 3.2 standard deviations above the promised share.
        bound = level + 3.2 * np.sqrt(level * (1 - level) / 200)
        assert np.mean(validity.check(learned, own[1]).p_value <= level) <= bound


@pytest.mark.parametrize(
    "edit, kind",
    [
        (lambda x: perturbations.jpeg(x, 90), "JPEG"),
        (lambda x: perturbations.jpeg(x, 60), "JPEG"),
        (lambda x: perturbations.noise(x, jax.random.key(9), 0.02), "noise"),
        (lambda x: perturbations.blur(x, 3), "blur or resize"),
        (lambda x: perturbations.resize(x, 0.5), "blur or resize"),
        (lambda x: perturbations.crop(x, 30), "crop"),
    ],
)
def test_processed_own_images_are_found_and_the_kind_is_named(learned, own, edit, kind):
    checks = validity.check(learned, edit(own[1]))
    warned = checks.p_value <= 0.01
    assert warned.mean() > 0.9
    assert np.mean(checks.kind[warned] == kind) > 0.85
    assert set(checks.kind) <= set(validity.KINDS)


def test_a_score_is_the_log_odds_of_normal_distributions(learned, own):
    images = np.concatenate([own[1][:40], perturbations.jpeg(own[1][:40], 95), 255 - own[1][:40]])
    found, _ = validity._scores(learned, images)
    x = (validity._describe(images) - np.asarray(learned.offset)) / np.asarray(learned.scale)
    squared = distance.cdist(x, learned.means, "mahalanobis", VI=np.asarray(learned.precision)) ** 2
    excess = np.maximum(squared[:, 1:] - np.asarray(learned.limits), 0)
    odds = (squared[:, :1] - squared[:, 1:]) / 2 - excess / 8
    assert (excess > 0).any() and (odds.max(axis=1) > 0).any() and (odds.max(axis=1) < 0).any()
    np.testing.assert_allclose(found, np.maximum(odds.max(axis=1), 0), rtol=1e-3, atol=1e-2)


def test_p_values_count_the_calibration_images(learned, own):
    scores = np.concatenate([np.zeros(240), np.arange(1.0, 11.0)]).astype(np.float32)
    model = learned.replace(calibration_scores=scores)
    images = np.concatenate([own[1], perturbations.jpeg(own[1], 95)])
    checks = validity.check(model, images)
    found, _ = validity._scores(model, images)
    expected = [(1 + np.sum(scores >= score)) / 251 for score in found]
    np.testing.assert_array_equal(checks.p_value, expected)
    assert checks.p_value.dtype == np.float64
    # Likelier untouched than processed: no evidence at all, whatever its rank.
    assert (found == 0).any() and (checks.p_value[found == 0] == 1).all()


def test_limits_hold_for_copies_that_taught_nothing(learned, own):
    copies = perturbations.noise(own[1], jax.random.key(4), 0.02)
    x = (validity._describe(copies) - np.asarray(learned.offset)) / np.asarray(learned.scale)
    mean = learned.means[1 + list(validity._PROCESSES).index("noise")]
    squared = distance.cdist(x, [mean], "mahalanobis", VI=np.asarray(learned.precision)) ** 2
    limit = float(learned.limits[list(validity._PROCESSES).index("noise")])
    assert np.mean(squared > limit) < 0.1 and np.median(squared) < limit


def test_an_image_unlike_everything_is_not_called_processed(learned):
    stripes = np.zeros((4, 32, 32, 1), np.uint8)
    stripes[:, ::2] = 255
    plain = learned.replace(limits=np.full(5, np.inf, np.float32))
    assert (validity.check(learned, stripes).p_value > 0.01).all()
    assert (validity.check(plain, stripes).p_value <= 0.01).any()


def test_neither_batch_nor_order_nor_dtype_matters(learned, own):
    images = np.concatenate(
        [own[1][:70], perturbations.noise(own[1][:30], jax.random.key(2), 0.01)]
    )
    order = np.random.default_rng(0).permutation(100)
    scores, kinds = validity._scores(learned, images)
    shuffled, shuffled_kinds = validity._scores(learned, images[order])
    np.testing.assert_array_equal(shuffled, scores[order])
    np.testing.assert_array_equal(shuffled_kinds, kinds[order])
    whole = validity.check(learned, images)
    for part in (validity.check(learned, data.to_float(images)), validity.check(learned, images)):
        np.testing.assert_array_equal(part.p_value, whole.p_value)
        np.testing.assert_array_equal(part.kind, whole.kind)
    one = validity.check(learned, images[99:])
    assert one.p_value[0] == whole.p_value[99] and one.kind[0] == whole.kind[99]
    nothing = validity.check(learned, images[:0])
    assert nothing.p_value.shape == nothing.kind.shape == (0,)


def test_half_of_the_images_calibrate_and_the_seed_decides(learned, own):
    assert learned.calibration_scores.shape == (250,)
    assert {leaf.dtype for leaf in jax.tree.leaves(learned)} == {np.dtype(np.float32)}
    again = validity.fit(own[0], jax.random.key(0))
    assert jax.tree.all(jax.tree.map(np.array_equal, learned, again))
    other = validity.fit(own[0], jax.random.key(1), num_images=220)
    assert other.calibration_scores.shape == (110,)


def test_no_image_calibrates_that_was_fitted_on(own, monkeypatch):
    seen = {"fitted": [], "calibrating": []}
    processed, scores = validity._processed, validity._scores

    def watched_processed(process, images, rng):
        seen["fitted"].append({image.tobytes() for image in images})
        return processed(process, images, rng)

    def watched_scores(model, images):
        seen["calibrating"].append({image.tobytes() for image in images})
        return scores(model, images)

    monkeypatch.setattr(validity, "_processed", watched_processed)
    monkeypatch.setattr(validity, "_scores", watched_scores)
    validity.fit(own[0], jax.random.key(0))
    (calibrating,) = seen["calibrating"]
    assert len(calibrating) == 250
    for fitted in seen["fitted"]:
        assert len(fitted) == 250 and not fitted & calibrating


def test_it_is_saved_as_plain_arrays(learned, own):
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = {k: np.asarray(v) for k, v in serialization.to_state_dict(learned).items()}
    read = safetensors.load(safetensors.save(arrays))
    again = validity.Validity(**read, image_shape=learned.image_shape)
    images = perturbations.jpeg(own[1], 95)
    for found, expected in zip(validity.check(again, images), validity.check(learned, images)):
        np.testing.assert_array_equal(found, expected)


def test_colour_of_any_size_is_learned_too():
    images = textures(500, 37, 42, 3)
    model = validity.fit(images[:400], jax.random.key(0))
    test = images[400:]
    assert np.mean(validity.check(model, test).p_value <= 0.01) <= 0.04
    for edited, kind in (
        (perturbations.jpeg(test, 80), "JPEG"),
        (perturbations.noise(test, jax.random.key(1), 0.03), "noise"),
        (perturbations.blur(test, 3), "blur or resize"),
    ):
        checks = validity.check(model, edited)
        assert np.mean(checks.p_value <= 0.01) > 0.9 and np.mean(checks.kind == kind) > 0.9
    # Only the colour of a JPEG has half the resolution.
    planes = validity._describe(test), validity._describe(perturbations.jpeg(test, 96))
    fine = [features[:, -63:].mean(axis=0).reshape(-1)[-8:].mean() for features in planes]
    assert fine[1] < fine[0] - 0.5


@pytest.mark.parametrize(
    "shape, words",
    [((199, 32, 32, 1), "199"), ((300, 32, 15, 3), "32 x 15"), ((300, 32, 32, 4), "4 channels")],
)
def test_where_nothing_can_be_learned_fit_says_none_and_why(shape, words):
    images = np.zeros(shape, np.uint8)
    assert validity.fit(images, jax.random.key(0)) is None
    assert words in validity.why_not(shape[1:], shape[0])
    assert validity.why_not((16, 16, 3), 200) is None


def test_images_that_are_all_alike_give_no_nan():
    model = validity.fit(np.zeros((200, 16, 16, 1), np.uint8), jax.random.key(0))
    checks = validity.check(model, np.zeros((3, 16, 16, 1), np.uint8))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model))
    np.testing.assert_array_equal(checks.p_value, 1.0)


def test_bad_images_are_refused(learned, own):
    with pytest.raises(ValueError, match="uint8"):
        validity.fit(data.to_float(own[0]), jax.random.key(0))
    with pytest.raises(ValueError, match=r"\[n, h, w, c\]"):
        validity.fit(own[0][0], jax.random.key(0))
    with pytest.raises(ValueError, match="32, 32, 1"):
        validity.check(learned, own[1][:, :24])


# --- the experiment ---------------------------------------------------------------------------


def test_experiment_counts_wrong_verdicts_and_right_warnings(tmp_path, capsys):
    flags = ["run.py", "--experiment=validity", "--preset=smoke", f"--workdir={tmp_path}"]
    assert _config.main(flags) == 0
    found = json.loads((tmp_path / "results.json").read_text())["metrics"]
    treatments = {"untouched", "JPEG 90", "noise 0.02", "blur 3", "crop 30", "resize 0.5"}
    assert set(found["own_not_ours"]) == treatments
    rivals = {"digits_dcgan_1", "digits_dcgan_2", "digits_wgan_gp_0"}
    assert set(found["warned"]) == {"own", "real", *rivals}
    # Untouched the verdict is right and nothing is said; processed it is wrong, and that is said.
    assert found["own_not_ours"]["untouched"] <= 0.05
    assert found["warned"]["own"]["untouched"] <= 0.06
    assert found["own_not_ours"]["JPEG 90"] > 0.9 and found["warned"]["own"]["JPEG 90"] > 0.9
    assert found["warned_among_own_wrong"] > 0.9
    low, high = found["false_alarms"]["own"]["interval"]
    assert low <= found["warned"]["own"]["untouched"] <= high < 0.15
    own = found["warned"]["own"]
    hit = np.mean([share for name, share in own.items() if name != "untouched"])
    np.testing.assert_allclose(
        found["processed_among_warned"]["own"], hit / (hit + own["untouched"])
    )
    stage = np.load(tmp_path / "stages" / "judged.npz")
    threshold = calibration.verdict_threshold(stage["calibration"], 0.005)
    wrong = np.concatenate([stage[f"score-{name}"] for name in treatments]) > threshold
    warned = np.concatenate([stage[f"p_value-own-{name}"] for name in treatments]) <= 0.01
    assert found["own_wrong"] == wrong.sum()
    np.testing.assert_allclose(found["warned_among_own_wrong"], warned[wrong].mean())
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list((tmp_path / "figures").iterdir())) == 2
    assert "JPEG 90" in capsys.readouterr().out
