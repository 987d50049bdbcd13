"""One step of training, of every GAN and of DeepSAD: the library against PyTorch.

    python benchmarks/training.py
    python benchmarks/training.py --size=64 --steps=dcgan,lsgan --batch_size=32 --repeats=3
    taskset -c 1 python benchmarks/training.py          # on a machine that does other things too

The GAN step is `training.step_all`, as `training.train` calls it: with 32 pixels a side the small
recipes of the zoo (one channel), with 64 the paper's networks (three). PyTorch takes the same step:
architecture, losses, Adam, one pass through the generator for both updates, no gradient that is not
used. The DeepSAD step is FLIPAD's encoder on activations of two sizes, 128 in a batch.

Prints a JSON line per step: seconds by the clock and of processor time (median of the repeats,
compiled, warmed up, blocked on), and what PyTorch takes over what we take. The contenders take
turns in one process and use the same number of threads, one per core they may run on. PyTorch runs
in both memory formats of images; the ratio is to the faster one.

Only one thread, or a machine that does nothing else, makes a fair comparison: PyTorch's threads
wait for one another in every layer, so that another process on one of the cores makes it five to
ten times slower, in processor time too.
"""

import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from flipad_jax import conventions
from flipad_jax.detection import deepsad
from flipad_jax.generators import training, zoo

STEPS = (*zoo.FAMILIES, "deepsad16", "deepsad32")

_STEPS = flags.DEFINE_list("steps", list(STEPS), f"Which: {', '.join(STEPS)}.")
_SIZE = flags.DEFINE_enum("size", "32", ["32", "64"], "Side of a GAN's images.")
_CONVENTION = flags.DEFINE_enum(
    "convention", "reference", list(conventions.CONVENTIONS), "Recipe of LSGAN and EBGAN."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images in a GAN's batch.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed steps of each contender.", lower_bound=1)

SMALL = {
    "dcgan": ((128, 64, 64), (64, 64, 128)),
    "ebgan": ((128, 64, 64), (64, 64, 128)),
    "lsgan": ((64, 64, 64, 64), (16, 32, 64, 128)),
    "wgan_gp": ((128, 64, 64), (64, 64, 128)),
}


def make_gan(family, size):
    """The family's model for digits of 32 or pictures of 64 pixels."""
    if size == 64:
        return zoo.make(family, (64, 64, 3), convention=_CONVENTION.value)
    features, discriminator_features = SMALL[family]
    return zoo.make(
        family,
        (32, 32, 1),
        convention=_CONVENTION.value,
        latent_dim=64,
        features=features,
        discriminator_features=discriminator_features,
    )


# --- GANs in PyTorch ------------------------------------------------------------------------------


def torch_generator(torch, gan):
    """DCGAN's generator, which three families share, or LSGAN's."""
    nn, features, size = torch.nn, gan.generator.features, gan.image_shape[0]
    channels = gan.image_shape[2]
    if gan.family == "lsgan":
        side = size // 8
        first = nn.Linear(gan.latent_dim, features[0] * side**2)
        modules = [first, nn.Unflatten(1, (features[0], side, side))]
        for before, after in zip(features, features[1:]):
            convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
            norm = nn.BatchNorm2d(after, gan.generator.epsilon)
            modules += [nn.Upsample(scale_factor=2), convolution, norm, nn.ReLU()]
        return nn.Sequential(*modules, nn.Conv2d(features[-1], channels, 3, padding=1), nn.Tanh())
    modules = [nn.Unflatten(1, (gan.latent_dim, 1, 1))]
    for i, (before, after) in enumerate(zip((gan.latent_dim, *features), features)):
        geometry = (4, 2, 1) if i else (4, 1, 0)
        convolution = nn.ConvTranspose2d(before, after, *geometry, bias=False)
        modules += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
    last = nn.ConvTranspose2d(features[-1], channels, 4, 2, 1, bias=False)
    return nn.Sequential(*modules, last, nn.Tanh())


def torch_discriminator(torch, gan):
    """The family's discriminator; EBGAN's is an encoder and a decoder."""
    nn, features, side = torch.nn, gan.discriminator.features, gan.image_shape[0]
    channels = gan.image_shape[2]
    modules = []
    for i, (before, after) in enumerate(zip((channels, *features), features)):
        side //= 2
        if gan.family == "lsgan":
            modules += [nn.Conv2d(before, after, 3, 2, 1), nn.LeakyReLU(0.2), nn.Dropout2d(0.25)]
            if i:
                modules.append(nn.BatchNorm2d(after, gan.discriminator.epsilon))
        elif gan.family == "ebgan":
            if i:
                modules += [nn.BatchNorm2d(before), nn.LeakyReLU(0.2)]
            modules.append(nn.Conv2d(before, after, 4, 2, 1, bias=False))
        else:
            modules.append(nn.Conv2d(before, after, 4, 2, 1, bias=False))
            if i and gan.family == "wgan_gp":
                modules.append(nn.LayerNorm([after, side, side]))
            elif i:
                modules.append(nn.BatchNorm2d(after))
            modules.append(nn.LeakyReLU(0.2))
    if gan.family == "lsgan":
        return nn.Sequential(*modules, nn.Flatten(), nn.Linear(features[-1] * side**2, 1))
    if gan.family != "ebgan":
        return nn.Sequential(*modules, nn.Conv2d(features[-1], 1, 4, bias=False), nn.Flatten(0))
    decoder = []
    for before, after in zip(features[::-1], features[-2::-1]):
        convolution = nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)
        decoder += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
    decoder.append(nn.ConvTranspose2d(features[0], channels, 4, 2, 1, bias=False))
    return nn.ModuleList([nn.Sequential(*modules), nn.Sequential(*decoder)])


