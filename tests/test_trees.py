"""Trees of parameters: paths, patterns, parts and wholes."""

import numpy as np
import pytest

from coda_jax import trees

PATTERNS = (r"(^|/)router/", r"norm/scale$", r"^head/")
INSIDE = (
    "decoder/decoder_norm/scale",
    "encoder/layers_0/pre_attention_layer_norm/scale",
    "encoder/layers_0/router/kernel",
    "head/bias",
    "router/kernel",
)
OUTSIDE = (
    "decoder/logits_dense/kernel",
    "encoder/head/kernel",
    "encoder/layers_0/attention/query/kernel",
    "encoder/layers_0/pre_mlp_layer_norm/bias",
    "encoder/my_router/kernel",
    "token_embedder/embedding",
)


def tree():
    paths = sorted(INSIDE + OUTSIDE)
    return trees.unflatten({p: np.full((2, i + 1), i) for i, p in enumerate(paths)})


def test_flatten_and_unflatten_are_inverse():
    flat = trees.flatten(tree())
    assert list(flat) == sorted(INSIDE + OUTSIDE)
    again = trees.flatten(trees.unflatten(flat))
    assert all(again[path] is leaf for path, leaf in flat.items())


def test_unflatten_refuses_a_leaf_that_is_also_a_folder():
    for paths in (("a", "a/b"), ("a/b", "a")):
        with pytest.raises(ValueError, match="a"):
            trees.unflatten({path: np.zeros(1) for path in paths})


def test_flatten_refuses_two_leaves_of_one_path():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        trees.flatten({"a/b": np.zeros(1), "a": {"b": np.zeros(1)}})


def test_split_gives_what_matches_and_then_the_rest():
    inside, outside = trees.split(tree(), PATTERNS)
    assert set(trees.flatten(inside)) == set(INSIDE)
    assert set(trees.flatten(outside)) == set(OUTSIDE)


@pytest.mark.parametrize("patterns", [PATTERNS, (), (r"",)])
def test_merge_is_the_inverse_of_split(patterns):
    flat = trees.flatten(tree())
    first, second = trees.split(trees.unflatten(flat), patterns)
    assert not trees.flatten(first).keys() & trees.flatten(second).keys()
    merged = trees.flatten(trees.merge(first, second))
    assert list(merged) == list(flat)
    assert all(merged[path] is flat[path] for path in flat)


def test_merge_refuses_shared_leaves_and_lists_them():
    with pytest.raises(ValueError, match=r"a/b\n  c$"):
        trees.merge({"a": {"b": 1}, "c": 1}, {"a": {"b": 2}, "c": 2, "d": 3})


def test_count_counts_scalars():
    assert trees.count({"a": np.zeros((2, 3)), "b": {"c": np.zeros(()), "d": np.zeros(4)}}) == 11


def test_check_tree_lists_every_difference():
    expected = {"a": np.zeros((2, 3)), "b": np.zeros(4), "c": {"d": np.zeros(1)}}
    actual = {"a": np.zeros((3, 2)), "c": {"e": np.zeros(7)}}
    with pytest.raises(ValueError) as error:
        trees.check_tree(expected, actual, what="the file's leaves do")
    text = str(error.value)
    assert text.startswith("the file's leaves do not match the model (4 leaves):")
    assert "wrong shape: a is (3, 2), expected (2, 3)" in text
    assert "missing: b (4,)" in text and "missing: c/d (1,)" in text
    assert "extra: c/e (7,)" in text


def test_check_tree_allows_only_the_named_leaves_to_be_missing():
    expected = tree()
    _, rest = trees.split(expected, PATTERNS)
    trees.check_tree(expected, expected)
    trees.check_tree(expected, rest, PATTERNS)
    with pytest.raises(ValueError, match="router/kernel"):
        trees.check_tree(expected, rest)
    del rest["token_embedder"]
    with pytest.raises(ValueError, match=r"1 leaves.*\n  missing: token_embedder/embedding"):
        trees.check_tree(expected, rest, PATTERNS)
