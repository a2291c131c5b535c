"""Adapter files hold what is trained, to the bit, and fit only the base that they belong to."""

from contract.programs import params
from contract.table import each_case
from helpers import assert_same_tree
import numpy as np
import pytest

from coda_jax import methods, trees
from coda_jax.checkpoints import load_adapter, save_adapter
from coda_jax.checkpoints.adapter import TENSORS
from coda_jax.checkpoints.tensor_files import read_tensors, write_tensors

each_config = each_case("files")


def saved(config, folder):
    """(trained leaves, base's leaves) of an adapter that is saved in the folder.

    None where there is no base, as nothing is frozen: that is refused.
    """
    trained, frozen = methods.partition(config, params(config))
    if not frozen:
        with pytest.raises(ValueError, match="train every leaf: what they make is a base"):
            save_adapter(folder, config, params(config))
        assert not folder.exists()
        return None
    save_adapter(folder, config, params(config))
    return trained, frozen


def base_of(config):
    """The dense model's leaves, with other values where the adapter file has its own."""
    _, dense = trees.split(params(config), methods.created(config))
    trained, frozen = methods.partition(config, dense)
    return trees.merge(
        trees.unflatten({path: leaf + 1 for path, leaf in trees.flatten(trained).items()}), frozen
    )


@each_config
def test_a_saved_adapter_is_loaded_bit_by_bit(case, tmp_path):
    """Onto the dense base, with the methods as they were."""
    config, folder = case.config, tmp_path / "adapter"
    if saved(config, folder) is None:
        return
    loaded, found = load_adapter(folder, config.dense(), base_of(config))
    assert loaded == config
    assert_same_tree(found, params(config))
    assert set(read_tensors(folder / TENSORS)) == set(
        trees.flatten(methods.partition(config, params(config))[0])
    )


@each_config
def test_another_base_is_refused(case, tmp_path):
    """Invariant 6: a single bit of a frozen leaf, whose path the error names."""
    config, folder = case.config, tmp_path / "adapter"
    leaves = saved(config, folder)
    if leaves is None:
        return
    frozen = trees.flatten(leaves[1])
    path = [*frozen][len(frozen) // 2]
    changed = np.array(frozen[path])
    changed.reshape(-1).view(np.uint8)[0] ^= 1
    base = trees.unflatten({**trees.flatten(base_of(config)), path: changed})
    with pytest.raises(ValueError, match=rf"another base; 1 of {len(frozen)} .*\n  {path}$"):
        load_adapter(folder, config.dense(), base)


@each_config
def test_missing_extra_and_misshapen_leaves_are_refused(case, tmp_path):
    """Invariant 6, in saving: all are listed."""
    config = case.config
    flat = trees.flatten(params(config))
    lost, misshapen = [*trees.flatten(methods.partition(config, params(config))[0])][:2]
    flat["surplus/kernel"] = flat.pop(lost)
    flat[misshapen] = flat[misshapen][None]
    with pytest.raises(ValueError) as error:
        save_adapter(tmp_path / "adapter", config, trees.unflatten(flat))
    for line in (f"missing: {lost} ", f"wrong shape: {misshapen} is ", "extra: surplus/kernel "):
        assert line in str(error.value)


@each_config
def test_damaged_files_are_refused(case, tmp_path):
    """Invariant 6, in loading: a leaf lost, one too many, one of another shape, another bit."""
    config, folder = case.config, tmp_path / "adapter"
    if saved(config, folder) is None:
        return
    file, base = folder / TENSORS, base_of(config)
    good = {name: np.array(leaf) for name, leaf in read_tensors(file).items()}
    name = [*good][-1]
    changed = good[name].copy()
    changed.reshape(-1).view(np.uint8)[-1] ^= 1
    for damage, sentence in (
        ({key: leaf for key, leaf in good.items() if key != name}, f"{name}: missing"),
        ({**good, "surplus": good[name]}, "surplus: .*the manifest says nothing"),
        ({**good, name: good[name][None]}, f"{name}: .*the manifest says"),
        ({**good, name: changed}, rf"is corrupt.*\['{name}'\]"),
    ):
        write_tensors(file, damage)
        with pytest.raises(ValueError, match=sentence):
            load_adapter(folder, config.dense(), base)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=TENSORS):
        load_adapter(folder, config.dense(), base)
