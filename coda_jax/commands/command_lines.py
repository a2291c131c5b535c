"""Command lines that other commands make: gin files and bindings, merged by name.

`coda compare` runs `coda train` and `coda evaluate` many times; what each is given is kept as the
text that a person could type.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import shlex
from typing import Any

from coda_jax.commands.configuration import configure
from coda_jax.commands.gin_files import UsageError, read, read_bindings
from coda_jax.commands.gin_macros import commands_of

FILES = "gin_file"  # the key of gin files among flags


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What a command that reads gin is given.

    Attributes:
        gin_files: in the order given.
        search_paths: folders of gin files.
        bindings: {NAME: VALUE}, as texts.
    """

    gin_files: tuple[str, ...] = ()
    search_paths: tuple[str, ...] = ()
    bindings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def plus(self, flags: Mapping[str, Any]) -> "CommandLine":
        """The same with more flags, which go before those of the same name.

        Args:
            flags: {NAME: VALUE} of bindings, where a text is written as on a command line, and
                under "gin_file" a name of a file, or several.
        """
        flags = dict(flags)
        files = flags.pop(FILES, ())
        files = (files,) if isinstance(files, str) else tuple(files)
        more = {name: x if isinstance(x, str) else repr(x) for name, x in flags.items()}
        names = tuple(dict.fromkeys((*self.gin_files, *files)))
        return dataclasses.replace(self, gin_files=names, bindings={**self.bindings, **more})

    def only(self, names: set[str]) -> "CommandLine":
        """The same with those of its bindings that have these names."""
        kept = {name: value for name, value in self.bindings.items() if name in names}
        return dataclasses.replace(self, bindings=kept)

    def configure(self, command: str) -> None:
        """Lets gin read it for a command; see `configuration.configure`."""
        texts = [f"{name}={value}" for name, value in self.bindings.items()]
        configure(self.gin_files, self.search_paths, texts, command)

    def words(self, command: str) -> list[str]:
        """The command, and its arguments."""
        return [
            f"coda {command}",
            *(f"--gin_file={name}" for name in self.gin_files),
            *(f"--gin_search_paths={name}" for name in self.search_paths),
            *(f"--gin.{name}={value}" for name, value in self.bindings.items()),
        ]

    def text(self, command: str) -> str:
        """What a person would type."""
        name, *arguments = self.words(command)
        return f"{name} {shlex.join(arguments)}"


def macros_of(gin_files: Sequence[str], search_paths: Sequence[str] = ()) -> set[str]:
    """The macros that files, and what they include, give a value."""
    files = [read(name, search_paths) for name in gin_files]
    bindings = (b for file in files for member in file.members() for b in member.bindings)
    return {binding.macro for binding in bindings if binding.macro}


def divided(
    command: str,
    gin_files: Sequence[str],
    search_paths: Sequence[str],
    bindings: Sequence[str],
) -> tuple[tuple[list[str], Sequence[str], list[str]], CommandLine]:
    """What a command that runs others reads itself, and what it passes on.

    Its own are the files that configure it, the macros in them, and its function's parameters.

    Args:
        command: its name.
        gin_files, search_paths, bindings: what it is given, as `configure` takes it.

    Returns:
        The arguments of `configure` for itself, and what is passed on.

    Raises:
        UsageError: a file does not exist, or a name is no name.
    """
    own = [
        name
        for name in gin_files
        if any(command in commands_of(member) for member in read(name, search_paths).members())
    ]
    macros = macros_of(own, search_paths)
    mine, theirs = [], {}
    for text in bindings:
        (binding,) = read_bindings([text])
        if binding.macro in macros or binding.selector.rpartition(".")[2] == command:
            mine.append(text)
            continue
        name, value = text.split("=", 1)
        if theirs.setdefault(name.strip(), value) != value:
            raise UsageError(f"{name.strip()} is given twice: {theirs[name.strip()]} and {value}")
    others = tuple(name for name in gin_files if name not in own)
    return (own, search_paths, mine), CommandLine(others, tuple(search_paths), theirs)
