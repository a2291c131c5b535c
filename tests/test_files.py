"""Files are either the old or the new one, whatever happens while they are written."""

import json
import os
import pathlib
import signal
import stat
import subprocess
import sys

import pytest

from coda_jax import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(name="old")
def fixture_old(tmp_path):
    """A file that is there already."""
    (tmp_path / "a.txt").write_text("old")
    return tmp_path / "a.txt"


def test_a_file_takes_its_place_when_it_is_complete(old):
    with files.atomic(old) as temporary:
        assert temporary.parent == old.parent and temporary != old
        temporary.write_text("new")
        assert old.read_text() == "old"
    assert old.read_text() == "new"
    assert names(old.parent) == ["a.txt"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o077, 0o700)])
def test_the_umask_says_who_may_read(tmp_path, mask, mode):
    previous = os.umask(mask)
    try:
        files.write_text(tmp_path / "a.txt", "a")
        with files.atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(previous)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode & 0o666
    assert (tmp_path / "folder").stat().st_mode & 0o777 == mode


def test_a_link_stays_and_its_file_is_replaced(old, tmp_path):
    (tmp_path / "link").symlink_to(old)
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and old.read_text() == "new"


def test_a_device_stays_what_it_is():
    files.write_text("/dev/null", "new")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("make", [pathlib.Path.touch, pathlib.Path.mkdir])
def test_a_name_that_was_swept_before_it_was_locked_is_made_again(old, make):
    made = []

    def make_and_sweep(path):
        make(path)
        made.append(path)
        if len(made) == 1:
            files._sweep(old)

    temporary, handle = files._locked_beside(old, make_and_sweep)
    os.close(handle)
    assert len(made) == 2 and not made[0].exists() and temporary == made[1]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_nothing_else(old, error):
    with pytest.raises(error), files.atomic(old) as temporary:
        temporary.write_text("half")
        raise error
    assert old.read_text() == "old"
    assert names(old.parent) == ["a.txt"]


def test_without_an_old_file_an_exception_leaves_none(tmp_path):
    with pytest.raises(ValueError), files.atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise ValueError
    assert not names(tmp_path)


def test_a_kill_leaves_the_old_file_and_the_next_write_replaces_it(old):
    script = (
        "import os, signal, sys; from coda_jax import files\n"
        "with files.atomic(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", script, str(old)])
    assert result.returncode == -signal.SIGKILL
    assert old.read_text() == "old"
    assert len(names(old.parent)) == 2
    with files.atomic(old) as temporary:
        assert names(old.parent) == [temporary.name, "a.txt"]  # what was left is gone
        files.write_text(old, "newer")  # by another, who leaves this one alone
        temporary.write_text("new")
    assert old.read_text() == "new" and names(old.parent) == ["a.txt"]


def test_a_folder_takes_its_place_as_a_whole(tmp_path):
    folder = tmp_path / "new" / "export"
    for content in ("first", "second"):
        with files.atomic_folder(folder) as temporary:
            (temporary / content).write_text(content)
            (temporary / "in").mkdir()
            (temporary / "in" / "x").write_text(content)
        assert names(folder) == sorted([content, "in"]) and names(folder.parent) == ["export"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "old").write_text("old")
    with pytest.raises(error), files.atomic_folder(tmp_path / "export") as temporary:
        (temporary / "half").write_text("half")
        raise error
    assert names(tmp_path) == ["export"] and names(tmp_path / "export") == ["old"]


def test_what_a_kill_left_of_a_folder_is_gone_after_the_next_write(tmp_path):
    for name in (".export.abc.tmp", ".other.abc.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    with files.atomic_folder(tmp_path / "export") as temporary:
        assert names(tmp_path) == sorted([temporary.name, ".other.abc.tmp"])
    assert names(tmp_path) == [".other.abc.tmp", "export"] and not names(tmp_path / "export")


def test_only_an_empty_folder_is_new(tmp_path):
    files.check_new(tmp_path / "x")
    files.check_new(tmp_path)
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="is not empty; name a new folder"):
            files.check_new(path)


def test_the_folder_of_a_file_is_made_before_or_the_file_refused(tmp_path):
    files.prepare(tmp_path / "a" / "b" / "c.json")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    for path, text in (
        (tmp_path / "a", "is a folder"),
        (tmp_path / "file" / "x", "Not a directory|exists"),
    ):
        with pytest.raises(ValueError, match=text):
            files.prepare(path)
    with pytest.raises(ValueError, match=r"file is read: give what is written another name"):
        files.prepare(tmp_path / "file", tmp_path / "a" / ".." / "file")
    with pytest.raises(ValueError, match="file is a file: name a folder"):
        files.checked_folder(tmp_path / "file")


def test_a_relative_path_is_written_where_it_was_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    with files.atomic("a.txt") as temporary:
        os.chdir(other)
        temporary.write_text("new")
    assert names(tmp_path) == ["a.txt", "other"] and not names(other)


def test_json_is_written_for_people_and_read_back(tmp_path):
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"b": 1, "a": [0.1, None, "é"]}, sort_keys=True)
    assert path.read_text().startswith('{\n  "a": [\n')
    assert files.read_json(path) == {"b": 1, "a": [0.1, None, "é"]}
    assert names(path.parent) == ["a.json"]


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_what_json_cannot_hold_is_not_written(tmp_path, value):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises((TypeError, ValueError)):
        files.write_json(tmp_path / "a.json", {"x": value})
    assert json.loads((tmp_path / "a.json").read_text()) == {}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", r"a\.json is not valid JSON"),
        (b"", r"a\.json is not valid JSON"),
        (b"{\n\xff\xfe", r"a\.json:2: not UTF-8: invalid start byte"),
        (b"[1]", r"a\.json must hold a JSON object, not \[1\]"),
        (b"null", r"a\.json must hold a JSON object, not null"),
        (
            b'{"x": {"a": 1, "b": 2, "a": 1}}',
            r"a\.json is not valid JSON: the key 'a' is given twice",
        ),
    ],
)
def test_a_file_that_is_no_object_of_json_is_named(tmp_path, content, text):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=text):
        files.read_json(tmp_path / "a.json")


def test_a_missing_file_of_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.json does not exist"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff", ":1: not UTF-8"),
        (b'{"a": "\\ud83d"}', r"is not valid JSON: half of a pair of \\u escapes: '\\ud83d'"),
        (b"[]", r"must hold a JSON object, not \[\]"),
        *[
            (b'{"a":' * depth + b"1" + b"}" * depth, "nested too deep, at most 100 lists")
            for depth in (101, 900, 10_000, 100_000)
        ],
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path, content, problem):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json.*{problem}"):
        files.read_json(tmp_path / "a.json")


def test_json_may_have_a_byte_order_mark_and_be_nested_as_deep_as_is_read(tmp_path):
    content = b'{"a":' * 100 + b'"\\ud83d\\ude00"' + b"}" * 100
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert files.read_json(tmp_path / "a.json") == json.loads(content)


@pytest.mark.parametrize(
    "name", ["a\\b", "a\\..\\..\\b", "gs:", "a:/b", "a[1]", "a*", "a?", os.fsdecode(b"a\xff")]
)
def test_a_folder_that_would_be_taken_for_another_is_refused(tmp_path, name, monkeypatch):
    with pytest.raises(ValueError, match=r"MODEL_DIR='.*: its path has '"):
        files.check_stores("MODEL_DIR", tmp_path / name)
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(ValueError, match="MODEL_DIR='run': its path has '"):
        files.check_stores("MODEL_DIR", "run")
    files.check_stores("MODEL_DIR", tmp_path / "a b:c %5C {ü} $HOME ~")
