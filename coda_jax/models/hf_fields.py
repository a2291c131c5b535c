"""Hugging Face's files, as far as all families share them: fields of config.json, axes of tensors.

Every field is either used, or checked, or in a list of those that change no logits. The rest is an
error: a field that we do not know may change the computation.
"""

from collections.abc import Iterable, Mapping, Set
from typing import Any

# Fields that change no logits: bookkeeping, tokenizer, generation, training, other tasks' heads.
IGNORED_FIELDS = """
    _name_or_path architectures transformers_version torch_dtype dtype use_cache output_past
    n_positions initializer_factor gradient_checkpointing classifier_dropout problem_type
    finetuning_task task_specific_params id2label label2id num_labels return_dict torchscript
    use_return_dict output_hidden_states output_attentions use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward _attn_implementation _attn_implementation_autoset
    _commit_hash auto_map model_max_length transformers.js_config
    tokenizer_class prefix bos_token_id eos_token_id sep_token_id bad_words_ids
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
    output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
IGNORED = frozenset(IGNORED_FIELDS.split())
# Ranges far above any model, and low enough that a small file costs no memory and no time.
LAYERS, OTHERS = (1, 128), (1, 2**20)
COUNTS = {
    **dict.fromkeys(("num_layers", "num_decoder_layers", "num_hidden_layers"), LAYERS),
    "vocab_size": (1, 2**24),
    "relative_attention_num_buckets": (4, 2**16),  # half of them for each direction
    "relative_attention_max_distance": (1, 10**6),
}


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
    fixed = {"quantization_config": (None,), **fixed}
    problems = [f"unknown field {prefix}{name}={value!r:.80}" for name, value in raw.items()
                if name not in known and name not in fixed]  # fmt: skip
    return problems + [
        f"{prefix}{name}={raw[name]!r:.80} is not handled (only {' or '.join(map(repr, allowed))})"
        for name, allowed in fixed.items()
        if name in raw and not any(same(raw[name], value) for value in allowed)
    ]


def same(value: Any, allowed: Any) -> bool:
    """Whether a field has exactly this value."""
    return type(value) is type(allowed) and value == allowed  # 0 is not False here


def count_problems(raw: Mapping[str, Any], names: Iterable[str], prefix: str = "") -> list[str]:
    """Returns which of the fields that are there are no whole numbers that a model can have."""
    ranges = {name: COUNTS.get(name, OTHERS) for name in names if name in raw}
    return [f"{prefix}{name}={raw[name]!r:.80} is not a whole number from {least} to {most}"
            for name, (least, most) in ranges.items()
            if not (type(raw[name]) is int and least <= raw[name] <= most)]  # fmt: skip


def number_problems(
    raw: Mapping[str, Any], limits: Mapping[str, float], prefix: str = ""
) -> list[str]:
    """Returns which of the fields that are there are no numbers from 0 to below their limit."""
    return [f"{prefix}{name}={raw[name]!r:.80} is not a number from 0 to below {high:g}"
            for name, high in limits.items()
            if name in raw
            and not (type(raw[name]) in (int, float) and 0 <= raw[name] < high)]  # fmt: skip


def is_transposed(path: str) -> bool:
    """Whether the file has the axes of a leaf the other way round: [out, in], [buckets, H]."""
    return path.endswith(("kernel", "/rel_embedding"))


def tensor_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a leaf in the file."""
    return shape[::-1] if is_transposed(path) else shape
