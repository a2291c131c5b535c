"""Adapter files: what they hold, and an error for everything that is not right (invariant 6)."""

import hashlib
import json
import random
import shutil

from helpers import (
    TINY_IMAGES,
    TINY_SPEECH,
    adapted_params,
    assert_same_tree,
    config,
    random_params,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import coda_jax
from coda_jax import methods, trees
from coda_jax.checkpoints import load_adapter, save_adapter
from coda_jax.checkpoints.adapter import (
    base_fingerprints,
    leaf_sha256,
    read_lengths,
    read_manifest,
)
from coda_jax.methods import Full, ParallelAdapter
from coda_jax.models import param_shapes

CONFIG = config(
    {
        "reduction": (1, 2.5),
        "epsilon": 0.1,
        "attention": "k_to_all",
        "cross_attention": "selected",
    },
    ParallelAdapter(bottleneck=4, activation="gelu"),
)
DENSE = CONFIG.dense()
FILES = ["adapter.json", "adapter.safetensors"]


@pytest.fixture(name="base", scope="module")
def fixture_base():
    return jax.tree.map(np.asarray, random_params(DENSE, seed=1))


@pytest.fixture(name="params", scope="module")
def fixture_params(base):
    return adapted_params(CONFIG, base)


@pytest.fixture(name="saved_once", scope="module")
def fixture_saved_once(params, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    save_adapter(directory, CONFIG, params, vocabulary="a vocabulary")
    return directory


@pytest.fixture(name="saved")
def fixture_saved(saved_once, tmp_path):
    """A saved adapter in a directory that is the test's own."""
    return shutil.copytree(saved_once, tmp_path / "adapter")


def edit_manifest(directory, change):
    """Changes a manifest, and its own SHA-256 with it, as a program that is wrong would."""
    manifest = read_manifest(directory)
    change(manifest)
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    if "manifest_sha256" in manifest:
        text = json.dumps(rest, sort_keys=True)
        manifest["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (directory / "adapter.json").write_text(json.dumps(manifest))


# --- What a file holds ---


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_round_trip_keeps_every_bit(saved, base, params, dtype):
    """The base says how to compute, the adapter file how the base is adapted."""
    loaded_config, loaded = load_adapter(saved, DENSE.replace(dtype=dtype, dropout_rate=0.5), base)
    assert loaded_config == CONFIG.replace(dtype=dtype, dropout_rate=0.5)
    assert_same_tree(loaded, params)


def test_the_file_holds_what_is_trained_and_nothing_else(saved, params):
    trained, _ = methods.partition(CONFIG, params)
    assert_same_tree(load_file(saved / "adapter.safetensors"), trees.flatten(trained))
    assert sorted(path.name for path in saved.iterdir()) == FILES


def test_the_manifest_says_what_belongs_to_the_leaves(saved, base, params):
    manifest = json.loads((saved / "adapter.json").read_text())
    assert manifest.keys() == {
        "format_version", "package_version", "config", "base", "vocabulary", "quantization",
        "leaves", "manifest_sha256",
    }  # fmt: skip
    assert manifest["format_version"] == 2
    assert manifest["package_version"] == coda_jax.__version__
    assert manifest["config"]["family"] == "t5"
    assert [m["name"] for m in manifest["config"]["methods"]] == ["coda", "parallel_adapter"]
    assert manifest["vocabulary"] == "a vocabulary" and manifest["quantization"] is None
    assert manifest["base"] == base_fingerprints(CONFIG, base)
    trained, _ = map(trees.flatten, methods.partition(CONFIG, params))
    assert manifest["leaves"] == {
        path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "sha256": leaf_sha256(leaf)}
        for path, leaf in trained.items()
    }


def test_a_leaf_has_the_documented_hash():
    six = np.arange(6, dtype="<f4").reshape(2, 3)
    expected = hashlib.sha256(b"(2, 3) float32\n" + six.tobytes()).hexdigest()
    for leaf in (six, np.asfortranarray(six), jnp.asarray(six)):
        assert leaf_sha256(leaf) == expected
    for other in (six.T, six.astype(np.float16), np.nextafter(six, 9), six.reshape(3, 2)):
        assert leaf_sha256(other) != expected


def test_fingerprints_are_of_the_frozen_leaves_alone(base, params):
    _, frozen = methods.partition(CONFIG, base)
    found = base_fingerprints(CONFIG, base)
    assert found.keys() == trees.flatten(frozen).keys()
    assert found == base_fingerprints(CONFIG, params)  # adaptation changes none of them


@pytest.mark.parametrize(
    ("base", "path"),
    [
        (TINY_IMAGES, "patch_embedder/bias"),
        (TINY_IMAGES, "patch_embedder/row_embedder/embedding"),
        (TINY_SPEECH, "encoder/layers_0/convolution/depthwise_kernel"),
    ],
)
def test_what_only_some_families_have_is_frozen(base, path):
    """An adapter belongs to a base with the same."""
    cfg = config(adapter=ParallelAdapter(4), base=base)
    shapes = param_shapes(cfg)
    assert path in trees.flatten(methods.partition(cfg, shapes)[1])


def test_the_dtypes_of_base_and_leaves_are_kept(base, params, tmp_path):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    trained, _ = methods.partition(CONFIG, params)
    params = trees.merge(trained, methods.partition(CONFIG, half)[1])
    save_adapter(tmp_path, CONFIG, params)
    assert_same_tree(load_adapter(tmp_path, DENSE, half)[1], params)
    with pytest.raises(ValueError, match="belongs to another base"):
        load_adapter(tmp_path, DENSE, base)


def test_saving_again_replaces_the_adapter(saved, base, params):
    other = config({"reduction": 5})
    changed = adapted_params(other, params, seed=2)
    save_adapter(saved, other, changed)
    loaded_config, loaded = load_adapter(saved, DENSE, base)
    assert loaded_config == other
    assert_same_tree(loaded, changed)
    assert read_manifest(saved)["vocabulary"] is None
    assert sorted(path.name for path in saved.iterdir()) == FILES


def test_a_head_is_saved_where_the_base_has_none(tmp_path):
    cfg = config(adapter=ParallelAdapter(4), base=TINY_SPEECH)
    params = random_params(cfg)
    save_adapter(tmp_path, cfg, params)
    base = {"encoder": trees.split(params["encoder"], methods.created(cfg))[1]}
    headless = cfg.dense().replace(vocab_size=0, blank_id=0)
    loaded_config, loaded = load_adapter(tmp_path, headless, base)
    assert loaded_config == cfg
    assert_same_tree(loaded, params)


# --- What is not saved ---


def test_a_dense_config_has_nothing_to_save(base, tmp_path):
    with pytest.raises(ValueError, match="nothing to save"):
        save_adapter(tmp_path / "new", DENSE, base)
    assert not (tmp_path / "new").exists()


def test_what_trains_every_leaf_is_no_adapter(params, tmp_path):
    full = CONFIG.replace(methods=(*CONFIG.methods, Full()))
    with pytest.raises(ValueError, match=r"'full'\] train every leaf: .* a base"):
        save_adapter(tmp_path / "new", full, params)
    assert not (tmp_path / "new").exists()


def test_params_that_do_not_fit_the_config_are_not_saved(base, tmp_path):
    with pytest.raises(ValueError, match="missing: encoder/layers_0/router/kernel"):
        save_adapter(tmp_path / "new", CONFIG, base)
    assert not (tmp_path / "new").exists()


# --- Another base ---


def test_the_leaves_in_which_another_base_differs_are_named(saved, base):
    flat = trees.flatten(base)
    changed = ("decoder/layers_0/mlp/wo/kernel", "token_embedder/embedding")
    other = {p: np.nextafter(x, 9) if p in changed else x for p, x in flat.items()}
    frozen = len(base_fingerprints(CONFIG, base))
    with pytest.raises(ValueError, match=rf"another base; 2 of {frozen} frozen leaves") as error:
        load_adapter(saved, DENSE, trees.unflatten(other))
    assert str(error.value).splitlines()[1:] == [f"  {path}" for path in changed]


def test_leaves_that_the_base_lacks_are_listed(saved, base):
    flat = trees.flatten(base)
    path = "encoder/layers_1/mlp/wo/kernel"
    del flat[path]
    with pytest.raises(ValueError, match=f"missing: {path}"):
        load_adapter(saved, DENSE, trees.unflatten(flat))


def test_a_base_of_other_sizes_is_refused_by_its_config(saved, base):
    with pytest.raises(ValueError, match=r"another base: emb_dim=16, not 24; mlp_dim=24, not 5"):
        load_adapter(saved, DENSE.replace(emb_dim=24, mlp_dim=5), base)


def test_a_base_of_another_family_is_refused(saved, base):
    with pytest.raises(ValueError, match="belongs to a 't5', not to a 'pix2struct'"):
        load_adapter(saved, TINY_IMAGES, base)


# --- Damage ---


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved, base, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_adapter(saved, DENSE, base)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.95])
def test_a_truncated_file_is_named(saved, base, name, keep):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match=name):
        load_adapter(saved, DENSE, base)


