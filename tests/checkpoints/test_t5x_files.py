"""T5X checkpoints: the same numbers as T5X, and each of its formats bit for bit.

What T5X itself wrote is in golden/t5x; tests/t5x runs T5X, where it is installed.
"""

import shutil

from helpers import (
    GOLDEN,
    TINY_IMAGES,
    TINY_SPEECH,
    assert_same_tree,
    config,
    logits,
    random_params,
    unpack,
)
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from t5x_formats import CODA, KINDS, fresh_params, write, write_legacy

from coda_jax import trees
from coda_jax.checkpoints import load_t5x, save_t5x
from coda_jax.checkpoints.t5x import is_of_scalable_t5, read_t5x, t5x_shapes
from coda_jax.checkpoints.t5x_scanned import to_scanned
from coda_jax.models.t5.config import infer_config

SCANNED = config(relpos_num_buckets=32, relpos_max_distance=128)


@pytest.fixture(name="params", scope="module")
def fixture_params():
    return fresh_params()


# --- What T5X wrote ---


@pytest.mark.parametrize(("name", "step"), [("legacy", 1000), ("orbax", 1001), ("scanned", 1002)])
def test_logits_equal_those_of_t5x_for_its_checkpoints(tmp_path, name, step):
    """Invariant 7."""
    params, found = read_t5x(unpack(f"t5x/{name}", tmp_path))
    assert found == step
    cfg = infer_config(params)
    assert cfg.logits_via_embedding == (name == "orbax")
    data = np.load(GOLDEN / "t5x" / "logits.npz")
    ours = logits(cfg, params, *(data[k] for k in ("encoder", "decoder_inputs", "decoder_targets")))
    valid = data["decoder_targets"] > 0
    theirs = data[f"logits_{name}"]
    np.testing.assert_allclose(np.asarray(ours)[valid], theirs[valid], rtol=1e-5, atol=1e-5)


def test_the_optimizer_of_a_checkpoint_of_t5x_is_not_read(tmp_path):
    checkpoint = unpack("t5x/legacy", tmp_path) / "checkpoint_1000"
    expected, _ = read_t5x(checkpoint)
    folders = list(checkpoint.glob("state.param_states.*"))
    assert len(folders) == len(trees.flatten(expected))
    for chunk in (file for folder in folders for file in folder.iterdir()):
        chunk.unlink()
    assert_same_tree(read_t5x(checkpoint)[0], expected)


def test_the_optimizer_of_a_checkpoint_of_orbax_is_not_read(tmp_path, params):
    write("orbax_zarr", tmp_path, params)
    shutil.rmtree(tmp_path / "state" / "state.param_states.x")
    assert_same_tree(load_t5x(tmp_path, CODA), params)


