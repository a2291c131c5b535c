"""w2v-BERT 2.0 in Hugging Face's layout: config.json, read strictly, and the names of tensors.

`architectures` says whether there is a CTC head. A field that is left out has the default of
transformers. What concerns training alone (the several dropouts, SpecAugment and its learned
vector, LayerDrop, how CTC losses are summed) changes no logits and is not kept.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from coda_jax.models import hf_fields
from coda_jax.models.base import HuggingFace
from coda_jax.models.w2v_bert.config import W2vBertConfig

ENCODER, CTC = "Wav2Vec2BertModel", "Wav2Vec2BertForCTC"
PREFIX = "wav2vec2_bert."  # of the encoder's tensors where there is a head
MASK_EMBEDDING = "masked_spec_embed"  # what SpecAugment puts in place of frames

SIZES = {  # their defaults are those of our config
    "hidden_size": "emb_dim",
    "num_hidden_layers": "num_encoder_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "feature_projection_input_dim": "feature_dim",
    "conv_depthwise_kernel_size": "conv_width",
    "left_max_position_embeddings": "max_left_distance",
    "right_max_position_embeddings": "max_right_distance",
}
# We have one rate of dropout, which is read from the first of theirs and written to all.
DROPOUTS = (
    "hidden_dropout",
    "activation_dropout",
    "attention_dropout",
    "feat_proj_dropout",
    "final_dropout",
    "conformer_conv_dropout",
)
LIMITS = {**dict.fromkeys((*DROPOUTS, "layerdrop"), 1.0), "layer_norm_eps": 1.0}
# Fields that change the computation, with the values for which they do not.
FIXED = {
    "hidden_act": ("swish", "silu"),
    "position_embeddings_type": ("relative_key",),
    "add_adapter": (False,),
    "use_intermediate_ffn_before_adapter": (False,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
}
USED = {"model_type", *SIZES, *LIMITS, "architectures", "vocab_size", "pad_token_id"}
# Fields that change no logits: of training, of other tasks' heads, of other position embeddings, of
# the convolutions that `add_adapter` would add, and of the pretraining in old files.
IGNORED_FIELDS = """
    apply_spec_augment mask_time_prob mask_time_length mask_time_min_masks mask_feature_prob
    mask_feature_length mask_feature_min_masks ctc_loss_reduction ctc_zero_infinity
    initializer_range use_weighted_layer_sum classifier_proj_size tdnn_dim tdnn_kernel
    tdnn_dilation xvector_output_dim rotary_embedding_base max_source_positions adapter_act
    adapter_kernel_size adapter_stride num_adapter_layers output_hidden_size codevector_dim
    contrastive_logits_temperature diversity_loss_weight feat_quantizer_dropout
    num_codevector_groups num_codevectors_per_group num_negatives proj_codevector_dim
    tie_word_embeddings tie_encoder_decoder
"""

HEAD = {"ctc_head/kernel": "lm_head.weight", "ctc_head/bias": "lm_head.bias"}
MODULES = {
    "pre_first_mlp_layer_norm": "ffn1_layer_norm",
    "first_mlp": "ffn1",
    "pre_attention_layer_norm": "self_attn_layer_norm",
    "attention": "self_attn",
    "convolution": "conv_module",
    "pre_second_mlp_layer_norm": "ffn2_layer_norm",
    "second_mlp": "ffn2",
    "final_layer_norm": "final_layer_norm",
}
PARTS = {  # within the modules
    "attention": {"query": "linear_q", "key": "linear_k", "value": "linear_v", "out": "linear_out"},
    "convolution": {
        "wi": "pointwise_conv1",
        "wo": "pointwise_conv2",
        "depthwise_kernel": "depthwise_conv",
    },
    "first_mlp": {"wi": "intermediate_dense", "wo": "output_dense"},
}
PARTS["second_mlp"] = PARTS["first_mlp"]


def tensor_name(path: str, config: W2vBertConfig) -> str:
    """Returns Hugging Face's name of the leaf at `path` of our parameter tree."""
    if path in HEAD:
        return HEAD[path]
    _, *parts = path.split("/")
    if parts[0].startswith("layers_"):
        layer, module, *rest = parts
        names = PARTS.get(module, {})
        rest = [names.get(name, name) for name in rest]
        parts = ["encoder", "layers", layer.removeprefix("layers_"), MODULES[module], *rest]
    if parts[-1] != "bias":
        leaves = ("kernel", "scale")
        parts = [*(parts[:-1] if parts[-1] in leaves else parts), "weight"]
    return (PREFIX if config.vocab_size else "") + ".".join(parts)


