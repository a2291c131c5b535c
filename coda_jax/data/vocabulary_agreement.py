"""Whether the vocabularies of one folder are one: `tokenizer.json` and the files beside it."""

from collections.abc import Iterator, Mapping
import itertools
import json
from typing import Any

import numpy as np

from coda_jax.data.sentencepiece_vocabulary import SentencePieceVocabulary
from coda_jax.data.tokenizers_vocabulary import TokenizersVocabulary, read_bpe
from coda_jax.data.vocabulary_files import (
    MERGES,
    SPACED_SENTINEL,
    SPIECE,
    TOKENIZER,
    VOCAB,
    Folder,
)

_TOLERANCE = 1e-5  # of scores, relative from 1 on; spiece.model has float32


def check_spiece(spiece: SentencePieceVocabulary, tokenizer: TokenizersVocabulary) -> None:
    """Checks that spiece.model and tokenizer.json have the same pieces, ids and scores.

    Args:
        spiece: with as many extra ids as the other has.
        tokenizer: may have more tokens, with higher ids.

    Raises:
        ValueError: they do not; the first difference is named.
    """
    model = _model(tokenizer.folder)
    _check(tokenizer.folder, SPIECE, _spiece_differences(spiece, tokenizer, model))


def check_bpe(folder: Folder) -> None:
    """Checks that vocab.json and merges.txt are those of tokenizer.json.

    Raises:
        ValueError: they are not; the first difference is named.
    """
    vocab, merges = read_bpe(folder)
    model = _model(folder)
    theirs = model.get("vocab")
    pairs = (x.split(" ") if isinstance(x, str) else x for x in model.get("merges") or ())
    differences = itertools.chain(
        _differences("the id of {!r}", vocab, dict(theirs) if isinstance(theirs, dict) else {}),
        _differences("merge {}", dict(enumerate(merges)), dict(enumerate(map(tuple, pairs)))),
    )
    _check(folder, f"{VOCAB} with {MERGES}", differences)


def _check(folder: Folder, other: str, differences: Iterator[str]) -> None:
    difference = next(differences, None)
    if difference is not None:
        raise ValueError(
            f"{folder.path!r} has two vocabularies, {other} and {TOKENIZER}, which differ: "
            f"{difference}. Remove the one that the model was not trained with"
        )


def _spiece_differences(
    spiece: SentencePieceVocabulary, tokenizer: TokenizersVocabulary, model: Mapping[str, Any]
) -> Iterator[str]:
    processor, entries = spiece.processor, model.get("vocab") or ()
    ids = list(range(processor.vocab_size()))
    pieces = processor.id_to_piece(ids)
    sentinels = {i: SPACED_SENTINEL.format(n) for n, i in enumerate(spiece.sentinel_ids)}
    for i, (ours, theirs) in enumerate(zip(pieces, map(tokenizer.id_to_token, ids), strict=True)):
        if ours != theirs and not (ours == sentinels.get(i) and ours[1:] == theirs):
            yield f"id {i} is {ours!r} and {theirs!r}"
    if len(entries) > len(ids):
        yield f"there are {len(ids)} and {len(entries)} pieces"
    if not isinstance(entries, list):  # byte pairs, which have neither scores nor an unknown id
        return
    ours = np.array(processor.get_score(ids[: len(entries)]))
    theirs = np.array([score for _, score in entries])
    differs = np.abs(ours - theirs) > _TOLERANCE * np.maximum(1, np.abs(ours))
    for i in map(int, np.flatnonzero(differs)):
        # What is not found in texts may have any score.
        if not (processor.is_control(i) or processor.is_unknown(i) or i in sentinels):
            yield f"the score of {pieces[i]!r}, id {i}, is {ours[i]:.6g} and {theirs[i]:.6g}"
    if model.get("unk_id") != processor.unk_id():
        yield f"unknown is id {processor.unk_id()} and {model.get('unk_id')}"


def _differences(name: str, ours: Mapping, theirs: Mapping) -> Iterator[str]:
    for key in (*ours, *(key for key in theirs if key not in ours)):
        if ours.get(key) != theirs.get(key):
            yield f"{name.format(key)} is {ours.get(key)} and {theirs.get(key)}"


def _model(folder: Folder) -> Mapping[str, Any]:
    """The "model" in a tokenizer.json, which the library has read already."""
    return json.loads(folder.read(TOKENIZER))["model"]
