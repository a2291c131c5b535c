"""The house rules: small files and functions, imports that go one way, names that stay at home.

What a family or a method is called is known in its folder only, so that another one is a folder, or
a file, and a line in the table.
"""

import ast
import pathlib
import re

import pytest

from coda_jax.commands import COMMANDS
from coda_jax.methods import METHODS
from coda_jax.models import CONFIGS, FAMILIES, presets

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "coda_jax"
# From the outermost to the innermost: each imports from its own row and those behind it only.
ORDER = [
    *["cli", "t5x_models", "commands", "ood", "serving"],
    *["inference", "adapters", "training", "checkpoints", "profiling"],
    *[
        "objectives",
        "models",
        "methods",
        "data",
        "nn",
        "processes",
        "sharding",
        "trees",
        "hub",
        "checks",
        "files",
        "optional",
    ],
    *["gin_configs", "bundled"],
]
OUTSIDE = ("tasks",)  # may import all of these
MAX_LINES, MAX_FUNCTION_LINES = 400, 60


def files(*folders):
    """{name such as "coda_jax/nn/layers.py": (path, syntax tree)} of the folders' files."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text()) for p in paths}


SOURCES = files("coda_jax")  # `tasks` and `gin_configs` in it are links, which are not followed
TASKS = files("tasks")


def test_every_module_has_a_place_in_the_order():
    rows = {pathlib.Path(name).parts[1].removesuffix(".py") for name in SOURCES}
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert (rows | folders) - {"__init__"} == {*ORDER, *OUTSIDE}


def test_the_init_of_a_folder_is_its_table_of_contents():
    missing = []
    for folder in (row for row in ORDER if f"coda_jax/{row}/__init__.py" in SOURCES):
        contents = ast.get_docstring(SOURCES[f"coda_jax/{folder}/__init__.py"]) or ""
        listed = {*COMMANDS} if folder == "commands" else set()
        names = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__", *listed}
        missing += [f"{folder}: {name}" for name in sorted(names) if f"`{name}`" not in contents]
    assert not missing, "\n".join(missing)


def test_no_file_is_longer_than_400_lines():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in SOURCES | TASKS}
    long = [f"{name}: {count} lines" for name, count in lines.items() if count > MAX_LINES]
    assert not long, "\n".join(long)


def test_no_function_is_longer_than_60_lines():
    long = [
        f"{name}:{node.lineno} {node.name}: {size} lines"
        for name, tree in (SOURCES | TASKS).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def imported(tree):
    """(line, dotted name) of everything of this package that a module imports or reaches."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            if (node.module or "").split(".")[0] == "coda_jax":
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("coda_jax."):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "coda_jax":
            yield node.lineno, f"coda_jax.{node.attr}"


def test_imports_go_one_way():
    """Where a module is imported inside a function, too."""
    wrong = []
    for name, tree in SOURCES.items():
        home = pathlib.Path(name).parts[1].removesuffix(".py")
        for line, target in imported(tree):
            row = target.split(".")[1]
            if row == "__version__":
                continue
            if row not in ORDER[ORDER.index(home) :]:
                wrong.append(f"{name}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


FAMILY_WORDS = {
    *FAMILIES,
    *CONFIGS,
    *presets(),
    *(path.parent.name for path in (PACKAGE / "models").glob("*/__init__.py")),
}
METHOD_WORDS = {*METHODS, *(method.__name__ for method in METHODS.values())}
# Of certain models, by their nature, or with words of others: "full" is also a policy of T5X.
NAMING = ("tasks/experiments.py", "coda_jax/nn/remat.py")


def said(tree):
    """(line, word) of every identifier, part of an import and text of a module, but its prose.

    Prose is docstrings, and what `argparse` prints. Functions of numpy, such as `np.full`, are
    called what they are.
    """
    prose = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(node.value)
        elif isinstance(node, ast.keyword) and node.arg in ("help", "description", "prog"):
            prose |= set(ast.walk(node.value))
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield line, node.value
        elif isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") not in ("np", "jnp"):
            yield line, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((line, part) for part in (node.module or "").split("."))
        elif isinstance(node, ast.alias):
            yield from ((line, part) for part in (*node.name.split("."), node.asname or ""))
        elif isinstance(node, ast.arg | ast.keyword):
            yield line, node.arg or ""
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield line, node.name


@pytest.mark.parametrize(
    "code",
    [
        "x = {'coda': 1}",
        "from coda_jax.methods.coda import unrouted",
        "from coda_jax.methods import coda as c",
        "methods.coda.unrouted",
        "f(coda=1)",
        "def f(coda): pass",
        "class coda: pass",
    ],
)
def test_a_name_is_seen_wherever_it_stands(code):
    assert "coda" in {word for _, word in said(ast.parse(code))}


def test_prose_names_what_it_likes():
    code = "def f():\n    \"coda\"\nadd('--x', help='coda')\nnp.coda(1)"
    assert "coda" not in {word for _, word in said(ast.parse(code))}


@pytest.mark.parametrize(
    "words, home", [(FAMILY_WORDS, "coda_jax/models/"), (METHOD_WORDS, "coda_jax/methods/")]
)
def test_only_its_own_folder_names_a_family_or_a_method(words, home):
    """Not even as a text."""
    named = [
        f"{name}:{line} {word}"
        for name, tree in (SOURCES | TASKS).items()
        if not name.startswith((home, *NAMING))
        for line, word in said(tree)
        if word in words
    ]
    assert not named, "\n".join(named)


def opens_text(call):
    """Whether a call opens a file as text without saying in which encoding."""
    called = ast.unparse(call.func)
    words = [x.value for x in (*call.args, *call.keywords) if isinstance(x, ast.Constant)]
    binary = called == "open" and any(str(word).endswith("b") for word in words)
    opens = called == "open" or called.endswith((".read_text", ".write_text"))
    said = binary or any(keyword.arg == "encoding" for keyword in call.keywords)
    return opens and not said and called != "files.write_text"


def test_texts_are_read_and_written_in_utf_8_wherever_it_runs():
    setup = {"setup.py": ast.parse((ROOT / "setup.py").read_text())}
    silent = [
        f"{name}:{node.lineno}"
        for name, tree in (SOURCES | TASKS | setup).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and opens_text(node)
    ]
    assert not silent, "\n".join(silent)


def test_nothing_asks_for_the_class_of_a_config():
    """What differs from family to family, its config or its `Family` says."""
    asked = [
        f"{name}:{number}"
        for name in SOURCES
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1)
        if re.search(r"isinstance\(.*[Cc]onfig", line)
    ]
    assert not asked, "\n".join(asked)
