"""What `coda ood` reads: a task with its labels, and inputs that are none of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from coda_jax import checks
from coda_jax.commands.loading import LoadedModel
from coda_jax.data import jsonl
from coda_jax.data.labels import LabelTask
from coda_jax.data.reports import say
from coda_jax.data.rows import read_requests
from coda_jax.data.source import Data
from coda_jax.objectives import model_for
from coda_jax.ood.known import HeldOut, split_labels

INSIDE = "in"  # the set of what is in distribution
HELD_OUT = "held_out"
FILES = (".jsonl", ".csv", ".tsv", ".txt")
Targets = dict[str, tuple[int, ...] | None]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A set of inputs.

    Attributes:
        name: of the set.
        tokens: what the model takes, one array for each.
        records: what people are shown of each.
        labels: the label of each; none for inputs that have none.
    """

    name: str
    tokens: list[np.ndarray] = dataclasses.field(repr=False)
    records: list[dict[str, Any]] = dataclasses.field(repr=False)
    labels: list[str] = dataclasses.field(default_factory=list, repr=False)

    def of(self, name: str, chosen: Callable[[str], bool]) -> "Inputs":
        """Those whose label is chosen, as another set."""
        kept = [i for i, label in enumerate(self.labels) if chosen(label)]
        columns = (self.tokens, self.records, self.labels)
        return Inputs(name, *([column[i] for i in kept] for column in columns))


def inside_and_outside(
    model: LoadedModel,
    data: Data,
    outside: Sequence[str],
    held_out: HeldOut,
    seed: int,
) -> tuple[Targets, tuple[str, ...], Inputs, list[Inputs]]:
    """All that is read.

    Args:
        model: what is asked.
        data: the task and its split, with limits.
        outside, held_out, seed: see `commands.ood`.

    Returns:
        ({label that is known: its tokens, None for a head}, labels that are held out, training
        examples of known labels, [what is in distribution, each set that is not]).

    Raises:
        ValueError: there is nothing out of distribution, or a set is empty; see `split_labels`.
    """
    if not outside and held_out is None:
        raise ValueError(
            "nothing is out of distribution: give OOD, such as ('others.jsonl',), or HELD_OUT"
        )
    if len({*outside}) < len(outside):
        raise ValueError(f"OOD={outside!r} names a set twice")
    head = tuple(getattr(model.config, "labels", ()))
    if model_for(model.config).describes and not head:
        raise ValueError("the model gives numbers, and what is known are labels")
    (train, tokens), (of_task, _) = (_labelled(x) for x in (data.with_split("train"), data))
    labels: Targets
    if head:
        if held_out is not None:
            raise ValueError(
                f"HELD_OUT={held_out!r}: the model's head has all {len(head)} labels; give inputs "
                "of others as OOD"
            )
        labels, held = dict.fromkeys(head), ()
    else:
        known, held = split_labels([*tokens], held_out, seed)
        labels = {label: tokens[label] for label in known}
    inside = of_task.of(INSIDE, labels.__contains__)
    sets = [of_task.of(HELD_OUT, held.__contains__)] if held else []
    _say_unknown(of_task, {*labels, *held}, data.place)
    sets += [_outside(model, data, entry) for entry in outside]
    for inputs in (inside, *sets):
        if not inputs.tokens:
            place = data.place if inputs.name in (INSIDE, HELD_OUT) else inputs.name
            raise ValueError(f"{place}: the set {inputs.name!r} has no examples")
    return labels, held, train.of("train", labels.__contains__), [inside, *sets]


def _labelled(data: Data) -> tuple[Inputs, dict[str, tuple[int, ...]]]:
    """The examples of a split, and {label that one has: its tokens}."""
    examples, task = _examples(data), jsonl.TASKS.get(data.task)
    tokens = [example["inputs"] for example in examples]
    targets = [tuple(example["targets"].tolist()) for example in examples]
    if isinstance(task, LabelTask):
        labels = [task.labels[number] for (number,) in targets]
    else:
        labels = [data.vocabulary.decode([*target]).strip() for target in targets]
    records = [
        {**record, "label": label}
        for record, label in zip(_records(data, tokens), labels, strict=True)
    ]
    written = dict(zip(reversed(labels), reversed(targets), strict=True))  # the first of a label
    return Inputs(data.split, tokens, records, labels), written


def _examples(data: Data) -> Sequence[Mapping[str, np.ndarray]]:
    """The examples of a task's split, whole."""
    if data.task in jsonl.TASKS:
        return jsonl.TASKS[data.task].examples(data.split)
    from coda_jax.data import seqio_tasks

    reading = {"seed": data.seed, "shuffle": False, "num_epochs": 1}
    return [
        *seqio_tasks.seqio_examples(data.task, data.split, feature_lengths=data.limits(), **reading)
    ]


def _records(data: Data, inputs: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
    """{"inputs"} of each example, where they are texts."""
    if data.task in jsonl.TASKS:
        texts = jsonl.TASKS[data.task].columns[data.split]["inputs"]
        return ({"inputs": text} for text in texts)
    vocabulary = data.vocabulary
    return (
        {"inputs": vocabulary.decode(x.tolist())} if np.issubdtype(x.dtype, np.integer) else {}
        for x in inputs
    )


def _outside(model: LoadedModel, data: Data, entry: str) -> Inputs:
    """A set out of distribution: a file of inputs, or a split of a task."""
    entry = checks.text("OOD", entry)
    if entry.endswith(FILES):
        limit = data.limits()["inputs"]
        encode = model.inputs.encoder(model.config, data.vocabulary, limit, None)
        asked = read_requests(entry, model.inputs.field, problem=model.inputs.problem)
        records = [record for records in asked for record in records]
        return Inputs(entry, [*map(encode, records)], records)
    task, _, split = entry.partition(":")
    other = dataclasses.replace(data, task=task or data.task).with_split(split or None)
    other.check_vocabulary(**model.vocabulary)
    inputs = [example["inputs"] for example in _examples(other)]
    return Inputs(entry, inputs, [*_records(other, inputs)])


def _say_unknown(inputs: Inputs, labels: set[str], place: str) -> None:
    """Counts examples of a label that no training example has."""
    unknown = [label for label in inputs.labels if label not in labels]
    if unknown:
        say(
            f"{place}: {len(unknown):,} of {len(inputs.labels):,} examples are left out: no "
            f"training example has their label, such as {unknown[0]!r}"
        )
