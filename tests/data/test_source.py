"""`Data`: the batches of JSONL tasks, cache files and seqio tasks, and whose token ids they are."""

import json
import subprocess
import sys

import numpy as np
import pytest

from coda_jax import bundled
from coda_jax.data import jsonl, seqio_tasks
from coda_jax.data.batches import batch_examples, epochs
from coda_jax.data.cache import write_cache
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
