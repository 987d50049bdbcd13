"""Layers, GANs, training, sampling, checkpoints, zoo."""

import collections
import functools
import hashlib
import importlib.resources

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments import _config, train_generator
from flipad_jax import checkpoints
from flipad_jax.generators import (
    dcgan,
    ebgan,
    layers,
    lsgan,
    sampling,
    training,
    wgan_gp,
    zoo,
)
from flipad_jax.inversion import final_layer

TINY = {"latent_dim": 4, "features": (6,), "discriminator_features": (5,)}


def tiny(family=dcgan.dcgan):
    return family((8, 8, 1), **TINY)


def fresh(gan):
    return training.take_seed(training.init_seeds(gan, jnp.zeros(1, jnp.uint32)), 0)


def noise(seed, *shape, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def tiny_images(num=20, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, 8, 8, 1), np.uint8)


# --- layers ---------------------------------------------------------------------------------------


def plain_conv(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def plain_conv_transpose(x, kernel, stride, padding):
    """The adjoint of the convolution with input and output exchanged, by JAX itself."""
    size = [(n - 1) * stride - 2 * padding + k for n, k in zip(x.shape[1:3], kernel.shape[:2])]
    out = jax.ShapeDtypeStruct((x.shape[0], *size, kernel.shape[2 + 1]), x.dtype)
    convolve = functools.partial(
        plain_conv, kernel=kernel.swapaxes(2, 3), stride=stride, padding=padding
    )
    return jax.linear_transpose(convolve, out)(x)[0]


GEOMETRIES = [
    (1, 4, 1, 0),
    (5, 4, 2, 1),
    (4, 3, 1, 1),
    (3, 5, 3, 2),
    (4, 6, 3, 2),
    (8, 4, 2, 0),
]  # size, kernel, stride, padding


@pytest.fixture(params=["as it is", "small"])
def _limits(request, monkeypatch):
    """Where a CPU takes other forms: at every size, and every image a piece of its own."""
    if request.param == "small":
        monkeypatch.setattr(layers, "_MANY", 1)
        monkeypatch.setattr(layers, "_PIECE", 1)


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize("size, kernel_size, stride, padding", GEOMETRIES)
def test_conv_transpose_and_all_its_derivatives(size, kernel_size, stride, padding):
    x, kernel = noise(0, 2, size, size, 3), noise(1, kernel_size, kernel_size, 3, 2)
    ours = lambda x, k: layers.conv_transpose(x, k, stride, padding)  # noqa: E731
    plain = lambda x, k: plain_conv_transpose(x, k, stride, padding)  # noqa: E731
    chex.assert_trees_all_close(ours(x, kernel), plain(x, kernel), atol=1e-12)
    y = noise(2, *plain(x, kernel).shape)
    chex.assert_trees_all_close(
        jax.vjp(ours, x, kernel)[1](y), jax.vjp(plain, x, kernel)[1](y), atol=1e-11
    )
    tangents = noise(3, *x.shape), noise(4, *kernel.shape)
    chex.assert_trees_all_close(
        jax.jvp(ours, (x, kernel), tangents), jax.jvp(plain, (x, kernel), tangents), atol=1e-11
    )

    def gradient_norm(f, x, kernel):
        return (
            jax.grad(lambda x, k: (f(x, k) ** 3).sum(), argnums=(0, 1))(x, kernel)[0] ** 2
        ).sum()

    chex.assert_trees_all_close(
        jax.grad(functools.partial(gradient_norm, ours), argnums=(0, 1))(x, kernel),
        jax.grad(functools.partial(gradient_norm, plain), argnums=(0, 1))(x, kernel),
        rtol=1e-9,
    )
    stacked = np.stack([kernel, 2 * kernel])
    vmapped = jax.vmap(lambda k: jax.vjp(ours, x, k)[1](y))(stacked)
    one_by_one = [jax.vjp(plain, x, k)[1](y) for k in stacked]
    chex.assert_trees_all_close(
        vmapped, jax.tree.map(lambda *v: jnp.stack(v), *one_by_one), atol=1e-11
    )


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize(
    "size, kernel_size, stride, padding", [(8, 4, 2, 1), (7, 4, 2, 1), (8, 3, 3, 0)]
)
def test_conv_and_its_second_derivatives(size, kernel_size, stride, padding):
    x, kernel = noise(0, 2, size, size, 3), noise(1, kernel_size, kernel_size, 3, 2)
    ours = lambda x, k: layers.conv(x, k, stride, padding)  # noqa: E731
    plain = lambda x, k: plain_conv(x, k, stride, padding)  # noqa: E731

    def penalty(f, x, kernel):
        return (jax.grad(lambda x: (f(x, kernel) ** 3).sum())(x) ** 2).sum()

    for f in (lambda f, x, k: (f(x, k) ** 3).sum(), penalty):
        chex.assert_trees_all_close(
            jax.value_and_grad(functools.partial(f, ours), argnums=(0, 1))(x, kernel),
            jax.value_and_grad(functools.partial(f, plain), argnums=(0, 1))(x, kernel),
            rtol=1e-9,
        )


def test_layers_against_pytorch():
    torch = pytest.importorskip("torch")
    x, kernel = noise(0, 2, 5, 6, 3), noise(1, 4, 4, 3, 2)
    up = torch.nn.functional.conv_transpose2d(
        torch.tensor(x.transpose(0, 3, 1, 2)),
        torch.tensor(kernel.transpose(2, 3, 0, 1)),
        stride=2,
        padding=1,
    )
    ours = layers.conv_transpose(x, kernel, 2, 1)
    np.testing.assert_allclose(ours, up.numpy().transpose(0, 2, 3, 1), atol=1e-12)
    down = torch.nn.functional.conv2d(
        torch.tensor(x.transpose(0, 3, 1, 2)),
        torch.tensor(kernel.transpose(3, 2, 0, 1)),
        stride=2,
        padding=1,
    )
    ours = layers.conv(x, kernel, 2, 1)
    np.testing.assert_allclose(ours, down.numpy().transpose(0, 2, 3, 1), atol=1e-12)


def test_pytorch_init_bounds():
    draw = layers.pytorch_init(2)(jax.random.key(0), (4, 4, 30, 50))
    assert 0.99 / 480**0.5 < float(abs(draw).max()) <= 1 / 480**0.5
    assert layers.pytorch_init(2) is layers.pytorch_init(2)  # or modules would compile anew


# --- architectures --------------------------------------------------------------------------------


def test_paper_architecture_and_its_parameter_count():
    gan = dcgan.dcgan((64, 64, 3))
    assert gan.generator.features == (512, 256, 128, 64)
    shapes = jax.eval_shape(gan.generator.init, jax.random.key(0), np.zeros((1, 100), np.float32))
    kernels = [100 * 512, 512 * 256, 256 * 128, 128 * 64, 64 * 3]
    expected = 16 * sum(kernels) + 2 * (512 + 256 + 128 + 64)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == expected
    shapes = jax.eval_shape(gan.discriminator.init, jax.random.key(0), np.zeros((1, 64, 64, 3)))
    kernels = [3 * 64, 64 * 128, 128 * 256, 256 * 512, 512]
    expected = 16 * sum(kernels) + 2 * (128 + 256 + 512)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == expected


@pytest.mark.parametrize(
    "family", [dcgan.dcgan, wgan_gp.wgan_gp, ebgan.ebgan, lsgan.lsgan], ids=lambda f: f.__name__
)
def test_an_image_shape_from_json_makes_the_same_model(family):
    """A list; the model is a static argument of compiled functions, so it must be hashable."""
    gan = family([16, 16, 1], latent_dim=2)
    assert gan.image_shape == (16, 16, 1)
    found = jax.eval_shape(functools.partial(training.init_seeds, gan), np.zeros(1, np.uint32))
    assert found.generator["params"].keys()


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("family", [dcgan.dcgan, wgan_gp.wgan_gp])
def test_any_size_and_channels(family, size):
    widths = (4,) * len(dcgan.default_features(size))
    gan = family((size, size, 2), latent_dim=3, features=widths, discriminator_features=widths)
    state = fresh(gan)
    images = gan.generator.apply(state.generator, np.ones((5, 3), np.float32))
    assert images.shape == (5, size, size, 2) and float(abs(images).max()) < 1
    logits, _ = gan.discriminator.apply(
        {"params": state.discriminator}, images, mutable=["batch_stats"]
    )
    assert logits.shape == (5,)


def test_generator_against_pytorch():
    torch = pytest.importorskip("torch")
    gan = dcgan.dcgan((16, 16, 3), latent_dim=5, features=(7, 6))
    variables = fresh(gan).generator
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda v: rng.uniform(0.5, 1.5, v.shape).astype(np.float32), variables)
    params, stats = variables["params"], variables["batch_stats"]
    modules = []
    for i, width in enumerate((7, 6)):
        last = 5 if i == 0 else 7
        convolution = torch.nn.ConvTranspose2d(last, width, 4, 1 + (i > 0), int(i > 0), bias=False)
        kernel = params[f"convolutions_{i}"]["kernel"].transpose(2, 3, 0, 1)
        convolution.weight.data = torch.tensor(kernel)
        norm = torch.nn.BatchNorm2d(width)
        norm.weight.data = torch.tensor(params[f"norms_{i}"]["BatchNorm_0"]["scale"])
        norm.bias.data = torch.tensor(params[f"norms_{i}"]["BatchNorm_0"]["bias"])
        norm.running_mean = torch.tensor(stats[f"norms_{i}"]["BatchNorm_0"]["mean"])
        norm.running_var = torch.tensor(stats[f"norms_{i}"]["BatchNorm_0"]["var"])
        modules += [convolution, norm, torch.nn.ReLU()]
    last = torch.nn.ConvTranspose2d(6, 3, 4, 2, 1, bias=False)
    last.weight.data = torch.tensor(params["last"]["kernel"].transpose(2, 3, 0, 1)) * 1e-3
    params["last"]["kernel"] = params["last"]["kernel"] * 1e-3
    model = torch.nn.Sequential(*modules, last, torch.nn.Tanh()).eval()
    latents = noise(1, 4, 5, dtype=np.float32)
    with torch.no_grad():
        expected = model(torch.tensor(latents)[:, :, None, None]).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gan.generator.apply(variables, latents), expected, atol=2e-5)


