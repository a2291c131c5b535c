"""Soft top-k: the differentiable relaxation of "pick the k largest scores".

    maximise  <s, lam> + eps * H(lam)   subject to  sum(lam) = k,  0 <= lam_i <= 1

with the entropy `H(lam) = -sum_i lam_i log lam_i`. The solution is

    lam_i = min(1, exp((s_i + a) / eps))

for the one scalar `a` at which the weights sum to k. As eps -> 0 it becomes the hard top-k; k = 1
gives `softmax(s / eps)`; k = n gives all ones.

Axis letters: N tokens, S segments (packed examples in a row), `...` any batch axes.
"""

from functools import partial
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from coda_jax import checks
from coda_jax.methods.kth_largest import kth_key, kth_largest
from coda_jax.nn import one_hot

# Stands for a masked score: far below every real score, and finite, so that no `inf - inf` arises.
_MASKED = -1e9
# Up to so many tokens a TPU compares each with each.
_IN_ORDER = 1024

SOLVERS = ("exact", "iterative")
ITERATIONS = checks.Whole(1, 10_000)
EPSILON = checks.Number(least=1e-6, most=1e6)  # beyond, gradients leave float32


def soft_topk(
    scores: Float[Array, "*batch n"],
    k: int | Int[Array, "..."],
    *,
    epsilon: float = 1.0,
    solver: str = "exact",
    num_iterations: int = 20,
    epsilon_init: float = 4.0,
    epsilon_decay: float = 0.7,
    mask: Bool[Array, "*#batch n"] | None = None,
    segment_ids: Int[Array, "*#batch n"] | None = None,
) -> Float[Array, "*batch n"]:
    """Weights in [0, 1] that sum to k and are monotone in the scores.

    Where at most k tokens are unmasked, the exact solver gives each of them exactly 1; the
    iterative one only comes near it, as with every sum. All arithmetic is float32.

    Args:
        scores: [..., N].
        k: number of tokens to pick, at least 1: an int, or an int array that broadcasts to the
            batch axes. With `segment_ids` it has one more axis, [..., S], and `k[..., j]` is for
            the segment with id `j + 1`. In an array, 0 picks nothing.
        epsilon: temperature, above 0, in units of the scores.
        solver: "exact", which ends at the solution, and whose gradient is the closed form; or
            "iterative", the paper's fixed number of steps, differentiated step by step.
        num_iterations: steps of the iterative solver.
        epsilon_init: temperature of its first step.
        epsilon_decay: factor on the temperature after each step, until it reaches `epsilon`.
        mask: [..., N], False for padding. Masked tokens get exactly 0.
        segment_ids: [..., N], 1..S for packed examples and 0 for padding. Each segment has a
            constraint of its own.

    Returns:
        [..., N] float32.

    Raises:
        ValueError: an argument is out of its range; `segment_ids` with a scalar k.

    Reference: Lei et al. 2023, Conditional Adapters, section 3.3 and appendix (soft top-k).
    """
    _check(k, segment_ids)
    EPSILON("epsilon", epsilon)
    EPSILON("epsilon_init", epsilon_init)
    checks.Number(above=0, most=1)("epsilon_decay", epsilon_decay)
    checks.OneOf(SOLVERS)("solver", solver)
    ITERATIONS("num_iterations", num_iterations)
    scores, k, mask = one_row_per_constraint(scores, k, mask, segment_ids)
    if segment_ids is None:
        scores, k, mask = (x[..., None, :] for x in (scores, k, mask))
    if solver == "exact":
        weights = _exact(scores, k, mask, epsilon)
    else:
        weights = _iterative(scores, k, mask, epsilon, num_iterations, epsilon_init, epsilon_decay)
    return weights.sum(-2)


def one_row_per_constraint(
    scores: Float[Array, "*batch n"],
    k: int | Int[Array, "..."],
    mask: Bool[Array, "*#batch n"] | None,
    segment_ids: Int[Array, "*#batch n"] | None,
) -> tuple[Float[Array, "... n"], Int[Array, "... 1"], Bool[Array, "... n"]]:
    """Scores, k and mask of the same batch axes; each segment a row in which the rest is masked.

    Returns:
        scores [..., N] float32 or [..., S, N]; k [..., 1], at most the mask's count; and the mask,
        False also where k is 0.
    """
    scores = jnp.asarray(scores, jnp.float32)
    k = jnp.asarray(k, jnp.int32)
    mask = jnp.ones(scores.shape, bool) if mask is None else mask
    if segment_ids is not None:
        segments = jnp.arange(1, k.shape[-1] + 1)[:, None]
        mask = (segment_ids[..., None, :] == segments) & mask[..., None, :]
        scores = scores[..., None, :]
    scores, mask = jnp.broadcast_arrays(scores, mask)
    k = jnp.broadcast_to(k, scores.shape[:-1])[..., None]
    k = jnp.minimum(k, mask.sum(-1, keepdims=True))
    return scores, k, mask & (k > 0)


