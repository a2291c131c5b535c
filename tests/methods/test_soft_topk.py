"""Soft top-k: values and gradients against independent float64 solutions of the equations."""

import functools

from helpers import as_on_tpu, solution
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from coda_jax.methods.kth_largest import kth_largest
from coda_jax.methods.soft_topk import hard_topk, one_row_per_constraint, soft_topk

few_examples = settings(max_examples=25)
EPSILONS = (0.02, 0.1, 0.5, 1.0, 4.0)

# Compiled once for each shape and each choice that is static: `k` is not.
STATIC = ("epsilon", "num_iterations", "epsilon_init", "epsilon_decay")
exact, iterative = (
    jax.jit(functools.partial(soft_topk, solver=solver), static_argnames=STATIC)
    for solver in ("exact", "iterative")
)
SOLVERS = {"exact": exact, "iterative": iterative}
both_solvers = pytest.mark.parametrize("solver", SOLVERS)


def jacobian(weights, epsilon):
    """By hand: with l = lam on U = {lam < 1} and 0 elsewhere, (diag(l) - l l^T / sum(l)) / eps."""
    free = np.where(np.asarray(weights, np.float64) < 1, weights, 0.0).astype(np.float64)
    total = free.sum()
    outer = np.outer(free, free) / total if total > 0 else 0.0
    return (np.diag(free) - outer) / epsilon


def iterations(scores, k, epsilon, steps=20, epsilon_init=4.0, decay=0.7):
    """The paper's iterations in float64, written as they are printed."""
    scores = np.asarray(scores, np.float64)
    b = np.zeros_like(scores)
    temperature = max(epsilon_init, epsilon)
    for _ in range(steps):
        a = temperature * (np.log(k) - logsumexp((scores + b) / temperature))
        b = np.minimum(-(scores + a), 0)
        temperature = max(decay * temperature, epsilon)
    return np.exp((scores + a + b) / epsilon)


def finite_differences(function, scores, step=1e-6):
    """The Jacobian [outputs, inputs] of a float64 function."""
    scores = np.asarray(scores, np.float64)
    columns = []
    for i in range(len(scores)):
        up, down = scores.copy(), scores.copy()
        up[i] += step
        down[i] -= step
        columns.append((function(up) - function(down)) / (2 * step))
    return np.stack(columns, axis=-1)


REFERENCES = {"exact": solution, "iterative": iterations}


@few_examples
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from((0.01, 1.0, 10.0)),
    epsilon=st.sampled_from(EPSILONS),
    n_k=st.sampled_from(((1, 1), (7, 2), (64, 1), (64, 21), (64, 63), (300, 100))),
)
def test_exact_is_the_root(seed, scale, epsilon, n_k):
    n, k = n_k
    scores = np.float32(scale * np.random.default_rng(seed).normal(size=n))
    weights = np.asarray(exact(jnp.asarray(scores), k, epsilon=epsilon))
    # A score is a float32: at |s| / eps in the hundreds its last digit moves a weight by 1e-5.
    tolerance = 2e-6 + 1e-7 * np.abs(scores).max() / epsilon
    np.testing.assert_allclose(weights, solution(scores, k, epsilon), atol=tolerance)
    assert abs(weights.sum(dtype=np.float64) - k) < 1e-5 * k


@few_examples
@given(
    st.lists(st.floats(-50, 50, width=32), min_size=12, max_size=12),
    st.sampled_from((1, 5, 11, 12)),
    st.sampled_from(EPSILONS),
)
def test_weights_are_in_range_sum_to_k_and_are_monotone(scores, k, epsilon):
    for solver in (exact, iterative):
        weights = np.asarray(solver(jnp.asarray(scores, jnp.float32), k, epsilon=epsilon))
        assert (weights >= 0).all() and (weights <= 1).all()
        assert (np.diff(weights[np.argsort(scores, kind="stable")]) >= -1e-6).all()
        if solver is exact:
            assert abs(weights.sum(dtype=np.float64) - k) < 1e-5 * k


