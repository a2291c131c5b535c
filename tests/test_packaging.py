"""What is packed, and what works in each way of installing it; sources are a copy of the clone."""

from pathlib import Path
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {"coda_jax": "coda_jax", "tasks": "coda_jax/tasks", "gin_configs": "coda_jax/gin_configs"}
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "requirements-light.txt", "README.md")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
OFFLINE = ("--no-build-isolation", "--no-deps", "--no-index")
MAX_WHEEL = 1.5e6  # bytes

# Run in each installation, with its folder first in the path or as the current directory.
USE = """
import importlib
import types

# Neither is needed to find modules and files, and both take seconds.
sys.modules |= {"seqio": types.ModuleType("seqio"), "tensorflow": None}
import coda_jax
from coda_jax import bundled, cli
from coda_jax.tasks import cider

for name in ("coda_jax.coda_jax", "coda_jax.tests", "coda_jax.setup"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} can be imported")

bindings = ["PRESET=t5_1_1_small", "INITIAL_CHECKPOINT_PATH=None"]
cli.configure(["runs/check.gin", "methods/coda.gin"], [], bindings)
from gin import resource_reader
for file in GIN_FILES:
    assert resource_reader.system_path_file_exists(f"coda_jax/gin_configs/{file}"), file
assert (bundled.VOCABULARY / "spiece.model").is_file()
try:
    print("has checkpoints", bundled.DENSE)
except FileNotFoundError as error:
    print(error)
print(coda_jax.__file__, cider.__file__)
"""


def gin_files() -> list[str]:
    folder = ROOT / "gin_configs"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.gin"))


def build(hook: str, sources: Path, folder: Path) -> Path:
    """A wheel, a source distribution or an editable wheel, as pip has setuptools build it."""
    folder.mkdir()
    code = f"import setuptools.build_meta as b; b.build_{hook}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=sources, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


def installed(wheel: Path, folder: Path) -> Path:
    """The folder, with the wheel's modules."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def use(installation: Path, folder: Path) -> str:
    """What USE prints, where the modules of the clone's own installation are not to be found.

    Args:
        installation: a folder of modules.
        folder: the current directory. If it is the installation, nothing else leads to the modules.
    """
    libraries, place = sysconfig.get_path("purelib"), str(installation)
    start = f"import site, sys\nsys.path.append({libraries!r})\n"  # its .pth files are not read
    if folder != installation:
        start += f"sys.path.insert(1, {place!r})\nsite.addsitedir({place!r})\n"
    code = f"{start}GIN_FILES = {gin_files()!r}\n{USE}"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def names(wheel: Path) -> set[str]:
    listed = zipfile.ZipFile(wheel).namelist()
    return {name for name in listed if not name.split("/")[0].endswith(".dist-info")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A clone: what git has, links as links; and a module that an earlier build has left."""
    copy = tmp_path_factory.mktemp("clone") / "coda"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    for file in (*FILES, "LICENSE"):
        shutil.copy(ROOT / file, copy)
    earlier = copy / "build" / "lib" / "coda_jax"
    earlier.mkdir(parents=True)
    (earlier / "removed.py").touch()
    return copy


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    return build("wheel", sources, tmp_path_factory.mktemp("built") / "wheel")


@pytest.fixture(scope="module")
def unpacked(sources, tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("unpacked")
    archive = build("sdist", sources, folder / "sdist")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_links_lead_to_the_folders_beside_the_package():
    for folder in ("tasks", "gin_configs"):
        link = ROOT / "coda_jax" / folder
        assert str(link.readlink()) == f"../{folder}"
        assert link.resolve() == ROOT / folder


def test_a_wheel_has_all_modules_gin_files_and_pages_and_one_vocabulary(wheel):
    expected = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for folder, package in SOURCES.items()
        for ending in ("py", "gin", "html")
        for path in (ROOT / folder).rglob(f"*.{ending}")
    }
    assert names(wheel) == expected | {"coda_jax/bundled/stdlib_vocabulary/spiece.model"}
    assert wheel.stat().st_size < MAX_WHEEL


@pytest.mark.all
def test_a_source_distribution_makes_the_same_wheel_which_works(wheel, unpacked, tmp_path):
    again = build("wheel", unpacked, tmp_path / "wheel")
    assert names(again) == names(wheel)
    assert f"{tmp_path}/modules/" in use(installed(again, tmp_path / "modules"), tmp_path)


def test_a_clone_works_without_installation(sources):
    assert "has checkpoints" in use(sources, sources)


def test_an_editable_installation_works_and_has_the_checkpoints(sources, tmp_path):
    package = build("editable", sources, tmp_path / "editable")
    output = use(installed(package, tmp_path / "modules"), tmp_path)
    assert f"has checkpoints {sources}" in output
    assert f"{sources}/coda_jax/tasks/cider.py" in output


def test_a_wheel_works_and_says_where_the_checkpoints_are(wheel, tmp_path):
    output = use(installed(wheel, tmp_path / "modules"), tmp_path)
    assert "a clone of the repository has them" in output
    assert f"{tmp_path}/modules/coda_jax/tasks/cider.py" in output


@pytest.mark.all
def test_pip_installs_from_a_folder_with_the_command(sources, tmp_path):
    modules = tmp_path / "modules"
    subprocess.run([*PIP, "install", *OFFLINE, "--target", modules, sources], check=True)
    assert f"{modules}/coda_jax/__init__.py" in use(modules, tmp_path)
    assert (modules / "bin" / "coda").is_file()


def test_every_folder_of_gin_files_is_a_package_so_that_gin_includes_from_it():
    folders = {path.parent for path in (ROOT / "gin_configs").rglob("*.gin")}
    assert all((folder / "__init__.py").is_file() for folder in folders)
