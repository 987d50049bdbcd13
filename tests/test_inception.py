"""Inception-V3 against an implementation in torch.nn; the loader of weights."""

import jax
import numpy as np
import pytest

from flipad_jax import inception
from flipad_jax.inception import InceptionV3

SHAPE = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)


@pytest.fixture(scope="module")
def zeros():
    """Arrays of the right names and shapes."""
    shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), SHAPE)
    leaves = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        *modules, name = [entry.key for entry in path[1:]]
        shape = tuple(leaf.shape[axis] for axis in ((3, 2, 0, 1) if leaf.ndim == 4 else (0,)))
        arrays[".".join([*modules, leaves.get(name, name)])] = np.zeros(shape, np.float32)
    return arrays


def test_size_of_the_network(zeros):
    # Torchvision publishes 27 161 264 parameters: 2 049 000 of its last layer, 3 326 696 of the
    # auxiliary one, and these.
    trained = [array.size for name, array in zeros.items() if ".running_" not in name]
    assert sum(trained) == 27_161_264 - 2_049_000 - 3_326_696
    assert zeros["Mixed_6c.branch7x7_2.conv.weight"].shape == (160, 160, 1, 7)
    network = inception.from_arrays(zeros)
    for layer, shape in (("Mixed_5d", (1, 35, 35, 288)), ("pool3", (1, 2048))):
        made = jax.eval_shape(lambda x, at=layer: inception.features(network, x, layer=at), SHAPE)
        assert made.shape == shape and made.dtype == np.float32


def test_what_does_not_fit_is_named(zeros, tmp_path):
    arrays = dict(zeros)
    arrays |= {"AuxLogits.fc.weight": np.zeros(3), "fc.bias": np.zeros(1008)}  # left aside
    inception.from_arrays(arrays)
    del arrays["Mixed_7c.branch_pool.bn.bias"], arrays["Conv2d_1a_3x3.conv.weight"]
    arrays["Mixed_5b.branch1x1.conv.weight"] = np.zeros((1, 1, 192, 64), np.float32)
    arrays["Mixed_6a.branch3x3.bn.running_var"] = np.full(384, np.nan, np.float32)
    arrays["head.weight"] = np.zeros(3)
    with pytest.raises(ValueError) as error:
        inception.from_arrays(arrays)
    for part in (
        "2 of 470 arrays are missing",
        "Conv2d_1a_3x3.conv.weight",
        "Mixed_7c.branch_pool.bn.bias",
        "1 arrays do not belong to it: head.weight",
        "Mixed_5b.branch1x1.conv.weight [1, 1, 192, 64] instead of [64, 192, 1, 1]",
        "NaN or infinity: Mixed_6a.branch3x3.bn.running_var",
    ):
        assert part in str(error.value)
    np.savez(tmp_path / "other.npz", **{f"layer{i}": np.zeros(2) for i in range(9)})
    with pytest.raises(ValueError, match="other.npz: no weights.* layer4 and 4 more"):
        inception.load(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="variant 'keras' is unknown; there are torchvision, fid"):
        inception.load(tmp_path / "other.npz", variant="keras")


def test_bad_images_and_layers(zeros):
    network = inception.from_arrays(zeros)
    with pytest.raises(ValueError, match="layer 'logits' is unknown"):
        inception.features(network, np.zeros((1, 75, 75, 3)), layer="logits")
    for shape, layer in (((1, 26, 30, 3), "Mixed_5d"), ((1, 75, 74, 3), "pool3")):
        with pytest.raises(ValueError, match=rf"{list(shape)[1]}.* takes \[n, h, w, 3\] with"):
            inception.features(network, np.zeros(shape), layer=layer)
    with pytest.raises(ValueError, match=r"\[75, 75, 3\]"):
        inception.features(network, np.zeros((75, 75, 3)), layer="pool3")


# --- PyTorch ------------------------------------------------------------------------------------

# Name -> convolutions (name, in, out, kernel, padding, stride) of every block.
_A = "1x1 {c} 64 1; 5x5_1 {c} 48 1; 5x5_2 48 64 5; 3x3dbl_1 {c} 64 1; 3x3dbl_2 64 96 3; "
_A += "3x3dbl_3 96 96 3; _pool {c} {p} 1"
_C = "1x1 768 192 1; 7x7_1 768 {p} 1; 7x7_2 {p} {p} 1x7; 7x7_3 {p} 192 7x1; 7x7dbl_1 768 {p} 1; "
_C += "7x7dbl_2 {p} {p} 7x1; 7x7dbl_3 {p} {p} 1x7; 7x7dbl_4 {p} {p} 7x1; 7x7dbl_5 {p} 192 1x7; "
_C += "_pool 768 192 1"
_E = "1x1 {c} 320 1; 3x3_1 {c} 384 1; 3x3_2a 384 384 1x3; 3x3_2b 384 384 3x1; 3x3dbl_1 {c} 448 1; "
_E += "3x3dbl_2 448 384 3; 3x3dbl_3a 384 384 1x3; 3x3dbl_3b 384 384 3x1; _pool {c} 192 1"
BLOCKS = {
    "Mixed_5b": _A.format(c=192, p=32),
    "Mixed_5c": _A.format(c=256, p=64),
    "Mixed_5d": _A.format(c=288, p=64),
    "Mixed_6a": "3x3 288 384 3/2; 3x3dbl_1 288 64 1; 3x3dbl_2 64 96 3; 3x3dbl_3 96 96 3/2",
    "Mixed_6b": _C.format(p=128),
    "Mixed_6c": _C.format(p=160),
    "Mixed_6d": _C.format(p=160),
    "Mixed_6e": _C.format(p=192),
    "Mixed_7a": "3x3_1 768 192 1; 3x3_2 192 320 3/2; 7x7x3_1 768 192 1; 7x7x3_2 192 192 1x7; "
    "7x7x3_3 192 192 7x1; 7x7x3_4 192 192 3/2",
    "Mixed_7b": _E.format(c=1280),
    "Mixed_7c": _E.format(c=2048),
}


