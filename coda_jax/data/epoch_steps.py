"""How many steps a run has of so many epochs."""

from fractions import Fraction
import itertools
import math

from coda_jax import checks
from coda_jax.data.batches import FEATURES, epochs, packed_rows
from coda_jax.data.examples import Expected
from coda_jax.data.source import Data

EPOCHS = checks.Number(above=0)


def steps_of(
    data: Data, num_epochs: float, expected: Expected, max_segments: int | None = None
) -> int:
    """The batches until each example was in one of them so many times.

    An epoch is a pass over the examples that are taken; those that are left out are none of it.
    Batches are full: what the last one lacks is from the next epoch. Where examples share rows, the
    rows are counted as they will be filled, in the order of each epoch.

    Args:
        data: what is trained on.
        num_epochs: E; of a part of an epoch, rounded up, its first examples.
        expected: what the model takes, see `Data.scan`.
        max_segments: at most so many examples in a row that they share.

    Raises:
        ValueError: the examples are not in memory, so that nobody knows how many they are.
    """
    num_epochs = EPOCHS("EPOCHS", num_epochs)
    if not data.in_memory:
        raise ValueError(
            f"EPOCHS={num_epochs} needs examples that can be counted, and {data.place} is read as "
            "it comes: give TRAIN_STEPS, or write its examples to a CACHE with `coda cache`"
        )
    examples = data.chosen(expected)
    count = math.ceil(Fraction(str(num_epochs)) * len(examples))
    if data.pack:
        limits = data.limits()
        lengths = [
            {key: range(min(len(x[key]), limits[key])) for key in FEATURES} for x in examples
        ]
        passes = epochs(lengths, seed=data.seed, shuffle=data.shuffle)
        count = sum(1 for _ in packed_rows(itertools.islice(passes, count), limits, max_segments))
    return math.ceil(count / data.batch_size)
