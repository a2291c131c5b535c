"""A run's folder: who may write there, its logs, and how a run is asked to stop."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import fcntl
import importlib.util
import itertools
import os
import pathlib
import re
import secrets
import shlex
import signal
import sys
import threading

from coda_jax import checks, files, processes
from coda_jax.data.reports import say
from coda_jax.optional import needs
from coda_jax.training.metrics_file import SPEED, MetricsFile

RUN_FILE = "run.json"  # in a run's folder: what the run is
FORMAT_VERSION = 3  # of that file
CHECKPOINTS = "checkpoints"  # in a run's folder: one folder for each step that is kept
EXPORT = "export"  # in a run's folder: what came out
_CLI = "coda_jax.cli"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def checked(directory: str | os.PathLike) -> pathlib.Path:
    """The path of a run's folder.

    Raises:
        ValueError: it is no name, or a file; and see `files.check_stores`.
    """
    checks.paths(MODEL_DIR=directory)
    files.check_stores("MODEL_DIR", directory)
    return files.checked_folder(directory)


def saved_steps(directory: pathlib.Path) -> list[int]:
    """The steps whose checkpoints are complete, ascending."""
    found = (directory / CHECKPOINTS).glob("[0-9]*")
    return sorted(int(path.name) for path in found if re.fullmatch("0|[1-9][0-9]*", path.name))


class Interruption(processes.Joint):
    """The run was asked to stop; its state is saved and the same command continues it.

    Attributes:
        exit_code: of the process, as shells have it.
    """

    def __init__(self, message: str, signum: int = signal.SIGTERM):
        super().__init__(message)
        self.exit_code = 128 + signum


class Requests:
    """The signals that asked a run to stop; those of all its processes."""

    def __init__(self):
        self._first: signal.Signals | None = None
        self._numbers = itertools.count(1)
        self._agreed = False

    def __call__(self) -> bool:
        """Whether the run was asked to stop: at the same call in all processes."""
        if not processes.are_several():
            return self._first is not None
        self._agreed = self._agreed or processes.asked_to_stop(next(self._numbers))
        return self._agreed

    def receive(self, signum: int, frame: object) -> None:
        """Notes a signal; a second Ctrl-C does not wait for the state to be saved."""
        del frame
        if self._first is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self._first is None:
            self._first = signal.Signals(signum)
            if signum == signal.SIGINT:
                print("\nstopping after this step; Ctrl-C again does not save", file=sys.stderr)
            if processes.are_several():
                os.kill(os.getpid(), signal.SIGTERM)  # of which JAX tells the others

    def stop(self, text: str) -> None:
        """Raises Interruption if the run was asked to stop."""
        if self():
            signum = self._first or signal.SIGTERM
            raise Interruption(f"stopped by {signum.name}: {text}{_go_on()}", signum)


def _go_on() -> str:
    """The command that continues a run, where a command is what runs."""
    if getattr(sys.modules["__main__"].__spec__, "name", None) == _CLI:
        command = sys.orig_argv
    elif _CLI in sys.modules:
        command = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
    else:
        return ""
    return f"; this goes on: {shlex.join(command)}"


@contextlib.contextmanager
def interruption() -> Iterator[Requests]:
    """While open, SIGTERM, SIGHUP and Ctrl-C are only noted in what is yielded.

    Those that are ignored stay so, as under nohup. Outside the main thread none is noted.
    """
    requests, previous = Requests(), {}
    try:
        if threading.current_thread() is threading.main_thread():
            noted = set(_SIGNALS)
            if processes.are_several():
                processes.hear_termination()
                noted.remove(signal.SIGTERM)
            for signum in noted:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    previous[signum] = signal.signal(signum, requests.receive)
        yield requests
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def owned(directory: pathlib.Path) -> Iterator[None]:
    """While open, no other run may train in the folder, which is made if there is none.

    Raises:
        ValueError: one does; or the processes of this run have different folders of that name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory) if processes.is_first() else contextlib.nullcontext():
        if processes.are_several():
            _check_is_shared(directory)
        yield


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is training in {directory}: wait, or name another"
            ) from error
        except OSError as error:
            say(
                f"{directory} cannot be locked ({error.strerror}): no other process may train there"
            )
        yield
    finally:
        os.close(handle)


def _check_is_shared(directory: pathlib.Path) -> None:
    mark = pathlib.Path(directory, processes.from_first(lambda: f".{secrets.token_hex(8)}.shared"))
    if processes.is_first():
        mark.touch()
    processes.wait_for_all()
    found = mark.exists()
    processes.wait_for_all()
    if processes.is_first():
        mark.unlink()
    if not found:
        raise ValueError(
            f"MODEL_DIR={directory} is another folder here than where process 0 runs: name one in "
            "a file system that all processes share"
        )


@contextlib.contextmanager
def metric_writer(
    directory: str | pathlib.Path, step: int
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Yields write(step, metrics): to `metrics.csv`, and to TensorBoard where clu is installed.

    Args:
        directory: of the run.
        step: from which it goes on.
    """
    if not processes.is_first():
        yield lambda step, metrics: None
        return
    table = MetricsFile(directory, step)
    with _tensorboard(directory) as show:

        def write(step: int, metrics: Mapping[str, float]) -> None:
            table.write(step, {name: x for name, x in metrics.items() if name != SPEED})
            show(step, metrics)

        yield write


@contextlib.contextmanager
def _tensorboard(directory: str | pathlib.Path) -> Iterator[Callable[[int, Mapping], None]]:
    if not all(map(importlib.util.find_spec, ("clu", "tensorflow", "tensorboard"))):
        yield lambda step, metrics: None
        return
    with needs():  # imports tensorflow, which accelerator hosts may lack
        from clu import metric_writers

    writer = metric_writers.SummaryWriter(os.fspath(directory))
    try:
        yield writer.write_scalars
    finally:
        writer.close()
