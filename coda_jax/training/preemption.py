"""A T5X training that is asked to stop saves its state after the step that it takes.

T5X saves and ends where its trainer raises its PreemptionError, and nothing in T5X raises it. Its
trainer keeps no state between the steps of a part of the training: it is kept here.
"""

from collections.abc import Iterable, Iterator
import contextlib
import signal
from typing import Any

import jax
import orbax.checkpoint as ocp

from coda_jax.training.run_directory import Interruption, interruption


class StopsOnRequest:
    """What is put before T5X's trainer, so that it stops on SIGTERM, SIGHUP or Ctrl-C.

    Several processes stop after the same step, that of JAX's preemption service, which SIGTERM to
    any of them sets; it is there where `jax.distributed` is. It counts T5X's steps, as orbax does.

    Attributes:
        stopped: the error that is raised, a class of T5X's PreemptionError.
    """

    stopped: type[Interruption]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._state = self._requests = None
        self._agreed = False
        self._open = contextlib.ExitStack()
        if jax.process_count() == 1:
            self._requests = self._open.enter_context(interruption())

    def close(self):
        """As T5X's; signals are what they were before."""
        super().close()
        self._open.close()

    def compile_train(self, batch):
        """As T5X's; the compiled step leaves its state here."""
        super().compile_train(batch)
        step = self._compiled_train_step

        def kept(state, batch):
            self._state, metrics = step(state, batch)
            return self._state, metrics

        self._compiled_train_step = kept

    def train(self, batch_iter, num_steps, start_step=None):
        """Trains as T5X does, see there; raises `stopped` after a step, whose state is kept.

        At least one step is taken: T5X cannot save a step twice.
        """
        if start_step is None:
            start_step = int(self.train_state.step)
        try:
            batches = self._until_asked(batch_iter, start_step)
            summary = super().train(batches, num_steps, start_step)
        except _Asked as asked:
            self.train_state, last = self._state, asked.step
        else:
            last = start_step + num_steps
        if self._asked(last):
            signum = self._signal()
            text = f"stopped by {signum.name}: step {last} is saved; the same command goes on"
            raise self.stopped(text, signum)
        return summary

    def _until_asked(self, batches: Iterable[Any], step: int) -> Iterator[Any]:
        """The batches, the first of them for a step; raises _Asked before one after a request."""
        for now, batch in enumerate(batches, start=step):
            if self._asked(now) and now > step:
                raise _Asked(now)
            yield batch

    def _asked(self, step: int) -> bool:
        """Whether the run is to stop before a step: several processes before the same one."""
        if self._requests is not None:
            return self._requests()
        self._agreed = self._agreed or ocp.utils.reached_preemption(step)
        return self._agreed

    def _signal(self) -> signal.Signals:
        try:
            if self._requests is not None:
                self._requests.stop("")
        except Interruption as request:
            return signal.Signals(request.exit_code - 128)
        return signal.SIGTERM


class _Asked(Exception):
    """Before the batch of a step, which is not taken."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step
