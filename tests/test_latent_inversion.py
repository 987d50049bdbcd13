"""SM-Inv: least squares in closed form, PyTorch's Adam, independence of batches, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flipad_jax import perceptual
from flipad_jax.detection import latent_inversion
from flipad_jax.detection.latent_inversion import (
    LatentGenerator,
    LatentInversionConfig,
    score,
    search,
    starts,
)
from flipad_jax.generators import sampling, zoo
from flipad_jax.inception import Inception, InceptionV3

RNG = jax.random.key(3)
SHAPE, LATENT_DIM = (4, 3, 2), 5
_DRAW = np.random.default_rng(0)
MATRIX = (0.1 * _DRAW.standard_normal((LATENT_DIM, *SHAPE))).astype(np.float32)
OFFSET = (0.1 * _DRAW.standard_normal(SHAPE)).astype(np.float32)
IMAGES = np.clip(0.3 * _DRAW.standard_normal((5, *SHAPE)), -1, 1).astype(np.float32)


def affine(params, z):
    return jnp.einsum("nd,dhwc->nhwc", z, params["matrix"]) + params["offset"][None]


def curved(params, z):
    """Not convex in z: starts end in different places."""
    return jnp.sin(4 * affine(params, z))


PARAMS = {"matrix": MATRIX, "offset": OFFSET}
AFFINE = LatentGenerator(PARAMS, affine, LATENT_DIM)
CURVED = LatentGenerator(PARAMS, curved, LATENT_DIM)


def test_an_affine_generator_gives_least_squares():
    config = LatentInversionConfig(num_steps=300, num_restarts=3)
    found = search(AFFINE, IMAGES, RNG, config)
    matrix = MATRIX.reshape(LATENT_DIM, -1).T.astype(np.float64)
    for i, image in enumerate(IMAGES):
        right = (image - OFFSET).ravel().astype(np.float64)
        solution, residual, *_ = np.linalg.lstsq(matrix, right)
        np.testing.assert_allclose(found.latent[i], solution, rtol=0, atol=2e-3)
        # The problem is convex: every start ends there.
        np.testing.assert_allclose(found.distances[i], residual[0] / right.size, rtol=1e-5)
        np.testing.assert_allclose(score(found)[i], np.sqrt(residual[0]) / right.size, rtol=1e-5)
    own = np.asarray(affine(PARAMS, jax.random.normal(RNG, (2, LATENT_DIM), jnp.float32)))
    own = np.clip(own, -1, 1)
    assert score(search(AFFINE, own, RNG, config)).max() < 1e-4 * score(found).min()


def test_the_best_start_counts():
    config = LatentInversionConfig(num_steps=60, num_restarts=6)
    found = search(CURVED, IMAGES, RNG, config)
    assert found.distances.shape == (5, 6) and len(set(found.restart)) > 1
    np.testing.assert_array_equal(found.restart, found.distances.argmin(axis=1))
    np.testing.assert_array_equal(found.distance, found.distances.min(axis=1))
    made = np.asarray(curved(PARAMS, found.latent))
    np.testing.assert_allclose(((made - IMAGES) ** 2).mean(axis=(1, 2, 3)), found.distance, 1e-5)
    # One start per image is the first of several.
    alone = search(CURVED, IMAGES, RNG, LatentInversionConfig(num_steps=60, num_restarts=1))
    np.testing.assert_allclose(alone.distance, found.distances[:, 0], rtol=1e-4)
    assert (alone.distance > found.distance * 1.01).any()


def test_neither_batch_nor_neighbours_matter():
    config = LatentInversionConfig(num_steps=20, num_restarts=3)
    together = search(CURVED, IMAGES, RNG, config)
    # 15 pairs: four batches, which part the starts of an image, and the last one is filled up.
    config = LatentInversionConfig(num_steps=20, num_restarts=3, batch_size=4)
    parted = search(CURVED, IMAGES, RNG, config)
    np.testing.assert_allclose(parted.distances, together.distances, rtol=1e-4)
    np.testing.assert_allclose(parted.latent, together.latent, rtol=0, atol=1e-4)
    part = search(CURVED, IMAGES[3:], RNG, config, first=3)
    np.testing.assert_allclose(part.distances, together.distances[3:], rtol=1e-4)
    moved = search(CURVED, IMAGES[3:], RNG, config)
    assert np.abs(moved.distances / together.distances[3:] - 1).max() > 0.01


def test_starts_are_normal_and_all_different():
    images, restarts = (grid.ravel() for grid in np.meshgrid(np.arange(40), np.arange(25)))
    z = np.asarray(starts(RNG, images, restarts, 8))
    assert z.dtype == np.float32 and len(np.unique(z, axis=0)) == 1000
    assert abs(z.mean()) < 4 / np.sqrt(z.size) and abs(z.std() - 1) < 4 / np.sqrt(2 * z.size)
    few = starts(RNG, images[7:9], restarts[7:9], 8)
    np.testing.assert_array_equal(few, z[7:9])


def test_the_steps_are_adams():
    """Kingma and Ba, algorithm 1, in float64; the gradient of the mean square by hand."""
    rate, image = 0.03, IMAGES[:1]
    z = np.asarray(starts(RNG, np.array([0]), np.array([0]), LATENT_DIM)[0], np.float64)
    matrix = MATRIX.reshape(LATENT_DIM, -1).T.astype(np.float64)
    mean = square = 0.0
    for t in range(1, 31):
        residual = matrix @ z + OFFSET.ravel() - image.ravel()
        gradient = 2 * matrix.T @ residual / residual.size
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        z = z - rate * (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
    config = LatentInversionConfig(num_steps=30, num_restarts=1, learning_rate=rate)
    found = search(AFFINE, image, RNG, config)
    np.testing.assert_allclose(found.latent[0], z, rtol=0, atol=1e-5)


def test_the_steps_are_those_of_pytorchs_adam():
    torch = pytest.importorskip("torch")
    z = np.random.default_rng(1).standard_normal((5, LATENT_DIM)).astype(np.float32)
    solver = latent_inversion.latent_inversion(CURVED, perceptual.distance("l2"))
    state, update = solver.init(jnp.asarray(z)), jax.jit(solver.update)
    unknowns = [torch.tensor(row, requires_grad=True) for row in z]
    optimizers = [torch.optim.Adam([row], lr=0.1) for row in unknowns]
    for step in range(10):
        state = update(state, jnp.asarray(IMAGES))
        for row, optimizer, image in zip(unknowns, optimizers, IMAGES, strict=True):
            optimizer.zero_grad()
            made = torch.einsum("d,dhwc->hwc", row, torch.tensor(MATRIX)) + torch.tensor(OFFSET)
            torch.nn.functional.mse_loss(torch.sin(4 * made), torch.tensor(image)).backward()
            optimizer.step()
        expected = np.stack([row.detach().numpy() for row in unknowns])
        np.testing.assert_allclose(state.z, expected, rtol=0, atol=1e-5, err_msg=f"{step=}")


@pytest.mark.slow
def test_the_distances_lower_what_they_are_called():
    """Through a real network and a real generator, own images come nearer than they started."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(
        InceptionV3().init, jax.random.key(0), np.zeros((1, 75, 75, 3), np.float32)
    )

    def drawn(leaf):
        if leaf.ndim == 1:
            return np.full(leaf.shape, 1, np.float32)
        scale = (2 / np.prod(leaf.shape[:3])) ** 0.5
        return (scale * draw.standard_normal(leaf.shape)).astype(np.float32)

    network = Inception(jax.tree.map(drawn, shapes), "torchvision")
    generator = zoo.load("digits_dcgan_0")
    own = sampling.generate(generator, RNG, 2)
    for name, network in (("inception", network), ("ms_ssim", None), ("l2", None)):
        first, last = (
            search(
                generator,
                own,
                RNG,
                LatentInversionConfig(num_steps=steps, num_restarts=2, distance=name),
                network=network,
            )
            for steps in (1, 40)
        )
        assert (last.distance < 0.5 * first.distance).all(), name
        if name != "l2":
            np.testing.assert_array_equal(score(last), last.distance)


