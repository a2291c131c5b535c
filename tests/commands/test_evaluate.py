"""What `coda evaluate` makes of outputs that a stop text ends."""

import json

from helpers import config, random_params
import numpy as np
from tokenizer_folders import cleaning_tokenizer

from coda_jax.commands.evaluate import evaluate
from coda_jax.commands.loading import LoadedModel
from coda_jax.data.jsonl import jsonl_task
from coda_jax.inference import Decoding, Predictor

CONFIG = config(vocab_size=12, num_encoder_layers=1, num_decoder_layers=1)


def test_outputs_end_with_their_stop_text_also_within_a_token(tmp_path, monkeypatch):
    def candidates(self, inputs, first=0, adapters=None):
        return ((index, np.array(x)[None], np.array([-0.5])) for index, x in enumerate(inputs))

    monkeypatch.setattr(Predictor, "candidates", candidates)  # answers each input with itself
    folder = cleaning_tokenizer(tmp_path / "tokenizer")
    lines = [{"inputs": "hello It", "targets": "hel"}, {"inputs": "It", "targets": "It"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = jsonl_task(validation_file=str(tmp_path / "in.jsonl"), vocabulary=str(folder))
    model = LoadedModel(CONFIG, random_params(CONFIG), tmp_path)
    decoding, output = Decoding(stop_strings=("l",)), tmp_path / "each.jsonl"
    found = evaluate(model, task, None, decoding, predictions=str(output))
    assert found == {task: {"accuracy": 100.0}}
    each = [json.loads(line)["prediction"] for line in output.read_text().splitlines()]
    assert each == ["hel", "It"]
