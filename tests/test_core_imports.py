"""The core runs where neither TensorFlow nor seqio, gin or t5x is installed."""

import subprocess
import sys

CORE = [
    *["soft_topk", "routing", "layers", "adapters", "conditional", "network", "vision"],
    *["conformer", "speech", "decoding", "ctc", "models", "best_rq"],
    *["params", "checkpoints", "batches", "run_files", "training", "inference", "runs", "answers"],
    *["convert", "benchmark", "breakdown", "flops", "check", "bench", "plots"],
]


def test_the_core_imports_without_tensorflow_seqio_gin_and_t5x():
    code = "import sys\nfor name in ('tensorflow', 'seqio', 'gin', 't5x', 'torch'):\n"
    code += "    sys.modules[name] = None  # an import of it is an ImportError\n"
    code += "\n".join(f"import coda_jax.{name}" for name in [*CORE, "cli"])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_imports_go_one_way():
    """No core module imports one that stands after it in the list."""
    import ast
    import pathlib

    import coda_jax

    folder = pathlib.Path(coda_jax.__file__).parent
    order = {name: place for place, name in enumerate(CORE)}
    for name in CORE:
        files = [folder / f"{name}.py"] if name != "checkpoints" else (folder / name).glob("*.py")
        for file in files:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module == "coda_jax":
                    imported = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    "coda_jax."
                ):
                    imported = [node.module.split(".")[1]]
                else:
                    continue
                for other in imported:
                    assert order.get(other, -1) <= order[name], f"{file.name} imports {other}"
