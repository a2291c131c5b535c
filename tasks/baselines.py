"""What a task's accuracy is to be compared with: simple classifiers, without and on top of a model.

`python -m coda_jax.tasks.baselines --checkpoint=DIR` prints what a linear classifier makes of a
model's embeddings and of its encoder's outputs. If the second is the worse, the encoder has lost
what the task needs, and adapters will not find it there.
"""

import argparse
from collections import Counter
from collections.abc import Callable

import jax
import numpy as np
import seqio

from coda_jax.commands.loading import LoadedModel, load_model
from coda_jax.data.source import Data
from coda_jax.objectives import model_for
from coda_jax.optional import needs
from coda_jax.tasks import offline  # noqa: F401 (registers the tasks)

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
    with needs("images"):  # Here: the other tasks do without scikit-learn.
        from sklearn import svm
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


def linear_probe(model: LoadedModel, task_name: str, length: int = 256) -> dict[str, float]:
    """Linear classifiers (ridge regression on the classes) of the mean over an input's tokens.

    Args:
        model: whose embeddings and encoder outputs are taken, without training.
        task_name: a seqio text task with classes as targets.
        length: tokens of an input that are read.

    Returns:
        {"embeddings": ..., "encoder": ...}, accuracies on the test split in per cent;
        "mean_cosine", between the encoder's outputs for any two tokens: near 1 where they have
        collapsed.
    """
    with needs("images"):
        from sklearn import linear_model, preprocessing

    train, targets = _mean_features(model, task_name, "train", length)
    test, test_targets = _mean_features(model, task_name, "test", length)
    result = {"mean_cosine": float((test.pop("directions").mean(0) ** 2).sum())}
    for name, features in test.items():
        scaler = preprocessing.StandardScaler().fit(train[name])
        classifier = linear_model.RidgeClassifier(alpha=30.0)
        classifier.fit(scaler.transform(train[name]), targets)
        result[name] = 100.0 * classifier.score(scaler.transform(features), test_targets)
    return result


def _mean_features(model, task_name, split, length):
    """Means over the tokens, {name: [examples, D]}, and the targets as text."""
    embedding = np.asarray(model.params["token_embedder"]["embedding"], np.float32)

    encode = jax.jit(model_for(model.config).encode)
    features = {"embeddings": [], "encoder": [], "directions": []}
    targets = []
    data = Data({"inputs": length, "targets": 16}, task_name, split=split, shuffle=False)
    for batch in data.batches(repeat=False):
        tokens = batch["encoder_input_tokens"]
        present = (tokens > 0)[..., None]
        rows = tokens.any(-1)  # the last batch is filled up with empty ones
        count = np.maximum(present.sum(1), 1)
        encoded = np.asarray(encode(model.params, tokens), np.float32)
        directions = encoded / np.linalg.norm(encoded, axis=-1, keepdims=True)
        for name, values in (
            ("embeddings", embedding[tokens]),
            ("encoder", encoded),
            ("directions", directions),
        ):
            features[name].append(((values * present).sum(1) / count)[rows])
        # Without their padding, of which batches have more or less.
        targets += [str(row[row > 0]) for row in batch["decoder_target_tokens"][rows]]
    return {name: np.concatenate(values) for name, values in features.items()}, targets


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--checkpoint", required=True, help="folder in Hugging Face layout")
    parser.add_argument("--task", default="stdlib_module")
    parser.add_argument("--random", action="store_true", help="random numbers in its place")
    arguments = parser.parse_args()
    model = load_model(arguments.checkpoint)
    if arguments.random:
        model = load_model(config=model.config)
    for name, value in linear_probe(model, arguments.task).items():
        print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
