"""What a run would cost, told without running it: `--plan`.

An experiment that has `plan(config) -> list[Stage]` names its compiled steps: the functions of the
library that it would call, the shapes they would be called with, and how often. Here XLA counts
what one call takes, from the shapes alone, and public peak figures of accelerators make times of
it. Nothing is trained, generated or loaded.

* FLOPs are those of the program as it is written (`Lowered.cost_analysis`): after optimisation,
  some backends hide products in calls to libraries, where nothing counts them. A multiplication by
  a zero that a convolution pads or dilates with is not counted.
* Bytes are the memory traffic of the compiled program: what it reads and writes between fused
  operations. It is compiled for the backend that is there, so on another one they are an estimate.
* XLA counts the body of a loop once. Loops of a known length are counted in full here; of a loop
  that ends when something holds, one iteration, and the stage says how many it counts.
* XLA counts nothing for factorisations, which are calls to LAPACK; `_FACTORISATIONS` does.

The stage builders below are used by all experiments. They take the library's own compiled
functions, private ones too: what is planned is then what runs, and a change there fails here
instead of making the plan wrong.
"""

import functools
import math
import os
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from flipad_jax import data
from flipad_jax.detection import (
    classifier,
    deepsad,
    one_class,
    reconstruction,
    regeneration,
    validity,
)
from flipad_jax.detection.classifier import Classifier, ClassifierConfig
from flipad_jax.detection.deepsad import DeepSADConfig
from flipad_jax.detection.reconstruction import ReconstructionConfig
from flipad_jax.detection.regeneration import RegenerationConfig
from flipad_jax.generators import impostors, sampling, training
from flipad_jax.generators.sampling import TrainedGenerator
from flipad_jax.generators.training import Gan
from flipad_jax.inversion import lasso, polyphase
from flipad_jax.inversion.final_layer import FinalLayer
from flipad_jax.inversion.linops import Conv, ConvTranspose, Dense
from flipad_jax.inversion.polyphase import Polyphase
from flipad_jax.inversion.preconditioner import Preconditioner

__all__ = [
    "ACCELERATORS",
    "Accelerator",
    "Cost",
    "Stage",
    "abstract_generator",
    "analyse",
    "classifier_training",
    "deepsad_scoring",
    "deepsad_training",
    "gan_training",
    "generation",
    "impostor_images",
    "inversion",
    "latent_search",
    "lower_bound",
    "mean_activation",
    "principal_directions",
    "reconstruction_training",
    "regeneration_search",
    "report",
    "share",
    "this_machine",
    "traces_of_processing",
    "training_images",
]


