"""Regeneration: a step against dense algebra, residuals against loops, own images to the last level
on an 8 x 8 generator, one that levels alone cannot climb, every mistake by its name."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flipad_jax.detection import processing, regeneration
from flipad_jax.detection.latent_inversion import LatentGenerator
from flipad_jax.detection.regeneration import Bank, RegenerationConfig
from flipad_jax.generators import dcgan, lsgan, sampling

CONFIG = RegenerationConfig(num_starts=6, max_iters=40, places=5)
RNG = jax.random.key(7)


def strong(module, seed, latent_dim=4, side=8):
    """An untrained model; weights of N(0, 0.02) draw grey, stronger ones draw pictures. Offsets, as
    training makes them: without, a latent of zero has no slope."""
    rng = jax.random.key(seed)
    variables = module.init(rng, jnp.zeros((1, latent_dim), jnp.float32))

    def stronger(path, x):
        if path[-1].key == "bias":
            return 0.5 * jax.random.normal(rng, x.shape, jnp.float32)
        return 8 * x if x.ndim == 4 else x

    params = jax.tree.map_with_path(stronger, variables["params"])
    variables = {**variables, "params": params}
    return sampling.TrainedGenerator(variables, module, (side, side, 1), latent_dim)


OURS = strong(dcgan.Generator(1, (8,)), 3)
THEIRS = strong(dcgan.Generator(1, (8,)), 4)
# Its convolutions know reverse mode only.
LSGAN = strong(lsgan.Generator(8, 1, (8, 8, 8, 8)), 0)
GENERATORS = {"dcgan": OURS, "lsgan": LSGAN}


def exact_levels(generator, z):
    """Grey levels in float64 that are not rounded, `[n, h, w, c]`."""
    made = generator.module.apply(generator.variables, jnp.asarray(z, jnp.float64))
    assert made.dtype == np.float64
    return (np.asarray(made) + 1) * 127.5


def assert_rounded(images, levels):
    """Whole levels; a tie may go either way in float32."""
    assert images.dtype == np.uint8
    assert np.abs(images - np.clip(levels, 0, 255)).max() <= 0.5 + 1e-3


@pytest.fixture(scope="module", name="own")
def _own():
    return sampling.generate(OURS, jax.random.key(5), 12)


@pytest.fixture(scope="module", name="found")
def _found(own):
    return regeneration.regenerate(OURS, own, RNG, CONFIG)


# --- the residuals ------------------------------------------------------------------------------


def test_residuals_are_those_of_loops_and_leave_out_what_the_encoder_cut():
    image = np.array([0, 0, 0, 0, 255, 255, 255, 255, 7, 3, 252, 100], np.float32)
    levels = np.array(
        [0.0, 0.4, 2.0, 6.0, 255.0, 254.6, 250.0, 244.0, 7.5, 1.0, 254.8, 180.0], np.float32
    )
    slack = 5.5
    differences, targets = [], []
    for x, made in zip(image.astype(float), levels.astype(float)):
        cut = (x == 0 and made < 0.5) or (x == 255 and made > 254.5)
        differences.append(0 if cut else made - x)
        # Within the slack of an end it says "this dark or darker".
        cut = (x <= slack and made < slack) or (x >= 255 - slack and made > 255 - slack)
        aim = min(max(x, slack), 255 - slack)
        y, o = (np.arctanh(min(max(v / 127.5 - 1, -1 + 1e-6), 1 - 1e-6)) for v in (made, aim))
        targets.append(0 if cut else 127.5 * (y - o))
    assert differences.count(0) == 4 and targets.count(0) == 8
    found = regeneration.residual(jnp.asarray(levels), jnp.asarray(image))
    np.testing.assert_allclose(found, differences, atol=1e-4)
    made = jnp.asarray(levels / np.float32(127.5) - 1)
    found = regeneration.target_residual(made, jnp.asarray(image), slack)
    np.testing.assert_allclose(found, targets, rtol=1e-4, atol=1e-3)


def test_both_residuals_of_a_stored_image_are_rounding():
    """At the latent that made it; atanh grows, so it is within what half a level makes of it."""
    levels = np.linspace(0, 255, 2000)[:, None, None, None]
    stored = np.rint(levels)
    np.testing.assert_array_less(np.abs(regeneration.residual(levels, stored)), 0.5 + 1e-9)
    found = regeneration.target_residual(levels / 127.5 - 1, stored, 0.5)

    def target(x):
        return 127.5 * np.arctanh(np.clip(x, 0.5, 254.5) / 127.5 - 1)

    low, high = (target(stored + half) - target(stored) for half in (-0.5, 0.5))
    assert (found >= low - 1e-6).all() and (found <= high + 1e-6).all()
    ends = (stored == 0) | (stored == 255)
    assert np.abs(found[ends]).max() < 1e-9 < np.abs(found[~ends]).max()


# --- one step -----------------------------------------------------------------------------------


def dense(model, image, z, in_targets, prior):
    """Residuals `[n]` and their Jacobian `[n, d]` in float64, by reverse mode and by hand."""
    generator, kind = model
    size = generator.latent_dim

    def made(z):
        images = generator.module.apply(generator.variables, z[None, :size])
        return (images if kind is None else kind.apply(images, z[size:])).ravel()

    exact = jnp.asarray(z, jnp.float64)
    x, jacobian = np.asarray(made(exact)), np.asarray(jax.jacrev(made)(exact))
    assert x.dtype == jacobian.dtype == np.float64
    wanted = np.asarray(image, np.float64).ravel()
    assert wanted.min() > 0 and wanted.max() < 255  # nothing is cut off
    if in_targets:
        r = np.arctanh(x) - np.arctanh(wanted / 127.5 - 1)
        jacobian = jacobian / (1 - x**2)[:, None]
    else:
        r = x + 1 - wanted / 127.5
    # The prior on the latent, not on the unknowns, is a few more residuals.
    weight = np.sqrt(prior if in_targets else prior / 100) * np.eye(len(z))[:size]
    return np.append(127.5 * r, weight @ z), np.concatenate([127.5 * jacobian, weight])


def step_of(jacobian, r, damping):
    gram = jacobian.T @ jacobian
    mu = damping * np.trace(gram) / len(gram)
    return np.linalg.solve(gram + mu * np.eye(len(gram)), jacobian.T @ r)


@functools.partial(jax.jit, static_argnames="config")
def update(model, image, state, config):
    """A step with a Jacobian of its own."""
    state = regeneration.linearize(model, image, state, config)
    return regeneration.update(model, image, state, config)


@pytest.mark.parametrize("in_targets", [False, True], ids=["levels", "targets"])
@pytest.mark.parametrize(
    "name, factors, prior, kind",
    [
        ("dcgan", (1.0,), 0.0, None),
        ("dcgan", (0.1, 0.5, 3.0, 30.0), 1e4, "brightness"),
        ("lsgan", (0.1, 0.5, 3.0, 30.0), 1e4, None),
    ],
)
def test_a_step_is_that_of_levenberg_and_marquardt(name, factors, prior, kind, in_targets):
    """Against dense algebra in float64, with one damping and with several."""
    model = GENERATORS[name], None if kind is None else processing.get(kind)
    image = sampling.generate(model[0], jax.random.key(5), 1)[0].astype(np.float32)
    z = np.array([0.3, -0.2, 0.5, 0.1] + [0.9, 0.05] * (kind is not None), np.float32)
    r, jacobian = dense(model, image, z, in_targets, prior)
    config = RegenerationConfig(damping=0.5, factors=factors, prior=prior)
    state = regeneration.init(jnp.asarray(z), image, config)
    assert bool(state.in_targets) and float(state.damping) == 0.5
    state = state._replace(in_targets=jnp.asarray(in_targets))
    after, levels = update(model, image, state, config)
    ends = [z - step_of(jacobian, r, 0.5 * factor) for factor in factors]
    costs = [np.square(dense(model, image, end, in_targets, prior)[0]).sum() for end in ends]
    best = int(np.argmin(costs))
    assert costs[best] < 0.9 * r @ r and min(np.diff(np.sort(costs)), default=1) > 0
    np.testing.assert_allclose(after.z, ends[best], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(after.damping, 0.5 * factors[best], rtol=1e-6)
    assert {after.z.dtype, after.damping.dtype, levels.dtype} == {jnp.dtype(jnp.float32)}
    assert bool(after.in_targets) == in_targets and int(after.stuck) == 0
    if kind is None:
        assert_rounded(np.asarray(levels, np.uint8), exact_levels(model[0], after.z[None])[0])


def test_a_jacobian_that_is_kept_learns_from_the_step():
    """Broyden: afterwards it maps the step to what the residual did, and all that is at right
    angles to the step to what it did before; a second step is that of dense algebra with it."""
    model = GENERATORS["dcgan"], None
    image = sampling.generate(model[0], jax.random.key(5), 1)[0].astype(np.float32)
    z = np.array([0.3, -0.2, 0.5, 0.1], np.float32)
    config = RegenerationConfig(damping=0.5, prior=0.0, renew_gain=0.0, switch_levels=0.0)
    state = regeneration.init(jnp.asarray(z), image, config)
    state = regeneration.linearize(model, image, state, config)
    after, _ = regeneration.update(model, image, state, config)
    assert not after.due and int(after.age) == 1
    step = np.asarray(after.z - z, float)
    ends = [dense(model, image, np.asarray(x), True, 0.0)[0][: image.size] for x in (z, after.z)]
    np.testing.assert_allclose(after.r, ends[1], atol=0.02)
    np.testing.assert_allclose(step @ after.jacobian, ends[1] - ends[0], atol=0.02)
    beside = np.linalg.svd(step[None])[2][1:]
    np.testing.assert_allclose(beside @ after.jacobian, beside @ state.jacobian, atol=0.02)
    assert np.abs(after.jacobian - state.jacobian).max() > 1
    second, _ = regeneration.update(model, image, after, config)
    matrix, r = np.asarray(after.jacobian, float).T, np.asarray(after.r, float)
    steps = [step_of(matrix, r, float(after.damping) * factor) for factor in config.factors]
    nearest = min(np.abs(after.z - step - second.z).max() for step in steps)
    assert nearest < 1e-3 < np.abs(second.z - after.z).max()


def test_a_jacobian_is_renewed_when_it_is_old_or_leads_nowhere():
    model = GENERATORS["dcgan"], None
    image = sampling.generate(model[0], jax.random.key(5), 1)[0].astype(np.float32)
    z = jnp.asarray([0.3, -0.2, 0.5, 0.1], jnp.float32)
    for config, due in [
        (RegenerationConfig(switch_levels=0.0, renew_gain=0.0), False),
        (RegenerationConfig(switch_levels=0.0, renew_gain=1.0), True),
        (RegenerationConfig(switch_levels=0.0, renew_gain=0.0, linearize_every=1), True),
        (RegenerationConfig(switch_levels=1e3, renew_gain=0.0), True),  # another residual
    ]:
        after, _ = update(model, image, regeneration.init(z, image, config), config)
        assert bool(after.due) == due and int(after.age) == 1
    # A borrowed Jacobian that leads nowhere: asked for anew, and nothing is held against the place.
    wrong = after._replace(jacobian=-after.jacobian, due=jnp.asarray(False))
    config = RegenerationConfig(switch_levels=0.0)
    lost, _ = regeneration.update(
        model, image, wrong._replace(in_targets=jnp.asarray(True)), config
    )
    assert bool(lost.due) and int(lost.stuck) == int(wrong.stuck)
    np.testing.assert_array_equal(lost.z, wrong.z)
    np.testing.assert_array_equal(lost.damping, wrong.damping)


def test_kept_jacobians_find_the_same_with_fewer_of_them(own):
    config = dataclasses.replace(CONFIG, num_starts=3)
    kept = regeneration.regenerate(OURS, own, RNG, config)
    always = regeneration.regenerate(OURS, own, RNG, dataclasses.replace(config, linearize_every=1))
    assert kept.proved.all() and always.proved.all()
    assert kept.iterations.sum() < 0.8 * always.iterations.sum()


def thermometer(steepness):
    """All pixels alike, and as dark as a level meter: tanh(steepness (z - 1/2))."""

    def apply(params, z):
        return jnp.tanh(params * (z[:, :, None, None] - 0.5)) * jnp.ones((1, 4, 4, 1), z.dtype)

    return LatentGenerator(jnp.float32(steepness), apply, 1)


def test_a_step_that_makes_it_worse_is_not_taken():
    """From black every step overshoots into white; wanted is nearly black."""
    config = RegenerationConfig(targets=False, factors=(30.0, 0.5))
    image = np.full((4, 4, 1), 20, np.float32)
    state = regeneration.init(jnp.zeros(1, jnp.float32), image, config)
    after, levels = update((thermometer(10), None), image, state, config)
    assert float(after.z[0]) == 0 and int(after.stuck) == 2 and not levels.any()  # 20 levels: far
    assert float(after.damping) == pytest.approx(30 * config.damping)


def test_targets_climb_where_levels_are_flat():
    """atanh of the image is 10 (z - 1/2): linear. In levels the first step, from black, ends in
    white, which is nearer to light grey but has no slope any more (a prior would lead back)."""
    images = np.full((1, 4, 4, 1), 200, np.uint8)
    config = RegenerationConfig(num_starts=1, prior=0.0)
    found = regeneration.regenerate(thermometer(10), images, RNG, config)
    assert found.proved.all() and found.iterations[0] < 10
    exact = 0.5 + np.arctanh(200 / 127.5 - 1) / 10
    # A level more or less is 1.5e-3 up here.
    assert found.latent[0, 0] == pytest.approx(exact, abs=2e-3)
    config = RegenerationConfig(num_starts=1, prior=0.0, targets=False)
    stuck = regeneration.regenerate(thermometer(10), images, RNG, config)
    assert not stuck.proved.any() and stuck.rmse[0] == 255 - 200 and (stuck.image == 255).all()


def test_a_search_goes_on_in_levels_when_it_is_near_or_stuck():
    generator, config = thermometer(10), RegenerationConfig(damping=0.5, patience=5)
    image = np.full((4, 4, 1), 200, np.float32)
    # One undamped step lands there.
    near = regeneration.init(jnp.zeros(1, jnp.float32), image, config)
    near = near._replace(damping=jnp.float32(1e-6))
    near, levels = update((generator, None), image, near, config)
    assert np.abs(levels - image).max() < config.switch_levels
    assert not near.in_targets and float(near.damping) == pytest.approx(1e-2)
    # A chessboard, symmetric about the start: nothing can be gained.
    image = np.where(np.indices((4, 4)).sum(axis=0) % 2, 155, 100)[:, :, None].astype(np.float32)
    state = regeneration.init(jnp.asarray([0.5], jnp.float32), image, config)
    stages = []
    for _ in range(6):
        state, _ = update((generator, None), image, state, config)
        stages.append((bool(state.in_targets), int(state.stuck)))
    # Half of the patience of five, rounded up, from the first step without a gain.
    assert stages[:3] == [(True, 1), (True, 2), (False, 0)] and not stages[-1][0]


@pytest.mark.parametrize(
    "far_levels, gain, counted", [(30.0, 2e-2, 1), (25.0, 2e-2, 2), (25.0, 5e-3, 2)]
)
def test_far_from_the_image_a_search_in_levels_has_half_the_patience(far_levels, gain, counted):
    """A chessboard of 55 levels' difference: the nearest grey is 27.5 levels away."""
    image = np.where(np.indices((4, 4)).sum(axis=0) % 2, 155, 100)[:, :, None].astype(np.float32)
    config = RegenerationConfig(targets=False, far_levels=far_levels, far_gain=gain)
    model = thermometer(1), None
    # At the nearest grey nothing is gained; a level beside it, a hundredth of the squares.
    for start, gained in (0.5, 0.0), (0.5 + 2.75 / 127.5, 0.01):
        state = regeneration.init(jnp.asarray([start], jnp.float32), image, config)
        state = state._replace(damping=jnp.float32(1e-6))
        after, _ = update(model, image, state, config)
        assert 1 - float(jnp.square(after.r).mean()) / (
            27.5**2 + (2.75 if gained else 0) ** 2
        ) == (pytest.approx(gained, abs=1e-3))
        # A hundredth is progress where it is near, or where so little is asked for far away.
        enough = gained > (gain if counted == 2 else config.min_gain)
        assert int(after.stuck) == (0 if enough else counted)


