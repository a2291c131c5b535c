"""The router: what it picks, how it counts, and what it refuses."""

import dataclasses
from fractions import Fraction
import functools
import math

from helpers import config
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import soft_topk
from coda_jax.conditional import CodaConfig as CodaConfigOfConditional
from coda_jax.routing import (
    CodaConfig,
    Router,
    Selection,
    Tokens,
    capacity,
    num_selected,
    select,
)

few_examples = settings(max_examples=25, deadline=None, derandomize=True)
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


def make_tokens(rng, batch=3, length=12, width=4, mask=None, segment_ids=None):
    x, u = rng.normal(size=(2, batch, length, width)).astype(np.float32)
    mask = np.ones((batch, length), bool) if mask is None else mask
    return Tokens(
        x=jnp.asarray(x),
        u=jnp.asarray(u),
        positions=jnp.arange(length)[None],
        mask=jnp.asarray(mask),
        segment_ids=None if segment_ids is None else jnp.asarray(segment_ids),
    )


def make_selection():
    return Selection(
        indices=jnp.array([[0, 3, 11], [1, 2, 5]]),
        weights=jnp.array([[0.5, 1.0, 0.25], [2.0, 0.0, 0.0]]),
        valid=jnp.array([[True, True, True], [True, False, False]]),
    )


def test_gather_takes_the_selected_tokens(rng):
    tokens = make_tokens(rng, batch=2, segment_ids=np.sort(rng.integers(1, 4, (2, 12))))
    selection = make_selection()
    gathered = selection.gather(tokens)
    for row in range(2):
        for slot, position in enumerate(selection.indices[row].tolist()):
            np.testing.assert_array_equal(gathered.x[row, slot], tokens.x[row, position])
            np.testing.assert_array_equal(gathered.u[row, slot], tokens.u[row, position])
            assert gathered.segment_ids[row, slot] == tokens.segment_ids[row, position]
            assert gathered.positions[row, slot] == position
    np.testing.assert_array_equal(gathered.mask, selection.valid)
    assert selection.gather(dataclasses.replace(tokens, segment_ids=None)).segment_ids is None


