"""LSGAN and EBGAN: architectures, losses, training, files."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from flipad_jax import conventions
from flipad_jax.generators import dcgan, ebgan, layers, lsgan, sampling, training, zoo
from flipad_jax.inversion import final_layer

FAMILIES = {"lsgan": lsgan.lsgan, "ebgan": ebgan.ebgan}
WIDTHS = {
    "lsgan": {"features": (5, 4, 6, 3), "discriminator_features": (4, 6, 5)},
    "ebgan": {"features": (7, 6), "discriminator_features": (4, 5, 6)},
}


def noise(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def tiny(name, **options):
    return FAMILIES[name]((16, 16, 2), latent_dim=5, **WIDTHS[name], **options)


def random_like(shapes, scale=0.3):
    """Weights between 0.05 and 1 of both signs, variances positive; nothing is compiled for it."""
    rng = np.random.default_rng(7)

    def draw(path, leaf):
        value = rng.uniform(0.05, 1.0, leaf.shape)
        positive = path[-1].key in ("var", "scale")
        return np.float32(value if positive else scale * value * rng.choice([-1, 1], leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_generator(gan):
    latents = np.zeros((1, gan.latent_dim), np.float32)
    return random_like(jax.eval_shape(gan.generator.init, jax.random.key(0), latents))


def random_discriminator(gan):
    images = np.zeros((1, *gan.image_shape), np.float32)
    return random_like(jax.eval_shape(gan.discriminator.init, jax.random.key(0), images)["params"])


def quick(function):
    """Compiled without optimisation: these programs run once."""
    return layers.jit_for_one_run(function)


# --- architectures --------------------------------------------------------------------------------


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", FAMILIES)
def test_paper_architecture_and_its_parameter_count(name):
    gan = FAMILIES[name]((64, 64, 3))
    shapes = jax.eval_shape(gan.generator.init, jax.random.key(0), np.zeros((1, 100), np.float32))
    critic = jax.eval_shape(gan.discriminator.init, jax.random.key(0), np.zeros((1, 64, 64, 3)))
    if name == "lsgan":
        convolutions = 9 * (128 * 128 + 128 * 128 + 128 * 64 + 64 * 3) + 3
        generator = 101 * 128 * 8 * 8 + convolutions + 2 * (128 + 128 + 64)
        kernels = 9 * (3 * 16 + 16 * 32 + 32 * 64 + 64 * 128 + 128 * 128)
        norms = 2 * (32 + 64 + 128 + 128)
        discriminator = kernels + (16 + 32 + 64 + 128 + 128) + norms + 512 + 1
    else:
        kernels = 100 * 512 + 512 * 256 + 256 * 128 + 128 * 64 + 64 * 3
        generator = 16 * kernels + 2 * (512 + 256 + 128 + 64)
        discriminator = 2 * (16 * (3 * 64 + 64 * 128 + 128 * 256) + 2 * (64 + 128))
    assert count(shapes["params"]) == generator
    assert count(critic["params"]) == discriminator


def to_torch(images):
    torch = pytest.importorskip("torch")
    return torch.tensor(np.asarray(images).transpose(0, 3, 1, 2))


class Torch:
    """PyTorch modules that hold our weights."""

    def __init__(self):
        self.torch = pytest.importorskip("torch")

    def fill(self, module, weight, bias=None):
        assert tuple(module.weight.shape) == weight.shape
        module.weight.data = self.torch.tensor(np.ascontiguousarray(weight))
        if bias is not None:
            module.bias.data = self.torch.tensor(bias)
        return module

    def conv(self, params, stride, padding):
        kernel, bias = params["kernel"].transpose(3, 2, 0, 1), params.get("bias")
        options = {"stride": stride, "padding": padding, "bias": bias is not None}
        module = self.torch.nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], **options)
        return self.fill(module, kernel, bias)

    def conv_transpose(self, params, stride=2, padding=1):
        kernel = params["kernel"].transpose(2, 3, 0, 1)
        options = {"stride": stride, "padding": padding, "bias": False}
        module = self.torch.nn.ConvTranspose2d(*kernel.shape[:3], **options)
        return self.fill(module, kernel)

    def linear(self, params, shape, axis):
        """Rows (axis 1) or columns (axis 0) of the kernel run over maps `shape` = (h, w, c)."""
        kernel = params["kernel"]
        order = np.arange(np.prod(shape)).reshape(shape).transpose(2, 0, 1).ravel()
        bias = params["bias"][order] if axis == 1 else params["bias"]
        module = self.torch.nn.Linear(*kernel.shape)
        return self.fill(module, kernel.take(order, axis=axis).T, bias)

    def norm(self, params, stats=None, eps=1e-5):
        params = params["BatchNorm_0"]
        module = self.torch.nn.BatchNorm2d(len(params["scale"]), eps)
        if stats is None:  # normalises with the statistics of the batch
            module.train()
        else:
            module.running_mean = self.torch.tensor(stats["BatchNorm_0"]["mean"])
            module.running_var = self.torch.tensor(stats["BatchNorm_0"]["var"])
            module.eval()
        return self.fill(module, params["scale"], params["bias"])

    def run(self, modules, x):
        with self.torch.no_grad():
            return self.torch.nn.Sequential(*modules)(x).numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_generator_against_pytorch(name):
    peer = Torch()
    layer = peer.torch.nn
    gan = tiny(name)
    variables = random_generator(gan)
    params, stats = variables["params"], variables["batch_stats"]
    latents = noise(1, 4, 5)
    if name == "lsgan":
        modules = [peer.linear(params["linear"], (2, 2, 5), 1), layer.Unflatten(1, (5, 2, 2))]
        for i in range(3):
            modules += [
                layer.Upsample(scale_factor=2),
                peer.conv(params[f"convolutions_{i}"], 1, 1),
            ]
            modules += [peer.norm(params[f"norms_{i}"], stats[f"norms_{i}"]), layer.ReLU()]
        modules.append(peer.conv(params["last"], 1, 1))
    else:
        modules = [layer.Unflatten(1, (5, 1, 1))]
        for i in range(2):
            modules.append(
                peer.conv_transpose(params[f"convolutions_{i}"], 1 + (i > 0), int(i > 0))
            )
            modules += [peer.norm(params[f"norms_{i}"], stats[f"norms_{i}"]), layer.ReLU()]
        modules.append(peer.conv_transpose(params["last"]))
    before = peer.run(modules, peer.torch.tensor(latents)).transpose(0, 2, 3, 1)
    found = quick(gan.generator.apply)(variables, latents)
    assert before.std() > 0.05
    np.testing.assert_allclose(found, np.tanh(before), atol=2e-5)


@pytest.mark.parametrize("epsilon", [1e-5, 0.8])
def test_lsgan_discriminator_against_pytorch(epsilon):
    peer = Torch()
    layer = peer.torch.nn
    gan = tiny("lsgan")
    params = random_discriminator(gan)
    modules = [peer.conv(params["Conv_0"], 2, 1), layer.LeakyReLU(0.2)]
    for i in (1, 2):
        norm = peer.norm(params[f"BatchNorm_{i - 1}"], eps=epsilon)
        modules += [peer.conv(params[f"Conv_{i}"], 2, 1), layer.LeakyReLU(0.2), norm]
    modules += [layer.Flatten(), peer.linear(params["Linear_0"], (2, 2, 5), 0)]
    images = noise(2, 6, 16, 16, 2)
    module = gan.discriminator.clone(dropout=0.0, epsilon=epsilon)
    apply = quick(functools.partial(module.apply, mutable=["batch_stats"]))
    found, _ = apply({"params": params}, images)
    np.testing.assert_allclose(found, peer.run(modules, to_torch(images))[:, 0], rtol=1e-4)


def test_ebgan_discriminator_against_pytorch():
    peer = Torch()
    layer = peer.torch.nn
    gan = tiny("ebgan")
    params = random_discriminator(gan)
    encoder = [peer.conv(params["Conv_0"], 2, 1)]
    for i in (1, 2):
        norm = peer.norm(params[f"BatchNorm_{i - 1}"])
        encoder += [norm, layer.LeakyReLU(0.2), peer.conv(params[f"Conv_{i}"], 2, 1)]
    decoder = []
    for i in (0, 1):
        norm = peer.norm(params[f"BatchNorm_{i + 2}"])
        decoder += [peer.conv_transpose(params[f"ConvTranspose_{i}"]), norm, layer.ReLU()]
    decoder.append(peer.conv_transpose(params["ConvTranspose_2"]))
    images = noise(2, 6, 16, 16, 2)
    apply = quick(functools.partial(gan.discriminator.apply, mutable=["batch_stats"]))
    (decoded, codes), _ = apply({"params": params}, images)
    expected = peer.run(encoder, to_torch(images))
    np.testing.assert_allclose(codes.reshape(6, 2, 2, 6), expected.transpose(0, 2, 3, 1), rtol=1e-3)
    expected = peer.run(encoder + decoder, to_torch(images))
    np.testing.assert_allclose(decoded, expected.transpose(0, 2, 3, 1), rtol=1e-3, atol=1e-4)


def plain_conv(x, kernel):
    padding = [(size // 2,) * 2 for size in kernel.shape[:2]]
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=dimensions)


def assert_same_with_gradients(ours, plain, x, kernel):
    expected = jax.eval_shape(plain, x, kernel)
    y = noise(2, *expected.shape, dtype=np.float64)

    @quick
    def both(x, kernel):
        pulled = (jax.vjp(f, x, kernel) for f in (ours, plain))
        return [(value, pull_back(y)) for value, pull_back in pulled]

    chex.assert_trees_all_close(*both(x, kernel), atol=1e-11)


def test_upsampled_convolution_and_its_gradients(monkeypatch):
    monkeypatch.setattr(layers, "_PIECE", 300)  # one image of 6 x 8 x 5 at a time
    x, kernel = noise(0, 2, 3, 4, 2, dtype=np.float64), noise(1, 3, 3, 2, 5, dtype=np.float64)
    assert_same_with_gradients(
        layers.upsampled_conv,
        lambda x, kernel: plain_conv(x.repeat(2, axis=1).repeat(2, axis=2), kernel),
        x,
        kernel,
    )


# A window larger than the image, one that only leans out of it, and a batch in uneven pieces.
@pytest.mark.parametrize(
    "shape, window, piece",
    [((3, 2, 3), (3, 5), 99), ((2, 2, 9), (5, 1), 99), ((5, 4, 5), (3, 5), 130)],
)
def test_same_convolution_and_its_gradients(shape, window, piece, monkeypatch):
    monkeypatch.setattr(layers, "_PIECE", piece)
    x, kernel = noise(0, *shape, 2, dtype=np.float64), noise(1, *window, 2, 3, dtype=np.float64)
    assert_same_with_gradients(layers.same_conv, plain_conv, x, kernel)
    with pytest.raises(ValueError, match="odd"):
        layers.same_conv(x, kernel[1:])


@pytest.mark.parametrize("size, blocks", [(16, 3), (32, 4), (64, 5), (128, 5)])
def test_sizes_of_an_lsgan(size, blocks):
    gan = lsgan.lsgan((size, size, 1), latent_dim=3)
    assert gan.discriminator.features == (16, 32, 64, 128, 128)[:blocks]
    images, variables = jax.eval_shape(
        lambda: gan.generator.init_with_output(jax.random.key(0), jnp.zeros((2, 3), jnp.float32))
    )
    assert images.shape == (2, size, size, 1)
    first = (size // 8) ** 2 * 128
    assert variables["params"]["linear"]["kernel"].shape == (3, first)
    critic = jax.eval_shape(gan.discriminator.init, jax.random.key(0), images)
    last_map = max(2, size // 32)
    width = gan.discriminator.features[-1]
    assert critic["params"]["Linear_0"]["kernel"].shape == (last_map**2 * width, 1)


@pytest.mark.parametrize(
    "family, shape, options, message",
    [
        ("lsgan", (48, 48, 3), {}, "16, 32, 64"),
        ("lsgan", (8, 8, 3), {}, "16, 32, 64"),
        ("lsgan", (32, 64, 3), {}, "h = w"),
        ("lsgan", (32, 32, 3), {"features": (8, 8, 8)}, "4 widths"),
        ("lsgan", (32, 32, 3), {"discriminator_features": (8,) * 5}, "4 widths"),
        ("ebgan", (48, 48, 3), {}, "8, 16, 32"),
        ("ebgan", (64, 64, 3), {"features": (8, 8, 8)}, "4 widths"),
        ("ebgan", (32, 32, 3), {"discriminator_features": (8,) * 4}, "3 widths"),
        ("lsgan", (32, 32, 3), {"convention": "code"}, "paper, reference"),
        ("ebgan", (32, 32, 3), {"convention": "code"}, "paper, reference"),
        ("dcgan", (32, 32, 3), {"convention": "code"}, "paper, reference"),
        ("vae", (32, 32, 3), {}, "there are dcgan"),
    ],
)
def test_models_that_cannot_be_made(family, shape, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.make(family, shape, **options)


# --- losses ---------------------------------------------------------------------------------------


def test_least_squares_by_hand():
    gan = tiny("lsgan")
    scores = {"real": np.array([0.3, -1.0, 2.0]), "fake": np.array([2.0, 0.1, 0.5])}
    used = []

    def discriminate(name, rng):
        used.append(jax.random.key_data(rng).tolist())
        return scores[name]

    rng = jax.random.key(0)
    found = gan.discriminator_loss(discriminate, "real", "fake", rng)
    # ((0.7^2 + 2^2 + 1^2) / 3 + (2^2 + 0.1^2 + 0.5^2) / 3) / 2
    np.testing.assert_allclose(found, (5.49 + 4.26) / 6, rtol=1e-6)
    found = gan.generator_loss(discriminate, "fake", rng)
    np.testing.assert_allclose(found, (1 + 0.81 + 0.25) / 3, rtol=1e-6)
    # The two batches do not share their dropout.
    assert used[0] != used[1]


@pytest.mark.parametrize("squared", [True, False])
def test_pull_away_term_by_a_double_loop(squared):
    codes = noise(0, 5, 7, dtype=np.float64)
    total = 0.0
    for i in range(5):
        for j in range(5):
            if i != j:
                cosine = codes[i] @ codes[j] / np.linalg.norm(codes[i]) / np.linalg.norm(codes[j])
                total += cosine**2 if squared else cosine
    found = ebgan.pull_away(codes, squared=squared)
    np.testing.assert_allclose(found, total / 20, rtol=1e-9)
    gradient = quick(jax.grad(functools.partial(ebgan.pull_away, squared=squared)))
    assert np.isfinite(gradient(np.zeros((3, 2)))).all()
    with pytest.raises(ValueError, match="no pair"):
        ebgan.pull_away(codes[:1])


@pytest.mark.parametrize("batch, margin", [(4, 1.0), (96, 1.5)])
def test_energies_and_their_margin(batch, margin):
    gan = tiny("ebgan")
    real, fake = (noise(seed, batch, 2, 2, 1, dtype=np.float64) for seed in (0, 1))
    for scale in (0.2, 2.0):  # energies of the generated images below and above the margin
        discriminate = lambda x: (x + (0.1 if x is real else scale), None)  # noqa: B023,E731
        expected = 0.1**2 + max(margin - scale**2, 0)
        found = gan.discriminator_loss(discriminate, real, fake, None)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("convention", conventions.CONVENTIONS)
def test_the_target_of_an_ebgan_generator_is_held_fixed(convention):
    gan = tiny("ebgan", convention=convention)
    fake = noise(0, 3, 2, 2, 1, dtype=np.float64)
    codes = noise(1, 3, 4, dtype=np.float64)
    loss = functools.partial(gan.generator_loss, lambda x: (0.5 * x, codes), rng=None)
    pull_away = ebgan.pull_away(codes, squared=convention == "paper")
    np.testing.assert_allclose(loss(fake), np.mean((0.5 * fake) ** 2) + 0.1 * pull_away, rtol=1e-6)
    # d/dx (0.5 x - t)^2 = 2 (0.5 x - t) 0.5 at t = x. Were t not fixed: 0.5 x.
    np.testing.assert_allclose(jax.grad(loss)(fake), -0.5 * fake / fake.size, rtol=1e-6)


def test_conventions():
    for name in FAMILIES:
        paper, reference = (tiny(name, convention=word) for word in conventions.CONVENTIONS)
        assert (paper.discriminator_steps, reference.discriminator_steps) == (5, 1)
    paper, reference = (tiny("lsgan", convention=word) for word in conventions.CONVENTIONS)
    for network in ("generator", "discriminator"):
        assert getattr(paper, network).epsilon == 1e-5
        assert getattr(reference, network).epsilon == 0.8
    assert (
        zoo.make("dcgan", (16, 16, 1), convention="reference").generator
        == dcgan.dcgan((16, 16, 1)).generator
    )


# --- training -------------------------------------------------------------------------------------


# Compiling a step takes as long as all other tests of a family.
@pytest.mark.parametrize("name", [pytest.param("lsgan", marks=pytest.mark.slow), "ebgan"])
def test_a_step_moves_every_weight_and_steps_lower_the_discriminators_loss(name):
    gan = tiny(name, convention="reference")
    step = jax.jit(functools.partial(training.train_step, gan))
    state = training.take_seed(training.init_seeds(gan, jnp.zeros(1, jnp.uint32)), 0)
    real = np.tanh(noise(3, 1, 8, 16, 16, 2))
    after, losses = step(state, real)
    assert all(np.isfinite(value).all() for value in jax.tree.leaves((after.generator, losses)))
    pairs = [
        (state.generator["params"], after.generator["params"]),
        (state.discriminator, after.discriminator),
    ]
    for pair in pairs:
        moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), *pair)
        # Adam's first step is the learning rate, whatever the gradient.
        assert all(0.5e-4 < value < 2.1e-4 for value in jax.tree.leaves(moved)), moved
    chex.assert_trees_all_equal(step(state, real)[0].discriminator, after.discriminator)
    values = []
    for _ in range(60):
        state, losses = step(state, real)
        values.append(float(losses.discriminator))
    assert np.mean(values[-10:]) < np.mean(values[:10]) - 0.02


def test_dropout_takes_whole_channels():
    gan = tiny("lsgan")
    apply = quick(
        functools.partial(
            gan.discriminator.apply,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
        )
    )
    variables, images = {"params": random_discriminator(gan)}, noise(2, 64, 16, 16, 2)
    scores, kept = apply(variables, images, rngs={"dropout": jax.random.key(0)})
    again, _ = apply(variables, images, rngs={"dropout": jax.random.key(0)})
    other, _ = apply(variables, images, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_array_equal(scores, again)
    assert float(abs(scores - other).max()) > 1e-3
    for i in range(3):
        # A map is zero everywhere or nowhere; a quarter of them is, in every block.
        maps = np.asarray(kept["intermediates"][f"Dropout_{i}"]["__call__"][0]) == 0
        whole = maps.all(axis=(1, 2))
        np.testing.assert_array_equal(whole, maps.any(axis=(1, 2)))
        assert 0.15 < whole.mean() < 0.35


class Grey(nn.Module):
    """Makes images that know nothing of the latents."""

    @nn.compact
    def __call__(self, latents, *, train=False):
        x = layers.BatchNorm()(jnp.ones_like(latents), train=train)
        return x[:, None, None, :1] * jnp.zeros((1, 2, 2, 1))


class Lossy(nn.Module):
    """How much dropout leaves of each image."""

    @nn.compact
    def __call__(self, images):
        weight = self.param("weight", nn.initializers.ones, (), jnp.float32)
        ramp = jnp.arange(images.size, dtype=jnp.float32).reshape(images.shape)
        kept = nn.Dropout(0.5)(ramp, deterministic=False)
        return weight * kept.mean(axis=(1, 2, 3))


def test_dropout_is_drawn_anew_in_every_step_and_the_same_for_the_same_seed():
    # Everything but dropout is constant in this model, so its losses show what was drawn.
    gan = tiny("lsgan")._replace(
        generator=Grey(),
        discriminator=Lossy(),
        image_shape=(2, 2, 1),
        optimizer=optax.sgd(0.0),
        discriminator_steps=2,
    )
    state = training.take_seed(training.init_seeds(gan, jnp.zeros(1, jnp.uint32)), 0)
    step = quick(functools.partial(training.train_step, gan))

    def losses(number, seed):
        changed = state._replace(step=jnp.int32(number), rng=jax.random.key(seed))
        return tuple(map(float, step(changed, np.zeros((2, 16, 2, 2, 1), np.float32))[1]))

    assert losses(0, 0) == losses(0, 0)
    for other in (losses(1, 0), losses(0, 1)):
        assert all(a != b for a, b in zip(losses(0, 0), other))


# --- sampling and files ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_final_layer_makes_the_image_from_the_activation(name):
    widths = WIDTHS.get(name, {"features": (7, 6)})["features"]
    gan = zoo.make(name, (16, 16, 2), latent_dim=5, features=widths)
    generator = sampling.TrainedGenerator(
        random_generator(gan), gan.generator, gan.image_shape, gan.latent_dim
    )
    z = noise(0, 4, 5)
    activations = quick(lambda z: sampling.activations(generator, z))(z)
    layer = sampling.final_layer(generator)
    assert activations.shape[1:] == layer.operator.input_shape
    assert (layer.bias is not None) == (name == "lsgan") and float(activations.min()) >= 0
    found = quick(jax.vmap(functools.partial(final_layer.forward, layer)))(activations)
    expected = quick(gan.generator.apply)(generator.variables, z)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.std(found) > 0.05


@pytest.mark.parametrize("convention", [None, *conventions.CONVENTIONS])
def test_a_saved_lsgan_comes_back_with_its_convention(convention, tmp_path):
    options = {} if convention is None else {"convention": convention}
    gan = tiny("lsgan", **options)
    generator = sampling.TrainedGenerator(
        random_generator(gan), gan.generator, gan.image_shape, gan.latent_dim
    )
    entry = {
        "family": "lsgan",
        "image_shape": [16, 16, 2],
        "latent_dim": 5,
        "features": [5, 4, 6, 3],
    }
    zoo.save_file(tmp_path / "g.safetensors", generator, {**entry, **options})
    assert zoo.load_file(tmp_path / "g.safetensors").module == gan.generator
