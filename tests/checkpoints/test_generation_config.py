"""generation_config.json: taken where nothing is said, as transformers means it."""

import json
import logging

from helpers import TINY, config, random_params
import pytest

from coda_jax.checkpoints.generation_config import read_generation_config
from coda_jax.commands.loading import LoadedModel, completed
from coda_jax.inference import Decoding
from coda_jax.objectives import Generation

PLAIN = {
    "_from_model_config": True,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "transformers_version": "5.2.0",
    "use_cache": True,
    "output_attentions": False,
    "num_beam_groups": 1,
    "typical_p": 1.0,
    "bad_words_ids": None,
}


@pytest.fixture(name="read")
def fixture_read(tmp_path):
    """Returns a function: (fields) -> the options of a folder with them."""

    def read(fields, cfg=TINY):
        (tmp_path / "generation_config.json").write_text(json.dumps(fields))
        return read_generation_config(tmp_path, cfg)

    return read


def taken(fields, **said):
    """Returns (the resolved options, what was taken) of options over a file's."""
    options, changed = Generation(**said).with_defaults(fields)
    return options.resolved(), changed


def test_what_transformers_writes_by_default_changes_nothing(read, tmp_path, caplog):
    assert read_generation_config(tmp_path, TINY) == {}  # without a file
    with caplog.at_level(logging.WARNING):
        assert read(PLAIN) == {}
    assert not caplog.records
    defaults = {"num_beams": 1, "do_sample": False, "top_k": 50, "temperature": 1.0}
    assert taken(defaults, num_beams=4) == (Generation(num_beams=4).resolved(), {})


def test_lengths_count_as_in_transformers(read):
    assert read({"max_length": 20, "min_length": 5}) == {
        "max_decode_length": 19,
        "min_new_tokens": 4,
    }
    assert read({"max_new_tokens": 7, "max_length": 20, "min_new_tokens": 3, "min_length": 9}) == {
        "max_decode_length": 7,
        "min_new_tokens": 3,
    }
    options, _ = taken(read({"min_length": 31}), max_decode_length=8)
    assert options.min_new_tokens == 8


def test_beams_of_the_file_follow_transformers_rules(read):
    options, changed = taken(read({"num_beams": 4, "early_stopping": True}))
    assert (options.num_beams, options.length_penalty, options.early_stopping) == (4, 1.0, True)
    assert options.alpha is None
    assert changed == {"num_beams": 4, "length_penalty": 1.0, "early_stopping": True}
    options, changed = taken(read({"length_penalty": 2.0}), num_beams=2)
    assert (options.length_penalty, changed) == (2.0, {"length_penalty": 2.0})


def test_what_is_said_goes_before_the_file(read):
    fields = read({"num_beams": 4, "length_penalty": 2.0, "max_new_tokens": 9})
    options, changed = taken(fields, alpha=0.9, max_decode_length=5)
    assert (options.num_beams, options.alpha, options.length_penalty) == (4, 0.9, None)
    assert changed == {"num_beams": 4}
    options, changed = taken(fields, num_beams=1)
    assert changed == {"max_decode_length": 9} and options.num_beams == 1
    options, changed = taken({"forced_bos_token_id": 3}, decoder_prefix=(5,))
    assert not changed


def test_options_of_sampling_are_taken_with_sampling_only(read):
    fields = read({"do_sample": True, "temperature": 0.7, "top_p": 0.9})
    options, _ = taken(fields)
    assert (options.do_sample, options.temperature, options.top_k, options.top_p) == (
        *(True, 0.7, 50, 0.9),
    )
    assert taken(fields, do_sample=False)[1] == {}
    assert taken({"temperature": 0.7})[1] == {}


def test_unknown_fields_are_named_and_other_ids_refused(read, caplog):
    with caplog.at_level(logging.WARNING):
        assert read({"penalty_alpha": 0.6, "encoder_no_repeat_ngram_size": 0}) == {}
    assert "not handled, outputs may differ: {'penalty_alpha': 0.6}" in caplog.text
    with pytest.raises(ValueError, match=r"eos_token_id=\[1, 5\], but the model's config says 1"):
        read({"eos_token_id": [1, 5]})
    assert read({"eos_token_id": [1]}) == {}
    assert read({"pad_token_id": 2, "eos_token_id": 3}, config(pad_id=2, eos_id=3)) == {}
    with pytest.raises(ValueError, match="max_length='long' is no int"):
        read({"max_length": "long"})
    with pytest.raises(ValueError, match="length_penalty=True is no int or float"):
        read({"length_penalty": True})


def test_a_model_says_what_it_takes(tmp_path, read, caplog):
    read({"num_beams": 2, "stop_strings": [".", "\n"], "no_repeat_ngram_size": 3})
    model = LoadedModel(TINY, random_params(TINY), tmp_path)
    with caplog.at_level(logging.WARNING):
        decoding = completed(Decoding(no_repeat_ngram_size=0, batch_size=3), model)
    assert (decoding.num_beams, decoding.no_repeat_ngram_size, decoding.batch_size) == (2, 0, 3)
    assert decoding.stop_strings == (".", "\n")
    said = "num_beams=2, stop_strings=('.', '\\n'), length_penalty=1.0"
    assert f"{tmp_path}/generation_config.json: {said}" in caplog.text
    assert completed(Decoding(), LoadedModel(TINY, {}, None)) == Decoding().resolved()
