"""Vocabularies over the library `tokenizers`: their ids, and what lies beside them in a folder."""

import copy
import json
import shutil

import pytest
from tokenizer_folders import FOLDER, NAMES, edit

from coda_jax.data import vocabularies
from coda_jax.data.sentencepiece_vocabulary import SentencePieceVocabulary
from coda_jax.data.tokenizers_vocabulary import TokenizersVocabulary
from coda_jax.data.vocabularies import find_fingerprint, load_vocabulary

ADDED = ["<sep>", "newword", "neues wort"]


@pytest.mark.parametrize(
    ("name", "size", "ids"),
    [
        ("byte_bpe", 330, (0, 2, 1, 3)),
        ("byte_bpe_4", 330, (0, 2, 1, 3)),
        ("byte_bpe_5", 330, (0, 2, 1, 3)),
        ("llama_5", 370, (None, 2, 1, 0)),
        ("unigram_4", 143, (0, 1, None, 2)),
        ("unigram_5", 143, (0, 1, None, 2)),
    ],
)
def test_special_ids_are_those_of_the_tokenizer(name, size, ids):
    v = load_vocabulary(FOLDER / name)
    assert (v.vocab_size, (v.pad_id, v.eos_id, v.bos_id, v.unk_id)) == (size, ids)
    first = size - 1 - 3 * name.startswith("unigram")  # which has three tokens added later
    assert v.sentinel_ids == list(range(first, first - 10, -1))


def test_config_json_says_what_the_tokenizer_does_not(copied):
    folder = copied("llama_5")
    (folder / "config.json").write_text('{"pad_token_id": 1, "eos_token_id": 5}')
    vocabulary = load_vocabulary(folder)
    assert (vocabulary.pad_id, vocabulary.eos_id) == (1, 2)
    (folder / "tokenizer_config.json").unlink()
    edit(folder / "tokenizer.json", lambda x: x.update(post_processor=None))  # which adds id 2
    vocabulary = load_vocabulary(folder / "tokenizer.json")
    assert (vocabulary.pad_id, vocabulary.eos_id) == (1, 5)


def test_padding_that_is_the_end_marker_is_none(copied):
    folder = copied("byte_bpe_5")
    edit(folder / "tokenizer_config.json", lambda x: x.update(pad_token="</s>"))
    assert load_vocabulary(folder).pad_id == 0  # <pad>, as the token is usually called
    (folder / "config.json").write_text('{"pad_token_id": 3}')
    assert load_vocabulary(folder).pad_id == 3


def test_a_text_keeps_the_start_and_has_no_end(copied):
    codet5 = load_vocabulary(FOLDER / "byte_bpe")
    assert codet5.encode("")[:1] == [codet5.bos_id] and codet5.eos_id not in codet5.encode("a")
    assert codet5.encode("a</s>").count(codet5.eos_id) == 1
    unigram = load_vocabulary(FOLDER / "unigram_4")
    assert unigram.encode("") == [] and unigram.encode("</s>") == [unigram.eos_id]


def test_a_tokenizer_that_adds_no_end_is_read_with_a_warning(copied, caplog):
    folder = copied("llama_5")
    edit(folder / "tokenizer.json", lambda x: x.update(post_processor=None))
    with caplog.at_level("WARNING"):
        vocabulary = load_vocabulary(folder)
    assert "adds no EOS to a text" in caplog.text
    assert vocabulary.encode("a b") == load_vocabulary(FOLDER / "llama_5").encode("a b")


