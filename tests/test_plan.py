"""What --plan counts, against hand counts and against what the library really calls."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments import _config, _plan, demo, perturbed_samples, train_generator
from flipad_jax import data
from flipad_jax.detection import deepsad
from flipad_jax.detection.deepsad import DeepSADConfig
from flipad_jax.generators import layers, sampling, training, zoo
from flipad_jax.generators.dcgan import dcgan
from flipad_jax.inversion import lasso, linops, preconditioner
from flipad_jax.inversion.final_layer import FinalLayer


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def cost(function, *arguments, **static):
    return _plan.analyse(_plan.Stage("step", function, arguments, 1, static=static))


def shapes(tree):
    return [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(tree)]


def taps(small, large, size, stride, padding):
    """Pairs of a place of the small and one of the large map that a kernel joins, along one axis.

    Counted one by one: the convolution from the large map to the small one and its transpose.
    """
    places = itertools.product(range(small), range(size))
    return sum(0 <= i * stride + k - padding < large for i, k in places)


# XLA's counts.


def test_a_matrix_product_is_two_operations_per_term():
    found = cost(jnp.matmul, floats(20, 30), floats(30, 40))
    assert found.flops == 2 * 20 * 30 * 40
    assert found.bytes == 4 * (20 * 30 + 30 * 40 + 20 * 40)
    assert found.peak_memory == found.bytes
    in_place = jax.jit(lambda x: x + 1, donate_argnums=0)
    assert cost(in_place, floats(1000)).peak_memory == 4000


@pytest.mark.parametrize("stride, padding", [(1, 0), (2, 1), (1, 2)])
def test_convolutions_count_no_padding(stride, padding):
    n, size, channels, features, kernel = 3, 12, 5, 7, 4
    out = (size + 2 * padding - kernel) // stride + 1
    by_hand = 2 * n * channels * features * taps(out, size, kernel, stride, padding) ** 2

    def forward(x, k):
        return layers.conv(x, k, stride, padding)

    x, k = floats(n, size, size, channels), floats(kernel, kernel, channels, features)
    y = floats(n, out, out, features)
    assert cost(forward, x, k).flops == by_hand
    transposed = lambda y, k: layers.conv_transpose(y, k, stride, padding)  # noqa: E731
    assert cost(transposed, y, floats(kernel, kernel, features, channels)).flops == by_hand

    def kernel_gradient(x, k, y):
        return jax.vjp(lambda k: forward(x, k), k)[1](y)[0]

    assert cost(kernel_gradient, x, k, y).flops == by_hand


def product(x, y):
    return x @ y


def test_loops_of_known_length_are_counted_in_full():
    x, one = floats(16, 16), 2 * 16**3

    def loop(x, y):
        return lax.fori_loop(0, 9, lambda _, x: x @ y, x)

    def scan(x, y, *, length, unroll):
        return lax.scan(lambda x, _: (x @ y, None), x, None, length=length, unroll=unroll)[0]

    def nested(x, y):
        return lax.fori_loop(0, 3, lambda _, x: loop(x, y), x)

    def branches(x, y):
        return lax.cond(x[0, 0] > 0, lambda: loop(x, y), lambda: x)

    for counted, times in (
        (cost(loop, x, x), 9),
        (cost(jax.jit(scan, static_argnames=("length", "unroll")), x, x, length=7, unroll=3), 7),
        (cost(jax.jit(scan, static_argnames=("length", "unroll")), x, x, length=4, unroll=4), 4),
        (cost(nested, x, x), 27),
        (cost(branches, x, x), 9),
    ):
        assert times * one <= counted.flops < times * one * 1.02
    assert cost(loop, x, x).bytes > 9 * 3 * 4 * 16**2

    def until(x, y, n):
        return lax.fori_loop(0, n, lambda _, x: x @ y, x)

    # Nobody knows how often: one iteration.
    found = cost(until, x, x, jax.ShapeDtypeStruct((), jnp.int32))
    assert one <= found.flops < 1.02 * one


def test_factorisations_are_counted_though_xla_does_not():
    n = 40
    found = cost(jnp.linalg.solve, floats(3, n, n), floats(3, n, 2))
    assert 3 * 2 / 3 * n**3 <= found.flops < 1.5 * 3 * 2 / 3 * n**3
    assert 9 * n**3 <= cost(jnp.linalg.eigh, floats(n, n)).flops < 1.1 * 9 * n**3


def test_stages_that_multiply_in_full_precision_are_known():
    exact = lambda x, y: jnp.dot(x, y, precision=lax.Precision.HIGHEST)  # noqa: E731
    both = lambda x, y: exact(x, y) + x @ y  # noqa: E731
    x = floats(8, 8)
    assert cost(exact, x, x).exact and cost(jax.jit(exact), x, x).exact
    assert not cost(product, x, x).exact and not cost(both, x, x).exact


def test_the_bound_is_the_scarcer_of_arithmetic_and_memory():
    machine = _plan.Accelerator(1e9, 1e8, 1e6, 1e9, "")
    assert _plan.lower_bound(_plan.Cost(2e9, 1.0, 0, False), machine) == 2
    assert _plan.lower_bound(_plan.Cost(2e9, 1.0, 0, True), machine) == 20
    assert _plan.lower_bound(_plan.Cost(2e9, 3e6, 0, False), machine) == 3


def test_this_machine_is_measured():
    machine = _plan.this_machine()
    assert 1e8 < machine.flops < 1e16 and 1e8 < machine.bandwidth < 1e14


# Stages: what is counted, and that the library calls just this, so often, with such arrays.


def dcgan_flops(gan, batch_size):
    """Products of one training step of a DCGAN, by hand."""
    sizes = [gan.image_shape[0] // 2**i for i in range(len(gan.discriminator.features) + 1)]

    def network(widths, last, taps=taps):
        widths = [gan.image_shape[-1], *widths]
        stages = [
            2 * batch_size * a * b * taps(small, large, 4, 2, 1) ** 2
            for a, b, small, large in zip(widths, widths[1:], sizes[1:], sizes)
        ]
        return np.array([*stages, 2 * batch_size * 4 * 4 * widths[-1] * last])

    critic = network(gan.discriminator.features, 1)
    # `layers.conv` takes its gradient at the padding too, and cuts it off.
    back = network(gan.discriminator.features, 1, lambda small, *_: small * 4)
    generator = network(gan.generator.features[::-1], gan.latent_dim)
    # Forward, kernel gradient, and the gradient at the input where there is something before it.
    learn = (2 * critic + back).sum() - back[0]
    teach = (critic + back).sum()
    return 2 * learn + teach + 3 * generator.sum() - generator[-1]


def test_a_training_step_is_what_a_hand_count_says():
    # So wide that all but the products is little.
    gan = dcgan((16, 16, 3), latent_dim=24, features=(256, 192), discriminator_features=(160, 224))
    stage = _plan.gan_training(gan, 64, 5, 3)
    assert stage.calls == 15
    kernels = 16 * (24 * 256 + 256 * 192 + 192 * 3 + 3 * 160 + 160 * 224 + 224)
    assert stage.num_parameters == kernels + 2 * (256 + 192 + 224)
    by_hand = dcgan_flops(gan, 64)
    assert by_hand < _plan.analyse(stage).flops < 1.01 * by_hand


def test_training_calls_what_is_planned(monkeypatch):
    gan = dcgan((8, 8, 1), latent_dim=4, features=(4,))
    calls = []

    def step_all(states, images, *, mesh, **static):
        calls.append((shapes((states, images)), static))
        return states, training.Losses(np.zeros(1), np.zeros(1))

    stage = _plan.gan_training(gan, 4, 3, num_images=9)
    assert stage.function is training.step_all
    monkeypatch.setattr(training, "step_all", step_all)
    training.train(gan, np.zeros((9, 8, 8, 1), np.uint8), seeds=(0,), num_steps=3, batch_size=4)
    assert calls == [(shapes(stage.arguments), dict(stage.static))] * stage.calls


def test_generation_calls_what_is_planned(monkeypatch):
    generator = zoo.load("digits_dcgan_0")
    stage = _plan.generation(generator, 25, 10)
    calls = []

    def generate_batch(*arguments):
        calls.append(shapes(arguments[:3]))
        return np.zeros((10, 32, 32, 1), np.uint8)

    assert stage.function is sampling._generate_batch
    monkeypatch.setattr(sampling, "_generate_batch", generate_batch)
    sampling.generate(generator, jax.random.key(0), 25, batch_size=10)
    assert calls == [shapes(stage.arguments)] * stage.calls and stage.calls == 3


@pytest.mark.parametrize("method", ["fista", "primal_dual"])
def test_inversion_calls_what_is_planned(monkeypatch, method):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 4, 16, 1)).astype(np.float32)
    op = linops.conv_transpose(kernel, (4, 4, 16), strides=2, padding=1)
    stage = _plan.inversion(FinalLayer(op), 5, 4, 20, method=method)
    calls = []

    def advance(operator, state, o, num_steps, numbers, *, method, mesh):
        calls.append((int(num_steps), shapes((operator, state, o, numbers))))
        return state, np.zeros(4)

    def finish(operator, state, o, where, num_steps, numbers, *, method, mesh):
        nothing = np.zeros(len(where))
        info = lasso.LassoInfo(nothing, nothing, nothing, nothing == 0)
        return jnp.zeros((len(where), 4, 4, 16), jnp.float32), info

    # Constants of the operator that take long to compile.
    monkeypatch.setattr(linops, "squared_norm", lambda op: jnp.float32(1e4))
    monkeypatch.setattr(preconditioner, "_coupling", lambda op, m: jnp.float32(1))
    monkeypatch.setattr(lasso, "_advance", advance)
    monkeypatch.setattr(lasso, "_finish", finish)
    targets = rng.normal(size=(5, 8, 8, 1)).astype(np.float32)
    lasso.solve(op, targets, lam=0.01, tol=0, max_iters=20, method=method, chunk_size=4)
    assert calls == [(10, shapes(stage.arguments))] * stage.calls
    assert stage.calls == 4 and not stage.at_most
    # Ten times A and A^T, and at least one product for the certificate.
    once = 4 * 2 * 16 * taps(4, 8, 4, 2, 1) ** 2
    assert 21 * once < _plan.analyse(stage).flops < 60 * once
    assert _plan.analyse(stage).exact


def test_deepsad_calls_what_is_planned(monkeypatch):
    config = DeepSADConfig(widths=(4, 4), rep_dim=8, epochs=2, batch_size=8)
    stage = _plan.deepsad_training(config, (8, 8, 3), 30)
    calls = []

    def step(state, x, labels, config, mesh):
        calls.append((shapes((state, x)), labels.shape, config))
        return state, np.float32(0)

    assert stage.function is deepsad._train_step_jit
    monkeypatch.setattr(deepsad, "_train_step_jit", step)
    own, real = np.ones((20, 8, 8, 3), np.float32), np.ones((10, 8, 8, 3), np.float32)
    deepsad.fit(jax.random.key(0), own, real, config)
    expected = (shapes(stage.arguments[:2]), stage.arguments[2].shape, stage.static["config"])
    assert calls == [expected] * stage.calls and stage.calls == 6


def test_a_latent_search_is_a_pass_forth_and_one_back():
    generator = _plan.abstract_generator(dcgan((16, 16, 3), latent_dim=24, features=(64, 48)))
    stage = _plan.latent_search(generator, 10, 7, 3, batch_size=8)
    assert stage.calls == 7 * 4
    forth = _plan.analyse(_plan.mean_activation(generator, 8, 8)).flops
    last = 2 * 8 * 48 * 3 * taps(8, 16, 4, 2, 1) ** 2
    assert 2 * (forth + last) * 0.98 < _plan.analyse(stage).flops < 2 * (forth + last) * 1.05


def test_a_regeneration_is_a_pass_forth_for_every_latent_number():
    generator = _plan.abstract_generator(dcgan((16, 16, 3), latent_dim=24, features=(64, 48)))
    stage = _plan.regeneration_search(generator, 10)
    assert stage.calls == 250
    forth = _plan.analyse(_plan.mean_activation(generator, 8, 8)).flops / 8
    last = 2 * 48 * 3 * taps(8, 16, 4, 2, 1) ** 2
    # The image itself and 24 directions; statistics of normalisation are in neither.
    assert 25 * (forth + last) * 0.98 < _plan.analyse(stage).flops < 25 * (forth + last) * 1.1


# The experiments.


@pytest.mark.parametrize("module", [demo, train_generator])
@pytest.mark.parametrize("preset", ["smoke", "demo", "paper"])
def test_every_preset_has_a_plan_of_real_calls(module, preset):
    stages = module.plan(_config.make_config(module, preset))
    assert len({stage.name for stage in stages}) == len(stages)
    for stage in stages:
        assert stage.calls > 0
        assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(stage.arguments))
        # Refused if the function does not take these arguments; not compiled.
        function = stage.function if hasattr(stage.function, "trace") else jax.jit(stage.function)
        function.trace(*stage.arguments, **stage.static)


@pytest.mark.parametrize("immunize, fits", [("same", 8), ("any", 1), ("none", 1)])
def test_a_detector_that_serves_all_columns_is_fitted_once(immunize, fits):
    changes = {"methods": ("one_class",), "seeds": (0,), "families": ("dcgan",)}
    config = _config.make_config(perturbed_samples, "demo")
    config = dataclasses.replace(config, immunize=immunize, ours=(), **changes)
    stages = {stage.name: stage for stage in perturbed_samples.plan(config)}
    learned = "DCGAN, one-class, network that learns images of altered copies: training step"
    assert stages[learned].calls == 900 * fits
    drawn = "DCGAN, one-class, network that draws own images again: training step"
    if immunize == "none":
        assert drawn not in stages
    else:
        assert stages[drawn].calls == 2000 * fits
        stage = stages[drawn]
        jax.jit(stage.function).trace(*stage.arguments)


def test_the_demo_that_trains_anew_plans_for_it():
    config = _config.make_config(demo, "smoke", retrain=True, tol=1e-2)
    stages = {stage.name: stage for stage in demo.plan(config)}
    for name in ("digits_dcgan_0", *config.rivals):
        assert stages[f"{name}: training step"].calls == zoo.record(name)["num_steps"]
    (inversion,) = (stage for stage in stages.values() if "inversion" in stage.name)
    assert inversion.at_most


def test_the_training_set_is_known_without_reading_it(tmp_path):
    for name in data.NAMES:
        size = 32
        assert (
            _plan.training_images(name, size, 7).shape
            == data.load(name, split="train", image_size=size, num_images=7).shape
        )
    assert _plan.training_images("digits", 32).shape == data.load("digits", split="train").shape
    data.write_images(tmp_path, np.zeros((10, 8, 8, 1), np.uint8))
    assert _plan.training_images(str(tmp_path), 8).shape == (8, 8, 8, 1)


def test_the_table_adds_up(monkeypatch):
    slow = _plan.Accelerator(1e3, 1e3, math.inf, math.inf, "float32")
    small = _plan.Accelerator(1e3, 1e3, math.inf, 1.0, "float32")
    monkeypatch.setattr(_plan, "ACCELERATORS", {"small": small})
    monkeypatch.setattr(_plan, "this_machine", lambda: slow)
    x = floats(10, 10)
    stages = [
        _plan.Stage("few", product, (x, x), 3, num_parameters=1234),
        _plan.Stage("many", product, (x, x), 27, at_most=True),
    ]
    text = _plan.report("--experiment=toy", stages)
    few, many = (line for line in text.splitlines() if line.startswith(("few", "many")))
    assert "1.23 k" in few and "6 k" in few and "6 s" in few and "too large" in few
    assert "<= 27" in many and "54 k" in many and "54 s" in many
    (total,) = (line for line in text.splitlines() if line.startswith("all"))
    assert "60 k" in total and "1 min" in total
    assert "lower bounds" in text and "small 1 kFLOP/s" in text


@pytest.mark.parametrize(
    "shared_by, num_devices, used", [(64, 8, 8), (64, 6, 4), (6, 4, 3), (1, 8, 1), (7, 8, 7)]
)
def test_devices_share_what_they_can_cut_into_equal_parts(shared_by, num_devices, used):
    stage = _plan.Stage("step", product, (), 1, shared_by=shared_by)
    assert _plan.share(stage, num_devices) == pytest.approx(1 / used)


def test_the_plan_for_several_devices_says_what_does_not_scale(monkeypatch):
    slow = _plan.Accelerator(1e3, 1e3, math.inf, math.inf, "float32")
    monkeypatch.setattr(_plan, "ACCELERATORS", {})
    monkeypatch.setattr(_plan, "this_machine", lambda: slow)
    x = floats(10, 10)
    stages = [
        _plan.Stage("together", product, (x, x), 8, shared_by=64),
        _plan.Stage("alone", product, (x, x), 3),
    ]
    text = _plan.report("--experiment=toy", stages, 8)
    # 2000 operations a call, 1000 a second: 16 s and 6 s; on eight devices 2 s and 6 s.
    one, eight = (line for line in text.splitlines() if line.startswith("all"))
    assert one.split()[-2:] == ["22", "s"] and "on one device" in one
    assert eight.split()[-2:] == ["8", "s"] and "on 8 devices" in eight
    rows = [line for line in text.splitlines() if line.startswith(("together", "alone"))]
    assert [row.split()[2] for row in rows] == ["8", "1"]
    assert "One device does alone: alone." in " ".join(text.split())
    # Those that are there are planned for by default: here one.
    assert "devices" not in _plan.report("--experiment=toy", stages, jax.device_count())
