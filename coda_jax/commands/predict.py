"""`coda predict`: answers to the inputs of a file."""

from collections.abc import Iterable, Iterator, Mapping
import functools
import os
import re
import sys
from typing import Any, TextIO

from tqdm import tqdm

from coda_jax import checks, files, processes
from coda_jax.commands.encodings import descriptions, write_embeddings
from coda_jax.commands.loading import (
    LoadedModel,
    held_at_once,
    with_checkpoint_defaults,
)
from coda_jax.commands.many_adapters import names_in, problem_of
from coda_jax.commands.marking import Marking, line
from coda_jax.data.reports import say
from coda_jax.data.rows import read_requests, written
from coda_jax.data.vocabularies import check_vocabulary, identity, load_vocabulary
from coda_jax.inference import Decoding, Predictor
from coda_jax.objectives import model_for
from coda_jax.serving.answers import outputs_of, texts_of
from coda_jax.sharding import Placement

# What later tokens may change of a text's end: a character of which not all bytes have come, and a
# space that a tokenizer takes away before a full stop or the end of "isn't" and "it's".
_UNSETTLED = re.compile(r"(\s+('\w{0,2}|n'?)?)?\N{REPLACEMENT CHARACTER}*$")


def predict(
    model: LoadedModel,
    inputs: str,
    output: str,
    decoding: Decoding,
    vocabulary: str | None = None,
    chunk_size: int | None = None,
    font: str | None = None,
    scores: bool = False,
    stream: bool = False,
    embed: str | None = None,
    placement: Placement | None = None,
    field: str | None = None,
    marking: Marking | None = None,
) -> None:
    """Writes a row with all that was asked and its "prediction" for each input, in their order.

    Of several outputs "predictions" lists all, the best first, as {"text", "score"}; for the score
    see `Predictor.candidates`. A text with a stop text ends with it. Heads give labels or numbers.

    Args:
        model: what answers.
        inputs: a file, or "-" for standard input, whose lines are answered as they come; see
            `rows.read_requests`. Rows have "inputs", a text, or the file of an "image", with a
            question as "header", or of "audio".
        output: the file to write, which is there when it is complete, see `rows.written`; or "-"
            for JSONL on standard output.
        decoding: how outputs are made; what it leaves open, the adapter's training or
            generation_config.json may say. What is cut is counted and said.
        vocabulary: folder or file of the vocabulary, or "bytes"; None: beside the checkpoint.
        chunk_size: inputs held at once; None for 4,096 texts or 8 batches of images or audio.
        font: file of the font of headers; None for the default.
        scores: whether the "score" of each prediction that is no number is written, too.
        stream: print only the texts instead, each on a line that grows with its tokens.
        embed: "mean" or "tokens" to write the encoder's outputs instead; see `encodings`.
        placement: the devices; None for all, which share the rows of a batch.
        field: what of a row is its input, see `rows.Field`; None for the field named above.
        marking: by what inputs out of distribution are marked; their answers are null.

    Raises:
        ValueError: an option has no effect, or cannot be with `stream`; inputs are the output.
    """
    marking, others = marking or Marking(), {"STREAM": stream, "EMBED": embed}
    _check_options(inputs, output, vocabulary, font, scores, stream, chunk_size, marking)
    if embed is not None or model_for(model.config).describes:
        scored = embed is None and getattr(model.config, "labels", ())
        decoding.check_encodes(SCORES=scores and not scored, STREAM=stream)
    marks, decoding = marking.start(model, decoding, placement, **others)
    vocabulary = load_vocabulary(vocabulary or model.directory)
    check_vocabulary(identity(vocabulary), **model.vocabulary)
    encode = model.inputs.encoder(model.config, vocabulary, decoding.max_input_length, font)
    asked = read_requests(inputs, model.inputs.field, field, problem_of(model))
    chunks = _chunks(asked, chunk_size or held_at_once(model, decoding))
    if embed is not None:
        write_embeddings(model, decoding, chunks, encode, output, embed, placement)
    elif model_for(model.config).describes:
        _write(descriptions(model, decoding, chunks, encode, placement, scores, marks), output)
    else:
        how = scores, stream, marks
        _generate(model, decoding, vocabulary, placement, chunks, encode, output, *how)


