"""LoRA as the library peft stores it: its options, names of leaves, and magnitudes of DoRA.

Axis letters: D inputs, F outputs, R rank.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from coda_jax import checks
from coda_jax.methods.base import Method
from coda_jax.methods.lora import Lora

KIND = "LORA"  # its `peft_type`
METHOD = Lora
LEAVES = {  # the end of peft's name of a tensor, and our leaf
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "lora_magnitude",
}
_FIELDS = {"r": "rank", "lora_alpha": "alpha"}
_SWITCHES = {"use_rslora": "rank_stabilized", "use_dora": "weight_decomposed"}
# What changes no output, or is told by the tensors themselves.
_OF_NO_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_type", "peft_version", "lora_dropout", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "megatron_config", "megatron_core", "runtime_config",
    "ensure_weight_tying",
}  # fmt: skip
# Of init_lora_weights; others, such as "pissa", change the base's weights, too.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_NEUTRAL = (None, False, "none", [], {})


def read(fields: Mapping[str, Any], targets: tuple[str, ...], source: str) -> Lora:
    """The method of the options in a file.

    Args:
        fields: of adapter_config.json.
        targets: patterns of the modules that have tensors.
        source: the file's name, for errors.

    Raises:
        ValueError: options are missing, or ask for what `Lora` has not.
    """
    if missing := sorted(_FIELDS.keys() - fields.keys()):
        raise ValueError(f"{source} lacks {missing}")
    known = {*_FIELDS, *_SWITCHES, *_OF_NO_EFFECT, "init_lora_weights"}
    others = {name: value for name, value in fields.items() if name not in known}
    unknown = {name: value for name, value in others.items() if value not in _NEUTRAL}
    if (start := fields.get("init_lora_weights")) not in _STARTS:
        unknown["init_lora_weights"] = start
    if unknown:
        raise ValueError(f"{source} asks for what Lora has not: {unknown}")
    values = {ours: fields[theirs] for theirs, ours in _FIELDS.items()}
    given = {x: fields[x] for x in _SWITCHES if fields.get(x) is not None}
    try:
        switches = {_SWITCHES[x]: checks.flag(x, value) for x, value in given.items()}
        return Lora(targets=targets, **values, **switches)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def write(method: Method) -> dict[str, Any]:
    """The options of a file, of which peft fills in the others."""
    names = (_FIELDS | _SWITCHES).items()
    return {
        "peft_type": KIND,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        **{theirs: getattr(method, ours) for theirs, ours in names},
    }


def to_peft(name: str, leaf: Array, kernel: Float[Array, "d f"]) -> Array:
    """A leaf as peft has it: transposed, and a magnitude as |W| + m."""
    leaf = jnp.asarray(leaf, jnp.float32)
    return (leaf + _column_norms(kernel) if name == "lora_magnitude" else leaf).T


def from_peft(name: str, tensor: Array, kernel: Float[Array, "d f"]) -> Array:
    """The inverse of `to_peft`; ValueError for magnitudes of another number of columns."""
    leaf = jnp.asarray(tensor, jnp.float32).T
    if name != "lora_magnitude":
        return leaf
    if leaf.shape != (norms := _column_norms(kernel)).shape:
        raise ValueError(f"{name} has the shape {leaf.shape}, and the base's columns {norms.shape}")
    return leaf - norms


def _column_norms(kernel):
    return jnp.linalg.norm(jnp.asarray(kernel, jnp.float32), axis=0)
