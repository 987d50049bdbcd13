"""The attributor as a user has it: fit, score, verdicts."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flipad_jax
from flipad_jax import AttributorConfig, FinalLayer, data, linops, metrics, perturbations
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection import calibration, classifier, validity
from flipad_jax.detection.classifier import ClassifierConfig
from flipad_jax.detection.deepsad import DeepSADConfig
from flipad_jax.detection.one_class import OneClassConfig
from flipad_jax.inversion.final_layer import forward, invert

QUICK = {
    "check_untouched": False,
    "num_altered": 0,
    "tol": 0.0,
    "max_iters": 15,
    "one_class": OneClassConfig(num_components=20, batch_size=64),
    "deepsad": DeepSADConfig(widths=(4, 4), rep_dim=8, epochs=2, batch_size=32),
}
CHANNELS = 5


def make_layer(bias=None):
    kernel = np.random.default_rng(0).standard_normal((4, 4, CHANNELS, 3)).astype(np.float32)
    operator = linops.conv_transpose(0.15 * kernel, (8, 8, CHANNELS), strides=2, padding=1)
    return FinalLayer(operator, None if bias is None else jnp.asarray(bias, jnp.float32))


LAYER = make_layer()


def model_images(seed, num, model_seed=0, layer=LAYER):
    """Images of a toy generator: non-negative activations around those of a few latent factors."""
    mixing = np.random.default_rng(model_seed).standard_normal((6, 8, 8, CHANNELS))
    latents = np.random.default_rng(seed).standard_normal((num, 6))
    z = np.maximum(np.einsum("nk,khwc->nhwc", latents, mixing) * 0.5, 0).astype(np.float32)
    return data.to_uint8(np.asarray(jax.vmap(lambda v: forward(layer, v))(z))), z


OWN, ACTIVATIONS = model_images(1, 400)
Z_BAR = ACTIVATIONS.mean(axis=0)
REAL = data.load("photos", split="train", image_size=16, num_images=200)


def fit(detector="one_class", features="activations", layer=LAYER, real=REAL, **options):
    config = AttributorConfig(detector=detector, features=features, **{**QUICK, **options})
    real = None if detector == "one_class" else real
    return flipad_jax.fit(layer, Z_BAR, OWN, real, rng=jax.random.key(0), config=config)


@pytest.fixture(scope="module")
def fitted():
    return fit()


def test_own_images_are_accepted_and_others_are_not(fitted):
    own, _ = model_images(2, 200)
    found = flipad_jax.verdicts(fitted, own, fnr=0.05)
    assert found.accepted.mean() > 0.85 and set(found.verdict) <= {"ours", "not_ours"}
    # The same last layer, another body: what the activations are like is all that differs.
    for rival in (REAL[:100], model_images(3, 100, model_seed=5)[0]):
        assert metrics.auc(found.score, flipad_jax.score(fitted, rival)) > 0.95


def test_scores_p_values_threshold_and_verdict_agree(fitted):
    images = np.concatenate([OWN[:30], REAL[:30]])
    assert len(fitted.calibration_scores) == 100
    for fnr in (0.0, 0.05, 0.3):
        found = flipad_jax.verdicts(fitted, images, fnr=fnr)
        np.testing.assert_array_equal(found.score, flipad_jax.score(fitted, images))
        assert found.threshold == calibration.verdict_threshold(fitted.calibration_scores, fnr)
        np.testing.assert_array_equal(found.accepted, found.score <= found.threshold)
        np.testing.assert_array_equal(found.verdict == "ours", found.accepted)
        expected = calibration.conformal_p_values(fitted.calibration_scores, found.score)
        np.testing.assert_array_equal(found.p_value, expected)
        if fnr:
            np.testing.assert_array_equal(found.verdict == "not_ours", found.p_value <= fnr)


def test_calibration_images_fit_nothing(monkeypatch):
    seen = []
    original = attribution.one_class.fit
    monkeypatch.setattr(
        attribution.one_class,
        "fit",
        lambda own, reference, config, **options: seen.append((own, reference))
        or original(own, reference, config, **options),
    )
    fitted = fit()
    own, reference = seen[0]
    assert (len(own), len(reference)) == (200, 100)
    z, _ = flipad_jax.invert(LAYER, OWN, Z_BAR, tol=0.0, max_iters=15, method="fista")
    every = np.asarray(z) - Z_BAR[None]
    rows = {row.tobytes(): i for i, row in enumerate(np.round(every, 3).reshape(400, -1))}
    used = [
        rows[row.tobytes()]
        for part in (own, reference)
        for row in np.round(part, 3).reshape(len(part), -1)
    ]
    assert len(set(used)) == 300
    rest = np.setdiff1d(np.arange(400), used)
    np.testing.assert_allclose(
        np.sort(flipad_jax.score(fitted, OWN[rest])), fitted.calibration_scores, rtol=1e-3
    )


def test_altered_copies_of_own_images_teach_a_statistic(tmp_path):
    """Rivals of the very same activations, whose last layer alone is another."""
    kernel = 0.15 * np.random.default_rng(8).standard_normal((4, 4, CHANNELS, 3))
    operator = linops.conv_transpose(
        kernel.astype(np.float32), (8, 8, CHANNELS), strides=2, padding=1
    )
    rival, _ = model_images(4, 100, layer=FinalLayer(operator))
    own, _ = model_images(2, 100)
    network = ClassifierConfig(widths=(16, 32), num_steps=150)
    fitted = fit(num_altered=1000, classifier=network)
    assert set(fitted.detector.classifiers) == {"altered", "altered_activations"}
    assert fitted.detector.reference.shape == (5, 100)
    logits = [
        classifier.logits(fitted.detector.classifiers["altered"], images)
        for images in (own, perturbations.alter(own, 9, 100), rival)
    ]
    assert metrics.auc(logits[0], logits[1]) > 0.8 and metrics.auc(logits[0], logits[2]) > 0.8
    flipad_jax.save(fitted, tmp_path)
    np.testing.assert_array_equal(
        flipad_jax.score(flipad_jax.load(tmp_path), rival),
        flipad_jax.score(fitted, rival),
    )


def test_as_few_iterations_as_suffice_are_found_and_stored(tmp_path, monkeypatch):
    seen, original = [], attribution._activations
    monkeypatch.setattr(
        attribution,
        "_activations",
        lambda layer, z_bar, config, images: seen.append(config.max_iters)
        or original(layer, z_bar, config, images),
    )
    areas = iter((0.90, 0.97, 0.974, 0.96))  # of 3, 10, 30 and 100: 10 is within 0.005 of the best
    monkeypatch.setattr(attribution.metrics, "auc", lambda own, others: next(areas))
    fitted = fit(max_iters=0)
    assert {3, 10, 30, 100} <= set(seen)
    assert fitted.config.max_iters == 10
    flipad_jax.save(fitted, tmp_path)
    loaded = flipad_jax.load(tmp_path)
    assert loaded.config.max_iters == 10
    np.testing.assert_array_equal(
        flipad_jax.score(loaded, REAL[:8]), flipad_jax.score(fitted, REAL[:8])
    )
    for wrong in ({"tol": 1e-2}, {"detector": "deepsad"}):
        with pytest.raises(ValueError, match="max_iters=0 .* one-class"):
            AttributorConfig(max_iters=0, **wrong)


def test_immunised_is_fitted_to_treated_images(monkeypatch):
    seen, original = {}, attribution.classifier.fit

    def noting(rng, own, others, *args, reads, **options):
        if reads == "images":
            seen.update(own=own, others=others)
        return original(rng, own, others, *args, reads=reads, **options)

    monkeypatch.setattr(attribution.classifier, "fit", noting)
    few = {"num_altered": 64, "classifier": ClassifierConfig(widths=(4,), num_steps=1)}
    untreated = fit(**few)
    before = dict(seen)
    fitted = fit(immunize="blur-3", **few)
    # Own images and, after they were altered, their copies: the same ones, blurred.
    for name, images in before.items():
        np.testing.assert_array_equal(seen[name], perturbations.blur(images, 3))
    blurred, _ = model_images(2, 200)
    blurred = perturbations.blur(blurred, 3)
    assert flipad_jax.verdicts(fitted, blurred, fnr=0.05).accepted.mean() > 0.85
    assert flipad_jax.verdicts(untreated, blurred, fnr=0.05).accepted.mean() < 0.5
    with pytest.raises(ValueError, match="unknown perturbation 'fog'"):
        AttributorConfig(immunize="fog")


def test_impostors_teach_a_statistic(tmp_path):
    impostors, _ = model_images(7, 200, model_seed=9)
    config = AttributorConfig(
        **QUICK,
        classifier=ClassifierConfig(widths=(8,), num_steps=40),
        num_inverted=100,
    )
    seen = []
    fitted = flipad_jax.fit(
        LAYER,
        Z_BAR,
        OWN,
        rng=jax.random.key(0),
        impostors=impostors,
        config=config,
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    assert ("learning from impostors, steps", 40, 40) in seen
    assert ("inverting own images for reference", 100, 100) in seen
    assert ("inverting own images", 100, 100) in seen  # of 200
    assert fitted.detector.reference.shape == (4, 100)
    images = np.concatenate([OWN[:5], REAL[:5]])
    flipad_jax.save(fitted, tmp_path)
    np.testing.assert_array_equal(
        flipad_jax.score(flipad_jax.load(tmp_path), images), flipad_jax.score(fitted, images)
    )
    with pytest.raises(ValueError, match="takes no images of impostors"):
        flipad_jax.fit(
            LAYER,
            Z_BAR,
            OWN,
            REAL,
            rng=jax.random.key(0),
            impostors=impostors,
            config=AttributorConfig(detector="deepsad"),
        )


@pytest.mark.parametrize("features", ["activations", "pixels", "dct"])
def test_deepsad_on_every_kind_of_features(features, tmp_path):
    fitted = fit("deepsad", features)
    scores = flipad_jax.score(fitted, OWN[:10])
    assert np.isfinite(scores).all()
    # Floating images are judged as the 8-bit ones that they are.
    floats = data.to_float(OWN[:10])
    np.testing.assert_allclose(flipad_jax.score(fitted, floats), scores, rtol=1e-3)
    flipad_jax.save(fitted, tmp_path / "a")
    np.testing.assert_array_equal(
        flipad_jax.score(flipad_jax.load(tmp_path / "a"), OWN[:10]), scores
    )


def test_an_inversion_without_certificate_is_no_verdict(fitted):
    strict = dataclasses.replace(
        fitted, config=dataclasses.replace(fitted.config, tol=1e-9, max_iters=3)
    )
    found = flipad_jax.verdicts(strict, REAL[:4])
    assert set(found.verdict) == {"cannot_judge"} and not found.accepted.any()
    assert np.isnan(found.p_value).all() and not found.converged.any()
    with pytest.raises(ValueError, match="did not reach tol"):
        fit(tol=1e-9, max_iters=3)


def missing(monkeypatch, count):
    """The first `count` images of every set are scored as if their inversion missed its bound."""
    honest = attribution.score_with_info

    def marked(*args, **kwargs):
        found = honest(*args, **kwargs)
        return found._replace(converged=found.converged & (np.arange(len(found.score)) >= count))

    monkeypatch.setattr(attribution, "score_with_info", marked)


def test_calibration_images_without_certificate_set_no_threshold(fitted, monkeypatch, caplog):
    missing(monkeypatch, 7)
    found = fit().calibration_scores
    assert len(found) == 93 and set(found) < set(fitted.calibration_scores)
    assert "7 of 100 calibration images are left out" in caplog.text
    missing(monkeypatch, 100)
    with pytest.raises(ValueError, match="none of 100 inversions of calibration images reached"):
        fit()


def test_no_images_no_verdicts(fitted):
    assert flipad_jax.verdicts(fitted, OWN[:0]).verdict.shape == (0,)


def test_the_same_seed_gives_the_same_attributor(fitted):
    np.testing.assert_array_equal(fit().calibration_scores, fitted.calibration_scores)


@pytest.mark.parametrize(
    "images, message",
    [
        (OWN[0], "shape"),
        (OWN[:, :8], "shape"),
        (OWN.astype(np.int32), "int32"),
        (np.full((2, 16, 16, 3), np.nan, np.float32), "NaN"),
        (OWN.astype(np.float32), r"\[-1, 1\]"),
    ],
)
def test_images_that_cannot_be_judged(fitted, images, message):
    with pytest.raises(ValueError, match=message):
        flipad_jax.verdicts(fitted, images)


def test_wrong_calls_are_refused():
    call = lambda *args, **config: flipad_jax.fit(  # noqa: E731
        LAYER, Z_BAR, *args, rng=jax.random.key(0), config=AttributorConfig(**config)
    )
    with pytest.raises(ValueError, match="needs real images"):
        call(OWN, detector="deepsad")
    with pytest.raises(ValueError, match="own images alone"):
        call(OWN, REAL)
    with pytest.raises(ValueError, match="199"):
        call(OWN[:60])
    for config, message in (
        ({"detector": "none"}, "detector"),
        ({"features": "pixels"}, "reads activations"),
        ({"detector": "deepsad", "features": "audio"}, "features"),
        ({"calibration_share": 0.6}, "calibration_share"),
        ({"tol": float("nan")}, "tol"),
        ({"num_inverted": 5}, "num_inverted=5"),
    ):
        with pytest.raises(ValueError, match=message):
            AttributorConfig(**config)


def test_too_few_images_are_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(validity, "fit", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match="199"):
        flipad_jax.fit(LAYER, Z_BAR, OWN[:60], rng=jax.random.key(0))
    config = AttributorConfig(calibration_share=0.49)
    with pytest.raises(ValueError, match="leave 4 to fit, expected 30"):
        flipad_jax.fit(LAYER, Z_BAR, OWN[:200], rng=jax.random.key(0), config=config)


def test_images_are_judged_as_8_bits_whatever_they_came_as(fitted):
    draw = np.random.default_rng(0)
    levels = np.clip(OWN[:40] + draw.uniform(-0.4, 0.4, OWN[:40].shape), 0, 255)
    floats = (levels / 127.5 - 1).astype(np.float32)
    np.testing.assert_array_equal(
        flipad_jax.score(fitted, floats), flipad_jax.score(fitted, OWN[:40])
    )
    config = AttributorConfig(**QUICK)
    rounded, same = (
        flipad_jax.fit(LAYER, Z_BAR, own, rng=jax.random.key(0), config=config)
        for own in (OWN[:200], (OWN[:200] / 127.5 - 1).astype(np.float32))
    )
    np.testing.assert_array_equal(rounded.calibration_scores, same.calibration_scores)


def test_few_images_say_what_they_certify_and_go_on(caplog):
    config = AttributorConfig(**{**QUICK, "one_class": OneClassConfig(num_components=5)})
    few = flipad_jax.fit(LAYER, Z_BAR, OWN[:80], rng=jax.random.key(0), config=config)
    assert len(few.calibration_scores) == 20
    assert "0.0476" in caplog.text and "199" in caplog.text  # 1 / 21
    assert np.isfinite(flipad_jax.score(few, OWN[80:90])).all()


@pytest.mark.parametrize("num_altered", [0, 400])
def test_a_dense_last_layer_with_a_bias_of_its_own_per_pixel(num_altered):
    draw = np.random.default_rng(0)
    matrix = (0.1 * draw.standard_normal((40, 300))).astype(np.float32)
    bias = draw.standard_normal((10, 10, 3)).astype(np.float32)
    op = linops.dense(matrix, input_shape=(1, 1, 40), output_shape=(10, 10, 3))
    layer = FinalLayer(op, jnp.asarray(bias), "sigmoid")
    z = np.maximum(draw.standard_normal((400, 6)) @ draw.standard_normal((6, 40)), 0)
    z = z.reshape(400, 1, 1, 40).astype(np.float32)
    own = data.to_uint8(np.asarray(jax.vmap(lambda v: forward(layer, v))(z)))
    config = AttributorConfig(**{**QUICK, "num_altered": num_altered})
    fitted = flipad_jax.fit(layer, z.mean(0), own, rng=jax.random.key(0), config=config)
    assert ("altered_activations" in fitted.detector.classifiers) == bool(num_altered)
    noise = draw.integers(0, 256, (50, 10, 10, 3)).astype(np.uint8)
    assert flipad_jax.verdicts(fitted, noise).accepted.mean() < 0.05
    assert flipad_jax.verdicts(fitted, own[:100], fnr=0.05).accepted.mean() > 0.9


def test_scores_do_not_depend_on_the_batch_and_compile_once_per_shape(fitted):
    images = np.concatenate([OWN[:70], REAL[:30]])
    scores = flipad_jax.score(fitted, images)
    alone = np.concatenate([flipad_jax.score(fitted, images[i : i + 9]) for i in range(0, 100, 9)])
    np.testing.assert_allclose(alone, scores, rtol=1e-4)
    np.testing.assert_allclose(flipad_jax.score(fitted, jnp.asarray(images)), scores, rtol=1e-4)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: (
            compiled.append(event)
            if "backend_compile" in event or "cache_retrieval" in event
            else None
        )
    )
    flipad_jax.score(fitted, images[:90])  # filled up to the same 128
    assert not compiled
    jax.jit(lambda x: x * 3 + 1)(jnp.arange(7))
    assert compiled  # the listener does listen


def test_departures_show_where_an_image_is_not_ours(fitted):
    found = attribution.departures(fitted, OWN[:200])
    assert found.maps.shape == (200, 8, 8)
    np.testing.assert_allclose(np.sqrt((found.maps**2).mean()), 1, atol=0.1)
    z, _ = invert(LAYER, OWN[:200], Z_BAR, tol=0.0, max_iters=15, method="fista")
    np.testing.assert_allclose(found.mean_activation, np.asarray(z).mean(0), atol=1e-4)
    tampered = OWN[:20].copy()
    tampered[:, 8:, 8:] = REAL[:20, 8:, 8:]
    maps = attribution.departures(fitted, tampered).maps
    assert maps[:, 5:, 5:].mean() > 1.5 * maps[:, :3, :3].mean()
    none = attribution.departures(fitted, OWN[:0])
    assert none.maps.shape == (0, 8, 8) and np.isnan(none.mean_activation).all()
    with pytest.raises(ValueError, match="inverts no images"):
        attribution.departures(fit("deepsad", "pixels"), OWN[:2])


def test_own_images_that_were_processed_are_doubted_and_untouched_ones_are_not(tmp_path):
    fitted = fit(check_untouched=True)
    fresh, _ = model_images(2, 200)
    found = flipad_jax.verdicts(fitted, fresh)
    assert (found.doubt != "").mean() < 0.06 and found.doubt.shape == (200,)
    spoiled = perturbations.blur(fresh, 3)
    found = flipad_jax.verdicts(fitted, spoiled)
    assert ["blur" in text for text in found.doubt].count(True) > 180
    flipad_jax.save(fitted, tmp_path)
    loaded = flipad_jax.load(tmp_path)
    np.testing.assert_array_equal(attribution.doubts(loaded, spoiled), found.doubt)
    assert not any(attribution.doubts(fit(), spoiled))
    assert attribution.doubts(fitted, fresh[:0]).shape == (0,)


class Shelf:
    """Keeps everything, and dies at the write of that number."""

    def __init__(self):
        self.parts, self.states, self.dies_at = {}, {}, None
        self.computed = []

    def _write(self):
        self.dies_at = None if self.dies_at is None else self.dies_at - 1
        if self.dies_at == 0:
            raise KeyboardInterrupt

    def part(self, name, compute):
        if name not in self.parts:
            self.computed.append(name)
            found = {key: np.asarray(value) for key, value in compute().items()}
            self._write()
            self.parts[name] = found
        return self.parts[name]

    def restore(self, name, like):
        return self.states.get(name)

    def save(self, name, step, state):
        self.computed.append(f"{name}, epoch {step}")
        self._write()
        self.states[name] = jax.tree.map(np.asarray, state)


def test_a_layer_that_did_not_make_the_images_is_told(caplog):
    config = AttributorConfig(**QUICK)
    for z_bar, told in ((Z_BAR, False), (Z_BAR + 1.0, True)):
        caplog.clear()
        with caplog.at_level("WARNING", logger="absl"):
            flipad_jax.fit(LAYER, z_bar, OWN, rng=jax.random.key(0), config=config)
        assert ("does not fit the images: their mean is off" in caplog.text) == told


@pytest.mark.parametrize("detector", ["one_class", "deepsad"])
def test_a_fit_that_was_killed_goes_on_to_the_same_attributor(detector, monkeypatch):
    image_bytes = 4 * 8 * 8 * CHANNELS
    monkeypatch.setattr(attribution, "_PART", 130 * image_bytes)  # two batches of 64
    config = AttributorConfig(detector=detector, **QUICK, batch_size=64)
    real = None if detector == "one_class" else REAL

    def fit(kept=None):
        return flipad_jax.fit(
            LAYER, Z_BAR, OWN, real, rng=jax.random.key(0), config=config, kept=kept
        )

    expected, shelf = fit(), Shelf()
    for _ in range(50):  # killed at the second write of every start
        shelf.dies_at = 2
        try:
            found = fit(shelf)
            break
        except KeyboardInterrupt:
            pass
    same = jax.tree.map(
        np.array_equal, (expected.detector, expected.profile), (found.detector, found.profile)
    )
    assert all(jax.tree.leaves(same))
    np.testing.assert_array_equal(found.calibration_scores, expected.calibration_scores)
    names = {
        "one_class": ["reference-0", "own-0", "own-128", "calibration-0"],
        "deepsad": ["own-0", "own-128", "own-256", "real-0", "real-128"]
        + ["deepsad, epoch 1", "deepsad, epoch 2", "calibration-0"],
    }
    # Calibration scores are named by the detector that gave them: the same one after every kill.
    computed = {re.sub("(?<=calibration)-[0-9a-f]{12}", "", name) for name in shelf.computed}
    assert computed == set(names[detector]) and len(set(shelf.computed)) == len(computed)
    written = sum(part["rows"].nbytes for part in shelf.parts.values() if "rows" in part)
    num_real = 0 if real is None else len(real)
    assert written == attribution.kept_bytes(LAYER, config, len(OWN), num_real)
    # All but what was being written is computed once.
    assert len(shelf.computed) < 2 * len(names[detector])
