"""Dense checkpoints, in Hugging Face's layout where it has a place for the model.

What differs by family is in its folder.
"""

from collections.abc import Mapping
import os
from pathlib import Path

import jax
import numpy as np

from coda_jax import files, hub, methods, trees
from coda_jax.checkpoints import own_layout, tensor_files, weights
from coda_jax.checkpoints.t5x import is_t5x
from coda_jax.models import FAMILIES, Family, ModelConfig, family_of, param_shapes
from coda_jax.models.hf_fields import is_transposed
from coda_jax.nn.quantized import check_float

MAX_SHARD_BYTES = 5 * 10**9
CONFIG_FILE = "config.json"


def _family(raw: Mapping, source: str) -> tuple[str, Family]:
    """The model_type of a config.json, and the family whose checkpoints have it.

    An old file may lack the field; the name of the class in "architectures" then tells it.
    """
    architectures, model_type = raw.get("architectures") or [], raw.get("model_type")
    if not isinstance(architectures, list) or any(type(x) is not str for x in architectures):
        raise ValueError(f"{source}: architectures={architectures!r:.80} is not a list of texts")
    if not isinstance(model_type, str | None):
        raise ValueError(f"{source}: model_type={model_type!r:.80} is not a text")
    layouts = {name: family.huggingface for name, family in FAMILIES.items()}
    by_type = {kind: FAMILIES[name] for name, x in layouts.items() for kind in x.model_types}
    if model_type is None:
        classes = " ".join(architectures).lower()
        started = [kind for kind in by_type if classes.startswith(kind.replace("-", ""))]
        model_type = max(started, key=len, default=None)
    for layout in layouts.values():
        if model_type in layout.refused:
            raise ValueError(f"{source}: model_type={model_type!r}: {layout.refused[model_type]}")
    if model_type not in by_type:
        raise ValueError(
            f"{source}: model_type={model_type!r:.80} is not handled; only {sorted(by_type)} are"
        )
    return model_type, by_type[model_type]


