"""Data: seqio tasks and JSONL files to examples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import hashlib
import importlib.metadata
import json
import os
import sys
from typing import ClassVar

import numpy as np
import seqio
import tensorflow as tf
import tqdm

from coda_jax import batches

EXTRA_IDS = 100
BYTE_EXTRA_IDS = 125  # 384 ids together, as ByT5 has.


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns {"accuracy": the percentage of the predictions that equal their targets}."""
    matches = sum(t == p for t, p in zip(targets, predictions, strict=True))
    return {"accuracy": 100.0 * matches / max(len(targets), 1)}


def strip_text(text: str, **unused_kwargs) -> str:
    """Returns the text without white space around it: the postprocessor of the text tasks."""
    return text.strip()


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
            raise ValueError(f"MemorySource has one shard, not {shard_info.num_shards}.")
        # Not the parent's method, which warns of a weak shuffle: ours is a full one.
        return self._dataset_fn(split=split, shuffle_files=shuffle, seed=seed)


def output_features(vocabulary: seqio.Vocabulary) -> dict[str, seqio.Feature]:
    """Returns the features of a text-to-text task: inputs and targets, each ending with EOS."""
    return {
        key: seqio.Feature(vocabulary=vocabulary, add_eos=True) for key in ("inputs", "targets")
    }


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
      num_epochs: how often; None for ever.

    Returns:
      An iterator of {"inputs", "targets"}, arrays of tokens or of vectors.

    Raises:
      ValueError: an unknown task or split, or a length that is not positive.
    """
    batches.check_feature_lengths(feature_lengths)
    if num_epochs is not None:
        batches.check_positive(num_epochs=num_epochs)
    provider = _provider(task_or_mixture)
    if split not in provider.splits:
        raise ValueError(f"{provider.name} has no split {split!r}, only {sorted(provider.splits)}.")
    dataset = provider.get_dataset(
        sequence_length=dict(feature_lengths),
        split=split,
        shuffle=shuffle,
        seed=seed,
        num_epochs=num_epochs,
        trim_output_features=False,
    )
    dataset = dataset.map(lambda x: {key: x[key] for key in batches.FEATURES})
    return dataset.as_numpy_iterator()


def _provider(task_or_mixture) -> seqio.Task | seqio.Mixture:
    if not isinstance(task_or_mixture, str):
        return task_or_mixture
    return seqio.get_mixture_or_task(task_or_mixture)


def task_vocabulary(task_or_mixture: str | seqio.Task | seqio.Mixture) -> seqio.Vocabulary:
    """Returns the vocabulary of a task's targets, which is that of textual inputs too."""
    return _provider(task_or_mixture).output_features["targets"].vocabulary


class VectorsFeatureConverter(seqio.EncDecFeatureConverter):
    """seqio's converter for inputs that are float vectors [length, C], as of patches; unpacked."""

    TASK_FEATURES: ClassVar = {
        **seqio.EncDecFeatureConverter.TASK_FEATURES,
        "inputs": seqio.FeatureConverter.FeatureSpec(dtype=tf.float32, rank=2),
    }
    MODEL_FEATURES: ClassVar = {
        **seqio.EncDecFeatureConverter.MODEL_FEATURES,
        "encoder_input_tokens": seqio.FeatureConverter.FeatureSpec(dtype=tf.float32, rank=2),
    }


