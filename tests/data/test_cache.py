"""The cache file gives back what was written, and cannot lie."""

import json

import numpy as np
import pytest

from coda_jax.data.cache import CACHE_FORMAT, read_cache, write_cache

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


def arrays(**changed):
    return {
        "metadata": np.array(json.dumps({"format": CACHE_FORMAT})),
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
