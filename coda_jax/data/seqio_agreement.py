"""Are the vocabularies that a run of T5X is given those of its model, and of its task?"""

import importlib
from typing import Any

from coda_jax.data.seqio_tasks import provider
from coda_jax.data.seqio_vocabularies import TokenizersSeqioVocabulary, plain_vocabulary
from coda_jax.data.vocabularies import Identity, check_vocabulary
from coda_jax.optional import needs

with needs():
    import seqio

_KNOWN = (seqio.ByteVocabulary, seqio.SentencePieceVocabulary, TokenizersSeqioVocabulary)


def check_vocabularies(config: Any, inputs: seqio.Vocabulary, outputs: seqio.Vocabulary) -> None:
    """Checks that every id of a model's vocabularies has an embedding, and that they end alike.

    Args:
        config: the model's.
        inputs: the vocabulary of its inputs; a `seqio.PassThroughVocabulary` where they are none.
        outputs: that of its outputs.

    Raises:
        ValueError: a vocabulary has more ids than the model, or another end.
    """
    for vocabulary in (inputs, outputs):
        found = Identity("", vocabulary.vocab_size, vocabulary.eos_id, vocabulary.pad_id)
        try:
            check_vocabulary(found, config.vocab_size, eos_id=config.eos_id, pad_id=config.pad_id)
        except ValueError as error:
            raise ValueError(f"VOCABULARY is not that of the PRESET: {error}") from error


def agreed(
    task: Any, module: str | None, inputs: seqio.Vocabulary, outputs: seqio.Vocabulary
) -> tuple[seqio.Vocabulary, seqio.Vocabulary]:
    """The vocabularies of a task, which give texts the same ids as those of a model.

    seqio holds `ByteVocabulary()` and ByT5's, with 125 extra ids, for different: a task without
    extra ids never uses them, so that it may have either.

    Args:
        task: the name of a task or mixture of seqio, or itself; others, as those of airio, are left
            to T5X.
        module: that registers the task, if nothing has imported it yet.
        inputs: the model's.
        outputs: the model's.

    Returns:
        Those of (inputs, outputs): the task's, or the model's where the task is left to T5X.

    Raises:
        ValueError: there is no such task, or it has other vocabularies; the difference is said.
    """
    if module is not None:
        importlib.import_module(module)
    if not isinstance(task, str | seqio.Task | seqio.Mixture):
        return inputs, outputs
    found = provider(task)
    theirs = tuple(found.output_features[name].vocabulary for name in ("inputs", "targets"))
    for name, their, our in zip(("inputs", "targets"), theirs, (inputs, outputs), strict=True):
        if difference := _difference(their, our):
            raise ValueError(
                f"MIXTURE_OR_TASK_NAME={found.name} has another vocabulary for its {name} than "
                f"VOCABULARY: {difference}"
            )
    return theirs


def _difference(their: seqio.Vocabulary, our: seqio.Vocabulary) -> str | None:
    """What differs between a task's vocabulary and a model's; None where ids are the same."""
    if their == our:
        return None
    kinds = f"{_shown(their)} and {_shown(our)}"
    if not any(isinstance(their, kind) and isinstance(our, kind) for kind in _KNOWN):
        return kinds
    a, b = map(plain_vocabulary, (their, our))
    if a.fingerprint != b.fingerprint:
        return f"{kinds}, with the SHA-256 {a.fingerprint} and {b.fingerprint}"
    if their.extra_ids:
        return f"{kinds}, with {their.extra_ids} and {our.extra_ids} extra ids"
    return None


def _shown(vocabulary: seqio.Vocabulary) -> str:
    name = type(vocabulary).__name__
    file = getattr(vocabulary, "sentencepiece_model_file", None)
    return f"{name}({file})" if file else f"{name} of {vocabulary.vocab_size} ids"
