"""How inputs are prepared, as a checkpoint's files say: preprocessor_config.json.

Fields are read as strictly as those of config.json: each is used, or must have the value that is
computed here, or changes nothing.
"""

from collections.abc import Mapping, Set
import os
from pathlib import Path
from typing import Any

from coda_jax import files, hub
from coda_jax.models import hf_fields

FILE = "preprocessor_config.json"
JOINED_FILE = "processor_config.json"  # in which newer ones stand among others
_JOINED = ("image_processor", "feature_extractor")
# Of how arrays are handed over, and of names.
_IGNORED_FIELDS = """
    image_processor_type feature_extractor_type processor_class _processor_class auto_map
    return_tensors data_format input_data_format device disable_grouping default_to_square
    return_attention_mask padding_side padding_value
"""


def find(directory: str | os.PathLike) -> dict[str, str]:
    """The file of a folder that says it, {name: path}; {} where there is none."""
    for name in (FILE, JOINED_FILE):
        if os.path.isfile(path := os.path.join(directory, name)):
            return {name: path}
    return {}


def read(
    directory: Path, used: Set[str], fixed: Mapping[str, tuple]
) -> tuple[Mapping[str, Any], str]:
    """The fields of a checkpoint's file, and where they stand; {} where there is none.

    Args:
        directory: of the checkpoint.
        used: fields that the family reads; None is as if one were not there.
        fixed: fields that must have one of some values.

    Raises:
        ValueError: a field is unknown, or has a value that is not handled; all are named.
    """
    found = find(directory)
    if not found:
        return {}, str(directory / FILE)
    ((name, path),) = found.items()
    raw = files.read_json(path, hub.MAX_JSON_BYTES)
    if name == JOINED_FILE:
        raw = next((raw[part] for part in _JOINED if raw.get(part)), {})
        if not isinstance(raw, Mapping):
            raise ValueError(f"{path}: {raw!r:.80} is not an object")
    raw = {key: value for key, value in raw.items() if value is not None}
    problems = hf_fields.field_problems(raw, {*used, *_IGNORED_FIELDS.split()}, fixed)
    if problems:
        raise ValueError(f"{path} cannot be used:\n  " + "\n  ".join(problems))
    return {key: raw[key] for key in used if key in raw}, path
