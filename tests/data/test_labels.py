"""JSONL files of texts with labels."""

import json

import numpy as np
import pytest

from coda_jax.data import jsonl, labels
from coda_jax.data.source import Data


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(*values):
    return [{"inputs": f"text {value}", "label": value} for value in values]


def test_targets_are_the_places_of_classes_or_the_numbers(tmp_path):
    train = write(tmp_path / "train.jsonl", *rows("no", "yes", 3, "no"))
    found = labels.read_labels(train)
    assert found == ("3", "no", "yes")
    task = labels.labelled_task(train_file=train, vocabulary="bytes", labels=found)
    examples = jsonl.TASKS[task].examples("train")
    assert [x["targets"].tolist() for x in examples] == [[1], [2], [0], [1]]
    assert examples[0]["inputs"].tolist() == [*(b + 3 for b in b"text no"), 1]

    numbers = write(tmp_path / "numbers.jsonl", *rows(0.5, -2))
    task = labels.labelled_task(validation_file=numbers, vocabulary="bytes", labels=())
    lengths = {"inputs": 10, "targets": 1}
    data = Data(lengths, task=task, split="validation", batch_size=2, shuffle=False)
    (batch,) = data.batches(repeat=False)
    assert batch["decoder_target_tokens"].dtype == np.float32
    assert batch["decoder_target_tokens"].tolist() == [[0.5], [-2.0]]
    assert batch["decoder_loss_weights"].tolist() == [[1], [1]]


@pytest.mark.parametrize(
    ("row", "classes", "message"),
    [
        ({"inputs": "a"}, ("a", "b"), "x.jsonl:2: the field 'label' is missing"),
        ({"inputs": 3, "label": "a"}, ("a", "b"), "x.jsonl:2: 'inputs' must be a string: 3"),
        ({"inputs": "a", "label": "c"}, ("a", "b"), "x.jsonl:2: the label 'c' is none of"),
        ({"inputs": "a", "label": None}, ("a", "b"), "x.jsonl:2: the label of a class must be"),
        ({"inputs": "a", "label": True}, ("a", "b"), "x.jsonl:2: the label of a class must be"),
        ({"inputs": "a", "label": "c"}, (), "x.jsonl:2: the label must be a finite number: 'c'"),
        ({"inputs": "a", "label": float("nan")}, (), "x.jsonl:2: the label must be a finite"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, classes, message):
    good = {"inputs": "a", "label": classes[0] if classes else 1.0}
    file = write(tmp_path / "x.jsonl", good, row)
    with pytest.raises(ValueError, match=message):
        labels.labelled_task(train_file=file, vocabulary="bytes", labels=classes)


def test_a_task_without_files_is_refused():
    with pytest.raises(ValueError, match="at least one of"):
        labels.labelled_task(vocabulary="bytes", labels=())
