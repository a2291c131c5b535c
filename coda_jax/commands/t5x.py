"""`coda t5x`: T5X's own programs, after a look at what they are given.

The command line is read as all of `coda`'s is, and most mistakes are found in its text. Then T5X's
main module runs as it is, with gin files in the order that it needs and absolute paths; what only
the values tell, `t5x_run` checks as T5X makes its model.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import importlib.util
import logging
import os
import pathlib
import runpy
import sys
from typing import Any

from absl import logging as absl_logging

from coda_jax.commands.environment import without_early_logs
from coda_jax.commands.gin_files import (
    GinFile,
    Macro,
    UsageError,
    in_order,
    package_folder,
    read,
    read_bindings,
)
from coda_jax.commands.gin_macros import (
    check_macros,
    check_order_of_t5x,
    check_values,
    in_order_of_t5x,
)
from coda_jax.optional import needs

_PROGRAMS = {  # of T5X: (the function that gin configures, the package's file for it)
    "train": ("train", "t5x/finetune.gin"),
    "eval": ("evaluate", "t5x/eval.gin"),
    "infer": ("infer", "t5x/infer.gin"),
}
_PATHS = (  # macros that T5X needs as absolute paths
    "MODEL_DIR",
    "INITIAL_CHECKPOINT_PATH",
    "CHECKPOINT_PATH",
    "EVAL_OUTPUT_DIR",
    "INFER_OUTPUT_DIR",
)
_LOGGING = ("t5x", "seqio", "clu", "coda_jax")  # packages that tell how a run goes
_CLONES = ("t5x", "airio", "jestimator")  # on no package index in a version that works
_FLAGS = {  # T5X's own, beside those of gin
    "tfds_data_dir": "folder of sets that TensorFlow Datasets has prepared",
    "seqio_additional_cache_dirs": "folders of tasks that seqio has cached, with commas between",
    "multiprocess_gpu": "true: this is one of several processes with GPUs",
    "coordinator_address": "of the first of them, as IP:PORT",
    "process_count": "how many they are",
    "process_index": "which this is, from 0",
    "shard_id": "the part of the task that this process infers, from 0",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `coda t5x`."""
    parser.add_argument("program", choices=[*_PROGRAMS], help="of T5X")
    for name, text in _FLAGS.items():
        parser.add_argument(f"--{name}", metavar="VALUE", help=f"{text} (T5X's)")
    if parser.usage is not None:  # argparse writes the program itself where it makes the usage
        programs = "{" + ",".join(_PROGRAMS) + "}"
        parser.usage = parser.usage.replace(parser.prog, f"{parser.prog} {programs}", 1)


def t5x(options: argparse.Namespace) -> None:
    """Runs a program of T5X.

    Args:
        options: what `cli` has parsed.

    Raises:
        UsageError: T5X is not there; or a file or a name does not exist, something is missing, or
            what is given would have no effect.
        ModuleNotFoundError: what T5X needs is not there.
    """
    missing = [name for name in _CLONES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)}: not installed, and on no package index. Clones of "
            "google-research/t5x, google/airio and google-research/jestimator on PYTHONPATH will "
            "do: docs/t5x.md, section 1"
        )
    arguments = command_line(
        options.program, options.gin_file, options.gin_search_paths, options.gin_bindings
    )
    values = ((name, getattr(options, name)) for name in _FLAGS)
    arguments += [f"--{name}={value}" for name, value in values if value is not None]
    with needs("t5x"):  # By name: this module stands above the commands.
        importlib.import_module("coda_jax.t5x_models")
    if not options.verbose:
        _look_for_gpus()
        absl_logging.get_absl_handler().python_handler.addFilter(_log_of_the_run())
    _run(f"t5x.{options.program}", arguments)


