"""Foreign generators: converted layers against PyTorch's and Flax's own, from_torch against the
module itself, and every mistake that is refused."""

import dataclasses
import functools
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import serialization

from flipad_jax import AttributorConfig, data, fit, score
from flipad_jax.generators import impostors, interop, sampling, zoo
from flipad_jax.generators.interop import torch_module
from flipad_jax.inversion import final_layer, linops
from flipad_jax.inversion.final_layer import FinalLayer

# (kernel, strides, padding, output_padding) with nothing alike on both axes.
ODD = [
    ((4, 4), (2, 2), (1, 1), (0, 0)),
    ((3, 5), (2, 3), (1, 0), (1, 2)),
    ((5, 2), (3, 1), (2, 1), (0, 0)),
]


@pytest.fixture(scope="module")
def torch():
    """PyTorch, or the test is skipped."""
    return pytest.importorskip("torch")


@functools.cache
def zoo_case():
    """A generator of the zoo as a stranger's: kernel, mean activation, images."""
    model = zoo.load("digits_dcgan_0")
    layer = sampling.final_layer(model)
    z_bar = np.asarray(sampling.mean_activation(model, jax.random.key(0), 500))
    return layer, z_bar, sampling.generate(model, jax.random.key(1), 300)


def images_like(shape, n=3):
    """Any uint8 images: for tests in which only their shape matters."""
    return np.random.default_rng(1).integers(0, 256, (n, *shape), np.uint8)


def save_arrays(state, path):
    """A state dict as .pth, .safetensors or .npz."""
    import torch

    if path.suffix == ".pth":
        torch.save(state, path)
    elif path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        np.savez(path, **{k: v.numpy() for k, v in state.items()})


def torch_images(out):
    """[n, c, h, w] of PyTorch as [n, h, w, c] on the host."""
    return np.moveaxis(out.detach().numpy(), 1, -1)


# --- arrays from files --------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("kind", ["conv_transpose", "conv", "dense"])
def test_layers_of_torch_files_compute_what_torch_computes(torch, tmp_path, kind, ending):
    for kernel, strides, padding, extra in ODD:
        torch.manual_seed(0)
        z = torch.randn(3, 4, 6, 7)
        if kind == "dense":
            module = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(4 * 6 * 7, 2 * 5 * 3))
            z = z.reshape(3, -1)
            out = module[1](z).reshape(3, 2, 5, 3)
            geometry = {}
        elif kind == "conv":
            module = torch.nn.Sequential(
                torch.nn.ReLU(), torch.nn.Conv2d(4, 2, kernel, strides, padding)
            )
            out, geometry = module[1](z), {"strides": strides, "padding": padding}
        else:
            module = torch.nn.Sequential(
                torch.nn.ReLU(), torch.nn.ConvTranspose2d(4, 2, kernel, strides, padding, extra)
            )
            out = module[1](z)
            geometry = {"strides": strides, "padding": padding, "output_padding": extra}
        path = tmp_path / f"weights{ending}"
        save_arrays(module.state_dict(), path)
        arrays = interop.read_arrays(path)
        assert set(arrays) == {"1.weight", "1.bias"}
        loaded = interop.final_layer(
            arrays,
            "1",
            layer=kind,
            mean_activation=z[0].numpy(),
            generated=images_like(torch_images(out).shape[1:]),
            activation="identity",
            **geometry,
        )
        assert loaded.z_bar.dtype == jnp.float32 and loaded.layer.operator.dtype == jnp.float32
        own = z.numpy()
        own = own[:, None, None] if kind == "dense" else np.moveaxis(own, 1, -1)
        np.testing.assert_array_equal(loaded.z_bar, own[0])
        made = jax.vmap(functools.partial(final_layer.forward, loaded.layer))(own)
        np.testing.assert_allclose(made, torch_images(out), atol=1e-5)
        assert any("1.bias lies beside 1.weight" in note for note in loaded.notes)


class FlaxNet(nn.Module):
    """Its last layer alone, under the name that trained models have."""

    make: object

    @nn.compact
    def __call__(self, z):
        return self.make(name="last")(z)


