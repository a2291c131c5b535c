"""Every kind of folder in which people have a T5: the same numbers as transformers.

`make_golden_kinds.py` makes the folders of tests/golden/kinds, and says what is in them.
"""

import json

from helpers import GOLDEN, assert_same_tree, logits
import numpy as np
import pytest

from coda_jax.checkpoints import load_hf, save_hf
from coda_jax.objectives import model_for


def has_decoder(name):
    """Whether the kind is an encoder-decoder."""
    return "greedy" in np.load(FOLDERS[name] / "expected.npz")


FOLDERS = {path.name: path for path in sorted((GOLDEN / "kinds").iterdir())}
NAMES = ("encoder", "decoder_inputs", "decoder_targets")
each_kind = pytest.mark.parametrize("name", FOLDERS)
with_decoder = pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=[] if x == "umt5_bin" else [pytest.mark.all])
        for x in FOLDERS
        if has_decoder(x)
    ],
)


@each_kind
def test_outputs_equal_those_of_transformers(name):
    """Invariant 7."""
    config, params = load_hf(FOLDERS[name])
    expected = np.load(FOLDERS[name] / "expected.npz")
    model = model_for(config)
    if not config.num_decoder_layers:
        found, theirs = model.encode(params, expected["encoder"]), expected["outputs"]
        valid = expected["encoder"] != config.pad_id
    else:
        found, theirs = (
            logits(config, params, *[expected[key] for key in NAMES]),
            expected["logits"],
        )
        valid = expected["decoder_targets"] != config.pad_id
    np.testing.assert_allclose(np.asarray(found)[valid], theirs[valid], rtol=1e-4, atol=1e-4)


@with_decoder
def test_greedy_answers_equal_those_of_transformers(name):
    config, params = load_hf(FOLDERS[name])
    expected = np.load(FOLDERS[name] / "expected.npz")
    theirs = expected["greedy"]
    steps = theirs.shape[1]
    ours = model_for(config).predict(params, expected["encoder"], max_decode_length=steps)
    np.testing.assert_array_equal(ours, theirs)


@each_kind
def test_what_is_saved_is_of_the_same_kind(name, tmp_path):
    """And the encoder alone is what transformers' class for it reads."""
    config, params = load_hf(FOLDERS[name])
    save_hf(tmp_path, config, params)
    again, same = load_hf(tmp_path)
    assert again == config
    assert_same_tree(same, params)
    raw = json.loads((tmp_path / "config.json").read_text())
    published = json.loads((FOLDERS[name] / "config.json").read_text())
    for field in ("eos_token_id", "pad_token_id", "decoder_start_token_id", "architectures"):
        if field in published:
            assert raw[field] == published[field], field
