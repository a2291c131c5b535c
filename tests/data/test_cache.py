"""The cache file gives back what was written, and cannot lie."""

import json
import tracemalloc
import zipfile

import numpy as np
import pytest

from coda_jax.data import cache
from coda_jax.data.cache import CACHE_FORMAT, read_cache, write_cache

OLDER = "coda_jax examples 1"  # the format without a checksum

LENGTHS = {"inputs": 24, "targets": 9}


def random_examples(count):
    rng = np.random.default_rng(0)

    def tokens(limit):
        return rng.integers(1, 50, rng.integers(1, limit + 1))

    return [{key: tokens(limit) for key, limit in LENGTHS.items()} for _ in range(count)]


def test_cache_gives_back_what_was_written(tmp_path):
    examples = [*random_examples(20), {"inputs": np.zeros(0, int), "targets": np.array([1])}]
    path = tmp_path / "folder" / "cache.npz"
    metadata = {"task": "a", "feature_lengths": LENGTHS, "umlaut": "ä"}
    assert write_cache(path, iter(examples), metadata) == 21
    cached, read = read_cache(path)
    assert read == metadata
    assert len(cached) == 21
    for a, b in zip(cached, examples, strict=True):
        np.testing.assert_array_equal(a["inputs"], b["inputs"])
        np.testing.assert_array_equal(a["targets"], b["targets"])
    np.testing.assert_array_equal(cached[-2]["inputs"], examples[-2]["inputs"])
    with pytest.raises(IndexError):
        cached[21]
    assert [p.name for p in path.parent.iterdir()] == ["cache.npz"]


