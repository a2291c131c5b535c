"""The running Python's own standard library as a data set of functions and files.

Nothing is imported or executed: the sources are read and parsed with `ast`. Every function is put
into a split by a hash of its source, so that the split does not depend on the order of the files,
and the functions of the validation and test splits are cut out of the file texts.
"""

import ast
from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import os
import sysconfig
import textwrap
import tokenize
from typing import NamedTuple

MIN_BYTES = 200
MAX_BYTES = 2000

_SKIPPED_DIRECTORIES = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "lib-dynload", "site-packages", "test", "tests"}
)
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Function:
    """One function of the standard library.

    Attributes:
        source: its text, decorators included, without the indentation of its place.
        module: the top-level module that holds it ("asyncio" for asyncio/events.py).
        file: the path of its file, relative to the library, with "/" between the parts.
        qualname: its name with the classes and functions around it, "Class.method".
        name: its name.
        docstring: the first line of its docstring, or None.
        undocumented: `source` without the docstring; None where there is no docstring.
        exceptions: the distinct exceptions that it raises by name, in order.
        split: "train", "validation" or "test".
    """

    source: str
    module: str
    file: str
    qualname: str
    name: str
    docstring: str | None
    undocumented: str | None
    exceptions: tuple[str, ...]
    split: str


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of the standard library that holds at least one `Function`.

    Attributes:
        path: the path relative to the library, with "/" between the parts.
        module: the top-level module.
        text: the text, without the functions of the validation and test splits.
        undocumented: `text` without the file's docstring.
        summary: the first line of its docstring, or None.
        classes: the names of its classes outside of functions, in order.
    """

    path: str
    module: str
    text: str
    undocumented: str
    summary: str | None
    classes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What `read_corpus` returns: all functions (each text once) and all files, in path order."""

    functions: tuple[Function, ...]
    files: tuple[SourceFile, ...]


def normalized(source: str) -> str:
    """Returns the source with every run of white space as one space: the key of a function."""
    return " ".join(source.split())


def split_of(source: str) -> str:
    """Returns "train", "validation" or "test" (80, 10, 10 %) by a hash of the normalised source."""
    digest = hashlib.sha256(normalized(source).encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % 10
    return {8: "validation", 9: "test"}.get(bucket, "train")


@functools.lru_cache(maxsize=1)
def read_corpus(directory: str | None = None) -> Corpus:
    """Reads all functions and files of a standard library.

    Args:
        directory: where the library lies; the running Python's own if None.

    Returns:
        A `Corpus`; the same library gives the same corpus.

    Raises:
        ValueError: there is no function of a fitting size in the directory.
    """
    directory = directory or sysconfig.get_paths()["stdlib"]
    functions, files, seen = [], [], set()
    for path in _python_files(directory):
        parsed = _parse(os.path.join(directory, path))
        if parsed is None:
            continue
        lines, tree = parsed
        found = [_Found(n, name, _source(lines, n)) for n, name in _all_functions(tree)]
        taken = list(_taken_functions(lines, found, path))
        for function in taken:
            key = normalized(function.source)
            if key not in seen:
                seen.add(key)
                functions.append(function)
        if taken:  # Files without functions are tables of characters and the like.
            files.append(_source_file(path, lines, tree, found))
    if not functions:
        raise ValueError(f"No function of {MIN_BYTES} to {MAX_BYTES} bytes under {directory!r}")
    return Corpus(tuple(functions), tuple(files))


def _python_files(directory: str) -> list[str]:
    paths = []
    for parent, directories, names in os.walk(directory):
        directories[:] = [
            d
            for d in directories
            if d not in _SKIPPED_DIRECTORIES and not d.startswith(("config-", "test_"))
        ]
        for name in names:
            # _sysconfigdata* describes one build, not the library.
            if name.endswith(".py") and not name.startswith(("test_", "_sysconfigdata")):
                paths.append(os.path.relpath(os.path.join(parent, name), directory))
    return sorted(path.replace(os.sep, "/") for path in paths)


def _parse(path: str) -> tuple[list[str], ast.Module] | None:
    """Returns the lines and the syntax tree; None for a file that is not Python of this version."""
    try:
        with tokenize.open(path) as f:
            text = f.read()
        # Not splitlines: it also splits at form feeds, which ast does not count.
        return text.split("\n"), ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None


def _module_of(path: str) -> str:
    first = path.split("/")[0]
    return first.removesuffix(".py")


def _first_line(node: _Function) -> int:
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def _source(lines: list[str], node: _Function) -> str:
    # ast.get_source_segment splits the whole file at every call.
    text = "\n".join(lines[_first_line(node) - 1 : node.end_lineno])
    return textwrap.dedent(text).strip("\n")


class _Found(NamedTuple):
    """A function of any size, in its place in the file."""

    node: _Function
    qualname: str
    source: str

    @property
    def fits(self) -> bool:
        return MIN_BYTES <= len(self.source.encode()) <= MAX_BYTES

    @property
    def is_heldout(self) -> bool:
        return self.fits and split_of(self.source) != "train"


def _inner_statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the statements right below a node; expressions hold no functions, save lambdas."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield child


def _all_functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[_Function, str]]:
    """Yields every function, also nested ones, with its qualified name, outer ones first."""
    for node in _inner_statements(tree):
        named = isinstance(node, (*_FUNCTION, ast.ClassDef))
        if isinstance(node, _FUNCTION):
            yield node, prefix + node.name
        yield from _all_functions(node, prefix + node.name + "." if named else prefix)


