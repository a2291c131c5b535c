"""`coda convert`: nothing changes on the way, and what does not belong together is refused."""

import dataclasses
import json
from pathlib import Path
import shutil
import tarfile

import gin
from helpers import assert_same_tree, logits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from coda_jax import batches as batches_lib
from coda_jax import checkpoints, cli, runs, training
from coda_jax import params as params_lib
from coda_jax.adapters import AdapterConfig
from coda_jax.convert import convert, infer_config
from coda_jax.routing import CodaConfig

GOLDEN = Path(__file__).parent / "golden"
ADAPTER = AdapterConfig(bottleneck=4)
CODA = CodaConfig(reduction=(1, 2.5), epsilon=0.1, attention="k_to_all")


@pytest.fixture(autouse=True)
def clean_gin():
    """Leaves no configuration behind."""
    yield
    gin.clear_config()


def adapted(base, config, seed=0):
    """Returns (config, params) with adapters and routers, every trained leaf changed."""
    config = dataclasses.replace(config, adapter=ADAPTER, coda=CODA)
    trained, frozen = params_lib.partition(checkpoints.swap_in(base, config, jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    trained = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), trained)
    return config, params_lib.merge(trained, frozen)


def golden_logits(config, params, name):
    data = np.load(GOLDEN / name / "logits.npz")
    return np.asarray(
        logits(config, params, *(data[k] for k in ("encoder", "decoder_inputs", "decoder_targets")))
    )


