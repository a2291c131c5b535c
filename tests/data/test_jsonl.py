"""JSONL files and tasks over them: every bad line is named, and seqio reads the same tokens."""

import json
import sys

import numpy as np
import pytest
import seqio
from tokenizer_folders import FOLDER

from coda_jax import bundled
from coda_jax.data import jsonl, seqio_tasks

LENGTHS = {"inputs": 128, "targets": 64}


@pytest.fixture(autouse=True)
def forget_tasks():
    """Removes what a test has registered."""
    before = set(seqio.TaskRegistry.names())
    yield
    jsonl.TASKS.clear()
    for name in set(seqio.TaskRegistry.names()) - before:
        seqio.TaskRegistry.remove(name)


@pytest.fixture
def write(tmp_path):
    """Writes the texts of splits; returns the keyword arguments that name the files."""

    def files(**texts):
        for split, text in texts.items():
            (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
        return {f"{split}_file": str(tmp_path / f"{split}.jsonl") for split in texts}

    return files


def lines(*pairs):
    return "".join(json.dumps({"inputs": i, "targets": t}) + "\n" for i, t in pairs)


def as_lists(examples):
    return [(e["inputs"].tolist(), e["targets"].tolist()) for e in examples]


def read(task, split):
    return as_lists(
        seqio_tasks.seqio_examples(
            task, split, feature_lengths=LENGTHS, seed=0, shuffle=False, num_epochs=1
        )
    )


def test_a_jsonl_task_reads_its_files(write):
    files = write(
        train=lines(("a", "b"), ("c", "d\n")) + "\n  \n",  # A blank end is fine.
        test='{"inputs": "ü ", "targets": "", "id": 3}',  # So are other fields and no line end.
    )
    name = jsonl.jsonl_task(**files, vocabulary="bytes")
    assert name == "jsonl_train_test"
    task = jsonl.TASKS[name]
    assert as_lists(task.examples("train")) == [([100, 1], [101, 1]), ([102, 1], [103, 13, 1])]
    assert as_lists(task.examples("test")) == [([198, 191, 35, 1], [1])]
    assert task.examples("test")[0]["inputs"].dtype == np.int32
    with pytest.raises(ValueError, match=r"no split 'validation', only \['test', 'train'\]"):
        task.examples("validation")
    assert jsonl.jsonl_task(**files, vocabulary="bytes") == name
    assert jsonl.TASKS[name] is task


def test_the_fields_of_a_line_may_have_other_names(tmp_path):
    file = tmp_path / "answers.jsonl"
    lines = [{"id": 3, "question": "a b", "prediction": "c"}, {"question": "d", "prediction": "e"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"train_file": file, "vocabulary": "bytes"}
    task = jsonl.TASKS[jsonl.jsonl_task(**given, fields=("question", "prediction"))]
    assert task.columns == {"train": {"inputs": ["a b", "d"], "targets": ["c", "e"]}}
    with pytest.raises(ValueError, match=r"answers.jsonl:1: the field 'inputs' is missing"):
        jsonl.jsonl_task(**given)
    with pytest.raises(ValueError, match="INPUT_FIELD and TARGET_FIELD are both 'question'"):
        jsonl.jsonl_task(**given, fields=("question", "question"))


def test_seqio_reads_the_same_of_a_table(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id,q,c,answer\n1,why,"x\ny",because\n2,a,b,c\n')
    fields = ("question: {q} context: {c}", "answer")
    name = jsonl.jsonl_task(train_file=path, vocabulary="bytes", fields=fields)
    task = jsonl.TASKS[name]
    assert task.columns["train"] == {
        "inputs": ["question: why context: x\ny", "question: a context: b"],
        "targets": ["because", "c"],
    }
    assert task.lines == {"train": [2, 4]}
    assert read(name, "train") == as_lists(task.examples("train"))


@pytest.mark.parametrize(
    "vocabulary",
    ["bytes", str(bundled.VOCABULARY), *(str(FOLDER / name) for name in ("byte_bpe", "unigram_5"))],
)
def test_seqio_knows_the_task_by_its_name_and_reads_the_same_tokens(write, vocabulary):
    pairs = [("def f(x):\n    return  x", "f <extra_id_0> ü"), ("", "日本"), (" a ", "b")]
    name = jsonl.jsonl_task(**write(train=lines(*pairs)), vocabulary=vocabulary)
    assert seqio.get_mixture_or_task(name).num_input_examples("train") == 3  # as T5X looks it up
    assert read(name, "train") == as_lists(jsonl.TASKS[name].examples("train"))


def test_a_task_made_before_seqio_was_imported_is_registered_when_it_is_read(write, monkeypatch):
    with monkeypatch.context() as without:
        without.delitem(sys.modules, "seqio")
        name = jsonl.jsonl_task(**write(test=lines(("a", "b"))), vocabulary="bytes")
    assert name not in seqio.TaskRegistry.names()
    assert read(name, "test") == [([100, 1], [101, 1])]
    assert name in seqio.TaskRegistry.names()


def test_a_task_of_seqio_scores_exact_matches(write):
    files = write(train=lines(("a", "b")))
    name = jsonl.jsonl_task(**files, vocabulary="bytes")
    task = seqio_tasks.provider(name)
    assert set(task.splits) == {"train"}
    assert read(name, "train") == [([100, 1], [101, 1])]
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
        *[
            (brackets, ":1: not JSON: maximum recursion depth: it is nested too deep, at most 100 ")
            for brackets in (
                "[" * 100_000,
                "[" * 5000 + "]" * 5000,
                '{"a":' * 101 + "1" + "}" * 101,
            )
        ],
        ("", "file is empty"),
        ("\n\n", "file is empty"),
    ],
)
def test_a_bad_line_is_named_when_the_task_is_made(write, text, message):
    files = write(train=lines(("a", "b")), validation=text)
    with pytest.raises(ValueError, match=message) as e:
        jsonl.jsonl_task(**files, vocabulary="bytes")
    assert files["validation_file"] in str(e.value)
    assert not jsonl.TASKS


def test_a_task_needs_a_file_and_a_vocabulary_that_exist(write, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="at least one"):
        jsonl.jsonl_task(vocabulary="bytes")
    with pytest.raises(FileNotFoundError):
        jsonl.jsonl_task(train_file=str(tmp_path / "no"), vocabulary="bytes")
    files = write(train=lines(("a", "b")))
    with pytest.raises(FileNotFoundError, match="No vocabulary 'nowhere'"):
        jsonl.jsonl_task(**files, vocabulary="nowhere")
    monkeypatch.delitem(sys.modules, "seqio")
    with pytest.raises(FileNotFoundError, match="No vocabulary 'nowhere'"):
        jsonl.jsonl_task(**files, vocabulary="nowhere")


@pytest.mark.parametrize("name", ["train_file", "vocabulary"])
def test_a_number_is_no_file(name):
    given = {"train_file": "a.jsonl", "vocabulary": "bytes", name: 2024}
    with pytest.raises(ValueError, match=rf"^{name.upper()} must be .* got 2024: write \./2024$"):
        jsonl.jsonl_task(**given)
