"""Rematerialisation: the same numbers from fewer values that are kept."""

import functools

from contract.programs import params
from helpers import ADAPTER, random_tokens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.commands.bench_programs import random_batch
from coda_jax.methods import Coda, Lora
from coda_jax.models import FAMILIES, param_axes, param_shapes
from coda_jax.nn.remat import POLICIES
from coda_jax.nn.tokens import selections
from coda_jax.objectives import model_for

METHODS = (Coda(2.0), Lora(rank=2), ADAPTER)
FAMILY_NAMES = [
    pytest.param(name, marks=[] if name == "t5" else pytest.mark.all) for name in FAMILIES
]


def config_of(family, policy="none", **changes):
    tiny = FAMILIES[family].tiny
    return tiny.replace(methods=METHODS, dropout_rate=0.0, remat_policy=policy, **changes)


def batch_of(config):
    return random_batch(config, 4, 48, 16)


@functools.cache
def step(config):
    """The compiled (loss, gradient) of a config; with dropout where it has some."""
    rng = jax.random.key(0) if config.dropout_rate else None

    def loss(given, batch):
        return model_for(config).loss(given, batch, rng)[0]

    program = jax.jit(jax.value_and_grad(loss))
    return program.lower(params(config.replace(remat_policy="none")), batch_of(config)).compile()


def assert_close(first, second):
    def compare(one, other):
        np.testing.assert_allclose(one, other, atol=1e-6 * max(1.0, float(jnp.abs(one).max())))

    jax.tree.map(compare, first, second)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("policy", ["minimal", "full"])
def test_gradients_are_the_same_and_less_is_kept(family, policy):
    plain, config = (config_of(family, x, num_encoder_layers=3) for x in ("none", policy))
    assert param_axes(config) == param_axes(plain)
    assert jax.tree.structure(param_shapes(config)) == jax.tree.structure(param_shapes(plain))
    given = params(plain), batch_of(plain)
    assert_close(step(plain)(*given), step(config)(*given))
    before, after = (step(x).memory_analysis().temp_size_in_bytes for x in (plain, config))
    assert after < 0.9 * before


def test_dropout_is_drawn_again_as_it_was():
    plain, config = (config_of("t5", x).replace(dropout_rate=0.3) for x in ("none", "full"))
    given = params(plain), batch_of(plain)
    assert_close(step(plain)(*given), step(config)(*given))


def test_what_layers_pick_is_still_told_and_answers_are_the_same(rng):
    plain, config = config_of("t5"), config_of("t5", "full")
    tokens = random_tokens(rng, [9, 5], 9)

    def answer(config):
        variables = {"params": params(plain)}
        network = config.network()
        _, state = network.apply(
            variables, tokens, enable_dropout=False, method="encode", mutable=["intermediates"]
        )
        answers = model_for(config).predict(params(plain), tokens, max_decode_length=6)
        return selections(state["intermediates"]), answers

    (expected, expected_answer), (found, found_answer) = answer(plain), answer(config)
    assert [*found] == [*expected] == ["layers_0", "layers_1"]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(np.testing.assert_array_equal, found_answer, expected_answer)


def test_policies_are_those_of_t5x():
    assert [*POLICIES] == ["none", "minimal", "full"]
    with pytest.raises(ValueError, match=r"remat_policy must be one of .* got 'all'"):
        config_of("t5", "all")
