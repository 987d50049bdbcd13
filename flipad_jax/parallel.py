"""Several processes as one program."""

import jax

__all__ = ["initialize", "is_main"]


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
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(coordinator_address, num_processes, process_id)


def is_main() -> bool:
    """Whether this is process 0, the one that writes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0
