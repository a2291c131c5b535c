"""Precision, recall and F1 of classes: scikit-learn's."""

import numpy as np
import pytest

from coda_jax.data.classes import confusion, scores


@pytest.mark.parametrize("num_classes", [2, 5])
def test_metrics_are_those_of_scikit_learn(rng, num_classes):
    sklearn = pytest.importorskip("sklearn.metrics")
    true = rng.integers(0, num_classes, 40)
    answers = np.where(rng.random(40) < 0.5, true, rng.integers(0, num_classes, 40))
    counts = confusion(true, answers, num_classes)
    np.testing.assert_array_equal(counts, sklearn.confusion_matrix(true, answers))
    labels = [f"class {i}" for i in range(num_classes)]
    found = scores(counts, labels)
    expected = sklearn.classification_report(
        true, answers, target_names=labels, output_dict=True, zero_division=0
    )
    for name, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
        assert found[name] == pytest.approx(expected["macro avg"][theirs])
        for label in labels:
            assert found["classes"][label][name] == pytest.approx(expected[label][theirs])
            assert found["classes"][label]["examples"] == expected[label]["support"]


def test_a_class_that_no_example_has_is_in_no_mean():
    """c is nowhere; b is in no example, but one was taken for it."""
    found = scores(confusion([0, 0, 3, 3], [0, 1, 3, 3], 4), ["a", "b", "c", "d"])
    assert found["precision"] == pytest.approx((1 + 0 + 1) / 3)
    assert found["recall"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert found["f1"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert found["classes"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "examples": 0}
