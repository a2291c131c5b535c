"""What `coda COMMAND --help` says of a command's gin files and macros, read off their text.

gin is not imported, so that help comes at once.
"""

from collections.abc import Iterator
import re
import shlex
import textwrap

from coda_jax.commands import COMMANDS
from coda_jax.commands.gin_files import PACKAGE, package_folder, package_names

_WIDTH = 100
_MACRO = re.compile(r"^([A-Z][A-Z0-9_]*) = (.*?)(?: +# (.*))?$", re.MULTILINE)
_INCLUDE = re.compile(rf"^include '{PACKAGE}(.*)'", re.MULTILINE)


def texts(name: str) -> Iterator[str]:
    """The texts of the files that a file of the package includes, and its own."""
    text = (package_folder() / name).read_text(encoding="utf-8")
    for included in _INCLUDE.findall(text):
        yield from texts(included)
    yield text


def runs(command: str) -> list[str]:
    """The files of runs/ that configure a command."""
    start = re.compile(rf"^{command}\.{command}\b", re.MULTILINE)
    return [name for name in package_names("runs") if any(map(start.search, texts(name)))]


def macros(name: str) -> dict[str, tuple[str, str]]:
    """{macro: (its value as written, its comment or "")} of a file and what it includes."""
    found: dict[str, tuple[str, str]] = {}
    for text in texts(name):
        for macro, value, comment in _MACRO.findall(text):
            found[macro] = value, comment or found.get(macro, ("", ""))[1]
    return found


def summary(name: str) -> str:
    """The first sentence of a file."""
    comment = re.match(r"(?:#.*\n)+", (package_folder() / name).read_text(encoding="utf-8"))
    text = " ".join(line.lstrip("# ") for line in (comment[0] if comment else "").splitlines())
    return re.split(r"(?<=[.:]) ", text)[0].rstrip(":")


def epilog(command: str) -> str:
    """An example, and the runs and macros of a command that reads gin files."""
    row = COMMANDS[command]
    parts = [f"example:\n{example(command)}"]
    if not row.reads_gin:
        return parts[0]
    run, *others = re.findall(r"--gin_file=(\S+)", row.example)
    kind = run.partition("/")[0]
    files = runs(command) if kind == "runs" else package_names(kind)
    if files != [run]:
        parts.append(f"files of {kind}/:\n" + _table({name: summary(name) for name in files}))
    for kind, macro in (("methods", "METHODS"), ("tasks", "MIXTURE_OR_TASK_NAME")):
        if any(f"%{macro}" in text for text in texts(run)):
            names = " ".join(name.rpartition("/")[2] for name in package_names(kind))
            parts.append(f"files of {kind}/:\n{_wrapped(names)}")
    for name in (run, *others):
        rows = dict(map(_row, macros(name).items()))
        parts.append(f"macros of {name}, with what they are unless they are given:\n{_table(rows)}")
    parts.append(
        _wrapped(
            "A VALUE is written as in a gin file; what gin cannot read is a text. "
            "--gin.FUNCTION.PARAMETER=VALUE binds any parameter, such as "
            "--gin.Decoding.num_beams=4. Files may be given in any order; gin files are programs: "
            "they import modules and call what is in them.",
            "",
        )
    )
    return "\n\n".join(parts)


def _row(item: tuple[str, tuple[str, str]]) -> tuple[str, str]:
    macro, (value, comment) = item
    value = "(required)" if value == "%gin.REQUIRED" else value
    return macro, f"{value}  # {comment}" if comment else value


def example(command: str) -> str:
    """A command line that works, over several lines."""
    lines = [f"coda {command}"]
    for word in shlex.split(COMMANDS[command].example):
        if len(f"  {lines[-1]} {word} \\") > _WIDTH:
            lines.append("  ")
        lines[-1] += f" {word}"
    return textwrap.indent(" \\\n".join(lines), "  ")


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows)) + 2
    lines = (textwrap.wrap(text, _WIDTH - width - 2) or [""] for text in rows.values())
    return "\n".join(
        f"  {name:{width}}" + f"\n{'':{width + 2}}".join(wrapped)
        for name, wrapped in zip(rows, lines, strict=True)
    )


def _wrapped(text: str, indent: str = "  ") -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
