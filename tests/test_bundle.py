"""Attributors on disk: what comes back, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flipad_jax
from flipad_jax import AttributorConfig, FinalLayer, data, linops
from flipad_jax.detection import bundle
from flipad_jax.detection.one_class import OneClassConfig
from flipad_jax.inversion.final_layer import forward

FILES = ("attributor.json", "attributor.safetensors")
DRAW = np.random.default_rng(0)
KERNEL = (0.2 * DRAW.standard_normal((4, 4, 3, 3))).astype(np.float32)
Z = np.maximum(DRAW.standard_normal((120, 6, 6, 3)), 0).astype(np.float32)
OTHERS = DRAW.integers(0, 256, (5, 12, 12, 3)).astype(np.uint8)


def fit(bias=None):
    op = linops.conv_transpose(KERNEL, (6, 6, 3), strides=2, padding=1)
    layer = FinalLayer(op, None if bias is None else jnp.asarray(bias, jnp.float32))
    own = data.to_uint8(np.asarray(jax.vmap(lambda z: forward(layer, z))(Z)))
    config = AttributorConfig(one_class=OneClassConfig(num_components=5), num_altered=0)
    return flipad_jax.fit(layer, Z.mean(0), own, rng=jax.random.key(0), config=config), own


@pytest.fixture(scope="module")
def fitted():
    return fit()[0]


@pytest.fixture
def saved(fitted, tmp_path):
    flipad_jax.save(fitted, tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize("bias", [None, (0.1, -0.2, 0.3)])
def test_a_saved_attributor_comes_back(bias, tmp_path):
    fitted, own = fit(bias)
    flipad_jax.save(fitted, tmp_path / "a")
    assert tuple(sorted(p.name for p in (tmp_path / "a").iterdir())) == FILES
    loaded = flipad_jax.load(tmp_path / "a")
    assert loaded.config == fitted.config and loaded.image_shape == (12, 12, 3)
    images = np.concatenate([own[:5], OTHERS])
    for a, b in zip(flipad_jax.verdicts(loaded, images), flipad_jax.verdicts(fitted, images)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(loaded.profile.mean, fitted.profile.mean)


def test_the_settings_say_what_the_bundle_is(saved, fitted, tmp_path):
    found = bundle.describe(saved)
    assert found["flipad_jax"] == flipad_jax.__version__ and found["convention"] == "paper"
    assert found["images"]["shape"] == [12, 12, 3] and found["num_calibration"] == 30
    other, _ = fit((0.1, 0.2, 0.3))
    flipad_jax.save(other, tmp_path / "b")
    assert bundle.describe(tmp_path / "b")["layer_sha256"] != found["layer_sha256"]
    flipad_jax.save(fitted, tmp_path / "c")
    assert bundle.describe(tmp_path / "c")["sha256"] == found["sha256"]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_anywhere_is_refused(name, saved):
    content = (saved / name).read_bytes()
    for place in np.linspace(0, len(content) - 2, 40).astype(int):
        # A digit or letter, so that the settings stay readable JSON wherever they can.
        new = b"7" if content[place : place + 1] != b"7" else b"8"
        if content[place : place + 1].isspace():
            continue  # blanks between JSON tokens say nothing
        (saved / name).write_bytes(content[:place] + new + content[place + 1 :])
        with pytest.raises(ValueError, match="damaged|changed|format|not an attributor"):
            flipad_jax.load(saved)
    (saved / name).write_bytes(content)
    flipad_jax.load(saved)


@pytest.mark.parametrize("name", FILES)
def test_half_of_a_bundle_is_refused(name, saved):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        flipad_jax.load(saved)
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        flipad_jax.load(saved)


def test_two_bundles_do_not_mix(saved, tmp_path):
    flipad_jax.save(fit((0.1, 0.2, 0.3))[0], tmp_path / "b")
    (saved / FILES[0]).write_bytes((tmp_path / "b" / FILES[0]).read_bytes())
    with pytest.raises(ValueError, match="not the file that"):
        flipad_jax.load(saved)


def test_other_formats_are_named(saved):
    settings = json.loads((saved / FILES[0]).read_text())
    for found, message in ((99, "update flipad_jax"), (1, "fit the attributor again")):
        (saved / FILES[0]).write_text(json.dumps({**settings, "format": found}))
        with pytest.raises(ValueError, match=message):
            flipad_jax.load(saved)
    for text in ("[]", "{}", '{"format": "two"}'):
        (saved / FILES[0]).write_text(text)
        with pytest.raises(ValueError, match="not an attributor"):
            flipad_jax.load(saved)


def test_what_is_no_folder_is_no_attributor(saved):
    for path in (saved / "nothing", saved / FILES[0]):
        with pytest.raises(FileNotFoundError, match="not an attributor"):
            flipad_jax.load(path)
