"""T5's network: its numbers beside T5X's, packed targets, layers of their own reduction."""

import dataclasses
import functools

from helpers import (
    ADAPTER,
    TINY,
    config,
    encode,
    logits,
    method_of,
    pack,
    random_params,
    random_tokens,
    shapes,
    shift_right,
    with_coda,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import methods, trees
from coda_jax.methods import Coda
from coda_jax.methods.selection import num_selected

LENGTHS = [9, 4, 1, 7, 2, 0, 3, 8]  # of the rows of a batch
DENSE = config()
ROUTED = config({"reduction": 3, "max_segments": 8})
TIED = config(
    {"reduction": 3}, logits_via_embedding=True, mlp_activations=("relu",), num_encoder_layers=1
)
PER_LAYER = config({"reduction": (1, 2.5), "epsilon": 0.3, "max_segments": 8})


@pytest.mark.all
@pytest.mark.parametrize("cfg", [TIED, PER_LAYER], ids=["tied", "per layer"])
def test_every_gradient_is_finite_and_reaches_its_leaf(cfg, rng):
    """In a batch with a row of padding; the logits too."""
    params = random_params(cfg)
    inputs = random_tokens(rng, [12, 0, 5], 12)
    targets = random_tokens(rng, [6, 0, 4], 6)

    @jax.jit
    def loss(params):
        found = logits(cfg, params, inputs, shift_right(targets), targets)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(found), targets[..., None], axis=-1)
        return -jnp.sum(chosen[..., 0] * (targets > 0)), found

    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    assert found.dtype == jnp.float32 and np.isfinite(found).all()
    for path, leaf in trees.flatten(gradient).items():
        assert np.isfinite(leaf).all(), path
        # A dense layer does not route, so its router learns nothing.
        idle = cfg is PER_LAYER and path == "encoder/layers_0/router/kernel"
        assert np.asarray(leaf).any() != idle, path


@pytest.mark.parametrize("routing", ["soft_topk", "sigmoid"])
def test_router_and_adapter_learn_from_the_first_step(routing, rng):
    """With a fresh adapter its up-projection has a gradient, and the router too."""
    cfg = config({"reduction": 2, "routing": routing}, num_encoder_layers=1)
    params = random_params(cfg, fresh=True)
    inputs = random_tokens(rng, [12, 7], 12)
    cotangent = rng.normal(size=(2, 12, TINY.emb_dim)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda p: (encode(cfg, p, inputs)[0] * cotangent).sum()))(params)
    found = gradient["encoder"]["layers_0"]
    assert np.asarray(found["adapter"]["wo"]["kernel"]).any()
    assert np.asarray(found["router"]["kernel"]).any()
    assert not np.asarray(found["adapter"]["wi"]["kernel"]).any()


@pytest.mark.parametrize("attention", ["k_to_k", "k_to_all"])
def test_picking_every_token_is_the_dense_layer(attention, rng):
    """Where all tokens are picked, their weights are 1 and routing changes nothing."""
    almost_one = config({"reduction": 1.01, "attention": attention}, num_encoder_layers=1)
    params = random_params(almost_one)
    inputs = random_tokens(rng, [12, 5, 1], 12)
    found, selections = encode(almost_one, params, inputs)
    assert [*selections] == ["layers_0"]
    expected, _ = encode(with_coda(almost_one, reduction=1), params, inputs)
    np.testing.assert_allclose(found[inputs > 0], expected[inputs > 0], atol=1e-4)


@pytest.mark.all
def test_each_layer_has_its_own_reduction(rng):
    """Invariants 2 to 4 where the first layer is dense: padding, packing, budget."""
    params = random_params(PER_LAYER)
    inputs = random_tokens(rng, LENGTHS, 9)
    found, selections = encode(PER_LAYER, params, inputs)
    assert [*selections] == ["layers_1"]
    k = [num_selected(length, 2.5) for length in LENGTHS]
    assert selections["layers_1"].valid.sum(-1).tolist() == k
    wide = np.pad(inputs[::-1], ((0, 0), (0, 7)))
    apart = encode(PER_LAYER, params, wide)[0][::-1, :9]
    np.testing.assert_allclose(found[inputs > 0], apart[inputs > 0], atol=1e-5)
    rows = [row[row > 0] for row in inputs if row.any()]
    packed, segments = pack(rows, 36)
    together, _ = encode(PER_LAYER, params, packed, segments)
    np.testing.assert_allclose(together[0, : sum(LENGTHS)], found[inputs > 0], atol=1e-5)


@pytest.mark.all
def test_reduction_is_free_to_change_without_new_parameters(rng):
    """Parameters of r = 3 serve at any other reduction; more picked tokens change the output."""
    params = random_params(ROUTED)
    inputs = random_tokens(rng, LENGTHS, 9)
    outputs = {}
    for reduction in (3, (1, 4)):
        other = with_coda(ROUTED, reduction=reduction)
        trees.check_tree(shapes(other)["params"], params)
        outputs[reduction], selections = encode(other, params, inputs)
        assert np.isfinite(outputs[reduction]).all()
        for name, selection in selections.items():
            r = method_of(other, Coda).reductions(2)[int(name[-1])]
            assert int(selection.valid[0].sum()) == num_selected(9, r)
    first = outputs.pop(3)
    assert all(np.abs(first - other).max() > 1e-3 for other in outputs.values())


