"""What all tests share."""

import atexit
import contextlib
import importlib.metadata
import itertools
import os
import shutil
import tempfile

# Read when JAX starts. The models are tiny, so tests spend their time compiling: the second flag
# halves it, the third, which newer versions refuse, again. The first gives the trainer two devices
# to share a batch.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    + "--xla_cpu_use_fusion_emitters=false" * (importlib.metadata.version("jaxlib") < "0.11"),
)
# What one test compiles serves all others, in whichever process they run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(prefix="coda_jax_programs_"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

from helpers import as_on_tpu, as_with_bfloat16
import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_enable_x64", False)
# The same examples in every run; compiling makes the first of them slow.
hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("same")


_TESTS = itertools.count(1)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """What a file compiled does not fill the memory while the others run."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _forget_many_programs():
    """Nor do those of a long file use up the 65,530 mappings that Linux gives a process."""
    yield
    if next(_TESTS) % 50 == 0:
        jax.clear_caches()


@pytest.fixture
def rng():
    """A generator that starts the same in every test, whatever ran before."""
    return np.random.default_rng(20230411)


@pytest.fixture(params=[False, True], ids=["no_bfloat16", "bfloat16"], name="processor")
def fixture_processor(request):
    """A test twice: for CPUs without and with products of bfloat16, whichever this one is."""
    jax.clear_caches()  # programs that were traced for the other
    with as_with_bfloat16(request.param):
        yield
    jax.clear_caches()


@pytest.fixture(params=["default", "tpu"], name="branches")
def fixture_branches(request):
    """A test twice: with what this machine runs, and with what a TPU would run."""
    with as_on_tpu() if request.param == "tpu" else contextlib.nullcontext():
        yield
