"""Configurations as JSON: the one codec, for adapter files and for runs.

A config is an object with its family, its fields, and its methods as a list of objects with their
names and fields. Dtypes are written by name, tuples as lists. What a layer computes again for its
gradient is not written: it is of a run on some machine. Sizes of layers are, where there are any.
"""

from collections.abc import Mapping
import dataclasses
import types
import typing
from typing import Any

import jax.numpy as jnp

from coda_jax import methods, models
from coda_jax.methods.version_1 import KINDS, as_methods

_KINDS = {float: (int, float)}  # of the values of a field, where others than its own type may be


def to_json(config: models.ModelConfig) -> dict[str, Any]:
    """The fields of a config, with those of its methods."""
    adaptation = [{"name": method.name, **_fields(method)} for method in config.methods]
    return {"family": config.family, **_fields(config), "methods": adaptation}


def from_json(values: Any, source: object) -> models.ModelConfig:
    """The inverse of `to_json`; a field that an older version did not write has its default.

    Args:
        values: what JSON held.
        source: where it was found, for errors.

    Raises:
        ValueError: a name is unknown, a value of a wrong type or not valid; all are named.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: {values!r} is not an object")
    fields = dict(values)
    family = models.find(fields.pop("family", None), source)
    listed = fields.pop("methods", [])
    if not isinstance(listed, list):
        raise ValueError(f"{source}: methods={listed!r} is not a list")
    adaptation = tuple(_method(entry, source) for entry in listed)
    return _made(family.config, fields, source, methods=adaptation)


def from_version_1(
    values: Any, adaptation: Mapping[str, Any], source: object, trained: str = "adapters"
) -> models.ModelConfig:
    """The config that version 1 wrote: the methods apart, or among the fields.

    Args:
        values: fields of the model.
        adaptation: fields of the methods by version 1's keys.
        source: where they were found, for errors.
        trained: what was trained, "adapters" or "all".
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: {values!r} is not an object")
    fields = {key: value for key, value in values.items() if key not in KINDS}
    given = {key: adaptation.get(key, values.get(key)) for key in KINDS}
    wrong = {key: x for key, x in given.items() if not isinstance(x, Mapping | None)}
    if wrong:
        raise ValueError(f"{source}: {wrong} are not objects")
    return from_json({**fields, "methods": as_methods(given, trained)}, source)


def _fields(config: Any) -> dict[str, Any]:
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "dtype":
            value = jnp.dtype(value).name
        values[field.name] = _as(list, value)
    for name in ("methods", "remat_policy"):
        values.pop(name, None)
    if not values.get("layer_sizes", True):  # as older versions wrote it
        del values["layer_sizes"]
    return values


def _as(kind: type, value: Any) -> Any:
    """Tuples as lists, or lists as tuples, also within them."""
    return kind(_as(kind, x) for x in value) if isinstance(value, tuple | list) else value


def _method(entry: Any, source: object) -> methods.Method:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{source}: the method {entry!r} is not an object")
    fields = dict(entry)
    try:
        cls = methods.find(fields.pop("name", None))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return _made(cls, fields, source)


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value is of the type that a field is annotated with."""
    if isinstance(kind, types.UnionType):
        return any(_is_of(member, value) for member in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        members = typing.get_args(kind)
        members = members[:1] * len(value) if members[-1] is Ellipsis else members
        return len(members) == len(value) and all(map(_is_of, members, value))
    return kind is Any or type(value) in _KINDS.get(kind, (kind,))


def _made(cls: type, values: Mapping[str, Any], source: object, **others: Any) -> Any:
    """A flat dataclass of the values and of others that are made already."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = {key: values[key] for key in sorted(values.keys() - known.keys())}
    if unknown:
        raise ValueError(f"{source} has unknown keys for {cls.__name__}: {unknown}")
    arguments = {key: _as(tuple, x) for key, x in values.items()}
    for name, value in arguments.items():
        if not _is_of(known[name].type, value):
            raise ValueError(f"{source} has {cls.__name__}.{name}={value!r} of a wrong type")
    try:
        return cls(**arguments, **others)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} is not valid: {error}") from error
