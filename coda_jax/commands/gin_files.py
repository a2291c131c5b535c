"""Gin files as text: where a name leads, what a file is for, and in which order they are read.

Nothing that a file names is imported here, so that most mistakes are found at once. The order in
which files are given does not matter: those of the package are read first, by their kind (`KINDS`),
then one's own, in the order given, then the bindings of the command line. A name of the package
means its own file, whatever lies in the current folder.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import difflib
import functools
import importlib.util
import os
import pathlib
import re
import tokenize
from typing import Any, NoReturn

from coda_jax.optional import needs

PACKAGE = "coda_jax/gin_configs/"
# The package's folders in the order in which their files are read; "" holds preset.gin.
KINDS = ("runs", "", "methods", "tasks", "t5x")
_SHOWN = 3  # mistakes of a kind that are told
_INCLUDE = re.compile(r"\s*include\s*['\"]")
# What gin raises for what it cannot read.
UNREADABLE = (SyntaxError, ValueError, TypeError, RecursionError, tokenize.TokenError)


class UsageError(ValueError):
    """A command line, or a gin file, that cannot be carried out."""

    exit_code = 2


@dataclasses.dataclass(frozen=True)
class Macro:
    """%NAME in a value."""

    name: str


@dataclasses.dataclass(frozen=True)
class Reference:
    """@name or @name() in a value."""

    name: str


@dataclasses.dataclass(frozen=True)
class Binding:
    """NAME = VALUE, of a macro or a parameter.

    Attributes:
        scope: before the last "/", or "".
        selector: the configurable as it is written, or the macro.
        parameter: of the configurable; "" for a macro.
        value: with `Macro` and `Reference` in it.
        place: for people: file and line, or the flag.
        line: the line of the file, or all of what the command line binds.
    """

    scope: str
    selector: str
    parameter: str
    value: Any
    place: str
    line: str = ""

    @property
    def macro(self) -> str | None:
        """The name of the macro, None for a parameter."""
        scoped = f"{self.scope}/{self.selector}" if self.scope else self.selector
        return None if self.parameter else scoped

    @property
    def name(self) -> str:
        """The left side."""
        scope = f"{self.scope}/" * bool(self.scope)
        return scope + self.selector + f".{self.parameter}" * bool(self.parameter)


@dataclasses.dataclass(frozen=True, eq=False)
class GinFile:
    """A gin file, read but not followed.

    Attributes:
        path: of the file.
        name: as people write it.
        kind: its folder in the package, None for a file of one's own.
        includes: the files that it includes.
        bindings: in their order.
        configures: full names of the functions and classes that it binds, as it imports them.
    """

    path: pathlib.Path
    name: str
    kind: str | None
    includes: tuple["GinFile", ...]
    bindings: tuple[Binding, ...]
    configures: frozenset[str]

    def members(self) -> Iterator["GinFile"]:
        """The files that it includes, theirs first, and itself."""
        for included in self.includes:
            yield from included.members()
        yield self

    @property
    def installed(self) -> bool:
        """Whether another package brings it."""
        return self.path in _installed(self.name)

    def found(self, kind: str) -> list["GinFile"]:
        """The outermost files of a kind, among itself and what it includes."""
        if self.kind == kind:
            return [self]
        return [file for included in self.includes for file in included.found(kind)]

    def text(self) -> str:
        """Its text without includes, whose lines are left blank."""
        lines = _text(self.path).split("\n")
        return "\n".join("" if _INCLUDE.match(line) else line for line in lines)


def _text(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8-sig")


def package_folder() -> pathlib.Path:
    """The folder of the package's gin files."""
    from coda_jax import gin_configs

    return pathlib.Path(next(iter(gin_configs.__path__)))


