"""The statement: a power law that is known is found, with its interval; p-values under the null."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from flipad_jax import data, perturbations
from flipad_jax.detection import proof, regeneration
from flipad_jax.detection.proof import ProofConfig
from flipad_jax.generators import zoo


def power_law(rng, alpha, edge, num):
    """Errors with P(e < t) = (t / edge)^alpha."""
    return edge * rng.uniform(size=num) ** (1 / alpha)


def test_the_codimension_of_a_power_law_is_found():
    errors = power_law(np.random.default_rng(0), 5.0, 9.0, 20_000)
    tail = proof.foreign_tail(errors)
    assert tail.codimension == pytest.approx(5, rel=0.06)
    assert tail.smallest == errors.min()
    # P(e < t) = (t / 9)^5, of which the ends of the intervals give a bound.
    for t in (1.0, 2.0, 4.0):
        bound = float(proof.foreign_probability(tail, t))
        assert (t / 9) ** 5 <= bound <= 2 * (t / 9) ** 4.5


def test_the_probability_is_bounded_as_often_as_it_says():
    """1000 samples of 100 errors: just below the edge and far below it."""
    rng = np.random.default_rng(4)
    for t in (0.5, 5.0, 6.0):
        held = []
        for _ in range(1000):
            tail = proof.foreign_tail(power_law(rng, 4.0, 10.0, 100), confidence=0.9)
            held.append(float(proof.foreign_probability(tail, t)) >= (t / 10) ** 4)
        assert np.mean(held) >= 0.9


def test_ours_is_where_the_probability_is_the_rate():
    tail = proof.foreign_tail(power_law(np.random.default_rng(5), 8.0, 9.0, 4000))
    limit = proof.ours_up_to(tail, 1e-8)
    assert limit < tail.smallest / 2  # or the other rule would decide
    assert float(proof.foreign_probability(tail, limit)) == pytest.approx(1e-8)
    assert proof.ours_up_to(tail, 0.9) == tail.smallest / 2
    assert proof.ours_up_to(proof.foreign_tail(np.array([5.0, 6.0])), 0.5) == 0


@pytest.mark.parametrize("std", [0.004, 0.05, 0.1])
def test_the_excess_over_noise_is_normal_whatever_the_picture_is(std):
    """Dark, bright, grey and ramps: what the ends cut off is in the mean and in the variance."""
    ramp = np.linspace(0, 255, 32 * 32).reshape(32, 32, 1)
    pictures = [np.zeros_like(ramp), ramp * 0.02, ramp, 255 - ramp * 0.1, 100 + ramp * 0.1]
    for number, picture in enumerate(pictures):
        made = np.repeat(np.round(picture).astype(np.uint8)[None], 400, axis=0)
        noisy = perturbations.noise(made, jax.random.key(number), std)
        excess = proof.noise_excess(made, noisy, 255 * std)
        assert abs(excess.mean()) < 4 / 20 and 0.88 < excess.std() < 1.12
    # A picture that is ten levels off is seen under noise of 25 (ramp between 100 and 200).
    assert proof.noise_excess(made + 10, noisy, 255 * std).mean() > 2.5


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1])
def test_the_strength_of_noise_is_found_whatever_the_picture_is(std):
    """Also of half black digits, where the ends cut it off; structure beside it hardly counts."""
    ramp = np.linspace(0, 255, 32 * 32).reshape(32, 32, 1)
    pictures = [np.zeros_like(ramp), ramp, 100 + ramp * 0.1]
    pictures += list(data.load("digits", split="train", image_size=32, num_images=2))
    for number, picture in enumerate(pictures):
        made = np.repeat(np.round(picture).astype(np.uint8)[None], 100, axis=0)
        noisy = perturbations.noise(made, jax.random.key(number), std)
        found = proof.noise_std(made, noisy)
        assert found.mean() == pytest.approx(255 * std, rel=0.02)
        assert found.std() < 0.06 * 255 * std
        excess = proof.noise_excess(made, noisy)
        assert abs(excess.mean()) < 0.5 and excess.std() < 1.9
        known = proof.noise_excess(made, noisy, found)
        np.testing.assert_array_equal(excess, known)
    wrong = np.clip(made + 60 * np.sin(ramp / 10), 0, 255).astype(np.uint8)
    assert np.median(proof.noise_excess(wrong, noisy)) > 4


def test_the_strength_of_noise_asks_for_two_pixels():
    column = np.zeros((1, 8, 1, 1), np.uint8)
    with pytest.raises(ValueError, match=r"\[8, 1\] have no 2 x 2 pixels"):
        proof.noise_std(column, column)


def test_under_noise_the_excess_says_what_is_far_away():
    rng = np.random.default_rng(6)
    own, tail = rng.uniform(12, 13, 99), proof.foreign_tail(rng.uniform(13, 30, 200))
    errors = np.array([25.0, 25.0, np.inf])
    excess = np.array([0.0, 9.0, 9.0]), rng.normal(size=99), rng.uniform(4, 50, 200)
    found = proof.judge(errors, np.zeros(3, bool), own, tail, excess=excess)
    assert found.verdict.tolist() == ["cannot_judge", "not_ours", "cannot_judge"]
    assert found.p_value[0] > 0.1 and found.p_value[1] == 1 / 100 and np.isnan(found.p_value[2])
    plain = proof.judge(errors, np.zeros(3, bool), own, tail)
    assert plain.verdict.tolist() == ["not_ours", "not_ours", "cannot_judge"]


def test_the_excess_over_noise_refuses_what_it_cannot_say():
    images = np.zeros((2, 4, 4, 1), np.uint8)
    with pytest.raises(ValueError, match="uint8 images of one shape"):
        proof.noise_excess(images, images.astype(np.float32), 5.0)
    with pytest.raises(ValueError, match="uint8 images of one shape"):
        proof.noise_excess(images, images[:1], 5.0)
    with pytest.raises(ValueError, match="one shape .n, h, w, c., got uint8 .4, 4, 1."):
        proof.noise_excess(images[0], images[0], 5.0)
    with pytest.raises(ValueError, match="positive number of grey levels"):
        proof.noise_excess(images, images, 0.0)


def test_above_the_edge_nothing_is_bounded():
    tail = proof.foreign_tail(power_law(np.random.default_rng(0), 5.0, 9.0, 1000))
    assert proof.foreign_probability(tail, [tail.edge, 100.0]).tolist() == [1, 1]


def test_the_lower_end_is_one_as_often_as_it_says():
    """2000 samples of 150 errors: alpha is below the end in one of twenty, the other half of a
    confidence of 90 % is q's."""
    rng = np.random.default_rng(1)
    low = [
        proof.foreign_tail(power_law(rng, 3.0, 8.0, 150), confidence=0.9).codimension_low
        for _ in range(2000)
    ]
    assert np.mean(np.array(low) > 3.0) == pytest.approx(0.05, abs=0.015)


