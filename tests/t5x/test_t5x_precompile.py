"""T5X's `precompile` with our network, without the package `t5`, of which it uses nothing."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

import coda_jax
from coda_jax.tasks import offline

# Not "t5x": this folder of tests would be found under that name.
models = pytest.importorskip(
    "t5x.models", reason="T5X is not installed: make test-t5x T5X_PATH=...", exc_type=ImportError
)

FILES = ["t5x/precompile.gin", "methods/coda.gin", "tasks/stdlib_module.gin"]


def test_a_training_step_is_compiled_and_written(tmp_path):
    package = tmp_path / "t5/data"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py", package / "mixtures.py"):
        file.touch()
    root = Path(coda_jax.__file__).parent.parent
    bindings = {
        "PRESET": "'t5_1_1_stdlib'",
        "VOCABULARY": f"'{Path(offline.VOCABULARY_FILE).parent}'",
        "MODEL_DIR": f"'{tmp_path / 'run'}'",
        "BATCH_SIZE": 8,
        "TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 16},
    }
    folders = [root, root / "coda_jax/gin_configs", Path(models.__file__).parent.parent]
    line = [sys.executable, "-m", "t5x.main", "--run_mode=precompile"]
    line += [f"--gin_search_paths={','.join(map(str, folders))}"]
    line += [f"--gin_file={name}" for name in FILES]
    line += [f"--gin.{name}={value}" for name, value in bindings.items()]
    paths = f"{tmp_path}:{os.environ['PYTHONPATH']}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": paths}
    result = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    program = (tmp_path / "run/lowered_hlo_post_optimization").read_bytes()
    assert b"router" in program and b"adapter" in program