def _check(k, segment_ids):
    if not isinstance(k, np.ndarray | jax.Array):
        checks.COUNT("k", k)
    if segment_ids is not None and jnp.ndim(k) == 0:
        raise ValueError(f"with segment_ids, k must have one entry per segment, got the scalar {k}")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _exact(scores, k, mask, epsilon):
    """The optimum over the last axis; scores, mask [..., S, N]; k [..., S, 1].

    Scores are the same for each s, no token is unmasked for two, and k is at most the mask's count.
    """
    if scores.shape[-1] <= _IN_ORDER:
        tpu = partial(_solve_in_order, epsilon=epsilon)
    else:
        tpu = partial(_solve_by_search, epsilon=epsilon, on_tpu=True)
    search = partial(_solve_by_search, epsilon=epsilon, on_tpu=False)
    return lax.platform_dependent(scores, k, mask, tpu=tpu, default=search)


def _solve_by_search(scores, k, mask, *, epsilon, on_tpu):
    """By Newton's method.

    Let z = (s - s_k) / eps, where s_k is the k-th largest score, n the number of scores. The root a
    of `sum_i min(1, exp(z_i + a)) = k` lies between -ln(n - k + 1) and 0, since the k - 1 larger
    weights are at most 1 and the others at most exp(a). In t = exp(a) the sum is concave and
    piecewise linear, so Newton's method from the left,

        t = (k - |S|) / sum_{i not in S} exp(z_i),    S = {i: z_i + a > 0},

    rises to the root and is exact once S stays the same. Over scores of all kinds of spread that
    took at most 5 steps for n = 64, 7 for 512 and 8 for 4,096.
    """
    z = (scores - kth_largest(scores, k, mask, by_counts=on_tpu)) / epsilon
    z = jnp.where(mask, z, -jnp.inf)
    exp_z = jnp.exp(z)  # infinite only where saturated from the start
    sums = _sums_in_one_pass if on_tpu else _sums

    def newton(_, a):
        saturated = z + a > 0
        taken, free = sums(saturated, jnp.where(saturated, 0.0, exp_z))
        # Only where nothing is asked for (k = 0) is what is left not positive.
        return jnp.minimum(jnp.log(jnp.maximum(k - taken, 1) / free), 0.0)

    start = -jnp.log((mask.sum(-1, keepdims=True) - k + 1).astype(jnp.float32))
    rounds = 4 + scores.shape[-1].bit_length() // 2
    a = lax.fori_loop(0, rounds, newton, start, unroll=rounds if on_tpu else 1)
    return _weights(z, a, k, mask)


def _sums(saturated, free):
    return saturated.sum(-1, keepdims=True), free.sum(-1, keepdims=True)


def _sums_in_one_pass(saturated, free):
    """Both at once: for so little a TPU takes as long to begin a pass as for the pass."""

    def add(one, other):
        return one[0] + other[0], one[1] + other[1]

    zeros = np.float32(0), np.float32(0)
    found = lax.reduce((saturated.astype(jnp.float32), free), zeros, add, (free.ndim - 1,))
    return tuple(x[..., None] for x in found)


def _weights(z, a, k, mask):
    """min(1, exp(z + a)), with the sum k."""
    saturated = mask & (z + a >= 0)
    weights = jnp.where(mask, jnp.exp(jnp.minimum(z + a, 0.0)), 0.0)
    # The sum is met to the last digit by scaling the unsaturated weights.
    free = jnp.where(saturated, 0.0, weights).sum(-1, keepdims=True)
    scale = (k - saturated.sum(-1, keepdims=True)) / jnp.where(free > 0, free, 1.0)
    return jnp.where(saturated, 1.0, jnp.minimum(weights * scale, 1.0))


def _solve_in_order(scores, k, mask, *, epsilon):
    """The closed form, from the order of the scores alone, without a loop.

    If the m largest weights are 1, then a = ln((k - m) / sum of exp(z_j) over the others), which is
    the root for the smallest m whose own token, the next in order, comes out at 1 or below.
    """
    order = _Order.of(scores, mask)
    k_own, rank = order.to_tokens(k), order.rank
    kth = order.to_tokens(order.sum(jnp.where(rank == k_own - 1, order.scores, 0.0)))
    z = (order.scores - kth) / epsilon
    # Far above the k-th, a token is 1 whatever its exponential is.
    exp_z = jnp.where(order.segments > 0, jnp.exp(jnp.minimum(z, 50.0)), 0.0)
    behind = one_hot.chosen_sums(order.behind, exp_z)
    left = jnp.maximum(k_own - rank, 1)
    a = jnp.log(left / jnp.where(behind > 0, behind, 1.0))
    fits = (rank < k_own) & (z + a <= 0)
    first = order.to_tokens(order.least(jnp.where(fits, rank, scores.shape[-1])))
    a = order.sum(jnp.where(fits & (rank == first), a, 0.0))
    return _weights(jnp.where(mask, z[..., None, :], -jnp.inf), a, k, mask)