@pytest.mark.parametrize("single", [["<pad>", "A", "<unk>"], ["A", "</s>", "<unk>"]])
def test_a_tokenizer_that_puts_more_than_the_end_behind_a_text_is_refused(copied, single):
    """Its tokens would be taken for those in front, and vanish from decoded texts."""
    folder, ids = copied("unigram_5"), {"<pad>": 0, "</s>": 1, "<unk>": 2}
    steps = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if name == "A"
        else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in single
    ]
    tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()}
    processor = {"single": steps, "special_tokens": tokens}
    edit(folder / "tokenizer.json", lambda x: x["post_processor"].update(processor))
    with pytest.raises(ValueError, match="behind a text may stand the end marker, 1, and nothing"):
        load_vocabulary(folder)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"},
                                          {"type": "CTC", "pad_token": "<pad>", "cleanup": False,
                                           "word_delimiter_token": "|"}]},
    ],
    ids=["none", "WordPiece", "BPEDecoder", "CTC"],
)  # fmt: skip
def test_pieces_that_depend_on_their_neighbours_are_refused(copied, decoder):
    folder = copied("unigram_5")
    edit(folder / "tokenizer.json", lambda x: x.update(decoder=decoder))
    with pytest.raises(ValueError, match=r"joins tokens by .*: stop texts need ByteLevel"):
        load_vocabulary(folder).pieces()


@pytest.mark.parametrize("name", NAMES)
def test_pieces_are_what_tokens_add_to_a_text(name):
    vocabulary = load_vocabulary(FOLDER / name)
    ids, pieces = vocabulary.encode("the file of é"), vocabulary.pieces()
    assert b"".join(pieces[i] for i in ids).decode().lstrip() == vocabulary.decode(ids).lstrip()


@pytest.mark.parametrize("name", NAMES)
def test_a_decoded_text_ends_at_the_end_marker_and_shows_sentinels(name):
    v = load_vocabulary(FOLDER / name)
    ids = v.encode("the <extra_id_3> file")
    padding = [] if v.pad_id is None else [v.pad_id] * 2
    text = v.decode(ids)
    assert "<extra_id_3>" in text and text.startswith("the") and text.endswith("file")
    assert v.decode([*padding, *ids, v.eos_id, 7, *padding]) == text
    assert v.decode([]) == v.decode([v.eos_id, 7]) == ""
    assert v.decode([v.unk_id, 10_000]) == v.decode([v.unk_id] * 2) != ""


def test_texts_are_cleaned_up_where_the_settings_say_so(copied):
    for name in ("unigram_5", "llama_5"):
        folder = copied(name)
        ids = load_vocabulary(folder).encode("do n't say hello , you .")
        as_is = load_vocabulary(folder).decode(ids)
        settings = folder / "tokenizer_config.json"
        edit(settings, lambda x: x.update(clean_up_tokenization_spaces=True))
        # As in transformers 5, texts of byte pairs stay as they are.
        cleaned = {"unigram_5": as_is.replace(" .", ".").replace(" n't", "n't")}
        cleaned["unigram_5"] = cleaned["unigram_5"].replace(" ,", ",")
        assert load_vocabulary(folder).decode(ids) == cleaned.get(name, as_is)


def test_what_the_file_says_of_padding_and_cutting_is_not_done(copied):
    folder = copied("unigram_5")
    ids = load_vocabulary(folder).encode("the file of the text")
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None,
               "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit(folder / "tokenizer.json", lambda x: x.update(padding=padding, truncation=cut))
    assert load_vocabulary(folder).encode("the file of the text") == ids


@pytest.mark.parametrize("name", NAMES)
def test_fingerprints_and_files(name, copied, tmp_path):
    folder = copied(name)
    vocabulary = load_vocabulary(folder)
    assert find_fingerprint(folder) == vocabulary.fingerprint
    assert find_fingerprint(FOLDER / name) == vocabulary.fingerprint  # wherever it lies
    files = {path.name for path in folder.iterdir()} - {"expected.json"}
    assert set(vocabulary.files) == set(vocabularies.find_files(folder)) == files
    (tmp_path / "new").mkdir()
    vocabularies.copy_files(vocabulary.files, tmp_path / "new")
    vocabularies.copy_files(vocabulary.files, folder)  # onto itself: nothing happens
    assert load_vocabulary(tmp_path / "new") == vocabulary


