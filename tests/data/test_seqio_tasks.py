"""Examples of seqio tasks: determinism, caches, and the same batches as seqio's."""

import copy
import functools
import hashlib
import itertools
import pathlib

import numpy as np
import pytest
import seqio
import tensorflow as tf
from tokenizer_folders import FOLDER, lines

from coda_jax.data import batches, seqio_tasks
from coda_jax.data.cache import read_cache
from coda_jax.data.source import Data
from coda_jax.data.vocabularies import load_vocabulary
from coda_jax.tasks import offline, preprocessors

LENGTHS = {"inputs": 128, "targets": 64}
AFTER_TRIM = seqio.preprocessors.append_eos_after_trim


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


@pytest.mark.all
def test_a_shuffled_mixture_repeats_with_its_seed_only():
    first = read("stdlib_pretrain", "validation", 5, shuffle=True, num_epochs=None, limit=300)
    again = read("stdlib_pretrain", "validation", 5, shuffle=True, num_epochs=None, limit=300)
    other = read("stdlib_pretrain", "validation", 6, shuffle=True, num_epochs=None, limit=300)
    assert first == again
    assert first != other


@pytest.mark.all
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


@seqio.map_over_dataset
def twice(example):
    """One text as inputs and targets."""
    return {"inputs": example["text"], "targets": example["text"]}


@pytest.fixture(scope="module")
def small_and_large(vocabulary):
    """A mixture of tasks of 10 and 100 examples, one of which cuts by itself."""
    for count, ending in ((10, seqio.preprocessors.append_eos), (100, AFTER_TRIM)):
        texts = [f"{count} return {i} " + "and so on " * 60 for i in range(count)]
        seqio.TaskRegistry.add(
            f"of_{count}",
            source=seqio_tasks.MemorySource(lambda _, t=texts: {"text": t}, ("test",)),
            preprocessors=[
                twice,
                seqio.preprocessors.tokenize,
                ending,
            ],
            output_features=seqio_tasks.output_features(vocabulary),
            metric_fns=[seqio_tasks.accuracy],
            shuffle_buffer_size=100,
        )
    return seqio.MixtureRegistry.add("of_10_and_100", ["of_10", "of_100"], default_rate=1.0)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_pass_of_a_mixture_is_every_example_of_every_task_once(
    small_and_large, vocabulary, shuffle
):
    found = read("of_10_and_100", "test", shuffle=shuffle)
    assert len(found) == len({tuple(inputs) for inputs, _ in found}) == 110
    assert all(len(inputs) > LENGTHS["inputs"] for inputs, _ in found)  # none was cut by its task
    many = read("of_10_and_100", "test", shuffle=shuffle, num_epochs=None, limit=60)
    small = sum(vocabulary.decode(inputs).startswith("10 ") for inputs, _ in many)
    assert 15 < small < 45  # at equal rates


def test_a_mixture_is_evaluated_task_by_task(small_and_large):
    found = dict(seqio_tasks.evaluated("of_10_and_100", "test", LENGTHS))
    assert {task.name: len(x) for task, x in found.items()} == {"of_10": 10, "of_100": 100}
    for task, examples in found.items():
        targets = [x["targets"].tolist() for x in examples]
        assert max(map(len, targets)) > LENGTHS["targets"]
        assert seqio_tasks.metrics_of(task, examples, targets) == {"accuracy": 100}
        outputs = [x[: LENGTHS["targets"]] for x in targets]  # cut ones are never right
        assert seqio_tasks.metrics_of(task, examples, outputs) == {"accuracy": 0}


def test_tasks_without_inputs_or_metrics_are_refused(vocabulary):
    source = seqio_tasks.MemorySource(lambda _: {"targets": ["a"]}, ("test",))
    features = {"targets": seqio.Feature(vocabulary)}
    steps = [seqio.preprocessors.tokenize]
    seqio.TaskRegistry.add("no_inputs", source, features, steps)
    with pytest.raises(
        ValueError, match=r"no_inputs has .*\['targets'\]: \['inputs'\] are missing"
    ):
        read("no_inputs", "test")
    with pytest.raises(ValueError, match="stdlib_span_corruption, split 'train': no task has metr"):
        list(seqio_tasks.evaluated("stdlib_span_corruption", "train", LENGTHS))


def test_texts_that_seqio_cuts_still_end_with_eos(vocabulary):
    """As T5X reads our tasks."""
    task = seqio.get_mixture_or_task("stdlib_exception")
    cut, whole = (
        list(task.get_dataset(LENGTHS, "test", shuffle=False, **trimmed).take(60))
        for trimmed in ({}, {"trim_output_features": False})
    )
    long = 0
    for ours, theirs in zip(cut, whole, strict=True):
        inputs, expected = ours["inputs"].numpy(), theirs["inputs"].numpy()
        if len(expected) > LENGTHS["inputs"]:
            long += 1
            expected = np.append(expected[: LENGTHS["inputs"] - 1], vocabulary.eos_id)
        np.testing.assert_array_equal(inputs, expected)
        assert ours.keys() == theirs.keys()
    assert 0 < long < len(cut)


