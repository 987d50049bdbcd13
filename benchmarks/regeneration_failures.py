"""Which latents does a search miss, and why?

    python benchmarks/regeneration_failures.py
    python benchmarks/regeneration_failures.py --generator=digits_lsgan_0 --num_images=100

Own images are searched for from one start, at zero, without a bank. Of every image a few quantities
are known at its true latent, of which this is to say whether they tell a failure from a success:

* `norm`: ||z||, how far the start is away;
* `clipped`: share of pixels at level 0 or 255, which are inequalities and no equations;
* `dead`: share of the hidden layers' units that are off;
* `smallest`, `middle`: singular values of the Jacobian of those pixels that are not clipped, in
  grey levels per unit of the latent: a flat direction has a small one;
* `to_bank`: root mean square distance, in grey levels, to the nearest of other own images;
* `line`: is the way straight? Of the misfit in target space on the line from the start to the true
  latent: how often it rises among 50 steps.

One JSON line: failures, and per quantity its mean over failures and successes and the area under
the curve, above 0.5 where failures have more of it. Then, of the failures: how many other starts
find (the nearest of --bank own images; three random ones), and whether the place where the search
stopped is a minimum (gradient of the squared error there, relative to that at the start).
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from flipad_jax import metrics
from flipad_jax.detection import regeneration
from flipad_jax.detection.regeneration import RegenerationConfig
from flipad_jax.generators import zoo

_GENERATOR = flags.DEFINE_string("generator", "digits_dcgan_0", "A generator of the zoo, a file.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 200, "Own images.", lower_bound=10)
_BANK = flags.DEFINE_integer("bank", 8192, "Own images with known latents.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of latents and starts.")


def _searched(generator, images, rng, num_starts, bank=None):
    config = RegenerationConfig(num_starts=num_starts)
    return regeneration.regenerate(generator, images, rng, config, bank=bank)


def _dead(generator, latents):
    """`[n]` share of units that are off: batch normalisation that ends at zero or below."""
    _, state = generator.module.apply(
        generator.variables,
        latents,
        capture_intermediates=lambda module, _: type(module).__name__ == "BatchNorm",
        mutable=["intermediates"],
    )
    layers = jax.tree.leaves(state["intermediates"])
    return np.mean([np.mean(np.asarray(x) <= 0, axis=tuple(range(1, x.ndim))) for x in layers], 0)


def _spectra(generator, latents, images):
    """`[n, d]` singular values of the Jacobians, largest first."""

    @jax.jit
    def jacobian(z):
        def levels(z):
            return 127.5 * (generator.module.apply(generator.variables, z[None])[0] + 1)

        return jax.jacfwd(levels)(z).reshape(-1, z.size)

    found = []
    for z, image in zip(latents, images, strict=True):
        seen = ((image > 0) & (image < 255)).ravel()
        rows = np.where(seen[:, None], np.asarray(jacobian(z), np.float64), 0)
        found.append(np.linalg.svd(rows, compute_uv=False))
    return np.stack(found)


def _misfit(generator, slack, z, image):
    """What a search from the start minimises, without its prior."""
    made = generator.module.apply(generator.variables, z[None])[0]
    return jnp.mean(jnp.square(regeneration.target_residual(made, image, slack)))


def _rises(generator, slack, latents, images):
    """`[n]` how often the misfit rises on the line from zero to the true latent."""

    @jax.jit
    def along(z, image):
        steps = jnp.linspace(0, 1, 51)[:, None] * z
        return jax.vmap(lambda s: _misfit(generator, slack, s, image))(steps)

    found = [np.diff(np.asarray(along(z, x))) for z, x in zip(latents, images, strict=True)]
    return np.array([int((steps > 0).sum()) for steps in found], float)


def _slopes(generator, latents, images):
    """`[n]` norms of the gradients of the mean squared error in levels."""

    @jax.jit
    def norm(z, image):
        def cost(z):
            made = generator.module.apply(generator.variables, z[None])[0]
            return jnp.mean(jnp.square(regeneration.residual(127.5 * (made + 1), image)))

        return jnp.linalg.norm(jax.grad(cost)(z))

    return np.array([float(norm(z, x)) for z, x in zip(latents, images, strict=True)])


def main(argv):
    """Search, describe, print."""
    del argv
    name = _GENERATOR.value
    generator = zoo.load(name) if name in zoo.names() else zoo.load_file(name)
    rng = functools.partial(jax.random.fold_in, jax.random.key(_SEED.value))
    own = regeneration.make_bank(generator, rng(0), _NUM_IMAGES.value)
    bank = regeneration.make_bank(generator, rng(1), _BANK.value)
    first = _searched(generator, own.images, rng(2), 1)
    failed = ~first.proved
    floats = own.images.astype(np.float32)
    spectra = _spectra(generator, own.latents, own.images)
    nearest = [
        np.sqrt(np.square(bank.images.astype(np.float32) - image).mean(axis=(1, 2, 3)).min())
        for image in floats
    ]
    config = RegenerationConfig()
    quantities = {
        "norm": np.linalg.norm(own.latents, axis=1),
        "clipped": ((own.images == 0) | (own.images == 255)).mean(axis=(1, 2, 3)),
        "dead": _dead(generator, own.latents),
        "smallest": spectra[:, -1],
        "middle": np.median(spectra, axis=1),
        "to_bank": np.array(nearest),
        "line": _rises(generator, config.slack, own.latents, floats),
    }
    row = {"generator": name, "images": len(failed), "failed": int(failed.sum())}
    if 0 < failed.sum() < len(failed):
        for key, values in quantities.items():
            row[key] = {
                "failures": float(values[failed].mean()),
                "successes": float(values[~failed].mean()),
                "area": metrics.auc(values[~failed], values[failed]),
            }
    if failed.any():
        left = own.images[failed]
        row["found_from_the_bank"] = float(
            _searched(generator, left, rng(3), 1, bank).proved.mean()
        )
        # The first of them is zero again.
        row["found_from_three_more"] = float(_searched(generator, left, rng(4), 4).proved.mean())
        stopped = first.latent[failed][:, : generator.latent_dim]
        slope = functools.partial(_slopes, generator)
        there, at_start = slope(stopped, floats[failed]), slope(0 * stopped, floats[failed])
        row["gradient_where_it_stopped"] = float(np.median(there / at_start))
        row["distance_where_it_stopped"] = float(
            np.median(np.linalg.norm(stopped - own.latents[failed], axis=1))
        )
        row["levels_where_it_stopped"] = float(np.median(first.rmse[failed]))
    print(json.dumps(row))


if __name__ == "__main__":
    app.run(main)