def test_what_a_processing_leaves_is_not_far(monkeypatch):
    """Noise leaves an own image as far away as others; its search is not hurried for that."""
    seen = []
    monkeypatch.setattr(regeneration, "_search", lambda *args: seen.append(args[3].far_levels))
    image = sampling.generate(OURS, RNG, 1)
    noise = processing.get("noise")
    regeneration.regenerate(OURS, image, RNG)
    regeneration.regenerate(OURS, image, RNG, processing=noise)
    assert seen == [RegenerationConfig.far_levels, noise.slack] and noise.slack > seen[0]


# --- the search ---------------------------------------------------------------------------------


def assert_consistent(generator, images, found, config):
    """All that is said of the images is true of those that the latents make, in NumPy."""
    levels = exact_levels(generator, found.latent)
    assert_rounded(found.image, levels)
    np.testing.assert_array_equal(found.processed, found.image)
    errors = np.abs(found.image.astype(float) - images).reshape(len(images), -1)
    np.testing.assert_allclose(found.rmse, np.sqrt((errors**2).mean(axis=1)), rtol=1e-6)
    np.testing.assert_array_equal(found.largest, errors.max(axis=1))
    inside = (images > 0) & (images < 255)
    np.testing.assert_array_equal(found.equations, inside.sum(axis=(1, 2, 3)))
    squares = np.where(inside, np.square(levels - images), 0).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(found.misfit, squares / inside.sum(axis=(1, 2, 3)), rtol=1e-3)
    near = (found.rmse <= config.rmse_levels) & (found.largest <= config.max_levels)
    np.testing.assert_array_equal(found.proved, near)
    assert found.unknowns.shape == (len(images), 0) and set(found.replayed) == {""}
    assert (found.starts >= 1).all() and (found.starts <= config.num_starts).all()
    assert (found.iterations >= found.starts).all()
    assert (found.iterations <= config.num_starts * config.max_iters).all()


