"""What examples a model can take, and what is found in all of a file."""

import numpy as np
import pytest
from tokenizer_folders import FOLDER

from coda_jax.data.examples import Expected, Writing, problem, scan, writing
from coda_jax.data.reports import of_scan
from coda_jax.data.vocabularies import ByteVocabulary, load_vocabulary

LIMITS = {"inputs": 5, "targets": 3}
TEXTS = Expected(vocab_size=20)
VECTORS = Expected(vocab_size=20, channels=2)
NUMBERS = Expected(vocab_size=20, targets="numbers")
UNREAD = Expected(vocab_size=0, channels=2, targets=None)
WRITTEN = Writing(2, frozenset([1, 2, 3]))
IDS, FRAMES = np.array([4, 5, 1]), np.ones((3, 2), np.float32)


def refuse_long_targets(inputs, targets):
    return f"{len(targets)} for {len(inputs)}" if len(targets) > len(inputs) else None


@pytest.mark.parametrize(
    ("expected", "changed", "named"),
    [
        (TEXTS, {}, None),
        (TEXTS, {"inputs": FRAMES}, "inputs are float32 values of the shape [3, 2]"),
        (TEXTS, {"inputs": IDS.astype(float)}, "inputs are float64 values of the shape [3]"),
        (TEXTS, {"inputs": IDS[:0]}, "its inputs are empty"),
        (TEXTS, {"inputs": np.array([4, 20])}, "inputs have the id 20, the model's are 0 to 19"),
        (TEXTS, {"targets": np.array([4, -1])}, "targets have the id -1"),
        (TEXTS, {"targets": IDS[:0]}, "its targets are empty"),
        (TEXTS, {"targets": np.array([3, 2, 1])}, "has no pieces for its targets"),
        (TEXTS, {"targets": np.array([3, 2, 4, 1])}, None),
        (TEXTS, {"targets": np.array([1])}, None),
        (VECTORS, {"inputs": FRAMES}, None),
        (VECTORS, {}, "its inputs have the shape [3], the model takes [n, 2]"),
        (VECTORS, {"inputs": FRAMES[:, :1]}, "the shape [3, 1], the model takes [n, 2]"),
        (VECTORS, {"inputs": FRAMES[:0]}, "its inputs are empty"),
        (VECTORS, {"inputs": FRAMES * np.nan}, "not finite"),
        (VECTORS, {"inputs": FRAMES * np.inf}, "not finite"),
        (NUMBERS, {"targets": np.array([np.nan])}, "its targets are [nan]"),
        (NUMBERS, {"targets": np.array([0.5])}, None),
        (UNREAD, {"inputs": FRAMES, "targets": IDS[:0]}, None),
        (UNREAD, {}, "its inputs have the shape [3]"),
    ],
)
def test_what_a_model_cannot_learn_is_named(expected, changed, named):
    found = problem({"inputs": IDS, "targets": IDS} | changed, expected, WRITTEN, LIMITS)
    assert found is None if named is None else named in found


def test_missing_features_are_named():
    assert problem({"targets": IDS}, TEXTS, WRITTEN, LIMITS) == "it has no 'inputs'"


def test_an_objective_sees_what_is_left_of_an_example():
    expected = Expected(vocab_size=20, misfit=refuse_long_targets)
    example = {"inputs": np.full(2, 4), "targets": np.full(9, 4)}
    assert problem(example, expected, WRITTEN, LIMITS) == "3 for 2"
    assert problem(example, expected, WRITTEN, {"inputs": 5, "targets": 2}) is None


def test_what_a_vocabulary_has_no_pieces_for_is_known():
    found = load_vocabulary(FOLDER / "unigram")
    written = writing(found)
    assert written.unknown_id == found.unk_id == 2
    for text, is_nothing in (("日本", True), ("😀", True), ("", True), ("a日", False)):
        assert written.nothing.issuperset(found.encode(text)) == is_nothing
    assert writing(ByteVocabulary()) == Writing()
    assert writing(load_vocabulary(FOLDER / "byte_bpe")).unknown_id is None


def test_a_scan_counts_and_says_what_is_cut_and_cannot_be_written():
    def example(inputs, *targets):
        return {"inputs": np.full(inputs, 4), "targets": np.array([*targets, 1])}

    examples = [example(9, 4), example(2, 3, 2), example(2, 4, 2, 4, 4), example(1)]
    found = scan(examples, TEXTS, WRITTEN, LIMITS)
    assert found.kept == [0, 2, 3]
    assert [place for place, _ in found.problems] == [1]
    assert list(of_scan(found, TEXTS, LIMITS)) == [
        "3 examples of at most 9 inputs (limit 5) and 5 targets (limit 3)",
        "1 examples are left out; the first is number 2: the vocabulary has no pieces for its "
        "targets, so that no output can be right",
        "1 inputs and 1 targets of 3 are cut; "
        "--gin.TASK_FEATURE_LENGTHS=\"{'inputs': 9, 'targets': 5}\" keeps all",
        "0 inputs and 1 targets of 3 have characters that the vocabulary has no pieces for",
        "1 targets of 3 are empty",
    ]
