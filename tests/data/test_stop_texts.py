"""Stop texts: the table ends an output with the first token that completes one, and no other."""

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from coda_jax import bundled
from coda_jax.data.stop_texts import cut, stop_table
from coda_jax.data.vocabularies import ByteVocabulary, load_vocabulary

VOCABULARIES = {
    "bytes": ByteVocabulary(),
    "sentencepiece": load_vocabulary(str(bundled.VOCABULARY)),
}
PIECES = {name: vocabulary.pieces() for name, vocabulary in VOCABULARIES.items()}
TEXTS = st.text("ab \n.é日", min_size=1, max_size=4)
WORDS = st.lists(st.sampled_from([*"ab \n.é日", "self", "def", "aab", "  "]), max_size=12)


def end_by_table(table, ids):
    """Returns the number of tokens up to the one that completes a stop text; None for none."""
    state = 0
    for place, token in enumerate(ids):
        state = table[state, token]
        if state == len(table) - 1:
            return place + 1
    return None


def end_by_search(pieces, stops, ids):
    """Returns the same from the bytes of the text so far."""
    text = b""
    for place, token in enumerate(ids):
        text += pieces[token]
        if any(stop.encode() in text for stop in stops):
            return place + 1
    return None


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=40)
@given(words=WORDS, stops=st.lists(TEXTS, min_size=1, max_size=3))
def test_an_output_ends_with_the_token_that_completes_a_stop_text(name, words, stops):
    vocabulary = VOCABULARIES[name]
    ids = vocabulary.encode("".join(words))
    table = stop_table(vocabulary, stops, vocabulary.vocab_size + 2)
    assert table.shape[1] == vocabulary.vocab_size + 2
    assert end_by_table(table, ids) == end_by_search(PIECES[name], stops, ids)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_pieces_of_a_text_are_the_text(name):
    vocabulary, pieces = VOCABULARIES[name], PIECES[name]
    for text in ("def f(x):\n    return 'aé日'", "<extra_id_3> x", " \x00 self.\t", "no stop"):
        ids = vocabulary.encode(text)
        joined = b"".join(pieces[i] for i in ids).decode()
        assert joined.lstrip(" ") == vocabulary.decode(ids).lstrip(" ")
    assert len(pieces) == vocabulary.vocab_size and pieces[vocabulary.eos_id] == b""


def test_after_a_complete_text_the_search_begins_anew():
    """As it must behind a prefix that holds a stop text."""
    vocabulary = VOCABULARIES["bytes"]
    table = stop_table(vocabulary, ["ab"], 384)
    a, b, x = vocabulary.encode("abx")
    complete = table[table[0, a], b]
    assert complete == len(table) - 1
    assert table[complete, x] == table[0, x] == 0 and table[complete, a] == table[0, a]


def test_the_states_are_numbered_in_one_order_whatever_the_hash_seed():
    """So that two exports are the same, byte for byte."""
    vocabulary, letters = VOCABULARIES["bytes"], "qwertyuiopasdfghjklzxcvbnm"
    table = stop_table(vocabulary, [letter + "." for letter in letters], 384)
    assert table[0, vocabulary.encode("".join(sorted(letters)))].tolist() == [*range(1, 27)]


def test_too_many_states_are_refused():
    stop_table(VOCABULARIES["bytes"], ["x" * 255], 384)
    with pytest.raises(ValueError, match="the stop texts have 256 different beginnings"):
        stop_table(VOCABULARIES["bytes"], ["x" * 256], 384)


def test_a_text_is_cut_behind_its_first_stop_text():
    assert cut("one. two. three", [".", "two"]) == "one."
    assert cut("one two three", [".", "two"]) == "one two"
    assert cut("nothing", ["."]) == "nothing"
    assert cut("Q. one. two", ["."], start=2) == "Q. one."
    assert cut("Qab", ["ab"], start=2) == "Qab"  # begun in what was given
    assert cut("abb", ["b", "ab"]) == "ab"
