"""What is said of data: how long examples are, what is cut, left out, or cannot be written."""

from collections.abc import Iterable, Iterator, Mapping
import itertools
import sys

import numpy as np
from tqdm import tqdm

from coda_jax import processes
from coda_jax.data.batches import FEATURES, Batches, Example
from coda_jax.data.examples import Expected, Scan

_LOOKED_AT = 16  # examples of a stream, before it is used


def say(line: str) -> None:
    """Prints a line to standard error, above the bars of progress; the first process alone does."""
    if processes.is_first():
        tqdm.write(line, file=sys.stderr)


def binding(limits: Mapping[str, int], longest: Mapping[str, int]) -> str:
    """The flag that keeps examples of these lengths whole."""
    enough = {key: max(limits[key], longest[key]) for key in FEATURES}
    return f'--gin.TASK_FEATURE_LENGTHS="{enough}"'


def check_stream(examples: Iterable[Example], expected: Expected, place: str) -> None:
    """Looks at the first examples of a stream.

    Args:
        examples: of the stream.
        expected: what a model takes.
        place: where they come from.

    Raises:
        ValueError: all of them have empty targets, which the model reads.
    """
    first = list(itertools.islice(examples, _LOOKED_AT))
    empty = [np.array_equal(x["targets"], [expected.eos_id]) for x in first]
    if expected.targets == "tokens" and len(first) == _LOOKED_AT and all(empty):
        raise ValueError(
            f"{place}: the targets of the first {_LOOKED_AT} examples are empty; without targets a "
            "CTC head learns from a teacher alone (DISTILL=1, EVAL_TASK_NAME=None)"
        )


class News:
    """Counts that are worth saying: 1, 10, 100, ... for the first time, in whichever pass."""

    def __init__(self):
        self._told: dict[str, int] = {}

    def has(self, kind: str, count: int) -> bool:
        """Whether a count of a kind is news, which it then is no more."""
        if 10 ** (len(str(count)) - 1) != count or count <= self._told.get(kind, 0):
            return False
        self._told[kind] = count
        return True


def cut_so_far(batches: Batches, lengths: Mapping[str, int], limits: Mapping[str, int]) -> str:
    """A sentence on what was cut, where the last one had these lengths."""
    return (
        f"{batches.num_truncated:,} of {batches.num_examples:,} examples so far are cut, the last "
        f"has {lengths['inputs']:,} inputs and {lengths['targets']:,} targets; "
        f"{binding(limits, batches.longest)} keeps them"
    )


def cut_in_all(batches: Batches, limits: Mapping[str, int]) -> str:
    """A sentence on what was cut in the end."""
    return (
        f"{batches.num_truncated:,} of {batches.num_examples:,} examples were cut; "
        f"{binding(limits, batches.longest)} keeps all"
    )


def of_scan(found: Scan, expected: Expected, limits: Mapping[str, int]) -> Iterator[str]:
    """What there is to say of all examples of a source.

    Args:
        found: in the examples.
        expected: what the model takes.
        limits: the most "inputs" and "targets" that are kept.

    Yields:
        Sentences, the first of how many and how long the examples are.
    """
    sides, count = found.features(expected), len(found.kept)

    def of_each(numbers):
        return " and ".join(f"{numbers[key]:,} {key}" for key in sides)

    known = " and ".join(f"{found.longest[key]:,} {key} (limit {limits[key]:,})" for key in sides)
    yield f"{count:,} examples of at most {known}"
    if found.problems:
        (place, why), left_out = found.problems[0], len(found.problems)
        yield f"{left_out:,} examples are left out; the first is number {place + 1:,}: {why}"
    if any(found.num_cut[key] for key in sides):
        keeps_all = binding(limits, found.longest)
        yield f"{of_each(found.num_cut)} of {count:,} are cut; {keeps_all} keeps all"
    if any(found.num_unknown[key] for key in sides):
        unknown = of_each(found.num_unknown)
        yield f"{unknown} of {count:,} have characters that the vocabulary has no pieces for"
    if found.num_empty:
        yield f"{found.num_empty:,} targets of {count:,} are empty"
