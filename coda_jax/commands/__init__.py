"""The commands of `coda`, one file each. `COMMANDS` is the table that `cli` reads.

| file | holds |
|---|---|
| `gin_files` | gin files as text: their names, kinds and order |
| `gin_macros` | what that text lacks, and macros that nothing reads |
| `configuration` | gin files and bindings to a configured command; what has no effect is refused |
| `manual` | what `--help` says of a command's macros |
| `environment` | what a process sets up before anything is imported: logs, compiled programs |
| `mistakes` | which errors are a user's, and how they are told |
| `sources` | every kind of checkpoint that `convert` and `prune` read |
| `loading` | a checkpoint, methods and an adapter file, put together for all commands |
| `model_card` | what an adapter file says of itself to people: its README.md |
| `command_lines` | the flags of commands that another command runs |
| `compare_plan` | from what `compare` is given to its cells |
| `compare_cells` | a recipe of `compare` with a seed: its commands, its run, what is kept |
| `compare_speed` | what the models of `compare` cost |
| `compare_routing` | what a model of `compare` makes of held-out inputs |
| `bench_programs` | the programs that `bench` compares |
| `bench_topology` | `bench` for TPUs that are not there |
| `check_topology` | `check` for pods that are not there |
| `t5x_run` | the model of a T5X run and what it starts from, checked before T5X builds anything |
| `t5x_partial` | what T5X saves of a run, and is given where its checkpoint is not whole |
| `t5x_identity` | what the folder of a T5X run says of it, compared with what is asked |
| `t5x_data` | a T5X run that goes on takes the batches that it has not taken yet |
| `t5x_best` | which checkpoints T5X keeps |
| `many_adapters` | adapters that the lines of `predict` choose from |
| `marking` | how `predict` marks inputs that are out of distribution |
| `encodings` | what `predict` writes of an encoder |
| `served` | what `export` puts beside its programs: load.py and what it imports |
| `ood_data` | what `ood` reads: a task with its labels, and inputs that are none of it |
"""

from collections.abc import Callable
import dataclasses
import importlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Command:
    """A row of the table: a module of this folder with a function of its name.

    Attributes:
        summary: a line for people.
        example: arguments that work, for the help and for errors.
        reads_gin: whether it is given gin files. They configure its function, which then takes no
            arguments, unless it has flags.
        has_flags: whether it has flags of its own, which the `add_flags(parser)` of its module
            adds; its function takes what was parsed.
        runs_others: whether it runs other commands, and is given the flags that are theirs; see
            `command_lines`.
        one_of: macros of which one must have a value.
        either: macros of which one alone has a value: one's own takes the place of the package's.
    """

    summary: str
    example: str
    reads_gin: bool = True
    has_flags: bool = False
    runs_others: bool = False
    one_of: tuple[tuple[str, ...], ...] = ()
    either: tuple[tuple[str, ...], ...] = ()


def load(command: str, function: str | None = None) -> Callable[..., Any]:
    """A command's function, or another of its module; only that module is imported."""
    return getattr(importlib.import_module(f"{__name__}.{command}"), function or command)


_MODEL = (
    "--gin.INITIAL_CHECKPOINT_PATH=flan-t5-base --gin.INITIAL_ADAPTER_PATH=my_run/export/adapter"
)
COMMANDS = {
    "train": Command(
        "adapt a model to a task",
        "--gin_file=runs/finetune.gin --gin_file=methods/coda.gin --gin_file=tasks/jsonl.gin "
        "--gin.INITIAL_CHECKPOINT_PATH=flan-t5-base --gin.MODEL_DIR=my_run "
        "--gin.TRAIN_FILE=train.jsonl --gin.VALIDATION_FILE=validation.jsonl",
        one_of=(("MIXTURE_OR_TASK_NAME", "CACHE"),),
        either=(("TRAIN_STEPS", "EPOCHS"),),
    ),
    "evaluate": Command(
        "metrics of a task, from decoded outputs",
        f"--gin_file=runs/evaluate.gin --gin_file=tasks/jsonl.gin {_MODEL} "
        "--gin.VALIDATION_FILE=validation.jsonl",
    ),
    "ood": Command(
        "does a model know which inputs are none of its task",
        f"--gin_file=runs/ood.gin --gin_file=tasks/jsonl.gin {_MODEL} "
        "--gin.TRAIN_FILE=train.jsonl --gin.VALIDATION_FILE=validation.jsonl "
        "--gin.OOD=others.jsonl",
    ),
    "predict": Command(
        "answers to the inputs of a file",
        f"--gin_file=runs/predict.gin {_MODEL} --gin.INPUT=questions.txt",
    ),
    "serve": Command(
        "answers over HTTP",
        f"--gin_file=runs/serve.gin {_MODEL} --gin.PORT=8000",
    ),
    "cache": Command(
        "a task's tokenised examples in one file",
        "--gin_file=runs/cache.gin --gin_file=tasks/stdlib_module.gin --gin.OUTPUT=train.npz",
    ),
    "check": Command(
        "does a checkpoint fit a model, a model a pod; the costs",
        "--gin_file=runs/check.gin --gin_file=methods/coda.gin "
        "--gin.INITIAL_CHECKPOINT_PATH=flan-t5-base",
    ),
    "convert": Command(
        "a checkpoint in another layout",
        "--gin_file=runs/convert.gin --gin.INPUT=my_run --gin.OUTPUT=my_adapter "
        "--gin.LAYOUT=adapter --gin.INITIAL_CHECKPOINT_PATH=flan-t5-base",
    ),
    "compare": Command(
        "several recipes on one checkpoint: quality, parameters, speed",
        "--gin_file=runs/compare.gin --gin_file=tasks/jsonl.gin "
        "--gin.INITIAL_CHECKPOINT_PATH=flan-t5-base --gin.MODEL_DIR=compared "
        "--gin.TRAIN_FILE=train.jsonl --gin.VALIDATION_FILE=validation.jsonl",
        runs_others=True,
    ),
    "prune": Command(
        "the smaller model that structured pruning leaves",
        "--gin_file=runs/prune.gin --gin.INPUT=my_run/export/adapter "
        "--gin.INITIAL_CHECKPOINT_PATH=flan-t5-base --gin.OUTPUT=smaller",
    ),
    "export": Command(
        "a folder that answers without coda_jax",
        f"--gin_file=runs/export.gin {_MODEL} --gin.OUTPUT=served",
    ),
    "bench": Command(
        "what routing saves: times here, or cycles of a TPU",
        "--preset=t5_1_1_base --input_length=512 --batch_size=4 --reductions=3,5",
        reads_gin=False,
        has_flags=True,
    ),
    "t5x": Command(
        "T5X's training, evaluation and inference, on pods",
        "train --gin_file=t5x/finetune.gin --gin_file=methods/coda.gin --gin_file=tasks/mnli.gin "
        "--gin.PRESET=t5_1_1_base --gin.VOCABULARY=spiece.model "
        "--gin.INITIAL_CHECKPOINT_PATH=checkpoint_1000000 --gin.MODEL_DIR=my_run "
        "--gin.TRAIN_STEPS=1010000",
        has_flags=True,
    ),
}
