"""Dense checkpoints in Hugging Face's layout: T5 with v1.1, flan-T5, mT5 and byT5, and others.

The family is what `model_type` in config.json says. Each has a config, names and shapes of its
tensors, and a rule for tensors that are stored several times or not at all, or that no computation
reads; this module has those of T5.
"""

from collections.abc import Callable, Mapping
import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from coda_jax import params as params_lib
from coda_jax.checkpoints import files, hf_config, hf_pix2struct, hf_w2v_bert
from coda_jax.checkpoints.shapes import expected_shapes
from coda_jax.network import T5Config
from coda_jax.speech import W2vBertConfig
from coda_jax.vision import Pix2StructConfig

MAX_SHARD_BYTES = 5 * 10**9
SHARED = "shared.weight"
HEAD = "lm_head.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of SHARED
# In checkpoints converted before 2021; no version of the model ever read it.
UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)

TOP_NAMES = {
    "token_embedder/embedding": SHARED,
    "decoder/logits_dense/kernel": HEAD,
    "encoder/encoder_norm/scale": "encoder.final_layer_norm.weight",
    "decoder/decoder_norm/scale": "decoder.final_layer_norm.weight",
    **{f"{stack}/relpos_bias/rel_embedding":
       f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
       for stack in ("encoder", "decoder")},
}  # fmt: skip
SUBLAYERS = {  # stack: our module and norm of each sublayer, with its name and number in theirs
    "encoder": {
        "attention": "layer.0.SelfAttention",
        "pre_attention_layer_norm": "layer.0.layer_norm",
        "mlp": "layer.1.DenseReluDense",
        "pre_mlp_layer_norm": "layer.1.layer_norm",
    },
    "decoder": {
        "self_attention": "layer.0.SelfAttention",
        "pre_self_attention_layer_norm": "layer.0.layer_norm",
        "encoder_decoder_attention": "layer.1.EncDecAttention",
        "pre_cross_attention_layer_norm": "layer.1.layer_norm",
        "mlp": "layer.2.DenseReluDense",
        "pre_mlp_layer_norm": "layer.2.layer_norm",
    },
}
PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


def hf_name(path: str, config: T5Config) -> str:
    """Returns Hugging Face's name of the leaf at `path` of our parameter tree."""
    if path in TOP_NAMES:
        return TOP_NAMES[path]
    stack, layer, module, *rest = path.split("/")
    block = f"{stack}.block.{layer.removeprefix('layers_')}.{SUBLAYERS[stack][module]}"
    if rest == ["scale"]:
        return f"{block}.weight"
    return f"{block}.{PROJECTIONS.get(rest[0], rest[0])}.weight"


def _is_transposed(path: str) -> bool:
    return path.endswith(("kernel", "/rel_embedding"))  # theirs are [out, in] and [buckets, H]


def hf_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a leaf in their file."""
    return shape[::-1] if _is_transposed(path) else shape


def _converted(path: str, leaf: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A leaf with our order of axes from theirs, or the other way round; axes of 1 come and go."""
    return (leaf.T if _is_transposed(path) else leaf).reshape(shape)


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    same_kind = first.shape == second.shape and first.dtype == second.dtype
    return same_kind and np.array_equal(first, second)


def _resolve_embeddings(tensors: dict, raw: Mapping, source: str) -> dict:
    """Leaves one tensor for each embedding of the model: SHARED, and HEAD if it is not scaled."""
    tensors = {name: leaf for name, leaf in tensors.items() if name not in UNUSED}
    present = [name for name in (SHARED, *COPIES) if name in tensors]
    if not present:
        return tensors
    shared = tensors[present[0]]
    tied = present[1:]
    if hf_config.scales_logits(raw) and HEAD in tensors:
        tied.append(HEAD)
    different = [name for name in tied if not _equal(tensors[name], shared)]
    if different:
        raise ValueError(
            f"{source}: {different} must equal {present[0]} with "
            f"tie_word_embeddings={raw.get('tie_word_embeddings')!r} and "
            f"scale_decoder_outputs={raw.get('scale_decoder_outputs')!r}, but differ from it."
        )
    kept = {name: leaf for name, leaf in tensors.items() if name not in (*present, *tied)}
    kept[SHARED] = shared
    if hf_config.may_share_unscaled(raw):
        kept.setdefault(HEAD, shared)
    return kept


