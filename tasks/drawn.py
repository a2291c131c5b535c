"""What the tasks share whose examples are made anew from their number whenever they are read."""

from collections.abc import Callable

import numpy as np
import seqio
import tensorflow as tf

from coda_jax.data.seqio_tasks import MemorySource

SIZES = {"train": 100_000, "validation": 500, "test": 1_000}  # examples of each split
SPLITS = tuple(SIZES)


def source(prepare: Callable[[str], object]) -> MemorySource:
    """Returns the seqio source of {"split", "number"} of every example.

    Args:
        prepare: called with the split before the threads that make examples start, for what each of
            them would otherwise do.
    """

    def numbers(split: str) -> dict[str, list]:
        prepare(split)
        return {"split": [split] * SIZES[split], "number": list(range(SIZES[split]))}

    return MemorySource(numbers, SPLITS, SIZES)


def step(
    make: Callable[[str, int], tuple[np.ndarray, str]],
    dtype: tf.DType,
    feature: Callable[[tf.Tensor], dict[str, tf.Tensor]],
) -> Callable:
    """Returns the seqio preprocessor that makes the examples whose split and number it gets.

    Args:
        make: (split, number) -> an array and the text of the targets.
        dtype: of the array.
        feature: the array as a feature of the example, by its name.
    """

    def make_bytes(split, number):
        array, text = make(split.decode(), int(number))
        return array, text.encode()

    @seqio.map_over_dataset
    def made(example):
        arguments = [example["split"], example["number"]]
        array, text = tf.numpy_function(make_bytes, arguments, (dtype, tf.string))
        return {**feature(array), "targets": tf.ensure_shape(text, [])}

    return made


def scattered(lengths: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Returns where things of the lengths start: in their order, at random, none over another."""
    # The free length is shared out at random over the gaps.
    gaps = np.sort(rng.integers(total - lengths.sum() + 1, size=len(lengths)))
    return gaps + np.cumsum(lengths) - lengths