def test_own_images_are_regenerated_to_the_last_level(own, found):
    assert found.proved.all() and found.largest.max() <= 1 and found.rmse.max() <= 0.5
    assert_consistent(OURS, own, found, CONFIG)
    # Three times the twelfth that rounding makes would be far off already.
    assert found.misfit.max() < 0.25
    np.testing.assert_array_equal(regeneration.make_images(OURS, found.latent), found.image)


def test_images_of_another_seed_are_not(found):
    images = sampling.generate(THEIRS, jax.random.key(5), 6)
    foreign = regeneration.regenerate(OURS, images, RNG, CONFIG)
    assert not foreign.proved.any() and foreign.rmse.min() > 10 * found.rmse.max()
    assert (foreign.starts == CONFIG.num_starts).all()
    assert_consistent(OURS, images, foreign, CONFIG)


def test_neighbours_and_order_do_not_matter(own):
    """From one start: what an image comes to depends on nothing else."""
    config = dataclasses.replace(CONFIG, num_starts=1)
    images = np.concatenate([own[:8], sampling.generate(THEIRS, jax.random.key(5), 2)])
    together = regeneration.regenerate(OURS, images, RNG, config)
    assert together.proved.any() and not together.proved.all()
    order = np.array([9, 3, 0, 7, 1, 8, 2, 6, 5, 4])
    turned = regeneration.regenerate(OURS, images[order], RNG, config)
    part = regeneration.regenerate(OURS, images[:6], RNG, config)
    for name in ("latent", "rmse", "iterations", "proved", "image"):
        whole = getattr(together, name)
        np.testing.assert_allclose(getattr(turned, name), whole[order], atol=1e-6, err_msg=name)
        np.testing.assert_allclose(getattr(part, name), whole[:6], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("places", [1, 100])
def test_the_number_of_places_does_not_matter(own, found, places):
    config = dataclasses.replace(CONFIG, places=places)
    again = regeneration.regenerate(OURS, own, RNG, config)
    np.testing.assert_array_equal(again.proved, found.proved)
    assert np.abs(again.image.astype(int) - found.image).max() <= 2
    np.testing.assert_allclose(again.latent, found.latent, atol=0.1)
    if places == 100:  # all starts side by side, until one of them succeeds
        assert (again.starts == 6).all()
        assert (again.iterations >= 6).all() and (again.iterations < 6 * 10).all()


def test_the_order_of_the_images_does_not_matter_where_they_are_named():
    images = sampling.generate(THEIRS, jax.random.key(5), 5)  # not found: all starts are made
    names = [7, 2**32 - 1, 0, 12, 3]
    config = dataclasses.replace(CONFIG, places=1)
    found = regeneration.regenerate(OURS, images, RNG, config, names=names)
    again = regeneration.regenerate(OURS, images[::-1], RNG, config, names=names[::-1])
    for name in ("latent", "rmse", "iterations"):
        np.testing.assert_array_equal(getattr(again, name)[::-1], getattr(found, name))
    unnamed = regeneration.regenerate(OURS, images[::-1], RNG, config)
    assert (unnamed.iterations[::-1] != found.iterations).any()
    with pytest.raises(ValueError, match="4 names for 5 images"):
        regeneration.regenerate(OURS, images, RNG, config, names=names[:4])


def test_no_product_is_a_short_one():
    """What an accelerator would round to ten bits by default moves pixels by levels."""
    model = (OURS, None)
    image = jnp.zeros((8, 8, 1), jnp.float32)
    state = regeneration.init(jnp.ones(4, jnp.float32), image, CONFIG)

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                yield equation.params["precision"]
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from products(inner)

    for step in (regeneration.linearize, regeneration.update):
        traced = jax.make_jaxpr(lambda s, step=step: step(model, image, s, CONFIG))(state)
        found = list(products(traced.jaxpr))
        assert len(found) > 2
        assert all(p is not None and set(p) == {jax.lax.Precision.HIGHEST} for p in found)


def test_progress_ends_with_all_images(own):
    seen = []
    config = dataclasses.replace(CONFIG, num_starts=1)
    images = np.concatenate([own[:8], sampling.generate(THEIRS, jax.random.key(5), 2)])
    regeneration.regenerate(OURS, images, RNG, config, progress=lambda *pair: seen.append(pair))
    counts, totals = zip(*seen)
    assert set(totals) == {10} and counts[-1] == 10 and sorted(counts) == list(counts)


def test_images_with_black_and_white_have_fewer_equations():
    """Stronger still, so that tanh saturates: those pixels are inequalities."""
    last = OURS.variables["params"]["last"]["kernel"]
    params = {**OURS.variables["params"], "last": {"kernel": 10 * last}}
    model = dataclasses.replace(OURS, variables={**OURS.variables, "params": params})
    images = sampling.generate(model, jax.random.key(5), 6)
    cut = ((images == 0) | (images == 255)).sum(axis=(1, 2, 3))
    assert cut.min() > 3
    found = regeneration.regenerate(model, images, RNG, CONFIG)
    assert_consistent(model, images, found, CONFIG)
    assert found.proved.all() and (found.equations == 64 - cut).all()


# --- any generator ------------------------------------------------------------------------------

MATRIX = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)) / 5, jnp.float32)


