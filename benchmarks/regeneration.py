"""Proof of origin: own images proved per second, against the papers' search with Adam.

    python benchmarks/regeneration.py
    python benchmarks/regeneration.py --generator=digits_lsgan_0 --num_images=16
    python benchmarks/regeneration.py --num_images=2 --adam_steps=20 --adam_restarts=2  # a try

Contenders, on the same images of a generator of the zoo:

*   `default`: `regeneration.regenerate` as it is, four starts at most;
*   `levels`: the same without target space;
*   `one_start`, `one_start_levels`: both from zero alone;
*   `bank`: half of the starts at the nearest of `--bank_size` own images with known latents;
*   `near`: the same, but it stops within four levels, as near as Adam comes: what equal success
    takes;
*   `encoder`: the first start at what a network says that learned for `--encoder_steps` to tell
    latents from own images (its training, `encoder_seconds`, is not in the seconds per image);
*   `coarse`: the first start where a search of the image's means over 2 x 2 pixels ended;
*   `adam`: SM-Inv, `latent_inversion.search`: Adam with rate 0.1 on the squared distance, and the
    best of ten random starts counts;
*   `adam_pytorch`: the same in PyTorch, from the same starts (for the generators of DCGAN's shape),
    on one thread or on all, whatever is faster: on a machine that does other things too PyTorch's
    threads wait for one another.

Adam gets the first `--adam_images` images only; what is printed is per image.

Prints a JSON line per contender: the share of images whose latent was found to a root mean square
error below 0.5, 1 and 4 grey levels, their median error, seconds per image by the clock and of
processor time (median of the repeats, Adam's of one run; compiled and warmed up before), images
proved per second, that is below 0.5 levels, images below 4 levels per second, and how many times
more the first contender proves in a second by the clock and in one of processor time; null where
nothing was proved. Then a table.
"""

import functools
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import linen as nn

from flipad_jax import data, report
from flipad_jax.detection import latent_inversion, regeneration
from flipad_jax.detection.latent_inversion import LatentGenerator, LatentInversionConfig
from flipad_jax.detection.regeneration import Bank, RegenerationConfig
from flipad_jax.generators import dcgan, sampling, zoo

CONTENDERS = (
    "default",
    "levels",
    "one_start",
    "one_start_levels",
    "bank",
    "near",
    "encoder",
    "coarse",
    "adam",
    "adam_pytorch",
)

_GENERATOR = flags.DEFINE_string("generator", "digits_dcgan_1", "Name in the zoo.")
_CONTENDERS = flags.DEFINE_list(
    "contenders", list(CONTENDERS), "Which, the first one is compared with."
)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 64, "Own images.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs of ours.", lower_bound=1)
_BANK_SIZE = flags.DEFINE_integer("bank_size", 4096, "Images of the bank.", lower_bound=1)
_ENCODER_STEPS = flags.DEFINE_integer(
    "encoder_steps", 4000, "Training steps of the encoder.", lower_bound=1
)
_ADAM_IMAGES = flags.DEFINE_integer("adam_images", 16, "Images that Adam gets.", lower_bound=1)
_ADAM_STEPS = flags.DEFINE_integer("adam_steps", 1000, "Steps of Adam.", lower_bound=1)
_ADAM_RESTARTS = flags.DEFINE_integer("adam_restarts", 10, "Starts of Adam.", lower_bound=1)

_PROVED = 0.5  # grey levels
_NEAR = 4.0
_LEVELS = (_PROVED, 1.0, _NEAR)


def rmse(generator, latents, images):
    """Root mean square errors `[n]` of what latents make, in grey levels."""
    made = regeneration.make_images(generator, latents).astype(np.float64)
    return np.sqrt(np.square(made - images).mean(axis=(1, 2, 3)))


