"""seqio tasks: their examples, and the cache file of a task.

The module imports seqio and TensorFlow, so that it is imported where it is needed alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import difflib
import importlib.metadata
import os
import re
from typing import Any

import numpy as np
import tqdm

from coda_jax import checks
from coda_jax.data import jsonl
from coda_jax.data.batches import FEATURES, check_feature_lengths
from coda_jax.data.cache import write_cache
from coda_jax.data.scores import accuracy, strip_text
from coda_jax.data.seqio_vocabularies import plain_vocabulary, seqio_vocabulary
from coda_jax.optional import needs

with needs():
    import seqio
    import tensorflow as tf


class MemorySource(seqio.FunctionDataSource):
    """A seqio source of records that fit into memory."""

    def __init__(
        self,
        load: Callable[[str], Mapping[str, Sequence[str]]],
        splits: Sequence[str],
        num_input_examples: Mapping[str, int] | None = None,
    ):
        """Makes the source; nothing is loaded yet.

        Args:
            load: returns the columns of a split; called whenever the split is read.
            splits: the names of the splits.
            num_input_examples: the number of records of each split, if known.
        """

        def dataset_fn(split, shuffle_files, seed=None):
            dataset = tf.data.Dataset.from_tensor_slices(dict(load(split)))
            if shuffle_files:
                dataset = dataset.shuffle(max(len(dataset), 1), seed=seed)
            return dataset

        super().__init__(dataset_fn, splits=splits, num_input_examples=num_input_examples)

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **unused_kwargs):
        """Returns a split as a tf.data.Dataset; see `seqio.DataSource.get_dataset`."""
        if shard_info and shard_info.num_shards > 1:
            raise ValueError(f"MemorySource has one shard, not {shard_info.num_shards}")
        # Not the parent's method, which warns of a weak shuffle: ours is a full one.
        return self._dataset_fn(split=split, shuffle_files=shuffle, seed=seed)


# What TensorFlow says of an error that Python code has raised in a dataset.
_RAISED = re.compile(r"(ValueError|FileNotFoundError): (.*?)(?:\n+Traceback|\n+\t|\Z)", re.DOTALL)
_EVALUATION_SEED = 42  # that of `seqio.Evaluator`
_IDS = ("vocab_size", "eos_id", "pad_id", "unk_id")  # of a vocabulary, that a cache file says


def output_features(vocabulary: seqio.Vocabulary, vectors: bool = False) -> dict:
    """Returns the features of a task: texts that end with EOS; "inputs" may be vectors."""
    text = seqio.Feature(vocabulary=vocabulary, add_eos=True)
    inputs = seqio.ContinuousFeature(rank=2, dtype=tf.float32) if vectors else text
    return {"inputs": inputs, "targets": text}


def seqio_examples(
    task_or_mixture: str | seqio.Task | seqio.Mixture,
    split: str,
    *,
    feature_lengths: Mapping[str, int],
    seed: int,
    shuffle: bool,
    num_epochs: int | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Reads tokenised examples of a seqio task or mixture, untrimmed.

    Args:
        task_or_mixture: the provider or its registered name.
        split: "train", "validation", ...
        feature_lengths: the lengths of "inputs" and "targets": some tasks, such as span corruption,
            make examples of the length; the others may give longer ones.
        seed: the same seed gives the same examples in the same order.
        shuffle: whether to shuffle.
        num_epochs: how often, every example of every task of a mixture, one task after the other;
            None for ever, a mixture's tasks drawn at their rates.

    Returns:
        An iterator of {"inputs", "targets"}, arrays of tokens or of vectors.

    Raises:
        ValueError: an unknown task or split, a task that lacks one of the two, or a length that is
            not positive.
    """
    check_feature_lengths(feature_lengths)
    checks.Maybe(checks.COUNT)("num_epochs", num_epochs)
    found = provider(task_or_mixture)
    if split not in found.splits:
        raise ValueError(f"{found.name} has no split {split!r}, only {sorted(found.splits)}")
    reading = {
        "sequence_length": dict(feature_lengths),
        "split": split,
        "shuffle": shuffle,
        "seed": seed,
        "num_epochs": num_epochs,
        "trim_output_features": False,
    }
    with own_errors():
        if num_epochs is None:
            dataset = whole(found).get_dataset(**reading).map(_pair)
        else:
            dataset = None
            for task in seqio.get_subtasks(found):
                if split in task.splits:
                    more = whole(task).get_dataset(**reading).map(_pair)
                    dataset = more if dataset is None else dataset.concatenate(more)
    return _iterated(dataset)


def _pair(example):
    return {key: example[key] for key in FEATURES}


