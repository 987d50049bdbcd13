"""Files of weights, whatever framework wrote them, as named arrays. Nothing is unpickled."""

import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["read_arrays"]

_MOST_VISITS = 100_000  # dictionaries, lists and leaves in a file of weights


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All floating arrays of a file of weights.

    Names of nested dictionaries are joined: with "." for PyTorch ("generator.main.12.weight"), with
    "/" for Flax and Orbax ("params/last/kernel"). Half precision becomes float32; whole numbers
    and anything that is no array are left out.

    Args:
      path: `.safetensors`, `.npz`, a PyTorch state dict (`.pth`, `.pt`, `.bin`; also inside a
        dictionary), a Flax `.msgpack`, or the folder of an Orbax checkpoint (or of its manager:
        the newest step).
    Returns:
      Name -> array, in the order of the file.
    Raises:
      FileNotFoundError: if there is nothing at `path`.
      ValueError: if it cannot be read, needs code to be unpickled, holds no floating array, or
        PyTorch is not installed.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if path.is_dir():
        reader: Callable[[pathlib.Path], Mapping[str, Any]] = _read_orbax
    elif path.suffix.lower() in _READERS:
        reader = _READERS[path.suffix.lower()]
    else:
        endings = ", ".join(_READERS)
        raise ValueError(f"{path}: unknown ending; weights are read from {endings} and folders")
    try:
        found = reader(path)
    except _Refused as refused:
        raise ValueError(f"{path}: {refused}") from None
    except Exception as error:  # What a damaged file raises is any library's guess.
        raise ValueError(
            f"{path} cannot be read: it is damaged or no {path.suffix or 'checkpoint'} file "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error
    arrays = {
        name: _at_least_float32(array)
        for name, array in found.items()
        if jnp.issubdtype(array.dtype, jnp.floating)
    }
    if not arrays:
        raise ValueError(f"{path} holds no floating array")
    return arrays


class _Refused(Exception):
    """A file that is not read, and why."""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or "no message"


def _at_least_float32(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.itemsize >= 4 else array.astype(np.float32)


def _flatten(tree: Any, separator: str) -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries and lists, with their joined names."""
    visits = 0

    def flatten(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        nonlocal visits
        visits += 1
        if visits > _MOST_VISITS:  # A few bytes can name a list that holds another one twice, ...
            raise _Refused(f"it holds more than {_MOST_VISITS} entries")
        if isinstance(tree, (list, tuple)):
            tree = dict(enumerate(tree))
        if not isinstance(tree, Mapping):
            yield prefix, tree
            return
        for name, value in tree.items():
            yield from flatten(value, f"{prefix}{separator}{name}" if prefix else str(name))

    return flatten(tree, "")


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    # Importing JAX has taught NumPy the name of bfloat16.
    with safe_open(os.fspath(path), framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        # A member that is no array comes as its bytes.
        found = {name: file[name] for name in file.files}
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    import pickle

    try:
        import torch
    except ImportError:
        raise _Refused(
            "reading it needs PyTorch: pip install 'flipad_jax[torch]', or save the weights as "
            "safetensors"
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error)
        if "WeightsUnpickler" not in reason and "weights_only" not in reason:
            raise
        raise _Refused(
            "it is damaged, or holds more than weights, and reading that would run code from the "
            "file; save it with torch.save(module.state_dict(), ...) or as safetensors"
        ) from None
    tensors = {
        name: tensor
        for name, tensor in _flatten(content, ".")
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    }
    # With strides of 0 a tensor can have any size and no memory, until it is worked with.
    most = max(path.stat().st_size, 1 << 20)
    for name, tensor in tensors.items():
        if tensor.numel() > most:
            raise _Refused(f"{name} claims {tensor.numel()} numbers, more than the file has bytes")
    return {
        name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).numpy()
        for name, tensor in tensors.items()
    }


def _read_msgpack(path: pathlib.Path) -> dict[str, np.ndarray]:
    from flax import serialization

    content = serialization.msgpack_restore(path.read_bytes())
    return {k: v for k, v in _flatten(content, "/") if isinstance(v, np.ndarray)}


def _read_orbax(path: pathlib.Path) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    items = _orbax_items(path.resolve())
    if not items:
        raise _Refused("the folder holds no Orbax checkpoint")
    arrays: dict[str, np.ndarray] = {}
    for item, folder in items.items():
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata.tree
            # As NumPy arrays: the devices that it was written on need not be here.
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            content = checkpointer.restore(
                folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy)
            )
        tree = {item: content} if item else content
        arrays |= {k: v for k, v in _flatten(tree, "/") if isinstance(v, np.ndarray)}
    return arrays


def _orbax_items(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """The trees of a checkpoint by their names: the folder itself, its items, its newest step."""

    def is_tree(folder):
        return (folder / "_METADATA").is_file()

    if is_tree(path):
        return {"": path}
    children = sorted(child for child in path.iterdir() if child.is_dir())
    items = {c.name if c.name != "default" else "": c for c in children if is_tree(c)}
    steps = [child for child in children if child.name.isdecimal()]
    if items or not steps:
        return items
    return _orbax_items(max(steps, key=lambda step: int(step.name)))


_READERS: dict[str, Callable[[pathlib.Path], Mapping[str, Any]]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
    ".msgpack": _read_msgpack,
}
