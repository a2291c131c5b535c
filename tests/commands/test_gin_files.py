"""Gin files as text: where a name leads, in which order files are read, what cannot be read."""

import itertools
import pathlib
import re

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
import pytest

from coda_jax.commands import gin_files
from coda_jax.commands.configuration import configure
from coda_jax.commands.gin_files import PACKAGE, UsageError, find, in_order, package_folder, read
from coda_jax.commands.gin_macros import check_values

OWN = package_folder()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, and what writes gin files in it."""
    monkeypatch.chdir(tmp_path)

    def write(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.gin").write_text(text)

    write.folder = tmp_path
    return write


def plant(folder):
    """Files with the names of the package's, in a folder."""
    for name in ("runs/check.gin", "preset.gin"):
        for start in ("", PACKAGE):
            file = pathlib.Path(folder, start + name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("PLANTED = 1\n")


@pytest.mark.parametrize("name", ["runs/check.gin", f"{PACKAGE}runs/check.gin"])
def test_a_name_of_the_package_is_its_own_file(name, here):
    plant(".")
    assert find(name).samefile(OWN / "runs/check.gin")
    here(own=f"include '{name}'\ninclude 'preset.gin'\n")
    assert [file.path.resolve() for file in read("own.gin").members()][:-1] == [
        (OWN / file).resolve() for file in ("preset.gin", "runs/check.gin", "preset.gin")
    ]


@pytest.mark.parametrize("name", ["./runs/check.gin", "{folder}/runs/check.gin", "runs/../own.gin"])
def test_a_path_is_that_file(name, here):
    plant(".")
    here(own="A = 1\n")
    (file,) = read(name.format(folder=here.folder)).members()
    assert file.kind is None and file.path.resolve().is_relative_to(here.folder)


def test_a_search_path_goes_before_the_package_but_not_for_its_own_includes(here):
    plant("search")
    assert find("runs/check.gin", ["search"]) == pathlib.Path("search/runs/check.gin")
    found = read("runs/evaluate.gin", ["search"])
    assert all(file.kind is not None for file in found.members())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("methods/cod.gin", "'methods/cod.gin'; did you mean methods/coda.gin"),
        ("coda.gin", "'coda.gin'; did you mean methods/coda.gin"),
        ("runs/Predict.gin", "did you mean runs/predict.gin"),
        ("onw.gin", "did you mean own.gin"),
        ("nothing_like_it", "there is no gin file 'nothing_like_it'"),
        (".", "there is no gin file '.'"),
        ("", "there is no gin file ''"),
    ],
)
def test_a_file_that_is_not_there_is_named_with_those_like_it(name, message, here):
    here(own="")
    with pytest.raises(UsageError, match=re.escape(message)):
        read(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A = 1\nB = 'x\n", "own.gin:2: "),
        ("A = {1: 2\n", "own.gin:2: a bracket or a quote is not closed"),
        ("A = 1\n\nB 3\n", "own.gin:3: gin cannot read 'B 3'"),
        ("include 'other.gn'\n", "own.gin:1: there is no gin file 'other.gn'"),
        ("include 'own.gin'\n", "own.gin includes itself"),
        ("A = 1\ninclude 'preset.gin'\n", "own.gin:2: an include must come before the bindings"),
        ("A = \0\n", "own.gin"),
    ],
)
def test_a_file_that_gin_cannot_read_is_told_with_its_line(text, message, here):
    here(own=text)
    with pytest.raises(UsageError, match=re.escape(message)) as told:
        read("own.gin")
    assert len(str(told.value).splitlines()) == 1


def test_a_file_that_is_no_text_is_told(here):
    (here.folder / "own.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"own\.gin is no gin file"):
        read("own.gin")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
@example(text="(" * 3000)
@example(text="include 'preset.gin'\n" * 3)
@example(text="a:\n  b = 1\n c = 2")
def test_any_text_is_a_gin_file_or_a_usage_error(text, tmp_path):
    (tmp_path / "own.gin").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        read(str(tmp_path / "own.gin"))
    except UsageError as error:
        assert "own.gin" in str(error)


def names(*given, search_paths=()):
    """The short names of files in their order."""
    return [file.name for file in in_order([read(name, search_paths) for name in given])]


@pytest.mark.parametrize(
    "files",
    [
        ("runs/finetune.gin", "methods/coda.gin", "tasks/jsonl.gin"),
        ("runs/evaluate.gin", "preset.gin", "tasks/labels.gin"),
        ("t5x/model.gin", "methods/lora.gin", "tasks/mnli.gin"),
    ],
)
def test_the_order_of_the_packages_files_does_not_matter(files):
    orders = [names(*order) for order in itertools.permutations(files)]
    assert all(order == orders[0] for order in orders)
    assert "t5x" in files[0] or next(name for name in orders[0] if name in files) == files[0]


def test_ones_own_files_come_last_in_the_order_given(here):
    here(
        a="include 'coda_jax/gin_configs/runs/finetune.gin'\ninclude 'c.gin'\n",
        b="include 'methods/coda.gin'\n",
        c="C = 1\n",
    )
    found = names("b.gin", "tasks/jsonl.gin", "a.gin")
    assert found[-3:] == ["b.gin", "c.gin", "a.gin"]
    packages = ["runs/train.gin", "runs/finetune.gin", "methods/coda.gin", "tasks/jsonl.gin"]
    assert [name for name in found if name in packages] == packages
    assert names("c.gin", "a.gin")[-2:] == ["c.gin", "a.gin"]  # once


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["runs/finetune.gin", "runs/evaluate.gin"], "two runs in one command: "),
        (["runs/finetune.gin", "runs/train.gin"], "two runs in one command: "),
        (["runs/finetune.gin", "own.gin"], "two runs in one command: "),
        (["tasks/mnli.gin", "tasks/jsonl.gin"], "two tasks in one command: "),
        (["own.gin", "methods/lora.gin"], "two recipes in one command: "),
    ],
)
def test_two_of_a_kind_are_refused(given, message, here):
    here(own="include 'runs/check.gin'\ninclude 'methods/coda.gin'\n")
    for order in (given, given[::-1]):
        with pytest.raises(UsageError, match=message):
            names(*order)


def test_a_task_takes_the_place_of_one_that_a_run_brings():
    found = names("tasks/rendered_text_inked.gin", "runs/pretrain_rendered_text.gin")
    assert found.index("tasks/rendered_text.gin") < found.index("tasks/rendered_text_inked.gin")


def test_the_lines_of_a_file_stay_where_they_are(here):
    here(own="include 'preset.gin'\n\nincluded = 3\ninclude_x = 4\n")
    assert read("own.gin").text() == "\n\nincluded = 3\ninclude_x = 4\n"


def test_a_name_with_two_values_is_refused():
    check_values(gin_files.read_bindings(["A=1", "A = 1", "f.x=2", "g.f.y=3", "s/f.x=4"]))
    check_values(gin_files.read_bindings(["A=%gin.REQUIRED", "A=1"]))  # as T5X's own files do
    for texts in (["A=1", "A=2"], ["f.x=1", "f.x='1'"], ["f.x=1", "g.f.x=True"]):
        with pytest.raises(UsageError, match=r"is given twice: --gin\..* and --gin\."):
            check_values(gin_files.read_bindings(texts))


def test_a_file_gives_a_name_one_value(here):
    here(own="SEED = 3\nSEED = 4\n")
    with pytest.raises(UsageError, match=r"SEED is given twice: own\.gin:1 and own\.gin:2"):
        configure(["runs/predict.gin", "own.gin"])
