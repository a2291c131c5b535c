"""What all tests share."""

import os

# The models are tiny, so tests spend their time compiling: this halves it. Read when JAX starts.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np
import pytest

jax.config.update("jax_enable_x64", False)


@pytest.fixture
def rng():
    """A generator that starts the same in every test, whatever ran before."""
    return np.random.default_rng(20230411)
