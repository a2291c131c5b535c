"""T5X checkpoints with something missing, damaged or foreign: an error for each (invariant 6)."""

import json
import shutil

from helpers import assert_same_tree
import numpy as np
import pytest
from t5x_formats import (
    CODA,
    FOLDERS,
    KINDS,
    array_folder,
    fresh_params,
    write,
    write_legacy,
    write_zarr,
)

from coda_jax import trees
from coda_jax.checkpoints import load_t5x
from coda_jax.checkpoints.t5x import read_t5x

EMBEDDING = "token_embedder/embedding"
KERNEL = "encoder/layers_0/mlp/wo/kernel"


@pytest.fixture(name="params", scope="module")
def fixture_params():
    return fresh_params()


def first_chunk(folder):
    return next(file for file in sorted(folder.iterdir()) if not file.name.startswith("."))


def truncate(file, keep=0.5):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: first_chunk(folder).unlink(),
        lambda folder: truncate(first_chunk(folder)),
        lambda folder: truncate(first_chunk(folder), 0),
        lambda folder: (folder / ".zarray").unlink(),
        lambda folder: truncate(folder / ".zarray"),
        shutil.rmtree,
    ],
    ids=["no chunk", "half a chunk", "empty chunk", "no .zarray", "half a .zarray", "no folder"],
)
@pytest.mark.parametrize("kind", FOLDERS)
def test_every_damaged_array_is_listed(tmp_path, params, kind, damage):
    write(kind, tmp_path, params)
    zeros = "decoder/layers_0/adapter/wo/kernel"  # would be read as what it was
    for path in (EMBEDDING, KERNEL, zeros):
        damage(array_folder(kind, tmp_path, path))
    with pytest.raises(ValueError, match=r"damaged \(3 leaves\)") as error:
        load_t5x(tmp_path, CODA)
    for path in (EMBEDDING, KERNEL, zeros):
        assert f"{path} cannot be read" in str(error.value)


@pytest.mark.parametrize("keep", [None, 0.5])
def test_a_damaged_store_of_all_arrays_is_an_error_or_does_not_matter(tmp_path, params, keep):
    write("orbax", tmp_path / "sound", params)
    refused = set()
    for file in [path for path in (tmp_path / "sound").rglob("*") if path.is_file()]:
        copy = shutil.copytree(tmp_path / "sound", tmp_path / "copy", dirs_exist_ok=True)
        damaged = copy / file.relative_to(tmp_path / "sound")
        damaged.unlink() if keep is None else truncate(damaged, keep)
        try:
            assert_same_tree(read_t5x(copy)[0], params)
        except (FileNotFoundError, ValueError):
            refused.add(file.parent.name if file.parent.name == "d" else file.name)
    assert {"_METADATA", "manifest.ocdbt", "d"} <= refused


def edit_zarray(folder, **changes):
    metadata = json.loads((folder / ".zarray").read_text())
    (folder / ".zarray").write_text(json.dumps({**metadata, **changes}))


def test_shapes_and_dtypes_are_those_of_the_table(tmp_path, params):
    write("legacy", tmp_path, params)
    edit_zarray(array_folder("legacy", tmp_path, EMBEDDING), shape=[10, 16])
    edit_zarray(array_folder("legacy", tmp_path, KERNEL), dtype="<i4")
    with pytest.raises(ValueError, match=r"2 leaves") as error:
        load_t5x(tmp_path, CODA)
    assert f"{EMBEDDING} has shape (10, 16), the table of leaves says (20, 16)" in str(error.value)
    assert f"{KERNEL} is int32, the table of leaves says float32" in str(error.value)


