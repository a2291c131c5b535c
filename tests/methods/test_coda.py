"""The router: what it picks, how it counts, and what it refuses."""

from fractions import Fraction
import functools
import math

from helpers import config, layer_tokens, solution
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.methods import Coda
from coda_jax.methods.coda import ROUTINGS, Router, token_scores
from coda_jax.methods.selection import capacity, num_selected, select
from coda_jax.methods.soft_topk import soft_topk
from coda_jax.nn.layers import LayerNorm
from coda_jax.nn.tokens import Tokens

few_examples = settings(max_examples=25)
REDUCTIONS = (1, 1.1, 1.5, 2, 2.3, 2.5, 3, 3.7, 5, 8, 100)

jit_select = jax.jit(select, static_argnums=2)


def brute_force(scores, k, mask, segment_ids):
    """Positions picked in one row: in each segment the k largest scores, the earlier of equals."""
    picked = []
    for segment, count in enumerate(k, start=1):
        inside = [i for i in range(len(scores)) if mask[i] and segment_ids[i] == segment]
        picked += sorted(inside, key=lambda i: (-scores[i], i))[:count]
    return sorted(picked)


def exact_count(length, reduction):
    """ceil(length / reduction) for the decimal number that was written."""
    return math.ceil(Fraction(length) / Fraction(str(reduction)))


@few_examples
@given(st.integers(0, 2**31), st.booleans())
def test_select_equals_a_loop(seed, ties):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (5, 16)) if ties else rng.normal(size=(5, 16))
    scores = np.float32(scores)
    mask = rng.random((5, 16)) < 0.8
    mask[0] = False
    segment_ids = np.sort(rng.integers(1, 4, (5, 16)), axis=-1)
    segment_ids[1] = 1
    sizes = ((segment_ids[..., None] == np.arange(1, 4)) & mask[..., None]).sum(1)
    k = rng.integers(0, sizes + 1)
    k = np.minimum(k, 4)
    for ids, counts in ((segment_ids, k), (None, k[:, :1])):
        flat_ids = np.ones_like(segment_ids) if ids is None else ids
        indices, valid = jit_select(scores, counts, 12, mask, ids)
        assert (np.diff(indices) > 0).all()  # ascending, so none occurs twice
        assert (np.asarray(indices) >= 0).all() and (np.asarray(indices) < 16).all()
        for row in range(5):
            expected = brute_force(scores[row], counts[row], mask[row], flat_ids[row])
            assert np.asarray(indices[row])[np.asarray(valid[row])].tolist() == expected


def test_select_loses_no_token_where_the_compiler_computes_a_score_twice(rng):
    """Scores that are made in the same program: with another rounding, none is the k-th largest."""
    segment_ids = np.sort(rng.integers(1, 5, (64, 20)), axis=-1).astype(np.int32)
    sizes = (segment_ids[:, None] == np.arange(1, 5)[:, None]).sum(-1)
    k = -(-sizes // 3).astype(np.int32)
    scale, bias, w = rng.normal(size=(3, 16)).astype(np.float32)

    @jax.jit
    def picked(x):
        u = LayerNorm().apply({"params": {"scale": scale, "bias": bias}}, x)
        scores = token_scores(u, w)
        _, valid = select(scores, k, 12, segment_ids > 0, segment_ids)
        return valid.sum(-1), soft_topk(scores, k, segment_ids=segment_ids)

    counts, _ = picked(rng.normal(size=(64, 20, 16)).astype(np.float32))
    np.testing.assert_array_equal(counts, k.sum(-1))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_num_selected_is_the_exact_ceil(reduction):
    lengths = np.arange(0, 600)
    expected = [exact_count(int(length), reduction) for length in lengths]
    assert [num_selected(int(length), reduction) for length in lengths] == expected
    assert num_selected(jnp.asarray(lengths), reduction).tolist() == expected


@few_examples
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
    st.sampled_from(REDUCTIONS),
    st.integers(0, 30),
)
def test_capacity_holds_every_segments_own_ceil(lengths, reduction, padding):
    needed = sum(exact_count(length, reduction) for length in lengths)
    total = sum(lengths) + padding
    slots = capacity(total, reduction, len(lengths))
    assert needed <= slots <= total
    assert capacity(total, reduction) == exact_count(total, reduction)