def torch_losses(torch, gan, discriminator):
    """(discriminator's loss of real and generated images, generator's loss), of the family."""
    functional = torch.nn.functional

    def entropy(logits, label):
        labels = torch.full_like(logits, label)
        return functional.binary_cross_entropy_with_logits(logits, labels)

    def penalty(real, fake):
        weight = torch.rand(len(real), 1, 1, 1)
        mixed = (weight * real + (1 - weight) * fake).requires_grad_()
        gradient = torch.autograd.grad(discriminator(mixed).sum(), mixed, create_graph=True)[0]
        return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()

    def code_and_decode(images):
        codes = discriminator[0](images)
        return codes.flatten(1), discriminator[1](codes)

    def ebgan_discriminator(real, fake):
        energies = [functional.mse_loss(code_and_decode(x)[1], x) for x in (real, fake)]
        return energies[0] + functional.relu(max(1, len(real) / 64) - energies[1])

    def ebgan_generator(fake):
        codes, decoded = code_and_decode(fake)
        directions, n = functional.normalize(codes), len(codes)
        cosines = directions @ directions.T
        if _CONVENTION.value == "paper":
            cosines = cosines**2
        pull_away = (cosines.sum() - n) / (n * (n - 1))
        return functional.mse_loss(decoded, fake.detach()) + 0.1 * pull_away

    return {
        "dcgan": (
            lambda real, fake: entropy(discriminator(real), 0.9)
            + entropy(discriminator(fake), 0.1),
            lambda fake: entropy(discriminator(fake), 0.9),
        ),
        "wgan_gp": (
            lambda real, fake: discriminator(fake).mean()
            - discriminator(real).mean()
            + 10 * penalty(real, fake),
            lambda fake: -discriminator(fake).mean(),
        ),
        "lsgan": (
            lambda real, fake: 0.5
            * (((discriminator(real) - 1) ** 2).mean() + (discriminator(fake) ** 2).mean()),
            lambda fake: ((discriminator(fake) - 1) ** 2).mean(),
        ),
        "ebgan": (ebgan_discriminator, ebgan_generator),
    }[gan.family]


def torch_gan_step(torch, gan, images, batch_size, memory_format):
    """A function that makes one step."""
    generator = torch_generator(torch, gan).to(memory_format=memory_format)
    discriminator = torch_discriminator(torch, gan).to(memory_format=memory_format)
    betas = (0.0, 0.9) if gan.family == "wgan_gp" else (0.5, 0.999)
    networks = [list(network.parameters()) for network in (generator, discriminator)]
    adams = [torch.optim.Adam(p, lr=2e-4, betas=betas, fused=True) for p in networks]
    of_fakes = torch_losses(torch, gan, discriminator)
    images = torch.tensor(images.transpose(0, 3, 1, 2))

    def update(index, loss):
        gradients = torch.autograd.grad(loss, networks[index])
        for parameter, gradient in zip(networks[index], gradients):
            parameter.grad = gradient
        adams[index].step()

    def batch():
        real = images[torch.randint(len(images), (batch_size,))].float() / 127.5 - 1
        return real.contiguous(memory_format=memory_format)

    def step():
        for i in range(gan.discriminator_steps):
            last = i == gan.discriminator_steps - 1
            with torch.set_grad_enabled(last):
                fake = generator(torch.randn(batch_size, gan.latent_dim))
            update(1, of_fakes[0](batch(), fake.detach()))
        update(0, of_fakes[1](fake))

    return step, sum(p.numel() for network in networks for p in network)


def jax_gan_step(gan, images, batch_size):
    """The same with the library."""
    states = training.init_seeds(gan, jnp.zeros(1, jnp.uint32))
    images = jnp.asarray(images)
    trained = states.generator["params"], states.discriminator
    count = sum(leaf.size for leaf in jax.tree.leaves(trained))

    def step():
        nonlocal states
        states, _ = training.step_all(states, images, gan=gan, batch_size=batch_size)
        jax.block_until_ready(states)

    return step, count


