"""Where examples come from: a JSONL task, a cache file, or any other task or mixture of seqio.

seqio and TensorFlow are imported for the last only.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
import re
from typing import Any

from coda_jax import checks
from coda_jax.data import jsonl
from coda_jax.data.batches import Batches, batch_examples, check_feature_lengths, epochs
from coda_jax.data.cache import read_cache
from coda_jax.data.vocabularies import Identity, Vocabulary, check_vocabulary, identity


@dataclasses.dataclass(frozen=True)
class Data:
    """Where examples come from: a task or mixture, a file of `coda cache`, or nothing.

    Attributes:
        feature_lengths: the most tokens, or patches, of "inputs" and tokens of "targets".
        task: name of a JSONL task, or of a registered seqio task or mixture.
        cache: path of the file instead.
        split: the task's split.
        batch_size: rows of a batch.
        pack: whether several examples share a row.
        shuffle: whether the order is random, anew in each epoch.
        seed: of the order and of random preprocessing.
    """

    feature_lengths: Mapping[str, int]
    task: str | None = None
    cache: str | None = None
    split: str = "train"
    batch_size: int = 32
    pack: bool = False
    shuffle: bool = True
    seed: int = 0

    def __post_init__(self):
        check_feature_lengths(self.feature_lengths)
        checks.fields(
            self,
            **dict.fromkeys(("task", "cache"), checks.Maybe(checks.text)),
            split=checks.text,
            batch_size=checks.COUNT,
            pack=checks.flag,
            shuffle=checks.flag,
            seed=checks.SEED,
        )
        if self.task is not None and self.cache is not None:
            raise ValueError(f"give a task or a cache file, not both: {self.task=}, {self.cache=}")

    @property
    def exists(self) -> bool:
        """Whether a task or a file is named at all; a JSONL task must have a file of the split."""
        if self.task in jsonl.TASKS:
            return self.split in jsonl.TASKS[self.task].splits
        return self.task is not None or self.cache is not None

    def batches(
        self, repeat: bool, max_segments: int | None = None, pad_id: int = 0, start_id: int = 0
    ) -> Batches:
        """Batches: for ever in full, or one pass whose last is filled up with empty rows.

        Args:
            repeat: whether for ever.
            max_segments: at most so many examples in a row, with `pack`; None for no limit.
            pad_id: the token that fills up rows.
            start_id: the token from which a decoder starts.

        Raises:
            FileNotFoundError: there is no such cache file.
            ValueError: an unknown task or split, no examples, or a damaged cache file.
        """
        return batch_examples(
            self._examples(None if repeat else 1),
            batch_size=self.batch_size,
            feature_lengths=self.feature_lengths,
            pack=self.pack,
            max_segments=max_segments if self.pack else None,
            drop_remainder=repeat,
            pad_id=pad_id,
            start_id=start_id,
        )

    def _examples(self, num_epochs: int | None):
        if self.cache is not None:
            examples, _ = read_cache(self.cache)
        elif self.task in jsonl.TASKS:
            examples = jsonl.TASKS[self.task].examples(self.split)
        else:
            from coda_jax.data import seqio_tasks

            return seqio_tasks.seqio_examples(
                self.task,
                self.split,
                feature_lengths=self.feature_lengths,
                seed=self.seed,
                shuffle=self.shuffle,
                num_epochs=num_epochs,
            )
        return epochs(examples, seed=self.seed, num_epochs=num_epochs, shuffle=self.shuffle)

    def description(self) -> dict[str, Any]:
        """What the examples and their batches are, as JSON: contents, not paths.

        Of a task that seqio reads, its name, without the hash of its arguments.
        """
        fields = {name: value for name, value in dataclasses.asdict(self).items()
                  if name not in ("task", "cache")}  # fmt: skip
        fields["feature_lengths"] = dict(self.feature_lengths)
        if self.cache is not None:
            with open(self.cache, "rb") as file:
                return {**fields, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        if self.task in jsonl.TASKS:
            text = json.dumps(jsonl.TASKS[self.task].columns[self.split], sort_keys=True)
            return {**fields, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        return {**fields, "task": re.sub(r"_[0-9a-f]{12}$", "", str(self.task))}

    def check_vocabulary(
        self, vocab_size: int, directory: str | os.PathLike | None = None, **model: Any
    ) -> None:
        """Checks that the data's token ids are those of a model; see `check_vocabulary`.

        Args:
            vocab_size: the model's number of embeddings.
            directory: where the model's vocabulary may lie.
            **model: what else is known of the model: the other arguments of `check_vocabulary`.

        Raises:
            ValueError: they are not, or the cache file does not say what its ids are.
        """
        check_vocabulary(self._identity(), vocab_size, directory, **model)

    def _identity(self) -> Identity:
        """What of the vocabulary a model must agree with."""
        if self.cache is None:
            return identity(self.vocabulary)
        _, metadata = read_cache(self.cache)
        missing = {"vocabulary", "vocab_size"} - metadata.keys()
        if missing:
            raise ValueError(f"{self.cache} does not say its {sorted(missing)}")
        ids = (metadata.get(name) for name in ("eos_id", "pad_id"))  # older files lack them
        return Identity(metadata["vocabulary"], metadata["vocab_size"], *ids)

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the task."""
        if self.task in jsonl.TASKS:
            return jsonl.TASKS[self.task].vocabulary
        from coda_jax.data import seqio_tasks

        return seqio_tasks.plain_vocabulary(seqio_tasks.task_vocabulary(self.task))

    def vocabulary_fingerprint(self) -> str:
        """The vocabulary's fingerprint; a cache file must say it."""
        return self._identity().fingerprint

    def vocabulary_files(self) -> Mapping[str, str]:
        """The files of the task's vocabulary, {name: path}; none for bytes or a cache."""
        return {} if self.task is None else self.vocabulary.files
