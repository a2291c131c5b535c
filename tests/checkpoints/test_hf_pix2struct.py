"""Pix2Struct checkpoints: transformers' numbers, and strict configs."""

import dataclasses
import json
import shutil

from helpers import GOLDEN, assert_same_tree, logits
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from coda_jax.checkpoints import load_hf, save_hf
from coda_jax.models.pix2struct.config import Pix2StructConfig
from coda_jax.models.pix2struct.huggingface import EMBEDDING, HEAD, parse_config

CONFIGS = ("pix2struct", "deep encoder", "many heads")


def our_logits(config, params, inputs):
    tokens = [inputs[key] for key in ("encoder", "decoder_inputs", "decoder_targets")]
    return np.asarray(logits(config, params, *tokens))


def assert_same_logits(ours, theirs, inputs):
    valid = inputs["decoder_targets"] > 0
    np.testing.assert_allclose(ours[valid], theirs[valid], rtol=1e-4, atol=1e-5)


@pytest.fixture(name="maker")
def fixture_maker(monkeypatch):
    """The module that makes the golden files; skips where torch or transformers is missing."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(GOLDEN))
    import make_golden_pix2struct

    return make_golden_pix2struct


@pytest.fixture(name="copy")
def fixture_copy(tmp_path):
    """Returns a function that copies the golden checkpoint and edits its config and tensors."""

    def copy(tensors=None, text=(), vision=(), **config):
        folder = tmp_path / "copy"
        shutil.copytree(GOLDEN / "pix2struct", folder)
        raw = json.loads((folder / "config.json").read_text()) | config
        for part, changes in (("text_config", text), ("vision_config", vision)):
            if changes:
                raw[part] |= changes
        (folder / "config.json").write_text(json.dumps(raw))
        if tensors is not None:
            stored = load_file(folder / "model.safetensors")
            tensors(stored)
            save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy


def test_logits_equal_the_golden_ones():
    config, params = load_hf(GOLDEN / "pix2struct")
    golden = np.load(GOLDEN / "pix2struct" / "logits.npz")
    assert isinstance(config, Pix2StructConfig)
    assert_same_logits(our_logits(config, params, golden), golden["logits"], golden)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers_for_fresh_weights(maker, tmp_path, name, tied):
    """Invariant 7. transformers does not scale the logits of a tied model."""
    raw = maker.raw_config(name, tie_word_embeddings=tied)
    maker.write_checkpoint(tmp_path, raw, maker.random_weights(raw, 3))
    inputs = maker.random_inputs(raw, 4, ((4, 4), (1, 1), (2, 3)), (1, 9, 4))
    theirs = maker.reference_logits(tmp_path, inputs)
    assert_same_logits(our_logits(*load_hf(tmp_path), inputs), theirs, inputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_what_we_save_and_we_what_it_saves(maker, tmp_path, name):
    raw = maker.raw_config(name)
    maker.write_checkpoint(tmp_path / "first", raw, maker.random_weights(raw, 5))
    config, params = load_hf(tmp_path / "first")
    save_hf(tmp_path / "ours", config, params)
    inputs = maker.random_inputs(raw, 7)
    theirs = maker.reference_logits(tmp_path / "ours", inputs)  # fails on any missing key
    assert_same_logits(our_logits(config, params, inputs), theirs, inputs)
    maker.MODEL.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again_config, again = load_hf(tmp_path / folder)
        assert again_config == config
        assert_same_tree(again, params)


def test_fields_that_are_left_out_have_the_defaults_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.Pix2StructConfig().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    empty = {"model_type": "pix2struct", "text_config": {}, "vision_config": {}}
    assert parse_config(raw, "") == parse_config(empty, "") == Pix2StructConfig(
        vocab_size=50244, emb_dim=768, num_heads=12, num_encoder_layers=12, num_decoder_layers=12,
        head_dim=64, mlp_dim=2048, patch_size=16, num_positions=4096,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"scale_logits": True}, "unknown field scale_logits=True"),
        ({"text": {"new_norm": 1}}, "unknown field text_config.new_norm=1"),
        ({"vision": {"new_norm": 1}}, "unknown field vision_config.new_norm=1"),
        ({"vision_config": None}, "vision_config must be an object: None"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder=False"),
        ({"pad_token_id": 3}, "pad_token_id=3"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        ({"tie_word_embeddings": True}, "lm_head.weight must equal"),
        ({"text": {"is_decoder": False}}, "text_config.is_decoder=False"),
        ({"text": {"dense_act_fn": "relu"}}, "text_config.dense_act_fn='relu'"),
        ({"text": {"decoder_start_token_id": 5}}, "text_config.decoder_start_token_id=5"),
        ({"text": {"d_kv": 4}}, "disagree in head_dim: 4 and 8"),
        ({"text": {"d_kv": 4}, "vision": {"d_kv": 4}}, "must be hidden_size=24"),
        ({"text": {"num_layers": 0}}, "text_config.num_layers=0 is not a whole number"),
        ({"vision": {"dense_act_fn": "gelu"}}, "vision_config.dense_act_fn='gelu'"),
        ({"vision": {"qkv_bias": True}}, "vision_config.qkv_bias=True"),
        ({"vision": {"layer_norm_eps": 1e-5}}, "disagree in the layer norms' epsilon"),
        ({"vision": {"layer_norm_eps": "small"}}, "layer_norm_eps='small'"),
        ({"vision": {"patch_embed_hidden_size": 13}}, "patch_embed_hidden_size=13 is not 3 n"),
        ({"vision": {"seq_len": 21}}, r"row_embedder.weight is \(20, 24\), expected \(21, 24\)"),
    ],
)
def test_config_that_is_not_handled_is_refused_by_name_and_value(copy, changes, text):
    with pytest.raises(ValueError, match=text):
        load_hf(copy(**changes))


def test_bookkeeping_is_accepted(copy):
    folder = copy(
        is_vqa=False, torch_dtype="float32", initializer_range=0.1,
        text={"use_cache": True, "encoder_hidden_size": 768, "is_encoder_decoder": True},
        vision={"image_size": 384, "attention_dropout": 0.1, "qkv_bias": False, "patch_size": 16},
    )  # fmt: skip
    assert load_hf(folder)[0] == load_hf(GOLDEN / "pix2struct")[0]


def test_every_wrong_tensor_is_listed(copy):
    def break_tensors(tensors):
        del tensors["encoder.layernorm.weight"]
        tensors["decoder.extra.weight"] = np.zeros(3, np.float32)

    with pytest.raises(ValueError) as error:
        load_hf(copy(tensors=break_tensors))
    assert "missing: encoder.layernorm.weight (24,)" in str(error.value)
    assert "extra: decoder.extra.weight (3,)" in str(error.value)


def test_a_tied_model_may_store_either_embedding(copy):
    def keep_the_head(tensors):
        del tensors[EMBEDDING]

    _, params = load_hf(copy(tensors=keep_the_head, tie_word_embeddings=True))
    head = load_file(GOLDEN / "pix2struct" / "model.safetensors")[HEAD]
    np.testing.assert_array_equal(params["token_embedder"]["embedding"], head)
    np.testing.assert_array_equal(params["decoder"]["logits_dense"]["kernel"], head.T)


@pytest.mark.parametrize(
    "changes", [{"logits_via_embedding": True}, {"mlp_activations": ("relu", "linear")}]
)
def test_models_that_transformers_lacks_are_not_saved(tmp_path, changes):
    config, params = load_hf(GOLDEN / "pix2struct")
    if "logits_via_embedding" in changes:
        del params["decoder"]["logits_dense"]
    with pytest.raises(ValueError, match="cannot be saved as a Hugging Face Pix2Struct"):
        save_hf(tmp_path / "new", dataclasses.replace(config, **changes), params)
    assert not (tmp_path / "new").exists()
