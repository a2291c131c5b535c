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
import os
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

from coda_jax import methods, trees
from coda_jax.objectives import Model, Sums
from coda_jax.sharding import Placement
from coda_jax.training import run_identity
from coda_jax.training.run_checkpoints import RunCheckpoints
from coda_jax.training.run_directory import Requests, interruption, metric_writer, owned

Batch = dict[str, np.ndarray]


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
        best_metric: name of the evaluation metric by which the kept ones are chosen; None: by age.
        best_mode: "max" or "min".
    """

    total_steps: int
    accumulation: int = 1
    max_grad_norm: float | None = 1.0
    seed: int = 0
    log_every: int = 20
    save_every: int = 500
    keep: int = 3
    best_metric: str | None = None
    best_mode: str = "max"

    def __post_init__(self):
        for name in ("total_steps", "accumulation", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainOptions.{name} must be at least 1: {getattr(self, name)}")
        if self.best_mode not in ("max", "min"):
            raise ValueError(f"TrainOptions.best_mode must be 'max' or 'min': {self.best_mode!r}")


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
        sums = _sums(model)(params, placement.batch(batch))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise ValueError("there is no batch to evaluate on")
    return model.metrics(total)


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
    directory: str | os.PathLike,
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
        run: what identifies the data, as JSON; see `run_identity` for the rest.
        eval_batches: makes a pass over the evaluation data.

    Returns:
        The parameters at the end, or the best where `best_metric` is set, and their metrics.

    Raises:
        ValueError: the directory holds another run, or the batches end before the last step.
        FloatingPointError: a loss, a metric or what would be saved was not finite; the last
            checkpoint is from before that.
        Interruption: SIGTERM, SIGHUP or Ctrl-C came; the state is saved.
    """
    print(describe(model, params), flush=True)
    first, batches = _peek(batches, options)
    known = run_identity.identify(model, params, options, optimizer, learning_rate, first)
    run, directory = run_identity.run_file({**known, **run}), pathlib.Path(directory).absolute()
    placement = Placement()
    with (
        owned(directory),
        interruption() as requests,
        _checkpoints(directory, run, options) as checkpoints,
        metric_writer(directory) as write,
    ):
        transform = make_optimizer(model, optimizer, learning_rate, options.max_grad_norm)
        state, frozen = _start(model, params, transform, placement)
        state, metrics = checkpoints.restore(state)
        loop = _Loop(
            model, frozen, placement, options, eval_batches, checkpoints, write, requests,
            rate=learning_rate if callable(learning_rate) else lambda step: learning_rate,
            step=make_train_step(model, transform, options.accumulation, options.seed),
        )  # fmt: skip
        if int(state.step) and (line := run_identity.machine_differs(directory, run)):
            print(line, flush=True)
        state, metrics = checkpoints.best(loop.run(state, batches, evaluated=bool(metrics)))
    return trees.merge(jax.device_get(state.trained), jax.device_get(frozen)), metrics


def _peek(batches: Iterator[Batch], options: TrainOptions) -> tuple[Batch, Iterator[Batch]]:
    """The first batch, and all of them."""
    first = next(batches, None)
    if first is None:
        raise ValueError(f"the data ended after 0 of {options.total_steps} batches")
    return first, itertools.chain([first], batches)


def _checkpoints(directory: pathlib.Path, run: Mapping, options: TrainOptions) -> RunCheckpoints:
    """Those of a folder, which must be of this run or of none."""
    run_identity.check_run(directory, run)
    return RunCheckpoints(directory, run, options.keep, options.best_metric, options.best_mode)


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
        if 0 < number < total:
            print(f"continuing at step {number} of {total}", flush=True)
        cut_off = number and not evaluated and self._saves_at(number)
        if cut_off and (metrics := self._evaluated(state)) is not None:
            self.checkpoints.replace(state, metrics)
        self._stop(number)
        with _Progress(total, number, self.model.metrics) as progress:
            for batch in itertools.islice(batches, number, total):
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


class _Progress:
    """The progress bar, and the check that no loss was missed that is not finite."""

    def __init__(
        self, total_steps: int, start: int, metrics_of: Callable[[Sums], dict[str, float]]
    ):
        self._metrics_of = metrics_of
        self._bar = tqdm(total=total_steps, initial=start, unit="step")
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
