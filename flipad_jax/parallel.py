"""Several processes as one program."""

import jax
import numpy as np

__all__ = ["anywhere", "initialize", "is_main"]


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the other processes; before anything else is asked of JAX.

    Args:
      coordinator_address: HOST:PORT of process 0; None: found by JAX (Slurm, TPU).
      num_processes: how many there are.
      process_id: which one this is.
    """
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(coordinator_address, num_processes, process_id)


def is_main() -> bool:
    """Whether this is process 0, the one that writes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true in any process; all must call it equally often."""
    if not jax.distributed.is_initialized():
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(flag)).any())
