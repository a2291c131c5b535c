"""seqio tasks: examples of them, the cache file of a task, and seqio's vocabularies.

The only module of this folder that imports seqio and TensorFlow when it is imported.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import importlib.metadata
import os
from typing import ClassVar

import numpy as np
import tqdm

from coda_jax import checks
from coda_jax.data import jsonl
from coda_jax.data.batches import FEATURES, check_feature_lengths
from coda_jax.data.cache import write_cache
from coda_jax.data.sentencepiece_vocabulary import SentencePieceVocabulary
from coda_jax.data.tokenizers_vocabulary import TokenizersVocabulary
from coda_jax.data.vocabularies import ByteVocabulary, Vocabulary, load_vocabulary
from coda_jax.data.vocabulary_files import FileSystem
from coda_jax.optional import needs

with needs():
    import seqio
    import tensorflow as tf


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
            raise ValueError(f"MemorySource has one shard, not {shard_info.num_shards}")
        # Not the parent's method, which warns of a weak shuffle: ours is a full one.
        return self._dataset_fn(split=split, shuffle_files=shuffle, seed=seed)


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
        num_epochs: how often; None for ever.

    Returns:
        An iterator of {"inputs", "targets"}, arrays of tokens or of vectors.

    Raises:
        ValueError: an unknown task or split, or a length that is not positive.
    """
    check_feature_lengths(feature_lengths)
    checks.Maybe(checks.COUNT)("num_epochs", num_epochs)
    found = provider(task_or_mixture)
    if split not in found.splits:
        raise ValueError(f"{found.name} has no split {split!r}, only {sorted(found.splits)}")
    dataset = found.get_dataset(
        sequence_length=dict(feature_lengths),
        split=split,
        shuffle=shuffle,
        seed=seed,
        num_epochs=num_epochs,
        trim_output_features=False,
    )
    dataset = dataset.map(lambda x: {key: x[key] for key in FEATURES})
    return dataset.as_numpy_iterator()


def provider(task_or_mixture: str | seqio.Task | seqio.Mixture) -> seqio.Task | seqio.Mixture:
    """Returns the task or mixture of a name; a JSONL task is registered with seqio here."""
    if not isinstance(task_or_mixture, str):
        return task_or_mixture
    if task_or_mixture in jsonl.TASKS:
        add_loaded_task(jsonl.TASKS[task_or_mixture])
    return seqio.get_mixture_or_task(task_or_mixture)


def task_vocabulary(task_or_mixture: str | seqio.Task | seqio.Mixture) -> seqio.Vocabulary:
    """Returns the vocabulary of a task's targets, which is that of textual inputs too."""
    return provider(task_or_mixture).output_features["targets"].vocabulary


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
    vectors = provider(task_or_mixture).output_features["inputs"].rank == 2
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
        # A mixture draws from its tasks as long as all have examples left: unshuffled, the tasks
        # that are not exhausted would give their first examples only.
        shuffle=isinstance(found, seqio.Mixture),
        num_epochs=num_epochs,
    )
    vocabulary = plain_vocabulary(task_vocabulary(found))
    metadata = {
        "task": found.name,
        "split": split,
        "vocabulary": vocabulary.fingerprint,
        **{name: getattr(vocabulary, name) for name in ("vocab_size", "eos_id", "pad_id")},
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


class TokenizersSeqioVocabulary(seqio.Vocabulary):
    """A vocabulary of the library `tokenizers` for seqio: the same ids and texts.

    seqio and T5X fill up rows with 0, whatever its padding is.

    Attributes:
        plain: the vocabulary.
    """

    def __init__(self, plain: TokenizersVocabulary):
        super().__init__()  # its sentinels are ids like others
        self.plain = plain

    @property
    def bos_id(self) -> int | None:
        return self.plain.bos_id

    @property
    def eos_id(self) -> int:
        return self.plain.eos_id

    @property
    def unk_id(self) -> int | None:
        return self.plain.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self.plain.vocab_size

    def _encode(self, s: str | bytes) -> list[int]:
        return self.plain.encode(s.decode() if isinstance(s, bytes) else s)

    def _decode(self, ids) -> str:
        return self.plain.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text):
            return np.array(self._encode(text), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(ids):
            rows = ids.reshape(-1, ids.shape[-1]).tolist()
            texts = np.array([self.plain.decode(row).encode() for row in rows], object)
            return texts.reshape(ids.shape[:-1])

        texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        return tf.ensure_shape(texts, ids.shape[:-1])

    def __eq__(self, other):
        return isinstance(other, TokenizersSeqioVocabulary) and self.plain == other.plain

    def __hash__(self):
        return hash(self.plain)

    def __str__(self):
        return str(self.plain)


_BUCKETS = FileSystem(
    isdir=tf.io.gfile.isdir,
    exists=tf.io.gfile.exists,
    size=lambda path: tf.io.gfile.stat(path).length,
    open=lambda path: tf.io.gfile.GFile(path, "rb"),
)


def seqio_vocabulary(path: str | os.PathLike) -> seqio.Vocabulary:
    """Loads a vocabulary for seqio, also from a bucket; see `vocabularies.load_vocabulary`.

    Args:
        path: as `load_vocabulary` takes it.

    Returns:
        seqio's vocabulary of SentencePiece or bytes, or one over the library `tokenizers`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as for `load_vocabulary`.
    """
    plain = load_vocabulary(path, _BUCKETS)
    if isinstance(plain, TokenizersVocabulary):
        return TokenizersSeqioVocabulary(plain)
    if isinstance(plain, ByteVocabulary):
        return seqio.ByteVocabulary(extra_ids=plain.extra_ids)
    return seqio.SentencePieceVocabulary(plain.file, extra_ids=plain.added_ids)


def plain_vocabulary(vocabulary: seqio.Vocabulary) -> Vocabulary:
    """The vocabulary without seqio that has the same ids."""
    if isinstance(vocabulary, TokenizersSeqioVocabulary):
        return vocabulary.plain
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return ByteVocabulary(vocabulary.extra_ids)
    file = vocabulary.sentencepiece_model_file
    return SentencePieceVocabulary(file, vocabulary.extra_ids, _BUCKETS)