@pytest.mark.parametrize(
    "shape, features, message",
    [
        ((48, 48, 3), None, "8, 16, 32, 64"),
        ((32, 64, 3), None, "h = w"),
        ((32, 32, 3), (8, 8), "3 widths"),
    ],
)
def test_images_that_no_dcgan_makes(shape, features, message):
    with pytest.raises(ValueError, match=message):
        dcgan.dcgan(shape, features=features)


def test_gradient_penalty_of_a_linear_critic():
    weight = noise(0, 4, 4, 1)
    real, fake = noise(1, 6, 4, 4, 1), noise(2, 6, 4, 4, 1)
    found = wgan_gp.gradient_penalty(
        lambda x: (x * weight[None]).sum(axis=(1, 2, 3)), real, fake, jax.random.key(0)
    )
    np.testing.assert_allclose(found, (np.linalg.norm(weight) - 1) ** 2, rtol=1e-9)
    # A critic of ||x||^2 / 2 has the mixed image itself as gradient: between real and fake.
    real, fake = np.full((50, 4, 4, 1), 2.0), np.zeros((50, 4, 4, 1))
    found = wgan_gp.gradient_penalty(
        lambda x: 0.5 * (x**2).sum(axis=(1, 2, 3)), real, fake, jax.random.key(0)
    )
    assert 9 < found < 30  # E (8 u - 1)^2 = 14.33 for u uniform