@pytest.mark.parametrize("kind", ["conv_transpose", "conv", "dense"])
def test_layers_of_flax_files_compute_what_flax_computes(tmp_path, kind):
    z = np.random.default_rng(0).standard_normal((3, 6, 7, 4)).astype(np.float32)
    strides = (2, 3)
    # The padding of the dilated input that goes with PyTorch's 1 and 0: kernel - 1 - padding.
    make, geometry = {
        "conv_transpose": (
            functools.partial(nn.ConvTranspose, 2, (3, 4), strides, [(1, 1), (3, 3)]),
            {"strides": strides, "padding": (1, 0)},
        ),
        "conv": (
            functools.partial(nn.Conv, 2, (3, 4), strides, [(1, 1), (0, 0)]),
            {"strides": strides, "padding": (1, 0)},
        ),
        "dense": (functools.partial(nn.Dense, 5 * 3 * 2), {}),
    }[kind]
    module = FlaxNet(functools.partial(make, bias_init=nn.initializers.normal()))
    inputs = z.reshape(3, -1) if kind == "dense" else z
    variables = module.init(jax.random.key(0), inputs)
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), variables)
    out = module.apply(variables, inputs)
    out = out.reshape(3, 5, 3, 2) if kind == "dense" else out
    path = tmp_path / "weights.msgpack"
    path.write_bytes(serialization.msgpack_serialize(variables))
    arrays = interop.read_arrays(path)
    assert set(arrays) == {"params/last/kernel", "params/last/bias"}
    loaded = interop.final_layer(
        arrays,
        "params/last",
        layer=kind,
        layout="flax",
        mean_activation=inputs[0],
        generated=images_like(out.shape[1:]),
        activation="identity",
        **geometry,
    )
    own = inputs[:, None, None] if kind == "dense" else inputs
    made = jax.vmap(functools.partial(final_layer.forward, loaded.layer))(own)
    np.testing.assert_allclose(made, out, atol=1e-5)


def test_orientation_of_a_flax_kernel_is_read_off_the_images():
    layer, z_bar, generated = zoo_case()
    kernel = np.asarray(layer.operator.kernel)
    for stored, words in (
        (kernel, "taken as it is"),
        (kernel[::-1, ::-1], "flipped, as Flax holds it"),
    ):
        loaded = interop.final_layer(
            {"kernel": stored},
            "kernel",
            layer="conv_transpose",
            layout="flax",
            mean_activation=z_bar,
            generated=generated,
            strides=2,
            padding=1,
        )
        np.testing.assert_array_equal(loaded.layer.operator.kernel, kernel)
        (note,) = loaded.notes
        assert words in note and loaded.warnings == ()
    # Nothing to tell by: a kernel that is its own mirror image.
    loaded = interop.final_layer(
        {"kernel": kernel + kernel[::-1, ::-1]},
        "kernel",
        layer="conv_transpose",
        layout="flax",
        mean_activation=z_bar,
        generated=generated,
        strides=2,
        padding=1,
    )
    warning = loaded.warnings[0]
    assert "flipped, as Flax holds it" in warning and "does not tell which" in warning


def test_nested_state_dicts_half_precision_and_what_is_no_float(torch, tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2))
    state = {f"module.{k}": v for k, v in module.state_dict().items()}
    state["module.0.weight"] = state["module.0.weight"].to(torch.bfloat16)
    state["module.0.bias"] = state["module.0.bias"].double()
    torch.save({"epoch": 3, "generator": state, "name": "x"}, tmp_path / "a.pt")
    arrays = interop.read_arrays(tmp_path / "a.pt")
    assert "generator.module.1.num_batches_tracked" not in arrays and len(arrays) == 6
    weight = arrays["generator.module.0.weight"]
    assert weight.dtype == np.float32 and arrays["generator.module.0.bias"].dtype == np.float64
    np.testing.assert_array_equal(weight, state["module.0.weight"].float().numpy())
    from safetensors.torch import save_file

    save_file({"a": state["module.0.weight"], "n": torch.arange(3)}, tmp_path / "a.safetensors")
    arrays = interop.read_arrays(tmp_path / "a.safetensors")
    assert list(arrays) == ["a"] and arrays["a"].dtype == np.float32
    np.testing.assert_array_equal(arrays["a"], weight)


def test_orbax_folders(tmp_path):
    import orbax.checkpoint as ocp

    from flipad_jax import checkpoints

    tree = {
        "params": {"last": {"kernel": jnp.arange(6.0).reshape(2, 3)}},
        "half": jnp.ones(2, jnp.bfloat16),
        "step": jnp.int32(3),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "single", tree)
    for step in (9, 10):
        checkpoints.save(tmp_path / "manager", step, jax.tree.map(lambda x: x + step, tree))
    for folder, offset in (("single", 0), ("manager", 10), ("manager/9", 9)):
        arrays = interop.read_arrays(tmp_path / folder)
        assert set(arrays) == {"params/last/kernel", "half"}
        assert arrays["half"].dtype == np.float32
        np.testing.assert_array_equal(
            arrays["params/last/kernel"], np.arange(6.0).reshape(2, 3) + offset
        )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: the folder holds no Orbax checkpoint"):
        interop.read_arrays(tmp_path / "empty")


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_pickle_is_refused_and_does_not_run(torch, tmp_path):
    mark = tmp_path / "mark"
    torch.save({"w": torch.ones(2), "evil": Malicious(mark)}, tmp_path / "evil.pth")
    (tmp_path / "raw.bin").write_bytes(pickle.dumps({"w": Malicious(mark)}, protocol=2))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")  # A whole module.
    for name in ("evil.pth", "raw.bin", "module.pth"):
        with pytest.raises(ValueError, match=r"torch.save\(module.state_dict\(\), ...\)") as error:
            interop.read_arrays(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not mark.exists()
    np.savez(tmp_path / "evil.npz", w=np.array([Malicious(mark)], dtype=object))
    with pytest.raises(ValueError, match="evil.npz cannot be read"):
        interop.read_arrays(tmp_path / "evil.npz")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malicious(mark)))  # It would have been noticed.
    assert mark.exists()


