"""A server of answers that need no model, and requests to one.

As a program: a server in the main thread, which says when it answers and when it is asked to stop,
and holds a batch for ten seconds.
"""

import asyncio
import contextlib
import http.client
import json
import threading
import time

import numpy as np

from coda_jax.data.examples import Expected
from coda_jax.models import FAMILIES
from coda_jax.serving.app import Service
from coda_jax.serving.batcher import Batcher
from coda_jax.serving.metrics import Metrics
from coda_jax.serving.reading import Reader
from coda_jax.serving.server import Server, listen

LONGEST = 100
JSON = {"Content-Type": "application/json"}


class Echo:
    """Answers as a model does that says its input, backwards, and its adapter.

    Attributes:
        batches: the inputs of each batch so far.
        gate: closed, it holds the batch that has begun.
        begun: set while there is one.
    """

    longest = LONGEST

    def __init__(self, batch_size=4, shapes=()):
        self.batch_size, self.shapes = batch_size, shapes
        self.batches, self.gate, self.begun = [], threading.Event(), threading.Event()
        self.gate.set()

    def warm_up(self, count, length, names):
        self.gate.wait(10)

    def __call__(self, inputs, names):
        texts = ["".join(map(chr, values)) for values in inputs]
        self.batches.append(texts)
        self.begun.set()
        self.gate.wait(10)
        for index, text in enumerate(texts):
            if text.startswith("NaN"):
                raise FloatingPointError("no answer to input 0")
            if text.startswith("bad"):
                raise RuntimeError("broken")
            yield index, {"prediction": text[::-1], "by": names and names[index]}
        self.begun.clear()


def encode(row):
    """The characters of a text."""
    return np.array([*map(ord, row["inputs"])], np.int32)


class Running:
    """A server in a thread of this process, and a client of it."""

    def __init__(
        self, answers, names=None, places=16, max_body=10_000, wait=0.0, reader=None, start=True
    ):
        metrics, expected = Metrics(), Expected(vocab_size=1000)
        inputs = FAMILIES["t5"].inputs
        reader = reader or Reader(inputs, encode, expected, LONGEST, names, max_rows=8)
        self.batcher = Batcher(answers, names, places, wait, metrics)
        self.service = Service(reader, self.batcher, names, max_body, metrics)
        self.server = Server(self.service, self.batcher)
        self._listener = listen("127.0.0.1", 0)
        self.port = self._listener.getsockname()[1]
        self.error = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        if start:
            self.thread.start()

    def run(self):
        """Until it is stopped."""
        try:
            asyncio.run(self.server.answer(self._listener))
        except Exception as error:
            self.error = error

    def stop(self):
        """What SIGTERM does."""
        self.server.stop()

    def until(self, condition):
        """Waits for something that is about to be."""
        for _ in range(4000):
            if condition():
                return
            time.sleep(0.005)
        raise AssertionError("it has not come")

    @property
    def waiting(self):
        """How many rows wait."""
        return len(self.batcher._waiting)

    def connection(self):
        return contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20))

    def ask(self, body=None, path="/predict", method=None, headers=JSON):
        """(status, value, headers) of a response; what is no bytes is sent as JSON."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with self.connection() as connection:
            method = method or ("GET" if body is None else "POST")
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            text = response.read()
        of_json = "json" in response.headers["Content-Type"]
        value = json.loads(text) if of_json else text.decode()
        return response.status, value, response.headers

    def ask_later(self, *arguments, **options):
        """The same, in a thread; its result is in the list that is returned, when it has come."""
        found = []
        asking = threading.Thread(
            target=lambda: found.append(self.ask(*arguments, **options)), daemon=True
        )
        asking.start()
        return found


@contextlib.contextmanager
def running(answers, **options):
    """A `Running` that is ready, and is stopped in the end."""
    made = Running(answers, **options)
    try:
        made.until(lambda: made.batcher.ready)
        yield made
    finally:
        if isinstance(answers, Echo):
            answers.gate.set()
        made.stop()
        made.thread.join(20)
        assert not made.thread.is_alive()


def _main():
    answers = Echo()
    server = Running(answers, start=False)
    answers.gate = threading.Event()  # closed
    stop = server.server.stop

    def told():
        stop()
        print("asked to stop", flush=True)

    def ask():
        server.until(lambda: server.batcher.ready)
        server.ask_later({"inputs": "x"})
        answers.begun.wait()
        print("a batch has begun", flush=True)

    server.server.stop = told
    threading.Thread(target=ask, daemon=True).start()
    server.run()


if __name__ == "__main__":
    _main()
