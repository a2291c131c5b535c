"""`coda t5x` without T5X: what its text tells, and what T5X's programs are handed."""

import importlib
import logging
import os
import sys

import pytest

from coda_jax import cli
from coda_jax.commands import t5x
from coda_jax.commands.gin_files import UsageError, package_folder

# What T5X's own files leave open, and which function they configure.
RUNS = {
    "finetune": ("train", "MODEL_DIR TRAIN_STEPS INITIAL_CHECKPOINT_PATH"),
    "eval": ("evaluate", "CHECKPOINT_PATH EVAL_OUTPUT_DIR"),
    "infer": ("infer", "CHECKPOINT_PATH INFER_OUTPUT_DIR"),
}
RUN = """
from __gin__ import dynamic_registration
import __main__ as script
{required}
TASK_FEATURE_LENGTHS = None
MIXTURE_OR_TASK_NAME = %gin.REQUIRED
MIXTURE_OR_TASK_MODULE = None
TRAIN_STEPS_RELATIVE = None
script.{function}:
  model = %MODEL
  lengths = %TASK_FEATURE_LENGTHS
  reads = [{read}]
"""
PROGRAM = """
import sys

ARGUMENTS = sys.argv[1:]
if __name__ == "__main__":
    import t5x.here as here
    here.run(sys.argv, sys.modules["__main__"])
"""
TRAIN = ["t5x/finetune.gin", "methods/coda.gin", "tasks/mnli.gin"]
GIVEN = {
    "MODEL_DIR": "run",
    "INITIAL_CHECKPOINT_PATH": "gs://bucket/checkpoint_10",
    "VOCABULARY": "bytes",
    "TRAIN_STEPS": "20",
    "PRESET": "t5_1_1_base",
}


@pytest.fixture(name="stand_in", autouse=True)
def fixture_stand_in(tmp_path, monkeypatch):
    """A package `t5x` that has programs and gin files for them; yields what its programs do."""
    folder = tmp_path / "clones" / "t5x"
    runs = folder / "configs" / "runs"
    runs.mkdir(parents=True)
    for name, (function, macros) in RUNS.items():
        required = "\n".join(f"{macro} = %gin.REQUIRED" for macro in macros.split())
        read = ", ".join(f"%{x}" for x in (*macros.split(), "MIXTURE_OR_TASK_NAME"))
        text = RUN.format(required=required, read=read, function=function)
        (runs / f"{name}.gin").write_text(text)
    for name in ("train", "eval", "infer"):
        (folder / f"{name}.py").write_text(PROGRAM)
    (folder / "here.py").write_text("run = lambda *_: None\n")
    for name in ("t5x", "airio", "jestimator"):
        (folder.parent / name).mkdir(exist_ok=True)
        (folder.parent / name / "__init__.py").touch()
    for name in [x for x in sys.modules if x.partition(".")[0] in ("t5x", "airio", "jestimator")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "coda_jax.t5x_models", sys)
    monkeypatch.setattr(t5x, "_look_for_gpus", lambda: None)  # imports TensorFlow
    yield importlib.import_module("t5x.here")
    for name in [x for x in sys.modules if x.partition(".")[0] in ("t5x", "airio", "jestimator")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def flags(files, bindings):
    return [f"--gin_file={x}" for x in files] + [f"--gin.{k}={v}" for k, v in bindings.items()]


def test_what_t5x_is_handed_has_its_order_and_absolute_paths(tmp_path):
    own = tmp_path / "own.gin"
    own.write_text("INITIAL_CHECKPOINT_PATH = 'base/checkpoint_10'\nREDUCTION = 5\n")
    given = {k: v for k, v in GIVEN.items() if k != "INITIAL_CHECKPOINT_PATH"}
    bindings = [f"{name}={value}" for name, value in given.items()]
    files = ["./own.gin", *TRAIN[::-1], "t5x/images.gin"]
    found = t5x.command_line("train", files, ["more"], bindings)
    names = ["t5x/finetune.gin", "t5x/images.gin", "methods/coda.gin", "tasks/mnli.gin"]
    assert found == [
        f"--gin_search_paths={tmp_path}/more,{package_folder()}",
        *(f"--gin_file={os.path.abspath(package_folder() / name)}" for name in names),
        f"--gin_file={own}",
        "--gin_bindings=VOCABULARY = 'bytes'",
        "--gin_bindings=TRAIN_STEPS=20",
        "--gin_bindings=PRESET = 't5_1_1_base'",
        f"--gin_bindings=MODEL_DIR = '{tmp_path}/run'",
        f"--gin_bindings=INITIAL_CHECKPOINT_PATH = '{tmp_path}/base/checkpoint_10'",
    ]


def test_pretraining_on_ones_own_texts_is_handed_over():
    given = GIVEN | {"TEXTS": "gs://bucket/texts", "DENOISERS": "ul2"}
    files = ["t5x/pretrain.gin", "methods/coda_pretrain.gin", "tasks/pretrain_text.gin"]
    found = t5x.command_line("train", files, [], [f"{k}={v}" for k, v in given.items()])
    assert [x for x in found if x.startswith("--gin_file")] == [
        f"--gin_file={os.path.abspath(package_folder() / name)}" for name in files
    ]
    assert "--gin_bindings=TEXTS = 'gs://bucket/texts'" in found


def without(name):
    return {k: v for k, v in GIVEN.items() if k != name}


@pytest.mark.parametrize(
    ("program", "files", "bindings", "message"),
    [
        (
            "train",
            [],
            {},
            "a run of t5x/ is missing; for example: coda t5x train --gin_file=t5x/",
        ),
        ("train", TRAIN[1:], GIVEN, "a run of t5x/ is missing"),
        ("train", ["t5x/eval.gin", *TRAIN[1:]], {}, "t5x/eval.gin is for `coda t5x eval`; for ex"),
        (
            "eval",
            TRAIN,
            GIVEN,
            "t5x/finetune.gin is for `coda t5x train`; for example: coda t5x ",
        ),
        ("train", [*TRAIN, "runs/train.gin"], GIVEN, "runs/train.gin is for `coda`'s own commands"),
        ("train", [TRAIN[0], TRAIN[2]], GIVEN, "a recipe, which says what is trained, is missing"),
        ("train", TRAIN[:2], GIVEN, "MIXTURE_OR_TASK_NAME must be given: "),
        (
            "train",
            TRAIN,
            without("VOCABULARY"),
            "VOCABULARY must be given, as a T5X check",
        ),
        ("train", TRAIN, without("MODEL_DIR"), "MODEL_DIR must be given: --gin.MODEL_DIR=..."),
        ("infer", ["t5x/infer.gin", *TRAIN[1:]], {"VOCABULARY": "x"}, "INFER_OUTPUT_DIR must be g"),
        ("train", [*TRAIN, "methods/full.gin"], GIVEN, "two recipes in one command"),
        ("train", [*TRAIN, "tasks/rte.gin"], GIVEN, "two tasks in one command"),
        (
            "train",
            TRAIN,
            {**GIVEN, "REDUCTON": 5},
            "nothing reads REDUCTON; did you mean REDUC",
        ),
        ("train", TRAIN, {**GIVEN, "QUANTIZE": "int8"}, "nothing reads QUANTIZE"),
        ("train", TRAIN, {**GIVEN, "A B": 5}, "'A B' is no name of a macro"),
        ("train", [*TRAIN, "own.gin"], GIVEN, "there is no gin file 'own.gin'"),
        ("fly", TRAIN, GIVEN, "invalid choice: 'fly' (choose from 'train', 'eval', 'infer')"),
    ],
)
def test_a_mistake_in_the_text_is_told_before_t5x_is_imported(
    program, files, bindings, message, stand_in, capsys
):
    stand_in.run = lambda *_: pytest.fail("T5X was started")
    assert cli.main(["t5x", program, *flags(files, bindings)]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_a_name_with_two_values_is_refused(tmp_path):
    bindings = [f"{name}={value}" for name, value in GIVEN.items()]
    with pytest.raises(UsageError, match="PRESET is given twice"):
        t5x.command_line("train", TRAIN, [], [*bindings, "PRESET=t5_1_1_xl"])


def test_t5xs_program_runs_as_the_main_module(stand_in):
    ran = []
    before = sys.argv, sys.modules["__main__"]
    stand_in.run = lambda arguments, main: ran.append((arguments, main.__spec__.name))
    options = ["--tfds_data_dir=sets", "--process_count=4"]
    cli.run(["t5x", "train", *flags(TRAIN, GIVEN), *options])
    ((arguments, name),) = ran
    assert name == "t5x.train"
    assert arguments[1:] == [
        *t5x.command_line("train", TRAIN, [], [f"{k}={v}" for k, v in GIVEN.items()]),
        *options,
    ]
    assert (sys.argv, sys.modules["__main__"]) == before


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (0, 0), (3, 3)])
def test_its_end_is_that_of_the_command(code, expected, stand_in):
    def stop(*_):
        sys.exit(code)

    stand_in.run = stop
    try:
        found = cli.main(["t5x", "train", *flags(TRAIN, GIVEN)])
    except SystemExit as error:
        found = error.code
    assert found == expected


