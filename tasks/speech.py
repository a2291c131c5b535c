"""Speech tasks as seqio tasks: LibriSpeech, and one's own recordings.

`task(name, vocabulary)` registers one of `SPECS` for a vocabulary, `recordings` files without
transcripts, to pretrain on. Transcripts are in lower case.
LibriSpeech comes from TFDS, which downloads it into $TFDS_DATA_DIR when it is first read.
Registering reads nothing.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import os

import seqio
import tensorflow as tf

from coda_jax.data import seqio_tasks
from coda_jax.data.audio import frames
from coda_jax.tasks import audio, found_files, metrics, registry, tables, texts

SPLITS = ("train", "validation", "test")
# Of the files that are taken from a folder.
ENDINGS = (".wav", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf")
COLUMNS = ("path", "sentence")  # of a table of transcripts, as in Common Voice
LIBRISPEECH = "librispeech:2.1.2"
LIBRISPEECH_SPLITS = {
    "clean": {
        "train": "train_clean100+train_clean360",
        "validation": "dev_clean",
        "test": "test_clean",
    },
    "other": {
        "train": "train_clean100+train_clean360+train_other500",
        "validation": "dev_other",
        "test": "test_other",
    },
}


def read_folder(directory: str, split: str) -> dict[str, list[str]]:
    """Reads `<split>.tsv`, tab-separated columns under a head with "path" and "sentence".

    Args:
        directory: where the tables lie, and where the paths of the recordings start.
        split: one of `SPLITS`.

    Returns:
        The columns "audio" and "targets".

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: it has no rows, or a column is missing; the file and line are named.
    """
    file = os.path.join(directory, f"{split}.tsv")
    columns: dict[str, list[str]] = {"audio": [], "targets": []}
    rows = tables.read_tsv(file)
    _, names = next(rows, (1, []))
    if missing := set(COLUMNS) - set(names):
        raise ValueError(f"{file}:1: no column {sorted(missing)} in {names}")
    for number, fields in rows:
        row = dict(zip(names, fields, strict=False))  # which may lack the last columns
        path, sentence = (row.get(name) for name in COLUMNS)
        if not path or sentence is None:
            raise ValueError(f"{file}:{number}: no {list(COLUMNS)} in {row!r}")
        columns["audio"].append(os.path.join(directory, path))
        columns["targets"].append(sentence.lower())
    if not columns["audio"]:
        raise ValueError(f"{file}: there are no recordings")
    return columns


@seqio.map_over_dataset
def from_librispeech(record):
    """The frames and the transcript of a TFDS record: "speech", 16-bit samples, and "text"."""
    samples = tf.cast(record["speech"], tf.float32) / 2.0**15
    return {"inputs": frames(samples), "targets": tf.strings.lower(record["text"])}


@dataclasses.dataclass(frozen=True)
class Spec:
    """One row of `SPECS`.

    Attributes:
        source: directory or None -> the records.
        step: seqio preprocessor from records to "inputs", frames, and "targets", text.
        reads_directory: whether the records lie in a directory of the user's.
        shuffle_buffer_size: of `add_task`.
    """

    source: Callable[[str | None], seqio.DataSource]
    step: Callable
    reads_directory: bool = False
    shuffle_buffer_size: int = 1


def _tfds(directory, splits):
    del directory
    return seqio.TfdsDataSource(LIBRISPEECH, splits=splits)


def _folder(directory):
    splits = registry.splits_of(directory, SPLITS, ".tsv")
    return seqio_tasks.MemorySource(functools.partial(read_folder, directory), splits)


SPECS = {
    **{
        f"librispeech_{name}": Spec(
            functools.partial(_tfds, splits=splits), from_librispeech, shuffle_buffer_size=1000
        )
        for name, splits in LIBRISPEECH_SPLITS.items()
    },
    "audio_folder": Spec(_folder, audio.load_audio(), reads_directory=True),
}


def task(name: str, vocabulary: str, directory: str | None = None) -> str:
    """Registers a task, once, and returns the name that it has in seqio. For gin files.

    Args:
        name: a key of `SPECS`.
        vocabulary: a path, or "bytes", for `seqio_tasks.seqio_vocabulary`.
        directory: for "audio_folder", where the tables and recordings lie.

    Returns:
        "<name>_<hash of the arguments>".

    Raises:
        ValueError: an unknown name, or a directory where none is read or none where one is needed.
        FileNotFoundError: there is no such vocabulary.
    """
    spec = registry.find("speech", name, SPECS)
    if spec.reads_directory != (directory is not None):
        needs = "needs a" if spec.reads_directory else "reads no"
        raise ValueError(f"{name!r} {needs} directory, got {directory!r}")

    def add(registered: str) -> seqio.Task:
        return add_task(
            registered,
            spec.source(directory),
            spec.step,
            seqio_tasks.seqio_vocabulary(vocabulary),
            shuffle_buffer_size=spec.shuffle_buffer_size,
        )

    return registry.once(name, (name, vocabulary, directory), add)


def recordings(files: str | Sequence[str], vocabulary: str) -> str:
    """Registers a task of recordings with empty targets, once, and returns its name. For gin files.

    Args:
        files: a file, a folder, a glob, or several; see `found_files.find`. Of a folder the files
            with one of `ENDINGS` are taken.
        vocabulary: a path, or "bytes", for `seqio_tasks.seqio_vocabulary`; no text is read.

    Returns:
        "audio_files", with a number appended where other arguments have that name.

    Raises:
        FileNotFoundError: no files match.
        ValueError: all of them are empty.
    """
    found = found_files.find("RECORDINGS", files, ENDINGS)
    read = functools.partial(read_recordings, found, f"RECORDINGS={files!r}")

    def add(registered: str) -> seqio.Task:
        return add_task(
            registered,
            seqio_tasks.MemorySource(read, ("train", "validation")),
            audio.load_audio(),
            seqio_tasks.seqio_vocabulary(vocabulary),
            metric_fns=(),
        )

    return registry.once("audio_files", (files, vocabulary), add)


def read_recordings(
    found: Sequence[found_files.File], place: str, split: str
) -> dict[str, list[str]]:
    """The recordings of a split, 5 % of which are validation: a hash of their names says which.

    Args:
        found: the files.
        place: where they are from, for the error.
        split: "train" or "validation"; of the latter no more are taken than of texts.

    Returns:
        The columns "audio" and "targets", which are empty.

    Raises:
        ValueError: there is none in the split.
    """
    names = [file.name for file in found]
    buckets = tf.strings.to_hash_bucket_fast(names, texts.VALIDATION_BUCKETS).numpy()
    wanted = split == "validation"
    paths = [f.path for f, bucket in zip(found, buckets, strict=True) if (bucket == 0) == wanted]
    if not paths:
        raise ValueError(
            f"{place}: none of {len(found)} files is in the split {split!r}: 5 % are validation, "
            "by a hash of the name. Give more files, or --gin.EVAL_TASK_NAME=None"
        )
    paths = paths[: texts.MAX_VALIDATION] if wanted else paths
    return {"audio": paths, "targets": [""] * len(paths)}


def add_task(
    name: str,
    source: seqio.DataSource,
    step: Callable,
    vocabulary: seqio.Vocabulary,
    *,
    metric_fns: Sequence[Callable] = (metrics.transcript_errors,),
    shuffle_buffer_size: int = 1,
) -> seqio.Task:
    """Registers a task from frames to transcripts.

    Args:
        name: the name of the task.
        source: of the records.
        step: seqio preprocessor from records to "inputs", [N, 161] frames, and "targets", text.
        vocabulary: of the targets.
        metric_fns: of seqio: word and character error rates.
        shuffle_buffer_size: how many examples, frames and all, are held to be shuffled; 1 for a
            source that shuffles all its records.

    Returns:
        The task.
    """
    return seqio_tasks.add_task(
        name,
        source,
        [step, seqio.preprocessors.tokenize],
        vocabulary,
        vectors=True,
        metric_fns=metric_fns,
        shuffle_buffer_size=shuffle_buffer_size,
    )
