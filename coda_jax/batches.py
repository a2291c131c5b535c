"""Token examples to model batches, and the cache file that holds them. Needs numpy only.

An example is {"inputs": int array, "targets": int array}. A batch has the keys and values of
seqio's EncDecFeatureConverter: `encoder_input_tokens`, `decoder_input_tokens`,
`decoder_target_tokens` and `decoder_loss_weights`, and with packing also the segment ids (from 1;
0 is padding) and positions of both sides. All are int32 [batch_size, length]. Inputs may be vectors
instead, such as patches: float arrays [n, C] become float32 [batch_size, length, C].
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import hashlib
import itertools
import json
import logging
import os
import tempfile
import zipfile
import zlib

import numpy as np

FEATURES = ("inputs", "targets")
VOCABULARY_NAME = "spiece.model"  # As Hugging Face names it in a T5 checkpoint's directory.
CACHE_FORMAT = "coda_jax examples 1"

Example = Mapping[str, np.ndarray]

_logger = logging.getLogger(__name__)


def check_positive(**values: int | None) -> None:
    """Raises ValueError, naming the value, unless every value is an int of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")


def check_feature_lengths(feature_lengths: Mapping[str, int]) -> None:
    """Raises ValueError unless there is one positive length for inputs and one for targets."""
    if set(feature_lengths) != set(FEATURES):
        raise ValueError(f"feature_lengths must have the keys {FEATURES}: {dict(feature_lengths)}.")
    check_positive(**{f"feature_lengths[{k!r}]": v for k, v in feature_lengths.items()})


def check_vocabulary(
    fingerprint: str,
    num_ids: int,
    vocab_size: int,
    checkpoint_directory: str | os.PathLike | None = None,
) -> None:
    """Checks that the ids of a vocabulary are those that a model was trained with.

    Args:
      fingerprint: the SHA-256 of the vocabulary's file, or "bytes".
      num_ids: how many ids it has.
      vocab_size: the model's number of embeddings; more than the vocabulary has is fine.
      checkpoint_directory: where the model's `spiece.model` may lie.

    Raises:
      ValueError: the vocabulary has more ids than the model, or differs from the checkpoint's.
    """
    if num_ids > vocab_size:
        raise ValueError(f"The vocabulary has {num_ids} ids, the model only {vocab_size}.")
    if checkpoint_directory is None:
        return
    file = os.path.join(checkpoint_directory, VOCABULARY_NAME)
    if not os.path.isfile(file):
        return
    with open(file, "rb") as f:
        theirs = hashlib.sha256(f.read()).hexdigest()
    if fingerprint != theirs:
        raise ValueError(
            f"The vocabulary of the data differs from the checkpoint's {file!r} "
            f"(SHA-256 {fingerprint}, {theirs})."
        )


class Batches(Iterator[dict[str, np.ndarray]]):
    """The iterator that `batch_examples` returns.

    Attributes:
      num_truncated: how many examples so far were longer than the limit.
      num_examples: how many examples were read so far.
    """

    def __init__(self, examples, batch_size, lengths, pack, max_segments, drop_remainder):
        self.num_truncated = 0
        self.num_examples = 0
        self._lengths = lengths
        rows = _packed_rows if pack else _single_rows
        self._batches = _batches(
            rows(self._trimmed(examples), lengths, max_segments),
            batch_size,
            lengths,
            pack,
            drop_remainder,
        )

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def _trimmed(self, examples: Iterable[Example]) -> Iterator[Example]:
        for example in examples:
            self.num_examples += 1
            if any(len(example[key]) > self._lengths[key] for key in FEATURES):
                self._count_truncated(example)
            # As seqio does: the end is cut off, EOS included.
            yield {key: np.asarray(example[key])[: self._lengths[key]] for key in FEATURES}

    def _count_truncated(self, example: Example) -> None:
        self.num_truncated += 1
        if 10 ** (len(str(self.num_truncated)) - 1) == self.num_truncated:  # 1, 10, 100, ...
            _logger.warning(
                "%d of %d examples truncated so far; the last: %d inputs, %d targets, limits %s.",
                self.num_truncated,
                self.num_examples,
                len(example["inputs"]),
                len(example["targets"]),
                dict(self._lengths),
            )


