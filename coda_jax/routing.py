"""The router: one score per token, k tokens of each example picked by score.

Axis letters: B batch, N tokens, K slots (the static capacity), S segments, D embedding.
"""

import dataclasses
from fractions import Fraction
from typing import Any

from flax import linen as nn
from flax import struct
from flax.linen import partitioning
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coda_jax.soft_topk import SOLVERS, kth_largest, one_row_per_constraint, soft_topk

ROUTINGS = ("soft_topk", "sigmoid", "truncation")
ATTENTIONS = ("k_to_k", "k_to_all")


@dataclasses.dataclass(frozen=True)
class CodaConfig:
    """How the conditional layers of an encoder route.

    Attributes:
        reduction: r, at least 1: a layer works on ceil(length / r) tokens of each example. One
            number for all layers, or one for each; 1 is the dense layer. It changes no parameter,
            so a trained model can be run at another reduction.
        epsilon: temperature of the soft top-k.
        solver: of the soft top-k, "exact" or "iterative".
        num_iterations: steps of the iterative solver.
        attention: what selected tokens attend to: "k_to_k" (each other) or "k_to_all".
        routing: "soft_topk" (weights from the soft top-k of the scores), "sigmoid" (a picked
            token's weight is the sigmoid of its score) or "truncation" (the first k tokens with
            weight 1, no parameter).
        max_segments: the most examples in a packed row; each costs a slot more.
    """

    reduction: float | tuple[float, ...] = 3.0
    epsilon: float = 1.0
    solver: str = "exact"
    num_iterations: int = 20
    attention: str = "k_to_k"
    routing: str = "soft_topk"
    max_segments: int = 16

    def __post_init__(self):
        if isinstance(self.reduction, list):
            object.__setattr__(self, "reduction", tuple(self.reduction))
        for reduction in self.reductions(1):
            if not 1 <= reduction < float("inf"):
                raise ValueError(
                    f"CodaConfig.reduction must be a finite number >= 1, got {reduction}"
                )
        for name, value, allowed in (
            ("solver", self.solver, SOLVERS),
            ("attention", self.attention, ATTENTIONS),
            ("routing", self.routing, ROUTINGS),
        ):
            if value not in allowed:
                raise ValueError(f"CodaConfig.{name} must be one of {allowed}, got {value!r}")
        for name in ("epsilon", "num_iterations", "max_segments"):
            if not getattr(self, name) > 0:
                raise ValueError(f"CodaConfig.{name} must be above 0, got {getattr(self, name)}")

    def reductions(self, num_layers: int) -> tuple[float, ...]:
        """The reduction of each layer; one number stands for `num_layers` equal ones."""
        if isinstance(self.reduction, tuple):
            return self.reduction
        return (self.reduction,) * num_layers


@struct.dataclass
class Tokens:
    """What a layer knows of the tokens it works on (n is N for all of them, K for a selection).

    Attributes:
        x: [B, n, D] the residual stream.
        u: [B, n, D] the normalised residual stream, which layer, adapter and router read.
        positions: [B or 1, n] int32, each token's place in its row.
        mask: [B, n] bool, False for padding and for empty slots.
        segment_ids: [B, n] int, or None where rows are not packed.
    """

    x: Float[Array, "b n d"]
    u: Float[Array, "b n d"]
    positions: Int[Array, "_ n"]
    mask: Bool[Array, "b n"]
    segment_ids: Int[Array, "b n"] | None = None

    def visible(self, context: "Tokens") -> Bool[Array, "b 1 #n l"]:
        """Which tokens of a context these may attend to: no padding, and only their own segment."""
        visible = context.mask[:, None, None, :]
        if context.segment_ids is not None:
            same = self.segment_ids[:, :, None] == context.segment_ids[:, None, :]
            visible = visible & same[:, None]
        return visible


def pick(values: Array, indices: Int[Array, "b k"]) -> Array:
    """values[b, indices[b, k]] for values [B, N, ...] and indices that are in bounds."""
    indices = indices.reshape(indices.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, indices, axis=1, mode="promise_in_bounds")


@struct.dataclass
class Selection:
    """The tokens that a layer works on.

    Attributes:
        indices: [B, K] int32, strictly ascending in each row.
        weights: [B, K] float32, the token's routing weight; 0 in empty slots.
        valid: [B, K] bool, False in empty slots (a short example fills fewer than K).
    """

    indices: Int[Array, "b k"]
    weights: Float[Array, "b k"]
    valid: Bool[Array, "b k"]

    @jax.named_scope("gather")
    def gather(self, tokens: Tokens) -> Tokens:
        """The selected tokens, [B, N, ...] -> [B, K, ...]."""

        x, u = (pick(values, self.indices) for values in (tokens.x, tokens.u))
        segment_ids = tokens.segment_ids
        if segment_ids is not None:
            segment_ids = pick(segment_ids, self.indices)
        return Tokens(x, u, self.indices, self.valid, segment_ids)

    @jax.named_scope("scatter")
    def scatter_add(
        self, x: Float[Array, "b n d"], delta: Float[Array, "b k d"]
    ) -> Float[Array, "b n d"]:
        """x + scatter(weights * delta): each slot's weighted update goes to its token."""
        update = self.weights[..., None].astype(delta.dtype) * delta

        def add(row, indices, values):
            return row.at[indices].add(
                values, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
            )

        return jax.vmap(add)(x, self.indices, update)


