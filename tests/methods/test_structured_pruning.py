"""Structured pruning adapters, beside what the contract tests check for every method."""

import itertools

from contract.programs import batch_of, fresh_params
from flax import linen as nn
from helpers import GOLDEN, TINY, TINY_SPEECH, random_params
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coda_jax import methods, trees
from coda_jax.methods import Full, Lora, ParallelAdapter, StructuredPruning
from coda_jax.methods.base import applied_to_modules
from coda_jax.methods.pruning_groups import MASK, masks_of
from coda_jax.nn.convolution import DepthwiseConvolution
from coda_jax.nn.layers import Dense
from coda_jax.objectives import model_for
from coda_jax.training import steps

BASE = TINY.replace(num_encoder_layers=2, dropout_rate=0.0)


@pytest.fixture(name="golden", scope="module")
def fixture_golden():
    """What the authors' library gives for random weights and masks."""
    return dict(np.load(GOLDEN / "pruning.npz"))


class Inner(nn.Module):
    """A module with the name that a prunable matrix has."""

    features: int
    name_of_dense: str

    @nn.compact
    def __call__(self, x):
        dense = Dense(self.features, ("mlp", "embed"), use_bias=True, name=self.name_of_dense)
        return dense(x)


class Stack(nn.Module):
    """A stack, in which blocks get their prototypes."""

    inner: tuple
    block: str

    @nn.compact
    def __call__(self, x):
        return Inner(*self.inner, name=self.block)(x)


class Outer(nn.Module):
    """A network with an encoder."""

    inner: tuple
    block: str

    @nn.compact
    def __call__(self, x):
        return Stack(self.inner, self.block, name="encoder")(x)


def test_splora_equals_the_authors_library(golden):
    """A matrix behind channels that are gone; columns that are gone are the next mask's."""
    module = Outer((golden["splora"].shape[-1], "wo"), "mlp")
    leaves = {
        "kernel": golden["splora_kernel"],
        "bias": golden["splora_bias"],
        "pruning_rows": golden["splora_rows"],
        "pruning_columns": golden["splora_columns"],
        MASK: golden["input_mask"].astype(np.float32),
    }
    with applied_to_modules((StructuredPruning(rank=3),)):
        found = module.apply({"params": {"encoder": {"mlp": {"wo": leaves}}}}, golden["x"])
    np.testing.assert_allclose(found * golden["output_mask"], golden["splora"], atol=1e-5)


def test_splopa_equals_the_authors_library(golden):
    module = Outer((golden["splopa"].shape[-1], "query"), "attention")
    leaves = {
        "kernel": golden["splopa_kernel"],
        "bias": golden["splopa_bias"],
        "pruning_weights": golden["splopa_weights"],
        MASK: golden["splopa_mask"].astype(np.float32),
    }
    prototypes = {
        "pruning_prototype_columns": golden["splopa_prototype_columns"],
        "pruning_prototype_rows": golden["splopa_prototype_rows"],
    }
    method = StructuredPruning("splopa", rank=2, block=4, prototypes=5)
    with applied_to_modules((method,)):
        params = {"encoder": {"attention": {"query": leaves}, **prototypes}}
        found = module.apply({"params": params}, golden["x"])
    np.testing.assert_allclose(found, golden["splopa"], atol=1e-5)


def test_sppara_equals_the_authors_library(golden):
    with applied_to_modules((StructuredPruning("sppara"),)):
        found = DepthwiseConvolution().apply(
            {"params": {"pruning_tap": golden["sppara_tap"]}},
            golden["x"],
            golden["sppara_kernel"],
            None,
        )
    np.testing.assert_allclose(found, golden["sppara"], atol=1e-5)


def test_taps_of_convolutions_merge(rng):
    """Those of a Conformer, with adapters beside its other matrices and groups that are gone."""
    config = TINY_SPEECH.replace(methods=(StructuredPruning("sppara", rank=2),), dropout_rate=0.0)
    flat = trees.flatten(random_params(config))
    assert sum(path.endswith("convolution/depthwise/pruning_tap") for path in flat) == 2
    for path in masks_of(flat):
        flat[path] = jnp.asarray(rng.random(flat[path].shape) < 0.7, jnp.float32)
    params = trees.unflatten(flat)
    merged_config, merged = methods.merge(config, params)
    assert merged_config == config.dense()
    logits = [
        jax.jit(model_for(c).logits)(p, batch_of(config))
        for c, p in ((config, params), (merged_config, merged))
    ]
    np.testing.assert_allclose(*logits, atol=1e-4)


