"""The config.json of T5-like Hugging Face checkpoints, read strictly.

Every field is either used, or checked, or in the list of those that change no logits. The rest is
an error: a field that we do not know may change the computation.
"""

from collections.abc import Iterable, Mapping, Set
from typing import Any

from coda_jax.network import T5Config

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
DEFAULT_FEED_FORWARD = {"t5": "relu", "mt5": "gated-gelu"}  # also: the known model types
ACTIVATIONS = {  # feed_forward_proj: (mlp_activations, dense_act_fn, is_gated_act)
    "relu": (("relu",), "relu", False),
    "gated-gelu": (("gelu", "linear"), "gelu_new", True),
}
# Fields that change the computation, with the values for which they do not.
FIXED = {
    "is_encoder_decoder": (True,),
    "is_decoder": (False,),
    "is_encoder_only": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "pad_token_id": (0, None),  # the network takes token 0 as padding
    "decoder_start_token_id": (0, None),  # and shifts targets right with token 0
}
USED = {*SIZES, *OPTIONAL, "model_type", "feed_forward_proj", "dense_act_fn", "is_gated_act",
        "tie_word_embeddings", "scale_decoder_outputs"}  # fmt: skip
# Fields that change no logits: bookkeeping, tokenizer, generation, training, other tasks' heads.
IGNORED_FIELDS = """
    _name_or_path architectures transformers_version torch_dtype dtype use_cache output_past
    n_positions initializer_factor gradient_checkpointing classifier_dropout problem_type
    finetuning_task task_specific_params id2label label2id num_labels return_dict torchscript
    use_return_dict output_hidden_states output_attentions use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward _attn_implementation_autoset
    tokenizer_class prefix bos_token_id eos_token_id sep_token_id bad_words_ids
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
    output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
IGNORED = frozenset(IGNORED_FIELDS.split())


def parse_config(raw: Mapping[str, Any], source: str) -> T5Config:
    """Returns the dense T5Config of a config.json.

    Args:
        raw: the fields.
        source: the file's name, for errors.

    Raises:
        ValueError: names every field that is unknown, missing or has a value that is not handled.
    """
    model_type = raw.get("model_type")
    if model_type not in DEFAULT_FEED_FORWARD:
        raise ValueError(
            f"{source}: model_type={model_type!r} is not handled; only "
            f"{sorted(DEFAULT_FEED_FORWARD)} are."
        )
    problems = field_problems(raw, USED | IGNORED, FIXED)
    projection = raw.get("feed_forward_proj", DEFAULT_FEED_FORWARD[model_type])
    problems += _size_problems(raw) + _activation_problems(raw, projection) + _scale_problems(raw)
    if problems:
        raise ValueError(f"{source} cannot be used:\n  " + "\n  ".join(problems))
    optional = {**OPTIONAL, **{name: raw[name] for name in OPTIONAL if name in raw}}
    return T5Config(
        **{ours: raw[theirs] for theirs, ours in SIZES.items()},
        num_decoder_layers=optional["num_decoder_layers"] or raw["num_layers"],
        mlp_activations=ACTIVATIONS[projection][0],
        dropout_rate=float(optional["dropout_rate"]),
        logits_via_embedding=scales_logits(raw),
        relpos_num_buckets=optional["relative_attention_num_buckets"],
        relpos_max_distance=optional["relative_attention_max_distance"],
        layer_norm_epsilon=float(optional["layer_norm_epsilon"]),
    )


def field_problems(
    raw: Mapping[str, Any], known: Set[str], fixed: Mapping[str, tuple], prefix: str = ""
) -> list[str]:
    """Returns what is wrong with fields' names, and with the values that must be certain ones.

    Args:
        raw: the fields.
        known: names that may be there.
        fixed: names that may be there with one of some values.
        prefix: of the names in what is returned.
    """
    problems = [f"unknown field {prefix}{name}={value!r}" for name, value in raw.items()
                if name not in known and name not in fixed]  # fmt: skip
    return problems + [
        f"{prefix}{name}={raw[name]!r} is not handled (only {' or '.join(map(repr, allowed))})"
        for name, allowed in fixed.items()
        if name in raw and not any(_same(raw[name], value) for value in allowed)
    ]


def _same(value: Any, allowed: Any) -> bool:
    return type(value) is type(allowed) and value == allowed  # 0 is not False here


def count_problems(raw: Mapping[str, Any], names: Iterable[str], prefix: str = "") -> list[str]:
    """Returns which of the fields that are there are no positive whole numbers."""
    return [f"{prefix}{name}={raw[name]!r} is not a positive whole number" for name in names
            if name in raw and not (type(raw[name]) is int and raw[name] > 0)]  # fmt: skip


def number_problems(
    raw: Mapping[str, Any], limits: Mapping[str, float], prefix: str = ""
) -> list[str]:
    """Returns which of the fields that are there are no numbers from 0 to below their limit."""
    return [f"{prefix}{name}={raw[name]!r} is not a number from 0 to below {high}"
            for name, high in limits.items()
            if name in raw
            and not (type(raw[name]) in (int, float) and 0 <= raw[name] < high)]  # fmt: skip


def _size_problems(raw: Mapping[str, Any]) -> list[str]:
    counts = [*SIZES, "relative_attention_num_buckets", "relative_attention_max_distance"]
    if raw.get("num_decoder_layers") is not None:
        counts.append("num_decoder_layers")
    limits = {"dropout_rate": 1.0, "layer_norm_epsilon": float("inf")}
    missing = [f"missing field {name}" for name in SIZES if name not in raw]
    return missing + count_problems(raw, counts) + number_problems(raw, limits)


def _activation_problems(raw: Mapping[str, Any], projection: Any) -> list[str]:
    if not isinstance(projection, str) or projection not in ACTIVATIONS:
        return [f"feed_forward_proj={projection!r} is not handled (only {sorted(ACTIVATIONS)})"]
    _, function, gated = ACTIVATIONS[projection]
    return [
        f"{name}={raw[name]!r} contradicts feed_forward_proj={projection!r}, which means {value!r}"
        for name, value in (("dense_act_fn", function), ("is_gated_act", gated))
        if name in raw and not _same(raw[name], value)
    ]


def _written_by_5(raw: Mapping[str, Any]) -> bool:
    major = str(raw.get("transformers_version", "")).split(".")[0]
    return major.isdigit() and int(major) >= 5


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
    if raw.get("scale_decoder_outputs") is not None:
        return raw["scale_decoder_outputs"]
    return raw.get("tie_word_embeddings") is not False


def may_share_unscaled(raw: Mapping[str, Any]) -> bool:
    """Returns whether an unscaled model without lm_head takes the embedding for it."""
    return bool(raw.get("tie_word_embeddings")) and not scales_logits(raw)


def format_config(config: T5Config, dtype: str) -> dict[str, Any]:
    """Returns the config.json of a dense T5Config, which transformers 4 and 5 read alike.

    Args:
        config: its `adapter` and `coda` are not written.
        dtype: name of the weights' dtype.

    Raises:
        ValueError: if the activations have no name in Hugging Face's T5.
    """
    names = [name for name, entry in ACTIVATIONS.items()
             if entry[0] == tuple(config.mlp_activations)]  # fmt: skip
    if not names:
        raise ValueError(
            f"mlp_activations={config.mlp_activations!r} cannot be saved as a Hugging Face T5; "
            f"only {[entry[0] for entry in ACTIVATIONS.values()]} can."
        )
    _, function, gated = ACTIVATIONS[names[0]]
    return {
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        "architectures": ["T5ForConditionalGeneration"],
        "decoder_start_token_id": 0,
        "dense_act_fn": function,
        "dropout_rate": config.dropout_rate,
        "eos_token_id": 1,
        "feed_forward_proj": names[0],
        "is_encoder_decoder": True,
        "is_gated_act": gated,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "model_type": "t5",
        "num_decoder_layers": config.num_decoder_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.relpos_max_distance,
        "relative_attention_num_buckets": config.relpos_num_buckets,
        "tie_word_embeddings": config.logits_via_embedding,
        "torch_dtype": dtype,
    }
