"""The commands with vocabularies of the library `tokenizers`."""

import json

from helpers import TINY
import jax
import numpy as np
import pytest
from tokenizer_folders import FOLDER

from coda_jax.commands import evaluate as evaluate_module
from coda_jax.commands.convert import convert
from coda_jax.commands.evaluate import evaluate
from coda_jax.commands.export import export as write_programs
from coda_jax.commands.loading import LoadedModel
from coda_jax.commands.predict import predict
from coda_jax.commands.train import export
from coda_jax.data import jsonl
from coda_jax.data.source import Data
from coda_jax.data.vocabularies import find_fingerprint, load_vocabulary
from coda_jax.inference import Decoding
from coda_jax.methods import Full
from coda_jax.models import init_params

CODE = TINY.replace(vocab_size=400, eos_id=2)  # CodeT5's padding is 0, its EOS 2
LENGTHS = {"inputs": 16, "targets": 8}


@pytest.fixture(name="model", scope="module")
def fixture_model():
    return LoadedModel(CODE, init_params(CODE, jax.random.key(0)), None)


@pytest.fixture(name="task")
def fixture_task(tmp_path):
    """A function that makes a JSONL task of three lines for a vocabulary."""
    texts = ("the file", "a text that is too long for sixteen tokens", "")
    lines = [{"inputs": text, "targets": text} for text in texts]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    file = str(tmp_path / "lines.jsonl")
    return lambda name: jsonl.jsonl_task(validation_file=file, vocabulary=str(FOLDER / name))


@pytest.mark.all
def test_all_files_of_a_vocabulary_go_with_the_checkpoint(model, task, tmp_path):
    config = model.config.replace(methods=(Full(),))
    data = Data(LENGTHS, task("byte_bpe"))
    export(tmp_path / "new", config, model.params, None, data, "unused", LENGTHS)
    assert find_fingerprint(tmp_path / "new") == find_fingerprint(FOLDER / "byte_bpe")
    # A vocabulary beside the base goes before that of the data.
    other = Data(LENGTHS, task("llama_5"))
    export(tmp_path / "next", config, model.params, tmp_path / "new", other, "unused", LENGTHS)
    assert find_fingerprint(tmp_path / "next") == find_fingerprint(FOLDER / "byte_bpe")
    convert(tmp_path / "new", tmp_path / "t5x", "t5x")
    assert load_vocabulary(tmp_path / "t5x") == load_vocabulary(FOLDER / "byte_bpe")


def test_predict_takes_and_checks_the_vocabulary_beside_the_checkpoint(model, tmp_path):
    (tmp_path / "inputs.txt").write_text("the file\nx\n")
    files = (str(tmp_path / "inputs.txt"), str(tmp_path / "answers.jsonl"))
    decoding = Decoding(max_input_length=16, max_decode_length=4, batch_size=2)
    beside = LoadedModel(model.config, model.params, FOLDER / "byte_bpe")
    predict(beside, *files, decoding)
    answers = [json.loads(x) for x in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["inputs"] for answer in answers] == ["the file", "x"]
    assert all(isinstance(answer["prediction"], str) for answer in answers)
    with pytest.raises(ValueError, match=r"differs from that of .*byte_bpe"):
        predict(beside, *files, decoding, vocabulary=str(FOLDER / "llama_5"))
    with pytest.raises(ValueError, match="The vocabulary has eos_id=1, the model eos_id=2"):
        predict(model, *files, decoding, vocabulary=str(FOLDER / "unigram_4"))


def test_the_vocabulary_that_is_used_is_the_one_of_the_adapter(model, task, tmp_path):
    """Also where it is given beside a base that has none."""
    (tmp_path / "inputs.txt").write_text("the file\n")
    used = find_fingerprint(FOLDER / "byte_bpe")
    trained = LoadedModel(model.config, model.params, None, {"my_run/adapter": "0" * 64})
    decoding = Decoding(max_input_length=16, max_decode_length=4, stop_strings=("x",))
    given = {"vocabulary": str(FOLDER / "byte_bpe")}
    named = f"my_run/adapter was trained with another .* used .SHA-256 0{{64}}, {used}"
    with pytest.raises(ValueError, match=named):
        predict(trained, str(tmp_path / "inputs.txt"), str(tmp_path / "x"), decoding, **given)
    with pytest.raises(ValueError, match=named):
        write_programs(trained, str(tmp_path / "x"), decoding, **given)
    with pytest.raises(ValueError, match=named):
        evaluate(trained, task("byte_bpe"), LENGTHS, decoding)
    assert not (tmp_path / "x").exists()
    known = LoadedModel(model.config, model.params, None, {"my_run/adapter": used})
    Data(LENGTHS, task("byte_bpe")).check_vocabulary(**known.vocabulary)


@pytest.mark.parametrize(("name", "pad_id"), [("llama_5", 1), ("byte_bpe", 0)])
def test_evaluate_leaves_it_to_the_model_to_pad_and_cut(model, task, monkeypatch, name, pad_id):
    """Whatever its padding is."""
    seen = []

    class Recorder:
        def __init__(self, config, params, decoding, vocabulary, placement):
            self.decoding = decoding

        def candidates(self, inputs, first):
            seen.extend(x.tolist() for x in inputs)
            length = self.decoding.max_decode_length  # the longest target's, rounded up
            assert length / 2 < max(map(len, inputs)) <= length
            return ((i, [np.resize(x, length)], [0.0]) for i, x in enumerate(inputs))

        def cuts(self):
            return []

    monkeypatch.setattr(evaluate_module, "Predictor", Recorder)
    config = model.config.replace(pad_id=pad_id)
    loaded = LoadedModel(config, model.params, None)
    metrics = evaluate(loaded, task(name), LENGTHS, Decoding())
    examples = jsonl.TASKS[task(name)].examples("validation")
    assert seen == [x["inputs"].tolist() for x in examples]
    (values,) = metrics.values()
    assert values["accuracy"] == 100  # the targets are what the inputs are
