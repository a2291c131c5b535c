"""Hugging Face checkpoints: the same numbers as transformers, and nothing accepted in silence."""

import dataclasses
import importlib.util
import json
import shutil

from helpers import GOLDEN, assert_same_tree, logits
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from coda_jax import hub
from coda_jax.checkpoints import encoder_of, huggingface, load_hf, save_hf

NAMES = ("v1_1", "v1_0", "mt5", "byt5")
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def our_logits(config, params, inputs):
    tokens = [inputs[key] for key in ("encoder", "decoder_inputs", "decoder_targets")]
    ours = logits(config, params, *tokens)
    assert ours.dtype == jnp.float32
    return np.asarray(ours)


def assert_same_logits(ours, theirs, inputs):
    valid = inputs["decoder_targets"] > 0
    np.testing.assert_allclose(ours[valid], theirs[valid], rtol=1e-4, atol=1e-5)


@pytest.fixture(name="golden_module")
def fixture_golden_module():
    """The module that makes the golden files; skips where torch or transformers is missing."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(name="copy")
def fixture_copy(tmp_path):
    """Returns a function that copies a golden checkpoint and edits its config and tensors."""

    def copy(name="v1_1", tensors=None, **config):
        folder = tmp_path / "copy"
        shutil.copytree(GOLDEN / name, folder)
        raw = json.loads((folder / "config.json").read_text())
        raw = {key: value for key, value in {**raw, **config}.items() if value != "removed"}
        (folder / "config.json").write_text(json.dumps(raw))
        if tensors is not None:
            stored = load_file(folder / "model.safetensors")
            tensors(stored)
            save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_golden_ones(name):
    """Invariant 7."""
    config, params = load_hf(GOLDEN / name)
    golden = np.load(GOLDEN / name / "logits.npz")
    assert_same_logits(our_logits(config, params, golden), golden["logits"], golden)


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers_for_fresh_weights(golden_module, tmp_path, name):
    raw = {**golden_module.CONFIGS[name], "d_model": 28, "d_ff": 36, "num_decoder_layers": 3}
    golden_module.write_checkpoint(tmp_path, raw, golden_module.random_weights(raw, 100))
    inputs = golden_module.random_inputs(raw["vocab_size"], 101, (40, 3), (1, 12))
    theirs = golden_module.reference_logits(tmp_path, inputs)
    assert_same_logits(our_logits(*load_hf(tmp_path), inputs), theirs, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_we_save(golden_module, tmp_path, name):
    config, params = load_hf(GOLDEN / name)
    params = jax.tree.map(lambda leaf: leaf * 1.01, params)
    save_hf(tmp_path, config, params)
    inputs = golden_module.random_inputs(config.vocab_size, 7)
    theirs = golden_module.reference_logits(tmp_path, inputs)  # fails on any missing key
    assert_same_logits(our_logits(config, params, inputs), theirs, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_we_load_what_transformers_5_saves(golden_module, tmp_path, name):
    """Its config says tie_word_embeddings=true for every T5, whether that is so or not."""
    import transformers

    kind = "MT5" if name == "mt5" else "T5"
    cls = getattr(transformers, f"{kind}ForConditionalGeneration")
    cls.from_pretrained(GOLDEN / name).save_pretrained(tmp_path)
    config, params = load_hf(tmp_path)
    expected_config, expected = load_hf(GOLDEN / name)
    assert config == expected_config
    assert_same_tree(params, expected)


@pytest.mark.parametrize("kind", ["T5", "MT5"])
def test_unscaled_tied_model_of_transformers_5_has_the_same_logits(golden_module, tmp_path, kind):
    import transformers

    sizes = {**golden_module.SIZES, "feed_forward_proj": "gated-gelu"}
    raw = getattr(transformers, f"{kind}Config")(**sizes, tie_word_embeddings=False)
    getattr(transformers, f"{kind}ForConditionalGeneration")(raw).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    config, params = load_hf(tmp_path)
    assert not config.logits_via_embedding
    inputs = golden_module.random_inputs(64, 3)
    theirs = golden_module.reference_logits(tmp_path, inputs)
    assert_same_logits(our_logits(config, params, inputs), theirs, inputs)


def test_config_is_mapped():
    config, params = load_hf(GOLDEN / "byt5")
    assert dataclasses.asdict(config) == {
        "vocab_size": 64, "dtype": jnp.float32, "emb_dim": 20, "num_heads": 3,
        "num_encoder_layers": 3, "num_decoder_layers": 1, "head_dim": 6, "mlp_dim": 40,
        "mlp_activations": ("gelu", "linear"), "dropout_rate": 0.1, "logits_via_embedding": False,
        "float32_attention_logits": False, "relpos_num_buckets": 16, "relpos_max_distance": 20,
        "layer_norm_epsilon": 1e-6, "methods": (), "shared_relpos_bias": True, "pad_id": 0,
        "eos_id": 1, "decoder_start_id": 0, "head": None, "labels": (), "pooling": "mean",
        "remat_policy": "none", "layer_sizes": (),
    }  # fmt: skip
    assert params["encoder"]["relpos_bias"]["rel_embedding"].shape == (3, 16)
    assert load_hf(GOLDEN / "v1_0")[0].mlp_activations == ("relu",)
    assert load_hf(GOLDEN / "v1_0")[0].logits_via_embedding


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_is_bit_identical(tmp_path, name):
    config, params = load_hf(GOLDEN / name)
    save_hf(tmp_path, config, params)
    again_config, again = load_hf(tmp_path)
    assert again_config == config
    assert_same_tree(again, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_bfloat16_keeps_its_bytes(tmp_path):
    config, params = load_hf(GOLDEN / "v1_1")
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    save_hf(tmp_path, config, half)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    stored = load_file(tmp_path / "model.safetensors")
    assert {leaf.dtype for leaf in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert_same_tree(load_hf(tmp_path)[1], half)


def test_bfloat16_file_is_read_as_torch_reads_it(golden_module, tmp_path):
    import torch

    raw = golden_module.CONFIGS["v1_1"]
    weights = golden_module.random_weights(raw, 5)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    golden_module.write_checkpoint(tmp_path, raw, weights)
    _, params = load_hf(tmp_path)
    leaf = params["token_embedder"]["embedding"]
    assert leaf.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(leaf.astype(np.float32), weights["shared.weight"].float())


def test_shards_are_written_read_and_replaced(tmp_path, monkeypatch):
    config, params = load_hf(GOLDEN / "v1_1")
    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", 30_000)
    save_hf(tmp_path, config, params)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    assert (
        sum(leaf.nbytes for shard in shards for leaf in load_file(shard).values())
        == (
            json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"][
                "total_size"
            ]
        )
    )
    assert all(sum(x.nbytes for x in load_file(shard).values()) <= 30_000 for shard in shards)
    assert_same_tree(load_hf(tmp_path)[1], params)

    monkeypatch.undo()
    changed = jax.tree.map(lambda leaf: leaf + 1, load_hf(tmp_path)[1])
    save_hf(tmp_path, config, changed)  # a stale shard or index must not be read later
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_tree(load_hf(tmp_path)[1], changed)

    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", 30_000)
    save_hf(tmp_path, config, params)
    assert_same_tree(load_hf(tmp_path)[1], params)


def test_transformers_loads_our_shards(golden_module, tmp_path, monkeypatch):
    config, params = load_hf(GOLDEN / "v1_1")
    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", 40_000)
    save_hf(tmp_path, config, params)
    golden = np.load(GOLDEN / "v1_1" / "logits.npz")
    theirs = golden_module.reference_logits(tmp_path, golden)
    np.testing.assert_allclose(theirs, golden["logits"], rtol=1e-5, atol=1e-5)


@pytest.fixture(name="sharded")
def fixture_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", 40_000)
    save_hf(tmp_path, *load_hf(GOLDEN / "v1_1"))
    return tmp_path


def edit_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def test_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_hf(sharded)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda i: i.pop("weight_map"), "no weight_map"),
        (lambda i: i["weight_map"].pop("shared.weight"), "shared.weight is in .* None"),
        (
            lambda i: i["weight_map"].update(extra=i["weight_map"]["shared.weight"]),
            "extra is not in",
        ),
        (lambda i: i["weight_map"].update({"shared.weight": "../x.safetensors"}), r"\.\./x"),
    ],
)
def test_index_that_does_not_match_its_shards_is_refused(sharded, change, text):
    edit_index(sharded, change)
    with pytest.raises(ValueError, match=text):
        load_hf(sharded)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_safetensors_is_named(copy, keep):
    folder = copy()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors"):
        load_hf(folder)


def test_garbage_in_place_of_files_is_named(copy):
    folder = copy()
    (folder / "model.safetensors").write_bytes(b"\xff" * 5000)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_hf(folder)
    for content in (b"{", b"\xff\xfe", b"[1]"):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            load_hf(folder)


def test_missing_files_are_named(copy, tmp_path):
    folder = copy()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_hf(folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_hf(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "config", "text"),
    [
        ("v1_1", {"model_type": "bart"}, "model_type='bart' is not handled"),
        ("v1_1", {"model_type": "removed", "architectures": ["Bart"]}, "model_type=None"),
        ("v1_1", {"model_type": "longt5"}, "a part of the text.*take a T5 v1.1"),
        ("v1_1", {"model_type": "switch_transformers"}, "choose among experts; take a T5 v1.1"),
        ("v1_1", {"model_type": "umt5"}, "missing: .*block.1.layer.0.*relative_attention_bias"),
        ("v1_1", {"is_decoder": True}, "is_decoder=True"),
        ("v1_1", {"tie_encoder_decoder": True}, "tie_encoder_decoder=True"),
        ("v1_1", {"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ("v1_1", {"pad_token_id": -1}, "pad_token_id=-1"),
        ("v1_1", {"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\]"),
        ("v1_1", {"decoder_start_token_id": 64}, "decoder_start_token_id=64"),
        ("v1_1", {"scale_attention": True}, "unknown field scale_attention=True"),
        ("v1_1", {"quantization_config": {}}, "quantization_config"),
        ("v1_1", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj='gated-tanh'"),
        ("v1_1", {"feed_forward_proj": ["relu"]}, "feed_forward_proj="),
        ("v1_1", {"is_gated_act": False}, "is_gated_act=False"),
        ("v1_1", {"dense_act_fn": "gelu"}, "dense_act_fn='gelu'"),
        ("v1_0", {"dense_act_fn": "tanh"}, r"'tanh', False\) is not handled"),
        ("v1_1", {"d_model": 24.0}, "d_model=24.0"),
        ("v1_1", {"num_layers": 0}, "num_layers=0"),
        ("v1_1", {"num_layers": 1000}, "num_layers=1000 is not a whole number from 1 to 128"),
        ("v1_1", {"d_model": 10**12}, "d_model=1000000000000 is not"),
        ("v1_1", {"vocab_size": 2**70}, "vocab_size=1180591620717411303424 is not"),
        ("v1_1", {"relative_attention_max_distance": 2**40}, "max_distance=1099511627776 is not"),
        ("v1_1", {"relative_attention_num_buckets": 1}, "num_buckets=1 is not.* from 4 to 65536"),
        ("v1_1", {"layer_norm_epsilon": 10**400}, "layer_norm_epsilon=10{70,79} is not"),
        ("v1_1", {"relative_attention_max_distance": 16}, r"/config\.json: .*above half of"),
        ("v1_1", {"architectures": 5}, "architectures=5 is not a list"),
        ("v1_1", {"architectures": "T5EncoderModel"}, "architectures='T5EncoderModel' is not"),
        ("v1_1", {"model_type": ["t5"]}, r"model_type=\['t5'\] is not a text"),
        ("v1_1", {"num_decoder_layers": True}, "num_decoder_layers=True"),
        ("v1_1", {"d_kv": "removed"}, "missing field d_kv"),
        ("v1_1", {"dropout_rate": 1.5}, "dropout_rate=1.5"),
        ("v1_1", {"layer_norm_epsilon": "small"}, "layer_norm_epsilon='small'"),
        ("v1_1", {"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        (
            "v1_1",
            {"tie_word_embeddings": True},
            "lm_head.weight.*set tie_word_embeddings to false",
        ),
        ("v1_1", {"scale_decoder_outputs": True}, "lm_head.*set scale_decoder_outputs to false"),
        ("mt5", {"tie_word_embeddings": True}, "transformers_version='4.16.0'"),
        ("mt5", {"scale_decoder_outputs": True}, "scale_decoder_outputs=True"),
        ("v1_0", {"tie_word_embeddings": False}, "missing: lm_head.weight"),
    ],
)
def test_config_that_is_not_handled_is_refused_by_name_and_value(copy, name, config, text):
    with pytest.raises(ValueError, match=text):
        load_hf(copy(name, **config))


def test_a_config_or_an_index_of_many_megabytes_is_not_read(copy):
    folder = copy()
    for name in ("model.safetensors.index.json", "config.json"):  # the weights are read after both
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / name).write_bytes(b" " * (hub.MAX_JSON_BYTES + 1))
        with pytest.raises(ValueError, match=rf"{name} has 4,194,305 bytes; .* at most 4,194,304"):
            load_hf(folder)


def test_every_config_problem_is_listed(copy):
    with pytest.raises(ValueError, match=r"(?s)unknown field a=1.*is_decoder=True.*d_ff=-1"):
        load_hf(copy(a=1, is_decoder=True, d_ff=-1))


def test_fields_that_do_not_change_the_computation_are_accepted(copy):
    folder = copy(
        n_positions=512, output_past=True, task_specific_params={"a": {}}, eos_token_id=[1],
        torch_dtype="bfloat16", dtype="float32", num_decoder_layers=None, pruned_heads={},
        max_length=20, _name_or_path="x", tokenizer_class="T5Tokenizer", initializer_factor=0.05,
        auto_map={"a": "b"}, quantization_config=None, _attn_implementation="sdpa",
        _commit_hash="1", model_max_length=512, **{"transformers.js_config": {"dtype": "q8"}},
    )  # fmt: skip
    config, params = load_hf(folder)
    assert config == load_hf(GOLDEN / "v1_1")[0]
    assert_same_tree(params, load_hf(GOLDEN / "v1_1")[1])


def test_every_wrong_tensor_is_listed(copy):
    def break_tensors(tensors):
        del tensors["encoder.final_layer_norm.weight"]
        tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"] = np.zeros((40, 24), np.float32)
        tensors["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"] = np.zeros(
            (32, 2), np.float32
        )

    with pytest.raises(ValueError) as error:
        load_hf(copy(tensors=break_tensors))
    text = str(error.value)
    assert "3 leaves" in text and "missing: encoder.final_layer_norm.weight (24,)" in text
    assert "wo.weight is (40, 24), expected (24, 40)" in text
    assert "extra: encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in text


def test_whole_number_tensors_are_refused(copy):
    with pytest.raises(ValueError, match=r"shared.weight \(I32\)"):
        load_hf(copy(tensors=lambda t: t.update({"shared.weight": np.zeros((64, 24), np.int32)})))


def test_copies_must_equal_the_embedding(copy):
    # The golden file has the leftovers of old files: equal copies, and a bias that is never read.
    assert {UNUSED, *COPIES} <= load_file(GOLDEN / "v1_0" / "model.safetensors").keys()
    with pytest.raises(ValueError, match=r"decoder.embed_tokens.weight.*must equal shared.weight"):
        load_hf(copy("v1_0", tensors=lambda t: t.update({COPIES[1]: t["shared.weight"] * 2})))


def test_a_copy_of_the_embedding_may_have_another_dtype(copy):
    def round_copies(tensors):
        tensors[COPIES[0]] = tensors["shared.weight"].astype(np.float16)
        tensors[COPIES[1]] = tensors["shared.weight"].astype(ml_dtypes.bfloat16)

    assert_same_tree(load_hf(copy("v1_0", round_copies))[1], load_hf(GOLDEN / "v1_0")[1])


def test_equal_lm_head_and_a_lone_copy_of_the_embedding_are_accepted(copy):
    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("shared.weight")
        del tensors[COPIES[0]]

    config, params = load_hf(copy("v1_0", tensors=rename))
    assert config.logits_via_embedding
    assert_same_tree(params, load_hf(GOLDEN / "v1_0")[1])


def test_params_and_configs_that_do_not_fit_are_not_saved(tmp_path):
    config, params = load_hf(GOLDEN / "v1_1")
    with pytest.raises(ValueError, match="extra: decoder/layers_1/mlp/wo/kernel"):
        save_hf(tmp_path / "new", dataclasses.replace(config, num_decoder_layers=1), params)
    tanh = dataclasses.replace(config, mlp_activations=("tanh", "linear"))
    with pytest.raises(ValueError, match=r"mlp_activations=\('tanh', 'linear'\)"):
        save_hf(tmp_path / "new", tanh, params)
    assert not (tmp_path / "new").exists()


def test_saving_over_the_checkpoint_that_is_in_use_keeps_its_values(copy):
    folder = copy()
    config, params = load_hf(folder)  # mapped from the very file that is replaced
    save_hf(folder, config, jax.tree.map(lambda leaf: leaf * 2, params))
    assert_same_tree(params, load_hf(GOLDEN / "v1_1")[1])
    np.testing.assert_array_equal(
        load_hf(folder)[1]["token_embedder"]["embedding"], params["token_embedder"]["embedding"] * 2
    )


def test_a_scale_that_transformers_5_0_0_wrote_by_mistake_is_not_believed(copy, caplog):
    folder = copy(
        scale_decoder_outputs=True, tie_word_embeddings=True, transformers_version="5.0.0"
    )
    config, params = load_hf(folder)
    assert not config.logits_via_embedding
    assert "scale_decoder_outputs=true is taken for a mistake" in caplog.text
    assert_same_tree(params, load_hf(GOLDEN / "v1_1")[1])
    with pytest.raises(ValueError, match="scale_decoder_outputs=True"):
        raw = json.loads((folder / "config.json").read_text()) | {"transformers_version": "5.1.0"}
        (folder / "config.json").write_text(json.dumps(raw))
        load_hf(folder)


def test_what_a_chronos_lacks_is_said(caplog):
    load_hf(GOLDEN / "kinds" / "chronos_t5")
    assert "scaling numbers to tokens" in caplog.text


def test_a_decoder_beside_an_encoder_alone_is_left_out(copy):
    config, params = load_hf(copy(architectures=["T5EncoderModel"]))
    both, whole = load_hf(GOLDEN / "v1_1")
    assert (config, set(params)) == (both.encoder_only(), {"encoder", "token_embedder"})
    assert_same_tree(params["encoder"], whole["encoder"])
    alone, same = encoder_of(both, whole)
    assert alone == config
    assert_same_tree(same, params)
