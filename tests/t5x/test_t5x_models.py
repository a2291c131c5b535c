"""T5X's side, against T5X itself: run with its checkout on PYTHONPATH (`make test-t5x`)."""

import importlib
import sys

import gin
from helpers import (
    T5X_SCRIPT,
    TINY_SPEECH,
    config,
    random_frames,
    random_params,
    random_tokens,
    shapes,
    shift_right,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio

from coda_jax import checkpoints, cli, gin_configs, methods, trees
from coda_jax.checkpoints.t5x_record import read_record, run_folder, write_record
from coda_jax.commands import configuration, gin_files
from coda_jax.data import seqio_tasks
from coda_jax.data.seqio_converters import TokensFeatureConverter, VectorsFeatureConverter
from coda_jax.methods import Coda, Full, ParallelAdapter
from coda_jax.models.pix2struct.config import Pix2StructConfig
from coda_jax.models.w2v_bert.config import W2vBertConfig
from coda_jax.nn.tokens import Selection
from coda_jax.objectives import Seq2Seq
from coda_jax.sharding import AXIS_RULES

# Not "t5x": this folder of tests would be found under that name.
pytest.importorskip(
    "t5x.models", reason="T5X is not installed: make test-t5x T5X_PATH=...", exc_type=ImportError
)
t5x_models = importlib.import_module("coda_jax.t5x_models")

CONFIG = config(coda={"reduction": 2.0, "max_segments": 2})


def model(cfg, optimizer=None, **kwargs):
    """T5X's model around the network of a config."""
    vocabulary = seqio.PassThroughVocabulary(cfg.vocab_size, eos_id=1)
    return t5x_models.CodaEncoderDecoderModel(
        cfg.network(), vocabulary, vocabulary, optimizer, **kwargs
    )


def packed_batch(rng):
    inputs = random_tokens(rng, [9, 5], 9)
    targets = random_tokens(rng, [4, 6], 6)
    ones = (inputs > 0).astype(np.int32)
    segments = np.where(np.arange(9) < 4, 1, 2) * ones
    target_segments = np.where(np.arange(6) < 3, 1, 2) * (targets > 0)
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": shift_right(targets),
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
    expected, _ = jax.jit(Seq2Seq(CONFIG, z_loss=1e-4).loss)(params, batch)
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
    made = model(cfg, z_loss=1e-4)
    targets = random_tokens(rng, [4, 6], 6)
    batch = {
        "encoder_input_tokens": random_frames(rng, [9, 5], 9),
        "decoder_input_tokens": shift_right(targets),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }
    variables = made.get_initial_variables(
        jax.random.key(0),
        {name: values.shape for name, values in batch.items()},
        {"encoder_input_tokens": jnp.float32},
    )
    params = variables["params"]
    loss, metrics = jax.jit(lambda p, b: made.loss_fn(p, b, None))(params, batch)
    expected, _ = jax.jit(Seq2Seq(cfg, z_loss=1e-4).loss)(params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["routing/layers_1/share"].compute() == pytest.approx((5 + 3) / 14)


def _dense_metrics(batch):
    dense = CONFIG.dense()
    return jax.jit(lambda p: model(dense).loss_fn(p, batch, None)[1])(random_params(dense))


def test_a_pod_is_divided_by_t5xs_default_rules():
    partitioning = importlib.import_module("t5x.partitioning")
    assert set(AXIS_RULES) == set(partitioning.standard_logical_axis_rules())


def test_the_network_that_we_are_compared_with_has_our_numbers(rng):
    cfg = config(relpos_num_buckets=32, relpos_max_distance=128)
    network, params = t5x_models.example_network(cfg), random_params(cfg)
    inputs, targets = random_tokens(rng, (6, 4), 6), random_tokens(rng, (4, 3), 4)
    given = {"params": params}, inputs, shift_right(targets), targets
    ours, theirs = (x.apply(*given, enable_dropout=False) for x in (cfg.network(), network))
    np.testing.assert_allclose(theirs[targets > 0], ours[targets > 0], atol=1e-5)
    assert t5x_models.example_network(TINY_SPEECH) is None
    assert t5x_models.example_network(config()) is None  # its bias has 32 buckets


def test_entropy_is_that_of_the_weights():
    weights = np.array([[0.25, 1.0, 0.0]], np.float32)
    selection = Selection(
        jnp.arange(3)[None], jnp.asarray(weights), jnp.array([[True, True, False]])
    )
    found = t5x_models.routing_metrics(
        {"encoder": {"layers_0": {"router": {"selection": (selection,)}}}}, jnp.int32(8)
    )
    values = {name.split("/")[-1]: metric.compute() for name, metric in found.items()}
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)) / 2
    assert values == pytest.approx({"share": 0.25, "weight": 0.625, "entropy": entropy})


