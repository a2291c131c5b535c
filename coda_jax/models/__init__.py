"""Families of models, one folder each. Start reading at `base`, then `t5`.

Every folder has the files `config` (sizes, options, published presets, a tiny one), `network` (the
Flax modules), `huggingface` (checkpoints), `inputs` (how inputs are read), `served` (how they are
where coda_jax is not), and in `__init__` its `FAMILY`; some have more. `FAMILIES` holds them all by
name; a new family is a folder, and an import and an entry here. `hf_fields` is what all checkpoints
of Hugging Face share, `preprocessing` their preprocessor_config.json.
"""

import dataclasses
import difflib
import os
import pathlib

from coda_jax.models.base import (
    Family,
    Inputs,
    ModelConfig,
    check_divides,
    init_params,
    param_axes,
    param_shapes,
    placed,
)
from coda_jax.models.pix2struct import FAMILY as PIX2STRUCT
from coda_jax.models.t5 import FAMILY as T5
from coda_jax.models.w2v_bert import FAMILY as W2V_BERT

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        T5,
        PIX2STRUCT,
        W2V_BERT,
    )
}
DEFAULT_PRESET = "t5_1_1_base"  # of `coda bench`
CONFIGS = {family.config.__name__: family.config for family in FAMILIES.values()}

__all__ = [
    "CONFIGS",
    "DEFAULT_PRESET",
    "FAMILIES",
    "Family",
    "Inputs",
    "ModelConfig",
    "check_divides",
    "family_of",
    "find",
    "init_params",
    "inputs_of",
    "param_axes",
    "param_shapes",
    "placed",
    "preset",
    "presets",
]


def find(name: str, source: object) -> Family:
    """The family of a name.

    Raises:
        ValueError: there is none; `source` says where the name was found.
    """
    if name not in [*FAMILIES]:
        raise ValueError(f"{source}: family={name!r} is unknown; it must be one of {[*FAMILIES]}")
    return FAMILIES[name]


def family_of(config: ModelConfig) -> Family:
    """The family of a config."""
    return FAMILIES[config.family]


def inputs_of(config: ModelConfig, directory: str | os.PathLike | None = None) -> Inputs:
    """The inputs of a config's family, as the checkpoint in a folder, if any, prepares them.

    Raises:
        ValueError: its preprocessor_config.json asks for what is not handled.
    """
    inputs = family_of(config).inputs
    if directory is None:
        return inputs
    return inputs.of_checkpoint(inputs, pathlib.Path(directory), config)


def presets() -> dict[str, ModelConfig]:
    """The published sizes of all families, by name."""
    return {name: cfg for family in FAMILIES.values() for name, cfg in family.presets.items()}


def preset(name: str, **changes) -> ModelConfig:
    """The config of a published size, with other values for some fields.

    Raises:
        ValueError: there is no such size or field, the nearest names are listed; a value is out of
            its range.
    """
    known = presets()
    if name not in [*known]:
        near = difflib.get_close_matches(str(name), known, n=3) or sorted(known)
        raise ValueError(f"preset {name!r} is unknown; did you mean one of {near}?")
    names = [field.name for field in dataclasses.fields(known[name])]
    for field in changes:
        if field not in names:
            near = difflib.get_close_matches(field, names, n=3) or names
            raise ValueError(f"preset {name!r} has no field {field!r}; did you mean one of {near}?")
    return known[name].replace(**changes)