def torch_network(torch):
    """Modules under torchvision's names, without their forward passes."""
    nn = torch.nn

    def unit(c_in, c_out, kernel, stride=1, padding=0):
        part = nn.Module()
        part.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        part.bn = nn.BatchNorm2d(c_out, eps=0.001)
        return part

    network = nn.Module()
    network.Conv2d_1a_3x3 = unit(3, 32, 3, 2)
    network.Conv2d_2a_3x3 = unit(32, 32, 3)
    network.Conv2d_2b_3x3 = unit(32, 64, 3, 1, 1)
    network.Conv2d_3b_1x1 = unit(64, 80, 1)
    network.Conv2d_4a_3x3 = unit(80, 192, 3)
    for name, lines in BLOCKS.items():
        block = nn.Module()
        for line in lines.split("; "):
            branch, c_in, c_out, kernel = line.split()
            kernel, _, stride = kernel.partition("/")
            sides = [int(side) for side in kernel.split("x")] * (1 if "x" in kernel else 2)
            padding = [0, 0] if stride else [side // 2 for side in sides]
            made = unit(int(c_in), int(c_out), sides, int(stride or 1), padding)
            setattr(block, f"branch{branch}", made)
        setattr(network, name, block)
    return network.eval()


def torch_features(torch, network, x, variant):
    """(Mixed_5d, pool3) `[n, c, h, w]`, `[n, 2048]`."""
    pools = torch.nn.functional

    def run(module, x, *names):
        for name in names:
            part = getattr(module, name)
            x = torch.relu(part.bn(part.conv(x)))
        return x

    def average(x):
        return pools.avg_pool2d(x, 3, 1, 1, count_include_pad=variant != "fid")

    def mixed(name, x):
        block = getattr(network, name)

        def branch(start, *names, begin=x):
            return run(block, begin, *(f"branch{start}{suffix}" for suffix in names or ("",)))

        if name[6] == "5":
            out = [branch("1x1"), branch("5x5", "_1", "_2"), branch("3x3dbl", "_1", "_2", "_3")]
            out.append(branch("_pool", begin=average(x)))
        elif name == "Mixed_6a":
            out = [branch("3x3"), branch("3x3dbl", "_1", "_2", "_3"), pools.max_pool2d(x, 3, 2)]
        elif name[6] == "6":
            out = [branch("1x1"), branch("7x7", "_1", "_2", "_3")]
            out.append(branch("7x7dbl", "_1", "_2", "_3", "_4", "_5"))
            out.append(branch("_pool", begin=average(x)))
        elif name == "Mixed_7a":
            out = [branch("3x3", "_1", "_2"), branch("7x7x3", "_1", "_2", "_3", "_4")]
            out.append(pools.max_pool2d(x, 3, 2))
        else:
            single, double = branch("3x3", "_1"), branch("3x3dbl", "_1", "_2")
            out = [branch("1x1")]
            out += [branch("3x3", f"_2{half}", begin=single) for half in "ab"]
            out += [branch("3x3dbl", f"_3{half}", begin=double) for half in "ab"]
            highest = variant == "fid" and name == "Mixed_7c"
            pooled = pools.max_pool2d(x, 3, 1, 1) if highest else average(x)
            out.append(branch("_pool", begin=pooled))
        return torch.cat(out, 1)

    x = run(network, x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")
    x = run(network, pools.max_pool2d(x, 3, 2), "Conv2d_3b_1x1", "Conv2d_4a_3x3")
    x = pools.max_pool2d(x, 3, 2)
    kept = None
    for name in BLOCKS:
        x = mixed(name, x)
        kept = x if name == "Mixed_5d" else kept
    return kept, pools.adaptive_avg_pool2d(x, 1).flatten(1)


@pytest.fixture(scope="module")
def in_torch(tmp_path_factory):
    """(PyTorch, its network with random weights, the file of these weights)."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    network = torch_network(torch)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.ndim == 4:
                tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5)
            elif name.endswith(("bn.weight", "running_var")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.2)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return torch, network, path


@pytest.mark.parametrize("variant", inception.VARIANTS)
def test_features_are_those_of_pytorch(in_torch, variant):
    torch, network, path = in_torch
    # Not square, and the last block has two places: a mean and a maximum over them differ.
    x = np.random.default_rng(0).uniform(-1, 1, (2, 75, 107, 3)).astype(np.float32)
    with torch.no_grad():
        rows = torch.from_numpy(x).permute(0, 3, 1, 2)
        expected = [part.numpy() for part in torch_features(torch, network, rows, variant)]
    ours = inception.load(path, variant=variant)

    @jax.jit
    def features(network, x):
        return [inception.features(network, x, layer=layer) for layer in inception.LAYERS]

    early, pooled = features(ours, x)
    assert early.shape == (2, 7, 11, 288) and pooled.shape == (2, 2048)
    for found, wanted in ((np.moveaxis(early, -1, 1), expected[0]), (pooled, expected[1])):
        assert wanted.std() > 0.1
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * wanted.max())
