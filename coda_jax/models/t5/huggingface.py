"""The T5 family in Hugging Face's layout: config.json and tensor names.

That is T5, v1.1, flan, mT5, byT5, umT5, Pile-T5, MADLAD-400, codet5, UL2 and text encoders alone.
"""

from collections.abc import Mapping
import logging
from typing import Any

import numpy as np

from coda_jax.models import hf_fields
from coda_jax.models.base import HuggingFace
from coda_jax.models.t5.config import T5Config

# Their names are T5Config's arguments; all of them must be in the file.
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "emb_dim",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
    "num_layers": "num_encoder_layers",
    "num_heads": "num_heads",
}
OPTIONAL = {  # with the defaults of all T5-like configs of transformers
    "num_decoder_layers": None,  # as many as num_layers
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
}
# Of feed_forward_proj; also: the known model types.
DEFAULT_FEED_FORWARD = {"t5": "relu", "mt5": "gated-gelu", "umt5": "gated-gelu"}
ACTIVATIONS = {  # feed_forward_proj: (mlp_activations, dense_act_fn, is_gated_act)
    "relu": (("relu",), "relu", False),
    "silu": (("silu",), "silu", False),
    "gated-relu": (("relu", "linear"), "relu", True),
    "gated-gelu": (("gelu", "linear"), "gelu_new", True),
    "gated-silu": (("silu", "linear"), "silu", True),
}
SPECIAL_IDS = {  # with the values of a field that is null or not there
    "pad_token_id": ("pad_id", 0),
    "eos_token_id": ("eos_id", 1),
    "decoder_start_token_id": ("decoder_start_id", 0),
}
REFUSED = {
    "longt5": "its attention sees a part of the text; with full attention its weights give other "
    "answers: take a T5 v1.1 or flan-T5 of its size, which read any length, and `Coda` for speed",
    "switch_transformers": "its layers choose among experts; take a T5 v1.1 or flan-T5 of its "
    "size, and `Coda` for speed",
}
# Fields that change the computation, with the values for which they do not.
FIXED = {
    "is_encoder_decoder": (True, False),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
}
USED = {*SIZES, *OPTIONAL, *SPECIAL_IDS, "model_type", "feed_forward_proj", "dense_act_fn",
        "is_gated_act", "tie_word_embeddings", "scale_decoder_outputs", "is_encoder_only",
        "chronos_config"}  # fmt: skip
# Of umT5, which no version of the model ever read: every umT5 has a bias in each layer.
IGNORED = {"scalable_attention", *hf_fields.IGNORED}

_logger = logging.getLogger(__name__)

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
        "relpos_bias": "layer.0.SelfAttention.relative_attention_bias",
        "pre_attention_layer_norm": "layer.0.layer_norm",
        "mlp": "layer.1.DenseReluDense",
        "pre_mlp_layer_norm": "layer.1.layer_norm",
    },
    "decoder": {
        "self_attention": "layer.0.SelfAttention",
        "relpos_bias": "layer.0.SelfAttention.relative_attention_bias",
        "pre_self_attention_layer_norm": "layer.0.layer_norm",
        "encoder_decoder_attention": "layer.1.EncDecAttention",
        "pre_cross_attention_layer_norm": "layer.1.layer_norm",
        "mlp": "layer.2.DenseReluDense",
        "pre_mlp_layer_norm": "layer.2.layer_norm",
    },
}
PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


def tensor_name(path: str, config: T5Config) -> str:
    """Returns Hugging Face's name of the leaf at `path` of our parameter tree."""
    if path in TOP_NAMES:
        return TOP_NAMES[path]
    stack, layer, module, *rest = path.split("/")
    block = f"{stack}.block.{layer.removeprefix('layers_')}.{SUBLAYERS[stack][module]}"
    if rest in (["scale"], ["rel_embedding"]):
        return f"{block}.weight"
    return f"{block}.{PROJECTIONS.get(rest[0], rest[0])}.weight"


def parse_config(raw: Mapping[str, Any], source: str) -> T5Config:
    """Returns the dense T5Config of a config.json.

    Args:
        raw: the fields.
        source: the file's name, for errors.

    Raises:
        ValueError: names every field that is unknown, missing or has a value that is not handled.
    """
    problems = hf_fields.field_problems(raw, USED | IGNORED, FIXED)
    projection = _feed_forward(raw)
    problems += _size_problems(raw) + _activation_problems(raw, projection) + _scale_problems(raw)
    if problems:
        raise ValueError(f"{source} cannot be used:\n  " + "\n  ".join(problems))
    _warn(raw, source)
    optional = {**OPTIONAL, **{name: raw[name] for name in OPTIONAL if name in raw}}
    return T5Config(
        **{ours: raw[theirs] for theirs, ours in SIZES.items()},
        **{ours: _special_id(raw, theirs) for theirs, (ours, _) in SPECIAL_IDS.items()},
        num_decoder_layers=(
            0 if is_encoder_only(raw) else optional["num_decoder_layers"] or raw["num_layers"]
        ),
        mlp_activations=ACTIVATIONS[projection][0],
        dropout_rate=float(optional["dropout_rate"]),
        logits_via_embedding=scales_logits(raw) and not is_encoder_only(raw),
        shared_relpos_bias=raw["model_type"] != "umt5",
        relpos_num_buckets=optional["relative_attention_num_buckets"],
        relpos_max_distance=optional["relative_attention_max_distance"],
        layer_norm_epsilon=float(optional["layer_norm_epsilon"]),
    )