def test_an_interrupted_write_leaves_the_old_cache(tmp_path):
    path = tmp_path / "cache.npz"
    write_cache(path, random_examples(3), {})
    before = path.read_bytes()

    def broken():
        yield from random_examples(2)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_cache(path, broken(), {})
    with pytest.raises(ValueError, match="No examples"):
        write_cache(path, [], {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def described(**fields):
    return np.array(json.dumps({"format": OLDER, **fields}))


def arrays(**changed):
    return {
        "metadata": described(),
        "inputs_tokens": np.arange(5),
        "inputs_offsets": np.array([0, 2, 5]),
        "targets_tokens": np.arange(3),
        "targets_offsets": np.array([0, 1, 3]),
        **changed,
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metadata": np.array("{")}, "metadata"),
        ({"metadata": np.array('{"task": 1}')}, "format"),
        ({"metadata": np.array('{"format": "other"}')}, "format 'other'"),
        ({"inputs_offsets": np.array([0, 2, 6])}, "inputs_offsets ends at 6"),
        ({"inputs_offsets": np.array([0, 6, 5])}, "inputs_offsets do not rise"),
        ({"targets_offsets": np.array([0, 3])}, "different numbers of examples"),
        ({"targets_tokens": None}, r"lacks \['targets_tokens'\]"),
        ({"metadata": described(format=CACHE_FORMAT)}, "is damaged: its SHA-256 is missing"),
        ({"metadata": np.array("[" * 5000)}, "nested too deep"),
        ({"metadata": np.array(["a"])}, "metadata without a format"),
        # Values that cannot be right.
        ({"inputs_tokens": np.arange(-1, 4)}, r"inputs_tokens holds the id -1; .* 0 to 2147483647"),
        (
            {"metadata": described(vocab_size=4)},
            "inputs_tokens holds the id 4; the vocabulary has 0 to",
        ),
        ({"targets_tokens": np.array([1, np.nan, 2])}, "targets_tokens holds numbers that are not"),
        ({"metadata": described(vocab_size=-1)}, "vocab_size must be a whole number"),
        ({"metadata": described(vocab_size=20, eos_id=20)}, "eos_id must be a whole number from 0"),
        ({"metadata": described(unk_id="x")}, "unk_id must be a whole number"),
        ({"metadata": described(vocabulary=3)}, "vocabulary must be a text"),
        ({"metadata": described(feature_lengths=[9])}, "feature_lengths must be a dict"),
        (
            {"metadata": described(feature_lengths={"inputs": 0})},
            r"feature_lengths\['inputs'\] must",
        ),
        # Arrays of unknown kinds.
        ({"inputs_tokens": np.array([{"a": 1}] * 5)}, "inputs_tokens holds object"),
        ({"inputs_tokens": np.array(["a"] * 5)}, "inputs_tokens holds <U1"),
        ({"inputs_tokens": np.zeros(5, complex)}, "inputs_tokens holds complex128"),
        ({"inputs_tokens": np.zeros(5, [("a", int)])}, "inputs_tokens holds"),
        ({"inputs_offsets": np.array([0.0, 2, 5])}, "inputs_offsets holds float64"),
        ({"inputs_offsets": np.array(5)}, "inputs_offsets do not rise from 0"),
        ({"inputs_tokens": np.zeros((5, 1, 1))}, r"inputs_tokens has the shape \(5, 1, 1\)"),
        ({"metadata": np.arange(3)}, "metadata holds int64"),
    ],
)
def test_a_cache_that_does_not_fit_together_is_refused(tmp_path, changed, message):
    path = tmp_path / "cache.npz"
    np.savez(path, **{k: v for k, v in arrays(**changed).items() if v is not None})
    with pytest.raises(ValueError, match=message) as e:
        read_cache(path)
    assert str(path) in str(e.value)


def test_files_that_are_no_cache_are_refused(tmp_path):
    good = tmp_path / "good.npz"
    write_cache(good, random_examples(200), {})
    data = good.read_bytes()
    np.save(tmp_path / "array.npy", np.arange(3))
    contents = {
        "cut": data[: len(data) // 2],
        "damaged": data[:300] + bytes(100) + data[400:],
        "empty": b"",
        "text": b"hello",
        "array": (tmp_path / "array.npy").read_bytes(),
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_cache(path)
    with pytest.raises(FileNotFoundError):
        read_cache(tmp_path / "missing.npz")


def npy(shape, content=b"", dtype="<i4"):
    """A member of an npz file that says it has a shape."""
    head = str({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + content


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("inputs_tokens", b"text", r"lacks \['inputs_tokens'\]"),  # whose name has no ending
        ("inputs_tokens.npy", b"text" * 9, "the magic string is not correct"),
        ("inputs_tokens.npy", b"", "is not a readable npz file"),
        ("inputs_tokens.npy", npy((2**40,)), "has another number of bytes"),
        ("inputs_tokens.npy", npy((-1,)), "has another number of bytes"),
        ("inputs_tokens.npy", npy((5,), bytes(24)), "has another number of bytes"),
        ("inputs_tokens.npy", npy((5,), dtype="|O"), "holds object"),
        ("inputs_tokens.npy", b"\x93NUMPY\x09\x00" + bytes(20), "version"),
    ],
)
def test_members_that_are_no_arrays_are_refused(tmp_path, name, content, message):
    path = tmp_path / "cache.npz"
    np.savez(path, **{k: v for k, v in arrays().items() if k != "inputs_tokens"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, content)
    with pytest.raises(ValueError, match=message) as error:
        read_cache(path)
    assert str(path) in str(error.value)


def test_an_encrypted_member_is_refused_and_others_are_not_opened(tmp_path):
    path = tmp_path / "cache.npz"
    np.savez_compressed(path, **arrays(other=np.zeros(2**25, np.uint8)))
    tracemalloc.start()
    assert len(read_cache(path)[0]) == 2
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    content = bytearray(path.read_bytes())
    for start in (b"PK\x03\x04", b"PK\x01\x02"):
        place = content.index(start)
        content[place + (6 if start[2] == 3 else 8)] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a readable npz file: .* is encrypted"):
        read_cache(path)


def test_every_bit_of_a_cache_counts(tmp_path):
    path = tmp_path / "cache.npz"
    write_cache(path, random_examples(2), {})
    assert path.read_bytes()[-71:-64] == b"sha256:"
    content, np_reads = path.read_bytes(), np.load(path)
    assert set(np_reads.files) == arrays().keys()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"cache\.npz"):
            read_cache(path)
    path.write_bytes(content + b"more")
    with pytest.raises(ValueError, match=r"cache\.npz"):
        read_cache(path)


def test_an_array_that_is_packed_to_nothing_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MAX_UNPACKED", 2**20)
    tokens = np.zeros(2**19, np.int32)
    changed = arrays(inputs_tokens=tokens, inputs_offsets=np.array([0, 2, len(tokens)]))
    np.savez_compressed(tmp_path / "cache.npz", **changed)
    with pytest.raises(ValueError, match=r"inputs_tokens has 2,097,152 bytes, packed to .* MAX_"):
        read_cache(tmp_path / "cache.npz")
    tokens = np.random.default_rng(0).integers(1, 4000, 2**19, np.int32)
    np.savez_compressed(tmp_path / "cache.npz", **changed | {"inputs_tokens": tokens})
    assert len(read_cache(tmp_path / "cache.npz")[0]) == 2