def test_files_that_cannot_be_read(torch, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere.pth: there is no such"):
        interop.read_arrays(tmp_path / "nowhere.pth")
    (tmp_path / "a.h5").write_bytes(b"x")
    with pytest.raises(ValueError, match="a.h5: unknown ending; weights are read from .safetens"):
        interop.read_arrays(tmp_path / "a.h5")
    torch.save({"w": torch.ones(1000)}, tmp_path / "good.pth")
    np.savez(tmp_path / "good.npz", w=np.ones(1000))
    for ending in (".safetensors", ".npz", ".pth", ".msgpack"):
        path = tmp_path / f"broken{ending}"
        good = tmp_path / f"good{ending}"
        path.write_bytes(good.read_bytes()[:500] if good.exists() else b"\x93nonsense")
        with pytest.raises(ValueError, match="broken") as error:
            interop.read_arrays(path)
        assert "damaged" in str(error.value) and "\n" not in str(error.value)
    np.savez(tmp_path / "ints.npz", n=np.arange(3))
    with pytest.raises(ValueError, match="ints.npz holds no floating array"):
        interop.read_arrays(tmp_path / "ints.npz")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"good.pth: .*pip install 'flipad_jax\[torch\]'"):
        interop.read_arrays(tmp_path / "good.pth")


# --- mistakes in the description of a layer -----------------------------------------------------


def described(**changes):
    """A correct description of a small layer, with changes."""
    arguments = {
        "arrays": {
            "main.3.weight": np.ones((4, 2, 3, 3), np.float32),
            "main.3.bias": np.ones(2, np.float32),
            "main.0.weight": np.ones((4, 4), np.float32),
        },
        "last_layer": "main.3",
        "layer": "conv_transpose",
        "mean_activation": np.ones((4, 5, 6), np.float32),
        "generated": images_like((10, 12, 2)),
        "strides": 2,
        "padding": 1,
        "output_padding": 1,
    } | changes
    arrays, last = arguments.pop("arrays"), arguments.pop("last_layer")
    return interop.final_layer(arrays, last, **arguments)


def test_the_description_that_the_next_test_breaks_is_right():
    loaded = described()
    assert loaded.layer.operator.output_shape == (10, 12, 2)
    assert loaded.layer.bias.shape == (2,)
    assert described(last_layer="main.3.weight", bias="main.3.bias").layer.bias.shape == (2,)


NAN = np.full((4, 5, 6), np.nan, np.float32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"last_layer": "mian.3"}, r"'mian.3'; did you mean main.3[.? ].* There are main.3"),
        ({"last_layer": "zzz"}, r"no array or layer 'zzz'; There are main.3.weight \[4, 2, 3, 3\]"),
        ({"layer": "pool"}, "layer='pool': expected one of conv_transpose, conv, dense"),
        ({"layout": "tf"}, "layout='tf': expected one of torch, flax, flipad"),
        ({"activation": "relu"}, "activation='relu': expected one of tanh, sigmoid, identity"),
        ({"bias": "main.3.bais"}, "no array 'main.3.bais' for the bias; did you mean main.3.bias"),
        ({"bias": "main.0.weight"}, r"bias main.0.weight has shape \[4, 4\], expected \[2\]"),
        ({"last_layer": "main.0"}, r"main.0.weight has shape \[4, 4\], expected \[in, out, kh, kw"),
        ({"mean_activation": NAN}, "the mean activation holds NaN"),
        ({"mean_activation": np.ones((4, 5, 6), int)}, "mean activation is int64, expected float"),
        (
            {"mean_activation": np.ones((5, 6))},
            r"mean activation has shape \[5, 6\], expected \[c, h, w\]",
        ),
        ({"mean_activation": np.ones((5, 6, 4))}, r"2 channels of 4, but .* is \[6, 4, 5\]"),
        ({"generated": np.zeros((3, 10, 12, 2))}, r"generated images are float64\[3, 10, 12, 2\]"),
        ({"generated": images_like((10, 12, 2), 1)}, "n of 2 or more"),
        (
            {"generated": images_like((10, 12, 3)), "bias": None},
            r"bias main.3.bias has shape \[2\]",
        ),
        (
            {"generated": images_like((10, 13, 2))},
            r"kernel 3x3, strides=2, padding=1, output_padding=1 makes \[10, 12, 2\] of a mean "
            r"activation \[5, 6, 4\], but the images are \[10, 13, 2\]; check strides, padding and "
            "output_padding",
        ),
        ({"output_padding": 2}, "output_padding=2 must be smaller than strides=2"),
        ({"layer": "conv"}, r"channels of 2, but the mean activation"),
    ],
)
def test_wrong_descriptions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        described(**changes)
    assert "\n" not in str(error.value)


