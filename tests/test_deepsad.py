"""DeepSAD against PyTorch (network, loss, optimiser), and what training must achieve."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flipad_jax.detection import deepsad

TINY = deepsad.DeepSADConfig(widths=(4, 6), rep_dim=8, epochs=3, batch_size=16)


_apply = jax.jit(
    deepsad.LeNet(TINY.widths, TINY.rep_dim).apply, static_argnames=("train", "mutable")
)
_step = jax.jit(deepsad.train_step, static_argnames="config")


def _data(n, seed=0, shape=(8, 8, 2)):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, *shape)), jnp.float32)


def _labels(n):
    return jnp.where(jnp.arange(n) % 3 > 0, 1, -1)


def _torch_lenet(config, channels, height, width):
    """The encoder of the paper's code, written from its description (FLIPAD paper, E.4)."""
    from torch import nn

    layers = []
    for out in config.widths:
        layers += [
            nn.Conv2d(channels, out, 5, padding=2, bias=False),
            nn.BatchNorm2d(out, eps=1e-4, affine=False),
            nn.LeakyReLU(0.01),
            nn.MaxPool2d(2, 2),
        ]
        channels, height, width = out, height // 2, width // 2
    flat = channels * height * width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, config.rep_dim, bias=False))


def _weights_from_torch(net, config, height, width):
    """Weights of the PyTorch network in our layout; also fits its gradients."""
    convs = [layer for layer in net if type(layer).__name__ == "Conv2d"]
    params = {
        f"Conv_{i}": {"kernel": conv.weight.detach().numpy().transpose(2, 3, 1, 0)}
        for i, conv in enumerate(convs)
    }
    halvings = 2 ** len(convs)
    dense = net[-1].weight.detach().numpy()  # [rep, c * h * w] to [h * w * c, rep]
    dense = dense.reshape(config.rep_dim, config.widths[-1], height // halvings, width // halvings)
    dense = dense.transpose(2, 3, 1, 0).reshape(-1, config.rep_dim)
    return {**params, "Dense_0": {"kernel": dense}}


def _torch_pair(config, shape, seed=0):
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed)
    height, width, channels = shape
    net = _torch_lenet(config, channels, height, width)
    for layer in net:
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    norms = [layer for layer in net if isinstance(layer, torch.nn.BatchNorm2d)]
    stats = {
        f"BatchNorm_{i}": {
            "mean": jnp.asarray(norm.running_mean.numpy().copy()),
            "var": jnp.asarray(norm.running_var.numpy().copy()),
        }
        for i, norm in enumerate(norms)
    }
    params = jax.tree.map(
        lambda a: jnp.asarray(a.copy()), _weights_from_torch(net, config, height, width)
    )
    return torch, net, params, stats


@pytest.mark.parametrize("shape", [(16, 16, 3), (9, 14, 5)])
def test_forward_is_pytorchs(shape):
    torch, net, params, stats = _torch_pair(TINY, shape)
    x = _data(6, shape=shape)
    planes = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)
    variables = {"params": params, "batch_stats": stats}
    with torch.no_grad():
        expected = net.eval()(planes).numpy()
    ours = _apply(variables, x, train=False)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, atol=2e-5)

    with torch.no_grad():
        expected = net.train()(planes).numpy()
    ours, updates = _apply(variables, x, train=True, mutable=("batch_stats",))
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    height, width, _ = shape
    for i, norm in enumerate(layer for layer in net if isinstance(layer, torch.nn.BatchNorm2d)):
        new, old = updates["batch_stats"][f"BatchNorm_{i}"], stats[f"BatchNorm_{i}"]
        np.testing.assert_allclose(new["mean"], norm.running_mean, atol=2e-5)
        # The documented deviation: PyTorch's running variance takes the unbiased variance.
        count = 6 * (height >> i) * (width >> i)
        unbiased = 0.9 * old["var"] + (new["var"] - 0.9 * old["var"]) * (count / (count - 1))
        np.testing.assert_allclose(unbiased, norm.running_var, atol=2e-5)


