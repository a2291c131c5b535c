"""Vocabularies of seqio, a model and a task: what does not fit is said."""

import sys
import types

from helpers import config
import pytest
import seqio

from coda_jax.data.seqio_agreement import agreed, check_vocabularies
from coda_jax.data.seqio_tasks import MemorySource, add_task
from coda_jax.data.seqio_vocabularies import seqio_vocabulary
from coda_jax.tasks import offline


def test_a_vocabulary_beyond_the_embedding_is_refused():
    for vocabulary, message in (
        (seqio.ByteVocabulary(), "has 259 ids, the model only 20"),
        (seqio.PassThroughVocabulary(20, eos_id=2), "eos_id=2, the model eos_id=1"),
    ):
        for pair in ((vocabulary, seqio.PassThroughVocabulary(0)), (vocabulary,) * 2):
            for given in (pair, pair[::-1]):
                with pytest.raises(ValueError, match=message):
                    check_vocabularies(config(), *given)


BYTES = seqio_vocabulary("bytes")
PIECES = seqio_vocabulary(offline.VOCABULARY_FILE)
THEIRS = {  # of a task: what differs from the words that VOCABULARY says
    "bytes": (BYTES, BYTES, None),
    "no extra ids": (seqio.ByteVocabulary(), BYTES, None),
    "other extra ids": (
        seqio.ByteVocabulary(100),
        BYTES,
        "ByteVocabulary of 359 ids and ByteVocabulary of 384 ids, with 100 and 125 extra ids",
    ),
    "other kind": (seqio.ByteVocabulary(), PIECES, "ByteVocabulary of 259 ids and SentencePiece"),
    "pieces": (PIECES, PIECES, None),
    "pieces without extra ids": (
        seqio.SentencePieceVocabulary(offline.VOCABULARY_FILE, 0),
        PIECES,
        None,
    ),
    "passed": (seqio.PassThroughVocabulary(9), BYTES, "PassThroughVocabulary of 9 ids and Byte"),
}


@pytest.fixture(name="task")
def fixture_task():
    """Returns a function that makes a task of a vocabulary."""
    name = "agreement"

    def make(vocabulary):
        return add_task(name, MemorySource(lambda _: {}, ("train",)), [], vocabulary)

    yield make
    seqio.TaskRegistry.remove(name)


@pytest.mark.parametrize("name", THEIRS)
def test_a_tasks_vocabulary_is_that_of_the_model_by_its_ids(name, task):
    theirs, ours, difference = THEIRS[name]
    made = task(theirs)
    for given in (made, "agreement"):
        if difference is None:
            assert agreed(given, None, ours, ours) == (theirs, theirs)
            continue
        with pytest.raises(ValueError, match=difference) as error:
            agreed(given, None, ours, ours)
        assert str(error.value).startswith("MIXTURE_OR_TASK_NAME=agreement has another vocabulary")


def test_a_task_is_found_where_its_module_registers_it(task, monkeypatch):
    with pytest.raises(ValueError, match="no task or mixture 'agreement' is registered"):
        agreed("agreement", None, BYTES, BYTES)
    monkeypatch.setitem(sys.modules, "registers_it", types.ModuleType("registers_it"))
    task(BYTES)
    assert agreed("agreement", "registers_it", BYTES, BYTES) == (BYTES, BYTES)
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        agreed("agreement", "nowhere", BYTES, BYTES)


def test_what_is_no_task_of_seqio_is_left_to_t5x():
    assert agreed(None, None, BYTES, PIECES) == (BYTES, PIECES)
