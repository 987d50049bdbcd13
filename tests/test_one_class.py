"""The one-class detector against scikit-learn and against samples of known distributions."""

import jax
import numpy as np
import pytest
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA

from flipad_jax import metrics
from flipad_jax.detection import classifier, one_class
from flipad_jax.detection.classifier import ClassifierConfig
from flipad_jax.detection.feature_rows import FeatureRows
from flipad_jax.detection.one_class import OneClassConfig

SHAPE = (6, 6, 4)
CONFIG = OneClassConfig(num_components=8, quantiles=(0.05, 0.5, 0.95), batch_size=32)


def activations(seed, num, *, basis_seed=0, scale=1.0, noise=0.05):
    """Low-rank activations plus noise; the basis belongs to the model."""
    basis = np.random.default_rng(basis_seed).standard_normal((8, *SHAPE))
    rng = np.random.default_rng(seed)
    z = np.einsum("nk,khwc->nhwc", rng.standard_normal((num, 8)), basis) * scale
    return (z + noise * rng.standard_normal(z.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def fitted():
    return one_class.fit(activations(1, 150), activations(2, 150), CONFIG)


def test_statistics_are_those_of_scikit_learn(fitted):
    own, test = activations(1, 150), activations(3, 40)
    found = one_class.statistics(fitted, test)

    pca = PCA(8, svd_solver="full").fit(own.reshape(150, -1).astype(np.float64))
    flat = test.reshape(40, -1).astype(np.float64)
    outside = flat - pca.inverse_transform(pca.transform(flat))
    residual = (outside**2).sum(1) / ((flat - pca.mean_) ** 2).sum(1)
    np.testing.assert_allclose(found[:, 0], residual, rtol=2e-3)

    def moments(z):
        return np.concatenate([z.mean((1, 2)), z.std((1, 2))], axis=1).astype(np.float64)

    def quantiles(z):
        return np.quantile(z.reshape(len(z), -1), CONFIG.quantiles, axis=1).T

    for column, describe in ((1, moments), (2, quantiles)):
        oracle = LedoitWolf().fit(describe(own))
        np.testing.assert_allclose(
            found[:, column], oracle.mahalanobis(describe(test)), rtol=1e-3, atol=1e-4
        )


def test_own_images_look_alike_and_others_do_not(fitted):
    own = one_class.score(fitted, activations(3, 200))
    for rival in (
        activations(4, 200, basis_seed=9),  # another subspace: only the residual can see it all
        activations(4, 200, scale=3.0),
        activations(4, 200, noise=0.5),
    ):
        assert metrics.auc(own, one_class.score(fitted, rival)) > 0.95
    assert 0.4 < metrics.auc(own, one_class.score(fitted, activations(5, 200))) < 0.6


def test_tail_probabilities_are_empirical_in_the_bulk_and_pareto_beyond():
    rng = np.random.default_rng(0)
    reference = np.sort(rng.pareto(3.0, 4000) + 1)
    values = np.array([1.0, 1.2, 1.5, 2.0])
    exact = -3 * np.log(values)
    found = one_class._log_tail_probability(reference, values)
    np.testing.assert_allclose(found, exact, atol=0.06)
    empirical = [np.log((1 + (reference >= v).sum()) / 4001) for v in values]
    np.testing.assert_allclose(found, empirical, rtol=1e-12)
    # Far beyond all 4000 values an empirical probability would stop at 1 / 4001.
    far = np.array([30.0, 100.0])
    np.testing.assert_allclose(
        one_class._log_tail_probability(reference, far), -3 * np.log(far), rtol=0.25
    )
    grid = np.linspace(0.5, 200, 5000)
    assert (np.diff(one_class._log_tail_probability(reference, grid)) <= 1e-12).all()


def test_equal_reference_values_do_not_divide_by_zero():
    found = one_class._log_tail_probability(np.ones(100), np.array([0.5, 1.0, 1.1]))
    assert np.isfinite(found).all() and found[0] == 0 and found[2] < found[1] - 10


def test_a_score_depends_on_its_image_only(fitted):
    z = activations(6, 33)
    scores = one_class.score(fitted, z)
    order = np.random.default_rng(0).permutation(33)
    np.testing.assert_allclose(one_class.score(fitted, z[order]), scores[order], rtol=1e-4)
    np.testing.assert_allclose(one_class.score(fitted, z[:1]), scores[:1], rtol=1e-4)
    assert one_class.score(fitted, z[:0]).shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_gets_no_score(fitted, bad):
    z = activations(6, 3)
    z[1, 0, 0, 0] = bad
    scores = one_class.score(fitted, z)
    assert np.isnan(scores[1]) and np.isfinite(scores[[0, 2]]).all()
    with pytest.raises(ValueError, match=r"own activations \[1\]"):
        one_class.fit(np.concatenate([z, activations(7, 60)]), activations(2, 120), CONFIG)


@pytest.mark.parametrize(
    "own, reference, message",
    [
        (activations(0, 20), activations(1, 120), "at least 30 and 20"),
        (activations(0, 60), activations(1, 19), "at least 30 and 20"),
        (activations(0, 60)[..., :2], activations(1, 120), "reference activations"),
        (activations(0, 60)[0], activations(1, 120), r"\[n, h, w, c\]"),
        (activations(0, 60).astype(int), activations(1, 120), "floating"),
    ],
)
def test_input_that_cannot_be_fitted(own, reference, message):
    with pytest.raises(ValueError, match=message):
        one_class.fit(own, reference, CONFIG)


@pytest.mark.parametrize(
    "options", [{"quantiles": (1.5,)}, {"num_components": 0}, {"quantiles": ()}]
)
def test_settings_out_of_range(options):
    with pytest.raises(ValueError, match="OneClassConfig"):
        OneClassConfig(**options)


@pytest.mark.parametrize("name", [n for n in one_class.CLASSIFIERS if n != "reconstruction"])
def test_a_classifier_is_one_statistic_more(fitted, name):
    images = np.random.default_rng(0).integers(0, 255, (150, 8, 8, 1), np.uint8)
    reads = "activations" if name == "altered_activations" else "images"
    rows = images if reads == "images" else activations(4, 150)
    network = classifier.fit(
        jax.random.key(0),
        rows[:100],
        rows[50:],
        ClassifierConfig(widths=(4,), num_steps=2),
        reads=reads,
    )
    reference = activations(2, 150)
    model = one_class.fit(
        activations(1, 150),
        reference,
        CONFIG,
        classifiers={name: network},
        reference_images=images,
    )
    assert model.reference.shape == (4, 150)
    test = activations(3, 20)
    found = one_class.statistics(model, test, images[:20])
    np.testing.assert_array_equal(found[:, :3], one_class.statistics(fitted, test))
    seen = images[:20] if reads == "images" else test
    np.testing.assert_allclose(np.log(found[:, 3]), classifier.logits(network, seen), 1e-5, 1e-7)
    # Fisher's sum: the fourth p-value counts one and a half times.
    alone = one_class._log_tail_probability(
        np.asarray(model.reference[3], float), found[:, 3].astype(float)
    )
    np.testing.assert_allclose(
        one_class.score(model, test, images[:20]) - one_class.score(fitted, test),
        -3 * alone,
        rtol=1e-6,
    )
    test[4, 0, 0, 0] = np.nan
    scores = one_class.score(model, test, images[:20])
    assert np.isnan(scores[4]) and np.isfinite(np.delete(scores, 4)).all()
    if reads == "activations":
        np.testing.assert_array_equal(one_class.score(model, test), scores)
        return
    for wrong in (None, images[:3]):
        with pytest.raises(ValueError, match="need the 20 images"):
            one_class.score(model, test, wrong)
    assert one_class.score(model, test[:0], images[:0]).shape == (0,)
    with pytest.raises(ValueError, match="need the 0 images behind .* got none"):
        one_class.score(model, test[:0])
    with pytest.raises(ValueError, match="'reconstruction' is a Classifier, expected Reconstr"):
        one_class.fit(
            activations(1, 60), reference, CONFIG, classifiers={"reconstruction": network}
        )


def test_a_reference_that_is_not_finite_is_refused(monkeypatch):
    monkeypatch.setattr(one_class, "statistics", lambda *_: np.full((20, 3), np.nan))
    with pytest.raises(ValueError, match="reference is not finite: 20 of 20"):
        one_class.fit(activations(1, 60), activations(2, 20), CONFIG)


def test_activations_on_disk_give_the_same_detector():
    """Against the exact decomposition: the span of the directions, and the scores of images."""
    rng = np.random.default_rng(0)
    shape, num = (4, 4, 6), 400
    mixing = rng.normal(size=(96, 96)) / np.sqrt(1 + np.arange(96))  # variances that fall slowly
    z = (rng.normal(size=(num + 200, 96)) @ mixing.T).reshape(-1, *shape).astype(np.float32)
    own, reference = z[:num], z[num : num + 100]
    config = OneClassConfig(num_components=12, batch_size=32)
    on_disk = []
    for part in (own, reference):
        rows = FeatureRows(part.shape, in_memory=0)
        rows[0 : len(part)] = part
        assert rows.on_disk
        on_disk.append(rows)
    exact = one_class.fit(own, reference, config)
    streamed = one_class.fit(*on_disk, config)
    np.testing.assert_allclose(streamed.mean, exact.mean, atol=1e-5)
    flat = own.reshape(num, -1) - np.asarray(exact.mean)
    explained = [np.square(flat @ np.asarray(m.directions)).sum() for m in (streamed, exact)]
    assert explained[0] > 0.995 * explained[1]  # of what the best span of so many explains
    found, known = (one_class.statistics(m, z[num + 100 :]) for m in (streamed, exact))
    np.testing.assert_allclose(found[:, 0], known[:, 0], rtol=0.05)
    np.testing.assert_allclose(found[:, 1:], known[:, 1:], rtol=1e-4)
    on_disk[0][0:1] = np.full((1, *shape), np.nan, np.float32)
    with pytest.raises(ValueError, match=r"own activations \[0\] hold NaN"):
        one_class.fit(*on_disk, config)
