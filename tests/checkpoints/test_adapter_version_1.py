"""Adapter files of version 1: they load bit for bit, and are as strict as they were."""

import hashlib
import json
import shutil

from helpers import assert_same_tree, random_params, unpack
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from coda_jax import bundled, methods, trees
from coda_jax.checkpoints import load_adapter, load_hf, save_adapter
from coda_jax.checkpoints.adapter import fingerprint_version_1, read_manifest
from coda_jax.methods import Coda, ParallelAdapter

METHODS = (
    Coda(reduction=(2.5,), epsilon=0.1, attention="k_to_all"),
    ParallelAdapter(bottleneck=4, activation="gelu"),
)


@pytest.fixture(name="files", scope="module")
def fixture_files(tmp_path_factory):
    """What version 1 wrote."""
    return unpack("version_1/files", tmp_path_factory.mktemp("version_1"))


@pytest.fixture(name="base", scope="module")
def fixture_base(files):
    """(config, parameters) of the base."""
    return load_hf(files / "base")


@pytest.fixture(name="saved")
def fixture_saved(files, tmp_path):
    """An adapter file in a directory that is the test's own."""
    return shutil.copytree(files / "run" / "export" / "adapter", tmp_path / "adapter")


def edit_manifest(directory, change):
    manifest = json.loads((directory / "adapter.json").read_text())
    change(manifest)
    (directory / "adapter.json").write_text(json.dumps(manifest))


def assert_loads(directory, config, base, expected_methods):
    """Every bit is that of the file or of the base."""
    loaded_config, loaded = load_adapter(directory, config, base)
    assert loaded_config == config.replace(methods=expected_methods)
    tensors = load_file(directory / "adapter.safetensors")
    frozen = trees.flatten(methods.partition(loaded_config, base)[1])
    assert_same_tree(loaded, {**frozen, **tensors})
    return loaded_config, loaded


def test_a_file_is_loaded_bit_for_bit(saved, base):
    assert read_manifest(saved)["format_version"] == 1
    assert_loads(saved, *base, METHODS)


@pytest.mark.parametrize(
    ("folder", "coda"),
    [
        (bundled.CODA, Coda(3, max_segments=4)),
        (bundled.CODA_IMAGES, Coda(8)),
        (bundled.CODA_SPEECH, Coda(4)),
    ],
)
def test_the_bundled_files_are_loaded_bit_for_bit(folder, coda):
    assert read_manifest(folder / "adapter")["format_version"] == 1
    assert_loads(folder / "adapter", *load_hf(folder), (coda, ParallelAdapter(64)))


def test_what_is_loaded_is_saved_as_version_2(saved, base, tmp_path):
    config, params = load_adapter(saved, *base)
    save_adapter(tmp_path / "new", config, params)
    assert read_manifest(tmp_path / "new")["format_version"] == 2
    tensors = [load_file(path / "adapter.safetensors") for path in (saved, tmp_path / "new")]
    assert_same_tree(*tensors)
    again_config, again = load_adapter(tmp_path / "new", *base)
    assert again_config == config
    assert_same_tree(again, params)


def test_a_field_that_was_not_yet_written_has_its_default(saved, base):
    edit_manifest(saved, lambda m: m["coda"].pop("max_segments"))
    edit_manifest(saved, lambda m: m["base_config"].pop("relpos_max_distance"))
    assert load_adapter(saved, *base)[0].methods == METHODS


def test_the_fingerprint_is_the_documented_hash(base):
    config = base[0].replace(methods=METHODS)
    ones, six = np.ones(2, np.float16), np.arange(6, dtype="<f4").reshape(2, 3)
    text = b"a (2,) float16\n" + ones.tobytes() + b"b/mlp (2, 3) float32\n" + six.tobytes()
    leaves = {"b": {"mlp": np.asfortranarray(six), "layer_norm": {"scale": ones}}, "a": ones}
    assert fingerprint_version_1(config, leaves) == hashlib.sha256(text).hexdigest()


