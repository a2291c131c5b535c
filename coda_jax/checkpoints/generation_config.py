"""generation_config.json: how a checkpoint's makers decode with it.

Older folders have these fields in config.json, where transformers reads them if there is no
generation_config.json. Read are the fields that `Generation` has; a field that would change outputs
in a way that is not offered here is named in a warning.
"""

from collections.abc import Mapping
import os
from pathlib import Path
from typing import Any

from absl import logging

from coda_jax import files, hub
from coda_jax.checkpoints.huggingface import CONFIG_FILE
from coda_jax.models import ModelConfig

GENERATION_CONFIG_FILE = "generation_config.json"

_LENGTHS = ("max_new_tokens", "max_length", "min_length", "min_new_tokens")
_TYPES = {  # of the fields that are read
    **dict.fromkeys(_LENGTHS, (int,)),
    **dict.fromkeys(("num_beams", "top_k", "no_repeat_ngram_size", "forced_bos_token_id"), (int,)),
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty", "length_penalty"), (int, float)),
    "do_sample": (bool,),
    "early_stopping": (bool, str),
    "stop_strings": (str, list),
}
_CALLED = {int: "an int", float: "a float", bool: "a bool", str: "a str", list: "a list"}
_IDS = {
    "pad_token_id": "pad_id",
    "eos_token_id": "eos_id",
    "decoder_start_token_id": "decoder_start_id",
}
_HARMLESS = frozenset([
    *["transformers_version", "_from_model_config", "bos_token_id", "use_cache", "cache_config"],
    *["cache_implementation", "max_cache_len", "return_dict_in_generate", "output_scores"],
    *["output_attentions", "output_hidden_states", "output_logits", "return_legacy_cache"],
    *["compile_config", "disable_compile", "prefill_chunk_size", "low_memory", "token_healing"],
    *["num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"],
    *["assistant_lookbehind", "target_lookbehind", "is_assistant", "max_matching_ngram_size"],
    *["assistant_early_exit", "prompt_lookup_num_tokens", "speculation_type", "use_mtp"],
    *["assistant_ensemble_weight", "continuous_batching_config"],
])  # fmt: skip
_NEUTRAL = {  # values that change nothing, beside null, false, 0 and what is empty
    "typical_p": 1,
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
}
_DEFAULTS = {  # of transformers' configs; in config.json such a value says nothing
    "max_length": 20, "min_length": 0, "num_beams": 1, "do_sample": False, "early_stopping": False,
    "temperature": 1, "top_k": 50, "top_p": 1, "repetition_penalty": 1, "length_penalty": 1,
    "no_repeat_ngram_size": 0,
}  # fmt: skip
_IN_CONFIG = frozenset([  # the fields of config.json that are read, or would change outputs
    *[*_TYPES, *_NEUTRAL, "bad_words_ids", "diversity_penalty", "forced_eos_token_id"],
    *["encoder_no_repeat_ngram_size", "remove_invalid_values", "exponential_decay_length_penalty"],
    *["suppress_tokens", "begin_suppress_tokens"],
])  # fmt: skip


def defaults_file(directory: str | os.PathLike) -> Path:
    """The file of a checkpoint's folder that says how to decode; it need not be there."""
    path = Path(directory) / GENERATION_CONFIG_FILE
    return path if path.is_file() else path.with_name(CONFIG_FILE)


def read_generation_config(
    directory: str | os.PathLike, config: ModelConfig, prefix_length: int = 0
) -> dict[str, Any]:
    """The options that a checkpoint's folder asks for, by their names in `Generation`.

    Args:
        directory: the checkpoint's folder.
        config: of its model, whose tokens must be those of the file.
        prefix_length: how many tokens are given behind the start token.

    Returns:
        {name: value}, empty where neither it nor config.json says anything.

    Raises:
        ValueError: it is not JSON, a field has another type than in transformers, or other tokens
            are named for padding, start or end.
    """
    path = defaults_file(directory)
    if not path.is_file():
        return {}
    raw = files.read_json(path, hub.MAX_JSON_BYTES)
    fields = {name: value for name, value in raw.items() if value is not None}
    if path.name == CONFIG_FILE:
        fields = {name: value for name, value in fields.items()
                  if name in _IN_CONFIG and value != _DEFAULTS.get(name)}  # fmt: skip
    _check_ids(fields, config, path)
    for name in _TYPES.keys() & fields.keys():
        if type(fields[name]) not in _TYPES[name]:
            expected = " or ".join(_CALLED[kind] for kind in _TYPES[name])
            raise ValueError(f"{path}: {name}={fields[name]!r:.80} is not {expected}")
    options = {name: fields[name] for name in fields if name in _TYPES}
    if not 0 <= (first := options.get("forced_bos_token_id", 0)) < config.vocab_size:
        raise ValueError(f"{path}: forced_bos_token_id={first} is no id below {config.vocab_size}")
    if isinstance(options.get("stop_strings"), list):
        options["stop_strings"] = tuple(options["stop_strings"])
    # transformers' lengths count the start token and the prefix, its numbers of new tokens neither.
    longest, shortest = options.pop("max_length", None), options.pop("min_length", None)
    if (new := options.pop("max_new_tokens", None)) is not None:
        options["max_decode_length"] = prefix_length + new
    elif longest is not None:
        options["max_decode_length"] = longest - 1
    if shortest:
        options.setdefault("min_new_tokens", max(0, shortest - 1 - prefix_length))
    read = {*_TYPES, *_IDS, *_HARMLESS}
    unknown = {
        name: value
        for name, value in fields.items()
        if name not in read and value and value != _NEUTRAL.get(name)
    }
    if unknown:
        logging.warning("%s: not handled, outputs may differ: %s", path, unknown)
    return options


def _check_ids(fields: Mapping[str, Any], config: ModelConfig, path: Path) -> None:
    """Raises ValueError where the file names other special tokens than the config."""
    for field, ours in _IDS.items():
        expected = getattr(config, ours)
        if fields.get(field, expected) not in (expected, [expected]):
            raise ValueError(
                f"{path}: {field}={fields[field]!r:.80}, but the model's config says {expected}"
            )
