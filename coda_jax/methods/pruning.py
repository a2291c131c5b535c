"""Which groups of weights vanish, and when: gates that carry scores, a schedule, a choice.

A group is what goes together: a hidden channel of a feed-forward block, a head of an attention, or
a block of a matrix. Its mask is a leaf, 1 or 0. The derivative of a gate by its mask is defined as
the group's score, so that either trainer brings it to the optimizer, which takes away groups.

Axis letters: B batch, G groups.
Reference: Hedegaard et al. 2022, Structured Pruning Adapters, arXiv 2211.10155.
"""

from collections.abc import Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CRITERIA = ("weight", "gradient", "taylor")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gated(
    axis: int,
    criterion: str,
    values: Float[Array, "b ..."],
    mask: Float[Array, "g"],
    norms: Float[Array, "g"],
) -> Float[Array, "b ..."]:
    """values * mask, whose derivative by the mask is the score of each group, at least 0.

    Args:
        axis: of the groups in the values.
        criterion: "taylor": sum over rows of |sum of value x gradient|; "gradient": sum of
            |gradient|; "weight": the given norms.
        values: [B, ...] what the groups give.
        mask: [G].
        norms: [G] of the groups' weights.
    """
    del criterion, norms
    return values * _along(axis, values, mask)


def _along(axis, values, mask):
    shape = [-1 if i == axis % values.ndim else 1 for i in range(values.ndim)]
    return mask.astype(values.dtype).reshape(shape)


def _gated_fwd(axis, criterion, values, mask, norms):
    return gated(axis, criterion, values, mask, norms), (values, mask, norms)


def _gated_bwd(axis, criterion, saved, cotangent):
    values, mask, norms = saved
    axis %= values.ndim
    others = tuple(i for i in range(1, values.ndim) if i != axis)
    gradient = cotangent.astype(jnp.float32)
    if criterion == "weight":
        scores = norms
    elif criterion == "gradient":
        scores = jnp.abs(gradient).sum((0, *others))
    else:
        scores = jnp.abs((values.astype(jnp.float32) * gradient).sum(others)).sum(0)
    return cotangent * _along(axis, values, mask), scores.astype(mask.dtype), jnp.zeros_like(norms)


gated.defvjp(_gated_fwd, _gated_bwd)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Groups go in equal shares: the first after step `start`, the last by `start + steps`.

    Attributes:
        density: the share of the prunable weights that stays in the end.
        start: steps before the first pruning, in which scores add up.
        steps: from the first pruning to the last.
        every: steps from one pruning to the next.
    """

    density: float
    start: int
    steps: int
    every: int

    @property
    def last(self) -> int:
        """The step of the last pruning."""
        return self.start + self.steps // self.every * self.every

    def due(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether groups go after a step, counted from 1."""
        later = step - self.start
        return (later >= 0) & (later % self.every == 0) & (later <= self.steps)

    def density_after(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """The share of the prunable weights that may stay after a step."""
        number = 1 + self.steps // self.every
        gone = jnp.clip(1 + (step - self.start) // self.every, 0, number)
        return 1 - (1 - self.density) * gone.astype(jnp.float32) / number


def keep_best(
    scores: Mapping[str, Float[Array, "..."]],
    masks: Mapping[str, Float[Array, "..."]],
    costs: Mapping[str, int],
    least: Mapping[str, int],
    density: Float[Array, ""] | float,
) -> dict[str, Float[Array, "..."]]:
    """The masks after the groups with the lowest scores are gone, over all sets of groups.

    Every set counts the same, with the sum of its scores' squares, and a group goes the sooner the
    less of it a weight of the group has: a head has as many as tens of channels. What is gone stays
    so.

    Args:
        scores: of each group, by the path of its set.
        masks: as they were.
        costs: weights of a group of each set.
        least: groups that stay in each set.
        density: the share of all weights that may stay.
    """
    ranked, prices = [], []
    for path, mask in masks.items():
        kept = mask.reshape(-1) > 0
        score = jnp.where(kept, scores[path].reshape(-1).astype(jnp.float32), 0)
        norm = jnp.sqrt(jnp.sum(jnp.square(score)))
        share = jnp.square(score / jnp.maximum(norm, 1e-30))
        score = jnp.where(kept, share / costs[path], -jnp.inf)
        place = jnp.argsort(jnp.argsort(-score))  # 0 for the best; ties go to the earlier
        ranked.append(jnp.where(place < least[path], jnp.inf, score))
        prices.append(jnp.full(score.shape, costs[path], jnp.float32))
    score, price = jnp.concatenate(ranked), jnp.concatenate(prices)
    order = jnp.argsort(score)
    gone = jnp.cumsum(price[order]) <= (1 - density) * price.sum() * (1 + 1e-6)
    gone &= score[order] < jnp.inf
    mask = jnp.ones_like(score).at[order].set(jnp.where(gone, 0.0, 1.0))
    parts, start = {}, 0
    for path, old in masks.items():
        part = mask[start : start + old.size].reshape(old.shape)
        parts[path], start = part.astype(old.dtype), start + old.size
    return parts


def keep_best_of_each(
    scores: Mapping[str, Float[Array, "..."]],
    masks: Mapping[str, Float[Array, "..."]],
    least: Mapping[str, int],
    density: Float[Array, ""] | float,
    together: Mapping[str, str],
) -> dict[str, Float[Array, "..."]]:
    """The masks after each set of groups has lost the same share.

    Args:
        scores, masks, least: as in `keep_best`.
        density: the share of each set that may stay, rounded up to a group.
        together: {path: name}; sets of one name lose the same groups, by the sums of their scores.
    """
    sums: dict[str, Array] = {}
    for path, name in together.items():
        sums[name] = sums.get(name, 0) + scores[path]
    kept = {}
    for path, mask in masks.items():
        score = jnp.where(mask > 0, sums[together[path]], -jnp.inf)
        place = jnp.argsort(jnp.argsort(-score))
        number = jnp.ceil(density * mask.size - 1e-4)
        kept[path] = (place < jnp.maximum(number, least[path])).astype(mask.dtype) * mask
    return kept


def kronecker(
    weights: Float[Array, "p n m"], prototypes: Float[Array, "p i j"]
) -> Float[Array, "d f"]:
    """sum_p kron(weights_p, prototypes_p), [n i, m j]."""
    (_, n, m), (_, i, j) = weights.shape, prototypes.shape
    return jnp.einsum("pnm,pij->nimj", weights, prototypes).reshape(n * i, m * j)


def masked_blocks(kernel: Float[Array, "d f"], mask: Float[Array, "n m"]) -> Float[Array, "d f"]:
    """The matrix with the blocks at zero whose mask is 0."""
    (n, m), (inputs, outputs) = mask.shape, kernel.shape
    blocks = kernel.reshape(n, inputs // n, m, outputs // m)
    return (blocks * mask[:, None, :, None].astype(kernel.dtype)).reshape(inputs, outputs)
