"""Adapter files: bit-identical round trips, and an error for everything that is not right."""

import dataclasses
import hashlib
import json
from pathlib import Path
import shutil

from helpers import assert_same_tree
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from coda_jax import params as params_lib
from coda_jax.adapters import AdapterConfig
from coda_jax.checkpoints import load_adapter, load_hf, save_adapter, swap_in
from coda_jax.checkpoints.adapter_files import fingerprint
from coda_jax.conditional import CodaConfig

GOLDEN = Path(__file__).parent / "golden"


def adapted(reduction=(1, 2.5), **changes):
    """Returns (base, config, params) with every trained leaf changed, as after an adaptation."""
    config, base = load_hf(GOLDEN / "v1_1")
    config = dataclasses.replace(
        config,
        adapter=AdapterConfig(bottleneck=4, activation="gelu"),
        coda=CodaConfig(reduction=reduction, epsilon=0.1, attention="k_to_all"),
        **changes,
    )
    trained, frozen = params_lib.partition(swap_in(base, config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), trained)
    return base, config, params_lib.merge(trained, frozen)


@pytest.fixture(name="saved_once", scope="module")
def fixture_saved_once(tmp_path_factory):
    base, config, params = adapted()
    directory = tmp_path_factory.mktemp("saved")
    save_adapter(directory, params, config)
    return directory, base, config, params


@pytest.fixture(name="saved")
def fixture_saved(saved_once, tmp_path):
    """Returns (directory, base, config, params); the directory is the test's own."""
    shutil.copytree(saved_once[0], tmp_path / "adapter")
    return tmp_path / "adapter", *saved_once[1:]


def edit_manifest(directory, change):
    manifest = json.loads((directory / "adapter.json").read_text())
    change(manifest)
    (directory / "adapter.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("reduction", [3, (1, 2.5)])
def test_round_trip_is_bit_identical(tmp_path, dtype, reduction):
    base, config, params = adapted(reduction, dtype=dtype)
    save_adapter(tmp_path, params, config)
    loaded_config, loaded = load_adapter(tmp_path, base)
    assert loaded_config == config
    assert_same_tree(loaded, params)


def test_file_holds_what_is_trained_and_nothing_else(saved):
    directory, _, _, params = saved
    trained, _ = params_lib.partition(params)
    assert load_file(directory / "adapter.safetensors").keys() == params_lib.flatten(trained).keys()
    assert sorted(path.name for path in directory.iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
    ]


def test_bfloat16_base_and_other_saved_dtypes_are_kept(saved_once, tmp_path):
    _, base, config, params = saved_once
    trained, frozen = params_lib.partition(params)
    params = params_lib.merge(trained, jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen))
    save_adapter(tmp_path, params, config)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    assert_same_tree(load_adapter(tmp_path, half)[1], params)
    with pytest.raises(ValueError, match="fingerprint"):
        load_adapter(tmp_path, base)


def test_saving_again_replaces_the_adapter(saved):
    directory, base, config, params = saved
    config = dataclasses.replace(config, coda=CodaConfig(reduction=5))
    params = jax.tree.map(lambda x: x, params)
    params["encoder"]["encoder_norm"]["scale"] = np.full(24, 2.0, np.float32)
    save_adapter(directory, params, config)
    loaded_config, loaded = load_adapter(directory, base)
    assert loaded_config == config
    assert_same_tree(loaded, params)


def test_fingerprint_depends_on_the_frozen_leaves_alone(saved):
    _, base, _, params = saved
    reference = fingerprint(base)
    assert fingerprint(params) == reference
    assert fingerprint(jax.tree.map(jnp.asarray, base)) == reference
    flat = params_lib.flatten(base)
    path = "decoder/layers_1/mlp/wo/kernel"
    for change in (lambda x: np.nextafter(x, 9), lambda x: x.T, lambda x: x.astype(np.float16)):
        assert fingerprint({**flat, path: change(flat[path])}) != reference


def test_fingerprint_is_the_documented_hash():
    ones, six = np.ones(2, np.float16), np.arange(6, dtype="<f4").reshape(2, 3)
    text = b"a (2,) float16\n" + ones.tobytes() + b"b/mlp (2, 3) float32\n" + six.tobytes()
    leaves = {"b": {"mlp": np.asfortranarray(six), "layer_norm": {"scale": ones}}, "a": ones}
    assert fingerprint(leaves) == hashlib.sha256(text).hexdigest()


