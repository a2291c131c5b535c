"""Attention of long inputs: what the plain formulation gives, in memory that grows as they do."""

import contextlib
import functools
import math

from contract.programs import relative_error
from flax import linen as nn
from helpers import as_on_tpu, config, pack, random_params, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.commands.bench_programs import Programs, random_batch, served_shapes
from coda_jax.methods import Coda, ParallelAdapter, PrefixTuning
from coda_jax.models import preset
from coda_jax.nn import dot_product_attention, long_attention
from coda_jax.nn.position_bias import PositionBias
from coda_jax.nn.visibility import Visibility

HEADS, HEAD_DIM = 2, 4
KERNEL = "__gpu$xla.gpu.triton"


@contextlib.contextmanager
def in_blocks(keys=8, logits=64):
    """What is traced meanwhile takes every input for a long one."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_attention, "_MOST_PAIRS", 0)
        patch.setattr(long_attention, "_BLOCK", keys)
        patch.setattr(long_attention, "_LOGITS_OF_HEAD", logits)
        patch.setattr(long_attention, "_LOGITS", 2 * HEADS * logits)
        yield
    jax.clear_caches()


def arrays(num_queries, num_keys, *, prefix=0, biased="both", masked="keys", seed=0):
    """(query, key, value, bias, mask) of two rows, the first of which sees nothing if masked."""
    rng = np.random.default_rng(seed)
    lengths = num_queries, num_keys, num_keys
    query, key, value = (
        jnp.asarray(rng.normal(size=(2, HEADS, n, HEAD_DIM)), jnp.float32) for n in lengths
    )
    sizes = num_queries, num_keys - prefix
    places = [np.sort(rng.choice(300, (2, n), replace=False), -1).astype(np.int32) for n in sizes]
    bias = mask = None
    if biased != "no":
        values = jnp.asarray(rng.normal(size=(HEADS, 8)), jnp.float32)
        bias = PositionBias(values, *map(jnp.asarray, places), biased == "both", 16, prefix)
    if masked != "no":
        seen = rng.random((2, sizes[1])) < 0.7
        seen[0] = False
        segments = [np.sort(rng.integers(1, 4, (2, n)), -1) for n in sizes]
        more = {
            "keys": [],
            "segments": segments,
            "causal": [None, None, *places],
        }[masked]
        mask = Visibility(jnp.asarray(seen), *map(_array, more), prefix=prefix)
    return query, key, value, bias, mask


def _array(x):
    return x if x is None else jnp.asarray(x)


def with_gradients(attend, query, key, value, bias, mask):
    """What attention gives, and the gradients of query, key, value and bias."""

    def total(values, *given):
        of_values = bias if values is None else bias.replace(values=values)
        y = attend(*given, of_values, mask)
        return (y * jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum(), y

    found = jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))
    return found(None if bias is None else bias.values, query, key, value)


def plain(query, key, value, bias, mask):
    """With an array of all queries and keys."""
    arrays = (None if x is None else x.array() for x in (bias, mask))
    return dot_product_attention._attend(query, key, value, *arrays, float32_logits=False)


def assert_close(found, expected):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected
    )


def test_blocks_give_what_all_keys_give_and_so_do_their_gradients():
    """Of rows that see nothing, too, and where the last blocks are not full."""
    given = arrays(11, 21, masked="segments")
    with in_blocks():
        found = with_gradients(dot_product_attention.attend, *given)
    assert_close(found, with_gradients(plain, *given))
    np.testing.assert_allclose(found[1][0], np.broadcast_to(
        np.asarray(given[2]).mean(2, keepdims=True)[0], found[1][0].shape
    ), atol=1e-5)  # fmt: skip


@pytest.mark.all
@settings(max_examples=20)
@given(
    num_queries=st.sampled_from([1, 7, 32, 61]),
    num_keys=st.sampled_from([5, 16, 33, 64]),
    keys=st.sampled_from([1, 8, 13, 64]),
    logits=st.sampled_from([1, 64, 4096]),
    prefix=st.sampled_from([0, 0, 3]),
    biased=st.sampled_from(["no", "one way", "both"]),
    masked=st.sampled_from(["no", "keys", "segments", "causal"]),
    on_tpu=st.booleans(),
    seed=st.integers(0, 9),
)
def test_all_kinds_of_blocks_masks_and_biases(keys, logits, on_tpu, **kinds):
    given = arrays(**kinds)
    with in_blocks(keys, logits), as_on_tpu() if on_tpu else contextlib.nullcontext():
        found = with_gradients(dot_product_attention.attend, *given)
    assert_close(found, with_gradients(plain, *given))


@pytest.mark.all
def test_blocks_are_precise_in_bfloat16():
    exact = arrays(40, 60, masked="segments")
    rounded = (*(x.astype(jnp.bfloat16) for x in exact[:3]), *exact[3:])
    exact = (*(x.astype(jnp.float32) for x in rounded[:3]), *exact[3:])
    with in_blocks():
        found, y = with_gradients(dot_product_attention.attend, *rounded)
    expected, expected_y = with_gradients(plain, *exact)
    assert y.dtype == found[1].dtype == jnp.bfloat16
    assert relative_error(y, expected_y) < 0.005
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 0.02


@pytest.mark.all
def test_dropout_drops_what_it_drops_of_an_array(rng):
    """The same weights, by the same random numbers."""
    query, key, value, bias, mask = arrays(20, 30)
    drop = nn.Dropout(0.5, broadcast_dims=(-2,), deterministic=False)
    dropout = functools.partial(drop.apply, {}, rngs={"dropout": jax.random.key(1)})
    expected = dot_product_attention.attend(query, key, value, bias, mask, dropout=dropout)
    with in_blocks():
        found = dot_product_attention.attend(query, key, value, bias, mask, dropout=dropout)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    without = dot_product_attention.attend(query, key, value, bias, mask)
    assert relative_error(found, without) > 0.1


@pytest.mark.all
@pytest.mark.parametrize(
    "methods",
    [
        (Coda(2.0, attention="k_to_all", max_segments=4), ParallelAdapter(4)),
        (Coda(1.0, max_segments=4), ParallelAdapter(4)),
        (PrefixTuning(3, hidden=4),),
    ],
)
def test_a_model_answers_as_with_arrays(methods, rng):
    """Encoder and decoder: its logits, of packed rows where the method packs."""
    cfg = config(dropout_rate=0.0).replace(methods=methods)
    params = random_params(cfg)
    inputs, targets = (random_tokens(rng, [n, n - 3], n) for n in (37, 19))
    given = inputs, np.pad(targets, ((0, 0), (1, 0)))[:, :-1], targets
    if methods[0].packs:
        rows = [random_tokens(rng, [n], n)[0] for n in (9, 14, 11)]
        of_targets = [random_tokens(rng, [n], n)[0] for n in (4, 6, 5)]
        (inputs, segments), (targets, of_segments) = pack(rows, 37), pack(of_targets, 19)
        given = inputs, np.pad(targets, ((0, 0), (1, 0)))[:, :-1], targets, segments, of_segments

    def logits():
        network = cfg.network()
        return jax.jit(functools.partial(network.apply, enable_dropout=False))(
            {"params": params}, *given
        )

    expected = logits()
    with in_blocks(logits=128):
        found = logits()
    seen = np.asarray(given[2]) > 0
    np.testing.assert_allclose(found[seen], expected[seen], rtol=1e-4, atol=1e-4)


def program(cfg, measure, length, packed=False, batch=1):
    """(function, arguments) of one of `coda bench`."""
    given = random_batch(cfg, batch, length, 16)
    if packed:
        for name, size in (("encoder", length), ("decoder", 16)):
            given[f"{name}_segment_ids"] = np.ones((batch, size), np.int32)
            given[f"{name}_positions"] = np.ones((batch, size), np.int32)
    return getattr(Programs(cfg, served_shapes(cfg), given), measure)()


def lowered(platform, function, arguments):
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    return jitted.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


DENSE = (ParallelAdapter(4),)
ROUTED = (Coda(3.0, attention="k_to_all", max_segments=4), *DENSE)


@pytest.mark.all
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("methods", [DENSE, ROUTED])
def test_programs_of_2048_tokens_are_as_they_were(methods, platform, monkeypatch):
    """And longer ones are not: they have no array of a head's queries and keys."""
    cfg = preset("t5_1_1_base", num_encoder_layers=1, num_decoder_layers=1, methods=methods)
    lower = functools.partial(lowered, platform)
    queries = 1366 if methods is ROUTED else 4096
    assert f"12x{queries}x4096x" not in lower(*program(cfg, "encoder", 4096))
    taken = lower(*program(cfg, "encoder", 2048))
    monkeypatch.setattr(long_attention, "_MOST_PAIRS", math.inf)
    assert taken == lower(*program(cfg, "encoder", 2048))
    assert f"12x{queries}x4096x" in lower(*program(cfg, "encoder", 4096))


