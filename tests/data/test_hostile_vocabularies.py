"""Files of a vocabulary that somebody else wrote: refused, or read without harm."""

import copy
import io
import json
import re
import time
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
from tokenizer_folders import FOLDER, edit
import tokenizers

from coda_jax.data.tokenizers_vocabulary import load_tokenizer_json
from coda_jax.data.vocabularies import load_vocabulary
from coda_jax.data.vocabulary_files import FileSystem, Folder


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("tokenizer.json", "67,108,864"),
        ("vocab.json", "67,108,864"),
        ("spiece.model", "67,108,864"),
        ("tokenizer_config.json", "4,194,304"),
    ],
)
def test_a_file_of_200_mb_is_refused_before_it_is_read(copied, name, most):
    folder = copied({"vocab.json": "byte_bpe", "spiece.model": "unigram"}.get(name, "unigram_5"))
    with open(folder / name, "wb") as file:
        file.truncate(200 * 10**6)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ValueError, match=rf"{name}' has 200,000,000 bytes; .* at most {most}"):
        load_vocabulary(folder)
    assert time.perf_counter() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json"])
@pytest.mark.parametrize("opening", ['{"a":', "[", '{"model": {"type": "BPE", "vocab":' + "["])
def test_deep_nesting_is_refused(copied, name, opening):
    folder = copied("byte_bpe_4" if name == "vocab.json" else "unigram_5")
    (folder / name).write_text(opening * 10_000)
    with pytest.raises(ValueError, match=name):
        load_vocabulary(folder)


REFUSED = {
    "no object": (lambda x: x.clear(), "is not a tokenizer: .*Model missing"),
    "a wrong type": (lambda x: x.update(added_tokens={}), "is not a tokenizer: .*expected a seq"),
    "no pieces": (lambda x: x["model"].update(vocab=[]), "is not a tokenizer: "),
    "a text for a score": (lambda x: x["model"]["vocab"].append(["a", "b"]), "invalid type"),
    "an unknown rule": (lambda x: x.update(normalizer={"type": "Python"}), "is not a tokenizer: "),
    "no unknown token": (lambda x: x["model"].update(unk_id=None), "is not a tokenizer: .*unk"),
    "no regular expression": (
        lambda x: x.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("},
                                          "behavior": "Isolated", "invert": False}),
        "is not a tokenizer: ",
    ),
    "damaged rules, at which the library panics": (
        lambda x: x["normalizer"].update(precompiled_charsmap="AAAA"),
        "is not a tokenizer: Precompiled",
    ),
    "a template without its token, at which it panics": (
        lambda x: x["post_processor"].update(special_tokens={}),
        "is not a tokenizer: ",
    ),
    "rules that double a text many times": (
        lambda x: x.update(normalizer={"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 64}),
        "its rules make a text up to 18,446,744,073,709,551,616 times as long",
    ),
    "no end marker": (
        lambda x: x["model"]["vocab"][1].__setitem__(0, "end") or x["added_tokens"].pop(1),
        "does not say which token ends a text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("problem", REFUSED)
def test_what_is_no_tokenizer_is_refused_in_one_line(copied, problem):
    change, message = REFUSED[problem]
    folder = copied("unigram_5")
    edit(folder / "tokenizer.json", change)
    with pytest.raises(ValueError, match=message) as caught:
        load_vocabulary(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_errors_of_the_library_later_on_are_errors_of_the_file(copied):
    folder = copied("unigram_5")
    with pytest.raises(ValueError, match=r"tokenizer.json' cannot encode 'a\\ud800'"):
        load_vocabulary(folder).encode("a\ud800")
    strip = {"type": "Strip", "content": "t", "start": 9, "stop": 9}  # at which it panics
    edit(folder / "tokenizer.json", lambda x: x.update(decoder=strip))
    vocabulary = load_vocabulary(folder)
    with pytest.raises(ValueError, match=r"tokenizer.json' cannot decode \["):
        vocabulary.decode([vocabulary.token_to_id("t")])


def test_an_exception_of_another_kind_passes(monkeypatch, copied):
    def interrupted(content):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizers.Tokenizer, "from_buffer", interrupted, raising=True)
    with pytest.raises(KeyboardInterrupt):
        load_vocabulary(FOLDER / "unigram_5")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 5}', "a token is not what transformers writes"),
        ("tokenizer_config.json", '{"eos_token": {"text": "a"}}', "a token is not"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens_decoder is not"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "a"}}', "id of an added token"),
        ("tokenizer_config.json", '{"additional_special_tokens": 1}', "additional_special_tokens"),
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}', "of a GPT2Tokenizer"),
        ("added_tokens.json", '{"<a>": "b"}', "id of an added token is not"),
        ("added_tokens.json", '{"<new>": 900}', r"does not have: '<new>' \(900\)"),
        ("vocab.json", '{"a": "b"}', "must hold pieces and their ids"),
        ("vocab.json", '{"a": -1}', "must hold pieces and their ids"),
        ("vocab.json", '{"a": 0}', "vocab.json' is not a tokenizer: "),  # the merges' are missing
        ("merges.txt", "a b c\n", "must hold two pieces a line"),
        ("merges.txt", "x y\n", "vocab.json' is not a tokenizer: "),
    ],
)
def test_damaged_files_of_byte_pairs_are_refused(copied, name, content, message):
    folder = copied("byte_bpe")
    (folder / "special_tokens_map.json").unlink()  # which would go first
    load_vocabulary(folder)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_vocabulary(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=4,
)


def places(value, path=()):
    """The paths of all values in a JSON value, of pieces some only."""
    yield path
    items = ()
    if isinstance(value, list):
        items = enumerate(value[:12])
    elif isinstance(value, dict):
        items = list(value.items())[:12]
    for key, inner in items:
        yield from places(inner, (*path, key))


def held(content):
    """A folder whose only file is a tokenizer.json of this content."""
    names = ("tokenizer.json",)
    return Folder("", FileSystem(
        isdir=None, exists=names.__contains__, size=lambda _: len(content),
        open=lambda _: io.BytesIO(content),
    ))  # fmt: skip


CONTENTS = {
    name: json.loads((FOLDER / name / "tokenizer.json").read_text())
    for name in ("unigram_4", "llama_5")
}
PLACES = {name: [p for p in places(CONTENTS[name]) if p] for name in CONTENTS}


@pytest.mark.parametrize("name", PLACES)
@settings(max_examples=150)
@given(data=st.data())
def test_a_tokenizer_with_any_other_values_loads_or_is_refused(name, data):
    content = copy.deepcopy(CONTENTS[name])
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(PLACES[name]))
        try:
            inner = content
            for key in path:
                inner = inner[key]
            inner[last] = data.draw(JSON)
        except (TypeError, KeyError, IndexError):
            continue  # an earlier change took the place away
    try:
        vocabulary = load_tokenizer_json(held(json.dumps(content).encode()))
        vocabulary.decode(vocabulary.encode("the <extra_id_0> file 日本</s>"))
    except ValueError as error:
        assert re.search(r"tokenizer\.json|does not say which", str(error))
