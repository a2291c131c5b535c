"""Many adapters of one base in `coda predict`: which there are, and which each line asks for."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
from pathlib import Path
from typing import Any

from coda_jax import checks
from coda_jax.adapters import unknown
from coda_jax.checkpoints.adapter import MANIFEST, read_config, read_manifest
from coda_jax.checkpoints.quantization import quantize
from coda_jax.checkpoints.swap_in import encoder_of
from coda_jax.commands.loading import LoadedModel

FIELD = "adapter"  # of a line
_GIVEN = "{'name': 'my_run/export/adapter'}, or a folder of adapters' folders"


def find_adapters(given: Any) -> dict[str, str]:
    """{name: folder} of ADAPTERS: a dictionary, or a folder in which each has one of its name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is neither, or there is no adapter.
    """
    if isinstance(given, Mapping):
        found = {checks.text("a name in ADAPTERS", name): path for name, path in given.items()}
        checks.paths(**{f"ADAPTERS[{name!r}]": path for name, path in found.items()})
    else:
        found = {file.parent.name: file.parent for file in _manifests(given)}
    if not found or None in found.values():
        raise checks.wrong("ADAPTERS", f"adapters: {_GIVEN}", given)
    return {name: str(path) for name, path in found.items()}


def _manifests(given):
    if not isinstance(given, str) or not given:
        raise checks.wrong("ADAPTERS", _GIVEN, given)
    if not Path(given).is_dir():
        raise FileNotFoundError(f"ADAPTERS={given!r} is no folder")
    return sorted(Path(given).glob(f"*/{MANIFEST}"))


def with_adapters(
    model: LoadedModel, adapters: Mapping[str, str] | str | None = None
) -> LoadedModel:
    """A base with adapters: the config is that of the first, the parameters are the base's.

    They are quantised where all adapters were trained so.

    Args:
        model: the base.
        adapters: as of `find_adapters`; None for the model as it is.

    Raises:
        ValueError: the model has an adapter or methods already; see `read_manifest`. Whether the
            adapters belong to the base, `Adapters` says.
    """
    if adapters is None:
        return model
    folders = find_adapters(adapters)
    if model.config.methods:
        raise ValueError(f"ADAPTERS={adapters!r} belong to a base alone: no INITIAL_ADAPTER_PATH")
    adapted = read_config(next(iter(folders.values())))
    config, params = model.config, model.params
    if not adapted.num_decoder_layers:
        config, params = encoder_of(config, params)
    computed = {name: getattr(config, name) for name in config.run_fields}
    manifests = {folder: read_manifest(folder) for folder in folders.values()}
    vocabularies = {folder: found.get("vocabulary") for folder, found in manifests.items()}
    lengths = [found.get("lengths") for found in manifests.values()]
    names = lengths[0].keys() if all(lengths) else ()
    trained_on = {found.get("quantization") for found in manifests.values()}
    if len(trained_on) == 1 and (kind := trained_on.pop()):
        params = quantize(config, params, kind)
    return dataclasses.replace(
        model,
        config=adapted.replace(**computed),
        params=params,
        adapter={folder: found for folder, found in vocabularies.items() if found},
        lengths={name: max(found[name] for found in lengths) for name in names},
        adapters=folders,
    )


def problem_of(model: LoadedModel) -> Callable[[Mapping[str, Any]], str | None]:
    """(request) -> why it is none of the model, or names none of its ADAPTERS; None where it is."""
    names = [*(model.adapters or ())]
    return lambda request: _misnamed(request, names) or model.inputs.problem(request)


def _misnamed(request: Mapping[str, Any], names: list[str]) -> str | None:
    """Why a request names none of the adapters; None where it does, or there are none to name."""
    if FIELD not in request:
        return (
            f"the field {FIELD!r} is missing: with ADAPTERS each line names one" if names else None
        )
    if not names:
        return f"the field {FIELD!r} chooses from ADAPTERS, and there are none"
    return unknown(request[FIELD], names)


def names_in(model: LoadedModel, records: Iterable[Mapping[str, str]]) -> list[str] | None:
    """The names of the adapters of records; None without ADAPTERS."""
    return [record[FIELD] for record in records] if model.adapters else None
