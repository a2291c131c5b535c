"""`Data`: the batches of JSONL tasks, cache files and seqio tasks, and whose token ids they are."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tokenizer_folders import FOLDER

from coda_jax import bundled
from coda_jax.data import jsonl, seqio_tasks
from coda_jax.data.batches import INCOMPLETE, batch_examples, epochs
from coda_jax.data.cache import write_cache
from coda_jax.data.examples import Expected, num_shared
from coda_jax.data.source import Data
from coda_jax.data.vocabularies import find_fingerprint
from coda_jax.tasks import offline  # noqa: F401 (registers the tasks)

LENGTHS = {"inputs": 64, "targets": 16}
SPIECE_MODEL = str(bundled.VOCABULARY / "spiece.model")


@pytest.fixture(name="task")
def fixture_task(tmp_path):
    """The name of a JSONL task of ten lines."""
    pairs = [{"inputs": f"return {i}", "targets": str(i)} for i in range(10)]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)))
    return jsonl.jsonl_task(train_file=str(path), vocabulary=SPIECE_MODEL)


@pytest.fixture(name="cache")
def fixture_cache(tmp_path):
    path = str(tmp_path / "cache.npz")
    seqio_tasks.cache_task("stdlib_exception", "test", path, LENGTHS, seed=0)
    return path


def assert_same(actual, expected):
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_a_jsonl_task_gives_the_same_batches_on_every_host(task, monkeypatch):
    monkeypatch.setattr(seqio_tasks, "seqio_examples", None)  # never through seqio
    data = Data(LENGTHS, task, batch_size=4, seed=3)
    examples = list(epochs(jsonl.TASKS[task].examples("train"), seed=3, num_epochs=1))
    expected = batch_examples(examples, batch_size=4, feature_lengths=LENGTHS, drop_remainder=False)
    assert_same(data.batches(repeat=False), expected)
    endless = data.batches(repeat=True)
    first = [next(endless) for _ in range(8)]  # three epochs of ten lines
    rows = np.concatenate([batch["decoder_target_tokens"] for batch in first])
    assert all(batch["decoder_loss_weights"].any(1).all() for batch in first)
    assert len(np.unique(rows[:10], axis=0)) == len(np.unique(rows[10:20], axis=0)) == 10
    assert (rows[:10] != rows[10:20]).any()
    with pytest.raises(ValueError, match=r"no split 'test', only \['train'\]"):
        Data(LENGTHS, task, split="test").batches(repeat=False)


def test_rows_are_packed_with_at_most_so_many_segments(task):
    data = Data(LENGTHS, task, batch_size=1, pack=True, shuffle=False)
    batch = next(data.batches(repeat=False))
    assert batch["encoder_segment_ids"].max() > 3
    limited = list(data.batches(repeat=False, max_segments=3))
    assert [batch["encoder_segment_ids"].max() for batch in limited] == [3, 3, 3, 1]
    unpacked = Data(LENGTHS, task, batch_size=1).batches(repeat=False, max_segments=3)
    assert "encoder_segment_ids" not in next(unpacked)


def test_a_cache_gives_the_batches_of_its_task(cache):
    options = {"split": "test", "batch_size": 8, "shuffle": False}
    of_task = Data(LENGTHS, task="stdlib_exception", **options).batches(repeat=False)
    assert_same(Data(LENGTHS, cache=cache, **options).batches(repeat=False), of_task)


def test_the_vocabulary_must_be_the_models(task, cache, tmp_path):
    for data in (
        Data(LENGTHS, task),
        Data(LENGTHS, cache=cache),
        Data(LENGTHS, "stdlib_exception"),
    ):
        assert data.vocabulary_fingerprint() == find_fingerprint(bundled.VOCABULARY)
        data.check_vocabulary(4096)
        data.check_vocabulary(4224, bundled.VOCABULARY)
        data.check_vocabulary(4096, eos_id=1, pad_id=0)
        with pytest.raises(ValueError, match="4096 ids, the model only 384"):
            data.check_vocabulary(384)
        with pytest.raises(ValueError, match="The vocabulary has eos_id=1, the model eos_id=2"):
            data.check_vocabulary(4096, eos_id=2)
        with pytest.raises(ValueError, match="The vocabulary has pad_id=0, the model pad_id=1"):
            data.check_vocabulary(4096, eos_id=1, pad_id=1)
    with pytest.raises(ValueError, match="differs from that of"):
        Data(LENGTHS, "stdlib_exception_bytes").check_vocabulary(4096, bundled.VOCABULARY)
    write_cache(tmp_path / "bare.npz", [{"inputs": [1], "targets": [1]}], {})
    with pytest.raises(ValueError, match=r"does not say its \['vocab_size', 'vocabulary'\]"):
        Data(LENGTHS, cache=str(tmp_path / "bare.npz")).check_vocabulary(4096)


def test_the_vocabularys_files_are_known_for_tasks(task):
    files = {"spiece.model": SPIECE_MODEL}
    assert Data(LENGTHS, task).vocabulary_files() == files
    assert Data(LENGTHS, "stdlib_exception").vocabulary_files() == files
    assert Data(LENGTHS, "stdlib_exception_bytes").vocabulary_files() == {}
    assert Data(LENGTHS, cache="any").vocabulary_files() == {}


def test_one_source_at_most():
    assert not Data(LENGTHS).exists
    assert Data(LENGTHS, "stdlib_module").exists and Data(LENGTHS, cache="a").exists
    assert not Data(LENGTHS, "stdlib_module", split="nowhere").exists
    with pytest.raises(ValueError, match=r"nearest are \['stdlib_module"):
        _ = Data(LENGTHS, "stdlib_modul").exists
    with pytest.raises(ValueError, match="a task or a cache file, not both"):
        Data(LENGTHS, "a", "b")


BYTES = Expected(vocab_size=384)


@pytest.fixture(name="files")
def fixture_files(tmp_path):
    """A function that makes a JSONL task of bytes of {split: pairs}."""

    def make(**splits):
        files = {}
        for split, pairs in splits.items():
            lines = [json.dumps({"inputs": i, "targets": t}) for i, t in pairs]
            (tmp_path / f"my_{split}.jsonl").write_text("\n".join(lines))
            files[f"{split}_file"] = str(tmp_path / f"my_{split}.jsonl")
        return jsonl.jsonl_task(vocabulary="bytes", **files)

    return make


def test_limits_are_those_given_or_of_the_cache_or_defaults(task, cache, tmp_path):
    assert Data(None, task).limits() == {"inputs": 512, "targets": 512}
    assert Data(None, task).limits(2048) == {"inputs": 2048, "targets": 512}
    assert Data({"inputs": 7}, task).limits(9) == {"inputs": 7, "targets": 512}
    assert Data(None, cache=cache).limits() == LENGTHS
    assert Data({"targets": 3}, cache=cache).limits() == LENGTHS | {"targets": 3}
    for wrong, named in (({"input": 3}, "got {'input': 3}"), ({"inputs": 0}, "got 0")):
        with pytest.raises(ValueError, match=named):
            Data(wrong, task)


def test_what_is_cut_is_said_before_with_the_flag_that_keeps_all(files, capsys):
    name = files(train=[("a" * 40, "b"), ("c", "d" * 9)])
    data = Data({"inputs": 20}, name, batch_size=2, shuffle=False)
    data.check(BYTES)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("2 examples of at most 41 inputs (limit 20) and 10 targets (limit 512)")
    assert "1 inputs and 0 targets of 2 are cut" in second
    assert "--gin.TASK_FEATURE_LENGTHS=\"{'inputs': 41, 'targets': 512}\" keeps all" in second
    assert data.lengths(BYTES) == {"inputs": 20, "targets": 10}
    (batch,) = data.batches(repeat=False, expected=BYTES)
    assert batch["encoder_input_tokens"].shape == (2, 20)
    assert batch["encoder_input_tokens"][0, -1] == 1  # EOS
    assert INCOMPLETE not in batch  # no target is cut
    (batch,) = Data({"targets": 4}, name, batch_size=2, shuffle=False).batches(
        False, expected=BYTES
    )
    assert batch[INCOMPLETE].tolist() == [False, True]


def test_examples_that_cannot_be_learned_are_named_or_left_out(tmp_path, capsys):
    good = {"inputs": np.array([5, 1]), "targets": np.array([6, 1])}
    write_cache(tmp_path / "x.npz", [good, good | {"inputs": np.array([5, 999])}, good], {})
    data = Data(LENGTHS, cache=str(tmp_path / "x.npz"), batch_size=2, shuffle=False)
    with pytest.raises(ValueError, match=r"x.npz: example 2: .* id 999") as e:
        data.check(BYTES)
    assert "(1 of 3 cannot; --gin.LEAVE_OUT=True leaves such examples out)" in str(e.value)
    kept = Data(LENGTHS, cache=str(tmp_path / "x.npz"), batch_size=2, leave_out=True)
    kept.check(BYTES)
    assert "1 examples are left out; the first is number 2" in capsys.readouterr().err
    (batch,) = kept.batches(repeat=False, expected=BYTES)
    assert batch["decoder_loss_weights"].any(1).all()
    write_cache(tmp_path / "y.npz", [good | {"targets": np.array([], int)}], {})
    with pytest.raises(ValueError, match="there is no example that can be learned"):
        Data(cache=str(tmp_path / "y.npz"), leave_out=True).check(BYTES)


def test_a_file_without_any_target_is_refused(files):
    with pytest.raises(ValueError, match="all 2 targets are empty"):
        Data(LENGTHS, files(train=[("a", ""), ("b", "")])).check(BYTES)


def test_targets_that_the_vocabulary_changes_are_counted(tmp_path, capsys):
    lines = [{"inputs": "a", "targets": text} for text in ("the file", "the   file", "x")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    name = jsonl.jsonl_task(
        train_file=str(tmp_path / "train.jsonl"), vocabulary=str(FOLDER / "unigram")
    )
    Data(LENGTHS, name).check(Expected(vocab_size=143))
    assert (
        "1 targets are other texts in the vocabulary, which no output equals; the first: "
        f"{tmp_path}/train.jsonl:2\n" in capsys.readouterr().err
    )


def test_three_examples_fill_a_batch_of_eight_for_ever(files):
    data = Data(LENGTHS, files(train=[("a", "b"), ("c", "d"), ("e", "f")]), batch_size=8)
    batches = data.batches(repeat=True, expected=BYTES)
    assert all(next(batches)["decoder_loss_weights"].any(1).all() for _ in range(3))


def test_a_split_is_the_validation_or_the_only_one(files):
    task = files(test=[("a", "b")])
    assert Data(LENGTHS, task).with_split(None).split == "test"
    several = files(train=[("a", "b")], test=[("a", "b")])
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\]: give one as SPLIT"):
        Data(LENGTHS, several).with_split(None)
    with pytest.raises(ValueError, match=r"no split 'validation', .*; --gin.VALIDATION_FILE"):
        Data(LENGTHS, several).with_split("validation")
    with pytest.raises(ValueError, match=r"no split 'dev', only \['test', 'train'\]$"):
        Data(LENGTHS, several).with_split("dev")
    both = files(train=[("a", "b")], validation=[("a", "b")])
    assert Data(LENGTHS, both).with_split(None).split == "validation"


def test_examples_of_both_splits_are_counted(files):
    task = files(train=[("a", "b"), ("c", "d")], validation=[("c", "d"), ("c", "e"), ("a", "b")])
    read = [Data(LENGTHS, task, split=split).chosen(BYTES) for split in ("validation", "train")]
    assert num_shared(*read) == 2


def test_examples_of_a_stream_are_looked_at_and_counted_as_they_come(capsys):
    expected = Expected(vocab_size=4096)
    data = Data({"inputs": 16, "targets": 16}, "stdlib_exception", split="test", batch_size=8)
    for _ in range(2):  # what is said once is not said in the next pass
        batches = data.batches(repeat=False, expected=expected)
        batch, *_ = batches
        assert batch[INCOMPLETE].tolist() == [False] * 8
    said = capsys.readouterr().err.splitlines()
    assert batches.num_truncated > 10
    assert len(said) == len(str(batches.num_truncated))  # at 1, 10, 100, ...
    assert all("stdlib_exception, split 'test'" in line and "keeps them" in line for line in said)
    data.report(batches)
    assert f"{batches.num_truncated:,} of {batches.num_examples:,} examples" in (
        capsys.readouterr().err
    )
    with pytest.raises(ValueError, match=r"example 1 \('.*'\) cannot be learned: its inputs have"):
        next(data.batches(repeat=False, expected=Expected(vocab_size=10)))
    some = Data(data.feature_lengths, data.task, split="test", batch_size=8, leave_out=True)
    passed = some.batches(repeat=False, expected=Expected(4096, misfit=odd))
    assert sum(1 for _ in passed) and 0 < passed.num_examples < batches.num_examples
    assert "is left out, number 1 of such: it is odd" in capsys.readouterr().err


def odd(inputs, targets):
    return "it is odd" if targets[0] % 2 else None


def test_jsonl_and_cache_files_need_neither_tensorflow_nor_seqio(tmp_path):
    code = f"""
