"""The counts of operations against XLA's, where layers differ and where answers are decoded."""

import math
import re

from helpers import ADAPTER, config, without_loops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import trees
from coda_jax.methods import Coda
from coda_jax.models import param_shapes
from coda_jax.objectives import Seq2Seq
from coda_jax.profiling import flops, timing

# Wide enough that matrix products are nearly all of the arithmetic.
WIDE = config(adapter=ADAPTER, vocab_size=256, emb_dim=128, head_dim=64, mlp_dim=256)
BATCH, LENGTH = 2, 256


def compiled_flops(function, cfg):
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    with without_loops():
        return timing.flops(jax.jit(function).lower(param_shapes(cfg), tokens).compile())


@pytest.mark.all
def test_compiled_work_falls_with_each_layers_reduction():
    """Invariant 8, within 5 %, which leaves room for softmax and norms."""
    found, expected = [], []
    for reduction in (1, (1, 5), (2, 4)):
        cfg = WIDE.replace(methods=(Coda(reduction), ADAPTER))
        found.append(compiled_flops(Seq2Seq(cfg).encode, cfg))
        expected.append(flops.encoder_flops(cfg, BATCH, LENGTH))
    np.testing.assert_allclose(found, expected, rtol=0.05)
    np.testing.assert_allclose(
        found[0] / np.array(found), expected[0] / np.array(expected), rtol=0.05
    )


@pytest.mark.parametrize(
    "methods",
    [
        pytest.param((ADAPTER,), id="adapter", marks=pytest.mark.all),
        pytest.param((Coda(3), ADAPTER), id="routed"),
    ],
)
def test_the_answers_count_is_xlas_which_counts_one_step(methods):
    cfg = WIDE.replace(methods=methods)
    steps = 8

    def answer(params, tokens):
        return Seq2Seq(cfg).predict(params, tokens, max_decode_length=steps)

    found = compiled_flops(answer, cfg)
    encoder = flops.encoder_flops(cfg, BATCH, LENGTH)
    # The keys and values of the encoder's output: two kernels, in one decoder layer.
    once = 2 * 2 * BATCH * LENGTH * 128 * 128
    total = flops.answer_flops(cfg, BATCH, LENGTH, steps)
    np.testing.assert_allclose(encoder + once + (total - encoder - once) / steps, found, rtol=0.05)


def test_a_step_reads_its_weights_and_the_keys_and_values_of_all_places():
    cfg = config(dtype=jnp.bfloat16)
    flat = trees.flatten(param_shapes(cfg))
    read = [
        math.prod(leaf.shape)
        for path, leaf in flat.items()
        if path.startswith("decoder/") and path.endswith("/kernel")
        if not re.search("encoder_decoder_attention/(key|value)", path)
    ]
    places = cfg.num_decoder_layers * cfg.num_heads * cfg.head_dim * 2
    expected = 2 * (sum(read) + places * 3 * (7 + 4 * 5))
    assert flops.step_bytes(cfg, 3, 7, 5, num_beams=4) == expected