def tensor_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a leaf in their file; their convolutions are [out, in per group, W]."""
    if path.endswith("/depthwise_kernel"):
        return shape[1], 1, shape[0]
    if path.endswith("/kernel"):
        return (*shape[::-1], 1) if "/convolution/" in path else shape[::-1]
    return shape


def resolve_tensors(
    tensors: Mapping[str, np.ndarray], raw: Mapping[str, Any], source: str
) -> dict[str, np.ndarray]:
    """Returns the tensors that the model has: all but the vector of SpecAugment."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name.removeprefix(PREFIX) != MASK_EMBEDDING
    }


def parse_config(raw: Mapping[str, Any], source: str) -> W2vBertConfig:
    """Returns the dense W2vBertConfig of a config.json.

    Args:
        raw: the fields.
        source: the file's name, for errors.

    Raises:
        ValueError: names every field that is unknown, missing or has a value that is not handled.
    """
    ignored = {*hf_fields.IGNORED, *IGNORED_FIELDS.split()}
    problems = hf_fields.field_problems(raw, USED | ignored, FIXED)
    problems += hf_fields.count_problems(raw, SIZES) + hf_fields.number_problems(raw, LIMITS)
    problems = problems or _contradictions(raw)
    if problems:
        raise ValueError(f"{source} cannot be used:\n  " + "\n  ".join(problems))
    sizes = {ours: raw[theirs] for theirs, ours in SIZES.items() if theirs in raw}
    head = {}
    if raw["architectures"] == [CTC]:
        head = {"vocab_size": raw["vocab_size"], "blank_id": raw.get("pad_token_id", 0)}
    width, heads = _sizes(raw, "hidden_size", "num_attention_heads")
    return W2vBertConfig(
        **{"vocab_size": 0, **head, **sizes},
        head_dim=width // heads,
        dropout_rate=float(raw.get(DROPOUTS[0], 0.0)),
        layer_norm_epsilon=float(raw.get("layer_norm_eps", 1e-5)),
    )


def _sizes(raw: Mapping[str, Any], *names: str) -> list[int]:
    return [raw.get(name, getattr(W2vBertConfig, SIZES[name])) for name in names]


def _contradictions(raw: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with fields that are valid each for itself."""
    problems = []
    architectures, vocab_size = raw.get("architectures"), raw.get("vocab_size")
    if architectures not in ([ENCODER], [CTC]):
        problems.append(
            f"architectures={architectures!r} is not handled (only {[ENCODER]} or {[CTC]})"
        )
    if architectures == [CTC]:
        problems += hf_fields.count_problems({"vocab_size": vocab_size}, ["vocab_size"])
        blank = raw.get("pad_token_id", 0)
        if not problems and not (type(blank) is int and 0 <= blank < vocab_size):
            problems.append(f"pad_token_id={blank!r} must be a token below vocab_size={vocab_size}")
    width, heads = _sizes(raw, "hidden_size", "num_attention_heads")
    if width % heads:
        problems.append(f"hidden_size={width} is not a multiple of num_attention_heads={heads}")
    (conv_width,) = _sizes(raw, "conv_depthwise_kernel_size")
    if conv_width % 2 == 0:
        problems.append(f"conv_depthwise_kernel_size={conv_width} is not odd")
    return problems


def format_config(config: W2vBertConfig, dtype: str) -> dict[str, Any]:
    """Returns the config.json of a dense W2vBertConfig, with every field that is used.

    Args:
        config: its methods are not written.
        dtype: name of the weights' dtype.

    Raises:
        ValueError: if Hugging Face's w2v-BERT has no such model.
    """
    if config.num_decoder_layers:
        raise ValueError(
            f"num_decoder_layers={config.num_decoder_layers}: Hugging Face has no w2v-BERT with a "
            "T5 decoder."
        )
    if config.num_heads * config.head_dim != config.emb_dim or config.conv_width % 2 == 0:
        raise ValueError(
            f"num_heads={config.num_heads} times head_dim={config.head_dim} must be emb_dim="
            f"{config.emb_dim}, and conv_width={config.conv_width} odd, in a Hugging Face w2v-BERT."
        )
    return {
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        **dict.fromkeys(DROPOUTS, config.dropout_rate),
        "add_adapter": False,
        "architectures": [CTC if config.vocab_size else ENCODER],
        "hidden_act": "swish",
        "layer_norm_eps": config.layer_norm_epsilon,
        "mask_feature_prob": 0.0,  # as we keep no vector for SpecAugment
        "mask_time_prob": 0.0,
        "model_type": config.family,
        "pad_token_id": config.blank_id,
        "position_embeddings_type": "relative_key",
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size or None,
    }


HUGGINGFACE = HuggingFace(
    (W2vBertConfig.family,),
    parse_config,
    format_config,
    tensor_name,
    resolve_tensors,
    tensor_shape,
)
