"""The counts of operations against XLA's, and that routing really skips work (invariant 8)."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import benchmark, decoding, flops
from coda_jax.models import EncoderDecoder
from coda_jax.routing import CodaConfig

# Wide enough that matrix products are nearly all of the arithmetic.
WIDE = dataclasses.replace(
    helpers.config(adapter=helpers.ADAPTER), vocab_size=256, emb_dim=128, head_dim=64, mlp_dim=256
)
BATCH, LENGTH = 2, 256


def compiled_flops(function, config):
    params = jax.eval_shape(EncoderDecoder(config).init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    return benchmark.flops(jax.jit(function).lower(params, tokens).compile())


@pytest.mark.parametrize("attention", ["k_to_k", "k_to_all"])
def test_compiled_work_falls_as_the_formula_says(attention):
    """Within 5 %, which leaves room for softmax and norms."""
    found, expected = [], []
    for reduction in (1, 2, 4, (1, 5)):
        config = WIDE.replace(coda=CodaConfig(reduction, attention=attention))
        module = EncoderDecoder(config).module

        def encode(params, tokens, module=module):
            return module.apply({"params": params}, tokens, enable_dropout=False, method="encode")

        found.append(compiled_flops(encode, config))
        expected.append(flops.encoder_flops(config, BATCH, LENGTH))
    np.testing.assert_allclose(found, expected, rtol=0.05)
    np.testing.assert_allclose(
        found[0] / np.array(found), expected[0] / np.array(expected), rtol=0.05
    )


@pytest.mark.parametrize("coda", [None, CodaConfig(3)])
def test_the_answers_count_is_xlas_which_counts_one_step(coda):
    config = WIDE.replace(coda=coda)
    steps = 8

    def answer(params, tokens):
        return decoding.greedy(
            EncoderDecoder(config).module, params, tokens, max_decode_length=steps
        )

    found = compiled_flops(answer, config)
    encoder = flops.encoder_flops(config, BATCH, LENGTH)
    # The keys and values of the encoder's output: two kernels, in one decoder layer.
    once = 2 * 2 * BATCH * LENGTH * 128 * 128
    total = flops.answer_flops(config, BATCH, LENGTH, steps)
    np.testing.assert_allclose(encoder + once + (total - encoder - once) / steps, found, rtol=0.05)