class Mixing(Full):
    """A method that cannot keep packed examples apart."""

    packs = False


def test_the_model_has_the_converter_whose_rows_it_can_take():
    converter = model(CONFIG).FEATURE_CONVERTER_CLS(pack=True, use_custom_packing_ops=False)
    assert isinstance(converter, TokensFeatureConverter) and converter._max_segments == 2
    speech = model(config({"reduction": 2.0}, base=TINY_SPEECH, num_decoder_layers=1))
    assert isinstance(speech.FEATURE_CONVERTER_CLS(pack=False), VectorsFeatureConverter)
    with pytest.raises(ValueError, match="recordings are not packed"):
        speech.FEATURE_CONVERTER_CLS(pack=True)
    mixing = model(config().replace(methods=(Mixing(),))).FEATURE_CONVERTER_CLS
    assert not mixing(pack=False).pack
    with pytest.raises(ValueError, match=r"\['full'\] cannot keep packed examples apart"):
        mixing(pack=True)


REQUIRED = {
    "VOCABULARY": "'bytes'",
    "MIXTURE_OR_TASK_NAME": "'bytes_to_bytes'",
    "TASK_FEATURE_LENGTHS": "{'inputs': 8, 'targets': 4}",
    "TRAIN_STEPS": "10",
    **dict.fromkeys(("MODEL_DIR", "EVAL_OUTPUT_DIR", "INFER_OUTPUT_DIR"), "'/unused'"),
}


RECIPES = sorted(path.name for path in (gin_files.package_folder() / "methods").glob("*.gin"))


@pytest.fixture(scope="module", autouse=True)
def _tasks():
    """A task of bytes, another without extra ids, and one of vectors."""
    source = seqio_tasks.MemorySource(lambda _: {}, ("train",))
    for name, vocabulary, vectors in (
        ("bytes_to_bytes", seqio_tasks.seqio_vocabulary("bytes"), False),
        ("plain_bytes", seqio.ByteVocabulary(), False),
        ("vectors_to_bytes", seqio_tasks.seqio_vocabulary("bytes"), True),
    ):
        seqio_tasks.add_task(name, source, [], vocabulary, vectors=vectors)


@pytest.fixture(name="make_model")
def fixture_make_model(monkeypatch):
    """Returns a function that makes the model of gin files and a checkpoint."""
    monkeypatch.setitem(sys.modules, "__main__", T5X_SCRIPT)

    def make(files, checkpoint="gs://bucket/checkpoint_0", **changes):
        paths = dict.fromkeys(("INITIAL_CHECKPOINT_PATH", "CHECKPOINT_PATH"), f"'{checkpoint}'")
        bindings = [f"{macro}={value}" for macro, value in {**REQUIRED, **paths, **changes}.items()]
        cli.configure(files, [str(next(iter(gin_configs.__path__)))], bindings)
        return gin.query_parameter("%MODEL").scoped_configurable_fn()

    yield make
    gin.clear_config()


STDLIB = {"PRESET": "'t5_1_1_stdlib'"}
ELSEWHERE = {"CHECKPOINT": "None"}  # a checkpoint is compared as it is restored


@pytest.mark.parametrize("run", ["finetune", "pretrain", "eval", "infer"])
def test_gin_files_make_the_model(run, make_model):
    made = make_model([f"t5x/{run}.gin", "methods/coda.gin"], **ELSEWHERE, **STDLIB)
    assert isinstance(made, t5x_models.CodaEncoderDecoderModel)
    assert made.module.config.methods == (Coda(3), ParallelAdapter())
    assert made.module.config.emb_dim == 192