def test_init_and_update_make_the_same_state():
    solver = latent_inversion.latent_inversion(AFFINE, perceptual.distance("l2"))
    z = jax.ShapeDtypeStruct((5, LATENT_DIM), jnp.float32)
    state = jax.eval_shape(solver.init, z)
    assert jax.eval_shape(solver.update, state, jnp.asarray(IMAGES)) == state
    assert jax.eval_shape(solver.distances, state, jnp.asarray(IMAGES)).shape == (5,)


def test_progress_and_no_images():
    seen = []
    config = LatentInversionConfig(num_steps=30, num_restarts=2, batch_size=5)
    search(AFFINE, IMAGES, RNG, config, progress=lambda *counts: seen.append(counts))
    assert seen == [(25, 60), (30, 60), (55, 60), (60, 60)]
    found = search(AFFINE, IMAGES[:0], RNG, config)
    assert found.latent.shape == (0, LATENT_DIM) and found.distances.shape == (0, 2)
    assert score(found).shape == (0,)


def test_eight_bit_images_are_what_they_stand_for():
    config = LatentInversionConfig(num_steps=3, num_restarts=1)
    levels = np.random.default_rng(2).integers(0, 256, (2, *SHAPE)).astype(np.uint8)
    found = search(AFFINE, levels, RNG, config)
    floating = search(AFFINE, levels / 127.5 - 1, RNG, config)
    np.testing.assert_allclose(found.distances, floating.distances, rtol=1e-5)


