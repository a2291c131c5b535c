"""`coda predict`: answers to the inputs of a file."""

import contextlib
import itertools
import json
import sys

from absl import logging
from tqdm import tqdm

from coda_jax.commands.evaluate import held_at_once
from coda_jax.commands.loading import LoadedModel
from coda_jax.data.vocabularies import check_vocabulary, identity, load_vocabulary
from coda_jax.inference import Decoding, Predictor
from coda_jax.models import family_of


def predict(
    model: LoadedModel,
    inputs: str,
    output: str,
    decoding: Decoding,
    vocabulary: str | None = None,
    chunk_size: int | None = None,
    font: str | None = None,
) -> None:
    """Writes one JSON line with the input and its "prediction" for each, in their order.

    Args:
        model: what answers.
        inputs: a text file with one input a line, a .jsonl file, or "-" for text lines from
            standard input. An input is a text or the file of an image or a recording; lines of JSON
            have "inputs", or "image" and, as models for questions need it, "header".
        output: the JSONL file to write, or "-" for standard output.
        decoding: how outputs are searched for.
        vocabulary: folder or file of the vocabulary, or "bytes"; None: beside the checkpoint.
        chunk_size: inputs held at once; None for 4,096 texts or 8 batches of images or audio.
        font: file of the font of headers; None for that of `data.images`.
    """
    vocabulary = load_vocabulary(vocabulary or model.directory)
    check_vocabulary(identity(vocabulary), **model.vocabulary)
    predictor = Predictor(model.config, model.params, decoding)
    requests = family_of(model.config).inputs
    records = iter(requests.read(inputs))
    encode = requests.encoder(model.config, vocabulary, decoding.max_input_length, font)
    chunk_size = chunk_size or held_at_once(model, decoding)
    with contextlib.ExitStack() as stack:
        file = sys.stdout if output == "-" else stack.enter_context(open(output, "w"))
        progress = stack.enter_context(tqdm(unit="example", file=sys.stderr))
        while chunk := list(itertools.islice(records, chunk_size)):
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