def test_loss_is_equation_6_and_pytorchs():
    torch = pytest.importorskip("torch")
    distances = np.random.default_rng(0).exponential(size=40).astype(np.float32)
    labels = np.asarray(_labels(40))
    by_hand = [0.7 * (d + 1e-3) ** y for d, y in zip(distances, labels)]
    ours = deepsad.loss(jnp.asarray(distances), labels, eta=0.7, eps=1e-3)
    assert ours == pytest.approx(np.mean(by_hand), rel=1e-5)
    d = torch.tensor(distances, requires_grad=True)
    (0.7 * (d + 1e-3) ** torch.tensor(labels).float()).mean().backward()
    gradient = jax.grad(deepsad.loss)(jnp.asarray(distances), labels, eta=0.7, eps=1e-3)
    np.testing.assert_allclose(gradient, d.grad, rtol=1e-4)
    at_centre = deepsad.loss(jnp.zeros(2, jnp.float32), jnp.array([1, -1]))
    assert at_centre == pytest.approx((1e-6 + 1e6) / 2, rel=1e-5)


def test_steps_are_pytorchs_adam_with_coupled_decay():
    # A strong decay and a drop of the learning rate: the absence of either must show.
    config = deepsad.DeepSADConfig(
        widths=(4,), rep_dim=8, weight_decay=0.3, learning_rate=1e-2, drop_epochs=(1,), eps=1e-2
    )
    torch, net, params, stats = _torch_pair(config, (8, 8, 2))
    state = deepsad.init(jax.random.key(0), (8, 8, 2), config)
    centre = jnp.linspace(-0.5, 0.5, 8, dtype=jnp.float32)
    state = state.replace(params=params, batch_stats=stats, centre=centre)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=0.3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones=[1], gamma=0.1)
    labels = _labels(12)
    start = params
    for epoch in range(2):
        for i in range(3):
            x = _data(12, seed=i)
            planes = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)
            distances = ((net(planes) - torch.tensor(np.asarray(centre))) ** 2).sum(dim=1)
            value = ((distances + 1e-2) ** torch.tensor(np.asarray(labels)).float()).mean()
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            state, ours = _step(state, x, labels, config)
            assert ours == pytest.approx(value.item(), rel=1e-4)
        scheduler.step()
        state = state.replace(epoch=state.epoch + 1)
        expected = _weights_from_torch(net, config, 8, 8)
        for name, layer in expected.items():
            moved = np.abs(layer["kernel"] - start[name]["kernel"]).max()
            error = np.abs(layer["kernel"] - state.params[name]["kernel"]).max()
            assert error < 1e-2 * moved, (epoch, name)
        start = jax.tree.map(np.copy, expected)


@pytest.mark.parametrize("kind", sorted(deepsad.ENCODER_WIDTHS))
def test_paper_widths_have_the_papers_sizes(kind):
    config = deepsad.DeepSADConfig(widths=deepsad.ENCODER_WIDTHS[kind])
    size, channels, flat = {
        "activations": (32, 64, 2048),
        "large": (128, 3, 4096),
    }.get(kind, (32, 3, 2048))
    state = jax.eval_shape(lambda: deepsad.init(jax.random.key(0), (size, size, channels), config))
    assert state.params["Conv_0"]["kernel"].shape == (5, 5, channels, config.widths[0])
    assert state.params["Dense_0"]["kernel"].shape == (flat, 128)
    assert not any("bias" in layer for layer in state.params.values())


def test_initial_weights_are_uniform_within_pytorchs_bound():
    config = deepsad.DeepSADConfig(widths=(16, 32), rep_dim=64)
    params = deepsad.init(jax.random.key(1), (16, 16, 3), config).params
    for name, fan_in in [("Conv_0", 75), ("Conv_1", 400), ("Dense_0", 512)]:
        scaled = np.asarray(params[name]["kernel"]) * np.sqrt(fan_in)
        assert 0.97 < np.abs(scaled).max() <= 1.0 + 1e-6
        assert scaled.std() == pytest.approx(1 / np.sqrt(3), rel=0.05)


def test_centre_is_the_mean_pushed_from_zero():
    own, real = _data(21), _data(30, seed=1) + 1
    state = deepsad.init(jax.random.key(0), (8, 8, 2), TINY)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    mean = _apply(variables, jnp.concatenate([own, real]), train=False).mean(axis=0)
    small = np.abs(mean) < 0.1
    expected = np.where(small, np.where(mean < 0, -0.1, 0.1), mean)
    assert 0 < small.sum() < small.size  # both branches are seen
    centre = deepsad.with_centre(state, own, real, TINY).centre
    np.testing.assert_allclose(centre, expected, atol=1e-5)
    pushed = deepsad.push_from_zero(jnp.array([0.0, -0.0, -1e-9, 0.0999, 0.1, -0.2], jnp.float32))
    np.testing.assert_allclose(pushed, [0.1, 0.1, -0.1, 0.1, 0.1, -0.2], rtol=1e-6)


