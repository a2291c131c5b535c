"""`coda evaluate`: the metrics of a task, from decoded outputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
import json
import math
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from coda_jax import checks, files, processes
from coda_jax.commands.loading import LoadedModel, held_at_once, with_checkpoint_defaults
from coda_jax.data import classes, jsonl
from coda_jax.data.labels import check_labels
from coda_jax.data.reports import say
from coda_jax.data.rows import written
from coda_jax.data.source import Data
from coda_jax.data.vocabularies import Vocabulary
from coda_jax.inference import Decoding, Encodings, Predictor
from coda_jax.objectives import model_for
from coda_jax.serving.answers import texts_of
from coda_jax.sharding import Placement

Lines = Iterable[Mapping[str, Any]]


def evaluate(
    model: LoadedModel,
    task: str,
    feature_lengths: Mapping[str, int] | None,
    decoding: Decoding,
    split: str | None = None,
    output: str | None = None,
    placement: Placement | None = None,
    predictions: str | None = None,
    confusion: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Decodes the inputs of a task and compares the best outputs with its targets.

    Outputs may be as long as the longest target needs. Inputs and outputs that are cut are counted
    and said. A model with a head for labels or numbers is compared with those of a task of
    `data.labels`; of labels there are also precision, recall and F1, see `data.classes`.

    Args:
        model: what to evaluate.
        task: name of a JSONL task, or of a registered seqio task or mixture.
        feature_lengths: the most "inputs" that are kept, unless `decoding` says it.
        decoding: how outputs are made; what it leaves open, generation_config.json may say.
        split: of the task; None for "validation" or else the only one.
        output: JSON file for the metrics.
        placement: the devices; None for all, which share the rows of a batch.
        predictions: file for each example, its "prediction", and its "score" or "scores": JSONL, or
            by its name CSV or TSV.
        confusion: PNG file for a picture of which labels were taken for which.

    Returns:
        {task: {metric: value}}.

    Raises:
        ValueError: the task has no such split, no metrics, or examples that the model cannot take.
        FloatingPointError: what the model gives for an input is not finite; its number is named.
    """
    _check_files(model, task, output, predictions, confusion)
    lengths = dict(feature_lengths or {})
    if decoding.max_input_length is not None:
        lengths["inputs"] = decoding.max_input_length
    data = Data(lengths, task, batch_size=decoding.batch_size, shuffle=False)
    data = data.with_split(split).limited(model.longest_inputs)
    say(f"evaluating {data.place}")
    limit, known = data.feature_lengths["inputs"], model.lengths.get("inputs")
    if known not in (None, limit):
        say(f"at most {limit:,} inputs are kept; the adapter was trained with {known:,}")
    data.check_vocabulary(**model.vocabulary)
    check_labels(task, model_for(model.config).describes)
    decoding = dataclasses.replace(decoding, max_input_length=limit)
    if model_for(model.config).describes:
        found, lines = _of_head(model, data, decoding, placement, confusion)
    else:
        found, lines = _of_texts(model, data, decoding, placement)
    print(json.dumps(found, indent=2))
    if output is not None and processes.is_first():
        files.write_json(output, found)
    if predictions is not None and processes.is_first():
        files.write_text(predictions, "".join(written(lines, predictions)))
    return found


def _check_files(
    model: LoadedModel,
    task: str,
    output: str | None,
    predictions: str | None,
    confusion: str | None,
) -> None:
    """Raises ValueError where a file cannot be written, is read, or has nothing to show."""
    given = {"OUTPUT": output, "PREDICTIONS": predictions, "CONFUSION": confusion}
    checks.paths(**given)
    if confusion is not None and not _labels(model):
        raise ValueError(f"CONFUSION={confusion!r} is of labels, and the model has none")
    written = [os.path.abspath(path) for path in given.values() if path is not None]
    if len({*written}) < len(written):
        raise ValueError(f"files that are written need names of their own: {written}")
    read = jsonl.TASKS[task].files.values() if task in jsonl.TASKS else ()
    for path in written:
        files.prepare(path, *read)
    if confusion is not None:
        _picture()  # what it needs is missed before anything is computed


def _of_head(
    model: LoadedModel,
    data: Data,
    decoding: Decoding,
    placement: Placement | None,
    confusion: str | None,
) -> tuple[dict[str, dict[str, Any]], Lines]:
    """{task: metrics} of a head, and a line for each example."""
    decoding.check_encodes()
    objective = model_for(model.config)
    data.check(objective.expects)
    examples = data.chosen(objective.expects)
    encodings = Encodings(model.config, model.params, decoding, placement=placement)
    outputs = _in_order(encodings, data.task, examples, held_at_once(model, decoding))
    outputs = np.stack([found for (found,) in outputs])
    for line in encodings.cuts():
        say(line)
    targets = np.stack([example["targets"] for example in examples])
    batch = {"decoder_target_tokens": targets, "decoder_loss_weights": np.ones_like(targets)}
    _, sums = objective.loss_of(jnp.asarray(outputs), batch)
    metrics: dict[str, Any] = objective.report(sums)
    if not all(map(math.isfinite, metrics.values())):
        raise FloatingPointError(f"metrics are not finite: {metrics}")
    if labels := _labels(model):
        counts = classes.confusion(targets[:, 0], outputs.argmax(-1), len(labels))
        metrics |= classes.scores(counts, labels)
        if confusion is not None and processes.is_first():
            with files.atomic(confusion) as new:
                _picture()(new, counts, labels, data.place)
    lines = ({**row, **objective.describe(x)} for row, x in zip(_rows(data), outputs, strict=True))
    return {data.task: metrics}, lines


