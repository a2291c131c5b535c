"""What examples a model can take: each is looked at before it becomes part of a batch."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import dataclasses

import numpy as np

from coda_jax.data.batches import FEATURES, Example, cut
from coda_jax.data.vocabularies import Vocabulary

_NOWHERE = "\U000f1234"  # of private use: no vocabulary has a piece for it


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a model takes.

    Attributes:
        vocab_size: ids of tokens are below it.
        channels: of inputs that are vectors; None for tokens.
        targets: "tokens", "numbers", or None where they are not read.
        eos_id: of the token that ends a text.
        misfit: (inputs, targets) -> why the objective cannot learn them; None where it can.
        misplaced: (inputs) -> why the model has no places for vectors; None where it has.
    """

    vocab_size: int
    channels: int | None = None
    targets: str | None = "tokens"
    eos_id: int = 1
    misfit: Callable[[np.ndarray, np.ndarray], str | None] = lambda inputs, targets: None
    misplaced: Callable[[np.ndarray], str | None] = lambda inputs: None


@dataclasses.dataclass(frozen=True)
class Writing:
    """What a vocabulary does with a text that it has no pieces for.

    Attributes:
        unknown_id: the token that it writes; None where it can write everything.
        nothing: tokens that say nothing of a text: the unknown one, EOS, a lone space.
    """

    unknown_id: int | None = None
    nothing: frozenset[int] = frozenset()


def writing(vocabulary: Vocabulary) -> Writing:
    """How a vocabulary writes what it has no pieces for."""
    ids = vocabulary.encode(_NOWHERE)
    if vocabulary.unk_id not in ids:
        return Writing()
    return Writing(vocabulary.unk_id, frozenset([*ids, vocabulary.eos_id]))


def problem(
    example: Example, expected: Expected, written: Writing, limits: Mapping[str, int]
) -> str | None:
    """Why a model cannot learn an example; None where it can.

    Args:
        example: as it is read.
        expected: what the model takes.
        written: how its vocabulary writes.
        limits: the most "inputs" and "targets" that are kept.
    """
    missing = [key for key in FEATURES if key not in example]
    if missing:
        return f"it has no {' and no '.join(map(repr, missing))}"
    inputs, targets = (np.asarray(example[key]) for key in FEATURES)
    found = input_problem(inputs, expected)
    if found or expected.targets is None:
        return found
    if expected.targets == "numbers":
        return None if np.isfinite(targets).all() else f"its targets are {targets.tolist()}"
    found = _tokens("targets", targets, expected)
    if found:
        return found
    if written.unknown_id in targets and written.nothing.issuperset(targets.tolist()):
        return "the vocabulary has no pieces for its targets, so that no output can be right"
    inputs = cut(inputs, limits["inputs"], expected.eos_id)
    return expected.misfit(inputs, cut(targets, limits["targets"], expected.eos_id))


def input_problem(inputs: np.ndarray, expected: Expected) -> str | None:
    """Why a model cannot take inputs; None where it can."""
    if expected.channels is None:
        return _tokens("inputs", inputs, expected)
    return _vectors(inputs, expected)


def _tokens(key: str, values: np.ndarray, expected: Expected) -> str | None:
    if not np.issubdtype(values.dtype, np.integer) or values.ndim != 1:
        what = f"{values.dtype} values of the shape {list(values.shape)}"
        return f"its {key} are {what}, the model takes a row of token ids"
    if not len(values):
        return f"its {key} are empty"
    least, most = values.min(), values.max()
    if least < 0 or most >= expected.vocab_size:
        wrong = int(least if least < 0 else most)
        return f"its {key} have the id {wrong}, the model's are 0 to {expected.vocab_size - 1}"
    return None


def _vectors(values: np.ndarray, expected: Expected) -> str | None:
    if values.ndim != 2 or values.shape[1] != expected.channels:
        shape = list(values.shape)
        return f"its inputs have the shape {shape}, the model takes [n, {expected.channels}]"
    if not len(values):
        return "its inputs are empty"
    if not np.isfinite(values).all():
        return "its inputs hold values that are not finite numbers"
    return expected.misplaced(values)


@dataclasses.dataclass
class Scan:
    """What was found in all examples of a source.

    Attributes:
        kept: the places of the examples to take.
        problems: (place, why it cannot be learned) of the others.
        longest: the longest "inputs" and "targets" of those that are taken.
        num_cut: how many of each are longer than the limits.
        num_unknown: how many of each have something that the vocabulary has no pieces for.
        num_empty: how many targets are EOS alone.
    """

    kept: list[int] = dataclasses.field(default_factory=list)
    problems: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    longest: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(FEATURES, 0))
    num_cut: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(FEATURES, 0))
    num_unknown: dict[str, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(FEATURES, 0)
    )
    num_empty: int = 0

    def features(self, expected: Expected) -> Collection[str]:
        """The sides that the model reads."""
        return FEATURES if expected.targets is not None else FEATURES[:1]


def scan(
    examples: Iterable[Example], expected: Expected, written: Writing, limits: Mapping[str, int]
) -> Scan:
    """Looks at every example; the arguments are those of `problem`."""
    found = Scan()
    texts = expected.targets == "tokens"
    for place, example in enumerate(examples):
        why = problem(example, expected, written, limits)
        if why is not None:
            found.problems.append((place, why))
            continue
        found.kept.append(place)
        for key in found.features(expected):
            values, length = example[key], len(example[key])
            found.longest[key] = max(found.longest[key], length)
            found.num_cut[key] += length > limits[key]
            if written.unknown_id is not None:
                found.num_unknown[key] += bool((values == written.unknown_id).any())
        found.num_empty += texts and example["targets"].tolist() == [expected.eos_id]
    return found


class Chosen(Sequence[Example]):
    """Some of the examples of a sequence."""

    def __init__(self, examples: Sequence[Example], places: Sequence[int]):
        self._examples, self._places = examples, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        return self._examples[self._places[index]]


def num_shared(examples: Iterable[Example], others: Iterable[Example]) -> int:
    """How many examples are among some others."""

    def keys(found):
        return (hash(tuple(example[key].tobytes() for key in FEATURES)) for example in found)

    known = set(keys(others))
    return sum(key in known for key in keys(examples))
