"""Where an encoder's time goes: a profile of the compiled program, summed up by parts of a layer.

The operations of a compiled program carry the names of the modules that they come from. A fusion of
several parts counts for the one whose result it is.
"""

from collections.abc import Callable, Mapping
import pathlib
import re
import tempfile

import jax

from coda_jax import checks
from coda_jax.models import ModelConfig, family_of

OTHER = "other"  # norms before the attention, embedding, residual connections
# Of a program that is to be profiled; else a GPU's profile names graphs of many operations.
COMPILER_OPTIONS = {"xla_gpu_enable_command_buffer": ""}
Parts = Mapping[str, tuple[str, ...]]


def parts_of(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """{part: names of Flax modules and `jax.named_scope`s that belong to it}; the first counts."""
    own = {name: scopes for m in config.methods for name, scopes in m.profile_scopes.items()}
    return own | dict(family_of(config).profile_scopes)


def part_of(op_name: str, parts: Parts) -> str:
    """The part that an operation belongs to, by its path of scopes, "jit(f)/encoder/.../dot"."""
    scopes = set(re.split(r"[/.]", op_name))  # "attention.keys_values" is a method's scope
    return next((part for part, names in parts.items() if scopes.intersection(names)), OTHER)


def shares(
    compiled: jax.stages.Compiled, call: Callable, parts: Parts, rounds: int = 5
) -> dict[str, float]:
    """The share of each part in the time of all operations of a program.

    Args:
        compiled: the program, with the `COMPILER_OPTIONS`.
        call: runs it once.
        parts: as of `parts_of`.
        rounds: runs that are profiled.

    Returns:
        {part: share}; they add up to 1.

    Raises:
        ValueError: the profile holds no operation of the program.
    """
    checks.COUNT("rounds", rounds)
    belongs = {name: part_of(path, parts) for name, path in _op_names(compiled).items()}
    seconds = dict.fromkeys([*parts, OTHER], 0.0)
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(rounds):
                jax.block_until_ready(call())
        operations = list(_operations(directory))
    if belongs.keys().isdisjoint(operation for operation, _ in operations):
        raise ValueError("the profile holds no operation of the program")
    for operation, duration in operations:
        seconds[belongs.get(operation, OTHER)] += duration
    total = sum(seconds.values())
    return {part: value / total for part, value in seconds.items()}


def _op_names(compiled: jax.stages.Compiled) -> dict[str, str]:
    """{operation of the compiled program: path of scopes that it comes from}."""
    pattern = r'%?([\w.\-]+) = [^\n]*?metadata=\{[^}]*?op_name="([^"]*)"'
    return dict(re.findall(pattern, compiled.as_text()))


def _operations(directory: str):
    """(name, seconds) of each run of an operation in the profile that lies in the directory."""
    (file,) = pathlib.Path(directory).rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation is not None:
                    yield operation, event.duration_ns * 1e-9
