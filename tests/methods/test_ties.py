"""Invariant 9, ties are ties: equal tokens have equal scores, whatever the batch around them."""

import functools

from helpers import config, random_params, random_tokens
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from coda_jax.methods.coda import token_scores
from coda_jax.methods.selection import num_selected
from coda_jax.nn.sums import sum_in_order

REDUCTION = 3
# Rows whose k-th score is nearer than this to the next are left out, relative to the row's largest.
GAP = 1e-5
# (rows, padded length). XLA's CPU backend adds up in other orders from 32,768 numbers on, and
# treats the tokens left over from blocks of 8 in a way of their own.
SHAPES = ((7, 5), (2, 601))


def make_model(attention="k_to_k", dtype=jnp.float32, router_scale=1, **sizes):
    coda = {"reduction": REDUCTION, "attention": attention}
    cfg = config(coda, dtype=dtype, **{"num_encoder_layers": 1} | sizes)
    params = random_params(cfg)
    for name, layer in params["encoder"].items():
        if name.startswith("layers_"):
            layer["router"]["kernel"] *= router_scale
    return cfg, params


@functools.partial(jax.jit, static_argnums=0)
def encode(cfg, params, tokens):
    """Returns the encoder's output and each layer's scores and picks, [layers, B, N] both.

    All that this file knows of where the scores are is in here.
    """
    encoded, state = cfg.network().apply(
        {"params": params},
        tokens,
        enable_dropout=False,
        method="encode",
        mutable=["intermediates"],
        capture_intermediates=lambda module, method: method == "_scores",
    )
    routers = [
        state["intermediates"]["encoder"][f"layers_{i}"]["router"]
        for i in range(cfg.num_encoder_layers)
    ]
    scores = jnp.stack([router["_scores"][0] for router in routers])
    selections = [router["selection"][0] for router in routers]
    rows = jnp.arange(tokens.shape[0])[:, None]
    picks = [jnp.zeros(tokens.shape, bool).at[rows, s.indices].set(s.valid) for s in selections]
    return encoded, scores, jnp.stack(picks)


def pad(tokens, length):
    return np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])))


def share(tokens):
    """Returns the batch on two devices, if there are two and the rows are even in number."""
    devices = jax.devices()[: 2 - len(tokens) % 2]
    return jax.device_put(tokens, NamedSharding(Mesh(devices, "data"), PartitionSpec("data")))


def first_by_score(scores, length):
    """Returns the picks of a row, [N] bool: the largest scores, the earlier of equals."""
    order = np.argsort(-scores[:length], kind="stable")[: num_selected(int(length), REDUCTION)]
    return np.isin(np.arange(len(scores)), order)


WIDTHS = pytest.mark.parametrize(
    ("attention", "emb_dim", "router_scale"),
    [pytest.param("k_to_k", 192, 1, marks=pytest.mark.all), ("k_to_all", 36, 1000)],
)


@WIDTHS
def test_equal_tokens_have_equal_scores_in_the_first_layer(rng, attention, emb_dim, router_scale):
    """Bit by bit, at each place of each row of each shape; of equals the earlier is picked."""
    assert_equal_scores(rng, jnp.float32, attention, emb_dim, router_scale)


@pytest.mark.all
@pytest.mark.usefixtures("processor")
@WIDTHS
def test_so_they_have_in_bfloat16(rng, attention, emb_dim, router_scale):
    assert_equal_scores(rng, jnp.bfloat16, attention, emb_dim, router_scale)


