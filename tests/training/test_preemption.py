"""A T5X training that is asked to stop ends after a step, with its state; without T5X."""

import os
import signal

import jax
import orbax.checkpoint as ocp
import pytest

from coda_jax.training.preemption import StopsOnRequest
from coda_jax.training.run_directory import Interruption


class FakeTrainer:
    """What T5X's trainer does with steps: a state is kept after the last of them."""

    def __init__(self):
        self.train_state, self.asked_at, self.closed = 0, None, False

    def compile_train(self, batch):
        """As T5X's."""

        def step(state, batch):
            if batch == self.asked_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return state + batch, None

        self._compiled_train_step = step

    def train(self, batch_iter, num_steps, start_step=None):
        """As T5X's."""
        state = self.train_state
        for _ in range(num_steps):
            state, _ = self._compiled_train_step(state, next(batch_iter))
        self.train_state = state
        return "summary"

    def close(self):
        """As T5X's."""
        self.closed = True


class Trainer(StopsOnRequest, FakeTrainer):
    """As `checked_trainer` makes it."""

    stopped = type("Stopped", (Interruption,), {})


@pytest.fixture(name="trainer")
def fixture_trainer():
    """A trainer whose step has been compiled."""
    trainer = Trainer()
    trainer.compile_train(None)
    yield trainer
    trainer.close()


def batches():
    """A digit for each step."""
    return (10**number for number in range(6))


def test_without_a_request_nothing_is_changed(trainer):
    given = batches()
    assert trainer.train(given, 2, start_step=100) == "summary"
    assert trainer.train(given, 3, start_step=102) == "summary"
    assert trainer.train_state == 11111


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_request_ends_the_run_after_the_step_that_it_takes(trainer, signum):
    before = signal.signal(signum, signal.default_int_handler)
    trainer = Trainer()
    trainer.compile_train(None)
    given = batches()
    trainer.train(given, 2, start_step=100)
    os.kill(os.getpid(), signum)  # between two parts: a step is taken, as this one is saved
    message = f"stopped by {signum.name}: step 103 is saved; the same command goes on"
    with pytest.raises(Trainer.stopped, match=message) as error:
        trainer.train(given, 3, start_step=102)
    assert error.value.exit_code == 128 + signum
    assert trainer.train_state == 111 and next(given) == 10000
    trainer.close()
    assert trainer.closed and signal.signal(signum, before) is signal.default_int_handler


@pytest.mark.parametrize("taken", [1, 3, 4])
def test_it_may_come_in_any_step_of_a_part(trainer, taken):
    trainer.asked_at = 10 ** (taken - 1)
    with pytest.raises(Trainer.stopped, match=f"step {100 + taken} is saved"):
        trainer.train(batches(), 4, start_step=100)
    assert trainer.train_state == int("1" * taken)


def test_several_processes_stop_where_jax_says(monkeypatch):
    asked = []

    def reached(step):
        asked.append(step)
        return step == 102

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(ocp.utils, "reached_preemption", reached)
    handler = signal.getsignal(signal.SIGTERM)
    trainer = Trainer()
    assert signal.getsignal(signal.SIGTERM) is handler  # which is the preemption service's
    trainer.compile_train(None)
    with pytest.raises(Trainer.stopped, match="stopped by SIGTERM: step 102 is saved"):
        trainer.train(batches(), 4, start_step=100)
    assert asked == [100, 101, 102] and trainer.train_state == 11