def command_line(
    program: str, gin_files: Sequence[str], search_paths: Sequence[str], bindings: Sequence[str]
) -> list[str]:
    """The arguments with which T5X's program does what is asked of `coda t5x`.

    Args:
        program: "train", "eval" or "infer".
        gin_files: names as `gin_files.find` takes them, in any order.
        search_paths: folders in which files are looked for first.
        bindings: NAME=VALUE, with texts that may lack their quotes.

    Raises:
        UsageError: see `t5x`.
    """
    example = (
        f"for example: coda t5x {program} --gin_file={_PROGRAMS[program][1]} "
        "--gin_file=methods/coda.gin --gin_file=tasks/mnli.gin --gin.PRESET=t5_1_1_base ..."
    )
    given = read_bindings(bindings)
    named = in_order_of_t5x([read(name, search_paths) for name in gin_files])
    in_order(named)  # two recipes, or tasks, are refused
    members = list(dict.fromkeys(member for file in named for member in file.members()))
    for together in (*(x.bindings for x in members if x.kind is None and not x.installed), given):
        check_values(together)
    _check_program(program, named, members, example)
    check_order_of_t5x(named)
    bound = {x.name: x.value for x in [*(x for file in members for x in file.bindings), *given]}
    _check_vocabulary(bound)
    check_macros(example, members, given)
    paths = _absolute(bound)
    lines = [binding.line for binding in given if binding.name not in paths]
    lines += [f"{name} = {path!r}" for name, path in paths.items()]
    folders = [*map(os.path.abspath, search_paths), str(package_folder())]
    return [
        f"--gin_search_paths={','.join(folders)}",
        *(f"--gin_file={os.path.abspath(file.path)}" for file in named),
        *(f"--gin_bindings={line}" for line in lines),
    ]


def _check_program(
    program: str, named: Sequence[GinFile], members: Sequence[GinFile], example: str
) -> None:
    """Raises UsageError unless the gin files have a run, and it is of the program."""
    found = {
        other: file.name
        for other, (function, _) in _PROGRAMS.items()
        for file in named
        if any(f"__main__.{function}" in member.configures for member in file.members())
    }
    if not found:
        raise UsageError(f"a run of t5x/ is missing; {example}")
    for other, name in found.items():
        if other != program:
            raise UsageError(f"{name} is for `coda t5x {other}`; {example}")
    for file in members:
        if file.kind == "runs":
            raise UsageError(f"{file.name} is for `coda`'s own commands; {example}")


def _check_vocabulary(bound: Mapping[str, Any]) -> None:
    """Raises UsageError where the vocabulary is sought in the checkpoint, as files of tasks/ do."""
    if bound.get("VOCABULARY") == Macro("INITIAL_CHECKPOINT_PATH"):
        raise UsageError(
            "VOCABULARY must be given, as a T5X checkpoint has none in it: --gin.VOCABULARY=FOLDER "
            "with spiece.model or tokenizer.json, such a file, or bytes"
        )


def _absolute(bound: Mapping[str, Any]) -> dict[str, str]:
    """{macro: absolute path} of those that T5X needs, where they are relative."""
    paths = {name: bound[name] for name in _PATHS if isinstance(bound.get(name), str)}
    local = {name: path for name, path in paths.items() if "://" not in path}
    return {name: os.path.abspath(x) for name, x in local.items() if not os.path.isabs(x)}


def _look_for_gpus() -> None:
    """Has TensorFlow look for GPUs, as T5X will, without a line of log where there are none."""
    with needs():
        import tensorflow as tf

    with without_early_logs():
        tf.config.list_physical_devices("GPU")


def _log_of_the_run() -> Callable[[logging.LogRecord], bool]:
    """Which lines of T5X's log are of the run: no library's, nor gin's whole configuration.

    That lies in the run's folder, as config.gin.
    """
    found = (importlib.util.find_spec(name).submodule_search_locations for name in _LOGGING)
    folders = {pathlib.Path(place) for places in found for place in places}

    def tells(record):
        file = pathlib.Path(record.pathname)
        of_the_run = not folders.isdisjoint(file.parents) and file.name != "gin_utils.py"
        return of_the_run or record.levelno >= logging.ERROR

    return tells


def _run(module: str, arguments: Sequence[str]) -> None:
    """Runs a module as `python -m` does; its own end is no error."""
    before = sys.argv
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        sys.argv = before
