"""How the routing of a step differs from the model's own.

One adapter for every speed: each step draws one r from a list. A warm start: r rises from 1, where
the model is the dense one, to its own. An annealed temperature: epsilon falls to the model's own
from a higher one. Each way to route is a compiled program, so rises and falls have a few stages.
"""

from collections.abc import Sequence

import numpy as np

from coda_jax import checks
from coda_jax.methods import (
    EPSILON,
    REDUCTION,
    Method,
    check_reduction,
    epsilon_of,
    reduction_of,
    with_epsilon,
    with_reduction,
)

STAGES = 8
CHECKS = {  # of the options
    "reductions": checks.Maybe(checks.Each(check_reduction, least=1)),
    "reduction_start": checks.Maybe(REDUCTION),
    "epsilon_start": checks.Maybe(EPSILON),
}


def routed(
    methods: Sequence[Method],
    step: int,
    *,
    total_steps: int,
    seed: int,
    reductions: Sequence[float | tuple[float, ...]] | None = None,
    reduction_start: float | None = None,
    epsilon_start: float | None = None,
) -> tuple[Method, ...]:
    """The methods as they route at a step.

    Args:
        methods: the model's own.
        step: its number, from 0.
        total_steps: of the run.
        seed: of the run.
        reductions: the step trains at one of these, drawn by the seed and the step; None for the
            model's own.
        reduction_start: r in the first of 8 equal stages of the first half of the run, which go
            geometrically to the model's own, or to those drawn; None for no such stages.
        epsilon_start: the temperature in the first of 8 equal stages of the run, which go
            geometrically to the model's own; None for the model's own throughout.

    Raises:
        ValueError: an option is given, and none of the methods routes.
    """
    if reductions is not None:
        drawn = np.random.default_rng((seed, step)).integers(len(reductions))
        methods = with_reduction(methods, reductions[drawn])
    if reduction_start is not None:
        last = reduction_of(methods) or 1.0  # without a routing the next line raises
        between = _between(reduction_start, last, _stage(2 * step, total_steps))
        methods = with_reduction(methods, between)
    if epsilon_start is not None:
        last = epsilon_of(methods) or 1.0
        methods = with_epsilon(methods, _between(epsilon_start, last, _stage(step, total_steps)))
    return tuple(methods)


def _stage(step: int, total_steps: int) -> float:
    """From 0 in the first stage to 1 in the last, and behind it."""
    stages = min(STAGES, total_steps)
    return min(step * stages // total_steps, stages - 1) / (stages - 1) if stages > 1 else 1.0


def _between(first, last, share):
    if isinstance(last, tuple):
        return tuple(_between(first, x, share) for x in last)
    return first ** (1 - share) * last**share