class _Layout(NamedTuple):
    """How a family's checkpoints look."""

    parse_config: Callable[[Mapping[str, Any], str], T5Config]
    format_config: Callable[[Any, str], dict[str, Any]]
    hf_name: Callable[[str, Any], str]
    resolve_tensors: Callable[[dict, Mapping, str], dict]
    hf_shape: Callable[[str, tuple[int, ...]], tuple[int, ...]] = hf_shape


LAYOUTS = {
    T5Config.family: _Layout(
        hf_config.parse_config, hf_config.format_config, hf_name, _resolve_embeddings
    ),
    Pix2StructConfig.family: _Layout(
        hf_pix2struct.parse_config,
        hf_pix2struct.format_config,
        hf_pix2struct.hf_name,
        hf_pix2struct.resolve_embeddings,
    ),
    W2vBertConfig.family: _Layout(
        hf_w2v_bert.parse_config,
        hf_w2v_bert.format_config,
        hf_w2v_bert.hf_name,
        hf_w2v_bert.resolve_tensors,
        hf_w2v_bert.hf_shape,
    ),
}


def load_hf(directory: str | os.PathLike) -> tuple[T5Config, dict]:
    """Loads a dense checkpoint in the layout of transformers' class for the family.

    Args:
        directory: has config.json and model.safetensors, or its shards with their index.

    Returns:
        (config, params): the dense config of the family in config.json, with float32 as compute
        dtype, and nested dicts of read-only numpy arrays in the dtype of the file, which are read
        from disk when first used.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the config has a field that is not handled; if a file is corrupt or pickled;
            if tensors are missing, extra or misshapen (all are listed).
    """
    directory = Path(directory)
    source = str(directory / "config.json")
    raw = files.read_json(directory / "config.json")
    # Every model_type that is no family's name is for T5's parser to take or to refuse.
    layout = LAYOUTS.get(raw.get("model_type"), LAYOUTS[T5Config.family])
    config = layout.parse_config(raw, source)
    tensors = layout.resolve_tensors(files.read_directory(directory), raw, source)
    expected = params_lib.flatten(expected_shapes(config))
    names = {path: layout.hf_name(path, config) for path in expected}
    shapes = {
        names[path]: jax.ShapeDtypeStruct(layout.hf_shape(path, leaf.shape), leaf.dtype)
        for path, leaf in expected.items()
    }
    params_lib.check_tree(shapes, tensors, what=f"The tensors of {directory} do")
    flat = {
        path: _converted(path, tensors[names[path]], leaf.shape) for path, leaf in expected.items()
    }
    return config, params_lib.unflatten(flat)


def save_hf(directory: str | os.PathLike, config: T5Config, params: Mapping) -> None:
    """Saves a dense checkpoint that `load_hf` and transformers' class for the family read.

    An mT5 is saved with model_type t5, which is the same computation. The vocabulary is not part
    of a checkpoint; copy its files beside it.

    Args:
        directory: is created if need be; an older checkpoint in it is replaced, config.json last.
        config: the model's config; only its dense fields are written.
        params: the dense parameter tree; dtypes are kept.

    Raises:
        ValueError: if there are adapters or routers among the leaves; if leaves are missing, extra
            or misshapen (all are listed); if the config has no equivalent.
    """
    _, new = params_lib.split_new(params)
    if new:
        lines = "\n  ".join(params_lib.flatten(new))
        raise ValueError(
            "A Hugging Face checkpoint has no adapters and routers: save them with `save_adapter`, "
            f"and the dense leaves (`params.split_new`) here. Found:\n  {lines}"
        )
    dense = dataclasses.replace(config, adapter=None, coda=None)
    params_lib.check_tree(expected_shapes(dense), params)
    layout = LAYOUTS[config.family]
    flat = {path: np.asarray(leaf) for path, leaf in params_lib.flatten(params).items()}
    raw = layout.format_config(dense, max(flat.values(), key=np.size).dtype.name)
    tensors = {
        layout.hf_name(path, dense): _converted(path, leaf, layout.hf_shape(path, leaf.shape))
        for path, leaf in flat.items()
    }
    directory = Path(directory)
    files.write_directory(directory, tensors, MAX_SHARD_BYTES)
    files.write_json(directory / "config.json", raw)
