"""What gin files and a command line say as text: is anything missing, is every macro read?

Nothing is imported, so that these mistakes are found at once. Macros of the package's own files may
be read by nothing: another choice can replace what they are for.
"""

from collections.abc import Iterator, Mapping, Sequence
import re
from typing import Any

from coda_jax.commands import COMMANDS
from coda_jax.commands.gin_files import (
    Binding,
    GinFile,
    Macro,
    UsageError,
    nearest,
    package_folder,
    package_names,
    refuse,
    suggested,
)

REQUIRED = Macro("gin.REQUIRED")
_METHODS, _TASK = "METHODS", "MIXTURE_OR_TASK_NAME"  # the macros of recipes and of tasks
_FEW = 3  # files that are worth naming
_RUNS_OF_T5X = "t5x/configs/runs/"


def check_kinds(
    command: str, named: Sequence[GinFile], files: Sequence[GinFile], example: str
) -> None:
    """Raises UsageError unless there is a run, and the files are for its command."""
    for file in files:
        if file.kind == "t5x":
            raise UsageError(f"{file.name} is for `coda t5x`, see docs/t5x.md")
    configured = {name for file in files for name in commands_of(file)}
    if command in configured:
        return
    if configured:
        run = next(file.name for file in named if any(map(commands_of, file.members())))
        raise UsageError(f"{run} is for `coda {min(configured)}`; {example}")
    raise UsageError(f"a file of runs/ is missing; {example}")


def commands_of(file: GinFile) -> set[str]:
    """The commands whose functions a gin file binds, not counting what it includes."""
    return {name for name in COMMANDS if f"coda_jax.commands.{name}.{name}" in file.configures}


def check_macros(
    example: str,
    files: Sequence[GinFile],
    given: Sequence[Binding],
    one_of: Sequence[Sequence[str]] = (),
) -> None:
    """Checks the macros of a command.

    Args:
        example: of a command that works, for errors.
        files: in the order in which they are read.
        given: on the command line.
        one_of: see `Command`.

    Raises:
        UsageError: macros are missing, or of one's own are read by nothing.
    """
    bound = {b.name: b for b in [*(b for file in files for b in file.bindings), *given]}
    macros = {name: binding for name, binding in bound.items() if binding.macro}
    _check_cycles(macros)
    read_by = _readers(bound)
    for kind, macro, what in (("methods", _METHODS, "recipe"), ("tasks", _TASK, "task")):
        of_kind = [file.name for file in files if file.kind == kind]
        if of_kind and macro not in read_by:
            raise UsageError(f"this run takes no {what}: leave out {of_kind[-1]}")
    theirs = [file for file in files if file.kind is None and not file.installed]
    own = [b for file in theirs for b in file.bindings if b.macro]
    beyond = [b for b in [*given, *own] if b.macro and b.macro not in read_by]
    known = {name: macros[name] for name in read_by if name in macros}
    refuse([unread(binding, known) for binding in beyond])
    _check_missing(example, macros, read_by, one_of)


def check_values(bindings: Sequence[Binding]) -> None:
    """Raises UsageError where a file, or the command line, gives one name two values."""
    for place, second in enumerate(bindings):
        for first in bindings[:place]:
            if _overwrites(second, first) and first.value != REQUIRED:
                raise UsageError(f"{second.name} is given twice: {first.place} and {second.place}")


def displaced(
    files: Sequence[GinFile], given: Sequence[Binding], either: Sequence[Sequence[str]]
) -> list[Binding]:
    """NAME = None for each macro of the package's files whose place one's own takes.

    Args:
        files: in the order in which they are read.
        given: on the command line.
        either: see `Command`.

    Raises:
        UsageError: two of one's own have a value.
    """
    theirs = [file for file in files if file.kind is None and not file.installed]
    own = {b.macro: b for b in [*(b for file in theirs for b in file.bindings), *given]}
    found = []
    for names in either:
        chosen = [own[name] for name in names if name in own and own[name].value is not None]
        if len(chosen) > 1:
            places = " and ".join(binding.place for binding in chosen)
            raise UsageError(f"{' or '.join(names)}, one of the two: {places}")
        others = [name for name in names if chosen and name not in own]
        found += [Binding("", name, "", None, chosen[0].place, f"{name} = None") for name in others]
    return found


def _overwrites(second: Binding, first: Binding) -> bool:
    """Whether a later binding gives what an earlier one does another value."""
    if (first.scope, first.parameter) != (second.scope, second.parameter):
        return False
    longer, shorter = sorted((f".{x.selector}" for x in (first, second)), key=len, reverse=True)
    return longer.endswith(shorter) and repr(first.value) != repr(second.value)


def _check_cycles(macros: Mapping[str, Binding]) -> None:
    """Raises UsageError where a macro is made of itself."""
    reads = {
        name: {x.name for x in _flat(binding.value) if isinstance(x, Macro)}
        for name, binding in macros.items()
    }
    for name, reached in reads.items():
        while more := set().union(*(reads.get(x, ()) for x in reached)) - reached:
            reached = reached | more
        if name in reached:
            raise UsageError(f"{macros[name].place}: {name} is made of itself")


