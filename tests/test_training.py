"""The training loop: streams, what stops it, where it goes on."""

import functools
import hashlib
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tfds_sets import encoded, grey, prepare, real_features

from flipad_jax import checkpoints, pipeline
from flipad_jax.generators import dcgan, training

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (8, 8, 1)
TINY = dcgan.dcgan(SHAPE, latent_dim=4, features=(6,), discriminator_features=(6,))
# One model for most tests: what was compiled for it serves them all.
GAN = TINY._replace(discriminator_steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 pictures to train on, of which two are none and one is white."""
    folder = tmp_path_factory.mktemp("tfds")
    examples = [{"image": encoded(grey(i)), "label": 0} for i in range(40)]
    examples[3]["image"] = examples[20]["image"] = b"nonsense"
    examples[11]["image"] = encoded(np.full((28, 28), 255, np.uint8))
    splits = {"train": examples, "validation": examples[:1], "test": examples[:1]}
    prepare(folder, "mnist", real_features("mnist"), splits)
    return folder


def opened(folder, **options):
    options = {"batch_size": 4, "image_size": 8, "data_dir": folder, **options}
    return pipeline.stream("mnist", **options)


@pytest.fixture
def stream(folder):
    found = opened(folder)
    yield found
    found.close()


def an_array(stream, num_batches=8):
    """The same images in memory."""
    position = stream.position
    images = np.concatenate([next(stream) for _ in range(num_batches)])
    stream.position = position
    return images


def plain(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


# --- streams --------------------------------------------------------------------------------------


def test_a_stream_trains_as_its_batches_do_one_by_one(stream):
    """Against steps that are made by hand, seed by seed, on batches that are read by hand."""
    batches = [[next(stream) for _ in range(2)] for _ in range(3)]
    passed = stream.position
    stream.position = 0
    found = training.train(GAN, stream, seeds=(5, 7), num_steps=3)
    assert stream.position == passed
    one = jax.jit(training.train_step, static_argnums=0)
    for index, seed in enumerate((5, 7)):
        state = training.take_seed(training.init_seeds(GAN, jnp.asarray([5, 7], jnp.uint32)), index)
        for real in batches:
            state, _ = one(GAN, state, jnp.asarray(real, jnp.float32) / 127.5 - 1)
        trained = training.take_seed(found, index)
        chex.assert_trees_all_close(trained.generator, state.generator, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    "streamed", [True, pytest.param(False, marks=pytest.mark.slow)]  # test_generators has another
)
def test_stopped_training_goes_on_bit_for_bit(folder, tmp_path, streamed):
    streams = []

    def run(**options):
        streams.append(opened(folder))
        images = streams[-1] if streamed else an_array(streams[-1])
        size = {} if streamed else {"batch_size": 4}
        reports = []
        states = training.train(
            GAN,
            images,
            seeds=(1, 2),
            num_steps=12,
            report_every=2,
            checkpoint_every=6,
            progress=lambda step, report: reports.append((step, report)),
            **size,
            **options,
        )
        return states, reports

    whole, told = run()
    looks = iter([False, True])
    with pytest.raises(checkpoints.Preempted, match="after step 4 of 12, kept in"):
        run(checkpoint_dir=tmp_path / "c", should_stop=lambda: next(looks))
    assert checkpoints.steps(tmp_path / "c") == [4]
    # Killed later, it falls back on its last checkpoint.
    looks = iter([False])
    with pytest.raises(RuntimeError):

        def killed_at_the_second_look():
            try:
                return next(looks)
            except StopIteration:
                raise RuntimeError from None

        run(checkpoint_dir=tmp_path / "c", should_stop=killed_at_the_second_look)
    assert checkpoints.steps(tmp_path / "c") == [4, 6]
    resumed, rest = run(checkpoint_dir=tmp_path / "c")
    chex.assert_trees_all_equal(jax.tree.map(plain, resumed), jax.tree.map(plain, whole))
    assert [step for step, _ in rest] == [8, 10, 12]
    for (_, found), (_, wanted) in zip(rest, told[3:], strict=True):
        np.testing.assert_array_equal(found.generator, wanted.generator)
        np.testing.assert_array_equal(found.discriminator, wanted.discriminator)
    assert streams[-1].position == streams[0].position
    for stream in streams:
        stream.close()


def test_without_a_place_to_save_stopping_says_so(stream):
    with pytest.raises(checkpoints.Preempted, match="after step 2 of 9, nothing was kept"):
        training.train(
            GAN, stream, seeds=(0, 1), num_steps=9, report_every=2, should_stop=lambda: True
        )


def test_a_checkpoint_of_other_seeds_or_more_steps_is_not_taken_for_this_training(stream, tmp_path):
    images, folder = an_array(stream), tmp_path / "c"
    run = functools.partial(training.train, GAN, images, batch_size=4, checkpoint_dir=folder)
    first = run(seeds=(1, 2), num_steps=2)
    for other in ((3, 4), (2, 1)):
        with pytest.raises(ValueError, match=f"2 in {folder} is of other seeds than {other[0]}, "):
            run(seeds=other, num_steps=2)
    with pytest.raises(ValueError, match=f"2 in {folder} has more steps than num_steps=1: give at"):
        run(seeds=(1, 2), num_steps=1)
    again = run(seeds=(1, 2), num_steps=2)  # The same call finds what it made.
    chex.assert_trees_all_equal(jax.tree.map(plain, again), jax.tree.map(plain, first))


def test_a_checkpoint_of_two_processes_is_not_called_damaged(stream, tmp_path):
    states = training.init_seeds(GAN, jnp.asarray((1, 2), jnp.uint32))
    position = np.zeros(2, np.int64)
    checkpoints.save(tmp_path / "c", 1, {"states": states, "position_per_process": position})
    with pytest.raises(ValueError, match="was trained by 2 processes, this is 1: start as many"):
        training.train(GAN, stream, seeds=(1, 2), num_steps=2, checkpoint_dir=tmp_path / "c")


def test_a_checkpoint_of_an_array_is_none_of_a_stream(stream, tmp_path):
    run = functools.partial(training.train, GAN, seeds=(0, 1), checkpoint_dir=tmp_path / "c")
    run(an_array(stream), num_steps=1, batch_size=4)
    with pytest.raises(ValueError, match="checkpoint 1 in .* is not of this model"):
        run(stream, num_steps=2)


def test_streams_that_do_not_fit_are_refused(stream, folder):
    with pytest.raises(ValueError, match="that of the stream is 4"):
        training.train(GAN, stream, seeds=(0,), num_steps=1, batch_size=8)
    large = opened(folder, image_size=16)
    with pytest.raises(ValueError, match=r"\[n, 8, 8, 1\], the stream has \[16, 16, 1\]"):
        training.train(GAN, large, seeds=(0,), num_steps=1)
    large.close()


class Pending(np.ndarray):
    """A result that the device has only after a while."""

    ready_at = 0.0

    def block_until_ready(self):
        time.sleep(max(0.0, self.ready_at - time.perf_counter()))
        return self


@pytest.mark.parametrize("busy, least, most", [(0.0, 0.6, 1.0), (0.03, 0.2, 0.75), (0.12, 0, 0.15)])
def test_waiting_is_the_time_in_which_the_device_has_nothing_to_do(
    stream, monkeypatch, busy, least, most
):
    """Steps of so many seconds against 0.06 s for the batches of one."""
    reports, free_at = [], 0.0

    read = pipeline.Stream.__next__

    def slowly(self):
        time.sleep(0.03)
        return read(self)

    def step(states, batches, *, gan, mesh):
        nonlocal free_at
        loss = np.zeros(1).view(Pending)
        free_at = loss.ready_at = max(free_at, time.perf_counter()) + busy
        return states, training.Losses(loss, loss)

    def get(losses):
        time.sleep(max(0.0, free_at - time.perf_counter()))
        return losses

    monkeypatch.setattr(pipeline.Stream, "__next__", slowly)
    monkeypatch.setattr(training, "step_batches", step)
    monkeypatch.setattr(jax, "device_get", get)
    training.train(
        GAN,
        stream,
        seeds=(0, 1),
        num_steps=7,
        report_every=3,
        progress=lambda step, report: reports.append(float(report.waiting)),
    )
    assert least <= reports[1] <= most


TRAINS = """
    import sys
    import jax, numpy as np

    folder, checkpoint_dir, out, port, index, count = sys.argv[1:]
    index, count = int(index), int(count)
    from flipad_jax import checkpoints, parallel, pipeline
    from flipad_jax.generators import dcgan, training

    parallel.initialize(f"127.0.0.1:{port}", count, index)
    gan = dcgan.dcgan((8, 8, 1), latent_dim=4, features=(6,), discriminator_features=(6,))
    gan = gan._replace(discriminator_steps=2)

    def run(should_stop):
        stream = pipeline.stream(
            "mnist", batch_size=4, image_size=8, data_dir=folder, process_index=index,
            process_count=count,
        )
        states = training.train(
            gan, stream, seeds=(1, 2), num_steps=6, report_every=2, should_stop=should_stop,
            checkpoint_dir=checkpoint_dir,
        )
        return jax.tree.leaves(states.generator), stream.position

    looks = iter([False, index == count - 1])  # one of them is told
    try:
        run(lambda: next(looks))
        raise AssertionError
    except checkpoints.Preempted as error:
        assert "after step 4 of 6" in str(error), error
    leaves, position = run(lambda: False)
    np.savez(f"{out}{index}.npz", *leaves, position=position)
"""


@pytest.mark.slow
def test_two_processes_read_their_parts_and_stop_after_the_same_step(tmp_path):
    """What one process makes of the same stream, to rounding, after a stop and a start."""
    examples = [{"image": encoded(grey(i)), "label": 0} for i in range(30)]
    splits = {"train": examples, "validation": examples[:1], "test": examples[:1]}
    prepare(tmp_path, "mnist", real_features("mnist"), splits)
    found = {}
    for count in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        out = str(tmp_path / f"{count}-")
        arguments = [str(tmp_path), str(tmp_path / f"c{count}"), out, port]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(TRAINS), *arguments, str(i), str(count)],
                cwd=ROOT,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(count)
        ]
        for process in processes:
            _, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
        found[count] = [dict(np.load(f"{out}{i}.npz")) for i in range(count)]
    assert [result.pop("position") for result in found[2]] == [6 * 2 * 2] * 2
    assert found[1][0].pop("position") == 6 * 2 * 4
    chex.assert_trees_all_equal(*found[2])
    chex.assert_trees_all_close(found[2][0], found[1][0], atol=2e-5)


# --- numbers that are not finite ------------------------------------------------------------------


def without_slope(loss, value, condition):
    """The loss plus a constant: finite, and without a gradient where the condition holds."""
    return loss + jnp.sqrt(jnp.where(condition, 0.0 * value, 1.0))


def _discriminator_loss(discriminate, real, fake, rng):
    loss = TINY.discriminator_loss(discriminate, real, fake, rng)
    return without_slope(loss, discriminate(real).mean(), real.min(axis=(1, 2, 3)).max() > 0.99)


def _generator_loss(discriminate, fake, rng):
    return without_slope(TINY.generator_loss(discriminate, fake, rng), fake.mean(), True)


WHITE_DIVERGES = TINY._replace(discriminator_loss=_discriminator_loss)


def test_a_gradient_that_is_not_finite_names_the_step_and_the_batch(folder, tmp_path):
    """The step that shows the white image is named, and no other."""
    stream = opened(folder, seed=7)
    batches = [next(stream) for _ in range(10)]
    bad = next(i for i, batch in enumerate(batches) if batch.min(axis=(1, 2, 3)).max() == 255)
    assert 3 <= bad <= 8 and bad % 3
    stream.position = 0
    digest = hashlib.sha256(batches[bad].tobytes()).hexdigest()[:12]
    with pytest.raises(FloatingPointError) as error:
        training.train(
            WHITE_DIVERGES,
            stream,
            seeds=(4,),
            num_steps=40,
            report_every=40,
            checkpoint_every=3,
            checkpoint_dir=tmp_path / "c",
        )
    text = str(error.value)
    assert f"the discriminator's loss or its gradient is not finite in step {bad + 1} " in text
    assert f"(seed 4, learning rate 0.0002, images {digest})" in text
    assert max(checkpoints.steps(tmp_path / "c")) == bad // 3 * 3
    states = training.init_seeds(WHITE_DIVERGES, jnp.zeros(1, jnp.uint32))
    _, saved = checkpoints.restore_latest(
        tmp_path / "c", {"states": states, "position_per_process": np.zeros(1, np.int64)}
    )
    assert all(np.isfinite(plain(leaf)).all() for leaf in jax.tree.leaves(saved["states"]))
    stream.close()


def test_the_seed_and_its_images_are_named(stream):
    images = np.minimum(an_array(stream), 200)
    shown = functools.partial(training._step_indices, TINY, num_images=32, batch_size=4)
    indices = [np.asarray(shown(jax.random.key(6), step)) for step in range(8)]
    images[indices[5][0, 0]] = 255
    with pytest.raises(FloatingPointError) as error:
        training.train(WHITE_DIVERGES, images, seeds=(6,), num_steps=8, batch_size=4)
    digest = hashlib.sha256(images[indices[5]].tobytes()).hexdigest()[:12]
    assert f"in step 6 (seed 6, learning rate 0.0002, images {digest})" in str(error.value)


def test_a_gradient_of_the_generator_is_seen_too(stream, tmp_path):
    gan = TINY._replace(generator_loss=_generator_loss)
    with pytest.raises(FloatingPointError, match="the generator's loss .* in step 1 .seed 0,"):
        training.train(gan, stream, seeds=(0,), num_steps=1, checkpoint_dir=tmp_path / "c")
    assert checkpoints.steps(tmp_path / "c") == []
