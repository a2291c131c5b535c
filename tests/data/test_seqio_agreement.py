"""Vocabularies of seqio and a model: what does not fit is said."""

from helpers import config
import pytest
import seqio

from coda_jax.data.seqio_agreement import check_vocabularies


def test_a_vocabulary_beyond_the_embedding_is_refused():
    for vocabulary, message in (
        (seqio.ByteVocabulary(), "has 259 ids, the model only 20"),
        (seqio.PassThroughVocabulary(20, eos_id=2), "eos_id=2, the model eos_id=1"),
    ):
        for pair in ((vocabulary, seqio.PassThroughVocabulary(0)), (vocabulary,) * 2):
            for given in (pair, pair[::-1]):
                with pytest.raises(ValueError, match=message):
                    check_vocabularies(config(), *given)