def test_few_foreign_images_bound_nothing():
    errors = power_law(np.random.default_rng(0), 3.0, 8.0, 80)
    assert not math.isnan(proof.foreign_tail(errors).edge)
    errors[0] = 0.2
    tail = proof.foreign_tail(errors[:79])
    assert math.isnan(tail.edge) and tail.smallest == 0.2
    assert proof.foreign_probability(tail, [0.1, 9.0]).tolist() == [1, 1]


def test_rounding_is_rounding():
    """Under the null at most as many small p-values as there may be; twice the error has none."""
    rng = np.random.default_rng(2)
    for n in (60, 1024):
        r = rng.uniform(-0.5, 0.5, (4000, n))
        p = proof.rounding_p_value(np.square(r).mean(axis=1), np.full(4000, n))
        assert scipy.stats.kstest(p, "uniform").pvalue > 1e-3
        more = proof.rounding_p_value(np.square(1.4 * r).mean(axis=1), np.full(4000, n))
        assert np.mean(more < 0.05) > 0.95
    assert np.isnan(proof.rounding_p_value(0.0, 0))


def test_what_is_proved_is_polished_until_only_rounding_is_left():
    """From near the latents that were drawn: their least squares, not where a search could stop."""
    generator = zoo.load("digits_dcgan_0")
    own = regeneration.make_bank(generator, jax.random.key(5), 8)
    near = own.latents + 0.1 * np.asarray(jax.random.normal(jax.random.key(2), own.latents.shape))
    # One short step, which is called enough.
    enough = {"rmse_levels": 30.0, "max_levels": 200.0, "damping": 100.0}
    config = regeneration.RegenerationConfig(num_starts=1, targets=False, **enough)
    found = regeneration.regenerate(
        generator, own.images, jax.random.key(0), config, bank=own._replace(latents=near)
    )
    assert found.proved.all()
    assert proof.rounding_p_value(found.misfit, found.equations).min() > 0.05