def _iterated(dataset: tf.data.Dataset) -> Iterator[dict[str, np.ndarray]]:
    with own_errors():
        yield from dataset.as_numpy_iterator()


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raises errors of Python code in a dataset, such as a bad file, as they were raised there."""
    try:
        yield
    except tf.errors.OpError as error:
        if (found := _RAISED.search(error.message)) is None:
            raise
        kind = ValueError if found[1] == "ValueError" else FileNotFoundError
        raise kind(found[2]) from error


def has_any(dataset: tf.data.Dataset) -> bool:
    """Whether a dataset has an example, which is read for it."""
    return any(True for _ in dataset.take(1))


def whole(task_or_mixture: seqio.Task | seqio.Mixture) -> seqio.Task | seqio.Mixture:
    """The same without the cutting of `append_eos_after_trim`, which would not be counted."""
    if isinstance(task_or_mixture, seqio.Task):
        steps = task_or_mixture.preprocessors
        if seqio.preprocessors.append_eos_after_trim not in steps:
            return task_or_mixture
        swapped = {seqio.preprocessors.append_eos_after_trim: seqio.preprocessors.append_eos}
        steps = [swapped.get(step, step) for step in steps]
        return task_or_mixture.replace(preprocessors=steps)
    tasks = [(task, whole(task)) for task in task_or_mixture.tasks]
    if all(ours is theirs for theirs, ours in tasks):
        return task_or_mixture
    rates = [(ours, task_or_mixture.get_rate(theirs)) for theirs, ours in tasks]
    return seqio.Mixture(task_or_mixture.name, rates)


def provider(task_or_mixture: str | seqio.Task | seqio.Mixture) -> seqio.Task | seqio.Mixture:
    """Returns the task or mixture of a name; a JSONL task is registered with seqio here.

    Raises:
        ValueError: there is none; or it lacks "inputs" or "targets".
    """
    found = task_or_mixture
    if isinstance(found, str):
        found = registered(found)
    missing = [key for key in FEATURES if key not in found.output_features]
    if missing:
        has = sorted(found.output_features)
        raise ValueError(f"{found.name} has the features {has}: {missing} are missing")
    return found


def registered(name: str) -> seqio.Task | seqio.Mixture:
    """Returns the task or mixture of a name, whatever its features; see `provider`."""
    if name in jsonl.TASKS:
        add_loaded_task(jsonl.TASKS[name])
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        near = difflib.get_close_matches(name, known) or sorted(known)[:3]
        nearest = f"; the nearest are {near}" if near else ""
        raise ValueError(
            f"no task or mixture {name!r} is registered{nearest}. Does a gin file import the "
            "module that registers it?"
        )
    return seqio.get_mixture_or_task(name)


def is_mixture(task_or_mixture: seqio.Task | seqio.Mixture) -> bool:
    """Whether it draws from several tasks."""
    return isinstance(task_or_mixture, seqio.Mixture)


def task_vocabulary(task_or_mixture: str | seqio.Task | seqio.Mixture) -> seqio.Vocabulary:
    """Returns the vocabulary of a task's targets, which is that of textual inputs too."""
    return provider(task_or_mixture).output_features["targets"].vocabulary


def evaluated(
    task_or_mixture: str, split: str, feature_lengths: Mapping[str, int]
) -> Iterator[tuple[seqio.Task, list[dict[str, Any]]]]:
    """The tasks of a mixture, or the one, that have the split and metrics, with their examples.

    Args:
        task_or_mixture: the registered name.
        split: "validation", "test", ...
        feature_lengths: for tasks that make examples of the length; nothing is cut.

    Raises:
        ValueError: there is none; or a metric is not of outputs alone.
    """
    found = seqio.get_subtasks(provider(task_or_mixture))
    tasks = [task for task in found if split in task.splits and task.metric_objs]
    if not tasks:
        raise ValueError(f"{task_or_mixture}, split {split!r}: no task has metrics")
    for task in tasks:
        kinds = {metric.model_output_type.name for metric in task.metric_objs}
        if kinds != {seqio.metrics.ModelOutputType.PREDICTION.name}:
            raise ValueError(f"{task.name} has metrics of {sorted(kinds)}, not of PREDICTION alone")
        dataset = whole(task).get_dataset(
            sequence_length=dict(feature_lengths),
            split=split,
            shuffle=False,
            seed=_EVALUATION_SEED,
            num_epochs=1,
            trim_output_features=False,
        )
        yield task, list(dataset.as_numpy_iterator())


def metrics_of(
    task: seqio.Task, examples: Sequence[Mapping], outputs: Sequence[Sequence[int]]
) -> dict[str, float]:
    """A task's metrics, as `seqio.Evaluator` has them.

    Args:
        task: of seqio.
        examples: of the task, whole; "inputs" are not read.
        outputs: the tokens of each one's output.
    """
    longest = max(map(len, outputs))
    padded = np.array([[*tokens, *[0] * (longest - len(tokens))] for tokens in outputs])
    values: dict = {}
    for metric in task.metric_objs:
        found = metric.from_model_output(examples, padded, task.output_features)
        if isinstance(found, seqio.metrics.CollectingMetric):
            computed, _ = found.actual_compute(examples, task.output_features)
        else:
            computed = found.compute()
        values |= computed
    return {name: float(getattr(value, "value", value)) for name, value in values.items()}


