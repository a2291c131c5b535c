"""Do the vocabularies of seqio that a run of T5X is given fit its model?"""

from typing import Any

from coda_jax.data.vocabularies import Identity, check_vocabulary
from coda_jax.optional import needs

with needs():
    import seqio


def check_vocabularies(config: Any, *vocabularies: seqio.Vocabulary) -> None:
    """Checks that every id of a model's vocabularies has an embedding, and that they end alike.

    Args:
        config: the model's.
        *vocabularies: of its inputs and of its outputs.

    Raises:
        ValueError: a vocabulary has more ids than the model, or another end.
    """
    for vocabulary in vocabularies:
        found = Identity("", vocabulary.vocab_size, vocabulary.eos_id, vocabulary.pad_id)
        try:
            check_vocabulary(found, config.vocab_size, eos_id=config.eos_id, pad_id=config.pad_id)
        except ValueError as error:
            raise ValueError(f"VOCABULARY is not that of the PRESET: {error}") from error
