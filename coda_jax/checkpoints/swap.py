"""From a dense checkpoint to one with adapters and routers."""

from collections.abc import Mapping
from typing import Any

import jax

from coda_jax import params as params_lib
from coda_jax.checkpoints.shapes import as_module, expected_shapes
from coda_jax.network import init_params


def swap_in(base_params: Mapping, model_or_config: Any, rng: jax.Array) -> dict:
    """Adds freshly initialised adapters and routers to a dense checkpoint.

    Every leaf of the base is used, as it is; the only leaves created are those that match
    `params.NEW`, or `params.HEADS` where the base has no head, in float32.

    Args:
        base_params: the dense parameter tree, e.g. from `load_hf`.
        model_or_config: the `T5Config` with `adapter` and `coda` set, or its network or model.
        rng: the key from which the new leaves are drawn.

    Returns:
        The parameter tree of the model, as nested dicts.

    Raises:
        ValueError: lists all leaves that are missing, extra or misshapen.
    """
    module = as_module(model_or_config)
    expected = params_lib.flatten(expected_shapes(module))
    creatable = params_lib.NEW + params_lib.HEADS
    params_lib.check_tree(expected, base_params, creatable, "The base parameters do")
    present = params_lib.flatten(base_params)
    already = [path for path in present if params_lib.matches(path, params_lib.NEW)]
    if already:
        lines = "\n  ".join(already)
        raise ValueError(f"The base parameters are not dense; they already hold:\n  {lines}")
    missing = [path for path in expected if path not in present]

    @jax.jit  # so that the values of the other leaves, which nobody reads, are never computed
    def create(key):
        fresh = params_lib.flatten(init_params(module, key))
        return {path: fresh[path].astype("float32") for path in missing}

    return params_lib.merge(base_params, create(rng) if missing else {})