# --- The formats ---


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_is_read_bit_for_bit(tmp_path, params, kind, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    write(kind, tmp_path / "checkpoint_7", params)
    loaded, step = read_t5x(tmp_path)
    assert step == 7
    assert_same_tree(loaded, params)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_small_arrays_lie_in_the_msgpack_file(tmp_path, params, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    norms = [path for path in trees.flatten(params) if path.endswith("scale")]
    write_legacy(tmp_path, params, inline=norms)
    assert not list(tmp_path.glob("*.scale"))
    assert_same_tree(load_t5x(tmp_path, CODA), params)


def gcs(spec):
    kvstore = {"driver": "gcs", "bucket": "t5x-dummy-bucket", "path": spec["kvstore"]["path"]}
    return {**spec, "kvstore": kvstore}


def before_2021(spec):
    kvstore = {"driver": "gfile"}
    metadata = {**spec["metadata"], "dtype": "<f4"}
    return {"driver": "zarr", "kvstore": kvstore, "metadata": metadata,
            "path": spec["kvstore"]["path"]}  # fmt: skip


@pytest.mark.parametrize("edit_spec", [gcs, before_2021])
def test_arrays_that_were_written_elsewhere_are_found_here(tmp_path, params, edit_spec):
    write_legacy(tmp_path, params, edit_spec=edit_spec)
    assert_same_tree(load_t5x(tmp_path, CODA), params)


@pytest.mark.parametrize("wrap", ["params", "no optimizer", "both"])
def test_other_places_of_the_parameters_are_known(tmp_path, params, wrap):
    def edit_tree(tree):
        inner = tree["optimizer"]
        if wrap in ("params", "both"):
            inner["target"] = {"params": inner["target"]}
        if wrap in ("no optimizer", "both"):
            tree.clear()
            tree.update(inner)

    write_legacy(tmp_path, params, inline=trees.flatten(params), edit_tree=edit_tree)
    assert_same_tree(load_t5x(tmp_path, CODA), params)


# --- Which checkpoint ---


def test_the_newest_of_a_run_is_taken_or_that_of_a_step(tmp_path, params):
    for step in (9, 10, 100):
        changed = {**params, "token_embedder": {"embedding": np.full((20, 16), step, np.float32)}}
        write_legacy(make(tmp_path / f"checkpoint_{step}"), changed)
    make(tmp_path / "checkpoint_200.tmp-1234")
    make(tmp_path / "checkpoint_300.orbax-checkpoint-tmp-5")
    make(tmp_path / "train")

    def embedding(directory, step=None):
        return load_t5x(directory, CODA, step)["token_embedder"]["embedding"][0, 0]

    assert embedding(tmp_path) == 100
    assert embedding(tmp_path, 9) == 9
    assert embedding(str(tmp_path / "checkpoint_10")) == 10
    assert embedding(tmp_path / "checkpoint_10", 10) == 10
    with pytest.raises(FileNotFoundError, match=r"checkpoint_11.*\[9, 10, 100\]"):
        load_t5x(tmp_path, CODA, 11)
    with pytest.raises(ValueError, match="not named checkpoint_9"):
        load_t5x(tmp_path / "checkpoint_10", CODA, 9)


def make(folder):
    folder.mkdir(parents=True)
    return folder


def test_a_newest_checkpoint_that_is_incomplete_is_not_passed_over(tmp_path, params):
    write_legacy(make(tmp_path / "checkpoint_1"), params)
    make(tmp_path / "checkpoint_2")
    with pytest.raises(FileNotFoundError, match="checkpoint_2 has no checkpoint_"):
        load_t5x(tmp_path, CODA)


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_no_checkpoint_is_an_error_that_says_what_one_is(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="a file 'checkpoint' or a folder 'state'"):
        load_t5x(tmp_path / name, CODA)


def test_a_remote_path_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"gs://bucket/checkpoint_1 .* gcloud storage cp"):
        load_t5x("gs://bucket/checkpoint_1", CODA)


# --- Scalable T5 ---


def scalable(params, axis=None):
    """The tree of the scalable T5: stacked along an axis, or layer by layer for None."""
    flat = {}
    for path, leaf in trees.flatten(params).items():
        stack, _, rest = path.partition("/")
        if "attention/out/kernel" in path:
            leaf = leaf.reshape(CODA.num_heads, CODA.head_dim, -1)
        elif "attention/" in path and leaf.ndim == 2:
            leaf = leaf.reshape(-1, CODA.num_heads, CODA.head_dim)
        if rest == "relpos_bias/rel_embedding":
            for layer in range(num_layers(stack)):
                flat[f"{stack}/layers_{layer}/{rest}"] = leaf
        else:
            flat[path] = leaf
    if axis is None:
        return trees.unflatten(flat)
    stacked = {path: leaf for path, leaf in flat.items() if "layers_" not in path}
    for path in flat.keys() - stacked.keys():
        stack, _, rest = path.split("/", 2)
        leaves = [flat[f"{stack}/layers_{i}/{rest}"] for i in range(num_layers(stack))]
        stacked[f"{stack}/{stack}/{rest}"] = np.stack(leaves, axis)
    return trees.unflatten(stacked)


def num_layers(stack):
    return {"encoder": CODA.num_encoder_layers, "decoder": CODA.num_decoder_layers}[stack]


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_scanned_layers_are_unstacked(tmp_path, params, kind, axis):
    """Values, and the shapes alone, for which only the biases are read."""
    write(kind, tmp_path, scalable(params, axis))
    assert is_of_scalable_t5(tmp_path)
    assert_same_tree(load_t5x(tmp_path, CODA), params)
    if kind == "legacy":
        for chunk in tmp_path.glob("*mlp*/[0-9]*"):
            chunk.unlink()
    found, expected = (trees.flatten(tree) for tree in (t5x_shapes(tmp_path), params))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in found.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in expected.items()
    }


