"""Scores of the router's weights; higher means in distribution: a router that is sure.

A layer's candidates are the k tokens that the router picks for it. A candidate of weight m goes
through the layer by m, and past it by 1 - m.

Axis letters: B inputs, K slots.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax.scipy.special import entr
from jaxtyping import Array, Float

from coda_jax.nn.tokens import Selection

REJECTED_BELOW = 0.5  # weight of a candidate that goes past the layer rather than through it


def routing_scores(selections: Mapping[str, Selection]) -> dict[str, Float[Array, " b"]]:
    """{"router_entropy", "router_rejected"}, each [B] float32; {} of a model that does not route.

    Both are means over layers of a mean over the layer's candidates, with a minus: of the entropy
    -m ln m - (1 - m) ln(1 - m) of a weight, and of whether it is below `REJECTED_BELOW`.

    Args:
        selections: {layer: what it works on}, of the layers that route.
    """
    if not selections:
        return {}
    layers = [*selections.values()]
    entropies = [_mean(x, entr(x.weights) + entr(jnp.maximum(1 - x.weights, 0))) for x in layers]
    rejected = [_mean(x, x.weights < REJECTED_BELOW) for x in layers]
    means = {"router_entropy": entropies, "router_rejected": rejected}
    return {name: -jnp.stack(of_layers).mean(0) for name, of_layers in means.items()}


def _mean(selection: Selection, values: Array) -> Float[Array, " b"]:
    """The mean over a layer's candidates; 0 where there are none, in a row of padding."""
    total = jnp.where(selection.valid, values, 0).sum(-1, dtype=jnp.float32)
    return total / jnp.maximum(selection.valid.sum(-1), 1)
