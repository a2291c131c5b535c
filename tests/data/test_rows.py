"""Rows of JSONL, CSV and TSV: what is wrong is named with file and line; templates; requests."""

import csv
import io
import itertools
import json

import pytest

from coda_jax.data import jsonl, rows
from coda_jax.data.labels import labelled_task, read_labels

TABLE = [
    {"id": "7", "inputs": 'a "b", c', "targets": "one\ntwo\r\nthree\rfour"},
    {"id": "", "inputs": " ü\t{x} ", "targets": "日本"},
    {"id": "8", "inputs": "", "targets": " "},
]


def write(path, table, **dialect):
    """Writes a table as Python's csv module does; returns the path."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*table[0]], **dialect)
        writer.writeheader()
        writer.writerows(table)
    return path


def read(path):
    return [dict(row.fields) for row in rows.read_rows(path)]


def requests(path, *arguments):
    return [*itertools.chain.from_iterable(rows.read_requests(path, *arguments))]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.TSV", "\t")])
def test_tables_are_read_as_they_were_written(tmp_path, name, delimiter):
    path = write(tmp_path / name, TABLE, delimiter=delimiter)
    assert read(path) == TABLE
    assert [row.place for row in rows.read_rows(path)] == [f"{path}:{n}" for n in (2, 6, 7)]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n\n")  # as Excel writes it
    assert read(path) == TABLE
    text = "".join(rows.written(TABLE, str(path)))
    path.write_text(text, encoding="utf-8", newline="")
    assert read(path) == TABLE and text.endswith("\n") and not text.endswith("\r\n")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "-"])
def test_what_is_written_is_read_again(tmp_path, name):
    lines = [{"inputs": "a", "n": 3, "scores": {"ü": 0.5}}, {"inputs": "b", "n": None}]
    text = "".join(rows.written(lines, name))
    if name == "a.csv":
        assert text == 'inputs,n,scores\na,3,"{""ü"": 0.5}"\nb,null,\n'
        with pytest.raises(ValueError, match=r"a\.csv: row 2 has the field 'm', the first has"):
            list(rows.written([{"n": 1}, {"n": 2, "m": 3}], name))
    else:
        assert [json.loads(line) for line in text.splitlines()] == lines


def test_a_long_value_is_read(tmp_path):
    path = write(tmp_path / "a.csv", [{"inputs": "x" * 200_000}])
    assert [len(row["inputs"]) for row in read(path)] == [200_000]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.csv: the file is empty"),
        (b"\n \n", r"a\.csv: the file is empty"),
        (b"\xef\xbb\xbf", r"a\.csv: there are no rows below"),
        (b"inputs,targets\n\n", r"a\.csv: there are no rows below the names of the columns"),
        (b"inputs,targets\na,b\nc\n", r"a\.csv:3: 1 values, not 2: \['inputs', 'targets'\]"),
        (b'inputs,targets\n"a\na",b\nc,d,e\n', r"a\.csv:4: 3 values, not 2"),
        (b"inputs,targets\n\na,b\n", r"a\.csv:2: 0 values, not 2"),
        (b"inputs,targets,inputs\na,b,c\n", r"a\.csv:1: several columns are called 'inputs'"),
        (b"inputs,targets\na,\xff\n", r"a\.csv:2: not UTF-8"),
        (b'inputs,targets\na,b\n"c,d\ne,f\n', r"a\.csv:3: unexpected end of data: a value that"),
        (b'inputs,targets\na,"b" c\n', r"a\.csv:2: ',' expected after '\"'"),
        (b"input,targets\na,b\n", r"a\.csv:2: the field 'inputs' is missing, there are only \['in"),
    ],
)
def test_a_bad_table_is_named(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        jsonl.jsonl_task(train_file=tmp_path / "a.csv", vocabulary="bytes")


def test_a_template_takes_several_fields():
    row = rows.Row("x", 3, {"question": "why {so}?", "the context": "c", "n": 4})
    taken = rows.Field("q: {question} {{c}}: {the context}")
    assert taken.text(row) == taken.value(row) == "q: why {so}? {c}: c"
    assert rows.Field("question").text(row) == "why {so}?"
    assert rows.Field("n").value(row) == 4
    with pytest.raises(ValueError, match="x:3: the field 'context' is missing, there are only"):
        rows.Field("{question} {context}").text(row)
    for given in ("n", "{n}"):
        with pytest.raises(ValueError, match="x:3: 'n' must be a string: 4"):
            rows.Field(given).text(row)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{a.b}", "nothing but names of fields in its braces"),
        ("{a[0]}", "nothing but names"),
        ("{a!r}", "nothing but names"),
        ("{a:>{b}}", "nothing but names"),
        ("{} {}", "nothing but names"),
        ("{a", "expected '}' before end of string; a brace of the text is written twice"),
        ("a}", "Single '}' encountered"),
        ("{{a}}", "names no field"),
        ("", "must be a text"),
        (3, "must be a text"),
    ],
)
def test_templates_hold_names_alone(given, message):
    with pytest.raises(ValueError, match=rf"INPUT_FIELD.*{message}"):
        rows.Field(given, "INPUT_FIELD")


def test_labels_are_a_column(tmp_path):
    path = write(tmp_path / "a.csv", [{"text": "a", "y": "3"}, {"text": "b", "y": "no"}])
    assert read_labels(path, "y") == ("3", "no")
    given = {"train_file": path, "vocabulary": "bytes", "fields": ("text", "y")}
    task = jsonl.TASKS[labelled_task(**given, labels=("3", "no"))]
    assert [x["targets"].tolist() for x in task.examples("train")] == [[0], [1]]
    with pytest.raises(ValueError, match=r"a\.csv:3: the label must be a finite number: 'no'"):
        labelled_task(**given, labels=())
    write(path, [{"text": "a", "y": "0.5"}, {"text": "b", "y": "-2"}])
    task = jsonl.TASKS[labelled_task(**given, labels=())]
    assert [x["targets"].tolist() for x in task.examples("train")] == [[0.5], [-2.0]]


def test_requests_keep_the_other_fields_of_their_rows(tmp_path):
    path = write(tmp_path / "a.tsv", TABLE, delimiter="\t")
    assert requests(path, "inputs") == TABLE
    found = requests(path, "image", "{id}: {targets}")
    assert found == [{**row, "image": f"{row['id']}: {row['targets']}"} for row in TABLE]
    (tmp_path / "a.jsonl").write_text('{"inputs": "one\\ntwo", "id": [3]}\n')
    assert requests(tmp_path / "a.jsonl", "inputs") == [{"inputs": "one\ntwo", "id": [3]}]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the field 'audio' is missing"):
        requests(tmp_path / "a.jsonl", "audio")
    with pytest.raises(ValueError, match=r"a\.tsv:6: no id"):
        requests(path, "inputs", None, lambda row: None if row["id"] else "no id")


def test_half_of_a_pair_of_escapes_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    for half in (
        '{"inputs": "\\ud83d"}',
        '{"inputs": "x", "\\uDE00": 1}',
        '{"inputs": ["\\ud83d"]}',
    ):
        path.write_text('{"inputs": "\\ud83d\\ude00"}\n' + half)
        with pytest.raises(ValueError, match=r"a\.jsonl:2: half of a pair of \\u escapes"):
            requests(path, "inputs")


LINES = {
    b"x\ny": ["x", "y"],
    b"x\r\ny\r\n": ["x", "y"],
    b"x\ry\n": ["x\ry"],  # one line, as in every other reader
    b"x\r\r\n\n": ["x\r", ""],
    b"\xef\xbb\xbfx\n\xef\xbb\xbfy": ["x", "\ufeffy"],
    "x\u2028y\x0c\x85\n".encode(): ["x\u2028y\x0c\x85"],
    b"one\n\n two\x0cand \n": ["one", "", " two\x0cand "],
}


@pytest.mark.parametrize("typed", LINES)
def test_lines_of_text_and_of_standard_input_are_requests(tmp_path, monkeypatch, typed):
    expected = [{"inputs": line} for line in LINES[typed]]
    (tmp_path / "a.txt").write_bytes(typed)
    assert requests(tmp_path / "a.txt", "inputs") == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed)))
    assert requests("-", "inputs") == expected


def test_bad_lines_of_text_are_named(tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    for content, message in (
        (b"fine\nso \xff\n", ":2: not UTF-8: invalid start"),
        (b"", ": there"),
    ):
        text.write_bytes(content)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        for name, place in (("-", "^standard input"), (text, r"a\.txt")):
            with pytest.raises(ValueError, match=place + message):
                requests(name, "inputs")
    with pytest.raises(ValueError, match="INPUT_FIELD='x' has no effect: lines of text have no"):
        requests(text, "inputs", "x")


class Arriving(io.RawIOBase):
    """Standard input whose parts come one after the other."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = [*parts]

    def readable(self):
        return True

    def readinto(self, buffer):
        part = self.parts.pop(0) if self.parts else b""
        buffer[: len(part)] = part
        return len(part)


def test_lines_of_standard_input_come_as_soon_as_they_are_whole(monkeypatch):
    stdin = Arriving(b"a\n", b"b", b"c\nd\ne", b"\xc3", b"\xbc\n", b"f", b"\xff")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(stdin)))
    found = rows.read_requests("-", "inputs")
    for lines, left in ((["a"], 6), (["bc", "d"], 4), (["eü"], 2)):
        assert next(found) == [{"inputs": line} for line in lines]
        assert len(stdin.parts) == left
    with pytest.raises(ValueError, match=r"^standard input:5: not UTF-8"):
        next(found)
    monkeypatch.setattr("sys.stdin", io.StringIO("ü\nb"))  # as in a notebook
    assert [*rows.read_requests("-", "inputs")] == [[{"inputs": "ü"}], [{"inputs": "b"}]]
