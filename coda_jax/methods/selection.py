"""Which tokens a row's scores pick, and how much each weighs.

Axis letters: B batch, N tokens, K slots (the static capacity), S segments.
"""

from fractions import Fraction
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coda_jax.methods import routing_kernel
from coda_jax.methods.soft_topk import hard_topk, one_row_per_constraint, soft_topk
from coda_jax.nn.cuda import with_kernel
from coda_jax.nn.tokens import in_slots, running_count
from coda_jax.sharding import num_parts


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
    return _selected(scores, k, num_slots, mask, segment_ids, jnp.ones_like(scores))[:2]


def _selected(scores, k, num_slots, mask, segment_ids, weights):
    """As of `select`, and the weights, which are not negative."""
    segments = mask.astype(jnp.int32) if segment_ids is None else segment_ids
    scores, k, mask = one_row_per_constraint(lax.stop_gradient(scores), k, mask, segments)
    picked = hard_topk(scores, k, mask).any(axis=1)
    # The rest of the slots hold the first other tokens, so that no index repeats.
    count = running_count(picked)
    others = jnp.arange(1, picked.shape[1] + 1) - count
    spare = num_slots - count[:, -1:]
    slots = jnp.where(picked | (others <= spare), count + jnp.minimum(others, spare) - 1, num_slots)
    # Of tokens that are not picked it is negative, so that one value says both.
    indices, weights = in_slots(slots, jnp.where(picked, weights, -1.0), num_slots)
    valid = ~(weights < 0)  # a weight that is NaN must not pass unseen
    return indices, valid, jnp.where(valid, weights, 0.0)


def pick_and_weigh(
    scores: Float[Array, "b n"],
    k: Int[Array, "b s"],
    num_slots: int,
    mask: Bool[Array, "b n"],
    segment_ids: Int[Array, "b n"] | None = None,
    epsilon: float = 1.0,
    solver: str = "exact",
    num_iterations: int = 20,
) -> tuple[Int[Array, "b k"], Bool[Array, "b k"], Float[Array, "b k"]]:
    """`select`, and the weights of what it picked in the soft top-k, 0 in empty slots.

    Args:
        scores: [B, N] float32.
        k: [B, S], as of `select`.
        num_slots: K, as of `select`.
        mask: [B, N], as of `select`.
        segment_ids: [B, N], as of `select`.
        epsilon: of the soft top-k.
        solver: likewise.
        num_iterations: likewise.
    """
    plain = functools.partial(
        _pick_and_weigh,
        num_slots=num_slots,
        segment_ids=segment_ids,
        epsilon=epsilon,
        solver=solver,
        num_iterations=num_iterations,
    )
    cuda, (rows, length) = plain, scores.shape
    alone = segment_ids is None and num_parts("batch", rows) == 1
    if solver == "exact" and alone and length <= routing_kernel.MOST_TOKENS:
        cuda = functools.partial(_pick_and_weigh_by_kernel, num_slots, epsilon)
    return lax.platform_dependent(scores, k, mask, cuda=cuda, default=plain)


def _pick_and_weigh(scores, k, mask, *, num_slots, segment_ids=None, epsilon, **solver):
    segments = mask.astype(jnp.int32) if segment_ids is None else segment_ids
    weights = soft_topk(scores, k, epsilon=epsilon, mask=mask, segment_ids=segments, **solver)
    return _selected(scores, k, num_slots, mask, segment_ids, weights)


def _shapes(scores, *_, num_slots, **options):
    shape = scores.shape[0], num_slots
    return [jax.ShapeDtypeStruct(shape, x) for x in (jnp.int32, jnp.bool, jnp.float32)]


_in_kernel = with_kernel(_pick_and_weigh, routing_kernel.route, _shapes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pick_and_weigh_by_kernel(num_slots, epsilon, scores, k, mask):
    return tuple(_in_kernel(scores, k, mask, num_slots=num_slots, epsilon=epsilon))


def _pick_and_weigh_by_kernel_fwd(num_slots, epsilon, scores, k, mask):
    def weights(scores):
        found = _pick_and_weigh(scores, k, mask, num_slots=num_slots, epsilon=epsilon)
        return found[2], found[:2]

    weights, of_scores, picked = jax.vjp(weights, scores, has_aux=True)
    return (*picked, weights), of_scores


def _pick_and_weigh_by_kernel_bwd(num_slots, epsilon, of_scores, cotangents):
    return *of_scores(cotangents[2]), None, None


_pick_and_weigh_by_kernel.defvjp(_pick_and_weigh_by_kernel_fwd, _pick_and_weigh_by_kernel_bwd)