def package_names(kind: str | None = None) -> list[str]:
    """The short names of the package's files, such as methods/coda.gin; of one kind, or all."""
    names = (path.relative_to(package_folder()) for path in package_folder().rglob("*.gin"))
    return sorted(p.as_posix() for p in names if kind in (None, p.parent.as_posix()))


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names that are most like one, whatever their case, and about equally so."""
    given = {other.casefold(): other for other in names}
    close = difflib.get_close_matches(name.casefold(), given, count)
    ratios = [difflib.SequenceMatcher(None, x, name.casefold()).ratio() for x in close]
    return [given[x] for x, ratio in zip(close, ratios, strict=True) if ratio > ratios[0] - 0.1]


def suggested(found: Sequence[str]) -> str:
    """The end of a sentence that offers names, "" for none."""
    return f"; did you mean {' or '.join(found)}?" if found else ""


def find(name: str, search_paths: Sequence[str] = (), by_package: bool = False) -> pathlib.Path:
    """The file of a name.

    Args:
        name: a path that is absolute or begins with "./" or "../"; else a name in a search path,
            of the package (with `PACKAGE` before it or not), in the current folder, or of another
            installed package, such as t5x/configs/runs/finetune.gin: the first that is there.
        search_paths: folders.
        by_package: whether a file of the package includes it, which means its own alone.

    Raises:
        UsageError: there is no such file; names like it are listed.
    """
    path = pathlib.Path(os.path.expanduser(name))
    if path.is_absolute() or name.startswith(("./", "../")):
        places = [path]
    else:
        places = [package_folder() / name.removeprefix(PACKAGE)]
        if not by_package:
            places = [*(pathlib.Path(folder, name) for folder in search_paths), *places, path]
        places += _installed(name)
    try:
        return next(place for place in places if place.is_file())
    except (StopIteration, ValueError, OSError):  # it cannot be a path
        own = package_names()
        alike = [x for x in own if x.endswith(f"/{path.stem}.gin")]
        alike += nearest(name, [*own, *(file.as_posix() for file in _beside(path))])
        alike = list(dict.fromkeys(alike))[:_SHOWN]
        raise UsageError(f"there is no gin file {name!r}{suggested(alike)}") from None


def _beside(path: pathlib.Path) -> list[pathlib.Path]:
    """The gin files in a path's folder."""
    try:
        return sorted(path.parent.glob("*.gin"))
    except (ValueError, OSError):  # it cannot be a path
        return []


def _installed(name: str) -> list[pathlib.Path]:
    """Where a file of another installed package may be; nothing is imported."""
    package, _, rest = name.partition("/")
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() and rest else None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    return [pathlib.Path(p, rest) for p in (spec and spec.submodule_search_locations) or ()]


def read(name: str, search_paths: Sequence[str] = ()) -> GinFile:
    """Reads a gin file and those that it includes.

    Raises:
        UsageError: a file is missing, cannot be read, or includes itself.
    """
    return _read(find(name, search_paths), name, tuple(search_paths), ())


def _read(path: pathlib.Path, name: str, search_paths: tuple, outer: tuple) -> GinFile:
    kind, name = _kind(path, name)
    if path.resolve() in outer:
        raise UsageError(f"{name} includes itself")
    imports, includes, bindings, configures = {}, [], [], set()
    for statement in _statements(path, name):
        what = type(statement).__name__
        if what == "ImportStatement":
            whole = statement.alias or statement.is_from
            imports[statement.bound_name()] = statement.module if whole else statement.bound_name()
        elif what == "IncludeStatement":
            place = f"{name}:{statement.location.line_num}"
            if bindings:
                raise UsageError(f"{place}: an include must come before the bindings of its file")
            try:
                found = find(statement.filename, search_paths, by_package=kind is not None)
            except UsageError as error:
                raise UsageError(f"{place}: {error}") from None
            outside = (*outer, path.resolve())
            includes.append(_read(found, statement.filename, search_paths, outside))
        elif what == "BindingStatement":
            bindings.append(_binding(statement, f"{name}:{statement.location.line_num}"))
        if getattr(statement, "selector", None):
            first, _, rest = statement.selector.partition(".")
            configures.add(f"{imports.get(first, first)}.{rest}" if rest else first)
    return GinFile(path, name, kind, tuple(includes), tuple(bindings), frozenset(configures))


def _kind(path: pathlib.Path, name: str) -> tuple[str | None, str]:
    """(the kind of a file, its name for people)."""
    try:
        short = path.resolve().relative_to(package_folder().resolve())
    except ValueError:
        return None, name
    return ("" if len(short.parts) == 1 else short.parts[0]), short.as_posix()


def _statements(path: pathlib.Path, name: str) -> list:
    """What gin's parser finds in a file."""
    try:
        return list(_parser()(_text(path)))
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise UsageError(f"{name} is no gin file: line {line} is not text in UTF-8") from None
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from None
    except UNREADABLE as error:
        raise UsageError(f"{name}{_said(error)}") from None


def _said(error: Exception) -> str:
    """What gin's parser has to say, with the line."""
    if isinstance(error, tokenize.TokenError):
        message, (line, _) = error.args
        return f":{line}: a bracket or a quote is not closed ({message})"
    message = str(getattr(error, "msg", error)).strip().splitlines() or ["not understood"]
    number, text = getattr(error, "lineno", None), getattr(error, "text", None) or ""
    place = f":{number}" if number else ""
    return f"{place}: gin cannot read {text.strip()[:80]!r}: {message[0]}"


