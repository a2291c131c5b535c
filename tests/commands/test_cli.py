"""The command line as a process: help, mistakes in a line, exit codes, and nothing else printed."""

import json
import os
import pathlib
import re
import subprocess
import sys

import gin
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
import pytest

import coda_jax
from coda_jax import cli
from coda_jax.commands import COMMANDS, configuration, load, manual, mistakes
from coda_jax.commands.gin_files import UsageError
from coda_jax.training.run_directory import Interruption

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "v1_1"
GIN_COMMANDS = [name for name, row in COMMANDS.items() if not row.has_flags]


def test_help_lists_all_commands_without_importing_jax():
    code = """
import json, sys
from coda_jax import cli
texts = [cli.parser(name).format_help() for name in (None, "train")]
print(json.dumps([texts[0], sorted({name.split(".")[0] for name in sys.modules})]))
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    text, modules = json.loads(run.stdout)
    rows = [line.split(None, 1) for line in text.splitlines() if line.startswith("    ")]
    assert {row[0]: row[1] for row in rows if row[0] in COMMANDS} == {
        name: command.summary for name, command in COMMANDS.items()
    }
    assert not {"jax", "flax", "gin", "tensorflow", "numpy"}.intersection(modules)


def test_every_command_has_a_file_of_its_name_with_a_function_of_its_name():
    for name in COMMANDS:
        assert load(name).__name__ == name and load(name).__module__.endswith(f".{name}")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_its_flags_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: coda {name} ")
    assert COMMANDS[name].summary in text and f"example:\n  coda {name} " in text
    for flag in ("--gin_file", "--gin_search_paths", "--gin.NAME=VALUE"):
        assert (flag in text) == COMMANDS[name].reads_gin
    for flag in ("--verbose", "--traceback", "--no_program_cache"):
        assert flag in text
    assert ("--preset" in text) == (name == "bench")


@pytest.mark.parametrize(
    ("folder", "said"), [("/tmp/a%b", "programs, in /tmp/a%b"), (None, "programs\n")]
)
def test_help_names_the_folder_of_programs(folder, said, monkeypatch, capsys):
    monkeypatch.setattr(cli.environment, "programs_folder", lambda: folder)
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("name", GIN_COMMANDS)
def test_each_command_lists_its_macros_with_their_values_and_comments(name):
    text = manual.epilog(name)
    run = re.search(r"--gin_file=(runs/\S+)", COMMANDS[name].example)[1]
    for macro, (value, comment) in manual.macros(run).items():
        row = next(line for line in text.splitlines() if line.startswith(f"  {macro} "))
        assert ("(required)" if value == "%gin.REQUIRED" else value) in row
        assert comment.split(" ")[0] in row
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize("name", GIN_COMMANDS)
def test_the_example_of_a_command_is_accepted(name, monkeypatch, capsys):
    """But for its files and folders, which are not there."""
    monkeypatch.setattr(configuration, "_parse", lambda *_: {})
    monkeypatch.setattr(configuration, "_check_reached", lambda *_: None)
    monkeypatch.setattr(gin, "get_configurable", lambda _: lambda *_: None)
    assert cli.main([name, *COMMANDS[name].example.split()]) == 0, capsys.readouterr().err


def test_the_help_of_training_lists_runs_recipes_and_tasks():
    text = manual.epilog("train")
    assert "  runs/finetune.gin" in text and "Adapts a checkpoint to a task." in text
    assert "lora.gin" in text and "jsonl.gin" in text
    assert "  TRAIN_FILE " in text and "  REDUCTION " in text  # of the files of the example


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == coda_jax.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "there is no command 'fly'; it may be one of train, "),
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["--gin_file=x"], "a command is missing"),
        (["--verbose", "train"], "--verbose"),
        (["train", "--steps=3"], "there is no argument --steps=3"),
        (["train", "--gin.NO_SUCH_MACRO"], "--gin.NO_SUCH_MACRO: write --gin.NAME=VALUE"),
        (["train", "--gin.=3"], "--gin.=3: write --gin.NAME=VALUE"),
        (["train", "--gin.3x=3"], "--gin.3x=3: '3x' is no name"),
        (["train", "--gin_fil=x"], "--gin_fil=x; did you mean --gin_file?"),
        (["train", "--gin_file"], "argument --gin_file: expected one argument"),
        (["train", "extra", "--gin.A=1"], "there is no argument extra"),
        (["train", "BATCH_SIZE=3"], "a macro is given as --gin.BATCH_SIZE=VALUE"),
        (["train", "--BATCH_SIZE=3"], "a macro is given as --gin.BATCH_SIZE=VALUE"),
        (["train", "--preset=t5_1_1_base"], "there is no argument --preset=t5_1_1_base"),
        (["train"], "a file of runs/ is missing; for example: coda train --gin_file="),
        (["train", "--gin_file=runs/finetun.gin"], "did you mean runs/finetune.gin"),
        (["bench", "--gin_file=x"], "there is no argument --gin_file=x"),
        (["bench", "--gin.A=1"], "there is no argument --gin.A=1"),
        (["t5x", "train", "train"], "there is no argument train; see `coda t5x --help`"),
        (["bench", "--size=base"], "there is no argument --size=base"),
        (["bench", "--batch_size=many"], "must be a whole number of at least 1, got 'many'"),
        (["bench", "--dtype=float64"], "invalid choice: 'float64'"),
        (["bench", "--preset=t5_1_1_bass"], "did you mean one of ['t5_1_1_base', "),
        (["bench", "--preset=mt5_base", "--checkpoint=x"], "not allowed with"),
    ],
)
def test_a_wrong_command_line_is_told_in_a_line_and_exits_with_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("coda") and message in printed
    assert len(printed.splitlines()) == 1


def test_without_arguments_there_is_the_help(capsys):
    assert cli.main([]) == 2
    assert "coda train --gin_file" in capsys.readouterr().out


def test_files_search_paths_and_bindings_are_collected_in_their_order():
    options = cli.parse_arguments(
        [
            "train",
            "--gin_file=a.gin",
            "--gin.A=1",
            "--gin_search_paths=/x,/y",
            "--gin_file",
            "b.gin",
            "--gin_search_paths=/z",
            "--gin.module.function.argument=a=b",
            "--gin.B=",
            "--gin.C=a\nb",
        ]
    )
    assert options.command == "train"
    assert options.gin_file == ["a.gin", "b.gin"]
    assert options.gin_search_paths == ["/x", "/y", "/z"]
    assert options.gin_bindings == ["A=1", "module.function.argument=a=b", "B=", "C=a\nb"]


def interrupted(code):
    error = Interruption("saved at step 3")
    error.exit_code = code
    return error


def as_gin_raises(error):
    """The error as it comes through two functions that gin configures."""

    @gin.configurable(f"inner_{id(error)}")
    def inner():
        raise error

    @gin.configurable(f"outer_{id(error)}")
    def outer():
        inner()

    with pytest.raises(type(error)) as caught:
        outer()
    return caught.value


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (UsageError("one\ntwo"), 2, "coda cache: one\ncoda cache: two\n"),
        (ValueError("x=3 must be 4"), 1, "coda cache: x=3 must be 4\n"),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "coda cache: 'a.txt': no such file\n"),
        (FileNotFoundError("there is no folder x"), 1, "coda cache: there is no folder x\n"),
        (FloatingPointError("step 3: NaN"), 1, "coda cache: step 3: NaN\n"),
        (MemoryError(), 1, "coda cache: out of memory\n"),
        (KeyboardInterrupt(), 130, "coda cache: interrupted\n"),
        (interrupted(143), 143, "coda cache: saved at step 3\n"),
        (interrupted(130), 130, "coda cache: saved at step 3\n"),
        (
            ModuleNotFoundError("soundfile is not installed; it comes with: pip install 'x'"),
            1,
            "coda cache: soundfile is not installed; it comes with: pip install 'x'\n",
        ),
        (as_gin_raises(ValueError("x=3 must be 4")), 1, "coda cache: x=3 must be 4\n"),
        (as_gin_raises(OSError(28, "No space", "f")), 1, "coda cache: 'f': no space\n"),
        (as_gin_raises(interrupted(143)), 143, "coda cache: saved at step 3\n"),
    ],
    ids=repr,
)
def test_a_mistake_is_told_without_a_traceback(error, code, printed, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "_call", fail)
    assert cli.main(["cache"]) == code
    assert capsys.readouterr().err == printed
    with pytest.raises(type(error)):
        cli.main(["cache", "--traceback"])


@pytest.mark.parametrize("error", [RuntimeError("x"), TypeError("y"), ModuleNotFoundError("z")])
def test_an_error_of_the_program_keeps_its_traceback(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "_call", fail)
    with pytest.raises(type(error)):
        cli.main(["cache"])


def test_a_value_error_of_jax_is_one_of_the_program():
    import jax.numpy as jnp

    with pytest.raises(ValueError) as caught:
        jnp.broadcast_to(jnp.ones(3), (2,))
    assert mistakes.told(caught.value) is None


def test_long_messages_are_cut_but_not_their_lists():
    lines = ["leaves differ:", *["  a/leaf"] * 30, "and so on", "third", "fourth", "x" * 9999]
    told = mistakes.told(ValueError("\n".join(lines))).splitlines()
    assert told[:31] == lines[:31] and told[-1].startswith("...") and len(told) == 33
    assert len(mistakes.told(ValueError("x" * 9999))) < 700
    told = mistakes.told(ValueError("\n".join([lines[0], *["  a/leaf"] * 99, "end"]))).splitlines()
    assert told[41:] == ["  ... and 59 more (--traceback shows all)", "end"]


FILES = ("runs/train.gin", "runs/predict.gin", "methods/coda.gin", "tasks/jsonl.gin", "x", "")
PIECES = [
    *COMMANDS,
    *["--help", "--verbose", "--gin_file", "--gin_search_paths=tests", "--gin.", "="],
    *[f"--gin_file={file}" for file in FILES],
    *["--gin.METHODS=('coda',)", "--gin.BATCH_SIZE=3", "--gin.MODEL_DIR=x", "--gin.A=%B"],
    *["--gin.Data.seed='", "--gin.a/b.c=@d"],
]
WORDS = st.lists(st.sampled_from(PIECES) | st.text(), max_size=6)


@settings(
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(command=st.sampled_from([*COMMANDS, ""]), words=WORDS)
@example(command="bench", words=[])
@example(command="train", words=["--gin_file=runs/train.gin\0"])
@example(command="predict", words=["--gin_file=" + "x" * 5000, "--gin.\ud800=3"])
def test_any_command_line_is_carried_out_or_refused_in_a_few_lines(command, words, capsys):
    """What it configures is not made, and nothing is run."""

    def load_flags(command, function=None):
        return load(command, function) if function else lambda *_: None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "load", load_flags)
        patch.setattr(configuration, "_parse", lambda *_: {})
        patch.setattr(configuration, "_check_reached", lambda *_: None)
        patch.setattr(gin, "get_configurable", lambda function: function)
        try:
            code = cli.main([command, *words] if command else words)
        except SystemExit as stop:
            code = stop.code
    printed = capsys.readouterr().err
    assert code in (0, 2)
    assert (code == 0) or "coda" in printed or not (command or words)
    assert len(printed.splitlines()) <= 5 + printed.count("\r") + printed.count("\x0b")


def process(folder, *arguments):
    """The program `coda` as an installation has it: a script in another folder."""
    script = folder / "bin" / "coda"
    script.parent.mkdir()
    script.write_text("import sys\nfrom coda_jax.cli import main\nsys.exit(main())\n")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    variables.pop("PYTHONWARNINGS", None)
    return subprocess.run(
        [sys.executable, script, *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
    )


def test_files_of_the_current_folder_run_no_code_and_nothing_is_logged(tmp_path):
    """Gin files, python modules and packages with the names of what is imported."""
    planted = "raise SystemExit('planted code ran')\n"
    for name in ("optax", "jax", "planted", "coda_jax/__init__"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(planted)
    for name in ("runs/check", "preset", "methods/coda", "methods/parallel_adapter"):
        for folder in ("", "coda_jax/gin_configs", "gin_configs"):
            file = tmp_path / folder / f"{name}.gin"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("import planted\n")
    (tmp_path / "own.gin").write_text("include 'coda_jax/gin_configs/runs/check.gin'\n")
    files = ["--gin_file=own.gin", "--gin_file=methods/coda.gin"]
    found = process(tmp_path, "check", *files, f"--gin.INITIAL_CHECKPOINT_PATH={GOLDEN}")
    assert found.returncode == 0, found.stderr
    assert "fits the model" in found.stdout and found.stderr == ""


def test_predicting_imports_nothing_that_it_does_not_need():
    code = "import sys\nimport coda_jax.commands.predict\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert not {"orbax", "tensorflow", "seqio", "clu", "matplotlib", "gin"} & loaded


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], []])
def test_a_reader_that_leaves_ends_a_command_quietly(arguments):
    """As in `coda --help | head -1`."""
    command = [sys.executable, "-m", "coda_jax.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        assert running.stderr.read() == b"" and running.wait() in (0, 1)  # 0: argparse saw it
