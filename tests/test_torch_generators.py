"""Whole generators from PyTorch state dicts, against the PyTorch modules that they come from."""

import jax
import numpy as np
import pytest

from flipad_jax.generators import interop, torch_generators


def dcgan_arrays(seed=0):
    """A state dict of a DCGAN 5-7-6-3 for 16 x 16, with names whose order is not that of text."""
    rng = np.random.default_rng(seed)
    arrays, last = {}, 5
    for i, (width, position) in enumerate(((7, 0), (6, 9))):
        arrays[f"main.{position}.weight"] = 0.1 * rng.normal(size=(last, width, 4, 4))
        arrays[f"main.{position + 1}.weight"] = 1 + 0.1 * rng.normal(size=width)
        arrays[f"main.{position + 1}.bias"] = 0.1 * rng.normal(size=width)
        arrays[f"main.{position + 1}.running_mean"] = 0.1 * rng.normal(size=width)
        arrays[f"main.{position + 1}.running_var"] = rng.uniform(0.5, 2, width)
        last = width
    arrays["main.12.weight"] = 0.1 * rng.normal(size=(last, 3, 4, 4))
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def modules_of(name):
    torch = pytest.importorskip("torch")
    nn = torch.nn
    torch.manual_seed(0)
    if name == "dcgan":
        layers = [nn.Unflatten(1, (5, 1, 1))]
        last = 5
        for i, width in enumerate((8, 7, 6)):
            layers += [nn.ConvTranspose2d(last, width, 4, 1 + (i > 0), int(i > 0), bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            last = width
        model = nn.Sequential(*layers, nn.ConvTranspose2d(last, 3, 4, 2, 1, bias=False), nn.Tanh())
    else:

        class Lsgan(nn.Module):
            """The linear layer comes last by name, as in the published code."""

            def __init__(self):
                super().__init__()
                self.l1 = nn.Sequential(nn.Linear(5, 6 * 2 * 2))
                layers, last = [], 6
                for width in (6, 5, 4):
                    layers += [
                        nn.Upsample(scale_factor=2),
                        nn.Conv2d(last, width, 3, 1, 1, bias=False),
                    ]
                    layers += [nn.BatchNorm2d(width), nn.ReLU()]
                    last = width
                self.conv_blocks = nn.Sequential(*layers, nn.Conv2d(last, 1, 3, 1, 1), nn.Tanh())

            def forward(self, z):
                return self.conv_blocks(self.l1(z).reshape(len(z), 6, 2, 2))

        model = Lsgan()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 3  # its own initialisation draws grey
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.normal_(1, 0.1)
            module.bias.data.normal_(0, 0.1)
    return torch, model.eval()


@pytest.mark.parametrize("name", ["dcgan", "lsgan"])
def test_images_are_those_of_pytorch(name, tmp_path):
    torch, model = modules_of(name)
    z = torch.randn(4, 5)
    with torch.no_grad():
        expected = model(z).numpy().transpose(0, 2, 3, 1)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    generator = torch_generators.from_arrays(interop.read_arrays(tmp_path / "model.pth"))
    assert generator.image_shape == expected.shape[1:] and generator.latent_dim == 5
    found = jax.jit(generator.module.apply)(generator.variables, z.numpy())
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_widths_and_order_come_from_the_file():
    generator = torch_generators.from_arrays(dcgan_arrays())
    assert generator.image_shape == (16, 16, 3) and generator.module.features == (7, 6)
    arrays = dcgan_arrays()
    kernels = generator.variables["params"]["convolutions_1"]["kernel"]
    np.testing.assert_array_equal(kernels, arrays["main.9.weight"].transpose(2, 3, 0, 1))
    more = {**{f"netG.{k}": v for k, v in arrays.items()}, "netD.0.weight": np.zeros((2, 2, 4, 4))}
    again = torch_generators.from_arrays(more, prefix="netG.")
    jax.tree.map(np.testing.assert_array_equal, again.variables, generator.variables)


def test_what_is_no_such_generator_is_refused():
    arrays = dcgan_arrays()
    with pytest.raises(ValueError, match="found nothing"):
        torch_generators.from_arrays({})
    for changes, words in (
        ({"main.1.running_mean": None, "main.1.running_var": None}, "1 batch normalisations"),
        ({"main.1.bias": None}, "batch normalisation 1 has no bias"),
        ({"main.12.weight": np.zeros((6, 3, 5, 5))}, "params/last/kernel"),
        ({"main.12.bias": np.zeros(3)}, "has no params/last/bias"),
        ({"main.12.weight": np.full((6, 3, 4, 4), np.nan)}, "NaN"),
        ({"main.20.weight": np.zeros(3)}, "1 other layers"),
    ):
        changed = {**arrays, **changes}
        changed = {name: array for name, array in changed.items() if array is not None}
        with pytest.raises(ValueError, match=words):
            torch_generators.from_arrays(changed)