class Stage(NamedTuple):
    """One compiled step of an experiment.

    Attributes:
      name: as the table shows it.
      function: jitted or not; what the experiment itself calls.
      arguments: trees of `jax.ShapeDtypeStruct`; nothing of them exists.
      calls: how often it runs.
      num_parameters: weights of the networks in it.
      static: keyword arguments that are part of the program.
      at_most: whether `calls` is an upper bound, as a solver stops when it is done.
      shared_by: how many devices can share one call: the length of the axis that is cut into equal
        parts, images or models; 1 for what one device does alone.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    calls: int
    num_parameters: int = 0
    static: Mapping[str, Any] = {}
    at_most: bool = False
    shared_by: int = 1


class Cost(NamedTuple):
    """One call of a stage.

    Attributes:
      flops: additions, multiplications and comparisons; a multiply-add counts as two.
      bytes: memory traffic.
      peak_memory: bytes of arguments, results and everything between; None if not known.
      exact: whether every product in it asks for full float32; others run in the reduced precision
        that is the accelerator's default.
    """

    flops: float
    bytes: float
    peak_memory: int | None
    exact: bool


class Accelerator(NamedTuple):
    """Peak figures of one chip, from the maker's data sheet.

    Attributes:
      flops: per second, in the precision that JAX multiplies float32 arrays in by default.
      exact_flops: per second at `Precision.HIGHEST`.
      bandwidth: bytes per second to and from its memory.
      memory: bytes.
      precision: what `flops` assumes.
    """

    flops: float
    exact_flops: float
    bandwidth: float
    memory: float
    precision: str


# The data sheets of NVIDIA (dense, without sparsity; SXM boards) and the TPU pages of Google Cloud.
# A TPU multiplies in bfloat16 only: six passes make a float32 product.
ACCELERATORS = {
    "A100": Accelerator(156e12, 19.5e12, 2.039e12, 80e9, "TF32"),
    "H100": Accelerator(494.7e12, 66.9e12, 3.35e12, 80e9, "TF32"),
    "TPU v5e": Accelerator(197e12, 197e12 / 6, 0.819e12, 16e9, "bfloat16"),
}


# ---------------------------------------------------------------------------------------------
# Cost


def analyse(stage: Stage) -> Cost:
    """What one call of a stage takes, from its shapes."""
    function = stage.function if hasattr(stage.function, "trace") else jax.jit(stage.function)
    traced = function.trace(*stage.arguments, **stage.static)
    lowered = traced.lower()
    compiled = _compile(lowered)
    more_flops, more_bytes = _uncounted(traced.jaxpr.jaxpr)
    memory = compiled.memory_analysis()
    peak = None
    if memory is not None:
        peak = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
    precisions = set(_precisions(traced.jaxpr.jaxpr))
    return Cost(
        flops=_counted(lowered, "flops") + more_flops,
        bytes=_counted(compiled, "bytes accessed") + more_bytes,
        peak_memory=peak,
        exact=precisions == {True},
    )


def _compile(lowered: Any) -> Any:
    # The lowest level makes the same fusions, hence the same bytes, in half the time.
    on_cpu = jax.default_backend() == "cpu"
    return lowered.compile({"xla_backend_optimization_level": 0} if on_cpu else None)


def _counted(stage: Any, what: str) -> float:
    """A number of XLA's analysis; it leaves out what is zero."""
    return float((stage.cost_analysis() or {}).get(what, 0.0))


# Of an [m, n] matrix, m >= n (Golub and Van Loan, Matrix Computations, 4th edition, sections 3.2,
# 5.2, 8.3; eigenvectors by tridiagonalisation and QR iteration).
_FACTORISATIONS: dict[str, Callable[[int, int], float]] = {
    "lu": lambda m, n: m * n**2 - n**3 / 3,
    "geqrf": lambda m, n: 2 * n**2 * (m - n / 3),
    "householder_product": lambda m, n: 2 * n**2 * (m - n / 3),
    "eigh": lambda m, n: 9 * n**3,
}


def _uncounted(jaxpr: Jaxpr) -> tuple[float, float]:
    """FLOPs and bytes that XLA's analysis of this program leaves out."""
    flops = bytes_ = 0.0
    equation: Any
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in _FACTORISATIONS:
            *batch, m, n = equation.invars[0].aval.shape
            flops += math.prod(batch) * _FACTORISATIONS[name](m, n)
        inner = [_uncounted(body) for body in _bodies(equation)]
        if name == "scan":
            body, length = equation.params["jaxpr"], equation.params["length"]
            missing = length - _copies(length, equation.params["unroll"])
            if missing:
                once = _once(body)
                flops, bytes_ = flops + missing * once[0], bytes_ + missing * once[1]
            inner = [(length * f, length * b) for f, b in inner]
        elif name == "cond":  # As XLA does, the costliest branch.
            inner = [max(inner)] if inner else []
        flops, bytes_ = flops + sum(f for f, _ in inner), bytes_ + sum(b for _, b in inner)
    return flops, bytes_


def _copies(length: int, unroll: int) -> int:
    """How often the body of a scan stands in the program."""
    return min(unroll, length) + (length % unroll if unroll < length else 0)


def _once(body: ClosedJaxpr) -> tuple[float, float]:
    """XLA's count of the body of a loop."""
    arguments = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in body.in_avals]
    lowered = jax.jit(jaxpr_as_fun(body)).lower(*arguments)
    return _counted(lowered, "flops"), _counted(_compile(lowered), "bytes accessed")


