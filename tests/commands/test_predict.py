"""What `coda predict` writes beside the best output: scores, several outputs, growing texts."""

import concurrent.futures
import json
import logging
import os
import signal
import subprocess
import sys

from helpers import config, random_params
import numpy as np
import pytest

from coda_jax.commands.loading import LoadedModel
from coda_jax.commands.predict import predict
from coda_jax.data.vocabularies import ByteVocabulary
from coda_jax.inference import Decoding, Predictor

CONFIG = config(vocab_size=384, num_encoder_layers=1, num_decoder_layers=1)
TEXTS = ["fade", "a longer input", "b"]
LENGTH = 6


@pytest.fixture(name="model")
def fixture_model(tmp_path):
    """A model of bytes that writes letters, in a folder without a vocabulary."""
    params = random_params(CONFIG)
    kernel = np.array(params["decoder"]["logits_dense"]["kernel"])
    kernel[:, [*range(100), *range(126, 384)]] *= 0.01
    params["decoder"]["logits_dense"]["kernel"] = kernel * 3
    return LoadedModel(CONFIG, params, tmp_path)


@pytest.fixture(name="inputs")
def fixture_inputs(tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n")
    return str(tmp_path / "in.txt")


def written(model, inputs, options, **arguments):
    """Returns the lines that `coda predict` writes."""
    output = model.directory / "out.jsonl"
    decoding = Decoding(max_decode_length=LENGTH, batch_size=2, **options)
    predict(model, inputs, str(output), decoding, "bytes", **arguments)
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.all
def test_several_outputs_are_written_with_their_scores(model, inputs):
    best = written(model, inputs, {"num_beams": 3})
    assert all(line.keys() == {"inputs", "prediction"} for line in best)
    lines = written(model, inputs, {"num_beams": 3, "num_return_sequences": 3}, chunk_size=2)
    for line, alone in zip(lines, best, strict=True):
        found = line["predictions"]
        assert line["prediction"] == found[0]["text"] == alone["prediction"]
        assert len({output["text"] for output in found}) == len(found) == 3
        assert [output["score"] for output in found] == sorted(
            (output["score"] for output in found), reverse=True
        )


def test_scores_of_a_single_output_are_written_where_they_are_asked_for(model, inputs):
    for line in written(model, inputs, {}, scores=True):
        (output,) = line["predictions"]
        assert output["text"] == line["prediction"] and output["score"] < 0


@pytest.mark.all
def test_draws_are_the_same_in_chunks_of_any_size(model, inputs):
    options = {"do_sample": True, "seed": 4}
    lines = written(model, inputs, options)
    assert lines == written(model, inputs, options, chunk_size=1)
    assert lines != written(model, inputs, options | {"seed": 5})


@pytest.mark.all
def test_a_text_ends_with_its_stop_text_also_behind_a_prefix_that_has_it(model, inputs):
    free = written(model, inputs, {})[0]["prediction"]
    stopped = written(model, inputs, {"stop_strings": free[2]})[0]["prediction"]
    assert stopped == free[: free.index(free[2]) + 1] and len(stopped) < len(free)
    prefix = ByteVocabulary().encode("Q.")
    line, *_ = written(model, inputs, {"decoder_prefix": prefix, "stop_strings": "."})
    assert line["prediction"].startswith("Q.") and len(line["prediction"]) == LENGTH


def test_generation_config_is_taken_and_said(model, inputs, caplog):
    with caplog.at_level(logging.WARNING):
        (model.directory / "generation_config.json").write_text('{"max_new_tokens": 2}')
        decoding = Decoding(batch_size=2)
        predict(model, inputs, str(model.directory / "out.jsonl"), decoding, "bytes")
    assert "generation_config.json: max_decode_length=2" in caplog.text
    lines = (model.directory / "out.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["prediction"]) for line in lines] == [2, 2, 2]


class Written(list):
    """Standard output that remembers its pieces."""

    write = list.append

    def flush(self):
        pass


def test_a_stream_is_a_line_for_each_input_that_grows_with_its_tokens(model, inputs, monkeypatch):
    expected = [line["prediction"] for line in written(model, inputs, {})]
    monkeypatch.setattr(sys, "stdout", Written())
    decoding = Decoding(max_decode_length=LENGTH)
    predict(model, inputs, "-", decoding, "bytes", stream=True)
    pieces = [*sys.stdout]
    monkeypatch.undo()
    assert "".join(pieces) == "".join(f"{text}\n" for text in expected)
    assert len([piece for piece in pieces if piece.strip()]) > 2 * len(TEXTS)


def test_streams_that_cannot_be_are_refused(model, inputs, tmp_path):
    with pytest.raises(ValueError, match="STREAM prints texts: OUTPUT="):
        predict(model, inputs, str(tmp_path / "x"), Decoding(), "bytes", stream=True)
    with pytest.raises(ValueError, match="one output without beams, got num_beams=2"):
        predict(model, inputs, "-", Decoding(num_beams=2), "bytes", stream=True)


@pytest.mark.parametrize(
    ("options", "arguments", "names"),
    [
        ({}, {"scores": True, "stream": True}, "SCORES, STREAM"),
        ({"num_beams": 4}, {}, r"Decoding\.max_decode_length, Decoding\.num_beams"),
    ],
)
def test_options_of_generation_are_refused_where_the_encoder_answers(
    model, inputs, options, arguments, names
):
    with pytest.raises(ValueError, match=f"the encoder answers: no .*{names}$"):
        written(model, inputs, options, embed="mean", **arguments)


def test_the_file_of_the_inputs_is_not_overwritten(model, inputs):
    (model.directory / "out.jsonl").symlink_to(inputs)
    with pytest.raises(ValueError, match=r"out\.jsonl is read: give"):
        written(model, inputs, {})


def test_a_character_is_printed_when_all_its_bytes_have_come(model, inputs, monkeypatch):
    ids = ByteVocabulary().encode("aé日!")
    monkeypatch.setattr(Predictor, "stream", lambda self, tokens, number: iter(ids))
    monkeypatch.setattr(sys, "stdout", Written())
    predict(model, inputs, "-", Decoding(), "bytes", stream=True)
    pieces = [piece for piece in sys.stdout if piece]
    monkeypatch.undo()
    assert pieces[:5] == ["a", "é", "日", "!", "\n"]


def test_the_output_is_the_older_one_until_the_new_one_is_complete(model, inputs, monkeypatch):
    complete = written(model, inputs, {})
    output = model.directory / "out.jsonl"
    output.write_text("older\n")
    seen, candidates = [], Predictor.candidates

    def interrupted(self, tokens, first=0):
        seen.append((output.read_text(), len([*model.directory.glob(".out.jsonl.*")])))
        if first == 2:
            raise KeyboardInterrupt
        return candidates(self, tokens, first)

    monkeypatch.setattr(Predictor, "candidates", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(model, inputs, {}, chunk_size=2)
    assert seen == [("older\n", 1)] * 2
    assert output.read_text() == "older\n"
    monkeypatch.undo()
    assert written(model, inputs, {}, chunk_size=2) == complete
    assert not [*model.directory.glob(".*")]


KILLED = """
import os, signal, sys
from coda_jax.commands.predict import _write

def lines():
    for number in range(5000):
        yield {"prediction": str(number)}
    os.kill(os.getpid(), signal.SIGKILL)

_write(lines(), sys.argv[1])
"""


@pytest.mark.all
def test_a_kill_leaves_the_older_output_and_the_next_call_clears_up(model, inputs):
    output = model.directory / "out.jsonl"
    output.write_text("older\n")
    killed = subprocess.run([sys.executable, "-c", KILLED, output])
    assert killed.returncode == -signal.SIGKILL
    assert output.read_text() == "older\n" and len([*model.directory.glob(".out.jsonl.*")]) == 1
    assert len(written(model, inputs, {})) == len(TEXTS)
    assert not [*model.directory.glob(".*")]


def test_a_pipe_gets_its_lines_as_they_come(model, inputs):
    os.mkfifo(model.directory / "out.jsonl")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        read = pool.submit((model.directory / "out.jsonl").read_text)
        decoding = Decoding(max_decode_length=LENGTH, batch_size=2)
        predict(model, inputs, str(model.directory / "out.jsonl"), decoding, "bytes")
        assert len(read.result().splitlines()) == len(TEXTS)
