"""seqio's feature converters: packed rows hold no more examples than a model can take."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from coda_jax.data import batches
from coda_jax.data.seqio_converters import TokensFeatureConverter, VectorsFeatureConverter

LENGTHS = {"inputs": 24, "targets": 9}


def short_examples(count):
    """Examples of a few tokens, of which many fit into a row."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5, (count, 2))
    return [
        {"inputs": rng.integers(2, 50, a).astype(np.int32), "targets": np.full(b, 3, np.int32)}
        for a, b in lengths
    ]


def converted(converter, examples):
    """The rows that a converter makes."""
    signature = dict.fromkeys(batches.FEATURES, tf.TensorSpec([None], tf.int32))
    dataset = tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=signature)
    return list(converter(dataset, LENGTHS).as_numpy_iterator())


@pytest.mark.parametrize("max_segments", [1, 2, 4])
def test_rows_hold_at_most_max_segments_and_are_those_of_our_trainer(max_segments):
    examples = short_examples(24)  # seqio packs in windows of the greatest length
    rows = converted(TokensFeatureConverter(max_segments, pack=True), examples)
    ours = batches.batch_examples(
        examples, batch_size=1, feature_lengths=LENGTHS, pack=True, max_segments=max_segments
    )
    assert max(row["encoder_segment_ids"].max() for row in rows) == max_segments
    for row, expected in zip(rows, ours, strict=True):
        assert row.keys() == expected.keys()
        for name, values in expected.items():
            if name != "decoder_input_tokens":  # behind the targets, where nothing is read
                np.testing.assert_array_equal(row[name], values[0], err_msg=name)


@pytest.mark.parametrize("pack", [False, True])
def test_without_a_limit_rows_are_those_of_seqio(pack):
    examples = short_examples(24)
    rows = converted(TokensFeatureConverter(pack=pack), examples)
    theirs = converted(seqio.EncDecFeatureConverter(pack=pack), examples)
    for row, expected in zip(rows, theirs, strict=True):
        assert all((row[name] == expected[name]).all() for name in expected)
    single = converted(TokensFeatureConverter(2, pack=False), examples)
    assert len(single) == len(examples)


def test_what_cannot_be_is_refused_at_once():
    with pytest.raises(ValueError, match=r"max_segments must be a whole number of at least 1"):
        TokensFeatureConverter(0)
    with pytest.raises(ValueError, match=r"recordings are not packed: pack=True; t5x/images.gin"):
        VectorsFeatureConverter(pack=True)
    assert VectorsFeatureConverter(pack=False).MODEL_FEATURES["encoder_input_tokens"].rank == 2
