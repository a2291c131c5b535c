"""setup.py names what the modules import; where an optional part is missing, an error says so."""

import ast
import importlib.metadata
from pathlib import Path
import re
import runpy
import subprocess
import sys

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
FILES = [*(ROOT / "coda_jax").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]
# T5X is on no registry; the others are copied to where coda_jax is not, and say what they need.
OTHERS = ("t5x_models.py", "load.py", "served.py")


def distribution(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def requirements():
    """The distributions that setup.py names: "light", "base" and the name of each extra."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        light = runpy.run_path(str(ROOT / "setup.py"))["requirements"]("requirements-light.txt")
    listed = {"light": light, "base": given["install_requires"], **given["extras_require"]}
    return {name: set(map(distribution, lines)) for name, lines in listed.items()}


def imports(node: ast.AST, within: str = "light"):
    """(module, where it has to come from) of each import of other packages.

    That is the argument of `needs`, the base for none, and "light" for an import outside of it.
    """
    for child in ast.iter_child_nodes(node):
        here = within
        if isinstance(child, ast.With):
            call = child.items[0].context_expr
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "needs":
                here = call.args[0].value if call.args else "base"
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        elif isinstance(child, ast.Import):
            yield from ((alias.name, here) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module, here
        yield from imports(child, here)


def test_every_import_is_of_a_requirement_and_those_of_extras_name_the_extra(requirements):
    distributions = importlib.metadata.packages_distributions()
    wrong = []
    for file in FILES:
        if file.name in OTHERS:
            continue
        for module, where in imports(ast.parse(file.read_text())):
            top = module.split(".")[0]
            if top == "coda_jax" or top in sys.stdlib_module_names:
                continue
            if file.is_relative_to(ROOT / "tasks") and where == "light":
                where = "base"  # without which `coda_jax.tasks` cannot be imported
            found = distributions.get(top, [top])  # libtpu is not installed everywhere
            if not {distribution(d) for d in found} & requirements[where]:
                wrong.append(f"{file.relative_to(ROOT)}: {module} is not in {where}")
    assert not wrong, "\n".join(wrong)


def test_the_extra_all_has_what_the_extras_but_those_of_devices_and_tests_have(requirements):
    names = ("speech", "images", "serve", "t5x")
    assert requirements["all"] == set.union(*(requirements[name] for name in names))
    assert requirements["cuda"] == {"jax"} and requirements["tpu"] == {"jax", "libtpu"}
    assert requirements["light"] < requirements["base"]


# (what is missing, what is done, what the error says), in an order in which no module has been
# imported by an earlier line.
MISSING = [
    ("gin", "cli.run(['check', '--gin_file=runs/check.gin'])", "coda_jax"),
    ("seqio", "from coda_jax.data import seqio_tasks", "coda_jax"),
    ("seqio", "from coda_jax.tasks import language", "coda_jax"),
    ("PIL", "from coda_jax.data import images", "coda_jax[images]"),
    ("matplotlib", "from coda_jax.profiling import plots", "coda_jax[images]"),
    ("prometheus_client", "from coda_jax.serving import metrics", "coda_jax[serve]"),
    ("soundfile", "audio.read_audio('recording.wav')", "coda_jax[speech]"),
    ("tensorflow", "audio.frames([0.0])", "coda_jax"),
]


ATTEMPT = """
import sys
from coda_jax import cli
from coda_jax.data import audio

for name, statement, package in MISSING:
    modules = dict(sys.modules)
    sys.modules[name] = None  # an import of it fails
    try:
        exec(statement)
    except ImportError as error:
        expected = f"{name} is not installed; it comes with: pip install '{package}'"
        assert str(error) == expected, error
    else:
        raise AssertionError(f"{statement} works without {name}")
    sys.modules.clear()
    sys.modules.update(modules)
"""


def test_what_is_missing_is_named_with_how_to_get_it():
    code = f"MISSING = {MISSING!r}\n{ATTEMPT}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_import_of_the_package_that_fails_is_not_taken_for_a_missing_part():
    from coda_jax.optional import needs

    with (
        pytest.raises(ModuleNotFoundError, match=r"^No module named 'coda_jax\.no"),
        needs("speech"),
    ):
        import coda_jax.nowhere  # noqa: F401