def test_the_fingerprint_covers_all_that_says_ids(copied):
    prints = {find_fingerprint(FOLDER / name) for name in NAMES}
    assert len(prints) == 5  # byte_bpe_4 and byte_bpe_5 have the same tokenizer.json
    folder = copied("byte_bpe")
    changes = {
        "added_tokens.json": lambda x: x.update({"<new>": 330}),
        "tokenizer_config.json": lambda x: x.update(add_prefix_space=True),
        "special_tokens_map.json": lambda x: x["additional_special_tokens"][0].update(lstrip=False),
    }
    for name, change in changes.items():
        edit(folder / name, change)
        prints.add(find_fingerprint(folder))
    assert len(prints) == 8


def test_a_copy_is_the_same():
    """gin copies what it is given."""
    vocabulary = load_vocabulary(FOLDER / "unigram_5")
    same = copy.deepcopy({"a": vocabulary})["a"]
    assert same == vocabulary and hash(same) == hash(vocabulary)
    assert vocabulary != load_vocabulary(FOLDER / "unigram_4")
    assert load_vocabulary(FOLDER / "unigram_5" / "tokenizer.json") == vocabulary


# --- Several kinds in one folder. ---


def remove_added(content):
    content["added_tokens"] = [x for x in content["added_tokens"] if x["content"] not in ADDED]


@pytest.fixture(name="both")
def fixture_both(copied):
    """A folder with spiece.model and a tokenizer.json of it, with tokens that were added later."""
    folder = copied("unigram")
    shutil.copy(FOLDER / "unigram_4" / "tokenizer.json", folder)
    return folder


def test_spiece_goes_first_unless_tokens_were_added_later(both):
    vocabulary = load_vocabulary(both)
    assert isinstance(vocabulary, TokenizersVocabulary)
    assert vocabulary.decode(vocabulary.encode("<sep> newword")) == "<sep> newword"
    assert find_fingerprint(both) == vocabulary.fingerprint
    edit(both / "tokenizer.json", remove_added)
    vocabulary = load_vocabulary(both)
    assert isinstance(vocabulary, SentencePieceVocabulary)
    assert (vocabulary.vocab_size, len(vocabulary.sentinel_ids)) == (140, 10)
    assert find_fingerprint(both) == find_fingerprint(FOLDER / "unigram") == vocabulary.fingerprint


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda x: x["model"]["vocab"][7].__setitem__(0, "other"), "id 7 is '.*' and 'other'"),
        (
            lambda x: x["model"]["vocab"][7].__setitem__(1, -9.0),
            "the score of '.*', id 7, is -.* and -9",
        ),
        (lambda x: x["model"]["vocab"].pop(129), "id 129 is '.*' and '<extra_id_9>'"),
        (lambda x: x["model"]["vocab"].insert(130, ["new", -1.0]), "id 130 is .* and 'new'"),
        (lambda x: x["model"].update(unk_id=1), "unknown is id 2 and 1"),
    ],
)
def test_two_vocabularies_that_differ_are_refused(both, change, difference):
    edit(both / "tokenizer.json", remove_added)
    edit(both / "tokenizer.json", change)
    with pytest.raises(ValueError, match=rf"spiece.model and tokenizer.json.*: {difference}"):
        load_vocabulary(both)


@pytest.mark.parametrize(
    ("name", "text", "difference"),
    [
        ("vocab.json", '{"<pad>": 0, "<s>": 1}', "the id of '.*' is None and 2"),
        ("merges.txt", "#version: 0.2\nt h\nh e\n", r"merge 0 is \('t', 'h'\) and \("),
    ],
)
def test_byte_pairs_that_differ_are_refused(copied, name, text, difference):
    folder = copied("byte_bpe_4")
    assert load_vocabulary(folder).fingerprint == find_fingerprint(FOLDER / "byte_bpe_5")
    (folder / name).write_text(text)
    for read in (load_vocabulary, find_fingerprint):
        with pytest.raises(ValueError, match=rf"vocab.json with merges.txt and .*: {difference}"):
            read(folder)


