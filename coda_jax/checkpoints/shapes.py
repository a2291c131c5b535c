"""The parameter tree that a model expects, without computing it."""

from typing import Any

from flax import linen as nn
import jax

from coda_jax.network import T5Config, init_params
from coda_jax.speech import W2vBertConfig
from coda_jax.vision import Pix2StructConfig

FAMILIES = {cls.family: cls for cls in (T5Config, Pix2StructConfig, W2vBertConfig)}


def config_class(family: str, source: object) -> type[T5Config]:
    """Returns the configuration class of a model family.

    Raises:
        ValueError: there is no such family; `source` says where its name was found.
    """
    if family not in FAMILIES:
        raise ValueError(
            f"{source}: family={family!r} is unknown; it must be one of {[*FAMILIES]}."
        )
    return FAMILIES[family]


def as_module(model_or_config: Any) -> nn.Module:
    """Returns the network of a config, of a model that has a `.module`, or the network itself."""
    if isinstance(model_or_config, T5Config):
        return model_or_config.network()
    if isinstance(model_or_config, nn.Module):
        return model_or_config
    module = getattr(model_or_config, "module", None)
    if isinstance(module, nn.Module):
        return module
    raise TypeError(
        f"Expected a T5Config, a network or a model with a network, got {type(model_or_config)}."
    )


def expected_shapes(model_or_config: Any) -> dict:
    """Returns the tree of `jax.ShapeDtypeStruct` that a model expects."""
    module = as_module(model_or_config)
    return jax.eval_shape(lambda rng: init_params(module, rng), jax.random.key(0))
