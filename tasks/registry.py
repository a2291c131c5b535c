"""What the modules share that have a table `SPECS` and a `task` for gin files."""

from collections.abc import Callable, Mapping, Sequence
import os
from typing import Any

import seqio

from coda_jax.data.jsonl import task_name


def find(kind: str, name: str, specs: Mapping[str, Any]) -> Any:
    """Returns the row of a table; ValueError says which names it has.

    Args:
        kind: the word for the tasks of the table.
        name: of the row.
        specs: the table.
    """
    if name not in specs:
        raise ValueError(f"There is no {kind} task {name!r}, only {sorted(specs)}")
    return specs[name]


def splits_of(directory: str, splits: Sequence[str], ending: str) -> tuple[str, ...]:
    """Returns the splits that have a file, named after them, in a folder; all if none has."""
    found = [s for s in splits if os.path.exists(os.path.join(directory, s + ending))]
    return tuple(found or splits)


def once(name: str, arguments: Sequence, add: Callable[[str], seqio.Task | seqio.Mixture]) -> str:
    """Registers a task or mixture unless it was registered before for the same arguments.

    Args:
        name: how its name begins.
        arguments: whatever makes it another one.
        add: registers it under the name that it gets.

    Returns:
        The name, with a number appended where other arguments have that name.
    """
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    registered = task_name(name, (), arguments, names)
    if registered not in names:
        add(registered)
    return registered


def add_mixed(
    name: str, parts: Mapping[str, tuple[Callable[[str], seqio.Task], float]]
) -> seqio.Task | seqio.Mixture:
    """Registers the only part under a name, or else a mixture of all parts.

    Args:
        name: of the task or mixture; tasks of a mixture have the name of the part behind it.
        parts: (what registers it under the name that it gets, its rate) by the part's name.

    Returns:
        The task or mixture.
    """
    if len(parts) == 1:
        ((add, _),) = parts.values()
        return add(name)
    rates = [(add(f"{name}_{part}").name, rate) for part, (add, rate) in parts.items()]
    return seqio.MixtureRegistry.add(name, rates)