def feature_converter(
    task_or_mixture: str | seqio.Task | seqio.Mixture,
) -> seqio.EncDecFeatureConverter:
    """Returns the converter of a task's examples to unpacked batches."""
    vectors = _provider(task_or_mixture).output_features["inputs"].rank == 2
    return (VectorsFeatureConverter if vectors else seqio.EncDecFeatureConverter)(pack=False)


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
      path: the npz file; see `batches.write_cache`.
      feature_lengths: the lengths of "inputs" and "targets".
      seed: for tasks with noise, and for mixtures.
      num_epochs: more than one only makes sense for tasks whose examples differ by epoch.

    Returns:
      The number of examples.

    Raises:
      ValueError: as for `seqio_examples`; no examples.
    """
    batches.check_positive(num_epochs=num_epochs)
    provider = _provider(task_or_mixture)
    examples = seqio_examples(
        provider,
        split,
        feature_lengths=feature_lengths,
        seed=seed,
        # A mixture draws from its tasks as long as all have examples left: unshuffled, the tasks
        # that are not exhausted would give their first examples only.
        shuffle=isinstance(provider, seqio.Mixture),
        num_epochs=num_epochs,
    )
    vocabulary = task_vocabulary(provider)
    metadata = {
        "task": provider.name,
        "split": split,
        "vocabulary": vocabulary_fingerprint(vocabulary),
        "vocab_size": vocabulary.vocab_size,
        "feature_lengths": dict(feature_lengths),
        "seed": seed,
        "num_epochs": num_epochs,
        "versions": {name: importlib.metadata.version(name) for name in ("seqio", "tensorflow")},
    }
    progress = tqdm.tqdm(examples, desc=f"{provider.name} {split}", unit=" examples")
    return batches.write_cache(path, progress, metadata)


def add_jsonl_task(
    name: str,
    *,
    train_file: str | os.PathLike | None = None,
    validation_file: str | os.PathLike | None = None,
    test_file: str | os.PathLike | None = None,
    vocabulary: seqio.Vocabulary,
    metric_fns: Sequence[Callable] | None = None,
) -> seqio.Task:
    """Registers a seqio task over JSONL files with lines {"inputs": str, "targets": str}.

    The files are read at once, so that a bad line is found before anything runs. Other fields of
    a line are ignored; blank lines are allowed at the end only.

    Args:
      name: the name of the task.
      train_file: the file of the split "train", if there is one.
      validation_file: the file of the split "validation", if there is one.
      test_file: the file of the split "test", if there is one.
      vocabulary: for inputs and targets.
      metric_fns: seqio metric functions; exact-match accuracy if None.

    Returns:
      The task.

    Raises:
      ValueError: no file, an empty file, a bad line (file and line are named), or a name that is
        registered already.
    """
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    columns = {
        split: read_jsonl(path, batches.FEATURES)
        for split, path in files.items()
        if path is not None
    }
    if not columns:
        raise ValueError(f"Task {name!r} needs at least one of {[f'{s}_file' for s in files]}.")
    counts = {split: len(column["inputs"]) for split, column in columns.items()}
    return seqio.TaskRegistry.add(
        name,
        source=MemorySource(columns.__getitem__, tuple(columns), counts),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features=output_features(vocabulary),
        postprocess_fn=strip_text,
        metric_fns=[accuracy] if metric_fns is None else list(metric_fns),
        shuffle_buffer_size=1,  # The source shuffles all records.
    )


def jsonl_task(
    *,
    train_file: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
    vocabulary: str,
) -> str:
    """Returns the name of the task over these files; see `add_jsonl_task`. For gin files.

    Args:
      train_file: the file of the split "train", if there is one.
      validation_file: the file of the split "validation", if there is one.
      test_file: the file of the split "test", if there is one.
      vocabulary: a path, or "bytes", for `load_vocabulary`.
    """
    files = (train_file, validation_file, test_file)
    name = "jsonl_" + hashlib.sha256(repr((files, vocabulary)).encode()).hexdigest()[:12]
    if name not in seqio.TaskRegistry.names():
        add_jsonl_task(
            name,
            train_file=train_file,
            validation_file=validation_file,
            test_file=test_file,
            vocabulary=load_vocabulary(vocabulary),
        )
    return name


def read_jsonl(
    path: str | os.PathLike, fields: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Reads some text fields of a JSONL file.

    Args:
      path: the file, UTF-8.
      fields: what each line must have, as strings.
      optional: what a line may lack, "" then.

    Returns:
      A list for each field, in the order of the lines.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: an empty file, or a line that is not such an object; file and line are named.
    """
    with open(path, "rb") as f:
        lines = f.read().rstrip().split(b"\n")
    if lines == [b""]:
        raise ValueError(f"{os.fspath(path)}: the file is empty.")
    columns: dict[str, list[str]] = {field: [] for field in (*fields, *optional)}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as e:
            raise ValueError(f"{os.fspath(path)}:{number}: not JSON: {e}.") from e
        if not isinstance(record, dict):
            raise ValueError(f"{os.fspath(path)}:{number}: not an object: {record!r}.")
        record = {**dict.fromkeys(optional, ""), **record}
        for field in columns:
            if field not in record:
                raise ValueError(f"{os.fspath(path)}:{number}: the field {field!r} is missing.")
            if not isinstance(record[field], str):
                raise ValueError(
                    f"{os.fspath(path)}:{number}: {field!r} must be a string: {record[field]!r}."
                )
            columns[field].append(record[field])
    return columns


