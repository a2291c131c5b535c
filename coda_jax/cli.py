"""The command `coda`: gin files and bindings in, one function called.

    coda train --gin_file=runs/finetune.gin --gin_file=methods/coda.gin --gin.MODEL_DIR=my_run

Flags follow T5X: --gin_file and --gin_search_paths may be repeated, and --gin.NAME=VALUE binds what
the files leave open. VALUE is written as in a gin file; what gin cannot read is taken as a text.

A command ends with 0, with 1 after a mistake in what it was given (files, values), with 2 where the
command line cannot be carried out, with 130 after Ctrl-C and 143 after SIGTERM.
"""

import argparse
from collections.abc import Sequence
import os
import re
import sys

import coda_jax
from coda_jax.commands import COMMANDS, command_lines, environment, load, manual, mistakes
from coda_jax.commands.configuration import configure
from coda_jax.commands.gin_files import UsageError, nearest, suggested
from coda_jax.commands.model_card import made_by

_BINDING = re.compile(r"--gin\.[^=]+=", re.DOTALL)
_DESCRIPTION = """\
Conditional adapters: a frozen encoder-decoder model, of which a router skips most of the work.

gin files say what a command does; `coda COMMAND --help` lists those of a command, and their macros.
The first two commands of most people:

{}

{}"""


class Parser(argparse.ArgumentParser):
    """Mistakes are one line, without the usage before it.

    Args:
        command: whose manual is the end of the help.
        **options: argparse's.
    """

    def __init__(self, command: str | None = None, **options):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )
        self._command = command

    def format_help(self):
        if self._command is not None:
            self.epilog = manual.epilog(self._command)
        return super().format_help()

    def error(self, message):
        raise UsageError(f"{message}; see `{self.prog} --help`")


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        command: the one that is called; only its own flags are loaded, if it has any.
    """
    examples = map(manual.example, ("train", "predict"))
    made = Parser(prog="coda", description=_DESCRIPTION.format(*examples))
    made.add_argument("--version", action="version", version=coda_jax.__version__)
    rows = made.add_subparsers(dest="command", metavar="command", parser_class=Parser)
    for name, row in COMMANDS.items():
        flags = rows.add_parser(
            name, command=name, help=row.summary, description=row.summary, prog=f"coda {name}"
        )
        if row.reads_gin:
            _add_gin_flags(flags)
        if row.has_flags and name == command:
            load(name, "add_flags")(flags)
        _add_common_flags(flags)
    return made


def _add_gin_flags(flags: argparse.ArgumentParser) -> None:
    flags.usage = (
        f"{flags.prog} [--gin_file=FILE ...] [--gin.NAME=VALUE ...] [--gin_search_paths=FOLDER,...]"
    )
    add = flags.add_argument
    add("--gin_file", metavar="FILE", action="append", default=[],
        help="of the package, such as methods/coda.gin, or a path; ./FILE is in this folder; "
        "repeatable, in any order")  # fmt: skip
    add("--gin_search_paths", metavar="FOLDERS", action="append", default=[],
        help="folders of gin files, which go before the package's; repeatable")  # fmt: skip
    shown = "--gin.NAME=VALUE"  # argparse shows it, and never meets it
    add(shown, metavar="", dest="_", help="binds a macro or a parameter; repeatable")


def _add_common_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--verbose", action="store_true", help="print all that is logged")
    flags.add_argument("--traceback", action="store_true", help="print where an error comes from")
    folder = environment.programs_folder()
    kept = "" if folder is None else f", in {folder}".replace("%", "%%")
    flags.add_argument(
        "--no_program_cache", action="store_true", help=f"do not keep compiled programs{kept}"
    )


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, with those of `--gin.` as `gin_bindings`.

    Raises:
        UsageError: the command line is not understood.
        SystemExit: help was asked for.
    """
    name = next(iter(arguments), "")
    if name not in COMMANDS and not name.startswith("-"):
        said = f"there is no command {name!r}" if name else "a command is missing"
        hint = suggested(nearest(name, COMMANDS)) or f"; it may be one of {', '.join(COMMANDS)}"
        raise UsageError(said + hint)
    options, rest = parser(name).parse_known_args(arguments)
    if options.command is None:
        raise UsageError(f"a command is missing; it may be one of {', '.join(COMMANDS)}")
    reads_gin = COMMANDS[options.command].reads_gin
    bindings = [text for text in rest if reads_gin and _BINDING.match(text)]
    if unknown := [text for text in rest if text not in bindings]:
        raise UsageError(_unknown(options.command, unknown[0]))
    if reads_gin:
        options.gin_search_paths = [p for t in options.gin_search_paths for p in t.split(",") if p]
        options.gin_bindings = [text.removeprefix("--gin.") for text in bindings]
    return options


def _unknown(command: str, text: str) -> str:
    """What is wrong with an argument that is none."""
    if COMMANDS[command].reads_gin and text.startswith("--gin."):
        return f"{text}: write --gin.NAME=VALUE"
    flag = text.partition("=")[0]
    if COMMANDS[command].reads_gin and re.fullmatch(r"-*[A-Z][A-Z0-9_]*", flag):
        return f"{text}: a macro is given as --gin.{flag.lstrip('-')}=VALUE"
    flags = ["--gin_file", "--gin_search_paths"] if COMMANDS[command].reads_gin else []
    flags += ["--verbose", "--traceback", "--no_program_cache", "--help"]
    if flag in flags:
        return f"{text} is written behind the command"
    if COMMANDS[command].has_flags:
        own = argparse.ArgumentParser(prog="", add_help=False)
        load(command, "add_flags")(own)
        flags += re.findall(r"--\w+", own.format_usage())
    near = suggested(nearest(flag, flags))
    return f"there is no argument {text}{near or f'; see `coda {command} --help`'}"


def run(arguments: Sequence[str]) -> None:
    """Runs a command; errors are raised as they come."""
    _call(parse_arguments(arguments))


def _call(options: argparse.Namespace) -> None:
    function = load(options.command)
    if COMMANDS[options.command].has_flags:
        function(options)
        return
    given, others = (options.gin_file, options.gin_search_paths, options.gin_bindings), ()
    bindings = dict(text.split("=", 1) for text in options.gin_bindings)
    words = command_lines.CommandLine(*given[:2], bindings).words(options.command)
    if COMMANDS[options.command].runs_others:
        given, passed_on = command_lines.divided(options.command, *given)
        others = (passed_on,)
    configure(*given, options.command)
    import gin

    from coda_jax import processes  # Here: it imports JAX, which not every command needs.

    with processes.ending_together(mistakes.told, mistakes.exit_code), made_by(*words):
        gin.get_configurable(function)(*others)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command as a process does; returns its exit status."""
    try:
        try:
            return _status(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as in `coda predict ... | head`, `coda --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _status(arguments: Sequence[str]) -> int:
    if not arguments:
        print(parser().format_help())
        return 2
    prog, traceback = parser().prog, False
    try:
        options = parse_arguments(arguments)
        prog, traceback = f"coda {options.command}", options.traceback
        environment.quiet(options.command, options.verbose)
        programs = environment.keep_programs(not options.no_program_cache)
        if options.verbose:
            print(programs, file=sys.stderr)
        environment.collect_garbage_rarely()
        _call(options)
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        said = mistakes.told(error)
        if traceback or said is None:
            raise
        sys.stdout.flush()
        print("\n".join(f"{prog}: {line}" for line in said.splitlines()), file=sys.stderr)
        return mistakes.exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