class EndedTask(seqio.Task):
    """A task whose texts, where seqio or T5X cuts them, still end with EOS."""

    def get_dataset(self, sequence_length=None, *args, trim_output_features=True, **kwargs):
        """Returns a tf.data.Dataset; see `seqio.Task.get_dataset`."""
        dataset = super().get_dataset(sequence_length, *args, trim_output_features=False, **kwargs)
        if not trim_output_features or not sequence_length:
            return dataset

        def trim(example):
            return {key: self._trimmed(key, x, sequence_length) for key, x in example.items()}

        return dataset.map(trim, num_parallel_calls=tf.data.AUTOTUNE)

    def _trimmed(self, key: str, values: tf.Tensor, limits: Mapping[str, int]) -> tf.Tensor:
        feature, limit = self.output_features.get(key), limits.get(key)
        if feature is None or limit is None:
            return values
        kept = values[:limit]
        if not feature.add_eos:
            return kept
        ended = tf.concat([kept[:-1], tf.constant([feature.vocabulary.eos_id], kept.dtype)], axis=0)
        return tf.cond(tf.size(values) <= limit, lambda: kept, lambda: ended)


def cache_task(
    task_or_mixture: str | seqio.Task | seqio.Mixture,
    split: str,
    path: str | os.PathLike,
    feature_lengths: Mapping[str, int],
    seed: int,
    num_epochs: int = 1,
) -> int:
    """Writes the tokenised examples of a task to one file, for hosts without TensorFlow.

    Args:
        task_or_mixture: the provider or its registered name.
        split: "train", "validation", ...
        path: the npz file; see `cache.write_cache`.
        feature_lengths: the lengths of "inputs" and "targets".
        seed: for tasks with noise, and for mixtures.
        num_epochs: more than one only makes sense for tasks whose examples differ by epoch.

    Returns:
        The number of examples.

    Raises:
        ValueError: as for `seqio_examples`; no examples.
    """
    checks.COUNT("num_epochs", num_epochs)
    checks.SEED("seed", seed)
    found = provider(task_or_mixture)
    examples = seqio_examples(
        found,
        split,
        feature_lengths=feature_lengths,
        seed=seed,
        shuffle=False,
        num_epochs=num_epochs,
    )
    vocabulary = plain_vocabulary(task_vocabulary(found))
    metadata = {
        "task": found.name,
        "split": split,
        "vocabulary": vocabulary.fingerprint,
        **{name: getattr(vocabulary, name) for name in _IDS},
        "feature_lengths": dict(feature_lengths),
        "seed": seed,
        "num_epochs": num_epochs,
        "versions": {name: importlib.metadata.version(name) for name in ("seqio", "tensorflow")},
    }
    progress = tqdm.tqdm(examples, desc=f"{found.name} {split}", unit=" examples")
    return write_cache(path, progress, metadata)


def add_task(
    name: str,
    source: seqio.DataSource,
    steps: Sequence[Callable],
    vocabulary: seqio.Vocabulary,
    *,
    vectors: bool = False,
    postprocess_fn: Callable = strip_text,
    metric_fns: Sequence[Callable] = (accuracy,),
    shuffle_buffer_size: int = 1,
) -> seqio.Task:
    """Registers a seqio task.

    Args:
        name: the name of the task.
        source: of the records.
        steps: seqio preprocessors from records to token ids, or vectors; EOS is appended after
            them.
        vocabulary: of the targets, and of inputs that are texts.
        vectors: whether "inputs" are vectors.
        postprocess_fn: of seqio.
        metric_fns: of seqio.
        shuffle_buffer_size: how many examples are held to be shuffled; 1 for a source that shuffles
            all its records.

    Returns:
        The task.

    Raises:
        ValueError: the name is registered already.
    """
    return seqio.TaskRegistry.add(
        name,
        task_cls=EndedTask,
        source=source,
        preprocessors=[*steps, seqio.preprocessors.append_eos],
        output_features=output_features(vocabulary, vectors),
        postprocess_fn=postprocess_fn,
        metric_fns=list(metric_fns),
        shuffle_buffer_size=shuffle_buffer_size,
    )


def add_loaded_task(task: jsonl.JsonlTask) -> None:
    """Registers what `jsonl.jsonl_task` has read, unless it is registered already.

    Raises:
        ValueError: it is a task of `data.labels`.
    """
    if not isinstance(task, jsonl.JsonlTask):
        raise ValueError(
            f"{task.name} has labels, which seqio's tasks do not; `coda train` reads it"
        )
    if task.name in seqio.TaskRegistry.names():
        return
    counts = {split: len(column["inputs"]) for split, column in task.columns.items()}
    source = MemorySource(task.columns.__getitem__, tuple(task.columns), counts)
    vocabulary = seqio_vocabulary(task.vocabulary_path)
    add_task(task.name, source, [seqio.preprocessors.tokenize], vocabulary)
