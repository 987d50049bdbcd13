"""Thresholds and p-values against their definitions, SciPy, and their guarantee by simulation."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from flipad_jax.detection import calibration

# Few distinct values, so that ties are the rule.
tied_scores = st.lists(st.integers(-3, 6).map(float), min_size=1, max_size=40)
rates = st.sampled_from([0.0, 0.005, 0.01, 0.05, 0.1, 0.25, 0.3, 0.5, 0.7, 1.0])


@given(tied_scores, rates)
@settings(deadline=None)
def test_threshold_is_the_interpolated_quantile(own, fnr):
    ordered, place = np.sort(own), (len(own) - 1) * (1 - fnr)
    below = min(int(place), len(own) - 1)
    above = min(below + 1, len(own) - 1)
    expected = ordered[below] + (place - below) * (ordered[above] - ordered[below])
    assert calibration.threshold(own, fnr) == pytest.approx(expected, abs=1e-9)


def test_threshold_is_torchs():
    torch = pytest.importorskip("torch")
    own = np.random.default_rng(0).exponential(size=997)
    for fnr in (0.005, 0.05):
        expected = torch.quantile(torch.tensor(own), 1 - fnr).item()
        assert calibration.threshold(own, fnr) == pytest.approx(expected, rel=1e-12)
    assert calibration.threshold(own, 0) == own.max()


@given(tied_scores, st.lists(st.floats(-5, 8), max_size=20))
@settings(deadline=None)
def test_p_values_count_own_scores_at_least_as_high(own, scores):
    expected = [(1 + sum(o >= s for o in own)) / (len(own) + 1) for s in scores]
    np.testing.assert_array_equal(calibration.conformal_p_values(own, scores), expected)


def test_p_values_at_the_edges():
    own = [1.0, 2.0, 2.0, 3.0]
    scores = np.array([[0.0, 2.0, 3.0], [3.5, np.nan, np.inf]])
    p_values = calibration.conformal_p_values(own, scores)
    np.testing.assert_array_equal(p_values, [[1.0, 0.8, 0.4], [0.2, np.nan, np.nan]])


@given(tied_scores, rates)
@settings(deadline=None)
def test_conformal_threshold_rejects_exactly_small_p_values(own, fnr):
    scores = np.concatenate([own, np.arange(-4, 8, 0.5)])
    by_p_value = calibration.conformal_p_values(own, scores) <= fnr
    np.testing.assert_array_equal(scores > calibration.conformal_threshold(own, fnr), by_p_value)


def test_what_198_and_199_scores_can_certify():
    own = np.random.default_rng(0).permutation(199).astype(float)
    assert calibration.conformal_threshold(own, 0.005) == 198.0  # the largest of 199
    assert calibration.conformal_threshold(own[own < 198], 0.005) == math.inf
    assert calibration.smallest_certifiable_fnr(199) == 0.005
    assert calibration.smallest_certifiable_fnr(198) > 0.005
    assert calibration.conformal_p_values(own[own < 198], [1e9])[0] > 0.005


def test_a_verdict_is_a_p_value_wherever_that_can_be():
    rng = np.random.default_rng(2)
    own, asked = rng.exponential(size=300), rng.exponential(size=500) * 2
    for fnr in (0.005, 0.02, 0.3):
        rejected = asked > calibration.verdict_threshold(own, fnr)
        p_values = calibration.conformal_p_values(own, asked)
        np.testing.assert_array_equal(rejected, p_values <= fnr)
    # Two hundred and ninety-nine scores certify 1 / 300. Who asks for less rejects no more.
    for fnr in (0.003, 0.0):
        assert calibration.verdict_threshold(own[:299], fnr) == own[:299].max()
    rates = np.linspace(0, 1, 2001)
    thresholds = [calibration.verdict_threshold(own[:299], fnr) for fnr in rates]
    assert (np.diff(thresholds) <= 0).all() and thresholds[-1] == own[:299].min()


@pytest.mark.parametrize("fnr", [0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.7])
def test_rank_is_decimal_arithmetic(fnr):
    # (n + 1)(1 - fnr) is a whole number for all of these n: rounding must not move the rank.
    for n_plus_1 in range(1000, 20001, 1000):
        rank = n_plus_1 - round(n_plus_1 * fnr)
        assert calibration.conformal_threshold(np.arange(1, n_plus_1), fnr) == rank


@pytest.mark.parametrize("ties", [False, True])
def test_conformal_guarantee_by_simulation(ties):
    rng = np.random.default_rng(0)
    rounds, n, fnr = 20000, 24, 0.1
    draws = rng.exponential(size=(rounds, n + 1))
    if ties:
        draws = np.round(draws, 1)
    rejected = [row[-1] > calibration.conformal_threshold(row[:-1], fnr) for row in draws]
    exact = math.floor((n + 1) * fnr) / (n + 1)  # 0.08: what distinct scores give exactly
    deviation = 4 * math.sqrt(exact * (1 - exact) / rounds)
    assert np.mean(rejected) <= exact + deviation
    if not ties:
        assert np.mean(rejected) >= exact - deviation
        # The paper's quantile has no such guarantee: interpolated, it rejects 0.12 here.
        quantile = [row[-1] > calibration.threshold(row[:-1], fnr) for row in draws]
        assert np.mean(quantile) > fnr


@given(
    st.lists(st.integers(1, 200).map(lambda k: k / 200), min_size=1, max_size=60),
    st.sampled_from([0.01, 0.05, 0.1, 0.3]),
)
@settings(max_examples=200, deadline=None)
def test_benjamini_hochberg_is_scipys(p_values, fdr):
    adjusted = scipy.stats.false_discovery_control(p_values, method="bh")
    expected = adjusted <= fdr * (1 + 1e-9)
    np.testing.assert_array_equal(calibration.benjamini_hochberg(p_values, fdr), expected)


def test_benjamini_hochberg_meets_the_line_exactly():
    # p_(k) = fdr k / m for every k, in numbers that binary fractions do not hold.
    for fdr in (0.05, 0.1, 0.3, 0.7):
        for m in (3, 7, 10, 49):
            p_values = np.array([(k * round(fdr * 100)) / (m * 100) for k in range(1, m + 1)])
            assert calibration.benjamini_hochberg(p_values, fdr).all()


def test_counts_of_p_values_are_enough_for_benjamini_hochberg():
    rng = np.random.default_rng(5)
    for fdr in (0.0, 0.05, 0.3, 1.0):
        p_values = rng.integers(1, 101, 2000) ** 2 / 100**2
        values, counts = np.unique(p_values, return_counts=True)
        level = calibration.benjamini_hochberg_level(values, counts, fdr)
        expected = scipy.stats.false_discovery_control(p_values) <= fdr * (1 + 1e-9)
        np.testing.assert_array_equal(p_values <= level, expected)
    assert np.isnan(calibration.benjamini_hochberg_level([], [], 0.1))
    with pytest.raises(ValueError, match="ascending"):
        calibration.benjamini_hochberg_level([0.2, 0.1], [1, 1], 0.1)
    with pytest.raises(ValueError, match="1 or more"):
        calibration.benjamini_hochberg_level([0.1, 0.2], [1, 0], 0.1)


def test_benjamini_hochberg_without_verdicts():
    p_values = np.array([0.01, np.nan, 0.9, 0.03, np.nan])
    # m = 3 known ones: 0.03 <= 0.05 * 2 / 3; were NaN counted, 0.03 > 0.05 * 2 / 5.
    expected = [True, False, False, True, False]
    np.testing.assert_array_equal(calibration.benjamini_hochberg(p_values, 0.05), expected)
    assert not calibration.benjamini_hochberg([np.nan], 0.5).any()
    assert calibration.benjamini_hochberg([], 0.5).shape == (0,)


def test_false_discoveries_by_simulation():
    rng = np.random.default_rng(0)
    own_share = []
    for _ in range(400):
        own = rng.normal(size=200)
        scores = np.concatenate([rng.normal(size=40), rng.normal(4, 1, size=40)])
        rejected = calibration.benjamini_hochberg(calibration.conformal_p_values(own, scores), 0.1)
        own_share.append(rejected[:40].sum() / max(rejected.sum(), 1))
    # Half of the images are ours, so the expected share is about 0.05, and at most 0.1.
    assert 0.03 < np.mean(own_share) < 0.07


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_own_scores_must_be_finite(bad):
    own = [1.0, bad, 2.0]
    for call in (
        lambda: calibration.threshold(own, 0.1),
        lambda: calibration.conformal_threshold(own, 0.1),
        lambda: calibration.conformal_p_values(own, [1.0]),
    ):
        with pytest.raises(ValueError, match="1 of 3 own scores"):
            call()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="fnr=1.5"):
        calibration.threshold([1.0], 1.5)
    with pytest.raises(ValueError, match="fnr=nan"):
        calibration.conformal_threshold([1.0], math.nan)
    with pytest.raises(ValueError, match=r"n >= 1"):
        calibration.threshold([], 0.1)
    with pytest.raises(ValueError, match=r"\[2, 2\]"):
        calibration.threshold(np.ones((2, 2)), 0.1)
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        calibration.benjamini_hochberg([0.2, 1.2], 0.1)
    with pytest.raises(ValueError, match="fdr=-1"):
        calibration.benjamini_hochberg([0.2], -1)