@functools.cache
def _parser() -> Callable[[str], Any]:
    """Gin's parser: (text) -> one, which gives its statements."""
    with needs():
        from gin import config_parser

    class AsWritten(config_parser.ParserDelegate):
        """References and macros, which are not looked up."""

        def configurable_reference(self, scoped_configurable_name, evaluate):
            return Reference(scoped_configurable_name)

        def macro(self, scoped_name):
            return Macro(scoped_name)

    return functools.partial(config_parser.ConfigParser, parser_delegate=AsWritten())


def bindings_of(text: str, name: str) -> list[Binding]:
    """The bindings of a configuration that gin has written; the name is for people."""
    found = (x for x in _parser()(text) if type(x).__name__ == "BindingStatement")
    return [_binding(statement, f"{name}:{statement.location.line_num}") for statement in found]


def _binding(statement, place: str) -> Binding:
    line = statement.location.line_content.strip()
    return Binding(
        statement.scope, statement.selector, statement.arg_name, statement.value, place, line
    )


def as_binding(text: str) -> str:
    """NAME=VALUE as on a line of a gin file: a VALUE that gin cannot read becomes a text.

    Raises:
        UsageError: VALUE begins with a quote or a bracket, and is not what it begins.
    """
    name, value = text.split("=", 1)
    try:
        _parser()(value.strip()).parse_value()
        (_,) = _parser()(text)  # ValueError: it is more than a binding
    except UNREADABLE:
        if value.lstrip().startswith(("'", '"', "(", "[", "{")):
            shown = value if len(value) <= 60 else f"{value[:60]}..."
            raise UsageError(
                f"--gin.{name}={shown!s}: this is no value of gin's. A quote or a bracket may not "
                "be closed, or the shell has taken quotes away"
            ) from None
        return f"{name} = {value!r}"
    return text


def read_bindings(texts: Iterable[str]) -> list[Binding]:
    """The bindings of a command line.

    Raises:
        UsageError: a name is no name, or a value none.
    """
    found = []
    for text in texts:
        name = text.split("=", 1)[0].strip()
        try:
            line = as_binding(text)
            (statement,) = _parser()(line)
            binding = dataclasses.replace(_binding(statement, f"--gin.{text}"), line=line)
        except UNREADABLE as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"--gin.{text}: {name!r} is no name of a macro or a parameter"
            ) from None
        found.append(binding)
    return found


def in_order(files: Sequence[GinFile]) -> list[GinFile]:
    """The files in the order in which they are read, each with its includes already in the list.

    What one's own files include of the package comes with the package's files, so that what is
    written in them always counts.

    Raises:
        UsageError: two runs, two recipes or two tasks are given.
    """
    units: dict[pathlib.Path, GinFile] = {}
    own: dict[pathlib.Path, GinFile] = {}

    def sort(file):
        if file.kind is not None:
            units.setdefault(file.path.resolve(), file)
            return
        for included in file.includes:
            sort(included)
        own.setdefault(file.path.resolve(), file)

    for file in files:
        sort(file)
    for kind, what in (("runs", "runs"), ("methods", "recipes"), ("tasks", "tasks")):
        # The task that a run brings is the one that it has unless another is given.
        among = (unit for unit in units.values() if kind != "tasks" or unit.kind != "runs")
        names = list(dict.fromkeys(file.name for unit in among for file in unit.found(kind)))
        if len(names) > 1:
            _refuse_two(what, names)
    ordered = sorted(units.values(), key=lambda unit: KINDS.index(unit.kind))
    members = (member for unit in [*ordered, *own.values()] for member in unit.members())
    return [*{file.path.resolve(): file for file in members}.values()]


def _refuse_two(what: str, names: list[str]) -> NoReturn:
    hint = {
        "recipes": ", and combine methods with --gin.METHODS=\"('...', '...')\"",
        "tasks": "; a mixture of seqio trains on several",
    }
    raise UsageError(f"two {what} in one command: {names}; give one{hint.get(what, '')}")


def refuse(problems: Sequence[str]) -> None:
    """Raises UsageError with the first of some mistakes, if there is any."""
    if problems:
        more = len(problems) - _SHOWN
        raise UsageError(
            "\n".join([*problems[:_SHOWN], *[f"and {more} more of this kind"] * (more > 0)])
        )