def read_inputs(path: str | os.PathLike) -> list[str]:
    """Reads the inputs to predict from.

    Args:
      path: a text file with one input a line, a .jsonl file with lines {"inputs": str}, or "-" for
        text on standard input.

    Returns:
      The inputs in order.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: there is no input, or a bad JSONL line (file and line are named).
    """
    path = os.fspath(path)
    if path.endswith(".jsonl"):
        return read_jsonl(path, ("inputs",))["inputs"]
    if path == "-":
        lines = [line.rstrip("\r\n") for line in sys.stdin]
    else:
        with open(path, encoding="utf-8") as f:
            lines = [line.rstrip("\n") for line in f]
    if not lines:
        raise ValueError(f"{path}: there are no inputs.")
    return lines


def load_vocabulary(path: str | os.PathLike) -> seqio.Vocabulary:
    """Loads a vocabulary.

    Args:
      path: a checkpoint's directory that holds `spiece.model`, such a file, or "bytes".

    Returns:
      A seqio vocabulary with T5's 100 extra ids, or ByT5's bytes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a SentencePiece model.
    """
    path = os.fspath(path)
    if path == "bytes":
        return seqio.ByteVocabulary(extra_ids=BYTE_EXTRA_IDS)
    # gfile: pods keep it in a bucket.
    file = os.path.join(path, batches.VOCABULARY_NAME) if tf.io.gfile.isdir(path) else path
    if not tf.io.gfile.exists(file):
        raise FileNotFoundError(f'No vocabulary {file!r}. For a model of bytes (ByT5) say "bytes".')
    try:
        plain = seqio.SentencePieceVocabulary(file)
        # mT5's file in Hugging Face layout brings the extra ids with it.
        has_extra_ids = plain.tokenizer.piece_to_id("▁<extra_id_0>") != plain.unk_id
    except Exception as e:  # protobuf and SentencePiece each raise errors of their own.
        raise ValueError(f"{file!r} is not a SentencePiece model: {e}.") from e
    return seqio.SentencePieceVocabulary(file, extra_ids=0 if has_extra_ids else EXTRA_IDS)


def vocabulary_fingerprint(vocabulary: seqio.Vocabulary) -> str:
    """Returns "bytes", or the SHA-256 of a SentencePiece vocabulary's file."""
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return "bytes"
    with tf.io.gfile.GFile(vocabulary.sentencepiece_model_file, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def check_vocabulary(
    vocabulary: seqio.Vocabulary,
    vocab_size: int,
    checkpoint_directory: str | os.PathLike | None = None,
) -> None:
    """Checks that a task's vocabulary is the one that a model was trained with.

    Args:
      vocabulary: the task's.
      vocab_size: the model's number of embeddings; more than the vocabulary has is fine.
      checkpoint_directory: where the model's `spiece.model` may lie.

    Raises:
      ValueError: the vocabulary has more ids than the model, or differs from the checkpoint's.
    """
    batches.check_vocabulary(
        vocabulary_fingerprint(vocabulary), vocabulary.vocab_size, vocab_size, checkpoint_directory
    )
