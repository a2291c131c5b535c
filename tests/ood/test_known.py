"""Which labels are known, and which are held out."""

import pytest

from coda_jax.ood.known import MOST, split_labels

LABELS = ["d", "b", "a", "c", "e", "h", "g", "f"]


def test_a_share_is_drawn_by_the_seed_whatever_the_order():
    known, held = split_labels(LABELS, 0.25, seed=1)
    assert len(held) == 2 and sorted([*known, *held]) == sorted(LABELS)
    assert split_labels(sorted(LABELS), 0.25, seed=1) == (known, held)
    assert len({split_labels(LABELS, 0.25, seed=seed)[1] for seed in range(9)}) > 3


def test_names_are_held_out():
    assert split_labels(LABELS[:4], ("d", "a")) == (("b", "c"), ("a", "d"))
    assert split_labels(LABELS[:4]) == (("a", "b", "c", "d"), ())


@pytest.mark.parametrize(
    ("labels", "held_out", "message"),
    [
        (["card", "loan"], ("cards",), r"no label 'cards'; the nearest are \['card'\]"),
        (LABELS, 0.01, r"HELD_OUT=0.01 leaves 8 of 8 labels and holds 0 out"),
        (LABELS, 0.99, r"leaves 0 of 8 labels"),
        (LABELS, 1, "HELD_OUT must be a number above 0 and below 1, got 1"),
        (LABELS, (), "HELD_OUT must be a tuple that is not empty"),
        (["a"], None, "leaves 1 of 1 labels"),
        (map(str, range(MOST + 1)), None, "2,001 different targets, more than 2,000"),
    ],
)
def test_what_cannot_be_held_out_is_named(labels, held_out, message):
    with pytest.raises(ValueError, match=message):
        split_labels([*labels], held_out)