def test_losses_of_the_dcgan_recipe():
    gan = tiny()
    logits = {"real": np.array([0.3, -1.0]), "fake": np.array([2.0, 0.1])}
    discriminate = lambda name: logits[name]  # noqa: E731

    def cross_entropy(values, label):
        p = 1 / (1 + np.exp(-values))
        return -np.mean(label * np.log(p) + (1 - label) * np.log(1 - p))

    found = gan.discriminator_loss(discriminate, "real", "fake", None)
    expected = cross_entropy(logits["real"], 0.9) + cross_entropy(logits["fake"], 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    found = gan.generator_loss(discriminate, "fake", None)
    np.testing.assert_allclose(found, cross_entropy(logits["fake"], 0.9), rtol=1e-6)


# --- training -------------------------------------------------------------------------------------


def test_every_epoch_shows_every_image_once():
    rng = jax.random.key(3)
    epochs = [
        np.concatenate([training._epoch_batch(rng, 3 * e + b, 13, 4) for b in range(3)])
        for e in range(2)
    ]
    assert all(len(set(epoch.tolist())) == 12 for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_seeds_together_equal_seeds_alone():
    gan, images = tiny(), tiny_images()
    run = functools.partial(training.train, gan, images, num_steps=2, batch_size=4)
    both = run(seeds=(5, 7))
    alone = training.take_seed(run(seeds=(7,)), 0)
    chex.assert_trees_all_close(
        training.take_seed(both, 1).generator, alone.generator, rtol=2e-3, atol=1e-5
    )
    first, second = (training.take_seed(both, i).generator["params"] for i in range(2))
    assert float(abs(first["last"]["kernel"] - second["last"]["kernel"]).max()) > 1e-3


def test_a_step_on_an_accelerator_is_the_same_step(monkeypatch):
    # Elsewhere than on a CPU seeds are vmapped and critic steps looped: the same numbers.
    gan, images = tiny(wgan_gp.wgan_gp)._replace(discriminator_steps=2), jnp.asarray(tiny_images())
    seeds = jnp.arange(2, dtype=jnp.uint32)
    states = []
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        step = jax.jit(training.step_all.__wrapped__, static_argnames=("gan", "batch_size"))
        states.append(
            step(training.init_seeds(gan, seeds), images, gan=gan, batch_size=4)[0].generator
        )
    chex.assert_trees_all_close(*states, rtol=2e-3, atol=1e-5)


def test_training_goes_on_where_it_was_bit_for_bit(tmp_path):
    gan, images = tiny(), tiny_images()
    run = functools.partial(
        training.train, gan, images, seeds=(1, 2), batch_size=4, checkpoint_every=2
    )
    whole = run(num_steps=5)
    run(num_steps=3, checkpoint_dir=tmp_path / "c")
    assert checkpoints.steps(tmp_path / "c") == [2, 3]
    seen = []
    resumed = run(
        num_steps=5,
        checkpoint_dir=tmp_path / "c",
        report_every=1,
        progress=lambda step, losses: seen.append(step),
    )
    assert seen == [4, 5]
    chex.assert_trees_all_equal(resumed.generator, whole.generator)
    chex.assert_trees_all_equal(resumed.discriminator_opt, whole.discriminator_opt)
    assert (jax.random.key_data(resumed.rng) == jax.random.key_data(whole.rng)).all()


def test_checkpoints_of_another_model_are_refused(tmp_path):
    state = fresh(tiny())
    assert checkpoints.restore_latest(tmp_path / "none", state) is None
    checkpoints.save(tmp_path / "c", 7, state)
    step, restored = checkpoints.restore_latest(tmp_path / "c", state)
    assert step == 7
    chex.assert_trees_all_equal(restored.generator, state.generator)
    other = fresh(dcgan.dcgan((8, 8, 3), **TINY))
    with pytest.raises(ValueError, match="not of this model"):
        checkpoints.restore_latest(tmp_path / "c", other)


def test_half_written_checkpoints_are_not_read(tmp_path):
    state = fresh(tiny())
    checkpoints.save(tmp_path / "c", 1, state)
    debris = tmp_path / "c" / "9.orbax-checkpoint-tmp"
    debris.mkdir()
    (debris / "half").write_text("x")
    assert checkpoints.steps(tmp_path / "c") == [1]
    assert checkpoints.restore_latest(tmp_path / "c", state)[0] == 1


def test_a_generator_learns_the_brightness_of_its_data():
    gan = dcgan.dcgan((8, 8, 1), latent_dim=4, features=(16,), discriminator_features=(16,))
    for level in (30, 225):
        images = np.full((32, 8, 8, 1), level, np.uint8)
        states = training.train(gan, images, seeds=(0,), num_steps=150, batch_size=16)
        generator = sampling.from_state(gan, training.take_seed(states, 0))
        mean = sampling.generate(generator, jax.random.key(0), 64).mean()
        assert abs(mean - level) < 60, (level, mean)


@pytest.mark.parametrize(
    "images, options, message",
    [
        (tiny_images(3), {}, "fewer than one batch"),
        (tiny_images().astype(np.float32) / 255, {}, "uint8"),
        (tiny_images()[:, :4], {}, "shape"),
        (tiny_images(), {"seeds": ()}, "seeds"),
    ],
)
def test_training_data_that_cannot_be_used(images, options, message):
    with pytest.raises(ValueError, match=message):
        training.train(
            tiny(), images, **{"seeds": (0,), "num_steps": 1, "batch_size": 4, **options}
        )


def test_a_diverged_training_stops(monkeypatch):
    gan = tiny()._replace(generator_loss=lambda discriminate, fake, rng: jnp.nan * fake.sum())
    with pytest.raises(FloatingPointError, match="generator's loss .* in step 1 "):
        training.train(gan, tiny_images(), seeds=(0,), num_steps=4, batch_size=4, report_every=2)


# --- sampling and zoo -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    gan = tiny()
    states = training.train(gan, tiny_images(), seeds=(0,), num_steps=3, batch_size=4)
    return sampling.from_state(gan, training.take_seed(states, 0))


def test_image_i_does_not_depend_on_the_others(trained):
    rng = jax.random.key(1)
    images = sampling.generate(trained, rng, 11)
    assert images.dtype == np.uint8 and images.shape == (11, 8, 8, 1)
    np.testing.assert_array_equal(images, sampling.generate(trained, rng, 11, batch_size=3))
    np.testing.assert_array_equal(images[4:], sampling.generate(trained, rng, 7, first=4))
    assert (images != sampling.generate(trained, jax.random.key(2), 11)).any()


def test_final_layer_makes_the_image_from_the_activation(trained):
    z = sampling.latents(jax.random.key(0), jnp.arange(5), trained.latent_dim)
    activations = sampling.activations(trained, z)
    assert activations.shape == (5, 4, 4, 6) and float(activations.min()) >= 0
    layer = sampling.final_layer(trained)
    again = jax.vmap(functools.partial(final_layer.forward, layer))(activations)
    np.testing.assert_allclose(again, trained.module.apply(trained.variables, z), atol=1e-6)
    mean = sampling.mean_activation(trained, jax.random.key(0), 5)
    np.testing.assert_allclose(mean, activations.mean(axis=0), atol=1e-6)


def test_saved_generators_come_back(trained, tmp_path):
    entry = {"family": "dcgan", "image_shape": [8, 8, 1], "latent_dim": 4, "features": [6]}
    digest = zoo.save_file(tmp_path / "g.safetensors", trained, entry)
    content = (tmp_path / "g.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    loaded = zoo.load_file(tmp_path / "g.safetensors")
    halves = jax.tree.map(lambda v: np.asarray(v, np.float16).astype(np.float32), trained.variables)
    chex.assert_trees_all_equal(loaded.variables, halves)
    (tmp_path / "bad.safetensors").write_bytes(content[:100])
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("bad", "text"):
        with pytest.raises(ValueError, match="not a generator"):
            zoo.load_file(tmp_path / f"{name}.safetensors")
    wrong = {**entry, "features": [7]}
    zoo.save_file(tmp_path / "w.safetensors", trained, wrong)
    with pytest.raises(ValueError, match="widths"):
        zoo.load_file(tmp_path / "w.safetensors")
    broken = trained.replace(variables=jax.tree.map(lambda v: v * 1e9, trained.variables))
    with pytest.raises(ValueError, match="float16"):
        zoo.save_file(tmp_path / "b.safetensors", broken, entry)


def test_the_zoo_is_complete_and_small():
    folder = importlib.resources.files(zoo)
    files = [path for path in folder.iterdir() if path.name.endswith(".safetensors")]
    assert sorted(path.name.removesuffix(".safetensors") for path in files) == sorted(zoo.names())
    assert sum(len(path.read_bytes()) for path in files) <= 8 * 2**20
    families = [zoo.record(name)["family"] for name in zoo.names()]
    assert collections.Counter(families) == dict.fromkeys(zoo.FAMILIES, 3)
    for name in zoo.names():
        entry, generator = zoo.record(name), zoo.load(name)
        assert {"command", "seed", "dataset", "sha256"} <= set(entry)
        images = sampling.generate(generator, jax.random.key(0), 40)
        assert images.shape[1:] == tuple(entry["image_shape"])
        assert images.std(axis=0).mean() > 20, f"{name} makes the same image again and again"
    with pytest.raises(ValueError, match="in the zoo; there are"):
        zoo.load("nobody")


def test_the_commands_of_the_zoo_make_what_it_holds():
    for name in zoo.names():
        entry = zoo.record(name)
        flags = dict(word[2:].split("=") for word in entry["command"].split()[2:])
        assert flags.pop("experiment") == "train_generator"
        config = _config.make_config(train_generator, **flags)
        made = train_generator.entry(
            train_generator._configured(config, tuple(entry["image_shape"])),
            config.seeds[0],
            dataset=config.dataset,
            data_seed=config.data_seed,
            num_images=config.num_images,
            num_steps=config.num_steps,
            batch_size=config.batch_size,
            convention=config.convention,
        )
        assert made == {key: entry[key] for key in made}, name


def test_a_changed_zoo_file_is_refused(monkeypatch):
    name = zoo.names()[0]
    entry = {**zoo.record(name), "sha256": "0" * 64}
    monkeypatch.setattr(zoo, "record", lambda _: entry)
    with pytest.raises(ValueError, match="SHA-256"):
        zoo.load(name)