def test_a_start_that_diverges_does_not_count():
    """sqrt(z - edge): a step of 0.1 towards the dark takes one start to where it has no value."""

    def fragile(edge, z):
        return jnp.sqrt(z[:, :, None, None] - edge)

    image, restart = np.divmod(np.arange(4), 2)
    z = np.asarray(starts(RNG, image, restart, 1))[:, 0]
    lowest = z.argmin()
    black = np.full((2, 1, 1, 1), -1, np.float32)
    config = LatentInversionConfig(num_steps=1, num_restarts=2)
    found = search(LatentGenerator(z.min() - 0.05, fragile, 1), black, RNG, config)
    np.testing.assert_array_equal(np.isnan(found.distances.ravel()), np.arange(4) == lowest)
    assert found.restart[lowest // 2] == 1 - lowest % 2 and np.isfinite(found.distance).all()
    # No start of an image is left: no verdict.
    config = LatentInversionConfig(num_steps=100, num_restarts=2)
    found = search(LatentGenerator(z.min() - 0.05, fragile, 1), black, RNG, config)
    assert np.isnan(score(found)).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_restarts": 0}, "num_restarts=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"distance": "lpips"}, "'lpips' is unknown; there are l2, ms_ssim, inception"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LatentInversionConfig(**settings)


def test_bad_images_and_generators():
    with pytest.raises(ValueError, match=r"\[5, 4, 2, 2\], but the generator makes \[n, 4, 3, 2\]"):
        search(AFFINE, IMAGES[:, :, 1:], RNG)
    with pytest.raises(ValueError, match="finite"):
        search(AFFINE, IMAGES * np.nan, RNG)
    with pytest.raises(ValueError, match="needs network=inception.load"):
        search(AFFINE, IMAGES, RNG, LatentInversionConfig(distance="inception"))
    with pytest.raises(
        ValueError, match=r"\[2, 4, 3, 2\], expected \[n, h, w, c\] with h, w >= 11"
    ):
        search(AFFINE, IMAGES, RNG, LatentInversionConfig(distance="ms_ssim"))
    with pytest.raises(ValueError, match="first=-1"):
        search(AFFINE, IMAGES, RNG, first=-1)
    flat = LatentGenerator(PARAMS, lambda params, z: affine(params, z).reshape(len(z), -1), 5)
    with pytest.raises(ValueError, match=r"expected images \[2, h, w, c\]"):
        search(flat, IMAGES, RNG)
    levels = LatentGenerator(PARAMS, lambda params, z: affine(params, z).astype(jnp.uint8), 5)
    with pytest.raises(ValueError, match="makes uint8 images"):
        search(levels, IMAGES, RNG)
    broken = LatentGenerator(PARAMS | {"offset": OFFSET * np.nan}, affine, LATENT_DIM)
    with pytest.raises(ValueError, match="NaN or infinity of 50 of 50 latents"):
        search(broken, IMAGES, RNG)