def dense_params(cfg):
    return jax.tree.map(np.asarray, random_params(cfg))


def test_what_is_stacked_is_what_t5x_stacks():
    params = dense_params(SCANNED)
    assert_same_tree(to_scanned(SCANNED, params), scalable(params, 1))
    eleven = SCANNED.replace(num_encoder_layers=11)  # whose names are not sorted as their numbers
    stacked = to_scanned(eleven, dense_params(eleven))["encoder"]["encoder"]["mlp"]["wo"]["kernel"]
    last = dense_params(eleven)["encoder"]["layers_10"]["mlp"]["wo"]["kernel"]
    np.testing.assert_array_equal(stacked[:, 10], last)


@pytest.mark.parametrize(
    ("cfg", "text"),
    [
        (CODA, r"no place for \d+ leaves .* such as decoder/layers_0/adapter/wi/kernel"),
        (config(), r"does not compute .* \{'relpos_num_buckets': 8, 'relpos_max_distance': 16\}"),
        (TINY_IMAGES, r"no place for \d+ leaves"),
        (TINY_SPEECH, r"no place for \d+ leaves"),
    ],
)
def test_what_t5x_could_not_scan_is_refused(cfg, text):
    with pytest.raises(ValueError, match=text):
        to_scanned(cfg, dense_params(cfg))
    encoder = SCANNED.encoder_only()
    with pytest.raises(ValueError, match=r"does not compute .* \{'num_decoder_layers': 0\}"):
        to_scanned(encoder, dense_params(encoder))


@pytest.mark.parametrize("layers", ["stacked", "apart", "ours"])
def test_layers_that_differ_in_their_bias_keep_it(tmp_path, layers):
    """As those of umT5: in both stacks, though one layer of a decoder differs from no other."""
    cfg = SCANNED.replace(shared_relpos_bias=False)
    params = dense_params(cfg)
    tree = to_scanned(cfg, params) if layers == "stacked" else params
    if layers == "apart":
        tree = scalable(params, None)
    write_legacy(tmp_path, tree, inline=trees.flatten(tree))
    assert is_of_scalable_t5(tmp_path) == (layers != "ours")
    assert_same_tree(load_t5x(tmp_path, cfg), params)
    assert infer_config(t5x_shapes(tmp_path)) == cfg.replace(methods=())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"encoder/encoder/mlp/wo/kernel": (24, 3, 16)}, r"axis 1 should be the 2 layers"),
        ({"encoder/encoder_norm/scale": None}, "not the norms"),
        ({"encoder/encoder/pre_mlp_layer_norm/scale": (16,),
          "encoder/encoder/pre_attention_layer_norm/scale": (16,)}, "not the norms"),
    ],
)  # fmt: skip
def test_stacks_that_do_not_agree_are_refused(tmp_path, params, change, text):
    flat = trees.flatten(scalable(params, 1))
    for path, shape in change.items():
        if shape is None:
            del flat[path]
        else:
            flat[path] = np.ones(shape, np.float32)
    write_legacy(tmp_path, trees.unflatten(flat), inline=flat)
    with pytest.raises(ValueError, match=text):
        load_t5x(tmp_path, CODA)


# --- Saving ---


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_saved_is_loaded(tmp_path, params, dtype):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    path = save_t5x(tmp_path / "new" / "run", params, step=12)
    assert path == tmp_path / "new" / "run" / "checkpoint_12"
    loaded, step = read_t5x(tmp_path / "new" / "run")
    assert step == 12
    assert_same_tree(loaded, params)


def test_a_checkpoint_is_not_overwritten_and_others_are_kept(tmp_path, params):
    save_t5x(tmp_path, params, step=2)
    save_t5x(tmp_path, params, step=1)
    with pytest.raises(FileExistsError, match="checkpoint_1 exists"):
        save_t5x(tmp_path, params, step=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_1", "checkpoint_2"]
