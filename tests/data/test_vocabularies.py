"""Vocabularies: the ids and texts of seqio's, and the one that a model was trained with."""

import copy
import hashlib
import json
from pathlib import Path
import shutil

from hypothesis import example, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import sentencepiece
import seqio

from coda_jax import bundled
from coda_jax.data import seqio_tasks, vocabularies

PATHS = ("bytes", str(bundled.VOCABULARY))
PAIRS = {
    path: (vocabularies.load_vocabulary(path), seqio_tasks.seqio_vocabulary(path)) for path in PATHS
}
SENTINELS = st.integers(0, 101).map("<extra_id_{}>".format)
WORDS = st.sampled_from(["def ", "self", "  ", "\n", "ü", "日本", "🙂", "\x00", "▁", "</s>"])
TEXTS = st.lists(SENTINELS | WORDS | st.text(max_size=5), max_size=12).map("".join)
IDS = st.lists(st.integers(0, 5) | st.integers(2, 4300), max_size=12)


@pytest.mark.parametrize("path", PATHS)
def test_numbers_equal_those_of_seqio(path):
    ours, theirs = PAIRS[path]
    assert ours.vocab_size == theirs.vocab_size == {"bytes": 384}.get(path, 4096)
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_id, theirs.pad_id) == (1, 0)
    assert seqio_tasks.plain_vocabulary(theirs) == ours
    assert seqio_tasks.plain_vocabulary(theirs).fingerprint == ours.fingerprint
    assert theirs.extra_ids == {"bytes": 125}.get(path, 100)
    # For bytes neither has to do with span corruption: ByT5 has the last bytes as sentinels.
    last = ours.vocab_size if path != "bytes" else 3 + 256
    assert ours.sentinel_ids == list(range(last - 1, last - 1 - 100, -1))


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=300)
@given(text=TEXTS)
@example("{000")  # of equal scores: 0 00 and 00 0
@example("f(<extra_id_0><extra_id_1><extra_id_2>)\n<extra_id_3><extra_id_100>")
def test_texts_have_the_ids_of_seqio(path, text):
    ours, theirs = PAIRS[path]
    ids = ours.encode(text)
    assert ids == list(theirs.encode(text)) == theirs.encode_tf(text).numpy().tolist()
    assert ours.decode(ids) == theirs.decode(ids)


SEQIOS_OWN = seqio.SentencePieceVocabulary(str(bundled.VOCABULARY / "spiece.model"), 100)


@settings(max_examples=300)
@given(parts=st.lists(st.integers(0, 99) | WORDS | st.text(max_size=5), max_size=12))
@example(["f(", 0, ")"])
@example([0, 1, 2, 3])
@example(["\n", 7, "\t", 8])
@example(["▁", 9, "x"])
def test_a_sentinel_is_one_wherever_it_stands(parts):
    """As seqio's are behind a space."""
    sentinels = [4095 - part for part in parts if isinstance(part, int)]
    texts = [f"<extra_id_{x}>" if isinstance(x, int) else x for x in parts]
    spaced = ""
    for part, text in zip(parts, texts, strict=True):
        glued = isinstance(part, int) and spaced[-1:] not in ("", " ", "▁")
        spaced += " " * glued + text
    ours = PAIRS[str(bundled.VOCABULARY)][0]
    ids = ours.encode("".join(texts))
    assert [i for i in ids if i >= 3996] == sentinels
    assert ids == list(SEQIOS_OWN.encode(spaced))


def test_texts_that_divide_equally_well_in_two_ways_have_the_ids_of_seqio():
    """Runs of a character, as of spaces that indent: only the rounding of scores tells them apart.

    As seqio's are with TensorFlow, which has a SentencePiece of its own.
    """
    ours, theirs = PAIRS[str(bundled.VOCABULARY)]
    characters = [
        piece for piece in map(ours.processor.id_to_piece, range(3996)) if len(piece) == 1
    ]
    texts = [
        before + character.replace("▁", " ") * times
        for character in characters
        for before in ("", "{", "x =", "def ")
        for times in range(2, 16)
    ]
    expected = theirs.tf_tokenizer.tokenize(texts).to_list()
    found = [ours.encode(text) for text in texts]
    assert found == expected
    in_two_ways = sum(len({*ids[1:]}) > 1 for ids in found if len(ids) > 2)
    assert in_two_ways > 1000  # of pieces of unequal lengths, that may stand in another order


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=300)
@given(ids=IDS)
def test_ids_have_the_texts_of_seqio(path, ids):
    ours, theirs = PAIRS[path]
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(np.array(ids, np.int32)) == ours.decode(iter(ids)) == ours.decode(ids)


@pytest.mark.parametrize("path", PATHS)
def test_a_copy_is_the_same(path):
    """gin copies what it is given."""
    ours, _ = PAIRS[path]
    same = copy.deepcopy(ours)
    assert same == ours
    assert same.encode("def f():") == ours.encode("def f():")


def test_sentinels_are_the_last_ids_in_descending_order():
    vocabulary, _ = PAIRS[str(bundled.VOCABULARY)]
    text = "".join(f" <extra_id_{i}>" for i in range(100))
    assert [i for i in vocabulary.encode(text) if i >= 3996] == list(range(4095, 3995, -1))
    assert vocabulary.decode([4095, 4094]) == "<extra_id_0> <extra_id_1>"


def test_vocabularies_load_from_a_directory_a_file_and_bytes(tmp_path):
    shutil.copy(bundled.VOCABULARY / "spiece.model", tmp_path / "spiece.model")
    for load in (vocabularies.load_vocabulary, seqio_tasks.seqio_vocabulary):
        for path in (tmp_path, tmp_path / "spiece.model"):
            assert load(path).vocab_size == 4096
        assert load("bytes").vocab_size == 384
        assert load("bytes").encode("a") == [100]
    assert seqio_tasks.seqio_vocabulary(tmp_path).extra_ids == 100