def test_capacity_is_as_small_as_it_can_be():
    """Segments of one token and one long one need all the slots."""
    reduction, lengths = 3, [1, 1, 1, 4]
    needed = sum(exact_count(length, reduction) for length in lengths)
    assert capacity(sum(lengths) - 1, reduction, 4) <= needed <= capacity(7, reduction, 4)


@functools.partial(jax.jit, static_argnums=(0, 1))
def route(coda, reduction, kernel, tokens):
    params = {} if coda.routing == "truncation" else {"kernel": kernel}
    return Router(coda, reduction).apply({"params": params}, tokens)


def rows_of_lengths(lengths, num_tokens):
    return np.arange(num_tokens) < np.array(lengths)[:, None]


LENGTHS = [12, 7, 1, 0]


@pytest.mark.parametrize("reduction", [1.5, 3])
def test_the_picked_are_the_k_largest_and_no_padding(reduction, rng):
    tokens = layer_tokens(rng, batch=4, mask=rows_of_lengths(LENGTHS, 12))
    kernel = jnp.asarray(rng.normal(size=4), jnp.float32)
    selection = route(Coda(reduction=reduction), reduction, kernel, tokens)
    scores = np.asarray(tokens.u @ kernel)
    assert selection.indices.shape == (4, exact_count(12, reduction))
    for row, length in enumerate(LENGTHS):
        k = exact_count(length, reduction)
        picked = np.asarray(selection.indices[row])[np.asarray(selection.valid[row])]
        expected = sorted(range(length), key=lambda i: -scores[row, i])[:k]
        assert picked.tolist() == sorted(expected)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_weights_of_each_routing(routing, rng):
    tokens = layer_tokens(rng, batch=4, mask=rows_of_lengths(LENGTHS, 12))
    kernel = jnp.asarray(rng.normal(size=4), jnp.float32)
    coda = Coda(reduction=3, epsilon=0.5, routing=routing)
    selection = route(coda, 3, kernel, tokens)
    scores = np.asarray(tokens.u @ kernel)
    for row, length in enumerate(LENGTHS):
        valid = np.asarray(selection.valid[row])
        picked = np.asarray(selection.indices[row])[valid]
        weights = np.asarray(selection.weights[row])
        assert (weights[~valid] == 0).all()
        if routing == "truncation":
            assert picked.tolist() == list(range(-(-length // 3)))
            assert (weights[valid] == 1).all()
        elif routing == "straight_through":
            np.testing.assert_allclose(weights[valid], 1, atol=1e-6)
        elif routing == "sigmoid":
            np.testing.assert_allclose(
                weights[valid], 1 / (1 + np.exp(-scores[row, picked])), rtol=1e-5
            )
        elif length:
            k = -(-length // 3)
            every = solution(scores[row, :length], k, 0.5)
            np.testing.assert_allclose(weights[valid], every[picked], atol=1e-6)


def test_straight_through_has_the_gradient_of_the_soft_weights(rng):
    tokens = layer_tokens(rng, batch=4, mask=rows_of_lengths(LENGTHS, 12))
    kernel = jnp.asarray(rng.normal(size=4), jnp.float32)
    cotangent = rng.normal(size=(4, 4)).astype(np.float32)

    def gradient(routing):
        coda = Coda(reduction=3, epsilon=0.5, routing=routing)
        return jax.grad(lambda w: (route(coda, 3, w, tokens).weights * cotangent).sum())(kernel)

    expected = gradient("soft_topk")
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient("straight_through"), expected, rtol=1e-5, atol=1e-6)


def test_noise_is_added_in_training_alone(rng):
    tokens, coda = layer_tokens(rng, batch=64), Coda(3.0, noise=2.0)
    params = {"kernel": jnp.zeros(4)}

    def first_picks(**rngs):
        selection = Router(coda, 3.0).apply({"params": params}, tokens, rngs=rngs)
        return np.asarray(selection.indices)

    assert (first_picks() == np.arange(4)).all()  # all scores are 0: the first of equals
    drawn, other = (first_picks(dropout=jax.random.key(seed)) for seed in (0, 1))
    assert not np.array_equal(drawn, other)
    shares = np.bincount(drawn.reshape(-1), minlength=12) / 64
    assert np.abs(shares - 1 / 3).max() < 0.2
    assert coda.needs_rng and not Coda().needs_rng


def test_truncation_takes_the_first_of_each_segment(rng):
    segment_ids = np.array([[1] * 5 + [2] * 1 + [3] * 4 + [0] * 2])
    tokens = layer_tokens(rng, batch=1, mask=segment_ids > 0, segment_ids=segment_ids)
    coda = Coda(reduction=2, routing="truncation", max_segments=3)
    selection = route(coda, 2, None, tokens)
    valid = np.asarray(selection.valid[0])
    assert np.asarray(selection.indices[0])[valid].tolist() == [0, 1, 2, 5, 6, 7]


def test_scores_are_float32_whatever_the_model_is(rng):
    """Two tokens whose scores bfloat16 arithmetic cannot tell apart are told apart."""
    u = jnp.asarray([[[1.0, 1.0], [1.0, 1.0078125], [0.0, 0.0]]], jnp.bfloat16)
    tokens = Tokens(u, u, jnp.arange(3)[None], jnp.ones((1, 3), bool))
    kernel = jnp.array([100.0, 0.5])
    selection = route(Coda(reduction=3), 3, kernel, tokens)
    assert selection.indices.tolist() == [[1]] and selection.weights.dtype == jnp.float32


def test_reduction_of_one_picks_nothing_and_means_all(rng):
    assert route(Coda(), 1, jnp.ones(4), layer_tokens(rng)) is None


@pytest.mark.parametrize("segment_ids", [[1, 1, 1, 2, 2, 2, 3, 3], [0, 3, 3, 3, 3, 3, 3, 3]])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_more_segments_than_allowed_give_nan(routing, segment_ids, rng):
    segment_ids = np.array([segment_ids])
    tokens = layer_tokens(rng, batch=1, length=8, mask=segment_ids > 0, segment_ids=segment_ids)
    kernel = jnp.ones(4)
    fits = route(Coda(routing=routing, max_segments=3), 2, kernel, tokens)
    assert np.isfinite(fits.weights).all() and np.asarray(fits.weights).any()
    overflows = route(Coda(routing=routing, max_segments=2), 2, kernel, tokens)
    assert np.isnan(overflows.weights).any()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_only_a_learned_routing_has_a_parameter(routing, rng):
    variables = jax.eval_shape(
        Router(Coda(routing=routing), 3.0).init, jax.random.key(0), layer_tokens(rng)
    )
    kernels = jax.tree.leaves(variables.get("params", {}))
    assert [kernel.shape for kernel in kernels] == ([] if routing == "truncation" else [(4,)])


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"reduction": 0.5}, "Coda.reduction .* got 0.5"),
        ({"reduction": 0}, "Coda.reduction .* got 0"),
        ({"reduction": -3}, "Coda.reduction .* got -3"),
        ({"reduction": float("nan")}, "Coda.reduction .* got nan"),
        ({"reduction": float("inf")}, "Coda.reduction .* got inf"),
        ({"reduction": (3, 0.9)}, r"Coda.reduction\[1\] .* got 0.9"),
        ({"reduction": [2.0, float("nan")]}, r"Coda.reduction\[1\] .* got nan"),
        ({"solver": "newton"}, "Coda.solver .* got 'newton'"),
        ({"attention": "all"}, "Coda.attention .* got 'all'"),
        ({"cross_attention": "k_to_k"}, "Coda.cross_attention .* got 'k_to_k'"),
        ({"routing": "random"}, "Coda.routing .* got 'random'"),
        ({"epsilon": 0.0}, "Coda.epsilon .* got 0.0"),
        ({"epsilon": float("nan")}, "Coda.epsilon .* got nan"),
        ({"noise": -1}, "Coda.noise .* got -1"),
        ({"noise": 1, "routing": "truncation"}, "Coda.noise=1 has no effect with routing='trunc"),
        ({"num_iterations": 0}, "Coda.num_iterations .* got 0"),
        ({"max_segments": 0}, "Coda.max_segments .* got 0"),
    ],
)
def test_bad_configs_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Coda(**kwargs)


def test_reductions_of_each_layer():
    assert Coda(reduction=3).reductions(4) == (3, 3, 3, 3)
    assert Coda(reduction=[1, 2.5]).reductions(2) == (1, 2.5)
    assert hash(Coda(reduction=[1, 2.5])) == hash(Coda(reduction=(1, 2.5)))
    with pytest.raises(ValueError, match="3 entries for 2 encoder layers"):
        config({"reduction": (1, 2, 3)})