import sys
for name in ("tensorflow", "seqio", "gin", "tokenizers"):
    sys.modules[name] = None  # an import of it is an ImportError
import coda_jax.data.audio, coda_jax.data.images
from coda_jax.data import cache, jsonl, source, vocabularies
name = jsonl.jsonl_task(train_file="train.jsonl", vocabulary={SPIECE_MODEL!r})
data = source.Data({LENGTHS!r}, name, batch_size=1)
data.check_vocabulary(4096)
cache.write_cache("cache.npz", jsonl.TASKS[name].examples("train"), {{}})
for found in (data, source.Data({LENGTHS!r}, cache="cache.npz", batch_size=1)):
    (batch,) = found.batches(repeat=False)
    tokens = batch["decoder_target_tokens"][0]
    print(vocabularies.load_vocabulary({SPIECE_MODEL!r}).decode(tokens))
"""
    (tmp_path / "train.jsonl").write_text('{"inputs": "a", "targets": "some text"}\n')
    line = [sys.executable, "-c", code]
    result = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["some text"] * 2


def test_data_are_described_by_their_contents(tmp_path, cache):
    """Not by where they lie."""

    def described(folder, targets, **others):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / "train.jsonl"
        lines = [{"inputs": "a", "targets": text} for text in targets]
        path.write_text("\n".join(map(json.dumps, lines)))
        task = jsonl.jsonl_task(train_file=str(path), vocabulary="bytes")
        return Data(LENGTHS, task, **others).description()

    first = described("first", "bc")
    json.dumps(first)
    assert first == described("moved", "bc") and str(tmp_path) not in str(first)
    assert first.keys() >= {"sha256", "feature_lengths", "batch_size", "pack", "split", "seed"}
    for other in (described("edited", "bd"), described("first", "bc", seed=1)):
        assert other != first
    copied = tmp_path / "copied.npz"
    shutil.copy(cache, copied)
    assert (
        Data(LENGTHS, cache=cache).description() == Data(LENGTHS, cache=str(copied)).description()
    )
    assert Data(LENGTHS, "image_folder").description()["task"] == "image_folder"
