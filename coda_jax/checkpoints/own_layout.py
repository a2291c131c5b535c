"""Dense checkpoints in a layout of our own, of models that have no place in Hugging Face's.

In config.json the `model_type` is "coda_jax", and the rest is the config as `config_json` writes
it. Tensors have the names and shapes of our leaves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from coda_jax import files, trees
from coda_jax.checkpoints import config_json, tensor_files, weights
from coda_jax.models import ModelConfig, param_shapes

MODEL_TYPE = "coda_jax"


def is_own(raw: Mapping[str, Any]) -> bool:
    """Whether the fields of a config.json are of this layout."""
    return raw.get("model_type") == MODEL_TYPE


def is_in(directory: Path | None) -> bool:
    """Whether the checkpoint of a folder, if there is one, is in this layout."""
    file = directory and directory / "config.json"
    return bool(file and file.is_file()) and is_own(files.read_json(file))


def parse_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """The dense config in the fields of a config.json; errors are those of `from_json`."""
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    config = config_json.from_json(fields, source)
    if config.methods:
        raise ValueError(f"{source} must be of a dense model, and has methods={fields['methods']}")
    return config.replace(dtype=jnp.float32)


def read_leaves(directory: Path, config: ModelConfig) -> dict[str, Any]:
    """The parameter tree of a folder; a ValueError lists the leaves that are not as they should."""
    found = weights.read_weights(directory)
    trees.check_tree(param_shapes(config), found, what=f"the tensors of {directory} do")
    return trees.unflatten(found)


def save(
    directory: Path, config: ModelConfig, leaves: Mapping[str, np.ndarray], max_bytes: int
) -> None:
    """Writes a dense model.

    Args:
        directory: created if need be; config.json is written last.
        config: dense.
        leaves: by path.
        max_bytes: of a file of tensors.
    """
    tensor_files.write_directory(directory, leaves, max_bytes)
    raw = {"model_type": MODEL_TYPE, **config_json.to_json(config)}
    files.write_json(directory / "config.json", raw, sort_keys=True)
