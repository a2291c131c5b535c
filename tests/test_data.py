"""Tests of coda_jax.data: determinism, JSONL files, vocabularies; every bad input is named."""

import hashlib
import io
import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest
import seqio

from coda_jax import batches, data
from coda_jax.tasks import offline

LENGTHS = {"inputs": 128, "targets": 64}


@pytest.fixture(scope="module")
def vocabulary():
    return data.task_vocabulary("stdlib_module")


@pytest.fixture
def jsonl_task(tmp_path):
    """Registers a task of one text of lines per split, and removes it at the end."""
    names = []

    def add(vocabulary=None, **texts):
        files = {}
        for split, text in texts.items():
            files[f"{split}_file"] = tmp_path / f"{split}.jsonl"
            files[f"{split}_file"].write_text(text, encoding="utf-8")
        names.append(f"jsonl_{len(names)}")
        vocabulary = vocabulary or data.load_vocabulary("bytes")
        return data.add_jsonl_task(names[-1], vocabulary=vocabulary, **files)

    yield add
    for name in set(names) & set(seqio.TaskRegistry.names()):
        seqio.TaskRegistry.remove(name)


def lines(*pairs):
    return "".join(json.dumps({"inputs": i, "targets": t}) + "\n" for i, t in pairs)


def read(task, split, seed=0, shuffle=False, num_epochs=1, limit=None):
    examples = data.seqio_examples(
        task,
        split,
        feature_lengths=LENGTHS,
        seed=seed,
        shuffle=shuffle,
        num_epochs=num_epochs,
    )
    taken = itertools.islice(examples, limit)
    return [(e["inputs"].tolist(), e["targets"].tolist()) for e in taken]


# --- seqio tasks. ---


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
        data.seqio_examples(**arguments | changed)


def test_a_cached_task_has_the_same_examples_and_says_what_it_is(tmp_path, vocabulary):
    path, spiece_model = tmp_path / "cache.npz", pathlib.Path(offline.VOCABULARY_FILE)
    count = data.cache_task("stdlib_exception", "test", path, LENGTHS, seed=7)
    cached, metadata = batches.read_cache(path)
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


# --- JSONL. ---


def test_a_jsonl_task_reads_its_files_and_scores_exact_matches(jsonl_task):
    task = jsonl_task(
        train=lines(("a", "b"), ("c", "d\n")) + "\n  \n",  # A blank end is fine.
        test='{"inputs": "ü ", "targets": "", "id": 3}',  # So are other fields and no line end.
    )
    assert set(task.splits) == {"train", "test"}
    assert read(task, "train") == [([100, 1], [101, 1]), ([102, 1], [103, 13, 1])]
    assert read(task.name, "test") == [([198, 191, 35, 1], [1])]
    (metric,) = task.metric_fns
    assert metric(["b", "d"], [task.postprocess_fn(x) for x in (" b ", "e")]) == {"accuracy": 50}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines(("a", "b")) + "{'inputs': 1}\n", ":2: not JSON"),
        (lines(("a", "b")) + "\n" + lines(("a", "b")), ":2: not JSON"),
        ('{"inputs": "a"}\n', ":1: the field 'targets' is missing"),
        (lines(("a", "b"), ("c", 3)), ":2: 'targets' must be a string: 3"),
        (lines((None, "b")), ":1: 'inputs' must be a string: None"),
        ('["a", "b"]\n', ":1: not an object"),
        ("", "file is empty"),
        ("\n\n", "file is empty"),
    ],
)
def test_a_bad_line_is_named_when_the_task_is_registered(jsonl_task, tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as e:
        jsonl_task(train=lines(("a", "b")), validation=text)
    assert str(tmp_path / "validation.jsonl") in str(e.value)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"inputs": "a"}\n{"inputs": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not JSON"):
        data.read_jsonl(path, ("inputs",))


def test_a_jsonl_task_needs_a_file_that_exists(jsonl_task, tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        jsonl_task()
    with pytest.raises(FileNotFoundError):
        data.add_jsonl_task("x", train_file=tmp_path / "no", vocabulary=None)


def test_inputs_come_from_text_jsonl_and_standard_input(tmp_path, monkeypatch):
    text, jsonl = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("one\n\n two\x0cand \n", encoding="utf-8")
    jsonl.write_text('{"inputs": "one\\ntwo", "targets": 3}\n')
    assert data.read_inputs(text) == ["one", "", " two\x0cand "]
    assert data.read_inputs(str(jsonl)) == ["one\ntwo"]
    monkeypatch.setattr("sys.stdin", io.StringIO("x\ny"))
    assert data.read_inputs("-") == ["x", "y"]
    text.write_text("")
    with pytest.raises(ValueError, match=r"a\.txt: there are no inputs"):
        data.read_inputs(text)
    jsonl.write_text('{"input": "one"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the field 'inputs'"):
        data.read_inputs(jsonl)


# --- Vocabularies. ---


def test_vocabularies_load_from_a_directory_a_file_and_bytes(tmp_path):
    shutil.copy(offline.VOCABULARY_FILE, tmp_path / "spiece.model")
    for path in (tmp_path, tmp_path / "spiece.model"):
        loaded = data.load_vocabulary(path)
        assert loaded.vocab_size == 4096
        assert loaded.extra_ids == 100
    assert data.load_vocabulary("bytes").vocab_size == 384
    assert data.load_vocabulary("bytes").encode("a") == [100]


def test_a_vocabulary_that_brings_its_extra_ids_gets_no_more(tmp_path, vocabulary):
    path = tmp_path / "spiece.model"
    path.write_bytes(vocabulary.sp_model)  # seqio's bytes hold the extra ids.
    assert data.load_vocabulary(path).vocab_size == 4096


def test_what_is_no_vocabulary_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"spiece\.model"):
        data.load_vocabulary(tmp_path)
    path = tmp_path / "spiece.model"
    path.write_bytes(b"\xff nonsense")
    with pytest.raises(ValueError, match=r"spiece\.model' is not a SentencePiece model"):
        data.load_vocabulary(tmp_path)


def test_the_vocabulary_must_be_the_models(tmp_path, vocabulary):
    of_bytes = data.load_vocabulary("bytes")
    data.check_vocabulary(vocabulary, 4096)
    data.check_vocabulary(vocabulary, 4224, tmp_path)  # No file beside the checkpoint.
    with pytest.raises(ValueError, match="4096 ids, the model only 4095"):
        data.check_vocabulary(vocabulary, 4095)
    shutil.copy(offline.VOCABULARY_FILE, tmp_path / "spiece.model")
    data.check_vocabulary(data.load_vocabulary(tmp_path), 4096, tmp_path)
    data.check_vocabulary(vocabulary, 4096, tmp_path)  # The same bytes elsewhere.
    with pytest.raises(ValueError, match=r"differs from .*bytes"):
        data.check_vocabulary(of_bytes, 4096, tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"other")
    with pytest.raises(ValueError, match="differs from"):
        data.check_vocabulary(vocabulary, 4096, tmp_path)


def test_batches_of_a_task_equal_those_of_seqio():
    ours = batches.batch_examples(
        data.seqio_examples(
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
