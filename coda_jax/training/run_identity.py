"""What makes a run the one that it is, as JSON, and how another one differs.

All that decides the result counts: the model, the parameters at the start, the data, the objective,
the optimizer. Paths and how often a run logs or saves do not. Optimizers and schedules are
functions: they are described by the values in their closures, which have the names of optax's
arguments, and beside that by what they do.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from coda_jax import files, methods, processes, trees
from coda_jax.checkpoints.config_json import from_json, to_json
from coda_jax.checkpoints.fingerprints import fingerprints
from coda_jax.nn.quantized import quantization_of
from coda_jax.objectives import Model
from coda_jax.sharding import Placement
from coda_jax.training import schedules
from coda_jax.training.distillation import Distillation
from coda_jax.training.run_directory import (
    EXPORT,
    FORMAT_VERSION,
    RUN_FILE,
    saved_steps,
)

_HOW_OFTEN = ("log_every", "save_every", "keep")  # options that do not change the parameters
_TABLES = {  # of many values: (what is counted, the tolerance)
    "base": ("the base's leaves", 0.0),
    "start": ("the new leaves at the start", 1e-3),  # drawn: other machines, other last bits
    "distillation/leaves": ("the teacher's leaves", 0.0),
    "first_batch": ("the arrays of the first batch", 0.0),
    "learning_rate/at": ("the learning rates at some steps", 1e-4),
    "optimizer/update": ("the updates of a small example", 1e-4),
}
_EXPLAINED = {  # tables that differ because something else does, which is said then
    "first_batch": {"data", "seed"},
    "start": {"config", "seed"},
    "learning_rate/at": {"learning_rate", "total_steps"},
    "optimizer/update": {"optimizer"},
}
_SHOWN = 60  # characters of a value in an error


def identify(
    model: Model,
    params: Mapping[str, Any],
    options: Any,
    optimizer: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    first_batch: Mapping[str, np.ndarray],
    distillation: Distillation | None = None,
) -> dict[str, Any]:
    """What the trainer knows of a run; the arguments are its own."""
    drawn = (*methods.created(model.config), *model.config.heads, *model.creates)
    new, base = trees.split(params, drawn)
    fields = dataclasses.asdict(options)
    how_often = {*_HOW_OFTEN} - ({"save_every"} if options.patience else set())  # which ends a run
    return {
        "config": to_json(model.config),
        "base": fingerprints(base),
        "quantization": quantization_of(base),
        "start": {path: _size(leaf) for path, leaf in trees.flatten(new).items()},
        "objective": {"name": model.name, **model.options},
        "options": {name: fields[name] for name in fields if name not in how_often},
        "optimizer": _optimizer(optimizer),
        "learning_rate": _learning_rate(learning_rate, options.total_steps),
        "distillation": distillation and distillation.described(),
        "first_batch": {name: _array(values) for name, values in first_batch.items()},
    }


def _size(leaf: Any) -> list[float]:
    """The mean absolute value of a leaf, its root mean square, and a sum that depends on signs."""
    values = np.asarray(leaf).astype(np.float64).reshape(-1)
    projection = np.cos(np.arange(values.size)) @ values
    return [float(np.abs(values).mean()), float(np.sqrt(np.mean(values**2))), float(projection)]


def _array(values: np.ndarray) -> str:
    """Shape and dtype; of ids also a digest. Sound and images may differ in the last bits."""
    values = np.ascontiguousarray(values)
    text = f"{values.dtype.name}{list(values.shape)}"
    if np.issubdtype(values.dtype, np.floating):
        return text
    return f"{text} {hashlib.sha256(values.tobytes()).hexdigest()}"


def _name(function: Callable) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return name.split(".<locals>")[0]


def _parts(value: Any, seen: dict[int, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, variables) of each function that a function reaches, itself first."""
    if id(value) in seen:
        return
    seen[id(value)] = value  # the value too, so that its id stays its own
    if isinstance(value, functools.partial):
        variables = {**dict(enumerate(value.args)), **value.keywords, "": value.func}
        yield _name(value), variables
    elif inspect.ismethod(value):
        variables = {"": value.__self__}
    elif inspect.isfunction(value):
        variables = inspect.getclosurevars(value).nonlocals
        yield _name(value), variables
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        variables = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        yield type(value).__qualname__, variables
    elif isinstance(value, Mapping):
        variables = value
    elif isinstance(value, list | tuple):
        variables = dict(enumerate(value))
    elif hasattr(value, "__wrapped__"):  # compiled
        variables = {"": value.__wrapped__}
    else:
        return
    for variable in variables.values():
        yield from _parts(variable, seen)


