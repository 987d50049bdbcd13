"""Which prior of activations separates best: the paper's z_bar, or one that knows more of own ones?

    python benchmarks/activation_priors.py
    python benchmarks/activation_priors.py --ours=FILE --rivals=FILE,FILE

Every image is inverted in several ways, by FISTA at 1/L with as many iterations each; the one-class
detector without its networks is fitted to own images inverted so, and asked about real images and
rivals. One JSON line per way: area under the curve and accuracy against each source.

* `lasso`: 1/2 ||A z - o||^2 + lam ||z - z_bar||_1, what the library does;
* `non_negative`: the same over z >= 0, as activations after a ReLU are;
* `low_rank`: z_bar gives way to the conditional mean of z given o, if activations were normal with
  the mean and the first principal directions of own ones: z_bar + C A^T (A C A^T + sigma)^-1
  (o - A z_bar); kept is z - z_bar;
* `low_rank_rest`: the same, of which what that mean does not explain is kept.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from flipad_jax import data, metrics
from flipad_jax.detection import calibration, one_class
from flipad_jax.generators import sampling, zoo
from flipad_jax.inversion import final_layer, linops

_OURS = flags.DEFINE_string("ours", "digits_dcgan_0", "A generator of the zoo, or a file.")
_RIVALS = flags.DEFINE_list(
    "rivals", ["digits_dcgan_1", "digits_dcgan_2", "digits_wgan_gp_0"], "Others."
)
_ITERS = flags.DEFINE_integer("iters", 30, "Iterations of FISTA.", lower_bound=1)
_LAM = flags.DEFINE_float("lam", 5e-4, "Lasso weight.", lower_bound=0.0)
_FNR = flags.DEFINE_float("fnr", 0.01, "Own images that may be rejected.", lower_bound=0.0)
_NUM_OWN = flags.DEFINE_integer("num_own", 900, "Own images that are fitted.", lower_bound=60)
_NUM_TEST = flags.DEFINE_integer("num_test", 200, "Test images of every source.", lower_bound=8)

_WAYS = ("lasso", "non_negative", "low_rank", "low_rank_rest")
_HELD = 300  # own images for reference, and as many that calibrate
_RANK = 300
_NOISE = 1e-2  # sigma: variance that the principal directions leave to a pixel's target
_BATCH = 50


@functools.partial(jax.jit, static_argnames=("num_iters", "non_negative"))
def _fista(operator, o, prior, lipschitz, lam, *, num_iters, non_negative):
    """z `[n, *input_shape]` after so many iterations from the prior."""

    def gradient(z):
        return jax.vmap(operator.adjoint)(jax.vmap(operator.forward)(z) - o)

    def proximal(z):
        shift = z - prior
        z = prior + jnp.sign(shift) * jnp.maximum(jnp.abs(shift) - lam / lipschitz, 0)
        return jnp.maximum(z, 0) if non_negative else z

    def body(carry, _):
        z, ahead, t = carry
        z_next = proximal(ahead - gradient(ahead) / lipschitz)
        t_next = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        return (z_next, z_next + (t - 1) / t_next * (z_next - z), t_next), None

    (z, _, _), _ = jax.lax.scan(body, (prior, prior, 1.0), None, length=num_iters)
    return z


def _conditional_mean(layer, z_bar, own):
    """o `[n, ...]` -> E[z | o] `[n, *input_shape]` under a normal law fitted to own activations."""
    flat = own.reshape(len(own), -1) - z_bar.ravel()
    _, values, directions = np.linalg.svd(flat, full_matrices=False)
    scaled = directions[:_RANK] * (values[:_RANK, None] / np.sqrt(len(own)))
    scaled = scaled.astype(np.float32).reshape(-1, *z_bar.shape)
    seen = np.asarray(jax.vmap(layer.operator.forward)(scaled)).reshape(len(scaled), -1)
    gram = seen @ seen.T + _NOISE * np.eye(len(seen))
    expected = np.asarray(layer.operator.forward(z_bar))

    def mean(o):
        left = (np.asarray(o) - expected).reshape(len(o), -1)
        weights = np.linalg.solve(gram, seen @ left.T).T
        more = weights @ scaled.reshape(len(scaled), -1)
        return (z_bar.ravel() + more).reshape(len(o), *z_bar.shape).astype(np.float32)

    return mean


def _load(name):
    if name in zoo.names():
        return zoo.load(name), zoo.record(name)
    return zoo.load_file(name), zoo.record_file(name)


def main(_):
    """All ways."""
    ours, entry = _load(_OURS.value)
    layer = sampling.final_layer(ours)
    rngs = jax.random.split(jax.random.key(0), 4)
    count = _NUM_OWN.value + 2 * _HELD
    side, seed = ours.image_shape[0], entry["data_seed"]
    real = data.load(
        entry["dataset"], split="test", image_size=side, num_images=_NUM_TEST.value, seed=seed
    )
    sources = {"real": real}
    for name in _RIVALS.value:
        sources[name] = sampling.generate(_load(name)[0], rngs[1], _NUM_TEST.value)
    own_images = sampling.generate(ours, rngs[0], count + _NUM_TEST.value)
    z_bar = np.asarray(sampling.mean_activation(ours, rngs[2]))
    latents = sampling.latents(rngs[3], jnp.arange(2000), ours.latent_dim)
    own = np.concatenate([sampling.activations(ours, z) for z in np.split(latents, 8)])
    conditional_mean = _conditional_mean(layer, z_bar, own)
    lipschitz = linops.squared_norm(layer.operator)
    for way in _WAYS:

        def inverted(images, way=way):
            found = []
            for start in range(0, len(images), _BATCH):
                o = final_layer.targets(layer, images[start : start + _BATCH])
                prior = np.broadcast_to(z_bar, (len(o), *z_bar.shape))
                if way.startswith("low_rank"):
                    prior = conditional_mean(o)
                z = _fista(
                    layer.operator,
                    o,
                    jnp.asarray(prior),
                    lipschitz,
                    _LAM.value,
                    num_iters=_ITERS.value,
                    non_negative=way == "non_negative",
                )
                found.append(np.asarray(z) - (prior if way == "low_rank_rest" else z_bar))
            return np.concatenate(found)

        z = inverted(own_images)
        model = one_class.fit(z[: _NUM_OWN.value], z[_NUM_OWN.value : -_HELD - _NUM_TEST.value])
        scores = {"own": np.asarray(one_class.score(model, z[-_HELD - _NUM_TEST.value :]))}
        held, scores["own"] = np.split(scores["own"], [_HELD])
        for name in sources:
            scores[name] = np.asarray(one_class.score(model, inverted(sources[name])))
        rivals = {name: scores[name] for name in sources}
        threshold = calibration.threshold(np.sort(held), _FNR.value)
        found = metrics.summary(scores["own"], rivals, threshold)
        kept = ("mean_auc", "mean_accuracy", "auc", "accuracy", "achieved_fnr")
        line = {"ours": _OURS.value, "way": way, **{key: found[key] for key in kept}}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    app.run(main)
