"""Keyed generators on an 8 x 8 root: the shift is learned, is seen, and survives a blur."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flipad_jax.generators import dcgan, sampling, training
from flipad_jax.perturbations import differentiable
from flipad_jax.registry import attributability, user_generators, user_keys
from flipad_jax.registry.user_generators import KeyedConfig
from flipad_jax.registry.user_keys import KeyConfig

CONFIG = KeyedConfig(num_steps=120, batch_size=16, learning_rate=3e-3)


@pytest.fixture(scope="module", name="root")
def _root():
    gan = dcgan.dcgan((8, 8, 1), latent_dim=4, features=(16,))
    root = sampling.from_state(gan, training.init(gan, jax.random.key(3)))
    # Weights of N(0, 0.02) draw grey: stronger ones draw pictures, a negative last layer dark ones.
    params = jax.tree.map(lambda x: 8 * x if x.ndim == 4 else x, root.variables["params"])
    params["last"]["kernel"] = -jnp.abs(params["last"]["kernel"])
    return dataclasses.replace(root, variables={**root.variables, "params": params})


@pytest.fixture(scope="module", name="data")
def _data(root):
    """Authentic images, those of the root itself: P_D = P_G0, as the theorems assume."""
    return sampling.generate(root, jax.random.key(0), 400), sampling.generate(
        root, jax.random.key(1), 400
    )


@pytest.fixture(scope="module", name="keys")
def _keys(data):
    config = KeyConfig(num_steps=150, batch_size=64, learning_rate=1e-2)
    return user_keys.joint(jax.random.key(0), data[0], data[0], 2, config=config)


@pytest.fixture(scope="module", name="found")
def _found(root, data, keys):
    return user_generators.search(root, keys, data[1], jax.random.key(2), CONFIG, num_images=200)


def made(root, state, index, num=200):
    model = user_generators.take_user(root, state, index)
    return sampling.generate(model, jax.random.fold_in(jax.random.key(7), index), num)


@pytest.mark.slow
def test_algorithm_1_makes_models_that_are_told_apart(root, data, keys, found):
    assert found.reached.all() and (found.distinguishability >= 1 - CONFIG.delta).all()
    d_max = attributability.extent(keys, [data[1]]).d_max
    # gamma is d_max times a power of alpha, d_max that of the data and the root's images.
    assert (found.gammas >= d_max - 1e-6).all()
    tables = [attributability.responses(keys, made(root, found.state, i)) for i in range(2)]
    assert attributability.attributability(tables) > 0.95
    real = attributability.responses(keys, data[0])
    for i in range(2):
        assert attributability.distinguishability(tables[i][:, i], real[:, i]) > 0.97
    users = attributability.attribute(keys, made(root, found.state, 1)).user
    assert (users == 1).mean() > 0.95
    assert (attributability.attribute(keys, data[1]).user == attributability.NOBODY).mean() > 0.95


@pytest.mark.slow
def test_the_error_of_eq_5_is_small_and_theorem_1_holds(root, keys, found, data):
    z = jax.random.normal(jax.random.key(9), (300, 4))
    root_images = root.module.apply(root.variables, z)
    for i in range(2):
        model = user_generators.take_user(root, found.state, i)
        shift = model.module.apply(model.variables, z) - root_images
        error = shift - found.gammas[i] * keys[i]
        assert np.linalg.norm(np.mean(error, axis=0)) < 0.5 * found.gammas[i]
        statistics = attributability.error_statistics(keys, [np.asarray(error)])
        d_max = attributability.extent(keys, [data[1]]).d_max[i]
        needed = attributability.required_gamma(
            d_max, statistics.std[i], statistics.mean[i], delta=0.5
        )
        if found.gammas[i] >= needed:
            assert found.distinguishability[i] >= 0.75


def test_all_users_in_one_program_are_users_one_by_one(root, keys):
    state = user_generators.init(root, 2, CONFIG)
    shifts = jnp.asarray(2 * keys)
    step = functools.partial(
        user_generators._step, root, jax.random.key(0), update=user_generators._match, config=CONFIG
    )
    together, losses = step(state, shifts)
    for i in range(2):
        own = jax.tree.map(lambda leaf: leaf[i : i + 1], state)
        alone, loss = step(own, shifts[i : i + 1])
        np.testing.assert_allclose(losses[i], loss[0], rtol=1e-4)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[i], b[0], atol=2e-5),
            together.params,
            alone.params,
        )


@pytest.mark.slow
def test_robust_training_of_all_users_in_one_program_is_that_of_users_one_by_one(root, monkeypatch):
    """The way of an accelerator against the loop of a CPU, over steps with and without noise."""
    keys = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=(1, 2), keepdims=True)
    config = dataclasses.replace(CONFIG, num_steps=4, quality=2.0, robust_share=0.5)
    noise = differentiable.draw("noise")
    tried = []

    def train(num_steps=config.num_steps, share=0.5):
        chosen = dataclasses.replace(config, num_steps=num_steps, robust_share=share)
        state = user_generators.init(root, 3, chosen, first=5)
        return user_generators.train_robust(root, state, keys, jax.random.key(6), chosen, noise)

    alone, losses = train()
    step = user_generators._step
    monkeypatch.setattr(jax, "default_backend", lambda: "another")
    monkeypatch.setattr(
        user_generators, "_step", lambda *a, **k: tried.append(len(a[2].user)) or step(*a, **k)
    )
    together, losses_together = train()
    assert tried == [3] * 4
    np.testing.assert_allclose(losses_together, losses, rtol=0, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        together.params,
        alone.params,
    )
    np.testing.assert_array_equal(together.step, alone.step)
    np.testing.assert_array_equal(together.user, [5, 6, 7])
    # The comparison is of something: weights moved by far more than that, and in the first step
    # some users met noise and some did not.
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), alone.params, root.variables["params"]
    )
    assert min(jax.tree.leaves(moved)) > 1e-3
    first, never, always = (train(1, share)[1] for share in (0.5, 0.0, 1.0))
    met = np.isclose(first, always, atol=1e-6)
    np.testing.assert_allclose(first, np.where(met, always, never), atol=1e-6)
    assert 0 < met.sum() < 3 and np.abs(always - never).min() > 1e-4


def test_a_user_does_not_depend_on_the_others(root, keys):
    few = dataclasses.replace(CONFIG, num_steps=3)
    both, _ = user_generators.train(
        root, user_generators.init(root, 2, few), keys, np.ones(2), jax.random.key(0), few
    )
    second, _ = user_generators.train(
        root,
        user_generators.init(root, 1, few, first=1),
        keys[1:],
        np.ones(1),
        jax.random.key(0),
        few,
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[0]), both.params, second.params)


@pytest.mark.slow
def test_robust_training_survives_what_it_saw(root, data, keys, found):
    blur = differentiable.strongest("blur")
    config = dataclasses.replace(CONFIG, num_steps=200, quality=1.0, robust_share=0.5)
    state = found.state
    robust, _ = user_generators.train_robust(root, state, keys, jax.random.key(5), config, blur)

    def share(state):
        hits = []
        for i in range(2):
            images = jnp.asarray(made(root, state, i) / 127.5 - 1, jnp.float32)
            blurred = np.asarray(blur(jax.random.key(0), images))
            hits.append((attributability.responses(keys, blurred)[:, i] > 0).mean())
        return np.mean(hits)

    assert share(robust) > max(0.9, share(state))


@pytest.mark.slow
def test_a_model_that_is_never_seen_is_reported(root, data, keys):
    config = dataclasses.replace(CONFIG, num_steps=1, max_rounds=2, learning_rate=1e-9)
    found = user_generators.search(root, keys, data[1], jax.random.key(2), config, num_images=50)
    assert not found.reached.any() and (found.rounds == 2).all()
    np.testing.assert_allclose(found.distinguishability, 0.5, atol=0.05)


def test_mistakes_are_named(root, keys):
    state = user_generators.init(root, 2, CONFIG)
    with pytest.raises(ValueError, match="one per user"):
        user_generators.train(root, state, keys[:, :4], np.ones(2), jax.random.key(0), CONFIG)
    with pytest.raises(ValueError, match="above 0"):
        user_generators.train(root, state, keys, np.zeros(2), jax.random.key(0), CONFIG)
    with pytest.raises(ValueError, match="norm"):
        user_generators.train(root, state, 2 * keys, np.ones(2), jax.random.key(0), CONFIG)
    with pytest.raises(ValueError, match="alpha"):
        KeyedConfig(alpha=1.0)


def test_the_ladder_begins_where_a_perfect_model_is_seen():
    """Against a scan of every rung; pixels at -1 lose nothing upwards, those at 1 everything."""
    rng = np.random.default_rng(0)
    key = rng.normal(size=40).astype(np.float32)
    key /= np.linalg.norm(key)
    x = np.clip(rng.normal(-0.8, 0.4, size=(500, 40)), -1, 1).astype(np.float32)
    x -= (0.4 + x @ key)[:, None] * key  # all of them on the negative side, at various distances
    x = np.clip(x + rng.normal(size=(500, 1)).astype(np.float32) * 0.05 * key, -1, 1)
    config = KeyedConfig(delta=0.02, alpha=1.1)
    real = np.full(100, -1.0)

    def seen(gamma):
        return (np.clip(x + gamma * key, -1, 1) @ key > 0).mean() / 2 + 0.5

    d_max = 0.3
    gamma = user_generators._first_gamma(x, key, d_max, real, config)
    rung = np.log(gamma / d_max) / np.log(1.1)
    assert rung == pytest.approx(round(rung), abs=1e-5) and rung > 0.5
    assert seen(gamma) >= 0.98 > seen(gamma / 1.1)
    # Real images on the wrong side: no gamma helps.
    assert np.isnan(user_generators._first_gamma(x, key, d_max, -real, config))


def test_a_key_that_is_not_compliant_is_reported_and_not_trained(root, data, keys, monkeypatch):
    monkeypatch.setattr(user_generators, "train", lambda *_, **__: pytest.fail("trained"))
    found = user_generators.search(
        root, -keys[:1], data[1], jax.random.key(2), CONFIG, num_images=50
    )
    assert not found.reached.any() and found.rounds.tolist() == [0]
    assert found.distinguishability[0] <= 0.6
    images = [
        sampling.generate(g, jax.random.key(0), 3)
        for g in (root, user_generators.take_user(root, found.state, 0))
    ]
    np.testing.assert_array_equal(*images)


@pytest.mark.slow
def test_a_training_that_diverges_is_an_error(root, data, keys):
    config = dataclasses.replace(CONFIG, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        user_generators.search(root, keys[:1], data[1], jax.random.key(2), config, num_images=50)
