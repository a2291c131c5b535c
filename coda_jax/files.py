"""Files and folders that are the old or the new one, also if a process is killed while writing."""

import collections
from collections.abc import Callable, Iterator, Mapping
import contextlib
import fcntl
import glob
import json
import os
import pathlib
import re
import secrets
import shutil
from typing import Any

MAX_DEPTH = 100  # of JSON: Python's own limit depends on where it is read
# In a path: patterns, what is a / on other systems, the end of a scheme, bytes that are not UTF-8.
_MISREAD = re.compile(r"[\[\]*?\\\ud800-\udfff]|:(?=/|$)")
_NOT_JSON = "not JSON: "
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary file beside `path`, which takes its place when the block ends well.

    The temporary file is on disk before it is renamed; where the block raises, it is removed. What
    a killed process left beside `path` is removed, too. A link is followed, and a device or a pipe
    is yielded itself.
    """
    path = pathlib.Path(path).resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    _sweep(path)
    temporary, handle = _locked_beside(path, pathlib.Path.touch)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


def prepare(path: str | os.PathLike, *read: str | os.PathLike) -> None:
    """Makes the folder of a file that is to be written later.

    Args:
        path: of the file.
        *read: files that are read until then.

    Raises:
        ValueError: there can be no such file: the path is a folder, or its folder cannot be made or
            written to; or it is one of those that are read.
    """
    for other in read:
        if os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):
            raise ValueError(f"{path} is read: give what is written another name")
    path = pathlib.Path(path).absolute()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: no permission for {path.parent}")


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `path`, which takes its place when the block ends well.

    A folder that is there is replaced as a whole. A kill leaves the old one, the new one or,
    between two renames, none.
    """
    path = pathlib.Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary, handle = _locked_beside(path, pathlib.Path.mkdir)
    try:
        yield temporary
        for file in filter(pathlib.Path.is_file, temporary.rglob("*")):
            _sync(file)
        if path.exists():
            os.replace(path, _beside(path))
        os.replace(temporary, path)
    finally:
        os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)
        _sweep(path)


def checked_folder(path: str | os.PathLike) -> pathlib.Path:
    """The path of a folder that is, or may be, there; ValueError where it is a file."""
    path = pathlib.Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder")
    return path


def check_stores(name: str, path: str | os.PathLike) -> None:
    """Raises ValueError where tensorstore or orbax would take a folder for another, or a pattern.

    Args:
        name: of the option, for the error.
        path: of the folder.
    """
    if wrong := sorted({*_MISREAD.findall(os.path.abspath(path))}):
        raise ValueError(
            f"{name}={os.fspath(path)!a}: its path has {' '.join(map(ascii, wrong))}, with which "
            "arrays are written elsewhere or cannot be read again: name another folder"
        )


def check_new(path: str | os.PathLike) -> None:
    """Raises FileExistsError where a folder to be written holds something."""
    path = pathlib.Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is not empty; name a new folder")


def _beside(path: pathlib.Path) -> pathlib.Path:
    """A new temporary name for what will be `path`; `_sweep` knows it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _locked_beside(
    path: pathlib.Path, make: Callable[[pathlib.Path], None]
) -> tuple[pathlib.Path, int]:
    """Makes a temporary file or folder that no other process sweeps while the handle is open."""
    while True:
        temporary = _beside(path)
        make(temporary)
        with contextlib.suppress(FileNotFoundError):  # swept before it was opened
            handle = os.open(temporary, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, handle
            os.close(handle)  # swept before it was locked


def _lock(handle: int) -> bool:
    """Locks a file as long as this process has it open; False where another process does."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # also a file system without locks
        return False
    return True


def _sync(path: pathlib.Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sweep(path: pathlib.Path) -> None:
    """Removes the temporary names of `path` that no living process has locked."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # or another user's
            handle = os.open(old, os.O_RDONLY)
            try:
                if _lock(handle):
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            finally:
                os.close(handle)


def check_is_no_pointer(content: bytes, path: str | os.PathLike) -> None:
    """Raises ValueError where a file is what a clone without Git LFS has in its place.

    Args:
        content: the first bytes of the file, or all.
        path: its name, for the error.
    """
    if content.startswith(_LFS_POINTER):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, "
            "or get it with `hf download`"
        )


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any, sort_keys: bool = False) -> None:
    """Writes a value that JSON can hold, atomically; makes the folder if there is none."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike, most: int | None = None) -> Mapping[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.
        most: bytes that it may have, where anyone may have written it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, not an object, or larger; the file is named.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if most is not None and (size := path.stat().st_size) > most:
        raise ValueError(f"{path} has {size:,} bytes; such a file has at most {most:,}")
    return parse_json(path.read_bytes(), path)


def parse_json(content: bytes, path: str | os.PathLike) -> Mapping[str, Any]:
    """The object that a JSON file holds.

    Args:
        content: of the file.
        path: its name, for the error.

    Raises:
        ValueError: it is not UTF-8, not JSON as `json_value` reads it, or not an object; the file
            is named.
    """
    check_is_no_pointer(content, path)
    try:
        value = json_value(decoded(content, path))
    except ValueError as error:
        problem = str(error).removeprefix(_NOT_JSON)
        raise ValueError(f"{path} is not valid JSON: {problem}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {json.dumps(value):.40}")
    return value


def json_value(text: str) -> Any:
    """The value that JSON stands for.

    Raises:
        ValueError: it is not JSON, is nested too deep to be walked through, gives a key of an
            object twice, or has half of a pair of escapes, which is no character; it is not said
            where it was found.
    """
    try:
        value = json.loads(text, object_pairs_hook=_with_keys_once)
        deep = _is_deep(value)
    except RecursionError:
        deep = True
    except ValueError as error:
        raise ValueError(f"{_NOT_JSON}{error}") from error
    if deep:
        raise ValueError(
            f"{_NOT_JSON}maximum recursion depth: it is nested too deep, at most {MAX_DEPTH} lists "
            "and objects within each other are read"
        )
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.end]
            raise ValueError(f"half of a pair of \\u escapes: {half!a}") from error
    return value


def _with_keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = next(name for name in found if counts[name] > 1)
        raise ValueError(f"the key {twice!r:.80} is given twice")
    return found


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [x for x in level if isinstance(x, dict | list)]
        level = [x for outer in level for x in (outer.values() if type(outer) is dict else outer)]
    return bool(level)


def decoded(content: bytes, place: str | os.PathLike, first: int = 1) -> str:
    """The text of bytes in UTF-8; a byte order mark at the start of a file is no part of it.

    Args:
        content: the bytes.
        place: the file, for errors.
        first: their first line in the file.

    Raises:
        ValueError: they are not UTF-8; the file and the first such line are named.
    """
    try:
        return content.decode("utf-8-sig" if first == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first + content[: error.start].count(b"\n")
        raise ValueError(f"{place}:{line}: not UTF-8: {error.reason}") from error


def lines(content: bytes, place: str | os.PathLike, first: int = 1) -> list[str]:
    """The lines of a text in UTF-8, [] for no bytes; arguments and errors are those of `decoded`.

    A line ends with a line feed, or with a carriage return and one; a carriage return alone is a
    part of its line.
    """
    text = decoded(content, place, first)
    parts = text.removesuffix("\n").split("\n") if text else []
    return [part.removesuffix("\r") for part in parts]