def test_the_leaf_of_a_flipped_bit_is_named(saved, base):
    data = bytearray((saved / "adapter.safetensors").read_bytes())
    data[-5] ^= 1
    (saved / "adapter.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"corrupt.*SHA-256 differs for \['[\w/]+'\]"):
        load_adapter(saved, DENSE, base)


def check_flip(directory, base, params, file, place):
    """A flipped bit is an error, or changes nothing that is loaded."""
    data = bytearray((directory / file).read_bytes())
    place %= len(data) * 8
    data[place // 8] ^= 1 << place % 8
    (directory / file).write_bytes(data)
    try:
        loaded_config, loaded = load_adapter(directory, DENSE, base)
    except ValueError as error:
        assert str(directory) in str(error)
    else:
        assert loaded_config == CONFIG.replace(dropout_rate=DENSE.dropout_rate)
        assert file != "adapter.json"
        assert_same_tree(loaded, params)


def test_flipped_bits_are_errors_or_change_nothing(saved_once, base, params, tmp_path):
    rng = random.Random(0)
    for number in range(60):
        directory = shutil.copytree(saved_once, tmp_path / str(number))
        file = FILES[number % 2]
        # In tensors the header first: it is small beside the data.
        check_flip(
            directory, base, params, file, rng.randrange(2**14 if number % 4 == 1 else 2**20)
        )


@pytest.mark.all
@pytest.mark.parametrize("file", FILES)
def test_many_flipped_bits_are_errors_or_change_nothing(saved_once, base, params, tmp_path, file):
    rng = random.Random(1)
    for _ in range(1500):
        directory = shutil.copytree(saved_once, tmp_path / "flipped")
        check_flip(directory, base, params, file, rng.randrange(2**20))
        shutil.rmtree(directory)


def test_all_corrupt_leaves_are_named(saved, base):
    tensors = load_file(saved / "adapter.safetensors")
    changed = ["encoder/encoder_norm/scale", "encoder/layers_0/router/kernel"]
    tensors |= {path: tensors[path] + 1 for path in changed}
    save_file(tensors, saved / "adapter.safetensors")
    with pytest.raises(ValueError) as error:
        load_adapter(saved, DENSE, base)
    assert str(error.value).endswith(f"SHA-256 differs for {changed}")


@pytest.mark.parametrize("change", [
    lambda m: m.update(vocabulary="another"),
    lambda m: m["base"].clear(),
    lambda m: m["config"]["methods"][0].update(reduction=9),
    lambda m: m["leaves"]["encoder/encoder_norm/scale"].update(sha256="0"),
    lambda m: m.update(manifest_sha256="0"),
])  # fmt: skip
def test_a_manifest_that_was_changed_by_hand_is_refused(saved, base, change):
    manifest = read_manifest(saved)
    change(manifest)
    (saved / "adapter.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"adapter\.json is corrupt, or was changed by hand"):
        load_adapter(saved, DENSE, base)


def test_leaves_that_differ_from_the_manifest_are_all_listed(saved, base):
    tensors = load_file(saved / "adapter.safetensors")
    del tensors["encoder/encoder_norm/scale"]
    tensors["encoder/layers_0/router/kernel"] = np.zeros((16, 2), np.float32)
    tensors["encoder/layers_7/router/kernel"] = np.zeros((16, 1), np.float32)
    save_file(tensors, saved / "adapter.safetensors")
    with pytest.raises(ValueError) as error:
        load_adapter(saved, DENSE, base)
    for path in ("encoder/encoder_norm/scale: missing", "layers_0/router", "layers_7/router"):
        assert path in str(error.value)


def test_the_lengths_of_the_training_are_there_where_they_are_known(saved, params):
    assert read_lengths(saved) == read_lengths(None) == {}
    save_adapter(saved, CONFIG, params, lengths={"inputs": 300, "targets": 7})
    assert read_lengths(saved) == {"inputs": 300, "targets": 7}


NORM = "encoder/encoder_norm/scale"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(format_version=3), r"format_version=3; this version reads \[1, 2\]"),
        (lambda m: m.pop("format_version"), "format_version=None"),
        (lambda m: m.update(extra=1), "unknown keys .'extra'"),
        (lambda m: m.pop("leaves"), "lacks the keys .'leaves'"),
        (lambda m: m.pop("manifest_sha256"), "lacks the keys .'manifest_sha256'"),
        (lambda m: m.update(leaves=[]), "table of leaves"),
        (lambda m: m["leaves"].update({NORM: 3}), "table of leaves"),
        (lambda m: m["leaves"][NORM].pop("sha256"), f"SHA-256 differs for .'{NORM}'"),
        (lambda m: m["leaves"][NORM].pop("shape"), f"{NORM}: .*manifest says .'dtype'"),
        (lambda m: m["leaves"].pop(NORM), f"{NORM}: .*manifest says nothing"),
        (lambda m: m.update(base=None), "no fingerprints of its base"),
        (
            lambda m: m["base"].pop("token_embedder/embedding"),
            "trained from:\n  token_embedder/emb",
        ),
        (lambda m: m["base"].update(new="0"), "trained from:\n  new"),
        (
            lambda m: m.update(quantization="int4"),
            r"quantization must be one of \('int8',\), got 'int4'",
        ),
        (lambda m: m.update(lengths={"inputs": 0, "targets": 3}), "senseless lengths: .*0"),
        (lambda m: m.update(lengths={"inputs": 3}), "senseless lengths"),
        (lambda m: m.update(lengths=[3, 3]), "senseless lengths"),
        (lambda m: m.update(config=[3]), r"\[3\] is not an object"),
        (lambda m: m["config"].update(family="conformer"), "family='conformer' is unknown"),
        (lambda m: m["config"].update(family="pix2struct"), "belongs to a 'pix2struct'"),
        (lambda m: m["config"].update(methods=[]), "names no methods"),
        (lambda m: m["config"]["methods"].append({"name": "x"}), "method 'x' is unknown"),
        (lambda m: m["config"]["methods"][0].update(rank=3), "unknown keys for Coda: .'rank': 3"),
        (lambda m: m["config"].update(emb_dim=25), "emb_dim=25, not 16"),
        (lambda m: m["config"]["methods"].pop(), "extra: .*adapter/wi/kernel"),
    ],
)
def test_a_wrong_manifest_is_refused_by_name(saved, base, change, text):
    edit_manifest(saved, change)
    with pytest.raises(ValueError, match=text):
        load_adapter(saved, DENSE, base)


def test_a_manifest_that_is_not_an_object_is_refused(saved, base):
    (saved / "adapter.json").write_text("[]")
    with pytest.raises(ValueError, match=r"adapter\.json must hold a JSON object"):
        load_adapter(saved, DENSE, base)


def test_an_adapter_that_lies_deeper_is_named(tmp_path):
    (tmp_path / "export" / "adapter").mkdir(parents=True)
    (tmp_path / "export" / "adapter" / "adapter.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"the adapter is {tmp_path}/export/adapter$"):
        read_manifest(tmp_path)