def test_long_examples_arrive_whole_so_that_they_can_be_counted():
    assert max(len(inputs) for inputs, _ in read("stdlib_module", "test")) > LENGTHS["inputs"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "nowhere"}, "no split 'nowhere'.*validation"),
        ({"task_or_mixture": "no_such_task"}, "no_such_task"),
        ({"feature_lengths": {"inputs": 0, "targets": 4}}, "got 0"),
        ({"num_epochs": 0}, "num_epochs .* got 0"),
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
        for key in a:  # seqio's have more columns of padding
            np.testing.assert_array_equal(a[key], b[key][:, : a[key].shape[1]])
            assert key == "decoder_input_tokens" or not b[key][:, a[key].shape[1] :].any()
    assert ours.num_truncated > 0


@pytest.fixture(scope="module", name="tokenizers")
def fixture_tokenizers():
    """A vocabulary of tokenizer.json, and seqio's over it."""
    folder = FOLDER / "unigram_4"
    return load_vocabulary(folder), seqio_tasks.seqio_vocabulary(folder)


def test_seqio_has_the_ids_and_texts_of_tokenizer_json(tokenizers):
    plain, theirs = tokenizers
    assert (theirs.vocab_size, theirs.eos_id, theirs.unk_id) == (143, 1, 2)
    assert (theirs.pad_id, theirs.bos_id, theirs.extra_ids) == (0, None, 0)
    texts = lines(60)
    rows = [plain.encode(text) for text in texts]
    in_graph = tf.data.Dataset.from_tensor_slices(texts).map(theirs.encode_tf)
    for text, ids, tensor in zip(texts, rows, in_graph.as_numpy_iterator(), strict=True):
        assert theirs.encode(text) == ids == tensor.tolist()
        assert theirs.decode(ids) == theirs.decode_tf(tf.constant(ids)).numpy().decode()
        assert theirs.decode([*ids, 1, 9]) == plain.decode(ids)
    pairs = tf.constant([[5, 1, 9], [9, 9, 500]])
    texts = [plain.decode([5]), plain.decode([9, 9, 500])]
    assert [text.decode() for text in theirs.decode_tf(pairs).numpy()] == texts


def test_seqio_vocabularies_of_the_same_files_are_equal(tokenizers):
    plain, theirs = tokenizers
    again = seqio_tasks.seqio_vocabulary(FOLDER / "unigram_4" / "tokenizer.json")
    assert theirs == again == copy.deepcopy(theirs) and hash(theirs) == hash(again)
    assert theirs != seqio_tasks.seqio_vocabulary(FOLDER / "unigram_5")
    assert theirs != seqio_tasks.seqio_vocabulary("bytes")
    assert seqio_tasks.plain_vocabulary(theirs) == plain
    assert "tokenizer.json" in str(theirs)


def test_a_cache_says_the_ids_of_its_vocabulary(tokenizers, tmp_path):
    plain, theirs = tokenizers
    task = add("cached", theirs, [seqio.preprocessors.tokenize], ["the file", "the text"])
    path = str(tmp_path / "cache.npz")
    seqio_tasks.cache_task(task, "train", path, LENGTHS, seed=0)
    examples, _ = read_cache(path)
    assert examples[0]["inputs"].tolist() == [*plain.encode("the file"), 1]
    data = Data(LENGTHS, cache=path)
    data.check_vocabulary(143, FOLDER / "unigram_4", eos_id=1, pad_id=0)
    with pytest.raises(ValueError, match="The vocabulary has eos_id=1, the model eos_id=2"):
        data.check_vocabulary(143, eos_id=2)
    with pytest.raises(ValueError, match="differs from that of"):
        data.check_vocabulary(143, FOLDER / "unigram_5")
    assert set(Data(LENGTHS, task.name).vocabulary_files()) == set(plain.files)


def test_span_corruption_takes_the_sentinels_wherever_they_are(tokenizers):
    plain, theirs = tokenizers
    assert plain.sentinel_ids[0] == 139 != plain.vocab_size - 1  # tokens were added later
    steps = [
        functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
        preprocessors.span_corruption,
    ]
    text = "some words of a text that is long enough for some spans of noise in it " * 3
    add("corrupted", theirs, steps, [text], columns=("targets",))
    for inputs, targets in read("corrupted", "train", limit=1):  # the last is short
        found = [i for i in inputs if i in plain.sentinel_ids]
        assert found == plain.sentinel_ids[: len(found)] and len(found) > 5
        assert found == [i for i in targets if i in plain.sentinel_ids]
        assert not {140, 141, 142} & {*inputs, *targets}


def add(name, vocabulary, steps, texts, columns=("inputs", "targets")):
    source = seqio_tasks.MemorySource(lambda _: dict.fromkeys(columns, texts), ("train",))
    return seqio_tasks.add_task(name, source, steps, vocabulary)