def test_mistakes_that_our_checks_find_are_told_and_errors_of_t5x_keep_their_traceback(
    stand_in, capsys
):
    def ours(*_):
        t5x.command_line("train", [], [], [])

    def theirs(*_):
        eval("int('x')", {"__name__": "t5x.utils"})

    stand_in.run = ours
    assert cli.main(["t5x", "train", *flags(TRAIN, GIVEN)]) == 2
    assert capsys.readouterr().err.startswith("coda t5x: a run of t5x/ is missing")
    with pytest.raises(UsageError):
        cli.main(["t5x", "train", *flags(TRAIN, GIVEN), "--traceback"])
    stand_in.run = theirs
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["t5x", "train", *flags(TRAIN, GIVEN)])


def test_the_log_is_that_of_the_run(tmp_path):
    tells = t5x._log_of_the_run()

    def record(file, level="INFO"):
        return logging.makeLogRecord(
            {"pathname": str(file), "levelno": getattr(logging, level), "msg": "x"}
        )

    folder = tmp_path / "clones" / "t5x"
    assert tells(record(folder / "trainer.py")) and tells(record(t5x.__file__))
    for file in (folder / "gin_utils.py", tmp_path / "clones" / "t5x_other" / "a.py", os.__file__):
        assert not tells(record(file)) and not tells(record(file, "WARNING"))
        assert tells(record(file, "ERROR"))


@pytest.mark.parametrize("missing", ["t5x", "airio", "jestimator"])
def test_where_t5x_is_not_installed_it_is_said_how_to_get_it(missing, monkeypatch, capsys):
    find = t5x.importlib.util.find_spec
    monkeypatch.setattr(
        t5x.importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    assert cli.main(["t5x", "train", *flags(TRAIN, GIVEN)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"coda t5x: {missing}: not installed") and "docs/t5x.md" in said
    assert len(said.splitlines()) == 1
