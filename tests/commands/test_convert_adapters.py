"""`coda convert` of adapters: to and from other libraries, and several that become one."""

from helpers import GOLDEN, adapted_params, assert_same_tree
import numpy as np
import pytest

from coda_jax import checkpoints, methods, trees
from coda_jax.checkpoints.adapter import read_manifest
from coda_jax.commands.convert import convert
from coda_jax.data.vocabularies import find_fingerprint
from coda_jax.methods import Lora


def test_a_bottleneck_of_the_library_adapters_makes_the_round_trip(tmp_path, capsys):
    theirs, base = GOLDEN / "adapters_library" / "seq_bn", GOLDEN / "v1_1"
    convert(theirs, tmp_path / "adapter", "adapter", base=base)
    loaded = checkpoints.load_hf(base)
    config, params = checkpoints.load_adapter(tmp_path / "adapter", *loaded)
    expected_config, expected = checkpoints.load_adapter_hub(theirs, *loaded)
    assert config == expected_config
    assert_same_tree(params, expected)
    convert(tmp_path / "adapter", tmp_path / "again", "adapter_hub", base=base)
    assert "(adapter_hub, for load_adapter(..., use_safetensors=True))" in capsys.readouterr().out
    assert checkpoints.is_adapter_hub(tmp_path / "again")
    assert_same_tree(checkpoints.load_adapter_hub(tmp_path / "again", *loaded)[1], expected)


def test_several_adapters_become_one_with_weights(base, tmp_path, capsys):
    """Also of another library, and straight into a merged checkpoint."""
    base_config, base_params = checkpoints.load_hf(base)
    config = base_config.replace(methods=(Lora(rank=2),))
    parts = [adapted_params(config, base_params, seed) for seed in (1, 2)]
    found = find_fingerprint(base)
    for name, part, longest in zip("ab", parts, (7, 9), strict=True):
        said = {"vocabulary": found, "lengths": {"inputs": longest, "targets": 3}}
        checkpoints.save_adapter(tmp_path / name, config, part, **said)
    convert(tmp_path / "b", tmp_path / "peft", "peft", base=base)
    sources = (tmp_path / "a", tmp_path / "peft")
    convert(sources, tmp_path / "sum", "adapter", base=base, weights=(0.25, 0.5))
    assert "sum (adapter)" in capsys.readouterr().out
    expected = methods.combine_adapters(base_params, [(config, x) for x in parts], (0.25, 0.5))
    again = checkpoints.load_adapter(tmp_path / "sum", base_config, base_params)
    assert again[0] == expected[0].replace(methods=again[0].methods)
    for path, leaf in trees.flatten(again[1]).items():
        np.testing.assert_allclose(leaf, trees.flatten(expected[1])[path], rtol=1e-6, err_msg=path)
    assert read_manifest(tmp_path / "sum")["vocabulary"] == found
    sources = [str(tmp_path / name) for name in "ab"]
    convert(sources, tmp_path / "hf", "hf", base=base, weights=(1, 1))
    merged = methods.merge(*methods.combine_adapters(base_params, [again, again], (2, -1)))[1]
    assert (
        trees.flatten(merged).keys()
        == trees.flatten(checkpoints.load_hf(tmp_path / "hf")[1]).keys()
    )
    convert(sources, tmp_path / "both", "adapter", base=base, weights=(1, 1))
    assert read_manifest(tmp_path / "both")["lengths"] == {"inputs": 9, "targets": 3}


def test_several_that_are_no_adapters_of_one_base_are_refused(base, tmp_path):
    base_config, base_params = checkpoints.load_hf(base)
    config = base_config.replace(methods=(Lora(rank=2),))
    params = adapted_params(config, base_params)
    for name in "ab":
        checkpoints.save_adapter(tmp_path / name, config, params, vocabulary=name * 64)
    one, two = str(tmp_path / "a"), str(tmp_path / "b")
    for sources, weights, message in (
        ((one, two), None, "WEIGHTS=None must be one for each of several in INPUT"),
        (one, (1,), r"WEIGHTS=\(1,\) must be one for each of several"),
        ((one, two), (1,), "2 adapters and the weights"),
        ((one, two), (1, "x"), r"WEIGHTS\[1\] must be a number"),
        ((one, two), (1, 1), "trained with other vocabularies"),
        ((), (1,), "INPUT must be the name of a file or folder"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(sources, tmp_path / "x", "adapter", base=base, weights=weights)
    assert not (tmp_path / "x").exists()
