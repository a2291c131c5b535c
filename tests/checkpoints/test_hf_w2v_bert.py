"""w2v-BERT checkpoints: transformers' numbers, and strict configs."""

import json
import shutil

from helpers import GOLDEN, assert_same_tree
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from coda_jax.checkpoints import load_hf, save_hf
from coda_jax.models import param_shapes
from coda_jax.models.w2v_bert.config import W2vBertConfig
from coda_jax.models.w2v_bert.huggingface import parse_config

CONFIGS = ("without a head", "another blank", "published distances")  # of the live comparison


def our_output(config, params, inputs):
    apply = jax.jit(config.network().apply, static_argnames="enable_dropout")
    return apply({"params": params}, inputs["features"], inputs["mask"], enable_dropout=False)


def assert_same_output(ours, theirs, inputs):
    mask = inputs["mask"]
    np.testing.assert_allclose(np.asarray(ours)[mask], theirs[mask], rtol=1e-4, atol=1e-5)


@pytest.fixture(name="maker")
def fixture_maker(monkeypatch):
    """The module that makes the golden files; skips where torch or transformers is missing."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(GOLDEN))
    import make_golden_w2v_bert

    return make_golden_w2v_bert


@pytest.fixture(name="copy")
def fixture_copy(tmp_path):
    """Returns a function that copies the golden checkpoint and edits its config and tensors."""

    def copy(tensors=None, **changes):
        folder = tmp_path / "copy"
        shutil.copytree(GOLDEN / "w2v_bert", folder)
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(raw))
        if tensors is not None:
            stored = load_file(folder / "model.safetensors")
            tensors(stored)
            save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy


def test_logits_equal_the_golden_ones():
    config, params = load_hf(GOLDEN / "w2v_bert")
    golden = np.load(GOLDEN / "w2v_bert" / "logits.npz")
    assert isinstance(config, W2vBertConfig) and config.vocab_size == 13
    assert_same_output(our_output(config, params, golden), golden["logits"], golden)


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal_those_of_transformers_and_what_we_save_it_loads(maker, tmp_path, name):
    """Invariant 7: logits, or hidden states where there is no head, with padding."""
    raw = maker.raw_config(name)
    maker.write_checkpoint(tmp_path / "first", raw, maker.random_weights(raw, 3))
    inputs = maker.random_inputs(raw, 4)
    config, params = load_hf(tmp_path / "first")
    assert (config.vocab_size, config.blank_id) == (
        raw["vocab_size"] or 0,
        raw.get("pad_token_id", 0),
    )
    ours = our_output(config, params, inputs)
    assert_same_output(ours, maker.reference_output(tmp_path / "first", inputs), inputs)
    save_hf(tmp_path / "ours", config, params)
    theirs = maker.reference_output(tmp_path / "ours", inputs)  # fails on any missing key
    assert_same_output(ours, theirs, inputs)
    cls = getattr(maker.transformers, raw["architectures"][0])
    cls.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again_config, again = load_hf(tmp_path / folder)
        assert again_config == config
        assert_same_tree(again, params)


def test_fields_that_are_left_out_have_the_defaults_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.Wav2Vec2BertConfig(architectures=["Wav2Vec2BertModel"]).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    empty = {"model_type": "wav2vec2-bert", "architectures": ["Wav2Vec2BertModel"]}
    assert parse_config(raw, "") == parse_config(empty, "") == W2vBertConfig(
        vocab_size=0, emb_dim=1024, num_heads=16, num_encoder_layers=24, head_dim=64, mlp_dim=4096,
        dropout_rate=0.0, feature_dim=160, conv_width=31, max_left_distance=64,
        max_right_distance=8,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"new_norm": 1}, "unknown field new_norm=1"),
        ({"position_embeddings_type": "rotary"}, "position_embeddings_type='rotary'"),
        ({"position_embeddings_type": None}, "position_embeddings_type=None"),
        ({"add_adapter": True}, "add_adapter=True"),
        ({"use_intermediate_ffn_before_adapter": True}, "use_intermediate_ffn_before_adapter=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"architectures": ["Wav2Vec2BertForXVector"]}, r"architectures=\['Wav2Vec2BertForXVector"),
        ({"architectures": None}, "architectures=None is not handled"),
        ({"vocab_size": None}, "vocab_size=None is not a whole number from 1 to"),
        ({"pad_token_id": 13}, "pad_token_id=13 must be a token below vocab_size=13"),
        ({"pad_token_id": None}, "pad_token_id=None must be a token"),
        ({"num_attention_heads": 3}, "hidden_size=16 is not a multiple of num_attention_heads=3"),
        ({"conv_depthwise_kernel_size": 4}, "conv_depthwise_kernel_size=4 is not odd"),
        ({"conv_depthwise_kernel_size": 7}, r"depthwise_conv.weight is \(16, 1, 5\), expected"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not a whole number"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps='small'"),
        ({"hidden_dropout": 1.5}, "hidden_dropout=1.5 is not a number"),
    ],
)
def test_config_that_is_not_handled_is_refused_by_name_and_value(copy, changes, text):
    with pytest.raises(ValueError, match=text):
        load_hf(copy(**changes))


def test_every_wrong_tensor_is_listed(copy):
    def break_tensors(tensors):
        del tensors["lm_head.bias"]
        del tensors["wav2vec2_bert.encoder.layers.1.conv_module.pointwise_conv1.weight"]
        tensors["wav2vec2_bert.adapter.proj.weight"] = np.zeros(3, np.float32)

    with pytest.raises(ValueError) as error:
        load_hf(copy(tensors=break_tensors))
    for text in (
        "missing: lm_head.bias (13,)",
        "missing: wav2vec2_bert.encoder.layers.1.conv_module.pointwise_conv1.weight (32, 16, 1)",
        "extra: wav2vec2_bert.adapter.proj.weight (3,)",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize("changes", [{"num_decoder_layers": 1}, {"head_dim": 4}, {"conv_width": 4}])
def test_models_that_transformers_lacks_are_not_saved(tmp_path, changes):
    config, _ = load_hf(GOLDEN / "w2v_bert")
    config = config.replace(**changes)
    shapes = param_shapes(config)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    with pytest.raises(ValueError, match="Hugging Face"):
        save_hf(tmp_path / "new", config, params)
    assert not (tmp_path / "new").exists()
