"""T5X's side, against T5X itself: run with its checkout on PYTHONPATH (`make test-t5x`)."""

import sys
import types

import gin
from helpers import TINY_SPEECH, config, random_frames, random_params, random_tokens, shapes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import seqio

from coda_jax import checkpoints, cli, gin_configs
from coda_jax import params as params_lib
from coda_jax.models import EncoderDecoder
from coda_jax.network import Transformer
from coda_jax.speech import SpeechToText
from coda_jax.vision import Pix2Struct

pytest.importorskip(
    "t5x.models", reason="T5X is not installed: make test-t5x T5X_PATH=...", exc_type=ImportError
)
t5x_models = pytest.importorskip("coda_jax.t5x_models")

CONFIG = config(coda={"reduction": 2.0, "max_segments": 2})


def model(cfg, optimizer=None, **kwargs):
    vocabulary = seqio.ByteVocabulary()
    return t5x_models.CodaEncoderDecoderModel(
        Transformer(cfg), vocabulary, vocabulary, optimizer, **kwargs
    )


def packed_batch(rng):
    inputs = random_tokens(rng, [9, 5], 9)
    targets = random_tokens(rng, [4, 6], 6)
    ones = (inputs > 0).astype(np.int32)
    segments = np.where(np.arange(9) < 4, 1, 2) * ones
    target_segments = np.where(np.arange(6) < 3, 1, 2) * (targets > 0)
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
        "encoder_segment_ids": segments,
        "decoder_segment_ids": target_segments,
        "encoder_positions": np.zeros_like(inputs),
        "decoder_positions": np.zeros_like(targets),
    }


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_ours_and_the_metrics_tell_how_tokens_are_routed(packed, rng):
    params = random_params(CONFIG)
    batch = packed_batch(rng)
    if not packed:
        batch = {k: v for k, v in batch.items() if "segment" not in k and "position" not in k}
    loss, metrics = jax.jit(lambda p, b: model(CONFIG, z_loss=1e-4).loss_fn(p, b, None))(
        params, batch
    )
    expected, _ = EncoderDecoder(CONFIG, z_loss=1e-4).loss(params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert not any("routing" in name for name in _dense_metrics(batch))
    for layer in range(CONFIG.num_encoder_layers):
        share, weight, entropy = (
            metrics[f"routing/layers_{layer}/{name}"].compute()
            for name in ("share", "weight", "entropy")
        )
        assert share == pytest.approx((5 + 3) / 14 if not packed else (2 + 3 + 2 + 1) / 14)
        assert 0 < weight <= 1 and 0 <= entropy <= np.log(2)


def test_speech_has_our_loss_and_its_routing_is_told(rng):
    """The encoder's inputs are float frames with their own mask."""
    cfg = config({"reduction": 2.0}, base=TINY_SPEECH, num_decoder_layers=1)
    made = t5x_models.CodaEncoderDecoderModel(
        SpeechToText(cfg), *[seqio.ByteVocabulary()] * 2, None, z_loss=1e-4
    )
    targets = random_tokens(rng, [4, 6], 6)
    batch = {
        "encoder_input_tokens": random_frames(rng, [9, 5], 9),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }
    shapes = {name: values.shape for name, values in batch.items()}
    variables = made.get_initial_variables(
        jax.random.key(0), shapes, {"encoder_input_tokens": jnp.float32}
    )
    params = variables["params"]
    loss, metrics = jax.jit(lambda p, b: made.loss_fn(p, b, None))(params, batch)
    expected, _ = jax.jit(EncoderDecoder(cfg, z_loss=1e-4).loss)(params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["routing/layers_1/share"].compute() == pytest.approx((5 + 3) / 14)


def _dense_metrics(batch):
    dense = CONFIG.dense()
    _, metrics = model(dense).loss_fn(random_params(dense), batch, None)
    return metrics


def test_entropy_is_that_of_the_weights():
    weights = np.array([[0.25, 1.0, 0.0]], np.float32)
    selection = t5x_models.Selection(
        jnp.arange(3)[None], jnp.asarray(weights), jnp.array([[True, True, False]])
    )
    found = t5x_models.routing_metrics(
        {"encoder": {"layers_0": {"router": {"selection": (selection,)}}}}, jnp.int32(8)
    )
    values = {name.split("/")[-1]: metric.compute() for name, metric in found.items()}
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)) / 2
    assert values == pytest.approx({"share": 0.25, "weight": 0.625, "entropy": entropy})


