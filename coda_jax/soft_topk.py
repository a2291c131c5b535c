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

# Stands for a masked score: far below every real score, and finite, so that no `inf - inf` arises.
_MASKED = -1e9

SOLVERS = ("exact", "iterative")


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
        solver: "exact", the closed form over the sorted scores, whose gradient is the closed form
            too; or "iterative", the paper's fixed number of steps, differentiated step by step.
        num_iterations: steps of the iterative solver.
        epsilon_init: temperature of its first step.
        epsilon_decay: factor on the temperature after each step, until it reaches `epsilon`.
        mask: [..., N], False for padding. Masked tokens get exactly 0.
        segment_ids: [..., N], 1..S for packed examples and 0 for padding. Each segment has a
            constraint of its own.

    Returns:
        [..., N] float32.

    Raises:
        ValueError: k below 1, epsilon not above 0, an unknown solver, or `segment_ids` with a
            scalar k.

    Reference: Lei et al. 2023, Conditional Adapters, section 3.3 and appendix (soft top-k).
    """
    _check(k, epsilon, solver, num_iterations, segment_ids)
    scores = jnp.asarray(scores, jnp.float32)
    k = jnp.asarray(k, jnp.int32)
    mask = jnp.ones(scores.shape, bool) if mask is None else mask
    if segment_ids is not None:
        # A segment is a row of its own in which all other tokens are masked.
        segments = jnp.arange(1, k.shape[-1] + 1)[:, None]
        mask = (segment_ids[..., None, :] == segments) & mask[..., None, :]
        scores = scores[..., None, :]
    scores, mask = jnp.broadcast_arrays(scores, mask)
    k = jnp.broadcast_to(k, scores.shape[:-1])[..., None]
    k = jnp.minimum(k, mask.sum(-1, keepdims=True))
    mask &= k > 0
    if solver == "exact":
        weights = _exact(scores, k, mask, epsilon)
    else:
        weights = _iterative(scores, k, mask, epsilon, num_iterations, epsilon_init, epsilon_decay)
    return weights if segment_ids is None else weights.sum(-2)


def _check(k, epsilon, solver, num_iterations, segment_ids):
    if isinstance(k, int) and k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
    if segment_ids is not None and jnp.ndim(k) == 0:
        raise ValueError(f"with segment_ids, k must have one entry per segment, got the scalar {k}")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _exact(scores, k, mask, epsilon):
    """The optimum over the last axis: scores, mask [..., N]; k [..., 1], at most the mask's count.

    Let z = s / eps be sorted in descending order. If the first m weights are saturated at 1, the
    others share what is left: exp(a / eps) = (k - m) / sum_{i >= m} exp(z_i). The right m is the
    smallest for which the largest of the others stays at or below 1; m = k - 1 always qualifies.
    """
    z = jnp.where(mask, scores, -jnp.inf)
    top = z.max(-1, keepdims=True)
    z = (z - jnp.where(jnp.isfinite(top), top, 0.0)) / epsilon
    descending = -jnp.sort(-z, axis=-1)
    left = k - jnp.arange(z.shape[-1])
    shift = jnp.log(jnp.maximum(left, 1)) - lax.cumlogsumexp(
        descending, axis=z.ndim - 1, reverse=True
    )
    fits = (left > 0) & (descending + shift <= 0)
    num_saturated = jnp.argmax(fits, axis=-1, keepdims=True)
    z += jnp.take_along_axis(shift, num_saturated, axis=-1)

    saturated = mask & ((z >= 0) | (k == mask.sum(-1, keepdims=True)))
    weights = jnp.where(saturated, 1.0, jnp.where(mask, jnp.exp(jnp.minimum(z, 0.0)), 0.0))
    # |z| can be in the hundreds, where float32 resolves 1e-5: the sum is met to the last digit by
    # scaling the unsaturated weights.
    free = jnp.where(saturated, 0.0, weights).sum(-1, keepdims=True)
    scale = (k - saturated.sum(-1, keepdims=True)) / jnp.where(free > 0, free, 1.0)
    return jnp.where(saturated, 1.0, jnp.minimum(weights * scale, 1.0))


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
