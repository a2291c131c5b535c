"""A bounded queue of rows, and the one thread that answers them in batches of similar lengths."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import threading
import time
from typing import Any

from absl import logging
import numpy as np

from coda_jax.data.batches import bucket
from coda_jax.serving.answers import Answers
from coda_jax.serving.metrics import Metrics


@dataclasses.dataclass(eq=False)
class Row:
    """A row that waits for its answer.

    Attributes:
        inputs: [n, ...].
        adapter: the name of its adapter; None without adapters.
        done: is told the answer, or the error, by the batcher's thread.
        arrived: when it was put into the queue, by `time.monotonic`.
    """

    inputs: np.ndarray
    adapter: str | None
    done: Callable[[dict[str, Any] | Exception], None]
    arrived: float = 0.0


class QueueFull(Exception):
    """There are no places for so many rows."""


class Batcher:
    """Answers rows: those of one length that wait longest are the next batch.

    A batch is begun when it is full, or `wait` seconds after its first row came. A place in the
    queue is taken by `reserve`, and free again where its row is begun or withdrawn.

    Args:
        answers: what answers them.
        names: of the adapters; None where there are none.
        places: rows that may wait.
        wait: seconds.
        metrics: what is told of queue and batches.

    Attributes:
        ready: whether all programs are compiled.
        closing: whether it ends as soon as nothing waits.
        failure: what has ended it; None for nothing.
    """

    def __init__(
        self,
        answers: Answers,
        names: Sequence[str] | None,
        places: int,
        wait: float,
        metrics: Metrics,
    ):
        self.ready = self.closing = False
        self.failure: Exception | None = None
        self._answers, self._names, self._wait, self._metrics = answers, names, wait, metrics
        self._places, self._reserved = places, 0
        self._waiting: list[Row] = []  # the oldest first
        self._begun: list[Row] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="coda_batcher", daemon=True)

    def start(self, then: Callable[[], None]) -> None:
        """Starts the thread, which compiles all programs first.

        It calls `then` when it is ready, and when it fails.
        """
        self._then = then
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a row has its place, waits or is being answered."""
        with self._changed:
            return bool(self._reserved or self._waiting or self._begun)

    def reserve(self, count: int) -> None:
        """Takes places for rows that are put or released later; raises QueueFull."""
        with self._changed:
            if self._reserved + len(self._waiting) + count > self._places:
                raise QueueFull
            self._reserved += count
            self._tell()

    def release(self, count: int) -> None:
        """Gives back places that were reserved."""
        with self._changed:
            self._reserved -= count
            self._tell()

    def put(self, rows: Iterable[Row]) -> None:
        """Rows whose places were reserved."""
        with self._changed:
            for row in rows:
                row.arrived = time.monotonic()
                self._waiting.append(row)
                self._reserved -= 1
            if self.failure is not None:
                self._refuse()
            self._changed.notify()

    def withdraw(self, rows: Sequence[Row]) -> None:
        """Takes rows out that nobody waits for any more; those that are begun are finished."""
        with self._changed:
            gone = set(rows)
            left = [row for row in self._waiting if row not in gone]
            self._metrics.withdrawn.inc(len(self._waiting) - len(left))
            self._waiting = left
            self._tell()

    def close(self) -> None:
        """Returns when all that was put is answered, and the thread has ended."""
        with self._changed:
            self.closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _tell(self) -> None:
        self._metrics.waiting.set(self._reserved + len(self._waiting))

    def _work(self) -> None:
        try:
            for count, length in self._answers.shapes:
                if self.closing:
                    return
                self._answers.warm_up(count, length, self._names)
            self.ready = True
            self._then()
            while batch := self._next():
                self._measured(batch)
        except Exception as error:  # the server ends with it
            with self._changed:
                self.ready, self.failure = False, error
                self._refuse()
            self._then()

    def _measured(self, batch: Sequence[Row]) -> None:
        started = time.monotonic()
        for row in batch:
            self._metrics.waited.observe(started - row.arrived)
        self._answer(batch)
        with self._changed:
            self._begun = []
        self._metrics.batch_rows.observe(len(batch))
        self._metrics.batch_seconds.observe(time.monotonic() - started)

    def _refuse(self) -> None:
        """Tells the rows that nobody will answer what has ended the thread."""
        unanswered = [*self._begun, *self._waiting]
        self._begun, self._waiting = [], []
        self._tell()
        for row in unanswered:
            row.done(self.failure)

    def _next(self) -> list[Row]:
        """The rows of the next batch; none where it is closing and nothing waits."""
        with self._changed:
            while True:
                if self._waiting:
                    batch, left = self._first_of_a_length(), self._seconds_left()
                    if len(batch) == self._answers.batch_size or left <= 0 or self.closing:
                        begun = set(batch)
                        self._waiting = [row for row in self._waiting if row not in begun]
                        self._begun = batch
                        self._tell()
                        return batch
                elif self.closing:
                    return []
                else:
                    left = None
                self._changed.wait(left)

    def _first_of_a_length(self) -> list[Row]:
        longest = self._answers.longest
        lengths = [bucket(len(row.inputs), longest) for row in self._waiting]
        pairs = zip(self._waiting, lengths, strict=True)
        return [row for row, x in pairs if x == lengths[0]][: self._answers.batch_size]

    def _seconds_left(self) -> float:
        return self._waiting[0].arrived + self._wait - time.monotonic()

    def _answer(self, batch: Sequence[Row]) -> None:
        left = dict(enumerate(batch))
        names = [row.adapter for row in batch] if self._names is not None else None
        try:
            for index, answer in self._answers([row.inputs for row in batch], names):
                left.pop(index).done(answer)
                self._metrics.answered.inc()
        except Exception as error:
            if len(batch) > 1:  # what one row does is no other's
                for row in left.values():
                    self._answer([row])
                return
            logging.exception("no answer")
            self._metrics.failed.inc(len(left))
            for row in left.values():
                row.done(error)
