"""Intent tasks from the files of their publishers: what is read, and what is refused."""

import csv
import json

from language_tasks import as_bytes, read
import pytest
import seqio

from coda_jax.tasks import language

# --- CLINC150 from its file. ---

CLINC_FILE = {
    "val": [["in spanish, meet me", "translate"]],
    "train": [["flip a coin", "flip_coin"], ["wie heißt du", "what_is_your_name"]],
    "oos_train": [["how much is an overdraft fee", "oos"]],
    "test": [["heads or tails", "flip_coin"]],
    "oos_test": [["has the dow changed", "oos"], ["prime numbers below 100", "oos"]],
    "oos_val": [["a show on broadway", "oos"]],
}


def clinc(directory, **changed):
    (directory / "data_full.json").write_text(json.dumps(CLINC_FILE | changed), encoding="utf-8")
    return language.task("clinc150", "bytes", str(directory))


def test_clinc_keeps_queries_out_of_scope_apart(tmp_path):
    name = clinc(tmp_path)
    keys = {"train": "train", "validation": "val", "test": "test", "oos_train": "oos_train"}
    keys |= {"oos_validation": "oos_val", "oos_test": "oos_test"}
    assert set(seqio.TaskRegistry.get(name).splits) == set(keys)
    for split, key in keys.items():
        assert read(name, split) == [
            {"inputs": as_bytes(f"clinc150: {text}"), "targets": as_bytes(intent)}
            for text, intent in CLINC_FILE[key]
        ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": None}, r"data_full.json: there must be a list .* under 'train'"),
        ({"train": []}, "a list of pairs .* under 'train'"),
        ({"train": [["a", "b"], ["a"]]}, r"train\[1\] must be \[text, intent\], not \['a'\]"),
        ({"train": [["a", 3]]}, r"train\[0\] must be .*, not \['a', 3\]"),
        ({"train": [["a", " "]]}, r"train\[0\] must be"),
        ({"train": ["ab"]}, r"train\[0\] must be .*, not 'ab'"),
    ],
)
def test_bad_places_of_the_clinc_file_are_named(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(clinc(tmp_path, **changed), "train")


def test_a_clinc_file_that_is_missing_or_not_json_is_named(tmp_path):
    name = language.task("clinc150", "bytes", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"data_full\.json"):
        read(name, "train")
    for content in (b"{", b"\xff", b""):
        (tmp_path / "data_full.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"data_full\.json: not JSON"):
            read(name, "train")
    (tmp_path / "data_full.json").write_text("[]")
    with pytest.raises(ValueError, match="under 'train'"):
        read(name, "train")


# --- Banking77 from its files. ---


def banking(directory, train, test=(("q", "t"),)):
    for name, rows in (("train", train), ("test", test)):
        with (directory / f"{name}.csv").open("w", encoding="utf-8", newline="") as f:
            csv.writer(f, lineterminator="\n").writerows([("text", "category"), *rows])
    return language.task("banking77", "bytes", str(directory))


def test_banking_goes_from_its_files_to_batches_of_bytes(tmp_path):
    # As published: quoted commas and quotes, and line ends inside of a query.
    rows = [
        ("\nI can't use my card\n\n", "card_not_working"),
        ('Why "declined", again?', "declined_card_payment"),
        *((f"Question {i} about ü?", f"intent_{i % 3}") for i in range(300)),
    ]
    name = banking(tmp_path, rows, [("Is my card here?", "card_arrival")])
    assert read(name, "test") == [
        {"inputs": as_bytes("banking77: Is my card here?"), "targets": as_bytes("card_arrival")}
    ]
    found = {
        split: [(tuple(x["inputs"]), tuple(x["targets"])) for x in read(name, split)]
        for split in ("train", "validation")
    }
    expected = [(tuple(as_bytes(f"banking77: {t}")), tuple(as_bytes(c))) for t, c in rows]
    assert sorted(found["train"] + found["validation"]) == sorted(expected)
    assert 0.05 < len(found["validation"]) / len(rows) < 0.15
    assert found["train"] == [row for row in expected if row in found["train"]]  # In order.
    shuffled = [tuple(x["inputs"]) for x in read(name, "train", shuffle=True)]
    assert sorted(shuffled) == sorted(inputs for inputs, _ in found["train"])
    assert shuffled != [inputs for inputs, _ in found["train"]]


def test_the_validation_split_of_banking_follows_the_texts_alone(tmp_path):
    rows = [(f"Question {i}", "a") for i in range(200)]
    first = {tuple(x["inputs"]) for x in read(banking(tmp_path, rows), "validation")}
    (tmp_path / "other").mkdir()
    fewer = [(text, "b") for text, _ in reversed(rows[:100])]
    second = {tuple(x["inputs"]) for x in read(banking(tmp_path / "other", fewer), "validation")}
    kept = {tuple(as_bytes(f"banking77: {text}")) for text, _ in fewer}
    assert second == first & kept
    assert second


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"test\.csv:0: the first line must be \['text', 'category'\], not None"),
        (b"category,text\na,b\n", r"test\.csv:1: the first line must be .*not \['category', "),
        (b"text,category\na,b\na,b,c\n", r"test\.csv:3: not a row of .*: \['a', 'b', 'c'\]"),
        (b"text,category\n\n", r"test\.csv:2: not a row of .*: \[\]"),
        (b"text,category\na, \n", r"test\.csv:2: not a row"),
        (b'text,category\n"a\nb,c\n', r"test\.csv:2: unexpected end of data"),
        (b"text,category\n\xff,b\n", r"test\.csv:2: not UTF-8: invalid start byte"),
        (b"text,category\n", r"test\.csv: there is no query of the split 'test'"),
    ],
)
def test_bad_lines_of_a_banking_file_are_named(content, message, tmp_path):
    name = banking(tmp_path, [("a", "b")])
    (tmp_path / "test.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(name, "test")


def test_a_banking_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/train\.csv"):
        read(language.task("banking77", "bytes", str(tmp_path / "nowhere")), "validation")


# --- SNIPS from its files. ---

SNIPS = ("AddToPlaylist", "BookRestaurant", "GetWeather", "PlayMusic", "RateBook")
SNIPS += ("SearchCreativeWork", "SearchScreeningEvent")


def snips(directory, train, test=("a",)):
    """Of each intent the same texts, in two parts."""
    for intent in SNIPS:
        (directory / intent).mkdir(exist_ok=True)
        for name, texts in ((f"train_{intent}_full", train), (f"validate_{intent}", test)):
            parts = [[{"text": t[:1]}, {"text": t[1:], "entity": "x"}] for t in texts]
            content = json.dumps({intent: [{"data": x} for x in parts]}, ensure_ascii=False)
            # As published: what is beyond 16 bits is two surrogates, each in UTF-8.
            units = content.encode("utf-16-be")
            pairs = [units[i : i + 2] for i in range(0, len(units), 2)]
            halves = [pair.decode("utf-16-be", "surrogatepass") for pair in pairs]
            file = directory / intent / f"{name}.json"
            file.write_bytes("".join(halves).encode("utf-8", "surrogatepass"))
    return language.task("snips", "bytes", str(directory))


def test_snips_goes_from_its_files_to_bytes(tmp_path):
    texts = ["Pop 🍕 é", *(f"Query {i}" for i in range(200))]
    name = snips(tmp_path, texts, ["Is it cold?"])
    assert read(name, "test") == [
        {"inputs": as_bytes("snips: Is it cold?"), "targets": as_bytes(intent)} for intent in SNIPS
    ]
    found = {
        split: [(tuple(x["inputs"]), tuple(x["targets"])) for x in read(name, split)]
        for split in ("train", "validation")
    }
    expected = [(tuple(as_bytes(f"snips: {t}")), tuple(as_bytes(c))) for c in SNIPS for t in texts]
    assert sorted(found["train"] + found["validation"]) == sorted(expected)
    assert 0.05 < len(found["validation"]) / len(expected) < 0.15
    assert {x for x, _ in found["train"]}.isdisjoint(x for x, _ in found["validation"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", r"validate_GetWeather\.json: there must be a list of queries under 'GetWeather'"),
        (b'{"GetWeather": [{"data": []}]}', r"GetWeather\[0\] must be \{\"data\": "),
        (b'{"GetWeather": [{"data": [{"text": 3}]}]}', r"GetWeather\[0\] must be .*'text': 3"),
        (b'{"GetWeather": [{"data": "ab"}]}', r"GetWeather\[0\] must be"),
        (b'{"GetWeather": [{"data": [{"text": " "}]}]}', r"GetWeather\[0\] must be"),
        (b"{", r"validate_GetWeather\.json: not JSON"),
        (b"\xff", r"validate_GetWeather\.json: not UTF-8: invalid start byte"),
        (b"\xed\xa0\xbc", r"validate_GetWeather\.json: not UTF-8"),  # half a character
    ],
)
def test_bad_places_of_a_snips_file_are_named(content, message, tmp_path):
    name = snips(tmp_path, ["b"])
    (tmp_path / "GetWeather" / "validate_GetWeather.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(name, "test")


def test_a_snips_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_AddToPlaylist_full\.json"):
        read(language.task("snips", "bytes", str(tmp_path)), "train")


# --- Some intents held out. ---


@pytest.mark.parametrize("held_out", [0.3, ["PlayMusic", "RateBook"]])
def test_held_out_intents_have_splits_of_their_own(tmp_path, held_out):
    snips(tmp_path, [f"Query {i}" for i in range(40)], ["a", "b"])
    name = language.task("snips", "bytes", str(tmp_path), held_out)
    held, splits = set(), ("train", "validation", "test")
    assert {*seqio.TaskRegistry.get(name).splits} == {*splits, *(f"held_out_{s}" for s in splits)}
    whole = language.task("snips", "bytes", str(tmp_path))
    for split in splits:
        parts = [read(name, f"{prefix}{split}") for prefix in ("", "held_out_")]
        known, held = ({tuple(x["targets"]) for x in part} for part in parts)
        assert known.isdisjoint(held) and (len(known), len(held)) == (5, 2)
        rows = sorted((x["inputs"], x["targets"]) for part in parts for x in part)
        assert rows == sorted((x["inputs"], x["targets"]) for x in read(whole, split))
    if isinstance(held_out, list):
        assert held == {tuple(as_bytes(intent)) for intent in held_out}


def test_intents_that_cannot_be_held_out_are_named(tmp_path):
    snips(tmp_path, ["a"])
    name = language.task("snips", "bytes", str(tmp_path), ("PlayMusik",))
    with pytest.raises(ValueError, match=r"no label 'PlayMusik'; the nearest are \['PlayMusic'"):
        read(name, "test")
    with pytest.raises(ValueError, match=r"held_out=0.5 needs the directory of a set of intents"):
        language.task("clinc150", "bytes", held_out=0.5)