class _Order(NamedTuple):
    """Which token is ahead of which: larger, or equal and earlier; by comparing each with each.

    Of S constraints over N tokens, each of which belongs to at most one.

    Attributes:
        scores: [..., N].
        segments: [..., N], which constraint it is, from 1; 0 for none.
        mask: [..., S, N].
        behind: [..., N, N], whether the second is the first, or of the same constraint and behind.
        rank: [..., N], how many are ahead.
    """

    scores: Array
    segments: Array
    mask: Array
    behind: Array
    rank: Array

    @classmethod
    def of(cls, scores, mask):
        num_constraints, length = mask.shape[-2:]
        numbers = jnp.arange(1, num_constraints + 1, dtype=jnp.int32)[:, None]
        segments = jnp.where(mask, numbers, 0).sum(-2)
        scores = jnp.where(segments > 0, scores[..., 0, :], _MASKED)
        one, other = scores[..., :, None], scores[..., None, :]
        places = jnp.arange(length, dtype=jnp.int32)
        ahead = (other > one) | ((other == one) & (places < places[:, None]))
        behind = ~ahead
        if num_constraints > 1:
            same = segments[..., :, None] == segments[..., None, :]
            ahead, behind = ahead & same, behind & same
        rank = one_hot.chosen_sums(ahead, jnp.ones_like(scores)).astype(jnp.int32)
        return cls(scores, segments, mask, behind, rank)

    def to_tokens(self, values):
        """[..., S, 1] -> [..., N], 0 for tokens without a constraint."""
        return jnp.where(self.mask, values, 0).sum(-2)

    def sum(self, values):
        """[..., N] -> [..., S, 1]."""
        return jnp.where(self.mask, values[..., None, :], 0).sum(-1, keepdims=True)

    def least(self, values):
        """[..., N] -> [..., S, 1]."""
        largest = values.shape[-1]
        return jnp.where(self.mask, values[..., None, :], largest).min(-1, keepdims=True)


def hard_topk(
    scores: Float[Array, "*batch s n"], k: Int[Array, "*batch s 1"], mask: Bool[Array, "*batch s n"]
) -> Bool[Array, "*batch s n"]:
    """The k largest of the unmasked scores; of equal ones the earlier.

    Args:
        scores: [..., S, N] float32, the same for each s.
        k: [..., S, 1], at most the number of unmasked scores; 0 picks none.
        mask: [..., S, N], in which no two s have a token.
    """
    if scores.shape[-1] <= _IN_ORDER:
        tpu = _largest_in_order
    else:
        tpu = partial(_largest_by_search, on_tpu=True)
    search = partial(_largest_by_search, on_tpu=False)
    return lax.platform_dependent(scores, k, mask, tpu=tpu, default=search)


def _largest_in_order(scores, k, mask):
    order = _Order.of(scores, mask)
    return mask & (order.rank < order.to_tokens(k))[..., None, :]


def _largest_by_search(scores, k, mask, *, on_tpu):
    # To compare the scores with `kth_largest` would not do: the compiler may compute a score twice,
    # with another rounding, and then none is equal. So these are the keys that were searched.
    found, keys = kth_key(scores, k, mask, by_counts=on_tpu)
    above, ties = mask & (keys > found), mask & (keys == found)
    wanted = k - above.sum(-1, keepdims=True)
    count = one_hot.running_count if on_tpu else partial(jnp.cumsum, axis=-1)
    return above | (ties & (count(ties) <= wanted))


def _exact_fwd(scores, k, mask, epsilon):
    weights = _exact(scores, k, mask, epsilon)
    return weights, weights


def _exact_bwd(epsilon, weights, cotangent):
    """ds_i = lam_i / eps * (g_i - sum_U lam g / sum_U lam) for i in U = {lam_i < 1}, else 0.

    A weight of exactly 1 counts as saturated, also where it only touches the bound (a tie there has
    two one-sided derivatives, and this is the one from above). With U empty the gradient is 0.
    """
    free = jnp.where(weights < 1.0, weights, 0.0)
    total = free.sum(-1, keepdims=True)
    mean = (free * cotangent).sum(-1, keepdims=True) / jnp.where(total > 0, total, 1.0)
    return free / epsilon * (cotangent - mean), None, None


_exact.defvjp(_exact_fwd, _exact_bwd)


def _iterative(scores, k, mask, epsilon, num_iterations, epsilon_init, epsilon_decay):
    """The paper's coordinate updates of the dual variables a and b with a decaying temperature.

    a = eps_t (ln k - logsumexp((s + b) / eps_t)), b = min(-(s + a), 0); at the end
    lam = exp((s + a + b) / eps).
    """
    scores = jnp.where(mask, scores, _MASKED)
    log_k = jnp.log(jnp.maximum(k, 1).astype(jnp.float32))

    def step(carry, _):
        b, _, temperature = carry
        a = temperature * (
            log_k - jax.nn.logsumexp((scores + b) / temperature, axis=-1, keepdims=True)
        )
        b = jnp.minimum(-(scores + a), 0.0)
        return (b, a, jnp.maximum(temperature * epsilon_decay, epsilon)), None

    start = (
        jnp.zeros_like(scores),
        jnp.zeros_like(log_k),
        jnp.float32(max(epsilon_init, epsilon)),
    )
    (b, a, _), _ = lax.scan(step, start, length=num_iterations)
    return jnp.where(mask, jnp.exp((scores + a + b) / epsilon), 0.0)
