"""What a process of `coda` sets up before jax or TensorFlow is imported: logs, compiled programs.

Nothing heavy is imported, and what a user has set stays.
"""

from collections.abc import Iterator
import contextlib
import gc
import importlib.abc
import importlib.util
import logging
import os
import pathlib
import re
import sys
import tempfile
import warnings

MAX_CACHE_BYTES = 2**30
_PACKAGE = pathlib.Path(__file__).parents[1]
_EARLY_LOG = re.compile(rb"[IWE]\d{4} [\d:]+|WARNING: All log messages before absl::InitializeLog")
_SECONDS_BETWEEN_LINES = "60"  # of a progress bar that is written to a file


def quiet(command: str, verbose: bool) -> None:
    """Only what this package has to say is printed; with `verbose`, all that is logged."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbose else "3")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", _SECONDS_BETWEEN_LINES)
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        return
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    sys.meta_path.insert(0, _QuietTensorFlow())
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: _PACKAGE in pathlib.Path(record.pathname).parents)
    logging.basicConfig(handlers=[handler], format=f"coda {command}: %(message)s")


class _QuietTensorFlow(importlib.abc.MetaPathFinder):
    """Keeps what TensorFlow logs before it reads any setting from the first import of it."""

    def find_spec(self, fullname, path, target=None):
        if fullname != "tensorflow":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:  # it may be asked for, and not imported
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_quietly(module):
                with without_early_logs():
                    execute(module)

            spec.loader.exec_module = execute_quietly
        return spec


@contextlib.contextmanager
def without_early_logs() -> Iterator[None]:
    """While open, lines of logs that are written to the process's standard error are left out."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            left = [line for line in file if not _EARLY_LOG.match(line)]
            os.write(2, b"".join(left))


def keep_programs(wanted: bool) -> str:
    """Lets JAX keep compiled programs on disk from run to run.

    A folder that cannot be written is left alone. JAX's own variable, where it is set, is followed.

    Args:
        wanted: False to compile everything anew.

    Returns:
        A line that says what is done.
    """
    if not wanted:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return "compiled programs are not kept"
    given, folder = os.environ.get("JAX_COMPILATION_CACHE_DIR"), programs_folder()
    if folder is None:
        return "compiled programs are not kept: there is no home folder"
    if not given:
        try:
            os.makedirs(folder, exist_ok=True)
            _prune(folder)
        except OSError as error:
            return f"compiled programs are not kept: {folder}: {error.strerror}"
        if not os.access(folder, os.W_OK):
            return f"compiled programs are not kept: {folder} cannot be written"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    return f"compiled programs are kept in {folder}"


def programs_folder() -> str | None:
    """The folder of compiled programs; None where there is no home folder."""
    if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return given
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "coda_jax", "programs") if os.path.isabs(base) else None


def _prune(folder: str) -> None:
    """Removes the oldest programs where all of them are more than `MAX_CACHE_BYTES`."""
    entries = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process removes them too
            entries.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= MAX_CACHE_BYTES:
            return
        with contextlib.suppress(OSError):
            os.remove(path)
        total -= size


def collect_garbage_rarely() -> None:
    """Importing and tracing make many objects that stay; looking for cycles is a tenth of it."""
    gc.set_threshold(100_000, 20, 100)
