"""Files of the library adapters (AdapterHub): adapter_config.json and a file of tensors.

    <sublayer>.adapters.<name>.<leaf>, such as
    encoder.block.0.layer.0.adapters.my_task.adapter_down.0.weight

`methods.ADAPTER_HUB` says which methods it has and how it stores them. A file says nothing of the
values of its base: another base of the same shapes is not noticed.
"""

from collections.abc import Mapping
import os
from pathlib import Path
import re
from typing import Any

import numpy as np

from coda_jax import checks, files, methods, trees
from coda_jax.checkpoints import tensor_files
from coda_jax.checkpoints.peft import CONFIG, patterns_of, read_either
from coda_jax.models import ModelConfig, family_of, param_shapes

TENSORS, TORCH_TENSORS = "adapter.safetensors", "pytorch_adapter.bin"
VERSION = "adapters.1.2.0"  # of the library whose files these are
_OTHERS = ("head_config.json", "embedding.pt")  # beside an adapter: more than an adapter
_PREFIX = "transformer."  # of models with heads of the library's own
_NAME = re.compile(r"\w[\w-]*")  # a module's, which has no dots
_SUBLAYER = re.compile(r"(en|de)coder\.block\.\d+\.layer\.\d+(?=\.)")  # in the names of T5


def is_adapter_hub(folder: str | os.PathLike) -> bool:
    """Whether a folder with adapter_config.json is of the library adapters, and not of peft."""
    fields = files.read_json(Path(folder) / CONFIG)
    return "peft_type" not in fields and "model_type" in fields


