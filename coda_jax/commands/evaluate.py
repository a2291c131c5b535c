"""`coda evaluate`: the metrics of a task, from decoded outputs."""

from collections.abc import Callable, Mapping
import dataclasses
import itertools
import json
import math

import numpy as np
from tqdm import tqdm

from coda_jax import files
from coda_jax.commands.loading import LoadedModel, with_checkpoint_defaults
from coda_jax.data.source import Data
from coda_jax.inference import Decoding, Encodings, Predictor
from coda_jax.models import family_of
from coda_jax.objectives import model_for
from coda_jax.optional import needs
from coda_jax.sharding import Placement


def held_at_once(model: LoadedModel, decoding: Decoding) -> int:
    """Inputs held at once: texts are worth sorting by length, images and audio are large."""
    return family_of(model.config).inputs.held or 8 * decoding.batch_size


def evaluate(
    model: LoadedModel,
    task: str,
    feature_lengths: Mapping[str, int],
    decoding: Decoding,
    split: str = "validation",
    output: str | None = None,
) -> dict[str, dict[str, float]]:
    """Decodes the inputs of a seqio task and compares the best outputs with its targets.

    A model with a head for labels or numbers is compared with those of a task of `data.labels`.

    Args:
        model: what to evaluate.
        task: name of a registered seqio task or mixture.
        feature_lengths: the most tokens of "inputs" and of "targets".
        decoding: how outputs are made; what it leaves open, generation_config.json may say.
        split: of the task.
        output: JSON file for the metrics.

    Returns:
        {task: {metric: value}}.

    Raises:
        FloatingPointError: what the model gives for an input is not finite; its number is named.
    """
    data = Data(feature_lengths, task, split=split, batch_size=decoding.batch_size, shuffle=False)
    data.check_vocabulary(**model.vocabulary)
    if model_for(model.config).describes:
        found = _of_head(model, data, decoding)
    else:
        found = _of_texts(model, data, decoding)
    print(json.dumps(found, indent=2))
    if output is not None:
        files.write_json(output, found)
    return found


def _of_head(model: LoadedModel, data: Data, decoding: Decoding) -> dict[str, dict[str, float]]:
    """{task: metrics} of a head."""
    from coda_jax.training import trainer  # Here: it imports orbax, which nothing else needs.

    batches = data.batches(repeat=False, **model.layout)
    placement = Placement()
    params = placement.params(model.params)
    metrics = trainer.evaluate(model_for(model.config), params, batches, placement)
    if not all(map(math.isfinite, metrics.values())):
        encodings = Encodings(model.config, model.params, decoding)
        for number, batch in enumerate(data.batches(repeat=False, **model.layout)):
            list(encodings(list(batch["encoder_input_tokens"]), number * data.batch_size))  # raises
        raise FloatingPointError(f"metrics are not finite: {metrics}")
    return {data.task: metrics}


def _of_texts(model: LoadedModel, data: Data, decoding: Decoding) -> dict[str, dict[str, float]]:
    """{task: metrics} of generated texts."""
    with needs():
        import seqio

    from coda_jax.data import seqio_tasks

    task, feature_lengths = data.task, data.feature_lengths
    decoding = dataclasses.replace(decoding, max_input_length=feature_lengths["inputs"])
    decoding = with_checkpoint_defaults(decoding, model)
    predictor = Predictor(model.config, model.params, decoding, data.vocabulary)
    evaluator = seqio.Evaluator(
        seqio_tasks.provider(task).name,
        seqio_tasks.feature_converter(task),
        eval_split=data.split,
        sequence_length=dict(feature_lengths),
    )
    metrics, _ = evaluator.evaluate(
        compute_metrics=True, predict_fn=_answers(predictor, model, task)
    )
    return {
        name: {metric: float(value) for metric, value in values.items()}
        for name, values in metrics.result().items()
    }


def _answers(predictor: Predictor, model: LoadedModel, task: str) -> Callable:
    """(seqio's examples with their numbers) -> [(number, tokens of the best output)]."""

    def unpadded(inputs):  # seqio fills up with zeros, whatever the model's padding is
        filled = inputs.reshape(len(inputs), -1).any(axis=1)
        return inputs[: np.flatnonzero(filled).max(initial=-1) + 1]

    def answer(dataset):
        examples, answers = dataset.as_numpy_iterator(), []
        size = held_at_once(model, predictor.decoding)
        with tqdm(desc=task, unit="example") as progress:
            while chunk := list(itertools.islice(examples, size)):
                inputs = [unpadded(example["encoder_input_tokens"]) for _, example in chunk]
                for place, tokens in predictor(inputs, first=len(answers)):
                    answers.append((int(chunk[place][0]), tokens.tolist()))
                    progress.update()
        return answers

    return answer