@pytest.mark.parametrize("n", [7, 512, 4096])
def test_newton_arrives_however_the_scores_are_spread(n, rng):
    places = np.arange(n)
    spreads = [
        rng.normal(size=n),
        rng.exponential(size=n),
        rng.standard_cauchy(n),
        rng.random(n) * 100,
        -np.log1p(places),
        -2 * np.log1p(places),
        0.01 * places,
        1.0 * places,
    ]
    scores = jnp.asarray(np.stack(spreads), jnp.float32)
    for k in sorted({1, n // 8 or 2, n // 2, 9 * n // 10, n - 1}):
        for epsilon in (0.1, 1.0):
            expected = np.stack([solution(row, k, epsilon) for row in scores])
            np.testing.assert_allclose(exact(scores, k=k, epsilon=epsilon), expected, atol=2e-4)


@given(
    scores=st.lists(
        st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1e-40]),
        min_size=8,
        max_size=8,
    ),
    k=st.integers(1, 8),
    masked=st.integers(0, 7),
)
@few_examples
def test_kth_largest_is_that_of_sorting(scores, k, masked):
    k = min(k, 8 - masked)
    scores = np.array(scores, np.float32)
    mask = np.arange(8) >= masked
    for by_counts in (False, True):
        found = kth_largest(jnp.asarray(scores), jnp.array([k]), jnp.asarray(mask), by_counts)
        assert found == np.sort(scores[mask])[-k]


