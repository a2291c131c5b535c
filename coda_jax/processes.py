"""One run in several processes, the same command in each: what JAX's own division leaves to do.

Arrays and programs are divided over the devices of all processes, see `sharding`. Every process
reads the same data and makes the same batches, of which its devices take their rows. The first one
alone writes files and prints; where one fails, all end.
"""

import atexit
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from typing import Any, TextIO
import zlib

import jax
from jax._src import distributed  # for its key-value store, which nothing public shows
from jax.experimental import multihost_utils
import numpy as np

from coda_jax import checks
from coda_jax.sharding import Placement

_NUMBER, _ID = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_FOREVER = 7 * 24 * 3600 * 1000  # milliseconds that a process waits for what another does
_SECONDS_BETWEEN_LOOKS = 1.0
_FAILURE = "coda_jax/failure"  # the key of the first failure's message
_numbers = itertools.count()  # of what processes tell and wait for: the same in all
_left = threading.Event()


class Joint(Exception):
    """An error that all processes raise at the same place."""


def placement(mesh: Mapping[str, int] | None = None, distributed: bool = False) -> Placement:
    """The devices of this process, or of all processes of a run. For gin files.

    Args:
        mesh: see `Placement`.
        distributed: whether this is one of several processes, which are joined.

    Raises:
        ValueError: the mesh is not of all devices; or nothing says which process this is.
    """
    if checks.flag("DISTRIBUTED", distributed):
        join()
    return Placement(mesh)


def join() -> None:
    """Joins the processes of a run, before JAX is used; those that are not the first are silent.

    JAX itself finds the others on TPU pods and under SLURM, Open MPI and Kubernetes; elsewhere, and
    instead, JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are read.

    Raises:
        ValueError: nothing says where the others are.
    """
    jax.config.update("jax_enable_preemption_service", False)  # until `hear_termination`
    try:
        given = {name: int(os.environ[name]) for name in (_NUMBER, _ID) if name in os.environ}
        jax.distributed.initialize(num_processes=given.get(_NUMBER), process_id=given.get(_ID))
    except ValueError as error:
        raise ValueError(
            f"DISTRIBUTED=True, but it is not known which process this is of how many ({error}): "
            f"set JAX_COORDINATOR_ADDRESS=HOST:PORT of the first, {_NUMBER}, and {_ID} from 0"
        ) from error
    # Of its own, as standard error is somewhere else while TensorFlow is imported.
    errors = os.fdopen(os.dup(2), "w", encoding="utf-8")
    threading.Thread(target=_watch, args=[errors], daemon=True).start()
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def are_several() -> bool:
    """Whether other processes take part; asks for no device."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the one that writes and prints; asks for no device where it is alone."""
    return not are_several() or jax.process_index() == 0


def _client() -> Any:
    return distributed.global_state.client


# --- Values ---


def from_first(function: Callable[[], Any]) -> Any:
    """What a function gives in the first process, where alone it is called: a value of JSON.

    The others wait for it. All processes must call this in the same order.
    """
    if not are_several():
        return function()
    key = f"coda_jax/values/{next(_numbers)}"
    if is_first():
        value = function()
        _client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_client().blocking_key_value_get(key, _FOREVER))


def wait_for_all() -> None:
    """Returns when all processes have called this, in the same order."""
    if are_several():
        _client().wait_at_barrier(f"coda_jax/barriers/{next(_numbers)}", _FOREVER)


def check_same(what: str, arrays: Callable[[], Iterable[Any]]) -> None:
    """Checks that all processes have been given the same arrays.

    Args:
        what: they are.
        arrays: gives them; not called where there is one process.

    Raises:
        ValueError: this process has other ones than the first.
    """
    if not are_several():
        return
    checksum = 0
    for array in map(np.asarray, arrays()):
        checksum = zlib.crc32(f"{array.dtype}{array.shape}".encode(), checksum)
        checksum = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), checksum)
    if from_first(lambda: checksum) != checksum:
        raise ValueError(
            f"{what} of process {jax.process_index()} are not those of process 0: give all "
            "processes the same files"
        )


def fetch(tree: Any) -> Any:
    """The tree with whole arrays of numpy, also where their parts are in several processes.

    All processes must call this in the same order.
    """

    def gathered(leaf):
        here = getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated
        return leaf if here else multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(gathered, tree))


# --- The end ---


def hear_termination() -> None:
    """From now on SIGTERM does not end the process: `asked_to_stop` tells of it."""
    state = distributed.global_state
    if are_several() and state.preemption_sync_manager is None:
        jax.config.update("jax_enable_preemption_service", True)
        state.initialize_preemption_sync_manager()


def asked_to_stop(number: int) -> bool:
    """Whether some process got SIGTERM; all are told so at the same call.

    Args:
        number: of the call, from 1, the same in all processes.
    """
    return multihost_utils.reached_preemption_sync_point(number)


@contextlib.contextmanager
def ending_together(
    told: Callable[[BaseException], str | None], status: Callable[[BaseException], int]
) -> Iterator[None]:
    """Where one process fails in this block, all end, with its message; else all wait for the last.

    Args:
        told: (error) -> what is said of it; None for its type and text.
        status: (error) -> what a process ends with.
    """
    try:
        yield
    except Joint as error:
        _leave(status(error))
        raise
    except BaseException as error:
        if are_several():
            _tell_failure(told(error) or f"{type(error).__name__}: {error}", status(error))
        raise
    _leave(0)


def _tell_failure(message: str, status: int) -> None:
    """Ends the other processes, each with a message that names this one, and then this one."""
    text = f"process {jax.process_index()} of {jax.process_count()} failed: {message}"
    try:
        _client().key_value_set(_FAILURE, text)
        _left.set()
        _end_soon(status, _time_for_others())
    except jax.errors.JaxRuntimeError:  # another one has failed before, and ends this one
        time.sleep(4 * _SECONDS_BETWEEN_LOOKS)


def _watch(errors: TextIO) -> None:
    """Ends this process where another one tells of its failure, which is printed."""
    while not _left.wait(_SECONDS_BETWEEN_LOOKS):
        try:
            message = _client().key_value_try_get(_FAILURE)
        except jax.errors.JaxRuntimeError:  # nobody has failed
            continue
        print(message, file=errors, flush=True)
        _end(1, _time_for_others())


def _time_for_others() -> float:
    """Seconds: without the first, which answers them, the others end with no word of why."""
    return 2 * _SECONDS_BETWEEN_LOOKS if is_first() else 0


def _end_soon(status: int, seconds: float = 0) -> None:
    """Ends this process when its main thread is done, whatever its others wait for.

    Clients of JAX, gloo and orbax may wait for ever for processes that have ended.

    Args:
        status: that it ends with.
        seconds: to wait before.
    """
    atexit.register(_end, status, seconds)
    late = threading.Timer(10 * _SECONDS_BETWEEN_LOOKS, _end, [status, 0])
    late.daemon = True
    late.start()


def _end(status: int, seconds: float) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(seconds)
    os._exit(status)


def _leave(status: int) -> None:
    """Waits until the others are done, too."""
    if not are_several():
        return
    wait_for_all()
    _left.set()
    jax.distributed.shutdown()
    _end_soon(status)
