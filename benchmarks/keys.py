"""Keys for many users: all at once, against one after the other as the papers' code does it.

    python benchmarks/keys.py                      # 100 keys of 32 x 32 x 1
    python benchmarks/keys.py --num_keys=20 --repeats=3

Contenders, on the same 4000 real digits and 4000 images of the zoo's first generator:

*   `joint`: `user_keys.joint` with its own settings;
*   `sequential`: eq. 9, one key after the other, `user_keys.sequential`, 310 steps;
*   `pytorch`: eq. 9 in PyTorch with the published optimiser: Adam 1e-3 falling by 0.6 an epoch, ten
    epochs of batches of 128 real and 128 generated images, the penalty |phi_j^T phi| on all earlier
    keys, start at N(0, I), normalised at the end (the published code never does that; unnormalised
    angles could not be compared).

Prints a JSON line per contender: seconds (median; compiled before, and the compilation's share),
compliance on held-out digits and on other images of the generator, the largest cosine of two keys,
d_max; then the ratio. PyTorch's time is measured on --torch_keys keys and scaled up, its quality is
of those.
"""

import json
import os
import time

import jax
import numpy as np
from absl import app, flags

from flipad_jax import data
from flipad_jax.generators import sampling, zoo
from flipad_jax.registry import user_keys

_NUM_KEYS = flags.DEFINE_integer("num_keys", 100, "Keys.", lower_bound=2)
_TORCH_KEYS = flags.DEFINE_integer("torch_keys", 10, "Keys that PyTorch makes.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs of ours.", lower_bound=1)

_EPOCHS, _BATCH = 10, 128


def torch_keys(real, generated, num_keys, num_threads):
    """Eq. 9 as published, but for the sign and the division by the norm: `[num_keys, D]`."""
    import torch

    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    sets = [torch.from_numpy(x.reshape(len(x), -1)) for x in (real, generated)]
    keys = torch.zeros(0, sets[0].shape[1])
    for _ in range(num_keys):
        key = torch.randn(sets[0].shape[1], requires_grad=True)
        optimizer = torch.optim.Adam([key], lr=1e-3)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.6)
        for _ in range(_EPOCHS):
            orders = [torch.randperm(len(x)) for x in sets]
            for start in range(0, min(map(len, sets)) - _BATCH + 1, _BATCH):
                loss = (keys @ key).abs().sum()
                for x, order in zip(sets, orders):
                    batch = x[order[start : start + _BATCH]]
                    loss = loss + torch.relu(1 + batch @ key).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        keys = torch.cat([keys, (key.detach() / key.detach().norm())[None]])
    return keys.numpy()


def quality(keys, real, generated):
    """What keys are worth on images that they were not made of."""
    found = user_keys.describe(keys, real, generated)
    return {
        "compliance_mean": round(float(found.compliance.mean()), 4),
        "compliance_smallest": round(float(found.compliance.min()), 4),
        "generated_compliance_smallest": round(float(found.generated_compliance.min()), 4),
        "largest_cosine": float(f"{np.abs(found.largest_cosine).max():.3g}"),
        "d_max_mean": round(float(found.d_max.mean()), 2),
    }


def main(_):
    """Run all contenders and print what they take."""
    num_keys = _NUM_KEYS.value
    root = zoo.load("digits_dcgan_0")
    train = data.load("digits", split="train", image_size=32)
    held_out = data.load("digits", split="test", image_size=32)
    generated = sampling.generate(root, jax.random.key(0), len(train))
    other = sampling.generate(root, jax.random.key(1), 1000)
    rng = jax.random.key(2)
    seconds = {}

    def show(name, keys, **facts):
        line = {"contender": name, "num_keys": num_keys, **facts, **quality(keys, held_out, other)}
        print(json.dumps(line), flush=True)

    methods = {
        "joint": lambda: user_keys.joint(rng, train, generated, num_keys),
        "sequential": lambda: user_keys.sequential(
            rng, train, generated, num_keys, config=user_keys.KeyConfig(num_steps=310)
        ),
    }
    for name, method in methods.items():
        start = time.perf_counter()
        method()
        first = time.perf_counter() - start
        times = []
        for _ in range(_REPEATS.value):
            start = time.perf_counter()
            keys = method()  # NumPy arrays: they are there
            times.append(time.perf_counter() - start)
        seconds[name] = float(np.median(times))
        show(name, keys, seconds=round(seconds[name], 3), first_seconds=round(first, 3))
    try:
        import torch  # noqa: F401
    except ImportError:
        print(json.dumps({"contender": "pytorch", "skipped": "PyTorch is not installed"}))
        return
    num_threads = len(os.sched_getaffinity(0))
    floats = [data.to_float(images) for images in (train, generated)]
    torch_keys(*floats, 1, num_threads)
    count = min(_TORCH_KEYS.value, num_keys)
    start = time.perf_counter()
    keys = torch_keys(*floats, count, num_threads).reshape(count, *root.image_shape)
    measured = time.perf_counter() - start
    seconds["pytorch"] = measured * num_keys / count
    show(
        "pytorch",
        keys,
        seconds=round(seconds["pytorch"], 3),
        measured_keys=count,
        measured_seconds=round(measured, 3),
    )
    ratios = {name: round(seconds["pytorch"] / seconds[name], 1) for name in methods}
    print(json.dumps({"pytorch_over_ours": ratios}))


if __name__ == "__main__":
    app.run(main)
