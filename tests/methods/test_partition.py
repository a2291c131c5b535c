"""What follows from a config's methods: their order, and which leaves are new, trained or kept."""

from helpers import ADAPTER, TINY, TINY_SPEECH, config
import numpy as np
import pytest

from coda_jax import methods, trees
from coda_jax.methods import METHODS, Coda, Full
from coda_jax.models import param_shapes

ONE_LAYER = TINY.replace(num_encoder_layers=1)
NEW = {
    "decoder/layers_0/adapter/wi/kernel",
    "decoder/layers_0/adapter/wo/kernel",
    "encoder/layers_0/adapter/wi/kernel",
    "encoder/layers_0/adapter/wo/kernel",
    "encoder/layers_0/router/kernel",
}
NORMS = {
    "decoder/decoder_norm/scale",
    "decoder/layers_0/pre_cross_attention_layer_norm/scale",
    "decoder/layers_0/pre_mlp_layer_norm/scale",
    "decoder/layers_0/pre_self_attention_layer_norm/scale",
    "encoder/encoder_norm/scale",
    "encoder/layers_0/pre_attention_layer_norm/scale",
    "encoder/layers_0/pre_mlp_layer_norm/scale",
}


def paths(tree):
    return set(trees.flatten(tree))


def test_adapters_and_routing_train_their_leaves_and_the_norms():
    cfg = config({"reduction": 3}, base=ONE_LAYER)
    params = param_shapes(cfg)
    trained, frozen = methods.partition(cfg, params)
    assert paths(trained) == NEW | NORMS
    assert paths(frozen) == paths(params) - NEW - NORMS
    new, dense = trees.split(params, methods.created(cfg))
    assert paths(new) == NEW
    trees.check_tree(param_shapes(cfg.dense()), dense)


def test_each_method_brings_its_own_leaves_only():
    cfg = config({"reduction": 3}, base=ONE_LAYER)
    params = param_shapes(cfg)
    for method, word in ((Coda(), "router"), (ADAPTER, "adapter")):
        own = {path for path in NEW if f"/{word}/" in path}
        alone = cfg.replace(methods=(method,))
        assert paths(trees.split(params, methods.created(alone))[0]) == own
        assert paths(methods.partition(alone, params)[0]) == own | NORMS


def test_a_head_is_trained_with_the_methods_but_not_created_by_them():
    """And of a Conformer's norms the biases are trained, but of its projections none."""
    cfg = config({"reduction": 3}, base=TINY_SPEECH, num_encoder_layers=1)
    params = param_shapes(cfg)
    head = {"ctc_head/bias", "ctc_head/kernel"}
    assert not paths(trees.split(params, methods.created(cfg))[0]) & head
    trained, frozen = methods.partition(cfg, params)
    assert head <= paths(trained)
    assert "encoder/layers_0/pre_second_mlp_layer_norm/bias" in paths(trained)
    assert "encoder/layers_0/second_mlp/wi/bias" in paths(frozen)


def test_full_trains_all_and_no_methods_train_nothing():
    params = param_shapes(ONE_LAYER)
    everything = ONE_LAYER.replace(methods=(Full(),))
    assert paths(methods.partition(everything, params)[0]) == paths(params)
    assert methods.created(everything) == ()
    assert methods.trained(ONE_LAYER) == ()
    assert paths(methods.partition(TINY_SPEECH, param_shapes(TINY_SPEECH))[0]) == set()


def test_what_cannot_be_folded_stays_and_full_tuning_leaves_nothing_behind():
    cfg = config({"reduction": 3}, base=ONE_LAYER)
    cfg = cfg.replace(methods=(*cfg.methods, Full()))
    params = {"a": np.zeros(1)}
    assert methods.merge(cfg, params) == (cfg, params)
    finished, left = methods.finish(cfg, params)
    assert finished == config({"reduction": 3}, base=ONE_LAYER) and left is params


def test_a_config_keeps_its_methods_in_the_order_of_the_table():
    given = [Full(), ADAPTER, Coda()]
    assert [method.name for method in methods.ordered(given)] == [
        name for name in METHODS if name in {method.name for method in given}
    ]
    assert TINY.replace(methods=given) == TINY.replace(methods=reversed(given))
    assert hash(TINY.replace(methods=given)) == hash(TINY.replace(methods=reversed(given)))


def test_methods_that_do_not_go_together_or_are_none_are_refused():
    with pytest.raises(ValueError, match=r"different kinds, got two of \['coda'\]"):
        TINY.replace(methods=(Coda(2), ADAPTER, Coda(3)))
    with pytest.raises(ValueError, match="must be methods such as those of METHODS, got 'coda'"):
        TINY.replace(methods=("coda",))
    with pytest.raises(ValueError, match=r"method 'adaptor' is unknown; .*'parallel_adapter'"):
        methods.find("adaptor")
    assert methods.find("coda") is Coda


def test_routing_is_changed_left_out_and_asked_about_where_there_is_some():
    routed, plain = (Coda(3, max_segments=5), ADAPTER), (ADAPTER,)
    assert methods.with_reduction(routed, 5) == (Coda(5, max_segments=5), ADAPTER)
    with pytest.raises(ValueError, match="reduction=5 is given for a model that does not route"):
        methods.with_reduction(plain, 5)
    assert methods.unrouted(routed) == methods.unrouted(plain) == plain
    assert methods.max_segments(routed) == 5 and methods.max_segments(plain) is None


def test_a_router_serves_with_other_options_and_an_adapter_does_not():
    assert Coda(3).continues(Coda(5, epsilon=0.1)) and not Coda().continues(ADAPTER)
    assert ADAPTER.continues(type(ADAPTER)(ADAPTER.bottleneck))
    assert not ADAPTER.continues(type(ADAPTER)(ADAPTER.bottleneck + 1))


def test_what_is_frozen_must_come_from_somewhere():
    cfg = config({"reduction": 3}, base=ONE_LAYER)
    params = param_shapes(cfg)
    frozen, total = (trees.count(x) for x in (methods.partition(cfg, params)[1], params))
    said = f"INITIAL_CHECKPOINT_PATH=None: {frozen:,} of {total:,} parameters are frozen"
    with pytest.raises(ValueError, match=said):
        methods.check_start(cfg, params, None)
    with pytest.raises(ValueError, match=r"INITIAL_CHECKPOINT_PATH='': .*methods/full\.gin"):
        methods.check_start(cfg, params, "")
    methods.check_start(cfg, params, "checkpoint")
    methods.check_start(cfg.replace(methods=(*cfg.methods, Full())), params, None)