def assert_equal_scores(rng, dtype, attention, emb_dim, router_scale):
    cfg, params = make_model(attention, dtype, router_scale, emb_dim=emb_dim, vocab_size=40)
    short = random_tokens(rng, [5], 5, 40)
    score_of, picks_of_short = {}, []
    for batch, length in SHAPES:
        tokens = random_tokens(rng, [length] * batch, length, 40)
        tokens[0, : length // 2] = 7
        tokens[-1] = pad(short, length)
        shared = share(tokens) if attention == "k_to_all" else tokens
        _, (scores,), (picks,) = map(np.asarray, encode(cfg, params, shared))
        for place in map(tuple, np.argwhere(tokens > 0)):
            token, score = tokens[place], scores[place]
            assert score.tobytes() == score_of.setdefault(token, score).tobytes(), (place, length)
        for row, row_scores, picked in zip(tokens, scores, picks, strict=True):
            expected = first_by_score(row_scores, np.count_nonzero(row))
            np.testing.assert_array_equal(picked, expected)
        picks_of_short.append(picks[-1, :5].tolist())
    assert picks_of_short == [picks_of_short[0]] * len(SHAPES)


@pytest.mark.all
def test_outputs_agree_but_for_near_ties_in_deeper_layers(rng, record_property):
    cfg, params = make_model(num_encoder_layers=2, vocab_size=200)
    lengths = rng.integers(2, 31, 64)
    tokens = random_tokens(rng, lengths, 30, 200)
    real = tokens > 0
    expected, scores, _ = map(np.asarray, encode(cfg, params, tokens))
    near = np.zeros(len(tokens), bool)
    for layer in scores[1:]:
        for row, length in enumerate(lengths):
            ordered = np.sort(layer[row, :length])[::-1]
            k = num_selected(int(length), REDUCTION)
            near[row] |= ordered[k - 1] - ordered[k] < GAP * np.abs(ordered).max()
    record_property("rows_near_a_tie", f"{near.sum()} of {len(near)}")
    print(f"{near.sum()} of {len(near)} rows are within {GAP} of a tie in a deeper layer")
    assert near.mean() < 0.1
    encoded = np.asarray(encode(cfg, params, pad(tokens, 64))[0])[:, :30]
    difference = np.where(real[..., None], encoded - expected, 0)[~near]
    assert np.abs(difference).max() < 1e-4 * np.abs(expected[real]).max()


@pytest.mark.all
@pytest.mark.usefixtures("processor")
def test_how_often_bfloat16_picks_otherwise(rng, record_property):
    """In the first layer never; deeper the hidden states differ by themselves, and this counts."""
    cfg, params = make_model(num_encoder_layers=2, vocab_size=200, dtype=jnp.bfloat16)
    tokens = random_tokens(rng, rng.integers(2, 31, 64), 30, 200)
    _, _, picks = encode(cfg, params, tokens)
    _, _, padded = encode(cfg, params, pad(tokens, 64))
    rates = (np.asarray(picks) != np.asarray(padded)[..., :30]).any(-1).mean(-1)
    record_property("rows_with_other_picks_by_layer", rates.tolist())
    print(f"share of rows with other picks in bfloat16, by layer: {rates.tolist()}")
    assert rates[0] == 0


@pytest.mark.parametrize("size", [1, 5, 100, 192])
def test_scores_and_gradients_equal_the_product(rng, size):
    u, w, weights = (rng.normal(size=s).astype(np.float32) for s in ((3, 7, size), size, (3, 7)))
    exact = np.einsum("bnd,d->bn", u.astype(np.float64), w)
    np.testing.assert_allclose(token_scores(u, w), exact, atol=1e-6 * np.abs(exact).max())
    got = jax.grad(lambda u, w: jnp.sum(token_scores(u, w) * weights), (0, 1))(u, w)
    expected = weights[..., None] * w, np.einsum("bn,bnd->d", weights.astype(np.float64), u)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())


def test_sum_of_many_axes_and_of_tangents(rng):
    x, t = rng.normal(size=(2, 2, 3, 4, 70)).astype(np.float32)
    total, tangent = jax.jvp(sum_in_order, (x,), (t,))
    np.testing.assert_allclose(total, x.sum(-1), atol=1e-5)
    np.testing.assert_allclose(tangent, t.sum(-1), atol=1e-5)
