"""`coda convert` of runs of `coda train`: of this version, and of version 1."""

import hashlib
import json
import shutil

from helpers import ADAPTER, assert_same_tree, unpack
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from coda_jax import checkpoints, methods, trees
from coda_jax.checkpoints.adapter import read_manifest
from coda_jax.checkpoints.zarr_arrays import list_orbax
from coda_jax.commands import loading
from coda_jax.commands.convert import convert
from coda_jax.commands.train import train
from coda_jax.data import source
from coda_jax.data.cache import write_cache
from coda_jax.data.vocabulary_files import SPIECE
from coda_jax.methods import Coda, Full, ParallelAdapter
from coda_jax.training.trainer import TrainOptions

PIECES = hashlib.sha256(b"pieces").hexdigest()  # of the vocabulary beside the base
METHODS = (Coda(reduction=2.5, routing="sigmoid"), ADAPTER)


def trained(folder, checkpoint, adaptation, steps=4, save_every=2):
    """Trains a checkpoint on a cache of random bytes; returns what `train` does."""
    rng = np.random.default_rng(0)
    cache = folder.parent / "cache.npz"
    examples = [{k: rng.integers(2, 20, 6) for k in ("inputs", "targets")} for _ in range(8)]
    write_cache(cache, examples, {"vocabulary": PIECES, "vocab_size": 20})
    return train(
        str(folder),
        loading.load_model(str(checkpoint), methods=adaptation),
        source.Data({"inputs": 8, "targets": 8}, cache=str(cache), batch_size=4),
        TrainOptions(steps, save_every=save_every),
        optimizer=optax.adamw,
        learning_rate=0.1,
    )


@pytest.fixture(name="old", scope="module")
def fixture_old(tmp_path_factory):
    """The folders that version 1 wrote, see golden/make_version_1.py."""
    return unpack("version_1/files", tmp_path_factory.mktemp("version_1"))


@pytest.fixture(name="base", scope="module")
def fixture_base(old, tmp_path_factory):
    """A dense Hugging Face checkpoint in bfloat16, with a vocabulary beside it."""
    folder = shutil.copytree(old / "base", tmp_path_factory.mktemp("base") / "dense")
    (folder / SPIECE).write_text("pieces")
    return folder