def _converted(path: str, leaf: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A leaf with our order of axes from theirs, or the other way round; axes of 1 come and go."""
    return (leaf.T if is_transposed(path) else leaf).reshape(shape)


def _read_config(directory: Path) -> tuple[ModelConfig, dict]:
    """The dense config, and the fields of config.json."""
    source = str(directory / CONFIG_FILE)
    if not directory.exists():
        raise FileNotFoundError(f"{source} does not exist: there is no such folder")
    if not os.path.exists(source) and is_t5x(directory):
        raise FileNotFoundError(
            f"{source} does not exist: this is a T5X checkpoint, of which `coda convert` with "
            "LAYOUT='hf' makes a folder in Hugging Face's layout"
        )
    raw = files.read_json(directory / CONFIG_FILE, hub.MAX_JSON_BYTES)
    if own_layout.is_own(raw):
        return own_layout.parse_config(raw, source), raw
    model_type, family = _family(raw, source)
    raw = {**raw, "model_type": model_type}
    try:
        return family.huggingface.parse_config(raw, source), raw
    except ValueError as error:  # also of the config's own checks, which know no file
        if source in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error


def load_hf_config(directory: str | os.PathLike) -> ModelConfig:
    """The config of a checkpoint, without its weights; see `load_hf`."""
    return _read_config(hub.find(directory))[0]


def load_hf(directory: str | os.PathLike) -> tuple[ModelConfig, dict]:
    """Loads a dense checkpoint in the layout of transformers' class for the family, or our own.

    Args:
        directory: has config.json and weights: model.safetensors, flax_model.msgpack or
            pytorch_model.bin, or shards of one of them with their index. Or the name of a model in
            the cache of the Hugging Face Hub, such as "google/flan-t5-base".

    Returns:
        (config, params): the dense config of the family in config.json, with float32 as compute
        dtype, and nested dicts of read-only numpy arrays in the dtype of the file, which are read
        from disk when first used.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the config has a field that is not handled; if a file is corrupt or holds
            more than weights; if tensors are missing, extra or misshapen (all are listed).
    """
    directory = hub.find(directory)
    config, raw = _read_config(directory)
    if own_layout.is_own(raw):
        return config, own_layout.read_leaves(directory, config)
    source, layout = str(directory / CONFIG_FILE), family_of(config).huggingface
    tensors = layout.resolve_tensors(weights.read_weights(directory), raw, source)
    expected = trees.flatten(param_shapes(config))
    names = {path: layout.tensor_name(path, config) for path in expected}
    shapes = {
        names[path]: jax.ShapeDtypeStruct(layout.tensor_shape(path, leaf.shape), leaf.dtype)
        for path, leaf in expected.items()
    }
    trees.check_tree(shapes, tensors, what=f"the tensors of {directory} do")
    flat = {
        path: _converted(path, tensors[names[path]], leaf.shape) for path, leaf in expected.items()
    }
    return config, trees.unflatten(flat)


def _format(config: ModelConfig, dtype: str) -> dict:
    """The fields of a config.json; a ValueError where there is no such model."""
    if config.layer_sizes:
        more = f" and {len(config.layer_sizes) - 1} more" * (len(config.layer_sizes) > 1)
        raise ValueError(
            f"layers of unequal sizes have no place in Hugging Face's layout: "
            f"{config.layer_sizes[0]}{more}; pruned with scope='uniform' they are equal"
        )
    return family_of(config).huggingface.format_config(config, dtype)


def has_place(config: ModelConfig) -> bool:
    """Whether a dense model is one of Hugging Face's, as a T5 with a head is not."""
    try:
        _format(config, "float32")
    except ValueError:
        return False
    return True


def save_dense(directory: str | os.PathLike, config: ModelConfig, params: Mapping) -> bool:
    """Saves a dense checkpoint that `load_hf` reads, in Hugging Face's layout where it has a place.

    Args:
        directory, config, params: as of `save_hf`, whose errors it raises.

    Returns:
        Whether it is in that layout; otherwise it is in our own, see `own_layout`.
    """
    if has_place(config.dense()):
        save_hf(directory, config, params)
        return True
    own_layout.save(Path(directory), config.dense(), _leaves(config, params), MAX_SHARD_BYTES)
    return False


def save_hf(directory: str | os.PathLike, config: ModelConfig, params: Mapping) -> None:
    """Saves a dense checkpoint that `load_hf` and transformers' class for the family read.

    An mT5 is saved with model_type t5, which is the same computation. The vocabulary is not part
    of a checkpoint; copy its files beside it.

    Args:
        directory: is created if need be; an older checkpoint in it is replaced, config.json last.
        config: the model's config; only its dense fields are written.
        params: the dense parameter tree; dtypes are kept.

    Raises:
        ValueError: if there are leaves of a method; if leaves are missing, extra
            or misshapen (all are listed); if the config has no equivalent.
    """
    dense, flat = config.dense(), _leaves(config, params)
    layout = family_of(config).huggingface
    raw = _format(dense, max(flat.values(), key=np.size).dtype.name)
    tensors = {
        layout.tensor_name(path, dense): _converted(
            path, leaf, layout.tensor_shape(path, leaf.shape)
        )
        for path, leaf in flat.items()
    }
    directory = Path(directory)
    tensor_files.write_directory(directory, tensors, MAX_SHARD_BYTES)
    files.write_json(directory / CONFIG_FILE, raw, sort_keys=True)


def _leaves(config: ModelConfig, params: Mapping) -> dict[str, np.ndarray]:
    """The leaves of a dense model by path, once they are known to be that."""
    every = tuple(pattern for method in methods.METHODS.values() for pattern in method.creates)
    if new := trees.flatten(trees.split(params, every)[0]):
        lines = "\n  ".join(new)
        raise ValueError(
            "a Hugging Face checkpoint has no leaves of a method: save them with `save_adapter`, "
            f"or `merge` them first, and save the dense leaves here; found:\n  {lines}"
        )
    check_float(params, "a Hugging Face checkpoint")
    trees.check_tree(param_shapes(config.dense()), params)
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
