"""Folders of any length run the same few compiled programs."""

import logging

import jax
import numpy as np
import pytest
from image_files import random_images
from toy_model import LAYER, own_images

import flipad_jax
from experiments import _config
from flipad_jax import AttributorConfig, data
from flipad_jax.detection.one_class import OneClassConfig

IMAGES, ACTIVATIONS = own_images(1, 801)


@pytest.fixture
def compiled():
    """Names of the programs that are compiled, as they are."""
    names = []

    class Listener(logging.Handler):
        def emit(self, record):
            words = record.getMessage().split()
            if words[0] == "Compiling":
                names.append(words[1])

    logger, listener = logging.getLogger("jax._src.interpreters.pxla"), Listener()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    with jax.log_compiles():
        yield names
    logger.removeHandler(listener)
    logger.setLevel(level)
    logger.propagate = propagate


def since(names):
    found = list(names)
    names.clear()
    return found


def fit(num_images):
    config = AttributorConfig(
        one_class=OneClassConfig(num_components=10),
        check_untouched=False,
        batch_size=64,
        num_altered=0,
    )
    images, z_bar = IMAGES[:num_images], ACTIVATIONS.mean(axis=0)
    return flipad_jax.fit(LAYER, z_bar, images, rng=jax.random.key(0), config=config)


@pytest.mark.slow
def test_another_number_of_images_compiles_next_to_nothing(compiled, tmp_path):
    fitted = fit(300)
    assert since(compiled)  # so that it is known to hear
    counts = []
    for num_images in (301, 555, 801, 302, 556, 800):
        fit(num_images)
        counts.append(len(since(compiled)))
    # Whatever number of images the last batch is filled up to is compiled once. Each number of
    # images has its own draw of the parts, moments of the last batch and principal directions.
    assert sum(counts) <= 90 and max(counts[3:]) <= 8, counts
    flipad_jax.save(fitted, tmp_path / "a")
    counts = []
    for num_images in (300, 33, 7, 1, 299, 211, 40, 13):
        data.write_images(tmp_path / f"{num_images}", IMAGES[:num_images])
        flags = [f"--images={tmp_path / str(num_images)}", f"--attributor={tmp_path / 'a'}"]
        flags += ["--preset=smoke", f"--output={tmp_path / str(num_images)}.csv"]
        assert _config.main(["run.py", "--experiment=attribute", *flags]) == 0
        counts.append(len(since(compiled)))
    # A length of its own kind (16, 32, 64 images in the last batch) compiles once; then nothing.
    assert sum(counts[:4]) <= 60 and counts[4:] == [0] * 4, counts


@pytest.mark.slow
def test_regeneration_of_another_number_of_images_compiles_nothing(compiled, tmp_path, monkeypatch):
    import toy_model

    from flipad_jax.detection import regeneration
    from flipad_jax.detection.regeneration import RegenerationConfig

    generator = toy_model.latent_generator()
    config = RegenerationConfig(num_starts=1)
    bank = regeneration.make_bank(generator, jax.random.key(1), 300)
    suspects = np.concatenate([IMAGES[:20], random_images(20, seed=3)])

    def search(num_images):
        return regeneration.regenerate(
            generator, suspects[:num_images], jax.random.key(2), config, bank=bank
        )

    everything = search(33)
    assert since(compiled)
    for num_images in (1, 7, 40, 38):
        found = search(num_images)
        shared = min(num_images, 33)
        np.testing.assert_array_equal(found.image[:shared], everything.image[:shared])
        # 33, 38 and 40 images are filled up to 64, 1 and 7 to 16.
        assert since(compiled).count("jit(_describe_all)") == (num_images == 1)