def batch_examples(
    examples: Iterable[Example],
    *,
    batch_size: int,
    feature_lengths: Mapping[str, int],
    pack: bool = False,
    max_segments: int | None = None,
    drop_remainder: bool = True,
) -> Batches:
    """Pads or packs examples into batches.

    Args:
      examples: dicts of "inputs" and "targets", tokens or vectors; longer ones are truncated, with
        a warning at 1, 10, 100, ... of them.
      batch_size: rows of a batch.
      feature_lengths: the lengths of "inputs" and "targets", in tokens.
      pack: puts several examples into one row, in order, as long as both sides fit.
      max_segments: at most so many examples in a row, with `pack`; None for no limit.
      drop_remainder: leaves out the last batch if it is not full; otherwise it is filled up with
        empty rows, whose loss weights are 0.

    Returns:
      An iterator of batches, with the attribute `num_truncated`.

    Raises:
      ValueError: a size or a length that is not positive.
    """
    check_positive(batch_size=batch_size)
    check_feature_lengths(feature_lengths)
    if max_segments is not None:
        check_positive(max_segments=max_segments)
    lengths = dict(feature_lengths)
    return Batches(examples, batch_size, lengths, pack, max_segments, drop_remainder)


def _single_rows(examples, unused_lengths, unused_max_segments) -> Iterator[list[Example]]:
    for example in examples:
        yield [example]


def _packed_rows(examples, lengths, max_segments) -> Iterator[list[Example]]:
    row: list[Example] = []
    used = dict.fromkeys(FEATURES, 0)
    for example in examples:
        fits = all(used[key] + len(example[key]) <= lengths[key] for key in FEATURES)
        if row and (not fits or len(row) == max_segments):
            yield row
            row, used = [], dict.fromkeys(FEATURES, 0)
        row.append(example)
        used = {key: used[key] + len(example[key]) for key in FEATURES}
    if row:
        yield row


def _batches(rows, batch_size, lengths, pack, drop_remainder) -> Iterator[dict[str, np.ndarray]]:
    group: list[list[Example]] = []
    for row in rows:
        group.append(row)
        if len(group) == batch_size:
            yield _convert(group, batch_size, lengths, pack)
            group = []
    if group and not drop_remainder:
        yield _convert(group, batch_size, lengths, pack)


def _convert(rows, batch_size, lengths, pack) -> dict[str, np.ndarray]:
    inputs, inputs_segments, inputs_positions = _fill(rows, "inputs", batch_size, lengths)
    targets, targets_segments, targets_positions = _fill(rows, "targets", batch_size, lengths)
    decoder_inputs = np.zeros_like(targets)
    decoder_inputs[:, 1:] = targets[:, :-1]
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_input_tokens": decoder_inputs,
        "decoder_loss_weights": (targets != 0).astype(np.int32),
    }
    if pack:
        same_segment = targets_segments[:, 1:] == targets_segments[:, :-1]
        decoder_inputs[:, 1:] *= same_segment  # 0 starts each segment.
        batch["encoder_segment_ids"] = inputs_segments
        batch["decoder_segment_ids"] = targets_segments
        batch["encoder_positions"] = inputs_positions
        batch["decoder_positions"] = targets_positions
    return batch


