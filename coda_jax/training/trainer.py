"""The trainer: any number of devices, of one process or several, divide batches and parameters.

Only the trained leaves have gradients, optimizer state and a place in the checkpoints; the frozen
ones are an argument of the step. A run is a function of its arguments alone: the batches come in a
fixed order, one a step, the dropout of a step depends on the seed and the step, and a checkpoint
holds the step (and so the position in the data), the trained leaves and the optimizer's state. So a
run that is cut off and started again ends where an uncut one does, to the last bit; its log, too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import functools
import itertools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from coda_jax import methods, processes, trees
from coda_jax.objectives import Model
from coda_jax.sharding import Placement
from coda_jax.training import run_identity, schedules
from coda_jax.training.best import Best
from coda_jax.training.distillation import Distillation
from coda_jax.training.metrics_file import EVALUATION
from coda_jax.training.options import TrainOptions
from coda_jax.training.progress import Progress
from coda_jax.training.run_checkpoints import RunCheckpoints, Saved, recover
from coda_jax.training.run_directory import (
    Requests,
    checked,
    interruption,
    metric_writer,
    owned,
    saved_steps,
)
from coda_jax.training.steps import (
    Batch,
    Step,
    TrainState,
    check_parts,
    make_optimizer,
    make_train_step,
    partition,
    start,
    steps_of,
)

# In a checkpoint: the steps since the last log entry, with their sums; and the best evaluation.
_UNLOGGED, _BEST = "unlogged", "best"


def evaluate(
    model: Model,
    params: Mapping,
    batches: Iterable[Batch],
    placement: Placement,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The model's metrics over all batches; None where `stop` said so between two of them."""
    total = None
    for batch in batches:
        if stop():
            return None
        with placement.divided():
            sums = _sums(model)(params, placement.batch(batch))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise ValueError("there is no batch to evaluate on")
    return model.report(total)


@functools.cache
def _sums(model: Model):
    return jax.jit(lambda params, batch: model.loss(params, batch)[1])


def describe(model: Model, params: Mapping[str, Any]) -> str:
    """One line: total and trained parameters, and their share."""
    total = trees.count(params)
    share = trees.count(partition(model, params)[0])
    names = ", ".join(method.name for method in model.config.methods)
    return (
        f"parameters: {total:,} in total, {share:,} trained ({share / total:.2%} of all, {names})"
    )


