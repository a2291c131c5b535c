"""Batches that are as long as their examples train as fully padded ones do."""

import functools
import itertools

from helpers import (
    TINY_SPEECH,
    assert_same_tree,
    config,
    random_frames,
    random_params,
    random_tokens,
)
import jax
import numpy as np
import pytest

from coda_jax import trees
from coda_jax.data.batches import batch_examples, epochs
from coda_jax.objectives import model_for

LENGTHS = {"inputs": 70, "targets": 20}
ROUTED = {"reduction": 2.0, "routing": "sigmoid"}  # which compiles fastest
TEXT = config(ROUTED, num_encoder_layers=1)
SPEECH = config(ROUTED, base=TINY_SPEECH, num_encoder_layers=1)


def padded(batch):
    """The batch with all columns that the limits allow."""

    def pad(key, values):
        length = LENGTHS["inputs" if key.startswith("encoder") else "targets"]
        widths = [(0, 0), (0, length - values.shape[1]), *[(0, 0)] * (values.ndim - 2)]
        return np.pad(values, widths)

    return {key: pad(key, values) for key, values in batch.items()}


def examples_of(cfg, sizes, rng):
    """Examples with so many inputs and targets."""

    def inputs(length):
        if cfg is TEXT:
            return random_tokens(rng, [length], length)[0]
        return random_frames(rng, [length], length)[0]

    return [{"inputs": inputs(n), "targets": random_tokens(rng, [t], t)[0]} for n, t in sizes]


@pytest.mark.parametrize("cfg", [pytest.param(TEXT, id="text"), pytest.param(SPEECH, id="speech")])
@pytest.mark.all
def test_gradients_are_those_of_full_padding(cfg, rng):
    examples = examples_of(cfg, [(25, 3), (7, 7), (12, 1), (31, 6)], rng)
    (batch,) = batch_examples(examples, batch_size=4, feature_lengths=LENGTHS)
    assert batch["encoder_input_tokens"].shape[:2] == (4, 32)
    assert batch["decoder_target_tokens"].shape == (4, 8)
    step = jax.jit(jax.value_and_grad(model_for(cfg).loss, has_aux=True))
    params = random_params(cfg)
    (_, sums), gradients = step(params, batch)
    (_, full_sums), full_gradients = step(params, padded(batch))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), sums, full_sums)
    expected = trees.flatten(full_gradients)
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    for path, leaf in trees.flatten(gradients).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5 * largest, err_msg=path)


def test_the_batches_of_a_run_that_goes_on_are_those_of_one_that_was_not_cut(rng):
    """Of several lengths, which follow from the batch alone."""
    sizes = [(25, 3), (50, 3), (7, 7), (12, 15), (31, 6)]
    examples = examples_of(TEXT, sizes, rng)

    def batches(start, stop):
        ordered = epochs(examples, seed=0)
        made = batch_examples(ordered, batch_size=2, feature_lengths=LENGTHS)
        return list(itertools.islice(made, start, stop))  # as the trainer skips what it took

    whole = batches(0, 9)
    assert len({batch["encoder_input_tokens"].shape for batch in whole}) > 1
    for ours, theirs in zip([*batches(0, 4), *batches(4, 9)], whole, strict=True):
        assert_same_tree(ours, theirs)
