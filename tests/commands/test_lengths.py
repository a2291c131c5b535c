"""How long inputs and outputs may be, and that whatever is cut is said."""

import dataclasses
import json

from helpers import TINY_SPEECH, config, random_params
import numpy as np
import pytest

from coda_jax.commands.evaluate import evaluate
from coda_jax.commands.loading import LoadedModel, with_checkpoint_defaults
from coda_jax.commands.predict import predict
from coda_jax.data import jsonl
from coda_jax.inference import Decoding

CONFIG = config(vocab_size=384, num_encoder_layers=1, num_decoder_layers=1)
TRAINED = {"inputs": 40, "targets": 9}


@pytest.fixture(name="model", scope="module")
def fixture_model():
    """A model of bytes that never ends an output."""
    params = random_params(CONFIG)
    kernel = np.array(params["decoder"]["logits_dense"]["kernel"])
    kernel[:, :100] *= 0.01
    params["decoder"]["logits_dense"]["kernel"] = kernel * 3
    return LoadedModel(CONFIG, params, None)


def lengths_of(decoding):
    return decoding.max_input_length, decoding.max_decode_length


def test_lengths_are_those_said_or_of_the_training_or_of_the_checkpoint(tmp_path):
    plain = LoadedModel(CONFIG, {}, tmp_path)
    trained = dataclasses.replace(plain, lengths=TRAINED)
    assert lengths_of(with_checkpoint_defaults(Decoding(), plain)) == (512, 64)
    assert lengths_of(with_checkpoint_defaults(Decoding(), trained)) == (40, 16)  # 9, rounded up
    said = Decoding(max_input_length=7, max_decode_length=5)
    assert lengths_of(with_checkpoint_defaults(said, trained, 100)) == (7, 5)
    assert lengths_of(with_checkpoint_defaults(Decoding(), trained, 100)) == (
        40,
        128,
    )  # of evaluation
    prefixed = Decoding(decoder_prefix=tuple(range(5, 13)))
    assert lengths_of(with_checkpoint_defaults(prefixed, trained)) == (40, 32)  # 8 more
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 20}')
    assert lengths_of(with_checkpoint_defaults(Decoding(), plain)) == (512, 20)
    assert lengths_of(with_checkpoint_defaults(Decoding(), trained)) == (40, 16)
    speech = LoadedModel(TINY_SPEECH, {}, None, lengths={"inputs": 90, "targets": 9})
    assert lengths_of(with_checkpoint_defaults(Decoding(), speech)) == (
        90,
        90,
    )  # a token a frame at most


def test_predict_says_what_it_cut(model, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("a\n" + "b" * 50 + "\n")
    trained = LoadedModel(CONFIG, model.params, None, lengths=TRAINED)
    output = tmp_path / "new" / "folder" / "out.jsonl"
    predict(trained, str(tmp_path / "in.txt"), str(output), Decoding(batch_size=2), "bytes")
    assert len(output.read_text().splitlines()) == 2
    said = capsys.readouterr().err
    assert "1 of 2 inputs were longer than 40 tokens and were cut: " in said
    assert "--gin.Decoding.max_input_length=51 keeps all" in said
    assert "2 of 2 outputs were cut at 16 tokens: --gin.Decoding.max_decode_length=32" in said
    with pytest.raises(ValueError, match="is a folder: name a file"):
        predict(trained, "unread", str(tmp_path), Decoding(), "bytes")


def test_evaluate_takes_the_only_split_and_decodes_as_long_as_its_targets(model, tmp_path, capsys):
    lines = [{"inputs": "a", "targets": "b" * 20}, {"inputs": "c" * 30, "targets": "d"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = jsonl.jsonl_task(test_file=str(tmp_path / "test.jsonl"), vocabulary="bytes")
    metrics = tmp_path / "new" / "metrics.json"
    lengths = {"inputs": 10}
    found = evaluate(model, task, lengths, Decoding(batch_size=2), output=str(metrics))
    assert found == {task: {"accuracy": 0}} == json.loads(metrics.read_text())
    said = capsys.readouterr().err
    assert f"evaluating {tmp_path / 'test.jsonl'}" in said
    assert "1 of 2 inputs were longer than 10 tokens" in said
    assert "2 of 2 outputs were cut at 32 tokens" in said
    with pytest.raises(ValueError, match="is a folder: name a file"):
        evaluate(model, task, lengths, Decoding(), output=str(tmp_path))