def picture(matrix, z):
    return jnp.tanh(z @ matrix).reshape(-1, 8, 8, 1)


@jax.custom_vjp
def reverse_only(matrix, z):
    return picture(matrix, z)


def _backward(saved, cotangent):
    matrix, made = saved
    slope = (1 - jnp.square(made)).reshape(len(made), -1)
    return jnp.zeros_like(matrix), (cotangent.reshape(slope.shape) * slope) @ matrix.T


reverse_only.defvjp(lambda matrix, z: (picture(matrix, z), (matrix, picture(matrix, z))), _backward)


def made_by(apply, count, seed=1):
    """Latents, images and the generator of a function of `MATRIX`."""
    z = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    generator = LatentGenerator(MATRIX, apply, 4)
    return z, regeneration.make_images(generator, z), generator


def test_any_function_will_do():
    z, images, generator = made_by(picture, 3)
    levels = (np.tanh(z.astype(float) @ np.asarray(MATRIX, float)) + 1) * 127.5
    assert_rounded(images, levels.reshape(images.shape))
    config = dataclasses.replace(CONFIG, num_starts=1)
    found = regeneration.regenerate(generator, images, RNG, config)
    assert found.proved.all() and found.iterations.max() <= 6  # in targets it is linear
    np.testing.assert_allclose(found.latent, z, atol=0.05)
    none = regeneration.regenerate(generator, images[:0], RNG, CONFIG)
    assert all(len(field) == 0 for field in none)
    assert regeneration.make_images(generator, z[:0]).shape == (0, 8, 8, 1)