def _fill(rows, key, batch_size, lengths) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the tokens, segment ids and positions of one side, each [batch_size, length, ...]."""
    first = _stored(rows[0][0][key])
    tokens = np.zeros((batch_size, lengths[key], *first.shape[1:]), first.dtype)
    segments, positions = np.zeros((2, batch_size, lengths[key]), np.int32)
    for i, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, start=1):
            end = start + len(example[key])
            tokens[i, start:end] = example[key]
            segments[i, start:end] = segment
            positions[i, start:end] = np.arange(end - start)
            start = end
    return tokens, segments, positions


def _stored(values) -> np.ndarray:
    """Whole numbers as int32, others as float32."""
    values = np.asarray(values)
    floating = np.issubdtype(values.dtype, np.floating)
    return values.astype(np.float32 if floating else np.int32, copy=False)


def epochs(
    examples: Sequence[Example],
    *,
    seed: int,
    num_epochs: int | None = None,
    shuffle: bool = True,
) -> Iterator[Example]:
    """Goes through the examples again and again, each epoch in an order of its own.

    Args:
      examples: a sequence.
      seed: gives, with the number of the epoch, the order.
      num_epochs: how often; None for ever.
      shuffle: False keeps the given order.

    Returns:
      An iterator of examples.

    Raises:
      ValueError: no examples or no epochs.
    """
    if num_epochs is not None:
        check_positive(num_epochs=num_epochs)
    check_positive(**{"the number of examples": len(examples)})
    return _epochs(examples, seed, num_epochs, shuffle)


def _epochs(examples, seed, num_epochs, shuffle) -> Iterator[Example]:
    for epoch in itertools.count() if num_epochs is None else range(num_epochs):
        order = np.arange(len(examples))
        if shuffle:
            order = np.random.default_rng((seed, epoch)).permutation(order)
        for i in order:
            yield examples[int(i)]


class CachedExamples(Sequence[dict[str, np.ndarray]]):
    """The examples of a cache file: [i] gives {"inputs", "targets"}."""

    def __init__(self, tokens: Mapping[str, np.ndarray], offsets: Mapping[str, np.ndarray]):
        self._tokens = tokens
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets["inputs"]) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        i = range(len(self))[index]
        return {
            key: self._tokens[key][self._offsets[key][i] : self._offsets[key][i + 1]]
            for key in FEATURES
        }


def write_cache(path: str | os.PathLike, examples: Iterable[Example], metadata: Mapping) -> int:
    """Writes examples to one npz file, which appears only when it is complete.

    Args:
      path: the file.
      examples: dicts of "inputs" and "targets", tokens or vectors.
      metadata: what `read_cache` gives back; anything that JSON can hold.

    Returns:
      The number of examples.

    Raises:
      ValueError: there are no examples.
      TypeError: the metadata do not fit into JSON.
    """
    arrays = {"metadata": np.array(json.dumps({"format": CACHE_FORMAT, **metadata}))}
    parts: dict[str, list[np.ndarray]] = {key: [] for key in FEATURES}
    for example in examples:
        for key in FEATURES:
            parts[key].append(_stored(example[key]))
    if not parts["inputs"]:
        raise ValueError(f"No examples to write to {os.fspath(path)!r}.")
    for key in FEATURES:
        arrays[f"{key}_tokens"] = np.concatenate(parts[key])
        arrays[f"{key}_offsets"] = np.cumsum([0, *map(len, parts[key])], dtype=np.int64)
    _write_atomically(os.path.abspath(path), arrays)
    return len(parts["inputs"])


def _write_atomically(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".cache-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as f:
            np.savez_compressed(f, **arrays)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read.
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_cache(path: str | os.PathLike) -> tuple[CachedExamples, dict]:
    """Reads a file of `write_cache`.

    Args:
      path: the file.

    Returns:
      The examples, with `len` and [i], and the metadata.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged or something else; the message says what is missing.
    """
    arrays = _read_arrays(path)
    names = ["metadata", *(f"{key}_{part}" for key in FEATURES for part in ("tokens", "offsets"))]
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ValueError(f"{os.fspath(path)!r} is not a cache of examples: it lacks {missing}.")
    try:
        metadata = json.loads(str(arrays["metadata"]))
        file_format = metadata.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise ValueError(f"{os.fspath(path)!r}: metadata without a format ({e}).") from e
    if file_format != CACHE_FORMAT:
        raise ValueError(
            f"{os.fspath(path)!r} has the format {file_format!r}, not {CACHE_FORMAT!r}."
        )
    tokens = {key: arrays[f"{key}_tokens"] for key in FEATURES}
    offsets = {key: arrays[f"{key}_offsets"] for key in FEATURES}
    _check_offsets(path, tokens, offsets)
    return CachedExamples(tokens, offsets), metadata


def _read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array, not an archive")
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, TypeError) as e:
        raise ValueError(f"{os.fspath(path)!r} is not a readable npz file: {e}.") from e


def _check_offsets(path, tokens, offsets) -> None:
    for key in FEATURES:
        o = offsets[key]
        if o.ndim != 1 or not len(o) or o[0] != 0 or (np.diff(o) < 0).any():
            raise ValueError(f"{os.fspath(path)!r}: {key}_offsets do not rise from 0.")
        if tokens[key].ndim not in (1, 2) or o[-1] != len(tokens[key]):
            raise ValueError(
                f"{os.fspath(path)!r}: {key}_tokens has the shape {tokens[key].shape}, but "
                f"{key}_offsets ends at {o[-1]}."
            )
    counts = {key: len(offsets[key]) - 1 for key in FEATURES}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{os.fspath(path)!r}: different numbers of examples: {counts}.")
