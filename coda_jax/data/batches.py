"""Examples to model batches, and epochs of examples. Needs numpy only.

An example is {"inputs": int array, "targets": int array}. A batch has the keys and values of
seqio's EncDecFeatureConverter: `encoder_input_tokens`, `decoder_input_tokens`,
`decoder_target_tokens` and `decoder_loss_weights`, and with packing also the segment ids (from 1;
0 is padding) and positions of both sides. All are int32 [batch_size, length], rows filled up with
the model's padding token. Inputs may be vectors instead, such as patches: float arrays [n, C]
become float32 [batch_size, length, C].

The lengths of a batch are those of its longest examples, rounded up by `bucket`: few lengths, so
that few programs are compiled. Packed rows have the full lengths.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
import itertools
from typing import NamedTuple

import numpy as np

from coda_jax import checks

FEATURES = ("inputs", "targets")

Example = Mapping[str, np.ndarray]

SHORTEST = {"inputs": 32, "targets": 8}  # buckets
INCOMPLETE = "decoder_targets_incomplete"  # rows whose targets no output can equal


def rounded_up(length: int, shortest: int) -> int:
    """The next power of two, at least `shortest`."""
    return max(shortest, 1 << (max(length, 1) - 1).bit_length())


def bucket(length: int, longest: int, shortest: int = SHORTEST["inputs"]) -> int:
    """The next power of two, at least `shortest` and at most `longest`."""
    return min(longest, rounded_up(length, shortest))


def buckets(longest: int) -> list[int]:
    """All lengths of padded inputs that there are, ascending."""
    found, length = [], 1
    while length <= longest:
        found.append(bucket(length, longest))
        length = found[-1] + 1
    return found


def cut(values: np.ndarray, longest: int, eos_id: int) -> np.ndarray:
    """At most so many tokens or vectors; where the tokens end with EOS, those kept do, too."""
    if len(values) <= longest:
        return values
    kept = np.array(values[:longest])
    if kept.ndim == 1 and values[-1] == eos_id:
        kept[-1] = eos_id
    return kept


def check_feature_lengths(
    feature_lengths: Mapping[str, int], may_lack: Collection[str] = ()
) -> None:
    """Raises ValueError unless there is a positive length for each feature, but for some."""
    given = set(feature_lengths) if isinstance(feature_lengths, Mapping) else {None}
    if given - set(FEATURES) or set(FEATURES) - given - set(may_lack):
        example = dict.fromkeys(FEATURES, 64)
        raise checks.wrong("feature_lengths", f"lengths such as {example}", feature_lengths)
    for feature, length in feature_lengths.items():
        checks.COUNT(f"feature_lengths[{feature!r}]", length)


class _Layout(NamedTuple):
    """Sizes of a batch, the tokens that stand for no text, and whether rows are marked."""

    batch_size: int
    lengths: dict[str, int]
    pad_id: int
    start_id: int
    eos_id: int
    unknown_id: int | None
    marks: bool


class Batches(Iterator[dict[str, np.ndarray]]):
    """The iterator that `batch_examples` returns.

    Attributes:
        num_examples: how many examples were read so far.
        num_truncated: how many of them were longer than the limits.
        longest: the longest "inputs" and "targets" so far, before they were cut.
    """

    def __init__(self, examples, layout, pack, max_segments, drop_remainder, on_cut):
        self.num_examples = 0
        self.num_truncated = 0
        self.longest = dict.fromkeys(FEATURES, 0)
        self._layout, self._on_cut = layout, on_cut
        rows = packed_rows if pack else _single_rows
        self._batches = _batches(
            rows(self._trimmed(examples), layout.lengths, max_segments),
            layout,
            pack,
            drop_remainder,
        )

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def _trimmed(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Examples of at most the limits, with "complete": whether an output may equal targets."""
        limits, unknown_id = self._layout.lengths, self._layout.unknown_id
        for example in examples:
            self.num_examples += 1
            example = {key: np.asarray(example[key]) for key in FEATURES}
            lengths = {key: len(values) for key, values in example.items()}
            for key in FEATURES:
                self.longest[key] = max(self.longest[key], lengths[key])
            if any(lengths[key] > limits[key] for key in FEATURES):
                self.num_truncated += 1
                if self._on_cut is not None:
                    self._on_cut(self, lengths)
            known = unknown_id is None or not (example["targets"] == unknown_id).any()
            yield {
                **{key: cut(example[key], limits[key], self._layout.eos_id) for key in FEATURES},
                "complete": known and lengths["targets"] <= limits["targets"],
            }