def test_the_optimizer_leaves_frozen_parameters_alone():
    params = random_params(CONFIG)
    definition = t5x_models.partial_optimizer(optax.adamw(0.1))
    state = definition.init_state(params)
    moments = [leaf for leaf in jax.tree.leaves(state.param_states) if leaf.ndim]
    trained, _ = params_lib.partition(params)
    assert len(moments) == 2 * len(jax.tree.leaves(trained))
    gradients = jax.tree.map(jnp.ones_like, params)
    new, _ = definition.apply_gradient(definition.hyper_params, params, state, gradients)
    words = params_lib.flatten(params_lib.labels(params))
    before, after = params_lib.flatten(params), params_lib.flatten(new)
    for path, word in words.items():
        assert np.array_equal(before[path], after[path]) == (word == "frozen")


REQUIRED = {
    "VOCABULARY": "'bytes'",
    "MIXTURE_OR_TASK_NAME": "'unused'",
    "TASK_FEATURE_LENGTHS": "{'inputs': 8, 'targets': 4}",
    "TRAIN_STEPS": "10",
    **dict.fromkeys(("MODEL_DIR", "EVAL_OUTPUT_DIR", "INFER_OUTPUT_DIR"), "'unused'"),
}


# T5X's run files configure the script that runs; here that is a module of its own.
SCRIPT = types.ModuleType("__main__")
SCRIPT.train, SCRIPT.evaluate, SCRIPT.infer = (lambda **kwargs: kwargs for _ in range(3))


@pytest.fixture(name="make_model")
def fixture_make_model(monkeypatch):
    """Returns a function that makes the model of gin files and a checkpoint."""
    monkeypatch.setitem(sys.modules, "__main__", SCRIPT)

    def make(files, checkpoint, **changes):
        paths = dict.fromkeys(("INITIAL_CHECKPOINT_PATH", "CHECKPOINT_PATH"), f"'{checkpoint}'")
        bindings = [f"{macro}={value}" for macro, value in {**REQUIRED, **paths, **changes}.items()]
        cli.configure(files, [str(next(iter(gin_configs.__path__)))], bindings)
        return gin.query_parameter("%MODEL").scoped_configurable_fn()

    yield make
    gin.clear_config()


FILES = ["models/t5_1_1_stdlib.gin", "methods/coda.gin"]


@pytest.mark.parametrize("run", ["finetune", "pretrain", "eval", "infer"])
def test_gin_files_make_the_model(run, make_model):
    made = make_model([f"t5x/{run}.gin", *FILES], "gs://bucket/checkpoint_0")
    assert isinstance(made, t5x_models.CodaEncoderDecoderModel)
    assert made.module.config.coda.reduction == 3 and made.module.config.adapter is not None


@pytest.mark.parametrize(
    ("name", "model_file", "network", "changes"),
    [
        ("images", "pix2struct_tiny", Pix2Struct, {}),
        ("speech", "w2v_bert_tiny", SpeechToText, {"NUM_DECODER_LAYERS": "2"}),
    ],
)
def test_other_inputs_have_a_file_that_replaces_the_network(
    name, model_file, network, changes, make_model
):
    files = ["t5x/finetune.gin", f"t5x/{name}.gin", f"models/{model_file}.gin", "methods/coda.gin"]
    made = make_model(files, "gs://bucket/checkpoint_0", **changes)
    assert isinstance(made.module, network) and made.module.config.coda.reduction == 3
    assert made.module.config.num_decoder_layers >= 1
    assert made.FEATURE_CONVERTER_CLS.MODEL_FEATURES["encoder_input_tokens"].rank == 2


@pytest.mark.parametrize("name", ["mnli_base_r5", "xsum_large_parallel_adapter", "pretrain_xl_r3"])
def test_experiments_run_under_t5x(name, make_model):
    files = ["t5x/finetune.gin", f"experiments/{name}.gin"]
    made = make_model(files, "gs://bucket/checkpoint_0").module.config
    reduction = name.partition("_r")[2]
    assert made.adapter is not None and (made.coda is None) == (not reduction.isdigit())


def test_the_checkpoint_is_compared_before_anything_is_restored(make_model, tmp_path):
    """The files say whether adapters and routers are to be in the checkpoint."""
    model_config = make_model(
        ["t5x/finetune.gin", *FILES], "gs://bucket/checkpoint_0"
    ).module.config
    for name, cfg in (("dense", model_config.dense()), ("adapted", model_config)):
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes(cfg)["params"])
        checkpoints.save_t5x(tmp_path / name, params)
    pretrained = [*FILES, "t5x/restore_pretrained.gin"]
    for files, fits, other in (
        (["t5x/finetune.gin", *FILES], "dense", "adapted"),
        (["t5x/finetune.gin", *pretrained], "adapted", "dense"),
        (["t5x/infer.gin", *FILES], "adapted", "dense"),
    ):
        make_model(files, tmp_path / fits)
        with pytest.raises(ValueError, match="encoder/layers_0/router/kernel"):
            make_model(files, tmp_path / other)
