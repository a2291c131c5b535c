"""`coda convert`: nothing changes on the way, and what does not belong together is refused."""

import shutil

from helpers import ADAPTER, GOLDEN, adapted_params, assert_same_tree, unpack
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import checkpoints, cli, methods, trees
from coda_jax.checkpoints.adapter import read_manifest
from coda_jax.checkpoints.t5x import is_of_scalable_t5
from coda_jax.checkpoints.t5x_record import RECORD, run_folder, write_record
from coda_jax.commands.convert import convert
from coda_jax.data.vocabularies import find_fingerprint
from coda_jax.data.vocabulary_files import SPIECE
from coda_jax.methods import Coda, Full, Lora
from coda_jax.models.t5.config import infer_config

METHODS = (Coda(reduction=(1, 2.5), epsilon=0.1, attention="k_to_all"), ADAPTER)


# --- Round trips ---


@pytest.mark.parametrize("name", ["v1_1", "v1_0", "mt5"])
def test_hf_to_t5x_to_hf_is_bit_identical(tmp_path, name):
    config, params = checkpoints.load_hf(GOLDEN / name)
    convert(GOLDEN / name, tmp_path / "t5x", "t5x")
    convert(tmp_path / "t5x", tmp_path / "hf", "hf")
    again_config, again = checkpoints.load_hf(tmp_path / "hf")
    assert again_config == config
    assert_same_tree(again, params)


@pytest.mark.parametrize("name", ["v1_1", "v1_0"])
def test_a_scanned_checkpoint_makes_the_round_trip(tmp_path, name, capsys, caplog):
    """Stacked for T5X's scalable T5, and back, with and without what says its config."""
    config, params = checkpoints.load_hf(GOLDEN / name)
    convert(GOLDEN / name, tmp_path / "t5x", "t5x", scan_layers=True)
    assert "(t5x, of T5X's scalable T5)" in capsys.readouterr().out
    assert is_of_scalable_t5(tmp_path / "t5x")
    said = "t5x/checkpoint_0 is of T5X's scalable T5: its layers are taken apart"
    for output in ("hf", "without"):
        convert(tmp_path / "t5x", tmp_path / output, "hf")
        assert_same_tree(checkpoints.load_hf(tmp_path / output)[1], params)
        (tmp_path / "t5x" / RECORD).unlink(missing_ok=True)
    assert [said in message for message in caplog.messages] == [True]
    assert checkpoints.load_hf(tmp_path / "hf")[0] == config


def test_what_is_merged_is_scanned_and_other_methods_are_not(base, tmp_path):
    base_config, base_params = checkpoints.load_hf(base)
    for name, adaptation in (("lora", (Lora(rank=2),)), ("coda", METHODS)):
        config = base_config.replace(methods=adaptation)
        params = adapted_params(config, base_params)
        checkpoints.save_adapter(tmp_path / name, config, params)
    convert(tmp_path / "lora", tmp_path / "t5x", "t5x", base=base, scan_layers=True)
    config = base_config.replace(methods=(Lora(rank=2),))
    merged = methods.merge(config, adapted_params(config, base_params))[1]
    assert_same_tree(checkpoints.load_t5x(tmp_path / "t5x", base_config), merged)
    with pytest.raises(ValueError, match=r"no place for \d+ leaves of this model, such as .*/adap"):
        convert(tmp_path / "coda", tmp_path / "x", "t5x", base=base, scan_layers=True)
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="SCAN_LAYERS=True is of LAYOUT='t5x', not of 'hf'"):
        convert(base, tmp_path / "x", "hf", scan_layers=True)


def test_what_shapes_do_not_tell_comes_from_the_config(tmp_path):
    config, params = checkpoints.load_hf(GOLDEN / "byt5")  # 16 buckets up to distance 20
    convert(GOLDEN / "byt5", tmp_path / "t5x", "t5x")
    (tmp_path / "t5x" / RECORD).unlink()
    with pytest.raises(ValueError, match="16 buckets"):
        convert(tmp_path / "t5x", tmp_path / "hf", "hf")
    convert(tmp_path / "t5x", tmp_path / "hf", "hf", config=config)
    again_config, again = checkpoints.load_hf(tmp_path / "hf")
    assert again_config == config
    assert_same_tree(again, params)


