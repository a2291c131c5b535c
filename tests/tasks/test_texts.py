"""Texts of one's own: which files are read, which texts are in a split, and what is wrong named."""

import itertools
import json
import re

import pytest
import seqio
import tensorflow as tf

from coda_jax.data import seqio_tasks
from coda_jax.tasks import found_files, pretrain_text, texts

LINES = [f"Line {i} with ü.\n" for i in range(64 * 200 + 10)]
RECORDS = ["".join(LINES[i : i + 64]) for i in range(0, len(LINES), 64)]
ANY = texts.Needed(lambda text: tf.strings.length(text) > 0, "all texts are empty")


def read(split, *, files=None, tfds_name=None, seqio_name=None, field="text", **options):
    """The texts of a split, through what every task over texts reads."""
    (((source,), rate),) = texts.sources(files, tfds_name, seqio_name, field, ANY).values()
    assert rate == 1
    with seqio_tasks.own_errors():
        records = source.get_dataset(split, **{"shuffle": False} | options)
        return [record["text"].decode() for record in records.as_numpy_iterator()]


def both(**given):
    """The sorted texts of (train, validation)."""
    return [sorted(read(split, **given)) for split in ("train", "validation")]


def write(folder, cut=90):
    folder.mkdir()
    (folder / "a.txt").write_text("".join(LINES[: 64 * cut]), encoding="utf-8")
    (folder / "inner").mkdir()
    (folder / "inner" / "b.md").write_text("".join(LINES[64 * cut :]), encoding="utf-8")
    return str(folder)


def test_a_folder_is_read_with_all_in_it_and_split_by_the_texts(tmp_path):
    folder = write(tmp_path / "a [folder]*")
    (tmp_path / "a [folder]*" / ".hidden").write_bytes(b"\xff")
    train, validation = both(files=folder)
    assert sorted(train + validation) == sorted(RECORDS)
    assert 0.01 < len(validation) / len(RECORDS) < 0.12
    # Files of other names, in another order and divided in another way: the same splits.
    other = write(tmp_path / "z", cut=140)
    (tmp_path / "z" / "inner" / "b.md").rename(tmp_path / "z" / "0.rst")
    assert both(files=other) == [train, validation]
    # JSONL, too.
    file = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text, "other": 1}) for text in RECORDS]
    file.write_text("\n\n".join(lines[::-1]) + "\n")
    assert both(files=str(file)) == [train, validation]


def test_a_file_a_glob_or_several_are_read_once_each(tmp_path):
    folder = write(tmp_path / "texts")
    expected = both(files=folder)
    glob = f"{folder}/**/*.*"
    for given in (glob, (f"{folder}/a.txt", f"{folder}/inner"), [glob, folder], (tmp_path,)):
        assert both(files=given) == expected
    assert [file.name for file in found_files.find("TEXTS", glob)] == ["a.txt", "inner/b.md"]
    assert [file.name for file in found_files.find("TEXTS", folder, (".md",))] == ["inner/b.md"]


def test_links_are_read_once_and_those_to_nothing_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("text\n")
    (tmp_path / "same.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    spellings = (str(tmp_path), f"{tmp_path}/**/*", f"{tmp_path}/./a.txt")
    for given in (*spellings, spellings):
        assert [file.name for file in found_files.find("TEXTS", given)] == ["a.txt"], given
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"TEXTS: .*gone\.txt is a link to nothing"):
        found_files.find("TEXTS", str(tmp_path))


def test_a_field_of_files_that_have_none_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text\n")
    with pytest.raises(ValueError, match="TEXT_FIELD='body' has no effect: none of TEXTS="):
        read("train", files=str(tmp_path), field="body")


def test_the_order_follows_the_seed_and_the_stream(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"text {i}\n")
    (((one, two), _),) = texts.sources(str(tmp_path), None, None, "text", ANY, streams=2).values()

    def order(source, seed):
        records = source.get_dataset("train", shuffle=True, seed=seed).as_numpy_iterator()
        return [record["text"] for record in records]

    assert order(one, 3) == order(one, 3)
    assert len({tuple(order(source, seed)) for source in (one, two) for seed in (3, 7)}) == 4


