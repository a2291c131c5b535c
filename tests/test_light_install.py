"""Without TensorFlow and seqio: a fresh environment of requirements-light.txt runs the commands."""

import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import pytest

from coda_jax import bundled

pytestmark = pytest.mark.all  # it needs the network and minutes

ROOT = Path(__file__).parent.parent
STEPS = 24  # more than the 20 of warm-up
ABSENT = ("tensorflow", "seqio", "clu", "matplotlib", "PIL", "soundfile", "sklearn", "pytest")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment's folder."""
    folder = tmp_path_factory.mktemp("light") / "environment"
    sources = folder.parent / "sources"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info", "tests", "docs")
    shutil.copytree(ROOT, sources, symlinks=True, ignore=ignored)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "install", "--quiet"]
    subprocess.run([*pip, "--requirement", sources / "requirements-light.txt"], check=True)
    subprocess.run([*pip, "--no-deps", sources], check=True)
    return folder


def run(environment: Path, folder: Path, *arguments, check: bool = True):
    """Runs a program of the environment."""
    program, *arguments = map(str, arguments)
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "JAX", "XLA"))}
    result = subprocess.run(
        [environment / "bin" / program, *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 or not check, result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint and JSONL files."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(bundled.DENSE, folder / "base")
    pairs = [{"inputs": f"def f{i}(): return {i}", "targets": str(i)} for i in range(40)]
    for name in ("train", "validation"):
        lines = (json.dumps(pair) + "\n" for pair in pairs)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "questions.txt").write_text("def f(): return 1\ndef g(): return 2\n")
    return folder


@pytest.fixture(scope="module")
def trained(environment, folder):
    """The command of the README, with few and short examples."""
    run(
        environment, folder, "coda", "train", "--gin_file=runs/finetune.gin",
        "--gin_file=methods/coda.gin", "--gin_file=tasks/jsonl.gin",
        "--gin.INITIAL_CHECKPOINT_PATH='base'", "--gin.MODEL_DIR='my_run'",
        "--gin.TRAIN_FILE='train.jsonl'", "--gin.VALIDATION_FILE='validation.jsonl'",
        "--gin.REDUCTION=3", f"--gin.TRAIN_STEPS={STEPS}", "--gin.BATCH_SIZE=8",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8}",
    )  # fmt: skip
    return folder / "my_run"


MODEL = (
    "--gin.INITIAL_CHECKPOINT_PATH='base'",
    "--gin.INITIAL_ADAPTER_PATH='my_run/export/adapter'",
)


def test_neither_tensorflow_nor_any_other_optional_part_is_there(environment, folder):
    code = f"import importlib.util as u; print([n for n in {ABSENT!r} if u.find_spec(n)])"
    assert run(environment, folder, "python", "-c", code).stdout.strip() == "[]"


def test_it_trains_from_jsonl_files(trained):
    assert (trained / "export" / "adapter" / "adapter.safetensors").is_file()
    assert json.loads((trained / "metrics.json").read_text())["loss"] > 0


def test_it_predicts(environment, folder, trained):
    command = ("coda", "predict", "--gin_file=runs/predict.gin", *MODEL)
    files = ("--gin.INPUT='questions.txt'", "--gin.OUTPUT='answers.jsonl'")
    run(environment, folder, *command, *files)
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [answer["inputs"] for answer in answers] == ["def f(): return 1", "def g(): return 2"]
    assert all("prediction" in answer for answer in answers)


def test_it_exports_programs(environment, folder, trained):
    sizes = ("--gin.BATCH_SIZES=(1,)", "--gin.Decoding.max_input_length=32")
    command = ("coda", "export", "--gin_file=runs/export.gin", *MODEL, "--gin.OUTPUT='served'")
    run(environment, folder, *command, *sizes)
    assert list((folder / "served").glob("*.jax_export"))


def test_it_evaluates(environment, folder, trained):
    files = ("--gin_file=runs/evaluate.gin", "--gin_file=tasks/jsonl.gin")
    data = "--gin.VALIDATION_FILE='validation.jsonl'"
    result = run(environment, folder, "coda", "evaluate", *files, *MODEL, data)
    assert json.loads(result.stdout)["jsonl_validation"].keys() == {"accuracy"}


def test_what_a_task_of_seqio_lacks_is_said(environment, folder, trained):
    files = ("--gin_file=runs/evaluate.gin", "--gin_file=tasks/stdlib_module.gin")
    result = run(environment, folder, "coda", "evaluate", *files, *MODEL, check=False)
    assert result.returncode != 0
    assert "seqio is not installed; it comes with: pip install 'coda_jax'" in result.stderr
