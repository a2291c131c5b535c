"""What `coda predict` writes beside the best output: scores, several outputs, growing texts."""

import concurrent.futures
import json
import logging
import os
import signal
import subprocess
import sys
import types
from typing import ClassVar

from command_line import flags
from helpers import config, random_params
import numpy as np
import pytest
from tokenizer_folders import cleaning_tokenizer

from coda_jax.checkpoints import save_hf
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


@pytest.fixture(name="echo")
def fixture_echo(monkeypatch):
    """Answers each input with itself."""

    def candidates(self, inputs, first=0, adapters=None):
        return ((index, x[None], np.array([-0.5])) for index, x in enumerate(inputs))

    monkeypatch.setattr(Predictor, "candidates", candidates)


class Written(list):
    """Standard output that remembers its pieces."""

    write = list.append

    def flush(self):
        pass


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
        assert all(output["score"] < 0 for output in found) and "score" not in line
    for line in written(model, inputs, {"num_beams": 3, "num_return_sequences": 3}, scores=True):
        assert line["score"] == line["predictions"][0]["score"]


def test_a_table_is_answered_with_its_other_columns_and_scores(model, tmp_path, echo):
    (tmp_path / "in.csv").write_text('id,a,b\n7,x,"y\nz"\n8,"1,2",\n')
    decoding, output = Decoding(max_decode_length=LENGTH), tmp_path / "out.tsv"
    arguments = {"scores": True, "field": "{b}-{a}"}
    predict(model, str(tmp_path / "in.csv"), str(output), decoding, "bytes", **arguments)
    assert output.read_text() == (
        'id\ta\tb\tinputs\tprediction\tscore\n7\tx\t"y\nz"\t"y\nz-x"\t"y\nz-x"\t-0.5\n'
        "8\t1,2\t\t-1,2\t-1,2\t-0.5\n"
    )


def test_a_line_of_standard_input_is_answered_before_the_next_is_read(model, monkeypatch, echo):
    printed, seen = Written(), []

    class Typed:
        """Two lines, then one, then the end."""

        parts: ClassVar = [b"a\nb\n", b"c\n", b""]

        def read1(self, size):
            seen.append(len(printed))
            return self.parts.pop(0)

    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=Typed()))
    monkeypatch.setattr(sys, "stdout", printed)
    predict(model, "-", "-", Decoding(max_decode_length=LENGTH), "bytes")
    monkeypatch.undo()
    assert [json.loads(line) for line in printed] == [
        {"inputs": text, "prediction": text} for text in "abc"
    ]
    assert seen == [0, 2, 3]


@pytest.mark.all
def test_a_process_answers_each_line_of_a_pipe_as_it_comes(tmp_path):
    save_hf(tmp_path, CONFIG, random_params(CONFIG))
    given = {"INITIAL_CHECKPOINT_PATH": tmp_path, "VOCABULARY": "bytes", "INPUT": "-"}
    given |= {"Decoding.max_decode_length": LENGTH}
    command = [sys.executable, "-m", "coda_jax.cli", "predict", *flags(["runs/predict.gin"], given)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as process:
        for text in TEXTS:  # each is asked when the one before is answered
            process.stdin.write(f"{text}\n")
            assert json.loads(process.stdout.readline())["inputs"] == text
        rest, errors = process.communicate()
    assert (rest, process.returncode) == ("", 0), errors


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
    monkeypatch.setattr(Predictor, "stream", lambda self, tokens, number, adapter: iter(ids))
    monkeypatch.setattr(sys, "stdout", Written())
    predict(model, inputs, "-", Decoding(), "bytes", stream=True)
    pieces = [piece for piece in sys.stdout if piece]
    monkeypatch.undo()
    assert pieces[:5] == ["a", "é", "日", "!", "\n"]


def test_spaces_that_a_tokenizer_takes_away_are_not_printed(model, inputs, monkeypatch):
    folder = cleaning_tokenizer(model.directory / "tokenizer")
    ids = [*range(2, 10), 1]
    monkeypatch.setattr(Predictor, "stream", lambda self, tokens, number, adapter: iter(ids))
    monkeypatch.setattr(sys, "stdout", Written())
    predict(model, inputs, "-", Decoding(), str(folder), stream=True)
    pieces = [*sys.stdout]
    monkeypatch.undo()
    assert "".join(pieces) == "hello. It's isn't.\n" * len(TEXTS)
    assert [piece for piece in pieces if piece][:2] == ["hello", "."]


@pytest.mark.parametrize("stream", [False, True])
def test_a_font_for_texts_is_refused(model, inputs, stream):
    with pytest.raises(ValueError, match=r"HEADER_FONT=.* has no effect"):
        predict(model, inputs, "-", Decoding(), "bytes", font="a.ttf", stream=stream)


def test_the_output_is_the_older_one_until_the_new_one_is_complete(model, inputs, monkeypatch):
    complete = written(model, inputs, {})
    output = model.directory / "out.jsonl"
    output.write_text("older\n")
    seen, candidates = [], Predictor.candidates

    def interrupted(self, tokens, first=0, adapters=None):
        seen.append((output.read_text(), len([*model.directory.glob(".out.jsonl.*")])))
        if first == 2:
            raise KeyboardInterrupt
        return candidates(self, tokens, first, adapters)

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
