"""Pix2Struct in Hugging Face's layout: config.json, read strictly, and the names of tensors.

A field that a part lacks has the default of transformers. `is_vqa` says how images were prepared,
which changes no logits.
"""

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

from coda_jax.models import hf_fields
from coda_jax.models.base import HuggingFace
from coda_jax.models.pix2struct.config import Pix2StructConfig

EMBEDDING = "decoder.embed_tokens.weight"
HEAD = "decoder.lm_head.weight"

# Fields of the two parts and their defaults in transformers, by the arguments of our config. Where
# both have one, they must agree.
SIZES = {
    "text_config": {
        "vocab_size": ("vocab_size", 50244),
        "hidden_size": ("emb_dim", 768),
        "num_heads": ("num_heads", 12),
        "num_layers": ("num_decoder_layers", 12),
        "d_kv": ("head_dim", 64),
        "d_ff": ("mlp_dim", 2048),
        "relative_attention_num_buckets": ("relpos_num_buckets", 32),
        "relative_attention_max_distance": ("relpos_max_distance", 128),
    },
    "vision_config": {
        "hidden_size": ("emb_dim", 768),
        "num_attention_heads": ("num_heads", 12),
        "num_hidden_layers": ("num_encoder_layers", 12),
        "d_kv": ("head_dim", 64),
        "d_ff": ("mlp_dim", 2048),
        "patch_embed_hidden_size": ("patch_dim", 768),
        "seq_len": ("num_positions", 4096),
    },
}
EPSILONS = {"text_config": "layer_norm_epsilon", "vision_config": "layer_norm_eps"}
LIMITS = {"dropout_rate": 1.0, **dict.fromkeys(EPSILONS.values(), 1.0)}
# Fields that change the computation, with the values for which they do not.
FIXED = {
    "": {
        "is_encoder_decoder": (True,),
        "tie_encoder_decoder": (False,),
        "pad_token_id": (0, None),
        "decoder_start_token_id": (0, None),
    },
    "text_config": {
        "dense_act_fn": ("gelu_new",),
        "is_decoder": (True,),
        "pruned_heads": ({}, None),
        "pad_token_id": (0, None),
        "decoder_start_token_id": (0, None),
    },
    "vision_config": {
        "dense_act_fn": ("gelu_new",),
        "is_decoder": (False,),
        "pruned_heads": ({}, None),
        "layer_norm_bias": (False,),
        "mlp_bias": (False,),
        "qkv_bias": (False,),
    },
}
# Fields of the parts that change no logits; encoder_hidden_size to hidden_act come from old files.
PART_IGNORED = """
    model_type initializer_range is_encoder_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder tie_word_embeddings encoder_hidden_size image_size intermediate_size
    num_channels patch_size projection_dim hidden_act pad_token_id decoder_start_token_id
    attention_dropout relative_attention_num_buckets relative_attention_max_distance
"""
TOP_IGNORED = "initializer_range is_vqa eos_token_id"
TOP_USED = {"model_type", "tie_word_embeddings", *SIZES}

TOP_NAMES = {
    "token_embedder/embedding": EMBEDDING,
    "patch_embedder/projection/kernel": "encoder.embeddings.patch_projection.weight",
    "patch_embedder/bias": "encoder.embeddings.patch_projection.bias",
    "patch_embedder/row_embedder/embedding": "encoder.embeddings.row_embedder.weight",
    "patch_embedder/column_embedder/embedding": "encoder.embeddings.column_embedder.weight",
    "encoder/encoder_norm/scale": "encoder.layernorm.weight",
    "decoder/relpos_bias/rel_embedding":
        "decoder.layer.0.self_attention.attention.relative_attention_bias.weight",
    "decoder/decoder_norm/scale": "decoder.final_layer_norm.weight",
    "decoder/logits_dense/kernel": HEAD,
}  # fmt: skip
STACKS = {"encoder": "encoder.encoder.layer", "decoder": "decoder.layer"}
MODULES = {  # those of the decoder; the encoder's have our names
    "self_attention": "self_attention.attention",
    "pre_self_attention_layer_norm": "self_attention.layer_norm",
    "encoder_decoder_attention": "encoder_decoder_attention.attention",
    "pre_cross_attention_layer_norm": "encoder_decoder_attention.layer_norm",
    "mlp": "mlp.DenseReluDense",
    "pre_mlp_layer_norm": "mlp.layer_norm",
}


def tensor_name(path: str, config: Pix2StructConfig) -> str:
    """Returns Hugging Face's name of the leaf at `path` of our parameter tree."""
    if path in TOP_NAMES:
        return TOP_NAMES[path]
    stack, layer, module, *rest = path.split("/")
    module = MODULES[module] if stack == "decoder" else module
    block = f"{STACKS[stack]}.{layer.removeprefix('layers_')}.{module}"
    if rest == ["scale"]:
        return f"{block}.weight"
    return f"{block}.{'output' if rest[0] == 'out' else rest[0]}.weight"


def resolve_embeddings(
    tensors: Mapping[str, np.ndarray], raw: Mapping[str, Any], source: str
) -> dict[str, np.ndarray]:
    """Returns the tensors with both embeddings, of which a tied model may store only one."""
    tensors = dict(tensors)
    present = [tensors[name] for name in (EMBEDDING, HEAD) if name in tensors]
    if not raw.get("tie_word_embeddings") or not present:
        return tensors
    if not np.array_equal(present[0], present[-1]):
        raise ValueError(f"{source}: {HEAD} must equal {EMBEDDING} with tie_word_embeddings=True.")
    return {**tensors, EMBEDDING: present[0], HEAD: present[0]}


