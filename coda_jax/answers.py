"""What a loaded model answers: the metrics of a task, and predictions for files.

The functions here are the ones that gin files name. They import seqio when they are called.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import itertools
import json
import sys
from typing import Any

from absl import logging
import numpy as np
from tqdm import tqdm

from coda_jax import models
from coda_jax.inference import Decoding, Predictor
from coda_jax.network import T5Config
from coda_jax.run_files import write_atomically
from coda_jax.runs import LoadedModel
from coda_jax.speech import W2vBertConfig
from coda_jax.vision import Pix2StructConfig


def evaluate(
    model: LoadedModel,
    task: str,
    feature_lengths: Mapping[str, int],
    decoding: Decoding,
    split: str = "validation",
    output: str | None = None,
) -> dict[str, dict[str, float]]:
    """`coda evaluate`: the metrics of a seqio task, from decoded outputs.

    Args:
        model: what to evaluate.
        task: name of a registered seqio task or mixture.
        feature_lengths: the most tokens of "inputs" and of "targets".
        decoding: how outputs are searched for.
        split: of the task.
        output: JSON file for the metrics.

    Returns:
        {task: {metric: value}}.
    """
    import seqio

    from coda_jax import data

    data.check_vocabulary(data.task_vocabulary(task), model.config.vocab_size, model.directory)
    decoding = dataclasses.replace(decoding, max_input_length=feature_lengths["inputs"])
    predictor = Predictor(models.for_config(model.config), model.params, decoding)
    module = model.config.network()

    def unpadded(inputs):
        return inputs[: np.flatnonzero(module.input_mask(inputs)).max(initial=-1) + 1]

    def predict(dataset):
        examples, answers = dataset.as_numpy_iterator(), []
        with tqdm(desc=task, unit="example") as progress:
            while chunk := list(itertools.islice(examples, _chunk_size(model, decoding))):
                inputs = [unpadded(example["encoder_input_tokens"]) for _, example in chunk]
                for place, tokens in predictor(inputs):
                    answers.append((int(chunk[place][0]), tokens.tolist()))
                    progress.update()
        return answers

    evaluator = seqio.Evaluator(
        task,
        data.feature_converter(task),
        eval_split=split,
        sequence_length=dict(feature_lengths),
    )
    metrics, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
    metrics = {
        name: {metric: float(value) for metric, value in values.items()}
        for name, values in metrics.result().items()
    }
    report = json.dumps(metrics, indent=2)
    print(report)
    if output is not None:
        write_atomically(output, report + "\n")
    return metrics


def predict(
    model: LoadedModel,
    inputs: str,
    output: str,
    decoding: Decoding,
    vocabulary: str | None = None,
    chunk_size: int | None = None,
    font: str | None = None,
) -> None:
    """`coda predict`: one JSON line with the input and its "prediction" for each, in their order.

    Args:
        model: what answers.
        inputs: a text file with one input a line, a .jsonl file, or "-" for text lines from
            standard input. An input is a text or the file of an image or a recording; lines of JSON
            have "inputs", or "image" and, as models for questions need it, "header".
        output: the JSONL file to write, or "-" for standard output.
        decoding: how outputs are searched for.
        vocabulary: folder or file of the vocabulary, or "bytes"; None: beside the checkpoint.
        chunk_size: inputs held at once; None for 4,096 texts or 8 batches of images or audio.
        font: file of the font of headers; None for that of `tasks.images`.
    """
    from coda_jax import data

    vocabulary = data.load_vocabulary(vocabulary or model.directory)
    data.check_vocabulary(vocabulary, model.config.vocab_size, model.directory)
    predictor = Predictor(models.for_config(model.config), model.params, decoding)
    records, encode = _requests(model.config, vocabulary, inputs, decoding, font)
    with contextlib.ExitStack() as stack:
        file = sys.stdout if output == "-" else stack.enter_context(open(output, "w"))
        progress = stack.enter_context(tqdm(unit="example", file=sys.stderr))
        while chunk := list(itertools.islice(records, chunk_size or _chunk_size(model, decoding))):
            answers = {}
            for index, answer in predictor([encode(record) for record in chunk]):
                answers[index] = vocabulary.decode(answer.tolist())
                progress.update()
            for index, record in enumerate(chunk):
                line = {**record, "prediction": answers[index]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    if predictor.num_truncated:
        logging.warning(
            "%d inputs were longer than %d tokens and were cut",
            predictor.num_truncated,
            decoding.max_input_length,
        )


def _chunk_size(model: LoadedModel, decoding: Decoding) -> int:
    """Inputs held at once: texts are worth sorting by length, images and audio are large."""
    large = isinstance(model.config, Pix2StructConfig | W2vBertConfig)
    return 8 * decoding.batch_size if large else 4096


def _requests(
    config: T5Config, vocabulary: Any, inputs: str, decoding: Decoding, font: str | None
) -> tuple[Iterator[dict[str, str]], Callable[[Mapping[str, str]], np.ndarray]]:
    """What is asked, and the function that makes a request the model's input."""
    from coda_jax import data

    if isinstance(config, W2vBertConfig):
        from coda_jax.tasks import audio

        records = ({"audio": path} for path in data.read_inputs(inputs))
        return records, lambda record: audio.frames(audio.read_audio(record["audio"])).numpy()
    if not isinstance(config, Pix2StructConfig):
        records = ({"inputs": text} for text in data.read_inputs(inputs))
        return records, lambda record: np.array(
            [*vocabulary.encode(record["inputs"]), vocabulary.eos_id]
        )
    from coda_jax.tasks import images

    def encode(record):
        image = images.read_image(record["image"], record.get("header", ""), font)
        return images.patches(image, decoding.max_input_length, config.patch_size).numpy()

    return iter(images.read_requests(inputs)), encode
