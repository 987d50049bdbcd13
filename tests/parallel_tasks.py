"""What tests/test_parallel.py runs in processes of its own, with other numbers of devices.

    python tests/parallel_tasks.py OUT.npz TASK[,TASK...] [--coordinator_address=... and so on]

Process 0 writes the arrays that the tasks return, as TASK/NAME.
"""

import argparse
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import flipad_jax
from flipad_jax import AttributorConfig, checkpoints, data, lasso, parallel
from flipad_jax.detection import deepsad
from flipad_jax.detection.classifier import ClassifierConfig
from flipad_jax.detection.deepsad import DeepSADConfig
from flipad_jax.detection.one_class import OneClassConfig
from flipad_jax.generators import dcgan, sampling, training, wgan_gp
from flipad_jax.registry import user_generators
from flipad_jax.registry.user_generators import KeyedConfig

heard = []  # signals


def flat(tree):
    """All numbers of a tree in one vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def small(make, size=8):
    widths = {8: (4,), 16: (4, 4)}[size]
    return make((size, size, 1), latent_dim=4, features=widths, discriminator_features=widths)


def trained(gan, *, num_steps=3, seeds=(0, 1), **options):
    losses = []
    photos = data.load("photos", split="train", image_size=gan.image_shape[0], num_images=64)
    states = training.train(
        gan,
        photos[..., :1],
        seeds=seeds,
        num_steps=num_steps,
        batch_size=16,
        report_every=1,
        progress=lambda step, said: losses.append([said.generator, said.discriminator]),
        **options,
    )
    return states, np.array(losses)


def gan():
    """Two seeds of a DCGAN, with BatchNorm in both networks."""
    states, losses = trained(small(dcgan.dcgan, 16))
    networks = states.generator, states.discriminator
    moments = states.generator_opt, states.discriminator_opt
    found = {"networks": flat(networks), "moments": flat(moments), "losses": losses}
    return found | {"flops": flops_per_device(small(dcgan.dcgan, 16))}


def flops_per_device(gan):
    mesh = parallel.mesh(16)
    seeds, images = jnp.arange(2, dtype=jnp.uint32), jnp.zeros((64, *gan.image_shape), jnp.uint8)
    arguments = parallel.replicate((training.init_seeds(gan, seeds), images), mesh)
    step = training.step_all.lower(*arguments, gan=gan, batch_size=16, mesh=mesh)
    return np.array(step.compile().cost_analysis()["flops"])


def gradient_penalty():
    """A WGAN-GP: several updates of the discriminator per step, second derivatives."""
    states, losses = trained(small(wgan_gp.wgan_gp), num_steps=2, seeds=(0,))
    return {"networks": flat((states.generator, states.discriminator)), "losses": losses}


def resumed(directory):
    """A training that ended and was taken up again from its checkpoint."""
    model = small(dcgan.dcgan)
    half, _ = trained(model, num_steps=2, checkpoint_dir=directory)
    assert checkpoints.steps(directory) == [2]
    states, _ = trained(model, num_steps=3, checkpoint_dir=directory)
    never_stopped, _ = trained(model, num_steps=3)
    networks, same = (flat((s.generator, s.discriminator)) for s in (states, never_stopped))
    np.testing.assert_array_equal(networks, same)
    return {"half": flat((half.generator, half.discriminator)), "networks": networks}


def sad():
    """DeepSAD on features that lie on the device, and on some that come from the host."""
    config = DeepSADConfig(widths=(4, 4), rep_dim=8, epochs=2, batch_size=16)
    draw = np.random.default_rng(0)
    own = draw.standard_normal((40, 8, 8, 2)).astype(np.float32)
    real = draw.standard_normal((30, 8, 8, 2)).astype(np.float32) + 0.5
    found = {}
    for name, array in (("device", jnp.asarray), ("host", np.asarray)):
        model, losses = deepsad.fit(jax.random.key(0), array(own), array(real), config)
        found |= {
            f"{name}_losses": losses,
            f"{name}_params": flat((model.params, model.batch_stats, model.centre)),
            f"{name}_scores": deepsad.score(model, np.concatenate([own, real])),
        }
    return found


def keyed():
    """Three users: a multiple of no number of devices but one."""
    model = small(dcgan.dcgan)
    state = training.take_seed(training.init_seeds(model, jnp.arange(1, dtype=jnp.uint32)), 0)
    root = sampling.from_state(model, state)
    config = KeyedConfig(num_steps=3, batch_size=8)
    keys = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype(np.float32)
    keys /= np.linalg.norm(keys.reshape(3, -1), axis=1)[:, None, None, None]
    state = user_generators.init(root, 3, config, first=5)
    state, losses = user_generators.train(
        root, state, keys, np.full(3, 2.0), jax.random.key(1), config
    )
    state, robust = user_generators.train_robust(
        root, state, keys, jax.random.key(2), config, lambda rng, x: 0.9 * x
    )
    one = user_generators.take_user(root, state, 2)
    return {
        "params": flat(state.params),
        "users": np.asarray(state.user),
        "steps": np.asarray(state.step),
        "losses": np.stack([losses, robust]),
        "images": sampling.generate(one, jax.random.key(3), 4).astype(np.float32),
    }


def _solved(rows, **options):
    """Of 13 targets, of which one is no number: activations, iterations, certificates."""
    from toy_model import LAYER  # makes arrays, which has to wait for `initialize`

    draw = np.random.default_rng(0)
    scale = np.geomspace(0.1, 1, 13)[:, None, None, None]
    targets = (scale * draw.standard_normal((13, *LAYER.operator.output_shape))).astype(np.float32)
    targets[4, 0, 0, 0] = np.nan
    said = []
    z, info = lasso.solve(LAYER.operator, targets[rows], lam=0.05, progress=said.append, **options)
    assert len(z.sharding.device_set) == 1
    assert said == sorted(said) and said[-1] == len(z)
    return {"z": np.asarray(z), "iters": info.num_iters, "gap": info.relative_gap}


def certified():
    """More images than slots."""
    return _solved(slice(None), tol=1e-3, chunk_size=4)


def started():
    """From given activations, with slots that stay empty."""
    started = np.random.default_rng(1).standard_normal((13, 4, 4, 5)).astype(np.float32)
    return _solved(slice(None), tol=1e-3, chunk_size=64, z_init=started)


def alike():
    """Iterations alone, a number of them that is no multiple of ten."""
    return _solved(slice(None), tol=0, max_iters=25, method="fista", chunk_size=16)


def few():
    """Fewer images than devices."""
    return _solved(slice(0, 3), tol=1e-3)


def attributor():
    """One-class detector with impostors: fitted, and its scores."""
    from toy_model import LAYER, own_images

    own, activations = own_images(1, 160)
    config = AttributorConfig(
        check_untouched=False,
        max_iters=10,
        one_class=OneClassConfig(num_components=8, batch_size=16),
        classifier=ClassifierConfig(widths=(8,), num_steps=5, batch_size=8),
        num_altered=40,
        batch_size=64,
    )
    draw = np.random.default_rng(3)
    impostors = draw.integers(0, 256, (40, *own.shape[1:]), dtype=np.uint8)
    fitted = flipad_jax.fit(
        LAYER,
        activations.mean(axis=0),
        own,
        rng=jax.random.key(0),
        impostors=impostors,
        config=config,
    )
    suspects = np.concatenate([own_images(2, 30)[0], impostors[:7]])
    return {
        "calibration": fitted.calibration_scores,
        "scores": flipad_jax.score(fitted, suspects),
        "networks": flat({n: c.variables for n, c in fitted.detector.classifiers.items()}),
    }


def processes():
    """What processes tell each other."""
    count, index = jax.process_count(), jax.process_index()
    mine = parallel.local_range(7)
    wide = np.pi * np.arange(7)[:, None] + np.array([0.0, 1e-17])  # float64: more than JAX keeps
    gathered = parallel.gather(wide[mine.start : mine.stop])
    np.testing.assert_array_equal(gathered, wide)
    text = np.array([f"file {i}" for i in range(7)])
    np.testing.assert_array_equal(parallel.gather(text[mine.start : mine.stop]), text)
    assert parallel.gather(np.zeros((0, 3))).shape == (0, 3)
    only_last = np.ones((2 if index == count - 1 else 0, 2), np.int64)
    np.testing.assert_array_equal(parallel.gather(only_last), np.ones((2, 2)))
    squares = parallel.in_parts(lambda rows: {"square": rows**2}, np.arange(5))
    np.testing.assert_array_equal(squares["square"], np.arange(5) ** 2)
    assert parallel.in_parts(np.negative, np.arange(1)).tolist() == [0]
    assert parallel.is_main() == (index == 0)
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM], "SIGTERM did not reach the handler from before `initialize`"
    assert parallel.anywhere(index == count - 1) and not parallel.anywhere(False)
    parallel.check_same("this", "text", np.arange(3), None)
    if count > 1:
        for value in (index, np.arange(3 + index), np.full(2, index)):
            try:
                parallel.check_same("The data", value)
            except ValueError as error:
                assert "The data of process 1" in str(error), error
            else:
                raise AssertionError("a difference was not noticed")
        try:
            parallel.mesh(7)
        except ValueError as error:
            assert "7" in str(error) and "2 processes" in str(error), error
        else:
            raise AssertionError("7 rows were divided between 2 processes")
    devices = jax.local_device_count()
    for rows in range(1, 20):
        used = max(n for n in range(1, devices + 1) if rows % n == 0)
        assert parallel.local_mesh(rows).size == used
        assert parallel.mesh(rows * count).size == used * count
    where = [device.process_index for device in parallel.mesh().devices.flat]
    assert where == sorted(where) and len(where) == jax.device_count()
    mesh = parallel.mesh()
    own = np.float32(index) + np.arange(2 * jax.local_device_count(), dtype=np.float32)
    total = jax.jit(jnp.sum)(parallel.shard(own, mesh))
    expected = sum((i + np.arange(len(own))).sum() for i in range(count))
    assert float(total) == expected, (float(total), expected)
    keys = parallel.replicate(jax.random.split(jax.random.key(0), 2), mesh)
    assert (
        jax.random.key_data(parallel.local(keys)) == parallel.local(jax.random.key_data(keys))
    ).all()
    return {"gathered": gathered}


TASKS = {
    task.__name__: task
    for task in (
        gan,
        gradient_penalty,
        resumed,
        sad,
        keyed,
        certified,
        started,
        alike,
        few,
        attributor,
        processes,
    )
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("tasks")
    parser.add_argument("--coordinator_address")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    group = args.coordinator_address, args.num_processes, args.process_id
    if args.num_processes is not None:
        parallel.initialize(*group)
        parallel.initialize(*group)  # once is enough
    found = {}
    for name in args.tasks.split(","):
        options = {"directory": args.out.with_suffix("")} if name == "resumed" else {}
        found |= {f"{name}/{key}": value for key, value in TASKS[name](**options).items()}
    if parallel.is_main():
        np.savez(args.out, num_devices=jax.device_count(), **found)


if __name__ == "__main__":
    main()
