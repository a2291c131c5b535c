"""The trainer for one host and any number of its devices.

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
import math
import pathlib
import time
from typing import Any

import flax.struct
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from coda_jax import checks, methods, trees
from coda_jax.objectives import Model, Sums
from coda_jax.sharding import Placement
from coda_jax.training import schedules
from coda_jax.training.run_directory import (
    Interruption,
    RunCheckpoints,
    interruption,
    metric_writer,
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
    model: Model, optimizer: optax.GradientTransformation, accumulation: int, seed: int
) -> Callable[[TrainState, Mapping, Batch], tuple[TrainState, Sums]]:
    """The jitted step (state, frozen, batch) -> (state, sums); the state's buffers are reused.

    The gradient is that of the mean loss over all target tokens of the batch, however many parts
    and devices it is spread over.
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
            parts = jax.tree.map(
                lambda x: x.reshape(accumulation, x.shape[0] // accumulation, *x.shape[1:]), batch
            )
            zeros = jax.tree.map(jnp.zeros_like, state.trained), Sums(*[jnp.zeros(())] * 5)
            (gradients, sums), _ = lax.scan(part, zeros, (jnp.arange(accumulation), parts))
        gradients = jax.tree.map(lambda g: g / jnp.maximum(sums.weight, 1), gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return TrainState(state.step + 1, trained, optimizer_state), sums

    return jax.jit(step, donate_argnums=0)


def evaluate(
    model: Model, params: Mapping, batches: Iterable[Batch], placement: Placement
) -> dict[str, float]:
    """The model's metrics over all batches."""
    total = None
    for batch in batches:
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
    model: Model, params: Mapping, transform: optax.GradientTransformation, placement: Placement
) -> tuple[TrainState, dict[str, Any]]:
    """The state before the first step, and the frozen leaves, on their devices."""
    trained, frozen = map(placement.params, partition(model, params))
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    state = TrainState(jnp.zeros((), jnp.int32), trained, transform.init(trained))
    return placement.params(state), frozen


def train(
    model: Model,
    params: Mapping,
    batches: Iterator[Batch],
    *,
    options: TrainOptions,
    optimizer: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    directory: str | pathlib.Path,
    run: Mapping[str, Any],
    eval_batches: Callable[[], Iterable[Batch]] | None = None,
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
        run: what identifies the run, as JSON.
        eval_batches: makes a pass over the evaluation data.

    Returns:
        The parameters at the end, or the best where `best_metric` is set, and their metrics.

    Raises:
        ValueError: the directory holds another run, the batches end before the last step, or an
            option, a learning rate among them, is out of its range.
        FloatingPointError: a loss was not finite; the last checkpoint is from before that.
        Interruption: SIGTERM came; the state is saved.
    """
    best_mode = options.best_mode(model, eval_batches is not None)
    rate = schedules.checked(learning_rate, options.total_steps)
    print(describe(model, params), flush=True)
    transform = make_optimizer(model, optimizer, learning_rate, options.max_grad_norm)
    placement = Placement()
    state, frozen = _start(model, params, transform, placement)
    step = make_train_step(model, transform, options.accumulation, options.seed)

    def take_step(state, batch):
        return step(state, frozen, placement.batch(batch))

    def evaluation(state):
        merged = trees.merge(state.trained, frozen)
        return eval_batches and evaluate(model, merged, eval_batches(), placement)

    with (
        RunCheckpoints(directory, run, options.keep, options.best_metric, best_mode) as checkpoints,
        metric_writer(directory) as write,
    ):
        state, _ = checkpoints.restore(state)
        batches = itertools.islice(batches, int(state.step), options.total_steps)
        state = _loop(
            state, batches, take_step, evaluation, model.report, options, rate, checkpoints, write
        )
        state, metrics = checkpoints.best(state)
    return trees.merge(jax.device_get(state.trained), jax.device_get(frozen)), metrics


def _loop(
    state: TrainState,
    batches: Iterable[Batch],
    take_step: Callable[[TrainState, Batch], tuple[TrainState, Sums]],
    evaluation: Callable[[TrainState], dict[str, float] | None],
    metrics_of: Callable[[Sums], dict[str, float]],
    options: TrainOptions,
    rate: Callable[[int], float],
    checkpoints: RunCheckpoints,
    write: Callable[[int, Mapping[str, float]], None],
) -> TrainState:
    """Takes a step for each batch; logs, evaluates and saves as often as the options say."""
    number = int(state.step)
    with (
        interruption() as interrupted,
        _Progress(options.total_steps, number, metrics_of) as progress,
    ):
        for batch in batches:
            state, sums = take_step(state, batch)
            number += 1
            progress.add(number, sums)
            saving = number % options.save_every == 0 or number == options.total_steps
            if saving or number % options.log_every == 0 or interrupted():
                write(number, progress.flush() | {"learning_rate": float(rate(number - 1))})
            metrics = evaluation(state) if saving else None
            if metrics is not None:
                write(number, {f"eval/{name}": value for name, value in metrics.items()})
                progress.show(metrics)
            if saving or interrupted():
                checkpoints.save(state, metrics)
            if interrupted() and number < options.total_steps:
                raise Interruption(f"stopped by SIGTERM after step {number}; the state is saved")
    if number < options.total_steps:
        raise ValueError(f"the data ended after {number} of {options.total_steps} batches")
    return state


class _Progress:
    """The progress bar, and the check that no loss was missed that is not finite."""

    def __init__(
        self, total_steps: int, start: int, metrics_of: Callable[[Sums], dict[str, float]]
    ):
        self._metrics_of = metrics_of
        self._bar = tqdm(total=total_steps, initial=start, unit="step", mininterval=1.0)
        self._pending: list[tuple[int, Sums]] = []
        self._since = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._bar.close()

    def add(self, step: int, sums: Sums) -> None:
        """Notes a step's sums without waiting for the device."""
        self._pending.append((step, sums))
        self._bar.update()

    def flush(self) -> dict[str, float]:
        """Metrics since the last call; FloatingPointError names the first step without a loss."""
        pending, self._pending = jax.device_get(self._pending), []
        for step, sums in pending:
            if not math.isfinite(sums.loss):
                raise FloatingPointError(
                    f"the loss of step {step} is {sums.loss}; the last checkpoint is from before it"
                )
        total = jax.tree.map(lambda *x: np.sum(x), *[sums for _, sums in pending])
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        metrics = self._metrics_of(total) | {"examples_per_second": float(total.examples) / seconds}
        self._bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, {metrics['examples_per_second']:.1f} examples/s"
        )
        return metrics

    def show(self, metrics: Mapping[str, float]) -> None:
        """Prints an evaluation's metrics above the bar."""
        self._since = time.monotonic()
        values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._bar.write(f"step {self._bar.n}: {values}")
