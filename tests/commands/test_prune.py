"""`coda prune`: the smaller model answers as the masked one, in Hugging Face's layout or ours."""

import json

from helpers import GOLDEN, adapted_params, assert_same_tree, golden_logits, random_params
import jax
import numpy as np
import pytest

from coda_jax import checkpoints, methods, trees
from coda_jax.checkpoints.adapter import MANIFEST, TENSORS, json_sha256, leaf_sha256
from coda_jax.checkpoints.tensor_files import read_tensors, write_tensors
from coda_jax.commands.convert import convert
from coda_jax.commands.loading import load_model
from coda_jax.commands.prune import prune
from coda_jax.commands.sources import read_source
from coda_jax.methods import Coda, Norms, ParallelAdapter, StructuredPruning
from coda_jax.methods.pruning_groups import is_of_heads, masks_of

BASE = GOLDEN / "v1_1"
METHOD = StructuredPruning(rank=2, scope="uniform")


def saved(folder, masks, method=METHOD):
    """(config, params) of a pruned model whose adapter file is saved; {end of a path: its mask}."""
    base_config, base = checkpoints.load_hf(BASE)
    config = base_config.replace(methods=(method, Norms()))
    flat = trees.flatten(adapted_params(config, base))
    for path in flat:
        if path.endswith(("pruning_rows", "pruning_columns")):
            flat[path] = flat[path] * flat[path].shape[0] ** -0.5
    for path in masks_of(flat):
        (mask,) = [value for end, value in masks.items() if path.startswith(end)]
        flat[path] = mask(flat[path].size, is_of_heads(path))
    params = trees.unflatten(flat)
    checkpoints.save_adapter(folder, config, params)
    return config, params


def of_random_channels(seed, heads=(0.0, 1.0), number=20):
    """A mask of given heads, and of so many channels, others in each block."""
    rng = np.random.default_rng(seed)

    def mask(size, has_heads):
        if has_heads:
            return np.array(heads, np.float32)
        return (np.arange(size) < number)[rng.permutation(size)].astype(np.float32)

    return mask


def logits_of(config, params):
    return golden_logits(config, params, np.load(BASE / "logits.npz"))


def test_the_smaller_model_answers_as_the_masked_one(tmp_path, capsys):
    """In float32 to 1e-5, with half of the heads and channels, merged and cut."""
    mask = of_random_channels(0)
    config, params = saved(tmp_path / "adapter", {"encoder": mask, "decoder": mask})
    prune(str(tmp_path / "adapter"), str(tmp_path / "small"), base=str(BASE))
    small_config, small = checkpoints.load_hf(tmp_path / "small")
    assert (small_config.num_heads, small_config.mlp_dim) == (1, 20)
    assert small_config.replace(num_heads=2, mlp_dim=40) == config.dense()
    np.testing.assert_allclose(logits_of(small_config, small), logits_of(config, params), atol=1e-5)
    counts = [trees.count(small), trees.count(methods.merge(config, params)[1])]
    assert f"{counts[0]:,} parameters" in capsys.readouterr().out
    assert counts[0] < 0.75 * counts[1]


def test_transformers_gives_the_same_logits(tmp_path):
    """Where it is installed."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    mask = of_random_channels(1)
    config, params = saved(tmp_path / "adapter", {"encoder": mask, "decoder": mask})
    prune(str(tmp_path / "adapter"), str(tmp_path / "small"), base=str(BASE))
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "small").eval()
    golden = np.load(BASE / "logits.npz")
    encoder, decoder = (
        torch.tensor(golden[name], dtype=torch.long) for name in ("encoder", "decoder_inputs")
    )
    with torch.no_grad():
        found = model(
            input_ids=encoder, attention_mask=(encoder > 0).long(), decoder_input_ids=decoder
        ).logits.numpy()
    seen = golden["decoder_targets"] > 0
    np.testing.assert_allclose(found[seen], np.asarray(logits_of(config, params))[seen], atol=2e-5)


@pytest.fixture(name="unequal", scope="module")
def fixture_unequal(tmp_path_factory):
    """(a folder with what was left of layers that differ, the pruned model)."""
    folder = tmp_path_factory.mktemp("unequal")
    masks = {
        "encoder/layers_0": of_random_channels(0, (1.0, 1.0)),
        "encoder/layers_1": of_random_channels(1, (0.0, 1.0), number=9),
        "decoder": of_random_channels(2),
    }
    model = saved(folder / "adapter", masks)
    prune(str(folder / "adapter"), str(folder / "small"), base=str(BASE))
    return folder / "small", *model


@pytest.mark.all
def test_layers_of_unequal_sizes_are_written_in_our_own_layout(unequal, tmp_path, capsys):
    """Which is a checkpoint like any other: for adapters, and T5X; not for Hugging Face's."""
    small, config, params = unequal
    base = load_model(str(small))
    assert dict(base.config.layer_sizes)["encoder/layers_1/mlp"] == 9
    expected = np.asarray(logits_of(config, params))
    np.testing.assert_allclose(
        logits_of(base.config, base.params), expected, atol=1e-5 * np.abs(expected).max()
    )
    adapted = load_model(str(small), methods=(Coda(2.0), ParallelAdapter(4)))
    checkpoints.save_adapter(tmp_path / "adapter", adapted.config, adapted.params)
    again = load_model(str(small), adapter_checkpoint=str(tmp_path / "adapter"))
    assert again.config == adapted.config
    assert_same_tree(again.params, adapted.params)
    convert(str(small), str(tmp_path / "t5x"), "t5x")
    t5x = read_source(tmp_path / "t5x")
    assert t5x.config.layer_sizes == base.config.layer_sizes
    assert_same_tree(t5x.params, base.params)
    with pytest.raises(ValueError, match="layers of unequal sizes have no place in Hugging Face"):
        convert(str(small), str(tmp_path / "hf"), "hf")