def test_more_wrong_descriptions():
    weights = np.ones((2, 4, 3, 3), np.float32)
    with pytest.raises(ValueError, match="output_padding belongs to a conv_transpose"):
        described(layer="conv", arrays={"w": weights}, last_layer="w")
    with pytest.raises(ValueError, match="w holds NaN or values beyond float32: 1 of 72"):
        bad = np.ones((4, 2, 3, 3))
        bad[0, 0, 0, 0] = 1e60
        described(arrays={"w": bad}, last_layer="w")
    with pytest.raises(ValueError, match=r"w makes 7 numbers, the images \[10, 12, 2\] have 240"):
        described(layer="dense", arrays={"w": np.ones((7, 3))}, last_layer="w")
    with pytest.raises(ValueError, match="makes 240 numbers of 3, but the mean activation has 120"):
        described(layer="dense", arrays={"w": np.ones((240, 3))}, last_layer="w")


# --- does the layer fit the images? --------------------------------------------------------------


def test_mismatch_tells_right_from_wrong():
    layer, z_bar, generated = zoo_case()
    kernel = np.asarray(layer.operator.kernel)
    other = np.asarray(sampling.final_layer(zoo.load("digits_dcgan_1")).operator.kernel)

    def mismatch(kernel=kernel, padding=1, bias=None, activation="tanh", z_bar=z_bar):
        operator = linops.conv_transpose(kernel, (16, 16, 64), strides=2, padding=padding)
        made = FinalLayer(operator=operator, bias=bias, activation=activation)
        return interop.mean_mismatch(made, z_bar, generated)

    assert mismatch() < interop.MISMATCH_BOUND
    wrong = {
        "flipped": mismatch(kernel[::-1, ::-1]),
        "rows and columns exchanged": mismatch(kernel.transpose(1, 0, 2, 3)),
        "another seed": mismatch(other),
        "shifted": mismatch(padding=((0, 2), (0, 2))),
        "bias": mismatch(bias=jnp.ones(1, jnp.float32)),
        "sigmoid": mismatch(activation="sigmoid"),
        "z_bar": mismatch(z_bar=z_bar[:, :, ::-1].copy()),
        "z_bar transposed": mismatch(z_bar=z_bar.transpose(1, 0, 2)),
    }
    assert all(value > interop.MISMATCH_BOUND for value in wrong.values()), wrong


def test_mismatch_of_a_model_with_one_known_answer():
    # Normal activations, identity: mean off by exactly half a spread.
    rng = np.random.default_rng(0)
    layer = FinalLayer(linops.conv(np.ones((1, 1, 1, 1), np.float32), (8, 8, 1)), None, "identity")
    images = data.to_uint8(0.2 * rng.standard_normal((900, 8, 8, 1)))
    assert interop.mean_mismatch(layer, np.zeros((8, 8, 1)), images) < 0.02
    off = interop.mean_mismatch(layer, np.full((8, 8, 1), 0.1), images)
    assert off == pytest.approx(0.5, abs=0.03)
    with_bias = dataclasses.replace(layer, bias=jnp.full(1, 0.1, jnp.float32))
    assert interop.mean_mismatch(with_bias, np.full((8, 8, 1), -0.1), images) < 0.02
    # Half of the values beyond white: the hidden part is accounted for.
    bright = data.to_uint8(1 + 0.2 * rng.standard_normal((900, 8, 8, 1)))
    assert interop.mean_mismatch(layer, np.ones((8, 8, 1)), bright) < 0.03
    assert interop.mean_mismatch(layer, np.full((8, 8, 1), 0.7), bright) > 0.4
    grey = np.full((3, 8, 8, 1), 128, np.uint8)
    assert interop.mean_mismatch(layer, np.zeros((8, 8, 1)), grey) == np.inf


def test_a_layer_that_does_not_fit_gets_a_note():
    layer, z_bar, generated = zoo_case()
    kernel = np.asarray(layer.operator.kernel)
    described = functools.partial(
        interop.final_layer,
        layer="conv_transpose",
        layout="flipad",
        mean_activation=z_bar,
        generated=generated,
        strides=2,
        padding=1,
    )
    assert described({"kernel": kernel}, "kernel").warnings == ()
    (warning,) = described({"kernel": kernel[::-1, ::-1]}, "kernel").warnings
    assert "does not fit the images: their mean is off by 0." in warning


# --- live modules ---------------------------------------------------------------------------------


