"""What needs no neural network: the majority class and a linear classifier on word counts."""

from collections import Counter
from collections.abc import Callable

import seqio

FEATURE_LENGTHS = {"inputs": 4096, "targets": 512}


def texts(task_name: str, split: str) -> tuple[list[str], list[str]]:
    """Returns the inputs and targets of a seqio task's split as text."""
    dataset = seqio.get_mixture_or_task(task_name).get_dataset(
        FEATURE_LENGTHS, split, shuffle=False
    )
    pairs = [
        (example["inputs_pretokenized"].decode(), example["targets_pretokenized"].decode())
        for example in dataset.as_numpy_iterator()
    ]
    return [inputs for inputs, _ in pairs], [targets for _, targets in pairs]


def majority_class(task_name: str, split: str = "test") -> float:
    """Returns the accuracy in per cent of always answering the train split's most common target."""
    _, train_targets = texts(task_name, "train")
    _, targets = texts(task_name, split)
    (answer, _), *_ = Counter(train_targets).most_common(1)
    return 100.0 * targets.count(answer) / len(targets)


def linear_svm(task_name: str, split: str = "test", tf_idf: bool = True) -> float:
    """Trains a linear support vector machine on the counts of the inputs' words.

    Args:
      task_name: a seqio text task with classes as targets.
      split: what to evaluate on.
      tf_idf: weighs the counts by how rare a word is.

    Returns:
      The accuracy in per cent.
    """
    from sklearn import svm  # Here: the other tasks do without scikit-learn.
    from sklearn.feature_extraction import text

    train_inputs, train_targets = texts(task_name, "train")
    inputs, targets = texts(task_name, split)
    make: Callable = text.TfidfVectorizer if tf_idf else text.CountVectorizer
    options = {"sublinear_tf": True} if tf_idf else {}
    vectorizer = make(token_pattern=r"\w+", lowercase=False, **options)
    classifier = svm.LinearSVC(C=1.0 if tf_idf else 0.01, random_state=0)
    classifier.fit(vectorizer.fit_transform(train_inputs), train_targets)
    return 100.0 * float(classifier.score(vectorizer.transform(inputs), targets))


def baselines(task_name: str, split: str = "test") -> dict[str, float]:
    """Returns {"majority_class": ..., "linear_svm": ...}, accuracies in per cent."""
    return {
        "majority_class": majority_class(task_name, split),
        "linear_svm": linear_svm(task_name, split),
    }
