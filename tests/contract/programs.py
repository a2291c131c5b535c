"""What contract tests run: parameters, inputs and batches of a case, and compiled programs.

What several tests need is made once for each config.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from coda_jax import trees
from coda_jax.checkpoints import swap_in
from coda_jax.commands.bench_programs import random_batch
from coda_jax.methods import Coda
from coda_jax.models import family_of, param_shapes
from coda_jax.objectives import model_for

LENGTHS = (9, 4, 1, 7, 2, 0, 3, 8)  # of the rows of a batch of inputs
LENGTH = max(LENGTHS)
TARGET_LENGTH = 3


@functools.cache
def base_params(config):
    """Parameters of the dense model with nothing zero, and no norm that does nothing."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape) * (leaf.shape[0] ** -0.5 if leaf.ndim > 1 else 0.2)
        return np.asarray(values + path.endswith("/scale"), leaf.dtype)

    flat = trees.flatten(param_shapes(config.dense()))
    return trees.unflatten({path: draw(path, leaf) for path, leaf in flat.items()})


@functools.cache
def fresh_params(config):
    """The dense model's parameters with the methods' fresh leaves, as numpy arrays."""
    params = swap_in(config, base_params(config.dense()), jax.random.key(1))
    return jax.tree.map(np.asarray, params)


def without_gradient(config):
    """Patterns of the leaves that no gradient reaches."""
    return tuple(pattern for m in config.methods for pattern in m.without_gradient)


@functools.cache
def params(config):
    """Parameters as after training: no new leaf is zero or the same everywhere."""
    rng = np.random.default_rng(1)

    def changed(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(leaf.dtype)
        if trees.matches(path, without_gradient(config)):
            return leaf
        if not leaf.any():
            return 0.3 * noise * leaf.shape[0] ** -0.5
        return leaf * (1 + 0.2 * noise)

    flat = trees.flatten(fresh_params(config))
    return trees.unflatten({path: changed(path, leaf) for path, leaf in flat.items()})


def coda_of(config):
    """How the config routes, None where it does not."""
    return next((method for method in config.methods if isinstance(method, Coda)), None)


def mask_of(lengths, num_tokens=None):
    """[B, N], True for the first places of each row."""
    return np.arange(num_tokens or max(lengths)) < np.array(lengths)[:, None]


def inputs_of(config, lengths=LENGTHS, seed=0):
    """Random inputs of these lengths, filled up with zeros, which are padding."""
    rng = np.random.default_rng(seed)
    full = family_of(config).inputs.random(config, rng, len(lengths), max(lengths))
    mask = mask_of(lengths).reshape(full.shape[:2] + (1,) * (full.ndim - 2))
    inputs = np.where(mask, full, np.zeros_like(full))
    found = config.network().input_mask(inputs)
    np.testing.assert_array_equal(found, mask_of(lengths), "what is zero is not padding")
    return inputs


def padded(inputs, places):
    """The inputs with more padding."""
    return np.pad(inputs, ((0, 0), (0, places)) + ((0, 0),) * (inputs.ndim - 2))


def with_noise_in_padding(config, inputs):
    """The inputs with other values in their padding, in all channels that do not say what it is."""
    input_mask = config.network().input_mask
    padding = ~np.asarray(input_mask(inputs))
    for channel in range(inputs.shape[2] if inputs.ndim == 3 else 0):
        noisy = inputs.copy()
        noisy[padding, channel] = 5.0
        if np.array_equal(~np.asarray(input_mask(noisy)), padding):
            inputs = noisy
    return inputs


def batch_of(config):
    """A batch of the trainer."""
    return random_batch(config, 2, LENGTH, TARGET_LENGTH)


@functools.partial(jax.jit, static_argnums=0)
def outputs(config, params, batch):
    """The logits of a batch, [B, T, V] or [B, N, V] float32."""
    return model_for(config).logits(params, batch)


def relative_error(found, expected):
    """The root mean square of the differences, as a share of that of the values."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))


def tokens_of_equal_choices(selections, others):
    """[B, N], the tokens of `inputs_of` in rows of which all layers take the same ones in both."""
    same = np.array(LENGTHS) > 0
    for layer, selection in selections.items():
        other = others[layer]  # slots that nothing was picked for hold the first other tokens
        different = (selection.indices != other.indices) & selection.valid
        different |= selection.valid != other.valid
        same &= ~np.asarray(different.any(-1))
    assert same.sum() > 2
    return mask_of(LENGTHS) & same[:, None]


def in_bfloat16(config):
    """The config with computation in bfloat16."""
    return dataclasses.replace(config, dtype=jnp.bfloat16)
