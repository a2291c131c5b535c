"""Optimizers of optax whose numbers are checked; any other may be given in their place."""

import optax

from coda_jax import checks
from coda_jax.training import schedules

_DECAY = checks.Number(least=0, below=1)  # of a running mean


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """`optax.adamw`.

    Args:
        learning_rate: a number or an optax schedule.
        weight_decay: times the rate, the share of each parameter that a step takes away.
        b1: decay of the mean of the gradients.
        b2: decay of the mean of their squares.
        eps: added to the root of the latter.

    Raises:
        ValueError: a value is out of its range.
    """
    return optax.adamw(
        schedules.rate_or_schedule("adamw.learning_rate", learning_rate),
        b1=_DECAY("adamw.b1", b1),
        b2=_DECAY("adamw.b2", b2),
        eps=checks.Number(above=0)("adamw.eps", eps),
        weight_decay=checks.Number(least=0)("adamw.weight_decay", weight_decay),
    )


def adafactor(
    learning_rate: optax.ScalarOrSchedule, momentum: float | None = None
) -> optax.GradientTransformation:
    """`optax.adafactor`: steps are in proportion to each parameter's size.

    Args:
        learning_rate: a number or an optax schedule.
        momentum: decay of the mean of the steps; None for none.

    Raises:
        ValueError: a value is out of its range.
    """
    return optax.adafactor(
        schedules.rate_or_schedule("adafactor.learning_rate", learning_rate),
        momentum=checks.Maybe(_DECAY)("adafactor.momentum", momentum),
    )
