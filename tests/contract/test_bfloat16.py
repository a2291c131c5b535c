"""Where a processor multiplies bfloat16, products name float32 as the type of their results."""

import functools
import re

from contract.programs import (
    LENGTHS,
    batch_of,
    in_bfloat16,
    inputs_of,
    params,
    relative_error,
    tokens_of_equal_choices,
)
from contract.table import CASES, one_family_by_default
from helpers import as_with_bfloat16, encode
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import trees
from coda_jax.objectives import model_for


def case_of(family):
    """The routed case of a family with plain adapters."""
    return next(
        case
        for case in CASES
        if case.family == family and case.adaptation == "coda+parallel_adapter"
    )


def served(config):
    """The config and its parameters as they are served in bfloat16."""
    config = in_bfloat16(config)
    return config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params(config))


@pytest.fixture(autouse=True)
def fixture_processor():
    """All tests here are for such a processor; this one multiplies in float32 instead."""
    with as_with_bfloat16():
        yield


@one_family_by_default(1)
def test_outputs_are_close_to_those_in_float32(family):
    config = case_of(family).config
    inputs = inputs_of(config)
    expected, exact = encode(config, params(config), inputs)
    encoder = jax.jit(functools.partial(encode.__wrapped__, in_bfloat16(config)))
    found, rounded = encoder(params(config), inputs)
    real = tokens_of_equal_choices(exact, rounded)
    assert 1e-4 < relative_error(found[real], expected[real]) < 0.03


@one_family_by_default(0)
def test_gradients_are_close_to_those_in_float32(family):
    config, batch = case_of(family).config, batch_of(case_of(family).config)

    def gradients(config):
        return jax.jit(jax.grad(lambda p: model_for(config).loss(p, batch)[0]))(params(config))

    expected, found = (trees.flatten(gradients(c)) for c in (config, in_bfloat16(config)))
    leaf = next(path for path in found if path.endswith("adapter/wo/kernel"))
    assert relative_error(found[leaf], expected[leaf]) < 0.2


@one_family_by_default(0)
def test_no_product_of_an_answer_is_in_float32(family):
    """But the router's scores, which are no product on a CPU."""
    config, held = served(case_of(family).config)
    model, inputs = model_for(config), inputs_of(config)
    predict = functools.partial(model.predict, max_decode_length=3)
    text = jax.jit(predict).lower(held, inputs).as_text()
    products = re.findall(r"stablehlo.dot_general.*: \((.*)\) -> (.*)", text)
    assert len(products) > 10
    for factors, result in products:
        assert factors.count("xbf16>") == 2
        assert result.endswith("xf32>")
    answers = model.predict(held, inputs, max_decode_length=3)
    assert np.shape(jax.tree.leaves(answers)[0])[0] == len(LENGTHS)
