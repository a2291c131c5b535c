"""Attention's kernel for GPUs, step by step on a CPU, against the plain formulation."""

import functools

from contract.programs import relative_error
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.nn import attention_kernel
from coda_jax.nn.dot_product_attention import (
    _attend,
    _attend_by_kernel,
    _attend_to_arrays,
    attend,
    join_heads,
)
from coda_jax.nn.position_bias import PositionBias

HEADS, HEAD_DIM = 3, 32
KERNEL = "__gpu$xla.gpu.triton"


def arrays(rng, num_queries, num_keys, rows=2):
    """Query, key, value, a bias of places that are not those in the row, and a mask."""
    lengths = num_queries, num_keys, num_keys
    query, key, value = (
        jnp.asarray(rng.normal(size=(rows, HEADS, n, HEAD_DIM)) / 2, jnp.bfloat16) for n in lengths
    )
    places = [np.sort(rng.choice(600, size=(rows, n), replace=False), -1) for n in lengths[:2]]
    values = jnp.asarray(rng.normal(size=(HEADS, 8)), jnp.float32)
    bias = PositionBias(values, *map(jnp.asarray, places), True, 100)
    mask = np.arange(num_keys) < [[num_keys], [num_keys // 2]]
    return query, key, value, bias, jnp.asarray(mask)[:, None, None]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(64, 128), (70, 50), (130, 195)])
def test_blocks_of_keys_give_what_all_keys_give(num_queries, num_keys, biased, rng):
    query, key, value, bias, mask = arrays(rng, num_queries, num_keys)
    distances = (bias.by_distance(), bias.query_positions, bias.key_positions) if biased else ()
    (found,) = attention_kernel.attend(
        *map(join_heads, (query, key, value)),
        mask[:, 0, 0],
        *distances,
        num_heads=HEADS,
        interpret=True,
    )
    exact = (x.astype(jnp.float32) for x in (query, key, value))
    expected = _attend(*exact, bias.array() if biased else None, mask, float32_logits=True)
    assert found.dtype == jnp.bfloat16
    assert relative_error(found, join_heads(expected)) < 0.005


def test_a_row_without_a_key_gets_the_mean_of_the_values(rng):
    query, key, value, _, mask = arrays(rng, 10, 70)
    nothing = jnp.zeros_like(mask[:, 0, 0])
    (found,) = attention_kernel.attend(
        *map(join_heads, (query, key, value)), nothing, num_heads=HEADS, interpret=True
    )
    mean = join_heads(value).astype(jnp.float32).mean(1)
    np.testing.assert_allclose(found[:, 3].astype(jnp.float32), mean, atol=2e-3)


def test_the_derivative_is_that_of_the_plain_formulation(rng):
    query, key, value, bias, mask = arrays(rng, 20, 30)

    def gradients(attend):
        def loss(values, *arrays):
            given = bias.replace(values=values)
            y = attend(given, *arrays, given.array(), mask)
            return jnp.square(y.astype(jnp.float32)).sum()

        return jax.grad(loss, (0, 1, 2, 3))(bias.values, query, key, value)

    plain = functools.partial(_attend_to_arrays, False)
    found = gradients(lambda *given: _attend_by_kernel(plain, *given))
    expected = gradients(lambda _, *given: _attend(*given, float32_logits=False))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"mask": None}, True),
        ({"bias": None}, True),
        ({"dtype": jnp.float32}, False),
        ({"bias": "array"}, False),
        ({"mask": "pairs"}, False),
    ],
)
def test_gpus_take_it_where_it_does_what_is_asked_for(change, taken, rng):
    query, key, value, bias, mask = arrays(rng, 64, 64)
    dtype = change.get("dtype", jnp.bfloat16)
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    given = {"bias": bias, "mask": mask} | {k: x for k, x in change.items() if k != "dtype"}
    if given["bias"] == "array":
        given["bias"] = bias.array()
    if given["mask"] == "pairs":
        given["mask"] = jnp.broadcast_to(mask, (2, 1, 64, 64))
    traced = jax.jit(attend).trace(query, key, value, given["bias"], given["mask"])
    assert (KERNEL in traced.lower(lowering_platforms=("cuda",)).as_text()) == taken


def test_programs_that_are_exported_hold_no_kernel(rng):
    given = arrays(rng, 64, 64)
    for platforms in (["cuda"], ["cpu", "cuda", "rocm", "tpu"]):
        assert (
            KERNEL
            not in jax.export.export(jax.jit(attend), platforms=platforms)(*given).mlir_module()
        )
