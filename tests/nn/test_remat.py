"""Rematerialisation: the same numbers from fewer values that are kept."""

import functools

from contract.programs import params, relative_error
from helpers import ADAPTER, random_tokens
import jax
import numpy as np
import pytest

from coda_jax import trees
from coda_jax.commands.bench_programs import random_batch
from coda_jax.methods import Coda, Lora
from coda_jax.models import FAMILIES, param_axes, param_shapes
from coda_jax.nn.remat import POLICIES
from coda_jax.nn.tokens import selections
from coda_jax.objectives import model_for

ROUTED = (Coda(2.0), ADAPTER)


def config_of(family, policy="none", methods=ROUTED, **changes):
    tiny = FAMILIES[family].tiny
    return tiny.replace(methods=methods, dropout_rate=0.0, remat_policy=policy, **changes)


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
    """The losses, each leaf of the gradients, and all of them together."""
    (loss, gradient), (other_loss, other_gradient) = first, second
    np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
    leaves, others = trees.flatten(gradient), trees.flatten(other_gradient)
    for path, leaf in leaves.items():
        if np.abs(leaf).max() > 1e-5:  # a bias of keys has none, only rounding
            assert relative_error(others[path], leaf) < 1e-5, path
    whole, other = (np.concatenate([x.reshape(-1) for x in y.values()]) for y in (leaves, others))
    assert relative_error(other, whole) < 1e-6


def test_the_layers_of_an_encoder_have_the_same_gradient(rng):
    plain, config = (
        config_of("t5", x, (ADAPTER,), num_encoder_layers=1).encoder_only()
        for x in ("none", "full")
    )
    assert param_axes(config) == param_axes(plain)
    given, tokens = params(plain), random_tokens(rng, [9, 5], 9)

    def gradient(config):
        def loss(given):
            found = config.network().apply({"params": given}, tokens, enable_dropout=False)
            return (found**2).mean()

        return jax.jit(jax.value_and_grad(loss))(given)

    assert_close(gradient(plain), gradient(config))


@pytest.mark.all
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["minimal", "full"])
def test_leaves_and_gradients_are_the_same(family, policy):
    plain, config = (config_of(family, x, num_encoder_layers=1) for x in ("none", policy))
    assert param_axes(config) == param_axes(plain)
    assert jax.tree.structure(param_shapes(config)) == jax.tree.structure(param_shapes(plain))
    given = params(plain), batch_of(plain)
    assert_close(step(plain)(*given), step(config)(*given))


def kept_bytes(config):
    """Of what a gradient keeps beside parameters. XLA's CPU compiler undoes part of it again."""
    given, batch = params(config.replace(remat_policy="none")), batch_of(config)

    def residuals(given):
        return jax.vjp(lambda given: model_for(config).loss(given, batch)[0], given)[1]

    shapes = {leaf.shape for leaf in jax.tree.leaves(given)}
    leaves = jax.tree.leaves(jax.eval_shape(residuals, given))
    return sum(x.size * x.dtype.itemsize for x in leaves if x.shape not in shapes)


@pytest.mark.all
def test_each_policy_keeps_less():
    none, minimal, full = (kept_bytes(config_of("t5", policy)) for policy in POLICIES)
    assert full < 0.5 * minimal < 0.2 * none


@pytest.mark.all
def test_modules_are_changed_inside_a_layer_too():
    plain, config = (config_of("t5", x, (Lora(rank=2),)) for x in ("none", "full"))
    given = params(plain), batch_of(plain)
    assert_close(step(plain)(*given), step(config)(*given))


@pytest.mark.all
def test_dropout_is_drawn_again_as_it_was():
    plain, config = (config_of("t5", x).replace(dropout_rate=0.3) for x in ("none", "full"))
    given = params(plain), batch_of(plain)
    assert_close(step(plain)(*given), step(config)(*given))


@pytest.mark.all
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
