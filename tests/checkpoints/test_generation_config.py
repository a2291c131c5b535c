"""generation_config.json: taken where nothing is said, as transformers means it."""

import json
import logging

from helpers import TINY, config, random_params
import pytest

from coda_jax.checkpoints.generation_config import read_generation_config
from coda_jax.commands.loading import LoadedModel, with_checkpoint_defaults
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


def test_without_the_file_config_json_says_it_as_in_transformers(read, tmp_path, caplog):
    old = {"model_type": "t5", "num_beams": 4, "max_length": 20, "typical_p": 0.9}
    old["length_penalty"] = 2
    (tmp_path / "config.json").write_text(json.dumps({**PLAIN, **old}))
    with caplog.at_level(logging.WARNING):
        made = with_checkpoint_defaults(Decoding(), LoadedModel(TINY, {}, tmp_path))
    assert (made.num_beams, made.length_penalty) == (4, 2)
    assert made.max_decode_length == Decoding().resolved().max_decode_length  # 20 says nothing
    assert f"{tmp_path}/config.json: num_beams=4, length_penalty=2" in caplog.text
    assert "not handled, outputs may differ: {'typical_p': 0.9}" in caplog.text
    assert read({"num_beams": 2}) == {"num_beams": 2}  # the file alone, where there is one


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


def test_lengths_count_a_prefix_as_in_transformers(read, tmp_path):
    read({"max_new_tokens": 3, "min_length": 6})
    assert read_generation_config(tmp_path, TINY, 3) == {
        "max_decode_length": 6,
        "min_new_tokens": 2,
    }
    model = LoadedModel(TINY, {}, tmp_path)
    options = with_checkpoint_defaults(Decoding(decoder_prefix=(5, 6, 7)), model)
    assert (options.max_decode_length, options.min_new_tokens) == (6, 2)
    read({"max_length": 8, "min_length": 2})
    assert read_generation_config(tmp_path, TINY, 3) == {
        "max_decode_length": 7,
        "min_new_tokens": 0,
    }


def test_what_is_wrong_with_the_file_names_it(read, tmp_path):
    model = LoadedModel(TINY, {}, tmp_path)
    for fields, message in (
        ({"max_length": 1}, "max_decode_length must be a whole number of at least 1, got 0"),
        ({"top_p": 2, "do_sample": True}, "top_p must be .*, got 2"),
        (
            {"num_beams": 4, "do_sample": True},
            "num_beams=4 .* do_sample=True draws: set num_beams=1 or do_sample=False",
        ),
    ):
        read(fields)
        with pytest.raises(
            ValueError, match=rf"{message}.*\({tmp_path}/generation_config.json asks for"
        ):
            with_checkpoint_defaults(Decoding(), model)
    read({})
    with pytest.raises(ValueError, match=r"do_sample=False$"):
        with_checkpoint_defaults(Decoding(num_beams=4, do_sample=True), model)


def test_of_a_search_and_a_draw_the_one_that_is_asked_for_is_done(read):
    options, changed = taken(read({"do_sample": True, "top_k": 5}), num_beams=4)
    assert (options.num_beams, options.do_sample, changed) == (4, False, {})
    fields = read({"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "top_k": 5})
    options, changed = taken(fields, do_sample=True)
    assert (options.num_beams, options.do_sample, changed) == (1, True, {"top_k": 5})
    with pytest.raises(ValueError, match="set num_beams=1"):  # both were
        taken(fields, do_sample=True, num_beams=2)


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
    with pytest.raises(ValueError, match="the model's config says 1") as error:
        read({"eos_token_id": [5] * 10_000})
    assert len(str(error.value)) < 500
    assert read({"eos_token_id": [1]}) == {}
    assert read({"pad_token_id": 2, "eos_token_id": 3}, config(pad_id=2, eos_id=3)) == {}
    with pytest.raises(ValueError, match="max_length='long' is not an int"):
        read({"max_length": "long"})
    with pytest.raises(ValueError, match="length_penalty=True is not an int or a float"):
        read({"length_penalty": True})


def test_a_model_says_what_it_takes(tmp_path, read, caplog):
    read({"num_beams": 2, "stop_strings": [".", "\n"], "no_repeat_ngram_size": 3})
    model = LoadedModel(TINY, random_params(TINY), tmp_path)
    with caplog.at_level(logging.WARNING):
        decoding = with_checkpoint_defaults(Decoding(no_repeat_ngram_size=0, batch_size=3), model)
    assert (decoding.num_beams, decoding.no_repeat_ngram_size, decoding.batch_size) == (2, 0, 3)
    assert decoding.stop_strings == (".", "\n")
    said = "num_beams=2, stop_strings=('.', '\\n'), length_penalty=1.0"
    assert f"{tmp_path}/generation_config.json: {said}" in caplog.text
    alone = LoadedModel(TINY, {}, None)
    expected = Decoding(max_input_length=512).resolved()
    assert with_checkpoint_defaults(Decoding(), alone) == expected