def test_a_vocabulary_that_brings_its_extra_ids_gets_no_more(tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(PAIRS[str(bundled.VOCABULARY)][1].sp_model)  # seqio's has the extra ids.
    ours, theirs = vocabularies.load_vocabulary(path), seqio_tasks.seqio_vocabulary(path)
    assert ours.vocab_size == theirs.vocab_size == 4096
    text = "def <extra_id_3> <extra_id_99>"
    assert ours.encode(text) == list(theirs.encode(text))


def test_sentinels_of_a_file_may_be_written_without_a_space(tmp_path):
    """As a training of SentencePiece with these user-defined symbols writes them."""
    with open(tmp_path / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words of a text"] * 9), model_writer=file, vocab_size=30,
            hard_vocab_limit=False, minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            user_defined_symbols=["<extra_id_0>", "<extra_id_1>"],
        )  # fmt: skip
    vocabulary = vocabularies.load_vocabulary(tmp_path)
    assert vocabulary.added_ids == 0 and vocabulary.sentinel_ids == [3, 4]
    assert [i for i in vocabulary.encode("a<extra_id_0>") if i < 5] == [3]
    assert seqio_tasks.seqio_vocabulary(tmp_path).vocab_size == vocabulary.vocab_size


def test_ids_that_a_vocabulary_does_not_have_are_unknown():
    for vocabulary, unknown in zip((x for x, _ in PAIRS.values()), ("", " \u2047 "), strict=True):
        assert vocabulary.decode([-1]) == vocabulary.decode([10**6]) == unknown


def test_pieces_are_added_as_protobuf_would_add_them():
    """All of what SentencePiece holds equals what it makes of seqio's bytes."""
    ours, theirs = PAIRS[str(bundled.VOCABULARY)]
    model = sentencepiece.SentencePieceProcessor(model_proto=theirs.sp_model)
    assert ours.processor.serialized_model_proto() == model.serialized_model_proto()


@pytest.mark.parametrize("load", [vocabularies.load_vocabulary, seqio_tasks.seqio_vocabulary])
def test_what_is_no_vocabulary_is_refused(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none of spiece\.model.*For a model of bytes"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No vocabulary '.*nowhere': .*VOCABULARY=bytes"):
        load(tmp_path / "nowhere")
    for number, content in enumerate((b"\xff nonsense", b"")):
        path = tmp_path / str(number) / "spiece.model"  # seqio remembers what it has read
        path.parent.mkdir()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"spiece\.model' is not a SentencePiece model: ."):
            load(path.parent)


def test_the_vocabulary_must_be_the_models(tmp_path):
    def check(path, *args, **ids):
        identity = vocabularies.identity(vocabularies.load_vocabulary(path))
        vocabularies.check_vocabulary(identity, *args, **ids)

    path = str(bundled.VOCABULARY)
    check(path, 4096)
    check(path, 4224, tmp_path, eos_id=1, pad_id=0)  # No file beside the checkpoint.
    check("bytes", 384, tmp_path / "no_such_folder")
    with pytest.raises(ValueError, match="4096 ids, the model only 4095"):
        check(path, 4095)
    with pytest.raises(ValueError, match="The vocabulary has eos_id=1, the model eos_id=2"):
        check(path, 4096, eos_id=2, pad_id=0)
    with pytest.raises(ValueError, match="The vocabulary has pad_id=0, the model pad_id=1"):
        check("bytes", 384, eos_id=1, pad_id=1)
    shutil.copy(Path(path) / "spiece.model", tmp_path / "spiece.model")
    check(path, 4096, tmp_path)  # The same bytes elsewhere.
    with pytest.raises(ValueError, match=r"differs from that of .* bytes, "):
        check("bytes", 4096, tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"model")
    other = vocabularies.Identity(hashlib.sha256(b"model").hexdigest(), 100)
    vocabularies.check_vocabulary(other, 128, tmp_path, eos_id=5)
    with pytest.raises(ValueError, match="differs from"):
        check(path, 4096, tmp_path)


ADDED = {  # files of transformers beside a spiece.model of 4,096 ids, and what is missing
    "with its id": ("added_tokens.json", {"<sep>": 4096}, r"'<sep>' \(4096\)"),
    "described": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"4096": {"content": "<sep>"}}},
        r"'<sep>' \(4096\)",
    ),
    "by its role": ("special_tokens_map.json", {"sep_token": "<sep>"}, "'<sep>'"),
    "among others": (
        "tokenizer_config.json",
        {"additional_special_tokens": ["<extra_id_0>", "<sep>"]},
        "'<sep>'",
    ),
    "by a name": ("tokenizer_config.json", {"extra_special_tokens": {"a": "<sep>"}}, "'<sep>'"),
}


@pytest.mark.parametrize("name", ADDED)
def test_a_token_that_was_added_to_a_model_is_read_or_refused(tmp_path, name):
    """It is in no spiece.model: its text would be letters, and its id would be unknown."""
    file, content, missing = ADDED[name]
    shutil.copy(bundled.VOCABULARY / "spiece.model", tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    for load in (vocabularies.load_vocabulary, seqio_tasks.seqio_vocabulary):
        for path in (tmp_path, tmp_path / "spiece.model"):
            with pytest.raises(ValueError, match=f"does not have: {missing}. Save the tokenizer"):
                load(path)
    (tmp_path / file).write_text(
        json.dumps(content).replace("<sep>", "<extra_id_99>").replace("4096", "3996")
    )
    assert vocabularies.load_vocabulary(tmp_path).vocab_size == 4096
