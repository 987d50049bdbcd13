"""A generator of 8 x 8 colour images that is small enough to be made anew in every test."""

import os

import jax
import jax.numpy as jnp
import numpy as np
from image_files import broken_files, png, random_images

import flipad_jax
from flipad_jax import AttributorConfig, FinalLayer, data, linops
from flipad_jax.detection.latent_inversion import LatentGenerator
from flipad_jax.detection.one_class import OneClassConfig
from flipad_jax.inversion.final_layer import forward

_DRAW = np.random.default_rng(0)
KERNEL = (0.2 * _DRAW.standard_normal((4, 4, 5, 3))).astype(np.float32)
BIAS = np.array([0.1, -0.2, 0.3], np.float32)
LAYER = FinalLayer(linops.conv_transpose(KERNEL, (4, 4, 5), strides=2, padding=1), BIAS)
_MIXING = _DRAW.standard_normal((6, 4, 4, 5))


def own_images(seed, num):
    """(uint8 images [num, 8, 8, 3], activations [num, 4, 4, 5]) of a few factors and a ReLU."""
    latents = np.random.default_rng(seed).standard_normal((num, 6))
    z = np.maximum(np.einsum("nk,khwc->nhwc", latents, _MIXING), 0).astype(np.float32)
    return data.to_uint8(np.asarray(jax.vmap(lambda v: forward(LAYER, v))(z))), z


def save_attributor(path, num_images, *, num_components=5, **settings):
    """Fits an attributor to so many own images and saves it; `settings` of AttributorConfig."""
    images, z = own_images(1, num_images)
    settings = {"num_altered": 0, **settings}
    config = AttributorConfig(one_class=OneClassConfig(num_components=num_components), **settings)
    fitted = flipad_jax.fit(LAYER, z.mean(0), images, rng=jax.random.key(0), config=config)
    flipad_jax.save(fitted, path)
    return path


def write_suspects(folder):
    """50 own images, 20 foreign ones in a subfolder, and files of all kinds that are none."""
    data.write_images(folder, own_images(2, 50)[0])
    data.write_images(folder / "others", random_images(20, seed=3))
    for name, (content, _) in broken_files().items():
        (folder / name).write_bytes(content)
    (folder / "round").symlink_to(folder, target_is_directory=True)
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:  # a name that is no text
        file.write(png(random_images(1)[0]))
    return folder


def latent_generator():
    """The same model as a function of its latent, for `--generator=toy_model:latent_generator`."""

    def apply(params, latents):
        z = jnp.maximum(jnp.einsum("nk,khwc->nhwc", latents, params["mixing"]), 0)
        return jax.vmap(lambda v: forward(LAYER, v))(z)

    return LatentGenerator({"mixing": jnp.asarray(_MIXING, jnp.float32)}, apply, 6)


def no_generator():
    """What --generator must refuse."""
    return 7
