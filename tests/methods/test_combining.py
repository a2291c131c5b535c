"""Weighted sums of adapters."""

import dataclasses

from helpers import TINY, adapted_params, logits, random_params
import numpy as np
import pytest

from coda_jax import methods, trees
from coda_jax.methods import (
    Coda,
    HoulsbyAdapter,
    Lora,
    ParallelAdapter,
    PrefixTuning,
    StructuredPruning,
    combine_adapters,
)

BASE = TINY.replace(dropout_rate=0.0, num_encoder_layers=1, num_decoder_layers=1)
EVERYTHING = (r"(attention|mlp)/\w+$",)
INPUTS = np.array([[3, 4, 5, 6, 7, 8], [9, 3, 5, 0, 0, 0]], np.int32)
TARGETS = np.array([[5, 6, 1], [7, 1, 0]], np.int32)


@pytest.fixture(name="base", scope="module")
def fixture_base():
    return random_params(BASE)


def adapter(base, *adaptation, seed=1, **changes):
    """(config, params) of a base with methods, whose leaves are random."""
    config = BASE.replace(methods=adaptation, **changes)
    return config, adapted_params(config, base, seed)


def outputs(config, params):
    return np.asarray(logits(config, params, INPUTS, TARGETS, TARGETS))


def updates(config, params):
    """{path: s A B} in float64."""
    (lora,), flat = config.methods, trees.flatten(params)
    return {
        path.removesuffix("/lora_a"): lora.scale
        * np.asarray(leaf, np.float64)
        @ np.asarray(flat[path.replace("lora_a", "lora_b")], np.float64)
        for path, leaf in flat.items()
        if path.endswith("/lora_a")
    }


def test_updates_of_lora_are_added_exactly(base):
    """Other ranks, strengths and scalings: the sum is that of the dense updates."""
    parts = [
        adapter(base, Lora(2, alpha=3.0, targets=EVERYTHING), seed=1),
        adapter(base, Lora(1, alpha=5.0, targets=EVERYTHING, rank_stabilized=True), seed=2),
        adapter(base, Lora(3, targets=EVERYTHING), seed=3),
    ]
    weights = (0.5, -1.25, 2.0)
    config, params = combine_adapters(base, parts, weights)
    assert config.methods == (Lora(6, alpha=6.0, targets=EVERYTHING),)
    found = updates(config, params)
    dense = [updates(*part) for part in parts]
    for path, leaf in found.items():
        expected = sum(w * part[path] for w, part in zip(weights, dense, strict=True))
        np.testing.assert_allclose(leaf, expected, atol=1e-5)
    # The model, too, is the base plus the sum.
    flat = trees.flatten(base)
    for path, leaf in trees.flatten(methods.merge(config, params)[1]).items():
        module = path.removesuffix("/kernel")
        expected = flat[path] + sum(
            w * part.get(module, 0) for w, part in zip(weights, dense, strict=True)
        )
        np.testing.assert_allclose(leaf, expected, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    "adaptation",
    [
        (Lora(2),),
        pytest.param((Coda(2.0), ParallelAdapter(4)), marks=pytest.mark.all),
        pytest.param((HoulsbyAdapter(4, use_bias=True),), marks=pytest.mark.all),
        pytest.param((PrefixTuning(3, hidden=5),), marks=pytest.mark.all),
    ],
    ids=lambda methods: methods[0].name,
)
def test_weights_1_and_0_give_the_first(adaptation, base):
    parts = [adapter(base, *adaptation, seed=seed) for seed in (1, 2)]
    np.testing.assert_allclose(
        outputs(*combine_adapters(base, parts, (1, 0))), outputs(*parts[0]), atol=1e-5
    )
    assert np.abs(outputs(*parts[0]) - outputs(*parts[1])).max() > 0.1


def test_leaves_are_added_and_norms_are_moved(base):
    """Of norms it is the changes that are added, whatever the weights add up to."""
    parts = [adapter(base, ParallelAdapter(4), seed=seed) for seed in (1, 2)]
    config, params = combine_adapters(base, parts, (0.75, 0.5))
    assert config == parts[0][0]
    flat, first, second = (trees.flatten(x) for x in (params, parts[0][1], parts[1][1]))
    for path, leaf in trees.flatten(base).items():
        expected = leaf
        if path.endswith("norm/scale"):
            expected = leaf + 0.75 * (first[path] - leaf) + 0.5 * (second[path] - leaf)
        np.testing.assert_allclose(flat[path], expected, atol=1e-6, err_msg=path)
    new = [path for path in flat if "/adapter/" in path]
    assert len(new) == 2 * (BASE.num_encoder_layers + BASE.num_decoder_layers)
    for path in new:
        np.testing.assert_allclose(flat[path], 0.75 * first[path] + 0.5 * second[path], atol=1e-6)