def test_verdicts():
    rng = np.random.default_rng(3)
    own = rng.uniform(0.1, 0.3, 99)
    foreign = np.concatenate([[5.0], power_law(rng, 6.0, 12.0, 999) + 5])
    errors = np.array([0.2, 0.2, 2.0, 4.9, 5.0, 20.0, np.inf, np.nan])
    proved = np.array([True, False, False, False, False, False, False, False])
    tail = proof.foreign_tail(foreign)
    found = proof.judge(errors, proved, own, tail, ProofConfig(fnr=0.02, foreign_rate=1e-3))
    assert found.verdict.tolist()[:2] == ["proved", "ours"]
    # Nearer than any foreign image that was seen, but not by much.
    assert found.verdict[3] == "cannot_judge" and found.foreign_probability[3] < 1e-2
    assert found.verdict.tolist()[4:] == ["not_ours", "not_ours", "cannot_judge", "cannot_judge"]
    np.testing.assert_allclose(found.p_value[3:6], 1 / 100)
    assert np.isnan(found.p_value[6:]).all() and np.isnan(found.foreign_probability[6:]).all()
    np.testing.assert_allclose(
        found.foreign_probability[:6], proof.foreign_probability(tail, errors[:6])
    )
    # Too few own images for this rate: nothing is called not ours.
    few = proof.judge(errors, proved, own[:20], tail, ProofConfig(fnr=0.02))
    assert "not_ours" not in few.verdict
    # An image that says too little is no proof of anything.
    determined = proof.is_determined(np.array([127, 128] * 4), 64)
    assert determined.tolist() == [False, True] * 4
    found = proof.judge(errors, proved, own, tail, determined=determined)
    assert found.verdict[0] == "cannot_judge" and found.verdict[1] == "ours"


def test_mistakes_are_named():
    for name in ("fnr", "foreign_rate", "confidence"):
        for bad in (0.0, 1.0, math.nan):
            with pytest.raises(ValueError, match=name):
                ProofConfig(**{name: bad})
    for bad in ([], [1.0, math.nan], [0.0, 1.0]):
        with pytest.raises(ValueError, match="foreign errors"):
            proof.foreign_tail(np.array(bad))
    assert proof.counted_codimension(np.array([100, 3]), 8).tolist() == [92, 0]


@pytest.mark.parametrize(
    "name", ["digits_dcgan_0", "digits_wgan_gp_0", "digits_lsgan_0", "digits_ebgan_0"]
)
def test_another_arithmetic_changes_pixels_by_far_less_than_rounding(name):
    """What another device may do to a proof: float32 against float64 (the tests have both)."""
    generator = zoo.load(name)
    z = np.random.default_rng(0).normal(size=(100, generator.latent_dim))

    def levels(dtype):
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), generator.variables)
        made = jax.jit(generator.module.apply)(variables, z.astype(dtype))
        return 127.5 * (np.asarray(made) + 1)

    single, double = levels(np.float32), levels(np.float64)
    assert single.dtype == np.float32 and double.dtype == np.float64
    assert 0 < np.abs(single - double).max() < 0.002
    assert np.mean(np.round(single) != np.round(double)) < 1e-4
