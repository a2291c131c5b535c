"""The invariants in batches in which each row has its own adapter, or whatever else is trained."""

import dataclasses
import functools

from contract.programs import (
    LENGTH,
    LENGTHS,
    base_params,
    batch_of,
    coda_of,
    fresh_params,
    inputs_of,
    mask_of,
    outputs,
    padded,
    params,
)
from contract.table import CASES, adapted, any_case, parametrized, routed, with_one_family
from helpers import ADAPTER, GOLDEN, TINY, as_on_tpu, without_loops
import jax
import numpy as np
import pytest

from coda_jax import methods, trees
from coda_jax.checkpoints import load_hf, swap_in
from coda_jax.methods import Coda, Lora
from coda_jax.methods.coda import with_reduction
from coda_jax.methods.selection import num_selected
from coda_jax.models import FAMILIES
from coda_jax.nn import dot_product_attention
from coda_jax.objectives import Generation, model_for

DEFAULT = "t5-coda+parallel_adapter"  # in `make test`
ROWS = (0, 1, 2, 1, 0, 2, 1, 0)  # the adapter of each row of `inputs_of`


def shares_leaves(case):
    """Whether something is trained, and not everything."""
    return adapted(case) and not trees.matches("frozen", methods.trained(case.config))


def each_case(where=any_case, default=()):
    """Parametrizes over the cases that have adapters."""
    cases = with_one_family(filter(shares_leaves, CASES))
    return parametrized(filter(where, cases), default)


@functools.cache
def adapter(config, number):
    """Parameters over the same base, with other values of what is trained for each number."""
    rng = np.random.default_rng(number)
    own, frozen = methods.partition(config, params(config))
    fixed = tuple(pattern for m in config.methods for pattern in m.without_gradient)

    def changed(path, leaf):
        if not number or trees.matches(path, fixed):
            return leaf
        return (leaf * (1 + 0.3 * rng.normal(size=leaf.shape))).astype(leaf.dtype)

    flat = {path: changed(path, leaf) for path, leaf in trees.flatten(own).items()}
    return trees.merge(trees.unflatten(flat), frozen)


def of_rows(config, adapters):
    """The parameters of a batch of which each row has one of these parameter trees."""
    _, frozen = methods.partition(config, adapters[0])
    own = [methods.partition(config, each)[0] for each in adapters]
    return trees.merge(frozen, jax.tree.map(lambda *leaves: np.stack(leaves), *own))


@functools.partial(jax.jit, static_argnums=0)
def mixed_outputs(config, params, batch):
    """As of `programs.outputs`."""
    return model_for(config).with_own_leaves().logits(params, batch)


@functools.partial(jax.jit, static_argnums=0)
def mixed_encoding(config, params, inputs, *segments):
    """(the encoder's output [B, N, D], the routing of its layers)."""
    model = model_for(config).with_own_leaves()
    options = {"enable_dropout": False, "method": "encode"}
    encoded = model.module.apply({"params": params}, inputs, *segments, **options)
    return encoded, None if segments else model.routing(params, inputs)


@functools.partial(jax.jit, static_argnums=0)
def encoding(config, params, inputs):
    """The encoder's output alone."""
    return model_for(config).encode(params, inputs)


@each_case(default=[DEFAULT])
def test_each_row_gives_what_it_gives_alone_with_its_adapter(case):
    """Invariant 11."""
    config, batch = case.config, batch_of(case.config)
    whole = [adapter(config, number) for number in (1, 2)]
    found = mixed_outputs(config, of_rows(config, whole), batch)
    for row, each in enumerate(whole):
        np.testing.assert_allclose(found[row], outputs(config, each, batch)[row], atol=1e-5)
    assert not np.allclose(found[1], outputs(config, whole[0], batch)[1], atol=1e-3)


@each_case()
def test_padding_and_the_order_of_rows_change_nothing(case):
    """Invariants 2 and 4: k tokens of each row have weight, none that is padding."""
    config, mask, inputs = case.config, mask_of(LENGTHS), inputs_of(case.config)
    whole = [adapter(config, number) for number in ROWS]
    found, routing = mixed_encoding(config, of_rows(config, whole), inputs)
    for number in set(ROWS):
        rows = np.array(ROWS) == number
        alone = encoding(config, adapter(config, number), inputs)
        np.testing.assert_allclose(found[rows], alone[rows], atol=1e-5)
    other, _ = mixed_encoding(config, of_rows(config, whole[::-1]), padded(inputs[::-1], 7))
    np.testing.assert_allclose(other[::-1, :LENGTH][mask], found[mask], atol=1e-5)
    assert not routing[:, ~mask].any()
    if coda_of(config) is not None:
        k = [num_selected(length, coda_of(config).reduction) for length in LENGTHS]
        np.testing.assert_array_equal((routing > 0).sum(-1), np.tile(k, (len(routing), 1)))