def _blobs(n, seed, shift):
    """Noise images with a bump in the middle, whose height tells the classes apart."""
    rows, columns = np.mgrid[-4:4, -4:4] + 0.5
    bump = np.exp(-(rows**2 + columns**2) / 8)[None, :, :, None] * shift
    return np.asarray(_data(n, seed) + bump.astype(np.float32))


def test_training_separates_two_blobs():
    config = deepsad.DeepSADConfig(
        widths=(4, 8), rep_dim=16, epochs=10, batch_size=32, learning_rate=4e-3, drop_epochs=(8,)
    )
    own, real = _blobs(128, 0, 1.0), _blobs(128, 1, -1.0)
    detector, losses = deepsad.fit(jax.random.key(0), jnp.asarray(own), jnp.asarray(real), config)
    assert losses.shape == (10,) and losses[-1] < 0.3 * losses[0]
    own_scores = deepsad.score(detector, _blobs(200, 2, 1.0))
    real_scores = deepsad.score(detector, _blobs(200, 3, -1.0))
    assert (own_scores < np.median(real_scores)).mean() > 0.98
    assert (real_scores > np.median(own_scores)).mean() > 0.98


def test_same_seed_same_detector_and_resuming_changes_nothing():
    own, real = _data(40), _data(35, seed=1)
    states = []
    fitted, losses = deepsad.fit(jax.random.key(3), own, real, TINY, progress=states.append)
    again, _ = deepsad.fit(jax.random.key(3), own, real, TINY)
    other, _ = deepsad.fit(jax.random.key(4), own, real, TINY)
    resumed, resumed_losses = deepsad.fit(jax.random.key(3), own, real, TINY, state=states[0])
    scores = deepsad.score(fitted, own)
    np.testing.assert_array_equal(deepsad.score(again, own), scores)
    np.testing.assert_array_equal(deepsad.score(resumed, own), scores)
    assert np.abs(deepsad.score(other, own) - scores).max() > 1e-3
    np.testing.assert_array_equal(resumed_losses, losses)
    assert [int(state.epoch) for state in states] == [1, 2, 3]
    np.testing.assert_array_equal(np.isnan(states[1].losses), [False, False, True])


def test_host_arrays_train_the_same_detector():
    own, real = _data(40), _data(35, seed=1)
    on_device, _ = deepsad.fit(jax.random.key(0), own, real, TINY)
    on_host, _ = deepsad.fit(jax.random.key(0), np.asarray(own), np.asarray(real), TINY)
    np.testing.assert_allclose(
        deepsad.score(on_host, np.asarray(own)), deepsad.score(on_device, own), rtol=1e-4
    )


def test_an_epoch_sees_every_sample_once_and_drops_the_rest(monkeypatch):
    seen = []

    def record(state, x, labels, config, mesh):
        seen.append((np.asarray(x), np.asarray(labels)))
        return state, jnp.float32(len(seen))

    monkeypatch.setattr(deepsad, "_train_step_jit", record)
    own = np.arange(21, dtype=np.float32)[:, None, None, None]
    real = -1 - np.arange(30, dtype=np.float32)[:, None, None, None]
    state = deepsad.init(jax.random.key(0), (8, 8, 2), TINY)
    state, mean = deepsad.train_epoch(jax.random.key(0), state, own, real, TINY)
    assert [x.shape for x, _ in seen] == [(16, 1, 1, 1)] * 3 and float(mean) == 2.0
    values = np.concatenate([x.ravel() for x, _ in seen])
    labels = np.concatenate([y for _, y in seen])
    assert len(set(values)) == 48
    np.testing.assert_array_equal(labels, np.where(values >= 0, 1, -1))
    deepsad.train_epoch(jax.random.key(0), state, own, real, TINY)  # the next epoch shuffles anew
    assert not np.array_equal(seen[0][0], seen[3][0])