def test_processes_share_the_files(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text {i}\n")
    shards = [
        read("train", files=str(tmp_path), shard_info=seqio.ShardInfo(i, 4)) for i in range(4)
    ]
    assert sorted(itertools.chain(*shards)) == sorted(read("train", files=str(tmp_path)))
    assert all(shards)


def test_a_process_whose_files_lack_a_split_has_no_examples_of_it(tmp_path):
    """As others of a run may have them."""
    (tmp_path / "a.txt").write_text("one text\n")
    (tmp_path / "b.txt").write_text("".join(f"line {i}\n" * 64 for i in range(100)))
    name = pretrain_text.task("bytes", files=str(tmp_path))
    lengths = {"inputs": 32, "targets": 16}
    found = [
        list(
            seqio.get_mixture_or_task(name).get_dataset(
                lengths, "validation", shard_info=seqio.ShardInfo(i, 2), num_epochs=1
            )
        )
        for i in range(2)
    ]
    assert sorted(map(bool, found)) == [False, True]


def test_a_validation_split_is_no_larger_than_an_evaluation_can_be(tmp_path, monkeypatch):
    folder = write(tmp_path / "texts")
    monkeypatch.setattr(texts, "MAX_VALIDATION", 3)
    assert len(read("validation", files=folder)) == 3


def test_the_records_of_a_task_or_mixture_are_read_before_its_own_steps():
    columns = {"body": RECORDS, "inputs": RECORDS, "targets": RECORDS}
    source = seqio_tasks.MemorySource(lambda _: columns, ("train",))
    vocabulary = seqio_tasks.seqio_vocabulary("bytes")
    steps = [seqio.preprocessors.tokenize]
    for name in ("one", "two"):
        seqio_tasks.add_task(name, source, steps, vocabulary)
    seqio.MixtureRegistry.add("both", [("one", 1.0), ("two", 3.0)])
    train, validation = both(seqio_name="one", field="body")
    assert sorted(train + validation) == sorted(RECORDS)
    found = texts.sources(None, None, "both", "body", ANY)
    assert {name: rate for name, (_, rate) in found.items()} == {"one": 1.0, "two": 3.0}
    with pytest.raises(ValueError, match=r"TEXT_FIELD='text' is no text of its .* \['body', "):
        read("train", seqio_name="one")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Give one of TEXTS, TFDS_NAME, SEQIO_NAME, got none"),
        (
            {"files": "a", "tfds_name": "c4/en:3.1.0"},
            "Give one of .*, got TEXTS='a' and TFDS_NAME='c4/en:3.1.0'",
        ),
        ({"files": 7}, r"TEXTS\[0\] must be a text that is not empty, got 7"),
        ({"files": ()}, "TEXTS must be a tuple that is not empty"),
        ({"seqio_name": "stdlib_modul"}, "no task or mixture 'stdlib_modul' is registered"),
        ({"tfds_name": "c4/en"}, "version"),
        ({"seqio_name": "x", "field": ""}, "TEXT_FIELD must be a text that is not empty"),
    ],
)
def test_a_source_that_cannot_be_is_refused_at_once(given, message):
    rest = {"files": None, "tfds_name": None, "seqio_name": None, "field": "text"}
    with pytest.raises(ValueError, match=message):
        texts.sources(**rest | given, needed=ANY)


def test_places_without_files_and_empty_files_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    for given in ("nowhere", f"{tmp_path}/folder", f"{tmp_path}/*.txt"):
        expected = re.escape(f"TEXTS={given!r}: there are no files")
        with pytest.raises(FileNotFoundError, match=expected):
            texts.sources(given, None, None, "text", ANY)
    (tmp_path / "folder" / "empty.txt").touch()
    for given in (f"{tmp_path}/folder", f"{tmp_path}/folder/empty.txt"):
        with pytest.raises(ValueError, match=rf"TEXTS='{given}': every file is empty, of 1"):
            texts.sources(given, None, None, "text", ANY)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\n\xff\n", r"a\.txt:2: not UTF-8: invalid start byte"),
        ("a.jsonl", b'{"text": "x y z"}\n{"test": "x"}\n', r"a\.jsonl:2: .* no field 'text'"),
        ("a.jsonl", b'{"text": "x y z"}\n\n[1]\n', r"a\.jsonl:3: there is no field 'text'"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: 'text' must be a string, not 3"),
        ("a.jsonl", b'{"text": \n', r"a\.jsonl:1: not JSON: Expecting value"),
        ("a.jsonl", b'\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', r"a\.jsonl:1: half of a pair of \\u escapes"),
    ],
)
def test_a_bad_line_is_named_with_its_file(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read("train", files=str(tmp_path))
    assert len(str(error.value).splitlines()) == 1


def test_a_split_without_a_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a line\n")
    counts = []
    for split in ("train", "validation"):
        try:
            counts.append(len(read(split, files=str(tmp_path))))
        except ValueError as error:
            said = f"TEXTS='{tmp_path}': no text is in the split '{split}'"
            assert said in str(error) and "EVAL_TASK_NAME=None" in str(error)
            counts.append(0)
    assert sorted(counts) == [0, 1]


def test_errors_that_are_not_of_a_dataset_s_own_code_stay_what_they_are():
    with pytest.raises(tf.errors.InvalidArgumentError), seqio_tasks.own_errors():
        tf.debugging.assert_equal(1, 2)


def test_carriage_returns_within_lines_are_a_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\rtwo\r\nthree\n" + b"x\n" * 100)
    source = texts.TextFiles([str(tmp_path / "a.txt")], "text")
    found = [x["text"] for x in source.get_dataset("train", shuffle=False).as_numpy_iterator()]
    assert found == [b"one\rtwo\nthree\n" + b"x\n" * 62, b"x\n" * 38]