def train(
    model: Model,
    params: Mapping,
    batches: Iterator[Batch],
    *,
    options: TrainOptions,
    optimizer: Callable[..., optax.GradientTransformation],
    learning_rate: schedules.Rate,
    directory: str | os.PathLike,
    run: Mapping[str, Any],
    eval_batches: Callable[[], Iterable[Batch]] | None = None,
    placement: Placement | None = None,
    distillation: Distillation | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Trains from `params`, or from the newest checkpoint in `directory`, to the end.

    Args:
        model, params: what to train, and the parameters to start from.
        batches: of the whole run, in one order; a restarted run skips those that it took.
        options: how long and how often.
        optimizer: for example `optax.adamw`; called as `optimizer(learning_rate=...)`.
        learning_rate: a number, an optax schedule, or one that takes the run's steps.
        directory: of the run's checkpoints and logs.
        run: what identifies the data, as JSON; "eval_data" only where `best_metric` is set.
        eval_batches: makes a pass over the evaluation data.
        placement: the devices; None for all, which share the rows of a batch.
        distillation: a teacher to follow.

    Returns:
        The parameters at the end, or the best where `best_metric` is set, and their metrics.

    Raises:
        ValueError: the directory holds another run, the batches end too early, a value is out of
            its range, or devices cannot share the model.
        FloatingPointError: a loss, a metric or what would be saved was not finite; it is not saved.
        Interruption: SIGTERM, SIGHUP or Ctrl-C came; the state is saved.
    """
    mode = options.best_mode(model, eval_batches is not None)
    learning_rate = schedules.of_run(learning_rate, options.total_steps)
    rate = schedules.checked(learning_rate, options.total_steps)
    options.check_model(model)
    first, batches = _peek(batches, options)
    _announce(model, params, distillation, first)
    of_run = model, params, options, optimizer, learning_rate, first, distillation
    run = run_identity.identify(*of_run) | dict(run)
    run = run_identity.run_file(run, placement := placement or Placement())
    with (
        owned(directory := checked(directory).absolute()),
        interruption() as requests,
        _checkpoints(directory, run, options, mode, model) as kept,
    ):
        transform = make_optimizer(model, optimizer, learning_rate, options.max_grad_norm)
        state, frozen, step = _start(model, params, transform, options, placement, distillation)
        saved = kept.restore(state)
        with metric_writer(directory, int(saved.state.step)) as write:
            loop = _Loop(
                model, frozen, placement, options, eval_batches, kept, write, requests, rate, step
            )
            state, metrics, _ = kept.best(loop.run(saved, batches))
    return trees.merge(processes.fetch(state.trained), partition(model, params)[1]), metrics


def _start(
    model: Model,
    params: Mapping,
    optimizer: optax.GradientTransformation,
    options: TrainOptions,
    placement: Placement,
    distillation: Distillation | None,
) -> tuple[TrainState, dict[str, Any], Callable[[int], Step]]:
    """The state before the first step, the frozen leaves, and the step of each number."""
    state, frozen, shardings = start(model, params, optimizer, placement)

    def make(routed: Model) -> Step:
        of_step = optimizer, options.accumulation, options.seed, shardings
        return make_train_step(routed, *of_step, distillation)

    step = steps_of(model, functools.partial(options.methods_of, model), make)
    if distillation is None:
        return state, frozen, step
    own = distillation.own_leaves(partition(model, params)[1], placement)
    return state, frozen, lambda number: functools.partial(step(number), teacher=own)


def _announce(
    model: Model, params: Mapping, distillation: Distillation | None, first: Batch
) -> None:
    """Prints what is trained, and what a teacher costs."""
    print(describe(model, params), flush=True)
    if distillation is not None:
        print(distillation.cost(model, first), flush=True)


def _peek(batches: Iterator[Batch], options: TrainOptions) -> tuple[Batch, Iterator[Batch]]:
    """The first batch, and all of them."""
    first = next(batches, None)
    if first is None:
        raise ValueError(f"the data ended after 0 of {options.total_steps} batches")
    check_parts(first, options.accumulation)
    return first, itertools.chain([first], batches)


def _checkpoints(
    directory: pathlib.Path, run: Mapping, options: TrainOptions, best_mode: str, model: Model
) -> RunCheckpoints:
    """Those of a folder, which must be of this run or of none."""
    evaluated_on = run.get("eval_data")
    if options.best_metric is None:  # they decide nothing
        run = {name: value for name, value in run.items() if name != "eval_data"}
    processes.from_first(lambda: recover(directory))
    run_identity.check_run(directory, run)
    if saved_steps(directory):
        run_identity.say_other_machine(directory, run)
    first = methods.least_steps(model.config.methods)
    chosen = {"best_metric": options.best_metric, "best_mode": best_mode, "best_from": first}
    return RunCheckpoints(directory, run, options.keep, **chosen, evaluated_on=evaluated_on)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """Takes a step for each batch; logs, evaluates and saves as often as the options say."""

    model: Model
    frozen: Mapping[str, Any]
    placement: Placement
    options: TrainOptions
    eval_batches: Callable[[], Iterable[Batch]] | None
    checkpoints: RunCheckpoints
    write: Callable[[int, Mapping[str, float]], None]
    requests: Requests
    rate: Callable[[int], float]
    step: Callable[[int], Step]

    @functools.cached_property
    def best(self) -> Best:
        """The best evaluation so far."""
        mode = self.options.best_mode(self.model, self.eval_batches is not None)
        first = methods.least_steps(self.model.config.methods)
        return Best(self.options.best_metric, mode, self.options.patience, first)

    def _saves_at(self, number: int) -> bool:
        """Whether a checkpoint, with an evaluation, is due after a step."""
        return number % self.options.save_every == 0 or number == self.options.total_steps

    def _evaluated(self, state: TrainState) -> dict[str, float] | None:
        """The metrics; None where there are no data, or the run is to stop."""
        if self.eval_batches is None:
            return None
        params = trees.merge(state.trained, self.frozen)
        batches = self.eval_batches()
        metrics = evaluate(self.model, params, batches, self.placement, self.requests)
        if metrics is not None:
            number = int(state.step)
            self.write(number, {f"{EVALUATION}{name}": x for name, x in metrics.items()})
            self.best.note(number, metrics)
        return metrics

    def _of_methods(self, state: TrainState) -> dict[str, float]:
        """What methods say of their own leaves."""
        own = [
            method
            for method in self.model.config.methods
            if type(method).progress is not methods.Method.progress
        ]
        trained = processes.fetch(state.trained) if own else {}
        return {name: x for method in own for name, x in method.progress(trained).items()}

    def _begins(self, number: int) -> str:
        """What a run that goes on from a checkpoint does."""
        if self.best.is_over:
            return "the run is finished: by its patience it ended"
        finished = number == self.options.total_steps
        return "the run is finished: it ended" if finished else "continuing"

    def _stop(self, number: int) -> None:
        of = f"of {self.options.total_steps}"
        self.requests.stop(f"step {number} {of} is saved" if number else f"before step 1 {of}")

    def run(self, saved: Saved, batches: Iterator[Batch]) -> TrainState:
        """The state after the last step.

        Args:
            saved: the checkpoint that the run goes on from, or the first state.
            batches: of the whole run.
        """
        state, metrics, carried = saved
        number, total = int(state.step), self.options.total_steps
        self.best.go_on(number, metrics, carried.get(_BEST))
        unevaluated = number and not metrics and self._saves_at(number)
        if unevaluated and (metrics := self._evaluated(state)) is not None:
            self.checkpoints.replace(state, metrics, carried | {_BEST: self.best.carried})
        if number:
            print(f"{self._begins(number)} at step {number} of {total}", flush=True)
        self._stop(number)
        if self.best.is_over:
            return state
        unlogged = carried.get(_UNLOGGED, ())
        with Progress(total, number, self.model.report, unlogged) as progress:
            for batch in itertools.islice(batches, number, total):
                with self.placement.divided():
                    step = self.step(number)
                    state, sums = step(state, self.frozen, self.placement.batch(batch))
                number += 1
                progress.add(number, sums)
                saving = self._saves_at(number)
                if saving or number % self.options.log_every == 0:
                    rate = float(self.rate(number - 1))
                    own = self._of_methods(state)
                    self.write(number, progress.flush() | {"learning_rate": rate} | own)
                metrics = self._evaluated(state) if saving else None
                if metrics is not None:
                    own = {name: x for name, x in own.items() if "/" not in name}
                    progress.show(metrics | own, self.best.said)
                if saving or self.requests():
                    carried = {_UNLOGGED: progress.unlogged(), _BEST: self.best.carried}
                    self.checkpoints.save(state, metrics, carried)
                    self._stop(number)
                if self.best.is_over:
                    return state
        if number < total:
            raise ValueError(f"the data ended after {number} of {total} batches")
        return state