@pytest.mark.parametrize("name", ["v1_1", "v1_0"])
def test_adapters_make_the_round_trip(tmp_path, name):
    dense_config, base = checkpoints.load_hf(GOLDEN / name)
    config = dense_config.replace(methods=METHODS)
    params = adapted_params(config, base)
    checkpoints.save_adapter(tmp_path / "adapter", config, params)
    convert(tmp_path / "adapter", tmp_path / "t5x", "t5x", base=GOLDEN / name)
    assert_same_tree(checkpoints.load_t5x(tmp_path / "t5x", config), params)

    convert(tmp_path / "t5x", tmp_path / "hf", "hf", methods=METHODS)
    again_dense_config, dense = checkpoints.load_hf(tmp_path / "hf")
    assert again_dense_config == dense_config
    adapter = tmp_path / "hf" / "adapter"
    again_config, again = checkpoints.load_adapter(adapter, dense_config, dense)
    assert again_config == config
    assert_same_tree(again, params)
    # The new dense checkpoint has the norms that were trained; the adapter brings its own.
    assert_same_tree(checkpoints.load_adapter(adapter, dense_config, base)[1], params)


def test_an_adapter_file_keeps_its_vocabulary(base, tmp_path):
    config, params = checkpoints.load_hf(base)
    found = find_fingerprint(base)
    config = config.replace(methods=METHODS)
    params = adapted_params(config, params)
    checkpoints.save_adapter(tmp_path / "adapter", config, params, vocabulary=found)
    convert(tmp_path / "adapter", tmp_path / "hf", "hf", base=base)
    assert read_manifest(tmp_path / "hf" / "adapter")["vocabulary"] == found
    assert (tmp_path / "hf" / SPIECE).read_text() == "pieces"