# --- DeepSAD --------------------------------------------------------------------------------------


def jax_deepsad_step(x, labels, config):
    """`deepsad.train_step`, compiled."""
    state = deepsad.init(jax.random.key(0), x.shape[1:], config)
    state = state.replace(centre=jnp.full(config.rep_dim, 0.1, jnp.float32))
    run = jax.jit(deepsad.train_step, static_argnames="config")
    x, labels = jnp.asarray(x), jnp.asarray(labels)

    def step():
        nonlocal state
        state, _ = run(state, x, labels, config)
        jax.block_until_ready(state)

    return step, sum(leaf.size for leaf in jax.tree.leaves(state.params))


def torch_deepsad_step(torch, x, labels, config, memory_format):
    """The same in PyTorch."""
    nn, modules, (side, _, before) = torch.nn, [], x.shape[1:]
    for width in config.widths:
        norm = nn.BatchNorm2d(width, eps=1e-4, affine=False)
        convolution = nn.Conv2d(before, width, 5, padding=2, bias=False)
        modules += [convolution, norm, nn.LeakyReLU(0.01), nn.MaxPool2d(2)]
        before, side = width, side // 2
    linear = nn.Linear(before * side**2, config.rep_dim, bias=False)
    network = nn.Sequential(*modules, nn.Flatten(), linear).to(memory_format=memory_format)
    adam = torch.optim.Adam(
        network.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    x = torch.tensor(x.transpose(0, 3, 1, 2)).contiguous(memory_format=memory_format)
    exponents = torch.tensor(labels)

    def step():
        distances = ((network(x) - 0.1) ** 2).sum(dim=1)
        loss = ((distances + config.eps) ** exponents).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()

    return step, sum(p.numel() for p in network.parameters())


# --- measuring ------------------------------------------------------------------------------------


def medians(contenders, repeats):
    """Median seconds of each contender, by the clock and of processor time, taking turns."""
    times = {name: [] for name in contenders}
    for step in contenders.values():
        step()
        step()
    for _ in range(repeats):
        for name, step in contenders.items():
            start = time.perf_counter(), time.process_time()
            step()
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: np.median(values, axis=0).tolist() for name, values in times.items()}


def contenders_of(name, torch):
    """What to call the step, and the functions that make it with their numbers of parameters."""
    formats = {}
    if torch is not None:
        formats = {"pytorch": torch.contiguous_format, "pytorch_nhwc": torch.channels_last}
    rng = np.random.default_rng(0)
    if name in zoo.FAMILIES:
        gan, batch_size = make_gan(name, int(_SIZE.value)), _BATCH_SIZE.value
        images = rng.integers(0, 256, (4 * batch_size, *gan.image_shape), np.uint8)
        made = {"ours": jax_gan_step(gan, images, batch_size)}
        for key, memory_format in formats.items():
            made[key] = torch_gan_step(torch, gan, images, batch_size, memory_format)
        size = "x".join(map(str, gan.image_shape))
        return f"{name} {size}, batch {batch_size}, {gan.discriminator_steps} to 1", made
    config = deepsad.DeepSADConfig(widths=deepsad.ENCODER_WIDTHS["activations"])
    side = int(name.removeprefix("deepsad"))
    x = rng.standard_normal((config.batch_size, side, side, 64), np.float32)
    labels = np.where(np.arange(len(x)) % 2, 1, -1).astype(np.int32)
    made = {"ours": jax_deepsad_step(x, labels, config)}
    for key, memory_format in formats.items():
        made[key] = torch_deepsad_step(torch, x, labels, config, memory_format)
    return f"deepsad {side}x{side}x64, batch {len(x)}", made


def main(argv):
    """Measure the steps that were asked for."""
    if len(argv) > 1 or not set(_STEPS.value) <= set(STEPS):
        raise app.UsageError(f"unknown: {argv[1:] or sorted(set(_STEPS.value) - set(STEPS))}")
    threads = len(os.sched_getaffinity(0))
    try:
        import torch

        torch.set_num_threads(threads)
    except ImportError:
        torch = None
    for name in _STEPS.value:
        shown, made = contenders_of(name, torch)
        counts = {count for _, count in made.values()}
        if len(counts) > 1:
            raise AssertionError(f"{name}: networks of different sizes, {counts}")
        found = medians({key: step for key, (step, _) in made.items()}, _REPEATS.value)
        line = {"step": shown, "threads": threads, "parameters": counts.pop()}
        line["seconds"] = {key: round(clock, 4) for key, (clock, _) in found.items()}
        line["processor_seconds"] = {key: round(cpu, 4) for key, (_, cpu) in found.items()}
        peers = [values for key, values in found.items() if key != "ours"]
        if peers:
            clock, cpu = np.min(peers, axis=0) / found["ours"]
            line["pytorch_over_ours"] = {"seconds": round(clock, 2), "processor": round(cpu, 2)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    app.run(main)
