"""Keys: exact angles, compliance on images that were not seen, eq. 9 against another optimiser."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.fft

from flipad_jax.registry import attributability, user_keys
from flipad_jax.registry.user_keys import KeyConfig

QUICK = KeyConfig(num_steps=200, batch_size=64, learning_rate=1e-2)


def images(seed, num=400):
    """A dark background that hardly varies, and a bright blob: 6 x 6 x 1."""
    rng = np.random.default_rng(seed)
    x = np.full((num, 6, 6, 1), -0.9) + 0.02 * rng.normal(size=(num, 6, 6, 1))
    x[:, 2:4, 2:4] += rng.uniform(0, 1.5, (num, 2, 2, 1))
    return np.clip(x, -1, 1).astype(np.float32)


REAL, GENERATED = images(0), images(1)


@pytest.fixture(scope="module", name="keys")
def _keys():
    return user_keys.joint(jax.random.key(0), REAL, GENERATED, 6, config=QUICK)


def test_joint_keys_are_orthonormal_and_compliant(keys):
    flat = keys.reshape(6, -1).astype(np.float64)
    np.testing.assert_allclose(flat @ flat.T, np.eye(6), atol=1e-6)
    found = user_keys.describe(keys, images(2), images(3))
    assert found.compliance.min() == found.generated_compliance.min() == 1
    assert np.abs(found.largest_cosine).max() < 1e-6
    responses = attributability.responses(keys, np.concatenate([images(2), images(3)]))
    np.testing.assert_allclose(found.d_max, np.abs(responses).max(axis=0), rtol=1e-5)
    # Not by luck: random orthonormal vectors are on the wrong side half of the time.
    random = np.linalg.qr(np.random.default_rng(0).normal(size=(36, 6)))[0].T
    random = random.reshape(6, 6, 6, 1).astype(np.float32)
    assert user_keys.describe(random, REAL, GENERATED).compliance.min() < 0.5


def test_every_pair_is_at_the_wanted_angle():
    keys = user_keys.joint(jax.random.key(0), REAL, GENERATED, 4, cosine=np.sqrt(0.5), config=QUICK)
    flat = keys.reshape(4, -1).astype(np.float64)
    expected = np.full((4, 4), np.sqrt(0.5))
    np.fill_diagonal(expected, 1)
    np.testing.assert_allclose(flat @ flat.T, expected, atol=1e-6)
    assert user_keys.describe(keys, images(2), images(3)).compliance.min() > 0.99


@pytest.mark.parametrize("method", ["joint", "sequential"])
def test_keys_can_be_added_without_touching_those_handed_out(keys, method):
    before = keys.copy()
    find = getattr(user_keys, method)
    more = find(jax.random.key(1), REAL, GENERATED, 2, earlier=keys, config=QUICK)
    np.testing.assert_array_equal(keys, before)
    cosines = more.reshape(2, -1) @ keys.reshape(6, -1).T
    # Exactly at right angles, or by the penalty of eq. 9 hardly ever acute.
    assert np.abs(cosines).max() < 1e-6 if method == "joint" else cosines.max() < 0.1
    assert (
        user_keys.describe(np.concatenate([keys, more]), images(2), images(3)).compliance[6:].min()
        > 0.98
    )


def test_a_sequential_key_does_not_depend_on_how_many_are_asked_for():
    one = user_keys.sequential(jax.random.key(5), REAL, GENERATED, 1, config=QUICK)
    two = user_keys.sequential(jax.random.key(5), REAL, GENERATED, 2, config=QUICK)
    np.testing.assert_allclose(one[0], two[0], atol=1e-6)
    later = user_keys.sequential(
        jax.random.key(5), REAL, GENERATED, 1, earlier=two[:1], config=QUICK
    )
    np.testing.assert_allclose(later[0], two[1], atol=1e-5)


def test_eq_9_is_solved():
    """Eq. 9 is convex: without a minibatch's noise no other optimiser finds a lower value."""
    from scipy import optimize

    real, generated = REAL[:60].reshape(60, -1), GENERATED[:60].reshape(60, -1)
    known = np.zeros((1, 36))
    known[0, 0] = 1.0

    def value(phi):
        hinges = np.maximum(1 + np.concatenate([real, generated]) @ phi, 0).mean()
        return hinges + np.maximum(known @ phi, 0).sum()

    found = user_keys._solve_one(
        jax.random.key(0),
        real,
        generated,
        known.astype(np.float32),
        1,
        KeyConfig(num_steps=1500, batch_size=120, learning_rate=5e-3),
    )
    # The norm was divided out: the best value along the direction.
    along = optimize.minimize_scalar(lambda s: value(s * np.asarray(found)), (0, 10)).fun
    best = optimize.minimize(value, np.asarray(found) * 2, method="Powell", options={"maxiter": 20})
    assert along <= best.fun + 0.01