def _readers(bound: Mapping[str, Binding]) -> dict[str, Binding]:
    """{macro: a binding that reads it}, followed from the parameters."""
    found: dict[str, Binding] = {}
    todo = [binding for binding in bound.values() if not binding.macro]
    while todo:
        binding = todo.pop()
        for value in _flat(binding.value):
            if isinstance(value, Macro) and value.name not in found:
                found[value.name] = binding
                if value.name in bound:
                    todo.append(bound[value.name])
    return found


def _flat(value: Any) -> Iterator[Any]:
    """The values in nested containers."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def unread(binding: Binding, known: Mapping[str, Binding]) -> str:
    """What is wrong with a macro that nothing reads, and which ones are meant."""
    name = binding.macro
    homes = _homes(name)
    if 0 < len(homes) <= _FEW:
        end = f"; it is of {' and '.join(homes)}"
    else:
        end = suggested([_shown(known[other]) for other in nearest(name, known)])
    return f"{binding.place}: nothing reads {name}{end}"


def _shown(binding: Binding) -> str:
    """A macro with its value, or its line, which may have a comment."""
    if not binding.line.startswith(binding.name):
        return binding.name
    line = re.sub(r"\s+", " ", binding.line.replace("%gin.REQUIRED", "..."))
    return line if len(line) <= 80 else binding.name


def _homes(name: str) -> list[str]:
    """The recipes and tasks of the package that bind a macro."""
    start = re.compile(rf"^{re.escape(name)} *=", re.MULTILINE)
    files = [*package_names("methods"), *package_names("tasks")]
    return [
        file
        for file in files
        if start.search((package_folder() / file).read_text(encoding="utf-8"))
    ]


def _check_missing(
    example: str,
    macros: Mapping[str, Binding],
    read_by: Mapping[str, Binding],
    one_of: Sequence[Sequence[str]],
) -> None:
    """Raises UsageError where a macro has no value."""
    if _METHODS in read_by and _METHODS not in macros:
        recipes = ", ".join(package_names("methods"))
        raise UsageError(
            "a recipe, which says what is trained, is missing: --gin_file=FILE with one of "
            f"{recipes}"
        )
    # A name with a dot is a constant of gin's, which text does not tell.
    unknown = [name for name in read_by if name not in macros and "." not in name]
    if unknown:
        places = [f"{read_by[x].place} reads %{x}, which has no value" for x in unknown]
        refuse([p + suggested(nearest(x, macros)) for p, x in zip(places, unknown, strict=True)])
    missing = [name for name, binding in macros.items() if binding.value == REQUIRED]
    if missing:
        flags = " ".join(f"--gin.{name}=..." for name in missing)
        raise UsageError(f"{', '.join(missing)} must be given: {flags}; {example}")
    for names in one_of:
        if all(name in macros and macros[name].value is None for name in names):
            raise UsageError(
                f"{' or '.join(names)} must be given: by a file of tasks/, such as "
                "--gin_file=tasks/jsonl.gin, or with --gin.NAME=VALUE"
            )


def in_order_of_t5x(files: Sequence[GinFile]) -> list[GinFile]:
    """The files in the order in which T5X is to read them, see `check_order_of_t5x`."""

    def place(file):
        return 0 if any(map(_is_run_of_t5x, file.members())) else _rank(file, runs=False)

    return sorted(files, key=place)


def check_order_of_t5x(files: Sequence[GinFile]) -> None:
    """Raises UsageError where a file is overwritten by one that is to be read before it.

    T5X reads files in the order given. What counts is that of `gin_files`: a run with what it
    includes, files that change it, a recipe, a task, one's own.
    """
    earlier: list[tuple[int, Binding, str]] = []
    for file in files:
        members = [*file.members()]
        runs = any(map(_is_run_of_t5x, members))
        here = [(_rank(x, runs), binding, x.name) for x in members for binding in x.bindings]
        for rank, binding, name in here:
            for other, overwritten, home in earlier:
                if rank < other and _overwrites(binding, overwritten):
                    shown = file.name if name == file.name else f"{file.name} (in it {name})"
                    raise UsageError(f"{shown} overwrites {binding.name} of {home}: give it first")
        earlier += here


def _is_run_of_t5x(file: GinFile) -> bool:
    return f"/{_RUNS_OF_T5X}" in file.path.as_posix()


def _rank(member: GinFile, runs: bool) -> int:
    """The place of a file in the order; `runs` is whether it comes with a run of T5X's."""
    if member.kind in ("methods", "tasks"):
        return 2 + ("methods", "tasks").index(member.kind)
    if member.kind is None and not member.installed and not _is_run_of_t5x(member):
        return 4
    return 0 if runs else 1