def test_a_damaged_config_of_our_own_layout_is_refused(unequal, tmp_path):
    raw = json.loads((unequal[0] / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((unequal[0] / "model.safetensors").read_bytes())
    for changes, message in (
        ({"layer_sizes": []}, "the tensors of .* not match the model"),
        ({"layer_sizes": [["encoder/layers_0/mlp", "x"]]}, "layer_sizes=.* of a wrong type"),
        ({"layer_sizes": [["encoder/layers_7/mlp", 3]]}, "config.json is not valid: .*layers_7"),
        ({"methods": [{"name": "norms"}]}, "config.json must be of a dense model"),
        ({"d_model": 3}, "config.json has unknown keys for T5Config: {'d_model': 3}"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(raw | changes))
        with pytest.raises(ValueError, match=message):
            checkpoints.load_hf(tmp_path)


def test_masks_of_another_base_are_refused(tmp_path):
    """Of other weights; of other sizes; and in a file whose masks are not of its own base's."""
    mask = of_random_channels(0)
    adapter = tmp_path / "adapter"
    saved(adapter, {"encoder": mask, "decoder": mask})
    config, params = checkpoints.load_hf(BASE)
    larger = config.replace(num_heads=3)
    for name, other, values, message in (
        (
            "weights",
            config,
            jax.tree.map(lambda x: 2 * x, params),
            "another base; .* leaves differ",
        ),
        ("sizes", larger, random_params(larger), "belongs to another base: num_heads=2, not 3"),
    ):
        checkpoints.save_hf(tmp_path / name, other, values)
        with pytest.raises(ValueError, match=message):
            prune(str(adapter), str(tmp_path / "small"), base=str(tmp_path / name))
    tensors = dict(read_tensors(adapter / TENSORS))
    manifest = json.loads((adapter / MANIFEST).read_text())
    path = "encoder/layers_0/mlp/wo/pruning_mask"
    tensors[path] = np.ones(7, np.float32)
    manifest["leaves"][path] |= {"shape": [7], "sha256": leaf_sha256(tensors[path])}
    manifest["manifest_sha256"] = json_sha256(manifest, "manifest_sha256")
    (adapter / MANIFEST).write_text(json.dumps(manifest))
    write_tensors(adapter / TENSORS, {name: np.array(leaf) for name, leaf in tensors.items()})
    with pytest.raises(ValueError, match=rf"wrong shape: {path} is \(7,\), expected \(40,\)"):
        prune(str(adapter), str(tmp_path / "small"), base=str(BASE))
    assert not (tmp_path / "small").exists()


def test_other_methods_are_refused(tmp_path):
    """One that has pruned nothing, and blocks, which leave matrices of the same size."""
    base_config, base = checkpoints.load_hf(BASE)
    for method in (ParallelAdapter(4), StructuredPruning("splopa", rank=1, block=8)):
        config = base_config.replace(methods=(method,))
        checkpoints.save_adapter(tmp_path / method.name, config, adapted_params(config, base))
        with pytest.raises(ValueError, match="there are no heads and channels that were pruned"):
            prune(str(tmp_path / method.name), str(tmp_path / "small"), base=str(BASE))
