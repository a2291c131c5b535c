"""The network: the design's invariants, over a table of all methods."""

import dataclasses
import functools

from helpers import (
    TINY,
    config,
    encode,
    logits,
    pack,
    random_params,
    random_tokens,
    shapes,
    shift_right,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import params as params_lib
from coda_jax.adapters import AdapterConfig
from coda_jax.network import Transformer
from coda_jax.routing import num_selected

SEGMENT_LENGTHS = [1, 4, 1, 1, 7, 2, 1, 1]  # with r = 3 they need 10 slots, not ceil(18 / 3) = 6
LENGTHS = [9, 4, 1, 7, 2, 0, 3, 8]  # of the rows of a batch: as many, to share compilations


def routed(**coda):
    return config({"max_segments": len(SEGMENT_LENGTHS), **coda})


METHODS = {
    "dense": config(),
    "adapter": config(adapter=AdapterConfig(bottleneck=4)),
    "k_to_k": routed(reduction=3),
    "k_to_all": routed(reduction=2.5, attention="k_to_all"),
    "iterative": routed(reduction=3, solver="iterative"),
    "sigmoid": routed(reduction=2, routing="sigmoid"),
    "truncation": routed(reduction=2, routing="truncation", attention="k_to_all"),
    "per layer": routed(reduction=(1, 2.5), epsilon=0.3),
}
TIED = config({"reduction": 3}, logits_via_embedding=True, mlp_activations=("relu",))
ROUTED = [name for name, cfg in METHODS.items() if cfg.coda is not None]
each_method = pytest.mark.parametrize("name", METHODS)


@pytest.mark.parametrize("name", [*METHODS, "tied"])
def test_every_gradient_is_finite_and_reaches_its_leaf(name, rng):
    """In a batch with a row of padding; the logits too."""
    cfg = {**METHODS, "tied": TIED}[name]
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
    for path, leaf in params_lib.flatten(gradient).items():
        assert np.isfinite(leaf).all(), path
        # A dense layer does not route, so its router learns nothing.
        idle = name == "per layer" and path == "encoder/layers_0/router/kernel"
        assert np.asarray(leaf).any() != idle, path


@pytest.mark.parametrize("name", ["k_to_k", "sigmoid"])
def test_router_and_adapter_learn_from_the_first_step(name, rng):
    """With a fresh adapter its up-projection has a gradient, and the router too."""
    cfg = METHODS[name]
    params = random_params(cfg, fresh=True)
    inputs = random_tokens(rng, [12, 7], 12)
    cotangent = rng.normal(size=(2, 12, TINY.emb_dim)).astype(np.float32)
    gradient = jax.grad(lambda p: (encode(cfg, p, inputs)[0] * cotangent).sum())(params)
    for layer in ("layers_0", "layers_1"):
        found = gradient["encoder"][layer]
        assert np.asarray(found["adapter"]["wo"]["kernel"]).any()
        assert np.asarray(found["router"]["kernel"]).any()
        assert not np.asarray(found["adapter"]["wi"]["kernel"]).any()


@pytest.mark.parametrize("attention", ["k_to_k", "k_to_all"])
@pytest.mark.parametrize("routing", ["soft_topk", "truncation"])
def test_reduction_of_one_with_fresh_adapters_is_the_dense_model(attention, routing, rng):
    """Invariant 1."""
    cfg = config({"reduction": 1.0, "attention": attention, "routing": routing})
    params = random_params(cfg, fresh=True)
    dense, _ = params_lib.split_new(params)
    inputs, targets = random_tokens(rng, [12, 5], 12), random_tokens(rng, [6, 3], 6)
    np.testing.assert_allclose(
        logits(cfg, params, inputs, shift_right(targets), targets),
        logits(cfg.dense(), dense, inputs, shift_right(targets), targets),
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ["k_to_k", "k_to_all"])
def test_picking_every_token_is_the_dense_layer(name, rng):
    """Where all tokens are picked, their weights are 1 and routing changes nothing."""
    cfg = METHODS[name]
    almost_one = dataclasses.replace(cfg, coda=dataclasses.replace(cfg.coda, reduction=1.01))
    one = dataclasses.replace(cfg, coda=dataclasses.replace(cfg.coda, reduction=1))
    params = random_params(cfg)
    inputs = random_tokens(rng, [12, 5, 1], 12)
    found, selections = encode(almost_one, params, inputs)
    assert sorted(selections) == ["layers_0", "layers_1"]
    np.testing.assert_allclose(
        found[inputs > 0], encode(one, params, inputs)[0][inputs > 0], atol=1e-4
    )


@each_method
def test_padding_and_other_rows_change_nothing(name, rng):
    """Invariant 2."""
    cfg = METHODS[name]
    params = random_params(cfg)
    inputs = random_tokens(rng, LENGTHS, 9)
    together, _ = encode(cfg, params, inputs)
    # Another order, other neighbours, a row of padding, and more padding.
    others = random_tokens(rng, [16, 0], 16)
    wide = np.concatenate([others, np.pad(inputs[::-1], ((0, 0), (0, 7)))])
    apart, _ = encode(cfg, params, wide)
    assert np.isfinite(together).all() and np.isfinite(apart).all()
    apart = apart[2:][::-1, :9]
    np.testing.assert_allclose(together[inputs > 0], apart[inputs > 0], atol=1e-5)


@each_method
def test_packed_examples_give_what_they_give_alone(name, rng):
    """Invariant 3, in the encoder: many short segments, which round up one by one."""
    cfg = METHODS[name]
    params = random_params(cfg)
    inputs = random_tokens(rng, SEGMENT_LENGTHS, 9)
    alone, _ = encode(cfg, params, inputs)
    rows = [row[row > 0] for row in inputs]
    # Two packed rows: all segments, and a few of them in another order.
    packed, segments = pack(rows, 20)
    fewer, fewer_segments = pack([rows[4], rows[0], rows[1]], 20)
    found, selections = encode(
        cfg,
        params,
        np.concatenate([packed, fewer]),
        np.concatenate([segments, fewer_segments]),
    )
    for i, length in enumerate(SEGMENT_LENGTHS):
        np.testing.assert_allclose(found[0][segments[0] == i + 1], alone[i, :length], atol=1e-5)
    for i, j in enumerate((4, 0, 1)):
        length = SEGMENT_LENGTHS[j]
        np.testing.assert_allclose(
            found[1][fewer_segments[0] == i + 1], alone[j, :length], atol=1e-5
        )
    for layer, selection in selections.items():
        reduction = cfg.coda.reductions(2)[int(layer[-1])]
        expected = sum(num_selected(length, reduction) for length in SEGMENT_LENGTHS)
        assert int(selection.valid[0].sum()) == expected


@pytest.mark.parametrize("name", ["dense", "k_to_k"])
def test_packed_targets_give_what_they_give_alone(name, rng):
    """Invariant 3, the whole network."""
    cfg = METHODS[name]
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


@pytest.mark.parametrize("name", ROUTED)
def test_budget_is_kept_in_every_layer(name, rng):
    """Invariant 4: at most k tokens of each example, no padding, weights within [0, 1]."""
    cfg = METHODS[name]
    inputs = random_tokens(rng, LENGTHS, 9)
    _, selections = encode(cfg, random_params(cfg), inputs)
    routing_layers = [i for i, r in enumerate(cfg.coda.reductions(2)) if r > 1]
    assert sorted(selections) == [f"layers_{i}" for i in routing_layers]
    for i in routing_layers:
        selection = selections[f"layers_{i}"]
        k = [num_selected(length, cfg.coda.reductions(2)[i]) for length in LENGTHS]
        valid, weights = np.asarray(selection.valid), np.asarray(selection.weights)
        assert selection.indices.shape == (len(LENGTHS), max(k))
        assert valid.sum(-1).tolist() == k
        picked = np.take_along_axis(inputs, np.asarray(selection.indices), axis=1)
        assert (picked[valid] > 0).all()
        assert (weights[~valid] == 0).all() and (weights[valid] > 0).all() and (weights <= 1).all()


def test_reduction_is_free_to_change_without_new_parameters(rng):
    """Parameters of r = 3 serve at any other reduction; more picked tokens change the output."""
    cfg = METHODS["k_to_k"]
    params = random_params(cfg)
    inputs = random_tokens(rng, LENGTHS, 9)
    outputs = {}
    for reduction in (3, 5, (1, 4)):
        other = dataclasses.replace(cfg, coda=dataclasses.replace(cfg.coda, reduction=reduction))
        params_lib.check_tree(shapes(other)["params"], params)
        outputs[reduction], selections = encode(other, params, inputs)
        assert np.isfinite(outputs[reduction]).all()
        for name, selection in selections.items():
            r = other.coda.reductions(2)[int(name[-1])]
            assert int(selection.valid[0].sum()) == num_selected(9, r)
    first = outputs.pop(3)
    assert all(np.abs(first - other).max() > 1e-3 for other in outputs.values())


@pytest.mark.parametrize("name, tolerance", [("adapter", 0.02), ("k_to_k", 0.03), ("tied", 0.1)])
def test_bfloat16_is_close_to_float32(name, tolerance, rng):
    """The unit-scale embedding of tied models makes their attention sharper."""
    cfg = {**METHODS, "tied": TIED}[name]
    params = random_params(cfg)
    inputs, targets = random_tokens(rng, [12, 7], 12), random_tokens(rng, [6, 4], 6)
    half = dataclasses.replace(cfg, dtype=jnp.bfloat16)
    exact = logits(cfg, params, inputs, shift_right(targets), targets)
    found = logits(half, params, inputs, shift_right(targets), targets)
    assert found.dtype == jnp.float32
    error = np.sqrt(np.mean((found - exact) ** 2) / np.mean(np.square(exact)))
    assert 1e-4 < error < tolerance


# What T5X's partitioning rules know.
AXIS_NAMES = {
    "embed", "mlp", "heads", "kv", "joined_kv", "vocab", "relpos_buckets", "layers", "stack"
}  # fmt: skip


@each_method
def test_every_parameter_has_axis_names(name):
    made = shapes(METHODS[name])
    params = params_lib.flatten(made["params"])
    axes = params_lib.flatten(made["params_axes"])
    assert axes.keys() == {f"{path}_axes" for path in params}
    for path, leaf in params.items():
        names = axes[f"{path}_axes"].names
        assert len(names) == len(leaf.shape) == len(set(names)) and set(names) <= AXIS_NAMES, path


def test_new_parameters_are_those_of_the_design():
    cfg = METHODS["k_to_k"]
    dense, new = params_lib.split_new(shapes(cfg)["params"])
    params_lib.check_tree(shapes(cfg.dense())["params"], dense)
    expected = {}
    for layer in ("encoder/layers_0", "encoder/layers_1", "decoder/layers_0"):
        expected |= {f"{layer}/adapter/wi/kernel": (16, 4), f"{layer}/adapter/wo/kernel": (4, 16)}
        if layer.startswith("encoder"):
            expected[f"{layer}/router/kernel"] = (16,)
    assert {path: leaf.shape for path, leaf in params_lib.flatten(new).items()} == expected


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
    params_lib.check_tree(tree["params"], params)
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
    model = Transformer(METHODS["dense"])
    params = shapes(METHODS["dense"])["params"]
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
