"""The parameter tree that a model expects, without computing it."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from coda_jax.network import T5Config, Transformer


def as_module(model_or_config: Any) -> nn.Module:
    """Returns the network of a config, of a model that has a `.module`, or the network itself."""
    if isinstance(model_or_config, T5Config):
        return Transformer(model_or_config)
    if isinstance(model_or_config, nn.Module):
        return model_or_config
    module = getattr(model_or_config, "module", None)
    if isinstance(module, nn.Module):
        return module
    raise TypeError(
        f"Expected a T5Config, a network or a model with a network, got {type(model_or_config)}."
    )


def init_params(module: nn.Module, rng: jax.Array) -> dict:
    """Returns the fresh parameter tree of an encoder-decoder over token ids."""
    tokens = jnp.ones((1, 2), jnp.int32)  # parameters do not depend on batch or length
    return module.init(rng, tokens, tokens, tokens, enable_dropout=False)["params"]


def expected_shapes(model_or_config: Any) -> dict:
    """Returns the tree of `jax.ShapeDtypeStruct` that a model expects."""
    module = as_module(model_or_config)
    return jax.eval_shape(lambda rng: init_params(module, rng), jax.random.key(0))
