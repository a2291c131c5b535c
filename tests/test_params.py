"""The table of trained, saved and new leaves, and the tree functions."""

import numpy as np
import pytest

from coda_jax import params as params_lib

NEW = (
    "decoder/layers_0/adapter/wi/kernel",
    "encoder/layers_0/adapter/wo/kernel",
    "encoder/layers_0/router/kernel",
)
NORMS = (
    "decoder/decoder_norm/scale",
    "decoder/layers_0/pre_cross_attention_layer_norm/scale",
    "decoder/layers_0/pre_self_attention_layer_norm/scale",
    "encoder/encoder_norm/scale",
    "encoder/layers_0/pre_attention_layer_norm/scale",
    "encoder/layers_0/pre_mlp_layer_norm/bias",
    "encoder/layers_0/pre_mlp_layer_norm/scale",
)
HEADS = ("ctc_head/bias", "ctc_head/kernel")
FROZEN = (
    "decoder/logits_dense/kernel",
    "encoder/layers_0/attention/query/kernel",
    "encoder/layers_0/mlp/wi_0/bias",
    "encoder/layers_0/mlp/wi_0/kernel",
    "encoder/relpos_bias/rel_embedding",
    "token_embedder/embedding",
)


def tree():
    paths = sorted(NEW + NORMS + HEADS + FROZEN)
    return params_lib.unflatten({p: np.full((2, i + 1), i) for i, p in enumerate(paths)})


def test_flatten_and_unflatten_are_inverse():
    flat = params_lib.flatten(tree())
    assert list(flat) == sorted(NEW + NORMS + HEADS + FROZEN)
    again = params_lib.flatten(params_lib.unflatten(flat))
    assert all(again[path] is leaf for path, leaf in flat.items())


def test_unflatten_refuses_a_leaf_that_is_also_a_folder():
    for paths in (("a", "a/b"), ("a/b", "a")):
        with pytest.raises(ValueError, match="a"):
            params_lib.unflatten({path: np.zeros(1) for path in paths})


def test_trained_leaves_are_adapters_routers_norms_and_heads_only():
    mask = params_lib.flatten(params_lib.trained_mask(tree()))
    assert {path for path, trained in mask.items() if trained} == set(NEW + NORMS + HEADS)
    everything = params_lib.flatten(params_lib.trained_mask(tree(), "all"))
    assert all(everything.values()) and len(everything) == len(mask)


def test_labels_agree_with_the_mask():
    mask = params_lib.flatten(params_lib.trained_mask(tree()))
    words = params_lib.flatten(params_lib.labels(tree()))
    assert words == {path: "trained" if value else "frozen" for path, value in mask.items()}


@pytest.mark.parametrize("trained", ["adapters", "all"])
def test_merge_is_the_inverse_of_partition(trained):
    flat = params_lib.flatten(tree())
    first, second = params_lib.partition(params_lib.unflatten(flat), trained)
    assert not params_lib.flatten(first).keys() & params_lib.flatten(second).keys()
    merged = params_lib.flatten(params_lib.merge(first, second))
    assert list(merged) == list(flat)
    assert all(merged[path] is flat[path] for path in flat)


@pytest.mark.parametrize("function", ["partition", "trained_mask", "labels"])
def test_unknown_trained_value_is_named(function):
    with pytest.raises(ValueError, match="'adaptors'"):
        getattr(params_lib, function)(tree(), "adaptors")


def test_merge_refuses_shared_leaves_and_lists_them():
    with pytest.raises(ValueError, match=r"a/b\n  c$"):
        params_lib.merge({"a": {"b": 1}, "c": 1}, {"a": {"b": 2}, "c": 2, "d": 3})


def test_split_new_separates_the_dense_model():
    dense, new = params_lib.split_new(tree())
    assert set(params_lib.flatten(new)) == set(NEW)
    assert set(params_lib.flatten(dense)) == set(NORMS + HEADS + FROZEN)


def test_count_counts_scalars():
    assert (
        params_lib.count({"a": np.zeros((2, 3)), "b": {"c": np.zeros(()), "d": np.zeros(4)}}) == 11
    )


def test_check_tree_lists_every_difference():
    expected = {"a": np.zeros((2, 3)), "b": np.zeros(4), "c": {"d": np.zeros(1)}}
    actual = {"a": np.zeros((3, 2)), "c": {"e": np.zeros(7)}}
    with pytest.raises(ValueError) as error:
        params_lib.check_tree(expected, actual)
    text = str(error.value)
    assert "4 leaves" in text
    assert "wrong shape: a is (3, 2), expected (2, 3)" in text
    assert "missing: b (4,)" in text and "missing: c/d (1,)" in text
    assert "extra: c/e (7,)" in text


def test_check_tree_allows_only_the_named_leaves_to_be_missing():
    expected = tree()
    dense, _ = params_lib.split_new(expected)
    params_lib.check_tree(expected, expected)
    params_lib.check_tree(expected, dense, params_lib.NEW)
    with pytest.raises(ValueError, match="router/kernel"):
        params_lib.check_tree(expected, dense)
    del dense["token_embedder"]
    with pytest.raises(ValueError, match=r"1 leaves.*\n  missing: token_embedder/embedding"):
        params_lib.check_tree(expected, dense, params_lib.NEW)