def timed(run, repeats):
    """What a function returns, and its median seconds by the clock and of processor time."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        found = run()  # NumPy arrays: they are there
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return found, *np.median(times, axis=0).tolist()


def torch_generator(torch, generator):
    """The same network in PyTorch; raises where it does not make the same images."""
    nn, module = torch.nn, generator.module
    params, stats = generator.variables["params"], generator.variables["batch_stats"]

    def transposed(kernel, stride, padding):
        kernel = np.array(kernel).transpose(2, 3, 0, 1).copy()
        layer = nn.ConvTranspose2d(*kernel.shape[:2], 4, stride, padding, bias=False)
        layer.weight.data = torch.from_numpy(kernel)
        return layer

    modules = [nn.Unflatten(1, (generator.latent_dim, 1, 1))]
    for i, width in enumerate(module.features):
        geometry = (2, 1) if i else (1, 0)
        norm = nn.BatchNorm2d(width)
        own, moments = (part[f"norms_{i}"]["BatchNorm_0"] for part in (params, stats))
        for name, array in (
            ("weight", own["scale"]),
            ("bias", own["bias"]),
            ("running_mean", moments["mean"]),
            ("running_var", moments["var"]),
        ):
            getattr(norm, name).data = torch.from_numpy(np.array(array))
        kernel = params[f"convolutions_{i}"]["kernel"]
        modules += [transposed(kernel, *geometry), norm, nn.ReLU()]
    network = nn.Sequential(*modules, transposed(params["last"]["kernel"], 2, 1), nn.Tanh())
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    z = np.random.default_rng(0).standard_normal((8, generator.latent_dim)).astype(np.float32)
    theirs = network(torch.from_numpy(z)).numpy().transpose(0, 2, 3, 1)
    difference = np.abs(theirs - np.asarray(module.apply(generator.variables, z))).max()
    if not difference < 1e-4:
        raise AssertionError(f"PyTorch makes other images, by up to {difference:.2g}")
    return network


def torch_search(torch, network, images, starts, num_steps, batch_size):
    """SM-Inv in PyTorch: the best latents `[n, d]` of starts `[n, restarts, d]`."""
    num_images, num_restarts, latent_dim = starts.shape
    pairs = torch.from_numpy(starts.reshape(-1, latent_dim).copy())
    floats = torch.from_numpy(data.to_float(images).transpose(0, 3, 1, 2).copy())
    wanted = floats.repeat_interleave(num_restarts, 0)
    latents, distances = [], []
    for z, x in zip(pairs.split(batch_size), wanted.split(batch_size)):
        z = z.clone().requires_grad_()
        x = x.contiguous(memory_format=torch.channels_last)
        adam = torch.optim.Adam([z], lr=0.1)
        for _ in range(num_steps):
            adam.zero_grad()
            ((network(z) - x) ** 2).mean(dim=(1, 2, 3)).sum().backward()
            adam.step()
        with torch.no_grad():
            distances.append(((network(z) - x) ** 2).mean(dim=(1, 2, 3)))
        latents.append(z.detach())
    found = torch.cat(latents).reshape(starts.shape).numpy()
    best = torch.cat(distances).reshape(num_images, num_restarts).argmin(dim=1).numpy()
    return found[np.arange(num_images), best]


class Encoder(nn.Module):
    """Latents `[n, d]` of targets `[n, h, w, c]`: a linear map and, beside it, three residual
    blocks."""

    latent_dim: int
    width: int = 512

    @nn.compact
    def __call__(self, targets):
        """The latents' means, given the images."""
        x = targets.reshape(len(targets), -1)
        linear = nn.Dense(self.latent_dim)(x)
        x = nn.Dense(self.width)(x)
        for _ in range(3):
            inner = nn.Dense(self.width)(nn.relu(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(nn.relu(inner))
        return linear + nn.Dense(self.latent_dim)(nn.LayerNorm()(x))


def train_encoder(generator, num_steps, batch_size=128):
    """A function from uint8 images to latents, and the mean squared error that it has at last."""
    encoder = Encoder(generator.latent_dim)
    schedule = optax.cosine_decay_schedule(1e-3, num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def encode(params, images):
        levels = images.astype(jnp.float32) / 127.5 - 1
        return encoder.apply(params, jnp.arctanh(jnp.clip(levels, -0.99, 0.99)))

    def draw(rng):
        z = jax.random.normal(rng, (batch_size, generator.latent_dim))
        images = generator.module.apply(generator.variables, z)
        return z, jnp.clip(jnp.round((images + 1) * 127.5), 0, 255)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, rng):
        z, images = draw(rng)
        loss = lambda params: jnp.square(encode(params, images) - z).mean()  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    key = jax.random.key(3)
    params = encoder.init(key, jnp.zeros((1, *generator.image_shape)))
    state = optimizer.init(params)
    for index in range(num_steps):
        params, state, value = step(params, state, jax.random.fold_in(key, index))
    return jax.jit(functools.partial(encode, params)), float(value)


def coarse_start(generator, images, rng):
    """A function without arguments that searches for the images' means over 2 x 2 pixels."""
    halves = lambda x: x.reshape(  # noqa: E731
        len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3]
    ).mean(axis=(2, 4))
    small = LatentGenerator(
        generator.variables,
        lambda variables, z: halves(generator.module.apply(variables, z)),
        generator.latent_dim,
    )
    means = np.round(halves(images.astype(np.float64))).astype(np.uint8)
    return lambda: regeneration.regenerate(small, means, rng, RegenerationConfig(num_starts=1))


def ours(name, generator, images, rng):
    """A function without arguments that regenerates all images, and facts of the contender."""
    config = RegenerationConfig()
    facts, bank = {}, None
    if name == "encoder":
        start = time.perf_counter()
        encode, loss = train_encoder(generator, _ENCODER_STEPS.value)
        facts["encoder_seconds"] = round(time.perf_counter() - start, 1)
        facts["encoder_loss"] = float(f"{loss:.3g}")
        encode(images)

        def encoded():
            # A bank of the very images: every one is its own nearest, and begins there.
            own = Bank(np.asarray(encode(images)), images)
            return regeneration.regenerate(generator, images, rng, config, bank=own)

        return encoded, facts
    if name == "coarse":
        search = coarse_start(generator, images, rng)

        def refined():
            coarse = search()
            own = Bank(coarse.latent, images)
            found = regeneration.regenerate(generator, images, rng, config, bank=own)
            return found._replace(iterations=found.iterations + coarse.iterations)

        return refined, facts
    if name.startswith("one_start"):
        config = RegenerationConfig(num_starts=1)
    elif name in ("bank", "near"):
        if name == "near":
            config = RegenerationConfig(rmse_levels=_NEAR, max_levels=255.0, switch_levels=_NEAR)
        start = time.perf_counter()
        bank = regeneration.make_bank(generator, jax.random.key(1), _BANK_SIZE.value)
        facts["bank_seconds"] = round(time.perf_counter() - start, 2)
    if name.endswith("levels"):
        config = RegenerationConfig(num_starts=config.num_starts, targets=False)
    return lambda: regeneration.regenerate(generator, images, rng, config, bank=bank), facts


def adam(name, generator, images, rng):
    """Latents of Adam as a function of the number of steps, or None without PyTorch."""
    config = LatentInversionConfig(num_restarts=_ADAM_RESTARTS.value)

    def search(num_steps):
        own = LatentInversionConfig(num_steps=num_steps, num_restarts=config.num_restarts)
        return latent_inversion.search(generator, images, rng, own).latent

    if name == "adam":
        return search
    if not isinstance(generator.module, dcgan.Generator):
        return None
    try:
        import torch
    except ImportError:
        return None
    network = torch_generator(torch, generator)
    pairs = np.divmod(np.arange(len(images) * config.num_restarts), config.num_restarts)
    starts = np.asarray(latent_inversion.starts(rng, *pairs, generator.latent_dim))
    starts = starts.reshape(len(images), config.num_restarts, -1)

    def torch_steps(num_steps):
        return torch_search(torch, network, images, starts, num_steps, config.batch_size)

    seconds = {}
    for count in {1, len(os.sched_getaffinity(0))}:
        torch.set_num_threads(count)
        torch_steps(1)
        seconds[count] = timed(functools.partial(torch_steps, 2), 1)[1]
    torch.set_num_threads(min(seconds, key=seconds.get))
    return torch_steps


def measure(name, generator, images, rng):
    """The line of a contender, without the comparison."""
    if name.startswith("adam"):
        images = images[: _ADAM_IMAGES.value]
        search = adam(name, generator, images, rng)
        if search is None:
            return {"contender": name, "skipped": "no PyTorch, or not of DCGAN's shape"}
        search(1)
        latents, clock, cpu = timed(functools.partial(search, _ADAM_STEPS.value), 1)
        facts = {"steps": _ADAM_STEPS.value, "restarts": _ADAM_RESTARTS.value}
    else:
        run, facts = ours(name, generator, images, rng)
        start = time.perf_counter()
        run()
        facts["first_seconds"] = round(time.perf_counter() - start, 2)
        found, clock, cpu = timed(run, _REPEATS.value)
        latents = found.latent
        facts["starts_mean"] = round(float(found.starts.mean()), 2)
        facts["jacobians_mean"] = round(float(found.iterations.mean()), 1)
    errors = rmse(generator, latents, images)
    shares = {str(level): round(float((errors < level).mean()), 4) for level in _LEVELS}
    proved = int((errors < _PROVED).sum())
    return {
        "contender": name,
        "images": len(images),
        **facts,
        "share_below_levels": shares,
        "rmse_median": float(f"{np.median(errors):.3g}"),
        "seconds_per_image": float(f"{clock / len(images):.3g}"),
        "processor_seconds_per_image": float(f"{cpu / len(images):.3g}"),
        "proved_per_second": float(f"{proved / clock:.3g}"),
        "near_per_second": float(f"{(errors < _NEAR).sum() / clock:.3g}"),
    }


def ratios(first, line):
    """How many times more the first contender proves in a second; None where nothing was proved."""
    found = {}
    for name, key in (("clock", ""), ("processor", "processor_")):
        rates = [
            x["share_below_levels"][str(_PROVED)] / x[f"{key}seconds_per_image"]
            for x in (first, line)
        ]
        found[name] = float(f"{rates[0] / rates[1]:.3g}") if rates[1] else None
    return found


def main(argv):
    """Measure every contender that was asked for."""
    if len(argv) > 1 or not set(_CONTENDERS.value) <= set(CONTENDERS) or not _CONTENDERS.value:
        raise app.UsageError(f"unknown: {argv[1:] or _CONTENDERS.value}")
    generator = zoo.load(_GENERATOR.value)
    images = sampling.generate(generator, jax.random.key(0), _NUM_IMAGES.value)
    rng = jax.random.key(2)
    device = jax.devices()[0].device_kind
    facts = {"generator": _GENERATOR.value, "image_shape": list(generator.image_shape)}
    facts |= {"latent_dim": generator.latent_dim, "device": device}
    print(json.dumps({**facts, "threads": len(os.sched_getaffinity(0))}), flush=True)
    lines = []
    for name in _CONTENDERS.value:
        line = measure(name, generator, images, rng)
        if "skipped" not in line:
            lines.append(line)
            line[f"{lines[0]['contender']}_over_it"] = ratios(lines[0], line)
        print(json.dumps(line), flush=True)
    if not lines:
        return
    table = [
        [
            line["contender"],
            *(f"{share:.1%}" for share in line["share_below_levels"].values()),
            line["rmse_median"],
            line["seconds_per_image"],
            line["proved_per_second"],
            line["near_per_second"],
            *ratios(lines[0], line).values(),
        ]
        for line in lines
    ]
    header = ["contender", *(f"< {level:g} levels" for level in _LEVELS), "median error"]
    first = lines[0]["contender"]
    header += [
        "s per image",
        "proved per s",
        "< 4 levels per s",
        f"{first} / it",
        "in processor time",
    ]
    print(report.table_text(header, table))


if __name__ == "__main__":
    app.run(main)
