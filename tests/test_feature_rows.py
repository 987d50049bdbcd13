"""Rows in a file are read and written as in memory, and a detector learns the same from them."""

import jax
import numpy as np
import pytest
import toy_model

from flipad_jax import data
from flipad_jax.detection import attributor, feature_rows
from flipad_jax.detection.attributor import AttributorConfig
from flipad_jax.detection.deepsad import DeepSADConfig
from flipad_jax.detection.feature_rows import FeatureRows


@pytest.fixture(name="pair")
def _pair():
    content = np.random.default_rng(0).normal(size=(37, 3, 4, 2)).astype(np.float32)
    rows = FeatureRows(content.shape, in_memory=0)
    for start in range(0, 37, 8):
        rows[start : start + 8] = content[start : start + 8]
    return rows, content


def test_a_file_holds_what_was_written(pair):
    rows, content = pair
    assert rows.on_disk and len(rows) == 37 and rows.ndim == 4 and rows.shape == content.shape
    np.testing.assert_array_equal(np.concatenate(list(rows.batches(10))), content)
    shuffled = np.random.default_rng(1).permutation(37)[:20]
    np.testing.assert_array_equal(rows[shuffled], content[shuffled])
    np.testing.assert_array_equal(rows[np.array([5, 6, 7, 2, 36])], content[[5, 6, 7, 2, 36]])
    assert rows[np.array([], int)].shape == (0, 3, 4, 2)


def test_rows_can_be_overwritten(pair):
    rows, content = pair
    rows[4:9] = 2 * content[4:9]
    np.testing.assert_array_equal(
        rows[3:10], content[3:10] * np.r_[1, [2] * 5, 1][:, None, None, None]
    )


def test_small_features_stay_in_memory():
    assert not FeatureRows((10, 4)).on_disk
    assert FeatureRows((10, 4), in_memory=159).on_disk


def test_rows_that_do_not_fit_are_refused(pair):
    rows, content = pair
    with pytest.raises(ValueError, match=r"\[5, 3, 4, 2\]"):
        rows[0:5] = content[:4]
    with pytest.raises(ValueError, match="one piece"):
        rows[0:8:2] = content[:4]


def test_deepsad_learns_the_same_from_a_file(monkeypatch):
    own, z = toy_model.own_images(0, 80)
    real = data.load("photos", split="train", image_size=8, num_images=40)
    config = AttributorConfig(
        detector="deepsad",
        deepsad=DeepSADConfig(widths=(4,), rep_dim=8, epochs=2, batch_size=16),
        check_untouched=False,
        batch_size=32,
    )
    scores = []
    for limit in (2**29, 0):
        monkeypatch.setattr(feature_rows, "IN_MEMORY", limit)
        fitted = attributor.fit(
            toy_model.LAYER, z.mean(axis=0), own, real, rng=jax.random.key(0), config=config
        )
        scores.append(attributor.score(fitted, real[:8]))
    np.testing.assert_array_equal(*scores)


def test_deepsad_without_real_images_is_refused():
    own, z = toy_model.own_images(0, 80)
    config = AttributorConfig(detector="deepsad", check_untouched=False)
    with pytest.raises(ValueError, match="there are none"):
        attributor.fit(
            toy_model.LAYER, z.mean(axis=0), own, own[:0], rng=jax.random.key(0), config=config
        )