def batch_examples(
    examples: Iterable[Example],
    *,
    batch_size: int,
    feature_lengths: Mapping[str, int],
    pack: bool = False,
    max_segments: int | None = None,
    drop_remainder: bool = True,
    pad_id: int = 0,
    start_id: int = 0,
    eos_id: int = 1,
    unknown_id: int | None = None,
    marks: bool = False,
    on_cut: Callable[["Batches", Mapping[str, int]], None] | None = None,
) -> Batches:
    """Pads or packs examples into batches.

    Args:
        examples: dicts of "inputs" and "targets", tokens or vectors; longer ones are cut and
            counted, and tokens that end with EOS still do.
        batch_size: rows of a batch.
        feature_lengths: the most tokens, or vectors, of "inputs" and "targets"; of packed rows, the
            lengths.
        pack: puts several examples into one row, in order, as long as both sides fit.
        max_segments: at most so many examples in a row, with `pack`; None for no limit.
        drop_remainder: leaves out the last batch if it is not full; otherwise it is filled up with
            empty rows, whose loss weights are 0.
        pad_id: the token that fills up rows.
        start_id: the token from which a decoder starts.
        eos_id: the token that ends a text.
        unknown_id: the token of what the vocabulary cannot write.
        marks: whether batches have `INCOMPLETE`, [batch_size]: which rows have targets that were
            cut or have unknown tokens, so that no output is right.
        on_cut: called for each example that is cut, with the iterator and its whole lengths.

    Returns:
        An iterator of batches, which counts.

    Raises:
        ValueError: a size or a length that is not positive.
    """
    checks.COUNT("batch_size", batch_size)
    check_feature_lengths(feature_lengths)
    checks.Maybe(checks.COUNT)("max_segments", max_segments)
    tokens = pad_id, start_id, eos_id, unknown_id
    layout = _Layout(batch_size, dict(feature_lengths), *tokens, marks)
    return Batches(examples, layout, pack, max_segments, drop_remainder, on_cut)


def _single_rows(examples, unused_lengths, unused_max_segments) -> Iterator[list[Example]]:
    for example in examples:
        yield [example]


def packed_rows(
    examples: Iterable[Example], lengths: Mapping[str, int], max_segments: int | None
) -> Iterator[list[Example]]:
    """The examples of each row, in order: as many as fit, and at most `max_segments`."""
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


def _batches(rows, layout, pack, drop_remainder) -> Iterator[dict[str, np.ndarray]]:
    group: list[list[Example]] = []
    for row in rows:
        group.append(row)
        if len(group) == layout.batch_size:
            yield _convert(group, layout, pack)
            group = []
    if group and not drop_remainder:
        yield _convert(group, layout, pack)


def _convert(rows, layout, pack) -> dict[str, np.ndarray]:
    inputs, inputs_segments, inputs_positions = _fill(rows, "inputs", layout, pack)
    targets, targets_segments, targets_positions = _fill(rows, "targets", layout, pack)
    starts = targets_segments[:, 1:] != targets_segments[:, :-1] if pack else False
    decoder_inputs = np.full_like(targets, layout.start_id)
    decoder_inputs[:, 1:] = np.where(starts, layout.start_id, targets[:, :-1])
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_input_tokens": decoder_inputs,
        "decoder_loss_weights": (targets_segments > 0).astype(np.int32),
    }
    if layout.marks:
        incomplete = [not all(example["complete"] for example in row) for row in rows]
        batch[INCOMPLETE] = np.pad(incomplete, (0, layout.batch_size - len(rows)))
    if pack:
        batch["encoder_segment_ids"] = inputs_segments
        batch["decoder_segment_ids"] = targets_segments
        batch["encoder_positions"] = inputs_positions
        batch["decoder_positions"] = targets_positions
    return batch


def _fill(rows, key, layout, pack) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the tokens, segment ids and positions of one side, each [batch_size, length, ...]."""
    first, length = as_feature(rows[0][0][key]), layout.lengths[key]
    if not pack:
        length = bucket(max(len(row[0][key]) for row in rows), length, SHORTEST[key])
    shape = (layout.batch_size, length)
    padding = layout.pad_id if np.issubdtype(first.dtype, np.integer) else 0
    tokens = np.full((*shape, *first.shape[1:]), padding, first.dtype)
    segments, positions = np.zeros((2, *shape), np.int32)
    for i, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, start=1):
            end = start + len(example[key])
            tokens[i, start:end] = example[key]
            segments[i, start:end] = segment
            positions[i, start:end] = np.arange(end - start)
            start = end
    return tokens, segments, positions


def as_feature(values: np.ndarray) -> np.ndarray:
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
    checks.Maybe(checks.COUNT)("num_epochs", num_epochs)
    checks.COUNT("the number of examples", len(examples))
    return _epochs(examples, seed, num_epochs, shuffle)


def _epochs(examples, seed, num_epochs, shuffle) -> Iterator[Example]:
    for epoch in itertools.count() if num_epochs is None else range(num_epochs):
        order = np.arange(len(examples))
        if shuffle:
            order = np.random.default_rng((seed, epoch)).permutation(order)
        for i in order:
            yield examples[int(i)]