def _described(function: Callable, skipped: tuple[Any, ...] = ()) -> dict[str, Any]:
    """{name of a function that it reaches: {variable: value}}, of values that are plain."""
    described: dict[str, Any] = {}
    for name, variables in _parts(function, {id(x): x for x in skipped}):
        plain = {str(key): value for key, value in variables.items() if _is_plain(value)}
        place, number = name, 2
        while described.get(place, {}).keys() & plain.keys() and any(
            described[place].get(key, value) != value for key, value in plain.items()
        ):
            place, number = f"{name}_{number}", number + 1
        if plain:
            described.setdefault(place, {}).update(plain)
    return described


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, bool | int | str | None)


def _learning_rate(learning_rate: optax.ScalarOrSchedule, total_steps: int) -> dict[str, Any]:
    """A number, or what a schedule is made of and its values at some steps."""
    if not callable(learning_rate):
        return {"name": "constant", "value": float(learning_rate)}
    at = zip(*schedules.rates(learning_rate, total_steps, most=1000), strict=True)
    at = {str(step): float(rate) for step, rate in at}
    return {"name": _name(learning_rate), **_described(learning_rate), "at": at}


def _optimizer(optimizer: Callable[..., optax.GradientTransformation]) -> dict[str, Any]:
    """What an optimizer is made of, and its first updates of a small tree."""

    def one(step):
        del step
        return 1.0

    try:
        transform = optimizer(learning_rate=one)
    except TypeError:  # it computes with the rate
        transform = optimizer(learning_rate=1.0)
    params = {"bias": jnp.array([0.5, -0.6]), "kernel": jnp.array([[0.1, -0.2], [0.3, 0.4]])}

    @jax.jit
    def updates():
        state, found, current = transform.init(params), [], params
        for scale in (0.3, -0.2):
            gradients = jax.tree.map(lambda x, scale=scale: scale * (x + 0.1), current)
            update, state = transform.update(gradients, state, current)
            current = optax.apply_updates(current, update)
            found.append(update)
        return found

    try:
        update = [float(x) for leaf in jax.tree.leaves(updates()) for x in leaf.reshape(-1)]
        update = update if all(map(math.isfinite, update)) else None
    except Exception:  # it is only for trees of certain names or shapes
        update = None
    name = getattr(optimizer, "__name__", _name(optimizer))
    return {"name": name, **_described(transform.update, (one,)), "update": update}


def check_run(directory: pathlib.Path, run: Mapping[str, Any]) -> None:
    """Checks that a folder holds no other run than this one.

    A run that has saved nothing yet holds nothing.

    Args:
        directory: the run's folder.
        run: what `run_file` gives.

    Raises:
        ValueError: it does; what differs is listed, or that it cannot be known.
    """
    path, steps = directory / RUN_FILE, saved_steps(directory)
    if not steps and not (path.exists() and (directory / EXPORT).exists()):
        return
    if not path.exists():
        raise ValueError(
            f"{directory} has checkpoints of steps {steps}, but no {RUN_FILE} that says of which "
            "run: put it back, or name another MODEL_DIR"
        )
    found = files.read_json(path)
    if found.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{directory} holds a run of format_version={found.get('format_version', 1)}, which "
            f"this version ({FORMAT_VERSION}) cannot continue: `coda convert` turns it into a "
            "checkpoint or an adapter to start from, in another directory"
        )
    if "config" in found:  # an older version did not write all fields
        found = {**found, "config": to_json(from_json(found["config"], path))}
    if lines := differences(json.loads(json.dumps(found)), run):
        raise ValueError(
            f"{directory} holds a run with other settings:\n  "
            + "\n  ".join(lines)
            + f"\n{_advice(directory)}"
        )