@pytest.mark.all
def test_a_step_on_packed_rows_has_no_array_of_pairs():
    """Not of the mask either: K = ceil(4096 / 3) + 3."""
    cfg = preset("t5_1_1_base", num_encoder_layers=1, num_decoder_layers=1, methods=ROUTED)
    text = lowered("cpu", *program(cfg, "train_step", 4096, packed=True))
    assert "x1369x" in text and "x1369x4096x" not in text


def temporary_bytes(methods, measure, length):
    """Of a tiny model's program."""
    function, arguments = program(config().replace(methods=methods), measure, length)
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    return jitted.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.all
@pytest.mark.parametrize(
    ("methods", "measure"),
    [
        (DENSE, "encoder"),
        (DENSE, "train_step"),
        ((Coda(1.0), *DENSE), "train_step"),
        (ROUTED, "train_step"),
    ],
)
def test_memory_grows_as_the_input_does(methods, measure):
    with in_blocks(keys=64, logits=64 * 64):
        short, long = (temporary_bytes(methods, measure, n) for n in (1024, 2048))
    assert long <= 2.3 * short


@pytest.mark.all
def test_memory_grows_as_the_square_with_arrays():
    """Which the test before would see."""
    assert temporary_bytes(DENSE, "train_step", 1024) > 3 * temporary_bytes(
        DENSE, "train_step", 512
    )


@pytest.mark.all
def test_gpus_take_their_kernel_where_nothing_is_differentiated():
    given = [jnp.zeros((1, 1, n, 64), jnp.bfloat16) for n in (2000, 2500, 2500)]
    mask = Visibility(jnp.ones((1, 2500), bool))

    def attend(query, key, value):
        return dot_product_attention.attend(query, key, value, None, mask)

    def loss(*given):
        return attend(*given).astype(jnp.float32).sum()

    text = lowered("cuda", attend, given)
    assert KERNEL in text and "2000x2500x" not in text
    text = lowered("cuda", jax.grad(loss, (0, 1, 2)), given)
    assert "2000x2500x" not in text and "stablehlo.while" in text
