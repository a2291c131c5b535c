"""The trainer: any number of devices, of one process or several, divide batches and parameters.

Only the trained leaves have gradients, optimizer state and a place in the checkpoints; the frozen
ones are an argument of the step. A run is a function of its arguments alone: the batches come in a
fixed order, one a step, the dropout of a step depends on the seed and the step, and a checkpoint
holds the step (and so the position in the data), the trained leaves and the optimizer's state. So a
run that is cut off and started again ends where an uncut one does, to the last bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import functools
import itertools
import os
import pathlib
from typing import Any

import flax.struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from coda_jax import checks, methods, processes, trees
from coda_jax.models import param_axes, placed
from coda_jax.objectives import Model, Sums
from coda_jax.sharding import Placement
from coda_jax.training import run_identity, schedules
from coda_jax.training.progress import Progress
from coda_jax.training.run_checkpoints import RunCheckpoints, recover
from coda_jax.training.run_directory import (
    Requests,
    interruption,
    metric_writer,
    owned,
    saved_steps,
)

Batch = dict[str, np.ndarray]
_NORM = checks.Number(above=0)


@flax.struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
        step: number of steps taken.
        trained: the trained leaves, float32.
        optimizer: the optimizer's state over them.
    """

    step: jax.Array
    trained: dict[str, Any]
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How long and how often.

    Attributes:
        total_steps: steps of the whole run, those before a restart included.
        accumulation: parts into which a batch is cut, to be worked through one after the other.
        max_grad_norm: gradients are scaled down to this global norm; None for no limit.
        seed: of the dropout.
        log_every: steps between log entries.
        save_every: steps between checkpoints, each with an evaluation before it.
        keep: checkpoints kept.
        best_metric: the metric of an evaluation, one of the model's `metrics`, by which the kept
            ones are chosen; None: by age.
    """

    total_steps: int
    accumulation: int = 1
    max_grad_norm: float | None = 1.0
    seed: int = 0
    log_every: int = 20
    save_every: int = 500
    keep: int = 3
    best_metric: str | None = None

    def __post_init__(self):
        counts = ("total_steps", "accumulation", "log_every", "save_every", "keep")
        checks.fields(
            self,
            **dict.fromkeys(counts, checks.COUNT),
            max_grad_norm=checks.Maybe(_NORM),
            seed=checks.SEED,
            best_metric=checks.Maybe(checks.text),
        )

    def best_mode(self, model: Model, evaluates: bool) -> str:
        """Whether more of the best metric is better, "max", or less, "min".

        Args:
            model: that is trained.
            evaluates: whether there is something to evaluate it on.

        Raises:
            ValueError: the model has no such metric, or is not evaluated.
        """
        if self.best_metric is None:
            return "max"
        name = f"TrainOptions.best_metric={self.best_metric!r}"
        if self.best_metric not in model.metrics:
            raise ValueError(f"{name} must be one of {[*model.metrics]} of {model.name!r}")
        if not evaluates:
            raise ValueError(f"{name} needs data to evaluate on, a split 'validation'")
        return model.metrics[self.best_metric].better


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    accumulation: int,
    seed: int,
    places: TrainState | None = None,
) -> Callable[[TrainState, Mapping, Batch], tuple[TrainState, Sums]]:
    """The jitted step (state, frozen, batch) -> (state, sums); the state's buffers are reused.

    The gradient is that of the mean loss over all target tokens of the batch, however many parts
    and devices it is spread over. `places` are the shardings of the next state, which XLA chooses
    otherwise.
    """

    def loss(trained, frozen, batch, rng):
        return model.loss(trees.merge(trained, frozen), batch, rng)

    grad = jax.grad(loss, has_aux=True)

    def step(state: TrainState, frozen: Mapping, batch: Batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        if not model.needs_rng:
            rng = None

        def part(total, inputs):
            index, microbatch = inputs
            part_rng = None if rng is None else jax.random.fold_in(rng, index)
            return jax.tree.map(
                jnp.add, total, grad(state.trained, frozen, microbatch, part_rng)
            ), None

        if accumulation == 1:
            gradients, sums = grad(state.trained, frozen, batch, rng)
        else:
            # A part has rows from all over the batch, so that each device has its share of it.
            parts = jax.tree.map(
                lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch
            )
            zeros = jax.tree.map(jnp.zeros_like, state.trained), Sums(*[jnp.zeros(())] * 5)
            (gradients, sums), _ = lax.scan(part, zeros, (jnp.arange(accumulation), parts))
        gradients = jax.tree.map(lambda g: g / jnp.maximum(sums.weight, 1), gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return TrainState(state.step + 1, trained, optimizer_state), sums

    return jax.jit(step, donate_argnums=0, out_shardings=places and (places, places.step))


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


def partition(model: Model, params: Mapping[str, Any]) -> tuple[dict, dict]:
    """(trained, frozen): what the config's methods train, and the objective's own leaves.

    Raises:
        ValueError: the config has no methods, so that nothing would be trained.
    """
    if not model.config.methods:
        raise ValueError("nothing is trained: the config has no methods")
    return trees.split(params, (*methods.trained(model.config), *model.creates))


def describe(model: Model, params: Mapping[str, Any]) -> str:
    """One line: total and trained parameters, and their share."""
    total = trees.count(params)
    share = trees.count(partition(model, params)[0])
    names = ", ".join(method.name for method in model.config.methods)
    return (
        f"parameters: {total:,} in total, {share:,} trained ({share / total:.2%} of all, {names})"
    )


def make_optimizer(
    model: Model,
    optimizer: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    max_grad_norm: float | None = None,
) -> optax.GradientTransformation:
    """The optimizer with clipping, and each method's own part of a step around it."""
    learning_rate = schedules.rate_or_schedule("learning_rate", learning_rate)
    max_grad_norm = checks.Maybe(_NORM)("max_grad_norm", max_grad_norm)
    transform = optimizer(learning_rate=learning_rate)
    if max_grad_norm is not None:
        transform = optax.chain(optax.clip_by_global_norm(max_grad_norm), transform)
    for method in model.config.methods:
        transform = method.wrap_optimizer(transform)
    return transform