def _check_options(inputs, output, vocabulary, font, scores, stream, chunk_size, marking) -> None:
    checks.paths(INPUT=inputs, OUTPUT=output, VOCABULARY=vocabulary, HEADER_FONT=font)
    checks.flag("SCORES", scores)
    checks.flag("STREAM", stream)
    checks.Maybe(checks.COUNT)("chunk_size", chunk_size)
    if processes.are_several() and (inputs == "-" or stream):
        given = "INPUT='-'" if inputs == "-" else "STREAM=True"
        raise ValueError(f"{given} is for one process: several answer a file into a file")
    if output != "-":
        files.prepare(output, inputs, *filter(None, [marking.detector]))


def _generate(
    model, decoding, vocabulary, placement, chunks, encode, output, scores, stream, marks
) -> None:
    """Writes or prints what a model generates."""
    decoding = with_checkpoint_defaults(decoding, model)
    predictor = Predictor(
        model.config, model.params, decoding, vocabulary, placement, model.adapters
    )
    names = functools.partial(names_in, model)
    if stream:
        if output != "-" or scores:
            raise ValueError(
                f"STREAM prints texts: OUTPUT={output!r} and SCORES={scores} have no effect"
            )
        records = (record for chunk in chunks for record in chunk)
        _print_growing(predictor, vocabulary, encode, records, names)
    else:
        _write(_answers(predictor, vocabulary, encode, chunks, names, scores, marks), output)
    for said in predictor.cuts():
        say(said)


def _chunks(asked: Iterable[list], size: int) -> Iterator[list]:
    """Lists of at most so many."""
    for records in asked:
        for start in range(0, len(records), size):
            yield records[start : start + size]


def _write(lines: Iterable[Mapping[str, Any]], output: str) -> None:
    """Writes rows as they come: to standard output, for "-", or to a new file.

    The new file takes the place of an older one when it is complete.
    """
    if output == "-":
        _write_each(written(lines, output), sys.stdout)
        return
    new = files.atomic(output if processes.is_first() else os.devnull)
    with new as path, open(path, "w", encoding="utf-8") as file:
        _write_each(written(lines, output), file)


def _write_each(texts: Iterable[str], file: TextIO) -> None:
    for text in texts:
        file.write(text)
        file.flush()


def _answers(
    predictor, vocabulary, encode, chunks, names, scores, marks
) -> Iterator[dict[str, Any]]:
    """The lines of all chunks of records, whose adapters `names` says."""
    text, done = texts_of(predictor.decoding, vocabulary), 0
    silent = not processes.is_first()
    with tqdm(unit="example", file=sys.stderr, disable=silent) as progress:
        for chunk in chunks:
            answers = {}
            inputs = list(map(encode, chunk))
            for index, *found in predictor.candidates(inputs, done, names(chunk)):
                answers[index] = outputs_of(text, *found)
                progress.update()
            marked = marks(inputs, done) if marks else [None] * len(chunk)
            for index, record in enumerate(chunk):
                best = answers[index][0]
                answer = {"prediction": best["text"]}
                if scores:
                    answer["score"] = best["score"]
                if predictor.decoding.num_return_sequences > 1:
                    answer["predictions"] = answers[index]
                yield line(record, answer, marked[index])
            done += len(chunk)


def _print_growing(predictor, vocabulary, encode, records, names) -> None:
    """Prints the text of each output as its tokens come."""
    text = texts_of(predictor.decoding, vocabulary)
    for number, record in enumerate(records):
        found, shown = [], ""
        (adapter,) = names([record]) or [None]
        for token in predictor.stream(encode(record), number, adapter):
            found.append(token)
            grown = _UNSETTLED.sub("", text(found))
            if grown.startswith(shown):
                print(grown[len(shown) :], end="", flush=True)
                shown = grown
        print(text(found).removeprefix(shown), flush=True)
