"""A PyTorch generator that runs: geometry, mean activation, own images and impostors from it."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flipad_jax import data
from flipad_jax.generators import impostors as _impostors
from flipad_jax.generators.interop import layer_of_arrays
from flipad_jax.generators.interop.written import ImportedGenerator, weights_of
from flipad_jax.inversion.final_layer import ACTIVATIONS, FinalLayer

__all__ = ["from_torch"]

_IMAGES_PER_IMPOSTOR = 128

Progress = Callable[[str, int, int], None]


def from_torch(
    module: Any,
    last_layer: str,
    *,
    sample: Callable[[int, int], Any],
    num_images: int = 2000,
    num_mean: int = 5000,
    num_impostors: int = 0,
    batch_size: int = 100,
    activation: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ImportedGenerator:
    """All that attribution needs of a PyTorch generator.

    The module runs in evaluation mode, on the device where it is; its training flags are restored.
    Kind and geometry of the layer are read off it, which of the invertible activations follows
    is found by comparing. What `sample` gives depends on the numbers alone, so nothing here depends
    on `batch_size` beyond rounding:

        def sample(start, count):
            return torch.stack([
                torch.randn(100, 1, 1, generator=torch.Generator().manual_seed(i))
                for i in range(start, start + count)
            ])

    Images are the first `num_images` of the stream, z_bar is the mean of the first `num_mean`,
    impostors go on after both.

    Args:
      module: `torch.nn.Module`; what `sample` gives -> images `[n, c, h, w]`, in [-1, 1] (or in
        [0, 1] if it ends with a sigmoid, or a tanh scaled to [0, 1]).
      last_layer: name of its last `ConvTranspose2d`, `Conv2d` or `Linear`.
      sample: (start, count) -> inputs of images number start to start + count - 1: a tensor, or a
        tuple of tensors, the positional arguments of the module.
      num_images: own images, to fit on and calibrate with.
      num_mean: activations averaged for z_bar; the paper's code uses 5000.
      num_impostors: images of changed copies of the module (`generators.impostors`); some ten
        thousand tell other seeds of one's architecture far better. They are made 128 at a time,
        because batch normalisation takes the statistics of its batch.
      batch_size: images at once, for memory and speed only.
      activation: one of `final_layer.ACTIVATIONS`, if it shall be that one; found if None.
      seed: of the impostors.
      progress: called with (what is being done, how much is done, of how much).
    Returns:
      Layer, z_bar, images, impostors, notes.
    Raises:
      ValueError: if there is no such layer, it or what follows is not of the form that [P1]
        inverts, the module is not deterministic, or its images depend on their batch.
    """
    import torch

    if min(num_images, batch_size) < 3 or num_mean < 1 or num_impostors < 0:
        raise ValueError(
            f"{num_images=} and {batch_size=} must be at least 3, {num_mean=} 1, "
            f"{num_impostors=} 0"
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"{activation=}: expected one of {', '.join(ACTIVATIONS)}")
    progress = progress or (lambda what, done, total: None)
    last = _torch_last_layer(module, last_layer)
    total = max(num_images, num_mean)
    with torch.no_grad(), _evaluating(module):
        first = _run(module, last, sample, 0, min(batch_size, total))
        _check_deterministic(module, last, sample, first)
        image_shape = _torch_image_shape(last, last_layer, first)
        ending = _torch_ending(first, activation)
        layer = _torch_layer(last, last_layer, first, image_shape, ending)
        generated = np.empty((num_images, *image_shape), np.uint8)
        z_sum = np.zeros(first.z.shape[1:], np.float64)
        clipped = 0
        for start in range(0, total, batch_size):
            count = min(batch_size, total - start)
            batch = first if start == 0 else _run(module, last, sample, start, count)
            if start:
                _check_ending(batch, ending)
            z_sum += batch.z[: max(0, num_mean - start)].cpu().double().sum(dim=0).numpy()
            if start < num_images:
                x = _in_range(batch.out[: num_images - start], ending)
                clipped += int(np.sum(np.abs(x) > 1))
                generated[start : start + len(x)] = data.to_uint8(x)
            progress("making own images", min(start + count, total), total)
        z_mean = _channels_last(z_sum[None] / num_mean)[0].reshape(layer.operator.input_shape)
        z_bar = jnp.asarray(z_mean, jnp.float32)
        impostor_images = None
        if num_impostors:
            impostor_images = _torch_impostors(
                module, last_layer, layer, sample, total, num_impostors, seed, progress
            )
    notes = [f"the last activation is {ending.description}"]
    if clipped:
        share = clipped / generated.size
        notes.append(
            f"{share:.2%} of the values of the images lie outside [-1, 1] and were clipped, as an "
            "8-bit file does it"
        )
    return ImportedGenerator(layer, z_bar, generated, impostor_images, tuple(notes))


class _Batch(NamedTuple):
    """One forward pass: input and output of the last layer, and of the module (torch tensors)."""

    inputs: tuple[Any, ...]
    z: Any
    before: Any
    out: Any


class _Ending(NamedTuple):
    """What follows the last layer in a module."""

    activation: str
    description: str
    function: Callable[[Any], Any]
    zero_to_one: bool


def _endings() -> tuple[_Ending, ...]:
    import torch

    return (
        _Ending("tanh", "tanh", torch.tanh, False),
        _Ending("sigmoid", "sigmoid", torch.sigmoid, True),
        _Ending("identity", "identity", lambda a: a, False),
        _Ending("tanh", "tanh, scaled to [0, 1]", lambda a: (torch.tanh(a) + 1) / 2, True),
        _Ending("sigmoid", "sigmoid, scaled to [-1, 1]", lambda a: torch.tanh(a / 2), False),
        _Ending("identity", "identity, clipped", lambda a: torch.clamp(a, -1, 1), False),
    )


def _torch_kinds() -> dict[str, Any]:
    from torch import nn

    return {"conv_transpose": nn.ConvTranspose2d, "conv": nn.Conv2d, "dense": nn.Linear}


def _torch_last_layer(module: Any, name: str) -> Any:
    """The submodule, if it is one that can be inverted."""
    kinds = tuple(_torch_kinds().values())
    submodules = dict(module.named_modules())
    last = submodules.get(name)
    if not isinstance(last, kinds):
        candidates = [n for n, m in submodules.items() if isinstance(m, kinds)]
        found = "there is none of that name" if last is None else f"it is a {type(last).__name__}"
        listed = (
            ", ".join(f"{n!r}" for n in candidates[::-1][: layer_of_arrays.NAMES_LISTED]) or "none"
        )
        raise ValueError(
            f"{name!r} is no ConvTranspose2d, Conv2d or Linear of the module ({found}); these are, "
            f"from the last on: {listed}"
        )
    for setting, allowed in (("groups", 1), ("dilation", 1), ("padding_mode", "zeros")):
        value = getattr(last, setting, allowed)
        if value not in (allowed, (allowed, allowed)):
            raise ValueError(
                f"{name!r} has {setting}={value}; only {setting}={allowed} is supported"
            )
    return last


@contextlib.contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    flags = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in flags:
            part.training = training


def _device(module: Any) -> Any:
    import torch

    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _inputs(module: Any, sample: Callable[[int, int], Any], start: int, count: int) -> tuple:
    import torch

    inputs = sample(start, count)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    for tensor in inputs:
        if not isinstance(tensor, torch.Tensor) or len(tensor) != count:
            got = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(
                f"sample({start}, {count}) must return a tensor, or a tuple of tensors, with "
                f"{count} rows; got {got}"
            )
    return tuple(tensor.to(_device(module)) for tensor in inputs)


def _run(
    module: Any, last: Any, sample: Callable[[int, int], Any], start: int, count: int
) -> _Batch:
    return _forward(module, last, _inputs(module, sample, start, count))


def _forward(module: Any, last: Any, inputs: tuple) -> _Batch:
    import torch

    calls: list[tuple[Any, Any]] = []

    def watch(_, args, kwargs, output):
        calls.append((args[0] if args else kwargs["input"], output))

    handle = last.register_forward_hook(watch, with_kwargs=True)
    try:
        out = module(*inputs)
    finally:
        handle.remove()
    if len(calls) != 1:
        raise ValueError(
            f"the last layer runs {len(calls)} times in a forward pass, expected once: it is not "
            "the last layer of one chain, or shared"
        )
    z, before = calls[0]
    if not isinstance(out, torch.Tensor) or out.ndim != 4 or len(out) != len(inputs[0]):
        got = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(f"the module returns {got}, expected a tensor of images [n, c, h, w]")
    if not (torch.isfinite(out).all() and torch.isfinite(z).all()):
        raise ValueError("the module makes NaN or infinity")
    return _Batch(inputs, z, before, out)


def _tolerance(tensor: Any) -> float:
    """Of values in [-1, 1] that were computed twice in the dtype of a tensor."""
    import torch

    return max(1e-5, 4 * torch.finfo(tensor.dtype).eps)


def _check_deterministic(
    module: Any, last: Any, sample: Callable[[int, int], Any], batch: _Batch
) -> None:
    def differs(a, b):
        return float((a - b).abs().max()) > _tolerance(batch.out)

    if differs(_forward(module, last, batch.inputs).out, batch.out):
        raise ValueError(
            "the module makes another image of the same input every time: random numbers are drawn "
            "inside (noise, dropout); make them part of what sample returns, or switch them off"
        )
    again = _inputs(module, sample, 0, 2)  # Batch statistics refuse a single one.
    if any((a != b[:2]).any() for a, b in zip(again, batch.inputs, strict=True)):
        raise ValueError(
            "sample(0, 2) is not the start of a larger sample from 0: its inputs must depend on "
            "their numbers alone"
        )
    if differs(_forward(module, last, again).out, batch.out[:2]):
        raise ValueError(
            "an image depends on the others of its batch (batch normalisation without running "
            "statistics?), so the module is not one function of its latent"
        )


def _torch_image_shape(last: Any, name: str, batch: _Batch) -> tuple[int, int, int]:
    c, h, w = batch.out.shape[1:]
    z, before = batch.z, batch.before
    dense = isinstance(last, _torch_kinds()["dense"])
    if z.ndim != (2 if dense else 4):
        raise ValueError(
            f"{name!r} is given {list(z.shape)}, expected {'[n, d]' if dense else '[n, c, h, w]'}"
        )
    if before[0].numel() != batch.out[0].numel() or (not dense and before.shape != batch.out.shape):
        raise ValueError(
            f"{name!r} makes {list(before.shape)} but the module {list(batch.out.shape)}: it is "
            "not the last layer, or the image is resized or cropped after it"
        )
    return h, w, c


def _deviation(batch: _Batch, ending: _Ending) -> float:
    predicted = ending.function(batch.before).reshape(batch.out.shape)
    return float((predicted - batch.out).abs().max())


def _torch_ending(batch: _Batch, activation: str | None) -> _Ending:
    """What follows the layer: the ending that deviates least."""
    endings = [e for e in _endings() if activation in (None, e.activation)]
    deviations = [_deviation(batch, ending) for ending in endings]
    best = int(np.argmin(deviations))
    _raise_if_off(deviations[best], endings[best], batch)
    return endings[best]


def _check_ending(batch: _Batch, ending: _Ending) -> None:
    _raise_if_off(_deviation(batch, ending), ending, batch)


def _raise_if_off(deviation: float, ending: _Ending, batch: _Batch) -> None:
    largest = max(1.0, float(batch.out.abs().max()))
    if not deviation <= _tolerance(batch.out) * largest:
        raise ValueError(
            f"the module's images are no known activation of the layer's output: "
            f"{ending.activation} comes closest and is off by up to {deviation:.3g}; final-layer "
            "inversion needs tanh, sigmoid or identity right after the layer, nothing that cannot "
            "be inverted (ReLU) and nothing added afterwards (a residual connection)"
        )


def _channels_last(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def _in_range(out: Any, ending: _Ending) -> np.ndarray:
    """Images `[n, h, w, c]` in [-1, 1] (beyond it for the identity), float32 on the host."""
    x = _channels_last(out.float().cpu().numpy())
    return 2 * x - 1 if ending.zero_to_one else x


def _torch_geometry(last: Any, batch: _Batch) -> tuple[str, dict[str, Any]]:
    kind = next(name for name, cls in _torch_kinds().items() if isinstance(last, cls))
    if kind == "dense":
        return kind, {"strides": 1, "padding": 0, "output_padding": 0}
    padding = last.padding
    if padding == "valid":
        padding = 0
    elif padding == "same":  # Stride 1; what is odd goes to the bottom and the right.
        padding = tuple(((k - 1) // 2, k // 2) for k in last.kernel_size)
    output_padding: Any = 0
    if kind == "conv_transpose":
        # Of this call: an output_size, if one was given, overrides the module's own.
        output_padding = tuple(
            int(tall) - ((n - 1) * s - 2 * p + k)
            for tall, n, s, p, k in zip(
                batch.before.shape[2:],
                batch.z.shape[2:],
                last.stride,
                padding,
                last.kernel_size,
                strict=True,
            )
        )
    return kind, {"strides": last.stride, "padding": padding, "output_padding": output_padding}


def _torch_layer(
    last: Any, name: str, batch: _Batch, image_shape: tuple[int, int, int], ending: _Ending
) -> FinalLayer:
    """The layer, compared with what the module has computed."""
    kind, geometry = _torch_geometry(last, batch)
    arrays = {"weight": last.weight.detach().float().cpu().numpy()}
    if last.bias is not None:
        arrays["bias"] = last.bias.detach().float().cpu().numpy()
    kernel = layer_of_arrays.to_own_layout(
        name, layer_of_arrays.finite(name, arrays["weight"]), kind, "torch", image_shape
    )
    bias = layer_of_arrays.find_bias(arrays, "weight", None, kind, image_shape, "torch", [])
    z = _own_activations(batch.z[:2])
    operator = layer_of_arrays.make_operator(kind, kernel, z.shape[1:], image_shape, geometry)
    layer = FinalLayer(operator=operator, bias=bias, activation=ending.activation)
    forward = jax.vmap(operator.forward)(jnp.asarray(z, jnp.float32))
    made = np.asarray(forward if bias is None else forward + bias)
    before = batch.before[:2].reshape(len(z), *batch.out.shape[1:])
    before = _channels_last(before.float().cpu().numpy())
    off = np.abs(made - before).max()
    if not off <= 10 * _tolerance(batch.before) * max(1.0, np.abs(before).max()):
        raise ValueError(
            f"{name!r} does not compute what its weights say (off by up to {off:.3g}): a hook or a "
            "forward method of its own changes it"
        )
    return layer


def _own_activations(z: Any) -> np.ndarray:
    """Torch activations as an operator here takes them: `[n, h, w, c]` or `[n, 1, 1, d]`."""
    z = _channels_last(z.float().cpu().numpy())
    return z if z.ndim == 4 else z[:, None, None, :]


_finish = jax.jit(_impostors.finish)


def _torch_impostors(
    module: Any,
    last_layer: str,
    layer: FinalLayer,
    sample: Callable[[int, int], Any],
    first: int,
    num_images: int,
    seed: int,
    progress: Progress,
) -> np.ndarray:
    """`generators.impostors`, with the hidden layers changed in PyTorch."""
    size = _IMAGES_PER_IMPOSTOR
    few = _impostors.num_refitted(layer, size)
    forward = jax.jit(jax.vmap(layer.operator.forward))
    weights = weights_of(layer)
    last = module.get_submodule(last_layer)
    images = np.empty((num_images, *layer.operator.output_shape), np.uint8)
    for index, start in enumerate(range(0, num_images, size)):
        rng = np.random.default_rng([seed, index])
        inputs = _inputs(module, sample, first + start, size)
        ours = _forward(module, last, tuple(tensor[:few] for tensor in inputs))
        strength, case, ridge, contrast = rng.random(4, dtype=np.float32)
        changed = _changed_copy(module, last_layer, rng, float(_impostors.strength(strength)))
        theirs = _forward(changed, changed.get_submodule(last_layer), inputs)
        noise = rng.standard_normal(1 + weights.size, dtype=np.float32)
        choices = _impostors.Choices(
            strength, case, ridge, contrast, noise[0], noise[1:].reshape(weights.shape)
        )
        batch = _finish(
            layer,
            jnp.asarray(_own_activations(theirs.z)),
            forward(jnp.asarray(_own_activations(ours.z))),
            choices,
        )
        images[start : start + size] = np.asarray(batch)[: num_images - start]
        progress("making impostors", min(start + size, num_images), num_images)
    return images


def _changed_copy(module: Any, last_layer: str, rng: np.random.Generator, strength: float) -> Any:
    """A copy with one or two hidden weights and perhaps one normalisation jittered.

    Batch normalisation takes the statistics of its batch.
    """
    import torch
    from torch import nn

    changed = copy.deepcopy(module)
    for part in changed.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()
    before = []
    for name, part in changed.named_modules():
        if name == last_layer:
            break
        before.append(part)
    kinds = tuple(_torch_kinds().values())
    hidden = [part for part in before if isinstance(part, kinds)]
    if not hidden:
        raise ValueError(
            f"no ConvTranspose2d, Conv2d or Linear comes before {last_layer!r} that impostors "
            "could change"
        )
    norms = [
        part
        for part in before
        if isinstance(part, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))
        and part.weight is not None
        and part.bias is not None
    ]

    def noise(like):
        drawn = rng.standard_normal(tuple(like.shape), dtype=np.float32)
        return torch.from_numpy(drawn).to(like)

    # Later layers leave more of a mark and come oftener.
    likely = np.arange(1, len(hidden) + 1) / math.comb(len(hidden) + 1, 2)
    how_many = min(len(hidden), 1 + int(rng.integers(2)))
    for i in rng.choice(len(hidden), size=how_many, replace=False, p=likely):
        w = hidden[i].weight
        w.copy_(math.sqrt(1 - strength**2) * w + strength * w.std(correction=0) * noise(w))
    chosen = int(rng.integers(-len(norms), len(norms))) if norms else -1
    if chosen >= 0:  # Half of the time.
        scale, offset = norms[chosen].weight, norms[chosen].bias
        offset.add_(strength * offset.std(correction=0) * noise(offset))
        scale.mul_(1 + 0.5 * strength * noise(scale))
    return changed