def dcgan(torch, last=None, after=None, seed=0):
    """A small DCGAN with running statistics that a training has left, [n, 5, 1, 1] -> 12 x 12."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential()
    module.add_module("first", torch.nn.ConvTranspose2d(5, 6, 3))
    module.add_module("norm", torch.nn.BatchNorm2d(6))
    module.add_module("relu", torch.nn.ReLU())
    module.add_module("middle", torch.nn.ConvTranspose2d(6, 7, 4, 2, 1))
    module.add_module("relu2", torch.nn.ReLU())
    module.add_module("last", last or torch.nn.ConvTranspose2d(7, 3, 4, 2, 1))
    module.add_module("after", after or torch.nn.Tanh())
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor.mul_(3 if "last" in name else 2)
        module.norm.bias.normal_()
        module.train()(torch.randn(50, 5, 1, 1))
    return module


def sample_of(torch, *shape):
    """Latents, each from its number."""

    def sample(start, count):
        return torch.stack(
            [
                torch.randn(*shape, generator=torch.Generator().manual_seed(i))
                for i in range(start, start + count)
            ]
        )

    return sample


def from_torch(torch, module, last="last", shape=(5, 1, 1), **options):
    """`interop.from_torch` in small."""
    options = {"num_images": 30, "num_mean": 50, "batch_size": 20} | options
    options = {"sample": sample_of(torch, *shape)} | options
    return interop.from_torch(module, last, **options)


def test_from_torch_gives_what_the_module_computes(torch):
    module = dcgan(torch)
    module.train()
    module.norm.eval()
    module.last.training = True
    flags = [part.training for part in module.modules()]
    done = []
    imported = from_torch(torch, module, progress=lambda *row: done.append(row))
    assert [part.training for part in module.modules()] == flags
    assert done[-1] == ("making own images", 50, 50)
    module.eval()
    with torch.no_grad():
        latents = sample_of(torch, 5, 1, 1)(0, 50)
        activations = module[:5](latents)
        images = np.rint((torch_images(module(latents)) + 1) * 127.5)
    assert imported.generated.dtype == np.uint8 and imported.impostors is None
    assert np.abs(imported.generated - images[:30]).max() <= 1
    assert np.mean(imported.generated != images[:30]) < 1e-3
    mean = np.moveaxis(activations.double().mean(0).numpy(), 0, -1)
    np.testing.assert_allclose(imported.z_bar, mean, atol=1e-6)
    assert imported.z_bar.dtype == jnp.float32
    made = jax.vmap(functools.partial(final_layer.forward, imported.layer))(
        np.moveaxis(activations.numpy(), 1, -1)
    )
    np.testing.assert_allclose(made, torch_images(module(latents)), atol=1e-5)
    assert imported.notes == ("the last activation is tanh",)


def test_from_torch_does_not_depend_on_the_batch_size(torch):
    module = dcgan(torch)
    one, two = (from_torch(torch, module, num_mean=25, batch_size=size) for size in (7, 64))
    with torch.no_grad():
        mean = module.eval()[:5](sample_of(torch, 5, 1, 1)(0, 25)).mean(0).numpy()
    np.testing.assert_allclose(one.z_bar, np.moveaxis(mean, 0, -1), atol=1e-6)
    np.testing.assert_allclose(one.z_bar, two.z_bar, atol=1e-6)
    assert np.abs(one.generated.astype(int) - two.generated).max() <= 1
    assert np.mean(one.generated != two.generated) < 1e-3


def last_layers(torch):
    """Last layers of all kinds for 12 x 12 or so, from maps [7, 6, 6]."""
    nn_ = torch.nn
    return {
        "conv_transpose": nn_.ConvTranspose2d(7, 3, (3, 5), (2, 3), (1, 0), (1, 2), bias=False),
        "conv": nn_.Conv2d(7, 1, (3, 2), (1, 2), (1, 0)),
        "same": nn_.Conv2d(7, 3, (4, 3), padding="same"),
        "valid": nn_.Conv2d(7, 3, 3, padding="valid"),
        "dense": nn_.Sequential(nn_.Flatten(), nn_.Linear(7 * 36, 3 * 4 * 5)),
    }


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", ["conv_transpose", "conv", "same", "valid", "dense"])
def test_from_torch_reads_the_geometry_of_every_kind(torch, kind):
    last = last_layers(torch)[kind]
    name, after = "last", torch.nn.Tanh()
    if kind == "dense":
        name, after = "last.1", torch.nn.Sequential(torch.nn.Unflatten(1, (3, 4, 5)), after)
    module = dcgan(torch, last, after)
    imported = from_torch(torch, module, name)
    module.eval()
    with torch.no_grad():
        latents = sample_of(torch, 5, 1, 1)(0, 4)
        z = module[:5](latents).numpy()
        images = torch_images(module(latents))
    z = z.reshape(4, 1, 1, -1) if kind == "dense" else np.moveaxis(z, 1, -1)
    made = jax.vmap(functools.partial(final_layer.forward, imported.layer))(z)
    np.testing.assert_allclose(made, images, atol=1e-5)
    assert imported.z_bar.shape == z.shape[1:]


def test_output_size_of_a_call_is_what_counts(torch):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = dcgan(torch)[:5]
            self.last = torch.nn.ConvTranspose2d(7, 3, 3, 2, 1)

        def forward(self, latents):
            return torch.tanh(self.last(self.body(latents), output_size=(12, 11)))

    imported = from_torch(torch, Net())
    assert imported.layer.operator.output_shape == (12, 11, 3)


@pytest.mark.parametrize(
    "name, function, zero_to_one",
    [
        ("tanh", "tanh", False),
        ("sigmoid", "sigmoid", True),
        ("identity", "identity", False),
        ("tanh", "half", True),
        ("sigmoid", "doubled", False),
        ("identity", "clipped", False),
    ],
)
def test_the_last_activation_is_found(torch, name, function, zero_to_one):
    class After(torch.nn.Module):
        def forward(self, a):
            return {
                "tanh": lambda: torch.tanh(a),
                "sigmoid": lambda: torch.sigmoid(a),
                "identity": lambda: a,
                "half": lambda: 0.5 * torch.tanh(a) + 0.5,
                "doubled": lambda: 2 * torch.sigmoid(a) - 1,
                "clipped": lambda: a.clamp(-1, 1),
            }[function]()

    module = dcgan(torch, after=After())
    imported = from_torch(torch, module)
    assert imported.layer.activation == name
    with torch.no_grad():
        images = torch_images(module.eval()(sample_of(torch, 5, 1, 1)(0, 30)))
    images = images if not zero_to_one else 2 * images - 1
    outside = np.mean(np.abs(images) > 1)
    levels = np.rint(np.clip((images + 1) * 127.5, 0, 255))
    assert np.abs(imported.generated - levels).max() <= 1
    assert np.mean(imported.generated != levels) < 1e-3
    if function == "identity":
        assert outside > 0 and f"{outside:.2%} of the values" in imported.notes[1]
    else:
        assert len(imported.notes) == 1
    other = "tanh" if name != "tanh" else "sigmoid"
    with pytest.raises(ValueError, match=f"{other} comes closest and is off by"):
        from_torch(torch, module, activation=other)


def test_modules_that_cannot_be_inverted_are_refused(torch):
    nn_ = torch.nn

    class Residual(nn_.Module):
        def forward(self, a):
            return torch.tanh(a) + 0.1 * torch.tanh(a).roll(1, -1)

    class Noise(nn_.Module):
        def forward(self, a):
            return torch.tanh(a + torch.randn_like(a))

    class Twice(nn_.Module):
        def __init__(self):
            super().__init__()
            self.last = nn_.Conv2d(3, 3, 3, padding=1)

        def forward(self, latents):
            return torch.tanh(self.last(self.last(latents.expand(-1, 3, 4, 4))))

    class Scaled(nn_.ConvTranspose2d):
        def forward(self, z):
            return 2 * super().forward(z)

    class Everything(nn_.Module):
        def forward(self, a):
            return a, a

    def conv(**options):
        return nn_.Conv2d(7, 7, 3, padding=1, **options)

    plain = dcgan(torch)
    cases = [
        (plain, "lst", "'lst' is no ConvTranspose2d.*none of that name.*: 'last', 'middle', 'fi"),
        (plain, "norm", "'norm' is no ConvTranspose2d.*it is a BatchNorm2d"),
        (plain, "middle", r"'middle' makes \[20, 7, 6, 6\] but the module \[20, 3, 12, 12\]"),
        (dcgan(torch, conv(groups=7)), "last", "groups=7; only groups=1"),
        (dcgan(torch, conv(dilation=2)), "last", r"dilation=\(2, 2\); only dilation=1"),
        (dcgan(torch, conv(padding_mode="reflect")), "last", "padding_mode=reflect; only"),
        (dcgan(torch, after=nn_.ReLU()), "last", "cannot be inverted .ReLU. and nothing added"),
        (dcgan(torch, after=Residual()), "last", r"tanh comes closest and is off by up to 0\.\d+"),
        (dcgan(torch, after=Noise()), "last", "another image of the same input every time"),
        (dcgan(torch, after=nn_.Upsample(scale_factor=2)), "last", "resized or cropped"),
        (dcgan(torch, after=Everything()), "last", "the module returns tuple, expected"),
        (dcgan(torch, Scaled(7, 3, 4, 2, 1)), "last", "does not compute what its weights say"),
        (
            nn_.Sequential(
                nn_.BatchNorm2d(5, track_running_stats=False), *dcgan(torch), nn_.Identity()
            ),
            "6",
            "an image depends on the others of its batch",
        ),
    ]
    for module, last, message in cases:
        module.train()
        with pytest.raises(ValueError, match=message):
            from_torch(torch, module, last)
        assert all(part.training for part in module.modules())
    with pytest.raises(ValueError, match="the last layer runs 2 times in a forward pass"):
        from_torch(torch, Twice(), shape=(1, 4, 4))
    broken = dcgan(torch)
    with torch.no_grad():
        broken.first.weight[0] = float("nan")
    with pytest.raises(ValueError, match="the module makes NaN"):
        from_torch(torch, broken)


def test_wrong_samples_and_numbers_are_refused(torch):
    module = dcgan(torch)
    with pytest.raises(ValueError, match=r"sample\(0, 20\) must return .* 20 rows; got \[3, 5"):
        from_torch(torch, module, sample=lambda start, count: torch.zeros(3, 5, 1, 1))
    with pytest.raises(ValueError, match="got ndarray"):
        from_torch(torch, module, sample=lambda start, count: np.zeros((count, 5, 1, 1)))
    with pytest.raises(ValueError, match="inputs must depend on their numbers alone"):
        from_torch(torch, module, sample=lambda start, count: torch.randn(count, 5, 1, 1))
    for wrong in ({"num_images": 2}, {"num_mean": 0}, {"num_impostors": -1}, {"batch_size": 2}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            from_torch(torch, module, **wrong)
    with pytest.raises(ValueError, match="activation='relu': expected one of tanh"):
        from_torch(torch, module, activation="relu")


def test_modules_of_several_inputs(torch):
    class Conditional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = dcgan(torch)
            self.label = torch.nn.Embedding(3, 5)

        def forward(self, latents, labels):
            return self.body(latents + self.label(labels)[:, :, None, None])

    module, latents = Conditional(), sample_of(torch, 5, 1, 1)

    def sample(start, count):
        return latents(start, count), torch.arange(start, start + count) % 3

    imported = from_torch(torch, module, "body.last", sample=sample)
    with torch.no_grad():
        images = torch_images(module.eval()(*sample(0, 30)))
    assert np.abs(imported.generated - np.rint((images + 1) * 127.5)).max() <= 1


# --- impostors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["conv_transpose", "dense"])
def test_impostors_are_almost_ours(torch, kind):
    last = last_layers(torch)[kind]
    name, after = "last", torch.nn.Tanh()
    if kind == "dense":
        name, after = "last.1", torch.nn.Sequential(torch.nn.Unflatten(1, (3, 4, 5)), after)
    module = dcgan(torch, last, after).eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    imported = from_torch(torch, module, name, num_impostors=200)
    assert imported.impostors.shape == (200, *imported.generated.shape[1:])
    assert all((v == before[k]).all() for k, v in module.state_dict().items())
    with torch.no_grad():
        latents = sample_of(torch, 5, 1, 1)(50, 200)
        ours = np.rint((torch_images(module(latents)) + 1) * 127.5).reshape(200, -1)
    theirs = imported.impostors.reshape(200, -1).astype(float)
    for part in (slice(0, 128), slice(128, 200)):
        # Changed, and yet the pictures of the same latents.
        assert np.mean(theirs[part] != ours[part]) > 0.1
        assert np.corrcoef(theirs[part].ravel(), ours[part].ravel())[0, 1] > 0.3
    again = from_torch(torch, module, name, num_impostors=130, batch_size=9).impostors
    np.testing.assert_array_equal(again, imported.impostors[:130])
    other = from_torch(torch, module, name, num_impostors=128, seed=1).impostors
    assert np.mean(other != imported.impostors[:128]) > 0.1


def test_hidden_layers_before_the_last_change_and_nothing_else(torch):
    module = dcgan(torch).eval()
    seen = set()
    with torch.no_grad():
        for seed in range(30):
            changed = torch_module._changed_copy(module, "last", np.random.default_rng(seed), 0.6)
            assert changed.norm.training and not changed.last.training
            before, after = module.state_dict(), changed.state_dict()
            moved = {name for name in before if (before[name] != after[name]).any()}
            assert moved <= {"first.weight", "middle.weight", "norm.weight", "norm.bias"}
            weights = moved & {"first.weight", "middle.weight"}
            assert weights and len(moved - weights) in (0, 2)
            seen.add((len(weights), len(moved - weights)))
            for name in weights:
                assert 0.7 < float(after[name].std() / before[name].std()) < 1.3
    assert seen == {(1, 0), (1, 2), (2, 0), (2, 2)}
    with pytest.raises(ValueError, match="no ConvTranspose2d, Conv2d or Linear comes before"):
        torch_module._changed_copy(module, "first", np.random.default_rng(0), 0.5)


def test_refitting_a_convolution_and_a_stride_that_does_not_divide():
    rng = np.random.default_rng(0)
    cases = [
        (linops.conv, {"strides": (2, 3), "padding": (0, 1)}, (7, 8, 3)),
        (linops.conv_transpose, {"strides": (2, 3), "padding": 2}, (5, 4, 3)),
    ]
    for build, geometry, shape in cases:
        kernels = rng.standard_normal((2, 3, 3, 3, 2)).astype(np.float32)
        op, true = (build(kernel, shape, **geometry) for kernel in kernels)
        activations = jnp.asarray(rng.standard_normal((80, *shape)), jnp.float32)
        wanted = jax.vmap(true.forward)(activations)
        found = jax.jit(impostors._refitted)(op, activations, wanted, jnp.float32(1e-7))
        np.testing.assert_allclose(found, true.kernel, atol=1e-3)


# --- files without PyTorch, and the attributor ----------------------------------------------------


@pytest.mark.parametrize("kind", ["conv_transpose", "conv", "same", "dense"])
def test_what_is_written_reads_back_as_the_same_layer(torch, tmp_path, kind):
    if kind == "conv_transpose":
        last = torch.nn.ConvTranspose2d(7, 3, 5, 3, 2, 1)
    elif kind == "conv":
        last = torch.nn.Conv2d(7, 1, 3, 2, 1)
    else:
        last = last_layers(torch)["dense"]
    if kind == "same":
        last = torch.nn.Conv2d(7, 3, 3, padding="same")
    name, after = "last", torch.nn.Tanh()
    if kind == "dense":
        name, after = "last.1", torch.nn.Sequential(torch.nn.Unflatten(1, (3, 4, 5)), after)
    number = 5 if kind == "conv" else 0
    imported = from_torch(torch, dcgan(torch, last, after), name, num_impostors=number)
    interop.write(imported, tmp_path / "out")
    folder = tmp_path / "out"
    lines = (folder / "fit.flags").read_text().splitlines()
    flags = dict(line.removeprefix("--").split("=", 1) for line in lines)
    geometry = {
        "conv_transpose": {"strides": "3", "padding": "2", "output_padding": "1"},
        "conv": {"strides": "2", "padding": "1", "impostors": str(folder / "impostors")},
        "same": {"strides": "1", "padding": "1"},
        "dense": {"strides": "1", "padding": "0"},
    }[kind]
    layer = "conv" if kind == "same" else kind
    assert flags == geometry | {
        "generator": str(folder / "last_layer.safetensors"),
        "last_layer": "kernel",
        "layer": layer,
        "layout": "flipad",
        "activation": "tanh",
        "mean_activation": str(folder / "mean_activation.npy"),
        "generated": str(folder / "generated"),
    }
    images = data.read_images(flags["generated"]).images
    np.testing.assert_array_equal(images, imported.generated)
    if kind == "conv":
        written = data.read_images(flags["impostors"]).images
        np.testing.assert_array_equal(written, imported.impostors)
    numbers = {k: int(v) for k, v in flags.items() if k in ("strides", "padding", "output_padding")}
    loaded = interop.final_layer(
        interop.read_arrays(flags["generator"]),
        flags["last_layer"],
        layer=flags["layer"],
        layout=flags["layout"],
        activation=flags["activation"],
        mean_activation=np.load(flags["mean_activation"], allow_pickle=False),
        generated=images,
        **numbers,
    )
    np.testing.assert_array_equal(loaded.z_bar, imported.z_bar)
    z = jax.random.normal(jax.random.key(0), imported.z_bar.shape, jnp.float32)
    np.testing.assert_array_equal(
        final_layer.forward(loaded.layer, z), final_layer.forward(imported.layer, z)
    )
    assert [path.name for path in folder.rglob("*.partial")] == []
    with pytest.raises(ValueError, match="generated holds files already"):
        interop.write(imported, folder)


def test_geometry_that_no_single_number_says_is_not_written(torch, tmp_path):
    for last in (
        torch.nn.ConvTranspose2d(7, 3, 4, (2, 1), 1),
        torch.nn.Conv2d(7, 3, 4, padding="same"),
    ):
        imported = from_torch(torch, dcgan(torch, last))
        with pytest.raises(ValueError, match="cannot be written as one number each"):
            interop.write(imported, tmp_path / "out")
    imported = from_torch(torch, dcgan(torch, torch.nn.Conv2d(7, 2, 3, padding=1)))
    with pytest.raises(ValueError, match="1 or 3 channels, not 2"):
        interop.write(imported, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scores_are_those_of_a_layer_built_by_hand(torch):
    module = dcgan(torch)
    imported = from_torch(torch, module, num_images=160, num_mean=160)
    kernel = module.last.weight.detach().numpy().transpose(2, 3, 0, 1)
    operator = linops.conv_transpose(kernel, (6, 6, 7), strides=2, padding=1)
    layer = FinalLayer(operator, jnp.asarray(module.last.bias.detach().numpy()), "tanh")
    with torch.no_grad():
        latents = sample_of(torch, 5, 1, 1)(0, 160)
        z_bar = np.moveaxis(module.eval()[:5](latents).mean(0).numpy(), 0, -1)
    config = AttributorConfig(
        max_iters=10, batch_size=16, num_altered=0
    )  # One size of batches: compiled once.
    suspects = from_torch(torch, dcgan(torch, seed=1)).generated
    scores = [
        score(fit(*args, imported.generated, rng=jax.random.key(0), config=config), suspects)
        for args in ((imported.layer, imported.z_bar), (layer, z_bar))
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)
