"""Shares of the parts of a layer in an encoder's time."""

import helpers
import jax
import jax.numpy as jnp
import pytest

from coda_jax.profiling import breakdown


def test_operations_belong_to_the_part_that_their_scopes_name():
    path = "jit(encode)/Transformer/encode/encoder/layers_3/"
    parts = breakdown.parts_of(helpers.config({"reduction": 2.0}))
    for operation, part in {
        "attention/query/dot_general": "attention",
        "attention.keys_values/key/dot_general": "attention",
        "encoder_decoder_attention/query/dot_general": "attention",
        "mlp/wi_0/dot_general": "mlp",
        "adapter/wi/dot_general": "adapter",
        "router/sort": "router",
        "gather/jit(take)/gather": "gather",
        "scatter/scatter-add": "scatter",
        "pre_attention_layer_norm/mul": breakdown.OTHER,
    }.items():
        assert breakdown.part_of(path + operation, parts) == part


def test_shares_are_those_of_the_program_that_ran():
    @jax.jit
    def function(x):
        with jax.named_scope("router"):
            x = x @ x
        with jax.named_scope("mlp"):
            return jnp.sort(x @ x @ x)

    x = jnp.ones((64, 64))
    compiled = function.lower(x).compile(breakdown.COMPILER_OPTIONS)
    parts = {"router": ("router",), "mlp": ("mlp",)}
    found = breakdown.shares(compiled, lambda: compiled(x), parts)
    assert sum(found.values()) == pytest.approx(1)
    assert found["mlp"] > found["router"] > 0

    other = jax.jit(lambda x: -x).lower(x).compile()
    with pytest.raises(ValueError, match="holds no operation of the program"):
        breakdown.shares(other, lambda: compiled(x), parts)