def _taken_functions(lines: list[str], found: list[_Found], path: str) -> Iterator[Function]:
    heldout = [f for f in found if f.is_heldout]
    end = 0  # The last line of the last function taken: those nested in it are skipped.
    for candidate in found:
        node = candidate.node
        if node.lineno <= end or not candidate.fits:
            continue
        # A function nested in this one may itself be held out, here or in another file.
        if candidate not in heldout and any(_is_inside(f.node, node) for f in heldout):
            continue
        end = node.end_lineno
        docstring, undocumented = _docstring(lines, node)
        yield Function(
            source=candidate.source,
            module=_module_of(path),
            file=path,
            qualname=candidate.qualname,
            name=node.name,
            docstring=docstring,
            undocumented=undocumented,
            exceptions=_exceptions(node),
            split=split_of(candidate.source),
        )


def _is_inside(inner: _Function, outer: _Function) -> bool:
    return outer.lineno < inner.lineno and inner.end_lineno <= outer.end_lineno


def _docstring(lines: list[str], node: _Function) -> tuple[str | None, str | None]:
    """Returns the docstring's first line and the source without the docstring, or two Nones."""
    first_line = _summary(node)
    statement = node.body[0]
    if first_line is None or statement.lineno <= node.lineno:
        return None, None
    kept = lines[_first_line(node) - 1 : statement.lineno - 1]
    kept += lines[statement.end_lineno : node.end_lineno]
    return first_line, textwrap.dedent("\n".join(kept)).strip("\n")


def _summary(node: _Function | ast.Module) -> str | None:
    """Returns the first line of a docstring, None where there is none or it is empty."""
    docstring = (ast.get_docstring(node) or "").strip()
    return docstring.split("\n")[0].strip() or None


def _exceptions(node: _Function) -> tuple[str, ...]:
    raises = [n for n in ast.walk(node) if isinstance(n, ast.Raise) and n.exc is not None]
    names = []
    for statement in sorted(raises, key=lambda n: (n.lineno, n.col_offset)):
        exc = statement.exc
        name = _last_name(exc.func if isinstance(exc, ast.Call) else exc)
        # `raise error` raises again what was caught: not the name of a class.
        if name and name[:1].isupper():
            names.append(name)
    return tuple(dict.fromkeys(names))


def _last_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def _outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    for node in _inner_statements(tree):
        if not isinstance(node, _FUNCTION):
            yield node
            yield from _outside_functions(node)


def _source_file(path: str, lines: list[str], tree: ast.Module, found: list[_Found]) -> SourceFile:
    cut = set()
    for function in found:
        if function.is_heldout:
            cut.update(range(_first_line(function.node) - 1, function.node.end_lineno))
    summary = _summary(tree)
    docstring = set()
    if summary is not None:
        docstring.update(range(tree.body[0].lineno - 1, tree.body[0].end_lineno))

    def text(without: set[int]) -> str:
        return "\n".join(line for i, line in enumerate(lines) if i not in without)

    classes = [node.name for node in _outside_functions(tree) if isinstance(node, ast.ClassDef)]
    return SourceFile(
        path=path,
        module=_module_of(path),
        text=text(cut),
        undocumented=text(cut | docstring),
        summary=summary,
        classes=tuple(dict.fromkeys(classes)),
    )