def run_file(run: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
    """The contents of a `RUN_FILE`; the devices are noted, but others may continue.

    Raises:
        ValueError: this process has been given another run than the first one; the values are
            listed.
    """
    mesh = dict(placement.mesh.shape)
    machine = {"devices": placement.mesh.size, "platform": jax.default_backend()}
    if mesh["model"] > 1:
        machine["mesh"] = mesh
    if jax.process_count() > 1:
        machine["processes"] = jax.process_count()
    run = json.loads(json.dumps({"format_version": FORMAT_VERSION, **run, "machine": machine}))
    if lines := differences(processes.from_first(lambda: run), run):
        raise ValueError(
            f"process {jax.process_index()} (here) has another run than process 0 (there):\n  "
            + "\n  ".join(lines)
        )
    return run


def say_other_machine(directory: pathlib.Path, run: Mapping[str, Any]) -> None:
    """Prints a line if a run goes on with other devices."""
    there, here = files.read_json(directory / RUN_FILE).get("machine"), run["machine"]
    if there != here:
        line = f"the run began on {there} and goes on on {here}: the last bits will differ"
        print(line, flush=True)


def _advice(directory: pathlib.Path) -> str:
    exported = directory / EXPORT
    text = "Give these values again, or name another MODEL_DIR"
    if (exported / "adapter").exists():
        text += f"; INITIAL_ADAPTER_PATH={exported / 'adapter'} goes on from its result"
    elif exported.exists():
        text += f"; INITIAL_CHECKPOINT_PATH={exported} goes on from its result"
    return text


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One line for each value that differs between two runs; large tables are counted."""
    lines = dict(_differing("", there, here))
    options = {name for name in ("seed", "total_steps") if f"options/{name}" in lines}
    if "total_steps" in options:  # of which a schedule is made
        lines = {k: x for k, x in lines.items() if not k.startswith("learning_rate/")}
    kinds = options | {path.split("/")[0] for path in lines if path not in _TABLES}
    lines = {k: x for k, x in lines.items() if not kinds & _EXPLAINED.get(k, set())}
    for kind in ("optimizer", "learning_rate"):  # another function has other parts
        if f"{kind}/name" in lines:
            lines = {k: x for k, x in lines.items() if f"{kind}/" not in k or k == f"{kind}/name"}
    for path in ("data/sha256", "eval_data/sha256"):
        if path in lines:
            lines[path] = "the examples are not those that the run began with"
    values = [f"{path}: {line}" for path, line in lines.items() if path not in _TABLES]
    return values + [line for path, line in lines.items() if path in _TABLES]


def _differing(path: str, there: Any, here: Any) -> Iterator[tuple[str, str]]:
    """(path, what differs) of each value."""
    if path == "machine" or there == here:
        return
    if path in _TABLES and isinstance(there, Mapping | list) and isinstance(here, Mapping | list):
        what, tolerance = _TABLES[path]
        there, here = _by_name(there), _by_name(here)
        names = sorted(there.keys() | here.keys())
        other = [x for x in names if not _close(there.get(x), here.get(x), tolerance)]
        if other:
            more = " ..." if len(other) > 1 else ""
            yield path, f"{what}: {len(other)} of {len(names)} differ, {other[0]}{more}"
        return
    if isinstance(there, list) and isinstance(here, list):
        there, here = _named(there), _named(here)
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted(there.keys() | here.keys()):
            inner = f"{path}/{key}" if path else key
            yield from _differing(inner, there.get(key), here.get(key))
        return
    yield path, "there {}, here {}".format(*_shortened(repr(there), repr(here)))


def _by_name(values: Any) -> Mapping[str, Any]:
    return values if isinstance(values, Mapping) else {str(i): x for i, x in enumerate(values)}


def _named(values: list) -> Any:
    """Methods by their names; any other list as it is."""
    if all(isinstance(x, Mapping) and isinstance(x.get("name"), str) for x in values):
        return {x["name"]: {k: v for k, v in x.items() if k != "name"} for x in values}
    return values


def _close(there: Any, here: Any, tolerance: float) -> bool:
    if there == here:
        return True
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        return all(map(_close, there, here, [tolerance] * len(there)))
    numbers = isinstance(there, float) and isinstance(here, float)
    return numbers and math.isclose(there, here, rel_tol=tolerance, abs_tol=1e-9 * (tolerance > 0))


def _shortened(there: str, here: str) -> tuple[str, str]:
    """Two texts, or what is around the first place where they differ."""
    if max(len(there), len(here)) <= _SHOWN:
        return there, here
    pairs = enumerate(zip(there, here, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(there), len(here)))
    start = max(0, place - _SHOWN // 4)

    def around(text):
        head, tail = "..." * (start > 0), "..." * (len(text) > start + _SHOWN)
        return f"{head}{text[start : start + _SHOWN]}{tail}"

    return around(there), around(here)
