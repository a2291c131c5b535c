"""What the tests of commands share."""

import gin
from helpers import GOLDEN
import jax
import jax.numpy as jnp
import pytest

from coda_jax import checkpoints
from coda_jax.data.vocabulary_files import SPIECE


@pytest.fixture(autouse=True)
def clean_gin():
    """Leaves no configuration behind."""
    yield
    gin.clear_config()


@pytest.fixture(name="base", scope="module")
def fixture_base(tmp_path_factory):
    """A dense Hugging Face checkpoint in bfloat16, with a vocabulary beside it."""
    folder = tmp_path_factory.mktemp("base")
    config, params = checkpoints.load_hf(GOLDEN / "v1_1")
    checkpoints.save_hf(folder, config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    (folder / SPIECE).write_text("pieces")
    return folder
