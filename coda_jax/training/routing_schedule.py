"""How the routing of a step differs from the model's own.

One adapter for every speed: each step draws one r from a list. An annealed temperature: epsilon
falls to the model's own from a higher one, in stages. Each way to route is a compiled program, so
both are few.
"""

from collections.abc import Sequence

import numpy as np

from coda_jax import checks
from coda_jax.methods import Method, check_reduction, epsilon_of, with_epsilon, with_reduction

STAGES = 8  # of an annealed epsilon
CHECKS = {  # of the options
    "reductions": checks.Maybe(checks.Each(check_reduction, least=1)),
    "epsilon_start": checks.Maybe(checks.Number(above=0)),
}


def routed(
    methods: Sequence[Method],
    step: int,
    *,
    total_steps: int,
    seed: int,
    reductions: Sequence[float | tuple[float, ...]] | None = None,
    epsilon_start: float | None = None,
) -> tuple[Method, ...]:
    """The methods of the step that follows `step` others.

    Args:
        methods: the model's own.
        step: from 0.
        total_steps: of the run.
        seed: of the run.
        reductions: the step trains at one of these, drawn by the seed and the step; None for the
            model's own.
        epsilon_start: the temperature of the first of 8 equal stages, which fall geometrically to
            the model's own; None for the model's own throughout.

    Raises:
        ValueError: an option is given, and none of the methods routes.
    """
    if reductions is not None:
        drawn = np.random.default_rng((seed, step)).integers(len(reductions))
        methods = with_reduction(methods, reductions[drawn])
    if epsilon_start is not None:
        last = epsilon_of(methods) or 1.0  # without a routing the last line raises
        share = min(step * STAGES // total_steps, STAGES - 1) / (STAGES - 1)
        methods = with_epsilon(methods, epsilon_start ** (1 - share) * last**share)
    return tuple(methods)
