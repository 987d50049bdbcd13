"""Features against SciPy, PyTorch and NumPy on the whole set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st

from flipad_jax.detection import features


def _images(n=4, h=12, w=8, c=3, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).uniform(-1, 1, (n, h, w, c)).astype(dtype)


@pytest.mark.parametrize("dtype, tol", [(np.float32, 1e-4), (np.float64, 1e-9)])
@pytest.mark.parametrize("h, w", [(32, 32), (12, 7), (1, 5), (128, 64)])
def test_dct_is_scipys(h, w, dtype, tol):
    x = _images(h=h, w=w, dtype=dtype)
    expected = scipy.fft.dctn(x.astype(np.float64), type=2, norm=None, axes=(1, 2))
    result = features.dct(jnp.asarray(x))
    assert result.dtype == dtype
    np.testing.assert_allclose(result, expected, rtol=0, atol=tol * max(1, np.abs(expected).max()))


def test_log_dct_is_the_papers_formula():
    x = _images(dtype=np.float64)
    expected = np.log(np.abs(scipy.fft.dctn(x, type=2, axes=(1, 2))) + 1e-10)
    np.testing.assert_allclose(features.log_dct(jnp.asarray(x)), expected, atol=1e-9)
    # The offset is what a vanishing coefficient leaves.
    np.testing.assert_allclose(features.log_dct(jnp.zeros((1, 4, 4, 1))), np.log(1e-10), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 16, 31, 32])
def test_resizing_is_pytorchs(size):
    torch = pytest.importorskip("torch")
    for h, w in [(64, 32), (47, 33), (32, 64), (96, 41)]:
        x = _images(n=2, h=h, w=w)
        planes = torch.tensor(x).permute(0, 3, 1, 2)
        nearest = torch.nn.functional.interpolate(planes, size=(size, size))
        expected = nearest.permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(features.downsample_nearest(jnp.asarray(x), size), expected)
        if h % size == 0 and w % size == 0:
            pooled = torch.nn.functional.max_pool2d(planes, (h // size, w // size))
            expected = pooled.permute(0, 2, 3, 1).numpy()
            np.testing.assert_array_equal(features.max_pool(jnp.asarray(x), size), expected)


def test_nearest_takes_pytorchs_index_for_every_length():
    torch = pytest.importorskip("torch")
    for length in range(2, 260, 3):
        x = np.arange(length, dtype=np.float32)
        for size in range(1, length):
            expected = torch.nn.functional.interpolate(torch.tensor(x)[None, None], size=size)
            np.testing.assert_array_equal(
                features._nearest_index(length, size), expected[0, 0].numpy()
            )


def test_center_crop_keeps_the_middle():
    x = np.arange(7 * 6, dtype=np.float32).reshape(1, 7, 6, 1)
    # torchvision: top = round(3 / 2) = 2, left = round(2 / 2) = 1.
    np.testing.assert_array_equal(features.center_crop(x, 4), x[:, 2:6, 1:5])


@pytest.mark.parametrize("resize", features.RESIZES)
def test_short_sides_are_left_alone(resize):
    x = _images(h=16, w=64)
    config = features.FeatureConfig(kind="pixels", resize=resize, size=32)
    assert features.extract(config, x).shape == (4, 16, 32, 3)
    same = features.FeatureConfig(kind="pixels", resize=resize, size=None)
    np.testing.assert_array_equal(features.extract(same, x), x)


@given(
    sizes=st.lists(st.sampled_from([1, 2, 7]), min_size=2, max_size=5),
    offset=st.sampled_from([0.0, -3.0, 100.0]),
)
@settings(max_examples=25, deadline=None)
def test_streamed_moments_are_those_of_the_whole_set(sizes, offset):
    x = np.random.default_rng(sum(sizes)).normal(offset, 1, (sum(sizes), 2, 3, 2))
    total = None
    for batch in np.split(x, np.cumsum(sizes)[:-1]):
        batch = features.moments(jnp.asarray(batch, jnp.float32))
        total = batch if total is None else features.merge_moments(total, batch)
    assert total.mean.dtype == jnp.float32
    np.testing.assert_allclose(total.mean, x.mean(axis=0), atol=1e-5 * (1 + abs(offset)))
    expected = x.std(axis=0, ddof=1)
    # Sums of squares would lose 1e-7 * 100^2 = 1e-3 to cancellation in float32.
    np.testing.assert_allclose(features.standard_deviation(total), expected, atol=1e-4)


def test_own_samples_come_out_standardised():
    own = np.random.default_rng(0).normal(2, 3, (500, 4, 4, 2))
    config = features.FeatureConfig(kind="activations")
    fitted = features.fit(config, [own[:200], own[200:]])
    prepared = features.prepare(fitted, own)
    std = own.std(axis=0, ddof=1)
    np.testing.assert_allclose(prepared.mean(axis=0), 0, atol=1e-10)
    np.testing.assert_allclose(prepared.std(axis=0, ddof=1), std / (std + 0.05), rtol=1e-10)


def test_statistics_of_own_or_of_all():
    own, real = _images(seed=1, dtype=np.float64), _images(n=7, seed=2, dtype=np.float64) + 1
    for which, chosen in [("own", own), ("all", np.concatenate([own, real]))]:
        config = features.FeatureConfig(kind="pixels", standardize=which)
        fitted = features.fit(config, [own], [real[:3], real[3:]])
        np.testing.assert_allclose(fitted.mean, chosen.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(fitted.std, chosen.std(axis=0, ddof=1), rtol=1e-12)


def test_statistics_of_half_precision_samples_are_not_half_precise():
    own = np.random.default_rng(0).normal(10, 1, (3000, 1, 1, 1)).astype(np.float16)
    fitted = features.fit(features.FeatureConfig("activations"), [own[:1500], own[1500:]])
    np.testing.assert_allclose(fitted.std, own.astype(np.float64).std(axis=0, ddof=1), rtol=1e-4)
    assert features.prepare(fitted, own).dtype == jnp.float16


@pytest.mark.parametrize("standardize", ["own", "none"])
def test_channels_that_differ_most_are_kept(standardize):
    rng = np.random.default_rng(0)
    own = rng.normal(0, 0.1, (60, 4, 4, 5))
    real = rng.normal(0, 0.1, (60, 4, 4, 5))
    real[..., 3] += 2.0
    # Differs most in mean absolute value, but not in the mean: signs alternate over the positions.
    real[..., 1] += np.where(np.indices((4, 4)).sum(axis=0) % 2, 3.0, -3.0)
    config = features.FeatureConfig(kind="activations", standardize=standardize, num_channels=2)
    fitted = features.fit(config, [own], [real])
    assert fitted.channels.tolist() == [1, 3]
    expected = own[..., [1, 3]]
    if standardize == "own":
        chosen = own[..., [1, 3]]
        expected = (chosen - chosen.mean(axis=0)) / (chosen.std(axis=0, ddof=1) + 0.05)
    np.testing.assert_allclose(features.prepare(fitted, own), expected, atol=1e-10)


def test_channels_are_compared_after_standardisation():
    rng = np.random.default_rng(0)
    own = rng.normal(0, [0.01, 10.0], (400, 2, 2, 2))
    real = rng.normal(0, [0.01, 10.0], (400, 2, 2, 2)) + [0.5, 3.0]
    for standardize, first in [("own", 0), ("none", 1)]:
        config = features.FeatureConfig("activations", standardize=standardize, num_channels=1)
        assert features.fit(config, [own], [real]).channels.tolist() == [first]


@pytest.mark.parametrize("kind", features.KINDS)
@pytest.mark.parametrize("convention", ["paper", "reference"])
def test_prepare_jitted_in_float32(kind, convention):
    own, real = _images(n=9, h=64, w=64), _images(n=8, h=64, w=64, seed=1)
    fitted = features.fit(features.preset(kind, convention), [own], [real])
    plain = features.prepare(fitted, own)
    jitted = jax.jit(features.prepare)(fitted, own)
    assert plain.shape == (9, 32, 32, 3) and plain.dtype == jitted.dtype == jnp.float32
    np.testing.assert_allclose(plain, jitted, atol=1e-3)


def test_conventions():
    paper = {kind: features.preset(kind) for kind in features.KINDS}
    reference = {kind: features.preset(kind, "reference") for kind in features.KINDS}
    assert {c.resize for c in paper.values()} == {"nearest"}
    assert [reference[kind].resize for kind in features.KINDS] == [
        "nearest",
        "center_crop",
        "max_pool",
    ]
    assert [paper[kind].standardize for kind in features.KINDS] == ["none", "own", "own"]
    assert [reference[kind].standardize for kind in features.KINDS] == ["none", "all", "own"]


def test_mistakes_are_named():
    config = features.preset("activations")
    own = _images()
    with pytest.raises(ValueError, match="kind='pixel'"):
        features.FeatureConfig(kind="pixel")
    with pytest.raises(ValueError, match="size=0"):
        features.FeatureConfig(kind="pixels", size=0)
    with pytest.raises(ValueError, match="convention='papers'"):
        features.preset("pixels", "papers")
    with pytest.raises(ValueError, match="uint8"):
        features.extract(config, own.astype(np.uint8))
    with pytest.raises(ValueError, match="not multiples"):
        features.max_pool(_images(h=48, w=48), 32)
    with pytest.raises(ValueError, match="fewer than two own"):
        features.fit(config, [own[:1]])
    with pytest.raises(ValueError, match="fewer than two own"):
        features.fit(config, [])
    with pytest.raises(ValueError, match="NaN or infinity in the own"):
        features.fit(config, [own, np.where(own > 0.99, np.nan, own)])
    with pytest.raises(ValueError, match="real is None"):
        features.fit(features.preset("dct", "reference"), [own])
    with pytest.raises(ValueError, match="3 channels only"):
        features.fit(features.FeatureConfig("activations", num_channels=4), [own], [own])
    fitted = features.fit(features.preset("pixels"), [own])
    with pytest.raises(ValueError, match=r"\[4, 12, 9, 3\]"):
        features.prepare(fitted, _images(w=9))