def num_selected(length: int | Int[Array, "..."], reduction: float) -> int | Int[Array, "..."]:
    """k = ceil(length / reduction), in whole numbers; 0 for an empty example.

    Args:
        length: int, or an int array.
        reduction: at least 1.
    """
    ratio = Fraction(reduction).limit_denominator(1000)
    return -(-(length * ratio.denominator) // ratio.numerator)


def capacity(length: int, reduction: float, max_segments: int = 1) -> int:
    """K = ceil(N / r) + S - 1, at most N: slots that hold every segment's own ceil."""
    return min(length, num_selected(length, reduction) + max_segments - 1)


def select(
    scores: Float[Array, "b n"],
    k: Int[Array, "b s"],
    num_slots: int,
    mask: Bool[Array, "b n"],
    segment_ids: Int[Array, "b n"] | None = None,
) -> tuple[Int[Array, "b k"], Bool[Array, "b k"]]:
    """The k largest scores of each example, in ascending position order; ties go to the earlier.

    Args:
        scores: [B, N] float32.
        k: [B, S] tokens to pick from each segment, S = 1 where `segment_ids` is None.
        num_slots: K, at least `k.sum(-1)` and at most N.
        mask: [B, N], False for tokens that must not be picked.
        segment_ids: [B, N], 1..S for packed examples, 0 for padding.

    Returns:
        indices [B, K] int32, strictly ascending; valid [B, K], False in empty slots, whose indices
        are those of tokens that were not picked.
    """
    segments = mask.astype(jnp.int32) if segment_ids is None else segment_ids
    scores, k, mask = one_row_per_constraint(lax.stop_gradient(scores), k, mask, segments)
    threshold = kth_largest(scores, k, mask)
    above = mask & (scores > threshold)
    ties = mask & (scores == threshold)
    wanted = k - above.sum(-1, keepdims=True)
    picked = (above | (ties & (jnp.cumsum(ties, axis=-1) <= wanted))).any(axis=1)
    # The rest of the slots hold the first other tokens, so that no index repeats.
    spare = num_slots - picked.sum(-1, keepdims=True)
    taken = picked | (~picked & (jnp.cumsum(~picked, axis=-1) <= spare))
    indices = kept_first(taken, num_slots)
    return indices, jnp.take_along_axis(picked, indices, axis=1, mode="promise_in_bounds")


def kept_first(keep: Bool[Array, "b n"], num_slots: int) -> Int[Array, "b k"]:
    """The places of what is kept, [B, K] int32, in ascending order; 0 in the slots left over."""
    places = jnp.broadcast_to(jnp.arange(keep.shape[1], dtype=jnp.int32), keep.shape)
    slots = jnp.where(keep, jnp.cumsum(keep, axis=-1) - 1, num_slots)

    def put(slots, places):
        return jnp.zeros(num_slots, jnp.int32).at[slots].set(places, mode="drop")

    return jax.vmap(put)(slots, places)


class Router(nn.Module):
    """Scores the tokens, s = u . w, and picks k = ceil(length / reduction) of each example.

    Attributes:
        config: how tokens are scored and weighted.
        reduction: r of this layer, at least 1.
    """

    config: CodaConfig
    reduction: float

    @nn.compact
    def __call__(self, tokens: Tokens) -> Selection | None:
        """Picks tokens; None stands for all of them with weight 1, which is what r = 1 gives."""
        scores = self._scores(tokens.u)
        if self.reduction == 1:
            return None
        mask, segment_ids = tokens.mask, tokens.segment_ids
        num_segments = 1 if segment_ids is None else self.config.max_segments
        segments = mask.astype(jnp.int32) if segment_ids is None else segment_ids
        lengths = jnp.sum(
            (segments[:, None, :] == jnp.arange(1, num_segments + 1)[:, None]) & mask[:, None, :],
            axis=-1,
        )
        k = num_selected(lengths, self.reduction)
        slots = capacity(scores.shape[1], self.reduction, num_segments)
        indices, valid = select(scores, k, slots, mask, segment_ids)
        weights = self._weights(scores, k, mask, segments)
        weights = jnp.where(valid, jnp.take_along_axis(weights, indices, axis=-1), 0.0)
        if segment_ids is not None:
            # More segments than the slots were counted for cannot be an error inside a compiled
            # program, and must not pass unseen: it makes the loss NaN.
            overflow = segment_ids.max() > self.config.max_segments
            weights = jnp.where(overflow, jnp.nan, weights)
        selection = Selection(indices, weights, valid)
        self.sow("intermediates", "selection", selection)
        return selection

    def _scores(self, u: Float[Array, "b n d"]) -> Float[Array, "b n"]:
        if self.config.routing == "truncation":
            return jnp.broadcast_to(-jnp.arange(u.shape[1], dtype=jnp.float32), u.shape[:2])
        kernel = partitioning.param_with_axes(
            "kernel",
            nn.initializers.normal(u.shape[-1] ** -0.5),
            (u.shape[-1],),
            jnp.float32,
            axes=("embed",),
        )
        return jnp.einsum("bnd,d->bn", u.astype(jnp.float32), kernel.astype(jnp.float32))

    def _weights(self, scores, k, mask, segments) -> Any:
        if self.config.routing == "sigmoid":
            return nn.sigmoid(scores)
        if self.config.routing == "truncation":
            return jnp.ones_like(scores)
        return soft_topk(
            scores,
            k,
            epsilon=self.config.epsilon,
            solver=self.config.solver,
            num_iterations=self.config.num_iterations,
            mask=mask,
            segment_ids=segments,
        )
