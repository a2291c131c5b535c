"""`coda prune`: the smaller model answers as the masked one; what has no layout is refused."""

from helpers import GOLDEN, adapted_params
import jax
import numpy as np
import pytest

from coda_jax import checkpoints, methods, trees
from coda_jax.commands.prune import prune
from coda_jax.methods import ParallelAdapter, StructuredPruning
from coda_jax.methods.pruning_groups import is_of_heads, masks_of
from coda_jax.objectives import model_for

BASE = GOLDEN / "v1_1"
METHOD = StructuredPruning(rank=2, scope="uniform")


def saved(folder, masks, method=METHOD):
    """(config, params) of a pruned model whose adapter file is saved; {end of a path: its mask}."""
    base_config, base = checkpoints.load_hf(BASE)
    config = base_config.replace(methods=(method,))
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
    golden = np.load(BASE / "logits.npz")
    batch = {
        "encoder_input_tokens": golden["encoder"],
        "decoder_input_tokens": golden["decoder_inputs"],
        "decoder_target_tokens": golden["decoder_targets"],
    }
    return jax.jit(model_for(config).logits)(params, batch)


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


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            {"encoder": of_random_channels(0), "decoder": of_random_channels(0, number=19)},
            "different numbers of channels, for which Hugging Face's layout has no place",
        ),
        (
            {"encoder": of_random_channels(0, (1.0, 1.0)), "decoder": of_random_channels(0)},
            "different numbers of heads",
        ),
        (
            {
                "encoder/layers_0": of_random_channels(0, (1.0, 0.0)),
                "encoder/layers_1": of_random_channels(0, (0.0, 1.0)),
                "decoder": of_random_channels(0),
            },
            "encoder/relpos_bias/rel_embedding is shared, and these layers have kept other heads",
        ),
    ],
)
def test_what_has_no_place_in_the_layout_is_refused(masks, message, tmp_path):
    saved(tmp_path / "adapter", masks)
    with pytest.raises(ValueError, match=message):
        prune(str(tmp_path / "adapter"), str(tmp_path / "small"), base=str(BASE))
    assert not (tmp_path / "small").exists()


def test_other_methods_are_refused(tmp_path):
    """One that has pruned nothing, and blocks, which leave matrices of the same size."""
    base_config, base = checkpoints.load_hf(BASE)
    for method in (ParallelAdapter(4), StructuredPruning("splopa", rank=1, block=8)):
        config = base_config.replace(methods=(method,))
        checkpoints.save_adapter(tmp_path / method.name, config, adapted_params(config, base))
        with pytest.raises(ValueError, match="there are no heads and channels that were pruned"):
            prune(str(tmp_path / method.name), str(tmp_path / "small"), base=str(BASE))
