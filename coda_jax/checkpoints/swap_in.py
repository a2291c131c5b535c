"""From a dense checkpoint to one with the leaves of its methods."""

from collections.abc import Mapping
from typing import Any

import jax

from coda_jax import methods, trees
from coda_jax.models import ModelConfig, init_params, param_shapes


def swap_in(config: ModelConfig, params: Mapping[str, Any], rng: jax.Array) -> dict[str, Any]:
    """Adds the freshly initialised leaves of the config's methods to a dense checkpoint.

    Every leaf of the base is used, as it is; the only leaves created are those that the methods
    create, and a head where the base has none, in float32.

    Args:
        config: of the adapted model.
        params: the dense parameter tree, e.g. from `load_hf`.
        rng: the key from which the new leaves are drawn.

    Returns:
        The parameter tree of the model, as nested dicts.

    Raises:
        ValueError: lists all leaves that are missing, extra or misshapen.
    """
    new = methods.created(config)
    already = [path for path in trees.flatten(params) if trees.matches(path, new)]
    if already:
        lines = "\n  ".join(already)
        raise ValueError(f"the base parameters are not dense; they already hold:\n  {lines}")
    return _create(config, params, (*new, *config.heads), rng)


def add_head(config: ModelConfig, params: Mapping[str, Any], rng: jax.Array) -> dict[str, Any]:
    """Adds a fresh head to a model that has none, such as one that was pretrained without.

    Arguments and errors are those of `swap_in`, but the leaves of the methods must be there.
    """
    return _create(config, params, config.heads, rng)


def encoder_of(config: ModelConfig, params: Mapping[str, Any]) -> tuple[ModelConfig, dict]:
    """The encoder of an encoder-decoder alone: (config, params).

    Args:
        config: of the model; one without a decoder is returned as it is.
        params: its parameter tree.

    Raises:
        ValueError: the family has no encoders alone.
    """
    if not config.num_decoder_layers:
        return config, dict(params)
    config = config.encoder_only()
    paths = trees.flatten(param_shapes(config))
    flat = trees.flatten(params)
    return config, trees.unflatten({path: flat[path] for path in paths if path in flat})


def _create(
    config: ModelConfig, params: Mapping[str, Any], creatable: tuple[str, ...], rng: jax.Array
) -> dict[str, Any]:
    """The parameters with fresh leaves for those that are missing and may be created."""
    expected = trees.flatten(param_shapes(config))
    trees.check_tree(expected, params, creatable, "the base parameters do")
    present = trees.flatten(params)
    missing = [path for path in expected if path not in present]

    @jax.jit  # so that the values of the other leaves, which nobody reads, are never computed
    def create(key):
        fresh = trees.flatten(init_params(config, key))
        return {path: fresh[path].astype("float32") for path in missing}

    return trees.merge(params, create(rng) if missing else {})