def test_a_score_does_not_depend_on_the_batch():
    own, real = _data(37), _data(20, seed=1)
    fitted, _ = deepsad.fit(jax.random.key(0), own, real, TINY)
    scores = deepsad.score(fitted, own)
    assert scores.shape == (37,) and scores.dtype == np.float32
    single = np.concatenate([deepsad.score(fitted, own[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(single, scores[:5], rtol=1e-5)
    assert deepsad.score(fitted, own[:0]).shape == (0,)
    distances = np.square(deepsad.embed(fitted, own, TINY) - np.asarray(fitted.centre)).sum(axis=1)
    np.testing.assert_allclose(scores, distances, rtol=1e-6)


def test_scores_of_the_same_shape_compile_once():
    fitted, _ = deepsad.fit(jax.random.key(0), _data(20), _data(20, seed=1), TINY)
    deepsad.score(fitted, _data(16))
    compiled = deepsad._embed_jit._cache_size()
    for n in (1, 7, 40):
        deepsad.score(fitted, _data(n, seed=n))
    assert deepsad._embed_jit._cache_size() == compiled


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_features_never_get_a_score(bad):
    own, real = _data(20), _data(20, seed=1)
    fitted, _ = deepsad.fit(jax.random.key(0), own, real, TINY)
    spoiled = own.at[3, 2, 1, 0].set(bad)
    scores = deepsad.score(fitted, spoiled)
    assert np.isnan(scores[3]) and np.isfinite(np.delete(scores, 3)).all()
    # Weights of one sign carry an infinity to the end instead of turning it into NaN.
    positive = dataclasses.replace(fitted, params=jax.tree.map(jnp.abs, fitted.params))
    assert np.isnan(deepsad.score(positive, spoiled)[3])
    with pytest.raises(ValueError, match="1 of 20 own and 0 of 20 real"):
        deepsad.fit(jax.random.key(0), spoiled, real, TINY)


def test_a_loss_that_explodes_is_an_error_with_its_epoch():
    config = deepsad.DeepSADConfig(
        widths=(4,), rep_dim=8, epochs=3, batch_size=16, learning_rate=1e30, drop_epochs=()
    )
    with pytest.raises(FloatingPointError, match="epoch [12] of 3"):
        deepsad.fit(jax.random.key(0), _data(20), _data(20, seed=1), config)


def test_many_seeds_at_once():
    config = deepsad.DeepSADConfig(widths=(2,), rep_dim=4)
    keys = jax.random.split(jax.random.key(0), 2)
    x, labels = _data(16, shape=(4, 4, 1)), _labels(16)
    states = jax.vmap(lambda key: deepsad.init(key, (4, 4, 1), config))(keys)
    many, losses = jax.vmap(lambda state: _step(state, x, labels, config))(states)
    one, value = _step(deepsad.init(keys[1], (4, 4, 1), config), x, labels, config)
    assert losses[1] == pytest.approx(float(value), rel=1e-5)
    difference = optax.tree.sub(jax.tree.map(lambda a: a[1], many.params), one.params)
    assert optax.tree.norm(difference) < 1e-3 * optax.tree.norm(one.params)


def test_mistakes_are_named():
    own = _data(20)
    fit = deepsad.fit
    rng = jax.random.key(0)
    with pytest.raises(ValueError, match="expected floating point"):
        fit(rng, own.astype(jnp.int32), own, TINY)
    with pytest.raises(ValueError, match="differ in shape"):
        fit(rng, own, own[:, :7], TINY)
    with pytest.raises(ValueError, match="batch_size=16"):
        fit(rng, own[:5], own[:5], TINY)
    with pytest.raises(ValueError, match="20 own and 0 real"):
        fit(rng, own, own[:0], TINY)
    with pytest.raises(ValueError, match="h, w >= 16"):
        deepsad.init(rng, (8, 8, 2), deepsad.DeepSADConfig(widths=(2, 2, 2, 2)))
    with pytest.raises(ValueError, match="widths="):
        deepsad.DeepSADConfig(widths=())
    with pytest.raises(ValueError, match="eps=0"):
        deepsad.DeepSADConfig(eps=0)
    with pytest.raises(ValueError, match="batch_size=1"):
        deepsad.DeepSADConfig(batch_size=1)
    assert hash(deepsad.DeepSADConfig(widths=[4, 4])) == hash(deepsad.DeepSADConfig(widths=(4, 4)))
    state = deepsad.init(rng, (8, 8, 2), TINY)
    detector = deepsad.finish(state, TINY, (8, 8, 2))
    with pytest.raises(ValueError, match=r"expected \[n, 8, 8, 2\]"):
        deepsad.score(detector, own[:, :, :, :1])
