"""Soft top-k: the differentiable relaxation of "pick the k largest scores".

    maximise  <s, lam> + eps * H(lam)   subject to  sum(lam) = k,  0 <= lam_i <= 1

with the entropy `H(lam) = -sum_i lam_i log lam_i`. The solution is

    lam_i = min(1, exp((s_i + a) / eps))

for the one scalar `a` at which the weights sum to k. As eps -> 0 it becomes the hard top-k; k = 1
gives `softmax(s / eps)`; k = n gives all ones.

Axis letters: N tokens, S segments (packed examples in a row), `...` any batch axes.
"""

from functools import partial

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from coda_jax import checks

# Stands for a masked score: far below every real score, and finite, so that no `inf - inf` arises.
_MASKED = -1e9
_TOP_BIT = np.uint32(1 << 31)  # a float32's sign

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
        solver: "exact", Newton's method, which ends at the solution, and whose gradient is the
            closed form; or "iterative", the paper's fixed number of steps, differentiated step by
            step.
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
    if solver == "exact":
        weights = _exact(scores, k, mask, epsilon)
    else:
        weights = _iterative(scores, k, mask, epsilon, num_iterations, epsilon_init, epsilon_decay)
    return weights if segment_ids is None else weights.sum(-2)


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
    """The optimum over the last axis: scores, mask [..., N]; k [..., 1], at most the mask's count.

    Let z = (s - s_k) / eps, where s_k is the k-th largest score, n the number of scores. The root a
    of `sum_i min(1, exp(z_i + a)) = k` lies between -ln(n - k + 1) and 0, since the k - 1 larger
    weights are at most 1 and the others at most exp(a). In t = exp(a) the sum is concave and
    piecewise linear, so Newton's method from the left,

        t = (k - |S|) / sum_{i not in S} exp(z_i),    S = {i: z_i + a > 0},

    rises to the root and is exact once S stays the same. Over scores of all kinds of spread that
    took at most 5 steps for n = 64, 7 for 512 and 8 for 4,096.
    """
    z = (scores - kth_largest(scores, k, mask)) / epsilon
    z = jnp.where(mask, z, -jnp.inf)
    exp_z = jnp.exp(z)  # infinite only where saturated from the start

    def newton(_, a):
        saturated = z + a > 0
        left = k - saturated.sum(-1, keepdims=True)
        free = jnp.where(saturated, 0.0, exp_z).sum(-1, keepdims=True)
        # Only where nothing is asked for (k = 0) is `left` not positive.
        return jnp.minimum(jnp.log(jnp.maximum(left, 1) / free), 0.0)

    start = -jnp.log((mask.sum(-1, keepdims=True) - k + 1).astype(jnp.float32))
    a = lax.fori_loop(0, 4 + scores.shape[-1].bit_length() // 2, newton, start)
    saturated = mask & (z + a >= 0)
    weights = jnp.where(mask, jnp.exp(jnp.minimum(z + a, 0.0)), 0.0)
    # The sum is met to the last digit by scaling the unsaturated weights.
    free = jnp.where(saturated, 0.0, weights).sum(-1, keepdims=True)
    scale = (k - saturated.sum(-1, keepdims=True)) / jnp.where(free > 0, free, 1.0)
    return jnp.where(saturated, 1.0, jnp.minimum(weights * scale, 1.0))


def kth_largest(
    scores: Float[Array, "*batch n"], k: Int[Array, "*batch 1"], mask: Bool[Array, "*batch n"]
) -> Float[Array, "*batch 1"]:
    """The k-th largest of the unmasked scores, without sorting.

    Args:
        scores: [..., N] float32.
        k: [..., 1]; 0 counts as 1.
        mask: [..., N]. Where fewer than k are unmasked, the result is meaningless.
    """
    found, _ = _kth_key(scores, k, mask)
    bits = jnp.where(found < _TOP_BIT, ~found, found ^ _TOP_BIT)
    return lax.bitcast_convert_type(bits, jnp.float32)


def above_and_at_kth_largest(
    scores: Float[Array, "*batch n"], k: Int[Array, "*batch 1"], mask: Bool[Array, "*batch n"]
) -> tuple[Bool[Array, "*batch n"], Bool[Array, "*batch n"]]:
    """Which unmasked scores are above the k-th largest, and which are equal to it.

    Always fewer than k are above, and with those that are equal there are at least k. To compare
    the scores with `kth_largest` does not give that: the compiler may compute a score twice, with
    another rounding, and then none is equal. So these are the keys that were searched.

    Args:
        scores: [..., N] float32.
        k: [..., 1], at most the number of unmasked scores; 0 counts as 1.
        mask: [..., N].
    """
    found, keys = _kth_key(scores, k, mask)
    return mask & (keys > found), mask & (keys == found)


def _kth_key(scores, k, mask):
    """The key of the k-th largest score, and all keys, as they came out of the search.

    A key is a float32 as a whole number that is ordered like it. Digit by digit: the largest such
    that at least k of the scores' keys reach it.
    """
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)
    keys = jnp.where(mask, jnp.where(bits < _TOP_BIT, bits | _TOP_BIT, ~bits), 0)
    k = jnp.maximum(k, 1)
    digits = jnp.arange(1, 4, dtype=jnp.uint32)

    def add_digit(i, carry):
        found, keys = carry
        shift = (30 - 2 * i).astype(jnp.uint32)
        candidates = found | (digits << shift)
        reached = (keys[..., None, :] >= candidates[..., :, None]).sum(-1)
        return found | ((reached >= k).sum(-1, keepdims=True, dtype=jnp.uint32) << shift), keys

    return lax.fori_loop(0, 16, add_digit, (jnp.zeros(k.shape, jnp.uint32), keys))


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
