"""The command `coda`: gin files and bindings in, one function called.

    coda train --gin_file=runs/finetune.gin --gin_file=methods/coda.gin --gin.MODEL_DIR=my_run

Flags follow T5X: --gin_file and --gin_search_paths may be repeated, and --gin.NAME=VALUE binds what
the files leave open. VALUE is written as in a gin file; what gin cannot read is taken as a text.
"""

import argparse
from collections.abc import Sequence
import pathlib
import re
import sys
import tokenize

import coda_jax
from coda_jax.commands import COMMANDS
from coda_jax.optional import needs

_INCLUDE = re.compile(r"^\s*include\s+['\"]([^'\"]+)['\"]", re.MULTILINE)


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        command: the one that is called; only its own flags are loaded, if it has any.
    """
    made = argparse.ArgumentParser(
        prog="coda",
        description="Conditional adapters for encoder-decoder models.",
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=coda_jax.__version__)
    rows = made.add_subparsers(dest="command", required=True, metavar="command")
    for name, row in COMMANDS.items():
        flags = rows.add_parser(name, help=row.summary, description=row.summary, allow_abbrev=False)
        if row.reads_gin:
            _add_gin_flags(flags)
        elif name == command:
            row.load("add_flags")(flags)
    return made


def _add_gin_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--gin_file", action="append", default=[], help="a gin file; repeatable")
    flags.add_argument(
        "--gin_search_paths", action="append", default=[], help="folders of gin files; repeatable"
    )
    flags.epilog = "--gin.NAME=VALUE binds a macro or a parameter; repeatable"


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, bindings) of a command line.

    Raises:
        SystemExit: the command line is not understood; the usage is printed.
    """
    made = parser(next(iter(arguments), None))
    options, rest = made.parse_known_args(arguments)
    reads_gin = COMMANDS[options.command].reads_gin
    bindings = [text for text in rest if reads_gin and re.match(r"--gin\.[^=]+=", text)]
    if unknown := [text for text in rest if text not in bindings]:
        made.error(f"unknown arguments: {' '.join(unknown)}")
    if reads_gin:
        options.gin_search_paths = [p for t in options.gin_search_paths for p in t.split(",")]
    return options, [text.removeprefix("--gin.") for text in bindings]


def as_binding(text: str) -> str:
    """NAME=VALUE as on a line of a gin file: a VALUE that gin cannot read becomes a text."""
    from gin import config_parser

    class Names(config_parser.ParserDelegate):
        """Takes every reference and macro as it is written."""

        def configurable_reference(self, scoped_configurable_name, evaluate):
            return scoped_configurable_name, evaluate

        def macro(self, scoped_name):
            return scoped_name

    name, value = text.split("=", 1)
    try:
        config_parser.ConfigParser(value.strip(), Names()).parse_value()
        (_,) = config_parser.ConfigParser(text, Names())  # ValueError: it is more than a binding
    except (SyntaxError, ValueError, TypeError, RecursionError, tokenize.TokenError):
        return f"{name} = {value!r}"
    return text


def package_folder() -> pathlib.Path:
    """The folder of the package's gin files."""
    from coda_jax import gin_configs

    return pathlib.Path(next(iter(gin_configs.__path__)))


def recipes(files: Sequence[str], search_paths: Sequence[str] = ()) -> list[str]:
    """The recipes, files of methods/, that gin files bring, those that they include among them.

    A file that includes another one of methods/ is one recipe with it.
    """
    found = []
    for name in files:
        short = name.removeprefix("coda_jax/gin_configs/")
        places = (pathlib.Path(folder) / short for folder in ("", package_folder(), *search_paths))
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            continue  # gin says so
        if (package_folder() / "methods").resolve() in path.resolve().parents:
            found.append(f"methods/{path.name}")
        else:
            found += recipes(_INCLUDE.findall(path.read_text(encoding="utf-8")), search_paths)
    return list(dict.fromkeys(found))


def configure(gin_files: Sequence[str], search_paths: Sequence[str], bindings: Sequence[str]):
    """Reads gin files and bindings; a name that does not exist is an error that names it.

    Args:
        gin_files: paths, or short names of the package's own files, such as methods/coda.gin.
        search_paths: folders in which gin looks for files too.
        bindings: as on a line of a gin file, or with texts that lack their quotes.

    Raises:
        ValueError: two recipes are given.
    """
    with needs():  # Here: `coda bench` runs where gin is not installed.
        import gin

    from coda_jax.methods import METHODS

    given = recipes(gin_files, search_paths)
    if len(given) > 1:
        raise ValueError(
            f"two recipes in one command: {given}; give one, and combine methods with "
            "--gin.METHODS=\"('...', '...')\""
        )
    gin.clear_config()
    for method in METHODS.values():  # so that any field can be bound, whichever recipe is given
        gin.external_configurable(method, module="coda_jax.methods")
    for path in search_paths:
        gin.add_config_file_search_path(path)
    own = package_folder()
    files = [
        str(own / name) if (own / name).is_file() and not pathlib.Path(name).exists() else name
        for name in gin_files
    ]
    gin.parse_config_files_and_bindings(files, [as_binding(text) for text in bindings])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    options, bindings = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    command = COMMANDS[options.command]
    if not command.reads_gin:
        return command.load()(options)
    configure(options.gin_file, options.gin_search_paths, bindings)
    import gin

    from coda_jax.training.run_directory import Interruption  # Here: `--help` needs no jax.

    try:
        gin.get_configurable(command.load())()
    except Interruption as interruption:
        print(interruption, file=sys.stderr)
        return 143  # 128 + SIGTERM
    return 0


if __name__ == "__main__":
    sys.exit(main())