@pytest.mark.parametrize(
    ("name", "preset", "family", "changes"),
    [
        ("images", "pix2struct_tiny", Pix2StructConfig, {}),
        ("speech", "w2v_bert_tiny", W2vBertConfig, {"NUM_DECODER_LAYERS": "2"}),
    ],
)
def test_other_inputs_have_a_file_that_replaces_the_network(
    name, preset, family, changes, make_model
):
    files = ["t5x/finetune.gin", f"t5x/{name}.gin", "methods/coda.gin"]
    changes = {**ELSEWHERE, "PRESET": f"'{preset}'", **changes}
    made = make_model(files, MIXTURE_OR_TASK_NAME="'vectors_to_bytes'", **changes)
    found = made.module.config
    assert isinstance(found, family) and found.methods == (Coda(3), ParallelAdapter())
    assert type(made.module) is type(found.network()) and found.num_decoder_layers >= 1
    assert made.FEATURE_CONVERTER_CLS(pack=False).MODEL_FEATURES["encoder_input_tokens"].rank == 2
    with pytest.raises(ValueError, match="another vocabulary for its inputs than VOCABULARY: Byte"):
        make_model(files, **changes)
    changes.pop("NUM_DECODER_LAYERS", None)
    with pytest.raises(ValueError, match=rf"of tokens: give --gin_file=t5x/{name}\.gin"):
        make_model(["t5x/finetune.gin", "methods/coda.gin"], **changes)


def test_a_task_without_extra_ids_has_the_vocabulary_of_the_model(make_model):
    """T5X compares the vocabularies with `==`, which extra ids make unequal."""
    files, given = ["t5x/finetune.gin", "methods/coda.gin"], {**ELSEWHERE, **STDLIB}
    made = make_model(files, MIXTURE_OR_TASK_NAME="'plain_bytes'", **given)
    theirs = seqio.ByteVocabulary()
    assert (made.input_vocabulary, made.output_vocabulary) == (theirs, theirs)
    with pytest.raises(ValueError, match=r"no task or mixture 'plain_byte' .*plain_bytes"):
        make_model(files, MIXTURE_OR_TASK_NAME="'plain_byte'", **given)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_under_t5x(recipe, make_model):
    """The optimizer of a run trains what the recipe's methods train."""
    made = make_model(["t5x/finetune.gin", f"methods/{recipe}"], **ELSEWHERE, **STDLIB)
    found = made.module.config
    assert [m.name for m in found.methods] == list(gin.query_parameter("%METHODS"))
    leaves = shapes(found)["params"]
    state = jax.eval_shape(made.optimizer_def.init_state, leaves)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(state.param_states) if leaf.ndim)
    assert sizes >= 2 * trees.count(methods.partition(found, leaves)[0])


def test_the_checkpoint_is_compared_before_anything_is_restored(make_model, tmp_path):
    """A training takes what there is, unless NEW_LEAVES demands one kind."""
    recipe = ["methods/coda.gin"]
    first = make_model(["t5x/finetune.gin", *recipe], **ELSEWHERE, **STDLIB).module.config
    saved = {}
    for name, cfg in (("dense", first.dense()), ("adapted", first)):
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes(cfg)["params"])
        saved[name] = checkpoints.save_t5x(tmp_path / name, params)
        make_model(["t5x/finetune.gin", *recipe], saved[name], **STDLIB)
    for run, given, fits, other in (
        ("finetune", {"NEW_LEAVES": "'created'"}, "dense", "adapted"),
        ("finetune", {"NEW_LEAVES": "'restored'"}, "adapted", "dense"),
        ("infer", {}, "adapted", "dense"),
    ):
        files = [f"t5x/{run}.gin", *recipe]
        make_model(files, saved[fits], **given, **STDLIB)
        with pytest.raises(ValueError, match=f"is an? {other} checkpoint: it has"):
            make_model(files, saved[other], **given, **STDLIB)


def test_a_folder_of_checkpoints_is_for_an_evaluation_of_all_of_them(make_model, tmp_path):
    recipe = ["methods/full.gin"]
    cfg = make_model(["t5x/eval.gin", *recipe], **ELSEWHERE, **STDLIB).module.config
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes(cfg)["params"])
    checkpoints.save_t5x(tmp_path, params)
    with pytest.raises(ValueError, match=r"CHECKPOINT_PATH=.* is the folder of a run"):
        make_model(["t5x/eval.gin", *recipe], tmp_path, **STDLIB)
    mode = {"RestoreCheckpointConfig.mode": "'all'"}
    assert make_model(["t5x/eval.gin", *recipe], tmp_path, **mode, **STDLIB)