def test_another_base_is_refused_with_both_fingerprints(saved, base):
    config, params = base
    flat = trees.flatten(params)
    flat["token_embedder/embedding"] = flat["token_embedder/embedding"] * 2
    with pytest.raises(ValueError) as error:
        load_adapter(saved, config, trees.unflatten(flat))
    adapted = config.replace(methods=METHODS)
    for tree in (params, flat):
        assert fingerprint_version_1(adapted, tree) in str(error.value)


def test_a_base_of_other_sizes_is_refused(saved, base):
    config = base[0].replace(num_encoder_layers=2)
    with pytest.raises(ValueError, match="another base: num_encoder_layers=1, not 2"):
        load_adapter(saved, config, random_params(config))


# --- Damage ---


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
@pytest.mark.parametrize("keep", [None, 0.0, 0.1, 0.95])
def test_a_missing_or_truncated_file_is_named(saved, base, name, keep):
    data = (saved / name).read_bytes()
    if keep is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(FileNotFoundError if keep is None else ValueError, match=name):
        load_adapter(saved, *base)


def test_a_flipped_bit_is_found(saved, base):
    data = bytearray((saved / "adapter.safetensors").read_bytes())
    data[-5] ^= 1
    (saved / "adapter.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="corrupt"):
        load_adapter(saved, *base)


def test_leaves_that_differ_from_the_manifest_are_all_listed(saved, base):
    tensors = load_file(saved / "adapter.safetensors")
    del tensors["encoder/encoder_norm/scale"]
    tensors["encoder/layers_0/router/kernel"] = np.zeros((8, 2), np.float32)
    tensors["encoder/layers_7/router/kernel"] = np.zeros((8, 1), np.float32)
    save_file(tensors, saved / "adapter.safetensors")
    with pytest.raises(ValueError) as error:
        load_adapter(saved, *base)
    for path in ("encoder/encoder_norm/scale: missing", "layers_0/router", "layers_7/router"):
        assert path in str(error.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(format_version=2), "lacks the keys .'base', 'config'"),
        (lambda m: m.pop("format_version"), "format_version=None"),
        (lambda m: m.update(extra=1), "unknown keys .'extra'"),
        (lambda m: m.pop("leaves"), "lacks the keys .'leaves'"),
        (lambda m: m.update(leaves=[]), "table of leaves"),
        (lambda m: m.update(leaves={"a": 3}), "table of leaves"),
        (lambda m: m["coda"].update(temperature=3), "Coda: .*'temperature': 3"),
        (lambda m: m["adapter"].update(rank=3), "ParallelAdapter: .*'rank': 3"),
        (lambda m: m["base_config"].update(depth=3), "T5Config: .*'depth': 3"),
        (lambda m: m["base_config"].update(dtype="complex64"), "complex64"),
        (lambda m: m["base_config"].update(emb_dim="8"), "emb_dim='8'"),
        (lambda m: m["base_config"].update(emb_dim=9), "emb_dim=9, not 8"),
        (lambda m: m["base_config"].pop("vocab_size"), "vocab_size"),
        (lambda m: m["base_config"].update(family="conformer"), "family='conformer' is unknown"),
        (lambda m: m["base_config"].update(family="pix2struct"), "belongs to a 'pix2struct'"),
        (lambda m: m.update(base_config=[3]), r"\[3\] is not an object"),
        (lambda m: m["coda"].update(reduction=0.5), "0.5"),
        (lambda m: m["coda"].update(routing="magic"), "magic"),
        (lambda m: m.update(coda=[3]), r"\[3\]"),
        (lambda m: m.update(adapter=None, coda=None), "names no methods"),
        (lambda m: m.update(adapter=None), "extra: .*adapter/wi/kernel"),
    ],
)
def test_a_wrong_manifest_is_refused_by_name(saved, base, change, text):
    edit_manifest(saved, change)
    with pytest.raises(ValueError, match=text):
        load_adapter(saved, *base)
