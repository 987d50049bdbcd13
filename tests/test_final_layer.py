"""Final layer: exact inverses, the shift by z_bar, the streamed mean, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import lasso_gap, small_layer

from flipad_jax.inversion import final_layer, linops
from flipad_jax.inversion.final_layer import FinalLayer

pytestmark = pytest.mark.usefixtures("strict_ranks")

BIAS = np.array([0.3, -0.2, 0.05])


def identity_layer(activation, bias=None, dtype=np.float32):
    """A layer whose operator is the identity on 2 x 2 RGB images."""
    op = linops.conv(np.eye(3, dtype=dtype)[None, None], (2, 2, 3))
    return FinalLayer(op, None if bias is None else jnp.asarray(bias), activation)


def every_grey_level():
    return np.resize(np.arange(256, dtype=np.uint8), (22, 2, 2, 3))


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("activation", final_layer.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_targets_invert_the_activation_on_every_grey_level(activation, bias, dtype):
    layer = identity_layer(activation, bias, dtype)
    images = every_grey_level()
    o = final_layer.targets(layer, images)
    assert o.dtype == dtype and o.shape == images.shape and np.isfinite(o).all()
    again = jax.vmap(lambda o: final_layer.forward(layer, o))(o)
    # All levels come back exactly but 0 and 255, which are clipped by 1e-4 (an 80th of a level).
    np.testing.assert_allclose((again + 1) * 127.5, images, rtol=0, atol=0.0129)
    inner = (images > 0) & (images < 255)
    error = np.abs((np.asarray(again) + 1) * 127.5 - images)[inner].max()
    assert error < (1e-3 if dtype == np.float32 else 1e-10)


def test_targets_against_the_formulas():
    x = every_grey_level().astype(np.float64) / 127.5 - 1
    clipped = np.clip(x, -0.9999, 0.9999)
    p = (clipped + 1) / 2
    formulas = {"tanh": np.arctanh(clipped), "sigmoid": np.log(p / (1 - p)), "identity": x}
    for activation, expected in formulas.items():
        layer = identity_layer(activation, BIAS, np.float64)
        o = final_layer.targets(layer, every_grey_level())
        np.testing.assert_allclose(o, expected - BIAS, rtol=0, atol=1e-10)
    assert abs(formulas["tanh"]).max() == pytest.approx(4.9517, abs=1e-4)


def test_float_images_and_uint8_images_are_the_same():
    layer, images = identity_layer("tanh"), every_grey_level()
    x = (images.astype(np.float64) / 127.5 - 1).astype(np.float32)
    np.testing.assert_allclose(
        final_layer.targets(layer, images), final_layer.targets(layer, jnp.asarray(x)), atol=2e-4
    )


@pytest.mark.parametrize("activation, factor", [("tanh", 1), ("sigmoid", 2)])
def test_float32_targets_keep_their_digits_at_the_clip(activation, factor):
    # Far below lam = 5e-4: an error of 1e-4 in the target makes a certificate of 1e-2 worthless.
    layer, images = identity_layer(activation), every_grey_level()
    exact = factor * np.arctanh(np.clip(images.astype(np.float64) / 127.5 - 1, -0.9999, 0.9999))
    np.testing.assert_allclose(final_layer.targets(layer, images), exact, rtol=2e-7, atol=1e-7)
    extremes = np.array([-1, 1, 1 + 5e-7, 0.99995], np.float32).reshape(-1, 1, 1, 1)
    o = final_layer.targets(layer, np.broadcast_to(extremes, (4, 2, 2, 3)))
    limit = factor * np.arctanh(0.9999) * np.array([-1, 1, 1, 1])
    np.testing.assert_allclose(o[:, 0, 0, 0], limit, rtol=2e-7)


def test_forward_makes_the_image():
    op, matrix = small_layer()
    z = np.random.default_rng(0).standard_normal(op.input_shape)
    before = (matrix @ z.ravel()).reshape(op.output_shape) + BIAS
    images = {"tanh": np.tanh(before), "sigmoid": 2 / (1 + np.exp(-before)) - 1, "identity": before}
    for activation, expected in images.items():
        layer = FinalLayer(op, jnp.asarray(BIAS), activation)
        np.testing.assert_allclose(final_layer.forward(layer, jnp.asarray(z)), expected, atol=1e-12)
    assert np.abs(images["identity"]).max() > 1  # no activation, no bound


@pytest.mark.parametrize("activation", final_layer.ACTIVATIONS)
def test_invert_solves_equation_5(activation):
    """The certificate is recomputed for ||A z - o||^2 + lambda ||z - z_bar||_1, lambda = 2 lam."""
    op, matrix = small_layer()
    layer = FinalLayer(op, jnp.asarray(BIAS), activation)
    rng = np.random.default_rng(0)
    z_bar = np.abs(rng.standard_normal(op.input_shape))
    images = rng.integers(0, 256, (3, *op.output_shape), dtype=np.uint8)
    z, info = final_layer.invert(layer, images, z_bar, lam=0.02, tol=1e-6)
    assert info.converged.all() and z.shape == (3, *op.input_shape)
    o = np.asarray(final_layer.targets(layer, images))
    np.testing.assert_array_less(0, np.abs(o).max())
    for solution, target in zip(np.asarray(z), o, strict=True):
        value = np.sum((matrix @ solution.ravel() - target.ravel()) ** 2)
        value += 2 * 0.02 * np.abs(solution - z_bar).sum()
        shifted = target.ravel() - matrix @ z_bar.ravel()
        gap = 2 * lasso_gap(matrix, solution - z_bar, shifted, 0.02)
        assert gap <= 1.001e-6 * value
        # Zeros of z - z_bar, but for what the solver's last correction leaves, are what the l1
        # norm is for.
        assert 0.02 < np.mean(np.abs(solution - z_bar) < 1e-4) < 0.98


def test_an_image_of_the_mean_activation_is_inverted_to_it():
    op, _ = small_layer(np.float32)
    layer = FinalLayer(op, jnp.asarray(BIAS, jnp.float32))
    z_bar = np.abs(0.2 * np.random.default_rng(0).standard_normal(op.input_shape))
    z_bar = z_bar.astype(np.float32)
    image = final_layer.forward(layer, jnp.asarray(z_bar))
    z, info = final_layer.invert(layer, image[None], z_bar, lam=5e-4)
    assert info.converged.all()
    np.testing.assert_allclose(z[0], z_bar, rtol=0, atol=1e-3)


def test_options_reach_the_solver():
    op, _ = small_layer(np.float32)
    images = np.full((3, *op.output_shape), 100, np.uint8)
    z_bar, done = np.zeros(op.input_shape, np.float32), []
    _, info = final_layer.invert(
        FinalLayer(op), images, z_bar, tol=0, max_iters=4, chunk_size=2, progress=done.append
    )
    assert info.num_iters.tolist() == [4, 4, 4] and done == [1, 2, 3]
    z, info = final_layer.invert(FinalLayer(op), images[:0], z_bar)
    assert z.shape == (0, *op.input_shape) and info.gap.shape == (0,)
    with pytest.raises(TypeError, match="tolerance"):
        final_layer.invert(FinalLayer(op), images, z_bar, tolerance=1)


def test_bad_images_are_named():
    layer = identity_layer("tanh")
    x = np.zeros((14, 2, 2, 3), np.float32)
    z_bar = np.zeros((2, 2, 3), np.float32)
    x[3, 0, 1, 2] = np.nan
    x[5, 0, 0, 0] = 1.01
    for call in (final_layer.targets, lambda *a: final_layer.invert(*a, z_bar)):
        with pytest.raises(
            ValueError, match=r"images \[3\] are NaN; values of images \[5\] are out"
        ):
            call(layer, x)
    x[:] = -np.inf
    with pytest.raises(
        ValueError, match=r"\[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\] and 4 more are outside"
    ):
        final_layer.targets(layer, jnp.asarray(x))
    for bad, message in [
        (np.zeros((2, 2, 3), np.float32), r"expected|add a batch axis"),
        (np.zeros((1, 2, 3, 3), np.float32), r"makes images of shape \('n', 2, 2, 3\)"),
        (np.zeros((1, 2, 2, 3)), "dtype float64, expected uint8 or float32"),
        (np.zeros((1, 2, 2, 3), np.int64), "dtype int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            final_layer.targets(layer, bad)
    final_layer.targets(layer, np.full((1, 2, 2, 3), 1 + 5e-7, np.float32))


def test_bad_layers_and_means_are_refused():
    with pytest.raises(ValueError, match="activation='relu'"):
        identity_layer("relu")
    image = np.zeros((1, 2, 2, 3), np.uint8)
    for bias in (np.zeros(4), np.zeros((1, 3))):
        with pytest.raises(ValueError, match="bias has shape"):
            final_layer.targets(identity_layer("tanh", bias), image)
    layer = identity_layer("tanh")
    for z_bar in (np.zeros((2, 3, 3)), np.zeros((2, 2, 3), int)):
        with pytest.raises(ValueError, match="z_bar has shape"):
            final_layer.invert(layer, image, z_bar)
    with pytest.raises(ValueError, match="z_bar holds NaN"):
        final_layer.invert(layer, image, np.full((2, 2, 3), np.nan))


def activation_fn(latents):
    """Not linear, so that the mean of the activations is not the activation of the mean."""
    return jnp.stack([jax.nn.relu(latents), jnp.square(latents)], axis=-1)


def test_mean_activation_is_the_mean_of_the_same_draws():
    rng = jax.random.key(3)
    latents = [jax.random.normal(jax.random.fold_in(rng, i), (4,)) for i in range(50)]
    expected = np.mean(activation_fn(np.float32(latents)).astype(np.float64), axis=0)
    for batch_size in (1, 7, 50, 64):
        mean = final_layer.mean_activation(
            activation_fn, rng, latent_shape=4, num_samples=50, batch_size=batch_size
        )
        assert mean.shape == (4, 2) and mean.dtype == jnp.float32
        np.testing.assert_allclose(mean, expected, rtol=2e-6, atol=1e-7)


def test_mean_activation_converges_to_the_expectation():
    mean = final_layer.mean_activation(
        activation_fn, jax.random.key(0), latent_shape=(64,), num_samples=4000, batch_size=512
    )
    # relu of a normal: 1 / sqrt(2 pi); its square: 1. Standard errors 0.0012 and 0.0028.
    np.testing.assert_allclose(mean.mean(axis=0), [1 / np.sqrt(2 * np.pi), 1], rtol=0, atol=0.014)


def test_mean_activation_does_not_lose_small_terms_in_a_long_sum():
    # A running sum in float32 would be off by 1e-5 after 3000 terms of 0.3.
    mean = final_layer.mean_activation(
        lambda latents: jnp.full_like(latents, 0.1),
        jax.random.key(0),
        latent_shape=1,
        num_samples=9000,
        batch_size=3,
    )
    np.testing.assert_allclose(mean, 0.1, rtol=3e-7)


def test_mean_activation_of_other_latents_and_mistakes():
    options = {"latent_shape": 3, "num_samples": 10}
    mean = final_layer.mean_activation(
        lambda latents: latents,
        jax.random.key(0),
        sample_latents=lambda rng, shape: jax.random.uniform(rng, shape, minval=5.0, maxval=6.0),
        **options,
    )
    assert ((mean > 5) & (mean < 6)).all()
    with pytest.raises(ValueError, match="3 of 3 entries"):
        final_layer.mean_activation(jnp.log, jax.random.key(0), **options)
    with pytest.raises(ValueError, match="batch_size=0"):
        final_layer.mean_activation(jnp.log, jax.random.key(0), batch_size=0, **options)
