"""Our model: dense, or with CoDA and its parallel adapter."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.engine import HUGGING_FACE, Case, Engine
from coda_jax import checkpoints
from coda_jax.methods import comparisons
from coda_jax.models import ModelConfig
from coda_jax.objectives import model_for


def load(case: Case, dtype: str = "float32", reduction: float | None = None) -> Engine:
    """Our model for one case.

    Args:
        case: weights and inputs.
        dtype: of the weights and of the computation.
        reduction: r of CoDA, k_to_k; None for the dense model without an adapter.
    """
    config, params = _dense(case.folder, dtype)
    if reduction is not None:
        (methods,) = comparisons.conditional([reduction]).values()
        config, params = config.replace(methods=methods), _adapted(case.folder, dtype)
    model = model_for(config)
    inputs = jnp.asarray(case.inputs)

    @functools.cache
    def encoder():
        return jax.jit(model.encode).lower(params, inputs).compile()

    @functools.cache
    def answer(length):
        function = functools.partial(model.predict, max_decode_length=length)
        return jax.jit(function).lower(params, inputs).compile()

    return Engine(
        lambda: np.asarray(encoder()(params, inputs), np.float32),
        lambda length: np.asarray(answer(length)(params, inputs)),
    )


@functools.cache
def _dense(folder: pathlib.Path, dtype: str) -> tuple[ModelConfig, dict]:
    """The config, and the weights in a dtype."""
    config, params = checkpoints.load_hf(folder / HUGGING_FACE)
    config = config.replace(dtype=jnp.dtype(dtype).type, dropout_rate=0.0, eos_id=-1)
    return config, jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


@functools.cache
def _adapted(folder: pathlib.Path, dtype: str) -> dict:
    """The same weights, with those of a router and an adapter, which are alike for all r."""
    config, params = _dense(folder, dtype)
    (methods,) = comparisons.conditional([2]).values()
    return checkpoints.swap_in(config.replace(methods=methods), params, jax.random.key(0))
