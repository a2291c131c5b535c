"""What `coda predict` writes of an encoder: labels and numbers of a head, or its outputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import math
import pathlib
import sys
from typing import Any

import numpy as np
from tqdm import tqdm

from coda_jax import processes
from coda_jax.checkpoints.tensor_files import write_tensors
from coda_jax.commands.loading import LoadedModel
from coda_jax.commands.many_adapters import names_in
from coda_jax.commands.marking import Marks, line
from coda_jax.data.reports import say
from coda_jax.inference import Decoding, Encodings
from coda_jax.objectives import model_for
from coda_jax.sharding import Placement

EMBEDDING = "embeddings"  # the tensor with a vector for each input


def descriptions(
    model: LoadedModel,
    decoding: Decoding,
    chunks: Iterable,
    encode: Callable,
    placement: Placement | None = None,
    scores: bool = False,
    marks: Marks | None = None,
) -> Iterator[dict[str, Any]]:
    """The input and its "prediction" for each record, in their order.

    Args:
        model: an encoder with a head.
        decoding: the size of batches and the longest input.
        chunks: lists of records.
        encode: (record) -> its input.
        placement: the devices; None for all.
        scores: whether the logarithm of a label's probability is written as its "score".
        marks: of inputs out of distribution; None: there are none.
    """
    describe = model_for(model.config).describe
    encoded = _encoded(model, decoding, chunks, encode, None, placement, marks)
    for record, outputs, mark in encoded:
        answer = describe(outputs)
        if scores:
            answer["score"] = math.log(answer["scores"][answer["prediction"]])
        yield line(record, answer, mark)


def write_embeddings(
    model: LoadedModel,
    decoding: Decoding,
    chunks: Iterable,
    encode: Callable,
    output: str,
    embed: str,
    placement: Placement | None = None,
) -> None:
    """Writes the encoder's outputs as safetensors, float32.

    Args:
        model: any with an encoder.
        decoding: the size of batches and the longest input.
        chunks: lists of records.
        encode: (record) -> its input.
        output: the file.
        embed: "mean" for one tensor "embeddings" [inputs, D]; "tokens" for a tensor [n, D] for
            each input, named by its number from 0.
        placement: the devices; None for all.

    Raises:
        ValueError: the output is standard output.
    """
    if output == "-":
        raise ValueError("embeddings are written to a file: give OUTPUT, such as out.safetensors")
    encoded = _encoded(model, decoding, chunks, encode, embed, placement)
    found = [outputs for _, outputs, _ in encoded]
    one = {EMBEDDING: np.stack(found)} if embed == "mean" else None
    if processes.is_first():
        write_tensors(pathlib.Path(output), one or {str(i): x for i, x in enumerate(found)})


def _encoded(
    model: LoadedModel,
    decoding: Decoding,
    chunks: Iterable,
    encode: Callable,
    embed: str | None,
    placement: Placement | None,
    marks: Marks | None = None,
) -> Iterable[tuple[Mapping, np.ndarray, Mapping | None]]:
    """(record, outputs, mark) of each input, in their order."""
    encodings = Encodings(model.config, model.params, decoding, embed, placement, model.adapters)
    silent = not processes.is_first()
    with tqdm(unit="example", file=sys.stderr, disable=silent) as progress:
        done = 0
        for chunk in chunks:
            outputs = {}
            inputs = [encode(record) for record in chunk]
            for index, found in encodings(inputs, done, names_in(model, chunk)):
                outputs[index] = found
                progress.update()
            marked = marks(inputs, done) if marks else [None] * len(chunk)
            for index, record in enumerate(chunk):
                yield record, outputs[index], marked[index]
            done += len(chunk)
    for said in encodings.cuts():
        say(said)
