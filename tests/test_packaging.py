"""What an installed package holds: the wheel is built from a copy of the sources."""

from pathlib import Path
import shutil
import subprocess
import sys
import zipfile

ROOT = Path(__file__).parent.parent
SOURCES = {"coda_jax": "coda_jax", "tasks": "coda_jax/tasks", "gin_configs": "coda_jax/gin_configs"}


def test_the_wheel_has_all_modules_gin_files_and_bundled_checkpoints(tmp_path):
    copy = tmp_path / "sources"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", tmp_path, copy], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = {
        name
        for name in zipfile.ZipFile(wheel).namelist()
        if not name.split("/")[0].endswith("info")
    }
    expected = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for folder, package in SOURCES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == expected
    assert "coda_jax/bundled/stdlib_t5_coda/adapter/adapter.safetensors" in packed
