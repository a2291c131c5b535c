"""The routes of a server; what is refused is answered with {"error": a sentence}."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
import concurrent.futures
import contextlib
import json
import time
from typing import Any

from absl import logging

from coda_jax.optional import needs
from coda_jax.serving.batcher import Batcher, QueueFull, Row
from coda_jax.serving.metrics import CONTENT_TYPE, Metrics
from coda_jax.serving.reading import Asked, Reader, Refused

with needs("serve"):
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

BODY_SECONDS = 30.0  # in which a body must have come
HELD_BODIES = 8  # of the largest size, that are held at once while they come and are read
_DISCARD_SECONDS = 1.0  # of what a client still sends when it is refused
_CLIENT_LEFT = 499  # as nginx counts them; nobody gets it
_ROUTES = "POST /predict, GET /adapters, GET /health, GET /metrics"
_JSON = "application/json"
_WHY = {
    404: f"there is no such path; there are {_ROUTES}",
    405: f"this method is not for this path; there are {_ROUTES}",
}

Receive = Callable[[], Any]  # of ASGI


class Service:
    """Answers requests with what a batcher's thread makes of their rows.

    Args:
        reader: reads bodies.
        batcher: answers rows.
        adapters: names; None where there are none.
        max_body: bytes of a body.
        metrics: what is told of requests.

    Attributes:
        app: the ASGI application.
        closing: whether nothing is accepted any more.
    """

    def __init__(
        self,
        reader: Reader,
        batcher: Batcher,
        adapters: Sequence[str] | None,
        max_body: int,
        metrics: Metrics,
    ):
        self.closing = False
        self._reader, self._batcher, self._metrics = reader, batcher, metrics
        self._adapters, self._max_body, self._held = adapters, max_body, 0
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "coda_reader")
        self.app = Starlette(
            routes=[
                Route("/predict", self._predict, methods=["POST"]),
                Route("/adapters", self._list, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/metrics", self._measured, methods=["GET"]),
            ],
            exception_handlers={HTTPException: _refused_by_starlette, Exception: _failed},
        )
        self.app.router.redirect_slashes = False

    def close(self) -> None:
        """Ends the thread that reads rows."""
        self._pool.shutdown(wait=False)

    async def _list(self, request: Request) -> Response:
        return _json({"adapters": [*(self._adapters or ())]})

    async def _health(self, request: Request) -> Response:
        state = self._state()
        return _json({"status": state}, 200 if state == "ready" else 503)

    async def _measured(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    def _state(self) -> str:
        if self.closing:
            return "closing"
        return "ready" if self._batcher.ready else "starting"

    async def _predict(self, request: Request) -> Response:
        started = time.monotonic()

        def count(status):
            self._metrics.requests.labels(status).inc()
            self._metrics.request_seconds.observe(time.monotonic() - started)

        try:
            asked, rows, answers = await self._accepted(request)
            if asked.streams:
                events = self._events(rows, answers, count)
                return StreamingResponse(events, media_type="text/event-stream")
            response = await self._whole(request.receive, rows, answers)
        except Refused as refused:
            response = _json({"error": refused.why}, refused.status)
            await _discard(request)
        except ClientDisconnect:
            response = Response(status_code=_CLIENT_LEFT)
        except Exception:
            count(500)
            raise
        count(response.status_code)
        return response

    async def _accepted(self, request: Request) -> tuple[Asked, list[Row], asyncio.Queue]:
        """What is asked for, its rows in the batcher's queue, and where the answers will come."""
        state = self._state()
        if state != "ready":
            raise Refused(503, f"the server is {state}: ask again later")
        _check_headers(request)
        async with contextlib.AsyncExitStack() as stack:
            content = await self._body(request, stack)
            asked = await self._read(self._reader.asked, content)
            del content
            count = len(asked.rows)
            try:
                self._batcher.reserve(count)
            except QueueFull as error:
                raise Refused(429, "the queue is full: ask again later") from error
            try:
                inputs = await self._read(self._reader.inputs, asked.rows)
            except BaseException:
                self._batcher.release(count)
                raise
        answers: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def teller(number):
            def tell(answer):
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(answers.put_nowait, (number, answer))

            return tell

        named = zip(inputs, asked.adapters, strict=True)
        rows = [Row(*given, teller(number)) for number, given in enumerate(named)]
        self._batcher.put(rows)
        return asked, rows, answers

    async def _read(self, function: Callable, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def _body(self, request: Request, stack: contextlib.AsyncExitStack) -> bytes:
        """The body; what it takes is given back with the stack."""
        declared = request.headers.get("content-length", "0")
        too_large = Refused(413, f"the body is too large; MAX_BODY is {self._max_body:,} bytes")
        if int(declared) > self._max_body:
            raise too_large
        parts, size = [], 0

        def give_back():
            self._held -= size

        stack.callback(give_back)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    self._held += len(part)
                    if size > self._max_body:
                        raise too_large
                    if self._held > HELD_BODIES * self._max_body:
                        raise Refused(429, "too many large bodies at once: ask again later")
        except TimeoutError as error:
            why = f"the body did not come within {BODY_SECONDS:.0f} seconds"
            raise Refused(408, why) from error
        return b"".join(parts)

    async def _whole(
        self, receive: Receive, rows: Sequence[Row], answers: asyncio.Queue
    ) -> Response:
        """All answers in one response; where the client leaves, rows not begun are withdrawn."""
        found: dict[int, dict[str, Any]] = {}

        async def collect():
            while len(found) < len(rows):
                number, answer = await answers.get()
                if isinstance(answer, Exception):
                    raise Refused(500, _no_answer(number, answer))
                found[number] = answer

        collecting, leaving = (asyncio.ensure_future(x) for x in (collect(), receive()))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ClientDisconnect
            collecting.result()
        finally:
            collecting.cancel()
            leaving.cancel()
            if len(found) < len(rows):
                self._batcher.withdraw(rows)
        return _json({"answers": [found[number] for number in range(len(rows))]})

    async def _events(
        self, rows: Sequence[Row], answers: asyncio.Queue, count: Callable[[int], None]
    ) -> AsyncIterator[str]:
        """Answers as server-sent events, as they come; where the client leaves, as `_whole`."""
        status = _CLIENT_LEFT
        try:
            for _ in rows:
                number, answer = await answers.get()
                if isinstance(answer, Exception):
                    answer = {"error": _no_answer(number, answer)}
                yield f"data: {_text({'index': number, **answer})}\n\n"
            yield "data: [DONE]\n\n"
            status = 200
        finally:
            if status != 200:
                self._batcher.withdraw(rows)
            count(status)


def _check_headers(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != _JSON:
        raise Refused(415, f"send JSON, with the header 'Content-Type: {_JSON}', not {kind!r}")
    encoding = request.headers.get("content-encoding", "")
    if encoding.strip().lower() not in ("", "identity"):
        raise Refused(415, f"the body is {encoding!r}; send it as it is")


async def _discard(request: Request) -> None:
    """Takes what a client is still sending, for a while, so that it sees why it is refused."""
    if "expect" in request.headers:  # it waits to be told to send
        return
    with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            async for _ in request.stream():
                pass


def _no_answer(number: int, error: Exception) -> str:
    finite = isinstance(error, FloatingPointError)
    why = "its outputs are NaN or infinite" if finite else "the server's log says why"
    return f"no answer to row {number} (the first is 0): {why}"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _json(value: Any, status: int = 200) -> Response:
    later = {"Retry-After": "1"} if status in (429, 503) else None
    return Response(_text(value), status, later, _JSON)


async def _refused_by_starlette(request: Request, error: HTTPException) -> Response:
    response = _json({"error": _WHY.get(error.status_code, error.detail)}, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _failed(request: Request, error: Exception) -> Response:
    logging.error("a request failed", exc_info=error)
    return _json({"error": "the server failed; its log says more"}, 500)
