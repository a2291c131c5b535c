"""The command `coda`: gin files and bindings in, one function called.

    coda train --gin_file=runs/finetune.gin --gin_file=methods/coda.gin --gin.MODEL_DIR="'/tmp/run'"

Flags follow T5X: --gin_file and --gin_search_paths may be repeated, and --gin.NAME=VALUE binds what
the files leave open, VALUE being written as in a gin file. `coda bench` has flags of its own and
needs no gin.
"""

import argparse
from collections.abc import Sequence
import pathlib
import sys

import coda_jax
from coda_jax import answers, bench, check, convert, exporting, gin_configs, runs
from coda_jax.run_files import Interruption

COMMANDS = {
    "train": runs.train,
    "evaluate": answers.evaluate,
    "predict": answers.predict,
    "cache": runs.cache,
    "export": exporting.export,
    "convert": convert.convert,
    "check": check.check,
}


def parse_arguments(arguments: Sequence[str]) -> tuple[str, list[str], list[str], list[str]]:
    """(command, gin files, search paths, bindings) of a command line.

    Raises:
        SystemExit: the command line is not understood; the usage is printed.
    """
    parser = argparse.ArgumentParser(prog="coda", description=__doc__.split("\n", 1)[0])
    parser.add_argument("command", choices=[*COMMANDS, "bench"])
    parser.add_argument("--gin_file", action="append", default=[], help="a gin file; repeatable")
    parser.add_argument(
        "--gin_search_paths", action="append", default=[], help="folders of gin files; repeatable"
    )
    parser.add_argument("--version", action="version", version=coda_jax.__version__)
    parser.epilog = "--gin.NAME=VALUE binds a macro or a parameter; repeatable"
    known, rest = parser.parse_known_args(arguments)
    bindings = [text.removeprefix("--gin.") for text in rest if text.startswith("--gin.")]
    unknown = [text for text in rest if not text.startswith("--gin.") or "=" not in text]
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    paths = [path for text in known.gin_search_paths for path in text.split(",")]
    return known.command, known.gin_file, paths, bindings


def configure(gin_files: Sequence[str], search_paths: Sequence[str], bindings: Sequence[str]):
    """Reads gin files and bindings; a name that does not exist is an error that names it.

    Args:
        gin_files: paths, or short names of the package's own files, such as methods/coda.gin.
        search_paths: folders in which gin looks for files too.
        bindings: as on a line of a gin file.
    """
    import gin  # Here: `coda bench` runs where gin is not installed.

    gin.clear_config()
    for path in search_paths:
        gin.add_config_file_search_path(path)
    own = pathlib.Path(next(iter(gin_configs.__path__)))
    files = [
        str(own / name) if (own / name).is_file() and not pathlib.Path(name).exists() else name
        for name in gin_files
    ]
    gin.parse_config_files_and_bindings(files, list(bindings))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["bench"]:
        return bench.main(arguments[1:])
    command, files, paths, bindings = parse_arguments(arguments)
    configure(files, paths, bindings)
    import gin

    try:
        gin.get_configurable(COMMANDS[command])()
    except Interruption as interruption:
        print(interruption, file=sys.stderr)
        return 143  # 128 + SIGTERM
    return 0


if __name__ == "__main__":
    sys.exit(main())