def test_scatter_add_and_its_gradients(rng):
    x = rng.normal(size=(2, 12, 4)).astype(np.float32)
    delta = rng.normal(size=(2, 3, 4)).astype(np.float32)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    selection = make_selection()

    def scatter(x, delta, weights):
        return dataclasses.replace(selection, weights=weights).scatter_add(x, delta)

    y, pullback = jax.vjp(scatter, x, delta, selection.weights)
    to_x, to_delta, to_weights = pullback(jnp.asarray(cotangent))
    expected = x.copy()
    for row in range(2):
        for slot, position in enumerate(selection.indices[row].tolist()):
            weight = float(selection.weights[row, slot])
            expected[row, position] += weight * delta[row, slot]
            g = cotangent[row, position]
            np.testing.assert_allclose(to_delta[row, slot], weight * g, atol=1e-6)
            np.testing.assert_allclose(to_weights[row, slot], g @ delta[row, slot], atol=1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_array_equal(to_x, cotangent)


@functools.partial(jax.jit, static_argnums=(0, 1))
def route(coda, reduction, kernel, tokens):
    params = {} if coda.routing == "truncation" else {"kernel": kernel}
    return Router(coda, reduction).apply({"params": params}, tokens)


def rows_of_lengths(lengths, num_tokens):
    return np.arange(num_tokens) < np.array(lengths)[:, None]


LENGTHS = [12, 7, 1, 0]


@pytest.mark.parametrize("reduction", [1.5, 3])
def test_the_picked_are_the_k_largest_and_no_padding(reduction, rng):
    tokens = make_tokens(rng, batch=4, mask=rows_of_lengths(LENGTHS, 12))
    kernel = jnp.asarray(rng.normal(size=4), jnp.float32)
    selection = route(CodaConfig(reduction=reduction), reduction, kernel, tokens)
    scores = np.asarray(tokens.u @ kernel)
    assert selection.indices.shape == (4, exact_count(12, reduction))
    for row, length in enumerate(LENGTHS):
        k = exact_count(length, reduction)
        picked = np.asarray(selection.indices[row])[np.asarray(selection.valid[row])]
        expected = sorted(range(length), key=lambda i: -scores[row, i])[:k]
        assert picked.tolist() == sorted(expected)


@pytest.mark.parametrize("routing", ["soft_topk", "sigmoid", "truncation"])
def test_weights_of_each_routing(routing, rng):
    tokens = make_tokens(rng, batch=4, mask=rows_of_lengths(LENGTHS, 12))
    kernel = jnp.asarray(rng.normal(size=4), jnp.float32)
    coda = CodaConfig(reduction=3, epsilon=0.5, routing=routing)
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
        elif routing == "sigmoid":
            np.testing.assert_allclose(
                weights[valid], 1 / (1 + np.exp(-scores[row, picked])), rtol=1e-5
            )
        elif length:
            k = -(-length // 3)
            every = soft_topk(jnp.asarray(scores[row, :length]), k, epsilon=0.5)
            assert abs(float(every.sum()) - k) < 1e-5 * k
            np.testing.assert_allclose(weights[valid], every[picked], atol=1e-6)


def test_truncation_takes_the_first_of_each_segment(rng):
    segment_ids = np.array([[1] * 5 + [2] * 1 + [3] * 4 + [0] * 2])
    tokens = make_tokens(rng, batch=1, mask=segment_ids > 0, segment_ids=segment_ids)
    coda = CodaConfig(reduction=2, routing="truncation", max_segments=3)
    selection = route(coda, 2, None, tokens)
    valid = np.asarray(selection.valid[0])
    assert np.asarray(selection.indices[0])[valid].tolist() == [0, 1, 2, 5, 6, 7]


def test_scores_are_float32_whatever_the_model_is(rng):
    """Two tokens whose scores bfloat16 arithmetic cannot tell apart are told apart."""
    u = jnp.asarray([[[1.0, 1.0], [1.0, 1.0078125], [0.0, 0.0]]], jnp.bfloat16)
    tokens = Tokens(u, u, jnp.arange(3)[None], jnp.ones((1, 3), bool))
    kernel = jnp.array([100.0, 0.5])
    selection = route(CodaConfig(reduction=3), 3, kernel, tokens)
    assert selection.indices.tolist() == [[1]] and selection.weights.dtype == jnp.float32


def test_reduction_of_one_picks_nothing_and_means_all(rng):
    assert route(CodaConfig(), 1, jnp.ones(4), make_tokens(rng)) is None


@pytest.mark.parametrize("segment_ids", [[1, 1, 1, 2, 2, 2, 3, 3], [0, 3, 3, 3, 3, 3, 3, 3]])
@pytest.mark.parametrize("routing", ["soft_topk", "sigmoid", "truncation"])
def test_more_segments_than_allowed_give_nan(routing, segment_ids, rng):
    segment_ids = np.array([segment_ids])
    tokens = make_tokens(rng, batch=1, length=8, mask=segment_ids > 0, segment_ids=segment_ids)
    kernel = jnp.ones(4)
    fits = route(CodaConfig(routing=routing, max_segments=3), 2, kernel, tokens)
    assert np.isfinite(fits.weights).all() and np.asarray(fits.weights).any()
    overflows = route(CodaConfig(routing=routing, max_segments=2), 2, kernel, tokens)
    assert np.isnan(overflows.weights).any()


@pytest.mark.parametrize("routing", ["soft_topk", "sigmoid", "truncation"])
def test_only_a_learned_routing_has_a_parameter(routing, rng):
    variables = jax.eval_shape(
        Router(CodaConfig(routing=routing), 3.0).init, jax.random.key(0), make_tokens(rng)
    )
    kernels = jax.tree.leaves(variables.get("params", {}))
    assert [kernel.shape for kernel in kernels] == ([] if routing == "truncation" else [(4,)])


def test_config_is_importable_from_conditional():
    assert CodaConfigOfConditional is CodaConfig


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"reduction": 0.5}, "CodaConfig.reduction .* got 0.5"),
        ({"reduction": 0}, "CodaConfig.reduction .* got 0"),
        ({"reduction": -3}, "CodaConfig.reduction .* got -3"),
        ({"reduction": float("nan")}, "CodaConfig.reduction .* got nan"),
        ({"reduction": float("inf")}, "CodaConfig.reduction .* got inf"),
        ({"reduction": (3, 0.9)}, "CodaConfig.reduction .* got 0.9"),
        ({"reduction": [2.0, float("nan")]}, "CodaConfig.reduction .* got nan"),
        ({"solver": "newton"}, "CodaConfig.solver .* got 'newton'"),
        ({"attention": "all"}, "CodaConfig.attention .* got 'all'"),
        ({"routing": "random"}, "CodaConfig.routing .* got 'random'"),
        ({"epsilon": 0.0}, "CodaConfig.epsilon .* got 0.0"),
        ({"epsilon": float("nan")}, "CodaConfig.epsilon .* got nan"),
        ({"num_iterations": 0}, "CodaConfig.num_iterations .* got 0"),
        ({"max_segments": 0}, "CodaConfig.max_segments .* got 0"),
    ],
)
def test_bad_configs_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CodaConfig(**kwargs)


def test_reductions_of_each_layer():
    assert CodaConfig(reduction=3).reductions(4) == (3, 3, 3, 3)
    assert CodaConfig(reduction=[1, 2.5]).reductions(2) == (1, 2.5)
    assert hash(CodaConfig(reduction=[1, 2.5])) == hash(CodaConfig(reduction=(1, 2.5)))
    with pytest.raises(ValueError, match="3 entries for 2 encoder layers"):
        config({"reduction": (1, 2, 3)})
