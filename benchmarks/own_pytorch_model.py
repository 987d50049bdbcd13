"""A PyTorch generator of one's own, from state dict to verdicts: seconds and accuracy.

    python benchmarks/own_pytorch_model.py --cache=FOLDER

Trains three DCGANs in PyTorch (latent 64, channels 128-64-64-1, 32 x 32 digits) that differ in the
seed only, and keeps their state dicts in the folder. Each in turn is ours: `interop.from_torch`
takes what attribution needs, `fit` fits the default attributor, and 500 images of each of the other
two seeds, 500 real test digits and 500 own images that fitted nothing are judged at --fnr. Prints
one JSON line per model and number of impostor images: seconds of fitting (everything after the
images exist), accuracy against each source (own accepted and rival rejected, averaged), and the
share of own images that were rejected.
"""

import json
import os
import pathlib
import time

import numpy as np
from absl import app, flags

_CACHE = flags.DEFINE_string("cache", "runs/own_pytorch_model", "Folder of the trained models.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the models.")
_STEPS = flags.DEFINE_integer("steps", 2500, "Training steps of 64 images.", lower_bound=1)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 2000, "Own images to fit on.", lower_bound=80)
_NUM_IMPOSTORS = flags.DEFINE_list("num_impostors", ["0"], "Images of impostors to learn from.")
_FNR = flags.DEFINE_float("fnr", 0.005, "Share of own images that may be rejected.")

LATENT_DIM = 64
LAST_LAYER = "9"
NUM_TEST = 500
_BATCH = 64


def generator():
    """An untrained generator, latents `[n, 64, 1, 1]` -> `[n, 1, 32, 32]` in (-1, 1)."""
    from torch import nn

    layers, width = [], LATENT_DIM
    for i, features in enumerate((128, 64, 64)):
        stride, padding = (2, 1) if i else (1, 0)
        layers.append(nn.ConvTranspose2d(width, features, 4, stride, padding, bias=False))
        layers += [nn.BatchNorm2d(features), nn.ReLU()]
        width = features
    layers += [nn.ConvTranspose2d(width, 1, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.Sequential(*layers)


def discriminator():
    """The mirrored discriminator, images to logits `[n, 1, 1, 1]`."""
    from torch import nn

    layers, width = [], 1
    for i, features in enumerate((64, 64, 128)):
        layers.append(nn.Conv2d(width, features, 4, 2, 1, bias=False))
        layers += [nn.BatchNorm2d(features)] if i else []
        layers.append(nn.LeakyReLU(0.2))
        width = features
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 0, bias=False))


def _untrained():
    """Generator and discriminator, initialised as DCGANs are."""
    from torch import nn

    models = generator(), discriminator()
    for layer in (layer for model in models for layer in model.modules()):
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
    return models


def train(seed, steps):
    """A trained generator: the recipe of `generators/dcgan.py` ([P1] E.1), in PyTorch."""
    import torch

    from flipad_jax import data

    images = data.to_float(data.load("digits", split="train"))
    images = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    torch.manual_seed(seed)
    # Channels last: 1.7 times faster on a CPU.
    ours, critic = (part.to(memory_format=torch.channels_last) for part in _untrained())
    optimisers = [
        torch.optim.Adam(module.parameters(), lr=2e-4, betas=(0.5, 0.999))
        for module in (ours, critic)
    ]

    def loss(logits, label):
        return torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.full_like(logits, label)
        )

    for step in range(steps):
        real = images[torch.randint(len(images), (_BATCH,))]
        fake = ours(torch.randn(_BATCH, LATENT_DIM, 1, 1))
        optimisers[1].zero_grad()
        (loss(critic(real), 0.9) + loss(critic(fake.detach()), 0.1)).backward()
        optimisers[1].step()
        optimisers[0].zero_grad()
        loss(critic(fake), 0.9).backward()
        optimisers[0].step()
        if (step + 1) % 250 == 0:
            print(f"seed {seed}: step {step + 1} of {steps}", flush=True)
    return ours.eval()


def cached(folder, seed, steps):
    """The generator of a seed, trained if the folder has it not."""
    import torch

    path = pathlib.Path(folder) / f"dcgan_{steps}_steps_seed_{seed}.pth"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        torch.save(train(seed, steps).state_dict(), partial)
        os.replace(partial, path)
    module = generator()
    module.load_state_dict(torch.load(path, weights_only=True))
    return module.eval()


def sample(start, count):
    """Latents number `start` to `start + count - 1`, each from its number alone."""
    import torch

    return torch.stack(
        [
            torch.randn(LATENT_DIM, 1, 1, generator=torch.Generator().manual_seed(i))
            for i in range(start, start + count)
        ]
    )


def images_of(module, first, count):
    """uint8 `[count, 32, 32, 1]` of latents from number `first` on."""
    import torch

    from flipad_jax import data

    with torch.no_grad():
        return data.to_uint8(np.moveaxis(module(sample(first, count)).numpy(), 1, -1))


def measure(modules, seed, num_images, num_impostors, fnr):
    """One row: this seed is ours, the others are rivals."""
    import jax

    from flipad_jax import data, fit, verdicts
    from flipad_jax.generators import interop

    start = time.monotonic()
    imported = interop.from_torch(
        modules[seed],
        LAST_LAYER,
        sample=sample,
        num_images=num_images,
        num_impostors=num_impostors,
        seed=seed,
    )
    imported_at = time.monotonic()
    attributor = fit(
        imported.layer,
        imported.z_bar,
        imported.generated,
        impostors=imported.impostors,
        rng=jax.random.key(seed),
    )
    fitted_at = time.monotonic()
    # Latents that neither fitted nor calibrated, nor made the impostors.
    own = verdicts(attributor, images_of(modules[seed], 10**6, NUM_TEST), fnr)
    rivals = {
        f"seed_{other}": images_of(module, 0, NUM_TEST)
        for other, module in modules.items()
        if other != seed
    }
    rivals["real"] = data.load("digits", split="test", num_images=NUM_TEST)
    accepted = float(np.mean(own.accepted))
    accuracy = {
        name: (accepted + 1 - float(np.mean(verdicts(attributor, images, fnr).accepted))) / 2
        for name, images in rivals.items()
    }
    mismatch = interop.mean_mismatch(imported.layer, imported.z_bar, imported.generated)
    return {
        "ours": f"seed_{seed}",
        "own_images": num_images,
        "impostor_images": num_impostors,
        "seconds_import": round(imported_at - start, 1),
        "seconds_fit": round(fitted_at - imported_at, 1),
        "seconds_judge_per_image": round(
            (time.monotonic() - fitted_at) / (NUM_TEST * (1 + len(rivals))), 4
        ),
        "accuracy": {name: round(value, 4) for name, value in accuracy.items()},
        "mean_accuracy": round(float(np.mean(list(accuracy.values()))), 4),
        "fnr": round(1 - accepted, 4),
        "mean_mismatch": round(mismatch, 3),
    }


def main(argv):
    """Train what is missing, then measure."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    modules = {int(seed): cached(_CACHE.value, int(seed), _STEPS.value) for seed in _SEEDS.value}
    for num_impostors in map(int, _NUM_IMPOSTORS.value):
        for seed in modules:
            row = measure(modules, seed, _NUM_IMAGES.value, num_impostors, _FNR.value)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app.run(main)
