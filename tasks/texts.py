"""People's own texts as records {"text"}: files, a TFDS data set, or what a task of seqio reads.

A hash of each text picks the split "validation", 5 % of them, so that it depends neither on the
order nor on the names of the files, and no text is in both splits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import seqio
import tensorflow as tf

from coda_jax import checks, files
from coda_jax.data import seqio_tasks
from coda_jax.tasks import found_files

LINES_PER_TEXT = 64
_READ_AT_ONCE = 2**20  # bytes of a file
VALIDATION_BUCKETS = 20  # One of them is the validation split.
SHUFFLED = 1000  # records that are held to be shuffled
MAX_VALIDATION = 1000  # records; an evaluation reads them all, however many texts there are
JSONL, FIELD = ".jsonl", "text"
SOURCES = ("TEXTS", "TFDS_NAME", "SEQIO_NAME")


class Needed(NamedTuple):
    """What at least one text must have.

    Attributes:
        has: (text, a scalar) -> whether it has it, both tensors.
        otherwise: what is said where none has.
    """

    has: Callable[[tf.Tensor], tf.Tensor]
    otherwise: str


class TextFiles(seqio.FileDataSource):
    """Files as records {field: text}: each line's field of `*.jsonl`, 64 lines of any other."""

    def __init__(self, files: Sequence[str], field: str):
        """Makes the source of files in UTF-8; nothing is read yet."""
        self._files = list(files)
        super().__init__(_reader(field), {"train": self._files})

    def list_shards(self, split: str) -> list[str]:
        """Returns the files."""
        del split
        return self._files


def _reader(field: str):
    """What makes a dataset of a file's records."""

    def texts(path: bytes) -> Iterator[bytes]:
        path = path.decode()
        for first, lines in _blocks(path):
            if not path.lower().endswith(JSONL):
                text = b"".join(line.removesuffix(b"\r") + b"\n" for line in lines)
                yield files.decoded(text, path, first).encode()
                continue
            for number, line in enumerate(lines, start=first):
                if line.strip():
                    yield _field(line, field, path, number)

    def read(path: tf.Tensor) -> tf.data.Dataset:
        text = tf.TensorSpec([], tf.string)
        found = tf.data.Dataset.from_generator(texts, args=[path], output_signature=text)
        return found.map(lambda text: {field: text})

    return read


def _blocks(path: str) -> Iterator[tuple[int, list[bytes]]]:
    """(number of the first, 64 lines) of a file, also in a bucket.

    TensorFlow's own lines lack their carriage returns, wherever these are.
    """
    first, lines, rest = 1, [], b""
    with tf.io.gfile.GFile(path, "rb") as file:
        while part := file.read(_READ_AT_ONCE):
            *ended, rest = (rest + part).split(b"\n")
            lines += ended
            whole = len(lines) // LINES_PER_TEXT * LINES_PER_TEXT
            for start in range(0, whole, LINES_PER_TEXT):
                yield first + start, lines[start : start + LINES_PER_TEXT]
            first, lines = first + whole, lines[whole:]
    if lines := lines + [rest] * bool(rest):
        yield first, lines


def _field(line: bytes, field: str, path: str, number: int) -> bytes:
    """The text under a name in a line of JSONL; ValueError names the place."""
    place, text = f"{path}:{number}", files.decoded(line, path, number)
    try:
        record = files.json_value(text)
    except ValueError as e:
        raise ValueError(f"{place}: {e}") from e
    if not isinstance(record, Mapping) or field not in record:
        raise ValueError(f"{place}: there is no field {field!r}, which TEXT_FIELD names")
    if not isinstance(record[field], str):
        raise ValueError(f"{place}: {field!r} must be a string, not {record[field]!r:.60}")
    return record[field].encode()


