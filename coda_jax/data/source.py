"""Where examples come from: a JSONL task, a cache file, or any other task or mixture of seqio.

seqio and TensorFlow are imported for the last only. JSONL tasks and cache files are in memory: what
is wrong with their examples, and what is cut, is known and said before they are used. The examples
of other tasks are looked at as they come.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

import numpy as np

from coda_jax import checks
from coda_jax.data import jsonl
from coda_jax.data.batches import (
    FEATURES,
    Batches,
    Example,
    batch_examples,
    check_feature_lengths,
    epochs,
)
from coda_jax.data.cache import CachedExamples, read_cache
from coda_jax.data.examples import Chosen, Expected, Scan, Writing, problem, scan, writing
from coda_jax.data.reports import News, check_stream, cut_in_all, cut_so_far, of_scan, say
from coda_jax.data.vocabularies import Identity, Vocabulary, check_vocabulary, identity

LONGEST = 512  # inputs, or targets, that are texts, where nobody says another limit
_LEAVE_OUT = "--gin.LEAVE_OUT=True leaves such examples out"


@dataclasses.dataclass(frozen=True)
class Data:
    """Where examples come from: a task or mixture, a file of `coda cache`, or nothing.

    Attributes:
        feature_lengths: the most tokens, or vectors, of "inputs" and "targets"; what it does not
            say is the cache file's, or a default: see `limits`.
        task: name of a JSONL task, or of a registered seqio task or mixture.
        cache: path of the file instead.
        split: the task's split.
        batch_size: rows of a batch.
        pack: whether several examples share a row.
        shuffle: whether the order is random, anew in each epoch.
        seed: of the order and of random preprocessing.
        leave_out: whether examples that a model cannot learn are left out, counted; otherwise they
            are errors.
    """

    feature_lengths: Mapping[str, int] | None = None
    task: str | None = None
    cache: str | None = None
    split: str = "train"
    batch_size: int = 32
    pack: bool = False
    shuffle: bool = True
    seed: int = 0
    leave_out: bool = False

    def __post_init__(self):
        checks.fields(
            self,
            **dict.fromkeys(("task", "cache"), checks.Maybe(checks.text)),
            split=checks.text,
            batch_size=checks.COUNT,
            **dict.fromkeys(("pack", "shuffle", "leave_out"), checks.flag),
            seed=checks.SEED,
        )
        if self.task is not None and self.cache is not None:
            raise ValueError(
                f"give a task or a cache file, not both: {self.task!r} and {self.cache!r}"
            )
        if self.feature_lengths is not None:
            check_feature_lengths(self.feature_lengths, may_lack=FEATURES)

    @property
    def exists(self) -> bool:
        """Whether a task that has the split, or a file, is named."""
        return self.cache is not None or (self.task is not None and self.split in self._splits)

    @property
    def _splits(self) -> Sequence[str]:
        if self.task in jsonl.TASKS:
            return jsonl.TASKS[self.task].splits
        from coda_jax.data import seqio_tasks

        return sorted(seqio_tasks.provider(self.task).splits)

    def with_split(self, split: str | None) -> "Data":
        """The task's data of a split; None for "validation" or else the only one, which is said.

        Raises:
            ValueError: there is no such split, or several to choose from.
        """
        found = self._splits
        if split is None and "validation" not in found and len(found) != 1:
            raise ValueError(f"{self.task} has the splits {found}: give one as SPLIT")
        if split is None:
            split = "validation" if "validation" in found else found[0]
        if split not in found:
            file = split in jsonl.SPLITS and self.task in jsonl.TASKS
            flag = f"; --gin.{split.upper()}_FILE gives it" if file else ""
            raise ValueError(f"{self.task} has no split {split!r}, only {found}{flag}")
        return dataclasses.replace(self, split=split)

    @property
    def place(self) -> str:
        """The file, or the task and its split, in words."""
        if self.task in jsonl.TASKS:
            return jsonl.TASKS[self.task].files.get(self.split, f"{self.split.upper()}_FILE")
        return self.cache or f"{self.task}, split {self.split!r}"

    def limits(self, longest_inputs: int = LONGEST) -> dict[str, int]:
        """The most "inputs" and "targets" that are kept: those given, the cache file's, a default.

        Args:
            longest_inputs: the most inputs where nothing else is said; of targets it is `LONGEST`.
        """
        lengths = {"inputs": longest_inputs, "targets": LONGEST}
        if self.cache is not None:
            lengths |= self._cached[1].get("feature_lengths") or {}
        return lengths | dict(self.feature_lengths or {})

    def limited(self, longest_inputs: int) -> "Data":
        """The same with the limits given."""
        return dataclasses.replace(self, feature_lengths=self.limits(longest_inputs))

    @property
    def in_memory(self) -> bool:
        """Whether all examples are at hand."""
        return self.cache is not None or self.task in jsonl.TASKS

    @functools.cached_property
    def _cached(self) -> tuple[CachedExamples, dict[str, Any]]:
        return read_cache(self.cache)

    def _all(self) -> Sequence[Example]:
        """The examples that are in memory."""
        if self.cache is not None:
            return self._cached[0]
        return jsonl.TASKS[self.task].examples(self.split)

    @functools.cached_property
    def _written(self) -> Writing:
        """How the vocabulary writes what it has no pieces for."""
        if self.cache is None:
            return writing(self.vocabulary)
        ids = [self._cached[1].get(name) for name in ("unk_id", "eos_id")]
        return Writing() if ids[0] is None else Writing(ids[0], frozenset(ids))

    @functools.cached_property
    def _scans(self) -> dict[Expected, Scan]:
        return {}

    def scan(self, expected: Expected) -> Scan:
        """Looks at all examples, which are in memory, once.

        Args:
            expected: what a model takes.

        Raises:
            ValueError: an example that it cannot learn, unless such are left out; none is left.
        """
        if expected not in self._scans:
            found = scan(self._all(), expected, self._written, self.limits())
            if found.problems and not self.leave_out:
                raise ValueError(self._refused(found))
            if not found.kept:
                raise ValueError(f"{self.place}: there is no example that can be learned")
            if found.num_empty == len(found.kept):
                raise ValueError(f"{self.place}: all {len(found.kept)} targets are empty")
            self._scans[expected] = found
        return self._scans[expected]

    def _refused(self, found: Scan) -> str:
        """The first example that cannot be learned, and how many there are."""
        (place, why), count = found.problems[0], len(found.problems) + len(found.kept)
        return (
            f"{self._numbered(place)}: the example cannot be learned: {why}\n"
            f"({len(found.problems)} of {count} cannot; {_LEAVE_OUT})"
        )

    def _numbered(self, place: int) -> str:
        """An example's file and line, or its number from 1."""
        lines = self.task in jsonl.TASKS and jsonl.TASKS[self.task].lines[self.split]
        return f"{self.place}:{lines[place]}" if lines else f"{self.place}: example {place + 1}"

    def check(self, expected: Expected) -> None:
        """Looks at the examples before they are used, and prints what is known of them.

        Of what is in memory all are looked at, of another task a few.

        Args:
            expected: what a model takes.

        Raises:
            ValueError: see `scan`; the task lacks features that are needed.
        """
        limits = self.limits()
        if not self.in_memory:
            check_stream(self._streamed(1, False, expected), expected, self.place)
            say(
                f"{self.place}: at most {limits['inputs']:,} inputs and {limits['targets']:,} "
                "targets of an example are kept; what is longer is cut and counted"
            )
            return
        for line in of_scan(self.scan(expected), expected, limits):
            say(f"{self.place}: {line}")
        if expected.targets == "tokens" and self.task in jsonl.TASKS:
            kept = set(self.scan(expected).kept)
            changed = jsonl.TASKS[self.task].changed_targets(self.split)
            if changed := [place for place in changed if place in kept]:
                say(
                    f"{self.place}: {len(changed):,} targets are other texts in the vocabulary, "
                    f"which no output equals; the first: {self._numbered(changed[0])}"
                )

    def lengths(self, expected: Expected) -> dict[str, int]:
        """What an adapter says of its training: see `checkpoints.save_adapter`.

        Predictions cut inputs where training did, and may be as long as the longest target that is
        known of.
        """
        limits = self.limits()
        if not self.in_memory or expected.targets is None:
            return limits
        found = self.scan(expected).longest["targets"]
        return limits | {"targets": min(limits["targets"], found)}

    def chosen(self, expected: Expected) -> Sequence[Example]:
        """The examples that are taken, of those in memory; errors are those of `scan`."""
        return Chosen(self._all(), self.scan(expected).kept)

    def batches(
        self,
        repeat: bool,
        max_segments: int | None = None,
        pad_id: int = 0,
        start_id: int = 0,
        eos_id: int = 1,
        expected: Expected | None = None,
    ) -> Batches:
        """Batches: for ever in full, or one pass whose last is filled up with empty rows.

        Args:
            repeat: whether for ever.
            max_segments: at most so many examples in a row, with `pack`; None for no limit.
            pad_id: the token that fills up rows.
            start_id: the token from which a decoder starts.
            eos_id: the token that ends a text.
            expected: what the model takes: the examples are looked at, and batches say which rows
                no output can equal.

        Raises:
            FileNotFoundError: there is no such cache file.
            ValueError: an unknown task or split, no examples, or a damaged cache file.
        """
        num_epochs, marks, on_cut = None if repeat else 1, expected is not None, None
        if self.in_memory:
            examples = self._all()
            if expected is not None:
                found, examples = self.scan(expected), self.chosen(expected)
                marks = bool(found.num_cut["targets"] or found.num_unknown["targets"])
            examples = epochs(examples, seed=self.seed, num_epochs=num_epochs, shuffle=self.shuffle)
        else:
            examples = self._streamed(num_epochs, self.shuffle, expected)
            on_cut = self._said_now_and_then
        return batch_examples(
            examples,
            batch_size=self.batch_size,
            feature_lengths=self.limits(),
            pack=self.pack,
            max_segments=max_segments if self.pack else None,
            drop_remainder=repeat,
            pad_id=pad_id,
            start_id=start_id,
            eos_id=eos_id,
            unknown_id=self._written.unknown_id if marks else None,
            marks=marks,
            on_cut=on_cut,
        )

    def _streamed(
        self, num_epochs: int | None, shuffle: bool, expected: Expected | None
    ) -> Iterator[Example]:
        """The examples of a task of seqio, each looked at."""
        from coda_jax.data import seqio_tasks

        limits = self.limits()
        examples = seqio_tasks.seqio_examples(
            self.task,
            self.split,
            feature_lengths=limits,
            seed=self.seed,
            shuffle=shuffle,
            num_epochs=num_epochs,
        )
        if expected is None:
            return examples
        return self._checked(examples, expected, limits)

    def _checked(self, examples, expected, limits) -> Iterator[Example]:
        left_out = 0
        written = Writing() if expected.targets is None else self._written
        for number, example in enumerate(examples, start=1):
            if (why := problem(example, expected, written, limits)) is None:
                yield example
                continue
            if not self.leave_out:
                named = self._named(number, example, expected)
                raise ValueError(f"{named} cannot be learned: {why}\n({_LEAVE_OUT})")
            left_out += 1
            if self._news.has("left out", left_out):
                named = self._named(number, example, expected)
                say(f"{named} is left out, number {left_out:,} of such: {why}")

    def _named(self, number: int, example: Example, expected: Expected) -> str:
        """An example of a stream, with its target where that is a text."""
        targets = example.get("targets")
        text = ""
        if expected.targets == "tokens" and np.ndim(targets) == 1:
            text = f" ({self.vocabulary.decode(np.asarray(targets).tolist())!r:.60})"
        return f"{self.place}: example {number}{text}"

    def _said_now_and_then(self, batches: Batches, lengths: Mapping[str, int]) -> None:
        if self._news.has("cut", batches.num_truncated):
            say(f"{self.place}: {cut_so_far(batches, lengths, self.limits())}")

    @functools.cached_property
    def _news(self) -> News:
        return News()

    def report(self, batches: Batches) -> None:
        """Prints how many examples of a task of seqio were cut, in the end."""
        if batches.num_truncated and not self.in_memory:
            say(f"{self.place}: {cut_in_all(batches, self.limits())}")

    def description(self) -> dict[str, Any]:
        """What the examples and their batches are, as JSON: contents, not paths.

        Of a task that seqio reads, its name.
        """
        fields = {name: value for name, value in dataclasses.asdict(self).items()
                  if name not in ("task", "cache")}  # fmt: skip
        fields["feature_lengths"] = self.limits()
        if self.cache is not None:
            with open(self.cache, "rb") as file:
                return {**fields, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        if self.task in jsonl.TASKS:
            text = json.dumps(jsonl.TASKS[self.task].columns[self.split], sort_keys=True)
            return {**fields, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        return {**fields, "task": self.task}

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
        metadata = self._cached[1]
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
