"""What all tests share."""

import os

# Read when JAX starts. The models are tiny, so tests spend their time compiling: the first flag
# halves it. The second gives the trainer two devices to share a batch.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
)

import jax
import numpy as np
import pytest

jax.config.update("jax_enable_x64", False)


@pytest.fixture
def rng():
    """A generator that starts the same in every test, whatever ran before."""
    return np.random.default_rng(20230411)
