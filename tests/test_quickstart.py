"""What people start with: the README's five commands, the script to copy, and the notebook."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import gin
import pytest

from coda_jax import bundled, cli
from coda_jax.commands import configuration

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "my_task.sh"
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
COMMANDS = ("train", "evaluate", "predict", "compare", "export")
PATH = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])


def of_readme(command):
    """The arguments of a command of the README's section on own data."""
    text = (ROOT / "README.md").read_text()
    text = text[text.index("## With your own") : text.index("## In Python")]
    lines = re.search(rf"^    coda {command} ((?:.*\\\n)*.*)", text, re.MULTILINE)[1]
    return shlex.split(lines.replace("\\\n", " "))


def of_script(command, folder, *more):
    """The arguments that the script gives a program in the place of `coda`."""
    program = folder / "coda"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    called = ["sh", SCRIPT, command, *more]
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    found = subprocess.run(called, env={"PATH": path}, check=True, capture_output=True, text=True)
    name, *arguments = found.stdout.splitlines()
    assert name == command
    return arguments


@pytest.mark.parametrize("command", COMMANDS)
def test_the_script_has_the_readmes_commands_which_are_accepted(command, tmp_path, monkeypatch):
    """But for files and folders, which are not there."""
    found = of_script(command, tmp_path)
    assert sorted(found) == sorted(of_readme(command))
    assert of_script(command, tmp_path, "--gin.A=a b") == [*found, "--gin.A=a b"]
    monkeypatch.setattr(configuration, "_parse", lambda *_: {})
    monkeypatch.setattr(configuration, "_check_reached", lambda *_: None)
    monkeypatch.setattr(gin, "get_configurable", lambda _: lambda *_: None)
    assert cli.main([command, *found]) == 0


@pytest.mark.parametrize("arguments", [[], ["trian"]])
def test_the_script_says_what_it_can_do(arguments):
    found = subprocess.run(["sh", SCRIPT, *arguments], capture_output=True, text=True)
    assert found.returncode == 2 and "train|evaluate|predict|compare|export" in found.stderr


@pytest.mark.all
def test_the_script_runs_from_training_to_a_served_folder(tmp_path):
    """With another checkpoint, a path with a space, and quicker settings."""
    text = SCRIPT.read_text().replace("flan-t5-base", str(bundled.DENSE))
    text = text.replace("=train.jsonl", "='my train.jsonl'").replace("steps=1000", "steps=4")
    (tmp_path / "my_task.sh").write_text(text)
    pairs = [{"inputs": f"def f{i}(): return {i}", "targets": str(i)} for i in range(12)]
    for name in ("my train", "validation"):
        lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "questions.txt").write_text("def f(): return 1\n")
    small = ["--gin.BATCH_SIZE=4"]
    more = {
        "compare": ["--gin.SEEDS=(0,)", "--gin.TIMED=()", "--gin.TRAIN_STEPS=4", *small],
        "export": ["--gin.Decoding.max_input_length=32", *small],
        "train": small,
    }
    variables = {**os.environ, "PATH": PATH, "PYTHONPATH": str(ROOT)}
    for command in COMMANDS:
        called = ["sh", "my_task.sh", command, *more.get(command, ())]
        subprocess.run(called, cwd=tmp_path, env=variables, check=True)
    assert json.loads((tmp_path / "answers.jsonl").read_text())["inputs"] == "def f(): return 1"
    assert (tmp_path / "compared" / "report.html").is_file()
    assert (tmp_path / "served" / "load.py").is_file()


def cells():
    """(whether it is code, source) of the notebook's cells."""
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [(cell["cell_type"] == "code", "".join(cell["source"])) for cell in found["cells"]]


def test_the_notebook_is_one_without_outputs_and_its_cells_are_python_or_a_command():
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])
    for cell in found["cells"]:
        assert cell.keys() >= {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    commands = []
    for is_code, source in cells():
        if source.startswith("!"):
            commands.append(shlex.split(source[1:].replace("\\\n", " "))[:2])
        elif is_code:
            compile(source, "a cell", "exec")
        for name in re.findall(r"\]\(([\w.]+)\)", "" if is_code else source):
            assert (NOTEBOOK.parent / name).is_file()
    assert commands == [
        *(["coda", name] for name in ("train", "evaluate", "predict", "export")),
        ["python", "served/load.py"],
    ]


RUN = """
import json, subprocess, sys
names = {"__name__": "__main__"}
for code, source in json.load(sys.stdin):
    if source.startswith("!"):
        subprocess.run(source[1:], shell=True, check=True)
    elif code:
        exec(compile(source, "a cell", "exec"), names)
"""


@pytest.mark.all
def test_the_notebook_runs(tmp_path):
    """A module that can be imported is not installed."""
    found = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(cells()),
        cwd=tmp_path,
        env={**os.environ, "PATH": PATH, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert not (tmp_path / "coda_jax_clone").exists()
    (metrics,) = re.findall(r'"accuracy": ([\d.]+)', found.stdout)
    assert float(metrics) > 40  # of seven modules, the largest of which has a quarter of all
    *predicted, first, second = re.findall(r'{"inputs": .*"prediction": .*}', found.stdout)
    assert predicted == [first, second]
    assert json.loads(first)["prediction"] in re.search("answer: (.*)", found.stdout)[1]
    layers = re.findall(r"^layer \d: (.*)$", found.stdout, re.MULTILINE)
    assert len(layers) == 4
