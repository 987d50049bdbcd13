"""Attacks: the score in the graph against the attributor's own, both searches, what is reported."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model

import flipad_jax
from experiments import _config, _surrogate, attacks
from flipad_jax import AttributorConfig
from flipad_jax.detection import attributor as attribution
from flipad_jax.detection import calibration, one_class
from flipad_jax.detection.classifier import ClassifierConfig
from flipad_jax.detection.one_class import OneClassConfig
from flipad_jax.generators import sampling, zoo
from flipad_jax.inversion.final_layer import invert


@pytest.fixture(scope="module")
def fitted():
    images, z = toy_model.own_images(1, 200)
    config = AttributorConfig(
        one_class=OneClassConfig(num_components=5, quantiles=(0.05, 0.5, 0.95)),
        num_altered=64,
        classifier=ClassifierConfig(widths=(8,), num_steps=20, batch_size=16),
        max_iters=23,  # No multiple of the iterations between two certificates.
        check_untouched=False,
    )
    return flipad_jax.fit(toy_model.LAYER, z.mean(0), images, rng=jax.random.key(0), config=config)


@pytest.fixture(scope="module")
def surrogate(fitted):
    return _surrogate.make(fitted)


def suspects(num=16):
    """Own images, own images with single levels changed, and noise."""
    own = toy_model.own_images(2, 2 * num)[0]
    draw = np.random.default_rng(0)
    changed = np.clip(own[num:].astype(int) + draw.integers(-1, 2, own[num:].shape), 0, 255)
    noise = draw.integers(0, 256, own[:num].shape)
    return np.concatenate([own[:num], changed, noise]).astype(np.uint8)


def test_the_score_in_the_graph_is_the_attributors(fitted, surrogate):
    images = suspects()
    levels = jnp.asarray(images, jnp.float32)
    z, _ = invert(
        toy_model.LAYER, images, fitted.z_bar, lam=5e-4, tol=0, max_iters=23, method="fista"
    )
    z = z - fitted.z_bar
    found = jax.jit(jax.vmap(functools.partial(_surrogate.activation, surrogate)))(levels)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, z, atol=1e-4)

    logs = jax.jit(jax.vmap(functools.partial(_surrogate.statistics, surrogate)))(levels)
    true = one_class.statistics(fitted.detector, np.asarray(z), images)
    np.testing.assert_allclose(logs, np.log(true), atol=2e-3)

    scores = np.asarray(jax.jit(jax.vmap(functools.partial(_surrogate.score, surrogate)))(levels))
    true = attribution.score(fitted, images)
    assert np.ptp(true) > 50  # From the middle of the reference to far out in the tail.
    # A line between two images of the reference, where the attributor has a step.
    log_p = np.asarray(surrogate.log_p)
    steps = 2 * np.asarray(surrogate.weights).sum() * np.max(log_p[:-10] - log_p[1:-9])
    far = np.asarray(logs > surrogate.edge).all(axis=1)
    assert far.sum() >= 8
    np.testing.assert_allclose(scores[far], true[far], rtol=2e-3)
    np.testing.assert_allclose(scores, true, atol=steps + 0.02, rtol=2e-3)


@pytest.mark.slow
def test_its_gradient_is_that_of_finite_differences(surrogate):
    # In float64, where differences over a millionth of a level are exact enough.
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), surrogate)
    smooth = jax.jit(jax.value_and_grad(functools.partial(_surrogate.score, rounded=False), 1))
    draw = np.random.default_rng(1)
    for image, shift in zip(suspects(2)[1:4], (0.37, 0.01, 0.8)):
        levels = np.clip(image + shift + 1e-3 * draw.standard_normal(image.shape), 0.01, 254.99)
        direction, step = draw.standard_normal(image.shape), 1e-6
        ahead, behind = (smooth(wide, levels + sign * step * direction)[0] for sign in (1, -1))
        value, slope = smooth(wide, levels)
        assert value > 1 and abs(ahead - behind) > 1e-7
        np.testing.assert_allclose(
            jnp.vdot(slope, direction), (ahead - behind) / (2 * step), rtol=1e-3
        )


@pytest.mark.slow
def test_rounding_is_in_the_value_and_not_in_the_gradient(surrogate):
    image = suspects(1)[1].astype(np.float32)
    near = np.clip(image + np.random.default_rng(0).uniform(-0.4, 0.4, image.shape), 0, 255)
    both = jnp.asarray(np.stack([image, near]), jnp.float32)
    rounded = functools.partial(_surrogate.score, surrogate)
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(rounded)))(both)
    np.testing.assert_allclose(*values, rtol=1e-5)
    assert np.mean(np.asarray(slopes) != 0) > 0.9
    unrounded = functools.partial(_surrogate.score, surrogate, rounded=False)
    at_levels, between = jax.jit(jax.vmap(unrounded))(both)
    np.testing.assert_allclose(at_levels, values[0], rtol=1e-5)
    assert abs(between - values[0]) > 0.1


@pytest.mark.slow
def test_images_leave_by_less_than_noise_needs(fitted, surrogate):
    own = toy_model.own_images(3, 12)[0]
    threshold = float(fitted.calibration_scores.max())
    before = attribution.score(fitted, own)
    own = own[before < threshold]
    found = _surrogate.leave(surrogate, own, threshold + 0.5, num_steps=60)
    assert found.images.dtype == np.uint8 and found.reached.all()
    after = attribution.score(fitted, found.images)
    assert (after > threshold).all()
    np.testing.assert_allclose(after, found.score, atol=0.5)
    noisy = attacks.same_size_noise(own, found.images, np.random.default_rng(0))
    assert np.mean(attribution.score(fitted, noisy) > threshold) <= 0.5
    # What is out of reach is said so, and comes nearer all the same.
    far = _surrogate.leave(surrogate, own, 1e6, num_steps=60)
    assert not far.reached.any()
    assert (attribution.score(fitted, far.images) > before[before < threshold]).all()


@pytest.mark.slow
def test_images_enter_and_a_round_more_costs_no_more(fitted, surrogate):
    own = toy_model.own_images(4, 24)[0].astype(int)
    draw = np.random.default_rng(3)
    foreign = np.clip(own + draw.integers(-4, 5, own.shape), 0, 255).astype(np.uint8)
    threshold = float(np.quantile(fitted.calibration_scores, 0.9))
    before = attribution.score(fitted, foreign)
    foreign, before = foreign[before > threshold], before[before > threshold]
    foreign, before = foreign[:8], before[:8]
    assert len(foreign) >= 4
    found = [
        _surrogate.enter(surrogate, foreign, threshold - 0.5, num_steps=100, num_rounds=rounds)
        for rounds in (1, 3)
    ]
    sizes = [np.sum((m.images - foreign.astype(float)) ** 2, axis=(1, 2, 3)) for m in found]
    for moved in found:
        after = attribution.score(fitted, moved.images)
        assert (after[moved.reached] <= threshold).all()
        np.testing.assert_allclose(after, moved.score, atol=0.5)
    first, more = (moved.reached for moved in found)
    assert more.mean() >= 0.5 and (more >= first).all()
    assert (sizes[1][first] <= sizes[0][first]).all()
    assert more.sum() > first.sum() or (sizes[1][first] < sizes[0][first]).all()
    # What is out of reach is said so.
    assert not _surrogate.enter(surrogate, foreign, -1.0, num_steps=100).reached.any()


def test_no_gradient_is_promised_where_there_is_none(fitted):
    changed = dataclasses.replace(fitted.config, tol=1e-2)
    with pytest.raises(ValueError, match="tol=0.01"):
        _surrogate.make(dataclasses.replace(fitted, config=changed))
    drawn = {**fitted.detector.classifiers, "reconstruction": None}
    immunised = dataclasses.replace(fitted.detector, classifiers=drawn)
    with pytest.raises(ValueError, match="no gradient is known"):
        _surrogate.make(dataclasses.replace(fitted, detector=immunised))


def test_baselines_are_as_large_as_the_change():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    images[0], images[1] = 0, 255
    moved = images.astype(int)
    moved[:2, :4] += np.array([1, -1])[:, None, None, None]
    moved[2] = np.clip(moved[2] + draw.integers(-9, 10, moved[2].shape), 0, 255)
    moved[3, 0, 0, 0] ^= 1
    moved = moved.astype(np.uint8)

    def energy(x):
        return np.sum((x.astype(float) - images) ** 2, axis=(1, 2, 3))

    wanted = energy(moved)
    assert wanted[:2].tolist() == [96, 96] and wanted[3] == 1 and not wanted[4:].any()
    noisy = energy(attacks.same_size_noise(images, moved, draw))
    assert (noisy >= wanted).all() and (noisy <= 1.05 * wanted + 1).all()
    levels = attacks.same_size_levels(images, moved, draw)
    np.testing.assert_allclose(energy(levels), wanted, rtol=0.02)
    assert np.abs(levels[:2].astype(int) - images[:2]).max() == 1


def test_only_images_judged_rightly_before_count():
    images = np.zeros((4, 8, 8, 1), np.uint8)
    moved = images.copy()
    moved[:, 0, 0] = [[1], [2], [255], [1]]
    found = {
        "images": images,
        "moved": moved,
        "score_images": np.array([9.0, 9, 9, 1]),
        "score_moved": np.array([1.0, 9, 5, 1]),
        "score_noise": np.array([9.0, 1, 2, 1]),
        "score_levels": np.array([9.0, 1, 9, 1]),
        "doubted": np.array([True, True, False, True]),
        "reached": np.array([True, False, True, True]),
    }
    row = attacks._moved_row(attacks.Config(), found, 5.0, True)
    assert row["wrong_before"] == 1 and row["success"]["total"] == 3
    assert row["success"]["share"] == pytest.approx(2 / 3)
    assert [row["within"][b]["share"] for b in ("50", "45", "40")] == pytest.approx([1 / 3] * 3)
    psnr = 10 * np.log10(255**2 * 64 / np.array([1, 255**2]))
    assert row["psnr"]["highest"] == pytest.approx(psnr[0])
    assert row["psnr"]["lowest"] == pytest.approx(psnr[1])
    assert (row["noise"]["share"], row["levels"]["share"], row["doubted"]["share"]) == (0.5, 0, 0.5)
    # The other way round: leaving is to be above.
    row = attacks._moved_row(attacks.Config(), found, 5.0, False)
    assert row["wrong_before"] == 3 and row["success"]["share"] == 0
    assert row["psnr"]["median"] is None and row["noise"]["share"] is None
    text = attacks.summary({"copies": {}, "moved": {"own": row}})
    assert "own images leave" in text and "0.0%" in text


def test_the_jitter_keeps_the_kernels_size_and_everything_else():
    ours = zoo.load("digits_dcgan_0")
    before = ours.variables["params"]["last"]["kernel"]
    for strength in (0.0, 0.3, 1.0):
        changed = attacks._jittered(attacks.Config(), ours, strength)
        after = changed.variables["params"]["last"]["kernel"]
        assert 0.95 < after.std() / before.std() < 1.05 and after.dtype == before.dtype
        share = np.corrcoef(before.ravel(), after.ravel())[0, 1]
        assert share == pytest.approx(np.sqrt(1 - strength**2), abs=0.06)
        params = {**changed.variables["params"], "last": ours.variables["params"]["last"]}
        jax.tree.map(np.testing.assert_array_equal, params, ours.variables["params"])


def test_mistakes_are_refused_before_anything_is_computed(tmp_path, capsys):
    def refused(*flags):
        command = ("run.py", "--experiment=attacks", "--preset=smoke", f"--workdir={tmp_path}/w")
        assert _config.main([*command, *flags]) == 2
        assert not (tmp_path / "w" / "stages").exists()
        return capsys.readouterr().err

    assert "need 3 widths" in refused("--student_features=8,8")
    mine = tmp_path / "mine.safetensors"  # of which no other seed is known
    zoo.save_file(mine, zoo.load("digits_dcgan_0"), zoo.record("digits_dcgan_0"))
    assert "--other is missing" in refused(f"--ours={mine}")
    assert "--trained_on=2,2" in refused("--trained_on=2,2")
    assert "--ours=nothing: expected a generator of the zoo" in refused("--ours=nothing")


@pytest.mark.slow
def test_smoke_counts_what_its_stages_hold(tmp_path):
    workdir = tmp_path / "run"
    flags = ("--experiment=attacks", "--preset=smoke", f"--workdir={workdir}")
    assert _config.main(["run.py", *flags]) == 0
    found = json.loads((workdir / "results.json").read_text())["metrics"]
    fitted = flipad_jax.load(workdir / "attributor")
    threshold = calibration.verdict_threshold(fitted.calibration_scores, 0.05)
    assert found["threshold"] == pytest.approx(threshold)
    assert list(found["moved"]) == ["own", "real", "other seed"]
    names = [*found["copies"]]
    assert len(names) == 6 and names[-1] == "last layer refitted"
    own = sampling.generate(
        zoo.load("digits_dcgan_0"), attacks._regeneration.rng(attacks.Config(), attacks._TEST), 16
    )
    for number, name in enumerate(names):
        with np.load(workdir / "stages" / f"copy-{number}.npz") as stage:
            scores, images = stage["score"], stage["images"]
        np.testing.assert_allclose(attribution.score(fitted, images), scores, rtol=1e-4)
        assert found["copies"][name]["accepted"]["share"] == np.mean(scores <= threshold)
        error = np.mean((images.astype(float) - own) ** 2)
        if error:
            psnr = 10 * np.log10(255**2 / error)
            assert found["copies"][name]["psnr"] == pytest.approx(psnr)
    assert found["copies"]["ours, unchanged"]["psnr"] is None
    assert found["copies"]["last layer jittered by 0.3"]["psnr"] > 15
    # The pictures are ours again, far nearer than under a kernel of noise.
    refitted, noise = (found["copies"][name]["psnr"] for name in (names[-1], names[-2]))
    assert refitted > noise + 10
    with np.load(workdir / "stages" / "moved-own.npz") as stage:
        left = (stage["score_moved"] > threshold)[stage["score_images"] <= threshold]
        np.testing.assert_allclose(
            attribution.score(fitted, stage["moved"]), stage["score_moved"], rtol=1e-4
        )
    assert found["moved"]["own"]["success"]["share"] == left.mean() == 1
    page = (workdir / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
