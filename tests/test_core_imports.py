"""What is imported when: the core without TensorFlow, seqio, gin and t5x, the rest on first use."""

import pathlib
import subprocess
import sys

import pytest

import coda_jax

FOLDER = pathlib.Path(coda_jax.__file__).parent
HEAVY = ("tensorflow", "seqio", "gin", "t5x", "torch")
# What is built on them. `tasks` and `gin_configs` are links, which are not followed.
NEED_THEM = ("data/seqio_", "t5x_models.py")


def core_modules():
    """Names of all other modules of the package."""
    for path in sorted(FOLDER.rglob("*.py")):
        file = path.relative_to(FOLDER)
        if not file.as_posix().startswith(NEED_THEM):
            parts = file.with_suffix("").parts
            yield ".".join(("coda_jax", *parts[: -1 if parts[-1] == "__init__" else None]))


def run(code, *flags):
    """Runs the code in a new interpreter and returns what it printed."""
    result = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_core_imports_without_tensorflow_seqio_gin_and_t5x():
    names = list(core_modules())
    assert {"coda_jax.cli", "coda_jax.methods.coda", "coda_jax.models.t5.network"} < set(names)
    code = f"import sys\nfor name in {HEAVY}:\n"
    code += "    sys.modules[name] = None  # an import of it is an ImportError\n"
    run(code + "\n".join(f"import {name}" for name in names))


def test_the_package_itself_imports_neither_jax_nor_numpy():
    """So that it takes no time, and what a program does not use is never loaded."""
    loaded = run("import sys, coda_jax; print(*sys.modules)").split()
    assert "coda_jax" in loaded
    assert not {"jax", "flax", "numpy"} & {name.split(".")[0] for name in loaded}
    assert [name for name in loaded if name.startswith("coda_jax.")] == []


def test_every_public_name_is_there_and_listed_and_explained():
    """In a new interpreter, where nothing has been used yet."""
    code = """
import pydoc, coda_jax
listed = dir(coda_jax)
assert set(coda_jax.__all__) <= set(listed), listed
for name in coda_jax.__all__:
    assert getattr(coda_jax, name).__doc__ or isinstance(getattr(coda_jax, name), dict), name
text = pydoc.render_doc(coda_jax)
assert "Coda" in text and "load_hf" in text
from coda_jax import *
print(swap_in.__name__, len(coda_jax.__all__))
"""
    name, count = run(code).split()
    assert name == "swap_in" and 20 <= int(count) <= 40


def test_public_names_are_the_objects_that_the_packages_have():
    from coda_jax import checkpoints, inference, methods, models, objectives
    from coda_jax.methods.soft_topk import soft_topk

    assert coda_jax.soft_topk is soft_topk
    for module in (checkpoints, inference, methods, models, objectives):
        for name in coda_jax.__all__:
            if hasattr(module, name) and name != "soft_topk":
                assert getattr(coda_jax, name) is getattr(module, name), name
    for table in (methods.METHODS.values(), models.CONFIGS.values()):
        assert all(getattr(coda_jax, one.__name__) is one for one in table)


def test_a_name_that_is_not_there_is_an_attribute_error():
    for name in ("Codax", "load_hff", "_missing"):
        with pytest.raises(AttributeError, match=f"'coda_jax' has no attribute '{name}'"):
            getattr(coda_jax, name)
    with pytest.raises(ImportError):
        from coda_jax import load_hff  # noqa: F401


@pytest.mark.parametrize("name", ["coda_jax", "tests", "setup", "docs"])
def test_the_folder_above_is_not_part_of_the_package(name):
    """A second copy of every class, under `coda_jax.coda_jax`, would not equal the first."""
    with pytest.raises(ImportError):
        __import__(f"coda_jax.{name}")