def test_another_base_is_refused_with_both_fingerprints(saved):
    directory, base, _, _ = saved
    other = params_lib.flatten(base)
    other["token_embedder/embedding"] = other["token_embedder/embedding"] + 1
    with pytest.raises(ValueError) as error:
        load_adapter(directory, params_lib.unflatten(other))
    assert fingerprint(base) in str(error.value) and fingerprint(other) in str(error.value)


def test_a_base_of_other_sizes_is_refused_with_its_leaves(saved):
    _, base = load_hf(GOLDEN / "byt5")
    with pytest.raises(ValueError, match=r"encoder/layers_2/mlp/wo/kernel"):
        load_adapter(saved[0], base)


def test_dense_config_has_nothing_to_save(tmp_path):
    config, base = load_hf(GOLDEN / "v1_1")
    with pytest.raises(ValueError, match="nothing to save"):
        save_adapter(tmp_path / "new", base, config)
    assert not (tmp_path / "new").exists()


def test_params_that_do_not_fit_the_config_are_not_saved(saved_once, tmp_path):
    _, base, config, _ = saved_once
    with pytest.raises(ValueError, match="missing: encoder/layers_0/router/kernel"):
        save_adapter(tmp_path / "new", base, config)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
def test_missing_file_is_named(saved, name):
    directory, base, *_ = saved
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_adapter(directory, base)


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.95])
def test_truncated_file_is_named(saved, name, keep):
    directory, base, *_ = saved
    data = (directory / name).read_bytes()
    (directory / name).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match=name):
        load_adapter(directory, base)


def test_flipped_bit_is_found(saved):
    directory, base, *_ = saved
    data = bytearray((directory / "adapter.safetensors").read_bytes())
    data[-5] ^= 1
    (directory / "adapter.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="corrupt"):
        load_adapter(directory, base)


def test_leaves_that_differ_from_the_manifest_are_all_listed(saved):
    directory, base, *_ = saved
    tensors = load_file(directory / "adapter.safetensors")
    del tensors["encoder/encoder_norm/scale"]
    tensors["encoder/layers_0/router/kernel"] = np.zeros((24, 2), np.float32)
    tensors["encoder/layers_7/router/kernel"] = np.zeros((24, 1), np.float32)
    save_file(tensors, directory / "adapter.safetensors")
    with pytest.raises(ValueError) as error:
        load_adapter(directory, base)
    for path in ("encoder/encoder_norm/scale: missing", "layers_0/router", "layers_7/router"):
        assert path in str(error.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(format_version=2), "format_version=2"),
        (lambda m: m.pop("format_version"), "format_version=None"),
        (lambda m: m.update(extra=1), "unknown keys .'extra'"),
        (lambda m: m.pop("leaves"), "lacks the keys .'leaves'"),
        (lambda m: m.update(leaves=[]), "table of leaves"),
        (lambda m: m["coda"].update(temperature=3), "coda .*'temperature': 3"),
        (lambda m: m["adapter"].update(rank=3), "adapter .*'rank': 3"),
        (lambda m: m["base_config"].update(depth=3), "base_config .*'depth': 3"),
        (lambda m: m["base_config"].update(dtype="complex64"), "complex64"),
        (lambda m: m["base_config"].update(emb_dim="24"), "emb_dim='24'"),
        (lambda m: m["base_config"].update(emb_dim=25), "wrong shape"),
        (lambda m: m["base_config"].pop("vocab_size"), "vocab_size"),
        (lambda m: m["coda"].update(reduction=0.5), "0.5"),
        (lambda m: m["coda"].update(routing="magic"), "magic"),
        (lambda m: m.update(coda=[3]), r"\[3\]"),
        (lambda m: m.update(adapter=None, coda=None), "both adapter and coda"),
        (lambda m: m.update(adapter=None), "extra: .*adapter/wi/kernel"),
    ],
)
def test_wrong_manifest_is_refused_by_name(saved, change, text):
    directory, base, *_ = saved
    edit_manifest(directory, change)
    with pytest.raises(ValueError, match=text):
        load_adapter(directory, base)


def test_manifest_that_is_not_an_object_is_refused(saved):
    directory, base, *_ = saved
    (directory / "adapter.json").write_text("[]")
    with pytest.raises(ValueError, match=r"adapter\.json must hold a JSON object"):
        load_adapter(directory, base)
