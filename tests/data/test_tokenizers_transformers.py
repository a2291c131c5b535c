"""Ids and texts of the library `tokenizers` are those of transformers' fast tokenizers."""

import json

import pytest
from tokenizer_folders import FOLDER, NAMES, lines

from coda_jax.data.vocabularies import load_vocabulary


@pytest.mark.parametrize("name", NAMES)
def test_lines_have_the_golden_ids_and_texts(name):
    vocabulary = load_vocabulary(FOLDER / name)
    golden = json.loads((FOLDER / name / "expected.json").read_text())
    for line, ids, text in zip(lines(60), golden["ids"], golden["texts"], strict=True):
        assert [*vocabulary.encode(line), vocabulary.eos_id] == ids, line
        assert vocabulary.decode([*ids, 5, 6]) == text, line


def test_the_lines_are_of_many_scripts():
    made = lines(1000)
    assert len(set(made)) > 950
    assert len({ord(character) // 256 for line in made for character in line}) > 50
    assert sorted(file.parent.name for file in FOLDER.glob("*/expected.json")) == [*NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_lines_have_the_ids_and_texts_of_transformers(name, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    import make_golden_tokenizers as golden

    folder = FOLDER / name
    if (golden.VERSION, name) in {("5", "byte_bpe"), ("5", "unigram_4")}:
        pytest.skip("transformers 5 does not take all of this folder")
    vocabulary, theirs = load_vocabulary(folder), golden.load(folder)
    hidden = (theirs.pad_token_id, theirs.bos_token_id)
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    for line in lines(1000):
        ids = theirs(line).input_ids
        assert [*vocabulary.encode(line), vocabulary.eos_id] == ids, line
        kept = [i for i in ids[: ids.index(theirs.eos_token_id)] if i not in hidden]
        assert vocabulary.decode(ids) == theirs.decode(kept), line
        if not special & set(kept):  # as in most answers
            assert vocabulary.decode(ids) == theirs.decode(kept, skip_special_tokens=True), line
