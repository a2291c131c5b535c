"""Examples of seqio tasks: determinism, caches, and the same batches as seqio's."""

import hashlib
import itertools
import pathlib

import numpy as np
import pytest
import seqio

from coda_jax.data import batches, seqio_tasks
from coda_jax.data.cache import read_cache
from coda_jax.tasks import offline

LENGTHS = {"inputs": 128, "targets": 64}


@pytest.fixture(scope="module")
def vocabulary():
    return seqio_tasks.task_vocabulary("stdlib_module")


def read(task, split, seed=0, shuffle=False, num_epochs=1, limit=None):
    examples = seqio_tasks.seqio_examples(
        task,
        split,
        feature_lengths=LENGTHS,
        seed=seed,
        shuffle=shuffle,
        num_epochs=num_epochs,
    )
    taken = itertools.islice(examples, limit)
    return [(e["inputs"].tolist(), e["targets"].tolist()) for e in taken]


def test_a_shuffled_mixture_repeats_with_its_seed_only():
    first = read("stdlib_pretrain", "validation", 5, shuffle=True, num_epochs=None, limit=300)
    again = read("stdlib_pretrain", "validation", 5, shuffle=True, num_epochs=None, limit=300)
    other = read("stdlib_pretrain", "validation", 6, shuffle=True, num_epochs=None, limit=300)
    assert first == again
    assert first != other


def test_a_mixture_holds_its_tasks_at_their_rates(vocabulary):
    found = read("stdlib_pretrain", "validation", shuffle=True, num_epochs=None, limit=800)
    starts = [vocabulary.decode(inputs[:8]).split(":")[0] for inputs, _ in found]
    total = sum(offline.PRETRAIN_RATES.values())
    for prefix, task in (("siblings", "stdlib_siblings"), ("name", "stdlib_function_name")):
        expected = offline.PRETRAIN_RATES[task] / total
        assert starts.count(prefix) / 800 == pytest.approx(expected, abs=0.05)


def test_an_epoch_is_a_permutation_that_follows_the_seed():
    plain = read("stdlib_exception", "test")
    shuffled = read("stdlib_exception", "test", seed=1, shuffle=True)
    assert shuffled == read("stdlib_exception", "test", seed=1, shuffle=True)
    assert shuffled != read("stdlib_exception", "test", seed=2, shuffle=True)
    assert shuffled != plain
    assert sorted(shuffled) == sorted(plain)
    twice = read("stdlib_exception", "test", seed=1, shuffle=True, num_epochs=2)
    assert twice[: len(plain)] == shuffled
    assert sorted(twice[len(plain) :]) == sorted(plain)
    assert twice[len(plain) :] != shuffled


def test_long_examples_arrive_whole_so_that_they_can_be_counted():
    assert max(len(inputs) for inputs, _ in read("stdlib_module", "test")) > LENGTHS["inputs"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "nowhere"}, "no split 'nowhere'.*validation"),
        ({"task_or_mixture": "no_such_task"}, "no_such_task"),
        ({"feature_lengths": {"inputs": 0, "targets": 4}}, "not 0"),
        ({"num_epochs": 0}, "num_epochs .* not 0"),
    ],
)
def test_what_cannot_be_read_is_refused(changed, message):
    arguments = {
        "task_or_mixture": "stdlib_module",
        "split": "test",
        "feature_lengths": LENGTHS,
        "seed": 0,
        "shuffle": False,
        "num_epochs": 1,
    }
    with pytest.raises(ValueError, match=message):
        seqio_tasks.seqio_examples(**arguments | changed)


def test_a_cached_task_has_the_same_examples_and_says_what_it_is(tmp_path, vocabulary):
    path, spiece_model = tmp_path / "cache.npz", pathlib.Path(offline.VOCABULARY_FILE)
    count = seqio_tasks.cache_task("stdlib_exception", "test", path, LENGTHS, seed=7)
    cached, metadata = read_cache(path)
    expected = read("stdlib_exception", "test")
    assert count == len(cached) == len(expected)
    assert [(e["inputs"].tolist(), e["targets"].tolist()) for e in cached] == expected
    assert metadata["task"] == "stdlib_exception"
    assert metadata["split"] == "test"
    assert metadata["seed"] == 7
    assert metadata["feature_lengths"] == LENGTHS
    assert metadata["vocabulary"] == hashlib.sha256(spiece_model.read_bytes()).hexdigest()
    assert metadata["vocab_size"] == vocabulary.vocab_size == 4096
    assert metadata["versions"]["seqio"]


def test_batches_of_a_task_equal_those_of_seqio():
    ours = batches.batch_examples(
        seqio_tasks.seqio_examples(
            "stdlib_exception",
            "test",
            feature_lengths=LENGTHS,
            seed=0,
            shuffle=False,
            num_epochs=1,
        ),
        batch_size=8,
        feature_lengths=LENGTHS,
    )
    theirs = seqio.get_dataset(
        "stdlib_exception",
        LENGTHS,
        seqio.EncDecFeatureConverter(pack=False),
        dataset_split="test",
        shuffle=False,
    ).batch(8, drop_remainder=True)
    pairs = list(zip(ours, theirs.as_numpy_iterator(), strict=True))
    assert len(pairs) > 5
    for a, b in pairs:
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    assert ours.num_truncated > 0
