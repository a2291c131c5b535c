"""Learning rates over a run."""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from coda_jax import checks

RATE = checks.Number(above=0)


@dataclasses.dataclass(frozen=True)
class OverRun:
    """A schedule over the whole of a run, whose steps are not known yet.

    Attributes:
        make: (steps of the run) -> the schedule.
    """

    make: Callable[[int], optax.Schedule]


Rate = optax.ScalarOrSchedule | OverRun


def of_run(learning_rate: Rate, total_steps: int | None) -> optax.ScalarOrSchedule:
    """The rate of a run of so many steps; ValueError where they are not known."""
    total_steps = checks.COUNT("TrainOptions.total_steps", total_steps)
    return learning_rate.make(total_steps) if isinstance(learning_rate, OverRun) else learning_rate


def warmup_cosine(
    peak_value: float,
    total_steps: int | None = None,
    warmup_steps: int = 20,
    end_value: float = 0.0,
) -> optax.Schedule | OverRun:
    """Linearly from 0 to a peak, then along a cosine to the end of the run.

    Args:
        peak_value: the greatest rate.
        total_steps: of the run; None for those that it will have.
        warmup_steps: up to the peak; at most a quarter of the run.
        end_value: the rate at the end.

    Raises:
        ValueError: a value is out of its range.
    """
    peak_value = RATE("warmup_cosine.peak_value", peak_value)
    total_steps = checks.Maybe(checks.COUNT)("warmup_cosine.total_steps", total_steps)
    warmup_steps = checks.Whole(0)("warmup_cosine.warmup_steps", warmup_steps)
    end_value = checks.Number(least=0, most=peak_value)("warmup_cosine.end_value", end_value)

    def make(steps):
        warmup = min(warmup_steps, steps // 4)
        return optax.warmup_cosine_decay_schedule(0.0, peak_value, warmup, steps, end_value)

    return OverRun(make) if total_steps is None else make(total_steps)


def rate_or_schedule(name: str, value: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
    """A constant rate, which must be above 0, or a schedule as it is; a check as in `checks`."""
    return value if callable(value) else RATE(name, value)


def rates(
    learning_rate: optax.Schedule, total_steps: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Some steps of a run, evenly spread, and the rates of a schedule at them.

    Args:
        learning_rate: the schedule.
        total_steps: of the run.
        most: steps.
    """
    steps = np.unique(np.linspace(0, total_steps - 1, min(total_steps, most)).astype(np.int32))
    found = np.broadcast_to(jax.vmap(learning_rate)(jnp.asarray(steps)), steps.shape)
    return steps, np.asarray(found)


def checked(learning_rate: Rate, total_steps: int) -> optax.Schedule:
    """The learning rate as a schedule; up to 10,000 of its rates in a run are checked.

    Args:
        learning_rate: a number, above 0, an optax schedule, or one that takes the run's steps.
        total_steps: of the run.

    Raises:
        ValueError: a rate is another one; its step is named.
    """
    learning_rate = of_run(learning_rate, total_steps)
    if not callable(learning_rate):
        rate = RATE("learning_rate", learning_rate)
        return lambda step: rate
    steps, found = rates(learning_rate, total_steps, most=10_000)
    for step, rate in zip(steps, found, strict=True):
        checks.Number(least=0)(f"learning_rate of step {step + 1}", rate)
    if not found.any():
        raise ValueError(f"learning_rate is 0 in all {total_steps} steps")
    return learning_rate