def _start(
    model: Model,
    params: Mapping,
    transform: optax.GradientTransformation,
    options: TrainOptions,
    placement: Placement,
) -> tuple[TrainState, dict[str, Any], Callable]:
    """The state before the first step and the frozen leaves, on their devices, and the step."""
    trained, frozen = partition(model, placed(model.config, params, placement))

    def begin(trained):
        trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
        state = TrainState(jnp.zeros((), jnp.int32), trained, transform.init(trained))
        return jax.tree.map(jnp.copy, state)  # no buffer twice, as a step reuses each

    shapes = placement.shapes(jax.eval_shape(begin, trained), param_axes(model.config))
    places = jax.tree.map(lambda x: x.sharding, shapes)
    step = make_train_step(model, transform, options.accumulation, options.seed, places)
    return jax.jit(begin, out_shardings=places)(trained), frozen, step


def train(
    model: Model,
    params: Mapping,
    batches: Iterator[Batch],
    *,
    options: TrainOptions,
    optimizer: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    directory: str | os.PathLike,
    run: Mapping[str, Any],
    eval_batches: Callable[[], Iterable[Batch]] | None = None,
    placement: Placement | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Trains from `params`, or from the newest checkpoint in `directory`, to the last step.

    Args:
        model: what to train.
        params: the parameters to start from.
        batches: of the whole run, always in one order; a restarted run skips those that it took.
        options: how long and how often.
        optimizer: for example `optax.adamw`; called as `optimizer(learning_rate=...)`.
        learning_rate: a number or an optax schedule.
        directory: of the run's checkpoints and logs.
        run: what identifies the data, as JSON; see `run_identity` for the rest. "eval_data" in it
            does so only where `best_metric` is set; otherwise other data are evaluated on anew.
        eval_batches: makes a pass over the evaluation data.
        placement: the devices; None for all, which share the rows of a batch.

    Returns:
        The parameters at the end, or the best where `best_metric` is set, and their metrics.

    Raises:
        ValueError: the directory holds another run, the batches end before the last step, an option
            or the learning rate is out of its range, or devices cannot share the model.
        FloatingPointError: a loss, a metric or what would be saved was not finite; it is not saved.
        Interruption: SIGTERM, SIGHUP or Ctrl-C came; the state is saved.
    """
    best_mode = options.best_mode(model, eval_batches is not None)
    rate = schedules.checked(learning_rate, options.total_steps)
    print(describe(model, params), flush=True)
    first, batches = _peek(batches, options)
    known = run_identity.identify(model, params, options, optimizer, learning_rate, first)
    placement = placement or Placement()
    run = run_identity.run_file({**known, **run}, placement)
    directory = pathlib.Path(directory).absolute()
    with (
        owned(directory),
        interruption() as requests,
        _checkpoints(directory, run, options, best_mode) as checkpoints,
        metric_writer(directory) as write,
    ):
        transform = make_optimizer(model, optimizer, learning_rate, options.max_grad_norm)
        state, frozen, step = _start(model, params, transform, options, placement)
        state, metrics = checkpoints.restore(state)
        loop = _Loop(
            model, frozen, placement, options, eval_batches, checkpoints, write, requests, rate,
            step,
        )  # fmt: skip
        state, metrics = checkpoints.best(loop.run(state, batches, evaluated=bool(metrics)))
    return trees.merge(processes.fetch(state.trained), partition(model, params)[1]), metrics


def _peek(batches: Iterator[Batch], options: TrainOptions) -> tuple[Batch, Iterator[Batch]]:
    """The first batch, and all of them."""
    first = next(batches, None)
    if first is None:
        raise ValueError(f"the data ended after 0 of {options.total_steps} batches")
    return first, itertools.chain([first], batches)


def _checkpoints(
    directory: pathlib.Path, run: Mapping, options: TrainOptions, best_mode: str
) -> RunCheckpoints:
    """Those of a folder, which must be of this run or of none."""
    evaluated_on = run.get("eval_data")
    if options.best_metric is None:  # they decide nothing
        run = {name: value for name, value in run.items() if name != "eval_data"}
    processes.from_first(lambda: recover(directory))
    run_identity.check_run(directory, run)
    if saved_steps(directory):
        run_identity.say_other_machine(directory, run)
    chosen = {"best_metric": options.best_metric, "best_mode": best_mode}
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
    step: Callable[[TrainState, Mapping, Batch], tuple[TrainState, Sums]]

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
            self.write(int(state.step), {f"eval/{name}": x for name, x in metrics.items()})
        return metrics

    def _stop(self, number: int) -> None:
        of = f"of {self.options.total_steps}"
        self.requests.stop(f"step {number} {of} is saved" if number else f"before step 1 {of}")

    def run(self, state: TrainState, batches: Iterator[Batch], evaluated: bool) -> TrainState:
        """The state after the last step.

        Args:
            state: the first one, or that of a checkpoint.
            batches: of the whole run.
            evaluated: whether the checkpoint has an evaluation.
        """
        number, total = int(state.step), self.options.total_steps
        if number:
            done = "the run is finished: it ended" if number == total else "continuing"
            print(f"{done} at step {number} of {total}", flush=True)
        cut_off = number and not evaluated and self._saves_at(number)
        if cut_off and (metrics := self._evaluated(state)) is not None:
            self.checkpoints.replace(state, metrics)
        self._stop(number)
        with Progress(total, number, self.model.report) as progress:
            for batch in itertools.islice(batches, number, total):
                with self.placement.divided():
                    state, sums = self.step(state, self.frozen, self.placement.batch(batch))
                number += 1
                progress.add(number, sums)
                saving = self._saves_at(number)
                if saving or number % self.options.log_every == 0 or self.requests():
                    rate = float(self.rate(number - 1))
                    self.write(number, progress.flush() | {"learning_rate": rate})
                metrics = self._evaluated(state) if saving else None
                if metrics is not None:
                    progress.show(metrics)
                if saving or self.requests():
                    self.checkpoints.save(state, metrics)
                    self._stop(number)
        if number < total:
            raise ValueError(f"the data ended after {number} of {total} batches")
        return state