def load_adapter_hub(
    path: str | os.PathLike, config: ModelConfig, params: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Puts a bottleneck adapter of the library adapters onto a base.

    Args:
        path: the folder.
        config: of the dense base.
        params: the base's parameter tree.

    Returns:
        (config, params): the config with the method, and the whole parameter tree.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is of another method or family, or computes what ours does not; tensors are
            unknown, missing or misshapen.
    """
    folder = Path(path)
    file = folder / CONFIG
    fields = files.read_json(file)
    form, options = _form(fields, file, config)
    if others := [name for name in _OTHERS if (folder / name).exists()]:
        raise ValueError(f"{folder} has {others}, which is no part of the adapter: take them away")
    numbers = _numbers(config)
    expected, factors = form.places(options, numbers, str(file))
    widths = {max(1, int(config.emb_dim // factor)) for factor in factors.values()}
    if len(widths) != 1:
        raise ValueError(
            f"{file} has adapters of the widths {sorted(widths)}; ours have one width in all layers"
        )
    read = read_either(folder / TENSORS, folder / TORCH_TENSORS)
    found = _by_sublayer(read, fields.get("name"), form, config, folder)
    if lost := sorted(expected ^ found.keys()):
        raise ValueError(
            f"{folder}: the options and the tensors differ in where adapters are: {lost}"
        )
    targets = patterns_of(expected, [*numbers])
    method = form.read(options, widths.pop(), targets, str(file))
    leaves = {
        f"{sublayer}/{name}": np.asarray(leaf)
        for sublayer, tensors in found.items()
        for name, leaf in form.from_library(tensors, options, str(file)).items()
    }
    config = config.replace(methods=(method,))
    whole = trees.merge(params, trees.unflatten(leaves))
    trees.check_tree(param_shapes(config), whole, what=f"base and {folder} do")
    return config, whole


def save_adapter_hub(
    path: str | os.PathLike,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    name: str = "adapter",
    base: str = "",
) -> None:
    """Writes a bottleneck adapter as the library adapters does, as safetensors.

    `model.load_adapter(path, use_safetensors=True)` reads it there.

    Args:
        path: the folder; created if need be.
        config: of the adapted model, with one method, of `methods.ADAPTER_HUB`.
        params: the whole parameter tree.
        name: of the adapter.
        base: name or folder of the base.

    Raises:
        ValueError: there are other methods; leaves are missing, extra or misshapen, or have no
            place in the library's files.
    """
    forms = {form.METHOD.name: form for form in methods.ADAPTER_HUB.values()}
    names = [method.name for method in config.methods]
    if len(names) != 1 or names[0] not in forms:
        raise ValueError(f"AdapterHub's files hold {[*forms]} alone, and the model has {names}")
    if not _NAME.fullmatch(checks.text("name", name)):
        raise checks.wrong("name", "letters, digits, - and _", name)
    trees.check_tree(param_shapes(config), params)
    (method,), form, theirs = config.methods, forms[names[0]], _sublayers(config)
    leaves = trees.flatten(methods.partition(config, params)[0])
    found = {x: _below(leaves, x) for x in theirs if _below(leaves, x)}
    placed = {f"{x}/{leaf}" for x, below in found.items() for leaf in below}
    lost = [x for x in leaves if x not in placed or not x.endswith(tuple(form.LEAVES.values()))]
    if lost:
        raise ValueError(
            f"trained, and the library adapters has no place for it: {lost[0]}"
            + f" ({len(lost)} leaves in all)" * (len(lost) > 1)
        )
    tensors = {
        f"{theirs[x]}.adapters.{name}.{end}": np.asarray(tensor)
        for x, below in found.items()
        for end, tensor in form.to_library(below).items()
    }
    raw = family_of(config).huggingface.format_config(config.dense(), "float32")
    fields = {
        "config": form.write(method, config.emb_dim, found, _numbers(config)),
        "hidden_size": config.emb_dim,
        "model_class": raw["architectures"][0],
        "model_name": base,
        "model_type": raw["model_type"],
        "name": name,
        "version": VERSION,
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensor_files.write_tensors(folder / TENSORS, tensors)
    files.write_json(folder / CONFIG, fields, sort_keys=True)


def _form(fields: Mapping[str, Any], file: Path, config: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """How its method is stored, and its options."""
    options = fields.get("config")
    if not isinstance(options, dict):
        raise ValueError(f"{file} has no options of an adapter: config={options!r}")
    kind = options.get("architecture")
    if kind not in [*methods.ADAPTER_HUB]:  # which may be anything
        raise ValueError(f"{file} is of architecture={kind!r}; bottlenecks alone are read")
    types = family_of(config).huggingface.model_types
    if fields.get("model_type") not in types:
        raise ValueError(
            f"{file} is of model_type={fields.get('model_type')!r}; the base is one of {types}"
        )
    options = dict(options)
    if "version" not in fields:  # before 2.0 of adapter-transformers
        old = {"gelu": "gelu_new", "gelu_orig": "gelu"}
        name = str(options.get("non_linearity"))
        options["non_linearity"] = old.get(name, name)
    return methods.ADAPTER_HUB[kind], options


def _by_sublayer(
    tensors: Mapping[str, np.ndarray], name: Any, form: Any, config: ModelConfig, folder: Path
) -> dict[str, dict[str, np.ndarray]]:
    """{our sublayer: {end of the name: tensor}}."""
    ours = {theirs: path for path, theirs in _sublayers(config).items()}
    found: dict[str, dict[str, np.ndarray]] = {}
    unknown = []
    for whole, tensor in tensors.items():
        sublayer, _, end = whole.removeprefix(_PREFIX).partition(f".adapters.{name}.")
        if sublayer in ours and end in (*form.LEAVES, form.SCALING):
            found.setdefault(ours[sublayer], {})[end] = tensor
        else:
            unknown.append(whole)
    if unknown:
        raise ValueError(f"{folder} has tensors of no bottleneck of the base: {unknown}")
    return found


def _below(leaves: Mapping[str, Any], path: str) -> dict[str, Any]:
    return {
        x.removeprefix(f"{path}/"): leaf for x, leaf in leaves.items() if x.startswith(f"{path}/")
    }


def _sublayers(config: ModelConfig) -> dict[str, str]:
    """{our path: Hugging Face's name} of the sublayers of the dense model."""
    dense = config.dense()
    named = family_of(config).huggingface.tensor_name
    found = {}
    for stack in ("encoder", "decoder"):
        for place in dense.places(stack):
            for projection in dense.projections(place):
                path = f"{place.path}/{projection.path}"
                name = _SUBLAYER.match(named(f"{path}/kernel", dense))
                if name is None:
                    raise ValueError(
                        f"the library adapters has no sublayers of a {config.family!r}"
                    )
                found[path.rpartition("/")[0]] = name[0]
    return found


def _numbers(config: ModelConfig) -> dict[str, int]:
    """{path of a sublayer: number of its layer}, the decoder's layers behind the encoder's."""
    places = [*config.places("encoder"), *config.places("decoder")]
    numbers = {place.path: number for number, place in enumerate(places)}
    return {path: numbers[path.rpartition("/")[0]] for path in _sublayers(config)}