@each_case(lambda case: all(method.packs for method in case.methods))
def test_packed_examples_give_what_they_give_alone(case):
    """Invariant 3: those of a row share its adapter."""
    config = case.config
    inputs = inputs_of(config, (4, 3, 4, 3))
    together = np.concatenate([inputs[::2], inputs[1::2, :3]], axis=1)
    segments = np.tile(np.repeat([1, 2], [4, 3]), (2, 1)).astype(np.int32)
    whole = [adapter(config, number) for number in (1, 2)]
    found, _ = mixed_encoding(config, of_rows(config, whole), together, segments)
    for row, each in enumerate(whole):
        alone = encoding(config, each, inputs)
        np.testing.assert_allclose(found[row, :4], alone[2 * row], atol=1e-5)
        np.testing.assert_allclose(found[row, 4:], alone[2 * row + 1, :3], atol=1e-5)


@each_case(lambda case: all(method.starts_as_base for method in case.methods))
def test_fresh_adapters_are_the_base(case):
    """Invariant 1, at a reduction of 1 where there is routing."""
    config, batch = case.config, batch_of(case.config)
    if routed(case):
        config = config.replace(methods=with_reduction(config.methods, 1))
    found = mixed_outputs(config, of_rows(config, [fresh_params(case.config)] * 2), batch)
    dense = config.dense()
    np.testing.assert_allclose(found, outputs(dense, base_params(dense), batch), atol=1e-5)


@each_case(lambda case: case.method == "lora" and not routed(case))
def test_rows_give_what_merged_models_give(case):
    """Invariant 10."""
    config, batch = case.config, batch_of(case.config)
    whole = [adapter(config, number) for number in (1, 2)]
    found = mixed_outputs(config, of_rows(config, whole), batch)
    for row, each in enumerate(whole):
        merged = methods.merge(config, each)
        np.testing.assert_allclose(found[row], outputs(*merged, batch)[row], atol=1e-5)


@pytest.mark.all
@pytest.mark.parametrize("methods_of_rows", [(Coda(), ADAPTER), (Lora(rank=2),)], ids=len)
def test_rows_are_decoded_alike_on_a_tpu(methods_of_rows, monkeypatch):
    """Where a decoder attends to the encoding by matrices, which rows cannot share."""
    monkeypatch.setattr(dot_product_attention, "_WORTH_A_SOURCE", 0)
    config = TINY.replace(methods=methods_of_rows, dropout_rate=0.0)
    inputs, generation = inputs_of(config), Generation(max_decode_length=4, num_beams=2)
    whole = [adapter(config, number) for number in ROWS]

    def generated(model, params):
        with as_on_tpu():
            return jax.jit(lambda params: model.generate(params, inputs, generation))(params)

    found, scores = generated(model_for(config).with_own_leaves(), of_rows(config, whole))
    for number in set(ROWS):
        rows = np.array(ROWS) == number
        expected = generated(model_for(config), adapter(config, number))
        np.testing.assert_array_equal(found[rows], expected[0][rows])
        np.testing.assert_allclose(scores[rows], expected[1][rows], rtol=1e-4)


@pytest.mark.all
@pytest.mark.parametrize("family", FAMILIES)
def test_the_operations_are_those_of_one_adapter(family):
    """Invariant 8: own leaves cost no more, and what is not selected is not computed."""
    case = next(x for x in CASES if str(x) == f"{family}-coda+parallel_adapter")
    config, batch = case.config, batch_of(case.config)

    def flops(function, params):
        with without_loops():
            jax.clear_caches()
            compiled = function.lower(config, params, batch).compile()
        jax.clear_caches()
        return compiled.cost_analysis()["flops"]

    whole = [adapter(config, number) for number in (1, 2)]
    mixed = flops(mixed_outputs, of_rows(config, whole))
    assert mixed == pytest.approx(flops(outputs, whole[0]), rel=0.02)


@pytest.mark.all
def test_equal_tokens_are_ties_in_every_row():
    """Invariant 9: in the first layer, to the bit, and the earlier is taken."""
    case = next(x for x in CASES if str(x) == DEFAULT)
    config = dataclasses.replace(case, num_encoder_layers=1).config
    inputs = np.array([[5] * 9, [7, 5] * 4 + [7], [5] * 4 + [0] * 5], np.int32)
    whole = [adapter(config, number) for number in (1, 2, 0)]
    _, routing = mixed_encoding(config, of_rows(config, whole), inputs)
    assert (routing[0, 0] > 0).tolist() == [True] * 3 + [False] * 6
    assert (routing[0, 2] > 0).tolist() == [True] * 2 + [False] * 7
    taken = np.flatnonzero(routing[0, 1])
    assert taken.tolist() in ([0, 2, 4], [1, 3, 5])
    assert len({*np.asarray(routing[0, 1])[taken].tolist()}) == 1


@pytest.mark.all
@pytest.mark.parametrize("name", ["v1_1", "v1_0"])
def test_rows_with_fresh_adapters_give_what_the_original_gives(name):
    """Invariant 7."""
    config, base = load_hf(GOLDEN / name)
    golden = np.load(GOLDEN / name / "logits.npz")
    config = config.replace(methods=(Coda(reduction=1.0), ADAPTER))
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    given = (golden[x] for x in ("encoder", "decoder_inputs", "decoder_targets"))
    batch = dict(zip(names, given, strict=True))
    whole = [swap_in(config, base, jax.random.key(i)) for i in range(len(golden["encoder"]))]
    found = np.asarray(mixed_outputs(config, of_rows(config, whole), batch))
    valid = golden["decoder_targets"] > 0
    np.testing.assert_allclose(found[valid], golden["logits"][valid], rtol=1e-4, atol=1e-5)
