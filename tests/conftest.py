"""Settings for all tests, made before any test module imports JAX arrays."""

import jax
import pytest

# An array made without a dtype then shows up as float64 instead of passing by accident.
jax.config.update("jax_enable_x64", True)


@pytest.fixture
def strict_ranks():
    """Let implicit rank promotion raise: operators and solvers must broadcast in plain sight."""
    with jax.numpy_rank_promotion("raise"):
        yield