def run(method, number, base=BASE):
    """(config, trained leaves before and after each step) of steps on one batch."""
    config = base.replace(methods=(*base.methods, method))
    model, params = model_for(config), fresh_params(config)
    optimizer = steps.make_optimizer(model, optax.adam, 1e-3, max_grad_norm=1.0)
    step = steps.make_train_step(model, optimizer, accumulation=1, seed=0)
    trained, frozen = steps.partition(model, params)
    state = steps.TrainState(np.zeros((), np.int32), trained, optimizer.init(trained))
    seen = [trees.flatten(trained)]
    for _ in range(number):
        state, sums = step(state, frozen, batch_of(config))
        assert np.isfinite(sums.loss)
        state = jax.device_get(state)
        seen.append(trees.flatten(state.trained))
    return config, trees.flatten(params), seen


def density_of(config, params, masks):
    """The share of the prunable weights that no mask takes away, counted weight by weight."""
    kept = total = 0
    for path, mask in masks.items():
        block = path.rsplit("/", 2)[0]
        makers = ("query", "key", "value") if "dot_product" in path else ("wi_0", "wi_1")
        reader = "out" if "dot_product" in path else "wo"
        for name in (*makers, reader):
            kernel = params[f"{block}/{name}/kernel"]
            total += kernel.size
            kept += kernel.size * mask.mean()
    return kept / total


@pytest.mark.parametrize(
    "criterion",
    ["taylor", *(pytest.param(x, marks=pytest.mark.all) for x in ("gradient", "weight"))],
)
def test_groups_go_in_equal_shares_until_the_density_is_reached(criterion):
    """Three times a sixth; what is gone stays so; one head and 8 channels stay."""
    method = StructuredPruning(criterion=criterion, density=0.5, start=2, steps=4, every=2)
    config, params, seen = run(method, 8)
    densities = [density_of(config, params, masks_of(leaves)) for leaves in seen]
    assert densities[:2] == [1, 1] and densities[2] == densities[3] > densities[4]
    for step, wanted in ((2, 5 / 6), (4, 4 / 6), (6, 1 / 2), (8, 1 / 2)):
        assert wanted <= densities[step] < wanted + 0.07, (step, densities)
    for before, after in itertools.pairwise(seen):
        for path, mask in masks_of(after).items():
            assert set(np.unique(mask)) <= {0, 1}
            assert (mask <= before[path]).all(), path
            assert mask.sum() >= (1 if "dot_product" in path else 8), path
    found = method.progress(trees.unflatten(seen[-1]))
    assert found["density"] == pytest.approx(densities[-1])
    assert (
        found["kept/encoder/layers_0/mlp/wo"] == seen[-1][f"encoder/layers_0/mlp/wo/{MASK}"].sum()
    )


def test_the_weight_criterion_takes_the_smallest_groups():
    """Of each set, by its norms as numpy has them; B is still zero when scores are taken."""
    method = StructuredPruning(criterion="weight", density=0.6, start=1, steps=0, scope="uniform")
    _, params, seen = run(method, 1)
    for path, mask in masks_of(seen[1]).items():
        if "dot_product" in path:
            continue
        block = path.rsplit("/", 2)[0]
        squares = sum((params[f"{block}/wi_{i}/kernel"] ** 2).sum(0) for i in (0, 1))
        squares = squares + (params[f"{block}/wo/kernel"] ** 2).sum(1)
        number = int(np.ceil(0.6 * mask.size))
        np.testing.assert_array_equal(
            np.flatnonzero(mask), np.sort(np.argsort(-squares)[:number]), err_msg=path
        )


def test_uniform_pruning_leaves_the_same_heads_in_all_layers():
    """And equally many channels: so a checkpoint of Hugging Face can hold it."""
    base = BASE.replace(num_heads=4, num_decoder_layers=2)
    method = StructuredPruning(density=0.5, start=1, steps=0, every=1, scope="uniform")
    _, _, seen = run(method, 2, base)
    kept = {}
    for path, mask in masks_of(seen[-1]).items():
        stack, _, name, *_ = path.split("/")
        found = tuple(np.flatnonzero(mask)) if "dot_product" in path else mask.sum()
        kept.setdefault((stack, name), set()).add(found)
    assert all(len(found) == 1 for found in kept.values()), kept
    assert {len(*found) for (_, name), found in kept.items() if name != "mlp"} == {2}


def test_blocks_go_by_movement():
    """The sum over steps of -W x gradient, of which finite differences of the mask are the same."""
    method = StructuredPruning(
        "splopa", rank=1, block=4, prototypes=3, density=0.7, start=2, steps=0, every=1
    )
    _, _, seen = run(method, 3)
    masks = masks_of(seen[-1])
    kept, total = (sum(f(mask) for mask in masks.values()) for f in (np.sum, np.size))
    assert 0.7 <= kept / total < 0.7 + 2 / total
    assert all(mask.all() for mask in masks_of(seen[1]).values())


