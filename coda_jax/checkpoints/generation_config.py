"""generation_config.json: how a checkpoint's makers decode with it.

Read are the fields that `Generation` has; a field that would change outputs in a way that is not
offered here is named in a warning.
"""

from collections.abc import Mapping
import os
from pathlib import Path
from typing import Any

from absl import logging

from coda_jax import files
from coda_jax.models import ModelConfig

GENERATION_CONFIG_FILE = "generation_config.json"

_SAME = (  # fields that mean the same under the same name
    *["num_beams", "length_penalty", "early_stopping", "do_sample", "temperature", "top_k"],
    *["top_p", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"],
    *["forced_bos_token_id", "stop_strings"],
)
_LENGTHS = ("max_new_tokens", "max_length", "min_length", "min_new_tokens")
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


def read_generation_config(directory: str | os.PathLike, config: ModelConfig) -> dict[str, Any]:
    """The options that a checkpoint's folder asks for, by their names in `Generation`.

    Args:
        directory: the checkpoint's folder.
        config: of its model, whose tokens must be those of the file.

    Returns:
        {name: value}, empty where there is no such file.

    Raises:
        ValueError: it is not JSON, a length is no whole number, or it names other tokens for
            padding, start or end.
    """
    path = Path(directory) / GENERATION_CONFIG_FILE
    if not path.is_file():
        return {}
    fields = {name: value for name, value in files.read_json(path).items() if value is not None}
    _check_ids(fields, config, path)
    for name in _LENGTHS:
        if type(fields.get(name, 0)) is not int:
            raise ValueError(f"{path}: {name}={fields[name]!r} is not a whole number")
    options = {name: fields[name] for name in _SAME if name in fields}
    if isinstance(options.get("stop_strings"), list):
        options["stop_strings"] = tuple(options["stop_strings"])
    # transformers' lengths count the start token, its numbers of new tokens do not.
    if "max_new_tokens" in fields or "max_length" in fields:
        longest = fields.get("max_length", 1) - 1
        options["max_decode_length"] = fields.get("max_new_tokens", longest)
    if "min_length" in fields:
        options.setdefault("min_new_tokens", max(0, fields["min_length"] - 1))
    read = {*_SAME, *_IDS, *_LENGTHS, *_HARMLESS}
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
                f"{path}: {field}={fields[field]}, but the model's config says {expected}"
            )