@pytest.fixture(name="base", scope="module")
def fixture_base(tmp_path_factory):
    """A dense Hugging Face checkpoint in bfloat16, with a vocabulary beside it."""
    folder = tmp_path_factory.mktemp("base")
    config, params = checkpoints.load_hf(GOLDEN / "v1_1")
    checkpoints.save_hf(folder, config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    (folder / batches_lib.VOCABULARY_NAME).write_text("pieces")
    return folder


# --- Round trips ---


@pytest.mark.parametrize("name", ["v1_1", "v1_0", "mt5"])
def test_hf_to_t5x_to_hf_is_bit_identical(tmp_path, name):
    config, params = checkpoints.load_hf(GOLDEN / name)
    convert(GOLDEN / name, tmp_path / "t5x", "t5x")
    convert(tmp_path / "t5x", tmp_path / "hf", "hf")
    again_config, again = checkpoints.load_hf(tmp_path / "hf")
    assert again_config == config
    assert_same_tree(again, params)
    first, second = (golden_logits(config, tree, name) for tree in (params, again))
    assert first.tobytes() == second.tobytes()


def test_what_shapes_do_not_tell_comes_from_the_config(tmp_path):
    config, params = checkpoints.load_hf(GOLDEN / "byt5")  # 16 buckets up to distance 20
    convert(GOLDEN / "byt5", tmp_path / "t5x", "t5x")
    with pytest.raises(ValueError, match="16 buckets"):
        convert(tmp_path / "t5x", tmp_path / "hf", "hf")
    convert(tmp_path / "t5x", tmp_path / "hf", "hf", config=config)
    again_config, again = checkpoints.load_hf(tmp_path / "hf")
    assert again_config == config
    assert_same_tree(again, params)


@pytest.mark.parametrize("name", ["v1_1", "v1_0"])
def test_adapters_make_the_round_trip(tmp_path, name):
    dense_config, base = checkpoints.load_hf(GOLDEN / name)
    config, params = adapted(base, dense_config)
    checkpoints.save_adapter(tmp_path / "adapter", params, config)
    convert(tmp_path / "adapter", tmp_path / "t5x", "t5x", base=GOLDEN / name)
    assert_same_tree(checkpoints.load_t5x(tmp_path / "t5x"), params)

    convert(tmp_path / "t5x", tmp_path / "hf", "hf", adapter=ADAPTER, coda=CODA)
    again_dense_config, dense = checkpoints.load_hf(tmp_path / "hf")
    assert again_dense_config == dense_config
    again_config, again = checkpoints.load_adapter(tmp_path / "hf" / "adapter", dense)
    assert again_config == config
    assert_same_tree(again, params)
    first, second = (golden_logits(config, tree, name) for tree in (params, again))
    assert first.tobytes() == second.tobytes()
    # The new dense checkpoint has the norms that were trained; the adapter brings its own.
    assert_same_tree(checkpoints.load_adapter(tmp_path / "hf" / "adapter", base)[1], params)


def test_transformers_reads_a_checkpoint_of_t5x(tmp_path):
    """From T5X's own file to the logits of transformers, compared with T5X's."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name in ("legacy", "orbax", "scanned"):
        with tarfile.open(GOLDEN / "t5x" / f"{name}.tar.xz") as archive:
            archive.extractall(tmp_path / name, filter="data")
        convert(tmp_path / name, tmp_path / f"hf_{name}", "hf")
        model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / f"hf_{name}")
        data = np.load(GOLDEN / "t5x" / "logits.npz")
        encoder = torch.tensor(data["encoder"], dtype=torch.long)
        with torch.no_grad():
            theirs = model.eval()(
                input_ids=encoder,
                attention_mask=(encoder > 0).long(),
                decoder_input_ids=torch.tensor(data["decoder_inputs"], dtype=torch.long),
            ).logits.numpy()
        valid = data["decoder_targets"] > 0
        np.testing.assert_allclose(
            theirs[valid], data[f"logits_{name}"][valid], rtol=1e-4, atol=1e-5
        )


# --- Adapter files out of training checkpoints ---


@pytest.fixture(name="t5x_run", scope="module")
def fixture_t5x_run(base, tmp_path_factory):
    """A T5X run of the base: float32 as T5X trains it, with two checkpoints."""
    config, params = checkpoints.load_hf(base)
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    folder = tmp_path_factory.mktemp("t5x_run")
    for step in (10, 20):
        config_and_params = adapted(params, config, seed=step)
        checkpoints.save_t5x(folder, config_and_params[1], step)
    return folder, *config_and_params


def test_the_adapter_of_a_t5x_run_belongs_to_its_base_again(t5x_run, base, tmp_path):
    folder, config, params = t5x_run
    convert(folder, tmp_path / "adapter", "adapter", base=base, adapter=ADAPTER, coda=CODA)
    _, base_params = checkpoints.load_hf(base)
    loaded_config, loaded = checkpoints.load_adapter(tmp_path / "adapter", base_params)
    assert loaded_config == config
    trained, _ = params_lib.partition(params)
    _, frozen = params_lib.partition(base_params)
    assert frozen["token_embedder"]["embedding"].dtype == jnp.bfloat16
    assert_same_tree(loaded, params_lib.merge(trained, frozen))

    convert(folder, tmp_path / "other", "adapter", adapter=ADAPTER, coda=CODA)
    with pytest.raises(ValueError, match="fingerprint"):  # it is that of float32 leaves
        checkpoints.load_adapter(tmp_path / "other", base_params)


def test_a_step_of_a_t5x_run_is_chosen(t5x_run, base, tmp_path):
    folder, *_ = t5x_run
    options = {"adapter": ADAPTER, "coda": CODA}
    convert(folder, tmp_path / "t5x", "t5x", step=10, **options)
    assert (tmp_path / "t5x" / "checkpoint_10").is_dir()
    assert_same_tree(checkpoints.load_t5x(tmp_path / "t5x"), checkpoints.load_t5x(folder, 10))


def test_a_base_whose_leaves_were_not_frozen_is_refused(t5x_run, base, tmp_path):
    _, _, params = t5x_run
    flat = dict(params_lib.flatten(params))
    path = "decoder/layers_1/mlp/wo/kernel"
    flat[path] = np.nextafter(flat[path], np.float32(9))
    checkpoints.save_t5x(tmp_path / "run", params_lib.unflatten(flat))
    with pytest.raises(ValueError, match=rf"not trained from this base.*\n  {path}$"):
        convert(tmp_path / "run", tmp_path / "x", "adapter", base=base, adapter=ADAPTER, coda=CODA)
    assert not (tmp_path / "x").exists()


@pytest.fixture(name="train", scope="module")
def fixture_train(base, tmp_path_factory):
    """Returns a function that trains with the local trainer and returns the run's folder."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    examples = [{k: rng.integers(2, 60, 6) for k in ("inputs", "targets")} for _ in range(8)]
    metadata = {"vocabulary": "bytes", "vocab_size": 64}
    batches_lib.write_cache(folder / "cache.npz", examples, metadata)

    def train(trained):
        checkpoint = shutil.copytree(base, folder / "dense", dirs_exist_ok=True)
        (checkpoint / batches_lib.VOCABULARY_NAME).unlink()  # the examples are bytes
        runs.train(
            str(folder / trained),
            runs.load_model(str(checkpoint), adapter=ADAPTER, coda=CODA),
            runs.Data({"inputs": 8, "targets": 8}, cache=str(folder / "cache.npz"), batch_size=4),
            training.TrainOptions(4, trained=trained, save_every=2),
            optimizer=optax.adamw,
            learning_rate=0.1,
        )
        return folder / trained

    return train


def test_the_adapter_of_a_local_run_is_what_the_run_exported(train, base, tmp_path):
    run = train("adapters")
    convert(run, tmp_path / "adapter", "adapter", base=base)
    for name in ("adapter.json", "adapter.safetensors"):
        exported = (run / "export" / "adapter" / name).read_bytes()
        assert (tmp_path / "adapter" / name).read_bytes() == exported
    convert(run, tmp_path / "earlier", "adapter", base=base, step=2)
    earlier, last = (load_file(tmp_path / name / "adapter.safetensors")
                     for name in ("earlier", "adapter"))  # fmt: skip
    assert all((earlier[path] != last[path]).any() for path in last if "decoder" in path)

    convert(run, tmp_path / "t5x", "t5x", base=base)
    assert (tmp_path / "t5x" / "checkpoint_4").is_dir()
    assert (tmp_path / "t5x" / batches_lib.VOCABULARY_NAME).read_text() == "pieces"
    _, base_params = checkpoints.load_hf(base)
    _, params = checkpoints.load_adapter(tmp_path / "adapter", base_params)
    assert_same_tree(checkpoints.load_t5x(tmp_path / "t5x"), params)

    convert(run, tmp_path / "hf", "hf", base=base)
    assert (tmp_path / "hf" / batches_lib.VOCABULARY_NAME).read_text() == "pieces"
    _, dense = checkpoints.load_hf(tmp_path / "hf")
    assert_same_tree(checkpoints.load_adapter(tmp_path / "hf" / "adapter", dense)[1], params)

    with pytest.raises(ValueError, match="only what was trained"):
        convert(run, tmp_path / "x", "adapter")
    with pytest.raises(ValueError, match=f"trained from the base.*{GOLDEN / 'v1_1'} has"):
        convert(run, tmp_path / "x", "adapter", base=GOLDEN / "v1_1")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step=3. Steps found: \[2, 4\]"):
        convert(run, tmp_path / "x", "adapter", base=base, step=3)


def test_a_local_run_of_all_leaves_needs_no_base(train, base, tmp_path):
    run = train("all")
    convert(run, tmp_path / "hf", "hf")
    for path in ("model.safetensors", "config.json", "adapter/adapter.safetensors"):
        assert (tmp_path / "hf" / path).read_bytes() == (run / "export" / path).read_bytes()
    with pytest.raises(ValueError, match="holds all leaves"):
        convert(run, tmp_path / "x", "hf", base=base)


def test_a_run_whose_description_is_damaged_is_named(tmp_path):
    for model in ({"vocab_size": 3}, {"dtype": "float32", "mlp_activations": [], "depth": 3}):
        (tmp_path / "run.json").write_text(json.dumps({"model": model, "trained": "all"}))
        with pytest.raises(ValueError, match=r"run\.json does not describe a model"):
            convert(tmp_path, tmp_path / "x", "hf")


# --- The command, and what it refuses ---


def test_the_command_takes_a_method_after_its_own_file(t5x_run, base, tmp_path, capsys):
    folder, config, params = t5x_run
    arguments = ["convert", "--gin_file=runs/convert.gin", f"--gin.INPUT='{folder}'",
                 f"--gin.OUTPUT='{tmp_path}/hf'", "--gin.LAYOUT='hf'",
                 f"--gin.INITIAL_CHECKPOINT_PATH='{base}'"]  # fmt: skip
    with pytest.raises(ValueError, match=r"does not say what they do.*methods/coda\.gin"):
        cli.main(arguments)
    method = ["--gin_file=methods/coda.gin", "--gin.AdapterConfig.bottleneck=4"]
    method += ["--gin.REDUCTION=(1, 2.5)", "--gin.CodaConfig.epsilon=0.1"]
    assert cli.main([*arguments, *method, "--gin.CodaConfig.attention='k_to_all'"]) == 0
    assert f"step 20, {params_lib.count(params):,} parameters" in capsys.readouterr().out
    _, dense = checkpoints.load_hf(tmp_path / "hf")
    assert checkpoints.load_adapter(tmp_path / "hf" / "adapter", dense)[0] == config


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layout": "pytorch"}, r"layout='pytorch' is unknown.*'hf', 't5x', 'adapter'"),
        ({"layout": "adapter"}, "nothing to save"),
        ({"layout": "t5x", "step": 3}, r"Hugging Face checkpoint, for which \['step'\]"),
        ({"layout": "t5x", "adapter": ADAPTER, "coda": CODA}, r"\['adapter', 'coda'\] cannot"),
        ({"layout": "t5x", "base": "x"}, r"\['base'\] cannot"),
    ],
)
def test_what_means_nothing_for_a_source_is_refused(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        convert(GOLDEN / "v1_1", tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_a_folder_must_be_one_thing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no T5X checkpoint and has none of \['config"):
        convert(tmp_path, tmp_path / "x", "hf")
    convert(GOLDEN / "v1_1", tmp_path / "both", "t5x")
    shutil.copy(GOLDEN / "v1_1" / "config.json", tmp_path / "both")
    with pytest.raises(ValueError, match=r"several things .*Hugging Face.*T5X"):
        convert(tmp_path / "both", tmp_path / "x", "hf")


def test_leaves_that_a_t5x_checkpoint_lacks_are_listed(t5x_run, tmp_path):
    _, _, params = t5x_run
    flat = dict(params_lib.flatten(params))
    for path in ("encoder/layers_1/router/kernel", "decoder/layers_0/mlp/wo/kernel"):
        del flat[path]
    checkpoints.save_t5x(tmp_path / "run", params_lib.unflatten(flat))
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "run", tmp_path / "x", "hf", adapter=ADAPTER, coda=CODA)
    assert "missing: encoder/layers_1/router/kernel" in str(error.value)
    assert "missing: decoder/layers_0/mlp/wo/kernel" in str(error.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"decoder/logits_dense/kernel": None}, "with gated=True, decoder/logits_dense/kernel"),
        ({"token_embedder/embedding": None}, r"lack the matrices \['token_embedder/embedding'\]"),
        ({"encoder/relpos_bias/rel_embedding": (2,)}, "lack the matrices"),
    ],
)
def test_sizes_are_not_guessed(change, text):
    _, params = checkpoints.load_hf(GOLDEN / "v1_1")
    flat = dict(params_lib.flatten(params))
    for path, shape in change.items():
        flat[path] = np.ones(shape or ())
        if shape is None:
            del flat[path]
    with pytest.raises(ValueError, match=text):
        infer_config(params_lib.unflatten(flat))
