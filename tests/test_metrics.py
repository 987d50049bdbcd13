"""Metrics against scikit-learn, SciPy and counting by hand."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from flipad_jax import metrics

tied_scores = st.lists(st.integers(0, 8).map(float), min_size=1, max_size=30)


def _stack(own, rival):
    return np.r_[np.zeros(len(own)), np.ones(len(rival))], np.r_[own, rival]


@given(tied_scores, tied_scores)
@settings(deadline=None)
def test_auc_is_scikit_learns(own, rival):
    assert metrics.auc(own, rival) == pytest.approx(roc_auc_score(*_stack(own, rival)), abs=1e-12)


@given(tied_scores, tied_scores)
@settings(deadline=None)
def test_roc_is_scikit_learns(own, rival):
    curve = metrics.roc(own, rival)
    fpr, tpr, _ = roc_curve(*_stack(own, rival), drop_intermediate=False)
    # scikit-learn rejects at, we above a threshold: the same points, ours has (1, 1) at -inf.
    np.testing.assert_allclose(np.unique(np.c_[fpr, tpr], axis=0), _points(curve), atol=1e-12)
    area = np.trapezoid(curve.rival_rejected, curve.own_rejected)
    assert area == pytest.approx(metrics.auc(own, rival), abs=1e-12)


def _points(curve):
    return np.unique(np.c_[curve.own_rejected, curve.rival_rejected].round(14), axis=0)


def test_roc_says_what_a_threshold_does():
    own, rival = [1.0, 2.0, 2.0, 5.0], [2.0, 4.0, 6.0]
    curve = metrics.roc(own, rival)
    np.testing.assert_array_equal(curve.thresholds, [np.inf, 6, 5, 4, 2, 1, -np.inf])
    np.testing.assert_allclose(curve.own_rejected, [0, 0, 0, 0.25, 0.25, 0.75, 1])
    np.testing.assert_allclose(curve.rival_rejected, [0, 0, 1 / 3, 1 / 3, 2 / 3, 1, 1])


def test_a_score_at_the_threshold_is_accepted():
    own, rival = [0.0, 1.0, 2.0, 2.0], [2.0, 2.0, 3.0, 4.0]
    assert metrics.pair_accuracy(own, rival, 2.0) == (1.0 + 0.5) / 2
    assert metrics.pair_accuracy(own, rival, math.inf) == 0.5
    counts = metrics.confusion(own, {"other": rival}, 2.0)
    assert counts["own"] == {"accepted": 4, "rejected": 0, "undecided": 0}
    assert counts["other"] == {"accepted": 2, "rejected": 2, "undecided": 0}


def test_accuracy_weighs_both_sources_alike():
    assert metrics.pair_accuracy([0.0], [1.0] * 99 + [0.0], 0.5) == pytest.approx(0.995)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_undecided_image_is_never_a_success(bad):
    own, rival = [0.0, bad], [5.0, 5.0, 5.0, bad]
    for threshold in (1.0, math.inf, -math.inf):
        counts = metrics.confusion(own, {"other": rival}, threshold)
        assert counts["own"]["undecided"] == counts["other"]["undecided"] == 1
    assert metrics.pair_accuracy(own, rival, 1.0) == (0.5 + 0.75) / 2
    # Pairs: 1 of 2 own times 3 of 4 rival images can be told apart.
    assert metrics.auc(own, rival) == 0.5 * 0.75
    curve = metrics.roc(own, rival)
    assert np.trapezoid(curve.rival_rejected, curve.own_rejected) == pytest.approx(0.375)
    result = metrics.summary(own, {"other": rival}, 1.0)
    assert result["achieved_fnr"] == 0.5
    assert result["counts"]["own"] == {"accepted": 1, "rejected": 0, "undecided": 1}


@pytest.mark.parametrize("count, total", [(0, 10), (10, 10), (3, 20), (5, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_clopper_pearson_is_scipys(count, total, confidence):
    expected = scipy.stats.binomtest(count, total).proportion_ci(confidence, method="exact")
    result = metrics.clopper_pearson(count, total, confidence)
    np.testing.assert_allclose(result, tuple(expected), atol=1e-9)


def test_summary_by_hand():
    rng = np.random.default_rng(0)
    own = np.arange(200.0)
    rivals = {"real": np.full(50, 300.0), "seed_1": rng.uniform(100, 300, 80)}
    result = metrics.summary(own, rivals, 197.0)
    seed_1_rejected = (rivals["seed_1"] > 197).mean()
    assert result["accuracy"] == {
        "real": pytest.approx((0.99 + 1) / 2),
        "seed_1": pytest.approx((0.99 + seed_1_rejected) / 2),
    }
    assert result["mean_accuracy"] == pytest.approx(np.mean(list(result["accuracy"].values())))
    assert result["auc"]["real"] == 1.0 and 0.5 < result["auc"]["seed_1"] < 1.0
    assert result["mean_auc"] == pytest.approx((1 + result["auc"]["seed_1"]) / 2)
    assert result["achieved_fnr"] == 0.01
    assert result["achieved_fnr_interval"] == list(metrics.clopper_pearson(2, 200))
    assert result["num_images"] == {"own": 200, "real": 50, "seed_1": 80}
    assert result["counts"]["own"] == {"accepted": 198, "rejected": 2, "undecided": 0}


def test_summary_is_valid_json():
    scores = np.array([np.nan, np.inf, 1.0], np.float32)
    for threshold in (np.float32(0.5), math.inf):
        result = metrics.summary(scores, {"real": scores}, threshold)
        assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["threshold"] is None


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="threshold is NaN"):
        metrics.pair_accuracy([1.0], [1.0], math.nan)
    with pytest.raises(ValueError, match="rival scores of shape"):
        metrics.auc([1.0], [])
    with pytest.raises(ValueError, match="no rival scores"):
        metrics.summary([1.0], {}, 0.0)
    with pytest.raises(ValueError, match='called "own"'):
        metrics.confusion([1.0], {"own": [1.0]}, 0.0)
    with pytest.raises(ValueError, match="count=3, total=2"):
        metrics.clopper_pearson(3, 2)


def test_interval_of_a_mean_over_repeats():
    values = np.random.default_rng(0).normal(size=5)
    mean, half_width = metrics.mean_interval(values, 0.9)
    low, high = scipy.stats.t.interval(0.9, 4, loc=values.mean(), scale=scipy.stats.sem(values))
    np.testing.assert_allclose([mean - half_width, mean + half_width], [low, high])
    assert metrics.mean_interval([0.25]) == (0.25, None)
    for bad in ([], [0.1, np.nan]):
        with pytest.raises(ValueError, match="mean_interval"):
            metrics.mean_interval(bad)
