"""Batches of texts for those who call a model in Python."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coda_jax.data.batches import SHORTEST, batch_examples, rounded_up
from coda_jax.data.vocabularies import Vocabulary, check_vocabulary, identity


def text_batch(
    config: Any, vocabulary: Vocabulary, pairs: Sequence[tuple[str, str]]
) -> Mapping[str, np.ndarray]:
    """One batch of input and target texts, as long as its longest ones need, rounded up.

    Args:
        config: of the model that takes it.
        vocabulary: of the model; see `load_vocabulary`.
        pairs: (input, target) of each row.

    Returns:
        What `Model.loss` takes: "encoder_input_tokens" [B, N], "decoder_input_tokens" [B, T],
        "decoder_target_tokens" [B, T], all int32, and "decoder_loss_weights" [B, T].

    Raises:
        ValueError: there is no pair, or the vocabulary has ids that the model has not.
    """
    if not pairs:
        raise ValueError("text_batch: there is no pair of texts")
    ids = {name: getattr(config, name) for name in ("vocab_size", "eos_id", "pad_id")}
    check_vocabulary(identity(vocabulary), **ids)
    examples = [
        {
            name: np.array([*vocabulary.encode(text), config.eos_id], np.int32)
            for name, text in zip(("inputs", "targets"), pair, strict=True)
        }
        for pair in pairs
    ]
    lengths = {
        name: rounded_up(max(len(example[name]) for example in examples), SHORTEST[name])
        for name in ("inputs", "targets")
    }
    batches = batch_examples(
        examples,
        batch_size=len(pairs),
        feature_lengths=lengths,
        pad_id=config.pad_id,
        start_id=config.decoder_start_id,
        eos_id=config.eos_id,
    )
    return next(batches)