@pytest.mark.parametrize("kind", FOLDERS)
def test_arrays_that_are_not_in_the_table_are_listed(tmp_path, params, kind):
    write(kind, tmp_path, params)
    for path in ("encoder/layers_9/mlp/wo/kernel", "decoder/new/scale"):
        write_zarr(array_folder(kind, tmp_path, path), np.ones((2, 2), np.float32), [2, 2])
    with pytest.raises(ValueError) as error:
        load_t5x(tmp_path, CODA)
    assert "target.encoder.layers_9.mlp.wo.kernel" in str(error.value)
    assert "target.decoder.new.scale" in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_that_are_not_the_models_are_listed(tmp_path, params, kind):
    flat = dict(trees.flatten(params))
    removed = {path: flat.pop(path) for path in (KERNEL, "decoder/decoder_norm/scale")}
    flat["encoder/encoder_norm/scale"] = np.ones(17, np.float32)
    write(kind, tmp_path, trees.unflatten(flat | {"encoder/odd/kernel": removed[KERNEL]}))
    with pytest.raises(ValueError, match=r"not match the model \(4 leaves\)") as error:
        load_t5x(tmp_path, CODA)
    for path in removed:
        assert f"missing: {path}" in str(error.value)
    assert "wrong shape: encoder/encoder_norm/scale is (17,)" in str(error.value)
    assert "extra: encoder/odd/kernel" in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_are_no_parameters(tmp_path, params, kind):
    flat = trees.flatten(params)
    flat[EMBEDDING] = np.zeros((20, 16), np.uint16)  # as bfloat16 was written before version 3
    write(kind, tmp_path, trees.unflatten(flat))
    with pytest.raises(ValueError, match=f"not floats:\n  {EMBEDDING}: uint16"):
        load_t5x(tmp_path, CODA)


def put(*path, value):
    def edit_tree(tree):
        *parents, name = path
        for key in parents:
            tree = tree[key]
        tree[name] = value

    return edit_tree


@pytest.mark.parametrize(
    ("edit_tree", "text"),
    [
        (put("version", value=1), "version=1"),
        (put("optimizer", value=[3]), "not a list"),
        (put("optimizer", "params", value={"x": np.ones(2)}), "'params', 'state', 'target'"),
        (lambda tree: tree["optimizer"].pop("target"), r"holds \['state'\]"),
        (put("optimizer", "flax_mutables", value={"x": np.ones(2)}), "flax_mutables"),
        (put("optimizer", "target", "step", value=3), "not floats:\n  step: 3"),
    ],
)
def test_a_tree_of_another_kind_is_refused(tmp_path, params, edit_tree, text):
    write_legacy(tmp_path, params, inline=trees.flatten(params), edit_tree=edit_tree)
    with pytest.raises(ValueError, match=text):
        load_t5x(tmp_path, CODA)


@pytest.mark.parametrize(
    "change",
    [
        {"kvstore": {"driver": "file", "path": "../other"}},
        {"kvstore": {"driver": "file", "path": "/etc"}},
        {"kvstore": {"driver": "file", "path": ".."}},
        {"kvstore": {"driver": "file"}},
        {"kvstore": {"driver": "http", "path": "target.x"}},
        {"kvstore": "file:///tmp"},
        {"driver": "n5"},
    ],
)
def test_an_array_elsewhere_is_refused(tmp_path, params, change):
    write_legacy(tmp_path, params, edit_spec=lambda spec: {**spec, **change})
    with pytest.raises(ValueError, match=r"decoder/decoder_norm/scale is (stored|described)"):
        load_t5x(tmp_path, CODA)


@pytest.mark.parametrize("keep", [0, 0.3, 0.99])
def test_a_truncated_msgpack_file_is_named(tmp_path, params, keep):
    write("legacy", tmp_path, params)
    truncate(tmp_path / "checkpoint", keep)
    with pytest.raises(ValueError, match="checkpoint is not a complete msgpack file"):
        load_t5x(tmp_path, CODA)


def test_a_checkpoint_of_tensorflow_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1000000"')
    with pytest.raises(ValueError, match="convert_tf_checkpoint"):
        load_t5x(tmp_path, CODA)


def orbax_table(*keys):
    entry = {"key_metadata": [{"key": key, "key_type": 2} for key in keys]}
    return json.dumps({"tree_metadata": {"x": entry}, "use_ocdbt": False})


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"tree_metadata": {"a": {}}}', orbax_table("target", "x/../../../other")],
)
def test_a_table_of_orbax_that_is_none_is_named(tmp_path, params, content):
    write("orbax", tmp_path, params)
    (tmp_path / "state" / "_METADATA").write_text(content)
    with pytest.raises(ValueError, match="_METADATA"):
        load_t5x(tmp_path, CODA)


def test_a_missing_table_of_orbax_is_named(tmp_path, params):
    write("orbax", tmp_path, params)
    (tmp_path / "state" / "_METADATA").unlink()
    with pytest.raises(FileNotFoundError, match="_METADATA"):
        load_t5x(tmp_path, CODA)
