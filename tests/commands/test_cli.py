"""The command table: help without jax, and what the command line refuses."""

import json
import subprocess
import sys

import pytest

import coda_jax
from coda_jax import cli
from coda_jax.commands import COMMANDS


def test_help_lists_all_commands_without_importing_jax():
    code = """
import json, sys
from coda_jax import cli
text = cli.parser().format_help()
print(json.dumps([text, sorted({name.split(".")[0] for name in sys.modules})]))
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    text, modules = json.loads(run.stdout)
    rows = [line.split(None, 1) for line in text.splitlines() if line.startswith("    ")]
    assert {name: summary for name, summary in rows if name in COMMANDS} == {
        name: command.summary for name, command in COMMANDS.items()
    }
    assert not {"jax", "flax", "gin", "tensorflow", "numpy"}.intersection(modules)


def test_every_command_has_a_file_of_its_name_with_a_function_of_its_name():
    for name, command in COMMANDS.items():
        assert (command.module, command.load().__name__) == (name, command.function) == (name, name)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_its_flags(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: coda {name} ")
    assert COMMANDS[name].summary in text
    for flag in ("--gin_file", "--gin_search_paths", "--gin.NAME=VALUE"):
        assert (flag in text) == COMMANDS[name].reads_gin
    assert ("--preset" in text) == (name == "bench")


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == coda_jax.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["fly"], "invalid choice: 'fly'"),
        (["--gin_file=x"], "the following arguments are required: command"),
        (["train", "--steps=3"], "unknown arguments: --steps=3"),
        (["train", "--gin.NO_SUCH_MACRO"], "unknown arguments: --gin.NO_SUCH_MACRO"),
        (["train", "--gin.=3"], "unknown arguments: --gin.=3"),
        (["train", "--gin_fil=x"], "unknown arguments: --gin_fil=x"),
        (["train", "extra", "--gin.A=1"], "unknown arguments: extra"),
        (["train", "--preset=t5_1_1_base"], "unknown arguments: --preset=t5_1_1_base"),
        (["bench", "--gin_file=x"], "unknown arguments: --gin_file=x"),
        (["bench", "--gin.A=1"], "unknown arguments: --gin.A=1"),
        (["bench", "--size=base"], "unknown arguments: --size=base"),
        (["bench", "--batch_size=many"], "invalid int value: 'many'"),
        (["bench", "--dtype=float64"], "invalid choice: 'float64'"),
        (["bench", "--preset=t5_1_1_bass"], "did you mean one of ['t5_1_1_base', "),
        (["bench", "--preset=mt5_base", "--checkpoint=x"], "not allowed with"),
    ],
)
def test_a_wrong_command_line_is_explained_and_exits_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("usage: coda") and message in printed


def test_files_search_paths_and_bindings_are_collected_in_their_order():
    options, bindings = cli.parse_arguments(
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
        ]
    )
    assert options.command == "train"
    assert options.gin_file == ["a.gin", "b.gin"]
    assert options.gin_search_paths == ["/x", "/y", "/z"]
    assert bindings == ["A=1", "module.function.argument=a=b", "B="]


def test_a_run_that_was_interrupted_exits_as_after_sigterm(monkeypatch, capsys):
    import gin

    from coda_jax.training.run_directory import Interruption

    def stopped():
        raise Interruption("saved at step 3")

    monkeypatch.setattr(gin, "get_configurable", lambda _: stopped)
    assert cli.main(["cache"]) == 143
    assert capsys.readouterr().err == "saved at step 3\n"
