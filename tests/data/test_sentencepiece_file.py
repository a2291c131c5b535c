"""A spiece.model that would crash SentencePiece, which seqio's TensorFlow reads too, is refused."""

import io
import struct

import pytest
import sentencepiece

from coda_jax import bundled
from coda_jax.data import seqio_tasks, vocabularies
from coda_jax.data.sentencepiece_file import check_model

MODEL = (bundled.VOCABULARY / "spiece.model").read_bytes()
END, FAR, HAS_END = 1 << 31, 1 << 9, 1 << 8  # bits of a table's entries


def number(value):
    """A number as Protocol Buffers writes it."""
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + number(high) if high else bytes([low])


def field(place, content):
    """A field of bytes."""
    return number(place << 3 | 2) + number(len(content)) + content


def with_piece(size):
    """The model with one more piece, of which all fields together have so many bytes."""
    score = b"\x15" + struct.pack("<f", -9.0)
    return MODEL + field(1, field(1, b"a" * (size - len(score) - 3)) + score)


def with_rules(entries, texts=b"a\0", normalizer=3):
    """The model with rules whose table has one row, which starts with the entries."""
    table = struct.pack("<256I", *entries, *[0] * (256 - len(entries)))
    rules = struct.pack("<I", len(table)) + table + texts
    return MODEL + field(normalizer, field(2, rules))


REFUSED = {
    "a long piece": (with_piece(8001), "a piece has 8,001 bytes; at most 8,000 are read"),
    "a far offset": (with_rules([FAR | 1 << 10]), "leads out of its own table"),
    "an offset too large": (with_rules([256 << 10]), "leads out of its own table"),
    "of the texts for humans too": (with_rules([256 << 10], normalizer=5), "leads out of its own"),
    "no end where one is said": (with_rules([HAS_END | 1 << 10]), "leads out of its own table"),
    "an end of no text": (with_rules([HAS_END | 1 << 10, END | 2]), "leads out of its own table"),
    "an end at the start": (with_rules([END]), "leads out of its own table"),
    "a text without an end": (with_rules([0], b"a"), "precompiled_charsmap is damaged"),
    "no table": (MODEL + field(3, field(2, bytes(4) + b"a\0")), "precompiled_charsmap is damaged"),
    "a table cut off": (MODEL + field(3, field(2, b"\0\4\0\0abc\0")), "charsmap is damaged"),
    "an end within a field": (MODEL + b"\x0a\x05abc", "it ends within a field"),
    "an end within a number": (MODEL + b"\x0a\x85", "it ends within a number"),
    "a number too large": (MODEL + b"\x08" + b"\xff" * 10 + b"\1", "a number is too large"),
    "a group": (MODEL + b"\x7b", "field 15 is of the unknown kind 3"),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_would_crash_the_library_is_refused(problem, tmp_path):
    content, message = REFUSED[problem]
    (tmp_path / "spiece.model").write_bytes(content)
    for load in (vocabularies.load_vocabulary, seqio_tasks.seqio_vocabulary):
        with pytest.raises(ValueError, match=f"spiece.model' is not a Sent.* model: .*{message}"):
            load(tmp_path)


@pytest.mark.parametrize(
    "content", [with_piece(8000), with_rules([1 << 10, 0, HAS_END | 1 << 10, END | 1])]
)
def test_what_is_just_allowed_is_read(content, tmp_path):
    (tmp_path / "spiece.model").write_bytes(content)
    vocabulary = vocabularies.load_vocabulary(tmp_path)
    assert vocabulary.decode(vocabulary.encode("def f():")) == "def f():"


@pytest.mark.parametrize("rules", ["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity"])
def test_all_rules_that_sentencepiece_has_are_allowed(rules):
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words of a text"] * 9), model_writer=file, vocab_size=30,
        hard_vocab_limit=False, minloglevel=2, normalization_rule_name=rules,
    )  # fmt: skip
    content = file.getvalue()
    assert (len(content) > 10**5) == (rules != "identity")
    check_model(content)


def test_a_piece_that_is_no_utf_8_is_named_with_the_file(tmp_path):
    (tmp_path / "spiece.model").write_bytes(MODEL.replace(b"<unk>", b"\xbcunk>", 1))
    with pytest.raises(ValueError, match=r"spiece\.model' is not a SentencePiece model: 'utf-8'"):
        vocabularies.load_vocabulary(tmp_path)