def test_a_row_of_scores_is_that_of_the_equations(rng):
    """The gradient of a mask, against sums by hand."""
    from coda_jax.methods.pruning import gated

    values, weights = (rng.normal(size=(3, 4, 5)).astype(np.float32) for _ in range(2))
    norms = np.arange(5, dtype=np.float32)

    def loss(mask, criterion):
        return (gated(-1, criterion, values, mask, norms) * weights).sum()

    expected = {
        "taylor": np.abs((values * weights).sum(1)).sum(0),
        "gradient": np.abs(weights).sum((0, 1)),
        "weight": norms,
    }
    for criterion, scores in expected.items():
        found = jax.grad(loss)(jnp.ones(5), criterion)
        np.testing.assert_allclose(found, scores, rtol=1e-5)


def test_finish_clears_what_is_gone_and_changes_no_output():
    config = BASE.replace(methods=(StructuredPruning(rank=2),))
    flat = trees.flatten(random_params(config))
    rng = np.random.default_rng(3)
    for path in masks_of(flat):
        flat[path] = jnp.asarray(rng.random(flat[path].shape) < 0.5, jnp.float32)
    _, after = methods.finish(config, trees.unflatten(flat))
    after = trees.flatten(after)
    mask = flat[f"encoder/layers_0/mlp/wo/{MASK}"]
    columns = after["encoder/layers_0/mlp/wi_0/pruning_columns"]
    assert not columns[:, mask == 0].any() and columns[:, mask > 0].all()
    rows = after["encoder/layers_0/mlp/wo/pruning_rows"]
    assert not rows[mask == 0].any() and rows[mask > 0].all()
    gone = jnp.repeat(flat[f"encoder/layers_0/attention/dot_product/{MASK}"] == 0, BASE.head_dim)
    assert not after["encoder/layers_0/attention/query/pruning_columns"][:, gone].any()
    assert not after["encoder/layers_0/attention/out/pruning_rows"][gone].any()


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (TINY, {"density": 0.0}, r"density must be a number above 0 and at most 1, got 0\.0"),
        (TINY, {"density": 1.5}, r"density must be a number above 0 and at most 1, got 1\.5"),
        (TINY, {"density": float("nan")}, "density must be a finite number above 0"),
        (TINY, {"rank": 17}, r"rank=17 is above the width 16 of attention/query"),
        (TINY, {"rank": -1}, "rank must be a whole number of at least 0, got -1"),
        (TINY, {"kind": "splopa", "rank": 0}, "rank must be a whole number of at least 1, got 0"),
        (TINY, {"kind": "splopa", "rank": 5, "block": 4}, "rank=5 is above the width 4 of atten"),
        (TINY, {"kind": "prune"}, "kind must be one of"),
        (TINY, {"scope": "layer"}, "scope must be one of"),
        (TINY, {"start": 0}, "start must be a whole number of at least 1, got 0"),
        (TINY, {"every": 0}, "every must be a whole number of at least 1, got 0"),
        (TINY, {"kind": "sppara"}, "is of convolutions: there are none"),
        (TINY, {"kind": "splopa", "rank": 1}, "block=32 does not divide attention/query"),
        (TINY_SPEECH, {"kind": "splopa", "scope": "uniform"}, "is of heads and channels, not"),
        (TINY, {"criterion": "movement"}, "criterion must be one of"),
    ],
)
def test_what_cannot_be_is_refused(base, options, message):
    with pytest.raises(ValueError, match=message):
        base.replace(methods=(StructuredPruning(**options),))


def test_weights_of_groups_do_not_count_what_lora_adds():
    with pytest.raises(ValueError, match=r"criterion='weight' ignores \['lora'\]: 'taylor'"):
        BASE.replace(methods=(StructuredPruning(criterion="weight"), Lora(2)))


@pytest.mark.all
def test_masks_alone_are_for_a_base_that_is_trained():
    """Fine-pruning: the weights of groups count as they do beside thin matrices."""
    method = StructuredPruning(rank=0, density=0.5, start=1, steps=0, every=1)
    for others in ((), (ParallelAdapter(4),)):
        with pytest.raises(ValueError, match="rank=0 is for METHODS that train all: 'full'"):
            run(method, 1, BASE.replace(methods=others))
    config, params, seen = run(method, 1, BASE.replace(methods=(Full(),)))
    assert 0.5 <= density_of(config, params, masks_of(seen[-1])) < 0.57
    assert not any("pruning_rows" in path for path in params)
    assert config.methods[0].progress(trees.unflatten(seen[-1]))["density"] == pytest.approx(
        density_of(config, params, masks_of(seen[-1]))
    )
    merged_config, merged = methods.sliced(*methods.finish(config, trees.unflatten(seen[-1])))
    found = jax.jit(model_for(merged_config).logits)(merged, batch_of(config))
    expected = jax.jit(model_for(config).logits)(trees.unflatten(seen[-1]), batch_of(config))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_blocks_beside_lora_are_refused():
    """LoRA's update would be lost: blocks multiply a matrix of their own."""
    pruning = StructuredPruning("splopa", rank=1, block=4)
    with pytest.raises(ValueError, match=r"'splopa' replaces what \['lora'\] would"):
        TINY.replace(methods=(pruning, Lora(rank=2)))