def test_another_method_than_the_checkpoints_is_refused_at_once(make_model, tmp_path, caplog):
    """Where the methods' leaves are restored, and where T5X goes on in the run's folder."""
    own = tmp_path / "run"
    recipe = ["t5x/infer.gin", "methods/coda.gin"]
    cfg = make_model(recipe, **ELSEWHERE, **STDLIB).module.config
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes(cfg)["params"])
    checkpoint = checkpoints.save_t5x(own, params)
    write_record(run_folder(own), cfg)
    make_model(recipe, checkpoint, **STDLIB)
    make_model(recipe, checkpoint, REDUCTION="5", **STDLIB)
    assert [x for x in caplog.messages if "trained at r = 3, evaluated at r = 5" in x]
    changed = {"Coda.attention": "'k_to_all'", **STDLIB}
    with pytest.raises(ValueError, match="attention: there 'k_to_k', here 'k_to_all'"):
        make_model(recipe, checkpoint, **changed)
    made = make_model(recipe, checkpoint, CHANGE_METHODS="True", **changed)
    assert made.module.config.methods[0].attention == "k_to_all"

    training = ["t5x/finetune.gin", "methods/coda.gin"]
    gone = tmp_path / "gone"  # T5X does not read it any more
    make_model(training, gone, MODEL_DIR=f"'{own}'", **STDLIB)
    with pytest.raises(ValueError, match=r"reduction: there 3.*, here 5"):
        make_model(training, gone, MODEL_DIR=f"'{own}'", REDUCTION="5", **STDLIB)


def test_a_run_says_in_its_folder_what_its_model_is(tmp_path):
    t5x_models.summarize_config(str(tmp_path), None, 0, config=CONFIG, data={})
    assert read_record(run_folder(tmp_path)) == CONFIG
    assert (tmp_path / "config.gin").exists()


def test_beams_act_in_the_evaluation_of_a_training(make_model):
    files = ["t5x/finetune.gin", "methods/coda.gin"]
    made = make_model(files, NUM_BEAMS="4", ALPHA="0.3", **ELSEWHERE, **STDLIB)
    assert made._default_decoder_params.num_decodes == 4
    assert made.decode_fn.keywords == {"alpha": 0.3}


@pytest.mark.parametrize(("num_beams", "length"), [(1, 1), (2, 8)])
def test_one_beam_is_greedy(num_beams, length):
    """The end is likeliest at first; a longer output that is as likely has the better score."""

    def logits(state):
        first, last = (jnp.asarray(state.cur_index).max() == step for step in (0, 7))
        ends, goes_on = jnp.where(first, 0.51, last), jnp.where(first, 0.49, ~last)
        probabilities = jnp.stack([jnp.zeros(()), ends, goes_on])
        return jnp.log(jnp.tile(probabilities + 1e-6, (len(state.cur_token), 1))), state.cache

    search = t5x_models.beam_search()
    given = {"inputs": jnp.zeros((3, 10), jnp.int32), "cache": {}, "tokens_to_logits": logits}
    found, scores = search(**given, eos_id=1, num_decodes=num_beams, cache_offset=0)
    expected = [2] * (length - 1) + [1] + [0] * (10 - length)
    assert found[:, -1].tolist() == [expected] * 3
    if num_beams == 1:
        np.testing.assert_allclose(scores, np.full((3, 1), np.log(0.51)), atol=1e-4)


def test_beams_given_as_t5x_has_them_act_on_our_class(make_model, tmp_path):
    own = tmp_path / "own.gin"
    own.write_text(
        "from __gin__ import dynamic_registration\nfrom coda_jax import t5x_models\n"
        "t5x_models.CodaEncoderDecoderModel.predict_batch_with_aux.num_decodes = 4\n"
    )
    make_model(["t5x/finetune.gin", "methods/coda.gin", str(own)], **ELSEWHERE, **STDLIB)
    reached = configuration.reachable(T5X_SCRIPT.train)
    assert [key for key in reached if key[2] == "num_decodes" and "predict_batch" in key[1]]
