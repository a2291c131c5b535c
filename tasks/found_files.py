"""The files that a person names: a file, a folder, a glob, or several of these."""

from collections.abc import Collection, Sequence
import glob
import os
from typing import NamedTuple

import tensorflow as tf

from coda_jax import checks

_MAGIC = "*?["


class File(NamedTuple):
    """A file that was found.

    Attributes:
        path: of the file.
        name: from the folder that was given, or from the first folder of a glob that is a pattern:
            it stays when the folder is moved.
    """

    path: str
    name: str


def find(
    macro: str, given: str | os.PathLike | Sequence[str], endings: Collection[str] = ()
) -> list[File]:
    """Finds files, on disk or in a bucket.

    Args:
        macro: what the files are given as, for errors.
        given: a file, a folder, which is read with all folders in it, a glob, or several of these.
            What begins with a dot in a folder is left out.
        endings: of the files that are taken from a folder, such as ".wav"; () for all.

    Returns:
        The files, each once, sorted by their paths.

    Raises:
        FileNotFoundError: one of what is given has no files; it is named.
        ValueError: it is not a string, or all files are empty.
    """
    several = given if isinstance(given, tuple | list) else (given,)
    several = checks.Each(checks.text, least=1)(macro, [_plain(place) for place in several])
    found: dict[str, File] = {}
    for place in several:
        files = _files(place, tuple(endings))
        if not files:
            kind = f" that end in one of {sorted(endings)}" if endings else ""
            raise FileNotFoundError(f"{macro}={place!r}: there are no files{kind}")
        for file in sorted(files):
            real = _real(file.path)
            if not tf.io.gfile.exists(real):
                raise FileNotFoundError(f"{macro}: {file.path} is a link to nothing")
            if not tf.io.gfile.isdir(real):  # as the last path of a loop of links is
                found.setdefault(real, file)
    if not any(tf.io.gfile.stat(path).length for path in found):
        raise ValueError(f"{macro}={given!r}: every file is empty, of {len(found)}")
    return sorted(found.values())


def _real(path: str) -> str:
    """One path for all links and spellings of a file on disk."""
    return path if "://" in path else os.path.realpath(path)


def _plain(place):
    return os.fspath(place) if isinstance(place, os.PathLike) else place


def _files(place: str, endings: tuple[str, ...]) -> list[File]:
    if tf.io.gfile.isdir(place):
        return _in_folder(place, endings)
    if tf.io.gfile.exists(place):
        return [File(place, os.path.basename(place))]
    if not any(sign in place for sign in _MAGIC):
        return []
    head = place[: min(place.index(sign) for sign in _MAGIC if sign in place)]
    start = head.rpartition("/")[0]
    # Of the two only Python's takes ** for any folders, and only the other one reads buckets.
    matches = tf.io.gfile.glob(place) if "://" in place else glob.glob(place, recursive=True)
    matches = [path for path in matches if not tf.io.gfile.isdir(path)]
    return [File(path, path[len(start) :].lstrip("/")) for path in matches]


def _in_folder(folder: str, endings: tuple[str, ...]) -> list[File]:
    found = []
    # Python's does not follow links to folders, which may be loops.
    walk = tf.io.gfile.walk if "://" in folder else os.walk
    for inner, folders, names in walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and (not endings or name.lower().endswith(endings)):
                path = os.path.join(inner, name)
                found.append(File(path, path[len(folder) :].lstrip("/")))
    return found
