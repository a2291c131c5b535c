"""LoRA files of Hugging Face's library peft: a safetensors file and adapter_config.json.

    base_model.model.<module>.lora_A.weight            [R, D]
    base_model.model.<module>.lora_B.weight            [F, R]
    base_model.model.<module>.lora_magnitude_vector    [F], of DoRA

A file says nothing of the values of its base: another base of the same shapes is not noticed.
"""

from collections.abc import Iterable, Mapping
import os
from pathlib import Path
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from coda_jax import files, methods, trees
from coda_jax.checkpoints import tensor_files, torch_files
from coda_jax.methods import Lora
from coda_jax.models import ModelConfig, family_of, param_shapes

CONFIG = "adapter_config.json"
TENSORS, TORCH_TENSORS = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_LEAVES = {  # ours, of peft's
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "lora_magnitude",
    "lora_magnitude_vector.weight": "lora_magnitude",
}
_NAMES = {ours: theirs for theirs, ours in reversed(_LEAVES.items())}
# What changes no output, or is told by the tensors themselves.
_OF_NO_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_type", "peft_version", "lora_dropout", "init_lora_weights", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "megatron_config", "megatron_core",
    "runtime_config", "ensure_weight_tying",
}  # fmt: skip
_NEUTRAL = (None, False, "none", [], {}, ())


def load_peft(
    path: str | os.PathLike, config: ModelConfig, params: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Puts a LoRA of peft onto a base.

    Args:
        path: the folder.
        config: of the dense base.
        params: the base's parameter tree.

    Returns:
        (config, params): the config with `Lora`, and the whole parameter tree.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is another method's, or has options that `Lora` has not; tensors are unknown,
            missing or misshapen.
    """
    folder = Path(path)
    fields = files.read_json(folder / CONFIG)
    _check(fields, folder / CONFIG)
    tensors = _read_tensors(folder)
    modules = {name: path for path, name in _modules(config).items()}
    leaves, unknown = {}, []
    for name, tensor in tensors.items():
        module, leaf = _split(name)
        if leaf is None or module not in modules:
            unknown.append(name)
        else:
            leaves[f"{modules[module]}/{leaf}"] = np.asarray(tensor, np.float32).T
    if unknown:
        raise ValueError(f"{folder} has tensors of no projection of the base: {unknown}")
    base = trees.flatten(params)
    for path in [path for path in leaves if path.endswith("/lora_magnitude")]:
        kernel = base[path.replace("/lora_magnitude", "/kernel")]
        leaves[path] = leaves[path] - _column_norms(kernel)
    lora = Lora(
        rank=fields["r"],
        alpha=float(fields["lora_alpha"]),
        targets=_patterns({path.rpartition("/")[0] for path in leaves}, config),
        rank_stabilized=bool(fields.get("use_rslora")),
        weight_decomposed=bool(fields.get("use_dora")),
    )
    config = config.replace(methods=(lora,))
    whole = trees.merge(params, trees.unflatten(leaves))
    trees.check_tree(param_shapes(config), whole, what=f"base and {folder} do")
    return config, whole


def save_peft(
    path: str | os.PathLike, config: ModelConfig, params: Mapping[str, Any], *, base: str = ""
) -> None:
    """Writes a LoRA as peft does.

    Args:
        path: the folder; created if need be.
        config: of the adapted model, whose one method is `Lora`.
        params: the whole parameter tree.
        base: name or folder of the base, which peft loads if nobody says another.

    Raises:
        ValueError: there are other methods, of which peft knows nothing; leaves are missing, extra
            or misshapen.
    """
    names = [method.name for method in config.methods]
    if names != [Lora.name]:
        raise ValueError(f"peft's files hold {[Lora.name]} alone, and the model has {names}")
    trees.check_tree(param_shapes(config), params)
    (lora,) = config.methods
    saved, frozen = (trees.flatten(x) for x in methods.partition(config, params))
    modules = _modules(config)
    tensors = {}
    for leaf_path, leaf in saved.items():
        module, _, name = leaf_path.rpartition("/")
        array = np.asarray(leaf, np.float32)
        if name not in _NAMES:
            raise ValueError(f"{leaf_path} is trained, and peft's files have no place for it")
        if name == "lora_magnitude":
            array = array + _column_norms(frozen[f"{module}/kernel"])
        tensors[f"{_PREFIX}{modules[module]}.{_NAMES[name]}"] = array.T
    targets = {path.rpartition("/")[0] for path in saved}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensor_files.write_tensors(folder / TENSORS, tensors)
    fields = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if config.num_decoder_layers else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rank_stabilized,
        "use_dora": lora.weight_decomposed,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _target_modules({modules[path] for path in targets}, modules.values()),
    }
    files.write_json(folder / CONFIG, fields, sort_keys=True)


def _check(fields: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError where the config asks for what `Lora` is not."""
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{file} is of peft_type={fields.get('peft_type')!r}; LORA alone is read")
    ours = {"r", "lora_alpha", "use_rslora", "use_dora"}
    missing = sorted({"r", "lora_alpha"} - fields.keys())
    if missing:
        raise ValueError(f"{file} lacks {missing}")
    others = {name: x for name, x in fields.items() if name not in ours | _OF_NO_EFFECT}
    unknown = {name: value for name, value in others.items() if value not in _NEUTRAL}
    if unknown:
        raise ValueError(f"{file} asks for what Lora has not: {unknown}")


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    if not (folder / TENSORS).is_file() and (folder / TORCH_TENSORS).is_file():
        return torch_files.read_tensors(folder / TORCH_TENSORS)
    return tensor_files.read_tensors(folder / TENSORS)


def _split(name: str) -> tuple[str, str | None]:
    """(module, our leaf) of a tensor's name; None for a leaf that is none of LoRA's."""
    for theirs, ours in _LEAVES.items():
        if name.startswith(_PREFIX) and name.endswith(f".{theirs}"):
            return name.removeprefix(_PREFIX).removesuffix(f".{theirs}"), ours
    return name, None


def _modules(config: ModelConfig) -> dict[str, str]:
    """{our path: Hugging Face's name} of the modules with a matrix in the dense model."""
    named = family_of(config).huggingface.tensor_name
    paths = [p for p in trees.flatten(param_shapes(config.dense())) if p.endswith("/kernel")]
    return {
        path.removesuffix("/kernel"): named(path, config.dense()).removesuffix(".weight")
        for path in paths
    }


def _column_norms(kernel: Any) -> np.ndarray:
    return np.linalg.norm(np.asarray(jnp.asarray(kernel, jnp.float32)), axis=0)


def _patterns(targets: set[str], config: ModelConfig) -> tuple[str, ...]:
    """Patterns that match these modules and no other: the usual ones where they do."""
    modules = [*_modules(config)]

    def matched(patterns):
        return {path for path in modules if trees.matches(path, patterns)}

    if matched(Lora.targets) == targets:
        return Lora.targets
    found = []
    for path in sorted(targets):
        every_layer = "^" + re.sub(r"layers_\d+", r"layers_\\d+", path) + "$"
        pattern = every_layer if matched((every_layer,)) <= targets else f"^{path}$"
        if pattern not in found:
            found.append(pattern)
    return tuple(found)


def _target_modules(targets: set[str], modules: Iterable[str]) -> list[str]:
    """Ends of names, where they select these modules and no other, else whole names."""
    ends = {name.rpartition(".")[2] for name in targets}
    selected = {name for name in modules if name.rpartition(".")[2] in ends}
    return sorted(ends if selected == targets else targets)
