"""`coda evaluate`: the metrics of a task, from decoded outputs."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import math
from typing import Any

from tqdm import tqdm

from coda_jax import checks, files, processes
from coda_jax.commands.loading import LoadedModel, held_at_once, with_checkpoint_defaults
from coda_jax.data import jsonl
from coda_jax.data.labels import check_labels
from coda_jax.data.reports import say
from coda_jax.data.source import Data
from coda_jax.inference import Decoding, Encodings, Predictor
from coda_jax.models import placed
from coda_jax.objectives import model_for
from coda_jax.sharding import Placement


def evaluate(
    model: LoadedModel,
    task: str,
    feature_lengths: Mapping[str, int] | None,
    decoding: Decoding,
    split: str | None = None,
    output: str | None = None,
    placement: Placement | None = None,
) -> dict[str, dict[str, float]]:
    """Decodes the inputs of a task and compares the best outputs with its targets.

    Outputs may be as long as the longest target needs. Inputs and outputs that are cut are counted
    and said. A model with a head for labels or numbers is compared with those of a task of
    `data.labels`.

    Args:
        model: what to evaluate.
        task: name of a JSONL task, or of a registered seqio task or mixture.
        feature_lengths: the most "inputs" that are kept, unless `decoding` says it.
        decoding: how outputs are made; what it leaves open, generation_config.json may say.
        split: of the task; None for "validation" or else the only one.
        output: JSON file for the metrics.
        placement: the devices; None for all, which share the rows of a batch.

    Returns:
        {task: {metric: value}}.

    Raises:
        ValueError: the task has no such split, no metrics, or examples that the model cannot take.
        FloatingPointError: what the model gives for an input is not finite; its number is named.
    """
    checks.paths(OUTPUT=output)
    if output is not None:
        files.prepare(output)
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
    if model_for(model.config).describes:
        found = _of_head(model, data, decoding, placement)
    else:
        found = _of_texts(model, data, decoding, placement)
    print(json.dumps(found, indent=2))
    if output is not None and processes.is_first():
        files.write_json(output, found)
    return found


def _of_head(
    model: LoadedModel, data: Data, decoding: Decoding, placement: Placement | None = None
) -> dict[str, dict[str, float]]:
    """{task: metrics} of a head."""
    from coda_jax.training import trainer  # Here: it imports orbax, which nothing else needs.

    decoding.check_encodes()
    objective, placement = model_for(model.config), placement or Placement()
    data.check(objective.expects)
    made = functools.partial(data.batches, repeat=False, **model.layout, expected=objective.expects)
    params = placed(model.config, model.params, placement)
    metrics = trainer.evaluate(objective, params, made(), placement)
    if not all(map(math.isfinite, metrics.values())):
        encodings = Encodings(model.config, model.params, decoding, placement=placement)
        for number, batch in enumerate(made()):
            list(encodings(list(batch["encoder_input_tokens"]), number * data.batch_size))  # raises
        raise FloatingPointError(f"metrics are not finite: {metrics}")
    return {data.task: metrics}


@dataclasses.dataclass
class _Scored:
    """A task: its examples, and (outputs of each) -> metrics."""

    name: str
    examples: Sequence[Mapping[str, Any]]
    score: Callable[[Sequence[Sequence[int]]], dict[str, float]]


def _of_texts(
    model: LoadedModel, data: Data, decoding: Decoding, placement: Placement | None
) -> dict[str, dict[str, float]]:
    """{task: metrics} of generated texts."""
    tasks = _tasks(data)
    targets = max(len(example["targets"]) for task in tasks for example in task.examples)
    decoding = dataclasses.replace(decoding, max_input_length=data.feature_lengths["inputs"])
    predictor = Predictor(
        model.config,
        model.params,
        with_checkpoint_defaults(decoding, model, targets),
        data.vocabulary,
        placement,
    )
    held = held_at_once(model, predictor.decoding)
    found = {task.name: task.score(_outputs(predictor, task, held)) for task in tasks}
    for line in predictor.cuts():
        say(line)
    return found


def _tasks(data: Data) -> list[_Scored]:
    """The tasks of a mixture, or the one, whole."""
    if data.task in jsonl.TASKS:
        task = jsonl.TASKS[data.task]
        score = functools.partial(task.metrics, data.split)
        return [_Scored(task.name, task.examples(data.split), score)]
    from coda_jax.data import seqio_tasks

    return [
        _Scored(task.name, examples, functools.partial(seqio_tasks.metrics_of, task, examples))
        for task, examples in seqio_tasks.evaluated(data.task, data.split, data.feature_lengths)
    ]


def _outputs(predictor: Predictor, task: _Scored, size: int) -> list[list[int]]:
    """The tokens of the best output of each example."""
    outputs: list[list[int]] = [[]] * len(task.examples)
    silent = not processes.is_first()
    with tqdm(total=len(outputs), desc=task.name, unit="example", disable=silent) as progress:
        for start in range(0, len(outputs), size):
            inputs = [example["inputs"] for example in task.examples[start : start + size]]
            for place, tokens in predictor(inputs, first=start):
                outputs[start + place] = tokens.tolist()
                progress.update()
    return outputs