class SplitTexts(seqio.DataSource):
    """The texts of another source's split "train", as train and validation."""

    def __init__(
        self,
        records: seqio.DataSource,
        field: str,
        place: str,
        needed: Needed,
        stream: int = 0,
    ):
        """Makes the source; nothing is read yet.

        Args:
            records: has a split "train" whose records have the field, a text.
            field: of a record.
            place: what is read, for errors.
            needed: of at least one text of a split.
            stream: sources of other numbers read the same records in other orders.
        """
        super().__init__(("train", "validation"))
        self._records, self._field, self._place = records, field, place
        self._needed, self._stream = needed, stream

    def __str__(self) -> str:
        return self._place

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Whether there may be more parts than `list_shards` has; see seqio."""
        return self._records.supports_arbitrary_sharding

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns the names of the source's parts."""
        del split
        return self._records.list_shards("train")

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **unused_kwargs):
        """Returns a split as a tf.data.Dataset; see `seqio.DataSource.get_dataset`.

        Raises:
            ValueError: the records have no such field, or there is no text in the split.
        """
        seed = None if seed is None else seed + self._stream
        records = self._records.get_dataset(
            split="train", shuffle=shuffle, seed=seed, shard_info=shard_info
        )
        spec = records.element_spec.get(self._field)
        if spec is None or spec.dtype != tf.string or spec.shape.rank != 0:
            texts = [k for k, x in records.element_spec.items() if x.dtype == tf.string]
            raise ValueError(
                f"{self._place}: TEXT_FIELD={self._field!r} is no text of its records, which have "
                f"{sorted(texts)}"
            )

        def is_of_split(example):
            bucket = tf.strings.to_hash_bucket_fast(example["text"], VALIDATION_BUCKETS)
            return (bucket == 0) == (split == "validation")

        texts = records.map(lambda record: {"text": record[self._field]}).filter(is_of_split)
        if split == "validation":
            texts = texts.take(MAX_VALIDATION)
        if shard_info is None or shard_info.num_shards == 1:  # of several, some may have none
            self._check(texts, split)
        return texts.shuffle(SHUFFLED, seed=seed) if shuffle else texts

    def _check(self, texts: tf.data.Dataset, split: str) -> None:
        """Raises ValueError where there is no text, or none with what is needed."""
        if not seqio_tasks.has_any(texts):
            raise ValueError(
                f"{self._place}: no text is in the split {split!r}: 5 % are validation, by a hash "
                "of the text. Give more texts, or --gin.EVAL_TASK_NAME=None"
            )
        if not seqio_tasks.has_any(texts.filter(lambda record: self._needed.has(record["text"]))):
            raise ValueError(f"{self._place}: {self._needed.otherwise}")


def sources(
    files: str | Sequence[str] | None,
    tfds_name: str | None,
    seqio_name: str | None,
    field: str,
    needed: Needed,
    streams: int = 1,
) -> dict[str, tuple[list[SplitTexts], float]]:
    """The sources of the one of three that is given.

    Args:
        files: a file, a folder, a glob, or several; see `found_files.find`.
        tfds_name: name and version of a TFDS data set.
        seqio_name: of a task or mixture of seqio, whose records are read as they are before its own
            steps.
        field: of the records (and of JSONL files), a text.
        needed: of at least one text.
        streams: how many sources of the same records, in orders of their own.

    Returns:
        ([a source for each stream], rate) by the names of a mixture's tasks, or under "".

    Raises:
        FileNotFoundError: no files match.
        ValueError: none or several are given, all files are empty, or there is no such task.
    """
    given = dict(zip(SOURCES, (files, tfds_name, seqio_name), strict=True))
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        said = " and ".join(f"{name}={value!r}" for name, value in named.items()) or "none"
        raise ValueError(f"Give one of {', '.join(SOURCES)}, got {said}")
    ((name, value),) = named.items()
    place = f"{name}={value!r}"
    checks.text("TEXT_FIELD", field)
    if files is not None:
        paths = [file.path for file in found_files.find(name, files)]
        if field != FIELD and not any(path.lower().endswith(JSONL) for path in paths):
            raise ValueError(
                f"TEXT_FIELD={field!r} has no effect: none of {place} is a {JSONL} file"
            )
        records = {"": (TextFiles(paths, field), 1.0)}
    elif tfds_name is not None:
        splits = {"train": "train"}
        records = {"": (seqio.TfdsDataSource(checks.text(name, tfds_name), splits=splits), 1.0)}
    else:
        records = _of_seqio(seqio_tasks.registered(checks.text(name, seqio_name)), place)
    return {
        part: ([SplitTexts(source, field, place, needed, i) for i in range(streams)], rate)
        for part, (source, rate) in records.items()
    }


def _of_seqio(
    found: seqio.Task | seqio.Mixture, place: str
) -> dict[str, tuple[seqio.DataSource, float]]:
    """The sources of a task or mixture that have a split "train", with their rates."""
    tasks = [task for task in seqio.get_subtasks(found) if "train" in task.splits]
    if not tasks:
        raise ValueError(f"{place} has no split 'train', only {sorted(found.splits)}")
    if isinstance(found, seqio.Task):
        return {"": (found.source, 1.0)}
    return {task.name: (task.source, float(found.get_rate(task))) for task in tasks}
