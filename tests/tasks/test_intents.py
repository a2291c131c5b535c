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