@pytest.mark.all
@pytest.mark.parametrize("cfg", [DENSE, ROUTED], ids=["dense", "routed"])
def test_packed_targets_give_what_they_give_alone(cfg, rng):
    """Invariant 3, the whole network."""
    cfg = cfg.replace(num_encoder_layers=1)
    params = random_params(cfg)
    inputs, targets = random_tokens(rng, [5, 1, 6], 6), random_tokens(rng, [3, 4, 1], 4)
    alone = logits(cfg, params, inputs, shift_right(targets), targets)
    packed, segments = pack([row[row > 0] for row in inputs], 14)
    packed_targets, target_segments = pack([row[row > 0] for row in targets], 10)
    starts = np.diff(target_segments, prepend=0) != 0
    packed_inputs = np.where(starts, 0, shift_right(packed_targets))
    found = logits(cfg, params, packed, packed_inputs, packed_targets, segments, target_segments)
    for i, row in enumerate(targets):
        np.testing.assert_allclose(
            found[0][target_segments[0] == i + 1], alone[i][row > 0], atol=1e-5
        )


@pytest.mark.all
@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize(
    ("cfg", "tolerance"),
    [(config(adapter=ADAPTER, num_encoder_layers=1), 0.02), (TIED, 0.1)],
    ids=["adapter", "tied"],
)
def test_logits_in_bfloat16_are_close_to_those_in_float32(cfg, tolerance, rng):
    """The unit-scale embedding of tied models makes their attention sharper."""
    params = random_params(cfg)
    inputs, targets = random_tokens(rng, [12, 7], 12), random_tokens(rng, [6, 4], 6)
    half = dataclasses.replace(cfg, dtype=jnp.bfloat16)
    exact = logits(cfg, params, inputs, shift_right(targets), targets)
    found = logits(half, params, inputs, shift_right(targets), targets)
    assert found.dtype == jnp.float32
    error = np.sqrt(np.mean((found - exact) ** 2) / np.mean(np.square(exact)))
    assert 1e-4 < error < tolerance


def test_new_parameters_are_an_adapter_in_each_layer_and_a_router_in_each_of_the_encoder():
    new, _ = trees.split(shapes(ROUTED)["params"], methods.created(ROUTED))
    expected = {}
    for layer in ("encoder/layers_0", "encoder/layers_1", "decoder/layers_0"):
        expected |= {f"{layer}/adapter/wi/kernel": (16, 4), f"{layer}/adapter/wo/kernel": (4, 16)}
        if layer.startswith("encoder"):
            expected[f"{layer}/router/kernel"] = (16,)
    assert {path: leaf.shape for path, leaf in trees.flatten(new).items()} == expected


T5X_CONFIGS = {
    "gated, untied": {"mlp_activations": ("gelu", "linear")},
    "relu, tied": {"mlp_activations": ("relu",), "logits_via_embedding": True},
    "one layer, many heads": {"num_encoder_layers": 1, "num_decoder_layers": 3, "num_heads": 4},
}


@pytest.mark.parametrize("name", T5X_CONFIGS)
def test_dense_logits_equal_t5x(name, rng):
    """Invariant 7, for inputs longer than the last bucket's distance."""
    t5x = pytest.importorskip(
        "t5x.examples.t5.network", reason="T5X is not installed", exc_type=ImportError
    )
    cfg = config(relpos_num_buckets=32, relpos_max_distance=128, **T5X_CONFIGS[name])
    theirs = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(t5x.T5Config)}
    module = t5x.Transformer(t5x.T5Config(**theirs))
    params = random_params(cfg)
    inputs, targets = random_tokens(rng, [150, 60, 3], 150), random_tokens(rng, [30, 8, 1], 30)
    tree = jax.eval_shape(
        functools.partial(module.init, enable_dropout=False),
        jax.random.key(0),
        inputs,
        targets,
        targets,
    )
    trees.check_tree(tree["params"], params)
    assert tree["params_axes"] == shapes(cfg)["params_axes"]

    def check(inputs, decoder_inputs, targets, segments=None, target_segments=None):
        expected = jax.jit(functools.partial(module.apply, enable_dropout=False))(
            {"params": params}, inputs, decoder_inputs, targets, segments, target_segments
        )
        found = logits(cfg, params, inputs, decoder_inputs, targets, segments, target_segments)
        real = targets > 0
        np.testing.assert_allclose(found[real], expected[real], rtol=1e-4, atol=1e-5)

    check(inputs, shift_right(targets), targets)
    packed, segments = pack([row[row > 0] for row in inputs], 220)
    packed_targets, target_segments = pack([row[row > 0] for row in targets], 44)
    check(packed, shift_right(packed_targets), packed_targets, segments, target_segments)


def test_decoding_of_packed_rows_and_several_tokens_at_once_are_refused():
    model = DENSE.network()
    params = shapes(DENSE)["params"]
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)

    def decode(params, tokens, **kwargs):
        encoded = jnp.zeros((1, 4, TINY.emb_dim))
        call = functools.partial(
            model.apply,
            method="decode",
            decode=True,
            mutable=["cache"],
            enable_dropout=False,
            **kwargs,
        )
        _, made = call({"params": params}, encoded, tokens, tokens, tokens)
        return call({"params": params, **made}, encoded, tokens, tokens, tokens)

    with pytest.raises(ValueError, match="one token a step, got 4"):
        jax.eval_shape(decode, params, tokens)
    with pytest.raises(ValueError, match="packed examples cannot be decoded"):
        jax.eval_shape(
            functools.partial(decode, encoder_segment_ids=jnp.ones((1, 4), int)), params, tokens
        )