def test_the_number_of_tokens_may_differ(base):
    """The routers' leaves mean the same at any reduction: the first one's is taken."""
    parts = [adapter(base, Coda(r), ParallelAdapter(4), seed=r) for r in (2, 3)]
    assert combine_adapters(base, parts, (0.5, 0.5))[0].methods == parts[0][0].methods


def test_the_parts_stay_as_they_are(base):
    part = adapter(base, Lora(2))
    before = {path: np.array(x) for path, x in trees.flatten(part[1]).items()}
    combine_adapters(base, [part, part], (0.5, 0.5))
    for path, leaf in trees.flatten(part[1]).items():
        np.testing.assert_array_equal(leaf, before[path])


def test_what_does_not_belong_together_is_refused(base):
    lora = adapter(base, Lora(2))
    elsewhere = adapter(random_params(BASE, seed=9), Lora(2))
    for parts, weights, message in (
        ([], [], "there are 0 adapters"),
        ([lora], [1, 1], r"there are 1 adapters and the weights \(1, 1\)"),
        ([lora, lora], [1, float("nan")], r"WEIGHTS\[1\] must be a finite number, got nan"),
        (
            [lora, elsewhere],
            [1, 1],
            r"have other bases; frozen leaves differ:\n  .*scale\n  .*kernel",
        ),
        ([lora, adapter(base, ParallelAdapter(4))], [1, 1], r"methods cannot be added: \['lora'"),
        (
            [adapter(base, ParallelAdapter(4)), adapter(base, ParallelAdapter(5))],
            [1, 1],
            "adapters with other fields cannot be added: .*bottleneck=5",
        ),
        ([lora, adapter(base, Lora(2, targets=("query$",)))], [1, 1], "other projections .*value"),
        ([lora, adapter(base, Lora(2, weight_decomposed=True))], [1, 1], "DoRA"),
        ([adapter(base, StructuredPruning())] * 2, [1, 1], "cannot be added: masks have no sums"),
        (
            [adapter(base, Lora(6, targets=EVERYTHING))] * 3,
            [1, 1, 1],
            r"the ranks 6 \+ 6 \+ 6 = 18 are above .*'s width",
        ),
        ([lora, adapter(base, Lora(2), eos_id=2)], [1, 1], "models differ: eos_id=1, not 2"),
    ):
        with pytest.raises(ValueError, match=message):
            combine_adapters(base, parts, weights)


def test_another_base_than_that_of_the_adapters_is_refused(base):
    part = adapter(base, ParallelAdapter(4))
    with pytest.raises(ValueError, match="have other bases; frozen leaves differ"):
        combine_adapters(random_params(BASE, seed=9), [part, part], (0.5, 0.5))


def test_values_that_are_not_finite_are_refused(base):
    config, params = adapter(base, Lora(2))
    flat = dict(trees.flatten(params))
    path = next(path for path in flat if path.endswith("lora_a"))
    flat[path] = np.full_like(flat[path], np.nan)
    with pytest.raises(FloatingPointError, match="lora_a has values that are not finite"):
        combine_adapters(base, [(config, trees.unflatten(flat))], (1,))


def test_heads_are_added_where_the_base_has_none():
    encoder = BASE.encoder_only().replace(head="classification", labels=("a", "b"))
    base = random_params(BASE.encoder_only())
    config = dataclasses.replace(encoder, methods=(Lora(2),))
    parts = [(config, adapted_params(config, base, seed)) for seed in (1, 2)]
    _, params = combine_adapters(base, parts, (0.25, 0.5))
    flat, first, second = (trees.flatten(x) for x in (params, parts[0][1], parts[1][1]))
    heads = [path for path in flat if trees.matches(path, config.heads)]
    assert heads
    for path in heads:
        np.testing.assert_allclose(flat[path], 0.25 * first[path] + 0.5 * second[path], atol=1e-6)