def _bodies(equation: Any) -> Iterator[Jaxpr]:
    """The programs inside an operation: bodies, branches, called functions."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _precisions(jaxpr: Jaxpr) -> Iterator[bool]:
    """Of every product, whether it asks for full precision."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            asked = equation.params["precision"]
            asked = asked if isinstance(asked, tuple) else (asked,)
            yield all(precision == lax.Precision.HIGHEST for precision in asked)
        for body in _bodies(equation):
            yield from _precisions(body)


# ---------------------------------------------------------------------------------------------
# Stages


def _abstract(tree: Any) -> Any:
    """The shapes of a tree of arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _rng() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _num_elements(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _batches(num: int, batch_size: int) -> int:
    return -(-num // batch_size)


def training_images(dataset: str, image_size: int, num_images: int = 0) -> jax.ShapeDtypeStruct:
    """The shape of `data.load(dataset, split="train", ...)`, which reads nothing but file names and
    one image of a folder.

    Of a data set that is neither embedded nor a folder 10 000 RGB images are taken, as [P1] trains
    on, where `num_images` does not say how many.
    """
    count, channels = {"digits": (4000, 1), "photos": (8000, 3)}.get(dataset, (10_000, 3))
    if os.path.isdir(dataset):
        root, names, *_ = data.find_images(dataset)
        count = len(names) * 8 // 10
        decoded = (data.decode_image(os.path.join(root, name))[0] for name in names)
        channels = next((image.shape[2] for image in decoded if image is not None), channels)
    shape = (num_images or count, image_size, image_size, channels)
    return jax.ShapeDtypeStruct(shape, jnp.uint8)


def abstract_generator(gan: Gan) -> TrainedGenerator:
    """The generator of a `Gan` with shapes in place of weights."""
    return sampling.from_state(gan, jax.eval_shape(lambda: training.init(gan, jax.random.key(0))))


def gan_training(
    gan: Gan,
    batch_size: int,
    num_steps: int,
    num_models: int = 1,
    *,
    num_images: int = 10_000,
    name: str | None = None,
) -> Stage:
    """Training of GANs: one call is one step of one of `num_models`.

    Args:
      gan: the model.
      batch_size: images per update.
      num_steps: generator updates.
      num_models: seeds, each trained so long. They share a program; its memory grows with them.
      num_images: training images, which are all on the device.
      name: of the stage.
    """
    states = jax.eval_shape(lambda: training.init_seeds(gan, jnp.zeros(1, jnp.uint32)))
    images = jax.ShapeDtypeStruct((num_images, *gan.image_shape), jnp.uint8)
    return Stage(
        name or f"{gan.family}: training step",
        training.step_all,
        (_abstract(states), images),
        calls=num_steps * num_models,
        num_parameters=_num_elements((states.generator["params"], states.discriminator)),
        static={"gan": gan, "batch_size": batch_size},
        shared_by=batch_size,
    )


def generation(
    generator: TrainedGenerator, num_images: int, batch_size: int = 250, *, name: str = "generation"
) -> Stage:
    """`sampling.generate`."""
    return Stage(
        name,
        sampling._generate_batch,
        (_abstract(generator), _rng(), jax.ShapeDtypeStruct((), jnp.int32)),
        calls=_batches(num_images, batch_size),
        num_parameters=_num_elements(generator.variables["params"]),
        static={"batch_size": batch_size},
    )


def mean_activation(
    generator: TrainedGenerator, num_samples: int = 5000, batch_size: int = 128
) -> Stage:
    """`sampling.mean_activation`; the running sum is not counted."""
    return Stage(
        "mean activation",
        sampling.activations,
        (_abstract(generator), _floats(batch_size, generator.latent_dim)),
        calls=_batches(num_samples, batch_size),
        num_parameters=_num_elements(generator.variables["params"]),
    )


def inversion(
    layer: FinalLayer,
    num_images: int,
    batch_size: int = 64,
    max_iters: int = 30,
    *,
    method: str = "fista",
    tol: float = 0.0,
    name: str = "inversion",
) -> Stage:
    """`final_layer.invert`: one call is ten iterations, and their certificate, of one batch.

    What ends a solve is not counted; for "primal_dual" that is a fifth of it.

    Args:
      layer: the last layer, of arrays or shapes.
      num_images: to be inverted.
      batch_size: slots of the solver.
      max_iters: iterations of each image.
      method: as in `lasso.METHODS`.
      tol: if it is not 0, an image may need fewer iterations, and the stage says "at most".
      name: of the stage.
    """
    operator: Any = layer.operator
    if isinstance(operator, (Conv, ConvTranspose)):
        operator = polyphase.polyphase(operator)
    operator = _abstract(operator)
    number = jax.ShapeDtypeStruct((), operator.dtype)
    numbers: dict[str, Any] = {"lam": number, "tol": number}
    numbers["max_iters"] = jax.ShapeDtypeStruct((), jnp.int32)
    if method == "fista":
        numbers["lipschitz"] = number
    else:
        numbers["preconditioner"] = _preconditioner(operator)
    targets = jax.ShapeDtypeStruct((batch_size, *layer.operator.output_shape), operator.dtype)
    enter = functools.partial(lasso._enter, method=method)
    state, o, _ = jax.eval_shape(enter, operator, targets, None, numbers)

    def advance(operator, state, o, numbers):
        # Not `lasso._advance` itself, whose number of steps is no constant: a constant is counted.
        step = lasso.METHODS[method](operator, **numbers).advance
        return jax.vmap(lambda state, o: step(state, o, lasso._GAP_EVERY))(state, o)

    return Stage(
        name,
        jax.jit(advance, donate_argnums=1),
        (operator, state, o, numbers),
        calls=_batches(num_images, batch_size) * _batches(max_iters, lasso._GAP_EVERY),
        num_parameters=_num_elements(layer.operator),
        at_most=tol > 0,
        shared_by=batch_size,
    )


def _preconditioner(operator: Any) -> Preconditioner:
    """The shapes of `preconditioner(operator)`, which wants weights: a 3 x 3 filter, as on every
    trained layer so far."""
    shape: tuple[int, ...] = ()
    if isinstance(operator, Polyphase):
        shape = (3, 3, operator.output_shape[2], operator.output_shape[2])
    elif isinstance(operator, Dense):
        shape = (math.prod(operator.output_shape),) * 2
    number: Any = jax.ShapeDtypeStruct((), operator.dtype)
    weights: Any = jax.ShapeDtypeStruct(shape, operator.dtype)
    return Preconditioner(weights, number, number)


def latent_search(
    generator: TrainedGenerator,
    num_images: int,
    steps: int,
    restarts: int = 1,
    *,
    batch_size: int = 64,
    name: str = "latent search",
) -> Stage:
    """Search for the latent of an image by gradient steps (SM-Inv of [P1]).

    One call is one step of a batch: images of the latents, their mean squared distance to the
    suspects, its gradient at the latents.

    Args:
      generator: the model, of arrays or shapes.
      num_images: suspects.
      steps: of each search.
      restarts: searches of each suspect.
      batch_size: searches at a time.
      name: of the stage.
    """

    def step(generator, latents, images):
        def distance(latents):
            made = generator.module.apply(generator.variables, latents)
            return jnp.mean(jnp.square(made - images))

        return jax.value_and_grad(distance)(latents)

    return Stage(
        name,
        step,
        (
            _abstract(generator),
            _floats(batch_size, generator.latent_dim),
            _floats(batch_size, *generator.image_shape),
        ),
        calls=_batches(num_images * restarts, batch_size) * steps,
        num_parameters=_num_elements(generator.variables["params"]),
    )


# Of a start whose image is not ours, on average over 48 of digits_dcgan_0.
_JACOBIANS_PER_START = 25


def regeneration_search(
    generator: TrainedGenerator, num_starts: int, *, name: str = "regeneration"
) -> Stage:
    """Search for the latent of an image by Levenberg and Marquardt's method (`regeneration`).

    One call is one Jacobian of one image, which is nearly all of the work; calls are those of
    images that are not ours. Own ones take fewer, and fewer starts. What a codec in the model adds
    is left out.

    Args:
      generator: the model, of arrays or shapes.
      num_starts: suspects times starts.
      name: of the stage.
    """
    config = RegenerationConfig()
    image = _floats(*generator.image_shape)

    def jacobian(generator, image, z):
        state = regeneration.init(z, image, config)
        return regeneration.linearize((generator, None), image, state, config)

    return Stage(
        name,
        jacobian,
        (_abstract(generator), image, _floats(generator.latent_dim)),
        calls=num_starts * _JACOBIANS_PER_START,
        at_most=True,
        num_parameters=_num_elements(generator.variables["params"]),
    )


def _deepsad_state(config: DeepSADConfig, shape: Sequence[int]) -> Any:
    return jax.eval_shape(lambda: deepsad.init(jax.random.key(0), tuple(shape), config))


def deepsad_training(
    config: DeepSADConfig, shape: Sequence[int], num_samples: int, *, name: str = "DeepSAD training"
) -> Stage:
    """`deepsad.fit`: one call is one step.

    Args:
      config: settings; the number of epochs and the size of a batch are among them.
      shape: (h, w, c) of the features.
      num_samples: own and real ones together.
      name: of the stage.
    """
    state = _deepsad_state(config, shape)
    labels = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
    return Stage(
        name,
        deepsad._train_step_jit,
        (state, _floats(config.batch_size, *shape), labels),
        calls=config.epochs * (num_samples // config.batch_size),
        num_parameters=_num_elements(state.params),
        static={"config": config},
        shared_by=config.batch_size,
    )


def deepsad_scoring(
    config: DeepSADConfig, shape: Sequence[int], num_samples: int, *, name: str = "DeepSAD scoring"
) -> Stage:
    """`deepsad.score`, which also finds the centre before training."""
    state = _deepsad_state(config, shape)
    return Stage(
        name,
        deepsad._embed_jit,
        (state.params, state.batch_stats, _floats(config.batch_size, *shape)),
        calls=_batches(num_samples, config.batch_size),
        num_parameters=_num_elements(state.params),
        static={"config": config},
        shared_by=config.batch_size,
    )


def impostor_images(
    generator: TrainedGenerator, num_images: int, *, images_per_impostor: int = 128
) -> Stage:
    """`impostors.generate`: one call is one impostor."""
    return Stage(
        "images of impostors",
        impostors._impostor,
        (_abstract(generator), jax.eval_shape(sampling.final_layer, generator), _rng()),
        calls=_batches(num_images, images_per_impostor),
        num_parameters=_num_elements(generator.variables["params"]),
        static={"num_images": images_per_impostor},
    )


def classifier_training(
    input_shape: tuple[int, int, int],
    config: ClassifierConfig,
    learned: str,
    *,
    reads: str = "images",
) -> Stage:
    """`classifier.fit`, on images or activations of a shape: one call is one step.

    Its step stands inside `fit`, so the gradient of the network's own logits stands for it; the
    statistics of batch normalisation and AdamW, a thousandth, are not counted.
    """
    (h, w), c = classifier._seen(input_shape), input_shape[2]
    scale = None if reads == "images" else _floats(c)
    init = functools.partial(classifier._network(input_shape, config).init, train=False)
    variables = jax.eval_shape(init, _rng(), _floats(1, h, w, c if scale else 5 * c))
    batch = 2 * config.batch_size  # as many own images as others

    def step(model, images, labels):
        def loss(params):
            changed = model.replace(variables={**model.variables, "params": params})
            found = classifier._logits(changed, images)
            return optax.sigmoid_binary_cross_entropy(found, labels).mean()

        return jax.grad(loss)(model.variables["params"])

    return Stage(
        f"network that learns {reads} of {learned}: training step",
        step,
        (
            Classifier(variables, scale, scale, input_shape, config),  # type: ignore[arg-type]
            _floats(batch, h, w, c),
            _floats(batch),
        ),
        calls=config.num_steps,
        num_parameters=_num_elements(variables["params"]),
    )


def reconstruction_training(
    image_shape: tuple[int, int, int], config: ReconstructionConfig
) -> Stage:
    """`reconstruction.fit` on images of a shape: one call is one step, as of
    `classifier_training`."""
    network = reconstruction._network(image_shape, config)
    init = functools.partial(network.init, train=False)
    variables = jax.eval_shape(init, _rng(), _floats(1, *network.shape))

    def step(variables, images, wanted):
        def loss(params):
            found, _ = network.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.mean(jnp.square(found - wanted))

        return jax.grad(loss)(variables["params"])

    batch = _floats(config.batch_size, *network.shape)
    return Stage(
        "network that draws own images again: training step",
        step,
        (variables, batch, batch),
        calls=config.num_steps,
        num_parameters=_num_elements(variables["params"]),
    )


def principal_directions(num_samples: int, num_features: int, num_components: int) -> Stage:
    """The costly part of `one_class.fit`: the Gram matrix of own activations and its vectors."""
    return Stage(
        "principal directions",
        one_class._principal_directions,
        (_floats(num_samples, num_features), num_components),
        calls=1,
    )


def traces_of_processing(image_shape: tuple[int, int, int], num_images: int) -> Stage:
    """Features of `validity.fit` and `check`: one call is one batch."""
    h, w, c = image_shape
    batch, window = validity._BATCH, validity._WINDOW
    return Stage(
        "traces of processing",
        validity._features_batch,
        (jax.ShapeDtypeStruct((batch, min(h, window), min(w, window), c), jnp.uint8),),
        calls=_batches(num_images, batch),
    )


# ---------------------------------------------------------------------------------------------
# Times and the table


def lower_bound(cost: Cost, accelerator: Accelerator) -> float:
    """Seconds that one call takes at the very least: full arithmetic or full memory all the time.

    How far a run is above it depends on the layers; kernels, launches and the host are not in it.
    """
    flops = accelerator.exact_flops if cost.exact else accelerator.flops
    return max(cost.flops / flops, cost.bytes / accelerator.bandwidth)


def this_machine() -> Accelerator:
    """What the first device reaches in a large matrix product and in a copy, measured in a second
    or two."""
    on_cpu = jax.default_backend() == "cpu"
    side, length = (1024, 2**22) if on_cpu else (8192, 2**28)

    def seconds(function, x):
        # In place: a new array is paged in first, which takes longer than writing it.
        jitted = jax.jit(function, donate_argnums=0)
        x, times = jitted(x).block_until_ready(), []
        for _ in range(5):
            start = time.perf_counter()
            x = jitted(x).block_until_ready()
            times.append(time.perf_counter() - start)
        return min(times)

    def product_rate(precision):
        product = functools.partial(jnp.dot, precision=precision)
        return 2 * side**3 / seconds(lambda x: product(x, x), jnp.zeros((side, side), jnp.float32))

    fast, exact = product_rate(None), product_rate(lax.Precision.HIGHEST)
    bandwidth = 2 * 4 * length / seconds(lambda x: x + 1, jnp.zeros(length, jnp.float32))
    return Accelerator(fast, exact, bandwidth, math.inf, "float32" if on_cpu else "default")


def share(stage: Stage, num_devices: int) -> float:
    """The part of a stage's time that it takes on so many devices, if exchange costs nothing.

    The axis is cut into equal parts: the largest number of devices that divides it takes part.
    """
    return 1 / _num_used(stage, num_devices)


def _num_used(stage: Stage, num_devices: int) -> int:
    return max(n for n in range(1, num_devices + 1) if stage.shared_by % n == 0)


def report(command: str, stages: Sequence[Stage], num_devices: int | None = None) -> str:
    """The table that `--plan` prints.

    Args:
      command: names what is planned.
      stages: from the experiment's `plan`.
      num_devices: how many to plan for, beside one; those present by default.
    """
    if num_devices is None:
        num_devices = jax.device_count()
    machines = {**ACCELERATORS, "this machine": this_machine()}
    header = ["stage", "parameters", "calls", "FLOPs", "bytes", "peak memory", *machines]
    if num_devices > 1:
        header.insert(3, "devices")
    rows, totals = [header], [0.0] * (2 + len(machines))
    shared = [0.0] * len(machines)
    known: dict[str, Cost] = {}
    for stage in stages:
        # Stages that differ in nothing but their calls are compiled once.
        same = repr((stage.function, stage.arguments, stage.static))
        cost = known[same] = known.get(same) or analyse(stage)
        amounts = [cost.flops, cost.bytes]
        amounts += [lower_bound(cost, machine) for machine in machines.values()]
        amounts = [stage.calls * amount for amount in amounts]
        totals = [total + amount for total, amount in zip(totals, amounts, strict=True)]
        part = share(stage, num_devices)
        shared = [time + part * more for time, more in zip(shared, amounts[2:], strict=True)]
        times = [_time(amount) for amount in amounts[2:]]
        for place, machine in enumerate(machines.values()):
            if cost.peak_memory is not None and cost.peak_memory > machine.memory:
                times[place] = "too large"
        name = stage.name + (" (float32)" if cost.exact else "")
        rows.append(
            [
                name,
                _si(stage.num_parameters) if stage.num_parameters else "",
                f"{'<= ' if stage.at_most else ''}{stage.calls:,}",
                _si(amounts[0]),
                _si(amounts[1]) + "B",
                "?" if cost.peak_memory is None else _si(cost.peak_memory) + "B",
                *times,
            ]
        )
        if num_devices > 1:
            rows[-1].insert(3, str(_num_used(stage, num_devices)))
    sums = [_si(totals[0]), _si(totals[1]) + "B", "", *map(_time, totals[2:])]
    blank = [""] * (len(header) - 1 - len(sums))
    rows.append(["all", *blank, *sums])
    if num_devices > 1:
        rows[-1][0] = "all, on one device"
        blank = [""] * (len(header) - 1 - len(machines))
        rows.append([f"all, on {num_devices} devices", *blank, *map(_time, shared)])
    backend = jax.default_backend()
    peaks = "; ".join(
        f"{name} {_si(m.flops)}FLOP/s ({m.precision}) and {_si(m.exact_flops)}FLOP/s, "
        f"{_si(m.bandwidth)}B/s"
        for name, m in machines.items()
    )
    notes = [
        "FLOPs and bytes: all calls of a stage; peak memory: one call. Bytes and memory are those "
        f"of the program that XLA compiles for {backend}.",
        "Times are lower bounds: FLOPs over peak rate or bytes over bandwidth, whichever is "
        "larger. Launches, small kernels, loading, drawing and writing come on top; only caches, "
        "and a compiler that fuses more, save bytes.",
        f"Peaks, of this machine measured: {peaks}. The second rate is that of full float32, which "
        "the stages marked so ask for.",
    ]
    if num_devices > 1:
        alone = [stage.name for stage in stages if _num_used(stage, num_devices) == 1]
        notes.append(
            f"On {num_devices} devices: images of a batch are cut into equal parts, and what "
            "devices exchange (gradients, once a step) costs nothing, so it is a lower bound as "
            "well. The times of the stages are those of one device. One device does alone: "
            f"{', '.join(alone) or 'nothing'}."
        )
    text = [
        f"{command} was not run. It would take:",
        "",
        _aligned(rows, 2 if num_devices > 1 else 1),
        "",
    ]
    return "\n".join(text + [textwrap.fill(note, 100) for note in notes])


def _aligned(rows: Sequence[Sequence[str]], num_sums: int) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:-num_sums], rule, *lines[-num_sums:]])


def _si(value: float) -> str:
    """Three digits and a prefix: 12.3 M."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if value < 999.5 or prefix == "E":
            break
        value /= 1000
    return f"{value:.3g} {prefix}" if prefix else f"{value:.3g} "


def _time(seconds: float) -> str:
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            break
    return f"{seconds / size:.3g} {unit}"