@pytest.mark.parametrize("length", [30, 1500])  # which TPUs compare each with each, and do not
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_tpus_find_the_same_root_and_the_same_choice(length, epsilon, rng):
    """For three segments of a row, the padding among them, and for scores that are equal."""
    scores = np.float32(rng.normal(size=(2, length)))
    scores[1] = np.round(scores[1])
    segments = rng.integers(0, 4, (2, length))
    k = -(-np.stack([(segments == s).sum(-1) for s in (1, 2, 3)], -1) // 3)

    def found():
        rows = one_row_per_constraint(scores, k, jnp.ones(scores.shape, bool), segments)
        weigh = jax.jit(functools.partial(soft_topk, epsilon=epsilon))
        return weigh(scores, k, segment_ids=segments), jax.jit(lambda *x: hard_topk(*x))(*rows)

    expected, choice = found()
    with as_on_tpu():
        weights, choice_of_tpu = found()
    np.testing.assert_array_equal(choice_of_tpu, choice)
    np.testing.assert_allclose(weights, expected, atol=2e-5)


def test_equal_scores_share_equally():
    np.testing.assert_allclose(exact(jnp.full(8, 3.0), 3, epsilon=0.1), 3 / 8, rtol=1e-6)


def test_small_epsilon_is_hard_topk(rng):
    scores = rng.permutation(50).astype(np.float32)
    weights = exact(jnp.asarray(scores), 17, epsilon=0.02)
    np.testing.assert_allclose(weights, scores >= 50 - 17, atol=1e-6)


@both_solvers
def test_k_of_one_is_softmax(solver, rng):
    scores = np.float32(rng.normal(size=(4, 30)))
    np.testing.assert_allclose(
        SOLVERS[solver](scores, 1, epsilon=0.5), softmax(scores / 0.5, axis=-1), atol=2e-6
    )


@pytest.mark.parametrize("k", [9, 10, 1000])
def test_k_of_all_is_ones(k, rng):
    np.testing.assert_array_equal(exact(jnp.asarray(rng.normal(size=(3, 9))), k, epsilon=0.1), 1)


@both_solvers
def test_masked_tokens_get_zero_and_do_not_count(solver, rng):
    scores = np.float32(rng.normal(size=(5, 20)))
    mask = rng.random((5, 20)) < 0.6
    scores = np.where(mask, scores, 30.0)  # the masked ones would win
    weights = np.asarray(SOLVERS[solver](scores, 4, epsilon=0.3, mask=mask))
    assert (weights[~mask] == 0).all()
    for i in range(5):
        alone = REFERENCES[solver](scores[i, mask[i]], 4, 0.3)
        np.testing.assert_allclose(weights[i, mask[i]], alone, atol=2e-5)


def test_fewer_tokens_than_k_get_exactly_one(rng):
    mask = jnp.arange(8) < jnp.array([[3], [4], [5]])
    weights = np.asarray(exact(jnp.asarray(rng.normal(size=(3, 8))), 4, mask=mask, epsilon=0.02))
    np.testing.assert_array_equal(weights[:2], mask[:2])
    assert (weights[2, :5] < 1).any() and abs(weights[2].sum() - 4) < 1e-5


def test_k_may_differ_between_rows(rng):
    scores = jnp.asarray(rng.normal(size=(4, 20)), jnp.float32)
    k = np.array([1, 0, 7, 25])
    weights = np.asarray(exact(scores, k, epsilon=0.1))
    for i, one_k in enumerate(k):
        expected = solution(scores[i], one_k, 0.1) if one_k else np.zeros(20)
        np.testing.assert_allclose(weights[i], expected, atol=1e-5)


@both_solvers
def test_segments_are_as_if_alone(solver, rng):
    scores = np.float32(rng.normal(size=(2, 24)))
    segment_ids = np.array([[1] * 10 + [2] * 1 + [3] * 9 + [0] * 4, [1] * 24])
    k = np.array([[4, 1, 3], [8, 5, 0]])  # the second row has no segments 2 and 3
    weights = np.asarray(SOLVERS[solver](scores, k, epsilon=0.2, segment_ids=segment_ids))
    assert (weights[segment_ids == 0] == 0).all()
    for row, segment in ((0, 1), (0, 2), (0, 3), (1, 1)):
        inside = segment_ids[row] == segment
        alone = REFERENCES[solver](scores[row, inside], k[row, segment - 1], 0.2)
        np.testing.assert_allclose(weights[row, inside], alone, atol=2e-5)


@both_solvers
def test_row_without_tokens_gives_zeros_and_no_nan(solver, rng):
    scores = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    mask = jnp.array([[False] * 6, [True] * 6])

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(scores):
        weights = soft_topk(scores, 2, epsilon=0.1, mask=mask, solver=solver)
        return (weights * jnp.arange(6)).sum(), weights

    gradient, weights = run(scores)
    assert (weights[0] == 0).all() and (gradient[0] == 0).all()
    alone = SOLVERS[solver](scores[1], 2, epsilon=0.1)
    np.testing.assert_allclose(weights[1], alone, atol=1e-6)
    assert np.isfinite(gradient[1]).all() and (gradient[1] != 0).any()


@few_examples
@given(
    st.integers(0, 2**31),
    st.sampled_from((0.1, 0.5, 1.0, 4.0)),
    st.sampled_from(((7, 2), (40, 13))),
)
def test_iterative_is_the_papers_iteration(seed, epsilon, n_k):
    n, k = n_k
    scores = np.float32(np.random.default_rng(seed).normal(size=n))
    np.testing.assert_allclose(
        iterative(jnp.asarray(scores), k, epsilon=epsilon),
        iterations(scores, k, epsilon),
        atol=2e-5,
    )
    np.testing.assert_allclose(
        iterative(
            jnp.asarray(scores),
            k,
            epsilon=epsilon,
            num_iterations=5,
            epsilon_init=2.0,
            epsilon_decay=0.5,
        ),
        iterations(scores, k, epsilon, 5, 2.0, 0.5),
        atol=2e-5,
    )


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_many_iterations_agree_with_exact(epsilon, rng):
    scores = jnp.asarray(rng.normal(size=64), jnp.float32)
    np.testing.assert_allclose(
        iterative(scores, 21, epsilon=epsilon, num_iterations=2000),
        exact(scores, 21, epsilon=epsilon),
        atol=1e-4,
    )


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 2.0])
def test_exact_gradient_is_that_of_the_solution(epsilon, rng):
    scores = np.float32(rng.normal(size=12))
    jacobian_of = jax.jit(jax.jacrev(functools.partial(soft_topk, epsilon=epsilon)))
    for k in (1, 4, 11):
        found = np.asarray(jacobian_of(scores, k))
        weights = solution(scores, k, epsilon)
        # No weight so close to 1 that a step of the differences would cross the kink.
        assert ((weights == 1) | (weights < 1 - 1e-4)).all()
        numeric = finite_differences(lambda s, k=k: solution(s, k, epsilon), scores)
        np.testing.assert_allclose(found, numeric, atol=1e-4)
        np.testing.assert_allclose(found, jacobian(weights, epsilon), atol=1e-4)
        # The sum of the weights is fixed, and a shift of all scores changes nothing.
        np.testing.assert_allclose(found.sum(0), 0, atol=1e-5)
        np.testing.assert_allclose(found.sum(1), 0, atol=1e-5)


@pytest.mark.parametrize("k", [6, 9])
def test_gradient_is_zero_where_all_are_saturated(k):
    gradient = jax.jit(jax.grad(lambda s: (soft_topk(s, k, epsilon=0.1) * jnp.arange(6)).sum()))
    np.testing.assert_array_equal(gradient(jnp.arange(6.0)), 0)


