"""Settings for all tests, made before any test module imports JAX arrays."""

import os
from pathlib import Path

# Most of the time of a test goes into compiling, and workers, subprocesses and the next run of the
# tests compile the same programs: they share what was compiled.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402
import pytest  # noqa: E402

# An array made without a dtype then shows up as float64 instead of passing by accident.
jax.config.update("jax_enable_x64", True)


@pytest.fixture
def strict_ranks():
    """Let implicit rank promotion raise: operators and solvers must broadcast in plain sight."""
    with jax.numpy_rank_promotion("raise"):
        yield