def test_the_excess_makes_responses_shorter_and_keeps_compliance():
    plain = KeyConfig(num_steps=400, batch_size=64, learning_rate=1e-2)
    found = {}
    for excess in (0.0, 0.3):
        config = dataclasses.replace(plain, excess=excess)
        keys = user_keys.joint(jax.random.key(0), REAL, GENERATED, 2, config=config)
        found[excess] = user_keys.describe(keys, images(2), images(3))
    assert found[0.3].compliance.min() > 0.98
    assert found[0.3].d_max.mean() < 0.8 * found[0.0].d_max.mean()
    with pytest.raises(ValueError, match="excess"):
        KeyConfig(excess=-1)


def test_more_keys_are_nearer_to_the_data(keys):
    mean = images(2).mean(axis=0)
    bound = user_keys.mean_response_bound(mean, 6)
    responses = keys.reshape(6, -1).astype(np.float64) @ mean.ravel()
    assert np.sqrt(np.mean(responses**2)) <= bound
    assert user_keys.mean_response_bound(mean, 24) == pytest.approx(bound / 2)


def test_keys_are_kept_in_a_file(keys, tmp_path):
    path = tmp_path / "keys.safetensors"
    user_keys.save(path, keys, {"users": ["ann", "bob"]})
    loaded, facts = user_keys.load(path)
    np.testing.assert_array_equal(loaded, keys)
    assert facts == {"users": ["ann", "bob"]}
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="holds no keys"):
        user_keys.load(path)
    with pytest.raises(ValueError, match="norm"):
        user_keys.save(path, 2 * keys)


def test_mistakes_are_named(keys):
    rng = jax.random.key(0)
    with pytest.raises(ValueError, match="room for 36"):
        user_keys.joint(rng, REAL, GENERATED, 37)
    with pytest.raises(ValueError, match="one size"):
        user_keys.joint(rng, REAL, np.zeros((4, 5, 5, 1), np.float32), 1)
    for find in (user_keys.joint, user_keys.sequential):  # as many numbers, other images
        with pytest.raises(ValueError, match=r"\(4, 9, 1\) each, the real ones \(6, 6, 1\)"):
            find(rng, REAL, GENERATED.reshape(-1, 4, 9, 1), 1)
        with pytest.raises(ValueError, match=r"earlier keys are \(4, 9, 1\) each"):
            find(rng, REAL, GENERATED, 1, earlier=keys.reshape(-1, 4, 9, 1))
    with pytest.raises(ValueError, match="another size"):
        user_keys.sequential(rng, REAL[:, :5], GENERATED[:, :5], 1, earlier=keys)
    with pytest.raises(ValueError, match="right angles"):
        user_keys.joint(rng, REAL, GENERATED, 1, earlier=keys, cosine=0.5)


def test_no_learning_rate_and_no_number_of_keys_loses_the_right_angles():
    """Steps are bounded: 600 keys of 32 x 32 at the default rate would run away without that."""
    config = KeyConfig(num_steps=50, batch_size=32, learning_rate=3.0)
    keys = user_keys.joint(jax.random.key(0), REAL, GENERATED, 34, config=config).reshape(34, -1)
    np.testing.assert_allclose(keys @ keys.T, np.eye(34), atol=1e-6)


@pytest.mark.parametrize("find", [user_keys.sequential, user_keys.joint])
def test_keys_of_a_bandwidth_have_no_other_frequencies(find):
    """Against SciPy's DCT of the keys; and the angles are kept, earlier keys of all frequencies
    included."""
    config = dataclasses.replace(QUICK, bandwidth=5)
    keys = find(jax.random.key(1), REAL, GENERATED, 2, config=config)
    frequencies = scipy.fft.dctn(keys, axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(np.square(frequencies[:, :5, :5]).sum((1, 2, 3)), 1, rtol=1e-5)
    assert user_keys.describe(keys, REAL, GENERATED).compliance.min() > 0.95
    earlier = find(jax.random.key(2), REAL, GENERATED, 2, config=QUICK)
    later = user_keys.joint(jax.random.key(1), REAL, GENERATED, 2, earlier=earlier, config=config)
    both = np.concatenate([earlier, later]).reshape(4, -1)
    np.testing.assert_allclose(both[2:] @ both.T, np.eye(4)[2:], atol=1e-5)


def test_a_bandwidth_that_images_do_not_have_is_refused():
    for bad in (-1, REAL.shape[1] + 1):
        with pytest.raises(ValueError, match="bandwidth"):
            config = dataclasses.replace(QUICK, bandwidth=bad)
            user_keys.joint(jax.random.key(0), REAL, GENERATED, 1, config=config)
    config = dataclasses.replace(QUICK, bandwidth=1)
    said = "within a bandwidth of 1 have room for 1 of the 2 directions that are needed"
    with pytest.raises(ValueError, match=said):
        user_keys.joint(jax.random.key(0), REAL, GENERATED, 2, config=config)