def test_a_tie_at_the_bound_counts_as_saturated():
    """Scores ln 2, 0, 0 with k = 2 and eps = 1: the first weight touches 1 exactly."""
    scores = jnp.log(jnp.array([2.0, 1.0, 1.0]))
    np.testing.assert_allclose(exact(scores, 2), [1, 0.5, 0.5], rtol=1e-6)
    found = jax.jit(jax.jacrev(lambda s: soft_topk(s, 2)))(scores)
    expected = np.array([[0, 0, 0], [0, 0.25, -0.25], [0, -0.25, 0.25]])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_gradient_stays_within_mask_and_segments(rng):
    scores = jnp.asarray(rng.normal(size=(1, 12)), jnp.float32)
    segment_ids = jnp.array([[1] * 5 + [2] * 5 + [0] * 2])

    @jax.jit
    @jax.jacrev
    def run(scores):
        return soft_topk(scores, jnp.array([[2, 3]]), epsilon=0.5, segment_ids=segment_ids)[0]

    found = run(scores)[:, 0]
    for segment, k in ((1, 2), (2, 3)):
        inside = np.asarray(segment_ids[0] == segment)
        weights = solution(np.asarray(scores)[0, inside], k, 0.5)
        np.testing.assert_allclose(found[np.ix_(inside, inside)], jacobian(weights, 0.5), atol=1e-5)
        assert (found[np.ix_(inside, ~inside)] == 0).all()
        assert (found[np.ix_(~inside, inside)] == 0).all()


@pytest.mark.parametrize("epsilon", [0.5, 1.0])
def test_iterative_gradient_is_that_of_the_iteration(epsilon, rng):
    scores = np.float32(rng.normal(size=10))
    found = jax.jit(jax.jacrev(lambda s: soft_topk(s, 3, epsilon=epsilon, solver="iterative")))(
        scores
    )
    numeric = finite_differences(lambda s: iterations(s, 3, epsilon), scores)
    np.testing.assert_allclose(found, numeric, atol=1e-3)


@both_solvers
def test_transformations_agree(solver, rng):
    scores = jnp.asarray(rng.normal(size=(3, 2, 10)), jnp.float32)

    def weights(scores):
        return soft_topk(scores, 4, epsilon=0.3, solver=solver)

    whole = weights(scores)
    np.testing.assert_allclose(jax.jit(weights)(scores), whole, atol=1e-6)
    by_row = jax.jit(jax.vmap(jax.vmap(weights)))
    np.testing.assert_allclose(by_row(scores), whole, atol=1e-6)
    gradient = jax.grad(lambda s: (weights(s) ** 2).sum())
    expected = jax.jit(gradient)(scores)
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(scores), expected, atol=1e-5)


@both_solvers
def test_bfloat16_scores_are_computed_in_float32(solver, rng):
    scores = jnp.asarray(rng.normal(size=(2, 40)), jnp.bfloat16)
    weights = SOLVERS[solver](scores, 13, epsilon=0.1)
    assert weights.dtype == jnp.float32
    same = SOLVERS[solver](scores.astype(jnp.float32), 13, epsilon=0.1)
    np.testing.assert_array_equal(weights, same)
    gradient = jax.grad(lambda s: (soft_topk(s, 13, solver=solver) ** 2).sum())
    assert jax.eval_shape(gradient, scores).dtype == jnp.bfloat16


def test_nan_scores_are_not_hidden():
    weights = exact(jnp.array([0.0, jnp.nan, 1.0, 2.0]), 2, epsilon=0.1)
    assert np.isnan(weights).any()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"k": 0}, "k must be .* at least 1, got 0"),
        ({"k": -2}, "k must be .* at least 1, got -2"),
        ({"epsilon": 0.0}, "epsilon must be a number from 1e-06 to .* got 0.0"),
        ({"epsilon": -1.0}, "epsilon must be a number from .* got -1.0"),
        ({"epsilon": float("nan")}, "epsilon must be a finite number .* got nan"),
        ({"solver": "sinkhorn"}, "solver must be one of .*'exact'.* got 'sinkhorn'"),
        ({"num_iterations": 0}, "num_iterations must be .* from 1 to 10000, got 0"),
        ({"segment_ids": jnp.ones(5, jnp.int32)}, "one entry per segment, got the scalar 2"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        soft_topk(jnp.arange(5.0), **{"k": 2, **kwargs})
