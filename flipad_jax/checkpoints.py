"""Orbax behind three functions, `save`, `restore_latest`, `steps`; and how a long loop stops.

A checkpoint is a directory `DIR/STEP` that Orbax renames into place when it is complete, so one
that a killed process left half written is never read. Only arrays are stored; nothing is ever
unpickled. Random keys are stored as their data and wrapped again on reading. Of several processes
all must call `save` and `restore_latest`, with arrays that span them, at the same step.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Preempted", "restore_latest", "save", "steps"]

_KEEP = 2  # the newest, and the one before it should a disk fill up while the newest is written


class Preempted(Exception):
    """A long loop was told to stop, and has saved what the same call goes on from."""


def _manager(directory: str | os.PathLike):
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=_KEEP, enable_async_checkpointing=False)
    try:
        return ocp.CheckpointManager(os.path.abspath(directory), options=options)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a checkpoint in {directory} is damaged: {error}") from error


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(state: Any) -> Any:
    """Random keys as their data."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)


def _with_keys(plain: Any, template: Any) -> Any:
    def wrap(leaf, like):
        if _is_key(like):
            return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like))
        return leaf

    return jax.tree.map(wrap, plain, template)


def _check_shape(path: Any, leaf: Any, like: Any) -> None:
    if leaf.shape != like.shape:
        name = jax.tree_util.keystr(path)
        raise ValueError(f"{name} is {list(leaf.shape)} there and {list(like.shape)} here")


def save(directory: str | os.PathLike, step: int, state: Any) -> None:
    """Write `state`, a tree of arrays, as checkpoint `step`, completely; keeps the newest two."""
    import orbax.checkpoint as ocp

    with _manager(directory) as manager:
        manager.save(step, args=ocp.args.StandardSave(_plain(state)), force=True)
        manager.wait_until_finished()


def restore_latest(directory: str | os.PathLike, template: Any) -> tuple[int, Any] | None:
    """The newest complete checkpoint as `(step, state)`, or None if there is none.

    Args:
      directory: as given to `save`.
      template: a state of the same structure, shapes and dtypes; its devices are where the arrays
        are put, so a checkpoint that was written on other devices can be read.
    Raises:
      ValueError: if the checkpoint has another structure or other shapes.
    """
    import orbax.checkpoint as ocp

    if not os.path.isdir(directory):
        return None
    with _manager(directory) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(template))
        try:
            state = manager.restore(step, args=ocp.args.StandardRestore(abstract))
            jax.tree.map_with_path(_check_shape, state, abstract)  # Orbax lets NumPy's pass
        except Exception as error:  # One that is damaged makes Orbax stumble over anything.
            raise ValueError(
                f"checkpoint {step} in {directory} is not of this model, or damaged: {error}"
            ) from error
    return step, _with_keys(state, template)


def steps(directory: str | os.PathLike) -> list[int]:
    """Numbers of the complete checkpoints in `directory`, ascending; empty if it does not exist."""
    if not os.path.isdir(directory):
        return []
    with _manager(directory) as manager:
        return sorted(manager.all_steps())