def parse_config(raw: Mapping[str, Any], source: str) -> Pix2StructConfig:
    """Returns the dense Pix2StructConfig of a config.json.

    Args:
        raw: the fields.
        source: the file's name, for errors.

    Raises:
        ValueError: names every field that is unknown, missing or has a value that is not handled.
    """
    ignored = {*hf_fields.IGNORED, *TOP_IGNORED.split()}
    problems = hf_fields.field_problems(raw, ignored | TOP_USED, FIXED[""])
    if type(raw.get("tie_word_embeddings")) not in (bool, type(None)):
        problems.append(f"tie_word_embeddings={raw['tie_word_embeddings']!r} is not true or false")
    for part in SIZES:
        if isinstance(raw.get(part), Mapping):
            problems += _part_problems(raw[part], part)
        else:
            problems.append(f"{part} must be an object: {raw.get(part)!r}")
    if not problems:
        problems = _disagreements(raw)
    if problems:
        raise ValueError(f"{source} cannot be used:\n  " + "\n  ".join(problems))
    sizes = {ours: value for part in SIZES for ours, value in _sizes(raw[part], part).items()}
    text = raw["text_config"]
    return Pix2StructConfig(
        **{ours: value for ours, value in sizes.items() if ours != "patch_dim"},
        patch_size=_patch_size(sizes["patch_dim"]),
        dropout_rate=float(text.get("dropout_rate", 0.1)),
        layer_norm_epsilon=_epsilon(text, "text_config"),
    )


def _part_problems(raw: Mapping[str, Any], part: str) -> list[str]:
    known = {*hf_fields.IGNORED, *PART_IGNORED.split(), *SIZES[part], *LIMITS}
    prefix = f"{part}."
    return (
        hf_fields.field_problems(raw, known, FIXED[part], prefix)
        + hf_fields.count_problems(raw, SIZES[part], prefix)
        + hf_fields.number_problems(raw, LIMITS, prefix)
    )


def _sizes(raw: Mapping[str, Any], part: str) -> dict[str, int]:
    """Returns the sizes that a part has, by the names of our arguments."""
    return {ours: raw.get(name, default) for name, (ours, default) in SIZES[part].items()}


def _epsilon(raw: Mapping[str, Any], part: str) -> float:
    return float(raw.get(EPSILONS[part], 1e-6))


def _patch_size(patch_dim: int) -> int:
    return math.isqrt(patch_dim // 3)


def _disagreements(raw: Mapping[str, Any]) -> list[str]:
    """Returns what our network, whose encoder and decoder share their sizes, cannot be."""
    text, vision = (_sizes(raw[part], part) for part in SIZES)
    epsilons = [_epsilon(raw[part], part) for part in SIZES]
    problems = [
        f"text_config and vision_config disagree in {name}: {text[name]} and {vision[name]}"
        for name in text.keys() & vision.keys()
        if text[name] != vision[name]
    ]
    if epsilons[0] != epsilons[1]:
        problems.append(
            f"text_config and vision_config disagree in the layer norms' epsilon: {epsilons}"
        )
    if text["num_heads"] * text["head_dim"] != text["emb_dim"]:
        problems.append(
            f"text_config: num_heads={text['num_heads']} times d_kv={text['head_dim']} must be "
            f"hidden_size={text['emb_dim']}"
        )
    if 3 * _patch_size(vision["patch_dim"]) ** 2 != vision["patch_dim"]:
        problems.append(
            f"vision_config.patch_embed_hidden_size={vision['patch_dim']} is not 3 n^2, that of a "
            "square patch of three colours"
        )
    return problems


def format_config(config: Pix2StructConfig, dtype: str) -> dict[str, Any]:
    """Returns the config.json of a dense Pix2StructConfig, with every field that is used.

    Args:
        config: its methods are not written.
        dtype: name of the weights' dtype.

    Raises:
        ValueError: if Hugging Face's Pix2Struct has no such model.
    """
    if tuple(config.mlp_activations) != ("gelu", "linear") or config.logits_via_embedding:
        raise ValueError(
            f"mlp_activations={config.mlp_activations!r} with logits_via_embedding="
            f"{config.logits_via_embedding} cannot be saved as a Hugging Face Pix2Struct, which "
            "has ('gelu', 'linear') and an output layer of its own."
        )
    if not config.shared_relpos_bias:
        raise ValueError("the layers of a Hugging Face Pix2Struct share one position bias.")
    if config.num_heads * config.head_dim != config.emb_dim:
        raise ValueError(
            f"num_heads={config.num_heads} times head_dim={config.head_dim} must be emb_dim="
            f"{config.emb_dim} in a Hugging Face Pix2Struct."
        )
    parts = {
        part: {
            "model_type": f"pix2struct_{part.removesuffix('_config')}_model",
            "dense_act_fn": "gelu_new",
            EPSILONS[part]: config.layer_norm_epsilon,
            **{name: getattr(config, ours) for name, (ours, _) in sizes.items()},
        }
        for part, sizes in SIZES.items()
    }
    parts["text_config"]["dropout_rate"] = config.dropout_rate
    return {
        **parts,
        "architectures": ["Pix2StructForConditionalGeneration"],
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "is_encoder_decoder": True,
        "model_type": "pix2struct",
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


HUGGINGFACE = HuggingFace(
    (Pix2StructConfig.family,), parse_config, format_config, tensor_name, resolve_embeddings
)