def test_two_vocabularies_that_cannot_be_compared_are_refused(copied):
    folder = copied("byte_bpe")
    shutil.copy(FOLDER / "unigram" / "spiece.model", folder)
    for read in (load_vocabulary, find_fingerprint):
        with pytest.raises(ValueError, match=r"two vocabularies, spiece.model and vocab.json"):
            read(folder)


@pytest.mark.parametrize("name", ["unigram", "unigram_5", "byte_bpe_5"])
def test_tokens_that_only_a_side_file_names_are_refused(copied, name):
    folder = copied(name)
    (folder / "added_tokens.json").write_text('{"<extra_id_9>": 130, "<new>": 150}')
    match = r"names added tokens that its .* does not have: .*'<new>' \(150\).* transformers"
    with pytest.raises(ValueError, match=match):
        load_vocabulary(folder)
    (folder / "added_tokens.json").unlink()
    load_vocabulary(folder)
    decoder = {"150": {"content": "<new>", "special": True}}
    edit(folder / "tokenizer_config.json", lambda x: x.update(added_tokens_decoder=decoder))
    with pytest.raises(ValueError, match=match):
        load_vocabulary(folder)


@pytest.mark.parametrize("tokens", [["<sep>"], {"image_token": "<sep>"}])
def test_extra_special_tokens_are_those_of_transformers_5_and_4(copied, tokens):
    folder = copied("byte_bpe")
    edit(folder / "tokenizer_config.json", lambda x: x.update(extra_special_tokens=tokens))
    assert "<sep>" in load_vocabulary(folder).folder.special_tokens()
    edit(folder / "tokenizer_config.json", lambda x: x.update(extra_special_tokens="<sep>"))
    with pytest.raises(ValueError, match="extra_special_tokens is not what transformers writes"):
        load_vocabulary(folder)


# --- SentencePiece's and bytes' side files. ---


def test_the_settings_say_how_many_extra_ids_there_are(copied):
    folder = copied("unigram")
    settings = folder / "tokenizer_config.json"
    assert load_vocabulary(folder).vocab_size == 140
    assert load_vocabulary(folder / "spiece.model") == load_vocabulary(folder)
    settings.write_text('{"extra_ids": 0}')
    assert load_vocabulary(folder).sentinel_ids == []
    settings.unlink()
    assert load_vocabulary(folder).vocab_size == 230  # T5's 100
    tokens = {str(130 + i): {"content": f"<extra_id_{4 - i}>"} for i in range(5)}
    settings.write_text(json.dumps({"added_tokens_decoder": tokens}))
    assert load_vocabulary(folder).sentinel_ids == [134, 133, 132, 131, 130]
    settings.write_text('{"extra_ids": "many"}')
    with pytest.raises(ValueError, match=r"tokenizer_config.json.*extra_ids is not .*'many'"):
        load_vocabulary(folder)


def test_a_sentencepiece_file_without_padding_takes_that_of_the_settings(tmp_path):
    """As of MADLAD-400: unknown is 0, <s> 1, and no token is padding."""
    import sentencepiece

    with open(tmp_path / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words of a text"] * 9), model_writer=file, vocab_size=30,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    vocabulary = load_vocabulary(tmp_path)
    assert (vocabulary.pad_id, vocabulary.eos_id) == (None, 2)
    (tmp_path / "config.json").write_text('{"pad_token_id": 0, "eos_token_id": 7}')
    assert load_vocabulary(tmp_path).pad_id == 0
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<s>", "eos_token": "a"}')
    vocabulary = load_vocabulary(tmp_path)
    assert (vocabulary.pad_id, vocabulary.eos_id) == (1, 2)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_a_folder_of_byt5_is_bytes(tmp_path, name):
    (tmp_path / name).write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_vocabulary(tmp_path) == load_vocabulary("bytes")
    assert find_fingerprint(tmp_path) == "bytes"
    decoder = '{"384": {"content": "<new>"}}'
    settings = f'{{"tokenizer_class": "ByT5Tokenizer", "added_tokens_decoder": {decoder}}}'
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ValueError, match=r"adds tokens to ByT5's, such as '<new>'"):
        load_vocabulary(tmp_path)
