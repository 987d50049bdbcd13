"""Impostors: what is changed and what is not, and the refitted last layer against the truth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from flipad_jax.generators import impostors, sampling, zoo
from flipad_jax.inversion import linops


@pytest.fixture(scope="module")
def ours():
    return zoo.load("digits_dcgan_0")


def test_same_key_same_images_whatever_the_number(ours):
    rng, done = jax.random.key(0), []
    images = impostors.generate(ours, rng, 20, images_per_impostor=8, progress=done.append)
    assert images.shape == (20, *ours.image_shape) and images.dtype == np.uint8
    assert done == [8, 16, 20]
    np.testing.assert_array_equal(
        impostors.generate(ours, rng, 11, images_per_impostor=8), images[:11]
    )
    own = sampling.generate(ours, jax.random.key(1), 20)
    # Pictures, not noise: dark for the most part, with bright strokes, as own ones are.
    for made in (images, own):
        assert np.mean(made < 8) > 0.5 and np.mean(made.max(axis=(1, 2, 3)) > 128) > 0.5
    other = impostors.generate(ours, jax.random.key(2), 8, images_per_impostor=8)
    assert np.any(other != images[:8])


def test_one_or_two_hidden_kernels_change_and_nothing_else(ours):
    seen = set()
    before = traverse_util.flatten_dict(ours.variables["params"], sep="/")
    change = jax.jit(impostors._with_changed_layers)
    for seed in range(12):
        changed, noise, _ = change(ours.variables, jax.random.key(seed), jnp.float32(0.6))
        assert noise.shape == before["last/kernel"].shape
        after = traverse_util.flatten_dict(changed["params"], sep="/")
        moved = {name for name in before if np.any(np.asarray(before[name]) != after[name])}
        kernels = {name for name in moved if name.endswith("kernel")}
        assert 1 <= len(kernels) <= 2 and "last/kernel" not in moved
        norms = {name.rsplit("/", 1)[0] for name in moved - kernels}
        assert len(norms) <= 1
        for name in kernels:  # Jittering keeps the size of the weights.
            assert 0.9 < float(after[name].std()) / float(np.std(before[name])) < 1.1
        seen |= {(len(kernels), bool(norms))}
    assert seen == {(1, False), (1, True), (2, False), (2, True)}


def _as_called(generator):
    """Paths of the modules with a kernel or a scale, in the order in which a picture meets them."""
    called = []

    def note(next_fun, args, kwargs, context):
        if context.module.path and context.method_name == "__call__":
            called.append(context.module.path)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        sampling.activations(generator, jnp.zeros((1, generator.latent_dim)))
    return called


@pytest.mark.parametrize("name", ["digits_lsgan_0", "digits_dcgan_0"])
def test_hidden_layers_are_told_from_the_latent_to_the_image(name):
    """Later ones are changed more often: LSGAN's linear layer, which is its first, least of all."""
    generator = zoo.load(name)
    params = generator.variables["params"]
    order = _as_called(generator)
    for array in ("kernel", "scale"):
        found = [path[:-1] for path in impostors._hidden(params, array)]
        assert found == [path for path in order if (*path, array) in _paths(params)]
    many = {f"convolutions_{i}": {"kernel": np.zeros(1)} for i in range(12)}
    found = [path[0] for path in impostors._hidden(many, "kernel")]
    assert found == [f"convolutions_{i}" for i in range(12)]


def _paths(params):
    return traverse_util.flatten_dict(params).keys()


def test_refitting_finds_the_kernel_that_made_the_pictures():
    rng = np.random.default_rng(0)
    for strides, padding, shape in ((2, 1, (6, 6, 3)), (1, 1, (5, 7, 3)), ((2, 3), 0, (4, 4, 3))):
        op = linops.conv_transpose(
            rng.standard_normal((4, 4, 3, 2)).astype(np.float32),
            shape,
            strides=strides,
            padding=padding,
        )
        true = jnp.asarray(rng.standard_normal((4, 4, 3, 2)), jnp.float32)
        activations = jnp.asarray(rng.standard_normal((60, *shape)), jnp.float32)
        wanted = jax.vmap(dataclasses.replace(op, kernel=true).forward)(activations)
        found = impostors._refitted(op, activations, wanted, jnp.float32(1e-7))
        np.testing.assert_allclose(found, true, atol=1e-3)
        # A strong ridge shrinks it.
        shrunk = impostors._refitted(op, activations, wanted, jnp.float32(10.0))
        assert np.linalg.norm(shrunk) < 0.3 * np.linalg.norm(true)


def test_mistakes_are_refused(ours):
    with pytest.raises(ValueError, match="num_images=-1"):
        impostors.generate(ours, jax.random.key(0), -1)
    with pytest.raises(ValueError, match="images_per_impostor=1"):
        impostors.generate(ours, jax.random.key(0), 4, images_per_impostor=1)
    only_last = dataclasses.replace(
        ours, variables={"params": {"last": ours.variables["params"]["last"]}}
    )
    with pytest.raises(ValueError, match="no hidden layer"):
        impostors.generate(only_last, jax.random.key(0), 4)