def is_encoder_only(raw: Mapping[str, Any]) -> bool:
    """Returns whether the model is an encoder without a decoder."""
    if raw.get("is_encoder_only") or raw.get("is_encoder_decoder") is False:
        return True
    return any(str(name).endswith("EncoderModel") for name in raw.get("architectures") or ())


def _special_id(raw: Mapping[str, Any], name: str) -> int:
    """A token id; transformers writes several ends as a list, of which there is one here."""
    value = raw.get(name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return SPECIAL_IDS[name][1] if value is None else value


def _feed_forward(raw: Mapping[str, Any]) -> Any:
    """Returns feed_forward_proj; without it, what the fields that follow from it say."""
    if "feed_forward_proj" in raw:
        return raw["feed_forward_proj"]
    _, function, gated = ACTIVATIONS[DEFAULT_FEED_FORWARD[raw["model_type"]]]
    wanted = raw.get("dense_act_fn", function), raw.get("is_gated_act", gated)
    return next((name for name, entry in ACTIVATIONS.items() if entry[1:] == wanted), wanted)


def _warn(raw: Mapping[str, Any], source: str) -> None:
    """Says what a reader of the config could take for something else."""
    if "chronos_config" in raw:
        _logger.warning(
            "%s: the model reads and writes token ids; scaling numbers to tokens and back, as "
            "chronos_config says, is not part of it",
            source,
        )
    if _scale_by_mistake(raw):
        _logger.warning(
            "%s: scale_decoder_outputs=true is taken for a mistake of transformers 5.0.0, which "
            "wrote it for every model: a gated T5 does not scale its logits",
            source,
        )


def _size_problems(raw: Mapping[str, Any]) -> list[str]:
    counts = [*SIZES, "relative_attention_num_buckets", "relative_attention_max_distance"]
    if raw.get("num_decoder_layers") is not None:
        counts.append("num_decoder_layers")
    limits = {"dropout_rate": 1.0, "layer_norm_epsilon": 1.0}
    problems = [f"missing field {name}" for name in SIZES if name not in raw]
    size = raw.get("vocab_size")
    ids = {name: _special_id(raw, name) for name in SPECIAL_IDS}
    problems += [
        f"{name}={value!r} is not one token below vocab_size={size!r}"
        for name, value in ids.items()
        if type(value) is not int or not 0 <= value < (size if type(size) is int else value + 1)
    ]
    return problems + hf_fields.count_problems(raw, counts) + hf_fields.number_problems(raw, limits)


def _activation_problems(raw: Mapping[str, Any], projection: Any) -> list[str]:
    if not isinstance(projection, str) or projection not in ACTIVATIONS:
        return [f"feed_forward_proj={projection!r} is not handled (only {sorted(ACTIVATIONS)})"]
    _, function, gated = ACTIVATIONS[projection]
    return [
        f"{name}={raw[name]!r} contradicts feed_forward_proj={projection!r}, which means {value!r}"
        for name, value in (("dense_act_fn", function), ("is_gated_act", gated))
        if name in raw and not hf_fields.same(raw[name], value)
    ]


def _written_by_5(raw: Mapping[str, Any]) -> bool:
    major = str(raw.get("transformers_version", "")).split(".")[0]
    return major.isdigit() and int(major) >= 5


def _scale_by_mistake(raw: Mapping[str, Any]) -> bool:
    """Whether scale_decoder_outputs is true where transformers 5.0.0 wrote it for every T5."""
    written = raw.get("transformers_version") == "5.0.0" and raw.get("scale_decoder_outputs")
    gated = str(_feed_forward(raw)).startswith("gated")
    return bool(written) and raw["model_type"] != "mt5" and gated


def _scale_problems(raw: Mapping[str, Any]) -> list[str]:
    problems = [f"{name}={raw[name]!r} is not true or false"
                for name in ("tie_word_embeddings", "scale_decoder_outputs")
                if type(raw.get(name)) not in (bool, type(None))]  # fmt: skip
    if raw["model_type"] == "mt5":
        if raw.get("scale_decoder_outputs"):
            problems.append("scale_decoder_outputs=True is not handled for model_type='mt5'")
        if raw.get("tie_word_embeddings") and not _written_by_5(raw):
            problems.append(
                "tie_word_embeddings=True for model_type='mt5' means scaled logits before "
                "transformers 5 and unscaled ones since; it is not handled for "
                f"transformers_version={raw.get('transformers_version')!r}"
            )
    return problems


def scales_logits(raw: Mapping[str, Any]) -> bool:
    """Returns whether decoder outputs are multiplied by d_model ** -0.5 before the logits.

    transformers 5 writes tie_word_embeddings=true for every T5, and says in scale_decoder_outputs
    what the field meant before: T5 1.0 scales (and ties), all later T5 and every mT5 do not.
    """
    if raw["model_type"] == "mt5":
        return False
    if _scale_by_mistake(raw):
        return False
    if raw.get("scale_decoder_outputs") is not None:
        return raw["scale_decoder_outputs"]
    return raw.get("tie_word_embeddings") is not False


def may_share_unscaled(raw: Mapping[str, Any]) -> bool:
    """Returns whether an unscaled model without lm_head takes the embedding for it."""
    return bool(raw.get("tie_word_embeddings")) and not scales_logits(raw)


def format_config(config: T5Config, dtype: str) -> dict[str, Any]:
    """Returns the config.json of a dense T5Config, which transformers 4 and 5 read alike.

    Args:
        config: its methods are not written.
        dtype: name of the weights' dtype.

    Raises:
        ValueError: if the activations have no name in Hugging Face's T5; if there is a head.
    """
    if config.head is not None:
        raise ValueError(
            f"head={config.head!r} is no part of a Hugging Face encoder; train it with a method "
            "that leaves its base frozen, and it is saved in an adapter file"
        )
    names = [name for name, entry in ACTIVATIONS.items()
             if entry[0] == tuple(config.mlp_activations)]  # fmt: skip
    if not names:
        raise ValueError(
            f"mlp_activations={config.mlp_activations!r} cannot be saved as a Hugging Face T5; "
            f"only {[entry[0] for entry in ACTIVATIONS.values()]} can."
        )
    _, function, gated = ACTIVATIONS[names[0]]
    model_type = "t5" if config.shared_relpos_bias else "umt5"
    kind = "ForConditionalGeneration" if config.num_decoder_layers else "EncoderModel"
    return {
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        **{theirs: getattr(config, ours) for theirs, (ours, _) in SPECIAL_IDS.items()},
        "architectures": [model_type.upper() + kind],
        "dense_act_fn": function,
        "dropout_rate": config.dropout_rate,
        "feed_forward_proj": names[0],
        "is_encoder_decoder": config.num_decoder_layers > 0,
        "is_gated_act": gated,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "model_type": model_type,
        "num_decoder_layers": config.num_decoder_layers or config.num_encoder_layers,
        "relative_attention_max_distance": config.relpos_max_distance,
        "relative_attention_num_buckets": config.relpos_num_buckets,
        "tie_word_embeddings": config.logits_via_embedding,
        "torch_dtype": dtype,
    }


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two tensors have the same values, as far as the dtype of the shorter one tells."""
    dtype = min(first.dtype, second.dtype, key=lambda x: x.itemsize)
    with np.errstate(over="ignore"):
        return np.array_equal(first.astype(dtype, copy=False), second.astype(dtype, copy=False))


def _resolve_embeddings(tensors: dict, raw: Mapping, source: str) -> dict:
    """Leaves one tensor for each embedding of the model: SHARED, and HEAD if it is not scaled."""
    tensors = {name: leaf for name, leaf in tensors.items() if name not in UNUSED}
    if is_encoder_only(raw):  # transformers ignores a decoder beside such a model, too
        tensors = {
            name: leaf
            for name, leaf in tensors.items()
            if name != HEAD and not name.startswith("decoder.")
        }
    present = [name for name in (SHARED, *COPIES) if name in tensors]
    if not present:
        return tensors
    shared = tensors[present[0]]
    tied = present[1:]
    if scales_logits(raw) and HEAD in tensors:
        tied.append(HEAD)
    different = [name for name in tied if not _equal(tensors[name], shared)]
    if different:
        scaled = raw.get("scale_decoder_outputs")
        field = "scale_decoder_outputs" if scaled else "tie_word_embeddings"
        hint = f" If the model has an lm_head of its own, as T5 v1.1 has, set {field} to false."
        raise ValueError(
            f"{source}: {different} must equal {present[0]} with {field}={raw.get(field)!r}, but "
            f"differ from it.{hint if HEAD in different else ''}"
        )
    kept = {name: leaf for name, leaf in tensors.items() if name not in (*present, *tied)}
    kept[SHARED] = shared
    if may_share_unscaled(raw) and not is_encoder_only(raw):
        kept.setdefault(HEAD, shared)
    return kept


HUGGINGFACE = HuggingFace(
    tuple(DEFAULT_FEED_FORWARD),
    parse_config,
    format_config,
    tensor_name,
    _resolve_embeddings,
    refused=REFUSED,
)
