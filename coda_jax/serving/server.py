"""From a listening socket to the last answer."""

import asyncio
from collections.abc import Iterator
import contextlib
import signal
import socket
import threading
import time

from coda_jax.data.reports import say
from coda_jax.optional import needs
from coda_jax.serving import app
from coda_jax.serving.app import Service
from coda_jax.serving.batcher import Batcher

with needs("serve"):
    import uvicorn

_BACKLOG = 2048  # connections that wait to be accepted
_KEEP_ALIVE = 75  # seconds: longer than proxies keep a connection, so that it is they who close it
_STEP = 0.5  # seconds from one look at what is left to the next
_PATIENCE = app.BODY_SECONDS + 5  # seconds, for clients that take their last answers


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OSError: the address is taken, or none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise OSError(f"HOST={host!r}, PORT={port}: {error.strerror or error}") from error


class Server(uvicorn.Server):
    """Accepts requests until it is asked to stop, and ends when those are answered.

    SIGTERM and SIGINT ask it to stop; a second one ends the process at once. Clients whose requests
    do not come are left after a while, and those that do not take their answers when there has been
    nothing else to do for a while.
    """

    def __init__(self, service: Service, batcher: Batcher):
        self._service, self._batcher = service, batcher
        super().__init__(
            uvicorn.Config(
                service.app,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE,
            )
        )

    def stop(self) -> None:
        """Accepts nothing more; in the thread of the event loop."""
        self._service.closing = self.should_exit = True

    async def answer(self, listener: socket.socket) -> None:
        """Answers what comes over a socket, until all that was accepted is answered.

        Raises:
            Exception: what has ended the batcher.
        """
        loop, started = asyncio.get_running_loop(), time.monotonic()

        def changed():
            if self._batcher.failure is not None:
                self.stop()
            else:
                say(f"ready after {time.monotonic() - started:.1f} seconds")

        self._batcher.start(lambda: loop.call_soon_threadsafe(changed))
        tasks = [asyncio.create_task(x) for x in (self._leave_the_silent(), self._leave_the_last())]
        try:
            await self.serve([listener])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.to_thread(self._batcher.close)
            self._service.close()
        if self._batcher.failure is not None:
            raise self._batcher.failure

    async def _leave_the_silent(self) -> None:
        """Ends connections on which no whole head of a request has come."""
        seconds: dict[asyncio.Protocol, float] = {}
        while True:
            await asyncio.sleep(_STEP)
            silent = [x for x in self.server_state.connections if _waits_for_a_head(x)]
            seconds = {x: seconds.get(x, 0.0) + _STEP for x in silent}
            for connection, passed in seconds.items():
                if passed > app.BODY_SECONDS:
                    connection.transport.abort()

    async def _leave_the_last(self) -> None:
        """Ends the connections of clients that do not take their answers, once it is to stop."""
        idle = 0.0
        while idle < _PATIENCE:
            await asyncio.sleep(_STEP)
            idle = idle + _STEP if self.should_exit and not self._batcher.busy else 0.0
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own handlers would end the process with the signal."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, signals = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)

        def stop():
            for number in signals:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)  # Python's own raises, and then waits
            self.stop()

        for number in signals:
            loop.add_signal_handler(number, stop)
        yield


def _waits_for_a_head(connection: asyncio.Protocol) -> bool:
    """Whether no request is under way, and uvicorn's own timer between two does not run."""
    answered = connection.cycle is None or connection.cycle.response_complete
    return answered and connection.timeout_keep_alive_task is None