def _rows(data: Data) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL task's split."""
    columns = jsonl.TASKS[data.task].columns[data.split]
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _labels(model: LoadedModel) -> Sequence[str]:
    return getattr(model.config, "labels", ())


def _picture() -> Callable[..., None]:
    from coda_jax.profiling.confusion import confusion_picture  # Here: it imports matplotlib.

    return confusion_picture


@dataclasses.dataclass
class _Scored:
    """A task: its examples, and (outputs of each) -> metrics; and what each is in words."""

    name: str
    examples: Sequence[Mapping[str, Any]]
    score: Callable[[Sequence[Sequence[int]]], dict[str, float]]
    rows: Lines


def _of_texts(
    model: LoadedModel, data: Data, decoding: Decoding, placement: Placement | None
) -> tuple[dict[str, dict[str, float]], Lines]:
    """{task: metrics} of generated texts, and a line for each example."""
    tasks = _tasks(data)
    targets = max(len(example["targets"]) for task in tasks for example in task.examples)
    predictor = Predictor(
        model.config,
        model.params,
        with_checkpoint_defaults(decoding, model, targets),
        data.vocabulary,
        placement,
    )
    held = held_at_once(model, predictor.decoding)
    text = texts_of(predictor.decoding, data.vocabulary)
    found, lines = {}, []
    for task in tasks:
        outputs = _in_order(predictor.candidates, task.name, task.examples, held)
        best = [candidates[0].tolist() for candidates, _ in outputs]
        said = [text(tokens) for tokens in best]
        found[task.name] = task.score(
            [_up_to_stop(*output, data.vocabulary) for output in zip(best, said, strict=True)]
        )
        scored = [(line, float(scores[0])) for line, (_, scores) in zip(said, outputs, strict=True)]
        named = {"task": task.name} if len(tasks) > 1 else {}
        lines.append(_lines(named, task.rows, scored))
    for line in predictor.cuts():
        say(line)
    return found, itertools.chain.from_iterable(lines)


def _up_to_stop(tokens: Sequence[int], text: str, vocabulary: Vocabulary) -> Sequence[int]:
    """The tokens of an output up to its first stop text, which may end within one of them."""
    if text == vocabulary.decode(tokens):
        return tokens
    return [*vocabulary.encode(text), vocabulary.eos_id]


def _lines(
    named: Mapping[str, str],
    rows: Lines,
    scored: Iterable[tuple[str, float]],
) -> Iterator[dict[str, Any]]:
    """A line for each example, made when it is asked for."""
    for row, (text, score) in zip(rows, scored, strict=True):
        yield {**named, **row, "prediction": text, "score": score}


def _tasks(data: Data) -> list[_Scored]:
    """The tasks of a mixture, or the one, whole."""
    if data.task in jsonl.TASKS:
        task = jsonl.TASKS[data.task]
        score = functools.partial(task.metrics, data.split)
        return [_Scored(task.name, task.examples(data.split), score, _rows(data))]
    from coda_jax.data import seqio_tasks

    return [
        _Scored(
            task.name,
            examples,
            functools.partial(seqio_tasks.metrics_of, task, examples),
            map(functools.partial(_in_words, data.vocabulary), examples),
        )
        for task, examples in seqio_tasks.evaluated(data.task, data.split, data.feature_lengths)
    ]


def _in_words(vocabulary: Vocabulary, example: Mapping[str, Any]) -> dict[str, str]:
    """The sides of an example that are texts."""
    return {
        key: vocabulary.decode(example[key].tolist())
        for key in ("inputs", "targets")
        if np.issubdtype(example[key].dtype, np.integer)
    }


def _in_order(
    answers: Callable[..., Iterable[tuple]],
    name: str,
    examples: Sequence[Mapping[str, Any]],
    size: int,
) -> list[tuple]:
    """What is answered to each example: without its index, which comes first.

    Args:
        answers: (inputs, number of the first) -> (index, ...) of each, in any order.
        name: of the task, for the progress bar.
        examples: with "inputs".
        size: examples held at once.
    """
    found: list[tuple] = [()] * len(examples)
    silent = not processes.is_first()
    with tqdm(total=len(found), desc=name, unit="example", disable=silent) as progress:
        for start in range(0, len(found), size):
            inputs = [examples[i]["inputs"] for i in range(start, min(start + size, len(found)))]
            for place, *answer in answers(inputs, first=start):
                found[start + place] = tuple(answer)
                progress.update()
    return found
