"""Epochs in steps: each example was seen so often when the last of these batches was taken."""

import collections
import itertools

import numpy as np
import pytest

from coda_jax.data.cache import write_cache
from coda_jax.data.epoch_steps import steps_of
from coda_jax.data.examples import Expected
from coda_jax.data.source import Data

EXPECTED = Expected(vocab_size=400)
LENGTHS = {"inputs": 12, "targets": 6}


@pytest.fixture(name="cache", scope="module")
def fixture_cache(tmp_path_factory):
    """23 examples of random lengths, some too long; each begins with a token of its own."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("cache") / "examples.npz"
    examples = (
        {
            "inputs": np.full(rng.integers(1, 15), 100 + i),
            "targets": np.full(rng.integers(1, 8), 2),
        }
        for i in range(23)
    )
    write_cache(path, examples, {"vocabulary": "bytes", "vocab_size": 400})
    return path


def seen(data, steps, **layout):
    """{first token of an example: how often it is in so many batches}."""
    counts = collections.Counter()
    for batch in itertools.islice(data.batches(repeat=True, **layout), steps):
        tokens = batch["encoder_input_tokens"]
        positions = batch.get("encoder_positions", np.arange(tokens.shape[1])[None])
        counts.update(tokens[(positions == 0) & (tokens > 0)].tolist())
    return counts


@pytest.mark.parametrize("num_epochs", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_size": 23}, {"batch_size": 50}, {"pack": True}, {"pack": True, "shuffle": False}],
    ids=str,
)
@pytest.mark.parametrize("max_segments", [None, 2])
def test_the_last_step_is_the_first_at_which_all_were_seen(
    cache, num_epochs, options, max_segments
):
    data = Data(LENGTHS, cache=str(cache), **{"batch_size": 4} | options)
    layout = {"max_segments": max_segments, "expected": EXPECTED}
    steps = steps_of(data, num_epochs, EXPECTED, max_segments)
    before, after = (seen(data, count, **layout) for count in (steps - 1, steps))
    assert len(after) == 23 and min(after.values()) >= num_epochs
    assert len(before) < 23 or min(before.values()) < num_epochs


def test_a_part_of_an_epoch_is_its_first_examples(cache):
    data = Data(LENGTHS, cache=str(cache), batch_size=4)
    assert [steps_of(data, part, EXPECTED) for part in (0.1, 0.5, 1, 1.1)] == [1, 3, 6, 7]
    assert steps_of(Data(LENGTHS, cache=str(cache), batch_size=1), 0.3, EXPECTED) == 7  # not 8


def test_what_is_left_out_is_no_part_of_an_epoch(cache):
    narrow = Expected(vocab_size=110)  # the tokens of ten examples
    data = Data(LENGTHS, cache=str(cache), batch_size=2, leave_out=True)
    assert steps_of(data, 3, narrow) == 15
    counts = seen(data, 15, expected=narrow)
    assert counts == dict.fromkeys(range(100, 110), 3)


def test_examples_that_come_as_they_are_read_have_no_epochs():
    data = Data(LENGTHS, task="stdlib_module")
    with pytest.raises(ValueError, match=r"EPOCHS=3 needs .*stdlib_module.*TRAIN_STEPS.*CACHE"):
        steps_of(data, 3, EXPECTED)


@pytest.mark.parametrize("value", [0, -1, "3", float("nan"), True])
def test_other_numbers_are_named(cache, value):
    with pytest.raises(ValueError, match="EPOCHS must be a "):
        steps_of(Data(LENGTHS, cache=str(cache)), value, EXPECTED)
