"""Examples to model batches, and epochs of examples. Needs numpy only.

An example is {"inputs": int array, "targets": int array}. A batch has the keys and values of
seqio's EncDecFeatureConverter: `encoder_input_tokens`, `decoder_input_tokens`,
`decoder_target_tokens` and `decoder_loss_weights`, and with packing also the segment ids (from 1;
0 is padding) and positions of both sides. All are int32 [batch_size, length], rows filled up with
the model's padding token. Inputs may be vectors instead, such as patches: float arrays [n, C]
become float32 [batch_size, length, C].
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import itertools
import logging
from typing import NamedTuple

import numpy as np

from coda_jax import checks

FEATURES = ("inputs", "targets")

Example = Mapping[str, np.ndarray]

_logger = logging.getLogger(__name__)


def check_feature_lengths(feature_lengths: Mapping[str, int]) -> None:
    """Raises ValueError unless there is one positive length for inputs and one for targets."""
    if not isinstance(feature_lengths, Mapping) or set(feature_lengths) != set(FEATURES):
        example = dict.fromkeys(FEATURES, 64)
        raise checks.wrong("feature_lengths", f"lengths such as {example}", feature_lengths)
    for feature, length in feature_lengths.items():
        checks.COUNT(f"feature_lengths[{feature!r}]", length)


class _Layout(NamedTuple):
    """Sizes of a batch, and the tokens that no example holds."""

    batch_size: int
    lengths: dict[str, int]
    pad_id: int
    start_id: int


class Batches(Iterator[dict[str, np.ndarray]]):
    """The iterator that `batch_examples` returns.

    Attributes:
        num_truncated: how many examples so far were longer than the limit.
        num_examples: how many examples were read so far.
    """

    def __init__(self, examples, layout, pack, max_segments, drop_remainder):
        self.num_truncated = 0
        self.num_examples = 0
        self._lengths = layout.lengths
        rows = _packed_rows if pack else _single_rows
        self._batches = _batches(
            rows(self._trimmed(examples), layout.lengths, max_segments),
            layout,
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
    pad_id: int = 0,
    start_id: int = 0,
) -> Batches:
    """Pads or packs examples into batches.

    Args:
        examples: dicts of "inputs" and "targets", tokens or vectors; longer ones are truncated,
            with a warning at 1, 10, 100, ... of them.
        batch_size: rows of a batch.
        feature_lengths: the lengths of "inputs" and "targets", in tokens.
        pack: puts several examples into one row, in order, as long as both sides fit.
        max_segments: at most so many examples in a row, with `pack`; None for no limit.
        drop_remainder: leaves out the last batch if it is not full; otherwise it is filled up with
            empty rows, whose loss weights are 0.
        pad_id: the token that fills up rows.
        start_id: the token from which a decoder starts.

    Returns:
        An iterator of batches, with the attribute `num_truncated`.

    Raises:
        ValueError: a size or a length that is not positive.
    """
    checks.COUNT("batch_size", batch_size)
    check_feature_lengths(feature_lengths)
    checks.Maybe(checks.COUNT)("max_segments", max_segments)
    layout = _Layout(batch_size, dict(feature_lengths), pad_id, start_id)
    return Batches(examples, layout, pack, max_segments, drop_remainder)


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
    inputs, inputs_segments, inputs_positions = _fill(rows, "inputs", layout)
    targets, targets_segments, targets_positions = _fill(rows, "targets", layout)
    starts = targets_segments[:, 1:] != targets_segments[:, :-1] if pack else False
    decoder_inputs = np.full_like(targets, layout.start_id)
    decoder_inputs[:, 1:] = np.where(starts, layout.start_id, targets[:, :-1])
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_input_tokens": decoder_inputs,
        "decoder_loss_weights": (targets_segments > 0).astype(np.int32),
    }
    if pack:
        batch["encoder_segment_ids"] = inputs_segments
        batch["decoder_segment_ids"] = targets_segments
        batch["encoder_positions"] = inputs_positions
        batch["decoder_positions"] = targets_positions
    return batch


def _fill(rows, key, layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the tokens, segment ids and positions of one side, each [batch_size, length, ...]."""
    first = as_feature(rows[0][0][key])
    shape = (layout.batch_size, layout.lengths[key])
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
