"""Batches of texts for Python."""

from helpers import config
import numpy as np
import pytest

from coda_jax.data.text_batches import text_batch
from coda_jax.data.vocabularies import ByteVocabulary

CONFIG = config(vocab_size=384)


def test_texts_become_a_batch_with_end_markers_and_padding():
    vocabulary = ByteVocabulary()
    batch = text_batch(CONFIG, vocabulary, [("a" * 40, "xy"), ("b", "")])
    assert batch["encoder_input_tokens"].shape == (2, 64)
    assert batch["decoder_target_tokens"].shape == (2, 8)
    np.testing.assert_array_equal(batch["encoder_input_tokens"][1, :3], [ord("b") + 3, 1, 0])
    np.testing.assert_array_equal(batch["decoder_target_tokens"][0, :4], [123, 124, 1, 0])
    np.testing.assert_array_equal(batch["decoder_input_tokens"][0, :4], [0, 123, 124, 1])
    np.testing.assert_array_equal(batch["decoder_loss_weights"].sum(-1), [3, 1])


def test_no_text_and_a_vocabulary_of_another_model_are_refused():
    with pytest.raises(ValueError, match="there is no pair of texts"):
        text_batch(CONFIG, ByteVocabulary(), [])
    with pytest.raises(ValueError, match="ids, the model only 100"):
        text_batch(CONFIG.replace(vocab_size=100), ByteVocabulary(), [("a", "b")])