def test_a_lora_of_peft_makes_the_round_trip(tmp_path):
    """To an adapter file, to peft's, and into a merged checkpoint that transformers reads."""
    peft, base = GOLDEN / "peft" / "dora", GOLDEN / "v1_1"
    convert(peft, tmp_path / "adapter", "adapter", base=base)
    loaded = checkpoints.load_hf(base)
    config, params = checkpoints.load_adapter(tmp_path / "adapter", *loaded)
    expected_config, expected = checkpoints.load_peft(peft, *loaded)
    assert config == expected_config
    assert_same_tree(params, expected)
    convert(tmp_path / "adapter", tmp_path / "peft", "peft", base=base)
    again = checkpoints.load_peft(tmp_path / "peft", *loaded)[1]
    for path, leaf in trees.flatten(again).items():  # a magnitude is added to a norm, and back
        np.testing.assert_allclose(leaf, trees.flatten(params)[path], atol=1e-6, err_msg=path)
    convert(tmp_path / "peft", tmp_path / "hf", "hf", base=base)
    merged = checkpoints.load_hf(tmp_path / "hf")[1]
    for path, leaf in trees.flatten(methods.merge(config, params)[1]).items():
        np.testing.assert_allclose(
            trees.flatten(merged)[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path
        )


def test_the_folder_of_a_merged_method_is_the_trained_model(base, tmp_path, capsys):
    base_config, base_params = checkpoints.load_hf(base)
    config = base_config.replace(methods=(Lora(rank=2),), dropout_rate=0.0)
    params = adapted_params(config, base_params)
    checkpoints.save_adapter(tmp_path / "adapter", config, params)
    source = shutil.copytree(base, tmp_path / "base")
    (source / "generation_config.json").write_text('{"num_beams": 4}')
    convert(tmp_path / "adapter", tmp_path / "hf", "hf", base=source)
    loaded_config, loaded = checkpoints.load_hf(tmp_path / "hf")
    assert loaded_config == base_config  # its dropout, too
    assert_same_tree(loaded, methods.merge(config, params)[1])
    assert (tmp_path / "hf" / "generation_config.json").read_text() == '{"num_beams": 4}'
    assert not (tmp_path / "hf" / "adapter").exists()
    assert "(hf, with ['lora'] merged into its weights)" in capsys.readouterr().out


def test_beside_an_adapter_the_base_is_as_it_was(base, tmp_path, capsys):
    base_config, base_params = checkpoints.load_hf(base)
    config = base_config.replace(methods=(*METHODS, Lora(rank=2)), dropout_rate=0.0)
    params = adapted_params(config, base_params)
    checkpoints.save_adapter(tmp_path / "adapter", config, params)
    convert(tmp_path / "adapter", tmp_path / "hf", "hf", base=base)
    loaded_config, loaded = checkpoints.load_hf(tmp_path / "hf")
    assert loaded_config == base_config
    assert_same_tree(loaded, base_params)  # the norms are not those that were trained
    again = checkpoints.load_adapter(tmp_path / "hf" / "adapter", loaded_config, loaded)
    assert_same_tree(again[1], params)
    assert "weights are the base alone, and only coda_jax reads" in capsys.readouterr().out


def test_a_head_that_no_folder_can_hold_stays_in_the_adapter(base, tmp_path):
    base_config, base_params = checkpoints.encoder_of(*checkpoints.load_hf(base))
    checkpoints.save_hf(tmp_path / "base", base_config, base_params)
    head = {"head": "classification", "labels": ("a", "b")}
    config = base_config.replace(methods=(Lora(rank=2),), **head)
    params = adapted_params(config, base_params)
    checkpoints.save_adapter(tmp_path / "adapter", config, params)
    convert(tmp_path / "adapter", tmp_path / "hf", "hf", base=tmp_path / "base")
    loaded = checkpoints.load_hf(tmp_path / "hf")
    assert_same_tree(loaded[1], base_params)
    assert_same_tree(checkpoints.load_adapter(tmp_path / "hf" / "adapter", *loaded)[1], params)


def test_transformers_reads_a_checkpoint_of_t5x(tmp_path):
    """From T5X's own file to the logits of transformers, compared with T5X's."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name in ("legacy", "orbax", "scanned"):
        convert(unpack(f"t5x/{name}", tmp_path / name), tmp_path / f"hf_{name}", "hf")
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


def test_a_folder_that_it_wrote_itself_comes_back_with_its_adapter(base, tmp_path, capsys):
    """Base and `adapter/`: both are what was trained."""
    config, params = checkpoints.load_hf(base)
    config = config.replace(methods=METHODS)
    params = adapted_params(config, params)
    found = find_fingerprint(base)
    checkpoints.save_adapter(tmp_path / "adapter", config, params, vocabulary=found)
    convert(tmp_path / "adapter", tmp_path / "hf", "hf", base=base)
    convert(tmp_path / "hf", tmp_path / "t5x", "t5x")
    assert f", {trees.count(params):,} parameters" in capsys.readouterr().out
    assert_same_tree(checkpoints.load_t5x(tmp_path / "t5x", config), params)
    convert(tmp_path / "hf", tmp_path / "again", "adapter")
    for name in ("adapter.json", "adapter.safetensors"):
        first, second = (tmp_path / x / name for x in ("adapter", "again"))
        assert first.read_bytes() == second.read_bytes()
    (tmp_path / "hf" / "adapter" / "adapter.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="adapter"):
        convert(tmp_path / "hf", tmp_path / "other", "t5x")


# --- Adapter files out of training checkpoints ---


@pytest.fixture(name="t5x_run", scope="module")
def fixture_t5x_run(base, tmp_path_factory):
    """A T5X run of the base: float32 as T5X trains it, with two checkpoints."""
    config, dense = checkpoints.load_hf(base)
    config = config.replace(methods=METHODS)
    dense = jax.tree.map(lambda x: x.astype(np.float32), dense)
    folder = tmp_path_factory.mktemp("t5x_run")
    for step in (10, 20):
        params = adapted_params(config, dense, seed=step)
        checkpoints.save_t5x(folder, params, step)
    return folder, config, params


def test_the_adapter_of_a_t5x_run_belongs_to_its_base_again(t5x_run, base, tmp_path):
    folder, config, params = t5x_run
    convert(folder, tmp_path / "adapter", "adapter", base=base, methods=METHODS)
    base_config, base_params = checkpoints.load_hf(base)
    loaded_config, loaded = checkpoints.load_adapter(tmp_path / "adapter", base_config, base_params)
    assert loaded_config == config
    trained, _ = methods.partition(config, params)
    _, frozen = methods.partition(config, base_params)
    assert frozen["token_embedder"]["embedding"].dtype == jnp.bfloat16
    assert_same_tree(loaded, trees.merge(trained, frozen))

    convert(folder, tmp_path / "other", "adapter", methods=METHODS)
    with pytest.raises(ValueError, match="belongs to another base"):  # of float32 leaves
        checkpoints.load_adapter(tmp_path / "other", base_config, base_params)


def test_the_folder_of_a_t5x_run_says_how_it_was_trained(t5x_run, base, tmp_path):
    folder = shutil.copytree(t5x_run[0], tmp_path / "run")
    config = t5x_run[1]
    write_record(run_folder(folder), config.replace(dtype="bfloat16", dropout_rate=0.0))
    convert(folder, tmp_path / "adapter", "adapter", base=base)
    assert checkpoints.load_adapter(tmp_path / "adapter", *checkpoints.load_hf(base))[0] == config
    other = (Coda(reduction=5, epsilon=0.1, attention="k_to_all"), ADAPTER)
    for source in (folder, folder / "checkpoint_20"):
        with pytest.raises(ValueError, match=r"coda/reduction: there \[1, 2\.5\], here 5"):
            convert(source, tmp_path / "x", "hf", methods=other)
    with pytest.raises(ValueError, match=r"num_heads: there .*, here "):
        convert(folder, tmp_path / "x", "hf", config=config.dense().replace(num_heads=1))
    convert(folder, tmp_path / "t5x", "t5x", step=10)
    convert(folder, tmp_path / "t5x", "t5x")  # the same run's
    convert(tmp_path / "t5x", tmp_path / "hf", "hf")
    assert read_manifest(tmp_path / "hf" / "adapter")["config"]["methods"][0]["reduction"][1] == 2.5
    with pytest.raises(ValueError, match="t5x was trained with other settings"):
        convert(base, tmp_path / "t5x", "t5x")
    assert not (tmp_path / "t5x" / "checkpoint_0").exists()


def test_a_step_of_a_t5x_run_is_chosen(t5x_run, tmp_path):
    folder, config, _ = t5x_run
    convert(folder, tmp_path / "t5x", "t5x", step=10, methods=METHODS)
    assert (tmp_path / "t5x" / "checkpoint_10").is_dir()
    expected = checkpoints.load_t5x(folder, config, 10)
    assert_same_tree(checkpoints.load_t5x(tmp_path / "t5x", config), expected)


def test_a_run_of_all_leaves_becomes_a_base(t5x_run, tmp_path):
    """What trains every leaf leaves nothing of itself behind."""
    folder, config, params = t5x_run
    convert(folder, tmp_path / "hf", "hf", methods=(*METHODS, Full()))
    base_config, dense = checkpoints.load_hf(tmp_path / "hf")
    adapter = tmp_path / "hf" / "adapter"
    loaded_config, loaded = checkpoints.load_adapter(adapter, base_config, dense)
    assert loaded_config == config
    assert_same_tree(loaded, params)


def test_a_base_whose_leaves_were_not_frozen_is_refused(t5x_run, base, tmp_path):
    _, _, params = t5x_run
    flat = dict(trees.flatten(params))
    path = "decoder/layers_1/mlp/wo/kernel"
    flat[path] = np.nextafter(flat[path], np.float32(9))
    checkpoints.save_t5x(tmp_path / "run", trees.unflatten(flat))
    with pytest.raises(ValueError, match=rf"not trained from this base.*\n  {path}$"):
        convert(tmp_path / "run", tmp_path / "x", "adapter", base=base, methods=METHODS)
    assert not (tmp_path / "x").exists()


# --- The command, and what it refuses ---


def test_the_command_takes_a_recipe_after_its_own_file(t5x_run, base, tmp_path, capsys):
    folder, config, params = t5x_run
    arguments = [
        "convert",
        "--gin_file=runs/convert.gin",
        f"--gin.INPUT={folder}",
        f"--gin.OUTPUT={tmp_path}/hf",
        "--gin.LAYOUT=hf",
        f"--gin.INITIAL_CHECKPOINT_PATH={base}",
    ]
    with pytest.raises(
        ValueError, match=r"with the methods \[\], (.*\n)+  extra: .*adapter/wi/kernel"
    ):
        cli.run(arguments)
    recipe = ["--gin_file=methods/coda.gin", "--gin.ParallelAdapter.bottleneck=4"]
    recipe += ["--gin.REDUCTION=(1, 2.5)", "--gin.Coda.epsilon=0.1"]
    assert cli.main([*arguments, *recipe, "--gin.Coda.attention=k_to_all"]) == 0
    assert f"step 20, {trees.count(params):,} parameters" in capsys.readouterr().out
    base_config, dense = checkpoints.load_hf(tmp_path / "hf")
    loaded, _ = checkpoints.load_adapter(tmp_path / "hf" / "adapter", base_config, dense)
    assert loaded == config


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layout": "pytorch"}, "LAYOUT must be one of .*'hf', 't5x', 'adapter'.* got 'pytorch'"),
        ({"layout": "adapter"}, "nothing to save"),
        ({"layout": "t5x", "step": 3}, "Hugging Face checkpoint, which needs no STEP"),
        ({"layout": "t5x", "methods": METHODS}, "needs no METHODS"),
        ({"layout": "t5x", "base": "x"}, "needs no INITIAL_CHECKPOINT_PATH"),
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
    flat = dict(trees.flatten(params))
    for path in ("encoder/layers_1/router/kernel", "decoder/layers_0/mlp/wo/kernel"):
        del flat[path]
    checkpoints.save_t5x(tmp_path / "run", trees.unflatten(flat))
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "run", tmp_path / "x", "hf", methods=METHODS)
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
    flat = dict(trees.flatten(params))
    for path, shape in change.items():
        flat[path] = np.ones(shape or ())
        if shape is None:
            del flat[path]
    with pytest.raises(ValueError, match=text):
        infer_config(trees.unflatten(flat))
