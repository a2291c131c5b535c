"""Batches: the same as seqio's, and epochs of examples."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from coda_jax.data import batches

LENGTHS = {"inputs": 24, "targets": 9}


def random_examples(count, seed=0, max_inputs=24, max_targets=9):
    rng = np.random.default_rng(seed)

    def tokens(limit):
        length = rng.integers(1, limit + 1)
        return np.append(rng.integers(2, 50, length - 1), 1).astype(np.int32)

    return [{"inputs": tokens(max_inputs), "targets": tokens(max_targets)} for _ in range(count)]


def seqio_batches(examples, batch_size, pack):
    signature = dict.fromkeys(batches.FEATURES, tf.TensorSpec([None], tf.int32))
    trimmed = [{k: ended(x[k], LENGTHS[k]) for k in LENGTHS} for x in examples]
    dataset = tf.data.Dataset.from_generator(lambda: iter(trimmed), output_signature=signature)
    dataset = seqio.EncDecFeatureConverter(pack=pack)(dataset, LENGTHS)
    return list(dataset.batch(batch_size, drop_remainder=True).as_numpy_iterator())


def ended(tokens, limit):
    """The tokens up to a limit, the last of them EOS."""
    return tokens if len(tokens) <= limit else np.append(tokens[: limit - 1], 1)


def assert_same_batches(actual, expected):
    """The same, but for columns of padding that seqio has at the end."""
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        for key in b:
            assert a[key].dtype == b[key].dtype, key
            length = a[key].shape[1]
            np.testing.assert_array_equal(a[key], b[key][:, :length], err_msg=key)
            if key != "decoder_input_tokens":  # where the end of the targets may stand there
                assert not b[key][:, length:].any(), key


# seqio packs in windows of max(LENGTHS) examples, so no more than that here; the small examples
# make rows of many segments.
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    ("max_inputs", "max_targets"),
    [(24, 9), *(pytest.param(*x, marks=pytest.mark.all) for x in [(6, 3), (40, 20)])],
)
def test_batches_equal_those_of_seqio(pack, max_inputs, max_targets):
    examples = random_examples(24, max_inputs, max_inputs, max_targets)
    ours = batches.batch_examples(examples, batch_size=2, feature_lengths=LENGTHS, pack=pack)
    assert_same_batches(list(ours), seqio_batches(examples, 2, pack))


def test_packed_rows_hold_all_examples_in_order_and_at_most_max_segments():
    examples = random_examples(50, max_inputs=7, max_targets=3)
    packed = batches.batch_examples(
        examples,
        batch_size=4,
        feature_lengths=LENGTHS,
        pack=True,
        max_segments=3,
        drop_remainder=False,
    )
    found = []
    for batch in packed:
        assert batch["encoder_segment_ids"].max() <= 3
        for i in range(4):
            for segment in range(1, batch["encoder_segment_ids"][i].max(initial=0) + 1):
                found.append(
                    {
                        "inputs": batch["encoder_input_tokens"][i][
                            batch["encoder_segment_ids"][i] == segment
                        ],
                        "targets": batch["decoder_target_tokens"][i][
                            batch["decoder_segment_ids"][i] == segment
                        ],
                    }
                )
    assert len(found) == len(examples)
    for a, b in zip(found, examples, strict=True):
        np.testing.assert_array_equal(a["inputs"], b["inputs"])
        np.testing.assert_array_equal(a["targets"], b["targets"])


@pytest.mark.parametrize("pack", [False, True])
def test_the_last_batch_is_dropped_or_filled_with_empty_rows(pack):
    examples = random_examples(5, max_inputs=24)
    for example in examples:
        example["inputs"] = np.resize(example["inputs"], 24)  # One a row, packed or not.
    kwargs = {"batch_size": 3, "feature_lengths": LENGTHS, "pack": pack}
    assert len(list(batches.batch_examples(examples, **kwargs))) == 1
    full, last = batches.batch_examples(examples, drop_remainder=False, **kwargs)
    assert full["decoder_loss_weights"].any(axis=1).tolist() == [True, True, True]
    for key, value in last.items():
        assert value.shape[0] == 3
        assert not value[2].any(), key
    assert last["decoder_loss_weights"].any(axis=1).tolist() == [True, True, False]


def test_examples_that_are_cut_are_counted_and_still_end_with_eos():
    long = {"inputs": np.append(np.arange(2, 40), 1), "targets": np.array([5, 1])}
    short = {"inputs": np.array([4, 1]), "targets": np.array([5, 1])}
    open_end = {"inputs": np.arange(2, 40), "targets": np.append(np.arange(2, 20), 1)}
    seen = []
    iterator = batches.batch_examples(
        [long, short, open_end, short],
        batch_size=2,
        feature_lengths=LENGTHS,
        marks=True,
        on_cut=lambda found, lengths: seen.append((found.num_truncated, lengths)),
    )
    first, second = iterator
    assert (iterator.num_truncated, iterator.num_examples) == (2, 4)
    assert iterator.longest == {"inputs": 39, "targets": 19}
    assert seen == [(1, {"inputs": 39, "targets": 2}), (2, {"inputs": 38, "targets": 19})]
    np.testing.assert_array_equal(first["encoder_input_tokens"][0], [*range(2, 25), 1])
    np.testing.assert_array_equal(second["encoder_input_tokens"][0], np.arange(2, 26))
    np.testing.assert_array_equal(second["decoder_target_tokens"][0], [*range(2, 10), 1])
    assert first[batches.INCOMPLETE].tolist() == [False, False]
    assert second[batches.INCOMPLETE].tolist() == [True, False]


def test_rows_with_unknown_tokens_and_spare_rows_are_marked_so():
    examples = [{"inputs": np.array([4, 1]), "targets": np.array([t, 1])} for t in (2, 5, 2)]
    marked = {"unknown_id": 2, "marks": True, "drop_remainder": False}
    for pack, expected in ((False, [[True, False], [True, False]]), (True, [[True, False]])):
        found = batches.batch_examples(
            examples, batch_size=2, feature_lengths=LENGTHS, pack=pack, **marked
        )
        assert [batch[batches.INCOMPLETE].tolist() for batch in found] == expected


def test_a_batch_is_as_long_as_its_longest_example_rounded_up():
    lengths = {"inputs": 100, "targets": 20}
    sizes = [(3, 2), (33, 9), (64, 8), (65, 17), (500, 21)]
    examples = [{"inputs": np.ones(n, int), "targets": np.ones(t, int)} for n, t in sizes]
    found = batches.batch_examples(examples, batch_size=1, feature_lengths=lengths)
    shapes = [
        (x["encoder_input_tokens"].shape[1], x["decoder_target_tokens"].shape[1]) for x in found
    ]
    assert shapes == [(32, 8), (64, 16), (64, 8), (100, 20), (100, 20)]
    packed = batches.batch_examples(examples, batch_size=1, feature_lengths=lengths, pack=True)
    assert next(packed)["encoder_input_tokens"].shape == (1, 100)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"batch_size": 0}, "batch_size .* got 0"),
        ({"batch_size": 2.0}, "batch_size .* got 2.0"),
        ({"feature_lengths": {"inputs": 0, "targets": 3}}, r"feature_lengths\['inputs'\] .* got 0"),
        ({"feature_lengths": {"inputs": 3}}, "must be lengths such as"),
        ({"pack": True, "max_segments": 0}, "max_segments .* got 0"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(changed, named):
    with pytest.raises(ValueError, match=named):
        batches.batch_examples([], **{"batch_size": 2, "feature_lengths": LENGTHS} | changed)


def test_epochs_are_permutations_that_differ_and_repeat_with_the_seed():
    numbers = list(range(30))
    first = list(batches.epochs(numbers, seed=3, num_epochs=2))
    assert first == list(batches.epochs(numbers, seed=3, num_epochs=2))
    assert first != list(batches.epochs(numbers, seed=4, num_epochs=2))
    assert sorted(first[:30]) == sorted(first[30:]) == numbers
    assert first[:30] != first[30:] and first[:30] != numbers
    assert list(batches.epochs(numbers, seed=3, num_epochs=2, shuffle=False)) == numbers * 2
    endless = batches.epochs(numbers, seed=3)
    assert [next(endless) for _ in range(60)] == first


@pytest.mark.parametrize(("examples", "kwargs"), [([], {}), ([1], {"num_epochs": 0})])
def test_epochs_of_nothing_are_refused(examples, kwargs):
    with pytest.raises(ValueError, match="0"):
        batches.epochs(examples, seed=0, **kwargs)