def test_the_prior_is_part_of_what_is_lowered():
    """In targets it is ridge regression: a step leaves the latent that fits for a smaller one."""
    z, images, generator = made_by(picture, 1)
    config = RegenerationConfig(damping=1e-6, factors=(1.0, 1e6), prior=1e5)
    image = images[0].astype(np.float32)
    state = regeneration.init(jnp.asarray(z[0]), image, config)
    after, _ = update((generator, None), image, state, config)
    matrix = 127.5 * np.asarray(MATRIX, float).T
    targets = 127.5 * np.arctanh(images[0].ravel() / 127.5 - 1)
    ridge = np.linalg.solve(matrix.T @ matrix + 1e5 * np.eye(4), matrix.T @ targets)
    assert np.linalg.norm(ridge) < 0.8 * np.linalg.norm(z)
    np.testing.assert_allclose(after.z, ridge, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("in_targets", [False, True], ids=["levels", "targets"])
def test_a_generator_that_knows_reverse_mode_only_has_the_same_jacobian(in_targets):
    _, images, generator = made_by(picture, 1)
    with pytest.raises(TypeError, match="custom_vjp"):  # it really is one
        jax.jvp(lambda z: reverse_only(MATRIX, z), (jnp.zeros((1, 4)),), (jnp.ones((1, 4)),))
    config = RegenerationConfig(targets=in_targets)
    image = images[0].astype(np.float32)
    state = regeneration.init(jnp.asarray([0.3, -0.2, 0.5, 0.1], jnp.float32), image, config)
    backward = dataclasses.replace(generator, apply=reverse_only)
    (ours, made), (theirs, same) = (
        update((model, None), image, state, config) for model in (backward, generator)
    )
    np.testing.assert_allclose(ours.z, theirs.z, rtol=1e-4)
    np.testing.assert_allclose(ours.damping, theirs.damping)
    assert np.abs(made - same).max() <= 1


def test_reverse_mode_only_regenerates_as_well():
    z, images, generator = made_by(reverse_only, 3)
    found = regeneration.regenerate(generator, images, RNG, CONFIG)
    assert found.proved.all()
    np.testing.assert_allclose(found.latent, z, atol=0.05)


@pytest.mark.slow
def test_an_lsgan_is_regenerated_too():
    images = sampling.generate(LSGAN, jax.random.key(5), 4)
    found = regeneration.regenerate(LSGAN, images, RNG, CONFIG)
    assert found.proved.all()
    assert_consistent(LSGAN, images, found, CONFIG)


def on_the_sphere(matrix, z):
    """No direction at zero: NaN."""
    return picture(matrix, 2 * z / jnp.linalg.norm(z, axis=1, keepdims=True))


def of_relus(matrix, z):
    """No slope at zero."""
    return picture(matrix, jax.nn.relu(z) - 0.5 * jax.nn.relu(-z))


@pytest.mark.parametrize("apply", [on_the_sphere, of_relus])
def test_a_start_that_leads_nowhere_is_left(apply):
    _, images, generator = made_by(apply, 3)
    found = regeneration.regenerate(generator, images, RNG, CONFIG)
    assert found.proved.all() and (found.starts > 1).all()
    np.testing.assert_array_equal(regeneration.make_images(generator, found.latent), found.image)
    config = dataclasses.replace(CONFIG, num_starts=1)
    # Black, as NaN is when it is turned into whole numbers.
    found = regeneration.regenerate(generator, 0 * images, RNG, config)
    assert not found.proved.any() and found.rmse.min() > 100


# --- the bank -----------------------------------------------------------------------------------


def test_a_bank_holds_the_images_of_its_latents():
    bank = regeneration.make_bank(OURS, jax.random.key(6), 300)
    assert_rounded(bank.images, exact_levels(OURS, bank.latents))
    assert bank.latents.dtype == np.float32 and len(np.unique(bank.latents, axis=0)) == 300
    # The stream that the generator's images are drawn from.
    images = sampling.generate(OURS, jax.random.key(6), 300)
    assert (images != bank.images).mean() < 1e-3
    few = regeneration.make_bank(LatentGenerator(MATRIX, picture, 4), jax.random.key(6), 2)
    np.testing.assert_array_equal(few.latents, bank.latents[:2])


def test_an_image_of_the_bank_is_found_at_once(own):
    # In the middle, so that the nearest has to be looked for.
    latents = sampling.latents(jax.random.key(5), jnp.arange(12), 4)
    others = regeneration.make_bank(OURS, jax.random.key(6), 30)
    bank = Bank(
        np.concatenate([others.latents, latents, others.latents]),
        np.concatenate([others.images, own, others.images]),
    )
    config = dataclasses.replace(CONFIG, num_starts=1)
    quick = regeneration.regenerate(OURS, own, RNG, config, bank=bank)
    assert quick.proved.all() and (quick.iterations == 1).all()
    np.testing.assert_allclose(quick.latent, latents, atol=0.1)
    config = dataclasses.replace(config, linearize_every=1)
    zero = regeneration.regenerate(OURS, own, RNG, config)
    assert zero.iterations.min() > 1


def test_half_of_the_starts_are_the_nearest_of_the_bank_in_turn(monkeypatch):
    """Brute force over the distances of targets; then zero, then random ones."""
    bank = regeneration.make_bank(OURS, jax.random.key(6), 40)
    images = sampling.generate(THEIRS, jax.random.key(5), 2)
    entered = {}
    search = regeneration._search

    def spy(model, images, start_at, *rest):
        entered.update({(i, s): start_at(i, s) for i, s in itertools.product(range(2), range(6))})
        return search(model, images, start_at, *rest)

    monkeypatch.setattr(regeneration, "_search", spy)
    regeneration.regenerate(OURS, images, RNG, CONFIG, bank=bank)
    for index, image in enumerate(images):
        o, known = (
            np.arctanh(np.clip(x.astype(float) / 127.5 - 1, -0.99, 0.99))
            for x in (image, bank.images)
        )
        order = np.argsort(np.square(known - o).sum(axis=(1, 2, 3)))
        for place in range(3):
            np.testing.assert_array_equal(entered[index, 2 * place], bank.latents[order[place]])
        assert not entered[index, 1].any()
        for number in (3, 5):
            own_rng = jax.random.fold_in(jax.random.fold_in(RNG, index), number)
            drawn = CONFIG.start_scale * jax.random.normal(own_rng, (4,), jnp.float32)
            np.testing.assert_allclose(entered[index, number], drawn, rtol=1e-6)


# --- mistakes -----------------------------------------------------------------------------------


def test_images_and_banks_that_do_not_fit_are_named(own):
    with pytest.raises(ValueError, match="uint8, as files hold them, got float32"):
        regeneration.regenerate(OURS, own.astype(np.float32) / 255, RNG)
    with pytest.raises(ValueError, match=r"\[n, 8, 8, 1\], got shape \(1, 16, 16, 1\)"):
        regeneration.regenerate(OURS, np.zeros((1, 16, 16, 1), np.uint8), RNG)
    for latents, images in (
        (np.zeros((2, 4)), np.zeros((2, 16, 16, 1), np.uint8)),
        (np.zeros((2, 5)), np.zeros((2, 8, 8, 1), np.uint8)),
        (np.zeros((0, 4)), np.zeros((0, 8, 8, 1), np.uint8)),
        (np.zeros((3, 4)), np.zeros((2, 8, 8, 1), np.uint8)),
    ):
        with pytest.raises(ValueError, match="the bank has latents"):
            regeneration.regenerate(OURS, own, RNG, bank=Bank(latents, images))
    with pytest.raises(ValueError, match="num_images=0"):
        regeneration.make_bank(OURS, RNG, 0)


class Counter:
    """A generator that makes something else each time, as one that draws noise inside does."""

    def __init__(self):
        self.count = 0

    def __call__(self, matrix, z):
        def host():
            self.count += 1
            return np.float32(0.1 * self.count)

        moved = jax.pure_callback(host, jax.ShapeDtypeStruct((), jnp.float32))
        return picture(matrix, z + jax.lax.stop_gradient(moved))


BAD = {
    "rounded": (
        lambda m, z: jnp.round(picture(m, z)),
        "not differentiable.*derivative is zero at all",
    ),
    "on the host": (
        lambda m, z: jax.pure_callback(
            lambda z: np.tanh(z @ np.asarray(m)).reshape(-1, 8, 8, 1),
            jax.ShapeDtypeStruct((len(z), 8, 8, 1), jnp.float32),
            z,
        ),
        "not differentiable in its latent: .*callback",
    ),
    "not deterministic": (Counter(), "not deterministic: two images of one latent differ"),
    "flat": (lambda m, z: z, "expected one image"),
    "several": (lambda m, z: picture(m, jnp.tile(z, (2, 1))), "expected one image"),
    "whole numbers": (
        lambda m, z: (255 * picture(m, z)).astype(jnp.uint8),
        "makes uint8 images, expected floating",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_generators_that_cannot_be_searched_are_named(own, name):
    apply, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        regeneration.regenerate(LatentGenerator(MATRIX, apply, 4), own, RNG)


def test_weights_that_are_not_finite_are_named(own):
    bad = LatentGenerator(MATRIX.at[0, 0].set(np.nan), picture, 4)
    with pytest.raises(ValueError, match="not finite"):
        regeneration.regenerate(bad, own, RNG)
    # The image is finite at many latents, its slope is not.
    sharp = LatentGenerator(MATRIX, lambda m, z: picture(m, jnp.sqrt(jnp.square(z) * 0)), 4)
    with pytest.raises(ValueError, match="or its derivatives are"):
        regeneration.regenerate(sharp, own, RNG)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_starts": 0},
        {"max_iters": 0},
        {"linearize_every": 0},
        {"renew_gain": 1.5},
        {"patience": 0},
        {"places": -1},
        {"damping": -1.0},
        {"damping": np.nan},
        {"start_scale": 0.0},
        {"factors": ()},
        {"factors": (1.0, np.inf)},
        {"min_gain": 1 / 3},
        {"min_gain": np.nan},
        {"slack": 0.0},
        {"slack": 127.0},
        {"prior": -1.0},
        {"prior": np.inf},
        {"max_levels": -1.0},
        {"rmse_levels": np.nan},
        {"switch_levels": -0.1},
        {"far_levels": -0.1},
        {"far_gain": -1e-3},
        {"far_gain": 1.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=f"RegenerationConfig.*{next(iter(bad))}"):
        RegenerationConfig(**bad)
