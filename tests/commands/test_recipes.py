"""Methods on the command line: one recipe at most, METHODS over it, and every field of a method."""

import dataclasses
import re

import gin
import pytest

from coda_jax import cli
from coda_jax.commands import loading
from coda_jax.commands.gin_files import package_folder
from coda_jax.methods import METHODS, Coda, Full, Method, ParallelAdapter

RUN = ["runs/check.gin"]
OWN = "include 'coda_jax/gin_configs/methods/coda_sigmoid.gin'\n"


def methods_of(files, *bindings, search_paths=()):
    """The methods that gin files and bindings give `coda check`."""
    bindings = ["INITIAL_CHECKPOINT_PATH=unused", *bindings]
    cli.configure([*RUN, *files], [str(path) for path in search_paths], bindings)
    return gin.get_configurable(loading.configured_methods)()


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["methods/coda.gin", "methods/full.gin"], ["coda", "full"]),
        (["coda_jax/gin_configs/methods/full.gin", "methods/coda.gin"], ["full", "coda"]),
        (["methods/coda_sigmoid.gin", "methods/coda.gin"], ["coda_sigmoid", "coda"]),
        (["{folder}/own.gin", "methods/full.gin"], ["coda_sigmoid", "full"]),
        (["own.gin", "methods/full.gin"], ["coda_sigmoid", "full"]),
        (["{folder}/outer.gin", "methods/full.gin"], ["coda_sigmoid", "full"]),
        (["{package}/methods/full.gin", "methods/coda.gin"], ["full", "coda"]),
    ],
)
def test_two_recipes_in_one_command_are_refused(files, found, tmp_path):
    """Also where a file includes one, of the package or one's own, found by path or by search."""
    (tmp_path / "own.gin").write_text(OWN)
    (tmp_path / "outer.gin").write_text("include 'own.gin'\n")
    places = {"folder": tmp_path, "package": package_folder().resolve()}
    files = [file.format(**places) for file in files]
    named = [f"methods/{name}.gin" for name in found]
    with pytest.raises(ValueError, match=re.escape(f"two recipes in one command: {named}; give")):
        methods_of(files, search_paths=[tmp_path])


def test_a_recipe_beside_a_run_that_brings_one_is_refused():
    with pytest.raises(ValueError, match=r"two recipes in one command: .*full\.gin.*coda\.gin"):
        cli.configure(["runs/pretrain_stdlib.gin", "methods/coda.gin"], [], [])


@pytest.mark.parametrize("files", [["methods/coda_sigmoid.gin"] * 2, ["own.gin"], ["outer.gin"]])
def test_a_recipe_is_one_with_those_that_it_includes(files, tmp_path):
    (tmp_path / "own.gin").write_text(OWN)
    (tmp_path / "outer.gin").write_text("include 'own.gin'\n")
    found = methods_of(files, search_paths=[tmp_path])
    assert found == (Coda(routing="sigmoid"), ParallelAdapter())


@pytest.mark.parametrize(
    ("files", "methods", "expected"),
    [
        (["methods/coda.gin"], "('coda', 'full')", (Coda(), Full())),
        (["methods/coda_sigmoid.gin"], "('coda',)", (Coda(routing="sigmoid"),)),
        (["methods/full.gin"], "('parallel_adapter',)", (ParallelAdapter(),)),
        ([], "('full', 'coda')", (Coda(), Full())),  # in the order of METHODS
        ([], "['parallel_adapter', 'coda']", (Coda(), ParallelAdapter())),
        ([], "()", ()),
    ],
)
def test_methods_combine_freely_over_a_recipe_and_without_one(files, methods, expected):
    assert methods_of(files, f"METHODS={methods}") == expected


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("('coda', 'lora2')", f"method 'lora2' is unknown; it must be one of {[*METHODS]}"),
        ("('coda', 'coda')", "methods must be of different kinds, got two of ['coda']"),
        ("coda", "METHODS='coda' must be a tuple of names, such as ('coda',)"),
    ],
)
def test_methods_that_are_no_methods_are_explained(methods, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        methods_of(["methods/coda.gin"], f"METHODS={methods}")


FIELDS = [
    (method, field)
    for method in METHODS.values()
    for field in dataclasses.fields(method)
    if field.default is not dataclasses.MISSING
]


@pytest.mark.parametrize(("method", "field"), FIELDS, ids=lambda x: getattr(x, "__name__", x.name))
def test_every_field_of_every_method_can_be_bound_without_a_recipe(method, field):
    name = f"{method.__name__}.{field.name}"
    made = methods_of([], f"METHODS=({method.name!r},)", f"{name}={field.default!r}")
    assert made == (method(),)
    assert gin.query_parameter(name) == field.default


@pytest.mark.parametrize(
    ("files", "bindings", "expected"),
    [
        (["methods/coda.gin"], ["ParallelAdapter.bottleneck=8"], (Coda(), ParallelAdapter(8))),
        (
            ["methods/full.gin"],  # which does not mention it
            ["ParallelAdapter.bottleneck=8", "METHODS=('full', 'parallel_adapter')"],
            (ParallelAdapter(8), Full()),
        ),
        (["methods/full.gin"], ["ParallelAdapter.bottleneck=8"], (Full(),)),
        (
            ["methods/parallel_adapter.gin"],
            ["methods.ParallelAdapter.activation=gelu"],
            (ParallelAdapter(activation="gelu"),),
        ),
        (["methods/coda.gin"], ["REDUCTION=(5, 4.5)"], (Coda((5, 4.5)), ParallelAdapter())),
        (
            ["methods/coda.gin"],
            ["Coda.num_iterations=3", "Coda.solver=iterative"],
            (Coda(solver="iterative", num_iterations=3), ParallelAdapter()),
        ),
    ],
)
def test_fields_of_any_method_are_bound_whatever_the_recipe_mentions(files, bindings, expected):
    assert methods_of(files, *bindings) == expected


def test_a_gin_file_may_name_a_method_by_its_own_module(tmp_path):
    (tmp_path / "own.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from coda_jax.methods import coda\n"
        "coda.Coda.reduction = 7\n"
        "METHODS = ('coda',)\n"
    )
    assert methods_of([str(tmp_path / "own.gin")]) == (Coda(7),)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("REDUCTION=0.5", "Coda.reduction must be a number from 1 to 1000000, got 0.5"),
        ("ParallelAdapter.bottleneck=0", "bottleneck must be a whole number of at least 1, got 0"),
        ("ParallelAdapter.botleneck=8", "botleneck"),
        ("load_model.checkpoit=x", "load_model"),
        ("no_such_function.x=1", "no_such_function"),
    ],
)
def test_names_and_values_that_do_not_exist_are_named(binding, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        methods_of(["methods/coda.gin"], binding)


@dataclasses.dataclass(frozen=True)
class Unmentioned(Method):
    """A method that gin has never heard of, as all are under T5X without a recipe."""

    name = "unmentioned"
    size: int = 3


def test_a_method_that_gin_does_not_know_has_its_defaults(monkeypatch):
    monkeypatch.setitem(METHODS, "unmentioned", Unmentioned)
    assert loading.configured_methods(("unmentioned",)) == (Unmentioned(3),)