@pytest.fixture(name="run", scope="module")
def fixture_run(old, tmp_path_factory):
    """The folder of a run that trained adapters and routers."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    trained(folder, old / "base", METHODS)
    return folder


@pytest.mark.all
def test_the_adapter_of_a_run_is_what_the_run_exported(run, base, tmp_path):
    convert(run, tmp_path / "adapter", "adapter", base=base)
    for name in ("adapter.json", "adapter.safetensors"):
        exported = (run / "export" / "adapter" / name).read_bytes()
        assert (tmp_path / "adapter" / name).read_bytes() == exported
    assert read_manifest(tmp_path / "adapter")["vocabulary"] == PIECES
    convert(run, tmp_path / "earlier", "adapter", base=base, step=2)
    earlier, last = (load_file(tmp_path / name / "adapter.safetensors")
                     for name in ("earlier", "adapter"))  # fmt: skip
    assert all((earlier[path] != last[path]).any() for path in last if "decoder" in path)


def test_a_run_is_turned_into_a_checkpoint_of_either_layout(run, base, tmp_path):
    base_config, base_params = checkpoints.load_hf(base)
    adapter = run / "export" / "adapter"
    config, params = checkpoints.load_adapter(adapter, base_config, base_params)
    convert(run, tmp_path / "t5x", "t5x", base=base)
    assert (tmp_path / "t5x" / "checkpoint_4").is_dir()
    assert (tmp_path / "t5x" / SPIECE).read_text() == "pieces"
    assert_same_tree(checkpoints.load_t5x(tmp_path / "t5x", config), params)

    convert(run, tmp_path / "hf", "hf", base=base)
    assert (tmp_path / "hf" / SPIECE).read_text() == "pieces"
    loaded = checkpoints.load_adapter(
        tmp_path / "hf" / "adapter", *checkpoints.load_hf(tmp_path / "hf")
    )
    assert_same_tree(loaded[1], params)


def test_a_run_needs_its_own_base_and_a_step_that_it_has(run, base, old, tmp_path):
    with pytest.raises(ValueError, match=r"give the base .* --gin.INITIAL_CHECKPOINT_PATH="):
        convert(run, tmp_path / "x", "adapter")
    with pytest.raises(ValueError, match=r"from another base than (.*\n)+  token_embedder/emb"):
        convert(run, tmp_path / "x", "adapter", base=old / "run_all" / "export")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step=3. Steps found: \[2, 4\]"):
        convert(run, tmp_path / "x", "adapter", base=base, step=3)
    assert not (tmp_path / "x").exists()


def test_a_damaged_checkpoint_of_a_run_is_refused(run, base, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    checkpoints = folder / "checkpoints"
    shutil.rmtree(checkpoints / "4" / "state")
    shutil.copytree(checkpoints / "2" / "state", checkpoints / "4" / "state")  # other leaves
    sentence = r"checkpoints/4 is damaged: the leaf trained/\S+ and \d+ more is not what was saved"
    with pytest.raises(ValueError, match=sentence):
        convert(folder, tmp_path / "x", "adapter", base=base)
    convert(folder, tmp_path / "x", "adapter", base=base, step=2)


def test_what_is_converted_goes_with_the_vocabulary_that_it_was_trained_with(run, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    (other / SPIECE).write_text("other pieces")
    for layout in ("hf", "adapter", "t5x"):
        with pytest.raises(ValueError, match=f"another vocabulary than that of {other} .*{PIECES}"):
            convert(run, tmp_path / "x", layout, base=other)
    assert not (tmp_path / "x").exists()


def test_a_folder_that_holds_something_is_not_written(run, base, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("mine")
    for layout in ("hf", "adapter"):
        with pytest.raises(FileExistsError, match="x is not empty; name a new folder"):
            convert(run, tmp_path / "x", layout, base=base)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["notes.txt"]


def test_leaves_that_are_no_models_are_refused(run, base, tmp_path):
    """A run whose description was changed does not lose what it trained."""
    folder = shutil.copytree(run, tmp_path / "run")
    described = json.loads((folder / "run.json").read_text())
    described["config"]["methods"] = described["config"]["methods"][1:]
    (folder / "run.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="extra: encoder/layers_0/router/kernel"):
        convert(folder, tmp_path / "x", "hf", base=base)


@pytest.mark.all
def test_a_run_of_all_leaves_needs_no_base(old, base, tmp_path):
    run = tmp_path / "run"
    trained(run, old / "base", (ADAPTER, Full()), steps=1)
    convert(run, tmp_path / "hf", "hf")
    for path in ("model.safetensors", "config.json", "adapter/adapter.safetensors"):
        assert (tmp_path / "hf" / path).read_bytes() == (run / "export" / path).read_bytes()
    with pytest.raises(ValueError, match="holds all leaves"):
        convert(run, tmp_path / "x", "hf", base=base)


@pytest.mark.parametrize(
    "description",
    [
        {"model": {"vocab_size": 3}, "trained": "all"},
        {"model": {"family": "t5", "vocab_size": 3, "depth": 3}, "trained": "all"},
        {"model": {"family": "t5", "vocab_size": 3}},
        {"format_version": 3},
        {"format_version": 3, "config": {"family": "t5"}},
        {"format_version": 2, "config": {"family": "t5", "vocab_size": 3}},
    ],
)
def test_a_run_whose_description_is_damaged_is_named(tmp_path, description):
    (tmp_path / "run.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"run\.json does not describe a model"):
        convert(tmp_path, tmp_path / "x", "hf")


# --- What version 1 wrote ---


OLD_METHODS = (
    Coda(reduction=(2.5,), epsilon=0.1, attention="k_to_all"),
    ParallelAdapter(bottleneck=4, activation="gelu"),
)


@pytest.fixture(name="adapted", scope="module")
def fixture_adapted(old):
    """(config, parameters) of what the run of version 1 exported."""
    adapter = old / "run" / "export" / "adapter"
    return checkpoints.load_adapter(adapter, *checkpoints.load_hf(old / "base"))


@pytest.mark.parametrize("source", ["run", "run/export/adapter"])
@pytest.mark.parametrize("layout", ["adapter", "hf", "t5x"])
def test_an_old_run_and_its_adapter_are_converted_to_every_layout(
    old, adapted, source, layout, tmp_path
):
    config, params = adapted
    assert config.methods == OLD_METHODS
    convert(old / source, tmp_path, layout, base=old / "base")
    if layout == "t5x":
        assert_same_tree(checkpoints.load_t5x(tmp_path, config), params)
        return
    base, adapter = (old / "base", tmp_path) if layout == "adapter" else (tmp_path, None)
    loaded = checkpoints.load_adapter(adapter or base / "adapter", *checkpoints.load_hf(base))
    assert loaded[0] == config
    assert_same_tree(loaded[1], params)
    tensors = old / "run" / "export" / "adapter" / "adapter.safetensors"
    assert_same_tree(
        load_file((adapter or base / "adapter") / "adapter.safetensors"), load_file(tensors)
    )


def test_an_old_run_needs_its_own_base(old, tmp_path):
    with pytest.raises(ValueError, match=r"another base than .*run_all(.*\n)+  the fingerprint"):
        convert(old / "run", tmp_path / "x", "hf", base=old / "run_all" / "export")
    with pytest.raises(ValueError, match="give the base"):
        convert(old / "run", tmp_path / "x", "hf")


@pytest.mark.parametrize("name", ["run_all", "run_best_rq"])
def test_an_old_run_of_all_leaves_gives_what_it_exported(old, name, tmp_path):
    """Also one that was pretrained with BEST-RQ, whose own head is left out."""
    convert(old / name, tmp_path, "hf")
    loaded, expected = (checkpoints.load_hf(path) for path in (tmp_path, old / name / "export"))
    assert loaded[0] == expected[0]
    assert_same_tree(loaded[1], expected[1])
    path = "adapter/adapter.safetensors"
    assert_same_tree(load_file(tmp_path / path), load_file(old / name / "export" / path))
    stored = list_orbax(old / name / "checkpoints" / "3" / "state")
    assert any("best_rq_head" in path for path in stored) == (name == "run_best_rq")


def test_an_old_t5x_checkpoint_is_converted(old, adapted, tmp_path):
    config, params = adapted
    convert(old / "t5x", tmp_path, "adapter", base=old / "base", methods=OLD_METHODS)
    loaded = checkpoints.load_adapter(tmp_path, *checkpoints.load_hf(old / "base"))
    assert loaded[0] == config
    assert_same_tree(loaded[1], params)


def test_an_old_run_goes_on_from_its_adapter_but_not_in_its_folder(old, adapted, tmp_path):
    run = shutil.copytree(old / "run", tmp_path / "run")
    with pytest.raises(ValueError, match=r"format_version=1, which .* cannot continue: `coda conv"):
        trained(run, old / "base", OLD_METHODS)
    before = sorted(path.relative_to(old / "run") for path in (old / "run").rglob("*"))
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before

    adapter = run / "export" / "adapter"
    loaded = loading.load_model(str(old / "base"), adapter_checkpoint=str(adapter))
    assert loaded.config.methods == OLD_METHODS
    frozen = trees.flatten(methods.partition(loaded.config, loaded.params)[1])
    assert frozen and trees.flatten(loaded.params).keys() == trees.flatten(adapted[1]).keys()
