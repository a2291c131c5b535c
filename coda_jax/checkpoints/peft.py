"""Files of Hugging Face's library peft: adapter_config.json and a safetensors file.

    base_model.model.<module>.<leaf>, such as
    base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight

`methods.PEFT` says which methods it has and how it stores them. A file says nothing of the values
of its base: another base of the same shapes is not noticed.
"""

from collections.abc import Iterable, Mapping, Sequence
import os
from pathlib import Path
import re
from typing import Any

import numpy as np

from coda_jax import files, methods, trees
from coda_jax.checkpoints import tensor_files, torch_files
from coda_jax.models import ModelConfig, family_of, param_shapes

CONFIG = "adapter_config.json"
TENSORS, TORCH_TENSORS = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."


def load_peft(
    path: str | os.PathLike, config: ModelConfig, params: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Puts an adapter of peft onto a base.

    Args:
        path: the folder.
        config: of the dense base.
        params: the base's parameter tree.

    Returns:
        (config, params): the config with the method, and the whole parameter tree.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is of another method, or has options that ours has not; tensors are unknown,
            missing or misshapen.
    """
    folder = Path(path)
    fields = files.read_json(folder / CONFIG)
    kind = fields.get("peft_type")
    if kind not in [*methods.PEFT]:  # which may be anything
        known = " or ".join(methods.PEFT)
        raise ValueError(f"{folder / CONFIG} is of peft_type={kind!r}; {known} alone is read")
    form = methods.PEFT[kind]
    read = read_either(folder / TENSORS, folder / TORCH_TENSORS)
    tensors, unknown = _by_leaf(read, form.LEAVES, config)
    targets = patterns_of({module for module, _ in tensors}, [*_modules(config)])
    method = form.read(fields, targets, str(folder / CONFIG))
    if unknown:
        raise ValueError(f"{folder} has tensors of no projection of the base: {unknown}")
    base = trees.flatten(params)
    leaves = {
        f"{module}/{name}": np.asarray(form.from_peft(name, tensor, base[f"{module}/kernel"]))
        for (module, name), tensor in tensors.items()
    }
    config = config.replace(methods=(method,))
    whole = trees.merge(params, trees.unflatten(leaves))
    trees.check_tree(param_shapes(config), whole, what=f"base and {folder} do")
    return config, whole


def save_peft(
    path: str | os.PathLike, config: ModelConfig, params: Mapping[str, Any], *, base: str = ""
) -> None:
    """Writes an adapter as peft does.

    Args:
        path: the folder; created if need be.
        config: of the adapted model, with one method, of `methods.PEFT`.
        params: the whole parameter tree.
        base: name or folder of the base, which peft loads if nobody says another.

    Raises:
        ValueError: there are other methods; leaves are missing, extra or misshapen, or have no
            place in peft's files.
    """
    forms = {form.METHOD.name: form for form in methods.PEFT.values()}
    names = [method.name for method in config.methods]
    if len(names) != 1 or names[0] not in forms:
        raise ValueError(f"peft's files hold {[*forms]} alone, and the model has {names}")
    trees.check_tree(param_shapes(config), params)
    form, modules = forms[names[0]], _modules(config)
    theirs = {ours: end for end, ours in form.LEAVES.items()}
    saved, frozen = (trees.flatten(x) for x in methods.partition(config, params))
    tensors = {}
    for leaf_path, leaf in saved.items():
        module, _, name = leaf_path.rpartition("/")
        if name not in theirs:
            raise ValueError(f"{leaf_path} is trained, and peft's files have no place for it")
        tensor = form.to_peft(name, leaf, frozen[f"{module}/kernel"])
        tensors[f"{_PREFIX}{modules[module]}.{theirs[name]}"] = np.asarray(tensor)
    targets = {modules[leaf_path.rpartition("/")[0]] for leaf_path in saved}
    fields = {
        **form.write(config.methods[0]),
        "task_type": "SEQ_2_SEQ_LM" if config.num_decoder_layers else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": _target_modules(targets, modules.values()),
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensor_files.write_tensors(folder / TENSORS, tensors)
    files.write_json(folder / CONFIG, fields, sort_keys=True)


def read_either(safetensors: Path, pytorch: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file or, where it alone is there, of one of PyTorch."""
    if not safetensors.is_file() and pytorch.is_file():
        return torch_files.read_tensors(pytorch)
    return tensor_files.read_tensors(safetensors)


def _by_leaf(
    tensors: Mapping[str, np.ndarray], leaves: Mapping[str, str], config: ModelConfig
) -> tuple[dict[tuple[str, str], np.ndarray], list[str]]:
    """{(our module, our leaf): tensor}, and the names of tensors that are none of them."""
    modules = {f"{_PREFIX}{name}": path for path, name in _modules(config).items()}
    found, unknown = {}, []
    for name, tensor in tensors.items():
        ends = [end for end in leaves if name.endswith(f".{end}")]
        module = modules.get(name.removesuffix(f".{ends[0]}")) if ends else None
        if module is None:
            unknown.append(name)
        else:
            found[module, leaves[ends[0]]] = tensor
    return found, unknown


def _modules(config: ModelConfig) -> dict[str, str]:
    """{our path: Hugging Face's name} of the modules with a matrix in the dense model."""
    dense = config.dense()
    named = family_of(config).huggingface.tensor_name
    paths = [path for path in trees.flatten(param_shapes(dense)) if path.endswith("/kernel")]
    return {
        path.removesuffix("/kernel"): named(path, dense).removesuffix(".weight") for path in paths
    }


def patterns_of(targets: set[str], modules: Sequence[str]) -> tuple[str, ...]:
    """Patterns that match these modules and no other, the same for all layers where that is so."""
    found = []
    for path in sorted(targets):
        every_layer = "^" + re.sub(r"layers_\d+", r"layers_\\d+", path) + "$"
        matched = {module for module in modules if trees.matches(module, (every_layer,))}
        pattern = every_layer if matched <= targets else f"^{path}$"
        if pattern not in found:
            found.append(pattern)
    return tuple(found)


def _target_modules(targets: set[str], modules: Iterable[str]) -> list[str]:
    """Ends of names, where they select these modules and no other, else whole names."""
    ends = {name.rpartition(".")[2] for name in targets}
    selected = {name for name in modules if name.rpartition(".")[2] in ends}
    return sorted(ends if selected == targets else targets)
